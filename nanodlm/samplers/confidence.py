"""Confidence sampling of a masked model: most confident positions first."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical, processes
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import base, reveal
from nanodlm.types import InputError, Samples

SCORES = ('max_prob', 'margin', 'entropy', 'random')


@dataclasses.dataclass(frozen=True)
class Confidence(base.MaskedSampler):
  """Draws all masked positions and keeps the most confident tokens.

  The confidence of a position is a function of the network's distribution p,
  before temperature, top-k and top-p (at temperature 0 every draw would be
  certain):

  - 'max_prob': p of the DRAWN token, which is the largest p only at temperature
    0 (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992).
  - 'margin': the difference of the two largest p.
  - 'entropy': the negative entropy of p.
  - 'random': uniform noise.

  Exactly one of `num_steps`, `threshold` and `entropy_budget` is positive. It
  determines the number of positions that a call keeps:

  - num_steps: ceil(masks left / calls left), hence at most num_steps calls.
  - threshold: all positions with confidence >= threshold, at least one
    (Fast-dLLM, arXiv 2505.22618). A threshold above 1 keeps one per call.
  - entropy_budget: as many, in order of confidence, as keep the sum of their
    entropies minus the largest entropy <= the budget, at least one (EB-Sampler,
    arXiv 2505.24857). This bounds the divergence, in nats, between the drawn
    product and any joint law with the same marginals.

  With one position per call, every score except 'max_prob' reproduces the
  network's law exactly, since the order depends only on the text so far.
  'max_prob' depends on the drawn token and favours likely texts at any number
  of calls; at temperature 1 a weak network repeats a few common words.

  Differs from MaskGIT: no noise is added to the confidence.

  Attributes:
    num_steps: number of calls, distributed over the blocks in proportion to
      their size, at least one per block; 0 disables the rule.
    score: the confidence that orders the positions.
    threshold: minimum confidence; 0 disables the rule.
    entropy_budget: budget in nats; 0 disables the rule.
    block_size: free positions per block, or 0 for one block. Blocks are filled
      from left to right (semi-autoregressive, LLaDA), and only the positions of
      one block are projected.
  """

  draw: Draw
  num_steps: int
  score: str = 'max_prob'
  threshold: float = 0.0
  entropy_budget: float = 0.0
  block_size: int = 0

  def __post_init__(self):
    check_score(self.score)
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
        "'confidence' and determines how many positions a call keeps; set the "
        'others to 0, for example --config.sampler.num_steps=0'
      )
    if self.threshold and self.score not in ('max_prob', 'margin'):
      raise InputError(
        f'sampler.threshold={self.threshold!r} is a probability, so '
        f"sampler.score={self.score!r} must be 'max_prob' or 'margin'"
      )

  def __call__(self, keys, canvas, denoise):
    length = canvas.tokens.shape[1]
    block_size = min(self.block_size or length, length)
    free = ~canvas.fixed
    num_free = jnp.sum(free, axis=1)
    block = (jnp.cumsum(free, axis=1) - 1) // block_size
    row = jnp.arange(free.shape[0])[:, None]

    def step(state):
      tokens, memory, hidden, num_calls = state
      current = jnp.min(jnp.where(hidden, block, length), axis=1)
      in_block = hidden & (block == current[:, None])
      # The sort is stable: masks of the block come first, from left to right.
      positions = jnp.argsort(~in_block, axis=1, stable=True)[:, :block_size]
      is_open = jnp.take_along_axis(in_block, positions, axis=1)
      # As in training, the share of masks is of the whole row, with the prompt.
      level = jnp.mean(hidden, axis=1)
      logits, memory = reveal.ask(
        denoise, tokens, level, positions.astype(jnp.int32), memory
      )
      call_keys = reveal.fold_in_each(keys, num_calls)
      draw_keys, score_keys = reveal.split_each(call_keys)
      drawn = self.draw.sample(draw_keys, logits)
      log_p = categorical.log_prob(logits, self.draw.mask_id)
      confidence, entropy = measure(self.score, score_keys, log_p, drawn)
      # All previous calls filled positions of each row that is not done.
      block_end = jnp.minimum((current + 1) * block_size, num_free)
      calls_left = jnp.zeros_like(current)
      if self.num_steps:
        end_call = reveal.scale_rank(
          block_end, self.num_steps, num_free, self.num_steps, length
        )
        calls_left = end_call - num_calls
      kept = self._kept(confidence, entropy, is_open, calls_left)
      new = jnp.where(kept, drawn, tokens[row, positions])
      return (
        tokens.at[row, positions].set(new),
        memory,
        hidden.at[row, positions].min(~kept),
        num_calls + 1,
      )

    tokens = jnp.where(free, self.draw.mask_id, canvas.tokens)
    tokens, _, _, num_calls = jax.lax.while_loop(
      lambda state: sharding.on_any_device(jnp.any(state[2])),
      step,
      (tokens, canvas.memory, free, jnp.zeros_like(tokens[0, 0])),
    )
    return Samples(tokens=tokens, num_calls=num_calls)

  def _kept(self, confidence, entropy, is_open, calls_left):
    """Returns which open positions a call keeps, [B, K] like its arguments."""
    order = jnp.argsort(
      jnp.where(is_open, -confidence, jnp.inf), axis=1, stable=True
    )
    if self.num_steps:
      num_open = jnp.sum(is_open, axis=1, keepdims=True)
      calls_left = jnp.maximum(calls_left, 1)[:, None]
      count = (num_open + calls_left - 1) // calls_left
    elif self.threshold:
      passes = is_open & (confidence >= self.threshold)
      count = jnp.maximum(jnp.sum(passes, axis=1, keepdims=True), 1)
    else:
      count = num_within(entropy, order, self.entropy_budget)
    rank = processes.inverse_permutation(order)
    return is_open & (rank < count)


def check_score(score: str):
  """Raises InputError unless `score` is one of SCORES."""
  if score not in SCORES:
    raise InputError(f'sampler.score={score!r} is not one of {list(SCORES)}')


def measure(
  score: str, keys: jax.Array, log_p: jax.Array, drawn: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the confidence of positions and their entropies, [B, K] each.

  Args:
    score: one of SCORES.
    keys: [B] keys of 'random'.
    log_p: [B, K, V].
    drawn: [B, K], what was drawn from it.
  """
  p = jnp.exp(log_p)
  entropy = -jnp.sum(p * log_p, axis=-1)
  if score == 'max_prob':
    confidence = jnp.take_along_axis(p, drawn[..., None], axis=-1)[..., 0]
  elif score == 'margin':
    largest = jax.lax.top_k(p, 2)[0]
    confidence = largest[..., 0] - largest[..., 1]
  elif score == 'entropy':
    confidence = -entropy
  else:
    confidence = reveal.uniform_each(keys, drawn.shape[1])
  return confidence, entropy


def num_within(
  entropy: jax.Array, order: jax.Array, budget: float
) -> jax.Array:
  """Returns how many positions an entropy budget allows, [B, 1], at least 1.

  Args:
    entropy: [B, K], in nats.
    order: [B, K], the positions in the order in which they are taken.
    budget: limit of the sum of their entropies minus the largest.
  """
  # The excess never decreases, so a prefix of the order passes.
  entropy = jnp.take_along_axis(entropy, order, axis=1)
  excess = jnp.cumsum(entropy, axis=1) - jax.lax.cummax(entropy, axis=1)
  return jnp.maximum(jnp.sum(excess <= budget, axis=1, keepdims=True), 1)
