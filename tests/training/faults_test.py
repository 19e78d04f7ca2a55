"""Tests that a run survives kills, damage, NaN, a second run and clock jumps.

NANODLM_KILLS=50 pytest tests/training/faults_test.py -k killed -s kills a run
50 times.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm.data import pipeline, prepare
from nanodlm.training import checkpoint, checksums
from nanodlm.training.state import TrainState
from nanodlm.types import InputError
from nanodlm.workdir import CHECKPOINTS
from tests import launches, workdirs
from tests.launch_test import arrays, assert_identical, wait_for

NUM_KILLS = int(os.environ.get('NANODLM_KILLS', 2))
NUM_STEPS = 100 + 20 * NUM_KILLS
EVERY_STEPS = 5
# Most of the time a save is in progress, and old checkpoints are deleted.
ARGS = (
  *launches.TINY,
  f'--config.train.num_steps={NUM_STEPS}',
  f'--config.checkpoint.every_steps={EVERY_STEPS}',
  '--config.checkpoint.max_to_keep=2',
)
# The wall clock jumps by a year, back and forth, several times a second.
WILD_CLOCK = """
import time
real, real_ns = time.time, time.time_ns
jump = lambda: 31536000 * (-1) ** int(7 * time.monotonic())
time.time = lambda: real() + jump()
time.time_ns = lambda: real_ns() + jump() * 10 ** 9
"""


def complete(workdir):
  return checksums.complete_steps(workdir / CHECKPOINTS)


def flip_bit(path, at=0.5):
  content = bytearray(path.read_bytes())
  content[int(at * len(content))] ^= 16
  path.write_bytes(content)


def largest_file(folder):
  return max(
    (path for path in folder.rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """An undisturbed run, and the outputs of a second run and of a reader."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  process = launches.start(*ARGS, f'--workdir={workdir}')
  wait_for(lambda: complete(workdir), process)
  # Paused, so that it does not end before the others have started.
  process.send_signal(signal.SIGSTOP)
  second = launches.start(*ARGS, f'--workdir={workdir}')
  reader = launches.start('--mode=eval', f'--workdir={workdir}')
  others = [launches.finish(other) for other in (second, reader)]
  process.send_signal(signal.SIGCONT)
  status, output = launches.finish(process)
  assert status == 0, output
  return workdir, *others


@pytest.mark.slow
def test_second_run_on_a_workdir_is_refused_and_evaluation_is_not(finished):
  _, (status, output), (eval_status, eval_output) = finished
  assert status == 2, output
  assert re.search(
    r'error: --workdir=.* is in use by another training run '
    r'\(process \d+ on ',
    output,
  ), output
  assert 'Traceback' not in output
  assert eval_status == 0 and 'held-out bound' in eval_output, eval_output


@pytest.mark.slow
def test_killed_and_damaged_run_ends_bit_identical(finished, tmp_path):
  reference, *_ = finished
  workdir = tmp_path / 'run'
  folder = workdir / CHECKPOINTS
  seed = int(os.environ.get('NANODLM_KILLS_SEED', 0))
  rng = random.Random(seed)
  unfinished = lambda: list(folder.glob('*.orbax-checkpoint-tmp'))
  last, kills, in_saves = None, 0, 0

  while kills < NUM_KILLS:
    process = launches.start(*ARGS, f'--workdir={workdir}', before=WILD_CLOCK)
    # A kill comes during a save, during training or during the start.
    if kills % 3 < 2:
      wait_for(lambda: complete(workdir)[-1:] not in ([], [last]), process)
    if kills % 3 == 0:
      while process.poll() is None and not unfinished():
        time.sleep(0.0005)  # Without it this loop would take a core.
    time.sleep(rng.uniform(0, (0.03, 0.2, 6)[kills % 3]))
    process.kill()
    status, output = launches.finish(process)
    assert 'DAMAGED' not in output and 'Traceback' not in output, output
    if kills % 3 < 2 and last is not None:
      assert f'at step {last}' in output, output
    assert status == -signal.SIGKILL, f'ended after {kills} kills: {output}'
    kills, in_saves = kills + 1, in_saves + bool(unfinished())
    last = complete(workdir)[-1]
  damaged = folder / str(last)
  flip_bit(largest_file(damaged / 'rest'))
  status, output = launches.launch(
    *ARGS, f'--workdir={workdir}', before=WILD_CLOCK
  )
  assert status == 0, output
  assert f'checkpoint {damaged} is DAMAGED: the content of rest/' in output
  resumed = (
    f'{EVERY_STEPS} steps are lost and will be trained again, from step '
  )
  assert resumed + str(last - EVERY_STEPS) in output
  assert f'replacing the damaged checkpoint of step {last}' in output
  print(f'{kills} kills, {in_saves} of them in a save, {NUM_STEPS} steps')
  assert not unfinished()
  assert complete(workdir) == [NUM_STEPS - EVERY_STEPS, NUM_STEPS]
  assert_identical(arrays(reference, NUM_STEPS), arrays(workdir, NUM_STEPS))


def damage_checksums(folder):
  flip_bit(folder / checksums.CHECKSUMS)


def empty_checksums(folder):
  (folder / checksums.CHECKSUMS).write_bytes(b'')


def flip(folder):
  flip_bit(largest_file(folder / 'params'))


def flip_meta(folder):
  flip_bit(folder / 'meta' / 'metadata')


def truncate(folder):
  os.truncate(largest_file(folder / 'params'), 100)


def lose(folder):
  largest_file(folder / 'params').unlink()


def lose_item(folder):
  shutil.rmtree(folder / 'params')


@pytest.fixture(scope='module')
def three_steps(tmp_path_factory):
  """The checkpoints of steps 1, 2 and 3 of a run."""
  workdir = workdirs.make_workdir(tmp_path_factory.mktemp('three'))
  folder = pathlib.Path(workdir) / CHECKPOINTS
  for step in (1, 2, 3):
    shutil.copytree(folder / '0', folder / str(step))
  shutil.rmtree(folder / '0')
  return workdir


@pytest.fixture
def steps_to_damage(three_steps, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(three_steps, workdir)
  return workdir


@pytest.mark.parametrize(
  'damage, words',
  [
    (damage_checksums, '(has changed|is missing|unreadable|bytes instead)'),
    (empty_checksums, 'is unreadable'),
    (flip, 'the content of params/.* has'),
    (flip_meta, 'the content of meta/metadata has'),
    (truncate, 'has 100 bytes instead of'),
    (lose, 'is missing'),
    (lose_item, 'is missing'),
  ],
)
def test_every_damage_is_found(steps_to_damage, damage, words, caplog):
  workdir = str(steps_to_damage)
  folder = steps_to_damage / CHECKPOINTS
  damage(folder / '3')
  items = (
    checkpoint.PARAMS if damage in (flip, truncate, lose, lose_item) else ()
  )
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    assert checkpoint.find_step(manager, items=items) == 2
    assert f'{folder}/3 is DAMAGED' in caplog.text
    with pytest.raises(InputError, match=f'{folder}/3 is damaged: .*{words}'):
      checkpoint.find_step(manager, 3, items)
  assert checkpoint.find_intact(workdir) == 2
  assert '1 steps are lost' in caplog.text
  assert complete(steps_to_damage) == [1, 2, 3]  # Nothing is deleted yet.
  damage(folder / '2')
  damage(folder / '1')
  before = sorted(folder.rglob('*'))
  with pytest.raises(InputError, match='all checkpoints in .* are damaged'):
    checkpoint.find_intact(workdir)
  assert before == sorted(folder.rglob('*'))


@pytest.mark.parametrize(
  'step, kept', [(2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4])]
)
def test_next_save_replaces_damaged_checkpoints(steps_to_damage, step, kept):
  flip(steps_to_damage / CHECKPOINTS / '3')
  flip(steps_to_damage / CHECKPOINTS / '2')
  workdir = str(steps_to_damage)
  assert checkpoint.find_intact(workdir) == 1
  params = {'kernel': jax.numpy.full((2, 3), float(step))}
  state = TrainState(jax.numpy.int32(step), params, None, {}, jax.random.key(0))
  with checkpoint.open_manager(workdir) as manager:
    checkpoint.save(manager, state, {}, {'step': step})
    checkpoint.wait(manager)
    assert manager.latest_step() == step
    restored = checkpoint.restore_state(manager, state, step, vocab_size=9)
  np.testing.assert_array_equal(restored.params['kernel'], params['kernel'])
  assert complete(steps_to_damage) == kept
  assert checkpoint.find_intact(workdir) == step


def test_checkpoint_of_an_older_version_has_no_checksums(steps_to_damage):
  folder = steps_to_damage / CHECKPOINTS / '3'
  for other in folder.parent.iterdir():
    (other / checksums.CHECKSUMS).unlink()
  assert checkpoint.find_intact(str(steps_to_damage)) == 3
  with checkpoint.open_manager(str(steps_to_damage), read_only=True) as manager:
    assert checkpoint.find_step(manager) == 3
    assert checkpoint.restore_meta(manager, 3)['data']['step'] == 0
    shape = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
      ),
      manager.item_metadata(3)['params'].tree,
    )
    checkpoint.restore_params(manager, shape, 3, vocab_size=258)
    truncate(folder)
    with pytest.raises(InputError, match='move that folder away'):
      checkpoint.restore_params(manager, shape, 3, vocab_size=258)


@pytest.mark.parametrize(
  'content', [b'', b'{"rest/\xf4": 3}', b'[]', b'[' * 100_000]
)
def test_damage_in_two_places_is_not_taken_for_an_import(
  steps_to_damage, content
):
  folder = steps_to_damage / CHECKPOINTS / '3'
  assert not checkpoint.holds_weights_alone(str(steps_to_damage))
  shutil.rmtree(folder / 'rest')
  # The checksums still list it.
  assert not checkpoint.holds_weights_alone(str(steps_to_damage))
  (folder / checksums.CHECKSUMS).write_bytes(content)
  assert not checkpoint.holds_weights_alone(str(steps_to_damage))
  assert checkpoint.find_intact(str(steps_to_damage)) == 2


@pytest.mark.parametrize('lost', [checksums.CHECKSUMS, 'everything'])
def test_checkpoint_that_lost_its_checksums_is_damaged(steps_to_damage, lost):
  folder = steps_to_damage / CHECKPOINTS / '3'
  if lost == 'everything':
    shutil.rmtree(folder)
    folder.mkdir()
  else:
    (folder / lost).unlink()
  assert 'is missing' in checksums.find_damage(folder)
  assert checkpoint.find_intact(str(steps_to_damage)) == 2


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A function that opens a small dataset, its folder, and its config."""
  root = tmp_path_factory.mktemp('damaged_data')
  (root / 'text.txt').write_text(workdirs.TEXT * 20)
  config = configs.load()
  config.data.update(
    source=f'text:{root}/text.txt', length=16, data_dir=str(root / 'data')
  )
  settings = configs.make_settings(config)
  open_data = lambda: prepare.prepare(settings.data, settings.tokenizer)
  return open_data, pathlib.Path(open_data().folders[0]), settings.data


def read_all(open_data, data_config):
  packed = open_data()
  batches = pipeline.make_train_iterator(
    packed, data_config, seed=0, batch_size=64
  )
  for _ in range(len(packed.train) // 64 + 1):
    next(batches)


def halve(path):
  os.truncate(path, path.stat().st_size // 2)


def empty(path):
  path.write_bytes(b'')


def remove(path):
  path.unlink()


def flip_start(path):
  flip_bit(path, 0.1)


def flip_end(path):  # In a JSON file, the closing bracket.
  flip_bit(path, 0.9999)


@pytest.mark.parametrize(
  'name, damage',
  [
    *(
      ('*-train.array_record*', damage)
      for damage in (flip_start, flip_bit, halve, empty, remove)
    ),
    *(
      (name, damage)
      for name in ('dataset_info.json', 'features.json', 'metadata.json')
      for damage in (flip_end, halve, empty, remove)
    ),
  ],
)
def test_damaged_data_is_an_error_that_says_what_to_do(prepared, name, damage):
  open_data, folder, data_config = prepared
  (path,) = folder.rglob(name)
  content = path.read_bytes()
  read_all(open_data, data_config)
  try:
    damage(path)
    with pytest.raises(InputError) as raised:
      if damage not in (flip_start, flip_bit):  # Found before data is read.
        open_data()
      else:
        read_all(open_data, data_config)
  finally:
    path.write_bytes(content)
  message = str(raised.value)
  assert str(path if 'array_record' in name else path.parent) in message
  assert f'Delete {folder}, and the next start prepares it again' in message
