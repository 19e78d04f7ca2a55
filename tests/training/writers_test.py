"""Tests of what nanodlm.train reports."""

import signal

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from nanodlm.devices import mesh as meshes
from nanodlm.training import signals, writers


def test_some_values_of_each_parameter():
  mesh = meshes.make_mesh(meshes.MeshConfig(2, 2, 2))
  big = np.random.default_rng(0).permutation(400_000).reshape(400, 1000)
  tree = {'small': np.arange(6.0).reshape(2, 3), 'layers': {'kernel': big}}
  for spec in (P(), P('fsdp', 'tensor')):
    specs = {'small': P(), 'layers': {'kernel': spec}}
    params = jax.device_put(
      tree,
      jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs),
    )
    values = writers.some_values(params)
    assert values.keys() == {'params/small', 'params/layers/kernel'}
    # Each once, however many devices hold a copy.
    np.testing.assert_array_equal(values['params/small'], np.arange(6.0))
    kernel = values['params/layers/kernel']
    assert len(np.unique(kernel)) == len(kernel) == writers.HISTOGRAM_VALUES
    assert abs(kernel.mean() - 200_000) < 3_000


def test_ctrl_c_of_one_of_several_processes_is_a_sigterm(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  arrived = []
  before = {
    signal.SIGTERM: signal.signal(
      signal.SIGTERM, lambda number, _: arrived.append(number)
    ),
    # Ignored in what a shell runs in the background.
    signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
  }
  try:
    with signals.catch():
      signal.raise_signal(signal.SIGINT)
      assert arrived == [signal.SIGTERM]
      with pytest.raises(KeyboardInterrupt):  # the second one
        signal.raise_signal(signal.SIGINT)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
