"""The law of samples of any length, with the exact network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.noise.categorical import Draw
from nanodlm.objectives.flex import Flex
from nanodlm.samplers import expand, insert
from nanodlm.types import Canvas
from tests import gaps, toys
from tests.gaps import FILL
from tests.toys import MASK

LAW = gaps.random_law(0)
NUM_ROWS, NUM_STEPS = 8000, 128
SAMPLER = insert.Insert(Draw(MASK), NUM_STEPS, Flex(MASK))


def index_of(tokens):
  return tokens @ (MASK + 1) ** np.arange(tokens.shape[-1])[::-1]


def make_denoise(network, length, num_steps=NUM_STEPS):
  """A `types.Denoise` of the tables of a network at the times of a grid."""
  t = 1 - np.arange(num_steps) / num_steps
  inside = np.minimum(t, 1 - 1e-7)  # At 1, texts other than the prompt are not.
  known = sorted(network.tokens, key=lambda x: index_of(gaps.row_of(x, length)))
  rows = np.array([index_of(gaps.row_of(x, length)) for x in known])
  table = np.stack([network.logits(x, inside, length) for x in known], axis=1)
  table, rule = jnp.asarray(table, jnp.float32), Flex(MASK)

  def denoise(tokens, level, positions):
    places = jnp.take_along_axis(rule.places(tokens), positions, axis=1)
    step = jnp.round((1 - level) * num_steps).astype(jnp.int32)[:, None]
    row = index_of(rule.network_input(tokens))[:, None]
    row = jnp.searchsorted(rows, row)
    return table[step, row, places]

  return denoise


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(sampler, denoise, canvas):
  keys = jax.random.split(jax.random.key(0), len(canvas.tokens))
  return sampler(keys, canvas, denoise)


def canvas_of(row, fixed, num=NUM_ROWS):
  return Canvas(*(np.tile(np.array(x), (num, 1)) for x in (row, fixed)))


def texts_of(tokens):
  return [tuple(x for x in row if x != FILL) for row in np.array(tokens)]


def test_the_law_of_whole_texts():
  denoise = make_denoise(gaps.ExactNetwork(LAW), gaps.ROOM + 1)
  # The content of free positions does not matter.
  canvas = canvas_of([MASK, 0, 1, FILL], [False, False, False, True])
  samples = run(SAMPLER, denoise, canvas)
  assert NUM_STEPS <= samples.num_calls <= NUM_STEPS + 1
  found = texts_of(samples.tokens)
  counts = [found.count(text) for text in gaps.ALL]
  assert sum(counts) == NUM_ROWS
  assert toys.chi_square(np.array(counts), LAW) > 1e-3
  # Room is at the end of the gap.
  for row, text in zip(np.array(samples.tokens), found):
    np.testing.assert_array_equal(row, gaps.row_of(text))


def test_a_prediction_of_two_calls_counts_twice():
  class Twice:
    calls = 2

    def __init__(self, denoise):
      self.denoise = denoise

    def __call__(self, *args):
      return self.denoise(*args)

  denoise = make_denoise(gaps.ExactNetwork(LAW), gaps.ROOM + 1)
  canvas = canvas_of([MASK, 0, 1, FILL], [False, False, False, True], 3)
  once, twice = (run(SAMPLER, x, canvas) for x in (denoise, Twice(denoise)))
  np.testing.assert_array_equal(once.tokens, twice.tokens)
  assert twice.num_calls == 2 * once.num_calls


@pytest.mark.parametrize(
  'row, fixed',
  [
    # 0{*}1, {*}1, 0{*}; and two gaps, around a token.
    ([0, FILL, 1, FILL], [1, 0, 1, 1]),
    ([FILL, FILL, 1, FILL], [0, 0, 1, 1]),
    ([0, FILL, FILL, FILL], [1, 0, 0, 1]),
    ([FILL, FILL, 1, FILL, FILL, FILL], [0, 0, 1, 0, 0, 1]),
  ],
)
def test_the_law_of_gaps(row, fixed):
  """The law of texts with the prompt at its place, and room in gaps."""
  row, fixed = np.array(row), np.array(fixed, bool)
  texts, eligible, shown, law = [], [], [], []
  runs = np.split(np.arange(len(row)), np.flatnonzero(np.diff(fixed)) + 1)
  runs = [
    places
    for places in runs
    if np.any(row[places] != FILL) or not fixed[places[0]]
  ]

  def fill(parts, text, which, canvas):
    if not parts:
      if text in gaps.ALL:
        texts.append(text)
        # The end is open if what precedes it is.
        eligible.append((*which, not fixed[-2]))
        shown.append((*canvas, *[FILL] * (len(row) - len(canvas))))
        law.append(LAW[gaps.ALL.index(text)])
      return
    places, *rest = parts
    if fixed[places[0]]:
      given = tuple(x for x in row[places] if x != FILL)
      fill(
        rest,
        (*text, *given),
        (*which, *[False] * len(given)),
        (*canvas, *row[places]),
      )
      return
    for own in gaps.ALL:
      if len(own) <= len(places):
        used = (*own, *[FILL] * (len(places) - len(own)))
        free = (*which, *[True] * len(own))
        fill(rest, (*text, *own), free, (*canvas, *used))

  fill(runs, (), (), ())
  law = np.array(law) / np.sum(law)
  network = gaps.ExactNetwork(law, texts, eligible)
  denoise = make_denoise(network, len(row))
  samples = run(SAMPLER, denoise, canvas_of(row, fixed))
  tokens = np.array(samples.tokens)
  np.testing.assert_array_equal(
    tokens[:, fixed], np.tile(row[fixed], (NUM_ROWS, 1))
  )
  found = [tuple(x) for x in tokens.tolist()]
  counts = [found.count(one) for one in shown]
  # A step can insert two tokens at once, for texts that are longer than any.
  assert 0.995 * NUM_ROWS < sum(counts) <= NUM_ROWS
  assert toys.chi_square(np.array(counts), law) > 1e-3


def test_insertion_keeps_order_and_room():
  m = MASK
  tokens = np.array([[5, 0, m, 9, 9, 6, 1, 9, 9]])
  free = np.array([[0, 1, 1, 1, 1, 0, 1, 1, 0]], bool)
  for before, at_end, last, expected in (
    (0, 0, 0, [5, 0, m, 9, 9, 6, 1, 9, 9]),
    (1, 0, 0, [5, m, 0, m, 9, 6, 1, 9, 9]),
    (1, 1, 1, [5, m, 0, m, m, 6, 1, m, 9]),
    # No more than there is room for.
    (0, 7, 7, [5, 0, m, m, m, 6, 1, m, 9]),
    (3, 7, 0, [5, m, m, 0, m, 6, 1, 9, 9]),
  ):
    count = np.zeros((1, 9), np.int32)
    count[0, [1, 5, 8]] = before, at_end, last
    new = insert.insert(jnp.array(tokens), jnp.array(free), count, m)
    np.testing.assert_array_equal(new[0], expected)
  ends = insert.ends_gap(jnp.array(tokens), jnp.array(free), m)
  np.testing.assert_array_equal(np.flatnonzero(ends[0]), [1, 5, 6, 8])


def test_a_full_canvas_takes_no_call():
  canvas = canvas_of([0, 1, FILL], [True] * 3, 2)
  denoise = lambda tokens, level, positions: jnp.zeros((2, 3, MASK + 1))
  assert run(SAMPLER, denoise, canvas).num_calls == 0


@pytest.mark.parametrize('truth', [(), (1,), (0, 1, 1), (1, 0, 1, 0, 0, 1)])
def test_masks_expand_and_are_deleted_until_a_gap_has_its_length(truth):
  length, num = 12, 20
  row = np.array([0, *[FILL] * 7, 1, MASK, MASK, FILL])
  fixed = np.array([True, *[False] * 7, True, False, False, True])

  def denoise(tokens, level, positions):
    """Knows what is between the fixed tokens; 0 in the other gap."""
    gap = tokens[:, 1:8]
    size = jnp.sum(gap != FILL, axis=1)[:, None]
    # What a gap of the right length holds; other ones change.
    right = jnp.array([*truth, *[0] * length])[positions - 1]
    change = jnp.where(size < len(truth), MASK, FILL)
    right = jnp.where(size == len(truth), right, change)
    right = jnp.where(positions > 8, 0, right)
    return 50.0 * jax.nn.one_hot(right, MASK + 1)

  sampler = expand.Expand(Draw(MASK), num_masks=3)
  samples = run(sampler, denoise, canvas_of(row, fixed, num))
  expected = [0, *truth, *[FILL] * (7 - len(truth)), 1, 0, 0, FILL]
  np.testing.assert_array_equal(samples.tokens, [expected] * num)
  changes = abs(len(truth) - 3)
  # A call for each change and each token.
  assert samples.num_calls == changes + len(truth) + 2


@pytest.mark.parametrize('score, is_right', [('max_prob', 1), ('random', 0)])
def test_the_most_confident_mask_comes_first(score, is_right):
  def denoise(tokens, level, positions):
    """Knows the second token; the first one once the second is there."""
    is_known = (positions != 1) | (tokens[:, 2:3] == 1)
    right = jax.nn.one_hot(jnp.ones_like(positions), MASK + 1)
    logits = jnp.where(is_known, 9.0, 0.5)[..., None] * right
    # Neither a mask nor the end of the row is likely.
    return logits.at[..., jnp.array([FILL, MASK])].set(-50.0)

  sampler = expand.Expand(Draw(MASK), num_masks=2, score=score)
  canvas = canvas_of([0, FILL, FILL, FILL], [True, False, False, True], 200)
  first = np.array(run(sampler, denoise, canvas).tokens)[:, 1]
  assert (np.mean(first == 1) > 0.98) == is_right


def test_a_gap_of_a_given_length_keeps_it():
  """Although the network prefers the last token of the row, which is room."""
  row = [0, *[FILL] * 4, MASK, MASK, FILL]
  canvas = canvas_of(row, [True, *[False] * 6, True], 20)

  def denoise(tokens, level, positions):
    is_two = jnp.sum(tokens[:, 1:5] != FILL, axis=1)[:, None] < 4
    wanted = jnp.where(is_two, MASK, 1)
    logits = 9.0 * jax.nn.one_hot(jnp.where(positions < 5, wanted, 1), MASK + 1)
    first = 50.0 * jax.nn.one_hot(jnp.full_like(positions, FILL), MASK + 1)
    return logits + jnp.where((positions == 5)[..., None], first, 0.0)

  samples = run(expand.Expand(Draw(MASK), num_masks=1), denoise, canvas)
  expected = [0, *[1] * 6, FILL]
  np.testing.assert_array_equal(samples.tokens, [expected] * 20)


def test_no_more_masks_than_there_is_room_for():
  canvas = canvas_of([0, FILL, FILL, FILL], [True, False, False, True], 8)
  always = lambda tokens, level, positions: (
    50.0 * jax.nn.one_hot(jnp.full(positions.shape, MASK), MASK + 1)
  )
  sampler = expand.Expand(Draw(MASK), num_masks=1)
  samples = run(sampler, always, canvas)
  tokens = np.array(samples.tokens)
  assert np.all(tokens < MASK)
  assert samples.num_calls <= 3 * 2


def test_it_ends_if_the_network_prefers_the_separator():
  def denoise(tokens, level, positions):
    logits = 5.0 * jax.nn.one_hot(jnp.full_like(tokens, FILL), MASK + 1)
    return logits.at[..., MASK].set(1.0)  # It always inserts.

  sampler = insert.Insert(Draw(MASK, temperature=0.0), 4, Flex(MASK))
  canvas = canvas_of([FILL] * 6, [False] * 5 + [True], num=20)
  samples = run(sampler, denoise, canvas)
  assert samples.num_calls <= 4 + 1
  tokens = np.asarray(samples.tokens)
  assert np.all(tokens != MASK) and np.any(tokens != FILL)
