"""The laws of searches, by enumeration with an exact sampler."""

import functools

import jax
import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm import searches
from nanodlm.noise import categorical
from nanodlm.samplers import ar, fixed_count
from nanodlm.types import Canvas, InputError
from tests import toys, workdirs
from tests.toys import LENGTH, MASK, TEXTS

JOINT = toys.random_joint(3)
VALUES = np.random.default_rng(4).normal(size=len(TEXTS)).astype(np.float32)
DRAW = categorical.Draw(MASK)
SAMPLERS = {
  'masked': fixed_count.FixedCount(DRAW, num_steps=LENGTH),
  'ar': ar.LeftToRight(DRAW, cache=False),
}


def reward(rows, fixed):
  del fixed
  return VALUES[toys.text_index(rows)]


@functools.cache
def fill_of(name):
  table = toys.CachedTable(toys.posterior_table(JOINT), causal=name == 'ar')

  @jax.jit
  def run(key, tokens, fixed):
    keys = jax.random.split(key, len(tokens))
    return SAMPLERS[name](keys, Canvas(tokens, fixed), table)

  def fill(params, key, tokens, fixed):
    del params
    samples = run(key, tokens, fixed)
    return np.asarray(samples.tokens), float(samples.num_calls)

  return fill


def search(name, best_of=1, num_refinements=0, temperature=0.0):
  return searches.Search(
    best_of, num_refinements, temperature, reward, name != 'ar'
  ).around(fill_of(name))


def counts(rows):
  return np.bincount(toys.text_index(rows), minlength=len(TEXTS))


BLANK = np.full((4000, LENGTH), MASK, np.int32), np.zeros((4000, LENGTH), bool)


def test_the_best_of_n():
  rows, num_calls = search('masked', best_of=3)(None, jax.random.key(0), *BLANK)
  # P(best = x) = F(x)^3 - F(before x)^3, in the order of the rewards.
  order = np.argsort(VALUES)
  share = np.diff(np.cumsum(JOINT[order]) ** 3, prepend=0.0)
  expected = np.zeros(len(TEXTS))
  expected[order] = share
  assert toys.chi_square(counts(rows), expected) > 1e-3
  assert num_calls == 3 * LENGTH


@pytest.mark.parametrize('name', SAMPLERS)
def test_refinements_tend_to_the_tilted_law(name):
  tilted = JOINT * np.exp(VALUES / 0.7)
  tilted /= tilted.sum()
  refine = search(name, best_of=2, num_refinements=40, temperature=0.7)
  rows, num_calls = refine(None, jax.random.key(1), *BLANK)
  assert toys.chi_square(counts(rows), tilted) > 1e-3
  assert toys.chi_square(counts(rows), JOINT) < 1e-6
  # A redraw takes a call for each position that it draws again.
  assert 2 * LENGTH + 40 <= num_calls < 42 * LENGTH


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_prompt_is_kept_and_rewards_never_fall(name):
  tokens, fixed = (x[:200].copy() for x in BLANK)
  tokens[:, 0], fixed[:, 0] = 1, True
  seen = []

  def watch(rows, fixed):
    seen.append(rows)
    return reward(rows, fixed)

  taken = []
  climb = searches.Search(1, 20, 0.0, watch, name != 'ar').around(
    fill_of(name), taken.append
  )
  rows, _ = climb(None, jax.random.key(2), tokens, fixed)
  assert (rows[:, 0] == 1).all() and len(seen) == len(taken) == 21
  values = reward(rows, fixed)
  assert (values >= reward(seen[0], fixed)).all()
  assert values.mean() > reward(seen[0], fixed).mean() + 0.5
  # What is returned is what was taken last.
  last = np.stack([np.where(x, i, -1) for i, x in enumerate(taken)]).max(0)
  expected = [seen[i][row] for row, i in enumerate(last)]
  np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(
  'values, named',
  [
    ((0, 0, 0.0), 'best_of=0'),
    ((1, -1, 0.0), 'num_refinements=-1'),
    ((1, 1, -1.0), 'reward_temperature=-1.0'),
    ((2, 0, 1.0), 'reward_temperature=1.0 is ignored'),
    ((2.5, 0, 0.0), 'best_of=2.5 must be an integer'),
    ((1, 1, np.inf), 'reward_temperature=inf'),
  ],
)
def test_wrong_values(values, named):
  with pytest.raises(InputError, match=named):
    searches.Search(*values, reward, True)


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  return lms.load(workdirs.make_workdir(tmp_path_factory.mktemp('searches')))


def first_letter(texts, prompts):
  return [ord(text.removeprefix(p)[0]) for text, p in zip(texts, prompts)]


def test_candidates_are_draws_from_the_canvas():
  given = []

  def fill(params, key, tokens, fixed):
    given.append(tokens)
    return np.full_like(tokens, len(given)), 1.0

  rise = lambda rows, fixed: np.asarray(rows[:, 0], np.float32)
  search = searches.Search(3, 1, 0.0, rise, True).around(fill)
  search(None, jax.random.key(0), *(x[:2] for x in BLANK))
  assert [x[0, 0] for x in given] == [MASK, MASK, MASK, 3]


def test_refinements_of_a_canvas_of_several_blocks(tmp_path):
  workdir = workdirs.make_workdir(
    tmp_path, objective__name='block', objective__block_size=16
  )
  run = lms.load(workdir).run
  spec = f'{__name__}:first_letter'
  for length, sees_right in ((16, True), (32, False)):
    search = lms.make_search(run, spec, num_refinements=1, length=length)
    assert search.sees_right == sees_right


def test_a_model_searches(lm):
  options = dict(prompt='ab a', num_samples=3, details=True)
  spec = f'{__name__}:first_letter'
  plain, best, more, refined = (
    lm.sample(**options, reward=spec, best_of=n, num_refinements=k)
    for n, k in ((1, 0), (6, 0), (12, 0), (12, 6))
  )
  values = [
    first_letter([x.text for x in those], ['ab a'] * 3)
    for those in (plain, best, more, refined)
  ]
  # The first candidates are the same ones.
  assert (np.diff(values, axis=0) >= 0).all() and sum(values[1]) > sum(
    values[0]
  )
  assert [x[0].num_calls for x in (plain, best, more)] == [4, 24, 48]
  assert 48 + 6 <= refined[0].num_calls <= 48 + 24
  for one in refined:
    assert one.text.startswith('ab a')
    # The log-probabilities are those of the tokens that were taken.
    free = ~one.fixed
    is_top = one.top_tokens[free] == one.tokens[free][:, None]
    top = np.where(is_top, one.top_logprobs[free], np.nan)
    seen = is_top.any(axis=1)
    assert seen.any()
    np.testing.assert_array_equal(
      np.nanmax(top[seen], axis=1), one.logprobs[free][seen]
    )


def test_ignored_without_a_reward(lm):
  with pytest.raises(InputError, match="best_of=2 is ignored with reward=''"):
    lm.sample(best_of=2)
