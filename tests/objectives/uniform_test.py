"""Tests of nanodlm.objectives.uniform: the curriculum of relaxed tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.noise import schedules, times
from nanodlm.objectives import uniform
from nanodlm.objectives.uniform import Uniform
from nanodlm.types import InputError
from tests import toys
from tests.toys import LENGTH, MASK

NUM = 4000


def relaxed(tau=0.4, num_soft_tokens=3, **changes):
  own = Uniform(
    MASK,
    curriculum_steps=5,
    tau=tau,
    num_soft_tokens=num_soft_tokens,
    **changes,
  )
  return own.curriculum()


def corrupt(objective, num=NUM):
  """Noises one text many times; its second token is not eligible."""
  levels = objective.sample_levels(jax.random.key(0), num, LENGTH)
  x0 = jnp.tile(jnp.array([2, 0, 1]), (num, 1))
  eligible = jnp.tile(jnp.array([True, False, True]), (num, 1))
  keys = jax.random.split(jax.random.key(1), num)
  return levels, x0, jax.jit(objective.corrupt)(keys, levels, x0, eligible)


@pytest.mark.parametrize('num_soft_tokens', [1, 2, 3])
@pytest.mark.parametrize('schedule', [schedules.Linear(), schedules.Cosine()])
def test_the_noise_is_that_of_the_discrete_objective(schedule, num_soft_tokens):
  # Every time is one of the range; the share of kept tokens is that of the
  # schedule at the time that the network reads, in ten bins of it.
  objective = relaxed(schedule=schedule, num_soft_tokens=num_soft_tokens)
  _, x0, noised = corrupt(objective, 20_000)
  alpha = 1 - np.asarray(schedule.noise(noised.t))
  assert 0.05 - 1e-6 < alpha.min() < 0.052 and 0.948 < alpha.max() < 0.95 + 1e-6
  kept = np.asarray(noised.tokens == x0)
  assert kept[:, 1].all()
  kept, bins = kept[:, ::2].mean(1), (alpha * 10).astype(int)
  for i in range(10):
    p = alpha[bins == i] * 2 / 3 + 1 / 3
    error = kept[bins == i].mean() - p.mean()
    assert abs(error) < 4 * (0.25 / 2 / len(p)) ** 0.5
  np.testing.assert_array_equal(noised.soft.ids[..., 0], noised.tokens)
  np.testing.assert_allclose(noised.soft.weights.sum(-1), 1, rtol=1e-6)
  clean = noised.soft.ids[:, 1] == x0[:, 1:2]
  assert clean.all() and (noised.soft.weights[:, 1, 0] == 1).all()


@pytest.mark.parametrize('tau', [0.0, 1e-7])
def test_without_temperature_the_input_and_the_terms_are_discrete(tau):
  objective, plain = relaxed(tau), Uniform(MASK)
  levels, x0, noised = corrupt(objective)
  rest = np.abs(np.asarray(noised.soft.weights) - (np.arange(3) == 0))
  assert rest.max() <= (0 if not tau else 1) and np.mean(rest > 1e-6) < 1e-4
  # The plain objective at the same time, of the same noisy text.
  u, width = objective.clock(levels)
  fields = plain.fields(1 - u, x0, noised.tokens)
  flat = lambda x: jnp.reshape(x, (-1, *x.shape[2:]))
  logits = jnp.asarray(toys.random_table(0))
  logits = flat(logits[toys.canvas_index(noised.tokens)])
  own = objective.terms(logits, jax.tree.map(flat, noised.fields))
  known = plain.terms(logits, jax.tree.map(flat, fields))
  np.testing.assert_allclose(own.loss, width * known.loss, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(own.cross_entropy, known.cross_entropy)
  assert np.isnan(own.nll).all()  # It is not a bound.


def test_the_loss_is_a_part_of_the_integral():
  # The plain objective's levels outside of the range count as 0.
  table = jnp.asarray(toys.random_table(1))
  sums = []
  for objective in (relaxed(), Uniform(MASK)):
    _, _, noised = corrupt(objective, 60_000)
    flat = lambda x: jnp.reshape(x, (-1, *x.shape[2:]))
    logits = flat(table[toys.canvas_index(noised.tokens)])
    loss = objective.terms(logits, jax.tree.map(flat, noised.fields)).loss
    loss = np.where(noised.scored, loss.reshape(noised.tokens.shape), 0).sum(1)
    inside = (noised.t > 0.05) & (noised.t < 0.95)
    sums.append(np.where(inside, loss, 0))
  error = sums[0].mean() - sums[1].mean()
  scale = np.hypot(*(x.std() / len(x) ** 0.5 for x in sums))
  assert abs(error) < 4 * scale and scale < 0.02 * sums[0].mean()
  assert sums[0].std() < sums[1].std()


def test_the_inverse_of_the_clock():
  t = jnp.linspace(0, 1, 101)
  back = times.smoothstep(times.inverse_smoothstep(t))[0]
  np.testing.assert_allclose(back, t, atol=1e-6)


def test_which_forms_are_relaxed():
  plain = Uniform(MASK, curriculum_steps=5, num_soft_tokens=3)
  assert type(plain.evaluation()) is type(plain.naive()) is Uniform
  assert type(plain.curriculum()) is uniform.Relaxed
  off = dataclasses.replace(plain, curriculum_steps=0)
  assert off.curriculum() is off
  assert off.unread_keys(True) == {'tau', 'num_soft_tokens'}
  assert not plain.unread_keys(True)


@pytest.mark.parametrize(
  'changes',
  [
    {'tau': -0.1},
    {'tau': float('nan')},
    {'num_soft_tokens': 0},
    {'curriculum_steps': -1},
    {'curriculum_steps': 1, 'num_soft_tokens': MASK + 1},
  ],
)
def test_errors_name_the_key(changes):
  key, value = list(changes.items())[-1]
  with pytest.raises(InputError, match=f'objective.{key}={value!r} must be'):
    Uniform(MASK, **changes).curriculum()
