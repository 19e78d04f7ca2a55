"""Sampling texts of high reward: the best of n, and a chain of refinements.

Both cost network calls, which are added up; a candidate of all texts takes as
many as the sampler without a search.
"""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from nanodlm.training import progress
from nanodlm.types import InputError

# See `lm.make_fill`.
Fill = Callable[..., tuple[np.ndarray, float]]


@dataclasses.dataclass(frozen=True)
class Search:
  """How texts of high reward are found.

  The best of n: each text is the one of highest reward among n samples.

  Refinements are steps of a Markov chain (Metropolis-Hastings). A step draws
  some of the free positions again, given the others, and takes the new text
  with probability min(1, exp((reward(new) - reward(old)) / temperature)). If
  all predictions of the network are conditional laws of one law p of texts, as
  those of 'ar' are, and the sampler draws from it, the redraws are reversible
  under p, and the chain's law tends to p(text) exp(reward(text) / temperature),
  up to a constant, from any start. Trained networks agree with such a p only
  nearly. At temperature 0 a reward never falls.

  Attributes:
    best_of: n.
    num_refinements: steps of the chain, which starts from the best of n.
    temperature: >= 0, in the unit of the rewards.
    reward: (rows [N, L], fixed [N, L]) -> rewards [N].
    sees_right: whether any positions can be drawn again; else the last ones.
  """

  best_of: int
  num_refinements: int
  temperature: float
  reward: Callable[[np.ndarray, np.ndarray], np.ndarray]
  sees_right: bool

  def __post_init__(self):
    for key, least in (('best_of', 1), ('num_refinements', 0)):
      value = getattr(self, key)
      if not isinstance(value, int) or value < least:
        raise InputError(f'{key}={value!r} must be an integer >= {least}')
    if not 0 <= self.temperature < np.inf:
      raise InputError(
        f'reward_temperature={self.temperature!r} must be finite and >= 0'
      )
    if self.temperature and not self.num_refinements:
      raise InputError(
        f'reward_temperature={self.temperature!r} is ignored with '
        'num_refinements=0'
      )

  def around(
    self, fill: Fill, on_candidate: Callable[[np.ndarray], None] | None = None
  ) -> Fill:
    """Returns a `Fill` that searches with the candidates of another.

    `on_candidate`(is_taken [N]) is called after each candidate.
    """

    def search(params, key, tokens, fixed):
      key_of = lambda i: jax.random.fold_in(key, i)
      num = self.best_of + self.num_refinements
      seed = jax.random.key_data(key_of(num))
      rng = np.random.default_rng(np.asarray(seed).tolist())
      best, values, num_calls = tokens, np.full(len(tokens), -np.inf), 0.0
      countdown = progress.Countdown('searching', num)
      for i in range(num):
        is_refinement = i >= self.best_of
        given = ~self._redrawn(rng, ~fixed) if is_refinement else fixed
        start = best if is_refinement else tokens
        new, calls = fill(params, key_of(i), start, given)
        num_calls += calls
        new_values = self.reward(new, fixed)
        gain = new_values - values
        is_taken = gain >= 0 if is_refinement else gain > 0
        if is_refinement and self.temperature:
          chance = np.exp(np.minimum(gain / self.temperature, 0.0))
          is_taken = rng.random(len(gain)) < chance
        best = np.where(is_taken[:, None], new, best)
        values = np.where(is_taken, new_values, values)
        if on_candidate:
          on_candidate(is_taken)
        countdown.count()
      return best, num_calls

    return search

  def _redrawn(self, rng: np.random.Generator, free: np.ndarray) -> np.ndarray:
    """Draws the positions to draw again, of those that are free, [N, L].

    Their share is the same in all rows, so that a small one takes few calls.
    """
    order = rng.random(free.shape)
    if not self.sees_right:
      order = np.broadcast_to(-np.arange(free.shape[1]), free.shape)
    rank = np.argsort(np.argsort(np.where(free, order, np.inf), axis=1), axis=1)
    num = np.ceil(rng.random() * free.sum(axis=1, keepdims=True))
    return free & (rank < num)
