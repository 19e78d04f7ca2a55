"""DreamOn's labels: undone, they give the text back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.objectives import masked
from nanodlm.objectives.masked import Masked

MASK, END, LENGTH, NUM = 11, 9, 12, 400
OBJECTIVE = Masked(MASK, expand=True)


def undo(tokens, labels, scored):
  """What the labels make of the noisy tokens, from right to left."""
  tokens = list(tokens)
  fills = list(labels)
  for i in np.flatnonzero(scored)[::-1]:
    if labels[i] == MASK:
      tokens[i : i + 1] = ['?', '?']
    elif labels[i] == END:
      del tokens[i]
    else:
      tokens[i] = int(fills[i])
  return [x for x in tokens if x != END]


@pytest.mark.parametrize('eligible', ['all', 'span'])
def test_labels_give_the_text_back(eligible):
  rng = np.random.default_rng(0)
  size = rng.integers(1, LENGTH - 1, size=NUM)
  place = np.arange(LENGTH)[None]
  x0 = rng.integers(END, size=(NUM, LENGTH))
  x0 = np.where(place < size[:, None], x0, END).astype(np.int32)
  can = np.ones(x0.shape, bool)
  if eligible == 'span':
    can = (place >= 1) & (place < size[:, None] - 1)
  keys = jax.random.split(jax.random.key(0), NUM)
  levels = OBJECTIVE.sample_levels(jax.random.key(1), NUM, LENGTH)
  noised = jax.jit(OBJECTIVE.corrupt)(keys, levels, x0, can)
  tokens, scored = np.array(noised.tokens), np.array(noised.scored)
  labels = np.array(noised.fields['target'])
  np.testing.assert_array_equal(tokens == MASK, scored)
  # The linear schedule: the time is the share of masks, as in sampling.
  np.testing.assert_allclose(noised.t, scored.mean(axis=1), rtol=1e-5)
  first = jax.vmap(lambda key: jax.random.split(jax.random.clone(key), 3)[0])
  plain = Masked(MASK).corrupt(first(keys), levels, x0, can)
  num_two = num_none = 0
  for i in range(NUM):
    found = undo(tokens[i], labels[i], scored[i])
    text = x0[i][x0[i] != END].tolist()
    if eligible == 'span':
      # Two masks stand for the tokens that they were.
      assert len(found) == len(text)
      for x, own in zip(found, text):
        assert x in ('?', own)
      twos = np.sum(labels[i][scored[i]] == MASK)
      nones = np.sum(labels[i][scored[i]] == END)
      assert scored[i].sum() == np.sum(plain.scored[i]) - twos + nones
      num_two, num_none = num_two + twos, num_none + nones
      scale = np.array(noised.fields['scale'][i])[scored[i]]
      assert np.all(scale == scale[:1])
    else:
      rest = iter(text)
      assert all(x in rest for x in found if x != '?')
  if eligible == 'span':
    assert num_two > 50 and num_none > 200


def test_the_rate_of_merging():
  num, length = 20_000, 2
  tokens = np.tile([[3, 4, END, END]], (num, 1)).astype(np.int32)
  can = np.tile([[True, True, False, False]], (num, 1))
  keys = jax.random.split(jax.random.key(0), num)
  noised = Masked(MASK).corrupt(
    jax.random.clone(keys), jnp.full(num, 0.99), tokens, can
  )
  both = np.array(noised.scored.sum(1) == length)
  merged = masked.merge(keys, noised, tokens[:, -1:], MASK)
  is_one = np.array(merged.scored.sum(1) == 1)
  # Half of the row is masked: (1 - 1/2) / 2.
  np.testing.assert_allclose(is_one[both].mean(), 0.25, atol=0.02)
  np.testing.assert_array_equal(
    merged.fields['target'][both & is_one][:, 0], MASK
  )


def test_evaluation_is_the_plain_bound():
  assert OBJECTIVE.evaluation() == Masked(MASK, noise='overlap')
  logits = (
    np.random.default_rng(0).normal(size=(5, MASK + 1)).astype(np.float32)
  )
  fields = {'target': np.array([0, 3, MASK, 9, MASK]), 'scale': np.ones(5)}
  terms = OBJECTIVE.terms(logits, fields)
  log_p = jax.nn.log_softmax(logits)
  expected = -log_p[np.arange(5), fields['target']]
  np.testing.assert_allclose(terms.loss, expected, rtol=1e-5)
  assert np.all(np.isnan(terms.nll))
