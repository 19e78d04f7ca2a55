"""Runs that are distilled: their rounds, their teachers, and mistakes."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm import objectives, train
from nanodlm.types import InputError
from tests import seams_test, workdirs
from tests.launch_test import arrays, assert_identical, metric_lines
from tests.seams_test import losses

NUM_STEPS, ROUND_STEPS = 9, 3


def start_from(folder, teacher, **changes):
  own = dict(
    train__num_steps=NUM_STEPS,
    distill__name='sdtt',
    distill__num_steps=4,
    distill__round_steps=ROUND_STEPS,
  )
  return seams_test.start_from(folder, teacher, **{**own, **changes})


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  return workdirs.make_workdir(tmp_path_factory.mktemp('teacher'))


@pytest.fixture(scope='module')
def student(teacher, tmp_path_factory):
  """A finished run of two rounds, saved in both and at the end."""
  start = start_from(tmp_path_factory.mktemp('student'), teacher)
  assert train.main(start) == 0
  return start


def saved(workdir, step, item):
  """The arrays of an item, without its name."""
  found = arrays(workdir, step, (item,))
  return {name.removeprefix(item): x for name, x in found.items()}


def test_the_student_of_a_round_is_the_teacher_of_the_next(teacher, student):
  frozen, params = (
    {step: saved(student.workdir, step, item) for step in (2, 4, 6, 8, 9)}
    for item in ('frozen', 'params')
  )
  assert_identical(frozen[2], saved(teacher, 0, 'params'))
  # The one of step 3, which is neither the first teacher nor the next student.
  for other in (frozen[2], params[2], params[4]):
    assert any(np.any(frozen[4][name] != x) for name, x in other.items())
  assert_identical(frozen[6], params[6])
  assert_identical(frozen[8], params[6])
  assert_identical(frozen[9], params[9])
  # What is trained is not a bound.
  lines = metric_lines(pathlib.Path(student.workdir))
  assert sum('train/loss' in x for x in lines) == 9
  assert not any('train/nll' in x for x in lines)
  assert min(losses(student).values()) > 0


@pytest.mark.slow
def test_resuming_over_a_change_of_round(teacher, student, tmp_path):
  # A run that was killed after step 4, and whose first teacher is gone.
  workdir = tmp_path / 'run'
  shutil.copytree(student.workdir, workdir)
  for step in (6, 8, 9):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  start = dataclasses.replace(student, workdir=str(workdir))
  moved = pathlib.Path(teacher).rename(tmp_path / 'moved')
  try:
    assert train.main(start) == 0
  finally:
    moved.rename(teacher)
  items = 'params', 'ema_params', 'frozen', 'rest'
  assert_identical(
    *(arrays(x, NUM_STEPS, items) for x in (student.workdir, start.workdir))
  )


def test_a_student_is_a_model_like_its_teacher(teacher, student):
  mine, theirs = lms.load(student.workdir).run, lms.load(teacher).run
  assert mine.objective == theirs.objective and mine.sampler == theirs.sampler
  assert isinstance(mine.trained, objectives.DISTILLATIONS['sdtt'])
  assert mine.trained.evaluation() == theirs.objective.evaluation()
  # A run that takes over its settings is not distilled again.
  changes = {'checkpoint.init_from': student.workdir}
  start = configs.Start('train', '', student.config, False, changes)
  assert start.resolve()[0].distill['name'] == ''


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'distill__name': 'sddt'}, "distill.name='sddt' is not one of"),
    ({'distill__divergence': 'mse'}, "distill.divergence='mse' is not one of"),
    (
      {'distill__teacher_temperature': 0.0},
      'distill.teacher_temperature=0.0 must be in',
    ),
    ({'distill__num_steps': 0}, 'distill.num_steps=0 must be >= 1'),
    (
      {'distill__round_steps': 2},
      'distill.round_steps=2 does not divide train.num_steps=9',
    ),
    ({'distill__num_steps': 6}, 'distill.num_steps=6 cannot be halved 2 times'),
    ({'checkpoint__init_from': ''}, "checkpoint.init_from='' must be"),
    ({'checkpoint__init_from': '/no/run'}, "checkpoint.init_from='/no/run'"),
    ({'objective__name': 'ar'}, "distill.name='sdtt' does not fit"),
    (
      {'objective__name': 'uniform', 'model__time_conditioning': True},
      "distill.name='sdtt' does not fit objective.name='uniform'",
    ),
    (
      {'objective__name': 'block', 'objective__ar_weight': 1.0},
      "objective.name: 'masked' of that run, 'block' of this run",
    ),
    (
      {'distill__name': 'dcd', 'objective__name': 'hybrid'},
      "objective.name: 'masked' of that run, 'hybrid' of this run",
    ),
    (
      {'objective__schedule': 'cosine'},
      "objective.schedule: 'linear' of that run, 'cosine' of this run",
    ),
    (
      {'model__rope_theta': 100.0},
      'model.rope_theta: 10000.0 of that run, 100.0 of this run',
    ),
    (
      {'tokenizer__name': 'sentencepiece', 'tokenizer__vocab_size': 290},
      'has a different tokenizer',
    ),
  ],
)
def test_mistakes(teacher, changes, named, tmp_path):
  start = start_from(tmp_path, teacher, **changes)
  with pytest.raises(InputError) as error:
    train.main(start)
  assert named in str(error.value)
  assert not pathlib.Path(start.workdir).exists()
