"""Several processes on one machine, and runs that change their devices.

NANODLM_PROCESSES=4 pytest -m slow tests/devices/multiprocess_test.py takes four
processes.
"""

import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm.data import pipeline, prepare
from nanodlm.devices import mesh as meshes
from nanodlm.run import make_run, make_training
from nanodlm.training import checkpoint, checksums
from nanodlm.workdir import CHECKPOINTS
from tests import launches, workdirs
from tests.launch_test import metric_lines, wait_for

pytestmark = pytest.mark.slow

NUM_PROCESSES = int(os.environ.get('NANODLM_PROCESSES', 2))
NUM_DEVICES = 4  # of all processes together
NUM_STEPS = 80
LOG_EVERY_STEPS = 10
# Silence that counts as a loss.
HEARTBEAT_SECS = 10
ARGS = (
  *launches.TINY,
  f'--config.train.num_steps={NUM_STEPS}',
  '--config.checkpoint.every_steps=20',
  '--config.checkpoint.max_to_keep=100',
  f'--config.train.log_every_steps={LOG_EVERY_STEPS}',
  f'--heartbeat_timeout_secs={HEARTBEAT_SECS}',
)


def start(workdir, *args):
  return launches.start_several(
    NUM_PROCESSES,
    NUM_DEVICES // NUM_PROCESSES,
    *ARGS,
    f'--workdir={workdir}',
    *args,
  )


def steps_of(workdir):
  return checksums.complete_steps(workdir / CHECKPOINTS)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run of one process, and of several of which one got SIGTERM."""
  root = tmp_path_factory.mktemp('runs')
  status, output = launches.launch(
    *ARGS, f'--workdir={root}/one', num_devices=NUM_DEVICES
  )
  assert status == 0, output
  several = root / 'several'
  processes = start(several)
  wait_for(lambda: 20 in steps_of(several), processes[0])
  processes[-1].send_signal(signal.SIGTERM)
  ended = [launches.finish(process) for process in processes]
  return root / 'one', several, ended


def losses(workdir):
  return {
    line['step']: line['train/loss']
    for line in metric_lines(workdir)
    if 'train/loss' in line
  }


def test_sigterm_saves_on_every_process(runs):
  _, several, ended = runs
  assert [status for status, _ in ended] == [143] * NUM_PROCESSES, ended
  last = steps_of(several)[-1]
  assert 20 <= last < NUM_STEPS
  assert last >= max(losses(several))  # none of the steps taken is lost
  assert checksums.find_damage(several / CHECKPOINTS / str(last)) == ''


def test_several_processes_train_as_one_does(runs):
  one, several, _ = runs
  ours, theirs = losses(several), losses(one)
  assert len(ours) >= 2
  for step, loss in ours.items():
    assert loss == pytest.approx(theirs[step], rel=1e-4)


def test_process_0_alone_writes_and_speaks(runs):
  _, several, ended = runs
  assert len(list(several.glob('events.*'))) == 1
  steps = [line['step'] for line in metric_lines(several)]
  assert steps == sorted(set(steps))
  assert 'nats/token' in ended[0][1]
  for _, output in ended[1:]:
    assert 'nats/token' not in output


def test_a_file_that_only_process_0_reads_ends_all(runs):
  several = runs[1]
  record = several / 'trained_on.npz'
  saved = record.read_bytes()
  record.write_bytes(saved[:100])
  ended = [launches.finish(process) for process in start(several)]
  record.write_bytes(saved)
  assert [status for status, _ in ended] == [2] * NUM_PROCESSES, ended
  assert 'trained_on.npz' in ended[0][1]


def test_a_lost_process_ends_the_others_and_one_process_goes_on(runs):
  one, several, _ = runs
  first = steps_of(several)[-1]
  processes = start(several, '--config.mesh.fsdp=2')
  wait_for(lambda: steps_of(several)[-1] > first, processes[0])
  processes[-1].kill()
  for process in processes[:-1]:
    output, _ = process.communicate(timeout=HEARTBEAT_SECS + 10)
    assert process.returncode not in (0, None), output
    # Ours, JAX's, or what Gloo's own threads end with.
    assert re.search(
      'another one (is|was) lost|another task died|Fatal Python error', output
    ), output
  processes[-1].communicate()
  # One process with the same devices resumes, with yet another mesh.
  last = steps_of(several)[-1]
  status, output = launches.launch(
    *ARGS,
    f'--workdir={several}',
    '--config.mesh.tensor=2',
    num_devices=NUM_DEVICES,
  )
  assert status == 0, output
  assert f'at step {last}' in output
  ours, theirs = losses(several), losses(one)
  assert ours.keys() == theirs.keys()
  for step in ours:
    # A line is the mean since the last one, or since the start.
    if not any(
      step - LOG_EVERY_STEPS < start < step for start in (first, last)
    ):
      assert ours[step] == pytest.approx(theirs[step], rel=1e-2)


def test_several_processes_go_on_where_one_stood(runs, tmp_path):
  one, _, _ = runs
  copy = tmp_path / 'copy'
  shutil.copytree(one, copy)
  last = steps_of(one)[-2]
  shutil.rmtree(copy / CHECKPOINTS / str(NUM_STEPS))
  (copy / 'metrics.jsonl').unlink()
  for process in start(copy, '--config.mesh.fsdp=2'):
    status, output = launches.finish(process)
    assert status == 0, output
  ours, theirs = losses(copy), losses(one)
  assert min(ours) > last and max(ours) == NUM_STEPS
  for step, loss in ours.items():
    assert loss == pytest.approx(theirs[step], rel=1e-3)


def test_several_processes_learn_from_samples_as_one_does(runs, tmp_path):
  args = (
    *ARGS,
    f'--config.checkpoint.init_from={runs[0]}',
    '--config.policy.name=sequence',
    '--config.policy.num_samples=4',
    '--config.policy.num_updates=2',
    '--config.policy.kl_weight=0.1',
    '--config.train.reward=tests.policy_test:num_as',
    '--config.train.num_steps=4',
    '--config.train.log_every_steps=1',
    '--config.checkpoint.every_steps=2',
    '--config.mesh.fsdp=2',
  )
  one, several = tmp_path / 'one', tmp_path / 'several'
  status, output = launches.launch(
    *args, f'--workdir={one}', num_devices=NUM_DEVICES
  )
  assert status == 0, output
  ended = [launches.finish(process) for process in start(several, *args)]
  assert [status for status, _ in ended] == [0] * NUM_PROCESSES, ended
  ours, theirs = (
    {x['step']: x for x in metric_lines(workdir) if 'train/loss' in x}
    for workdir in (several, one)
  )
  assert sorted(ours) == [1, 2, 3, 4]
  for step, line in ours.items():
    for key in ('reward', 'kl', 'entropy', 'loss', 'length'):
      found, expected = (x[f'train/{key}'] for x in (line, theirs[step]))
      # Sums of hundreds of nats in another order.
      assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), (step, key)
  assert ours[1]['train/reward'] > 0


# Devices along (data, fsdp, tensor).
# Four parts of a vocabulary of 258 ids have two of padding.
MESHES = {'one': (1, 1, 1), 'data': (8, 1, 1), 'all': (1, 2, 4)}
BATCH_SIZE = 16


class Trainer:
  """A run on a mesh of its own, a step at a time."""

  def __init__(self, workdir, shape):
    config = configs.read_run(workdir)
    config.mesh.update(dict(zip(meshes.AXES, shape)))
    config.optim.ema_decay = 0.9
    config.train.batch_size = BATCH_SIZE
    self.settings = settings = configs.make_settings(config)
    self.packed = prepare.prepare(settings.data, settings.tokenizer)
    run = make_run(settings, devices=jax.devices()[: np.prod(shape)])
    run = run.with_tokenizer(self.packed.tokenizer)
    self.mesh = run.mesh
    training = make_training(run)
    self.state = meshes.init_sharded(run.mesh, training.init_state)
    self.train_step = training.step

  def train(self, state, num_steps):
    """The state after more steps, and the losses of these."""
    step = int(state.step)
    batches = pipeline.make_train_iterator(
      self.packed,
      self.settings.data,
      seed=0,
      batch_size=BATCH_SIZE,
      start_step=step,
      rows=meshes.local_rows(self.mesh, BATCH_SIZE),
    )
    sums = []
    for _ in range(num_steps):
      state, values = self.train_step(
        state, meshes.shard_batch(self.mesh, next(batches))
      )
      sums.append(float(values['loss'] / values['weight']))
    return state, sums


@pytest.fixture(scope='module')
def trainers(tmp_path_factory):
  workdir = workdirs.make_workdir(
    tmp_path_factory.mktemp('topology'),
    scale=1.0,
    model__num_layers=1,
    model__num_heads=4,
  )
  return {name: Trainer(workdir, shape) for name, shape in MESHES.items()}


@pytest.mark.parametrize('before', MESHES)
def test_a_checkpoint_goes_on_with_other_devices(trainers, tmp_path, before):
  trainer = trainers[before]
  state, _ = trainer.train(trainer.state, 2)
  with checkpoint.open_manager(str(tmp_path)) as manager:
    checkpoint.save(manager, state, trainer.settings.to_dict(), {})
    checkpoint.wait(manager)
    saved_params = jax.device_get(state.params)
    _, expected = trainer.train(state, 2)
    for other in trainers.values():
      restored = checkpoint.restore_state(
        manager, other.state, 2, other.packed.tokenizer.vocab_size
      )
      for leaf, saved, own in zip(
        *map(
          jax.tree.leaves, (restored.params, saved_params, other.state.params)
        )
      ):
        rows = min(len(leaf), len(saved))
        np.testing.assert_array_equal(leaf[:rows], saved[:rows])
        np.testing.assert_array_equal(leaf[rows:], 0)
        assert leaf.sharding == own.sharding
      _, found = other.train(restored, 2)
      np.testing.assert_allclose(found, expected, rtol=1e-5)
