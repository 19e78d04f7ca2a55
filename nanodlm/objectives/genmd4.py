"""Masked noise whose schedule is learned, one for each token: GenMD4."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.noise import categorical, processes, times
from nanodlm.types import Noised, Objective, Terms


@dataclasses.dataclass(frozen=True)
class GenMD4(Objective):
  """The bound of masked noise with alpha_v(t) = 1 - t^w_v for token v.

  Source: MD4, arXiv 2406.04329, section on state-dependent schedules. A token v
  is masked in dt at w_v / t times the probability of being masked, the network's
  reverse reveals v at x_v w_v / t, and comparing the two gives for each mask

      loss_i = (1 / t) (w_x0 (-log x_x0 - 1) + sum_v w_v x_v)
             = (1 / t) (w_x0 * -log x_x0 + sum_v (w_v - w_x0) x_v) >= 0;

  the masked loss where w = 1. That i is masked tells of x0_i, by the time, so
  that the network must know the time.

  w = softplus(params['rate']) is trained too. It decides which tokens are
  masked: that part of the gradient is the score function's, with the other one
  of two draws of an example as the baseline (RLOO, as in the paper).

  Times are t = u^2, u ~ U(0, 1], and the loss is multiplied by dt/du: at uniform
  times its variance would be infinite for w <= 1, so it is for w <= 1/2.

  Differs from the paper: alpha_v(1) = 0 exactly, so nothing is left out of the
  bound (the paper has (1 - eps) t^w).

  Attributes:
    mask_id: the mask's id; the ids below it are the N real tokens.
    noise: how u is drawn: 'stratified' (over the global batch) or 'uniform'.
    rates: w, [N], > 0; None: all 1. `bind` sets it.
  """

  mask_id: int
  noise: str = 'stratified'
  rates: Any = None

  causal = False
  exact = False
  block_size = 0
  group_size = 1
  num_draws = 2
  needs_time = True
  can_correct = False
  noises = (
    'stratified',
    'uniform',
  )  # the first is what objective.noise='auto' stands for

  def __post_init__(self):
    times.check_noise(self.noise, self.noises)

  def init_params(self) -> dict[str, jax.Array]:
    """w = 1, MDLM's schedule for all tokens."""
    return {'rate': jnp.full((self.mask_id,), np.log(np.expm1(1.0)))}

  def bind(self, params: dict[str, jax.Array]) -> 'GenMD4':
    return dataclasses.replace(self, rates=jax.nn.softplus(params['rate']))

  def _rate(self, ids: jax.Array) -> jax.Array:
    """w of ids, any shape; 1 for those that are no real token."""
    if self.rates is None:
      return jnp.ones(ids.shape)
    rates = jnp.asarray(self.rates, jnp.float32)
    return jnp.where(
      ids < self.mask_id, rates[jnp.minimum(ids, self.mask_id - 1)], 1.0
    )

  def evaluation(self) -> 'GenMD4':
    return dataclasses.replace(self, noise='stratified')

  def naive(self) -> 'GenMD4':
    return dataclasses.replace(self, noise='uniform')

  def sample_levels(
    self, key: jax.Array, batch_size: int, length: int
  ) -> jax.Array:
    del length
    return times.SAMPLE_LEVELS[self.noise](key, batch_size)

  def eval_levels(
    self, key: jax.Array, num_draws: int, length: int
  ) -> jax.Array:
    return self.sample_levels(key, num_draws, length)

  def corrupt(
    self, keys: jax.Array, levels: jax.Array, x0: jax.Array, weight: jax.Array
  ) -> Noised:
    eligible = weight > 0
    u = 1 - levels  # in (0, 1]
    spread = lambda x: jnp.broadcast_to(x[:, None], x0.shape)
    xt = processes.Masked(self.mask_id).corrupt(
      keys, spread(u * u) ** self._rate(x0), x0, eligible
    )
    return Noised(
      tokens=xt,
      t=u * u,
      scored=eligible & (xt == self.mask_id),
      level=spread(u * u),
      fields={'target': x0, 'scale': spread(2 / u)},
    )

  def terms(self, logits: jax.Array, fields, vocab=categorical.WHOLE) -> Terms:
    target = fields['target']
    ce, correct = categorical.cross_entropy(logits, target, self.mask_id, vocab)
    x = jnp.exp(categorical.log_prob(logits, self.mask_id, vocab))
    own = self._rate(target)
    excess = vocab.sum((self._rate(vocab.ids(logits)) - own[:, None]) * x)
    loss = fields['scale'] * (own * ce + excess)
    return Terms(loss=loss, nll=loss, cross_entropy=ce, correct=correct)

  def noise_surrogate(
    self, noised: Noised, x0: jax.Array, weight: jax.Array, loss: jax.Array
  ) -> jax.Array:
    """The sum over pairs of (f_1 - f_2) (log q(z_1) - log q(z_2)), []."""
    log_mask = self._rate(x0) * jnp.log(noised.t)[:, None]
    # (At t = 1, where log_mask is 0, only a token that is given is left alone.)
    is_kept = (weight > 0) & ~noised.scored
    log_keep = jnp.log(-jnp.expm1(jnp.where(is_kept, log_mask, -1.0)))
    log_q = jnp.where(noised.scored, log_mask, log_keep)
    log_q = jnp.sum(jnp.where(weight > 0, log_q, 0.0), axis=1).reshape(-1, 2)
    f = jax.lax.stop_gradient(loss).reshape(-1, 2)
    return jnp.sum((f[:, 0] - f[:, 1]) * (log_q[:, 0] - log_q[:, 1]))

  def max_scored(self, batch_size: int, length: int) -> int:
    return batch_size * length

  def network_input(self, tokens: jax.Array) -> jax.Array:
    return tokens

  def network_time(self, level: jax.Array) -> jax.Array:
    return level

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    return processes.Masked(self.mask_id).prior((keys.shape[0], length))

  def level_at(self, t: jax.Array, free_share: jax.Array) -> jax.Array:
    return jnp.full(free_share.shape, t)

  def reverse(
    self,
    logits: jax.Array,
    xt: jax.Array,
    s: jax.Array,
    t: jax.Array,
    draw: categorical.Draw,
  ) -> jax.Array:
    """A mask becomes v with probability x_v (alpha_v(s) - alpha_v(t)) / t^w_v."""
    x = jnp.exp(draw.log_prob(logits))
    ids = categorical.WHOLE.ids(logits)
    hidden = x * (s / t) ** self._rate(ids)
    still_masked = jnp.sum(hidden, axis=-1, keepdims=True)
    p_xs = jnp.where(ids == self.mask_id, still_masked, x - hidden)
    is_masked = (xt == self.mask_id)[..., None]
    carried = jnp.where(ids == xt[..., None], 1.0, 0.0)
    return categorical.safe_log(jnp.where(is_masked, p_xs, carried))
