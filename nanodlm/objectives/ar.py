"""The autoregressive baseline, on the same transformer made causal."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.types import Noised, Objective, Terms


@dataclasses.dataclass(frozen=True)
class Autoregressive(Objective):
  """The exact negative log-likelihood, left to right.

  All L tokens are scored: the first is predicted from mask_id standing for the
  start of the sequence, so that L tokens of diffusion and L tokens of this are
  the same text. The network's input is the text shifted right by one.

  Attributes:
    mask_id: the id used as the start symbol.
  """

  mask_id: int

  causal = True
  exact = True
  group_size = 1
  block_size = 0
  needs_time = False

  def evaluation(self) -> 'Autoregressive':
    return self

  def naive(self) -> 'Autoregressive':
    return self

  def sample_levels(
    self, key: jax.Array, batch_size: int, length: int
  ) -> jax.Array:
    del key, length  # no noise
    return jnp.zeros((batch_size,))

  def eval_levels(
    self, key: jax.Array, num_draws: int, length: int
  ) -> jax.Array:
    return self.sample_levels(key, num_draws, length)

  def corrupt(
    self, keys: jax.Array, levels: jax.Array, x0: jax.Array, weight: jax.Array
  ) -> Noised:
    del keys
    return Noised(
      tokens=self.network_input(x0),
      t=jnp.zeros_like(levels),
      scored=weight > 0,
      level=jnp.full(x0.shape, jnp.nan),
      fields={'target': x0},
    )

  def terms(self, logits: jax.Array, fields, vocab=categorical.WHOLE) -> Terms:
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    return Terms(loss=ce, nll=ce, cross_entropy=ce, correct=correct)

  def max_scored(self, batch_size: int, length: int) -> int:
    return batch_size * length

  def network_input(self, tokens: jax.Array) -> jax.Array:
    start = jnp.full_like(tokens[:, :1], self.mask_id)
    return jnp.concatenate([start, tokens[:, :-1]], axis=1)

  def network_time(self, level: jax.Array) -> jax.Array:
    return jnp.zeros_like(level)
