"""The bound of texts of any length, by enumeration of all their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.objectives.flex import Flex
from tests import gaps, toys
from tests.gaps import FILL
from tests.toys import MASK

FLEX = Flex(MASK)
LAW = gaps.random_law(0)


def test_the_bound_is_exact_for_the_exact_network():
  network = gaps.ExactNetwork(LAW)
  values = [gaps.bound(text, None, network.logits) for text in gaps.ALL]
  np.testing.assert_allclose(values, -np.log(LAW), rtol=1e-5)


def test_the_bound_of_other_networks_is_larger():
  network = gaps.ExactNetwork(LAW)
  for other in (gaps.ExactNetwork(gaps.random_law(1)), None):

    def logits(tokens, t):
      if other is not None:
        return other.logits(tokens, t)
      noise = np.random.default_rng(len(tokens)).normal(size=(4, MASK + 1))
      return network.logits(tokens, t) + noise

    values = [gaps.bound(text, None, logits) for text in gaps.ALL]
    # A bound of a law: it is not below the entropy on average.
    assert LAW @ values > LAW @ -np.log(LAW) + 0.05
    assert np.sum(np.exp(-np.array(values))) < 1


def test_targets_of_one_alignment_would_cost_more():
  """The published loss takes the alignment that was drawn."""
  t, weight = gaps.nodes()
  excess = 0.0
  for p_text, text in zip(LAW, gaps.ALL):
    for noisy in gaps.noisy_texts(text):
      entropy = -sum(
        p * np.log(p) for law in noisy.p.values() for p in law.values()
      )
      share = gaps.probability(noisy, t)
      excess += p_text * np.sum(weight / t * share * entropy)
  # The entropy is 2.2 nats. Gaps on both sides of a mask would add to it.
  assert 0.1 < excess < 1


@pytest.mark.parametrize(
  'text, eligible',
  [
    ((), None),
    ((0, 0, 1), None),
    ((1, 1, 1), None),
    ((0, 1, 0), (False, True, True, True)),
    ((0, 1, 0), (True, True, False, False)),
    ((1, 0, 0), (False, True, False, False)),
    ((1, 0, 0), (False, False, False, False)),
  ],
)
def test_noise_and_targets(text, eligible):
  num, row = 4000, gaps.row_of(text)
  mask = np.ones(len(row), bool)
  if eligible is not None:
    mask[:] = eligible[-1]
    mask[: len(text)] = eligible[:-1]
  level = 0.4
  noised = jax.jit(FLEX.corrupt)(
    jax.random.split(jax.random.key(0), num),
    jnp.full(num, level),
    np.tile(row, (num, 1)),
    np.tile(mask, (num, 1)),
  )
  t = (1 - level) ** 2
  np.testing.assert_allclose(noised.t, t, rtol=1e-6)
  known = gaps.noisy_texts(text, eligible)
  tokens = np.array(noised.tokens)
  counts = []
  for one in known:
    is_it = np.all(tokens == gaps.row_of(one.tokens), axis=1)
    # Given tokens say which is which; here, tokens alone do, too.
    twins = [x for x in known if x.tokens == one.tokens]
    counts.append(is_it.sum())
    if not is_it.any() or len(twins) > 1:
      continue
    i = int(np.argmax(is_it))
    fields = jax.tree.map(lambda x: np.array(x[i]), noised.fields)
    scored = np.array(noised.scored[i])
    np.testing.assert_array_equal(
      np.flatnonzero(scored), sorted({*one.p, *one.n})
    )
    np.testing.assert_array_equal(
      np.flatnonzero(fields['is_mask']), sorted(one.p)
    )
    for j, n in one.n.items():
      np.testing.assert_allclose(fields['count'][j], n, atol=1e-5)
    for j, law in one.p.items():
      share = np.bincount(fields['ids'][j], fields['share'][j], minlength=MASK)
      expected = [law.get(v, 0.0) for v in range(MASK)]
      np.testing.assert_allclose(share[:MASK], expected, atol=1e-5)
    np.testing.assert_allclose(fields['scale'], 2 / (1 - level), rtol=1e-6)
  expected = np.array([gaps.probability(one, t) for one in known])
  np.testing.assert_allclose(expected.sum(), 1)
  merged = {}
  for one, p in zip(known, expected):
    merged[one.tokens] = merged.get(one.tokens, 0) + p
  found = {one.tokens: c for one, c in zip(known, counts)}
  assert sum(found.values()) == num
  p = toys.chi_square([found[k] for k in merged], [*merged.values()])
  assert p > 1e-3


def test_terms_are_those_of_the_enumeration():
  rng = np.random.default_rng(0)
  logits = rng.normal(scale=2, size=(4, MASK + 1)).astype(np.float32)
  row = gaps.row_of((0, 0, 1))
  noised = FLEX.corrupt(
    jax.random.split(jax.random.key(1), 50),
    jnp.full(50, 0.3),
    np.tile(row, (50, 1)),
    np.ones((50, 4), bool),
  )
  known = {one.tokens: one for one in gaps.noisy_texts((0, 0, 1))}
  for i in range(50):
    terms = FLEX.terms(logits, jax.tree.map(lambda x: x[i], noised.fields))
    loss = np.sum(np.where(noised.scored[i], terms.nll, 0))
    size = int(np.sum(np.array(noised.tokens[i]) != gaps.FILL))
    one = known[tuple(np.array(noised.tokens[i])[:size].tolist())]
    np.testing.assert_allclose(
      loss, 2 / 0.7 * gaps.loss_of(one, logits, 0.7**2), rtol=1e-4, atol=1e-5
    )


def test_targets_of_long_rows():
  """The numbers of ways to align them are beyond 1e300."""
  length, num_text = 1024, 1000
  x0 = jax.random.randint(jax.random.key(0), (1, length), 0, FILL)
  x0 = jnp.where(jnp.arange(length) < num_text, x0, FILL)
  eligible, keys = jnp.ones_like(x0, bool), jax.random.key(1)[None]
  noised = jax.jit(FLEX.corrupt)(keys, jnp.array([0.5]), x0, eligible)
  num_absent = num_text - int(jnp.sum(noised.tokens != FILL))
  assert num_absent > 200
  count = noised.fields['count'] * (noised.scored & ~noised.fields['is_mask'])
  np.testing.assert_allclose(jnp.sum(count), num_absent, rtol=1e-5)
  share = jnp.sum(noised.fields['share'], axis=2)[noised.tokens != FILL]
  np.testing.assert_allclose(share, 1, rtol=1e-5)
