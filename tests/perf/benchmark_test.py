"""Tests that the benchmark's figures agree, and that it needs no TensorFlow."""

import json
import os
import pathlib
import subprocess
import sys
import types
from unittest import mock

import jax
import pytest

from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm.perf import benchmark
from nanodlm.types import InputError
from tests import launches

ROOT = pathlib.Path(__file__).parents[2]
# None in sys.modules makes an import of the name fail.
BLOCKED = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'clu'):
  sys.modules[name] = None
from nanodlm import __main__
__main__.run()
"""


def run(*args):
  return subprocess.run(
    [sys.executable, '-c', BLOCKED, '--mode=benchmark', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
    env={**os.environ, 'XLA_FLAGS': launches.XLA_FLAGS},
    check=False,
  )


def test_figures_agree():
  done = run(
    '--config=configs/tiny.py',
    '--json',
    '--num_timed=2',
    '--samplers=fixed_count,ancestral',
    '--num_samples=2',
  )
  assert done.returncode == 0, done.stderr
  results = json.loads(done.stdout)
  train = results['train']
  # 258 x 64 embeddings; two layers of 4 x 64^2 + 3 x 64 x 192 and norms.
  assert train['num_params'] == 123_456
  assert train['tokens_per_sec'] == pytest.approx(8 * 64 / train['median_secs'])
  width, vocab = 64, 258
  layers = 2 * (4 * width**2 + 3 * width * 192)
  flops = (6 * (layers + width * vocab) + 12 * 2 * 64 * width) * 8 * 64
  assert train['flops_per_sec'] == pytest.approx(flops / train['median_secs'])
  for name in ('fixed_count', 'ancestral'):
    sample = results[f'sample/{name}']
    # Every sampler takes the other settings of the config's own.
    assert sample['num_calls'] == 16
    tokens_per_sec = 2 * 64 / sample['median_secs']
    assert sample['tokens_per_sec'] == pytest.approx(tokens_per_sec)
  assert results['eval']['num_calls'] == 2
  assert results['matmul_flops_per_sec'] > 0 and train['peak_bytes'] > 1e6
  assert results['reference']['tokens_per_sec'] > 0


@pytest.mark.parametrize('axis', ['data', 'fsdp'])
@pytest.mark.slow
def test_scaling(axis):
  done = run(
    '--config=configs/tiny.py',
    '--json',
    '--scaling=1,4',
    *(
      f'--config.mesh.{name}={-1 if name == axis else 1}'
      for name in ('data', 'fsdp')
    ),
  )
  assert done.returncode == 0, done.stderr
  one, four = json.loads(done.stdout).values()
  assert four['batch_size'] == 4 * one['batch_size']
  assert four['mesh'][axis] == 4
  assert four['flops_per_device'] == pytest.approx(
    one['flops_per_device'], rel=0.02
  )
  parts = {'data': 1, 'fsdp': 4}[axis]
  assert four['state_bytes_per_device'] == pytest.approx(
    one['state_bytes_per_device'] / parts, rel=0.05
  )
  # The gradients are summed over all devices, under fsdp one part per device.
  params = 4 * 123_456
  kind = {'data': 'all-reduce', 'fsdp': 'reduce-scatter'}[axis]
  assert four['collectives'][kind]['bytes'] == pytest.approx(params, rel=0.1)


def refused(*args):
  status, output = launches.launch('--mode=benchmark', *args)
  assert status == 2, output
  return output


@pytest.mark.parametrize('value', ['0', 'two', '1,-2'])
def test_scaling_needs_whole_numbers(value):
  output = refused('--config=configs/tiny.py', f'--scaling={value}')
  assert 'must be whole numbers >= 1' in output


def test_config_and_vocabulary_are_checked():
  assert '--mode=benchmark needs --config' in refused('--num_timed=2')
  output = refused('--config=configs/tiny.py', '--vocab_size=1')
  assert 'error: --vocab_size=1 must be' in output


def test_samplers_that_need_another_network():
  config = configs.load('tiny')
  config.model.conv_size = 3
  settings = configs.make_settings(config)
  run = runs.make_run(settings, devices=jax.devices()[:1])
  run = run.with_vocabulary(258)
  parts = ('time_train', 'time_reference', 'time_eval', 'time_sampler')
  with mock.patch.multiple(
    benchmark,
    **{name: mock.Mock(return_value={}) for name in parts},
    matmul_flops=lambda dtype: 1.0,
  ):
    times = lambda names: benchmark.time_programs(
      run, types.SimpleNamespace(samplers=names, num_timed=1, num_samples=1)
    )
    results = times(None)
    assert 'sample/confidence' in results
    assert 'sample/prefix_cache' not in results
    benchmark.time_train.reset_mock()
    with pytest.raises(InputError, match='model.conv_size=3'):
      times(['confidence', 'prefix_cache'])
    benchmark.time_train.assert_not_called()


def test_sampler_that_does_not_fit():
  output = refused('--config=configs/tiny.py', '--samplers=ar')
  assert "['ar'] do not fit" in output
