"""Speculative sampling: a block model drafts, its own causal law verifies."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise.categorical import Draw, safe_log, sample_categorical
from nanodlm.samplers import reveal
from nanodlm.types import InputError, Objective, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class Speculate(Sampler):
  """Draws from the autoregressive law of a block model, in fewer calls.

  For block diffusion with objective.ar_weight > 0. A round takes two calls:

  - The block model drafts the next S - 1 tokens in ONE call, each from its own
    law q_j, independently of each other. Its input is the last token and masks.
  - The autoregressive model reads the draft and gives p_j, the law of each
    token given those before it, and of one more.

  A draft d_j is accepted with probability min(1, p_j(d_j) / q_j(d_j)). In place
  of the first that is not, a token is drawn from max(p_j - q_j, 0), normalised,
  and the round ends; if all are accepted, one more is drawn from the last p.
  The samples have EXACTLY the law of the sampler `ar` with the same network and
  settings, for any draft: p and q have the same temperature, top-k and top-p,
  and at temperature 0 the tokens are those of `ar`. This needs that q_j is the
  law of d_j given the drafts before it, which is why a draft is one call.
  Source: Leviathan et al., arXiv 2211.17192, algorithm 1.

  A round makes 1 to S tokens; what takes `ar` S calls takes 2 if all drafts are
  accepted. Rows advance on their own, each with its place in the cache, so that
  `num_calls` is that of the slowest row. One more call reads a prompt. As with
  `ar`, p does not see the text to the right of a gap; drafts do in their block.

  Attributes:
    draw: how a token is drawn from p, and a draft from q.
    block_size: S of the model.
    eos_ids: the tokens that end a row, see `reveal.end_texts`.
  """

  draw: Draw
  block_size: int
  eos_ids: tuple[int, ...] = ()

  needs_cache = True
  needs = (
    "objective.name='block', objective.block_size >= 2 and "
    'objective.ar_weight > 0'
  )

  def __post_init__(self):
    if self.block_size < 2:
      raise InputError(
        f'objective.block_size={self.block_size!r} must be >= 2 with '
        "sampler.name='speculate': a block is the last token and its drafts"
      )

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.block_size >= 2 and objective.autoregressive is not None

  def __call__(self, keys, canvas, denoise):
    length, size = canvas.tokens.shape[1], self.block_size
    mask_id = self.draw.mask_id
    # A block may end after the canvas.
    pad = ((0, 0), (0, size))
    fixed = jnp.pad(canvas.fixed, pad, constant_values=True)
    tokens = jnp.where(canvas.fixed, canvas.tokens, mask_id)
    tokens = jnp.pad(tokens, pad, constant_values=mask_id)
    row = jnp.arange(len(tokens))[:, None]
    every = jnp.tile(jnp.arange(size), (len(tokens), 1))
    where, slots = jnp.arange(length + size)[None], jnp.arange(size)[None]
    causal = denoise.autoregressive

    def inputs(tokens):  # The autoregressive model reads these.
      return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=mask_id)

    def has_work(state):
      return sharding.on_any_device(jnp.any(state[2] < length))

    def fill(state):
      tokens, cache, start, num_calls = state
      draft_keys, accept_keys, draw_keys = reveal.split_each(
        jax.vmap(jax.random.fold_in)(keys, start), 3
      )
      # The block begins with the last token, if there is one.
      begin, places = jnp.maximum(start - 1, 0), start[:, None] + slots
      block = tokens[row, begin[:, None] + slots]
      drafted = (places - begin[:, None])[:, :-1]
      level = jnp.mean(block == mask_id, axis=1)
      visible = where < begin[:, None]
      logits, _ = denoise.within(cache, block, begin, level, drafted, visible)
      log_q = self.draw.log_prob(logits)
      drafts = self.draw.sample(draft_keys, logits)
      is_fixed = fixed[row, places]
      own = tokens[row, places]
      drafts = jnp.where(is_fixed[:, :-1], own[:, :-1], drafts)
      text = tokens.at[row, places[:, :-1]].set(drafts)

      visible = where < start[:, None]
      logits, cache = causal.within(
        cache, inputs(text)[row, places], start, level, every, visible
      )
      p, q = jnp.exp(self.draw.log_prob(logits)), jnp.exp(log_q)
      q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # There are S - 1 drafts.
      of_draft = lambda x: jnp.take_along_axis(
        x[:, :-1], drafts[..., None], axis=-1
      )[..., 0]
      u = reveal.uniform_each(accept_keys, size - 1)
      is_accepted = is_fixed[:, :-1] | (u * of_draft(q) < of_draft(p))
      num = jnp.sum(jnp.cumprod(is_accepted, axis=1), axis=1)[:, None]
      rest = jnp.maximum(p - q, 0)
      # It is 0 only if p and q are equal up to rounding.
      rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)
      drawn = jax.vmap(sample_categorical)(draw_keys, safe_log(rest))
      new = jnp.where(slots < num, jnp.pad(drafts, ((0, 0), (0, 1))), drawn)
      is_new = (slots <= num) & ~is_fixed
      tokens = tokens.at[row, places].set(jnp.where(is_new, new, own))
      tokens, has_ended = reveal.end_texts(tokens, fixed, self.eos_ids)
      is_open = jnp.any(~fixed & (tokens == mask_id), axis=1) & ~has_ended
      start = jnp.where(is_open, start + num[:, 0] + 1, length)
      num_calls += 1 + reveal.calls_of(denoise)
      return tokens, cache, start, num_calls

    cache = denoise.init_cache(tokens)
    is_open = ~jnp.all(fixed, axis=1)
    first = jnp.argmin(fixed, axis=1).astype(jnp.int32)
    start = jnp.where(is_open, first, length)
    has_prompt = sharding.on_any_device(jnp.any(is_open & (start > 0)))
    # None of the cache is visible; XLA folds attention to a constant slowly.
    nothing = where < jnp.minimum(start, 0)[:, None]
    read = lambda cache: causal.advance(
      cache, inputs(tokens)[:, :-1], 0, nothing
    )
    cache = jax.lax.cond(has_prompt, read, lambda cache: cache, cache)
    state = (tokens, cache, start, has_prompt.astype(jnp.int32))
    tokens, _, _, num_calls = jax.lax.while_loop(has_work, fill, state)
    return Samples(tokens[:, :length], num_calls)
