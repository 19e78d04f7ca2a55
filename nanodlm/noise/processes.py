"""Forward noise processes and their posteriors.

`Masked` takes the probability that a token is masked; `Mixture`, which masks
and replaces tokens, takes shares that are functions of the time. Each example
has its own key, so its noise does not depend on its batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanodlm.noise import schedules


@dataclasses.dataclass(frozen=True)
class Masked:
  """Absorbing noise: a token becomes mask_id and remains so.

  Source: D3PM, arXiv 2107.03006, "absorbing state"; MDLM, arXiv 2406.07524.

  Attributes:
    mask_id: the absorbing id.
  """

  mask_id: int

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    """Returns the noise at t = 1, every token masked, [B, length]."""
    return jnp.full((keys.shape[0], length), self.mask_id, jnp.int32)

  def corrupt(
    self, keys: jax.Array, noise: jax.Array, x0: jax.Array, eligible: jax.Array
  ) -> jax.Array:
    """Masks each eligible token of x0 [B, L] independently; returns xt [B, L].

    Args:
      keys: [B].
      noise: [B] or [B, L], P(masked) = 1 - alpha_t.
      x0: [B, L].
      eligible: [B, L] bool; other positions remain clean.
    """
    length = x0.shape[1]
    u = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    noise = noise.reshape(x0.shape[0], -1)
    return jnp.where(eligible & (u < noise), self.mask_id, x0)

  def corrupt_count(
    self,
    keys: jax.Array,
    count: jax.Array,
    x0: jax.Array,
    eligible: jax.Array,
    from_end: jax.Array | None = None,
  ) -> jax.Array:
    """Masks exactly `count` eligible tokens of each row, chosen uniformly.

    Args:
      keys: [B]; rows with the same key and eligible tokens share an order.
      count: [B] int32, at most the row's number of eligible positions.
      x0: [B, L].
      eligible: [B, L] bool.
      from_end: [B] bool, whether the last tokens of the order are masked
        instead of the first; None: no.
    """
    rank = random_rank(keys, eligible)
    if from_end is not None:
      last = jnp.sum(eligible, axis=1, keepdims=True) - 1
      rank = jnp.where(from_end[:, None], last - rank, rank)
    return jnp.where(eligible & (rank < count[:, None]), self.mask_id, x0)

  def reveal(
    self, xt: jax.Array, p_x0: jax.Array, probability: jax.Array
  ) -> jax.Array:
    """Returns q(xs | xt) for x0 ~ p_x0, [B, L, V].

    Args:
      xt: [B, L]; tokens that are not masked remain.
      p_x0: [B, L, V], 0 at mask_id.
      probability: [B, L], that a masked token is revealed.
    """
    mask = jax.nn.one_hot(self.mask_id, p_x0.shape[-1])[None, None]
    carried = jax.nn.one_hot(xt, p_x0.shape[-1])
    masked = (xt == self.mask_id)[..., None]
    reveal = probability[..., None]
    return jnp.where(masked, reveal * p_x0 + (1 - reveal) * mask, carried)


class Parts(NamedTuple):
  """The shares of q_t(z | x0), which sum to 1; arrays of one shape.

  Attributes:
    alpha: P(the token is kept).
    mask: P(it became mask_id).
    uniform: P(it was redrawn from the N real tokens, x0 included).
  """

  alpha: jax.Array
  mask: jax.Array
  uniform: jax.Array


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Noise that masks or replaces tokens, in shares that vary with time.

      q_t(z | x0) = alpha [z = x0] + b(z),
      b(mask) = mask share, b(z) = uniform share / N for the N = mask_id real
      tokens z.

  Source: GIDD, arXiv 2503.04482, for any such shares; D3PM's absorbing and
  uniform noise (arXiv 2107.03006) are its ends. Subclasses define `parts`.

  Attributes:
    mask_id: id of the mask; the ids below it are the N real tokens.
  """

  mask_id: int

  def parts(self, t: jax.Array, rest: jax.Array | None = None) -> Parts:
    """Returns the shares at times t in [0, 1], any shape.

    `rest` is 1 - t, if it is known without the rounding of a subtraction.
    """
    raise NotImplementedError

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    """Draws the noise at t = 1: keys [B] -> [B, length] int32."""
    raise NotImplementedError

  def mass(self, parts: Parts, z: jax.Array) -> jax.Array:
    """Returns b(z), 0 above mask_id; parts are scalar or of the shape of z."""
    real = jnp.where(z < self.mask_id, parts.uniform / self.mask_id, 0.0)
    return jnp.where(z == self.mask_id, parts.mask, real)

  def corrupt(
    self, keys: jax.Array, parts: Parts, x0: jax.Array, eligible: jax.Array
  ) -> jax.Array:
    """Draws xt ~ q_t(. | x0), [B, L] int32, independently for each token.

    Args:
      keys: [B].
      parts: the shares, [B] each.
      x0: [B, L].
      eligible: [B, L] bool; other positions remain clean.
    """
    length = x0.shape[1]
    halve = jax.vmap(lambda key: tuple(jax.random.split(key)))
    which_keys, token_keys = halve(keys)
    u = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(which_keys)
    # Small shares are compared with small u, for which float32 is fine.
    is_noise = u < (parts.mask + parts.uniform)[:, None]
    is_uniform = u < parts.uniform[:, None]
    tokens = self._uniform_tokens(token_keys, length)
    noise = jnp.where(is_uniform, tokens, self.mask_id)
    return jnp.where(eligible & is_noise, noise, x0).astype(jnp.int32)

  def _uniform_tokens(self, keys, length):
    return jax.vmap(
      lambda key: jax.random.randint(key, (length,), 0, self.mask_id)
    )(keys)

  def posterior(
    self, xt: jax.Array, p_x0: jax.Array, s: jax.Array, t: jax.Array
  ) -> jax.Array:
    """Returns q(xs | xt) = q_{t|s}(xt | xs) q_s(xs) / q_t(xt) for x0 ~ p_x0.

    Source: GIDD, arXiv 2503.04482: q_{t|s} is such a mixture, too, with
    alpha_{t|s} = alpha_t / alpha_s and b_{t|s} = b_t - alpha_{t|s} b_s. At s =
    0 the result is p_x0 * q_t(xt | .), normalised, and not p_x0, which is the
    law of x0 given the OTHER positions.

    Args:
      xt: [B, L].
      p_x0: [B, L, V] probabilities of the clean token, 0 at mask_id.
      s: [], time of the result, s < t.
      t: [], time of xt.

    Returns:
      [B, L, V] probabilities. If xt is impossible under p_x0, it remains.
    """
    at_s, at_t = self.parts(s), self.parts(t)
    kept = at_t.alpha / at_s.alpha
    step = jax.tree.map(
      lambda b_t, b_s: jnp.maximum(b_t - kept * b_s, 0.0), at_t, at_s
    )  # Its alpha is 0 and unused.
    ids = jnp.arange(p_x0.shape[-1])
    here = jax.nn.one_hot(xt, p_x0.shape[-1])
    forward = kept * here + self.mass(step, xt)[..., None]
    joint = forward * (at_s.alpha * p_x0 + self.mass(at_s, ids)[None, None])
    total = jnp.sum(joint, axis=-1, keepdims=True)
    return jnp.where(total > 0, joint / jnp.where(total > 0, total, 1.0), here)


@dataclasses.dataclass(frozen=True)
class Uniform(Mixture):
  """Uniform noise on any schedule. Source: UDLM, arXiv 2412.10193."""

  schedule: schedules.Schedule = schedules.Linear()

  def parts(self, t: jax.Array, rest: jax.Array | None = None) -> Parts:
    del rest
    noise = jnp.clip(self.schedule.noise(t), 0.0, 1.0)
    return Parts(1 - noise, jnp.zeros_like(noise), noise)

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    return self._uniform_tokens(keys, length)


@dataclasses.dataclass(frozen=True)
class Hybrid(Mixture):
  """Masks and uniform tokens. Source: GIDD, arXiv 2503.04482, section 3.

      c = B (t (1 - t))^{gamma/2}, B = 2^gamma p / (1 - p), C = 1 + c,
      alpha = (1 - t) / C, mask = t / C, uniform = c / C.

  The uniform share is 0 at both ends and largest, p, at t = 1/2.

  Attributes:
    p_uniform: p, in [0, 1); 0: masked noise on the linear schedule.
    gamma: rate at which the uniform share grows and falls, at most 2: above,
      this is not the law of a Markov chain.
  """

  p_uniform: float = 0.1
  gamma: float = 1.0

  def parts(self, t: jax.Array, rest: jax.Array | None = None) -> Parts:
    rest = 1 - t if rest is None else rest
    size = 2**self.gamma * self.p_uniform / (1 - self.p_uniform)
    c = size * (t * rest) ** (self.gamma / 2)
    return Parts(rest / (1 + c), t / (1 + c), c / (1 + c))

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    return jnp.full((keys.shape[0], length), self.mask_id, jnp.int32)


def random_rank(keys: jax.Array, eligible: jax.Array) -> jax.Array:
  """Draws a uniformly random order of each row's eligible positions.

  Args:
    keys: [B].
    eligible: [B, L] bool.

  Returns:
    [B, L] int32: 0 .. n-1 on the row's n eligible positions, n .. L-1
    elsewhere.
  """
  length = eligible.shape[1]
  # Bits, since float32's 2^23 values would tie ranks too often at long L. 32
  # bits and a stable sort leave a bias below 2^-32 L.
  bits = jax.vmap(lambda key: jax.random.bits(key, (length,)))(keys)
  order = jnp.lexsort((bits, ~eligible), axis=-1)
  return inverse_permutation(order)


def inverse_permutation(order: jax.Array) -> jax.Array:
  """Returns rank with rank[b, order[b, j]] = j, [B, L] int32."""
  return jnp.argsort(order, axis=-1).astype(jnp.int32)
