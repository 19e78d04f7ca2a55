"""Block-by-block sampling of a block-diffusion model."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.samplers import base, reveal
from nanodlm.types import Canvas, InputError, Objective, Sampler, Samples


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
    eos_ids: the tokens that end a row, see `reveal.end_texts`.
  """

  inner: Sampler
  block_size: int
  mask_id: int
  cache: bool = True
  eos_ids: tuple[int, ...] = ()

  def __post_init__(self):
    if self.block_size < 1:
      raise InputError(f'block_size={self.block_size!r} must be >= 1')

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return bool(objective.block_size)

  @property
  def needs_cache(self) -> bool:  # pyright: ignore
    return self.cache

  def num_blocks(self, length: int) -> int:
    return -(-length // self.block_size)

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
    # The network knows whole blocks: what is after the text is noise, too.
    is_padding = fixed & (tokens == self.mask_id)
    where = jnp.arange(tokens.shape[1])
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
    paste = lambda x, part, start: jax.lax.dynamic_update_slice_in_dim(
      x, part, start, axis=1
    )

    def has_work(state):
      _, _, block, done, _ = state
      left = ~fixed & (where >= block * size)[None] & ~done[:, None]
      return sharding.on_any_device(jnp.any(left))

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
      is_fixed, padding = cut(fixed, start), cut(is_padding, start)
      call, share = within, jnp.mean(padding, axis=1)
      if self.inner.reads_masks:
        call = lambda part, level, positions: within(
          part, level + share, positions
        )
      else:
        is_fixed &= ~padding
      # A block of padding alone has nothing to fill.
      is_idle = jnp.all(cut(fixed, start), axis=1) | done
      own = Canvas(cut(tokens, start), is_fixed | is_idle[:, None])
      samples = self.inner(reveal.fold_in_each(keys, block), own, call)
      part = jnp.where(padding, self.mask_id, samples.tokens)
      tokens = paste(tokens, part, start)
      tokens, done = reveal.end_texts(tokens, fixed, self.eos_ids)
      num_calls += samples.num_calls * reveal.calls_of(denoise)
      return tokens, cache, block + 1, done, num_calls

    cache = denoise.init_cache(tokens) if self.cache else ()
    zero, done = jnp.zeros_like(tokens[0, 0]), jnp.zeros_like(fixed[:, 0])
    state = (tokens, cache, zero, done, zero)
    tokens, _, _, _, num_calls = jax.lax.while_loop(has_work, fill, state)
    return Samples(tokens[:, :length], num_calls)
