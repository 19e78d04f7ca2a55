"""Tests of nanodlm.objectives by enumeration of texts and masks."""

import dataclasses
import functools
import itertools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nanodlm import objectives
from nanodlm.devices import mesh as meshes
from nanodlm.model.network import TransformerNetwork
from nanodlm.noise import processes, schedules, times
from nanodlm.objectives import masking, mixture
from nanodlm.objectives.ar import Autoregressive
from nanodlm.objectives.block import Block, BlockHybrid, BlockUniform
from nanodlm.objectives.d3pm import D3PM
from nanodlm.objectives.flex import Flex
from nanodlm.objectives.genmd4 import GenMD4
from nanodlm.objectives.masked import Masked
from nanodlm.objectives.mixture import Hybrid
from nanodlm.objectives.sedd import ScoreEntropy
from nanodlm.objectives.uniform import Uniform
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps.network import Denoiser, Scorer
from nanodlm.types import Batch, InputError
from tests import gaps, toys
from tests.toys import LENGTH, MASK, TEXTS

ALL_SCHEDULES = {
  name: schedules.make_schedule(name, power=3.0) for name in schedules.SCHEDULES
}
SUBSETS = np.array(list(itertools.product([False, True], repeat=LENGTH)))


def masked_nll(objective, table, x0, eligible):
  del objective
  return toys.any_order_nll(table, x0, eligible)


def masked_canvases(x0, eligible):
  """Masks every subset of the eligible positions: canvases, subsets [n, L]."""
  eligible = np.isin(np.arange(LENGTH), eligible)
  subsets = SUBSETS[~(SUBSETS & ~eligible).any(1)]
  return np.where(subsets, MASK, x0), subsets


def sedd_nll(objective, table, x0, eligible):
  """The paper's score entropy on the log-linear schedule, by quadrature."""
  del objective
  canvases, subsets = masked_canvases(x0, eligible)
  raw = table[toys.canvas_index(canvases)][..., :MASK].astype(np.float64)
  t, shares = quadrature(16)
  sigma, rate = -np.log1p(-t), 1 / (1 - t)
  score = raw[None] - np.log(np.expm1(sigma) * toys.VOCAB)[:, None, None, None]
  r = 1 / np.expm1(sigma)[:, None, None]
  target = score[:, :, np.arange(LENGTH), x0]
  entropy = np.exp(score).sum(-1) - r * target + r * (np.log(r) - 1)
  num = subsets.sum(1)[None]
  p = t[:, None] ** num * (1 - t[:, None]) ** (len(eligible) - num)
  entropy = (entropy * subsets[None]).sum(-1)
  return np.sum((shares * rate)[:, None] * p * entropy)


def d3pm_nll(objective, table, x0, eligible):
  """The sum of the chain's divergences, each step by Bayes' rule."""
  canvases, subsets = masked_canvases(x0, eligible)
  logits = table[toys.canvas_index(canvases)].astype(np.float64)
  x = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)  # with the mask
  num = objective.num_steps
  noise = np.asarray(
    objective.schedule.noise(jnp.arange(num + 1) / num), np.float64
  )
  total = 0.0
  for noise_s, noise_t in itertools.pairwise(noise):
    step = 1 - (1 - noise_t) / (1 - noise_s)  # q(mask | not masked before)
    likelihood = np.array([step] * MASK + [1.0])  # of a mask at t, by xs
    marginal = np.eye(4) * (1 - noise_s)  # q(xs | x0), of the mask it is 1
    marginal[:, MASK] += noise_s
    p = x @ marginal * likelihood
    p /= p.sum(-1, keepdims=True)
    q = marginal[x0] * likelihood
    q /= q.sum(-1, keepdims=True)
    kl = np.sum(np.where(q > 0, q * np.log(np.maximum(q, 1e-300) / p), 0), -1)
    count = subsets.sum(1)
    p_xt = noise_t**count * (1 - noise_t) ** (len(eligible) - count)
    total += np.sum(p_xt * (kl * subsets).sum(1))
  return total


RATES = (0.6, 1.0, 2.5)


def genmd4_nll(objective, tables, x0, eligible, nodes=None):
  """GenMD4's bound by quadrature of t = u^2, for one table or one per node."""
  u, shares = nodes or quadrature(48)
  canvases, subsets = masked_canvases(x0, eligible)
  log_x = toys.log_softmax(tables)[..., toys.canvas_index(canvases), :, :]
  rates = np.array(objective.rates or (1.0,) * toys.VOCAB)
  own, t = rates[x0], (u * u)[:, None, None]
  is_eligible = np.isin(np.arange(LENGTH), eligible)
  p = np.where(subsets, t**own, np.where(is_eligible, 1 - t**own, 1))
  loss = (
    (np.exp(log_x) @ rates - own * (log_x[..., np.arange(LENGTH), x0] + 1))
    * subsets
    / t
  )
  return np.sum((shares * 2 * u)[:, None] * p.prod(-1) * loss.sum(-1))


def quadrature(num):
  """Gauss-Legendre nodes in (0, 1) and their shares."""
  nodes, shares = np.polynomial.legendre.leggauss(num)
  return (nodes + 1) / 2, shares / 2


def uniform_law(t):
  """q_t(z | x0) on the linear schedule."""
  return toys.mixture_law(1 - t, 0 * t, t)


def uniform_terms(t, q, p, is_clean, is_mask):
  """UDLM's loss, arXiv 2412.10193, on the linear schedule."""
  del is_clean, is_mask
  num, (q_z, q_y), (p_z, p_y) = toys.VOCAB, q, p
  bar_z, bar_y, model_z, model_y = (num * v for v in (q_z, q_y, p_z, p_y))
  bar_y, model_y = bar_y[..., :MASK], model_y[..., :MASK]
  terms = (
    bar_y
    / bar_z[..., None]
    * np.log(model_z[..., None] * bar_y / (model_y * bar_z[..., None]))
  )
  return -1 / (num * (1 - t)) * (num / bar_z - num / model_z - terms.sum(-1))


def hybrid_shares(p_uniform, t):
  size = 2 * p_uniform / (1 - p_uniform)
  c = size * (t * (1 - t)) ** 0.5
  return c, 0.5 * (1 - 2 * t) / (t * (1 - t)) * c


def hybrid_law(t):
  c, _ = hybrid_shares(0.2, t)
  return toys.mixture_law((1 - t) / (1 + c), t / (1 + c), c / (1 + c))


def hybrid_terms(t, q, p, is_clean, is_mask):
  """GIDD's loss, arXiv 2503.04482, for p_uniform = 0.2 and gamma = 1."""
  c, dc = hybrid_shares(0.2, t)
  rate = (c + (1 - t) * dc) / (1 - t)
  weight = np.where(
    is_clean, rate / toys.VOCAB / (1 - t + c / toys.VOCAB), rate / c
  )
  weight = np.where(is_mask, 1 / (t * (1 - t)), weight)
  (q_z, q_y), (p_z, p_y) = q, p
  ratio = q_z / p_z
  divergence = np.sum(q_y * np.log(q_y / p_y), -1)
  return weight * (divergence + ratio - np.log(ratio) - 1)


def mixture_bound(law_of, terms_of, u, shares, logits, x0, eligible):
  """A published bound, summed over the nodes u of t = u^2 (3 - 2u) and all z.

  Args:
    law_of: t -> q_t(z | x0), [x0, z].
    terms_of: the loss of one position.
    u: [n] in (0, 1).
    shares: [n].
    logits: [64, L, V + 1], or with a leading [n].
    x0: [L].
    eligible: positions.
  """
  t, speed = u * u * (3 - 2 * u), 6 * u * (1 - u)
  z, laws = toys.CANVASES, law_of(t)
  x = np.exp(toys.log_softmax(np.broadcast_to(logits, (len(u), 64, LENGTH, 4))))
  p_z = np.ones((len(u), len(z)))
  for i in range(LENGTH):
    p_z *= laws[:, x0[i], z[:, i]] if i in eligible else z[:, i] == x0[i]
  total = np.zeros_like(p_z)
  for i in eligible:
    q_y = np.broadcast_to(laws[:, None, x0[i]], (len(u), 64, 4))
    p_y = laws[:, None, x0[i]] + np.einsum(
      'n,nzv->nzv', t_alpha(laws), x[:, :, i] - np.eye(MASK)[x0[i]]
    ) @ np.eye(MASK, 4)
    at_z = lambda v: v[:, np.arange(64), z[:, i]]
    with np.errstate(all='ignore'):  # where q(z) = 0
      loss = terms_of(
        t[:, None],
        (at_z(q_y), q_y),
        (at_z(p_y), p_y),
        (z[:, i] == x0[i])[None],
        (z[:, i] == MASK)[None],
      )
    total += np.where(at_z(q_y) > 0, loss, 0)
  return np.sum((shares * speed)[:, None] * p_z * total)


def t_alpha(laws):
  """alpha from q(z | x0), [n]."""
  return laws[:, 0, 0] - laws[:, 1, 0]


def uniform_nll(objective, table, x0, eligible):
  """The same on every schedule."""
  del objective
  return mixture_bound(
    uniform_law, uniform_terms, *quadrature(48), table, x0, eligible
  )


def hybrid_nll(objective, table, x0, eligible):
  if not objective.p_uniform:
    return toys.any_order_nll(table, x0, eligible)
  return mixture_bound(
    hybrid_law, hybrid_terms, *quadrature(48), table, x0, eligible
  )


def ar_nll(objective, table, x0, eligible):
  """Left to right, every token given all before it, eligible or not."""
  del objective
  log_p, nll = toys.log_softmax(table), 0.0
  for i in eligible:
    canvas = np.where(np.arange(LENGTH) < i, x0, MASK)
    nll -= log_p[toys.canvas_index(canvas), i, x0[i]]
  return nll


def flex_nll(objective, table, x0, eligible):
  """A row whose last tokens are its padding, as in `gaps`."""
  del objective
  text, eligible = list(x0), np.isin(np.arange(LENGTH), eligible)
  while text and text[-1] == x0[-1]:
    text.pop()
  size = len(text)
  logits = lambda tokens, t: table[
    toys.canvas_index(np.array([*tokens, *[x0[-1]] * (LENGTH - len(tokens))]))
  ]
  return gaps.bound(text, eligible[: size + 1], logits)


def table_logits(table, noised):
  return jnp.asarray(table)[toys.canvas_index(noised.tokens)]


def block_logits(size):
  """Shows position i its noisy block, clean blocks before it, then masks."""
  block = np.arange(LENGTH) // size

  def logits(table, noised):
    own = block[None, :, None] == block[None, None]
    before = block[None, :, None] > block[None, None]
    canvas = jnp.where(
      own,
      noised.tokens[:, None],
      jnp.where(before, noised.clean[:, None], MASK),
    )
    return jnp.asarray(table)[
      toys.canvas_index(canvas), np.arange(LENGTH)[None]
    ]

  return logits


def in_blocks(size, whole):
  """The sum over blocks of `whole`, a bound of a row, given blocks before."""
  block = np.arange(LENGTH) // size

  def nll(objective, table, x0, eligible):
    total = 0.0
    for b in set(block):
      canvas = np.where(
        block == b, toys.CANVASES, np.where(block < b, x0, MASK)
      )
      own = [i for i in eligible if block[i] == b]
      seen = np.asarray(table)[toys.canvas_index(canvas)]
      total += whole(objective, seen, x0, own) if own else 0.0
    return total

  return nll


def ar_logits(table, noised):
  """Looks up causal logits: position i sees input tokens 0..i."""
  seen = np.tril(np.ones((LENGTH, LENGTH), bool), -1)  # of x0, before i
  x0 = jnp.roll(noised.tokens, -1, axis=1)[:, None]
  canvas = jnp.where(seen[None], x0, MASK)
  return jnp.asarray(table)[toys.canvas_index(canvas), np.arange(LENGTH)[None]]


@dataclasses.dataclass(frozen=True)
class Case:
  """An objective: its forms, and an independent computation of its value."""

  forms: dict[str, object]
  expected_nll: object  # (objective, table, x0, eligible) -> nats
  logits: object = table_logits  # (table, Noised) -> [B, L, V + 1]
  is_masked: bool = False  # the masked positions are scored, and no others


CASES = {
  'ar': Case({'ar': Autoregressive(MASK)}, ar_nll, ar_logits),
  'block_of_1': Case(
    {'count': Block(MASK, block_size=1)},
    ar_nll,
    block_logits(1),
    is_masked=True,
  ),
  'block': Case(
    {
      'count': Block(MASK, block_size=3),
      'overlap': Block(MASK, noise='overlap', block_size=3),
      'uniform': Block(MASK, noise='uniform', block_size=3),
      'stratified': Block(MASK, noise='stratified', block_size=3),
      'with_ar': Block(MASK, block_size=3, ar_weight=0.5),
    },
    masked_nll,
    block_logits(3),
    is_masked=True,
  ),
  'block_uniform': Case(
    {
      'stratified': BlockUniform(MASK, block_size=3),
      'uniform': BlockUniform(MASK, noise='uniform', block_size=3),
    },
    uniform_nll,
    block_logits(3),
  ),
  'block_uniform_of_1': Case(
    {'cosine': BlockUniform(MASK, schedule=schedules.Cosine(), block_size=1)},
    in_blocks(1, uniform_nll),
    block_logits(1),
  ),
  'block_hybrid': Case(
    {'stratified': BlockHybrid(MASK, p_uniform=0.2, block_size=3)},
    hybrid_nll,
    block_logits(3),
  ),
  'block_hybrid_of_1': Case(
    {'stratified': BlockHybrid(MASK, p_uniform=0.2, block_size=1)},
    in_blocks(1, hybrid_nll),
    block_logits(1),
  ),
  'masked': Case(
    {
      'count': Masked(MASK),
      'overlap': Masked(MASK, noise='overlap'),
      'uniform': Masked(MASK, noise='uniform'),
      **{
        f'stratified_{name}': Masked(MASK, schedule, noise='stratified')
        for name, schedule in ALL_SCHEDULES.items()
      },
    },
    masked_nll,
    is_masked=True,
  ),
  'd3pm': Case(
    {
      'linear': D3PM(MASK, num_timesteps=4),
      'cosine': D3PM(MASK, schedules.Cosine(), 3, noise='uniform'),
      'one_step': D3PM(MASK, num_timesteps=1),
    },
    d3pm_nll,
    is_masked=True,
  ),
  'genmd4': Case(
    {
      'learned': GenMD4(MASK, rates=RATES),
      'uniform': GenMD4(MASK, noise='uniform', rates=RATES[::-1]),
      'initial': GenMD4(MASK),
    },
    genmd4_nll,
    is_masked=True,
  ),
  'flex': Case(
    {'stratified': Flex(MASK), 'uniform': Flex(MASK, noise='uniform')}, flex_nll
  ),
  'sedd': Case(
    {
      'count': ScoreEntropy(MASK),
      'stratified': ScoreEntropy(MASK, noise='stratified'),
    },
    sedd_nll,
    is_masked=True,
  ),
  'uniform': Case(
    {
      'uniform': Uniform(MASK, noise='uniform'),
      **{
        f'stratified_{name}': Uniform(MASK, schedule=schedule)
        for name, schedule in ALL_SCHEDULES.items()
      },
    },
    uniform_nll,
  ),
  'hybrid': Case(
    {
      'stratified': Hybrid(MASK, p_uniform=0.2),
      'uniform': Hybrid(MASK, noise='uniform', p_uniform=0.2),
      'masked': Hybrid(MASK, p_uniform=0.0),
    },
    hybrid_nll,
  ),
}
FORMS = [
  (f'{name}_{form}', case, objective)
  for name, case in CASES.items()
  for form, objective in case.forms.items()
]
# One objective of each kind, whose schedule does not matter.
KINDS = [
  row
  for row in FORMS
  if row[0]
  in (
    'ar_ar',
    'masked_count',
    'masked_stratified_linear',
    'd3pm_linear',
    'genmd4_learned',
    'flex_stratified',
    'sedd_count',
    'sedd_stratified',
    'uniform_stratified_linear',
    'hybrid_stratified',
    'block_count',
    'block_with_ar',
    'block_stratified',
    'block_uniform_stratified',
  )
]


@functools.partial(jax.jit, static_argnums=(0, 1))
def noised_nll(logits_of, objective, table, keys, levels, x0, eligible):
  """Returns what a training step scores: Noised, and Terms of [B, L]."""
  noised = objective.corrupt(keys, levels, x0, eligible)
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  terms = objective.terms(
    flat(logits_of(table, noised)), jax.tree.map(flat, noised.fields)
  )
  terms = jax.tree.map(
    lambda x: jnp.where(noised.scored, x.reshape(x0.shape), 0.0), terms
  )
  return noised, terms


class ConformanceTest(parameterized.TestCase):
  def test_every_objective_has_a_row(self):
    kind = lambda name: name.split('_of_')[0]
    self.assertEqual({kind(name) for name in CASES}, set(objectives.OBJECTIVES))
    for name, case in CASES.items():
      for objective in case.forms.values():
        self.assertIsInstance(objective, objectives.OBJECTIVES[kind(name)])

  @parameterized.named_parameters(FORMS)
  def test_mean_over_the_noise_is_the_expected_nll(self, case, objective):
    num, table = 6000, toys.random_table(0)
    rng = np.random.default_rng(1)
    x0 = TEXTS[rng.integers(len(TEXTS), size=num)]
    # Prompts, short texts and whole texts, in random order.
    kinds = np.array([[0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0]])
    eligible = kinds[rng.integers(len(kinds), size=num)] > 0
    keys = jax.random.split(jax.random.key(2), num)
    u = 1 - np.asarray(objective.sample_levels(jax.random.key(3), num, LENGTH))
    # At uniform times the loss has infinite variance (1 / t with probability t,
    # or worse), so importance sampling prefers small times.
    power = 4 if getattr(objective, 'noise', 'count') != 'count' else 1
    levels = np.minimum(1 - u**power, np.float32(1 - 2**-24))
    _, terms = noised_nll(
      case.logits, objective, table, keys, levels, x0, eligible
    )
    importance = (power * u ** (power - 1)).reshape(num, -1).prod(1)
    nll = np.asarray(terms.nll, np.float64).sum(1) * importance
    known = {}
    for text, kind in itertools.product(TEXTS, kinds):
      known[(*text, *kind)] = case.expected_nll(
        objective, table, text, np.flatnonzero(kind)
      )
    expected = [
      known[(*text, *kind)] for text, kind in zip(x0, eligible.astype(int))
    ]
    error = nll - expected
    standard_error = error.std() / num**0.5
    self.assertLess(abs(error.mean()), 4 * standard_error + 1e-5)

  @parameterized.named_parameters(FORMS)
  def test_finite_at_both_ends_of_time(self, case, objective):
    ends = jnp.array([0.0, 2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-24])
    shape = objective.sample_levels(jax.random.key(0), 6, LENGTH).shape
    ends = jnp.broadcast_to(ends.reshape(-1, *(1,) * (len(shape) - 1)), shape)
    keys = jax.random.split(jax.random.key(1), 6)
    x0, eligible = TEXTS[5:11], np.ones((6, LENGTH), bool)

    def loss(table):
      _, terms = noised_nll(
        case.logits, objective, table, keys, ends, x0, eligible
      )
      return jnp.sum(terms.loss), terms

    table = jnp.asarray(toys.random_table(0))
    grad, terms = jax.grad(loss, has_aux=True)(table)
    self.assertTrue(all(np.isfinite(x).all() for x in terms))
    self.assertTrue(np.isfinite(grad).all())
    self.assertGreaterEqual(np.min(terms.nll), -1e-6)  # cos(pi/2) is -4e-8

  @parameterized.named_parameters(KINDS)
  def test_the_mask_is_not_predicted(self, case, objective):
    num = 8
    logits = np.zeros((LENGTH, 4), np.float32)
    logits[:, MASK] = 50.0
    shape = objective.sample_levels(jax.random.key(1), num, LENGTH).shape
    levels = jnp.full(shape, 0.5)
    _, terms = noised_nll(
      lambda table, noised: jnp.stack([table] * num),
      objective,
      logits,
      jax.random.split(jax.random.key(0), num),
      levels,
      TEXTS[:num],
      np.ones((num, LENGTH), bool),
    )
    scored = terms.cross_entropy[terms.cross_entropy > 0]
    self.assertGreater(scored.size, 0)
    np.testing.assert_allclose(scored, np.log(3), rtol=1e-6)

  @parameterized.named_parameters(KINDS)
  def test_a_row_does_not_depend_on_its_neighbours(self, case, objective):
    num, group = 64, objective.group_size
    keys = jax.random.split(jax.random.key(0), num)
    levels = objective.sample_levels(jax.random.key(1), num, LENGTH)
    rng = np.random.default_rng(2)
    x0 = rng.integers(toys.VOCAB, size=(num, LENGTH)).astype(np.int32)
    eligible = rng.random((num, LENGTH)) < 0.7
    order = rng.permutation(num // group)[:, None] * group + np.arange(group)
    order = order.reshape(-1)
    args = (toys.random_table(0), keys, levels, x0, eligible)
    straight = noised_nll(case.logits, objective, *args)
    keys = jax.random.clone(keys)  # on purpose
    permuted = noised_nll(
      case.logits,
      objective,
      args[0],
      keys[order],
      *(x[order] for x in args[2:]),
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a[order], b),
      straight,
      permuted,
    )

  @parameterized.named_parameters(KINDS)
  def test_scored_positions(self, case, objective):
    num, length = 1024, 18
    rng = np.random.default_rng(0)
    x0 = rng.integers(toys.VOCAB, size=(num, length)).astype(np.int32)
    # Any number of eligible tokens, none and all included, in any order.
    ends = rng.integers(length + 1, size=num)
    ends[:256] = length
    eligible = rng.permuted(np.arange(length) < ends[:, None], axis=1)
    keys = jax.random.split(jax.random.key(1), num)
    levels = objective.sample_levels(jax.random.key(2), num, length)
    noised = jax.jit(objective.corrupt)(keys, levels, x0, eligible)
    scored = np.asarray(noised.scored)
    if not objective.any_length:  # Its tokens move; see flex_test.
      self.assertFalse(scored[~eligible].any())
    if case.is_masked:
      np.testing.assert_array_equal(noised.tokens, np.where(scored, MASK, x0))
    elif not objective.any_length:
      np.testing.assert_array_equal(scored, eligible)
    if not objective.causal and not objective.any_length:
      np.testing.assert_array_equal(noised.tokens[~eligible], x0[~eligible])
    groups = scored.reshape(num // objective.group_size, -1).sum(1)
    self.assertLessEqual(
      groups.max(), objective.max_scored(objective.group_size, length)
    )
    self.assertEqual(
      objective.max_scored(8 * objective.group_size, length),
      8 * objective.max_scored(objective.group_size, length),
    )

  @parameterized.named_parameters(KINDS)
  def test_the_evaluation_form(self, case, objective):
    del case
    final = objective.evaluation()
    self.assertEqual(final, final.evaluation())
    self.assertEqual(final.causal, objective.causal)
    levels = final.eval_levels(jax.random.key(0), 8, LENGTH)
    self.assertEqual(levels.shape[0], 8)
    np.testing.assert_array_equal(final.network_time(jnp.array([0.0])), [0.0])

  @parameterized.named_parameters(KINDS)
  def test_the_naive_form(self, case, objective):
    # The evaluation form, with independent levels and a truncation that keeps
    # the variance finite.
    del case
    naive = objective.naive()
    self.assertEqual(naive, naive.naive())
    self.assertEqual(naive.evaluation(), objective.evaluation())
    if objective.exact:
      self.assertEqual(naive, objective)
      return
    self.assertEqual(naive.group_size, 1)
    levels = naive.eval_levels(jax.random.key(0), 64, LENGTH).reshape(64, -1)
    strata = np.floor(np.asarray(levels) * 64).astype(int)
    for (
      column
    ) in strata.T:  # Of 64 draws, about a third of the strata have none.
      self.assertBetween(len(set(column)), 30, 52)
    if isinstance(objective, masking.MaskedNoise) and (
      objective.evaluation().is_counted
    ):
      self.assertEqual(naive.min_time, masking.NAIVE_MIN_NOISE)


class MaskedTest(parameterized.TestCase):
  """The L!-orders identity: Ou et al., arXiv 2406.03736."""

  def enumerate_time(self, objective, table, levels, shares):
    """The bound of every text [27], as a sum over levels and subsets."""
    with jax.enable_x64():
      t, scale = objective.time_and_scale(jnp.asarray(levels))
      noise = np.asarray(objective.schedule.noise(t))
      scale = np.asarray(scale)
    total = np.zeros(len(TEXTS))
    for subset in SUBSETS:
      num = subset.sum()
      p = noise**num * (1 - noise) ** (LENGTH - num)
      canvases = np.where(subset, MASK, TEXTS)
      ce = self.cross_entropy(objective, table, canvases)
      total += np.sum(shares * p * scale) * (ce * subset).sum(1)
    return total

  def cross_entropy(self, objective, table, canvases):
    fields = {
      'target': TEXTS.reshape(-1),
      'scale': np.ones(TEXTS.size, np.float32),
    }
    logits = table[toys.canvas_index(canvases)].reshape(-1, 4)
    nll = objective.terms(logits, fields).nll
    return np.asarray(nll, np.float64).reshape(TEXTS.shape)

  def continuous_bound(self, schedule, table):
    # t = v^2 makes the integrand smooth at t = 0 for every schedule.
    v, shares = np.polynomial.legendre.leggauss(48)
    v, shares = (v + 1) / 2, shares / 2
    return self.enumerate_time(
      Masked(MASK, schedule, noise='uniform'), table, 1 - v * v, shares * 2 * v
    )

  def discrete_bound(self, num_timesteps, schedule, table):
    objective = Masked(MASK, schedule, num_timesteps, noise='uniform')
    levels = (np.arange(num_timesteps) + 0.5) / num_timesteps
    return self.enumerate_time(
      objective, table, levels, np.full(num_timesteps, 1 / num_timesteps)
    )

  @parameterized.named_parameters(
    (f'{length}_of_{LENGTH}_eligible', length) for length in (1, 2, 3)
  )
  def test_fixed_count_is_the_mean_over_orders(self, length):
    objective, table = Masked(MASK), toys.random_table(0)
    eligible = np.arange(LENGTH) >= LENGTH - length
    # Every subset of a count has equal probability (see processes_test). There
    # are enough draws that each appears, and subsets get equal weights.
    num = 96
    level = np.repeat(np.float32((np.arange(length) + 0.5) / length), num)
    for text in TEXTS[::4]:
      x0 = np.tile(text, (level.size, 1))
      keys = jax.random.split(jax.random.key(0), level.size)
      noised, terms = noised_nll(
        table_logits,
        objective,
        table,
        keys,
        level,
        x0,
        np.tile(eligible, (level.size, 1)),
      )
      nll = {}
      for mask, row in zip(np.asarray(noised.scored), np.asarray(terms.nll)):
        nll.setdefault(mask.sum(), {})[tuple(mask)] = row.sum(dtype=np.float64)
      self.assertEqual(
        [len(nll[k]) for k in sorted(nll)],
        {1: [1], 2: [2, 1], 3: [3, 3, 1]}[length],
      )
      bound = np.mean(
        [np.mean(list(by_mask.values())) for by_mask in nll.values()]
      )
      expected = toys.any_order_nll(table, text, np.flatnonzero(eligible))
      np.testing.assert_allclose(bound, expected, rtol=1e-5)

  @parameterized.named_parameters(ALL_SCHEDULES.items())
  def test_continuous_time_is_the_mean_over_orders(self, schedule):
    table = toys.random_table(0)
    expected = [toys.any_order_nll(table, text) for text in TEXTS]
    np.testing.assert_allclose(
      self.continuous_bound(schedule, table), expected, rtol=1e-5
    )

  @parameterized.named_parameters(ALL_SCHEDULES.items())
  def test_discrete_time_is_a_sum_of_divergences(self, schedule):
    # KL(q(xs | xt, x0) || p(xs | xt)) over the chain, from the process alone.
    num, table = 5, toys.random_table(0)
    process, x0 = processes.Masked(MASK), TEXTS[7]
    one_hot = np.eye(4)[x0]
    p_model = np.concatenate(
      [np.exp(toys.log_softmax(table)), np.zeros((64, LENGTH, 1))], axis=-1
    )
    total = 0.0
    with jax.enable_x64():
      for j in range(1, num + 1):
        noise_s, noise_t = schedule.noise(jnp.array([(j - 1) / num, j / num]))
        for subset in SUBSETS:
          xt = np.where(subset, MASK, x0)[None]
          shown = jnp.full(xt.shape, (noise_t - noise_s) / noise_t)
          step = lambda p: np.asarray(
            process.reveal(jnp.asarray(xt), jnp.asarray(p)[None], shown)
          )[0]
          q, p = step(one_hot), step(p_model[toys.canvas_index(xt[0])])
          p_xt = np.prod(np.where(subset, noise_t, 1 - noise_t))
          ratio = np.where(q > 0, q / np.where(q > 0, p, 1), 1)
          total += p_xt * np.sum(q * np.log(ratio))
    bound = self.discrete_bound(num, schedule, table)[7]
    np.testing.assert_allclose(bound, total, rtol=1e-5)

  @parameterized.named_parameters(ALL_SCHEDULES.items())
  def test_discrete_time_falls_to_continuous_time(self, schedule):
    joint = toys.random_joint(0)
    table = toys.posterior_table(joint)
    entropy = -np.sum(joint * np.log(joint))
    np.testing.assert_allclose(
      joint @ self.continuous_bound(schedule, table), entropy, rtol=1e-5
    )
    bounds = [
      joint @ self.discrete_bound(num, schedule, table)
      for num in (1, 2, 4, 16, 256)
    ]
    self.assertTrue(np.all(np.diff(bounds) < 0), bounds)
    self.assertGreater(bounds[-1], entropy)
    self.assertLess(bounds[-1], entropy * 1.01)

  def test_bound_and_equality(self):
    # Against every denoiser the bound is at least the entropy; the exact
    # posterior reaches -log p(x) for every single text.
    joint = toys.random_joint(1)
    entropy = -np.sum(joint * np.log(joint))
    for seed in range(5):
      bound = self.continuous_bound(schedules.Linear(), toys.random_table(seed))
      self.assertGreater(joint @ bound, entropy + 0.01)
    exact = self.continuous_bound(
      schedules.Linear(), toys.posterior_table(joint)
    )
    np.testing.assert_allclose(exact, -np.log(joint), rtol=1e-5)

  def test_pairs_have_a_constant_number_of_masks(self):
    for length in (2, 7, 16):
      x0 = np.zeros((64, length), np.int32)
      levels = Masked(MASK).sample_levels(jax.random.key(0), 64, length)
      keys = jax.random.split(jax.random.key(1), 64)
      noised = Masked(MASK).corrupt(keys, levels, x0, np.ones_like(x0, bool))
      counts = np.asarray(noised.scored).sum(1)
      np.testing.assert_array_equal(counts[::2] + counts[1::2], length + 1)
      self.assertEqual((counts.min(), counts.max()), (1, length))

  @parameterized.product(
    own=[Masked(MASK), Block(MASK, block_size=8)], length=[8, 24]
  )
  def test_overlapping_rows_score_each_token(self, own, length):
    objective = dataclasses.replace(own, noise='overlap')
    x0 = np.tile(np.arange(length, dtype=np.int32) % 3, (64, 1))
    eligible = np.repeat(
      np.random.default_rng(0).random((32, length)) < 0.8, 2, 0
    )
    levels = objective.sample_levels(jax.random.key(0), 64, length)
    keys = jax.random.split(jax.random.key(1), 64)
    noised = objective.corrupt(keys, levels, x0, eligible)
    times = np.asarray(noised.scored).reshape(32, 2, length).sum(1)
    size = getattr(objective, 'block_size', 0) or length
    blocks = lambda x: x.reshape(32, -1, size).sum(-1)
    # Every token once, and one of each text (or block) twice.
    np.testing.assert_array_equal(times > 0, eligible[::2])
    np.testing.assert_array_equal(
      blocks(times), blocks(eligible[::2]) + (blocks(eligible[::2]) > 0)
    )
    self.assertGreater(len({row.tobytes() for row in times}), 16)

  @parameterized.parameters('count', 'overlap', 'uniform')
  def test_padding_does_not_change_the_law(self, noise):
    # Three eligible tokens among eight: every subset as often as without.
    objective = Masked(MASK, noise=noise)
    num, where = 20_000, np.array([1, 4, 6])
    x0 = np.zeros((num, 8), np.int32)
    eligible = np.zeros((num, 8), bool)
    eligible[:, where] = True
    keys = jax.random.split(jax.random.key(0), num)
    levels = jax.random.uniform(jax.random.key(1), (num,))
    noised = jax.jit(objective.corrupt)(keys, levels, x0, eligible)
    subset = np.asarray(noised.scored)[:, where] @ np.array([4, 2, 1])
    size = SUBSETS.sum(1)
    # 1/n over counts, 1/(n choose k) over subsets; the integral of
    # t^k (1-t)^(n-k) is 1 / ((n + 1) (n choose k)).
    choose = np.array([1, 3, 3, 1])[size]
    expected = {
      'count': np.where(size > 0, 1 / (3 * choose), 0),
      'overlap': np.where(size > 0, 1 / (3 * choose), 0),
      'uniform': 1 / (4 * choose),
    }[noise]
    counts = np.bincount(subset, minlength=8)
    self.assertGreater(toys.chi_square(counts, expected), 1e-3)

  def test_min_time_bounds_the_scale(self):
    levels = np.linspace(0, 1, 1001, dtype=np.float32)[:-1]
    objective = Masked(MASK, noise='uniform', min_time=0.01)
    t, scale = objective.time_and_scale(levels)
    self.assertGreater(np.min(t), 0.01 * 0.999)
    self.assertLessEqual(np.max(scale), 100.1)
    self.assertEqual(np.max(t), 1.0)


class MixtureTest(parameterized.TestCase):
  """The exact denoiser is the leave-one-out posterior, at every time."""

  def enumerate_bound(self, objective, law_of, table_of, num=32):
    """The bound of every text [27]; table_of(law [x0, z]) -> [64, L, V + 1]."""
    u, shares = quadrature(num)
    laws = law_of(u * u * (3 - 2 * u))
    tables = jnp.asarray(np.stack([table_of(law) for law in laws]))
    x0 = np.broadcast_to(TEXTS[None, None], (num, 64, 27, LENGTH))
    xt = np.broadcast_to(toys.CANVASES[None, :, None], x0.shape)
    levels = np.broadcast_to(1 - u[:, None, None], x0.shape[:3])
    logits = jnp.broadcast_to(tables[:, :, None], (*x0.shape, 4))

    @jax.jit
    def nll(levels, x0, xt, logits):
      fields = objective.fields(levels, x0, xt)
      flat = lambda x: x.reshape(-1, *x.shape[2:])
      return objective.terms(flat(logits), jax.tree.map(flat, fields)).nll

    rows = lambda x, *end: x.reshape(-1, *end)
    terms = np.asarray(
      nll(
        rows(levels).astype(np.float32),
        rows(x0, LENGTH),
        rows(xt, LENGTH),
        logits.reshape(-1, LENGTH, 4),
      ),
      np.float64,
    )
    terms = terms.reshape(*x0.shape).sum(-1)
    p = np.stack([np.prod(toys.noise_laws(law), axis=-1) for law in laws])
    return np.einsum('n,nzx,nzx->x', shares, p, terms)

  @parameterized.named_parameters(
    ('uniform', Uniform(MASK), uniform_law),
    ('hybrid', Hybrid(MASK, p_uniform=0.2), hybrid_law),
  )
  def test_bound_and_equality(self, objective, law_of):
    joint = toys.random_joint(1)
    entropy = -np.sum(joint * np.log(joint))
    for seed in range(2):
      table = toys.random_table(seed)
      bound = self.enumerate_bound(objective, law_of, lambda law: table)
      self.assertGreater(joint @ bound, entropy + 0.01)
    exact = self.enumerate_bound(
      objective, law_of, lambda law: toys.leave_one_out_table(joint, law)
    )
    np.testing.assert_allclose(exact, -np.log(joint), rtol=1e-3)

  @parameterized.parameters(0, 1)
  def test_without_uniform_tokens_it_is_the_masked_loss(self, seed):
    num, length, vocab = 64, 8, 50
    key = jax.random.key(seed)
    x0 = jax.random.randint(
      jax.random.fold_in(key, 0), (num, length), 0, vocab - 1
    )
    logits = 4 * jax.random.normal(
      jax.random.fold_in(key, 1), (num * length, vocab)
    )
    objective = Hybrid(vocab - 1, p_uniform=0.0)
    levels = (jnp.arange(num) + 0.5) / num
    noised = objective.corrupt(
      jax.random.split(jax.random.fold_in(key, 2), num),
      levels,
      x0,
      jnp.ones(x0.shape, bool),
    )
    flat = lambda x: x.reshape(-1)
    terms = objective.terms(logits, jax.tree.map(flat, noised.fields))
    u = 1 - levels
    scale = jnp.where(
      noised.tokens == vocab - 1, (6 * u * (1 - u) / noised.t)[:, None], 0
    )
    masked = Masked(vocab - 1).terms(
      logits, {'target': flat(x0), 'scale': flat(scale)}
    )
    for ours, expected in zip(terms, masked):
      np.testing.assert_allclose(ours, expected, rtol=1e-5)

  @parameterized.named_parameters(
    ('uniform', Uniform(MASK), uniform_nll, uniform_law, uniform_terms),
    (
      'hybrid',
      Hybrid(MASK, p_uniform=0.2),
      hybrid_nll,
      hybrid_law,
      hybrid_terms,
    ),
  )
  def test_truncation_of_the_clock(self, objective, nll, law, terms):
    # The part t < tau(MIN_CLOCK), near the end where rates are infinite.
    table, x0 = toys.random_table(0), TEXTS[5]
    u, shares = quadrature(48)
    left_out = mixture_bound(
      law,
      terms,
      u * mixture.MIN_CLOCK,
      shares * mixture.MIN_CLOCK,
      table,
      x0,
      range(LENGTH),
    )
    self.assertGreater(left_out, 0)
    self.assertLess(left_out, 1e-5 * nll(objective, table, x0, range(LENGTH)))
    t, rest = times.smoothstep(jnp.array([0.0]))
    np.testing.assert_array_equal((t, rest), ([0], [1]))
    x0 = jnp.zeros((2, 1), int)
    ends = objective.fields(jnp.array([0.0, 1.0]), x0, x0)
    self.assertTrue(all(np.isfinite(x).all() for x in ends.values()))

  @parameterized.product(
    make=(lambda n: Uniform(n), lambda n: Hybrid(n, p_uniform=0.1)),
    vocab=(4, 1001),
    scale=(0.1, 3.0),
  )
  def test_float32_at_both_ends_of_time(self, make, vocab, scale):
    # Against float64, where neither alpha nor the shares are lost.
    objective = make(vocab - 1)
    # Uniform noise has 1 - alpha, but not alpha, to full precision. The bound
    # is negligible where that matters.
    end = -2 if isinstance(objective, Uniform) else -3
    u = np.concatenate([np.logspace(-5, -0.5, 10), 1 - np.logspace(end, -1, 5)])
    rng = np.random.default_rng(0)
    logits = scale * rng.normal(size=(15 * 3, vocab)).astype(np.float32)
    x0 = np.zeros((15, 3), np.int32)
    xt = np.tile([0, 1, vocab - 1], (15, 1))  # kept, replaced, masked

    def nll(levels, logits):
      fields = objective.fields(levels, x0, xt)
      fields = jax.tree.map(lambda x: x.reshape(-1), fields)
      return objective.terms(logits, fields)

    levels = np.float32(1 - u)
    single = nll(jnp.asarray(levels), jnp.asarray(logits))
    with jax.enable_x64():
      # (log_softmax stays in float32: the same x.)
      double = nll(jnp.asarray(levels, jnp.float64), jnp.asarray(logits))
      self.assertEqual(double.nll.dtype, jnp.float64)
    np.testing.assert_allclose(single.nll, double.nll, rtol=2e-3)

  def test_only_training_weights_are_clipped(self):
    levels = jnp.linspace(0.001, 0.9999, 50)
    x0, xt = jnp.zeros((50, 1), int), jnp.ones((50, 1), int)
    true = Hybrid(MASK).fields(levels, x0, xt)
    clipped = Hybrid(MASK, max_weight=2.0).fields(levels, x0, xt)
    np.testing.assert_array_equal(clipped['nll_weight'], true['nll_weight'])
    np.testing.assert_array_equal(true['loss_weight'], true['nll_weight'])
    u = 1 - np.asarray(levels)
    speed = (6 * u * (1 - u))[:, None]
    np.testing.assert_allclose(
      clipped['loss_weight'],
      np.minimum(true['loss_weight'], 2 * speed),
      rtol=1e-4,
    )
    self.assertLess(np.sum(clipped['loss_weight']), np.sum(true['loss_weight']))
    self.assertEqual(Hybrid(MASK, max_weight=2.0).evaluation(), Hybrid(MASK))

  def test_the_clock_keeps_the_variance_of_uniform_noise_finite(self):
    # P(replaced) times the squared weight stays bounded as t falls, where at
    # uniform times it is 1 / t.
    u = np.logspace(-5, -1, 20)
    x0, xt = jnp.zeros((20, 1), int), jnp.ones((20, 1), int)
    fields = Uniform(MASK).fields(jnp.float32(1 - u), x0, xt)
    weight = np.asarray(fields['nll_weight'])[:, 0]
    t = np.asarray(times.smoothstep(jnp.float32(u))[0])
    replaced = t * 2 / 3
    self.assertLess(np.max(replaced * weight**2), 20)
    self.assertGreater(np.max(replaced / t**2), 1e9)

  def test_phi(self):
    d = np.concatenate([-np.logspace(-8, -0.3, 60), np.logspace(-8, 8, 60)])
    d = np.float32(d)
    x = np.float64(d)
    # For small d by its series in float64, which cancels as well.
    expected = np.where(
      abs(x) < 1e-3, x**2 / 2 - x**3 / 3 + x**4 / 4, x - np.log1p(x)
    )
    np.testing.assert_allclose(
      mixture.phi(d, jnp.log1p(d)), expected, rtol=1e-5
    )

  @parameterized.parameters(
    (lambda: Hybrid(MASK, p_uniform=1.0), 'objective.p_uniform=1.0'),
    (lambda: Hybrid(MASK, p_uniform=-0.1), 'objective.p_uniform=-0.1'),
    (lambda: Hybrid(MASK, p_uniform=0.95), 'objective.p_uniform=0.95'),
    (lambda: Hybrid(MASK, gamma=0.5), 'objective.gamma=0.5'),
    (lambda: Hybrid(MASK, gamma=2.5), 'objective.gamma=2.5'),
    (lambda: Uniform(MASK, max_weight=-1.0), 'objective.max_weight=-1.0'),
    (lambda: Uniform(MASK, noise='count'), "objective.noise='count'"),
    (lambda: D3PM(MASK, noise='count'), "objective.noise='count'"),
  )
  def test_errors_name_the_key(self, make, message):
    with self.assertRaisesRegex(InputError, message):
      make()


class MaskedKinTest(parameterized.TestCase):
  """d3pm and sedd are the masked loss plus a penalty."""

  def nll(self, objective, table, levels):
    num = len(TEXTS) * len(levels)
    x0 = np.tile(TEXTS, (len(levels), 1))
    levels = np.repeat(np.float32(levels), len(TEXTS))
    _, terms = noised_nll(
      table_logits,
      objective,
      table,
      jax.random.split(jax.random.key(0), num),
      levels,
      x0,
      np.ones(x0.shape, bool),
    )
    return terms

  def test_d3pm_without_a_share_on_the_mask(self):
    levels, table = np.arange(4) / 4 + 0.1, toys.random_table(0)
    masked = self.nll(
      Masked(MASK, noise='uniform', num_timesteps=4), table, levels
    )
    free = self.nll(D3PM(MASK, noise='uniform', num_timesteps=4), table, levels)
    self.assertTrue(np.all(np.asarray(free.nll) >= masked.nll * (1 - 1e-5)))
    self.assertGreater(np.sum(free.nll), 1.5 * np.sum(masked.nll))
    table[..., MASK] = -100
    none = self.nll(D3PM(MASK, noise='uniform', num_timesteps=4), table, levels)
    for ours, expected in zip(none, masked):
      np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)

  def test_d3pm_steps(self):
    self.assertEqual(D3PM(MASK).num_steps, 1000)
    self.assertEqual(D3PM(MASK, num_timesteps=7).num_steps, 7)
    final = D3PM(MASK, noise='uniform', num_timesteps=7, min_time=0.5)
    self.assertEqual(final.evaluation(), D3PM(MASK, num_timesteps=7))

  @parameterized.parameters('count', 'overlap', 'uniform')
  def test_sedd_of_normalised_ratios(self, noise):
    levels, table = np.arange(4) / 4 + 0.1, toys.random_table(0)
    masked = self.nll(Masked(MASK, noise=noise), table, levels)
    free = self.nll(ScoreEntropy(MASK, noise=noise), table, levels)
    self.assertTrue(np.all(np.asarray(free.nll) >= masked.nll * (1 - 1e-5)))
    self.assertGreater(np.sum(free.nll), 1.05 * np.sum(masked.nll))
    ratios = np.float32(toys.log_softmax(table) + np.log(toys.VOCAB))
    table[..., :MASK] = ratios
    normalised = self.nll(ScoreEntropy(MASK, noise=noise), table, levels)
    for ours, expected in zip(normalised, masked):
      np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)

  def test_bound_and_equality(self):
    joint = toys.random_joint(1)
    entropy = -np.sum(joint * np.log(joint))
    exact, eligible = toys.posterior_table(joint), range(LENGTH)
    bound = lambda nll, objective, table: sum(
      p * nll(objective, table, text, eligible) for p, text in zip(joint, TEXTS)
    )
    ratios = exact + np.float32(np.log(toys.VOCAB))
    np.testing.assert_allclose(
      bound(sedd_nll, None, ratios), entropy, rtol=1e-5
    )
    self.assertGreater(
      bound(sedd_nll, None, toys.random_table(0)), entropy + 0.01
    )
    exact[..., MASK] = -100
    steps = [
      bound(d3pm_nll, D3PM(MASK, num_timesteps=n), exact) for n in (1, 4, 32)
    ]
    self.assertTrue(np.all(np.diff(steps) < 0), steps)
    self.assertBetween(steps[-1], entropy, entropy * 1.02)


class GenMD4Test(parameterized.TestCase):
  def test_with_all_rates_1_it_is_the_masked_loss(self):
    objective, num = GenMD4(MASK), 64
    bound = objective.bind(objective.init_params())
    np.testing.assert_allclose(bound.rates, 1, rtol=1e-6)
    levels = (jnp.arange(num) + 0.5) / num
    x0, table = TEXTS[np.arange(num) % 27], toys.random_table(0)
    noised, terms = noised_nll(
      table_logits,
      objective,
      table,
      jax.random.split(jax.random.key(0), num),
      levels,
      x0,
      np.ones(x0.shape, bool),
    )
    logits = table_logits(table, noised).reshape(-1, 4)
    u = 1 - levels[:, None]
    scale = jnp.where(noised.scored, 2 * u / u**2, 0.0)  # dt/du times 1/t
    masked = Masked(MASK).terms(
      logits, {'target': x0.reshape(-1), 'scale': scale.reshape(-1)}
    )
    for ours, expected in zip((terms.loss, terms.nll), masked):
      np.testing.assert_allclose(ours.reshape(-1), expected, rtol=1e-5)

  def test_gradient_if_all_eligible_tokens_are_masked(self):
    # A level of 0 is t = 1, when only the prompt is not masked.
    x0 = jnp.asarray(TEXTS[:4])
    eligible = jnp.ones(x0.shape, bool).at[:, 0].set(False)

    def surrogate(rate):
      objective = GenMD4(MASK).bind({'rate': rate})
      noised = objective.corrupt(
        jax.random.split(jax.random.key(0), 4), jnp.zeros(4), x0, eligible
      )
      return objective._schedule_gradient(noised, x0, eligible, jnp.arange(4.0))

    gradient = jax.grad(surrogate)(GenMD4(MASK).init_params()['rate'])
    self.assertTrue(np.isfinite(gradient).all(), gradient)

  def test_bound_and_equality(self):
    # `genmd4_nll` is what the conformance tests find the objective to be.
    joint, objective = toys.random_joint(1), GenMD4(MASK, rates=RATES)
    entropy = -np.sum(joint * np.log(joint))
    bound = lambda tables, text: genmd4_nll(
      objective, tables, text, range(LENGTH), nodes
    )
    nodes = quadrature(48)
    for seed in range(2):
      table = toys.random_table(seed)
      value = sum(p * bound(table, text) for p, text in zip(joint, TEXTS))
      self.assertGreater(value, entropy + 0.01)
    exact = np.stack(
      [
        toys.whole_posterior_table(
          joint, toys.token_law(u ** (2 * np.array(RATES)))
        )
        for u in nodes[0]
      ]
    )
    value = sum(p * bound(exact, text) for p, text in zip(joint, TEXTS))
    np.testing.assert_allclose(value, entropy, rtol=1e-3)
    # A denoiser that ignores the rates has a larger bound.
    blind = toys.posterior_table(joint)
    value = sum(p * bound(blind, text) for p, text in zip(joint, TEXTS))
    self.assertGreater(value, entropy + 0.01)

  def test_the_gradient_through_the_noise(self):
    # At one time, for one text with a prompt, against finite differences of the
    # sum over all masks.
    table, x0, u = toys.random_table(0), np.array([2, 0, 1]), 0.6
    num, eligible = 40_000, [0, 1]
    is_eligible = np.tile([True, True, False], (2 * num, 1))
    keys = jax.random.split(jax.random.key(0), 2 * num)
    texts, levels = (
      np.tile(x0, (2 * num, 1)),
      np.full(2 * num, 1 - u, np.float32),
    )

    @jax.jit
    def estimates(rates):
      objective = GenMD4(MASK, rates=rates)
      noised = objective.corrupt(keys, levels, texts, is_eligible)

      def loss(rates):
        objective = GenMD4(MASK, rates=rates)
        terms = objective.terms(
          table_logits(table, noised).reshape(-1, 4),
          jax.tree.map(lambda x: x.reshape(-1), noised.fields),
        )
        row = (
          jnp.sum(
            jnp.where(noised.scored, terms.loss.reshape(texts.shape), 0.0),
            axis=1,
          )
          / 2
        )  # each draw counts half
        pairs = lambda x: x.reshape(num, 2, *x.shape[1:])
        surrogate = jax.vmap(objective._schedule_gradient)(
          jax.tree.map(pairs, noised),
          pairs(texts),
          pairs(is_eligible),
          pairs(row),
        )
        return row.reshape(num, 2).sum(1) + surrogate, row.reshape(num, 2).sum(
          1
        )

      both = jax.jacfwd(lambda rates: loss(rates)[0])(rates)
      path = jax.jacfwd(lambda rates: loss(rates)[1])(rates)
      return both, path

    both, path = (
      np.asarray(x, np.float64) for x in estimates(jnp.asarray(RATES))
    )
    exact = lambda rates: genmd4_nll(
      GenMD4(MASK, rates=tuple(rates)),
      table,
      x0,
      eligible,
      (np.array([u]), np.ones(1)),
    )
    step = 1e-5 * np.eye(3)
    expected = np.array(
      [(exact(RATES + h) - exact(RATES - h)) / 2e-5 for h in step]
    )
    error = both.mean(0) - expected
    self.assertTrue(np.all(abs(error) < 4 * both.std(0) / num**0.5 + 1e-5))
    # The gradient of the loss alone is biased.
    self.assertGreater(np.max(abs(path.mean(0) - expected)), 0.1)


class BlockTest(parameterized.TestCase):
  @parameterized.parameters(*masking.MaskedNoise.noises)
  def test_one_block_is_masked_diffusion(self, noise):
    # The same noise, scale and scored positions, so the same loss.
    whole = Block(MASK, noise=noise, block_size=18)
    keys = jax.random.split(jax.random.key(0), 64)
    x0 = np.arange(64 * 18, dtype=np.int32).reshape(64, 18) % 3
    eligible = np.random.default_rng(0).random(x0.shape) < 0.8
    levels = whole.sample_levels(jax.random.key(1), 64, 18)
    block = whole.corrupt(keys, levels, x0, eligible)
    own_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    masked = Masked(MASK, noise=noise).corrupt(
      own_keys, levels[:, 0], x0, eligible
    )
    np.testing.assert_array_equal(block.tokens, masked.tokens)
    np.testing.assert_array_equal(block.scored, masked.scored)
    jax.tree.map(np.testing.assert_array_equal, block.fields, masked.fields)
    self.assertEqual(
      whole.max_scored(64, 18), Masked(MASK, noise=noise).max_scored(64, 18)
    )

  def test_blocks_of_one_are_the_exact_value_for_every_text(self):
    objective, table = Block(MASK, block_size=1), toys.random_table(0)
    levels = objective.sample_levels(jax.random.key(0), 28, LENGTH)
    x0 = np.concatenate([TEXTS, TEXTS[:1]])  # whole pairs
    _, terms = noised_nll(
      block_logits(1),
      objective,
      table,
      jax.random.split(jax.random.key(1), 28),
      levels,
      x0,
      np.ones(x0.shape, bool),
    )
    expected = [ar_nll(objective, table, text, range(LENGTH)) for text in x0]
    np.testing.assert_allclose(np.sum(terms.nll, 1), expected, rtol=1e-5)

  def test_every_block_has_a_level_of_its_own(self):
    objective = Block(MASK, block_size=4)
    levels = np.asarray(objective.sample_levels(jax.random.key(0), 16, 32))
    self.assertEqual(levels.shape, (16, 8))
    np.testing.assert_array_equal(levels[::2], levels[1::2])  # partners
    # Stratified over all blocks of the batch: one in each of 64 strata.
    np.testing.assert_array_equal(
      np.sort((levels[::2] * 64).astype(int).ravel()), np.arange(64)
    )
    draws = np.asarray(objective.eval_levels(jax.random.key(1), 16, 32))
    self.assertEqual(draws.shape, (16, 8))
    for column in draws.T:  # each block's draws are
      np.testing.assert_array_equal(
        np.sort((column[::2] * 8).astype(int)), np.arange(8)
      )

  @parameterized.parameters(False, True)
  def test_the_two_laws_of_one_network(self, is_shifted):
    # A network with a causal clean copy, on all texts of two blocks of two.
    objective = Block(MASK, block_size=2, ar_weight=1.0)
    network = TransformerNetwork(
      toys.model_config(
        vocab_size=4, block_size=2, causal=True, shift_outputs=is_shifted
      )
    )
    params = jax.tree.map(
      lambda x: 6 * x, network.init_params(jax.random.key(0))
    )
    texts = np.array(list(itertools.product(range(MASK), repeat=4)), np.int32)
    whole = np.ones(texts.shape, bool)
    num = np.full(len(texts), 4, np.int32)
    index = np.arange(len(texts), dtype=np.int32)
    mesh = meshes.make_mesh(meshes.MeshConfig(1, 1, 1), jax.devices()[:1])
    evaluate = evaluate_steps.make_eval_step(
      Scorer(network, objective, 64), mesh, num_draws=64, seed=0
    )
    rows, _ = evaluate(params, Batch(texts, whole, num, num, num, None, index))
    np.testing.assert_allclose(np.exp(-rows['ar_nll']).sum(), 1, rtol=1e-5)

    # The block law by the sampler's calls: each block in a random order.
    call = Denoiser(network, objective, params)
    denoise = jax.jit(lambda *args: call(*args))
    every = np.tile(np.arange(4, dtype=np.int32), (len(texts), 1))

    def log_p(i, given):
      canvas = np.where(np.isin(np.arange(4), given)[None], texts, MASK)
      logits = denoise(canvas, np.ones(len(texts), np.float32), every)
      return toys.log_softmax(logits)[np.arange(len(texts)), i, texts[:, i]]

    nll, bound = 0, 0
    for start in (0, 2):
      before, i, j = list(range(start)), start, start + 1
      orders = [
        log_p(a, before) + log_p(b, [*before, a]) for a, b in ((i, j), (j, i))
      ]
      nll = nll - np.log(np.mean(np.exp(orders), axis=0))
      bound = bound - np.mean(orders, axis=0)
    np.testing.assert_allclose(np.exp(-nll).sum(), 1, rtol=1e-5)
    self.assertGreater(np.mean(bound - nll), 0.01)
    error = np.asarray(rows['nll'], np.float64) - bound
    self.assertLess(
      abs(error.mean()), 4 * error.std() / len(texts) ** 0.5 + 1e-5
    )
    # Two models: neither law is the other's.
    self.assertGreater(np.abs(rows['ar_nll'] - nll).max(), 0.1)
    if is_shifted:  # But for the first token of a block.
      own = call.autoregressive
      logits = jax.jit(lambda *args: own(*args))(
        texts, np.ones(len(texts), np.float32), every
      )
      exact = toys.log_softmax(logits)[np.arange(len(texts)), 2, texts[:, 2]]
      np.testing.assert_allclose(log_p(2, [0, 1]), exact, atol=1e-5)

  @parameterized.parameters(-0.5, float('nan'), float('inf'))
  def test_invalid_weights(self, weight):
    with self.assertRaisesRegex(InputError, f'objective.ar_weight={weight}'):
      Block(MASK, ar_weight=weight)

  def test_blocks_divide_the_row(self):
    with self.assertRaisesRegex(
      InputError,
      r'objective.block_size=4 .*data.length'
      r'=18; .*\[1, 2, 3, 6, 9, 18\]',
    ):
      Block(MASK, block_size=4).max_scored(2, 18)


class InputTimeTest(parameterized.TestCase):
  """A row with a prompt gets the same time as in sampling."""

  @parameterized.parameters(
    Masked(MASK, schedules.Cosine()),
    Masked(MASK, schedules.Cosine(), noise='stratified'),
    D3PM(MASK, schedules.Cosine(), num_timesteps=50),
  )
  def test_the_share_of_the_whole_row(self, objective):
    keys = jax.random.split(jax.random.key(0), 8)
    levels = objective.sample_levels(jax.random.key(1), 8, 16)
    x0, weight = np.zeros((8, 16), np.int32), np.ones((8, 16), bool)
    corrupt = jax.jit(objective.corrupt)
    whole = corrupt(keys, levels, x0, weight)
    # A new array, since the first one may still be read.
    response = weight & (np.arange(16) >= 12)
    part = corrupt(jax.random.clone(keys), levels, x0, response)
    for noised, free_share in ((whole, 1.0), (part, 0.25)):
      expected = objective.network_time(noised.level[:, 0] * free_share)
      np.testing.assert_allclose(noised.t, expected, atol=1e-5)
    self.assertLess(np.max(part.t), np.max(whole.t))


class AutoregressiveTest(parameterized.TestCase):
  def test_is_normalised(self):
    objective, table = Autoregressive(MASK), toys.random_table(3)
    _, terms = noised_nll(
      ar_logits,
      objective,
      table,
      jax.random.split(jax.random.key(0), 27),
      np.zeros(27, np.float32),
      TEXTS,
      np.ones(TEXTS.shape, bool),
    )
    nll = np.asarray(terms.nll, np.float64).sum(1)
    np.testing.assert_allclose(np.exp(-nll).sum(), 1, rtol=1e-5)

  def test_input_is_shifted(self):
    tokens = Autoregressive(MASK).network_input(jnp.array([[0, 1, 2]]))
    np.testing.assert_array_equal(tokens, [[MASK, 0, 1]])
