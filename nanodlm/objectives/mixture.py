"""Noise that replaces tokens: uniform (UDLM) and hybrid (GIDD), one bound."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical, processes, schedules, times
from nanodlm.types import InputError, Noised, Objective, Terms

NOISES = ('stratified', 'uniform')
# The clock u is kept this far from 0 and 1, where rates are infinite. Less than
# 1e-5 of the bound lies outside (see the tests).
MIN_CLOCK = 1e-6
# Below it phi is computed by its series: phi's relative error then stays under
# 1e-5, where d - log(1 + d) alone would lose it all.
SERIES_BELOW = 0.05
# A share per token below it is taken for 0: float32 could not divide by it, and
# no draw has ever met it.
MIN_MASS = 1e-30


@dataclasses.dataclass(frozen=True)
class MixtureNoise(Objective):
  """The continuous-time bound for any `processes.Mixture`.

  The noise is a Markov chain that jumps into token z, from wherever it stands,
  at the rate g(z) = b'(z) - (alpha' / alpha) b(z), as d/dt of q_t shows;
  comparing its reverse with the network's gives

      loss_i = g(z) / q(z) * [KL(q || p) + r - 1 - log r],  r = q(z) / p(z),

  where z = xt_i, q = q_t(. | x0_i) and p = q_t(. | x), the same mixture around
  the network's x. This is GIDD's bound (arXiv 2503.04482) with its weight g / q
  written for any shares; for uniform noise it is UDLM's (arXiv 2412.10193);
  where nothing but masks is mixed in it is the masked bound. x is the law of
  x0_i given the OTHER positions: with it the bound is exact.

  Times are t = tau(u) = u^2 (3 - 2u), u ~ U(0, 1), and the loss is multiplied
  by tau'(u): hybrid noise has rates ~ t^{-1/2} at the ends, and tau' cancels
  them, so that nothing but MIN_CLOCK is left out. It also keeps the variance of
  uniform noise's loss finite; hybrid noise's grows with log(1 / MIN_CLOCK).

  Attributes:
    mask_id: the mask's id; the ids below it are the real tokens.
    noise: how u is drawn: 'stratified' (over the global batch) or 'uniform'.
    max_weight: g / q is clipped to it in TRAINING (GIDD's clamped weights); 0
      is off. The reported nll is never clipped.
  """

  mask_id: int
  noise: str = 'stratified'
  max_weight: float = 0.0

  causal = False
  exact = False
  block_size = 0
  group_size = 1
  needs_time = False
  can_correct = True
  noises = NOISES  # the first is what objective.noise='auto' stands for

  def __post_init__(self):
    times.check_noise(self.noise, self.noises)
    if not self.max_weight >= 0:
      raise InputError(
        f'objective.max_weight={self.max_weight!r} must be >= 0 (0: off)'
      )

  @property
  def process(self) -> processes.Mixture:
    """How tokens become noise."""
    raise NotImplementedError

  def evaluation(self) -> 'MixtureNoise':
    return dataclasses.replace(self, noise='stratified', max_weight=0.0)

  def naive(self) -> 'MixtureNoise':
    return dataclasses.replace(self.evaluation(), noise='uniform')

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
    t, rest = times.smoothstep(_clock(levels))
    xt = self.process.corrupt(keys, self.process.parts(t, rest), x0, eligible)
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
    """What `terms` needs: levels [B], x0 and xt [B, L] -> arrays [B, L]."""
    u = _clock(levels)
    (t, rest), (speed, _) = jax.jvp(times.smoothstep, (u,), (jnp.ones_like(u),))
    one = jnp.ones_like(t)
    parts, rates = jax.jvp(self.process.parts, (t, rest), (one, -one))
    spread = lambda x: jnp.broadcast_to(x[:, None], x0.shape)
    parts, rates, speed = jax.tree.map(spread, (parts, rates, speed))
    b = self.process.mass(parts, xt)
    # alpha = 0, t = 1 in float32: the bracket is of second order in alpha.
    is_alive = parts.alpha > 0
    alpha = jnp.where(is_alive, parts.alpha, 1.0)
    jump = self.process.mass(rates, xt) - rates.alpha / alpha * b
    q = b + jnp.where(xt == x0, parts.alpha, 0.0)
    # (Where q = 0, xt cannot have been drawn.)
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

  def terms(self, logits: jax.Array, fields, vocab=categorical.WHOLE) -> Terms:
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

  def max_scored(self, batch_size: int, length: int) -> int:
    return batch_size * length

  def network_input(self, tokens: jax.Array) -> jax.Array:
    return tokens

  def network_time(self, level: jax.Array) -> jax.Array:
    return level

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    return self.process.sample_prior(keys, length)

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
    p_x0 = jnp.exp(draw.log_prob(logits))
    return categorical.safe_log(self.process.posterior(xt, p_x0, s, t))


@dataclasses.dataclass(frozen=True)
class Uniform(MixtureNoise):
  """Uniform noise, on any schedule: UDLM, arXiv 2412.10193.

  Nothing in a text tells how noisy it is, so the network must be told the time.

  Attributes:
    schedule: alpha(t).
  """

  schedule: schedules.Schedule = schedules.Linear()

  needs_time = True

  @property
  def process(self) -> processes.Uniform:
    """How tokens become noise: random tokens only."""
    return processes.Uniform(self.mask_id, self.schedule)


@dataclasses.dataclass(frozen=True)
class Hybrid(MixtureNoise):
  """Masks and uniform tokens: GIDD, arXiv 2503.04482.

  The share of masks tells the network the time; conditioning is optional.

  Attributes:
    p_uniform: the largest share of uniform tokens, at t = 1/2, in [0, 1).
    gamma: of `processes.Hybrid`; at least 1, or the loss has no variance.
  """

  p_uniform: float = 0.1
  gamma: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.p_uniform < 1:
      raise InputError(
        f'objective.p_uniform={self.p_uniform!r} must be in [0, 1)'
      )
    if not self.gamma >= 1:
      raise InputError(f'objective.gamma={self.gamma!r} must be >= 1')

  @property
  def process(self) -> processes.Hybrid:
    """How tokens become noise: masks and random tokens."""
    return processes.Hybrid(self.mask_id, self.p_uniform, self.gamma)


def phi(d: jax.Array, log1p_d: jax.Array) -> jax.Array:
  """phi(1 + d) = d - log(1 + d), >= 0, for d > -1; any shape."""
  is_small = jnp.abs(d) < SERIES_BELOW
  e = jnp.where(is_small, d, 0.0)
  series = e * e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e / 6))))
  return jnp.where(is_small, series, d - log1p_d)


def _clock(levels):
  """u for levels in [0, 1), as far from 0 and 1 as MIN_CLOCK."""
  return jnp.clip(1 - levels, MIN_CLOCK, 1 - MIN_CLOCK)


def _divergence(log_x, log_x0, fields, vocab):
  """KL(q || p) = sum_y q_y phi(p_y / q_y), [N]."""
  is_target = vocab.ids(log_x) == fields['target'][:, None]
  alpha, b = fields['alpha'], fields['mass']
  is_mixed = b > 0
  safe_b = jnp.where(is_mixed, b, 1.0)
  # y != x0: q_y = b and p_y - q_y = alpha x_y.
  gain = jnp.where(is_target, 0.0, alpha[:, None] * jnp.exp(log_x))
  d = gain / safe_b[:, None]
  others = jnp.where(
    is_mixed[:, None], safe_b[:, None] * phi(d, jnp.log1p(d)), gain
  )
  # y = x0: q = alpha + b and p - q = -alpha (1 - x0).
  q = alpha + b
  d = alpha * jnp.expm1(log_x0) / jnp.where(q > 0, q, 1.0)
  log_ratio = jnp.where(
    is_mixed, -jnp.log1p(_shortfall(log_x0, alpha, b)), log_x0
  )
  return vocab.sum(others) + q * phi(d, log_ratio)


def _ratio_excess(log_xz, log_x0, is_clean, is_mask, fields):
  """r - 1 - log r = phi(q(z) / p(z)), [N]; 0 at the mask, where q = p."""
  alpha, b = fields['alpha'], fields['mass']
  is_mixed = b > 0  # without uniform noise nothing jumps into a real token
  safe_b = jnp.where(is_mixed, b, 1.0)
  d = _shortfall(log_x0, alpha, b)
  clean = phi(d, jnp.log1p(d))
  gain = jnp.where(is_clean | is_mask, 0.0, alpha * jnp.exp(log_xz))
  wrong = phi(-gain / (safe_b + gain), -jnp.log1p(gain / safe_b))
  return jnp.where(is_mixed & ~is_mask, jnp.where(is_clean, clean, wrong), 0.0)


def _shortfall(log_x0, alpha, b):
  """q / p - 1 at the clean token, >= 0, [N]; 0 where b = 0."""
  p = jnp.where(b > 0, alpha * jnp.exp(log_x0) + b, 1.0)
  return jnp.where(b > 0, -alpha * jnp.expm1(log_x0) / p, 0.0)
