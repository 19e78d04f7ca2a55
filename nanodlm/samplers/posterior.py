"""Posterior sampling: reverses any noise on a grid, then corrects the text."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical, times
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import (
  Canvas,
  InputError,
  Objective,
  ReverseRule,
  Sampler,
  Samples,
)

# Time given to the network when it corrects a finished text. It is slightly
# above 0, so that the network expects a few wrong tokens.
CORRECTION_TIME = 0.01


@dataclasses.dataclass(frozen=True)
class Posterior(Sampler):
  """Follows the objective's reverse process on a grid 1 = t_0 > ... > t_T = 0.

  Each step draws every free position independently from p(xs | xt), the
  posterior q(xs | xt, x0) averaged over the predicted x0. Source: D3PM, arXiv
  2107.03006. For masked noise, this is the law of `ancestral` on the training
  schedule. With an exact network, the law is exact as T grows.

  For noise that replaces tokens, self-correction can follow (GIDD, arXiv
  2503.04482): each step draws a candidate for every free position and accepts
  the most probable of the candidates that differ from the text. A row without
  such a candidate is finished.

  Attributes:
    num_steps: T, the number of network calls; see `grid`.
    rule: the objective.
    grid: 'uniform', 'cosine' or a list of times; see `times.reverse_grid`.
    num_corrections: maximum number of correction steps, one call each.
  """

  draw: Draw
  num_steps: int
  rule: ReverseRule
  grid: str = 'uniform'
  num_corrections: int = 0

  fills_blocks = True
  remembers = True

  def __post_init__(self):
    times.check_grid(self.num_steps, self.grid)
    if self.num_corrections < 0:
      raise InputError(
        f'sampler.num_corrections={self.num_corrections!r} must be >= 0'
      )
    if self.num_corrections and not self.rule.can_correct:
      raise InputError(
        f'sampler.num_corrections={self.num_corrections!r} must be 0 for a '
        'network that predicts only masked tokens; those of uniform and hybrid '
        'noise can correct others'
      )

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return isinstance(objective, ReverseRule) and not objective.block_size

  def unread_keys(self) -> frozenset[str]:
    return frozenset({'num_steps'} if times.is_listed(self.grid) else ())

  def with_rule(self, rule: ReverseRule) -> 'Posterior':
    return dataclasses.replace(self, rule=rule)

  def times(self) -> jax.Array:
    """Returns the times of the steps, [T + 1], from 1 to 0."""
    return times.reverse_grid(self.num_steps, self.grid)

  def draw_step(
    self, keys: jax.Array, logits: jax.Array, xt: jax.Array, step: jax.Array
  ) -> jax.Array:
    """Draws a step's result [B, L]: keys [B], logits [B, L, V], xt [B, L]."""
    t, s = self.times()[step], self.times()[step + 1]
    log_p = self.rule.reverse(logits, xt, s, t, self.draw)
    return jax.vmap(categorical.sample_categorical)(keys, log_p)

  def __call__(self, keys, canvas, denoise):
    length = canvas.tokens.shape[1]
    prior_keys, step_keys, correction_keys = reveal.split_each(keys, 3)
    tokens = jnp.where(
      canvas.fixed, canvas.tokens, self.rule.sample_prior(prior_keys, length)
    )
    tokens, memory, num_steps = self._denoise(
      step_keys, canvas._replace(tokens=tokens), denoise
    )
    num_corrections = jnp.zeros_like(num_steps)
    if self.num_corrections:
      tokens, num_corrections = self._correct(
        correction_keys, Canvas(tokens, canvas.fixed, memory), denoise
      )
    return Samples(tokens=tokens, num_calls=num_steps + num_corrections)

  def _denoise(self, keys, canvas, denoise):
    tokens, fixed, memory = canvas.tokens, canvas.fixed, canvas.memory
    grid = self.times()
    num_steps = grid.size - 1
    positions = all_positions(tokens)
    free_share = jnp.mean(~fixed, axis=1)

    def body(state):
      step, tokens, memory = state
      level = self.rule.level_at(grid[step], free_share)
      logits, memory = reveal.ask(denoise, tokens, level, positions, memory)
      step_keys = reveal.fold_in_each(keys, step)
      drawn = self.draw_step(step_keys, logits, tokens, step)
      return step + 1, jnp.where(fixed, tokens, drawn), memory

    # A canvas without free positions takes no calls.
    has_work = sharding.on_any_device(jnp.any(~fixed))
    first = jnp.where(has_work, 0, num_steps)
    last, tokens, memory = jax.lax.while_loop(
      lambda state: state[0] < num_steps, body, (first, tokens, memory)
    )
    return tokens, memory, last - first

  def _correct(self, keys, canvas, denoise):
    tokens, fixed, memory = canvas.tokens, canvas.fixed, canvas.memory
    positions = all_positions(tokens)
    level = self.rule.level_at(
      jnp.float32(CORRECTION_TIME), jnp.mean(~fixed, axis=1)
    )

    def body(state):
      step, tokens, memory, is_open = state
      logits, memory = reveal.ask(denoise, tokens, level, positions, memory)
      candidate = self.draw.sample(reveal.fold_in_each(keys, step), logits)
      # The score ignores the temperature: at 0, all probabilities would be 1.
      log_p = categorical.log_prob(logits, self.draw.mask_id)
      score = jnp.take_along_axis(log_p, candidate[..., None], axis=-1)[..., 0]
      differs = ~fixed & (candidate != tokens)
      best = jnp.argmax(jnp.where(differs, score, -jnp.inf), axis=1)
      is_open &= jnp.any(differs, axis=1)
      accept = is_open[:, None] & (positions == best[:, None])
      tokens = jnp.where(accept, candidate, tokens)
      return step + 1, tokens, memory, is_open

    is_open = jnp.any(~fixed, axis=1)
    step, tokens, _, _ = jax.lax.while_loop(
      lambda state: (
        (state[0] < self.num_corrections)
        & sharding.on_any_device(jnp.any(state[3]))
      ),
      body,
      (jnp.zeros_like(jnp.sum(is_open)), tokens, memory, is_open),
    )
    return tokens, step


def all_positions(tokens: jax.Array) -> jax.Array:
  """Returns the positions of all tokens [B, L], [B, L] int32."""
  return jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
  )
