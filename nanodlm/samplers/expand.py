"""DreamOn's sampler: a mask becomes a token, two masks, or nothing."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import confidence, insert, posterior, reveal
from nanodlm.types import InputError, Objective, Sampler, Samples


@dataclasses.dataclass(frozen=True)
class Expand(Sampler):
  """Fills the most confident mask in each call; can change lengths of gaps.

  APPROXIMATE. A gap of any length starts with `num_masks` masks. There, a mask
  can also become two masks, if there is room, or none, with the probabilities
  that the network gives to the mask and to the last token of the row. The
  expansions of a row are at most its room at the start. Temperature, top-k and
  top-p are those of the choice between tokens. Source: DreamOn
  (DreamLM/DreamOn).

  Attributes:
    num_masks: see above.
    score: what masks are ranked by; see `Confidence`. Here p includes that of
      two masks and, in gaps of any length, that of none. 'max_prob' favours
      likely texts; 'random' has the network's law in gaps of a given length.
  """

  draw: Draw
  num_masks: int = 4
  score: str = 'max_prob'

  fills_room = True
  needs = 'objective.expand=True'

  def __post_init__(self):
    if self.num_masks < 1:
      raise InputError(f'sampler.num_masks={self.num_masks!r} must be >= 1')
    confidence.check_score(self.score)

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.predicts_masked and objective.any_length

  def __call__(self, keys, canvas, denoise):
    mask_id, (_, length) = self.draw.mask_id, canvas.tokens.shape
    free, last = ~canvas.fixed, canvas.tokens[:, -1:]
    # Gaps of a given length have no room.
    is_any = free & (canvas.tokens == last) & canvas.fixed[:, -1:]
    row, place = jnp.arange(len(free))[:, None], jnp.arange(length)[None]
    start = insert.run_starts(is_any)
    is_first = is_any & (place - start < self.num_masks)
    tokens = jnp.where(free & (is_first | ~is_any), mask_id, canvas.tokens)

    def body(state):
      tokens, budget, step = state
      masked = free & (tokens == mask_id)
      score_keys, kind_keys, draw_keys = reveal.split_each(
        reveal.fold_in_each(keys, step), 3
      )
      level = jnp.mean(masked, axis=1)
      logits = denoise(tokens, level, posterior.all_positions(tokens))
      room = (
        jnp.zeros_like(tokens)
        .at[row, start]
        .add(is_any & (tokens == last))[row, start]
      )
      is_open = masked & is_any
      can_two = is_open & (room > 0) & (budget > 0)
      ids = jnp.arange(logits.shape[-1])[None, None]
      is_two = ids == mask_id
      # A text with gaps of any length does not hold the last token of the row.
      is_none = ids == last[..., None]
      is_none &= jnp.any(is_any, axis=1)[:, None, None]
      barred = is_two & ~can_two[..., None] | is_none & ~is_open[..., None]
      log_p = categorical.log_prob(
        jnp.where(barred, categorical.NEG_INF, logits), mask_id + 1
      )
      # Whether there are two masks, none, or a token.
      end = jnp.take_along_axis(log_p, last[..., None], axis=2)[..., 0]
      kinds = (
        log_p[..., mask_id],
        jnp.where(is_open, end, categorical.NEG_INF),
        categorical.log_sum_exp(
          jnp.where(is_two | is_none, categorical.NEG_INF, log_p)
        ),
      )
      kind = jax.vmap(categorical.sample_categorical)(
        kind_keys, jnp.stack(kinds, axis=-1)
      )
      two, none = kind == 0, kind == 1
      new = self.draw.sample(
        draw_keys, jnp.where(is_none, categorical.NEG_INF, logits)
      )
      new = jnp.where(none, last, jnp.where(two, mask_id, new))
      score, _ = confidence.measure(self.score, score_keys, log_p, new)
      at = jnp.argmax(jnp.where(masked, score, -jnp.inf), axis=1)[:, None]
      is_at = (place == at) & masked
      tokens = jnp.where(is_at, new, tokens)
      # No row does both.
      two = jnp.take_along_axis(two, at, axis=1)
      count = (is_at & two).astype(tokens.dtype)
      longer = insert.insert(tokens, is_any, count, mask_id)
      # What is deleted is room at the end of its gap.
      is_room = is_any & (tokens == last)
      order = jnp.argsort(2 * start + is_room, axis=1)
      shorter = jnp.take_along_axis(tokens, order, axis=1)
      tokens = jnp.where(two, longer, shorter)
      return tokens, budget - two, step + 1

    def goes_on(state):
      return sharding.on_any_device(jnp.any(free & (state[0] == mask_id)))

    budget = jnp.sum(is_any, axis=1, keepdims=True)
    zero = jnp.zeros_like(tokens[0, 0])
    tokens, _, step = jax.lax.while_loop(goes_on, body, (tokens, budget, zero))
    return Samples(tokens=tokens, num_calls=step * reveal.calls_of(denoise))
