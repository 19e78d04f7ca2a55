"""Editing: fills masks and replaces tokens, each above a threshold."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import posterior, renoise, reveal
from nanodlm.types import InputError, Objective, ReverseRule, Sampler, Samples

DEFAULT_THRESHOLD = 0.7  # As in the released pipeline.


@dataclasses.dataclass(frozen=True)
class Edit(Sampler):
  """Fills masks and corrects tokens in the same calls.

  APPROXIMATE. Let c_i = max_v p_i(v), where p_i is the network's distribution,
  before temperature, top-k and top-p. Each call draws a token v_i ~ p_i for
  every free position, and changes

      masks with c_i >= threshold, at least the one of the largest c_i;
      tokens with c_i >= edit_threshold, to v_i.

  A row without masks ends when a call changes nothing, or after
  `num_corrections` such calls. Source: LLaDA 2.1, arXiv 2602.08676, which is
  this at temperature 0.

  The network must predict tokens as well as masks, hence the noise must be
  hybrid: networks of purely masked noise are not trained to, and what they
  predict of a token that they see is arbitrary. On a nearly blank canvas, such
  a network may disregard what was filled first: the random tokens that it
  expects per right one grow as (1 - t)^(gamma / 2 - 1) towards t = 1, hence
  without limit for objective.gamma=1, but not for 2. Start from a prompt: on a
  blank canvas, a network that knows relative positions only predicts the same
  everywhere, often the end of the text.

  If p_i is the law of x_i given the OTHER positions, a call that changes one
  position is exact, since its choice depends on them alone; a call that changes
  several draws them independently of each other.

  Attributes:
    threshold: for masks; 0 selects DEFAULT_THRESHOLD. Above 1, a call fills one
      mask.
    edit_threshold: for tokens. Above 1, tokens are final.
    num_corrections: maximum number of calls on a row without masks.
    block_size: free positions per block, or 0 for one block. The masks of a
      block are filled after those of the blocks to its left. Without blocks,
      surely predicted ends of the text come first and make it short.
  """

  draw: Draw
  threshold: float = 0.0
  edit_threshold: float = 0.5
  num_corrections: int = 0
  block_size: int = 0

  fills_blocks = True
  remembers = True

  def __post_init__(self):
    keys = ('threshold', 'edit_threshold', 'num_corrections', 'block_size')
    for key in keys:
      if not getattr(self, key) >= 0:
        raise InputError(f'sampler.{key}={getattr(self, key)!r} must be >= 0')

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return (
      renoise.Renoise.fits(objective)
      and isinstance(objective, ReverseRule)
      and objective.starts_masked
    )

  def __call__(self, keys, canvas, denoise):
    free, mask_id = ~canvas.fixed, self.draw.mask_id
    positions = posterior.all_positions(canvas.tokens)
    num_free = jnp.maximum(jnp.sum(free, axis=1), 1)
    length = canvas.tokens.shape[1]
    block = (jnp.cumsum(free, axis=1) - 1) // (self.block_size or length)

    def step(state):
      tokens, memory, is_open, num_edits, num_calls = state
      masked = free & (tokens == mask_id)
      # For hybrid noise, the level is the time, and nearly the share of masks.
      level = jnp.sum(masked, axis=1) / num_free
      level = jnp.maximum(level, posterior.CORRECTION_TIME)
      logits, memory = reveal.ask(denoise, tokens, level, positions, memory)
      drawn = self.draw.sample(reveal.fold_in_each(keys, num_calls), logits)
      current = jnp.min(jnp.where(masked, block, length), axis=1, keepdims=True)
      is_next = masked & (block == current)
      sure = jnp.exp(jnp.max(categorical.log_prob(logits, mask_id), axis=-1))
      surest = jnp.argmax(jnp.where(is_next, sure, -1.0), axis=1)
      is_filled = (sure >= (self.threshold or DEFAULT_THRESHOLD)) | (
        positions == surest[:, None]
      )
      is_edited = (sure >= self.edit_threshold) & (drawn != tokens)
      change = (is_next & is_filled) | (free & ~masked & is_edited)
      change &= is_open[:, None]
      tokens = jnp.where(change, drawn, tokens)
      num_edits += ~jnp.any(masked, axis=1)
      is_open = jnp.any(change, axis=1) & (
        jnp.any(free & (tokens == mask_id), axis=1)
        | (num_edits < self.num_corrections)
      )
      return tokens, memory, is_open, num_edits, num_calls + 1

    tokens = jnp.where(free, mask_id, canvas.tokens)
    zeros = jnp.zeros_like(tokens[:, 0])
    tokens, _, _, _, num_calls = jax.lax.while_loop(
      lambda state: sharding.on_any_device(jnp.any(state[2])),
      step,
      (tokens, canvas.memory, jnp.any(free, axis=1), zeros, zeros[0]),
    )
    return Samples(tokens=tokens, num_calls=num_calls)
