"""Block by block sampling of a block-diffusion model."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm import reveal
from nanodlm import sharding
from nanodlm.types import CachedDenoise
from nanodlm.types import Canvas
from nanodlm.types import InputError
from nanodlm.types import Sampler
from nanodlm.types import Samples

NO_EOS = -1


@dataclasses.dataclass(frozen=True)
class Block:
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

  def __call__(self, keys: jax.Array, canvas: Canvas, denoise: CachedDenoise
               ) -> Samples:
    size, length = self.block_size, canvas.tokens.shape[1]
    num_blocks = -(-length // size)
    # A last block that sticks out keeps its masks there.
    pad = ((0, 0), (0, num_blocks * size - length))
    fixed = jnp.pad(canvas.fixed, pad, constant_values=True)
    tokens = jnp.pad(jnp.where(canvas.fixed, canvas.tokens, self.mask_id), pad,
                     constant_values=self.mask_id)
    where = jnp.arange(num_blocks * size)
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    def paste(x, block, start):
      return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis=1)

    def body(state):
      tokens, cache, block, done, num_calls = state
      start = block * size
      visible = where < start
      if self.cache:
        def extend(cache):
          before = start - size
          return denoise.advance(cache, cut(tokens, before), before,
                                 where < before)
        cache = jax.lax.cond(block > 0, extend, lambda cache: cache, cache)
        num_calls += block > 0

        def within(part, level, positions):
          logits, _ = denoise.within(cache, part, start, level, positions,
                                     visible)
          return logits
      else:
        def within(part, level, positions):
          return denoise(paste(tokens, part, start), level, start + positions)

      own = Canvas(cut(tokens, start), cut(fixed, start))
      eos = jnp.asarray(self.eos_id, tokens.dtype)
      own_tokens = jnp.where(done[:, None] & ~own.fixed, eos, own.tokens)
      block_keys = reveal.fold_in_each(keys, block)
      samples = self.inner(
          block_keys, Canvas(own_tokens, own.fixed | done[:, None]), within)
      drawn = samples.tokens
      if self.eos_id != NO_EOS:
        is_eos = (drawn == eos) & ~own.fixed
        after = jnp.cumsum(is_eos, axis=1) - is_eos > 0
        drawn = jnp.where(after & ~own.fixed, eos, drawn)
        done = done | jnp.any(is_eos, axis=1)
      return (paste(tokens, drawn, start), cache, block + 1, done,
              num_calls + samples.num_calls)

    cache = denoise.init_cache(tokens) if self.cache else ()
    done = jnp.zeros_like(fixed[:, 0])
    zero = jnp.zeros_like(tokens[0, 0])
    state = (tokens, cache, zero, done, zero)

    def has_work(state):
      _, _, block, done, _ = state
      left = ~fixed & (where >= block * size)[None]
      return sharding.on_any_device(jnp.any(left & ~done[:, None]))

    tokens, _, block, _, num_calls = jax.lax.while_loop(has_work, body, state)
    # Where all rows were done early.
    left = ~fixed & (where >= block * size)[None]
    tokens = jnp.where(left, jnp.asarray(self.eos_id, tokens.dtype), tokens)
    return Samples(tokens[:, :length], num_calls)
