"""Unsupervised classifier-free guidance, which drops the prompt."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.samplers import base, reveal
from nanodlm.types import Denoise, InputError, Objective, Sampler

# Keeps guided log-probabilities finite in float32.
MAX_GUIDANCE = 1000.0


@dataclasses.dataclass(frozen=True)
class Guided(base.OuterSampler):
  """A sampler with strengthened dependence on the prompt.

  Every distribution p(x | prompt, rest) is replaced by one proportional to

      p(x | prompt, rest)^(1 + w) / p(x | rest)^w,

  where p(x | rest) is the network's prediction with masks in place of the
  prompt (all fixed positions). Source: Nie et al., arXiv 2410.18514; LLaDA,
  arXiv 2502.09992. One call with 2 B rows computes both, and `num_calls` counts
  it twice. On a blank canvas guidance has no effect, at the same cost.

  Attributes:
    inner: a sampler with `can_be_guided`.
    guidance: w in [0, MAX_GUIDANCE]; 0 disables guidance.
  """

  inner: Sampler
  guidance: float
  mask_id: int

  def __post_init__(self):
    if not 0 <= self.guidance <= MAX_GUIDANCE:
      raise InputError(
        f'sampler.guidance={self.guidance!r} must be in [0, {MAX_GUIDANCE:g}]'
      )

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.predicts_masked

  def unread_keys(self) -> frozenset[str]:
    return self.inner.unread_keys()

  def __call__(self, keys, canvas, denoise):
    samples = self.inner(
      keys, canvas, guide(denoise, canvas.fixed, self.guidance, self.mask_id)
    )
    num_calls = 2 * samples.num_calls * reveal.calls_of(denoise)
    return samples._replace(num_calls=num_calls)


def guide(
  denoise: Denoise, fixed: jax.Array, weight: float, mask_id: int
) -> Denoise:
  """Returns a `types.Denoise` of unnormalised, guided log-probabilities.

  `fixed` [B, L] bool is the prompt and `weight` is w.
  """

  def guided(tokens, level, positions):
    both = lambda x, y: jnp.concatenate([x, y])
    # The level is a share of the whole row, and the prompt is now masked too.
    without_level = jnp.minimum(level + jnp.mean(fixed, axis=1), 1.0)
    logits = denoise(
      both(tokens, jnp.where(fixed, mask_id, tokens)),
      both(level, without_level),
      both(positions, positions),
    )
    # Both are normalised, so that their difference is a log likelihood ratio.
    log_p, without = jnp.split(categorical.log_prob(logits, mask_id), 2)
    return without + (weight + 1) * (log_p - without)

  return guided
