"""Programs compiled ahead of time: what is reported, and what is refused."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import parameterized
import jax
import pytest

from configs import tiny
from nanodlm import config as configs
from nanodlm.perf import compile as ahead
from nanodlm.perf import hlo
from nanodlm.types import InputError

ROOT = pathlib.Path(__file__).parents[2]


def launch(*args):
  return subprocess.run(
    [sys.executable, 'launch.py', '--mode=compile', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


class ReportTest(parameterized.TestCase):
  def test_devices_at_hand(self):
    config = tiny.get_config()
    config.train.batch_size = config.eval.batch_size = 16
    workdir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, workdir)
    report = ahead.compile_config(
      config, configs.validate(config), '', 0, workdir
    )
    saved = json.loads((pathlib.Path(workdir) / ahead.REPORT_FILE).read_text())
    self.assertEqual(saved, report)
    self.assertEqual(report['mesh'], {'data': 8, 'fsdp': 1, 'tensor': 1})
    self.assertEqual(report['num_params'], 123_456)
    size = 4 * report['num_params']
    parts = report['part_bytes']
    self.assertEqual((parts['parameters'], parts['average']), (size, size))
    self.assertBetween(
      parts['optimiser'], 2 * size, 2 * size + 100
    )  # and counts
    self.assertEqual(parts['batch'], 16 * (64 * 2 + 1) * 4 // 8)
    train = report['programs']['train']
    state = sum(parts.values())
    # The step's number and the noise key are not among the parts.
    self.assertBetween(train['argument_bytes'], state, state + 100)
    self.assertGreater(
      train['peak_bytes'],
      train['argument_bytes'] + train['temporary_bytes'] - 1,
    )
    # One sum of all gradients; two halves of the V-wide projection are spared.
    self.assertGreaterEqual(train['collectives']['all-reduce']['bytes'], size)
    self.assertBetween(train['flops'] / report['model_flops'], 0.6, 1.0)
    self.assertBetween(
      report['programs']['eval']['flops'],
      0.1 * train['flops'],
      100 * train['flops'],
    )
    # No one says how much memory a CPU has, nor how many cycles anything takes.
    self.assertIsNone(train['fits'])
    self.assertNotIn('estimated_cycles', train)
    self.assertIn('123,456 parameters', ahead.format_report(report))

  def test_program_that_does_not_fit(self):
    class Lowered:
      def compile(self):
        raise jax.errors.JaxRuntimeError(
          'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory '
          'in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded hbm capacity '
          'by 5.75G.'
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
    self.assertIn(
      'peak 21.50 GiB, of 15.75 GiB: DOES NOT FIT', ahead.format_report(report)
    )

  def test_kernels_take_the_larger_time(self):
    cost = hlo.Cost()
    cost.kernels[hlo.Kernel('a', 197e12, 1)] = (
      2  # a second each, at the peak rate
    )
    cost.kernels[hlo.Kernel('b', 0, 819e9)] = 3
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
    settings = configs.validate(config)
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

  def test_mesh_that_does_not_fit(self):
    config = tiny.get_config()
    config.mesh.data = 3
    with self.assertRaisesRegex(InputError, 'the 8 devices'):
      ahead.make_plan(config, configs.validate(config), jax.devices(), 258)

  def test_launch_names_the_mistake(self):
    done = launch('--config=configs/tiny.py', '--topology=v9:2x2')
    self.assertEqual(done.returncode, 2)
    self.assertStartsWith(
      done.stderr, "error: --topology='v9:2x2' is not known"
    )


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="no TPU compiler here: pip install -e '.[tpu]'",
)
def test_pod_that_is_not_there(tmp_path):
  env = {**os.environ, 'XLA_FLAGS': ''}
  # The heads fill 128 lanes: the kernels are compiled too.
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
  # Two layers: attention and two rotations, forward and backward.
  assert train['num_kernel_calls'] == 12 and train['kernel_cycles'] > 0
  assert 0 < train['estimated_cycles'] < 1e8
  assert 0 < report['estimated_utilisation'] < 1
  assert "the compiler's estimate, not a measurement" in done.stdout
