"""Posterior sampling: any noise is undone on a grid, then corrected."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical, times
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import (
  Canvas,
  Denoise,
  InputError,
  ReverseRule,
  Sampler,
  Samples,
)

# The time told to the network when it corrects a finished text: near 0, with a
# little noise left, so that a wrong token here and there is what it expects.
CORRECTION_TIME = 0.01


@dataclasses.dataclass(frozen=True)
class Posterior(Sampler):
  """Walks a grid 1 = t_0 > ... > t_T = 0 with the objective's own rule.

  In each step every free position is drawn from p(xs | xt), independently of
  the others: the posterior q(xs | xt, x0) averaged over the prediction
  (D3PM, arXiv 2107.03006; for masked noise the law of `ancestral` on the
  training's schedule). Exact as T grows, where the network is.

  Afterwards, for noise that replaces tokens, self-correction (GIDD, arXiv
  2503.04482): each step draws a candidate for every free position and accepts
  one, of those that differ from the text the most probable. A row in which none
  differs is finished.

  Attributes:
    draw: how tokens are drawn from the network's prediction.
    num_steps: T, network calls; see `grid`.
    rule: the objective.
    grid: 'uniform', 'cosine' or the times; see `times.reverse_grid`.
    num_corrections: steps of self-correction at most, a network call each.
  """

  draw: Draw
  num_steps: int
  rule: ReverseRule
  grid: str = 'uniform'
  num_corrections: int = 0

  def __post_init__(self):
    times.check_grid(self.num_steps, self.grid)
    if self.num_corrections < 0:
      raise InputError(
        f'sampler.num_corrections={self.num_corrections!r} must be >= 0'
      )
    if self.num_corrections and not self.rule.can_correct:
      raise InputError(
        f'sampler.num_corrections={self.num_corrections!r} must be 0 for a '
        'network that predicts masked tokens only: it cannot judge the '
        "others; objective.name='uniform' and 'hybrid' can"
      )

  def with_rule(self, rule: ReverseRule) -> 'Posterior':
    return dataclasses.replace(self, rule=rule)

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    prior_keys, step_keys, correction_keys = jax.vmap(
      lambda key: tuple(jax.random.split(key, 3))
    )(keys)
    tokens = jnp.where(
      canvas.fixed, canvas.tokens, self.rule.sample_prior(prior_keys, length)
    )
    tokens, num_steps = self._denoise(step_keys, tokens, canvas.fixed, denoise)
    num_corrections = jnp.zeros_like(num_steps)
    if self.num_corrections:
      tokens, num_corrections = self._correct(
        correction_keys, tokens, canvas.fixed, denoise
      )
    return Samples(tokens=tokens, num_calls=num_steps + num_corrections)

  def _denoise(self, keys, tokens, fixed, denoise):
    """From noise to tokens [B, L]; and the number of calls."""
    grid = times.reverse_grid(self.num_steps, self.grid)
    num_steps = grid.size - 1
    positions = _all_positions(tokens)
    free_share = jnp.mean(~fixed, axis=1)

    def body(state):
      step, tokens = state
      t, s = grid[step], grid[step + 1]
      logits = denoise(tokens, self.rule.level_at(t, free_share), positions)
      log_p = self.rule.reverse(logits, tokens, s, t, self.draw)
      drawn = jax.vmap(categorical.sample_categorical)(
        reveal.fold_in_each(keys, step), log_p
      )
      return step + 1, jnp.where(fixed, tokens, drawn)

    # Nothing to do is no call.
    has_work = sharding.on_any_device(jnp.any(~fixed))
    first = jnp.where(has_work, 0, num_steps)
    last, tokens = jax.lax.while_loop(
      lambda state: state[0] < num_steps, body, (first, tokens)
    )
    return tokens, last - first

  def _correct(self, keys, tokens, fixed, denoise):
    """Corrected tokens [B, L]; and the number of calls."""
    positions = _all_positions(tokens)
    level = self.rule.level_at(
      jnp.float32(CORRECTION_TIME), jnp.mean(~fixed, axis=1)
    )

    def body(state):
      step, tokens, is_open = state
      logits = denoise(tokens, level, positions)
      candidate = self.draw.sample(reveal.fold_in_each(keys, step), logits)
      # The network's own probability: after temperature 0 all would be 1.
      log_p = categorical.log_prob(logits, self.draw.mask_id)
      score = jnp.take_along_axis(log_p, candidate[..., None], axis=-1)[..., 0]
      differs = ~fixed & (candidate != tokens)
      best = jnp.argmax(jnp.where(differs, score, -jnp.inf), axis=1)
      is_open &= jnp.any(differs, axis=1)
      accept = is_open[:, None] & (positions == best[:, None])
      return step + 1, jnp.where(accept, candidate, tokens), is_open

    is_open = jnp.any(~fixed, axis=1)
    step, tokens, _ = jax.lax.while_loop(
      lambda state: (
        (state[0] < self.num_corrections)
        & sharding.on_any_device(jnp.any(state[2]))
      ),
      body,
      (jnp.zeros_like(jnp.sum(is_open)), tokens, is_open),
    )
    return tokens, step


def _all_positions(tokens):
  return jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
  )
