"""The loop under every sampler whose reveal order does not depend on the logits.

Ancestral, fixed-count and first-hitting sampling of a masked model, and
left-to-right sampling, differ only in WHEN each position is revealed, and that
can be drawn before the network is called. So the plan is drawn first; then only
the positions being revealed are projected, and steps that reveal nothing cost
nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanodlm.categorical import Draw
from nanodlm.types import Canvas
from nanodlm.types import Denoise
from nanodlm.types import Samples


class Plan(NamedTuple):
  """When each position is revealed.

  Attributes:
    step: [B, L] int32, the step in 0..T-1 that reveals the position; anything
      where the canvas is fixed.
    level: [B, T] float32, the noise level told to the network at each step.
  """

  step: jax.Array
  level: jax.Array


def sample_plan(keys: jax.Array, canvas: Canvas, plan: Plan, denoise: Denoise,
                draw: Draw, num_slots: int) -> Samples:
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
  length = canvas.tokens.shape[1]
  num_slots = min(num_slots, length)
  num_steps = plan.level.shape[1]
  last = jnp.int32(num_steps)

  def next_step(hidden):
    return jnp.min(jnp.where(hidden, plan.step, last)).astype(jnp.int32)

  def reveal(state):
    tokens, context, hidden, step, part, num_calls = state
    pending = hidden & (plan.step == step)
    # Stable, so the pending positions come first, from left to right.
    positions = jnp.argsort(~pending, axis=1, stable=True)[:, :num_slots]
    is_pending = jnp.take_along_axis(pending, positions, axis=1)
    level = jax.lax.dynamic_index_in_dim(plan.level, step, 1, keepdims=False)
    logits = denoise(context, level, positions.astype(jnp.int32))
    draw_keys = jax.vmap(lambda key: jax.random.fold_in(
        jax.random.fold_in(key, step), part))(keys)
    drawn = draw.sample(draw_keys, logits)
    row = jnp.arange(tokens.shape[0])[:, None]
    drawn = jnp.where(is_pending, drawn, tokens[row, positions])
    tokens = tokens.at[row, positions].set(drawn)
    hidden = hidden.at[row, positions].min(~is_pending)
    following = next_step(hidden)
    is_same = following == step
    return (tokens, jnp.where(is_same, context, tokens), hidden, following,
            jnp.where(is_same, part + 1, 0), num_calls + 1)

  hidden = ~canvas.fixed
  tokens = jnp.where(hidden, draw.mask_id, canvas.tokens)
  zero = jnp.zeros_like(next_step(hidden))
  state = (tokens, tokens, hidden, next_step(hidden), zero, zero)
  state = jax.lax.while_loop(lambda state: state[3] < last, reveal, state)
  return Samples(tokens=state[0], num_calls=state[-1])
