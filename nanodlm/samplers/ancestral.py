"""Ancestral sampling of a masked model, on any schedule and grid."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import schedules, times
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import Canvas, Denoise, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
  """Follows the reverse process over a grid of times 1 = t_0 > ... > t_T = 0.

  In the step from t to s each masked position is revealed with probability
  (alpha_s - alpha_t) / (1 - alpha_t), independently (MDLM, arXiv 2406.07524,
  equation 6). Over the whole grid position i is therefore revealed in step j
  with probability alpha_{j+1} - alpha_j, whatever the network says: that is
  drawn first. Exact as T grows; at finite T the tokens of one step are drawn
  independently of each other.

  Attributes:
    draw: how tokens are drawn.
    num_steps: T; see `grid`.
    schedule: alpha(t) of the reverse process; need not be the training's.
    grid: 'uniform', 'cosine' or the times; see `times.reverse_grid`.
  """

  draw: Draw
  num_steps: int
  schedule: schedules.Schedule = schedules.Linear()
  grid: str = 'uniform'

  def __post_init__(self):
    times.check_grid(self.num_steps, self.grid)

  def noise_levels(self) -> jax.Array:
    """1 - alpha at t_0 .. t_T, [T + 1], from exactly 1 to exactly 0."""
    return schedules.noise_levels(
      self.schedule, times.reverse_grid(self.num_steps, self.grid)
    )

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    noise = self.noise_levels()
    plan_keys, draw_keys = jax.vmap(lambda key: tuple(jax.random.split(key)))(
      keys
    )
    u = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(plan_keys)
    # Revealed in the first step j with u >= noise_{j+1}; noise_T = 0, so always.
    step = jnp.searchsorted(-noise[1:], -u).astype(jnp.int32)
    # The expected masked share of the whole row, prompt included, as in training.
    free_share = jnp.mean(~canvas.fixed, axis=1, keepdims=True)
    plan = reveal.Plan(step, free_share * noise[None, :-1])
    return reveal.sample_plan(
      draw_keys, canvas, plan, denoise, self.draw, self._num_slots(length)
    )

  def _num_slots(self, length: int) -> int:
    with jax.ensure_compile_time_eval():
      noise = self.noise_levels()
      mean = length * float(jnp.max(noise[:-1] - noise[1:]))
    return reveal.enough_slots(mean)
