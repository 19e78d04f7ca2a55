"""Tests of nanodlm.noise.processes: posteriors, by enumeration."""

import itertools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.noise import processes, schedules
from tests import toys

MASK = 3
NUM = 20_000


def keys_of(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


class MaskedTest(parameterized.TestCase):
  process = processes.Masked(MASK)

  def marginal(self, noise):
    """q(xt | x0), [x0, xt]."""
    q = np.eye(4) * (1 - noise)
    q[:, MASK] += noise
    return q[:MASK]

  def posterior(self, xt, p_x0, noise_s, noise_t):
    return np.asarray(
      self.process.reveal(
        jnp.array([[xt]]),
        jnp.asarray(p_x0, jnp.float32)[None, None],
        jnp.array([[(noise_t - noise_s) / noise_t]], jnp.float32),
      )
    )[0, 0]

  def test_end_points(self):
    x0 = jnp.array([[0, 1, 2]] * 2)
    eligible = jnp.array([[True, True, True], [True, False, True]])
    corrupt = lambda noise: self.process.corrupt(
      keys_of(2), jnp.full((2,), noise), x0, eligible
    )
    np.testing.assert_array_equal(corrupt(0.0), x0)
    np.testing.assert_array_equal(corrupt(1.0), [[MASK] * 3, [MASK, 1, MASK]])
    np.testing.assert_array_equal(
      self.process.sample_prior(keys_of(2), 3), [[MASK] * 3] * 2
    )

  def test_corrupt_is_the_marginal_of_each_token_alone(self):
    x0 = jnp.tile(jnp.array([[0, 2]]), (NUM, 1))
    noise = jnp.where(jnp.arange(NUM) % 2, 0.25, 0.7)
    xt = jax.jit(self.process.corrupt)(
      keys_of(NUM), noise, x0, jnp.ones(x0.shape, bool)
    )
    for parity, level in ((0, 0.7), (1, 0.25)):
      pairs = np.asarray(xt)[parity::2]
      counts = np.histogram2d(pairs[:, 0], pairs[:, 1], range(5))[0]
      q = self.marginal(level)
      self.assertGreater(toys.chi_square(counts, np.outer(q[0], q[2])), 1e-3)

  @parameterized.parameters((0.0, 0.3), (0.2, 0.21), (0.5, 1.0), (0.0, 1.0))
  def test_posterior_agrees_with_the_marginals(self, noise_s, noise_t):
    q_s, q_t = self.marginal(noise_s), self.marginal(noise_t)
    for x0 in range(MASK):
      steps = np.array(
        [self.posterior(xt, np.eye(4)[x0], noise_s, noise_t) for xt in range(4)]
      )
      # A token other than x0 is never reached; no posterior is used there.
      np.testing.assert_allclose(steps.sum(1), 1, rtol=1e-6)
      np.testing.assert_allclose(q_t[x0] @ steps, q_s[x0], atol=1e-6)
      # Bayes, with q(xt | xs): a token is kept with alpha_t / alpha_s.
      keep = (1 - noise_t) / (1 - noise_s)
      forward = np.eye(4) * keep
      forward[:, MASK] += 1 - keep
      bayes = q_s[x0] * forward[:, MASK] / q_t[x0, MASK]
      np.testing.assert_allclose(steps[MASK], bayes, atol=1e-6)

  def test_posterior_is_linear_in_the_prediction(self):
    p = np.float32([0.5, 0.2, 0.3, 0.0])
    mixed = self.posterior(MASK, p, 0.2, 0.6)
    parts = [self.posterior(MASK, np.eye(4)[v], 0.2, 0.6) for v in range(3)]
    np.testing.assert_allclose(mixed, p[:3] @ np.array(parts), atol=1e-6)

  @parameterized.parameters(0, 1, 2, 3, 4)
  def test_count_is_exact_and_subsets_are_equally_likely(self, count):
    eligible = np.array([True, False, True, True, True, False])
    x0 = jnp.tile(jnp.array([[0, 1, 2, 0, 1, 2]]), (NUM, 1))
    xt = np.asarray(
      jax.jit(self.process.corrupt_count)(
        keys_of(NUM, count),
        jnp.full(NUM, count),
        x0,
        jnp.tile(eligible, (NUM, 1)),
      )
    )
    masked = xt == MASK
    np.testing.assert_array_equal(masked.sum(1), count)
    self.assertFalse(masked[:, ~eligible].any())
    np.testing.assert_array_equal(np.where(masked, x0, xt), x0)
    subsets = list(itertools.combinations(np.flatnonzero(eligible), count))
    index = {subset: i for i, subset in enumerate(subsets)}
    counts = np.bincount(
      [index[tuple(np.flatnonzero(row))] for row in masked],
      minlength=len(subsets),
    )
    if len(subsets) > 1:
      self.assertGreater(
        toys.chi_square(counts, np.ones(len(subsets)) / len(subsets)), 1e-3
      )


MIXTURES = {
  'uniform': processes.Uniform(MASK),
  'uniform_cosine': processes.Uniform(MASK, schedules.Cosine()),
  'hybrid': processes.Hybrid(MASK, p_uniform=0.3),
  'hybrid_gamma_2': processes.Hybrid(MASK, p_uniform=0.5, gamma=2.0),
  'hybrid_masked': processes.Hybrid(MASK, p_uniform=0.0),
}


class MixtureTest(parameterized.TestCase):
  def marginal(self, process, t):
    """q(xt | x0), [x0, xt], float64."""
    return toys.mixture_law(
      *(np.float64(x) for x in process.parts(jnp.float32(t)))
    )

  @parameterized.named_parameters(MIXTURES.items())
  def test_shares(self, process):
    t = jnp.linspace(0, 1, 101)
    parts = process.parts(t)
    np.testing.assert_allclose(sum(parts), 1, rtol=1e-6)
    self.assertGreaterEqual(min(np.min(share) for share in parts), 0)
    self.assertLess(np.max(np.diff(parts.alpha)), 0)
    self.assertEqual([share[0] for share in parts], [1, 0, 0])
    self.assertLess(parts.alpha[-1], 1e-7)
    if isinstance(process, processes.Hybrid):
      p = process.p_uniform
      np.testing.assert_allclose(parts.uniform[50], p, rtol=1e-6)
      self.assertEqual(np.argmax(parts.uniform), 50 if p else 0)
    else:
      self.assertEqual(np.max(parts.mask), 0)

  @parameterized.named_parameters(MIXTURES.items())
  def test_prior_is_the_noise_at_the_end(self, process):
    tokens = np.asarray(process.sample_prior(keys_of(NUM), 2))
    counts = np.histogram2d(tokens[:, 0], tokens[:, 1], range(5))[0]
    q = self.marginal(process, 1.0)
    self.assertGreater(toys.chi_square(counts, np.outer(q[0], q[1])), 1e-3)

  @parameterized.named_parameters(MIXTURES.items())
  def test_corrupt_is_the_marginal_of_each_token_alone(self, process):
    x0 = jnp.tile(jnp.array([[0, 1, 2]]), (NUM, 1))
    eligible = jnp.tile(jnp.array([[True, False, True]]), (NUM, 1))
    t = jnp.where(jnp.arange(NUM) % 2, 0.25, 0.7)
    xt = np.asarray(
      jax.jit(process.corrupt)(keys_of(NUM), process.parts(t), x0, eligible)
    )
    np.testing.assert_array_equal(xt[:, 1], 1)
    for parity, time in ((0, 0.7), (1, 0.25)):
      pairs = xt[parity::2]
      counts = np.histogram2d(pairs[:, 0], pairs[:, 2], range(5))[0]
      q = self.marginal(process, time)
      self.assertGreater(toys.chi_square(counts, np.outer(q[0], q[2])), 1e-3)

  @parameterized.product(
    process=list(MIXTURES.values()),
    interval=((0.0, 0.3), (0.2, 0.21), (0.5, 1.0), (0.0, 1.0)),
  )
  def test_posterior_agrees_with_the_marginals(self, process, interval):
    s, t = interval
    q_s, q_t = self.marginal(process, s), self.marginal(process, t)
    # q(xt | xs) is a mixture, too: the one that maps q_s to q_t.
    alpha_s, alpha_t = (
      np.float64(process.parts(jnp.float32(x)).alpha) for x in interval
    )
    ratio = alpha_t / alpha_s
    noise = lambda q, alpha: q[0] - alpha * np.eye(4)[0]
    jump = noise(q_t, alpha_t) - ratio * noise(q_s, alpha_s)
    forward = ratio * np.eye(4) + jump[None]  # [xs, xt]
    np.testing.assert_allclose(forward.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(q_s @ forward, q_t, atol=1e-6)
    for p_x0 in (*np.eye(4)[:3], np.array([0.5, 0.2, 0.3, 0.0])):
      steps = np.asarray(
        process.posterior(
          jnp.arange(4)[:, None],
          jnp.asarray(np.tile(p_x0, (4, 1, 1)), jnp.float32),
          jnp.float32(s),
          jnp.float32(t),
        )
      )[:, 0]  # [xt, xs]
      np.testing.assert_allclose(steps.sum(1), 1, rtol=1e-5)
      before, after = p_x0[:3] @ q_s, p_x0[:3] @ q_t
      np.testing.assert_allclose(after @ steps, before, atol=1e-5)
      possible = after > 1e-6
      bayes = before[:, None] * forward / np.maximum(after, 1e-12)
      np.testing.assert_allclose(steps[possible], bayes.T[possible], atol=1e-5)
      # Tokens that are impossible under p_x0 remain.
      np.testing.assert_allclose(steps[~possible], np.eye(4)[~possible])
      if s == 0:
        np.testing.assert_allclose(steps[possible, MASK], 0)

  @parameterized.parameters((0.0, 0.3), (0.2, 0.21), (0.5, 1.0))
  def test_without_uniform_tokens_it_is_masked_noise(self, s, t):
    xt = jnp.array([[MASK, 1, 2]])
    p_x0 = jnp.array([[[0.5, 0.2, 0.3, 0.0]] * 3])
    np.testing.assert_allclose(
      MIXTURES['hybrid_masked'].posterior(
        xt, p_x0, jnp.float32(s), jnp.float32(t)
      ),
      processes.Masked(MASK).reveal(xt, p_x0, jnp.full((1, 3), (t - s) / t)),
      atol=1e-6,
    )

  def test_ids_above_the_mask_are_never_reached(self):
    p_x0 = jnp.array([[[0.5, 0.2, 0.3, 0.0, 0.0, 0.0]]])
    step = MIXTURES['hybrid'].posterior(
      jnp.array([[1]]), p_x0, jnp.float32(0.3), jnp.float32(0.6)
    )
    self.assertGreater(step[0, 0, MASK], 0)
    np.testing.assert_array_equal(step[0, 0, MASK + 1 :], 0)


class RandomRankTest(parameterized.TestCase):
  def test_every_order_is_equally_likely(self):
    eligible = np.array([True, False, True, True])
    rank = np.asarray(
      jax.jit(processes.random_rank)(keys_of(NUM), jnp.tile(eligible, (NUM, 1)))
    )
    self.assertEqual(rank.dtype, np.int32)
    np.testing.assert_array_equal(rank[:, 1], 3)
    index = {
      order: i for i, order in enumerate(itertools.permutations(range(3)))
    }
    counts = np.bincount(
      [index[tuple(row)] for row in rank[:, eligible]], minlength=6
    )
    self.assertGreater(toys.chi_square(counts, np.full(6, 1 / 6)), 1e-3)

  def test_of_rows_of_any_length(self):
    eligible = np.random.default_rng(0).random((64, 9)) < 0.5
    eligible[0], eligible[1] = False, True
    rank = np.asarray(processes.random_rank(keys_of(64), jnp.asarray(eligible)))
    np.testing.assert_array_equal(np.sort(rank), np.tile(np.arange(9), (64, 1)))
    np.testing.assert_array_equal(
      rank < eligible.sum(1, keepdims=True), eligible
    )
