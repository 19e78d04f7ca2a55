"""Left-to-right sampling of an autoregressive model."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import CachedDenoise, Canvas, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class LeftToRight(Sampler):
  """Draws the free positions from left to right, one per call; exact.

  The causal network sees nothing to the right of the position it draws, so the
  free positions should be the end of the canvas (`sample.py` refuses others).

  Attributes:
    draw: how tokens are drawn.
    cache: keep keys and values: one call for a prompt, then each call is on one
      token. Without it each call runs the whole canvas: the same tokens (up to
      float rounding), slower.
  """

  draw: Draw
  cache: bool = True

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: CachedDenoise
  ) -> Samples:
    free = ~canvas.fixed
    rank = jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
    if not self.cache:
      plan = reveal.Plan(step=rank, level=jnp.ones(free.shape))
      return reveal.sample_plan(
        keys, canvas, plan, denoise, self.draw, num_slots=1
      )
    length = free.shape[1]
    # The network's input is the text shifted right by one, mask_id in front.
    tokens = jnp.where(free, self.draw.mask_id, canvas.tokens)
    inputs = jnp.pad(
      tokens, ((0, 0), (1, 0)), constant_values=self.draw.mask_id
    )
    is_free = sharding.on_any_device(jnp.any(free, axis=0))
    first = jnp.where(jnp.any(is_free), jnp.argmax(is_free), length)
    last = length - jnp.argmax(is_free[::-1])
    where = jnp.arange(length)

    def prompt(cache):
      return denoise.advance(cache, inputs[:, :-1], 0, where < 0)

    def body(state):
      inputs, cache, i, num_calls = state
      token = jax.lax.dynamic_slice_in_dim(inputs, i, 1, axis=1)
      own = jnp.zeros_like(token)
      level = jnp.ones((token.shape[0],))
      logits, cache = denoise.within(cache, token, i, level, own, where < i)
      column = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
      draw_keys = jax.vmap(
        lambda key, step: jax.random.fold_in(jax.random.fold_in(key, step), 0)
      )(keys, column(rank)[:, 0])
      drawn = self.draw.sample(draw_keys, logits)
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
