"""Tests of nanodlm.train: skipped steps, divergence and runs made longer."""

import contextlib
import dataclasses
import pathlib
import re
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import train
from nanodlm.training import checksums
from nanodlm.types import InputError
from tests.launch_test import arrays, assert_identical, metric_lines
from tests.seams_test import losses, start_of

PEAK = 1e-3
SKIPPED = (3, 4)  # Counted from 0.
NUM_STEPS = 10


class Spoilt(train.TextBatches):
  """Batches of which some are not finite; keeps the parameters it is shown."""

  seen = []

  def __call__(self, state, step):
    self.seen.append(jax.tree.map(np.array, state.params))
    batch = super().__call__(state, step)
    if step in SKIPPED:
      batch = batch._replace(weight=batch.weight * np.nan)
    return batch


def cosine(share):
  return PEAK * (1 + np.cos(np.pi * share)) / 2


def steps_of(start):
  folder = pathlib.Path(start.workdir) / 'checkpoints'
  return checksums.complete_steps(folder)


def rates(start):
  """Returns the learning rates that were reported, by step."""
  lines = metric_lines(pathlib.Path(start.workdir))
  key = 'train/learning_rate'
  return {line['step']: line[key] for line in lines if key in line}


@pytest.fixture(scope='module')
def spoilt(tmp_path_factory):
  """A finished run of which two steps were skipped, and what it was shown."""
  start = start_of(
    tmp_path_factory.mktemp('spoilt'),
    train__num_steps=NUM_STEPS,
    train__log_every_steps=1,
    train__batches='spoilt',
    # Its updates are the learning rate, up or down.
    optim__name='lion',
    optim__weight_decay=0.0,
    optim__schedule='cosine',
    optim__warmup_steps=0,
    optim__learning_rate=PEAK,
    checkpoint__every_steps=5,
  )
  Spoilt.seen.clear()
  with mock.patch.dict(train.BATCHES, spoilt=Spoilt):
    assert train.main(start) == 0
    yield start, list(Spoilt.seen)


def test_the_rate_of_a_step_is_the_one_that_is_reported(spoilt):
  start, seen = spoilt
  reported = rates(start)
  for step, (before, after) in enumerate(zip(seen, seen[1:])):
    change = jax.tree.map(lambda a, b: np.max(abs(a - b)), before, after)
    used = max(jax.tree.leaves(change))
    planned = cosine(step / NUM_STEPS)
    expected = 0.0 if step in SKIPPED else planned
    np.testing.assert_allclose(used, expected, rtol=1e-3)
    np.testing.assert_allclose(reported[step + 1], planned, rtol=1e-5)


def test_the_run_continues_after_skipped_steps(spoilt):
  path = pathlib.Path(spoilt[0].workdir)
  lines = [line for line in metric_lines(path) if 'train/skipped_steps' in line]
  counts = [line['train/skipped_steps'] for line in lines]
  assert counts == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
  assert np.isfinite(lines[-1]['train/loss'])
  assert all(
    np.isfinite(value).all()
    for name, value in arrays(path, NUM_STEPS).items()
    if name[:4] != 'rest'
  )


def test_a_checkpoint_waits_for_a_step_that_is_taken(spoilt):
  # Steps 4 and 5 were skipped, and a checkpoint was due after step 5.
  assert steps_of(spoilt[0]) == [6, NUM_STEPS]


@pytest.mark.slow
def test_a_longer_run_says_how_its_rate_changes(spoilt, caplog):
  start, _ = spoilt
  start.config.train.num_steps = 15
  start.config.checkpoint.keep_period = 7
  assert train.main(start) == 0
  (text,) = [x for x in caplog.messages if 'learning rate was' in x]
  values = [float(x) for x in re.findall(r'(\S+) in step', text)]
  np.testing.assert_allclose(values, [cosine(0.9), cosine(10 / 15)], rtol=0.01)
  assert 'optim.decay_from_step=10' in text
  np.testing.assert_allclose(rates(start)[11], cosine(10 / 15), rtol=1e-5)
  # As it advises: a new decay, from half of the rate.
  assert 'checkpoint.keep_period=7' in caplog.text
  caplog.clear()
  start.config.train.num_steps = 20
  start.config.checkpoint.keep_period = 10
  start.config.optim.update(decay_from_step=15, learning_rate=PEAK / 2)
  assert train.main(start) == 0
  assert 'is 0.0005 in step 16' in caplog.text
  assert 'keep_period' not in caplog.text
  expected = {16 + i: cosine(i / 5) / 2 for i in range(5)}
  found = {step: rate for step, rate in rates(start).items() if step > 15}
  assert found == pytest.approx(expected, rel=1e-5)
  # The config says how many steps were taken.
  start.config.train.num_steps = 19
  written = {path: path.read_bytes() for path in files_of(start)}
  with pytest.raises(InputError, match='num_steps=19 must be at least 20'):
    train.main(start)
  assert written == {path: path.read_bytes() for path in files_of(start)}


def test_a_run_that_resumes_reads_no_other_weights(spoilt):
  start, _ = spoilt
  written = {path: path.read_bytes() for path in files_of(start)}
  other = {'checkpoint.init_from': start.workdir}
  with pytest.raises(InputError, match='checkpoint.init_from=.* is ignored'):
    train.main(dataclasses.replace(start, changes=other))
  assert written == {path: path.read_bytes() for path in files_of(start)}


@pytest.mark.parametrize(
  'was, now, is_given, is_refused',
  [
    ('', 'b', True, True),
    ('a', 'b', True, True),
    ('a', './a/', True, False),
    ('a', '', True, False),
    ('a', 'b', False, False),
    ('gone', 'b', True, False),  # It has moved.
  ],
)
def test_starts_that_would_not_be_read(
  was, now, is_given, is_refused, tmp_path, monkeypatch
):
  (tmp_path / 'a').mkdir()
  monkeypatch.chdir(tmp_path)
  config = configs.load()
  config.checkpoint.init_from = now
  given = ['checkpoint.init_from'] * is_given
  settings = configs.make_settings(config, given)
  refused = pytest.raises(InputError, match='--workdir alone')
  with refused if is_refused else contextlib.nullcontext():
    train._check_same_start({'init_from': was}, settings, 'w')


def files_of(start):
  workdir = pathlib.Path(start.workdir)
  return [path for path in workdir.rglob('*') if path.is_file()]


def diverge(start):
  config = start.config.copy_and_resolve_references()
  config.optim.update(learning_rate=1e30, warmup_steps=0)
  config.train.num_steps = 40
  assert train.main(dataclasses.replace(start, config=config)) == 1


@pytest.mark.parametrize('every_steps', [1, 100])
@pytest.mark.slow
def test_a_lower_rate_resumes_a_run_that_diverged(
  tmp_path, capsys, every_steps
):
  start = start_of(
    tmp_path,
    train__num_samples=0,
    train__num_steps=2,
    checkpoint__every_steps=every_steps,
  )
  longer = start.config.copy_and_resolve_references()
  longer.train.num_steps = 4
  longer = dataclasses.replace(start, config=longer)
  # A new run. Its first step is what ruins it.
  diverge(start)
  error = capsys.readouterr().err
  if every_steps == 1:
    # The only checkpoint is left to the user.
    assert steps_of(start) == [1]
    (folder,) = re.findall(r'move (\S+) away', error)
    shutil.rmtree(folder)
  else:
    assert steps_of(start) == []
    assert 'step 0' in error
  assert train.main(start) == 0
  assert steps_of(start)[-1] == 2
  # A run that has a checkpoint resumes from it.
  path = pathlib.Path(start.workdir)
  before = arrays(path, 2)
  diverge(start)
  error = capsys.readouterr().err
  assert '5 steps in a row' in error and 'checkpoint of step 2' in error
  assert steps_of(start)[-1] == 2
  assert_identical(before, arrays(path, 2))
  assert train.main(longer) == 0
  assert steps_of(start)[-1] == 4
  assert np.isfinite(losses(start)[4])
