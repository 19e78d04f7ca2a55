"""Approximate block-by-block sampling of a masked model with a stale cache."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.samplers import base, reveal
from nanodlm.types import Canvas, InputError, Objective, Sampler, Samples

DEFAULT_BLOCK_SIZE = 32  # As in the paper.


@dataclasses.dataclass(frozen=True)
class PrefixCache(base.OuterSampler):
  """Fills blocks from left to right, and caches the rest of the canvas.

  APPROXIMATE: in a bidirectional model, every key and value depends on the
  whole canvas. Here the keys and values of prefix and masked suffix are
  computed once per block and reused while the tokens of the block change.
  Source: Fast-dLLM, arXiv 2505.22618, "DualCache".

  `num_calls` counts one call on the whole canvas per block with free positions,
  and the calls of the inner sampler, which run the S tokens of a block.

  Attributes:
    inner: the sampler of one block, [B, S]; its steps are per block.
    block_size: S; 0 selects DEFAULT_BLOCK_SIZE.
  """

  inner: Sampler
  block_size: int
  mask_id: int

  needs_cache = True

  def __post_init__(self):
    if self.block_size < 0:
      raise InputError(
        f'sampler.block_size={self.block_size!r} must be >= 0; 0 selects '
        f'{DEFAULT_BLOCK_SIZE}'
      )

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.predicts_masked

  def max_calls(self, length: int) -> int:
    size = min(self.block_size or DEFAULT_BLOCK_SIZE, length)
    num_blocks = -(-length // size) + 1  # The first may be partial.
    return num_blocks * (self.inner.max_calls(size) + 1)

  def __call__(self, keys, canvas, denoise):
    length = canvas.tokens.shape[1]
    size = min(self.block_size or DEFAULT_BLOCK_SIZE, length)
    num_blocks = -(-length // size)
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    def body(block, state):
      tokens, hidden, cache, num_calls = state
      # The last block ends with the canvas and may overlap the one before.
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
        # The network expects the share of masks in the whole row.
        level = (level * size + elsewhere) / length
        logits, _ = denoise.within(
          cache, part, start, level, positions, ~inside
        )
        return logits

      own = Canvas(cut(tokens, start), ~cut(hidden, start))
      samples = self.inner(reveal.fold_in_each(keys, block), own, within)
      tokens = jax.lax.dynamic_update_slice_in_dim(
        tokens, samples.tokens, start, axis=1
      )
      num_calls += has_work + samples.num_calls
      return tokens, hidden & ~inside[None], cache, num_calls

    tokens = jnp.where(canvas.fixed, canvas.tokens, self.mask_id)
    cache, zero = denoise.init_cache(tokens), jnp.zeros_like(tokens[0, 0])
    state = (tokens, ~canvas.fixed, cache, zero)
    tokens, _, _, num_calls = jax.lax.fori_loop(0, num_blocks, body, state)
    return Samples(tokens, num_calls)
