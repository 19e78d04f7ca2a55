"""Ancestral sampling of a masked model, on any schedule and grid."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import schedules, times
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import base, reveal


@dataclasses.dataclass(frozen=True)
class Ancestral(base.MaskedSampler):
  """Follows the reverse process over a grid of times 1 = t_0 > ... > t_T = 0.

  The step from t to s reveals each masked position independently with
  probability (alpha_s - alpha_t) / (1 - alpha_t). Source: MDLM, arXiv
  2406.07524, equation 6. Hence step j reveals a position with marginal
  probability alpha_{j+1} - alpha_j, regardless of the network, and the step of
  each position can be drawn in advance. The law is exact as T grows; at finite
  T, the tokens of one step are drawn independently of each other.

  A step in which a text reveals more tokens than a call projects takes another
  call, for the whole batch. This happens to a text once in 10^4 steps, hence to
  a batch of 4,096 texts in 3 of 10 steps and to 16,384 texts in 7 of 10. The
  number of projected tokens does not depend on the batch, since the tokens of a
  text would depend on the other texts then.

  Attributes:
    num_steps: T; see `grid`.
    schedule: alpha(t) of the reverse process; may differ from training.
    grid: 'uniform', 'cosine' or a list of times; see `times.reverse_grid`.
  """

  draw: Draw
  num_steps: int
  schedule: schedules.Schedule = schedules.Linear()
  grid: str = 'uniform'

  def __post_init__(self):
    times.check_grid(self.num_steps, self.grid)

  def noise_levels(self) -> jax.Array:
    """Returns 1 - alpha at t_0 .. t_T, [T + 1], from exactly 1 to exactly 0."""
    return schedules.noise_levels(
      self.schedule, times.reverse_grid(self.num_steps, self.grid)
    )

  def unread_keys(self) -> frozenset[str]:
    return frozenset({'num_steps'} if times.is_listed(self.grid) else ())

  def __call__(self, keys, canvas, denoise):
    length = canvas.tokens.shape[1]
    noise = self.noise_levels()
    plan_keys, draw_keys = reveal.split_each(keys)
    u = reveal.uniform_each(plan_keys, length)
    # The first step j with u >= noise_{j+1} reveals; noise_T = 0, so one does.
    step = jnp.searchsorted(-noise[1:], -u).astype(jnp.int32)
    # As in training, the share of masks is of the whole row, prompt included.
    free_share = jnp.mean(~canvas.fixed, axis=1, keepdims=True)
    plan = reveal.Plan(step, free_share * noise[None, :-1])
    with jax.ensure_compile_time_eval():
      noise = self.noise_levels()
      num_slots = reveal.enough_slots(length, noise[:-1] - noise[1:])
    return reveal.sample_plan(
      draw_keys, canvas, plan, denoise, self.draw, num_slots
    )
