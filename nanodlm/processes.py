"""Forward noise processes: how clean tokens become noisy, and the way back.

A process knows nothing of networks or schedules: it takes the probability that
a token is kept. Every key is one example's own, so the noise of an example does
not depend on the batch it stands in.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Masked:
  """Absorbing noise: a token becomes mask_id, and stays so.

  Source: D3PM, arXiv 2107.03006, "absorbing state"; MDLM, arXiv 2406.07524.

  Attributes:
    mask_id: the absorbing id.
  """

  mask_id: int

  def prior(self, shape: tuple[int, ...]) -> jax.Array:
    """The noise at t = 1: every token masked."""
    return jnp.full(shape, self.mask_id, jnp.int32)

  def corrupt(self, keys: jax.Array, noise: jax.Array, x0: jax.Array,
              eligible: jax.Array) -> jax.Array:
    """Masks each eligible token independently.

    Args:
      keys: [B].
      noise: [B], P(masked) = 1 - alpha_t.
      x0: [B, L].
      eligible: [B, L] bool; other positions stay clean.

    Returns:
      xt, [B, L].
    """
    length = x0.shape[1]
    u = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    return jnp.where(eligible & (u < noise[:, None]), self.mask_id, x0)

  def corrupt_count(self, keys: jax.Array, count: jax.Array, x0: jax.Array,
                    eligible: jax.Array) -> jax.Array:
    """Masks exactly `count` [B] eligible tokens of each row, chosen uniformly.

    Args:
      keys: [B].
      count: [B] int32, at most the row's number of eligible positions.
      x0: [B, L].
      eligible: [B, L] bool.

    Returns:
      xt, [B, L].
    """
    rank = random_rank(keys, eligible)
    return jnp.where(eligible & (rank < count[:, None]), self.mask_id, x0)

  def posterior(self, xt: jax.Array, p_x0: jax.Array, noise_s: jax.Array,
                noise_t: jax.Array) -> jax.Array:
    """q(xs | xt) when x0 ~ p_x0.

    Source: MDLM, arXiv 2406.07524, equation 6 (carry-over of unmasked tokens;
    a masked one is revealed with probability (alpha_s - alpha_t)/(1 - alpha_t)).

    Args:
      xt: [B, L].
      p_x0: [B, L, V] probabilities of the clean token, 0 at mask_id.
      noise_s: [B], 1 - alpha_s.
      noise_t: [B], 1 - alpha_t > 0.

    Returns:
      [B, L, V] probabilities.
    """
    reveal = ((noise_t - noise_s) / noise_t)[:, None, None]
    mask = jax.nn.one_hot(self.mask_id, p_x0.shape[-1])[None, None]
    carried = jax.nn.one_hot(xt, p_x0.shape[-1])
    masked = (xt == self.mask_id)[..., None]
    return jnp.where(masked, reveal * p_x0 + (1 - reveal) * mask, carried)


def random_rank(keys: jax.Array, eligible: jax.Array) -> jax.Array:
  """A uniformly random order of each row's eligible positions.

  Args:
    keys: [B].
    eligible: [B, L] bool.

  Returns:
    [B, L] int32: 0 .. n-1 on the row's n eligible positions, n .. L-1 elsewhere.
  """
  length = eligible.shape[1]
  # Bits, not floats: float32's 2^23 values collide often enough at long L to
  # tie ranks; 32 bits and a stable sort leave a bias below 2^-32 L.
  bits = jax.vmap(lambda key: jax.random.bits(key, (length,)))(keys)
  order = jnp.lexsort((bits, ~eligible), axis=-1)
  return inverse_permutation(order)


def inverse_permutation(order: jax.Array) -> jax.Array:
  """rank with rank[b, order[b, j]] = j, [B, L] int32."""
  return jnp.argsort(order, axis=-1).astype(jnp.int32)
