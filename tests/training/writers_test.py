"""Tests of what nanodlm.train reports."""

import io
import signal

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import PIL.Image
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from nanodlm.devices import mesh as meshes
from nanodlm.training import signals, writers


def test_events_are_those_that_tensorboard_reads(tmp_path):
  image = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
  with writers.open_writers(str(tmp_path), {}, '') as writer:
    writer.write_hparams({'model.num_layers': 2, 'optim.name': 'muon'})
    writer.write_scalars(3, {'a': 0.5, 'b': jax.numpy.float32(2)})
    writer.write_scalars(4, {'a': np.inf})
    writer.write_texts(3, {'sample': 'é *'})
    writer.write_images(3, {'order': image})
    writer.write_histograms(3, {'kernel': np.arange(31.0)})
  events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
  values = {
    tag: [
      (event.step, tensor_util.make_ndarray(event.tensor_proto))
      for event in events.Tensors(tag)
    ]
    for tag in events.Tags()['tensors']
  }
  assert values['a'] == [(3, 0.5), (4, np.inf)]
  assert values['b'] == [(3, 2)]
  assert values['sample'] == [(3, 'é *'.encode())]
  [(step, parts)] = values['order']
  assert step == 3 and list(parts[:2]) == [b'4', b'2']
  shown = np.asarray(PIL.Image.open(io.BytesIO(parts[2])))
  np.testing.assert_array_equal(shown, image[0])
  [(step, buckets)] = values['kernel']  # left and right edge, count
  assert step == 3 and buckets.shape == (30, 3)
  np.testing.assert_allclose(buckets[:, 0], np.arange(30))
  assert buckets[:, 2].tolist() == [1] * 29 + [2]
  kinds = {
    tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in values
  }
  hparams = kinds.pop('_hparams_/session_start_info')
  assert hparams == 'hparams' and kinds == {
    'a': 'scalars',
    'b': 'scalars',
    'sample': 'text',
    'order': 'images',
    'kernel': 'histograms',
  }
  metadata = events.SummaryMetadata('_hparams_/session_start_info')
  content = plugin_data_pb2.HParamsPluginData.FromString(
    metadata.plugin_data.content
  ).session_start_info.hparams
  assert content['model.num_layers'].number_value == 2
  assert content['optim.name'].string_value == 'muon'
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert lines == ['{"step": 3, "a": 0.5, "b": 2.0}', '{"step": 4, "a": null}']


def test_a_line_that_was_cut_does_not_swallow_the_next(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  for text, before in (
    ('', ''),
    ('{"a": 1}\n', '{"a": 1}\n'),
    ('{"a', '{"a\n'),
  ):
    path.write_text(text)
    with writers.open_writers(str(tmp_path), {}, '') as writer:
      writer.write_scalars(3, {'b': 0.5})
    assert path.read_text() == before + '{"step": 3, "b": 0.5}\n'


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
