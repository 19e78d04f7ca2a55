"""Uniform noise as the argmax of a Gaussian around the clean token.

With w = mu onehot(x0) + eps, eps ~ N(0, 1) for each of N tokens, z = argmax w
is x0 more often than any other token, and all others equally often. So z has
uniform noise's law, with

    alpha(mu) = (N P - 1) / (N - 1),  P = int phi(v - mu) Phi(v)^(N - 1) dv,

P being the probability that x0 is the largest. w is what the softmax of a
relaxed text is taken of. Source: Duo, arXiv 2506.10892; for the largest values
alone, its second part, arXiv 2602.21185.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from nanodlm.types import SoftTokens

# The ends of alpha in `mean_at`.
TABLE_MIN, TABLE_MAX = 0.02, 0.98
# alpha exceeds TABLE_MAX at a smaller mean than this, for any float32-countable
# number of tokens.
_MAX_MEAN = 12.0
# Below it, the size of an exponential draw is 0 in float32.
_MIN_TAIL = 1e-12
# A smaller temperature has the effect of this one, and does not overflow.
_MIN_TAU = 1e-20


def alpha_of(mean: np.ndarray, num_tokens: int) -> np.ndarray:
  """Returns alpha at means mu >= 0, float64, any shape; num_tokens > 1."""
  e = np.linspace(-9, 9, 1001)
  density = np.exp(-e * e / 2)
  below = np.exp((num_tokens - 1) * special.log_ndtr(mean[..., None] + e))
  p = below @ (density / density.sum())
  return (num_tokens * p - 1) / (num_tokens - 1)


@functools.cache
def _table(num_tokens):
  """Returns alpha, increasing over [TABLE_MIN, TABLE_MAX], and its means."""
  mean = np.linspace(0, _MAX_MEAN, 2401)
  alpha = alpha_of(mean, num_tokens)
  first = np.searchsorted(alpha, TABLE_MIN) - 1
  last = np.searchsorted(alpha, TABLE_MAX) + 1
  rows = slice(first, last)
  return alpha[rows].astype(np.float32), mean[rows].astype(np.float32)


def mean_at(alpha: jax.Array, num_tokens: int) -> jax.Array:
  """Returns mu with alpha(mu) = alpha in [TABLE_MIN, TABLE_MAX], any shape."""
  return jnp.interp(alpha, *map(jnp.asarray, _table(num_tokens)))


def sample_soft(
  keys: jax.Array,
  x0: jax.Array,
  mean: jax.Array,
  num_tokens: int,
  num_kept: int,
  tau: float,
) -> SoftTokens:
  """Draws the largest entries of w, and the softmax of a w / tau over them.

  a = 1 / sqrt(1 + mu^2) gives the entries of a w a second moment of 1 at x0.

  What is kept has the law that it has in a draw of all of w, at a cost that
  does not depend on `num_tokens`: the largest of the others are order
  statistics, their ids a uniformly random sequence, and x0 has its own rank
  among them. The softmax of all tokens differs in those left out only, whose
  share falls exponentially with their distance over tau.

  Args:
    keys: [B].
    x0: [B, L] int32 below num_tokens.
    mean: [B], mu.
    num_tokens: N > 1.
    num_kept: K in [1, N]; K = N is the whole softmax.
    tau: temperature, >= 0.

  Returns:
    Tokens [B, L, K], the largest entry, z, first.
  """
  length, num_others = x0.shape[1], min(num_kept, num_tokens - 1)
  left = num_tokens - 1 - jnp.arange(num_others)  # Not larger than the j-th.

  def draw(key):
    own, tail, digits = jax.random.split(key, 3)
    shape = (length, num_others)
    return (
      jax.random.normal(own, (length, 1)),
      jax.random.exponential(tail, shape),
      jax.random.randint(digits, shape, 0, left[None]),
    )

  own, tail, digits = jax.vmap(draw)(keys)
  # -log of the j-th largest of num_tokens - 1 uniform numbers (Renyi).
  tail = jnp.cumsum(tail / left[None, None], axis=-1)
  others = _normal_quantile(jnp.maximum(tail, _MIN_TAIL))
  ids = _decode(digits)
  ids += ids >= x0[..., None]
  mean = mean[:, None, None]
  values = jnp.concatenate([own + mean, others], axis=-1)
  ids = jnp.concatenate([x0[..., None], ids], axis=-1)
  values, rank = jax.lax.top_k(values, num_kept)
  scale = jnp.maximum(tau * jnp.sqrt(1 + mean * mean), _MIN_TAU)
  weights = jax.nn.softmax((values - values[..., :1]) / scale)
  return SoftTokens(jnp.take_along_axis(ids, rank, axis=-1), weights)


def _normal_quantile(tail: jax.Array) -> jax.Array:
  """Returns the normal quantile of exp(-tail), tail > 0, at full precision."""
  upper = -jax.scipy.special.ndtri(-jnp.expm1(-jnp.minimum(tail, 1.0)))
  lower = jax.scipy.special.ndtri(jnp.exp(-jnp.maximum(tail, 0.5)))
  return jnp.where(tail < 0.7, upper, lower)


def _decode(digits: jax.Array) -> jax.Array:
  """Converts Lehmer digits [..., K], the j-th in [0, N - j), to distinct ids.

  Uniform digits give a uniformly random sequence of K of the ids below N.
  """
  where = jnp.arange(digits.shape[-1])

  def insert(i, ids):
    j = digits.shape[-1] - 1 - i
    own = jax.lax.dynamic_index_in_dim(ids, j, axis=-1)
    is_moved = jnp.expand_dims(where > j, range(ids.ndim - 1)) & (ids >= own)
    return ids + is_moved

  return jax.lax.fori_loop(0, digits.shape[-1], insert, digits)
