"""Preferences: chosen texts become more probable than rejected ones."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.objectives import policy
from nanodlm.types import InputError


@dataclasses.dataclass(frozen=True)
class Preference(policy.Bounds):
  """-log sigmoid(kl_weight d), d the change of log p(chosen) - log p(rejected).

  The change is that from the reference. Rows 2i are chosen, rows 2i + 1
  rejected. Source: DPO, arXiv 2305.18290, exact for 'ar'; with bounds, VRPO of
  LLaDA 1.5, arXiv 2505.19223: of each text, both networks read the same noisy
  ones, which cover its tokens (see `policy.Bounds`). Like every loss here, the
  sum over pairs is divided by the number of tokens, not of pairs.

  Attributes:
    num_draws: number of noisy texts for each text.
  """

  num_draws: int = 2

  group_size = num_alternatives = 2

  def __post_init__(self):
    super().__post_init__()
    if not self.kl_weight > 0:
      raise InputError(
        f'policy.kl_weight={self.kl_weight!r} must be > 0 with preferences'
      )

  def loss(self, batch, levels, keys, score):
    eligible = jnp.asarray(batch.eligible)
    noised = self.corrupt(keys, levels, batch.tokens, eligible)
    num_rows = len(eligible)
    num_each = len(noised.tokens) // num_rows
    weight = jnp.repeat(eligible, num_each, axis=0).astype(jnp.float32)
    log_p = lambda losses: self.log_p(losses, num_rows).sum(axis=1)
    reference = score(noised, weight, params=score.frozen['reference'])
    reference = log_p(reference.losses)

    def margins(losses):
      gain = self.kl_weight * (log_p(losses) - reference)
      return gain[::2] - gain[1::2]

    def of_losses(losses):
      value = -jax.nn.log_sigmoid(margins(losses))
      return jnp.sum(batch.weight[::2] * value)

    scores = score(noised, weight, of_losses)
    margin = jnp.repeat(margins(scores.losses), 2)
    reports = {'margin': margin, 'preferred_share': (margin > 0) * 1.0}
    return scores._replace(reports=reports)
