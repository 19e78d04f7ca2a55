"""Block-by-block sampling of a block-diffusion model."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.samplers import base, reveal
from nanodlm.types import (
  CachedDenoise,
  Canvas,
  InputError,
  Objective,
  Sampler,
  Samples,
)

NO_EOS = -1


class _State(NamedTuple):
  """State of the loop over blocks: tokens [B, C], done [B]."""

  tokens: jax.Array
  cache: Any
  block: jax.Array
  done: jax.Array
  num_calls: jax.Array


@dataclasses.dataclass(frozen=True)
class Block(base.OuterSampler):
  """Fills blocks from left to right, each with a masked sampler.

  A block sees the finished blocks as clean text. Their keys and values are
  computed once and cached, which is exact, since clean positions do not attend
  to later or noisy ones. The canvas may be longer than the training texts.
  Source: BD3-LM, arXiv 2503.09573, algorithm 2.

  `num_calls` counts the calls of the inner sampler and, with the cache, one
  call per finished block. Each of them runs the S tokens of a block.

  Attributes:
    inner: the sampler of one block, [B, S]; its steps are per block.
    block_size: S of the model.
    mask_id: the mask's id.
    cache: whether to cache finished blocks. Without it, each call runs the
      whole canvas, with the same result up to float rounding.
    eos_id: a row that draws this token is done, and its remaining free
      positions become this token. With NO_EOS, rows are always filled.
  """

  inner: Sampler
  block_size: int
  mask_id: int
  cache: bool = True
  eos_id: int = NO_EOS

  def __post_init__(self):
    if self.block_size < 1:
      raise InputError(f'block_size={self.block_size!r} must be >= 1')

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return bool(objective.block_size)

  @property
  def needs_cache(self) -> bool:  # pyright: ignore
    return self.cache

  def max_calls(self, length: int) -> int:
    num_blocks = -(-length // self.block_size) + 1  # The first may be partial.
    return num_blocks * (self.inner.max_calls(self.block_size) + self.cache)

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: CachedDenoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    # The canvas is extended to whole blocks by fixed masks.
    pad = ((0, 0), (0, -length % self.block_size))
    fixed = jnp.pad(canvas.fixed, pad, constant_values=True)
    tokens = jnp.pad(
      jnp.where(canvas.fixed, canvas.tokens, self.mask_id),
      pad,
      constant_values=self.mask_id,
    )
    zero = jnp.zeros_like(tokens[0, 0])
    state = _State(
      tokens,
      denoise.init_cache(tokens) if self.cache else (),
      zero,
      jnp.zeros_like(fixed[:, 0]),
      zero,
    )

    def has_work(state):
      left = self._free_from(state.block, fixed)
      return sharding.on_any_device(jnp.any(left & ~state.done[:, None]))

    state = jax.lax.while_loop(
      has_work, lambda state: self._fill(keys, fixed, denoise, state), state
    )
    # Positions are left if all rows were done before the last block.
    left = self._free_from(state.block, fixed)
    tokens = jnp.where(left, self.eos_id, state.tokens)
    return Samples(tokens[:, :length], state.num_calls)

  def _fill(self, keys, fixed, denoise, state):
    """Draws the next block of all rows, [B, S]."""
    tokens, cache, block, done, num_calls = state
    start = block * self.block_size
    if self.cache:
      extend = lambda cache: self._extend(denoise, tokens, cache, start)
      cache = jax.lax.cond(block > 0, extend, lambda cache: cache, cache)
      num_calls += block > 0
    own = Canvas(self._cut(tokens, start), self._cut(fixed, start))
    own_tokens = jnp.where(done[:, None] & ~own.fixed, self.eos_id, own.tokens)
    samples = self.inner(
      reveal.fold_in_each(keys, block),
      Canvas(own_tokens, own.fixed | done[:, None]),
      self._within(denoise, tokens, cache, start),
    )
    drawn, done = self._end(samples.tokens, own.fixed, done)
    return _State(
      _paste(tokens, drawn, start),
      cache,
      block + 1,
      done,
      num_calls + samples.num_calls,
    )

  def _extend(self, denoise, tokens, cache, start):
    """Returns the cache, extended by the finished block before `start`."""
    before = start - self.block_size
    visible = jnp.arange(tokens.shape[1]) < before
    return denoise.advance(cache, self._cut(tokens, before), before, visible)

  def _within(self, denoise, tokens, cache, start):
    """Returns the `Denoise` of the block at `start`, with a canvas [B, S]."""
    if not self.cache:
      return lambda part, level, positions: denoise(
        _paste(tokens, part, start), level, start + positions
      )
    visible = jnp.arange(tokens.shape[1]) < start
    return lambda part, level, positions: denoise.within(
      cache, part, start, level, positions, visible
    )[0]

  def _end(self, drawn, fixed, done):
    """Ends a block [B, S] at the first eos_id; returns it and the rows done."""
    if self.eos_id == NO_EOS:
      return drawn, done
    is_eos = (drawn == self.eos_id) & ~fixed
    after = jnp.cumsum(is_eos, axis=1) - is_eos > 0
    drawn = jnp.where(after & ~fixed, self.eos_id, drawn)
    return drawn, done | jnp.any(is_eos, axis=1)

  def _free_from(self, block, fixed):
    """Returns which positions from `block` on are free, [B, C]."""
    where = jnp.arange(fixed.shape[1])
    return ~fixed & (where >= block * self.block_size)[None]

  def _cut(self, x, start):
    return jax.lax.dynamic_slice_in_dim(x, start, self.block_size, axis=1)


def _paste(x, block, start):
  return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis=1)
