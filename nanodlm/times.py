"""How noise levels are drawn, for the GLOBAL batch and within one example.

A level is a number u in [0, 1): a time, or the quantile of a count. All draws
are for the whole batch at once and identical on every device, which then takes
its own rows: drawing per device would lose the stratification.
"""

import jax
import jax.numpy as jnp


def sample_uniform(key: jax.Array, batch_size: int) -> jax.Array:
  """Independent u ~ U[0, 1), [B]."""
  return jax.random.uniform(key, (batch_size,))


def sample_stratified(key: jax.Array, batch_size: int) -> jax.Array:
  """One u in each of B equal strata, in random order, [B].

  Source: the low-discrepancy sampler of Kingma et al., arXiv 2107.00630,
  appendix I.1, with a jitter of its own in each stratum. Each u is marginally
  U[0, 1).
  """
  order_key, jitter_key = jax.random.split(key)
  order = jax.random.permutation(order_key, batch_size)
  u = (order + jax.random.uniform(jitter_key, (batch_size,))) / batch_size
  # (B - 1 + jitter) / B can round up to 1 in float32.
  return jnp.minimum(u, jnp.float32(1 - 2**-24))


def sample_stratified_pairs(key: jax.Array, batch_size: int) -> jax.Array:
  """Stratified levels that rows 2p and 2p + 1 share, [B]; B is even."""
  return jnp.repeat(sample_stratified(key, batch_size // 2), 2)
