"""Tests of nanodlm.noise.gaussian: laws of the argmax and of its neighbours."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from nanodlm.noise import gaussian
from tests import toys

NUM, DRAWS = 3, 20_000


def draw(mean, num_kept, tau, num_tokens=NUM, x0=1, draws=DRAWS):
  soft = jax.jit(gaussian.sample_soft, static_argnums=(3, 4, 5))(
    jax.random.split(jax.random.key(0), draws // 4),
    jnp.full((draws // 4, 4), x0, jnp.int32),
    jnp.full((draws // 4,), mean),
    num_tokens,
    num_kept,
    tau,
  )
  return jax.tree.map(lambda x: np.asarray(x).reshape(draws, -1), soft)


@pytest.mark.parametrize('alpha', [0.05, 0.4, 0.95])
@pytest.mark.parametrize('num_kept', [1, 2, 3])
def test_the_largest_has_the_law_of_uniform_noise(alpha, num_kept):
  mean = gaussian.mean_at(jnp.float32(alpha), NUM)
  z = draw(mean, num_kept, 0.3).ids[:, 0]
  expected = alpha * (np.arange(NUM) == 1) + (1 - alpha) / NUM
  assert toys.chi_square(np.bincount(z, minlength=NUM), expected) > 1e-3


@pytest.mark.parametrize('num_tokens', [2, 3, 67, 50_257])
def test_alpha_and_its_inverse(num_tokens):
  # Two tokens: a normal probability. More: adaptive quadrature.
  alphas = np.linspace(0.03, 0.97, 40)
  mean = np.float64(gaussian.mean_at(jnp.float32(alphas), num_tokens))
  if num_tokens == 2:
    known = 2 * special.ndtr(mean / 2**0.5) - 1
  else:
    # 1 - P in parts, with v = mu + e.
    beaten = lambda e, mu: (
      (1 - special.ndtr(mu + e) ** (num_tokens - 1)) * np.exp(-e * e / 2)
    )
    lost = [
      integrate.quad(beaten, -9, 9, mu, points=[-2, 0, 2])[0] for mu in mean
    ]
    p = 1 - np.array(lost) / (2 * np.pi) ** 0.5
    known = (num_tokens * p - 1) / (num_tokens - 1)
  np.testing.assert_allclose(known, alphas, atol=2e-5)
  # alpha(0) = 0, and the slope is that of differences.
  at = lambda mean: gaussian.alpha_of(np.array([mean]), num_tokens)[0]
  np.testing.assert_allclose(at(0.0), 0, atol=1e-9)
  slope = jax.grad(lambda a: gaussian.mean_at(a, num_tokens))(0.5)
  middle = float(gaussian.mean_at(jnp.float32(0.5), num_tokens))
  difference = (at(middle + 1e-4) - at(middle - 1e-4)) / 2e-4
  np.testing.assert_allclose(1 / slope, difference, rtol=5e-3)


@pytest.mark.parametrize('num_kept', [2, 4, 6])
def test_the_largest_entries_are_those_of_all(num_kept):
  # Whole Gaussians give the law of the ids in their order, with x0 at its own
  # rank, and the means of the weights, normalised over those that are kept.
  num, mean, tau = 6, 1.2, 0.5
  soft = draw(mean, num_kept, tau, num, x0=2)
  w = np.random.default_rng(0).normal(size=(200_000, num))
  w[:, 2] += mean
  order = np.argsort(-w, axis=1)[:, :num_kept]
  logits = np.take_along_axis(w, order, 1) / (tau * (1 + mean**2) ** 0.5)
  weights = special.softmax(logits, axis=1)
  np.testing.assert_array_less(np.diff(soft.weights), 1e-7)
  for known, own in ((weights, soft.weights), (weights**2, soft.weights**2)):
    np.testing.assert_allclose(own.mean(0), known.mean(0), atol=8e-3)
  np.testing.assert_allclose(soft.weights.sum(1), 1, rtol=1e-6)
  rank = lambda ids: np.bincount(
    np.where((ids == 2).any(1), (ids == 2).argmax(1), num_kept),
    minlength=num_kept + 1,
  )
  assert toys.chi_square(rank(soft.ids), rank(order) + 1e-9) > 1e-3
  # Given that x0 is first, the others are in uniformly random order.
  first = soft.ids[soft.ids[:, 0] == 2][:, 1:]
  others = np.delete(np.arange(num), 2)
  rows = list(itertools.permutations(others, num_kept - 1))
  counts = [(first == row).all(1).sum() for row in rows]
  assert sum(counts) == len(first)
  assert toys.chi_square(counts, np.ones(len(rows))) > 1e-3


def test_no_temperature():
  soft = draw(1.0, 3, 0.0)
  np.testing.assert_array_equal(soft.weights, [[1, 0, 0]] * DRAWS)


def test_large_vocabularies():
  # The largest of 49,999 others has the median of Phi^49999.
  soft = draw(0.0, 8, 0.5, 50_000)
  assert all(len(set(row)) == 8 for row in soft.ids)
  assert np.isfinite(soft.weights).all()
  assert abs(soft.ids.mean() / 49_999 - 0.5) < 0.01
  tail = -np.log1p(-np.linspace(0.001, 0.999, 50)) / 49_999
  np.testing.assert_allclose(
    gaussian._normal_quantile(jnp.float32(tail)),
    -special.ndtri(-np.expm1(-tail)),
    rtol=1e-5,
  )
