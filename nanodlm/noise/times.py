"""Draws of noise levels, and the time grids of samplers.

A level is a number u in [0, 1): a time, or the quantile of a count. Levels are
drawn for the whole batch on every device, which then takes its own rows: a draw
per device would not be stratified.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.types import InputError

GRIDS = ('uniform', 'cosine')


def sample_stratified(key: jax.Array, batch_size: int) -> jax.Array:
  """Draws one u in each of B equal strata, in random order, [B].

  Each u is marginally U[0, 1). Source: the low-discrepancy sampler of Kingma et
  al., arXiv 2107.00630, appendix I.1, with a separate jitter in each stratum.
  """
  order_key, jitter_key = jax.random.split(key)
  order = jax.random.permutation(order_key, batch_size)
  u = (order + jax.random.uniform(jitter_key, (batch_size,))) / batch_size
  # (B - 1 + jitter) / B can round up to 1 in float32.
  return jnp.minimum(u, jnp.float32(1 - 2**-24))


def sample_pairs(key: jax.Array, batch_size: int) -> jax.Array:
  """Draws stratified u, shared by rows 2p and 2p + 1, [B]; B is even."""
  return jnp.repeat(sample_stratified(key, batch_size // 2), 2)


# The choices of `objective.noise`: (key, batch_size) -> levels [B].
SAMPLE_LEVELS = {
  'count': sample_pairs,
  'overlap': sample_pairs,
  'stratified': sample_stratified,
  'uniform': lambda key, size: jax.random.uniform(key, (size,)),
}


def smoothstep(u: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns t = u^2 (3 - 2u) and 1 - t, both without cancellation; any shape.

  A uniform u gives times of density 1 / (6 sqrt(t)) near t = 0, and likewise
  near 1.
  """
  v = 1 - u
  return u * u * (3 - 2 * u), v * v * (3 - 2 * v)


def inverse_smoothstep(t: jax.Array) -> jax.Array:
  """Returns u in [0, 1] with u^2 (3 - 2u) = t; any shape."""
  return 0.5 - jnp.sin(jnp.arcsin(1 - 2 * t) / 3)


def is_listed(grid: str) -> bool:
  """Returns whether a grid lists its times, which fixes their number."""
  return grid not in GRIDS


def check_grid(num_steps: int, grid: str):
  """Raises InputError if `reverse_grid` does not support the grid."""
  if is_listed(grid):
    _parse_times(grid)
  elif num_steps < 1:
    raise InputError(f'sampler.num_steps={num_steps!r} must be >= 1')


def _parse_times(grid: str) -> np.ndarray:
  """Returns the times [T + 1] that a grid lists."""
  try:
    t = np.array([float(text) for text in grid.split(',')], np.float32)
  except ValueError:
    t = np.zeros(0, np.float32)
  # In float32, since two times may round to one. NaN fails the comparison.
  if t.size < 2 or t[0] != 1 or t[-1] != 0 or not np.all(np.diff(t) < 0):
    raise InputError(
      f'sampler.grid={grid!r} is not one of {list(GRIDS)}, nor a list of times '
      'that falls from 1 to 0, each below the one before, such as 1,0.5,0.2,0'
    )
  return t


def reverse_grid(num_steps: int, grid: str) -> jax.Array:
  """Returns the times t_0 .. t_T of a sampler's T steps, [T + 1], from 1 to 0.

  Args:
    num_steps: T; ignored by a grid that lists its times.
    grid: 'uniform', t_j = 1 - j/T; 'cosine', t_j = cos(pi/2 * j/T), with
      shorter steps at the start (MD4, arXiv 2406.04329, section 5); or the
      times, such as '1,0.5,0.2,0'.
  """
  if is_listed(grid):
    return jnp.asarray(_parse_times(grid))
  fraction = jnp.arange(num_steps + 1) / num_steps
  t = 1 - fraction if grid == 'uniform' else jnp.cos(jnp.pi / 2 * fraction)
  return jnp.clip(t, 0, 1).at[0].set(1.0).at[-1].set(0.0)
