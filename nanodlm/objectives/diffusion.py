"""The base class of diffusion objectives: noise levels, and their reversal."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nanodlm.noise import processes, times
from nanodlm.types import (
  InputError,
  Noised,
  Objective,
  ReverseRule,
  Score,
  Scores,
)

# The settings of an objective that only its own loss reads: those that
# distillation and tuning ignore.
LOSS_FIELDS = frozenset(
  {
    'noise',
    'max_weight',
    'min_time',
    'num_timesteps',
    'curriculum_steps',
    'tau',
    'num_soft_tokens',
  }
)


@dataclasses.dataclass(frozen=True)
class Diffusion(ReverseRule, Objective):
  """An objective that noises texts and whose samples start from noise.

  Attributes:
    mask_id: the mask's id; the ids below it are the N real tokens.
    noise: how levels are drawn, one of `noises`: by 'count' or 'overlap' (see
      `masking.MaskedNoise`), 'stratified' (over the global batch) or 'uniform'.
  """

  mask_id: int
  noise: str = dataclasses.field(default='stratified', kw_only=True)

  # Whether the network's output means the law of the clean token alone.
  is_normalised = True
  default_sampler = 'posterior'
  noises = ('stratified', 'uniform')

  def __post_init__(self):
    if self.noise not in self.noises:
      raise InputError(
        f'objective.noise={self.noise!r} is not one of {list(self.noises)}'
      )

  @property
  def process(self) -> Any:
    """The forward process; by default, tokens are masked."""
    return processes.Masked(self.mask_id)

  def evaluation(self):
    return dataclasses.replace(self, noise=self.noises[0])

  def naive(self):
    return dataclasses.replace(self.evaluation(), noise='uniform')

  def in_form(self, cls: 'type[Diffusion]') -> 'Diffusion':
    """Returns an objective of another class, with this one's settings."""
    names = [x.name for x in dataclasses.fields(cls) if hasattr(self, x.name)]
    return cls(**{name: getattr(self, name) for name in names})

  def with_clean(self, noised: Noised, eligible: jax.Array) -> Noised:
    """Returns noised texts whose clean copy is scored too, if it predicts.

    `eligible` [B, L] are the positions that it learns.
    """
    return noised

  def score_copies(
    self, score: Score, noised: Noised, weight: jax.Array
  ) -> Scores:
    """Scores the result of `with_clean`; weight [B, L] is of one copy."""
    return score(noised, weight)

  def sample_levels(self, key, batch_size, length):
    return times.SAMPLE_LEVELS[self.noise](key, batch_size)

  def sample_prior(self, keys, length):
    return self.process.sample_prior(keys, length)

  def renoise(self, keys, x0, t, where):
    noise = jnp.full(x0.shape, self.noise_at(t))
    return self.process.corrupt(keys, noise, x0, where)
