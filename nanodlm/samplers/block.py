"""Block by block sampling of a block-diffusion model."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.samplers import reveal
from nanodlm.types import (
  CachedDenoise,
  Canvas,
  InputError,
  ReverseRule,
  Sampler,
  Samples,
)

NO_EOS = -1


class _State(NamedTuple):
  """What the loop over blocks carries: tokens [B, C], rows done [B]."""

  tokens: jax.Array
  cache: Any
  block: jax.Array
  done: jax.Array
  num_calls: jax.Array


@dataclasses.dataclass(frozen=True)
class Block(Sampler):
  """Fills blocks from left to right, each by a masked sampler.

  A block sees the finished ones as clean text. Their keys and values are computed
  once, from the finished block, and cached: exact, as no clean position ever sees
  a later or a noisy one. The canvas may be longer than the training texts. Source:
  BD3-LM, arXiv 2503.09573, algorithm 2.

  `num_calls` counts the inner sampler's calls and, with the cache, one more for
  each finished block; each of them is on the S tokens of a block.

  Attributes:
    inner: the sampler of one block, [B, S]; its steps are per block.
    block_size: S, the model's.
    mask_id: the mask's id.
    cache: whether finished blocks are cached. Without it each call runs the whole
      canvas: the same tokens (up to float rounding), slower.
    eos_id: a row that has drawn this token is done: all free positions after it
      become this token. NO_EOS: rows are always filled.
  """

  inner: Sampler
  block_size: int
  mask_id: int
  cache: bool = True
  eos_id: int = NO_EOS

  def __post_init__(self):
    if self.block_size < 1:
      raise InputError(f'block_size={self.block_size!r} must be >= 1')

  def with_rule(self, rule: ReverseRule) -> 'Block':
    return dataclasses.replace(self, inner=self.inner.with_rule(rule))

  def with_draw(self, draw: Any) -> 'Block':
    return dataclasses.replace(self, inner=self.inner.with_draw(draw))

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: CachedDenoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    # A last block that sticks out keeps its masks there.
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
    # Where all rows were done early.
    left = self._free_from(state.block, fixed)
    tokens = jnp.where(left, self._eos(tokens), state.tokens)
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
    own_tokens = jnp.where(
      done[:, None] & ~own.fixed, self._eos(tokens), own.tokens
    )
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
    """The cache with the finished block before `start`."""
    before = start - self.block_size
    visible = jnp.arange(tokens.shape[1]) < before
    return denoise.advance(cache, self._cut(tokens, before), before, visible)

  def _within(self, denoise, tokens, cache, start):
    """The `Denoise` of the block at `start`, whose canvas is [B, S]."""
    if not self.cache:
      return lambda part, level, positions: denoise(
        _paste(tokens, part, start), level, start + positions
      )
    visible = jnp.arange(tokens.shape[1]) < start
    return lambda part, level, positions: denoise.within(
      cache, part, start, level, positions, visible
    )[0]

  def _end(self, drawn, fixed, done):
    """A block [B, S] that ends where eos_id was drawn; and the rows done."""
    if self.eos_id == NO_EOS:
      return drawn, done
    eos = self._eos(drawn)
    is_eos = (drawn == eos) & ~fixed
    after = jnp.cumsum(is_eos, axis=1) - is_eos > 0
    return (
      jnp.where(after & ~fixed, eos, drawn),
      done | jnp.any(is_eos, axis=1),
    )

  def _free_from(self, block, fixed):
    """Which positions of `block` and those after it are free, [B, C]."""
    where = jnp.arange(fixed.shape[1])
    return ~fixed & (where >= block * self.block_size)[None]

  def _cut(self, x, start):
    return jax.lax.dynamic_slice_in_dim(x, start, self.block_size, axis=1)

  def _eos(self, tokens):
    return jnp.asarray(self.eos_id, tokens.dtype)


def _paste(x, block, start):
  return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis=1)
