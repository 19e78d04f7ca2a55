"""Tests of nanodlm.samplers: laws of the samples with an exact posterior."""

from collections.abc import Callable
import dataclasses
import functools
import itertools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm import samplers
from nanodlm.noise import processes, schedules, times
from nanodlm.noise.categorical import Draw
from nanodlm.objectives import masking
from nanodlm.objectives.ar import Autoregressive
from nanodlm.objectives.block import Block as BlockObjective
from nanodlm.objectives.d3pm import D3PM
from nanodlm.objectives.genmd4 import GenMD4
from nanodlm.objectives.masked import Masked
from nanodlm.objectives.mixture import Hybrid
from nanodlm.objectives.sedd import ScoreEntropy
from nanodlm.objectives.uniform import Uniform
from nanodlm.samplers import guidance, reveal
from nanodlm.samplers.ancestral import Ancestral
from nanodlm.samplers.ar import LeftToRight
from nanodlm.samplers.block import Block
from nanodlm.samplers.confidence import Confidence
from nanodlm.samplers.edit import Edit
from nanodlm.samplers.expand import Expand
from nanodlm.samplers.first_hitting import FirstHitting
from nanodlm.samplers.fixed_count import FixedCount
from nanodlm.samplers.guidance import Guided
from nanodlm.samplers.posterior import CORRECTION_TIME, Posterior
from nanodlm.samplers.prefix_cache import PrefixCache
from nanodlm.samplers.psi import Psi
from nanodlm.samplers.remask import Remask
from nanodlm.samplers.renoise import Renoise
from nanodlm.samplers.speculate import Speculate
from nanodlm.types import Canvas, InputError
from tests import toys
from tests.toys import LENGTH, MASK, TEXTS, VOCAB

DRAW = Draw(MASK)
NUM_ROWS = 8_000
JOINT = toys.random_joint(0)
POSTERIOR = toys.posterior_table(JOINT)
# Further from a product of marginals, and less even.
SHARP_JOINT = JOINT**2.5 / np.sum(JOINT**2.5)
SHARP = toys.posterior_table(SHARP_JOINT)
SHARP_NETWORK = toys.CachedTable(SHARP)
NETWORK = toys.CachedTable(POSTERIOR)
# Drafts for the law of POSTERIOR: from its own marginals given what is before;
# of another law; and such that the likeliest tokens are hardly ever drafted.
DRAFTS = {
  'good': POSTERIOR,
  'bad': toys.random_table(3),
  'adversarial': np.float32([1, 1, 1, -1]) * -4 * POSTERIOR,
}


def test_parts_do_not_overflow():
  rng = np.random.default_rng(0)
  for longest in (7, 100, 65535):
    total = rng.integers(1, 2**31 // longest, 1000) * (longest > 7) + 5
    num = rng.integers(1, longest + 1, 1000)
    rank = rng.integers(0, num + 1)
    expected = total.astype(np.int64) * rank // num
    found = reveal.scale_rank(rank, total, num, total.max(), longest)
    np.testing.assert_array_equal(found, expected)
  large = reveal.scale_rank(np.array([1, 65534]), 65535, 65535, 65535, 65535)
  np.testing.assert_array_equal(large, [1, 65534])
  few = reveal.scale_rank(np.array([1, 99_999]), 16, 100_000, 16, 100_000)
  np.testing.assert_array_equal(few, [0, 15])
  with pytest.raises(InputError, match='65536, are too large'):
    reveal.scale_rank(1, 1, 1, 65536, 65536)


@dataclasses.dataclass(frozen=True)
class Case:
  """A sampler.

  Attributes:
    exact: the sampler, with settings for which its law is the joint, or closer
      than the test resolves.
    num_calls: (free positions) -> (minimum, maximum) calls of `exact`.
    fixed: a supported prompt.
    network: the model.
  """

  exact: object
  num_calls: Callable[[int], tuple[int, int]]
  fixed: tuple[bool, ...] = (False, True, False)
  network: object = NETWORK


CASES = {
  # One slot: a step that reveals n tokens of a row takes n calls.
  'ancestral': Case(Ancestral(DRAW, num_steps=128), lambda n: (n, n * 128)),
  # One call for the prompt.
  'ar': Case(
    LeftToRight(DRAW),
    lambda n: (n, n + (n < LENGTH)),
    (True, False, False),
    toys.CachedTable(POSTERIOR, causal=True),
  ),
  # Two blocks, the second shorter; one call more to cache the first.
  'block': Case(
    Block(FixedCount(DRAW, 2), 2, MASK),
    lambda n: (n, n + 1),
    network=toys.CachedTable(POSTERIOR, block_size=2),
  ),
  'confidence': Case(
    Confidence(DRAW, num_steps=LENGTH, score='random'), lambda n: (n, n)
  ),
  # One mask per call, and tokens are final.
  'edit': Case(Edit(DRAW, 1.01, 1.01), lambda n: (n, n)),
  # Here, no gap has room.
  'expand': Case(Expand(DRAW, score='random'), lambda n: (n, n)),
  'first_hitting': Case(FirstHitting(DRAW), lambda n: (n, n)),
  'fixed_count': Case(FixedCount(DRAW, num_steps=LENGTH), lambda n: (n, n)),
  'posterior': Case(Posterior(DRAW, 64, Masked(MASK)), lambda n: (64, 64)),
  # A table's "keys" do not depend on other positions: never stale.
  'prefix_cache': Case(
    PrefixCache(FixedCount(DRAW, 2), 2, MASK), lambda n: (n + 1, n + 2)
  ),
  'psi': Case(
    Psi(DRAW, 64, Masked(MASK), remask='cap', eta=0.01), lambda n: (64, 64)
  ),
  'remask': Case(
    Remask(DRAW, num_steps=128, remask='cap', eta=0.01), lambda n: (n, n * 128)
  ),
  # Masks only: one token per call, which then is certain.
  'renoise': Case(
    Renoise(DRAW, LENGTH, Hybrid(MASK, p_uniform=0.0), entropy_budget=1e-9),
    lambda n: (n, n),
  ),
}
CASES['speculate'] = Case(
  Speculate(DRAW, 3),
  lambda n: (2, 2 * n + 1),
  (True, False, False),
  toys.DraftingTable(POSTERIOR, DRAFTS['bad']),
)
ROWS = list(CASES.items())


def canvas_of(fixed, token=2):
  """A canvas [B, L] with `token` wherever it is fixed."""
  fixed = jnp.asarray(fixed)
  return Canvas(jnp.where(fixed, token, MASK), fixed)


def blank(num, length=LENGTH):
  return canvas_of(np.zeros((num, length), bool))


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(sampler, canvas, keys, network=NETWORK):
  """Samples with the exact posterior as the denoiser."""
  return sampler(keys, canvas, network)


def keys_of(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


def histogram(tokens):
  """Counts of the 27 texts; a mask among the tokens is an error."""
  np.testing.assert_array_less(tokens, MASK)
  return np.bincount(toys.text_index(tokens), minlength=len(TEXTS))


def product_of_marginals():
  """The law where all tokens are drawn at once from the blank canvas."""
  p = np.exp(toys.log_softmax(POSTERIOR[-1]))
  return np.prod([p[i, TEXTS[:, i]] for i in range(LENGTH)], axis=0)


def chain_law(noise, table=POSTERIOR):
  """The law of the reverse chain over a grid of noise levels, enumerated."""
  one_hot = np.eye(MASK + 1)
  p_x0 = np.concatenate(
    [
      np.exp(toys.log_softmax(table)),
      np.zeros((len(toys.CANVASES), LENGTH, 1)),
    ],
    axis=-1,
  )
  law = np.zeros(len(toys.CANVASES))
  law[-1] = 1  # all masks
  for noise_t, noise_s in itertools.pairwise(np.asarray(noise)):
    shown = jnp.full(toys.CANVASES.shape, (noise_t - noise_s) / noise_t)
    q = np.asarray(
      processes.Masked(MASK).reveal(toys.CANVASES, p_x0, shown), np.float64
    )
    # p(xs | xt) = prod_i q_i(xs_i), for every pair of canvases.
    step = np.prod(
      q[:, None] * one_hot[toys.CANVASES][None],
      axis=-1,
      where=one_hot[toys.CANVASES][None] > 0,
    ).prod(-1)
    law = law @ step
  return law[toys.canvas_index(TEXTS)]


class ConformanceTest(parameterized.TestCase):
  def test_every_sampler_has_a_row(self):
    # Samplers whose gaps have any length are in insert_test.
    expected = {k for k, cls in samplers.SAMPLERS.items() if cls.fills_masks}
    self.assertEqual(set(CASES), expected)
    for name, case in ROWS:
      self.assertIsInstance(case.exact, samplers.SAMPLERS[name])

  @parameterized.named_parameters(ROWS)
  def test_law(self, case):
    # Blank canvases: the joint.
    least, most = case.num_calls(LENGTH)
    free = run(case.exact, blank(NUM_ROWS), keys_of(NUM_ROWS), case.network)
    self.assertGreater(toys.chi_square(histogram(free.tokens), JOINT), 1e-3)
    self.assertBetween(free.num_calls, least, most)

    # A prompt: the joint given the prompt.
    fixed = np.array(case.fixed)
    canvas = canvas_of(np.tile(fixed, (NUM_ROWS, 1)))
    prompted = run(case.exact, canvas, keys_of(NUM_ROWS), case.network)
    given = JOINT * np.all(~fixed | (TEXTS == 2), axis=1)
    self.assertGreater(toys.chi_square(histogram(prompted.tokens), given), 1e-3)
    least, most = case.num_calls(LENGTH - 1)
    self.assertBetween(prompted.num_calls, least, most)

    # Every pattern of prompts side by side: a row is what it is elsewhere.
    pattern = np.array(list(itertools.product([False, True], repeat=LENGTH)))
    if fixed[0]:  # left to right: the free positions are the end
      pattern = np.arange(LENGTH)[None] < np.arange(8)[:, None] // 2
    pattern = np.tile(pattern, (NUM_ROWS // 8, 1))
    # The content of free positions does not matter.
    canvas = canvas_of(pattern)
    canvas = canvas._replace(tokens=jnp.where(pattern, canvas.tokens, 1))
    mixed = run(case.exact, canvas, keys_of(NUM_ROWS), case.network).tokens
    histogram(mixed)  # no mask is left
    np.testing.assert_array_equal(np.asarray(mixed)[pattern], 2)
    for same, other in (
      (~pattern.any(1), free),
      (np.all(pattern == fixed, axis=1), prompted),
    ):
      self.assertGreater(same.sum(), 0)
      np.testing.assert_array_equal(mixed[same], other.tokens[same])

    # A full canvas takes no call.
    full = run(
      case.exact,
      canvas_of(np.ones((NUM_ROWS, LENGTH), bool)),
      keys_of(NUM_ROWS),
      case.network,
    )
    self.assertEqual(full.num_calls, 0)

  @parameterized.named_parameters(ROWS)
  def test_draw_settings(self, case):
    # p(0), p(1), p(2) = .6, .3, .1 everywhere.
    logits = np.log(np.float32([0.6, 0.3, 0.1, 10.0]))
    network = case.network.of(np.tile(logits, (64, LENGTH, 1)))
    # At temperature 0.5: .783, .196, .022 before the nucleus is cut out.
    for draw, law in (
      (Draw(MASK, temperature=0.0), [1, 0, 0]),
      (Draw(MASK, temperature=1e-37), [1, 0, 0]),
      (Draw(MASK, temperature=100.0), [0.3362, 0.3338, 0.33]),
      (Draw(MASK, top_k=2), [2 / 3, 1 / 3, 0]),
      (Draw(MASK, temperature=0.5, top_p=0.9), [0.8, 0.2, 0]),
    ):
      if hasattr(case.exact, 'inner'):
        inner = dataclasses.replace(case.exact.inner, draw=draw)
        sampler = dataclasses.replace(case.exact, inner=inner)
      else:
        sampler = dataclasses.replace(case.exact, draw=draw)
      tokens = run(sampler, blank(1000), keys_of(1000), network).tokens
      counts = np.bincount(np.ravel(tokens), minlength=MASK)
      np.testing.assert_array_equal(counts[np.array(law) == 0], 0)
      if np.max(law) < 1:
        self.assertGreater(toys.chi_square(counts, np.array(law)), 1e-3)


def ended(text, eos_ids, is_blank=True):
  """A text after whose first EOS all tokens are eos_ids[0]."""
  text = list(text)
  for i, token in enumerate(text):
    if not is_blank and token in eos_ids:
      return text[: i + 1] + [eos_ids[0]] * (len(text) - i - 1)
    is_blank = is_blank and token in eos_ids
  return text


class EndTest(parameterized.TestCase):
  """A text that ends at its first EOS."""

  @parameterized.product(
    sampler=(
      Block(FixedCount(DRAW, 2), 2, MASK, eos_ids=(1, 2)),
      LeftToRight(DRAW, eos_ids=(1, 2)),
      LeftToRight(DRAW, cache=False, eos_ids=(1, 2)),
      Speculate(DRAW, 2, eos_ids=(1, 2)),
    ),
    prompt=(None, 0, 1),
  )
  def test_law(self, sampler, prompt):
    (network,) = (
      case.network
      for case in CASES.values()
      if type(case.exact) is type(sampler)
    )
    fixed = np.arange(LENGTH) < (prompt is not None)
    canvas = canvas_of(np.tile(fixed, (NUM_ROWS, 1)), prompt or 0)
    law = np.zeros(len(TEXTS))
    for text, p in zip(TEXTS, JOINT):
      if prompt in (None, text[0]):
        # A prompt is never an end.
        head = [] if prompt is None else [prompt]
        rest = ended(text[len(head) :], (1, 2), is_blank=not head)
        law[toys.text_index(np.array(head + rest))] += p
    samples = run(sampler, canvas, keys_of(NUM_ROWS), network)
    counts = histogram(samples.tokens)
    np.testing.assert_array_equal(counts[law == 0], 0)
    self.assertGreater(toys.chi_square(counts, law / law.sum()), 1e-3)

  def test_ended_texts_take_no_calls(self):
    # The second token is the EOS.
    table = np.zeros((64, LENGTH, 4), np.float32)
    table[:, :, 0], table[:, 1, 1] = 50, 99
    for sampler, num_calls, kind in (
      (LeftToRight(DRAW, eos_ids=(2, 1)), 2, {'causal': True}),
      (
        Block(FixedCount(DRAW, 1), 1, MASK, False, (2, 1)),
        2,
        {'block_size': 1},
      ),
    ):
      network = toys.CachedTable(table, **kind)
      samples = run(sampler, blank(4), keys_of(4), network)
      np.testing.assert_array_equal(samples.tokens, [[0, 1, 2]] * 4)
      self.assertEqual(samples.num_calls, num_calls)


class SpeculateTest(parameterized.TestCase):
  """The autoregressive law, whatever is drafted."""

  @parameterized.product(
    drafts=sorted(DRAFTS),
    draw=(DRAW, Draw(MASK, temperature=0.6, top_p=0.8), Draw(MASK, top_k=2)),
    block_size=(2, 3),
  )
  def test_law(self, drafts, draw, block_size):
    # The law of `ar`, enumerated with the settings of the draw.
    log_p = np.asarray(draw.log_prob(jnp.asarray(POSTERIOR)), np.float64)
    law = np.ones(len(TEXTS))
    for i in range(LENGTH):
      canvas = np.where(np.arange(LENGTH)[None] < i, TEXTS, MASK)
      law *= np.exp(log_p[toys.canvas_index(canvas), i, TEXTS[:, i]])
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    network = toys.DraftingTable(POSTERIOR, DRAFTS[drafts])
    sampler = Speculate(draw, block_size)
    samples = run(sampler, blank(NUM_ROWS), keys_of(NUM_ROWS), network)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)

  @parameterized.parameters(*sorted(DRAFTS))
  def test_gaps(self, drafts):
    # The middle is fixed: p does not see it before it is reached, drafts do.
    network = toys.DraftingTable(POSTERIOR, DRAFTS[drafts])
    canvas = canvas_of(np.tile([False, True, False], (NUM_ROWS, 1)))
    samples = run(Speculate(DRAW, 3), canvas, keys_of(NUM_ROWS), network)
    p = np.exp(toys.log_softmax(POSTERIOR))
    law = np.zeros(len(TEXTS))
    for a, b in itertools.product(range(MASK), repeat=2):
      first = p[toys.canvas_index(np.array([MASK] * 3)), 0, a]
      last = p[toys.canvas_index(np.array([a, 2, MASK])), 2, b]
      law[toys.text_index(np.array([a, 2, b]))] = first * last
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)

  @parameterized.parameters(*sorted(DRAFTS))
  def test_greedy_is_greedy(self, drafts):
    draw = Draw(MASK, temperature=0.0)
    network = toys.DraftingTable(POSTERIOR, DRAFTS[drafts])
    # After every first token.
    canvas = Canvas(
      np.int32([[i, MASK, MASK] for i in range(MASK)]),
      np.tile([True, False, False], (MASK, 1)),
    )
    samples = run(Speculate(draw, 3), canvas, keys_of(MASK), network)
    expected = run(
      LeftToRight(draw), canvas, keys_of(MASK), CASES['ar'].network
    )
    np.testing.assert_array_equal(samples.tokens, expected.tokens)

  def test_number_of_calls(self):
    # One token is certain. A perfect draft of 2 tokens gives 3 in a round, and
    # a draft that is never accepted 1.
    table = np.zeros((64, LENGTH, 4), np.float32)
    table[..., 0] = 50
    wrong = np.roll(table, 1, axis=-1)
    for drafts, num_calls in ((table, 2), (wrong, 6)):
      network = toys.DraftingTable(table, drafts)
      samples = run(Speculate(DRAW, 3), blank(4), keys_of(4), network)
      np.testing.assert_array_equal(samples.tokens, 0)
      self.assertEqual(samples.num_calls, num_calls)

  def test_what_it_fits(self):
    self.assertTrue(Speculate.fits(BlockObjective(MASK, ar_weight=1.0)))
    for other in (
      BlockObjective(MASK),
      BlockObjective(MASK, block_size=1, ar_weight=1.0),
      Masked(MASK),
      Autoregressive(MASK),
    ):
      self.assertFalse(Speculate.fits(other))
    with self.assertRaisesRegex(InputError, 'objective.block_size=1'):
      Speculate(DRAW, 1)


LISTED = '1,0.7,0.6,0.05,0'  # in uneven steps


class StepsTest(parameterized.TestCase):
  """Few steps: the law is that of the chain, not the joint's."""

  @parameterized.parameters(
    ('linear', 'uniform', 2),
    ('sqrt', 'uniform', 3),
    ('cosine', 'cosine', 4),
    ('linear', LISTED, 128),
    ('cosine', LISTED, 1),
  )
  def test_ancestral_follows_its_chain(self, schedule, grid, num_steps):
    alpha = schedules.make_schedule(schedule)
    sampler = Ancestral(DRAW, num_steps, alpha, grid)
    samples = run(sampler, blank(NUM_ROWS), keys_of(NUM_ROWS))
    law = chain_law(sampler.noise_levels())
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)
    self.assertLess(toys.chi_square(histogram(samples.tokens), JOINT), 1e-3)

  @parameterized.parameters(Ancestral, FixedCount)
  def test_one_step_is_the_product_of_marginals(self, cls):
    samples = run(cls(DRAW, num_steps=1), blank(NUM_ROWS), keys_of(NUM_ROWS))
    self.assertEqual(samples.num_calls, 1)
    self.assertGreater(
      toys.chi_square(histogram(samples.tokens), product_of_marginals()), 1e-3
    )

  @parameterized.parameters(1, 2)
  def test_overflow_does_not_change_the_law(self, num_slots):
    plan = reveal.Plan(
      jnp.zeros((NUM_ROWS, LENGTH), jnp.int32), jnp.ones((NUM_ROWS, 1))
    )
    sampler = lambda keys, canvas, denoise: reveal.sample_plan(
      keys, canvas, plan, denoise, DRAW, num_slots
    )
    samples = run(sampler, blank(NUM_ROWS), keys_of(NUM_ROWS))
    self.assertEqual(samples.num_calls, -(-LENGTH // num_slots))
    self.assertGreater(
      toys.chi_square(histogram(samples.tokens), product_of_marginals()), 1e-3
    )

  @parameterized.named_parameters(
    ('fixed_count', FixedCount(DRAW, 7), 7),
    ('fixed_count_of_fewer', FixedCount(DRAW, 40), 16),
    ('ancestral', Ancestral(DRAW, 8), 8),
    ('ancestral_listed', Ancestral(DRAW, 8, grid='1,0.6,0.3,0'), 3),
  )
  def test_calls_of_a_long_canvas(self, sampler, num_calls):
    denoise = lambda tokens, level, positions: jnp.zeros((*positions.shape, 4))
    sample = jax.jit(lambda keys: sampler(keys, blank(4, 16), denoise))
    samples = sample(keys_of(4))
    self.assertEqual(samples.num_calls, num_calls)
    self.assertLess(np.max(samples.tokens), MASK)

  @parameterized.product(schedule=sorted(schedules.SCHEDULES), grid=times.GRIDS)
  def test_every_grid_runs_from_noise_to_clean(self, schedule, grid):
    for num_steps in (1, 2, 7, 1000):
      alpha = schedules.make_schedule(schedule)
      noise = np.asarray(Ancestral(DRAW, num_steps, alpha, grid).noise_levels())
      j = np.arange(num_steps + 1) / num_steps
      t = {'uniform': 1 - j, 'cosine': np.cos(np.pi / 2 * j)}[grid]
      np.testing.assert_allclose(
        noise, alpha.noise(t.astype(np.float32).clip(0)), atol=1e-5
      )
      self.assertEqual((noise[0], noise[-1]), (1.0, 0.0))
      self.assertLess(np.max(np.diff(noise)), 1e-7)
      if num_steps < 10:  # with more, float32 cannot tell some from 1
        self.assertLess(np.max(np.diff(noise)), 0)


PROMPTS = ((False, False, False), (False, True, False))
MIXTURES = {
  'uniform': Uniform(MASK),
  'uniform_cosine': Uniform(MASK, schedule=schedules.Cosine()),
  'hybrid': Hybrid(MASK, p_uniform=0.3),
}
RULES = {
  'masked': Masked(MASK, schedules.Cosine()),
  'd3pm': D3PM(MASK, schedules.Polynomial(2.0)),
  'sedd': ScoreEntropy(MASK),
  'genmd4': GenMD4(MASK, rates=(0.6, 1.0, 2.5)),
  **MIXTURES,
}


def noise_law(rule, t):
  """q_t(z | x0), [x0, z]."""
  if isinstance(rule, GenMD4):
    return toys.token_law(float(t) ** np.array(rule.rates))
  if isinstance(rule, masking.MaskedNoise):
    noise = float(rule.schedule.noise(jnp.float32(t)))
    return toys.mixture_law(1 - noise, noise, 0.0)
  parts = rule.process.parts(jnp.float32(t))
  return toys.mixture_law(*(np.float64(x) for x in parts))


def exact_tables(rule, grid, fixed=(False,) * LENGTH):
  """The exact denoiser at each time of a grid, [T, 64, L, V + 1]."""
  table = toys.leave_one_out_table
  if isinstance(rule, GenMD4):
    table = toys.whole_posterior_table
  return np.stack([table(JOINT, noise_law(rule, t), fixed) for t in grid])


def timed_denoiser(tables, grid):
  """A denoiser that looks up the table of the level's place on the grid."""
  tables, grid = jnp.asarray(tables), jnp.asarray(grid)

  def denoise(tokens, level, positions):
    step = jnp.argmin(jnp.abs(level[:, None] - grid[None]), axis=1)[:, None]
    return tables[step, toys.canvas_index(tokens)[:, None], positions]

  return denoise


def posterior_chain(rule, t, tables, fixed, fresh=None):
  """The law [27] of the chain over times t [T + 1], enumerated; prompt: 2.

  `fresh` [T] is the share of positions that a step draws from scratch.
  """
  fixed = np.array(fixed)
  at_prompt = toys.CANVASES == 2
  if isinstance(rule, Uniform):
    start = toys.CANVASES < MASK
  else:
    start = toys.CANVASES == MASK
  law = np.where(fixed, at_prompt, start).all(1).astype(float)
  law /= law.sum()
  reverse = jax.jit(
    lambda table, s, t: jnp.exp(
      rule.reverse(table, jnp.asarray(toys.CANVASES), s, t, DRAW)
    )
  )
  row, position = np.arange(64)[:, None, None], np.arange(LENGTH)[None, None]
  fresh = np.zeros(len(tables)) if fresh is None else fresh
  for j, (table, share) in enumerate(zip(tables, fresh)):
    q = np.asarray(reverse(jnp.asarray(table), t[j + 1], t[j]), np.float64)
    if share:
      clean = np.asarray(reverse(jnp.asarray(table), 0.0, t[j]), np.float64)
      # Canvases that cannot be keep their masks.
      again = clean @ [*noise_law(rule, t[j + 1]), np.eye(MASK + 1)[MASK]]
      q = (1 - share) * q + share * again
    np.testing.assert_allclose(q.sum(-1), 1, rtol=1e-5)
    step = q[row, position, toys.CANVASES[None]]
    step = np.where(fixed, at_prompt[None], step)
    law = law @ step.prod(-1)
  np.testing.assert_allclose(law.sum(), 1, rtol=1e-4)
  return law[toys.canvas_index(TEXTS)]


class PosteriorTest(parameterized.TestCase):
  @parameterized.product(rule=['genmd4', *MIXTURES], fixed=PROMPTS)
  def test_many_steps_of_the_exact_denoiser_are_the_joint(self, rule, fixed):
    rule = RULES[rule]
    given = JOINT * np.all(~np.array(fixed) | (TEXTS == 2), axis=1)
    distance = []
    for num_steps in (16, 256):
      t = times.reverse_grid(num_steps, 'uniform')
      law = posterior_chain(rule, t, exact_tables(rule, t[:-1], fixed), fixed)
      distance.append(abs(law - given / given.sum()).sum() / 2)
    self.assertLess(distance[1], 0.012)  # total variation
    self.assertLess(distance[1], distance[0] / 4)

  @parameterized.product(
    rule=list(RULES), grid=(*times.GRIDS, LISTED), fixed=PROMPTS
  )
  def test_few_steps_follow_their_chain(self, rule, grid, fixed):
    if any(fixed) and grid != 'uniform':
      return  # one grid will do
    rule, t = RULES[rule], times.reverse_grid(3, grid)
    num_steps = t.size - 1
    if rule.can_correct or isinstance(rule, GenMD4):
      tables = exact_tables(rule, t[:-1], fixed)
    else:
      tables = np.stack([toys.random_table(seed) for seed in range(num_steps)])
    levels = rule.level_at(t[:-1], jnp.full(num_steps, 1 - np.mean(fixed)))
    sampler = Posterior(DRAW, 3, rule, grid)
    canvas = canvas_of(np.tile(fixed, (NUM_ROWS, 1)))
    samples = jax.jit(
      lambda keys: sampler(keys, canvas, timed_denoiser(tables, levels))
    )(keys_of(NUM_ROWS))
    law = posterior_chain(rule, t, tables, fixed)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)
    self.assertEqual(samples.num_calls, num_steps)

  @parameterized.parameters(
    FixedCount(DRAW, 2), Posterior(DRAW, 3, Uniform(MASK))
  )
  def test_a_text_that_ends_within_a_block(self, inner):
    seen = []

    class Spy(toys.CachedTable):
      def within(self, cache, tokens, start, level, *args):
        jax.debug.callback(lambda *x: seen.append(x), tokens, level, start)
        return super().within(cache, tokens, start, level, *args)

    sampler = Block(inner, 2, MASK)
    samples = run(sampler, blank(8), keys_of(8), Spy(POSTERIOR, block_size=2))
    jax.block_until_ready(samples)
    jax.effects_barrier()
    self.assertEqual(samples.tokens.shape, (8, LENGTH))
    self.assertLess(np.max(samples.tokens), MASK)
    seen = [(x, level) for x, level, start in seen if start == 2]
    self.assertEqual(len(seen), {2: 1, 3: 3}[inner.num_steps])
    for tokens, level in seen:
      noise = np.mean(tokens == MASK, axis=1)
      # As in training: masks are counted, or there are none.
      expected = level if inner.reads_masks else np.zeros(8)
      np.testing.assert_array_equal(noise, expected)

  @parameterized.parameters(True, False)
  def test_uniform_noise_in_blocks_of_one(self, cache):
    # The exact denoiser of a token, given those before, ignores its noise.
    is_own = np.eye(LENGTH, dtype=bool)
    index = toys.canvas_index(
      np.where(is_own, MASK, toys.CANVASES[:, None])
    )  # [64, L]
    table = np.asarray(POSTERIOR)[index, np.arange(LENGTH)]
    sampler = Block(Posterior(DRAW, 3, Uniform(MASK)), 1, MASK, cache)
    network = toys.CachedTable(table, block_size=1)
    samples = run(sampler, blank(NUM_ROWS), keys_of(NUM_ROWS), network)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), JOINT), 1e-3)
    self.assertEqual(samples.num_calls, 3 * LENGTH + 2 * cache)

  def test_temperature_is_of_the_prediction(self):
    # At temperature 0 the prediction is one token, but not the time of reveal.
    draw, rule = Draw(MASK, temperature=0.0), Masked(MASK)
    logits = jnp.array([[[0.0, 1.0, 0.5, 9.0]]])
    log_p = rule.reverse(
      logits, jnp.array([[MASK]]), jnp.float32(0.25), jnp.float32(1.0), draw
    )
    np.testing.assert_allclose(
      np.exp(log_p[0, 0]), [0, 0.75, 0, 0.25], atol=1e-6
    )

  def test_genmd4_reverse_is_bayes_rule(self):
    rule, s, t = RULES['genmd4'], 0.3, 0.8
    logits, rates = toys.random_table(0)[:1], np.array(RULES['genmd4'].rates)
    x = np.exp(toys.log_softmax(logits))[0, 0]
    hidden = np.append(x * (s / t) ** rates, 0)  # q(mask at s | mask at t, v)
    expected = np.append(x, hidden.sum()) - hidden
    log_p = rule.reverse(
      jnp.asarray(logits),
      jnp.array([[MASK, 1, MASK]]),
      jnp.float32(s),
      jnp.float32(t),
      DRAW,
    )
    np.testing.assert_allclose(np.exp(log_p[0, 0]), expected, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_p[0, 1]), [0, 1, 0, 0])
    end = rule.reverse(
      jnp.asarray(logits),
      jnp.array([[MASK, 1, MASK]]),
      jnp.float32(0),
      jnp.float32(t),
      DRAW,
    )
    np.testing.assert_allclose(np.exp(end[0, 0]), np.append(x, 0), atol=1e-6)

  def test_d3pm_reverse_is_bayes_rule(self):
    rule, s, t = RULES['d3pm'], 0.3, 0.8  # alpha = 1 - t^2
    logits = toys.random_table(0)[:1]
    x = np.exp(logits[0, 0]) / np.exp(logits[0, 0]).sum()
    to_mask = 1 - (1 - t**2) / (1 - s**2)
    before = (1 - s**2) * x + s**2 * np.eye(4)[MASK] * (1 - x[MASK])
    before[MASK] = s**2 * (1 - x[MASK]) + x[MASK]
    bayes = before * np.array([to_mask] * 3 + [1])
    log_p = rule.reverse(
      jnp.asarray(logits),
      jnp.full((1, LENGTH), MASK),
      jnp.float32(s),
      jnp.float32(t),
      DRAW,
    )
    np.testing.assert_allclose(
      np.exp(log_p[0, 0]), bayes / bayes.sum(), rtol=1e-5
    )

  def test_sedd_reverse_is_the_analytic_step(self):
    # p(y) = (exp(-dsigma Q) score)_y q_{t|s}(mask | y), linear schedule.
    rule, s, t = RULES['sedd'], 0.3, 0.8
    raw = np.random.default_rng(0).normal(size=(1, 1, 4)) * 0.5
    score = np.append(np.exp(raw[0, 0, :3]) * (1 - t) / t / 3, 1.0)
    rise = (1 - s) / (1 - t)  # exp(dsigma)
    staggered = score * rise
    staggered[MASK] += (1 - rise) * score.sum()
    p = staggered * np.array([1 - 1 / rise] * 3 + [1.0])
    np.testing.assert_allclose(p.sum(), 1)
    log_p = rule.reverse(
      jnp.asarray(raw, jnp.float32),
      jnp.array([[MASK]]),
      jnp.float32(s),
      jnp.float32(t),
      DRAW,
    )
    np.testing.assert_allclose(np.exp(log_p[0, 0]), p, rtol=1e-5)
    # Ratios far too large: clipped; none at all: the last step still reveals.
    for shift, end, revealed in ((9.0, s, 1.0), (-9.0, 0.0, 1.0)):
      log_p = rule.reverse(
        jnp.asarray(raw + shift, jnp.float32),
        jnp.array([[MASK]]),
        jnp.float32(end),
        jnp.float32(t),
        DRAW,
      )
      np.testing.assert_allclose(
        np.exp(log_p[0, 0, :3]).sum(), revealed, rtol=1e-5
      )

  @parameterized.named_parameters(RULES.items())
  def test_level_at(self, rule):
    free_share = jnp.array([1.0, 0.5])
    level = rule.level_at(jnp.float32(0.5), free_share)
    expected = [0.5, 0.5]
    if isinstance(rule, masking.MaskedNoise):
      expected = free_share * rule.schedule.noise(0.5)
    np.testing.assert_allclose(level, expected, rtol=1e-6)
    # A row without a prompt gets the time itself.
    np.testing.assert_allclose(rule.network_time(level)[0], 0.5, rtol=1e-5)

  @parameterized.parameters(
    (0, 0, [1, 1, 1]),
    (1, 1, [1, 2, 1]),
    (2, 2, [0, 2, 1]),
    (3, 3, [0, 2, 2]),
    (9, 4, [0, 2, 2]),
  )
  def test_corrections(self, num_corrections, num_calls, expected):
    # The chain says 1 everywhere, the corrections 0, 2, 2: the surest first.
    text = np.float32([[0, 0, 0, 0]] * LENGTH)
    text[:, 1] = 50

    def denoise(tokens, level, positions):
      is_end = jnp.isclose(level, CORRECTION_TIME)[:, None, None]
      better = jnp.array([[3.0, 0, 0, 0], [0, 0, 4, 0], [0, 0, 2, 0]])
      logits = jnp.where(is_end, better[None], jnp.asarray(text)[None])
      return jnp.broadcast_to(logits, (*tokens.shape, 4))

    draw = Draw(MASK, temperature=0.0)
    sample = lambda rule, fixed: Posterior(
      draw, 4, rule, num_corrections=num_corrections
    )(keys_of(2), canvas_of([fixed] * 2, token=1), denoise)
    samples = sample(MIXTURES['hybrid'], [False] * 3)
    self.assertEqual(samples.num_calls, 4 + num_calls)
    np.testing.assert_array_equal(samples.tokens, [expected] * 2)
    fixed = sample(MIXTURES['uniform'], [True, False, True])
    np.testing.assert_array_equal(
      fixed.tokens, [[1, 2 if num_corrections else 1, 1]] * 2
    )

  def test_corrections_need_networks_that_predict_all(self):
    for rule in RULES.values():
      if rule.can_correct:
        Posterior(DRAW, 4, rule, num_corrections=1)
      else:
        with self.assertRaisesRegex(InputError, 'sampler.num_corrections=1'):
          Posterior(DRAW, 4, rule, num_corrections=1)
    with self.assertRaisesRegex(InputError, 'sampler.num_corrections=-1'):
      Posterior(DRAW, 4, Hybrid(MASK), num_corrections=-1)


class PsiTest(parameterized.TestCase):
  @parameterized.named_parameters(RULES.items())
  def test_a_step_keeps_the_marginals(self, rule):
    # q_s(xs | x0) = sum_z q_t(z | x0) p(xs | z, x0), at every kappa.
    reverse = jax.jit(lambda *args: jnp.exp(rule.reverse(*args, DRAW)))
    z = jnp.arange(MASK + 1)[None]
    for x0, (s, t) in itertools.product(
      range(VOCAB), ((0.3, 0.8), (0.0, 0.4), (0.5, 0.5), (0.6, 1.0))
    ):
      x = np.append(np.eye(VOCAB)[x0], 0).clip(1e-30)
      if isinstance(rule, ScoreEntropy):  # ratios to the mean
        x[:MASK] *= VOCAB
      logits = jnp.tile(jnp.log(jnp.float32(x)), (1, MASK + 1, 1))
      to_s, to_0 = (
        np.asarray(reverse(logits, z, jnp.float32(end), jnp.float32(t))[0])
        for end in (s, 0)
      )
      before, after = noise_law(rule, t)[x0], noise_law(rule, s)[x0]
      again = to_0[:, :MASK] @ noise_law(rule, s)
      for kappa in (0.0, 0.3, 1.0):
        step = kappa * to_s + (1 - kappa) * again
        np.testing.assert_allclose(before @ step, after, atol=1e-5)

  @parameterized.named_parameters(RULES.items())
  def test_noise_has_its_law(self, rule):
    x0 = jnp.tile(jnp.arange(VOCAB), (NUM_ROWS, 1))
    where = jnp.tile(jnp.arange(NUM_ROWS)[:, None] % 4 > 0, (1, VOCAB))
    for t in (0.4, 1.0):
      xt = rule.renoise(keys_of(NUM_ROWS), x0, jnp.float32(t), where)
      np.testing.assert_array_equal(xt[::4], x0[::4])
      for v, law in enumerate(noise_law(rule, t)):
        counts = np.bincount(xt[where[:, 0], v], minlength=MASK + 1)
        self.assertGreater(toys.chi_square(counts, law), 1e-3)

  @parameterized.parameters(
    ('masked', 'cap', 0.2, PROMPTS[1]),
    ('d3pm', 'rescale', 0.5, PROMPTS[0]),
    ('sedd', 'constant', 1.0, PROMPTS[0]),
    ('genmd4', 'constant', 0.7, PROMPTS[1]),
    ('uniform', 'constant', 0.5, PROMPTS[1]),
    ('uniform_cosine', 'cap', 0.4, PROMPTS[0]),
    ('hybrid', 'rescale', 1.0, PROMPTS[0]),
    ('hybrid', 'loop', 0.1, PROMPTS[1]),
  )
  def test_follows_its_chain(self, rule, kind, eta, fixed):
    rule, num_steps = RULES[rule], 10 if kind == 'loop' else 3
    sampler = Psi(DRAW, num_steps, rule, remask=kind, eta=eta)
    t, fresh = sampler.times(), np.asarray(sampler.fresh_probs(), np.float64)
    self.assertEqual((t[0], t[-1], fresh[-1]), (1, 0, 0))
    self.assertBetween(fresh.max(), 0.19, 1.0)
    if rule.can_correct or isinstance(rule, GenMD4):
      tables = exact_tables(rule, t[:-1], fixed)
    else:
      tables = np.stack([toys.random_table(seed) for seed in range(num_steps)])
    levels = rule.level_at(t[:-1], jnp.full(num_steps, 1 - np.mean(fixed)))
    canvas = canvas_of(np.tile(fixed, (NUM_ROWS, 1)))
    denoise = timed_denoiser(tables, levels)
    samples = jax.jit(lambda keys: sampler(keys, canvas, denoise))(
      keys_of(NUM_ROWS)
    )
    law = posterior_chain(rule, t, tables, fixed, fresh)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)

  @parameterized.parameters(
    ('cap', 0.2, 4, 'linear'),
    ('rescale', 0.4, 4, 'cosine'),
    ('loop', 0.1, 10, 'sqrt'),
    ('constant', 0.7, 4, 'linear'),
    ('constant', 0.0, 3, 'cosine'),
  )
  def test_is_remask_for_masked_noise(self, kind, eta, num_steps, schedule):
    schedule = schedules.make_schedule(schedule)
    rule = Masked(MASK, schedule)
    sampler = Psi(DRAW, num_steps, rule, remask=kind, eta=eta)
    law = posterior_chain(
      rule,
      sampler.times(),
      [SHARP] * num_steps,
      PROMPTS[0],
      np.asarray(sampler.fresh_probs(), np.float64),
    )
    twin = Remask(DRAW, num_steps, schedule, remask=kind, eta=eta)
    np.testing.assert_allclose(law, remask_law(twin)[0], atol=2e-6)

  @parameterized.parameters('uniform', 'hybrid', 'masked')
  def test_greedy_tail(self, rule):
    rule = RULES[rule]
    sampler = Psi(DRAW, 3, rule, remask='constant', eta=0.5, greedy_tail=True)
    t = sampler.times()
    tables = exact_tables(rule, t[:-1])
    levels = rule.level_at(t[:-1], jnp.ones(3))
    denoise = timed_denoiser(tables.copy(), levels)
    tokens = jax.jit(
      lambda keys: sampler(keys, blank(NUM_ROWS), denoise).tokens
    )(keys_of(NUM_ROWS))
    best = np.argmax(tables[-1][..., :MASK], axis=-1)
    tables[-1] = np.log(np.eye(MASK + 1)[best].clip(1e-30))
    fresh = np.asarray(sampler.fresh_probs(), np.float64)
    law = posterior_chain(rule, t, tables, PROMPTS[0], fresh)
    self.assertGreater(toys.chi_square(histogram(tokens), law), 1e-3)


def renoise_law(sampler, times_of, tables, fixed):
  """The law [27] of the texts by enumeration, and of the number of calls."""
  free = [i for i in range(LENGTH) if not fixed[i]]
  is_uniform = isinstance(sampler.rule, Uniform)
  noise = range(VOCAB) if is_uniform else [MASK]
  law, calls = np.zeros(len(TEXTS)), np.zeros(sampler.num_steps + 1)
  start = [noise if i in free else [2] for i in range(LENGTH)]
  start = list(itertools.product(*start))
  chain = {(canvas, len(free)): 1 / len(start) for canvas in start}
  for call in range(sampler.num_steps):
    following = {}
    for (canvas, left), weight in chain.items():
      x = np.exp(toys.log_softmax(tables[left][toys.canvas_index(canvas)]))
      q = noise_law(sampler.rule, times_of[left])
      p = x * q[:, list(canvas)].T
      p /= p.sum(1, keepdims=True).clip(1e-300)
      h = [-sum(v * np.log(v) for v in row if v > 0) for row in p]
      order = sorted(free, key=lambda i: h[i])
      least = int(np.ceil(len(free) * (call + 1) / sampler.num_steps))
      within = [sum(h[i] for i in order[:k]) for k in range(len(order))]
      num = sum(x <= sampler.entropy_budget for x in within)
      taken = order[: max(num, least)]
      choices = [
        [(2, 1.0)]
        if fixed[i]
        else list(enumerate(p[i]))
        if i in taken
        else [(v, 1 / len(noise)) for v in noise]
        for i in range(LENGTH)
      ]
      for choice in itertools.product(*choices):
        values, shares = zip(*choice)
        state = values, len(free) - len(taken)
        following[state] = following.get(state, 0) + weight * np.prod(shares)
    chain = {state: p for state, p in following.items() if state[1]}
    done = {state: p for state, p in following.items() if not state[1]}
    for (values, _), p in done.items():
      law[toys.text_index(values)] += p
    calls[call + 1] = sum(done.values())
  return law, calls


class RenoiseTest(parameterized.TestCase):
  @parameterized.parameters(
    ('uniform', 3, 1e-9, PROMPTS[0]),
    ('uniform', 3, 0.5, PROMPTS[1]),
    ('uniform_cosine', 4, 0.8, PROMPTS[0]),
    ('hybrid', 3, 0.7, PROMPTS[0]),
  )
  def test_follows_its_chain(self, rule, num_steps, budget, fixed):
    rule = RULES[rule]
    sampler = Renoise(DRAW, num_steps, rule, entropy_budget=budget)
    num_free = LENGTH - sum(fixed)
    shares = np.arange(num_free + 1) / num_free
    t = np.interp(
      shares, rule.noise_at(np.linspace(0, 1, 9999)), np.linspace(0, 1, 9999)
    )
    np.testing.assert_allclose(rule.noise_at(t), shares, atol=1e-4)
    tables = exact_tables(rule, t, fixed)
    law, calls = renoise_law(sampler, t, tables, fixed)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    canvas = canvas_of(np.tile(fixed, (NUM_ROWS, 1)))
    denoise = timed_denoiser(tables, t)
    samples = jax.jit(lambda keys: sampler(keys, canvas, denoise))(
      keys_of(NUM_ROWS)
    )
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)
    self.assertEqual(samples.num_calls, np.flatnonzero(calls)[-1])

  def test_heat_and_a_budget_for_everything(self):
    # In one call, the product of the marginals to the power 1 / heat.
    sampler = Renoise(
      DRAW, 4, Uniform(MASK), entropy_budget=LENGTH * np.log(3), heat=2.0
    )
    table = POSTERIOR.copy()
    table[:] = POSTERIOR[-1]
    network = toys.CachedTable(table)
    samples = run(sampler, blank(NUM_ROWS), keys_of(NUM_ROWS), network)
    law = np.sqrt(product_of_marginals())
    self.assertGreater(
      toys.chi_square(histogram(samples.tokens), law / law.sum()), 1e-3
    )
    self.assertEqual(samples.num_calls, 1)


def edit_law(sampler, table, fixed):
  """The law [27] of the texts by enumeration, and of the number of calls."""
  free = [i for i in range(LENGTH) if not fixed[i]]
  law, calls = np.zeros(len(TEXTS)), {}
  # A state is the canvas, the corrections so far, and whether it is done.
  start = tuple(MASK if i in free else 2 for i in range(LENGTH))
  chain, call = {(start, 0): 1.0}, 0
  while chain:
    following, call = {}, call + 1
    for (canvas, num_edits), weight in chain.items():
      p = np.exp(toys.log_softmax(table[toys.canvas_index(np.array(canvas))]))
      sure, masked = p.max(1), [i for i in free if canvas[i] == MASK]
      size = sampler.block_size or LENGTH
      open_masks = [
        i
        for i in masked
        if free.index(i) // size == free.index(masked[0]) // size
      ]
      surest = max(open_masks, key=lambda i: sure[i], default=None)
      limits = [
        sampler.threshold if i in masked else sampler.edit_threshold
        for i in range(LENGTH)
      ]
      drawn = [i for i in free if sure[i] >= limits[i] or i == surest]
      drawn = [i for i in drawn if i in open_masks or i not in masked]
      for values in itertools.product(range(VOCAB), repeat=len(drawn)):
        new = list(canvas)
        for i, v in zip(drawn, values):
          new[i] = v
        share = weight * np.prod([p[i, v] for i, v in zip(drawn, values)])
        num = num_edits + (not masked)
        is_done = MASK not in new and (
          num >= sampler.num_corrections or tuple(new) == canvas
        )
        if is_done:
          law[toys.text_index(np.array(new))] += share
          calls[call] = calls.get(call, 0) + share
        else:
          state = tuple(new), num
          following[state] = following.get(state, 0) + share
    chain = following
  return law, calls


class EditTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0.5, 1.01, 0), PROMPTS[0]),
    ((0.6, 0.5, 0), PROMPTS[0]),
    ((0.55, 0.6, 3), PROMPTS[1]),
    ((1e-9, 0.5, 2), PROMPTS[0]),
    ((0.5, 0.5, 2, 2), PROMPTS[0]),
    ((0.5, 0.5, 1, 1), PROMPTS[1]),
  )
  def test_follows_its_chain(self, settings, fixed):
    table = toys.random_table(5)
    sampler = Edit(DRAW, *settings)
    law, calls = edit_law(sampler, table, fixed)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    canvas = canvas_of(np.tile(fixed, (NUM_ROWS, 1)))
    network = toys.CachedTable(table)
    samples = run(sampler, canvas, keys_of(NUM_ROWS), network)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)
    self.assertEqual(samples.num_calls, max(calls))


class LevelTest(parameterized.TestCase):
  """The noise level given to the network, which draws it as a token.

  The level is the expected share of masks in the whole row, with the prompt.
  """

  def levels(self, sampler, num, fixed, num_bins):
    """Returns the levels at which the free positions are revealed, in bins."""

    def denoise(tokens, level, positions):
      del tokens
      level_bin = (level * num_bins + 1e-4).astype(jnp.int32)[:, None, None]
      is_level = jnp.arange(num_bins + 2)[None, None] == level_bin
      return jnp.broadcast_to(
        jnp.where(is_level, 0.0, -1e9), (*positions.shape, num_bins + 2)
      )

    canvas = canvas_of(np.tile(fixed, (num, 1)), token=0)
    sample = jax.jit(lambda keys: sampler(keys, canvas, denoise))
    return np.asarray(sample(keys_of(num)).tokens)[:, ~np.array(fixed)]

  @parameterized.parameters(1, 2)
  def test_first_hitting_levels_are_uniform(self, row_per_free):
    # Each position's time of reveal is U(0, 1), independent of the others'.
    fixed = np.arange(2 * row_per_free) >= 2
    tokens = self.levels(FirstHitting(Draw(11)), 4000, fixed, 10 * row_per_free)
    counts = np.histogram2d(tokens[:, 0], tokens[:, 1], range(11))[0]
    self.assertGreater(toys.chi_square(counts, np.full((10, 10), 0.01)), 1e-3)

  @parameterized.parameters(
    (8, [8, 8, 6, 6, 4, 4, 2, 2]), (4, [4, 3, 2, 1]), (2, [2, 1])
  )
  def test_fixed_count_level_is_the_share_of_masks(self, num_free, levels):
    fixed = np.arange(8) >= num_free
    tokens = self.levels(FixedCount(Draw(9), 4), 16, fixed, 8)
    np.testing.assert_array_equal(np.sort(tokens)[:, ::-1], [levels] * 16)

  @parameterized.parameters(1, 2)
  def test_ancestral_level_is_that_before_the_step(self, row_per_free):
    fixed = np.arange(2 * row_per_free) >= 2
    tokens = self.levels(Ancestral(Draw(5), 4), 2000, fixed, 4 * row_per_free)
    counts = np.histogram2d(tokens[:, 0], tokens[:, 1], range(1, 6))[0]
    self.assertGreater(toys.chi_square(counts, np.full((4, 4), 1 / 16)), 1e-3)


def kept_positions(sampler, log_p, drawn, masked, num_calls, num_free):
  """Confidence's rule for one canvas, in plain Python; `masked` in order."""
  entropy, confidence = {}, {}
  for i in masked:
    p = np.exp(log_p[i])
    entropy[i] = -np.sum(p * log_p[i])
    largest = np.sort(p)[::-1]
    confidence[i] = {
      'max_prob': p[drawn[i]],
      'margin': largest[0] - largest[1],
      'entropy': -entropy[i],
    }[sampler.score]
  size = sampler.block_size or LENGTH
  first = num_free - len(masked)  # blocks are filled in order
  end = min((first // size + 1) * size, num_free)
  block = masked[: end - first] if sampler.block_size else masked
  order = sorted(block, key=lambda i: -confidence[i])
  if sampler.num_steps:
    calls_left = max(sampler.num_steps * end // num_free - num_calls, 1)
    return order[: -(-len(block) // calls_left)]
  kept = order[:1]
  for i in order[1:]:
    h = [entropy[j] for j in kept] + [entropy[i]]
    if (
      confidence[i] < sampler.threshold
      if sampler.threshold
      else sum(h) - max(h) > sampler.entropy_budget
    ):
      break
    kept.append(i)
  return kept


def confidence_law(sampler, canvas=(MASK,) * LENGTH):
  """The law of the texts, and of the number of calls, by enumeration."""
  log_p_x0 = toys.log_softmax(SHARP)
  start = tuple(int(v) for v in canvas)
  num_free, chain = start.count(MASK), {start: 1.0}
  law, calls = np.zeros(len(TEXTS)), np.zeros(LENGTH + 1)
  for num_calls in range(LENGTH):
    following = {}
    for state, weight in chain.items():
      log_p = log_p_x0[toys.canvas_index(np.array(state))]
      masked = [i for i in range(LENGTH) if state[i] == MASK]
      for values in itertools.product(range(MASK), repeat=len(masked)):
        drawn = dict(zip(masked, values))
        p = weight * np.exp(sum(log_p[i, v] for i, v in drawn.items()))
        kept = kept_positions(
          sampler, log_p, drawn, masked, num_calls, num_free
        )
        new = tuple(drawn[i] if i in kept else v for i, v in enumerate(state))
        following[new] = following.get(new, 0.0) + p
    done = {s: p for s, p in following.items() if MASK not in s}
    for state, p in done.items():
      law[toys.text_index(state)] += p
    calls[num_calls + 1] = sum(done.values())
    chain = {s: p for s, p in following.items() if MASK in s}
  return law, calls


class ConfidenceTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(num_steps=3),
    dict(num_steps=2),
    dict(num_steps=1),
    dict(num_steps=3, score='margin'),
    dict(num_steps=2, score='entropy'),
    dict(num_steps=3, block_size=2),
    dict(num_steps=2, block_size=2),
    dict(num_steps=1, block_size=1),
    dict(num_steps=0, threshold=0.5),
    dict(num_steps=0, threshold=0.1, score='margin'),
    dict(num_steps=0, threshold=0.4, block_size=2),
    dict(num_steps=0, entropy_budget=0.6, score='entropy'),
    dict(num_steps=0, entropy_budget=0.7, score='max_prob'),
  )
  def test_follows_its_chain(self, **fields):
    sampler = Confidence(DRAW, **fields)
    law, calls = confidence_law(sampler)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    samples = run(sampler, blank(NUM_ROWS), keys_of(NUM_ROWS), SHARP_NETWORK)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)
    if np.abs(law - SHARP_JOINT).sum() > 0.05:
      self.assertLess(
        toys.chi_square(histogram(samples.tokens), SHARP_JOINT), 1e-3
      )
    # All rows continue until the last one is done.
    self.assertEqual(samples.num_calls, np.flatnonzero(calls)[-1])

  @parameterized.parameters(
    ('random', True), ('margin', True), ('entropy', True), ('max_prob', False)
  )
  def test_one_per_call_is_exact_but_for_max_prob(self, score, is_exact):
    samples = run(
      Confidence(DRAW, num_steps=LENGTH, score=score),
      blank(NUM_ROWS),
      keys_of(NUM_ROWS),
      SHARP_NETWORK,
    )
    p_value = toys.chi_square(histogram(samples.tokens), SHARP_JOINT)
    self.assertEqual(p_value > 1e-3, is_exact)

  def test_follows_its_chain_after_a_prompt(self):
    sampler = Confidence(DRAW, num_steps=0, threshold=0.6)
    canvas = canvas_of(np.tile([False, True, False], (NUM_ROWS, 1)))
    law, calls = confidence_law(sampler, canvas.tokens[0])
    self.assertBetween(calls[1], 0.1, 0.9)  # some rows take one call, some two
    samples = run(sampler, canvas, keys_of(NUM_ROWS), SHARP_NETWORK)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)

  def test_the_budget_bounds_the_divergence(self):
    for table, joint in ((POSTERIOR, JOINT), (SHARP, SHARP_JOINT)):
      log_p = toys.log_softmax(table[-1])
      entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
      log_product = sum(log_p[i, TEXTS[:, i]] for i in range(LENGTH))
      divergence = np.sum(joint * (np.log(joint) - log_product))
      self.assertBetween(divergence, 0.0, entropy.sum() - entropy.max())

  def test_temperature_0_is_deterministic(self):
    # The confidence is a function of the network, not of the temperature.
    table = toys.random_table(2)
    log_p = toys.log_softmax(table)

    def greedy(order=None):
      canvas = np.full(LENGTH, MASK)
      for step in range(LENGTH):
        p = np.where(
          (canvas == MASK)[:, None], log_p[toys.canvas_index(canvas)], -np.inf
        )
        i = order[step] if order else np.argmax(p.max(1))
        canvas[i] = np.argmax(p[i])
      return canvas

    sampler = Confidence(Draw(MASK, temperature=0.0), num_steps=3)
    tokens = run(
      sampler, blank(64), keys_of(64), toys.CachedTable(table)
    ).tokens
    np.testing.assert_array_equal(tokens, np.tile(greedy(), (64, 1)))
    self.assertNotEqual(list(greedy()), list(greedy((0, 1, 2))))

  @parameterized.parameters(
    (dict(num_steps=0, threshold=1.01), 16),
    (dict(num_steps=0, threshold=1e-9), 1),
    (dict(num_steps=0, entropy_budget=1e-6), 16),
    (dict(num_steps=0, entropy_budget=100.0), 1),
    # 15 of 16 entropies of log 3 may be counted; log 3 = 1.0986.
    (dict(num_steps=0, entropy_budget=15 * 1.0987), 1),
    (dict(num_steps=0, entropy_budget=15 * 1.0985), 2),
    (dict(num_steps=0, threshold=1e-9, block_size=4), 4),
    (dict(num_steps=7), 7),
    (dict(num_steps=40), 16),
    (dict(num_steps=7, block_size=4), 7),
    (dict(num_steps=2, block_size=4), 4),
    (dict(num_steps=5, block_size=6), 5),
    (dict(num_steps=9, block_size=99), 9),
  )
  def test_calls_of_a_long_canvas(self, fields, num_calls):
    denoise = lambda tokens, level, positions: jnp.zeros((*positions.shape, 4))
    sampler = Confidence(DRAW, **fields)
    sample = jax.jit(lambda keys: sampler(keys, blank(4, 16), denoise))
    samples = sample(keys_of(4))
    self.assertEqual(samples.num_calls, num_calls)
    self.assertLess(np.max(samples.tokens), MASK)

  def test_blocks_are_filled_in_order(self):
    # Tokens encode the share of masks at their reveal, in 16ths of the row.
    fixed = np.isin(np.arange(16), [0, 1, 7, 12])
    for num_steps, levels in (
      (3, [[12] * 5, [7] * 5, [2] * 2]),
      (6, [[12, 12, 12, 9, 9], [7, 7, 5, 5, 3], [2, 2]]),
    ):
      sampler = Confidence(
        Draw(17), num_steps=num_steps, block_size=5, score='random'
      )
      tokens = LevelTest.levels(self, sampler, 32, fixed, 16)
      blocks = slice(0, 5), slice(5, 10), slice(10, 12)
      for block, expected in zip(blocks, levels):
        np.testing.assert_array_equal(
          np.sort(tokens[:, block])[:, ::-1], [expected] * 32
        )

  def test_only_a_block_is_projected(self):
    shapes = []

    def denoise(tokens, level, positions):
      shapes.append(positions.shape)
      return jnp.zeros((*positions.shape, 4))

    for block_size in (0, 5):
      sampler = Confidence(DRAW, num_steps=16, block_size=block_size)
      jax.eval_shape(
        lambda keys: sampler(keys, blank(4, 16), denoise), keys_of(4)
      )
    self.assertEqual(set(shapes), {(4, 16), (4, 5)})


def remask_law(sampler):
  """The law of the texts by enumeration, from the paper's formulas.

  And P(masked) at each point of the grid, [T + 1, L].
  """
  p_x0 = np.exp(toys.log_softmax(SHARP))
  noise = np.asarray(sampler.noise_levels(), np.float64)
  # A state is the canvas and the probability that each token was drawn with.
  chain = {((MASK,) * LENGTH, (0.0,) * LENGTH): 1.0}
  masked_share = [np.ones(LENGTH)]
  for j, (a_t, a_s) in enumerate(itertools.pairwise(1 - noise)):
    following = {}
    sigma_max = min(1, (1 - a_s) / a_t) if a_t else 1.0
    is_held = j / sampler.num_steps >= 0.449 and (
      (j + 1) / sampler.num_steps <= 0.951
    )
    for (canvas, prob), weight in chain.items():
      revealed = np.array(canvas) != MASK
      sigma = {
        'cap': min(sampler.eta, sigma_max),
        'rescale': sampler.eta * sigma_max,
        'loop': min(sampler.eta, sigma_max) * is_held,
        'conf': 0.0,
        'constant': sampler.eta * (1 - a_s),
      }[sampler.remask]
      reveal_prob = (a_s - (1 - sigma) * a_t) / (1 - a_t)
      mask_prob = (1 - a_s - sigma * a_t) / (1 - a_t)
      np.testing.assert_allclose(reveal_prob + mask_prob, 1)
      sigmas = np.full(LENGTH, sigma)
      if sampler.remask == 'conf' and revealed.any():
        w = np.exp(-np.array(prob)) * revealed
        sigmas = sampler.eta * sigma_max * w / w.sum()
      choices = []
      for i, v in enumerate(canvas):
        if v == MASK:
          p = p_x0[toys.canvas_index(np.array(canvas)), i]
          choices.append(
            [(MASK, 0.0, mask_prob)]
            + [
              (u, p[u] if sampler.remask == 'conf' else 0.0, reveal_prob * p[u])
              for u in range(MASK)
            ]
          )
        else:
          choices.append([(MASK, 0.0, sigmas[i]), (v, prob[i], 1 - sigmas[i])])
      for choice in itertools.product(*choices):
        values, probs, shares = zip(*choice)
        p = weight * np.prod(shares)
        if p:
          following[values, probs] = following.get((values, probs), 0.0) + p
    chain = following
    masked_share.append(
      sum(p * (np.array(canvas) == MASK) for (canvas, _), p in chain.items())
    )
  law = np.zeros(len(TEXTS))
  for (canvas, _), p in chain.items():
    law[toys.text_index(canvas)] += p
  return law, np.array(masked_share)


class RemaskTest(parameterized.TestCase):
  @parameterized.parameters(
    ('cap', 0.3, 4, 'linear', 'uniform'),
    ('cap', 1.0, 3, 'sqrt', 'uniform'),
    ('rescale', 0.5, 4, 'cosine', 'cosine'),
    ('conf', 1.0, 3, 'linear', 'uniform'),
    ('conf', 0.6, 3, 'linear', 'cosine'),
    ('loop', 0.1, 10, 'linear', 'uniform'),
    ('cap', 0.3, 1, 'linear', LISTED),
    ('constant', 0.7, 3, 'linear', 'uniform'),
  )
  def test_follows_its_chain(self, kind, eta, num_steps, schedule, grid):
    sampler = Remask(
      DRAW, num_steps, schedules.make_schedule(schedule), grid, kind, eta
    )
    law, masked_share = remask_law(sampler)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    if kind != 'conf':  # the noise that the network was trained on
      expected = np.tile(sampler.noise_levels()[:, None], (1, LENGTH))
      np.testing.assert_allclose(masked_share, expected, atol=1e-6)
    else:
      excess = masked_share - sampler.noise_levels()[:, None]
      self.assertBetween(excess.min(), -1e-6, 1e-6)
      self.assertBetween(excess.max(), 0.01, 0.25)
    samples = run(sampler, blank(40_000), keys_of(40_000), SHARP_NETWORK)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)
    without, _ = remask_law(dataclasses.replace(sampler, eta=0.0))
    self.assertLess(toys.chi_square(histogram(samples.tokens), without), 1e-3)

  @parameterized.parameters('cap', 'rescale', 'conf')
  def test_eta_0_is_ancestral(self, kind):
    sampler = Remask(DRAW, 3, remask=kind, eta=0.0)
    law = chain_law(Ancestral(DRAW, 3).noise_levels(), SHARP)
    np.testing.assert_allclose(remask_law(sampler)[0], law, atol=1e-6)
    samples = run(sampler, blank(NUM_ROWS), keys_of(NUM_ROWS), SHARP_NETWORK)
    self.assertGreater(toys.chi_square(histogram(samples.tokens), law), 1e-3)
    self.assertLessEqual(samples.num_calls, 9)

  @parameterized.parameters('cap', 'rescale')
  def test_the_law_nears_the_joint_with_steps_and_little_eta(self, kind):
    distance = lambda eta, num_steps: np.abs(
      remask_law(Remask(DRAW, num_steps, remask=kind, eta=eta))[0] - SHARP_JOINT
    ).sum()
    for eta in (0.1, 0.5):
      self.assertLess(distance(eta, 16), 0.7 * distance(eta, 4))
      self.assertLess(distance(eta, 64), 0.7 * distance(eta, 16))
    distances = [distance(eta, 16) for eta in (0.0, 0.1, 0.5, 1.0)]
    self.assertEqual(distances, sorted(distances))

  @parameterized.product(
    kind=['cap', 'rescale', 'loop', 'constant'],
    grid=times.GRIDS,
    eta=[0.0, 0.04, 1.0],
  )
  def test_probabilities_keep_the_noise(self, kind, grid, eta):
    for schedule in sorted(schedules.SCHEDULES):
      for num_steps in (1, 7, 100):
        sampler = Remask(
          DRAW, num_steps, schedules.make_schedule(schedule), grid, kind, eta
        )
        noise = np.asarray(sampler.noise_levels())
        sigma, reveal_prob = sampler.remask_probs(), sampler.reveal_probs()
        self.assertEqual((noise[0], noise[-1]), (1.0, 0.0))
        self.assertEqual((sigma[-1], reveal_prob[-1]), (0.0, 1.0))
        for p in (sigma, reveal_prob):
          self.assertBetween(np.min(p), 0.0, 1.0)
          self.assertBetween(np.max(p), 0.0, 1.0 + 1e-6)
        following = noise[:-1] * (1 - reveal_prob) + (1 - noise[:-1]) * sigma
        np.testing.assert_allclose(following, noise[1:], atol=1e-6)

  def test_loop_holds_the_level(self):
    sampler = Remask(DRAW, 20, remask='loop', eta=0.02)
    expected = np.interp(
      np.arange(21) / 20, [0, 0.45, 0.95, 1], [1, 0.1, 0.1, 0]
    )
    np.testing.assert_allclose(sampler.noise_levels(), expected, atol=1e-6)
    is_held = (np.arange(20) >= 9) & (np.arange(20) < 19)
    np.testing.assert_allclose(sampler.remask_probs(), 0.02 * is_held)

  def test_level_is_that_before_the_step(self):
    # A free position's last reveal, from its chain of two states.
    sampler = Remask(Draw(5), 4, remask='cap', eta=0.5)
    tokens = LevelTest.levels(self, sampler, 4000, np.arange(4) >= 2, 8)
    p = np.zeros(5)  # by the level (of 4) when last revealed; p[0] is masked
    p[0] = 1
    noise = np.array([4, 3, 2, 1, 0]) / 4
    for j in range(4):
      sigma, shown = sampler.remask_probs()[j], sampler.reveal_probs()[j]
      self.assertAlmostEqual(p[0], noise[j], places=5)
      p[1:], p[0], p[4 - j] = (
        p[1:] * (1 - sigma),
        p[0] * (1 - shown) + (1 - p[0]) * sigma,
        p[0] * shown,
      )
    counts = np.histogram2d(tokens[:, 0], tokens[:, 1], np.arange(1, 6))[0]
    self.assertGreater(toys.chi_square(counts, np.outer(p[1:], p[1:])), 1e-3)

  def test_conf_remasks_uncertain_tokens(self):
    # Position 0 is certain, position 1 uniform over three tokens. Tokens encode
    # the step of their reveal.
    sampler = Remask(Draw(12), 4, remask='conf', eta=1.0)

    def denoise(tokens, level, positions):
      step = (4 - level * 4 + 0.5).astype(jnp.int32)[:, None, None]
      ids = jnp.arange(13)[None, None]
      is_possible = (ids // 3 == step) & (
        (ids % 3 == 0) | (positions[..., None] == 1)
      )
      return jnp.where(is_possible, 0.0, -1e9)

    num, prob = 20_000, np.array([1, 1 / 3])
    sample = jax.jit(lambda keys: sampler(keys, blank(num, 2), denoise))
    tokens = np.asarray(sample(keys_of(num)).tokens) // 3
    chain = {(-1, -1): 1.0}  # the steps of the last reveals, -1 where masked
    for j in range(4):
      following = {}
      a_t, a_s = j / 4, (j + 1) / 4
      for state, weight in chain.items():
        w = np.exp(-prob) * (np.array(state) >= 0)
        sigma = min(1, (1 - a_s) / max(a_t, 1e-9)) * w / max(w.sum(), 1e-9)
        shown = (a_s - a_t) / (1 - a_t)
        choices = [
          ((-1, 1 - shown), (j, shown))
          if last < 0
          else ((-1, sigma[i]), (last, 1 - sigma[i]))
          for i, last in enumerate(state)
        ]
        for (x, p), (y, q) in itertools.product(*choices):
          following[x, y] = following.get((x, y), 0.0) + weight * p * q
      chain = following
    law = np.array(
      [[chain.get((x, y), 0.0) for y in range(4)] for x in range(4)]
    )
    counts = np.histogram2d(tokens[:, 0], tokens[:, 1], np.arange(5))[0]
    self.assertGreater(toys.chi_square(counts, law), 1e-3)

  @parameterized.parameters(
    ('cap', 0.04), ('rescale', 0.015), ('conf', 1.0), ('loop', 0.02)
  )
  def test_calls_of_a_long_canvas(self, kind, eta):
    denoise = lambda tokens, level, positions: jnp.zeros((*positions.shape, 4))
    sampler = Remask(DRAW, 16, remask=kind, eta=eta)
    sample = jax.jit(lambda keys: sampler(keys, blank(4, 64), denoise))
    samples = sample(keys_of(4))
    self.assertBetween(samples.num_calls, 14, 17)
    self.assertLess(np.max(samples.tokens), MASK)


class GuidanceTest(parameterized.TestCase):
  FIXED = np.array([False, True, False])

  def guided_law(self, weight):
    """p(x | c)^(1 + w) / p(x)^w position by position, over random orders."""
    log_p = toys.log_softmax(POSTERIOR)
    law = np.zeros(len(TEXTS))
    for order in ((0, 2), (2, 0)):
      for text in TEXTS[TEXTS[:, 1] == 2]:
        canvas, p = np.array([MASK, 2, MASK]), 0.5
        for i in order:
          without = np.where(self.FIXED, MASK, canvas)
          q = np.exp(
            (1 + weight) * log_p[toys.canvas_index(canvas), i]
            - weight * log_p[toys.canvas_index(without), i]
          )
          p *= q[text[i]] / q.sum()
          canvas[i] = text[i]
        law[toys.text_index(text)] += p
    return law

  @parameterized.parameters(0.0, 0.7, 2.0)
  def test_law(self, weight):
    sampler = Guided(FixedCount(DRAW, num_steps=LENGTH), weight, MASK)
    canvas = canvas_of(np.tile(self.FIXED, (NUM_ROWS, 1)))
    samples = run(sampler, canvas, keys_of(NUM_ROWS))
    counts = histogram(samples.tokens)
    self.assertGreater(toys.chi_square(counts, self.guided_law(weight)), 1e-3)
    plain = toys.chi_square(counts, self.guided_law(0.0))
    self.assertEqual(plain > 1e-3, weight == 0)
    self.assertEqual(samples.num_calls, 4)  # two steps of two evaluations

  @parameterized.parameters(0.5, 3.0)
  def test_last_position(self, weight):
    # p(x_0 | x_1 = c, x_2)^(1 + w) / p(x_0 | x_2)^w.
    rows = np.array(
      [[MASK, c, x] for c in range(3) for x in range(3)], np.int32
    )
    fixed = np.tile([False, True, False], (9, 1))
    guided = guidance.guide(toys.CachedTable(POSTERIOR), fixed, weight, MASK)
    logits = guided(rows, jnp.full(9, 1 / 3), jnp.zeros((9, 1), jnp.int32))
    p = np.exp(toys.log_softmax(logits))[:, 0]
    joint = JOINT.reshape(3, 3, 3)
    for (_, c, x), row in zip(rows, p):
      with_c = joint[:, c, x] / joint[:, c, x].sum()
      without = joint.sum(1)[:, x] / joint.sum(1)[:, x].sum()
      expected = with_c ** (1 + weight) / without**weight
      np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-3)

  def test_weight_0_and_blank_canvases_change_nothing(self):
    plain = toys.CachedTable(POSTERIOR)
    positions = jnp.tile(jnp.arange(LENGTH), (64, 1))
    level = jnp.zeros(64)
    p = toys.log_softmax(plain(toys.CANVASES, level, positions))
    for fixed, weight in ((self.FIXED, 0.0), (np.zeros(LENGTH, bool), 5.0)):
      guided = guidance.guide(plain, np.tile(fixed, (64, 1)), weight, MASK)
      np.testing.assert_allclose(
        toys.log_softmax(guided(toys.CANVASES, level, positions)), p, atol=1e-4
      )

  def test_levels_and_the_mask(self):
    seen = {}

    def denoise(tokens, level, positions):
      seen.update(tokens=tokens, level=level)
      return jnp.zeros((*positions.shape, 4)).at[..., MASK].set(50.0)

    fixed = np.array([[True, True, False, False], [False] * 4])
    tokens = jnp.array([[1, 2, MASK, 0], [MASK, MASK, 0, MASK]])
    guided = guidance.guide(denoise, fixed, 1.0, MASK)
    logits = guided(tokens, jnp.array([0.25, 0.75]), jnp.array([[2], [0]]))
    np.testing.assert_array_equal(
      seen['tokens'], [*tokens, [MASK, MASK, MASK, 0], tokens[1]]
    )
    np.testing.assert_allclose(seen['level'], [0.25, 0.75, 0.75, 0.75])
    self.assertLess(np.max(logits[..., MASK]), -1e20)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda: Ancestral(DRAW, 0), 'sampler.num_steps=0'),
    (lambda: FixedCount(DRAW, 0), 'sampler.num_steps=0'),
    (lambda: Ancestral(DRAW, 8, grid='log'), "sampler.grid='log'"),
    (lambda: Remask(DRAW, 0), 'sampler.num_steps=0'),
    (lambda: Remask(DRAW, 8, grid='log'), "sampler.grid='log'"),
    (lambda: Remask(DRAW, 8, remask='all'), "sampler.remask='all'"),
    (lambda: Remask(DRAW, 8, eta=-0.1), 'sampler.eta=-0.1'),
    (lambda: Psi(DRAW, 8, Masked(MASK), remask='conf'), "remask='conf'"),
    (lambda: Edit(DRAW, -1.0), 'sampler.threshold=-1.0'),
    (lambda: Edit(DRAW, block_size=-1), 'sampler.block_size=-1'),
    (lambda: Edit(DRAW, edit_threshold=-1.0), 'sampler.edit_threshold=-1.0'),
    (lambda: Renoise(DRAW, 0, Uniform(MASK)), 'sampler.num_steps=0'),
    (lambda: Renoise(DRAW, 8, Uniform(MASK), -1.0), 'entropy_budget=-1.0'),
    (lambda: Renoise(DRAW, 8, Uniform(MASK), heat=0.0), 'sampler.heat=0.0'),
    (lambda: Psi(DRAW, 8, Masked(MASK), eta=2.0), 'sampler.eta=2.0'),
    (lambda: Confidence(DRAW, 8, score='sure'), "sampler.score='sure'"),
    (lambda: Confidence(DRAW, -8), 'sampler.num_steps=-8'),
    (lambda: Confidence(DRAW, 8, block_size=-1), 'sampler.block_size=-1'),
    (lambda: Confidence(DRAW, 0), 'sampler.num_steps=0.* exactly one'),
    (
      lambda: Confidence(DRAW, 8, threshold=0.9),
      'sampler.num_steps=8, sampler.threshold=0.9.* exactly one',
    ),
    (
      lambda: Confidence(DRAW, 0, threshold=0.9, entropy_budget=0.1),
      'threshold=0.9, sampler.entropy_budget=0.1: exactly one',
    ),
    (
      lambda: Confidence(DRAW, 0, 'entropy', threshold=0.9),
      "threshold=0.9.*score='entropy'",
    ),
    (
      lambda: PrefixCache(FirstHitting(DRAW), 2, MASK, -1),
      'sampler.refresh_calls=-1',
    ),
    (lambda: Guided(FirstHitting(DRAW), -1.0, MASK), 'sampler.guidance=-1.0'),
  )
  def test_names_the_key(self, make, message):
    with self.assertRaisesRegex(InputError, message):
      make()
