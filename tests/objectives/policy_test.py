"""Tests of nanodlm.objectives.policy and preference by enumeration of texts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm import objectives
from nanodlm.objectives import policy
from nanodlm.objectives.ar import Autoregressive
from nanodlm.objectives.block import Block
from nanodlm.objectives.d3pm import D3PM
from nanodlm.objectives.genmd4 import GenMD4
from nanodlm.objectives.masked import Masked
from nanodlm.objectives.sedd import ScoreEntropy
from nanodlm.objectives.uniform import Uniform
from nanodlm.steps.network import Scorer
from nanodlm.types import Hidden, InputError
from tests import toys
from tests.objectives.distill_test import batch_of, Table
from tests.toys import LENGTH, MASK, TEXTS

NUM = len(TEXTS)
REWARD = np.random.default_rng(5).normal(size=NUM).astype(np.float32)
SEQUENCE, ONE_STEP, COUPLED, DPO = (
  objectives.POLICIES[name]
  for name in ('sequence', 'one_step', 'coupled', 'dpo')
)
CANVAS = np.where(
  np.tril(np.ones((LENGTH, LENGTH), bool), -1), TEXTS[:, None], MASK
)


class Causal(Table):
  """Position i sees the input's tokens 0 to i, which are x0 before i."""

  def hidden(self, params, tokens, t, *, positions=None, **_):
    x0 = jnp.roll(tokens, -1, axis=1)[:, None]
    before = np.tril(np.ones((LENGTH, LENGTH), bool), -1)
    canvas = jnp.where(before[None], x0, MASK)
    states = params['table'][toys.canvas_index(canvas), np.arange(LENGTH)]
    if positions is not None:
      states = states.reshape(-1, states.shape[-1])[positions]
    return Hidden(states)


def table(seed):
  return jnp.asarray(toys.random_table(seed))


def ar_log_p(table):
  """The exact log p of each of TEXTS, [27]."""
  log_p = jax.nn.log_softmax(table[..., :MASK])
  seen = log_p[toys.canvas_index(CANVAS), np.arange(LENGTH)]
  return jnp.take_along_axis(seen, TEXTS[..., None], axis=2)[..., 0].sum(1)


@functools.partial(jax.jit, static_argnums=0)
def run(objective, params, frozen, batch, key):
  """The total loss, its gradient and the reports."""
  network = Causal() if objective.base.exact else Table()
  scorer = Scorer(network, objective, chunk_size=1000)
  level_key, noise_key = jax.random.split(key)
  levels = objective.sample_levels(level_key, len(batch.tokens), LENGTH)
  keys = jax.random.split(noise_key, len(batch.tokens))

  def loss(table):
    copies = {name: {'table': x} for name, x in frozen.items()}
    score = scorer.scoring({'table': table}, copies)
    scores = objective.loss(batch, levels, keys, score)
    return scores.total, scores

  (total, scores), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  return total, gradient, scores


def weighted(weight, texts=TEXTS):
  return batch_of(texts)._replace(weight=np.asarray(weight, np.float32))


def test_every_entry_has_a_row():
  assert {SEQUENCE, ONE_STEP, COUPLED, DPO} == {*objectives.POLICIES.values()}


def test_the_gradient_is_that_of_the_mean_reward():
  params = table(0)
  p = np.exp(np.asarray(ar_log_p(params), np.float64))
  assert p.sum() == pytest.approx(1)
  objective = SEQUENCE(Autoregressive(MASK))
  _, gradient, _ = run(
    objective, params, {}, weighted(p * REWARD), jax.random.key(0)
  )
  mean_reward = lambda table: jnp.sum(jnp.exp(ar_log_p(table)) * REWARD)
  true = jax.grad(mean_reward)(params)
  np.testing.assert_allclose(-gradient, true, atol=1e-5)
  assert np.abs(true).max() > 1e-2


def test_the_divergence_and_its_gradient():
  params, reference = table(0), table(1)
  objective = SEQUENCE(Autoregressive(MASK), kl_weight=0.5)
  true_of = lambda x: jnp.sum(
    jnp.exp(ar_log_p(x)) * (ar_log_p(x) - ar_log_p(reference))
  )
  p = np.exp(np.asarray(ar_log_p(params)))
  value, total = 0.0, 0.0
  for text, share in zip(TEXTS, p):
    _, gradient, scores = run(
      objective,
      params,
      {'reference': reference},
      weighted([0.0], text[None]),
      jax.random.key(0),
    )
    value += share * scores.reports['kl'][0]
    total += share * gradient
  true, true_gradient = jax.value_and_grad(true_of)(params)
  assert value == pytest.approx(float(true), rel=1e-5)
  np.testing.assert_allclose(total, 0.5 * true_gradient, atol=1e-5)


@pytest.mark.parametrize('cls', [SEQUENCE, ONE_STEP, COUPLED])
def test_reports_of_a_uniform_network(cls):
  # All estimates are the same: log p of a token, whatever its noise.
  uniform, reference = np.zeros_like(table(0)), np.zeros_like(table(0))
  reference[..., 0] = np.log(2)
  objective = cls(Masked(MASK, noise='overlap'), kl_weight=0.5)
  found = []
  for i in range(200):
    scores = run(
      objective,
      uniform,
      {'reference': reference},
      weighted(np.zeros(NUM)),
      jax.random.key(i),
    )[2]
    found.append([scores.reports[key].mean() for key in ('entropy', 'kl')])
  deviation = np.std(found, axis=0) / len(found) ** 0.5
  per_text = LENGTH * (np.log(MASK + 1) - np.log(MASK) - np.log(2) / MASK)
  error = np.mean(found, axis=0) - [np.log(MASK), per_text]
  assert np.all(np.abs(error) < 5 * deviation + 1e-5)


@pytest.mark.parametrize('advantage', [1.5, -0.7])
def test_clipping(advantage):
  params, old = table(0), table(1)
  objective = SEQUENCE(Autoregressive(MASK), num_updates=2, clip=0.3)
  total, gradient, scores = run(
    objective,
    params,
    {'old': old},
    weighted(np.full(NUM, advantage)),
    jax.random.key(0),
  )
  gain = np.asarray(ar_log_p(params) - ar_log_p(old))
  ratio = np.exp(gain / LENGTH)
  is_clipped = np.abs(ratio - 1) > 0.3
  assert 0 < is_clipped.sum() < NUM
  np.testing.assert_allclose(scores.reports['clipped_share'], is_clipped)
  worse = np.minimum(ratio * advantage, np.clip(ratio, 0.7, 1.3) * advantage)
  np.testing.assert_allclose(total, -LENGTH * worse.sum(), rtol=1e-5)
  # Where clipping lowers the gain, it stops the gradient.
  slope = np.where(worse < ratio * advantage, 0, ratio * advantage)
  true = jax.grad(lambda x: jnp.sum(ar_log_p(x) * slope))(params)
  np.testing.assert_allclose(-gradient, true, atol=1e-4)


def cross_entropies(x, text, hidden):
  """-log p of each token of a text where `hidden` [L] is masked, [L]."""
  canvas = np.where(hidden, MASK, text)
  log_p = toys.log_softmax(np.asarray(x))[toys.canvas_index(canvas)]
  return -log_p[np.arange(LENGTH), text] * hidden


def overlapping(x, text):
  """The estimates of a pair of overlapping masks, [18], equally likely."""
  values = []
  for order in itertools.permutations(range(LENGTH)):
    for k in range(1, LENGTH + 1):
      first, last = (
        np.isin(range(LENGTH), o) for o in (order[:k], order[k - 1 :])
      )
      both = (
        LENGTH / count * cross_entropies(x, text, hidden).sum()
        for count, hidden in ((k, first), (LENGTH + 1 - k, last))
      )
      values.append(-sum(both) / 2)
  return np.array(values)


def single(x, text):
  """The estimates of a single mask, [7], and their probabilities."""
  values, shares = [], []
  for k in range(1, LENGTH + 1):
    subsets = [*itertools.combinations(range(LENGTH), k)]
    for subset in subsets:
      hidden = np.isin(range(LENGTH), subset)
      loss = cross_entropies(x, text, hidden).sum()
      values.append(-LENGTH / k * loss)
      shares.append(1 / LENGTH / len(subsets))
  return np.array(values), np.array(shares)


@functools.cache
def estimates(num_draws):
  """The code's estimates of log p(TEXTS[5]) by 6000 keys, [6000]."""
  objective = SEQUENCE(Masked(MASK), num_draws=num_draws)
  batch = weighted(np.ones(6000), np.repeat(TEXTS[5:6], 6000, axis=0))
  _, _, scores = run(objective, table(2), {}, batch, jax.random.key(1))
  return -np.asarray(scores.losses).reshape(6000, -1).sum(1)


def test_the_law_of_the_bounds():
  expected = overlapping(table(2), TEXTS[5])
  values, places = np.unique(expected.round(4), return_inverse=True)
  nearest = np.abs(estimates(2)[:, None] - values).argmin(axis=1)
  np.testing.assert_allclose(estimates(2), values[nearest], atol=1e-3)
  counts = np.bincount(nearest, minlength=len(values))
  assert toys.chi_square(counts, np.bincount(places) / 18) > 1e-3
  # The bound: any number of draws has its mean.
  bound = -toys.any_order_nll(np.asarray(table(2)), TEXTS[5])
  assert expected.mean() == pytest.approx(bound)
  for num_draws in (2, 4):
    error = estimates(num_draws).std() / 6000**0.5
    assert abs(estimates(num_draws).mean() - bound) < 4 * error


def test_shared_noise_has_less_variance():
  # Averages over all texts: of two networks, one step of training apart.
  old = toys.random_table(2)
  new = old + 0.1 * toys.random_table(3)
  variance = dict.fromkeys(('shared', 'independent', 'single'), 0.0)
  for text in TEXTS:
    a, b = (overlapping(x, text) for x in (new, old))
    variance['shared'] += np.var(a - b) / NUM
    variance['independent'] += (np.var(a) + np.var(b)) / NUM
    (c, shares), (d, _) = (single(x, text) for x in (new, old))
    # Two single masks of independent noise, the same number of calls.
    each = [np.sum(shares * x**2) - np.sum(shares * x) ** 2 for x in (c, d)]
    variance['single'] += sum(each) / 2 / NUM
  factor = variance['independent'] / variance['shared']
  assert factor == pytest.approx(SHARED_FACTOR, rel=0.01)
  assert variance['single'] > variance['independent']
  assert variance['single'] / variance['shared'] == pytest.approx(
    SINGLE_FACTOR, rel=0.01
  )


# Figures of this table, which are quoted in configs/policy.py.
SHARED_FACTOR, SINGLE_FACTOR = 181.0, 206.6


@pytest.mark.parametrize('name', ['one_step', 'coupled'])
def test_masks_and_weights(name):
  objective = objectives.POLICIES[name](Masked(MASK))
  num = 500
  texts = TEXTS[np.random.default_rng(0).integers(NUM, size=num)]
  batch = weighted(np.ones(num), texts)
  batch.eligible[::2, 0] = False
  levels = objective.sample_levels(jax.random.key(0), num, LENGTH)
  keys = jax.random.split(jax.random.key(1), num)
  noised = objective.corrupt(keys, levels, texts, batch.eligible)
  hidden = np.asarray(noised.tokens == MASK).reshape(num, -1, LENGTH)
  scale = np.asarray(noised.fields['scale']).reshape(hidden.shape)
  given = ~batch.eligible
  assert (hidden[:, 0] | given).all()
  if name == 'one_step':
    share = hidden[:, 0][given].mean()
    assert share == pytest.approx(0.3, abs=0.1) and (scale == 1).all()
  else:
    t = 0.2 + 0.6 * np.asarray(levels)
    assert not hidden[given[:, None] & np.ones_like(hidden)].any()
    # Complementary masks: each token is in one of the two.
    assert ((hidden[:, 1] ^ hidden[:, 2]) == batch.eligible).all()
    np.testing.assert_allclose(scale[:, 0], 0.5)
    np.testing.assert_allclose(scale[:, 1, 0], 0.5 / t, rtol=1e-5)
    np.testing.assert_allclose(scale[:, 2, 0], 0.5 / (1 - t), rtol=1e-5)
    rate = (hidden[:, 1] / t[:, None])[batch.eligible].mean()
    assert rate == pytest.approx(1, abs=0.1)
  # The loss is that of the masks, token by token.
  _, _, scores = run(objective, table(2), {}, batch, jax.random.key(3))
  assert np.isfinite(scores.losses).all()


def test_a_ratio_for_each_token():
  params, old = table(0), table(1)
  objective = ONE_STEP(Masked(MASK), num_updates=2, clip=0.2)
  advantage = np.linspace(-1, 1, NUM)
  total, _, _ = run(
    objective, params, {'old': old}, weighted(advantage), jax.random.key(0)
  )
  new, before = (
    np.array(
      [-cross_entropies(x, text, np.ones(LENGTH, bool)) for text in TEXTS]
    )
    for x in (params, old)
  )
  ratio, a = np.exp(new - before), advantage[:, None]
  value = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).sum()
  np.testing.assert_allclose(total, value, rtol=1e-4)


def test_what_is_given_is_not_clipped():
  params = table(0)
  # Nearly all ratios of the last position leave the interval.
  old = params.at[:, -1, 0].add(20.0)
  given = weighted(np.ones(NUM))
  eligible = np.zeros_like(given.eligible)
  eligible[:, -1] = True
  objective = ONE_STEP(Masked(MASK), num_updates=2, clip=0.2)
  _, _, scores = run(
    objective,
    params,
    {'old': old},
    given._replace(eligible=eligible),
    jax.random.key(0),
  )
  shares = np.array(scores.reports['clipped_share'])
  assert set(shares) <= {0.0, 1.0} and shares.mean() > 0.9


def test_the_gradient_of_preferences():
  params, reference = table(0), table(1)
  texts = TEXTS[np.random.default_rng(0).integers(NUM, size=20)]
  objective = DPO(Autoregressive(MASK), kl_weight=0.4)
  total, gradient, scores = run(
    objective,
    params,
    {'reference': reference},
    weighted(np.ones(20), texts),
    jax.random.key(0),
  )
  index = toys.text_index(texts)

  def value(x):
    x = np.asarray(x, np.float64)
    log_p = toys.log_softmax(x)[toys.canvas_index(CANVAS), np.arange(LENGTH)]
    log_p = np.take_along_axis(log_p, TEXTS[..., None], 2)[..., 0].sum(1)
    d = (log_p - np.asarray(ar_log_p(reference), np.float64))[index]
    return np.log1p(np.exp(-0.4 * (d[::2] - d[1::2]))), d[::2] - d[1::2]

  np.testing.assert_allclose(total, value(params)[0].sum(), rtol=1e-5)
  np.testing.assert_allclose(
    scores.reports['margin'][::2], 0.4 * value(params)[1], atol=1e-5
  )
  # Finite differences in some directions.
  rng = np.random.default_rng(1)
  for _ in range(5):
    step = 1e-4 * rng.normal(size=params.shape)
    up, down = (value(np.asarray(params) + x)[0].sum() for x in (step, -step))
    slope = np.sum(np.asarray(gradient) * step)
    assert slope == pytest.approx((up - down) / 2, rel=1e-3)


def test_preferences_of_bounds_share_their_noise():
  params, texts = table(0), TEXTS[:6]
  objective = DPO(Masked(MASK), kl_weight=0.4)
  run_ = functools.partial(
    run, objective, params, {'reference': params}, weighted(np.ones(6), texts)
  )
  for key in jax.random.split(jax.random.key(0), 3):
    total, gradient, scores = run_(key)
    # The same network at the same noise: no margin, whatever the noise is.
    np.testing.assert_allclose(total, 3 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(scores.reports['margin'], 0, atol=1e-5)
    assert np.abs(gradient).max() > 1e-3


BASES = {
  'masked': Masked(MASK),
  'ar': Autoregressive(MASK),
  'block': Block(MASK, block_size=3),
  'd3pm': D3PM(MASK),
  'sedd': ScoreEntropy(MASK),
  'uniform': Uniform(MASK),
}


@pytest.mark.parametrize('name', objectives.POLICIES)
@pytest.mark.parametrize('base', BASES)
def test_finite_with_every_objective_that_fits(name, base):
  cls = objectives.POLICIES[name]
  if not cls.fits(BASES[base]):
    assert base not in ('masked',) and issubclass(cls, policy.Masks)
    return
  objective = cls(BASES[base], kl_weight=0.1)
  batch = weighted(np.linspace(-1, 1, NUM - 1), TEXTS[1:])
  batch.eligible[0] = False  # Nothing is scored.
  batch.eligible[1, :2] = False
  total, gradient, scores = run(
    objective, table(0), {'reference': table(1)}, batch, jax.random.key(0)
  )
  assert np.isfinite(total) and np.isfinite(gradient).all()
  assert np.abs(gradient).max() > 0
  for value in jax.tree.leaves(scores.reports):
    assert value.shape == (NUM - 1,) and np.isfinite(value).all()


@pytest.mark.parametrize(
  'make, message',
  [
    (
      lambda: SEQUENCE(Masked(MASK), num_samples=1),
      'policy.num_samples=1 must',
    ),
    (
      lambda: SEQUENCE(Masked(MASK), num_updates=0),
      'policy.num_updates=0 must',
    ),
    (lambda: SEQUENCE(Masked(MASK), num_draws=3), 'policy.num_draws=3 must'),
    (lambda: COUPLED(Masked(MASK), clip=1.0), 'policy.clip=1.0 must'),
    (lambda: ONE_STEP(Masked(MASK), kl_weight=-1.0), 'policy.kl_weight=-1.0'),
    (lambda: DPO(Masked(MASK)), 'policy.kl_weight=0.0 must be > 0'),
  ],
)
def test_errors_name_the_key(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_what_does_not_fit():
  for cls in objectives.POLICIES.values():
    assert not cls.fits(GenMD4(MASK))
    assert not cls.fits(Block(MASK, block_size=3, ar_weight=1.0))
  assert not ONE_STEP.fits(Autoregressive(MASK))


def surrogate(name, x):
  """The mean over the noise of an estimator of log p(TEXTS), [27]."""
  log_p = jax.nn.log_softmax(x[..., :MASK])
  t, share = np.polynomial.legendre.leggauss(8)
  t, share = 0.5 + 0.3 * t, share / 2
  total = 0.0
  for hidden in itertools.product([False, True], repeat=LENGTH):
    num, hidden = sum(hidden), np.array(hidden)
    if not num:
      continue
    canvas = np.where(hidden, MASK, TEXTS)
    own = log_p[toys.canvas_index(canvas)]
    own = jnp.take_along_axis(own, TEXTS[..., None], axis=2)[..., 0]
    own = own[:, hidden].sum(axis=1)
    of_count = 1 / np.prod([(LENGTH - i) / (i + 1) for i in range(num)])
    # Both masks of a pair have the same expectation, by t and 1 - t.
    p = np.sum(share * t ** (num - 1) * (1 - t) ** (LENGTH - num))
    weight = {
      'sequence': of_count / num,  # n / k, k uniform, 1 / (n over k)
      'one_step': float(num == LENGTH),
      'coupled': (num == LENGTH) / 2 + p,
    }
    total += weight[name] * own
  return total


def exact(x):
  """log p of the sampler of one token per call in random order, [27]."""
  log_p = jax.nn.log_softmax(x[..., :MASK])
  orders = []
  for order in itertools.permutations(range(LENGTH)):
    canvas, total = np.full_like(TEXTS, MASK), 0.0
    for i in order:
      total += log_p[toys.canvas_index(canvas), i, TEXTS[:, i]]
      canvas[:, i] = TEXTS[:, i]
    orders.append(total)
  return jax.nn.logsumexp(jnp.stack(orders), axis=0) - np.log(len(orders))


# The cosine of the gradient and that of the mean reward, and its length
# relative to it, which configs/policy.py quotes.
COSINES = {'sequence': 0.890, 'one_step': 0.638, 'coupled': 0.839}


@pytest.mark.parametrize('name', COSINES)
def test_the_bias_of_the_gradient(name):
  params = 0.7 * table(2)
  p = np.exp(np.asarray(exact(params), np.float64))
  assert p.sum() == pytest.approx(1, abs=1e-5)
  advantage = p * (REWARD - np.sum(p * REWARD))
  true, own = (
    jax.grad(lambda x: jnp.sum(advantage * of(x)))(params)
    for of in (exact, functools.partial(surrogate, name))
  )
  mean_reward = jax.grad(lambda x: jnp.sum(jnp.exp(exact(x)) * REWARD))(params)
  np.testing.assert_allclose(true, mean_reward, atol=1e-5)
  cosine = jnp.sum(true * own) / jnp.linalg.norm(true) / jnp.linalg.norm(own)
  assert float(cosine) == pytest.approx(COSINES[name], abs=0.005)
  # The code's mean over the noise is this estimator.
  objective, num = objectives.POLICIES[name](Masked(MASK)), 300
  batch = weighted(np.tile(advantage, num) / num, np.tile(TEXTS, (num, 1)))
  _, gradient, _ = run(objective, params, {}, batch, jax.random.key(4))
  error = jnp.linalg.norm(-gradient - own) / jnp.linalg.norm(own)
  assert error < 0.15
