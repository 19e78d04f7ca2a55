"""Tests of nanodlm.noise.categorical: frequencies, also of rare tokens."""

from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from nanodlm.noise import categorical
from nanodlm.noise.categorical import Draw
from nanodlm.types import InputError
from tests import toys

MASK = 8
LOGITS = np.random.default_rng(0).normal(size=10).astype(np.float32) * 1.5
LOGITS[MASK:] = 30.0  # The mask, and padding of the vocabulary.


def softmax(logits):
  p = np.exp(np.asarray(logits, np.float64) - np.max(logits))
  return p / p.sum()


def draw_many(draw, logits, num=20_000):
  """Counts each id over rows and positions."""
  num_rows, num_slots = num // 4, 4
  keys = jax.random.split(jax.random.key(0), num_rows)
  logits = jnp.broadcast_to(
    jnp.asarray(logits), (num_rows, num_slots, len(logits))
  )
  tokens = jax.jit(draw.sample)(keys, logits)
  return np.bincount(np.asarray(tokens).reshape(-1), minlength=logits.shape[-1])


def nucleus(p, top_p):
  """Renormalises p on the smallest set of best tokens with at least top_p."""
  order = np.argsort(-p)
  num = np.searchsorted(np.cumsum(p[order]), top_p) + 1
  kept = np.zeros_like(p)
  kept[order[:num]] = p[order[:num]]
  return kept / kept.sum()


class DrawTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 0.5, 2.0)
  def test_frequencies(self, temperature):
    expected = np.zeros(10)
    expected[:MASK] = softmax(LOGITS[:MASK] / temperature)
    counts = draw_many(Draw(MASK, temperature), LOGITS)
    self.assertGreater(toys.chi_square(counts, expected), 1e-3)

  def test_rare_tokens_are_drawn_at_their_rate(self):
    # 512 tokens, each 12 nats below the best.
    logits = np.full(514, -12.0, np.float32)
    logits[0], logits[513] = 0, 50
    counts = draw_many(Draw(513), logits)
    p = 512 * np.exp(-12) / (1 + 512 * np.exp(-12))
    self.assertGreater(
      stats.binomtest(int(counts[1:].sum()), 20_000, p).pvalue, 1e-3
    )

  def test_the_tail_of_the_noise_is_not_cut_off(self):
    # The default mode cannot draw a token 17 nats below the best. Frequencies
    # would show that after 10^9 draws only, so the request is checked.
    with mock.patch.object(
      jax.random, 'categorical', wraps=jax.random.categorical
    ) as categorical_draw:
      Draw(2).sample(
        jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 1, 3))
      )
    self.assertEqual(categorical_draw.call_args.kwargs['mode'], 'high')
    self.assertEqual(categorical_draw.call_args.args[1].dtype, jnp.float32)

  def test_zero_temperature_is_the_best(self):
    counts = draw_many(Draw(MASK, temperature=0), LOGITS, 400)
    self.assertEqual(counts[LOGITS[:MASK].argmax()], 400)
    log_p = Draw(MASK, temperature=0).log_prob(LOGITS)
    np.testing.assert_allclose(
      np.exp(log_p), np.eye(10)[LOGITS[:MASK].argmax()]
    )

  @parameterized.parameters(1, 3, 7, 8, 100)
  def test_top_k(self, top_k):
    p = softmax(LOGITS[:MASK])
    p[np.argsort(-p)[top_k:]] = 0
    log_p = Draw(MASK, top_k=top_k).log_prob(LOGITS)
    np.testing.assert_allclose(np.exp(log_p[:MASK]), p / p.sum(), rtol=1e-5)
    np.testing.assert_array_equal(np.exp(log_p[MASK:]), 0)

  @parameterized.parameters(1e-6, 0.3, 0.5, 0.9, 0.99, 1.0)
  def test_top_p(self, top_p):
    for seed in range(20):
      logits = np.random.default_rng(seed).normal(size=10).astype(np.float32)
      expected = nucleus(softmax(logits[:MASK]), top_p)
      log_p = Draw(MASK, top_p=top_p).log_prob(logits)
      np.testing.assert_allclose(np.exp(log_p[:MASK]), expected, rtol=1e-5)
      np.testing.assert_array_equal(np.exp(log_p[MASK:]), 0)

  @parameterized.parameters(
    # temperature, top_k, top_p, the probabilities of ids 0 to 3
    (1e-30, 0, 1.0, [0, 0.5, 0.5, 0]),
    (1e-37, 0, 1.0, [0, 0.5, 0.5, 0]),
    (1e-37, 3, 0.9, [0, 0.5, 0.5, 0]),
    (100.0, 0, 1.0, softmax(np.array([0.01, 0.02, 0.02, 0.0]))),
    (0.0, 0, 1.0, [0, 1, 0, 0]),
    (1.0, 1, 1.0, [0, 1, 0, 0]),
    (1.0, 0, 0.0, [0, 1, 0, 0]),
    (1.0, 0, 1e-45, [0, 1, 0, 0]),
    (1.0, 2, 1.0, [0, 0.5, 0.5, 0]),
    (1.0, 2, 0.4, [0, 1, 0, 0]),
    (1.0, 2**40, 1.0, softmax(np.array([1, 2, 2, 0]))),
  )
  def test_extremes_and_ties(self, temperature, top_k, top_p, expected):
    logits = np.float32([[[1, 2, 2, 0, 9, 3e8]]])
    draw = Draw(4, temperature, top_k, top_p)
    rows = np.broadcast_to(logits, (256, 1, 6))
    array = lambda x, dtype: jnp.full(1, x, dtype)
    own = categorical.RowDraw(
      4,
      array(temperature, jnp.float32),
      array(min(top_k, 4), jnp.int32),
      array(top_p, jnp.float32),
    )
    for one in (draw, own):
      np.testing.assert_allclose(
        np.exp(one.log_prob(logits)[0, 0]), [*expected, 0, 0], rtol=1e-6
      )
      keys = jax.random.split(jax.random.key(0), 256)
      counts = np.bincount(np.ravel(one.sample(keys, rows)), minlength=6)
      np.testing.assert_array_equal(counts > 0, np.array([*expected, 0, 0]) > 0)

  def test_ties_leave_as_many_tokens_as_wanted(self):
    equal = np.zeros(9, np.float32)
    for settings, num in (
      (dict(top_k=1), 1),
      (dict(top_k=3), 3),
      (dict(top_p=0.5), 4),
      (dict(top_p=0.51), 5),
      (dict(top_k=4, top_p=0.5), 2),
    ):
      p = np.exp(Draw(8, **settings).log_prob(equal))
      np.testing.assert_allclose(p, (np.arange(9) < num) / num, rtol=1e-6)

  def test_top_k_then_top_p(self):
    p = softmax(LOGITS[:MASK] / 0.7)
    p[np.argsort(-p)[5:]] = 0
    expected = nucleus(p / p.sum(), 0.8)
    log_p = Draw(MASK, 0.7, top_k=5, top_p=0.8).log_prob(LOGITS)
    np.testing.assert_allclose(np.exp(log_p[:MASK]), expected, rtol=1e-5)
    counts = draw_many(Draw(MASK, 0.7, top_k=5, top_p=0.8), LOGITS)
    self.assertGreater(toys.chi_square(counts[:MASK], expected), 1e-3)

  def test_rows_and_slots_are_independent(self):
    keys = jax.random.split(jax.random.key(0), 5000)
    tokens = np.asarray(Draw(2).sample(keys, jnp.zeros((5000, 2, 3))))
    both = tokens[:-1, 0] + 2 * tokens[:-1, 1] + 4 * tokens[1:, 0]
    counts = np.bincount(both, minlength=8)
    self.assertGreater(toys.chi_square(counts, np.full(8, 1 / 8)), 1e-3)

  def test_settings_of_each_row(self):
    settings = [
      (1.0, 0, 1.0),
      (0.0, 0, 1.0),
      (0.7, 3, 1.0),
      (1.3, 0, 0.6),
      (0.5, 4, 0.9),
      (1.0, 99, 0.01),
    ]
    keys = lambda: jax.random.split(jax.random.key(5), len(settings))
    logits = 2 * jax.random.normal(
      jax.random.key(6), (len(settings), 4, MASK + 2)
    )
    temperature, top_k, top_p = map(np.array, zip(*settings))
    for rows in (
      slice(None),
      slice(0, 1),
      slice(0, 2),
    ):  # With and without cuts.
      draw = categorical.RowDraw(
        MASK, temperature[rows], top_k[rows], top_p[rows]
      )
      log_p = draw.log_prob(logits[rows])
      tokens = draw.sample(keys()[rows], logits[rows])
      for i, setting in enumerate(settings[rows]):
        one = Draw(MASK, *setting)
        np.testing.assert_allclose(
          log_p[i], one.log_prob(logits[i]), rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(
          tokens[i], one.sample(keys()[i : i + 1], logits[i : i + 1])[0]
        )

  def test_low_precision_logits(self):
    # Normalised in float32: a bfloat16 sum of 1000 terms would be wrong.
    logits = jnp.zeros(1001, jnp.bfloat16)
    log_p = Draw(1000).log_prob(logits)
    self.assertEqual(log_p.dtype, jnp.float32)
    np.testing.assert_allclose(log_p[:1000], -np.log(1000), rtol=1e-6)

  @parameterized.parameters(
    ({'temperature': -1.0}, 'sampler.temperature=-1.0'),
    ({'temperature': float('nan')}, 'sampler.temperature=nan'),
    ({'temperature': float('inf')}, 'sampler.temperature=inf'),
    ({'temperature': 1e30}, 'sampler.temperature=1e.30'),
    ({'top_k': -1}, 'sampler.top_k=-1'),
    ({'top_p': -0.5}, 'sampler.top_p=-0.5'),
    ({'top_p': float('nan')}, 'sampler.top_p=nan'),
    ({'top_p': 1.5}, 'sampler.top_p=1.5'),
  )
  def test_errors(self, fields, message):
    with self.assertRaisesRegex(InputError, message):
      Draw(MASK, **fields)


class CrossEntropyTest(parameterized.TestCase):
  def test_value_and_gradient(self):
    rng = np.random.default_rng(0)
    logits = (5 * rng.normal(size=(64, 10))).astype(np.float32)
    targets = rng.integers(MASK, size=64)
    targets[:8] = logits[:8, :MASK].argmax(1)

    def ours(x):
      return categorical.cross_entropy(x, targets, MASK)[0]

    def optaxs(x):
      return optax.softmax_cross_entropy_with_integer_labels(
        x[:, :MASK], targets
      )

    weight = rng.normal(size=64).astype(np.float32)
    np.testing.assert_allclose(
      ours(logits), optaxs(logits), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
      jax.grad(lambda x: ours(x) @ weight)(logits),
      jax.grad(lambda x: optaxs(x) @ weight)(logits),
      atol=1e-6,
    )
    correct = categorical.cross_entropy(logits, targets, MASK)[1]
    np.testing.assert_array_equal(
      correct, logits[:, :MASK].argmax(1) == targets
    )

  def test_extreme_logits(self):
    logits = np.float32([[1e4, -1e4, 0, 9e9], [0, 0, 0, 9e9]])
    targets = np.array([1, 2])
    ce, gradient = jax.value_and_grad(
      lambda x: jnp.sum(categorical.cross_entropy(x, targets, 3)[0])
    )(logits)
    np.testing.assert_allclose(ce, 2e4 + np.log(3), rtol=1e-6)
    np.testing.assert_allclose(
      gradient, [[1, -1, 0, 0], [1 / 3, 1 / 3, -2 / 3, 0]], atol=1e-6
    )
