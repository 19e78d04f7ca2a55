"""Masked (absorbing) diffusion, with MDLM, MD4 and LLaDA as special cases."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.objectives import masking, room
from nanodlm.types import Noised, Terms

# Most masks that are added after a gap, to be deleted.
MAX_DELETED = 64


@dataclasses.dataclass(frozen=True)
class Masked(masking.MaskedNoise, room.Roomy):
  """The negative evidence lower bound of masked diffusion, x0 prediction.

  Every form is a weighted cross entropy of the masked positions,

      loss_i = scale * 1[xt_i = mask] * -log p(x0_i | xt),

  with the noise and the scale of `masking.MaskedNoise`:

  - continuous time: MDLM, arXiv 2406.07524, equation 10; MD4, arXiv 2406.04329,
    equation 5.
  - discrete time: MD4, section 2. It is an upper bound of the continuous-time
    value if the predictions are consistent, like those of an exact posterior.
  - fixed count: the any-order autoregressive form (Ou et al., arXiv 2406.03736;
    LLaDA, arXiv 2502.09992, equation 6). It equals continuous time on any
    schedule, with less variance and no truncation.

  With `expand`, a network also learns to change the length of gaps. Source:
  DreamOn (DreamLM/DreamOn). At a mask it predicts the mask itself if there
  should be two, and the separator if there should be none; see `merge` and
  `append`. No new id is needed, so that any masked network can be tuned this
  way. The loss is then not a bound. That of evaluation is: it is of texts of
  known length, for which the mask is not predicted.

  Attributes:
    expand: whether masks can expand and be deleted.
  """

  expand: bool = False

  default_sampler = 'fixed_count'

  @property
  def any_length(self) -> bool:  # pyright: ignore
    return self.expand

  def evaluation(self):
    return dataclasses.replace(super().evaluation(), expand=False)

  def corrupt(self, keys, levels, x0, eligible):
    if not self.expand:
      return super().corrupt(keys, levels, x0, eligible)
    keys, merge_keys, append_keys = jax.vmap(
      lambda key: tuple(jax.random.split(key, 3))
    )(keys)
    noised = super().corrupt(keys, levels, x0, eligible)
    noised = merge(merge_keys, noised, x0[:, -1:], self.mask_id)
    noised = append(append_keys, noised, x0[:, -1:], self.mask_id)
    # As in sampling: that of the share of masks.
    t = self.network_time(jnp.mean(noised.scored, axis=1))
    return noised._replace(t=t)

  def max_scored(self, batch_size, length):
    if self.expand:
      return batch_size * length
    return super().max_scored(batch_size, length)

  def network_input(self, tokens):
    return room.Roomy.network_input(self, tokens) if self.expand else tokens

  def places(self, tokens):
    return room.Roomy.places(self, tokens) if self.expand else None

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    if not self.expand:
      return self.weighted_cross_entropy(logits, fields, vocab)
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id + 1, vocab
    )
    loss, none = fields['scale'] * ce, jnp.full_like(ce, jnp.nan)
    return Terms(loss, nll=none, cross_entropy=ce, correct=correct)


def merge(
  keys: jax.Array, noised: Noised, end: jax.Array, mask_id: int
) -> Noised:
  """Merges pairs of masks to one, whose label is the mask.

  Of neighbouring masks, from left to right, each pair is merged with
  probability (1 - share of masks) / 2. The rest of the row moves, and the token
  `end` [B, 1] fills it.
  """
  masked, length = noised.scored, noised.scored.shape[1]
  draw = lambda key: jax.random.uniform(key, (length,))
  share = jnp.mean(masked, axis=1, keepdims=True)
  next_masked = jnp.pad(masked, ((0, 0), (0, 1)))[:, 1:]
  can = masked & next_masked & (jax.vmap(draw)(keys) < (1 - share) / 2)
  # Every other one of consecutive candidates.
  place = jnp.arange(length)[None]
  start = jax.lax.cummax(jnp.where(can, -1, place), axis=1)
  first = can & ((place - start) % 2 == 1)
  second = jnp.pad(first, ((0, 0), (1, 0)))[:, :length]
  target = jnp.where(first, mask_id, noised.fields['target'])
  noised = noised._replace(fields={**noised.fields, 'target': target})
  to = jnp.where(second, length, place - jnp.cumsum(second, axis=1))
  return _move(noised, to, end)


def append(
  keys: jax.Array, noised: Noised, end: jax.Array, mask_id: int
) -> Noised:
  """Adds masks whose label is the token `end` [B, 1] after a run of masks.

  Half of the rows have none. The number is uniform in others, up to MAX_DELETED
  and the tokens `end` that are not masked at the end of the row.
  """
  masked, length = noised.scored, noised.tokens.shape[1]
  place = jnp.arange(length)[None]
  u = jax.vmap(lambda key: jax.random.uniform(key, (length + 2,)))(keys)
  # The end of the run of a random mask.
  chosen = jnp.argmax(jnp.where(masked, u[:, 2:], -1.0), axis=1)[:, None]
  stops = jnp.where(masked | (place < chosen), length, place)
  stop = jnp.min(stops, axis=1, keepdims=True)
  is_text = masked | (noised.tokens != end)
  num_text = jnp.max(jnp.where(is_text, place + 1, 0), axis=1, keepdims=True)
  most = jnp.minimum(length - 1 - num_text, MAX_DELETED)
  num = 1 + (u[:, :1] * most).astype(jnp.int32)
  has = (u[:, 1:2] < 0.5) & (most > 0) & jnp.any(masked, axis=1, keepdims=True)
  num = jnp.where(has, num, 0)
  noised = _move(noised, place + num * (place >= stop), end)
  is_new = (place >= stop) & (place < stop + num)
  own = jnp.take_along_axis(noised.fields['scale'], chosen, axis=1)
  scale = jnp.where(is_new, own, noised.fields['scale'])
  target = jnp.where(is_new, end, noised.fields['target'])
  return noised._replace(
    tokens=jnp.where(is_new, mask_id, noised.tokens),
    scored=noised.scored | is_new,
    fields={'target': target, 'scale': scale},
  )


def _move(noised: Noised, to: jax.Array, end: jax.Array) -> Noised:
  """Moves positions to places `to` [B, L]; L or more: they are left out."""
  row = jnp.arange(len(to))[:, None]

  def move(x, fill):
    blank = jnp.broadcast_to(jnp.asarray(fill, x.dtype), x.shape)
    return blank.at[row, to].set(x, mode='drop')

  fields = noised.fields
  return noised._replace(
    tokens=move(noised.tokens, end),
    scored=move(noised.scored, False),
    fields={
      'target': move(fields['target'], end),
      'scale': move(fields['scale'], 0.0),
    },
  )
