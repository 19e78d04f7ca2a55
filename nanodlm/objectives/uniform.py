"""Uniform noise, and the curriculum that begins with relaxed tokens."""

import dataclasses
import math

import jax.numpy as jnp

from nanodlm.noise import categorical, gaussian, processes, schedules, times
from nanodlm.objectives import mixture
from nanodlm.types import InputError, Objective, SoftTokens

# The noise levels alpha of the curriculum. At its ends Duo's range of 50k
# tokens, log signal-to-noise ratios of 1.85 to 3.55, has 0.049 and 0.945.
MIN_ALPHA, MAX_ALPHA = 0.05, 0.95


@dataclasses.dataclass(frozen=True)
class Uniform(mixture.MixtureNoise):
  """Uniform noise on any schedule. Source: UDLM, arXiv 2412.10193.

  The noise level is not visible in the text, so the network must be
  time-conditioned, unless `needs_time` is off: it then infers what it can, and
  the bound is looser. Source: GIDD at scale, arXiv 2512.10858.

  Attributes:
    schedule: alpha(t).
    needs_time: whether a network that does not read the time is refused.
    curriculum_steps: number of first steps that train `Relaxed` tokens; 0: off.
    tau: temperature of the relaxed tokens, >= 0.
    num_soft_tokens: K, tokens in the mixture that replaces a noisy one.
  """

  schedule: schedules.Schedule = schedules.Linear()
  curriculum_steps: int = 0
  tau: float = 1e-3
  num_soft_tokens: int = 8
  needs_time: bool = True

  starts_masked = False

  def __post_init__(self):
    super().__post_init__()
    for key, bound in (
      ('curriculum_steps', 0),
      ('tau', 0),
      ('num_soft_tokens', 1),
    ):
      value = getattr(self, key)
      if not bound <= value < math.inf:
        raise InputError(
          f'objective.{key}={value!r} must be >= {bound} and finite'
        )

  @property
  def process(self) -> processes.Uniform:
    """The forward process: random tokens only."""
    return processes.Uniform(self.mask_id, self.schedule)

  def unread_keys(self, uses_time):
    unread = super().unread_keys(uses_time)
    if self.curriculum_steps:
      return unread
    return unread | {'tau', 'num_soft_tokens'}

  def evaluation(self):
    # The curriculum is training's.
    own = super().evaluation()
    return dataclasses.replace(
      own,
      curriculum_steps=0,
      tau=Uniform.tau,
      num_soft_tokens=Uniform.num_soft_tokens,
    )

  def curriculum(self) -> Objective:
    if not self.curriculum_steps:
      return self
    if self.num_soft_tokens > self.mask_id:
      raise InputError(
        f'objective.num_soft_tokens={self.num_soft_tokens!r} must be at most '
        f'{self.mask_id}, the number of tokens of the vocabulary'
      )
    return self.in_form(Relaxed)


@dataclasses.dataclass(frozen=True)
class Relaxed(Uniform):
  """Uniform noise whose tokens the network reads as mixtures of embeddings.

  The noisy token is the argmax of a Gaussian w (`noise.gaussian`). The network
  reads the mean of embeddings under softmax(w / tau) instead, which shows some
  of what the argmax hides, so that the loss, which is that of `Uniform` for the
  argmax, has gradients of less variance. Source: Duo's curriculum, arXiv
  2506.10892; with the largest entries of w alone, arXiv 2602.21185.

  The loss is the part of the bound's integral over time in which alpha is in
  [MIN_ALPHA, MAX_ALPHA], for another input. It bounds nothing, and the reported
  nll is NaN.

  Differs from the paper: times are those of `MixtureNoise` within the range,
  and w has the signal-to-noise ratio with that time's alpha, where the paper
  draws ratios uniformly. This changes the variance of the same integral, the
  derivative of alpha(t) is exact, and the network reads the time that it reads
  afterwards. The softmax is normalised over the K largest entries, whose law is
  exact, and x0 is one of them at its own rank only.
  """

  def curriculum(self):
    return self

  def clock(self, levels):
    first, last = (
      times.inverse_smoothstep(self.schedule.inverse(1 - jnp.float32(alpha)))
      for alpha in (MAX_ALPHA, MIN_ALPHA)
    )
    return first + (last - first) * (1 - levels), last - first

  def corrupt(self, keys, levels, x0, eligible):
    t, rest = times.smoothstep(self.clock(levels)[0])
    mean = gaussian.mean_at(self.process.parts(t, rest).alpha, self.mask_id)
    ids, weights = gaussian.sample_soft(
      keys, x0, mean, self.mask_id, self.num_soft_tokens, self.tau
    )
    is_noisy = eligible[..., None]
    ids = jnp.where(is_noisy, ids, x0[..., None])
    first = jnp.arange(self.num_soft_tokens)[None, None] == 0
    xt = ids[..., 0]
    soft = SoftTokens(ids, jnp.where(is_noisy, weights, first))
    return self.noised(levels, x0, xt, eligible)._replace(soft=soft)

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    terms = super().terms(logits, fields, vocab)
    return terms._replace(nll=jnp.full_like(terms.nll, jnp.nan))
