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
  refuses others). Block diffusion with objective.ar_weight > 0 has such a
  network, too.

  Attributes:
    cache: whether to cache keys and values: one call reads the prompt, then
      each call runs one token. Without it, each call runs the whole canvas,
      with the same result up to float rounding.
    eos_ids: the tokens that end a row, see `reveal.end_texts`.
  """

  draw: Draw
  cache: bool = True
  eos_ids: tuple[int, ...] = ()

  is_final = True
  needs = "objective.name='ar', or 'block' and objective.ar_weight > 0"

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.autoregressive is not None

  @property
  def needs_cache(self) -> bool:  # pyright: ignore
    return self.cache

  def __call__(self, keys, canvas, denoise):
    denoise = denoise.autoregressive
    free = ~canvas.fixed
    rank = jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
    if not self.cache:
      plan = reveal.Plan(step=rank, level=jnp.ones(free.shape))
      tokens, num_calls = reveal.sample_plan(
        keys, canvas, plan, denoise, self.draw, num_slots=1
      )
      return Samples(self._end(tokens, free)[0], num_calls)
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

    def has_work(state):
      _, _, i, is_open, _ = state
      return (i < last) & sharding.on_any_device(jnp.any(is_open))

    def body(state):
      inputs, cache, i, is_open, num_calls = state
      column = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
      token = column(inputs)
      own, level = jnp.zeros_like(token), jnp.ones((token.shape[0],))
      logits, cache = denoise.within(cache, token, i, level, own, where < i)
      # The keys of `reveal.sample_plan`, so that the cache changes nothing.
      step_keys = jax.vmap(jax.random.fold_in)(keys, column(rank)[:, 0])
      drawn = self.draw.sample(reveal.fold_in_each(step_keys, 0), logits)
      is_own = column(free) & is_open[:, None]
      drawn = jnp.where(is_own, drawn, column(inputs[:, 1:]))
      inputs = jax.lax.dynamic_update_slice_in_dim(inputs, drawn, i + 1, axis=1)
      text, is_open = self._end(inputs[:, 1:], free)
      return inputs.at[:, 1:].set(text), cache, i + 1, is_open, num_calls + 1

    cache = denoise.init_cache(tokens)
    has_prompt = (first > 0) & (first < length)
    cache = jax.lax.cond(has_prompt, prompt, lambda cache: cache, cache)
    is_open = jnp.any(free, axis=1)
    state = (inputs, cache, first, is_open, has_prompt.astype(jnp.int32))
    inputs, _, _, _, num_calls = jax.lax.while_loop(has_work, body, state)
    return Samples(inputs[:, 1:], num_calls)

  def _end(self, text, free):
    """Returns the text and which rows have not ended (`reveal.end_texts`)."""
    text, has_ended = reveal.end_texts(text, ~free, self.eos_ids)
    return text, jnp.any(free, axis=1) & ~has_ended
