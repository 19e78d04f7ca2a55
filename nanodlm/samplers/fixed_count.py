"""Fixed-count sampling of a masked model: equally many tokens in each step."""

import dataclasses

import jax.numpy as jnp

from nanodlm.noise import processes
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import base, reveal
from nanodlm.types import InputError


@dataclasses.dataclass(frozen=True)
class FixedCount(base.MaskedSampler):
  """Reveals n / T of a row's n free positions in each step, in random order.

  This is the reverse of the fixed-count objective. With T = n it is the
  any-order autoregressive model, which is exact. With fewer steps it differs
  from ancestral sampling only in that every step reveals the same number.

  Attributes:
    num_steps: T; a row with fewer free positions takes one call per position.
  """

  draw: Draw
  num_steps: int

  def __post_init__(self):
    if self.num_steps < 1:
      raise InputError(f'sampler.num_steps={self.num_steps!r} must be >= 1')

  def __call__(self, keys, canvas, denoise):
    length = canvas.tokens.shape[1]
    num_steps = min(self.num_steps, length)
    plan_keys, draw_keys = reveal.split_each(keys)
    rank = processes.random_rank(plan_keys, ~canvas.fixed)
    num_free = jnp.sum(~canvas.fixed, axis=1, keepdims=True)
    # In integers: step floor(r T / n) reveals rank r, at most ceil(n / T) each.
    step = reveal.scale_rank(rank, num_steps, num_free, num_steps, length)
    is_before = step[:, :, None] < jnp.arange(num_steps)[None, None]
    revealed = jnp.sum(is_before & ~canvas.fixed[:, :, None], axis=1)
    # As in training, the share of masks is of the whole row, prompt included.
    plan = reveal.Plan(step, (num_free - revealed) / length)
    num_slots = -(-length // num_steps)
    return reveal.sample_plan(
      draw_keys, canvas, plan, denoise, self.draw, num_slots
    )
