"""Classifier-free guidance without a class: the prompt is what is dropped."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.types import (
  Canvas,
  Denoise,
  InputError,
  ReverseRule,
  Sampler,
  Samples,
)


@dataclasses.dataclass(frozen=True)
class Guided(Sampler):
  """A sampler that is drawn further towards the prompt.

  Every distribution p(x | prompt, rest) becomes proportional to

      p(x | prompt, rest)^(1 + weight) / p(x | rest)^weight,

  where p(x | rest) is the network's with masks in place of the prompt (all
  fixed positions): "unsupervised classifier-free guidance" (Nie et al., arXiv
  2410.18514; LLaDA, arXiv 2502.09992). Both come from one call with 2 B rows
  and `num_calls` counts two for it. A blank canvas has no prompt: guidance then
  changes nothing and costs as much.

  Attributes:
    sampler: of a network that knows masks.
    weight: w >= 0; 0 changes nothing.
    mask_id: the mask's id.
  """

  sampler: Sampler
  weight: float
  mask_id: int

  def __post_init__(self):
    if not self.weight >= 0:
      raise InputError(f'sampler.guidance={self.weight!r} must be >= 0')

  def with_rule(self, rule: ReverseRule) -> 'Guided':
    return dataclasses.replace(self, sampler=self.sampler.with_rule(rule))

  def with_draw(self, draw: Any) -> 'Guided':
    return dataclasses.replace(self, sampler=self.sampler.with_draw(draw))

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    samples = self.sampler(
      keys, canvas, guide(denoise, canvas.fixed, self.weight, self.mask_id)
    )
    return samples._replace(num_calls=2 * samples.num_calls)


def guide(
  denoise: Denoise, fixed: jax.Array, weight: float, mask_id: int
) -> Denoise:
  """A `types.Denoise` of guided log-probabilities, not normalised.

  Args:
    denoise: the network.
    fixed: [B, L] bool, the prompt.
    weight: w.
    mask_id: the mask's id.
  """

  def guided(tokens, level, positions):
    both = lambda x, y: jnp.concatenate([x, y])
    # The level is a share of the whole row, in which the prompt is now masked.
    without_level = jnp.minimum(level + jnp.mean(fixed, axis=1), 1.0)
    logits = denoise(
      both(tokens, jnp.where(fixed, mask_id, tokens)),
      both(level, without_level),
      both(positions, positions),
    )
    # Normalised over the clean tokens, so that this is a log likelihood ratio.
    log_p, without = jnp.split(categorical.log_prob(logits, mask_id), 2)
    return without + (weight + 1) * (log_p - without)

  return guided
