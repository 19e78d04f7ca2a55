"""The autoregressive baseline, on a causal version of the transformer."""

import dataclasses

import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.types import Noised, Objective, Terms


@dataclasses.dataclass(frozen=True)
class Autoregressive(Objective):
  """The exact negative log-likelihood, from left to right.

  The network's input is the text shifted right by one, after mask_id. The first
  token is predicted too, so that L tokens are the same text as L tokens of a
  diffusion model.

  Attributes:
    mask_id: the id of the start symbol.
  """

  mask_id: int

  default_sampler = 'ar'
  causal = True
  exact = True

  def sample_levels(self, key, batch_size, length):
    return jnp.zeros((batch_size,))

  def corrupt(self, keys, levels, x0, eligible):
    return Noised(
      tokens=self.network_input(x0),
      t=jnp.zeros_like(levels),
      scored=eligible,
      level=jnp.full(x0.shape, jnp.nan),
      fields={'target': x0},
    )

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    return Terms(loss=ce, nll=ce, cross_entropy=ce, correct=correct)

  def network_input(self, tokens):
    start = jnp.full_like(tokens[:, :1], self.mask_id)
    return jnp.concatenate([start, tokens[:, :-1]], axis=1)

  def network_time(self, level):
    return jnp.zeros_like(level)
