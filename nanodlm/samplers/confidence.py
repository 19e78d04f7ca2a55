"""Confidence sampling of a masked model: the surest positions first."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical, processes
from nanodlm.noise.categorical import Draw
from nanodlm.types import Canvas, Denoise, InputError, Sampler, Samples

SCORES = ('max_prob', 'margin', 'entropy', 'random')


@dataclasses.dataclass(frozen=True)
class Confidence(Sampler):
  """Draws every masked position, keeps the most confident ones, masks the rest.

  The confidence of a position comes from the network's own distribution p
  there, whatever the temperature, top-k and top-p of the draw (at temperature 0
  the drawn distribution would be certain everywhere):

  - 'max_prob': p of the token that was DRAWN, which is the largest p only at
    temperature 0 (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992).
  - 'margin': the largest p less the second largest.
  - 'entropy': minus the entropy of p.
  - 'random': uniform noise.

  How many positions a call keeps is one of three rules; of `num_steps`,
  `threshold` and `entropy_budget` exactly one is > 0:

  - num_steps: ceil(masked left / calls left), so at most num_steps calls.
  - threshold: all with confidence >= threshold, at least one (Fast-dLLM, arXiv
    2505.22618). Above 1: one per call.
  - entropy_budget: in order of confidence, as long as the sum of the entropies
    of p less the largest of them stays <= the budget, so at least one
    (EB-Sampler, arXiv 2505.24857). That bounds the divergence of the product
    that is drawn from any joint law with these marginals; nats.

  With one position per call every score but 'max_prob' reproduces the network's
  law exactly: the order then depends on the text so far only. 'max_prob' looks
  at the drawn token, which favours likely texts whatever the number of calls:
  at temperature 1 it ends in a few common words.

  Differs from MaskGIT: no noise is added to the confidence.

  Attributes:
    draw: how tokens are drawn.
    num_steps: calls, spread over the blocks in proportion to their size; with
      fewer calls than blocks each block still takes one.
    score: what orders the positions.
    threshold: of the confidence; 0: off.
    entropy_budget: nats; 0: off.
    block_size: 0, or the number of free positions that must be filled before
      the next so many are begun, from left to right (semi-autoregressive,
      LLaDA). Only a block's positions are projected.
  """

  draw: Draw
  num_steps: int
  score: str = 'max_prob'
  threshold: float = 0.0
  entropy_budget: float = 0.0
  block_size: int = 0

  def __post_init__(self):
    if self.score not in SCORES:
      raise InputError(
        f'sampler.score={self.score!r} is not one of {list(SCORES)}'
      )
    for key in ('num_steps', 'threshold', 'entropy_budget', 'block_size'):
      if not getattr(self, key) >= 0:
        raise InputError(f'sampler.{key}={getattr(self, key)!r} must be >= 0')
    rules = ('num_steps', 'threshold', 'entropy_budget')
    if sum(getattr(self, key) > 0 for key in rules) != 1:
      values = ', '.join(
        f'sampler.{key}={getattr(self, key)!r}' for key in rules
      )
      raise InputError(
        f'{values}: exactly one of them must be > 0 with sampler.name='
        "'confidence', and the others 0 (--config.sampler.num_steps=0, say): it "
        'says how many positions a call keeps'
      )
    if self.threshold and self.score not in ('max_prob', 'margin'):
      raise InputError(
        f'sampler.threshold={self.threshold!r} is a probability: '
        f"sampler.score={self.score!r} must be 'max_prob' or 'margin' with it"
      )

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    length = canvas.tokens.shape[1]
    block_size = min(self.block_size or length, length)
    free = ~canvas.fixed
    num_free = jnp.sum(free, axis=1)
    block = (jnp.cumsum(free, axis=1) - 1) // block_size
    row = jnp.arange(free.shape[0])[:, None]

    def step(state):
      tokens, hidden, num_calls = state
      current = jnp.min(jnp.where(hidden, block, length), axis=1)
      in_block = hidden & (block == current[:, None])
      # Stable, so the block's masks come first, from left to right.
      positions = jnp.argsort(~in_block, axis=1, stable=True)[:, :block_size]
      is_open = jnp.take_along_axis(in_block, positions, axis=1)
      # The masked share of the whole row, prompt included, as in training.
      level = jnp.mean(hidden, axis=1)
      logits = denoise(tokens, level, positions.astype(jnp.int32))
      draw_keys, score_keys = jax.vmap(
        lambda key: tuple(jax.random.split(jax.random.fold_in(key, num_calls)))
      )(keys)
      drawn = self.draw.sample(draw_keys, logits)
      confidence, entropy = self._confidence(score_keys, logits, drawn)
      # A row that is not done was part of every call so far.
      block_end = jnp.minimum((current + 1) * block_size, num_free)
      end_call = self.num_steps * block_end // jnp.maximum(num_free, 1)
      kept = self._kept(confidence, entropy, is_open, end_call - num_calls)
      new = jnp.where(kept, drawn, tokens[row, positions])
      return (
        tokens.at[row, positions].set(new),
        hidden.at[row, positions].min(~kept),
        num_calls + 1,
      )

    tokens = jnp.where(free, self.draw.mask_id, canvas.tokens)
    # From the data, so that under shard_map it varies over devices as they do.
    zero = jnp.sum(num_free, dtype=jnp.int32) * 0
    tokens, _, num_calls = jax.lax.while_loop(
      lambda state: sharding.on_any_device(jnp.any(state[1])),
      step,
      (tokens, free, zero),
    )
    return Samples(tokens=tokens, num_calls=num_calls)

  def _confidence(self, keys, logits, drawn):
    """Confidence and entropy of p [B, K] from logits [B, K, V]."""
    log_p = categorical.log_prob(logits, self.draw.mask_id)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * log_p, axis=-1)
    if self.score == 'max_prob':
      confidence = jnp.take_along_axis(p, drawn[..., None], axis=-1)[..., 0]
    elif self.score == 'margin':
      largest = jax.lax.top_k(p, 2)[0]
      confidence = largest[..., 0] - largest[..., 1]
    elif self.score == 'entropy':
      confidence = -entropy
    else:
      confidence = jax.vmap(
        lambda key: jax.random.uniform(key, drawn.shape[1:])
      )(keys)
    return confidence, entropy

  def _kept(self, confidence, entropy, is_open, calls_left):
    """Which of the open positions a call keeps, [B, K] bool."""
    order = jnp.argsort(
      jnp.where(is_open, -confidence, jnp.inf), axis=1, stable=True
    )
    if self.num_steps:
      num_open = jnp.sum(is_open, axis=1, keepdims=True)
      calls_left = jnp.maximum(calls_left, 1)[:, None]
      count = (num_open + calls_left - 1) // calls_left
    else:
      if self.threshold:
        passes = is_open & (confidence >= self.threshold)
      else:
        # Falls never along the order, so those that pass are its first.
        entropy = jnp.take_along_axis(entropy, order, axis=1)
        excess = jnp.cumsum(entropy, axis=1) - jax.lax.cummax(entropy, axis=1)
        passes = excess <= self.entropy_budget
      count = jnp.maximum(jnp.sum(passes, axis=1, keepdims=True), 1)
    rank = processes.inverse_permutation(order)
    return is_open & (rank < count)
