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
  Source: Fast-dLLM, arXiv 2505.22618, "DualCache". With refresh_calls=1,
  they are computed again before every call, and nothing is stale.

  `num_calls` counts the calls on the whole canvas that fill the cache, at least
  one per block with free positions, and the calls of the inner sampler, which
  run the S tokens of a block.

  Attributes:
    inner: the sampler of one block, [B, S]; its steps are per block.
    block_size: S; 0 selects DEFAULT_BLOCK_SIZE.
    refresh_calls: number of calls within a block after which a row's cache is
      computed again; 0: only for the next block. Calls that reveal nothing in
      the row are not counted, so that its sample does not depend on the other
      rows. (It does with 'remask' and refresh_calls > 1 if a token is hidden
      again before the row's next call.)
  """

  inner: Sampler
  block_size: int
  mask_id: int
  refresh_calls: int = 0

  needs_cache = True
  caches_noise = True

  def __post_init__(self):
    if self.block_size < 0:
      raise InputError(
        f'sampler.block_size={self.block_size!r} must be >= 0; 0 selects '
        f'{DEFAULT_BLOCK_SIZE}'
      )
    if self.refresh_calls < 0:
      raise InputError(
        f'sampler.refresh_calls={self.refresh_calls!r} must be >= 0; 0: the '
        'cache is computed once per block'
      )

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.predicts_masked

  def _size(self, length: int) -> int:
    return min(self.block_size or DEFAULT_BLOCK_SIZE, length)

  def num_blocks(self, length: int) -> int:
    return -(-length // self._size(length))

  def __call__(self, keys, canvas, denoise):
    length = canvas.tokens.shape[1]
    size, num_blocks = self._size(length), self.num_blocks(length)
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    def body(block, state):
      tokens, hidden, cache, num_calls = state
      # The last block ends with the canvas and may overlap the one before.
      start = jnp.minimum(block * size, length - size)
      where = jnp.arange(length)
      inside = (where >= start) & (where < start + size)
      has_work = sharding.on_any_device(jnp.any(cut(hidden, start)))

      def fresh(cache, tokens, level):
        nothing = jnp.zeros((length,), bool)
        return denoise.advance(cache, tokens, 0, nothing, level)

      level = jnp.mean(hidden, axis=1)
      cache = jax.lax.cond(
        has_work, fresh, lambda cache, *_: cache, cache, tokens, level
      )
      elsewhere = jnp.sum(hidden & ~inside[None], axis=1)
      # References, since the inner sampler carries no state between its calls:
      # the cache, each row's text and level in it, the block in the last call,
      # the calls that revealed a token of the row, and the refreshes.
      zeros = jnp.zeros_like(tokens[:, 0])
      state = (cache, tokens, level, cut(tokens, start), zeros, 0 * num_calls)
      if self.refresh_calls:
        held = jax.tree.map(jax.new_ref, state)

      def latest(part, level):
        """Returns the cache, computed again for the rows that are due."""
        if not self.refresh_calls:
          return cache
        last, text, its_level, before, calls, fills = jax.tree.map(
          lambda ref: ref[...], held
        )
        is_mask = part == self.mask_id
        calls += jnp.any((before == self.mask_id) & ~is_mask, axis=1)
        is_due = (calls > 0) & (calls % self.refresh_calls == 0)
        is_due &= jnp.any(is_mask, axis=1)
        # The others keep theirs: it is computed from the same text again.
        whole = jax.lax.dynamic_update_slice_in_dim(tokens, part, start, axis=1)
        text = jnp.where(is_due[:, None], whole, text)
        its_level = jnp.where(is_due, level, its_level)
        is_any = sharding.on_any_device(jnp.any(is_due))
        new = jax.lax.cond(
          is_any, fresh, lambda cache, *_: cache, last, text, its_level
        )
        state = (new, text, its_level, part, calls, fills + is_any)
        jax.tree.map(lambda ref, x: ref.__setitem__(..., x), held, state)
        return new

      def within(part, level, positions):
        # The network expects the share of masks in the whole row.
        level = (level * size + elsewhere) / length
        logits, _ = denoise.within(
          latest(part, level), part, start, level, positions, ~inside
        )
        return logits

      own = Canvas(cut(tokens, start), ~cut(hidden, start))
      samples = self.inner(reveal.fold_in_each(keys, block), own, within)
      tokens = jax.lax.dynamic_update_slice_in_dim(
        tokens, samples.tokens, start, axis=1
      )
      num_calls += has_work + samples.num_calls * reveal.calls_of(denoise)
      if self.refresh_calls:
        num_calls += held[-1][...]
      return tokens, hidden & ~inside[None], cache, num_calls

    tokens = jnp.where(canvas.fixed, canvas.tokens, self.mask_id)
    cache, zero = denoise.init_cache(tokens), jnp.zeros_like(tokens[0, 0])
    state = (tokens, ~canvas.fixed, cache, zero)
    tokens, _, _, num_calls = jax.lax.fori_loop(0, num_blocks, body, state)
    return Samples(tokens, num_calls)
