"""Runs that learn from rewards and preferences, and their mistakes."""

import dataclasses
import json
import pathlib
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm import rollouts, train
from nanodlm.types import InputError
from tests import seams_test, workdirs
from tests.launch_test import arrays, assert_identical, metric_lines

NUM_STEPS = 6
ITEMS = 'params', 'ema_params', 'frozen', 'rest'


def num_as(texts, prompts):
  del prompts
  return [text.count('a') / len(text) if text else 0.0 for text in texts]


def fails_later(texts, prompts):
  """Fails in the third call."""
  CALLS.append(texts)
  return num_as(texts, prompts) if len(CALLS) < 3 else [np.nan] * len(texts)


CALLS = []


def start_from(folder, workdir, **changes):
  own = dict(
    train__num_steps=NUM_STEPS,
    train__reward=f'{__name__}:num_as',
    policy__name='sequence',
    policy__num_samples=4,
    policy__num_updates=2,
    policy__kl_weight=0.1,
    policy__scale_advantages=False,
    optim__learning_rate=0.01,
    checkpoint__every_steps=3,
  )
  return seams_test.start_from(folder, workdir, **{**own, **changes})


@pytest.fixture(scope='module')
def first(tmp_path_factory):
  return workdirs.make_workdir(tmp_path_factory.mktemp('first'))


@pytest.fixture(scope='module')
def tuned(first, tmp_path_factory):
  """A finished run of three rounds of two steps, saved in the second one."""
  start = start_from(tmp_path_factory.mktemp('tuned'), first)
  with mock.patch.object(rollouts.Rollouts, '_make', autospec=True) as make:
    make.side_effect = MAKE
    assert train.main(start) == 0
    assert [call.args[2] for call in make.call_args_list] == [0, 1, 2]
  return start


MAKE = rollouts.Rollouts._make


def reports(start):
  lines = metric_lines(pathlib.Path(start.workdir))
  return {x['step']: x for x in lines if 'train/loss' in x}


def test_what_is_reported(tuned):
  steps = reports(tuned)
  assert sorted(steps) == [1, 2, 3, 4, 5, 6]
  for step, line in steps.items():
    assert line['train/length'] == workdirs.LENGTH
    assert line['train/num_calls'] == 4
    assert line['train/entropy'] == pytest.approx(line['train/nll'], rel=1e-5)
    # The samples of two steps are the same.
    if step % 2 == 0:
      assert line['train/reward'] == steps[step - 1]['train/reward']
  assert steps[1]['train/kl'] == pytest.approx(0, abs=1e-4)
  assert steps[1]['train/clipped_share'] == 0
  assert steps[6]['train/kl'] != 0
  assert 'train/bits_per_byte' not in steps[1]


def test_resuming_within_a_round(tuned, tmp_path):
  # A run that was killed after step 3, whose samples are those of step 2.
  workdir = tmp_path / 'run'
  shutil.copytree(tuned.workdir, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  start = dataclasses.replace(tuned, workdir=str(workdir))
  assert train.main(start) == 0
  assert_identical(
    *(arrays(x, NUM_STEPS, ITEMS) for x in (tuned.workdir, start.workdir))
  )
  for key in ('train/reward', 'train/kl', 'train/entropy'):
    assert reports(start)[4][key] == reports(tuned)[4][key]


def test_what_is_kept(tuned, first):
  copies = {step: arrays(tuned.workdir, step, ITEMS) for step in (3, 6)}
  start = arrays(first, 0, ('params',))
  for name, x in start.items():
    leaf = name.removeprefix('params')
    for step in (3, 6):
      np.testing.assert_array_equal(
        copies[step][f"frozen['reference']{leaf}"], x
      )
    old, new = (
      copies[6][f'{kind}{leaf}'] for kind in ("frozen['old']", 'params')
    )
    np.testing.assert_array_equal(old, new)
  assert lms.load(tuned.workdir).sample(seed=1)


@pytest.mark.parametrize('changes', [{}, {'policy__name': 'coupled'}])
@pytest.mark.slow
def test_devices_and_microbatches_change_nothing(first, tmp_path, changes):
  values = []
  for i, (num, micro) in enumerate(((1, 1), (4, 2))):
    start = start_from(
      tmp_path / str(i),
      first,
      train__num_steps=2,
      mesh__data=num,
      train__num_microbatches=micro,
      **changes,
    )
    with mock.patch('jax.devices', return_value=jax.local_devices()[:num]):
      assert train.main(start) == 0
    values.append(reports(start)[2])
  for key in ('train/reward', 'train/entropy', 'train/kl', 'train/loss'):
    assert values[0][key] == pytest.approx(values[1][key], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_reward_rises(first, tmp_path):
  start = start_from(
    tmp_path,
    first,
    train__num_steps=40,
    train__log_every_steps=5,
    checkpoint__every_steps=40,
    train__batch_size=64,
    policy__num_samples=16,
    policy__num_updates=1,
    policy__kl_weight=0.0,
    policy__scale_advantages=True,
    optim__learning_rate=0.03,
  )
  assert train.main(start) == 0
  values = [line['train/reward'] for line in reports(start).values()]
  assert values[-1] > 2 * values[0] + 0.02


def test_a_reward_that_fails_loses_nothing(first, tmp_path):
  CALLS.clear()
  start = start_from(
    tmp_path,
    first,
    train__reward=f'{__name__}:fails_later',
    policy__num_updates=1,
    checkpoint__every_steps=100,
  )
  with pytest.raises(InputError, match="fails_later' must return finite"):
    train.main(start)
  saved = pathlib.Path(start.workdir) / 'checkpoints'
  assert [path.name for path in saved.iterdir()] == ['2']
  CALLS.clear()
  start.config.train.num_steps = 4
  assert train.main(start) == 0
  assert sorted(reports(start)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'policy__name': 'sequenze'}, "policy.name='sequenze' is not one of"),
    ({'policy__num_samples': 1}, 'policy.num_samples=1 must be >= 2'),
    ({'policy__num_samples': 5}, 'policy.num_samples=5 does not divide'),
    ({'train__reward': ''}, "train.reward='' must say"),
    ({'train__reward': 'law:valid'}, 'the law of data.source='),
    ({'train__reward': 'no_such:thing'}, "train.reward='no_such:thing'"),
    ({'train__reward_secs': 0.0}, 'train.reward_secs=0.0 must be > 0'),
    (
      {'policy__name': ''},
      "train.reward='tests.policy_test:num_as' is ignored",
    ),
    ({'train__batches': 'text'}, "train.batches='text' must be 'rollouts'"),
    (
      {'train__batches': 'rollouts', 'train__reward': '', 'policy__name': ''},
      "train.batches='rollouts' does not fit policy.name=''",
    ),
    ({'train__batches': 'tekst'}, "train.batches='tekst' is not one of"),
    ({'checkpoint__init_from': ''}, "checkpoint.init_from='' must be"),
    (
      {'distill__name': 'sdtt'},
      "distill.name='sdtt' and policy.name='sequence'",
    ),
    ({'objective__name': 'ar', 'policy__name': 'one_step'}, 'does not fit'),
    (
      {'data__crop': 'document', 'data__padding': 'masked'},
      "data.padding='masked' and",
    ),
    (
      {'tokenizer__name': 'sentencepiece', 'tokenizer__vocab_size': 290},
      'has a different tokenizer',
    ),
    (
      {'model__rope_theta': 100.0},
      'model.rope_theta: 10000.0 of that run, 100.0 of this run',
    ),
  ],
)
def test_mistakes(first, changes, named, tmp_path):
  start = start_from(tmp_path, first, **changes)
  with pytest.raises(InputError) as error:
    train.main(start)
  assert named in str(error.value)
  assert not pathlib.Path(start.workdir).exists()


# All of a block has noise of its level, also what follows the end.
@pytest.mark.parametrize('name, num', [('ar', 6), ('block', 8)])
@pytest.mark.slow
def test_what_follows_the_end_of_a_sample_is_not_learnt(tmp_path, name, num):
  changes = {'objective__name': name, 'objective__block_size': 4}
  workdir = workdirs.make_workdir(tmp_path / 'first', **changes)
  start = start_from(
    tmp_path / 'run',
    workdir,
    **changes,
    sampler__stop_at_eos=True,
    train__num_steps=1,
    policy__num_updates=1,
  )
  end, seen = 256, []

  def fill(params, key, tokens, fixed):
    tokens = np.full_like(tokens, 97)
    tokens[::2, 5:] = end
    return tokens, 16.0

  def keep(*args):
    batch = MAKE(*args)
    seen.append(jax.device_get(batch))
    return batch

  with (
    mock.patch.object(rollouts.lms, 'make_fill', return_value=fill),
    mock.patch.object(rollouts.Rollouts, '_make', keep),
  ):
    assert train.main(start) == 0
  (batch,) = seen
  assert batch.eligible[::2].sum(axis=1).tolist() == [num] * 8
  assert batch.eligible[1::2].all()
  np.testing.assert_array_equal(batch.num_tokens[::2], num)


def test_samplers_of_gaps_of_any_length_are_refused(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n' * 20)
  changes = {
    'data__source': f'jsonl:{tmp_path}/a.jsonl',
    'data__crop': 'document',
    'model__time_conditioning': True,
    'objective__name': 'flex',
  }
  workdir = workdirs.make_workdir(tmp_path / 'flex', **changes)
  start = start_from(tmp_path / 'run', workdir, **changes)
  with pytest.raises(InputError, match="sampler.name='insert' does not fit"):
    train.main(start)


def test_samples_of_prompts(first, tmp_path):
  path = tmp_path / 'pairs.jsonl'
  pairs = [{'prompt': f'{i}+', 'response': f'{i}!'} for i in range(10, 40)]
  path.write_text('\n'.join(map(json.dumps, pairs)))
  seen = []

  def reward(texts, prompts):
    seen.append((texts, prompts))
    return [float(len(text)) for text in texts]

  with mock.patch.dict(globals(), written=reward):
    start = start_from(
      tmp_path,
      first,
      data__source=f'pairs:{path}',
      train__reward=f'{__name__}:written',
      train__num_steps=2,
      policy__num_updates=1,
    )
    assert train.main(start) == 0
  (texts, prompts), (_, others) = seen
  assert len(prompts) == 16 and len(set(prompts)) > 1
  for text, prompt in zip(texts, prompts):
    assert prompt[2:] == '+' and text.startswith(prompt)
  # A group has one prompt, and each step its own.
  assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 16, 4))
  assert prompts != others


def preferences(folder):
  path = folder / 'preferences.jsonl'
  rows = [
    {'prompt': f'{i}+', 'chosen': f'{i}!', 'rejected': f'{i + 1}?'}
    for i in range(10, 60)
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return f'preferences:{path}'


@pytest.mark.parametrize('objective', ['masked', 'ar'])
@pytest.mark.slow
def test_preferences(tmp_path, objective):
  workdir = workdirs.make_workdir(tmp_path / 'first', objective__name=objective)
  start = start_from(
    tmp_path / 'second',
    workdir,
    data__source=preferences(tmp_path),
    train__reward='',
    train__num_steps=30,
    train__log_every_steps=10,
    checkpoint__every_steps=30,
    objective__name=objective,
    policy__name='dpo',
    policy__kl_weight=0.5,
    optim__learning_rate=0.003,
  )
  assert train.main(start) == 0
  lines = reports(start)
  assert lines[30]['train/margin'] > lines[10]['train/margin'] > 0
  assert lines[30]['train/preferred_share'] > 0.9


def test_wrong_preferences(first, tmp_path):
  source = preferences(tmp_path)
  own = dict(policy__name='dpo', policy__kl_weight=0.1, train__reward='')
  for changes, named in (
    ({**own}, 'does not fit policy.name='),
    ({**own, 'policy__name': '', 'data__source': source}, "policy.name=''"),
    ({'data__source': source}, "policy.name='sequence'"),
    (
      {**own, 'data__source': source, 'policy__kl_weight': 0.0},
      'kl_weight=0.0',
    ),
  ):
    start = start_from(tmp_path / named[-5:], first, **changes)
    with pytest.raises(InputError) as error:
      train.main(start)
    assert named in str(error.value)
