"""First-hitting sampling of a masked model: exact, one token per call."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import processes
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import Canvas, Denoise, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class FirstHitting(Sampler):
  """Simulates the continuous-time reverse process without a grid.

  With n masks left the next one is revealed at the noise level
  m * u^(1/n), u ~ U(0, 1), and it is a uniformly random one of them. As many
  calls as free positions. Source: Zheng et al., arXiv 2409.02908, section 4.

  Attributes:
    draw: how tokens are drawn.
  """

  draw: Draw

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    order_keys, time_keys, draw_keys = jax.vmap(
      lambda key: tuple(jax.random.split(key, 3))
    )(keys)
    rank = processes.random_rank(order_keys, ~canvas.fixed)
    num_free = jnp.sum(~canvas.fixed, axis=1, keepdims=True)
    left = jnp.maximum(num_free - jnp.arange(length)[None], 1)
    u = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(time_keys)
    level = jnp.exp(jnp.cumsum(jnp.log1p(-u) / left, axis=1))
    # The expected masked share of the whole row, prompt included.
    level = level * num_free / length
    return reveal.sample_plan(
      draw_keys,
      canvas,
      reveal.Plan(rank, level),
      denoise,
      self.draw,
      num_slots=1,
    )
