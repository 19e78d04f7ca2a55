"""Noise that replaces tokens: the bound of any, and hybrid noise (GIDD)."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical, processes, times
from nanodlm.objectives import diffusion
from nanodlm.types import InputError, Noised, Terms

# Minimum distance of u from 0 and 1, where rates are infinite. It omits less
# than 1e-5 of the bound, as the tests show; 2e-5 with p_uniform=0.9.
MIN_CLOCK = 1e-6
# Below this |d|, phi is computed by its series, with a relative error under
# 1e-5; d - log(1 + d) would cancel.
SERIES_BELOW = 0.05
# Shares per token below this count as 0. float32 cannot divide by them, and
# draws do not encounter them.
MIN_MASS = 1e-30


@dataclasses.dataclass(frozen=True)
class MixtureNoise(diffusion.Diffusion):
  """The continuous-time bound for any `processes.Mixture`.

  The noise is a Markov chain that jumps from any token to token z at the rate
  g(z) = b'(z) - (alpha' / alpha) b(z), by differentiation of q_t. Comparison of
  its reverse with the network's gives

      loss_i = g(z) / q(z) * [KL(q || p) + r - 1 - log r],  r = q(z) / p(z),

  where z = xt_i, q = q_t(. | x0_i) and p = q_t(. | x), the same mixture around
  the network's prediction x. This is the bound of GIDD (arXiv 2503.04482), with
  its weight g / q generalised to any shares. It is the bound of UDLM (arXiv
  2412.10193) for uniform noise, and the masked bound for masks alone. The bound
  is exact if x is the law of x0_i given the OTHER positions.

  Times are t = tau(u) = u^2 (3 - 2u), u ~ U(0, 1), and the loss is multiplied
  by tau'(u), which cancels the rates ~ t^{-1/2} of hybrid noise at both ends;
  only MIN_CLOCK truncates the bound. The loss of uniform noise then has finite
  variance; that of hybrid noise grows with log(1 / MIN_CLOCK).

  Attributes:
    max_weight: upper limit of g / q in TRAINING (GIDD's clamped weights); 0
      disables it. The reported nll is not clipped.
  """

  max_weight: float = 0.0

  can_correct = True

  def __post_init__(self):
    super().__post_init__()
    if not self.max_weight >= 0:
      raise InputError(
        f'objective.max_weight={self.max_weight!r} must be >= 0; 0 disables it'
      )

  @property
  def process(self) -> processes.Mixture:
    """The forward process."""
    raise NotImplementedError

  def evaluation(self):
    return dataclasses.replace(super().evaluation(), max_weight=0.0)

  def clock(self, levels: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Returns u for levels in [0, 1), and the range of u that they cover."""
    return jnp.clip(1 - levels, MIN_CLOCK, 1 - MIN_CLOCK), 1.0

  def corrupt(self, keys, levels, x0, eligible):
    t, rest = times.smoothstep(self.clock(levels)[0])
    xt = self.process.corrupt(keys, self.process.parts(t, rest), x0, eligible)
    return self.noised(levels, x0, xt, eligible)

  def noised(
    self, levels: jax.Array, x0: jax.Array, xt: jax.Array, eligible: jax.Array
  ) -> Noised:
    """Returns x0 [B, L] noised to xt [B, L] at levels [B]."""
    t, _ = times.smoothstep(self.clock(levels)[0])
    return Noised(
      tokens=xt,
      t=t,
      scored=eligible,
      level=jnp.broadcast_to(t[:, None], x0.shape),
      fields=self.fields(levels, x0, xt),
    )

  def fields(
    self, levels: jax.Array, x0: jax.Array, xt: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns the fields of `terms`, [B, L]: levels [B], x0 and xt [B, L]."""
    u, speed = self.clock(levels)
    speed = jnp.full_like(u, speed)
    (t, rest), (speed, _) = jax.jvp(times.smoothstep, (u,), (speed,))
    one = jnp.ones_like(t)
    parts, rates = jax.jvp(self.process.parts, (t, rest), (one, -one))
    spread = lambda x: jnp.broadcast_to(x[:, None], x0.shape)
    parts, rates, speed = jax.tree.map(spread, (parts, rates, speed))
    b = self.process.mass(parts, xt)
    # t may round to 1, where the loss is 0: its bracket is O(alpha^2).
    is_alive = parts.alpha > 0
    alpha = jnp.where(is_alive, parts.alpha, 1.0)
    jump = self.process.mass(rates, xt) - rates.alpha / alpha * b
    q = b + jnp.where(xt == x0, parts.alpha, 0.0)
    # If q = 0, xt cannot be drawn.
    ratio = jnp.where(is_alive & (q > 0), jump / jnp.where(q > 0, q, 1.0), 0.0)
    clipped = jnp.minimum(ratio, self.max_weight) if self.max_weight else ratio
    mass = parts.uniform / self.mask_id
    return {
      'target': x0,
      'noisy': xt,
      'alpha': parts.alpha,
      'mass': jnp.where(mass > MIN_MASS, mass, 0.0),
      'loss_weight': clipped * speed,
      'nll_weight': ratio * speed,
    }

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    target, noisy = fields['target'], fields['noisy']
    log_x = categorical.log_prob(logits, self.mask_id, vocab)
    log_x0 = vocab.pick(log_x, target)
    divergence = _divergence(log_x, log_x0, fields, vocab)
    divergence += _ratio_excess(
      vocab.pick(log_x, noisy),
      log_x0,
      noisy == target,
      noisy == self.mask_id,
      fields,
    )
    correct = log_x0 >= vocab.max(log_x)
    return Terms(
      loss=fields['loss_weight'] * divergence,
      nll=fields['nll_weight'] * divergence,
      cross_entropy=-log_x0,
      correct=correct.astype(jnp.float32),
    )

  def noise_at(self, t):
    return 1 - self.process.parts(t).alpha

  def renoise(self, keys, x0, t, where):
    t = jnp.full(x0.shape[0], t)
    return self.process.corrupt(keys, self.process.parts(t), x0, where)

  def reverse(self, logits, xt, s, t, draw):
    p_x0 = jnp.exp(draw.log_prob(logits))
    return categorical.safe_log(self.process.posterior(xt, p_x0, s, t))


@dataclasses.dataclass(frozen=True)
class Hybrid(MixtureNoise):
  """Masks and uniform tokens. Source: GIDD, arXiv 2503.04482.

  The share of masks reveals the time, so time conditioning is optional.

  Attributes:
    p_uniform: maximum share of uniform tokens, at t = 1/2, in [0, 0.9]; with
      more, MIN_CLOCK omits more of the bound.
    gamma: see `processes.Hybrid`, in [1, 2]. Below 1 the loss has infinite
      variance; above 2 tokens would jump at negative rates.
  """

  p_uniform: float = 0.1
  gamma: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.p_uniform <= 0.9:
      raise InputError(
        f'objective.p_uniform={self.p_uniform!r} must be in [0, 0.9]'
      )
    if not 1 <= self.gamma <= 2:
      raise InputError(f'objective.gamma={self.gamma!r} must be in [1, 2]')

  @property
  def process(self) -> processes.Hybrid:
    """The forward process: masks and random tokens."""
    return processes.Hybrid(self.mask_id, self.p_uniform, self.gamma)

  def unread_keys(self, uses_time):
    own = frozenset(() if self.p_uniform else {'gamma'})
    return super().unread_keys(uses_time) | own


def phi(d: jax.Array, log1p_d: jax.Array) -> jax.Array:
  """Computes phi(1 + d) = d - log(1 + d) >= 0 for d > -1 of any shape."""
  is_small = jnp.abs(d) < SERIES_BELOW
  e = jnp.where(is_small, d, 0.0)
  series = e * e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e / 6))))
  return jnp.where(is_small, series, d - log1p_d)


def _divergence(log_x, log_x0, fields, vocab):
  """Computes KL(q || p) = sum_y q_y phi(p_y / q_y), [N]."""
  is_target = vocab.ids(log_x) == fields['target'][:, None]
  alpha, b = fields['alpha'], fields['mass']
  is_mixed = b > 0
  safe_b = jnp.where(is_mixed, b, 1.0)
  # For y != x0, q_y = b and p_y - q_y = alpha x_y.
  gain = jnp.where(is_target, 0.0, alpha[:, None] * jnp.exp(log_x))
  d = gain / safe_b[:, None]
  others = jnp.where(
    is_mixed[:, None], safe_b[:, None] * phi(d, jnp.log1p(d)), gain
  )
  # For y = x0, q = alpha + b and p - q = -alpha (1 - x0).
  q = alpha + b
  d = alpha * jnp.expm1(log_x0) / jnp.where(q > 0, q, 1.0)
  log_ratio = jnp.where(
    is_mixed, -jnp.log1p(_shortfall(log_x0, alpha, b)), log_x0
  )
  return vocab.sum(others) + q * phi(d, log_ratio)


def _ratio_excess(log_xz, log_x0, is_clean, is_mask, fields):
  """Computes r - 1 - log r = phi(q(z) / p(z)), [N]; 0 at masks (q = p)."""
  alpha, b = fields['alpha'], fields['mass']
  is_mixed = b > 0  # Without uniform noise, no jump ends in a real token.
  safe_b = jnp.where(is_mixed, b, 1.0)
  d = _shortfall(log_x0, alpha, b)
  clean = phi(d, jnp.log1p(d))
  gain = jnp.where(is_clean | is_mask, 0.0, alpha * jnp.exp(log_xz))
  wrong = phi(-gain / (safe_b + gain), -jnp.log1p(gain / safe_b))
  return jnp.where(is_mixed & ~is_mask, jnp.where(is_clean, clean, wrong), 0.0)


def _shortfall(log_x0, alpha, b):
  """Computes q / p - 1 >= 0 at the clean token, [N]; 0 if b = 0."""
  p = jnp.where(b > 0, alpha * jnp.exp(log_x0) + b, 1.0)
  return jnp.where(b > 0, -alpha * jnp.expm1(log_x0) / p, 0.0)
