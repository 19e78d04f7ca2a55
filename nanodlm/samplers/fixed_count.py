"""Fixed-count sampling of a masked model: so many positions in each step."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import processes
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import Canvas, Denoise, InputError, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class FixedCount(Sampler):
  """Reveals n / T of a row's n free positions in each step, in random order.

  The reverse of the fixed-count objective. With T = n it is the any-order
  autoregressive model, exact; with fewer steps it differs from ancestral
  sampling only in that the number revealed per step does not vary.

  Attributes:
    draw: how tokens are drawn.
    num_steps: T; a row with fewer free positions takes one call for each.
  """

  draw: Draw
  num_steps: int

  def __post_init__(self):
    if self.num_steps < 1:
      raise InputError(f'sampler.num_steps={self.num_steps!r} must be >= 1')

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    num_steps = min(self.num_steps, length)
    plan_keys, draw_keys = jax.vmap(lambda key: tuple(jax.random.split(key)))(
      keys
    )
    rank = processes.random_rank(plan_keys, ~canvas.fixed)
    num_free = jnp.sum(~canvas.fixed, axis=1, keepdims=True)
    # In integers: rank r goes to step floor(r T / n), at most ceil(n / T) each.
    step = rank * num_steps // jnp.maximum(num_free, 1)
    is_before = step[:, :, None] < jnp.arange(num_steps)[None, None]
    revealed = jnp.sum(is_before & ~canvas.fixed[:, :, None], axis=1)
    # The masked share of the whole row, prompt included, as in training.
    level = (num_free - revealed) / length
    return reveal.sample_plan(
      draw_keys,
      canvas,
      reveal.Plan(step, level),
      denoise,
      self.draw,
      -(-length // num_steps),
    )
