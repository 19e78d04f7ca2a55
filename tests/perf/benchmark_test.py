"""The benchmark runs without TensorFlow and prints figures that agree."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# None in sys.modules makes an import of the name fail.
BLOCKED = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'grain', 'orbax'):
  sys.modules[name] = None
from absl import app
from nanodlm.perf import benchmark
app.run(benchmark.main)
"""


def run(*args):
  return subprocess.run(
    [sys.executable, '-c', BLOCKED, *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, 'XLA_FLAGS': ''},
    check=False,
  )


def test_figures_agree(tmp_path):
  picture = tmp_path / 'shares.png'
  plot = [f'--plot={picture}'] if importlib.util.find_spec('matplotlib') else []
  done = run(
    '--config=configs/tiny.py',
    '--json',
    '--num_timed=2',
    '--samplers=fixed_count',
    '--num_samples=2',
    *plot,
  )
  assert done.returncode == 0, done.stderr
  assert not plot or picture.read_bytes()[:4] == b'\x89PNG'
  results = json.loads(done.stdout)
  train, sample = results['train'], results['sample/fixed_count']
  # 258 x 64 embeddings; two layers of 4 x 64^2 + 3 x 64 x 192 and norms.
  assert train['num_params'] == 123_456
  assert train['tokens_per_sec'] == pytest.approx(8 * 64 / train['median_secs'])
  width, vocab = 64, 258
  layers = 2 * (4 * width**2 + 3 * width * 192)
  flops = (6 * (layers + width * vocab) + 12 * 2 * 64 * width) * 8 * 64
  assert train['flops_per_sec'] == pytest.approx(flops / train['median_secs'])
  assert sample['num_calls'] == 16
  assert sample['tokens_per_sec'] == pytest.approx(
    2 * 64 / sample['median_secs']
  )
  assert results['matmul_flops_per_sec'] > 0 and train['peak_bytes'] > 1e6
  assert results['reference']['tokens_per_sec'] > 0
  # What was compiled does about the work of the model: some of it is saved by
  # scoring half of the positions.
  assert 0.4 * flops < train['least_flops'] < 1.2 * flops
  for row in (train, sample, results['eval']):
    assert row['roofline_share'] == pytest.approx(
      row['roofline_secs'] / row['median_secs']
    )
    assert 0 < row['roofline_share'] < 1.5
  # A call takes the whole row, both of them, and each position is projected once.
  forward = 2 * layers + 4 * 2 * 64 * width
  flops = 16 * 2 * 64 * forward + 2 * 2 * 64 * width * vocab
  assert sample['roofline_secs'] == pytest.approx(
    max(
      flops / results['matmul_flops_per_sec'],
      16 * 4 * train['num_params'] / results['copy_bytes_per_sec'],
    )
  )


@pytest.mark.parametrize('axis', ['data', 'fsdp'])
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
  # Gradients are summed over all devices, or each device's part of them is.
  params = 4 * 123_456
  kind = {'data': 'all-reduce', 'fsdp': 'reduce-scatter'}[axis]
  assert four['collectives'][kind]['bytes'] == pytest.approx(params, rel=0.1)


@pytest.mark.parametrize('value', ['0', 'two', '1,-2'])
def test_scaling_to_no_number(value):
  done = run('--config=configs/tiny.py', f'--scaling={value}')
  assert done.returncode == 2
  assert 'must be whole numbers >= 1' in done.stderr


@pytest.mark.parametrize(
  'args', ['--plot=x.gif', '--plot=no/such/folder/x.png', '--vocab_size=1']
)
def test_bad_flags_are_told_before_anything_is_timed(args):
  done = run('--config=configs/tiny.py', args)
  assert done.returncode == 2
  assert done.stderr.startswith('error: --') and ' must be ' in done.stderr


def test_sampler_that_does_not_fit():
  done = run('--config=configs/tiny.py', '--samplers=ar')
  assert done.returncode == 2
  assert "['ar'] do not fit" in done.stderr
