"""Left-to-right sampling of an autoregressive model."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm import reveal
from nanodlm.categorical import Draw
from nanodlm.types import Canvas
from nanodlm.types import Denoise
from nanodlm.types import Samples


@dataclasses.dataclass(frozen=True)
class LeftToRight:
  """Draws the free positions from left to right, one per call; exact.

  The causal network sees nothing to the right of the position it draws, so the
  free positions should be the end of the canvas (`sample.py` refuses others).

  Attributes:
    draw: how tokens are drawn.
  """

  draw: Draw

  def __call__(self, keys: jax.Array, canvas: Canvas, denoise: Denoise
               ) -> Samples:
    free = ~canvas.fixed
    plan = reveal.Plan(step=jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1,
                       level=jnp.ones(free.shape))
    return reveal.sample_plan(keys, canvas, plan, denoise, self.draw, num_slots=1)
