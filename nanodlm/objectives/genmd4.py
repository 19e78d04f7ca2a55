"""GenMD4: masked noise with a learned schedule for each token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.noise import categorical
from nanodlm.objectives import diffusion
from nanodlm.types import Noised, Terms


@dataclasses.dataclass(frozen=True)
class GenMD4(diffusion.Diffusion):
  """The bound of masked noise with alpha_v(t) = 1 - t^w_v for token v.

  Source: MD4, arXiv 2406.04329, section on state-dependent schedules. A masked
  token v is revealed in reverse time at the rate w_v / t, and by the network at
  the rate x_v w_v / t. Their comparison gives, for each mask,

      loss_i = (1 / t) (w_x0 (-log x_x0 - 1) + sum_v w_v x_v)
             = (1 / t) (w_x0 * -log x_x0 + sum_v (w_v - w_x0) x_v) >= 0,

  which is the masked loss if w = 1. At a known time, a mask is itself evidence
  about the token it hides, so the network must be time-conditioned.

  The rates w = softplus(params['rate']) are trained. Since they determine which
  tokens are masked, part of their gradient is a score-function estimate, whose
  baseline is the other one of two draws per example (RLOO, as in the paper).

  Times are t = u^2, u ~ U(0, 1], and the loss is multiplied by dt/du. The
  variance is then infinite only for w <= 1/2; at uniform times it would be for
  w <= 1.

  Differs from the paper: alpha_v(1) = 0 exactly, so that the bound is complete
  (the paper uses (1 - eps) t^w).

  Attributes:
    rates: w, [N], > 0, set by `bind`; None is all 1.
  """

  rates: Any = None

  needs_time = True
  num_training_draws = 2

  def init_params(self) -> dict[str, jax.Array]:
    """Returns the parameters of w = 1, the linear schedule for all tokens."""
    return {'rate': jnp.full((self.mask_id,), np.log(np.expm1(1.0)))}

  def bind(self, params: dict[str, jax.Array]) -> 'GenMD4':
    return dataclasses.replace(self, rates=jax.nn.softplus(params['rate']))

  def _rate(self, ids: jax.Array) -> jax.Array:
    """Returns w of ids of any shape; 1 for the mask and padding."""
    if self.rates is None:
      return jnp.ones(ids.shape)
    rates = jnp.asarray(self.rates, jnp.float32)
    return jnp.where(
      ids < self.mask_id, rates[jnp.minimum(ids, self.mask_id - 1)], 1.0
    )

  def corrupt(self, keys, levels, x0, eligible):
    u = 1 - levels  # In (0, 1].
    spread = lambda x: jnp.broadcast_to(x[:, None], x0.shape)
    xt = self.process.corrupt(
      keys, spread(u * u) ** self._rate(x0), x0, eligible
    )
    return Noised(
      tokens=xt,
      t=u * u,
      scored=eligible & (xt == self.mask_id),
      level=spread(u * u),
      fields={'target': x0, 'scale': spread(2 / u)},
    )

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    target = fields['target']
    ce, correct = categorical.cross_entropy(logits, target, self.mask_id, vocab)
    x = jnp.exp(categorical.log_prob(logits, self.mask_id, vocab))
    own = self._rate(target)
    excess = vocab.sum((self._rate(vocab.ids(logits)) - own[:, None]) * x)
    loss = fields['scale'] * (own * ce + excess)
    return Terms(loss=loss, nll=loss, cross_entropy=ce, correct=correct)

  def loss(self, batch, levels, keys, score):
    """Scores two draws of each example and adds the schedule's gradient."""
    keys = jax.vmap(jax.random.split)(keys).reshape(-1)
    twice = lambda x: jnp.repeat(x, 2, axis=0)
    x0, eligible = twice(batch.tokens), twice(batch.eligible)
    noised = self.corrupt(keys, twice(levels), x0, eligible)
    scores = score(noised, eligible * twice(batch.weight / 2)[:, None])
    gradient = self._schedule_gradient(noised, x0, eligible, scores.rows.loss)
    return scores._replace(total=scores.total + gradient)

  def _schedule_gradient(self, noised, x0, eligible, loss):
    """Sums (f_1 - f_2) (log q(z_1) - log q(z_2)) over pairs of draws, [].

    Its gradient is the score-function estimate, with the other draw as the
    baseline.
    """
    log_mask = self._rate(x0) * jnp.log(noised.t)[:, None]
    # At t = 1, log_mask is 0 and every eligible token is masked.
    is_kept = eligible & ~noised.scored
    log_keep = jnp.log(-jnp.expm1(jnp.where(is_kept, log_mask, -1.0)))
    log_q = jnp.where(noised.scored, log_mask, log_keep)
    log_q = jnp.sum(jnp.where(eligible, log_q, 0.0), axis=1).reshape(-1, 2)
    f = jax.lax.stop_gradient(loss).reshape(-1, 2)
    return jnp.sum((f[:, 0] - f[:, 1]) * (log_q[:, 0] - log_q[:, 1]))

  def noise_at(self, t):
    """Returns that of a token with w = 1."""
    return t

  def renoise(self, keys, x0, t, where):
    return self.process.corrupt(keys, t ** self._rate(x0), x0, where)

  def reverse(self, logits, xt, s, t, draw):
    """Reveals v with probability x_v (alpha_v(s) - alpha_v(t)) / t^w_v."""
    x = jnp.exp(draw.log_prob(logits))
    ids = categorical.WHOLE.ids(logits)
    hidden = x * (s / t) ** self._rate(ids)
    still_masked = jnp.sum(hidden, axis=-1, keepdims=True)
    p_xs = jnp.where(ids == self.mask_id, still_masked, x - hidden)
    is_masked = (xt == self.mask_id)[..., None]
    carried = jnp.where(ids == xt[..., None], 1.0, 0.0)
    return categorical.safe_log(jnp.where(is_masked, p_xs, carried))
