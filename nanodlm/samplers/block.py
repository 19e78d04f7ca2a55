"""Block-by-block sampling of a block-diffusion model."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.samplers import base, reveal
from nanodlm.types import Canvas, InputError, Objective, Sampler, Samples

NO_EOS = -1


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

  def __call__(self, keys, canvas, denoise):
    length, size = canvas.tokens.shape[1], self.block_size
    # The canvas is extended to whole blocks by fixed masks.
    pad = ((0, 0), (0, -length % size))
    fixed = jnp.pad(canvas.fixed, pad, constant_values=True)
    tokens = jnp.pad(
      jnp.where(canvas.fixed, canvas.tokens, self.mask_id),
      pad,
      constant_values=self.mask_id,
    )
    where = jnp.arange(tokens.shape[1])
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
    paste = lambda x, part, start: jax.lax.dynamic_update_slice_in_dim(
      x, part, start, axis=1
    )
    free_from = lambda block: ~fixed & (where >= block * size)[None]

    def has_work(state):
      _, _, block, done, _ = state
      left = free_from(block)
      return sharding.on_any_device(jnp.any(left & ~done[:, None]))

    def fill(state):
      tokens, cache, block, done, num_calls = state
      start = block * size
      if self.cache:
        # The block before this one is finished.
        before = start - size
        extend = lambda cache: denoise.advance(
          cache, cut(tokens, before), before, where < before
        )
        cache = jax.lax.cond(block > 0, extend, lambda cache: cache, cache)
        num_calls += block > 0
        within = lambda part, level, positions: denoise.within(
          cache, part, start, level, positions, where < start
        )[0]
      else:
        within = lambda part, level, positions: denoise(
          paste(tokens, part, start), level, start + positions
        )
      is_given, part = cut(fixed, start), cut(tokens, start)
      part = jnp.where(done[:, None] & ~is_given, self.eos_id, part)
      own = Canvas(part, is_given | done[:, None])
      samples = self.inner(reveal.fold_in_each(keys, block), own, within)
      drawn, done = self._end(samples.tokens, is_given, done)
      num_calls += samples.num_calls
      return paste(tokens, drawn, start), cache, block + 1, done, num_calls

    cache = denoise.init_cache(tokens) if self.cache else ()
    zero, done = jnp.zeros_like(tokens[0, 0]), jnp.zeros_like(fixed[:, 0])
    state = (tokens, cache, zero, done, zero)
    tokens, _, block, _, num_calls = jax.lax.while_loop(has_work, fill, state)
    # Positions are left if all rows were done before the last block.
    tokens = jnp.where(free_from(block), self.eos_id, tokens)
    return Samples(tokens[:, :length], num_calls)

  def _end(self, drawn, fixed, done):
    """Ends a block [B, S] at the first eos_id; returns it and the rows done."""
    if self.eos_id == NO_EOS:
      return drawn, done
    is_eos = (drawn == self.eos_id) & ~fixed
    after = jnp.cumsum(is_eos, axis=1) - is_eos > 0
    drawn = jnp.where(after & ~fixed, self.eos_id, drawn)
    return drawn, done | jnp.any(is_eos, axis=1)
