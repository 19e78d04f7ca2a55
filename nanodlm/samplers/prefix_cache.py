"""Block by block sampling of a plain masked model with a stale cache: approximate."""

import dataclasses
from typing import Any

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

DEFAULT_BLOCK_SIZE = 32  # as in the paper


@dataclasses.dataclass(frozen=True)
class PrefixCache(Sampler):
  """Fills blocks from left to right; outside the block nothing is recomputed.

  APPROXIMATE: in a bidirectional model every key and value depends on the whole
  canvas. They are computed once when a block begins (prefix and still masked
  suffix) and reused for all calls inside it, while the tokens of the block change.
  Source: Fast-dLLM, arXiv 2505.22618, "DualCache".

  `num_calls` counts a call on the whole canvas for each block that has something to
  fill, and the inner sampler's calls, each on the S tokens of a block.

  Attributes:
    inner: the sampler of one block, [B, S]; its steps are per block.
    block_size: S; 0 is DEFAULT_BLOCK_SIZE.
    mask_id: the mask's id.
  """

  inner: Sampler
  block_size: int
  mask_id: int

  def __post_init__(self):
    if self.block_size < 0:
      raise InputError(
        f'sampler.block_size={self.block_size!r} must be >= 0 (0: '
        f'{DEFAULT_BLOCK_SIZE})'
      )

  def with_rule(self, rule: ReverseRule) -> 'PrefixCache':
    return dataclasses.replace(self, inner=self.inner.with_rule(rule))

  def with_draw(self, draw: Any) -> 'PrefixCache':
    return dataclasses.replace(self, inner=self.inner.with_draw(draw))

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: CachedDenoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    size = min(self.block_size or DEFAULT_BLOCK_SIZE, length)
    num_blocks = -(-length // size)
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    def body(block, state):
      tokens, hidden, cache, num_calls = state
      # The last block ends with the canvas, over what is already filled.
      start = jnp.minimum(block * size, length - size)
      where = jnp.arange(length)
      inside = (where >= start) & (where < start + size)
      has_work = sharding.on_any_device(jnp.any(cut(hidden, start)))

      def fresh(cache):
        return denoise.advance(
          cache, tokens, 0, jnp.zeros((length,), bool), jnp.mean(hidden, axis=1)
        )

      cache = jax.lax.cond(has_work, fresh, lambda cache: cache, cache)
      elsewhere = jnp.sum(hidden & ~inside[None], axis=1)

      def within(part, level, positions):
        level = (level * size + elsewhere) / length  # of the whole row
        logits, _ = denoise.within(
          cache, part, start, level, positions, ~inside
        )
        return logits

      block_keys = reveal.fold_in_each(keys, block)
      samples = self.inner(
        block_keys, Canvas(cut(tokens, start), ~cut(hidden, start)), within
      )
      tokens = jax.lax.dynamic_update_slice_in_dim(
        tokens, samples.tokens, start, axis=1
      )
      return (
        tokens,
        hidden & ~inside[None],
        cache,
        num_calls + has_work + samples.num_calls,
      )

    tokens = jnp.where(canvas.fixed, canvas.tokens, self.mask_id)
    state = (
      tokens,
      ~canvas.fixed,
      denoise.init_cache(tokens),
      jnp.zeros_like(tokens[0, 0]),
    )
    tokens, _, _, num_calls = jax.lax.fori_loop(0, num_blocks, body, state)
    return Samples(tokens, num_calls)
