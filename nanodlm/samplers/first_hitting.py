"""First-hitting sampling of a masked model: exact, one token per call."""

import dataclasses

import jax.numpy as jnp

from nanodlm.noise import processes
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import base, reveal


@dataclasses.dataclass(frozen=True)
class FirstHitting(base.MaskedSampler):
  """Simulates the continuous-time reverse process without a grid.

  If n masks are left at noise level m, the next reveal happens at level
  m u^(1/n), u ~ U(0, 1), at a uniformly random masked position. Every free
  position takes one call. Source: Zheng et al., arXiv 2409.02908, section 4.
  """

  draw: Draw

  def __call__(self, keys, canvas, denoise):
    length = canvas.tokens.shape[1]
    order_keys, time_keys, draw_keys = reveal.split_each(keys, 3)
    rank = processes.random_rank(order_keys, ~canvas.fixed)
    num_free = jnp.sum(~canvas.fixed, axis=1, keepdims=True)
    left = jnp.maximum(num_free - jnp.arange(length)[None], 1)
    u = reveal.uniform_each(time_keys, length)
    level = jnp.exp(jnp.cumsum(jnp.log1p(-u) / left, axis=1))
    # As in training, the share of masks is of the whole row, prompt included.
    plan = reveal.Plan(rank, level * num_free / length)
    return reveal.sample_plan(
      draw_keys, canvas, plan, denoise, self.draw, num_slots=1
    )
