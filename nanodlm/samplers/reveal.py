"""Loops of samplers that choose positions before they call the network.

Ancestral, fixed-count, first-hitting and left-to-right sampling differ only in
WHEN each position is revealed, which can be drawn before the first network call
(`sample_plan`). Remasking chooses the positions of each step before its call
(`draw_pending`). Hence only the revealed positions are projected, and steps
that reveal no position take no call.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical
from nanodlm.noise.categorical import Draw
from nanodlm.types import Canvas, Denoise, InputError, Samples


class Plan(NamedTuple):
  """The step that reveals each position.

  Attributes:
    step: [B, L] int32 in 0..T-1; ignored if the position is fixed.
    level: [B, T] float32, the noise level given to the network at each step.
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

  The positions of one step are drawn independently, given the tokens before the
  step. A row with more than `num_slots` positions in a step takes further calls
  on the same tokens, so the law does not depend on `num_slots`.

  Args:
    keys: [B].
    canvas: tokens and fixed, [B, L].
    plan: the steps, which define the sampler.
    denoise: the network.
    draw: how a token is drawn from its logits.
    num_slots: number of positions per row that one call projects.

  Returns:
    Samples with num_calls <= T, unless a step overflows `num_slots`.
  """
  last = jnp.int32(plan.level.shape[1])

  def next_step(hidden):
    return jnp.min(jnp.where(hidden, plan.step, last)).astype(jnp.int32)

  def reveal(state):
    tokens, memory, hidden, step, num_calls = state
    pending = hidden & (plan.step == step)
    level = jax.lax.dynamic_index_in_dim(plan.level, step, 1, keepdims=False)
    tokens, memory, _, calls = draw_pending(
      fold_in_each(keys, step),
      tokens,
      pending,
      level,
      denoise,
      draw,
      num_slots,
      memory,
    )
    hidden = hidden & ~pending
    return tokens, memory, hidden, next_step(hidden), num_calls + calls

  hidden = ~canvas.fixed
  tokens = jnp.where(hidden, draw.mask_id, canvas.tokens)
  step = next_step(hidden)
  state = (tokens, canvas.memory, hidden, step, jnp.zeros_like(step))
  state = jax.lax.while_loop(
    lambda state: sharding.on_any_device(state[3] < last), reveal, state
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
  memory: Any = None,
  prob: jax.Array | None = None,
) -> tuple[jax.Array, Any, jax.Array | None, jax.Array]:
  """Draws the pending positions independently of each other, given `tokens`.

  The number of calls is that of the row with the most pending positions.

  Args:
    keys: [B].
    tokens: [B, L], the network's input in all calls.
    pending: [B, L] bool.
    level: [B], the noise level given to the network.
    denoise: the network.
    draw: how a token is drawn from its logits.
    num_slots: number of positions per row that one call projects.
    memory: what `ask` takes.
    prob: [B, L] float32 or None, the network's probability of each token;
      updated at the drawn positions.

  Returns:
    tokens with the pending positions replaced, the memory, which is new in rows
    with pending positions, likewise prob, and the number of calls [] int32.
  """
  num_slots = min(num_slots, tokens.shape[1])
  row = jnp.arange(tokens.shape[0])[:, None]

  def call(state):
    drawn, new_memory, prob, pending, num_calls = state
    # The sort is stable: pending positions come first, from left to right.
    positions = jnp.argsort(~pending, axis=1, stable=True)[:, :num_slots]
    is_pending = jnp.take_along_axis(pending, positions, axis=1)
    # A row without pending positions must not depend on the others' calls.
    logits, made = ask(
      denoise, tokens, level, positions.astype(jnp.int32), memory
    )
    is_asked = jnp.any(is_pending, axis=1)
    new_memory = keep(is_asked, made, new_memory)
    new = draw.sample(fold_in_each(keys, num_calls), logits)
    if prob is not None:
      new_prob = categorical.prob_of(logits, new, draw.mask_id)
      new_prob = jnp.where(is_pending, new_prob, prob[row, positions])
      prob = prob.at[row, positions].set(new_prob)
    new = jnp.where(is_pending, new, drawn[row, positions])
    drawn = drawn.at[row, positions].set(new)
    pending = pending.at[row, positions].min(~is_pending)
    return drawn, new_memory, prob, pending, num_calls + 1

  # Under shard_map, this zero varies over devices as the tokens do.
  zero = jnp.zeros_like(tokens[0, 0])
  drawn, memory, prob, _, num_calls = jax.lax.while_loop(
    lambda state: sharding.on_any_device(jnp.any(state[3])),
    call,
    (tokens, memory, prob, pending, zero),
  )
  return drawn, memory, prob, num_calls


def scale_rank(
  rank: Any, total: Any, num: Any, max_total: int, max_num: int
) -> jax.Array:
  """Returns floor(rank * total / num), int32, also if the product is larger.

  Args:
    rank: 0 to `num`, any shape.
    total: any integers >= 0.
    num: any integers >= 0; 0 counts as 1.
    max_total: the largest `total`.
    max_num: the largest `num`.

  Raises:
    InputError: both limits are 65,536 or more, so that 32 bits do not suffice.
  """
  if min(max_total, max_num) * max_num >= 1 << 32:
    raise InputError(
      f'sampler.num_steps and the length of the canvas, {max_total} and '
      f'{max_num}, are too large for this sampler; one must be below 65536'
    )
  rank, total, num = (
    jnp.asarray(x).astype(jnp.uint32) for x in (rank, total, num)
  )
  num = jnp.maximum(num, 1)
  return (total // num * rank + total % num * rank // num).astype(jnp.int32)


def calls_of(denoise: Any) -> int:
  """Returns `CachedDenoise.calls`, which is 1 of a plain function."""
  return getattr(denoise, 'calls', 1)


def ask(
  denoise: Any,
  tokens: jax.Array,
  level: jax.Array,
  positions: jax.Array,
  memory: Any,
) -> tuple[jax.Array, Any]:
  """Calls a network, which may remember its last prediction.

  Args:
    denoise: a `types.CachedDenoise`; a `types.Denoise` if memory is None.
    tokens: [B, L].
    level: [B].
    positions: [B, K].
    memory: of the call before, at first `Canvas.memory`.

  Returns:
    Logits [B, K, V], and the memory, None if it was None.
  """
  if memory is None:
    return denoise(tokens, level, positions), None
  return denoise.recall(tokens, level, positions, memory)


def keep(where: jax.Array, new: Any, old: Any) -> Any:
  """Returns the memory `new` in rows `where` [B], and `old` in others."""

  def pick(new, old):
    rows = where.reshape(-1, *(1,) * (new.ndim - 1))
    return jnp.where(rows, new, old)

  return jax.tree.map(pick, new, old)


def end_texts(
  tokens: jax.Array, fixed: jax.Array, eos_ids: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Ends each row [B, L] that is filled from left to right.

  The text ends at the first free EOS. One at the start of a blank canvas begins
  the text instead.

  Returns:
    Tokens, with eos_ids[0] in all free positions after the end, and [B] bool,
    whether each row has ended.
  """
  ends, is_after = find_ends(tokens, fixed, eos_ids)
  tokens = jnp.where(is_after & ~fixed, (*eos_ids, 0)[0], tokens)
  return tokens, jnp.any(ends, axis=1)


def find_ends(
  tokens: jax.Array, fixed: jax.Array, eos_ids: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns which tokens [B, L] can end a text, and which follow one of them.

  See `end_texts`.
  """
  is_eos = jnp.zeros_like(fixed)
  for eos_id in eos_ids:
    is_eos |= tokens == eos_id
  has_begun = jnp.cumsum(~is_eos | fixed, axis=1) > 0
  ends = is_eos & ~fixed & has_begun
  return ends, jnp.cumsum(ends, axis=1) - ends > 0


def fold_in_each(keys: jax.Array, data: jax.Array | int) -> jax.Array:
  """Returns fold_in(key, data) for each of [B] keys."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def split_each(keys: jax.Array, num: int = 2) -> tuple[jax.Array, ...]:
  """Splits each of [B] keys; returns `num` arrays of [B] keys."""
  return jax.vmap(lambda key: tuple(jax.random.split(key, num)))(keys)


def uniform_each(keys: jax.Array, length: int) -> jax.Array:
  """Draws U[0, 1) with each of [B] keys, [B, length]."""
  return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)


def enough_slots(length: int, shares: jax.Array) -> int:
  """Returns a number of slots that few rows exceed.

  It is four standard deviations above the mean number of reveals of the largest
  step, and a row exceeds it once in 10^4. `shares` are the expected reveals of
  each step, as shares of `length`.
  """
  mean = length * float(jnp.max(shares))
  return int(mean + 4 * mean**0.5 + 1)
