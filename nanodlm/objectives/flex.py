"""FlexMDM: tokens are inserted as masks and unmasked, so lengths are free."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy import special

from nanodlm.noise import categorical, times
from nanodlm.objectives import room
from nanodlm.types import InputError, InsertRule, Noised, Terms


@dataclasses.dataclass(frozen=True)
class Flex(InsertRule, room.Roomy):
  """The bound of joint insertion and unmasking, for texts of any length.

  Source: FlexMDM, arXiv 2509.01025. At time t, a token of the text is absent
  with probability t, a mask with probability -t log t, else clean; the network
  reads the tokens that are present, without gaps. In reverse time, an absent
  token becomes a mask at the rate 1 / t, and a mask its token at the same rate.
  The network gives the law of each mask's token, x, and the expected number of
  absent tokens, y. Let p and n be their exact values given the noisy and the
  clean text. Then

      loss = (1 / t) (sum_masks KL(p || x) + sum_gaps (y - n + n log(n / y))).

  This is an upper bound on -log p(text, length), for texts that are shorter
  than a row, and it is exact for an exact network. Differs from the paper,
  whose loss is larger by a constant:

  - p and n are averages over all ways in which the noisy text can be a part of
    the clean one. They are equally likely; the paper takes the one that was
    drawn.
  - A run of masks has one gap, since a mask next to another one is the same
    text on either side. It is that before the next token that is not a mask,
    or before the end of the text.

  y is read at that token, from the logit of the mask, which no law of a token
  includes. So any network has this output. It is proportional to t if t is
  small, as the exact one is where the noisy text is possible: the bound of any
  network is finite.

  Rows must be whole documents. A text ends before the last run of equal tokens
  in its row, the separators that fill it, and gaps are only next to eligible
  tokens. Times are t = v^2, v ~ U(0, 1], and the loss is multiplied by dt/dv;
  at uniform times its variance would be infinite.

  The targets take O(L^2) time and memory for each row of L tokens.
  """

  mask_id: int
  noise: str = dataclasses.field(default='stratified', kw_only=True)

  default_sampler = 'insert'
  needs_time = True
  any_length = True
  noises = ('stratified', 'uniform')

  def __post_init__(self):
    if self.noise not in self.noises:
      raise InputError(
        f'objective.noise={self.noise!r} is not one of {list(self.noises)}'
      )

  def evaluation(self):
    return dataclasses.replace(self, noise='stratified')

  def naive(self):
    return dataclasses.replace(self, noise='uniform')

  def sample_levels(self, key, batch_size, length):
    return times.SAMPLE_LEVELS[self.noise](key, batch_size)

  def corrupt(self, keys, levels, x0, eligible):
    v = (1 - levels)[:, None]  # In (0, 1].
    t = v * v
    place = jnp.arange(x0.shape[1])[None]
    num_text = _last_index(x0 != x0[:, -1:])[:, None] + 1
    is_free = eligible & (place < num_text)
    draw = jax.vmap(lambda key: jax.random.uniform(key, (x0.shape[1],)))(keys)
    is_absent = is_free & (draw < t)
    is_mask = is_free & ~is_absent & (draw < t - t * jnp.log(t))
    present = ~is_absent & (place < num_text)
    order = jnp.argsort(~present, axis=1, stable=True)
    take = lambda x: jnp.take_along_axis(x, order, axis=1)
    num = jnp.sum(present, axis=1, keepdims=True)
    tokens = take(jnp.where(is_mask, self.mask_id, x0))
    tokens = jnp.where(place < num, tokens, x0[:, -1:])
    is_mask = take(is_mask) & (place < num)
    # A noisy token at place j can be that of the text at place i.
    source = jnp.where(place < num, order, num_text)
    is_same = (tokens[..., None] == x0[:, None]) | is_mask[..., None]
    can_be = is_same & take(is_free)[..., None] & is_free[:, None]
    can_be |= ~is_free[:, None] & (source[..., None] == place[:, None])
    can_be &= (place < num)[..., None]
    share = _alignment(can_be, is_free, num_text[:, 0], num[:, 0])
    # How many absent tokens are expected before each place.
    index = place.astype(jnp.float32)
    before = jnp.sum(share * (index[:, None] - index[..., None]), axis=2)
    before = jnp.where(place < num, before, num_text - index)
    ends_gap = (place <= num) & ~is_mask
    last = jax.lax.cummax(jnp.where(ends_gap, place, -1), axis=1)
    last = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    known = jnp.take_along_axis(before, jnp.maximum(last, 0), axis=1)
    count = jnp.maximum(before - jnp.where(last < 0, 0.0, known), 0.0)
    is_open = eligible | jnp.pad(eligible, ((0, 0), (1, 0)))[:, :-1]
    is_open = jnp.take_along_axis(is_open, source, axis=1)
    spread = lambda x: jnp.broadcast_to(x, x0.shape)
    return Noised(
      tokens=tokens,
      t=t[:, 0],
      scored=is_mask | (ends_gap & is_open),
      level=spread(t),
      fields={
        'is_mask': is_mask,
        'ids': jnp.broadcast_to(x0[:, None], share.shape),
        'share': share,
        'count': count,
        't': spread(t),
        'scale': spread(2 / v),
      },
    )

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    log_x = categorical.log_prob(logits, self.mask_id, vocab)
    ids = fields['ids'] - vocab.ids(logits)[..., :1]
    ids = jnp.where(ids < 0, logits.shape[-1], ids)  # Those of other devices.
    row = jnp.arange(len(ids))[:, None]
    p = jnp.zeros_like(log_x).at[row, ids].add(fields['share'], mode='drop')
    ce = -vocab.sum(p * log_x)
    is_best = log_x >= vocab.max(log_x)[:, None]
    n, t = fields['count'], fields['t']
    y = self.num_absent(logits, t, vocab)
    gap = y - n + special.xlogy(n, n) - n * jnp.log(y)
    is_mask, is_near = fields['is_mask'], jnp.abs(y - n) < 0.5
    token = ce + vocab.sum(special.xlogy(p, p))
    loss = fields['scale'] * jnp.where(is_mask, token, gap)
    return Terms(
      loss=loss,
      nll=loss,
      cross_entropy=jnp.where(is_mask, ce, 0.0),
      correct=jnp.where(is_mask, vocab.sum(p * is_best), is_near),
    )

  def num_absent(
    self,
    logits: jax.Array,
    t: jax.Array,
    vocab: categorical.Vocab = categorical.WHOLE,
  ) -> jax.Array:
    """Returns the expected number of absent tokens; see `InsertRule`.

    It is t times the exponential of the mask's logit if that is below 1, else a
    parabola of it, so that the loss of an untrained network is not huge.
    """
    mask = jnp.full(logits.shape[:-1], self.mask_id)
    logit = vocab.pick(logits.astype(jnp.float32), mask) + jnp.log(t)
    low, high = jnp.minimum(logit, 0.0), jnp.maximum(logit, 0.0)
    return jnp.exp(low) + high + high * high / 2


def _last_index(where: jax.Array) -> jax.Array:
  """Returns the last index of each row that is True, [B]; -1 without one."""
  return jnp.max(jnp.where(where, jnp.arange(where.shape[1])[None], -1), axis=1)


def _alignment(
  can_be: jax.Array, can_skip: jax.Array, num_text: jax.Array, num: jax.Array
) -> jax.Array:
  """Returns the share of alignments in which token j is that of the text at i.

  An alignment assigns the first `num` [B] noisy tokens, in order, to tokens of
  the text, of which there are `num_text` [B].

  Args:
    can_be: [B, L, L] bool, for j and i.
    can_skip: [B, L] bool, tokens of the text that may be absent.
    num_text: [B] int32.
    num: [B] int32.

  Returns:
    [B, L, L] float32; sums to 1 over i for j < num.
  """
  length = can_skip.shape[1]
  log = lambda x: jnp.where(x, 0.0, categorical.NEG_INF)
  # [L, B, L] and [L, B, 1], by place i of the text.
  same = jnp.moveaxis(log(can_be), 2, 0)
  skip = jnp.moveaxis(log(can_skip), 1, 0)[..., None]
  inside = jnp.arange(length)[:, None, None] < num_text[None, :, None]
  start = log(jnp.arange(length + 1)[None] == jnp.zeros_like(num)[:, None])
  stop = log(jnp.arange(length + 1)[None] == num[:, None])
  shift = lambda x, *sides: jnp.pad(
    x, ((0, 0), sides), constant_values=categorical.NEG_INF
  )

  def forward(ways, at):
    same, skip, inside = at
    taken = shift(ways[:, :-1] + same, 1, 0)
    return jnp.where(inside, jnp.logaddexp(ways + skip, taken), ways), ways

  def backward(ways, at):
    same, skip, inside = at
    taken = shift(ways[:, 1:] + same, 0, 1)
    return jnp.where(inside, jnp.logaddexp(ways + skip, taken), ways), ways

  # The number of ways to align tokens before j with the text before i, and
  # those from j on with the text after i, as logarithms.
  total, before = jax.lax.scan(forward, start, (same, skip, inside))
  _, after = jax.lax.scan(backward, stop, (same, skip, inside), reverse=True)
  total = jnp.take_along_axis(total, num[:, None], axis=1)[None]
  log_share = before[..., :-1] + same + after[..., 1:] - total
  share = jnp.moveaxis(jnp.where(inside, jnp.exp(log_share), 0.0), 0, 2)
  # The logarithms of large numbers of ways are rounded.
  total_share = jnp.sum(share, axis=2, keepdims=True)
  return jnp.where(total_share > 0, share / total_share, 0.0)
