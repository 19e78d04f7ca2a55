"""Texts of different lengths, and all that their noise can be, enumerated."""

import collections
import itertools
from typing import NamedTuple

import numpy as np

from tests import toys
from tests.toys import MASK

# Texts of up to three of two tokens, and what fills their rows.
FILL = 2
ROOM = 3
ALL = [
  text
  for size in range(ROOM + 1)
  for text in itertools.product(range(FILL), repeat=size)
]


def row_of(text, length=ROOM + 1):
  return np.array([*text, *[FILL] * (length - len(text))], np.int32)


ROWS = np.stack([row_of(text) for text in ALL])


def random_law(seed):
  """A law of ALL, far from a product and from any law of lengths alone."""
  p = np.exp(1.2 * np.random.default_rng(seed).normal(size=len(ALL)))
  return p / p.sum()


class Noisy(NamedTuple):
  """What a text can become.

  Attributes:
    tokens: the present ones.
    num: numbers of absent tokens, masks, and clean tokens that were free.
    ways: in how many ways.
    p: the law of the token of each mask, {place: {token: share}}.
    n: absent tokens in the gap before each place that is not a mask, {place:
      number}, of gaps that are open.
    is_free: of each present token, whether it was.
  """

  tokens: tuple
  num: tuple
  ways: int
  p: dict
  n: dict
  is_free: tuple


def noisy_texts(text, eligible=None):
  """All `Noisy` of a text; eligible [len(text) + 1] is also of its end."""
  size = len(text)
  eligible = [True] * (size + 1) if eligible is None else list(eligible)
  groups = collections.defaultdict(list)
  options = [('absent', 'mask', 'clean') if e else ('given',) for e in eligible]
  for states in itertools.product(*options[:size]):
    places = [i for i, state in enumerate(states) if state != 'absent']
    tokens = tuple(MASK if states[i] == 'mask' else text[i] for i in places)
    # It is known which tokens are given.
    given = tuple(i if states[i] == 'given' else -1 for i in places)
    counts = collections.Counter(states)
    num = counts['absent'], counts['mask'], counts['clean']
    groups[tokens, given, num].append([*places, size])
  found = []
  for (tokens, given, num), ways in groups.items():
    p, n, start = {}, {}, -1
    for j, token in enumerate((*tokens, FILL)):
      if j < len(tokens) and token == MASK:
        law = collections.Counter(text[places[j]] for places in ways)
        p[j] = {v: k / len(ways) for v, k in law.items()}
        continue
      end = ways[0][j]
      if eligible[end] or (end and eligible[end - 1]):
        before = lambda places, j: places[j] if j >= 0 else -1
        n[j] = np.mean(
          [before(x, j) - before(x, start) - (j - start) for x in ways]
        )
      start = j
    is_free = tuple(x < 0 for x in given)
    found.append(Noisy(tokens, num, len(ways), p, n, is_free))
  return found


def probability(noisy, t):
  """P(noisy | text) at times t."""
  absent, masks, clean = noisy.num
  shares = t, -t * np.log(t), 1 - t + t * np.log(t)
  p = noisy.ways * shares[0] ** absent * shares[1] ** masks
  return p * shares[2] ** clean


def num_absent(logit):
  """y of the mask's logit plus log t."""
  return np.where(
    logit < 0,
    np.exp(np.minimum(logit, 0)),
    1 + np.maximum(logit, 0) + logit**2 / 2,
  )


def logit_of(y):
  """The inverse of `num_absent`."""
  return np.where(
    y < 1, np.log(np.maximum(y, 1e-30)), np.sqrt(np.maximum(2 * y - 1, 0)) - 1
  )


def loss_of(noisy, logits, t):
  """The loss without 1 / t; logits [(n,) L, V + 1] of the noisy text, t [n]."""
  log_x, total = toys.log_softmax(logits), 0.0
  for j, law in noisy.p.items():
    total += sum(p * (np.log(p) - log_x[..., j, v]) for v, p in law.items())
  for j, n in noisy.n.items():
    y = num_absent(np.asarray(logits, np.float64)[..., j, MASK] + np.log(t))
    total += y - n + (n * np.log(n / y) if n else 0)
  return total


def nodes(num=200):
  """Times for integrals over (0, 1), and their weights over t."""
  x, w = np.polynomial.legendre.leggauss(num)
  u, w = (x + 1) / 2, w / 2
  return u**4, w * 4 * u**3


def bound(text, eligible, logits_of):
  """The bound by quadrature; logits_of(tokens, t [n]) -> [(n,) L, V + 1]."""
  t, weight = nodes()
  total = 0.0
  for noisy in noisy_texts(text, eligible):
    loss = loss_of(noisy, logits_of(noisy.tokens, t), t)
    total += np.sum(weight / t * probability(noisy, t) * loss)
  return total


class ExactNetwork:
  """The exact denoiser of a law of texts, for one set of given tokens.

  Args:
    law: of `texts`.
    texts: the texts.
    eligible: of each text, as in `noisy_texts`; None: all.
  """

  def __init__(self, law, texts=ALL, eligible=None):
    self._of = collections.defaultdict(list)
    for i, (p, text) in enumerate(zip(law, texts)):
      which = None if eligible is None else eligible[i]
      for noisy in noisy_texts(text, which):
        self._of[noisy.tokens].append((p, noisy))

  @property
  def tokens(self):
    return list(self._of)

  def logits(self, tokens, t, length=ROOM + 1):
    """The logits [n, L, V + 1] of noisy tokens at times t [n]."""
    table = np.full((len(t), length, MASK + 1), -60.0)
    weights = [p * probability(noisy, t) for p, noisy in self._of[tokens]]
    total = sum(weights)
    gaps = {j for _, noisy in self._of[tokens] for j in noisy.n}
    for j in range(len(tokens) + 1):
      if j < len(tokens) and tokens[j] == MASK:
        for v in range(MASK):
          share = sum(
            w * noisy.p[j].get(v, 0)
            for w, (_, noisy) in zip(weights, self._of[tokens])
          )
          table[:, j, v] = np.log(np.maximum(share / total, 1e-26))
      elif j in gaps:
        mean = sum(
          w * noisy.n.get(j, 0)
          for w, (_, noisy) in zip(weights, self._of[tokens])
        )
        table[:, j, MASK] = logit_of(mean / total) - np.log(t)
    return table
