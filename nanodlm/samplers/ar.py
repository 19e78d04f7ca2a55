"""Left-to-right sampling of an autoregressive model."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import Objective, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class LeftToRight(Sampler):
  """Draws the free positions from left to right, one per call; exact.

  A causal network does not see text to the right of the drawn position, so the
  free positions should be at the end of the canvas (`prompts.make_canvas`
  refuses others).

  Attributes:
    cache: whether to cache keys and values: one call reads the prompt, then
      each call runs one token. Without it, each call runs the whole canvas,
      with the same result up to float rounding.
  """

  draw: Draw
  cache: bool = True

  is_final = True

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.causal

  @property
  def needs_cache(self) -> bool:  # pyright: ignore
    return self.cache

  def max_calls(self, length: int) -> int:
    return length + self.cache  # One more call reads the prompt.

  def __call__(self, keys, canvas, denoise):
    free = ~canvas.fixed
    rank = jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
    if not self.cache:
      plan = reveal.Plan(step=rank, level=jnp.ones(free.shape))
      return reveal.sample_plan(
        keys, canvas, plan, denoise, self.draw, num_slots=1
      )
    length = free.shape[1]
    # The network's input is the text shifted right by one, after mask_id.
    tokens = jnp.where(free, self.draw.mask_id, canvas.tokens)
    inputs = jnp.pad(
      tokens, ((0, 0), (1, 0)), constant_values=self.draw.mask_id
    )
    is_free = sharding.on_any_device(jnp.any(free, axis=0))
    first = jnp.where(jnp.any(is_free), jnp.argmax(is_free), length)
    last = length - jnp.argmax(is_free[::-1])
    where = jnp.arange(length)
    prompt = lambda cache: denoise.advance(cache, inputs[:, :-1], 0, where < 0)

    def body(state):
      inputs, cache, i, num_calls = state
      column = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
      token = column(inputs)
      own, level = jnp.zeros_like(token), jnp.ones((token.shape[0],))
      logits, cache = denoise.within(cache, token, i, level, own, where < i)
      # The keys of `reveal.sample_plan`, so that the cache changes nothing.
      step_keys = jax.vmap(jax.random.fold_in)(keys, column(rank)[:, 0])
      drawn = self.draw.sample(reveal.fold_in_each(step_keys, 0), logits)
      drawn = jnp.where(column(free), drawn, column(tokens))
      inputs = jax.lax.dynamic_update_slice_in_dim(inputs, drawn, i + 1, axis=1)
      return inputs, cache, i + 1, num_calls + 1

    cache = denoise.init_cache(tokens)
    has_prompt = (first > 0) & (first < length)
    cache = jax.lax.cond(has_prompt, prompt, lambda cache: cache, cache)
    state = (inputs, cache, first, has_prompt.astype(jnp.int32))
    inputs, _, _, num_calls = jax.lax.while_loop(
      lambda state: state[2] < last, body, state
    )
    return Samples(inputs[:, 1:], num_calls)
