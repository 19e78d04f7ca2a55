"""Tests of programs compiled ahead of time: reports and errors."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from absl.testing import parameterized
import jax
import psutil
import pytest

from configs import tiny
from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm.perf import compile as ahead
from nanodlm.perf import hlo
from nanodlm.types import InputError
from tests import launches

ROOT = pathlib.Path(__file__).parents[2]


def launch(*args):
  return launches.launch('--mode=compile', *args, num_devices=8)


class ReportTest(parameterized.TestCase):
  def test_devices_of_this_machine(self):
    config = tiny.get_config()
    config.train.batch_size = config.eval.batch_size = 16
    run = runs.make_run(configs.make_settings(config)).with_vocabulary(258)
    report = ahead.compile_run(run)
    self.assertEqual(json.loads(json.dumps(report)), report)
    self.assertEqual(report['mesh'], {'data': 8, 'fsdp': 1, 'tensor': 1})
    self.assertEqual(report['num_params'], 123_456)
    size = 4 * report['num_params']
    parts = report['part_bytes']
    self.assertEqual((parts['parameters'], parts['average']), (size, size))
    # The optimiser also counts its steps.
    self.assertBetween(parts['optimiser'], 2 * size, 2 * size + 100)
    self.assertEqual(parts['batch'], 16 * (64 * 5 + 3 * 4) // 8)
    train = report['programs']['train']
    state = sum(parts.values())
    # The parts leave out the number of the step and the noise key.
    self.assertBetween(train['argument_bytes'], state, state + 100)
    self.assertGreater(
      train['peak_bytes'],
      train['argument_bytes'] + train['temporary_bytes'] - 1,
    )
    # All gradients are summed once. Half of the positions skip the projection.
    self.assertGreaterEqual(train['collectives']['all-reduce']['bytes'], size)
    self.assertBetween(train['flops'] / report['model_flops'], 0.6, 1.0)
    self.assertBetween(
      report['programs']['eval']['flops'],
      0.1 * train['flops'],
      100 * train['flops'],
    )
    # The devices of a CPU share the machine's memory.
    total = psutil.virtual_memory().total
    self.assertAlmostEqual(
      train['capacity_bytes'], total / report['num_devices']
    )
    self.assertTrue(train['fits'])
    self.assertNotIn('estimated_cycles', train)
    self.assertIn('123,456 parameters', ahead.format_report(report))

  def test_program_that_does_not_fit(self):
    class Lowered:
      def compile(self):
        raise jax.errors.JaxRuntimeError(
          'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of '
          'memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded hbm '
          'capacity by 5.75G.'
        )

    row = ahead.report_program(Lowered(), None, None)
    self.assertFalse(row['fits'])
    self.assertEqual(row['peak_bytes'], 21.5 * 2**30)
    self.assertEqual(row['capacity_bytes'], 15.75 * 2**30)
    report = {
      'num_devices': 1,
      'device': 'd',
      'topology': '',
      'mesh': {},
      'num_params': 1,
      'tokens_per_step': 1,
      'model_flops': 1.0,
      'part_bytes': {},
      'programs': {'train': row},
    }
    text = ahead.format_report(report)
    self.assertIn('train: DOES NOT FIT', text)
    self.assertRegex(text, r'21\.50 +15\.75')

  def test_kernels_take_the_larger_time(self):
    cost = hlo.Cost()
    # Each call takes a second, by its FLOPs or by its bytes.
    cost.kernels[hlo.Kernel(197e12, 1)] = 2
    cost.kernels[hlo.Kernel(0, 819e9)] = 3
    self.assertAlmostEqual(
      ahead.kernel_cycles(cost, ahead.CHIPS['v5e']), 5 * 1.5e9
    )

  def test_chip_of_a_device(self):
    self.assertIs(ahead.find_chip('TPU v5 lite'), ahead.CHIPS['v5e'])
    self.assertIs(ahead.find_chip('TPU v5'), ahead.CHIPS['v5p'])
    self.assertIsNone(ahead.find_chip('cpu'))

  def test_vocabulary_without_data(self):
    config = tiny.get_config()
    config.tokenizer.name, config.tokenizer.vocab_size = 'sentencepiece', 2048
    settings = configs.make_settings(config)
    self.assertEqual(ahead.find_vocab_size(settings, 0), 2050)
    self.assertEqual(ahead.find_vocab_size(settings, 7), 7)
    with self.assertRaisesRegex(InputError, '--vocab_size=1 must be >= 2'):
      ahead.find_vocab_size(settings, 1)


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters('v5e:3x5', 'v9:2x2', 'v5p:4x4', 'v5e')
  def test_unknown_topology(self, topology):
    with self.assertRaisesRegex(InputError, 'v5e: 1x1, 2x2'):
      ahead.use_topology(topology)

  def test_without_the_compiler(self):
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'libtpu' else find(name),
      )
      with self.assertRaisesRegex(InputError, r"pip install -e '.\[tpu\]'"):
        ahead.use_topology('v5e:4x4')

  def test_launch_names_the_mistake(self):
    status, output = launch('--config=configs/tiny.py', '--topology=v9:2x2')
    self.assertEqual(status, 2)
    self.assertStartsWith(output, "error: --topology='v9:2x2' is unknown")

  def test_launch_checks_the_batch(self):
    status, output = launch(
      '--config=configs/tiny.py',
      '--config.train.batch_size=3',
      '--config.train.num_microbatches=2',
    )
    self.assertEqual(status, 2)
    self.assertStartsWith(output, 'error: train.batch_size=3 must be')


def test_launch_on_this_machine(tmp_path):
  status, output = launch(
    '--config=configs/tiny.py',
    '--config.train.batch_size=16',
    f'--workdir={tmp_path / "new"}',
  )
  assert status == 0, output
  assert '123,456 parameters' in output
  report = json.loads((tmp_path / 'new' / ahead.REPORT_FILE).read_text())
  assert set(report['programs']) == {'train', 'eval', 'sample'}


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU compiler: pip install -e '.[tpu]'",
)
def test_pod_that_does_not_exist(tmp_path):
  env = {**os.environ, 'XLA_FLAGS': ''}
  # Heads of 128 fill the lanes, so that the Pallas kernels are compiled.
  done = subprocess.run(
    [
      sys.executable,
      'launch.py',
      '--mode=compile',
      '--config=configs/tiny.py',
      '--topology=v5e:2x2',
      f'--workdir={tmp_path}',
      '--config.model.embed_dim=128',
      '--config.data.length=128',
      '--config.model.attention=pallas',
    ],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / ahead.REPORT_FILE).read_text())
  assert report['device'] == 'TPU v5 lite' and report['num_devices'] == 4
  train = report['programs']['train']
  assert train['fits'] and train['capacity_bytes'] == 15.75 * 2**30
  # Two layers of attention and two rotations, each forward and backward.
  assert train['num_kernel_calls'] == 12 and train['kernel_cycles'] > 0
  assert 0 < train['estimated_cycles'] < 1e8
  assert 0 < report['estimated_utilisation'] < 1
  assert 'not a measurement' in done.stdout
