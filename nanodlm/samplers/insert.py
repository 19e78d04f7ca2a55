"""Insertion: fills gaps of any length by inserting masks and revealing them."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical, times
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import posterior, reveal
from nanodlm.types import InsertRule, Objective, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class Insert(Sampler):
  """Follows the reverse process of FlexMDM over 1 = t_0 > ... > t_T = 0.

  A step from t to s reveals each mask with probability 1 - s / t, and inserts a
  Poisson number of masks in each gap, on average 1 - s / t times the number of
  tokens that are absent there. Masks that the last step inserts are revealed in
  one more call. The law is exact as T grows. Source: FlexMDM, arXiv 2509.01025.
  Differs from the released code: the last step draws its tokens and inserts
  those that are still absent; if a gap has less room than a step would insert,
  only the rest is left out, and only in this row.

  Free positions that hold the last token of the row are room for what is
  inserted. The text of each gap begins where the gap does.

  Attributes:
    num_steps: T.
    rule: the objective.
    grid: 'uniform', 'cosine' or a list of times; see `times.reverse_grid`.
  """

  draw: Draw
  num_steps: int
  rule: InsertRule
  grid: str = 'uniform'

  fills_masks = False
  fills_room = True

  def __post_init__(self):
    times.check_grid(self.num_steps, self.grid)

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return isinstance(objective, InsertRule)

  def unread_keys(self) -> frozenset[str]:
    return frozenset({'num_steps'} if times.is_listed(self.grid) else ())

  def with_rule(self, rule: InsertRule) -> 'Insert':
    return dataclasses.replace(self, rule=rule)

  def __call__(self, keys, canvas, denoise):
    free, mask_id = ~canvas.fixed, self.draw.mask_id
    grid = times.reverse_grid(self.num_steps, self.grid)
    num_steps = grid.size - 1
    positions = posterior.all_positions(canvas.tokens)
    last = canvas.tokens[:, -1:]

    def body(state):
      tokens, step = state
      t = grid[jnp.minimum(step, num_steps - 1)]
      share = 1 - grid[jnp.minimum(step + 1, num_steps)] / t
      logits = denoise(tokens, jnp.full(len(tokens), t), positions)
      step_keys = reveal.fold_in_each(keys, step)
      draw_keys, when_keys, count_keys = reveal.split_each(step_keys, 3)
      # No mask stands for the token that room holds.
      is_room = jnp.arange(logits.shape[-1])[None, None] == last[..., None]
      new = self.draw.sample(
        draw_keys, jnp.where(is_room, categorical.NEG_INF, logits)
      )
      when = reveal.uniform_each(when_keys, tokens.shape[1])
      shown = (tokens == mask_id) & free & (when < share)
      mean = self.rule.num_absent(
        logits, jnp.full(tokens.shape, t)
      ) * jnp.where(step < num_steps, share, 0)
      mean = jnp.where(ends_gap(tokens, free, mask_id), mean, 0.0)
      count = _poisson(count_keys, mean)
      tokens = jnp.where(shown, new, tokens)
      return insert(tokens, free, count, mask_id), step + 1

    def goes_on(state):
      tokens, step = state
      is_open = free & ((step < num_steps) | (tokens == mask_id))
      return sharding.on_any_device(jnp.any(is_open))

    tokens = jnp.where(free, last, canvas.tokens)
    zero = jnp.zeros_like(tokens[0, 0])
    tokens, step = jax.lax.while_loop(goes_on, body, (tokens, zero))
    return Samples(tokens=tokens, num_calls=step * reveal.calls_of(denoise))


def _poisson(keys: jax.Array, mean: jax.Array) -> jax.Array:
  """Draws the points in L adjacent intervals of each row, [B, L] int32.

  The first L points of a Poisson process, which `mean` [B, L] divides.
  """
  waits = jax.vmap(lambda key: jax.random.exponential(key, mean.shape[1:]))(
    keys
  )
  points = jnp.cumsum(waits, axis=1)
  num = jax.vmap(jnp.searchsorted)(points, jnp.cumsum(mean, axis=1))
  return jnp.diff(num, axis=1, prepend=0)


def ends_gap(tokens: jax.Array, free: jax.Array, mask_id: int) -> jax.Array:
  """Returns which tokens of a canvas [B, L] end a gap that is open, bool."""
  length = tokens.shape[1]
  after_free = jnp.pad(free, ((0, 0), (1, 0)))[:, :length]
  # The last position stands for the end of the text.
  is_text = tokens != tokens[:, -1:]
  is_text |= jnp.arange(length)[None] == length - 1
  return is_text & (tokens != mask_id) & (free | after_free)


def run_starts(free: jax.Array) -> jax.Array:
  """Returns where the run of equal values of each position begins, [B, L]."""
  begins = jnp.pad(free[:, 1:] != free[:, :-1], ((0, 0), (1, 0)))
  place = jnp.arange(free.shape[1])[None]
  return jax.lax.cummax(jnp.where(begins, place, 0), axis=1)


def insert(
  tokens: jax.Array, free: jax.Array, count: jax.Array, mask_id: int
) -> jax.Array:
  """Inserts masks before tokens of a canvas, up to the room there.

  Args:
    tokens: [B, L] int32; in each run of free positions, its tokens come first,
      then its room, which holds the last token of the row.
    free: [B, L] bool.
    count: [B, L] int32, the number of masks to insert before each token, and of
      a fixed one after the free positions before it.
    mask_id: the mask's id.

  Returns:
    [B, L] int32.
  """
  num_rows, length = tokens.shape
  row, place = jnp.arange(num_rows)[:, None], jnp.arange(length)[None]
  room = free & (tokens == tokens[:, -1:])
  start = run_starts(free)
  in_run = lambda x: jnp.zeros_like(tokens).at[row, start].add(x)[row, start]
  capacity = in_run(room.astype(tokens.dtype))
  count = count.astype(tokens.dtype)
  own = jnp.where(free, count, 0)
  # What is inserted before a fixed token belongs to the run that ends there.
  at_end = jnp.pad(jnp.where(free, 0, count), ((0, 0), (0, 1)))[:, 1:]
  total = jnp.cumsum(own, axis=1)
  moved = total - jnp.take_along_axis(total - own, start, axis=1)
  num_new = jnp.minimum(in_run(own + jnp.where(free, at_end, 0)), capacity)
  num_text = in_run((free & ~room).astype(tokens.dtype)) + num_new
  blank = jnp.where(place - start < num_text, mask_id, tokens[:, -1:])
  to = jnp.where(room, length, place + jnp.minimum(moved, capacity) * free)
  return jnp.where(free, blank, tokens).at[row, to].set(tokens, mode='drop')
