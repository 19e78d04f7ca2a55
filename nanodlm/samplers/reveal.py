"""The loops under samplers that choose positions before they call the network.

Ancestral, fixed-count and first-hitting sampling of a masked model, and
left-to-right sampling, differ only in WHEN each position is revealed, and that
can be drawn before the network is called (`sample_plan`). Remasking decides
step by step, but still before each call (`draw_pending`). So only the positions
being revealed are projected, and steps that reveal nothing cost nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical
from nanodlm.noise.categorical import Draw
from nanodlm.types import Canvas, Denoise, Samples


class Plan(NamedTuple):
  """When each position is revealed.

  Attributes:
    step: [B, L] int32, the step in 0..T-1 that reveals the position; anything
      where the canvas is fixed.
    level: [B, T] float32, the noise level told to the network at each step.
  """

  step: jax.Array
  level: jax.Array


def sample_plan(
  keys: jax.Array,
  canvas: Canvas,
  plan: Plan,
  denoise: Denoise,
  draw: Draw,
  num_slots: int,
) -> Samples:
  """Reveals the canvas step by step.

  All positions of one step are drawn independently given the tokens as they
  were before the step. A row with more than `num_slots` of them in a step takes
  further calls on the same tokens, so the law is exact for any `num_slots`.

  Args:
    keys: [B].
    canvas: tokens and fixed, [B, L].
    plan: the order; the sampler's whole identity.
    denoise: the network.
    draw: how a token is drawn from its logits.
    num_slots: positions of a row projected by one call.

  Returns:
    tokens [B, L]; num_calls at most T unless a step overflows `num_slots`.
  """
  last = jnp.int32(plan.level.shape[1])

  def next_step(hidden):
    return jnp.min(jnp.where(hidden, plan.step, last)).astype(jnp.int32)

  def reveal(state):
    tokens, hidden, step, num_calls = state
    pending = hidden & (plan.step == step)
    level = jax.lax.dynamic_index_in_dim(plan.level, step, 1, keepdims=False)
    tokens, _, calls = draw_pending(
      fold_in_each(keys, step), tokens, pending, level, denoise, draw, num_slots
    )
    hidden = hidden & ~pending
    return tokens, hidden, next_step(hidden), num_calls + calls

  hidden = ~canvas.fixed
  tokens = jnp.where(hidden, draw.mask_id, canvas.tokens)
  step = next_step(hidden)
  state = (tokens, hidden, step, jnp.zeros_like(step))
  state = jax.lax.while_loop(
    lambda state: sharding.on_any_device(state[2] < last), reveal, state
  )
  return Samples(tokens=state[0], num_calls=state[-1])


def draw_pending(
  keys: jax.Array,
  tokens: jax.Array,
  pending: jax.Array,
  level: jax.Array,
  denoise: Denoise,
  draw: Draw,
  num_slots: int,
  prob: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """Draws the pending positions, independently of each other given `tokens`.

  As many calls as the fullest row needs, all on the same tokens; none where
  nothing is pending.

  Args:
    keys: [B].
    tokens: [B, L], what the network sees.
    pending: [B, L] bool.
    level: [B], the noise level told to the network.
    denoise: the network.
    draw: how a token is drawn from its logits.
    num_slots: positions of a row projected by one call.
    prob: [B, L] or None; where a token is drawn it becomes the network's
      probability of it.

  Returns:
    tokens [B, L] and prob with the pending positions replaced, and the number
    of calls [] int32.
  """
  num_slots = min(num_slots, tokens.shape[1])
  row = jnp.arange(tokens.shape[0])[:, None]

  def call(state):
    drawn, prob, pending, num_calls = state
    # Stable, so the pending positions come first, from left to right.
    positions = jnp.argsort(~pending, axis=1, stable=True)[:, :num_slots]
    is_pending = jnp.take_along_axis(pending, positions, axis=1)
    logits = denoise(tokens, level, positions.astype(jnp.int32))
    new = draw.sample(fold_in_each(keys, num_calls), logits)
    if prob is not None:
      new_prob = categorical.prob_of(logits, new, draw.mask_id)
      new_prob = jnp.where(is_pending, new_prob, prob[row, positions])
      prob = prob.at[row, positions].set(new_prob)
    new = jnp.where(is_pending, new, drawn[row, positions])
    drawn = drawn.at[row, positions].set(new)
    pending = pending.at[row, positions].min(~is_pending)
    return drawn, prob, pending, num_calls + 1

  # From the data, so that under shard_map it varies over devices as they do.
  zero = jnp.sum(pending, dtype=jnp.int32) * 0
  drawn, prob, _, num_calls = jax.lax.while_loop(
    lambda state: sharding.on_any_device(jnp.any(state[2])),
    call,
    (tokens, prob, pending, zero),
  )
  return drawn, prob, num_calls


def fold_in_each(keys: jax.Array, data: jax.Array) -> jax.Array:
  """fold_in(key, data) of each of [B] keys."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def enough_slots(mean: float) -> int:
  """Slots that a step with `mean` expected reveals overflows once in 10^4."""
  return int(mean + 4 * mean**0.5 + 1)  # mean + 4 deviations
