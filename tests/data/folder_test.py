"""Tests of nanodlm.data.folder: interrupted and concurrent preparations."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types
from unittest import mock

from absl.testing import absltest, parameterized

from nanodlm.data import encoder, folder, prepare
from nanodlm.types import InputError
from tests.data.cases import DataTest, REPO

# A program that prepares what its arguments say, in a process of its own.
PROGRAM = """
import json, sys, time, types
if {no_tensorflow}:
  import importlib.machinery
  finder = importlib.machinery.PathFinder
  find = finder.find_spec
  finder.find_spec = lambda name, path=None, target=None: (
      None if name.split('.')[0] == 'tensorflow' else find(name, path, target))
import logging
from nanodlm import config
from nanodlm.data import encoder, pipeline, prepare
class Wait(logging.Handler):
  def emit(self, record):
    if 'encoding' in record.getMessage():
      print('working', flush=True)
      time.sleep({sleep})
log = logging.getLogger('nanodlm')
log.setLevel(logging.INFO)
log.addHandler(Wait())
log.propagate = False
encoder.PROGRESS_SECS = 0
data = config.DataConfig(
    source={source!r}, eval_source='', length=16, eval_fraction=0.1,
    eval_tokens=0, test_tokens=0, data_dir={data_dir!r},
    crop='random', long_documents='drop', segment_ids=True, padding='eos',
    clean_prefix_rate=0.0, clean_infill_rate=0.0, num_threads=1,
    prefetch_batches=1)
tokenizer = config.TokenizerConfig(name='bytes', path='', vocab_size=0)
packed = prepare.prepare(data, tokenizer)
batch = next(pipeline.make_train_iterator(packed, data, seed=0, batch_size=2))
assert batch.tokens.shape == (2, 16)
assert len(list(pipeline.make_eval_batches(packed, data, batch_size=2)))
assert 'tensorflow' not in sys.modules
print('rows', len(packed.train), flush=True)
"""


class FolderTest(DataTest):
  def run_program(self, no_tensorflow=False, sleep=0, **popen):
    program = PROGRAM.format(
      no_tensorflow=no_tensorflow,
      sleep=sleep,
      data_dir=self.data_dir,
      source=f'text:{self.folder}/*.txt',
    )
    return subprocess.Popen(
      [sys.executable, '-c', program],
      cwd=REPO,
      stdout=subprocess.PIPE,
      text=True,
      **popen,
    )

  def test_killed_preparation_leaves_nothing_that_looks_finished(self):
    self.write_documents()
    process = self.run_program(sleep=600)
    self.assertEqual(process.stdout.readline(), 'working\n')
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = self.left_in_data_dir()
    self.assertTrue(any('.incomplete-' in name for name in left), left)
    packed = self.prepare()
    self.assertLen(packed.train, 128)
    self.assertEqual(
      self.left_in_data_dir(), [os.path.basename(packed.folders[0])]
    )

  def test_only_old_leftovers_are_removed(self):
    self.write_documents()
    root = pathlib.Path(self.data_dir)
    recent, stale = (root / f'text-{x}.incomplete-host' for x in 'xy')
    recent.mkdir(parents=True)
    stale.mkdir()
    (stale / 'part-0.tokens').write_text('')
    os.utime(stale, (time.time() - 1e6,) * 2)
    packed = self.prepare()
    expected = [recent.name, os.path.basename(packed.folders[0])]
    self.assertSameElements(self.left_in_data_dir(), expected)

  @parameterized.parameters(errno.ENOLCK, errno.EOPNOTSUPP)
  def test_file_system_without_locks(self, code):
    self.write_documents()
    error = OSError(code, 'no locks')
    with mock.patch('fcntl.flock', side_effect=error):
      self.assertLen(self.prepare().train, 128)

  def test_two_processes_at_once(self):
    self.write_documents()
    processes = [self.run_program(sleep=0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    self.assertEqual([process.returncode for process in processes], [0, 0])
    self.assertTrue(all('rows 128' in output for output in outputs), outputs)
    # One of them worked, the other waited.
    self.assertEqual(sum('working' in output for output in outputs), 1)
    self.assertLen(self.left_in_data_dir(), 1)

  def test_another_machine_finishes_first(self):
    self.write_documents()
    finish = folder._publish

    def late(work, path):
      shutil.copytree(work, path)
      finish(work, path)

    with mock.patch.object(folder, '_publish', late):
      packed = self.prepare()
    self.assertLen(packed.train, 128)
    self.assertEqual(
      self.left_in_data_dir(), [os.path.basename(packed.folders[0])]
    )

  @parameterized.parameters('file', '/proc/nanodlm')
  def test_data_dir_that_cannot_be_written(self, data_dir):
    self.write_documents()
    data_dir = (
      os.path.join(self.write('file', 'in the way'), 'x')
      if (data_dir == 'file')
      else data_dir
    )
    with self.assertRaisesRegex(
      InputError, 'data.data_dir=.*cannot be written'
    ):
      self.prepare(data_dir=data_dir)

  def test_full_disk(self):
    self.write_documents()
    usage = types.SimpleNamespace(total=1, used=1, free=100)
    with mock.patch.object(prepare.shutil, 'disk_usage', return_value=usage):
      with self.assertRaisesRegex(InputError, 'the disk is full'):
        self.prepare()
    with mock.patch.object(encoder, 'encode', side_effect=OSError(28, 'full')):
      with self.assertRaisesRegex(InputError, 'the disk is full'):
        self.prepare()
    self.assertEmpty(self.left_in_data_dir())

  def test_environment_says_where(self):
    self.write_documents()
    with mock.patch.dict(os.environ, NANODLM_DATA_DIR=self.data_dir):
      packed = self.prepare(data_dir='')
    self.assertEqual(os.path.dirname(packed.folders[0]), self.data_dir)

  def test_without_tensorflow(self):
    self.write_documents()
    process = self.run_program(no_tensorflow=True)
    output, _ = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 0)
    self.assertIn('rows 128', output)

  def test_prints_nothing(self):
    self.write_documents()
    process = self.run_program(stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=60)
    self.assertEqual(set(output.splitlines()), {'working', 'rows 128'})
    self.assertEmpty(errors)


if __name__ == '__main__':
  absltest.main()
