"""Masked noise: how the objectives that share it draw it and weigh it."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical, processes, schedules, times
from nanodlm.types import InputError, Noised, Objective, Terms

NOISES = ('count', 'stratified', 'uniform')
# What MDLM samples times from (arXiv 2406.07524, its published code): without it
# the variance of masked diffusion at independent times is infinite. It leaves out
# about this share of the bound.
NAIVE_MIN_TIME = 1e-3


@dataclasses.dataclass(frozen=True)
class MaskedNoise(Objective):
  """Which tokens are masked, and the factor of each masked one's loss.

  - continuous time (num_timesteps = 0, noise 'stratified' or 'uniform'):
    scale = -dalpha_t / (1 - alpha_t), t ~ U(min_time, 1].
  - discrete time (num_timesteps = T): t = j/T, j uniform on 1..T, s = t - 1/T,
    scale = T (alpha_s - alpha_t) / (1 - alpha_t).
  - fixed count (noise 'count'): k uniform on 1..n, exactly k of the n eligible
    positions masked, scale = n / k. Rows 2p and 2p + 1 get k and n + 1 - k, so
    that every whole number of pairs has the same number of scored positions.

  Attributes:
    mask_id: the mask's id.
    schedule: alpha(t).
    noise: 'count', 'stratified' (over the global batch) or 'uniform'.
    num_timesteps: T of the discrete-time form; 0 is continuous time.
    min_time: t is drawn from (min_time, 1]. 0 leaves nothing out; a positive
      value bounds the scale but leaves the bound's share below it out of the
      TRAINING loss (evaluation always uses the fixed count).
  """

  mask_id: int
  schedule: schedules.Schedule = schedules.Linear()
  noise: str = 'count'
  num_timesteps: int = 0
  min_time: float = 0.0

  causal = False
  exact = False
  block_size = 0
  needs_time = False
  can_correct = False
  noises = NOISES  # the first is what objective.noise='auto' stands for

  def __post_init__(self):
    times.check_noise(self.noise, self.noises)
    if self.num_timesteps < 0:
      raise InputError(
        f'objective.num_timesteps={self.num_timesteps!r} must be '
        '>= 0 (0: continuous time)'
      )
    if not 0 <= self.min_time < 1:
      raise InputError(
        f'objective.min_time={self.min_time!r} must be in [0, 1)'
      )
    if self.noise == 'count' and (self.num_timesteps or self.min_time):
      raise InputError(
        "objective.noise='count' draws no time: objective.num_timesteps="
        f'{self.num_timesteps!r} and objective.min_time={self.min_time!r} must '
        "be 0 with it, or objective.noise be 'stratified' or 'uniform'"
      )

  @property
  def group_size(self) -> int:
    """Two where noise by count is drawn in pairs (k, L + 1 - k)."""
    return 2 if self.noise == 'count' else 1

  @property
  def process(self) -> processes.Masked:
    """How tokens become noise."""
    return processes.Masked(self.mask_id)

  def evaluation(self) -> 'MaskedNoise':
    """The form whose mean is reported: no truncation, least variance."""
    return dataclasses.replace(
      self, noise='count', num_timesteps=0, min_time=0.0
    )

  def naive(self) -> 'MaskedNoise':
    """The bound at independent times, MDLM's, with its truncation."""
    return dataclasses.replace(
      self.evaluation(), noise='uniform', min_time=NAIVE_MIN_TIME
    )

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
    if self.noise == 'count':
      n = jnp.sum(eligible, axis=1)
      offset = jnp.minimum((levels * n).astype(jnp.int32), n - 1)
      is_mirrored = jnp.arange(x0.shape[0]) % 2 == 1
      count = jnp.where(is_mirrored, n - offset, 1 + offset)
      count = jnp.where(n > 0, count, 0)
      xt = self.process.corrupt_count(keys, count, x0, eligible)
      level = count / jnp.maximum(n, 1)
      t = self.network_time(count / x0.shape[1])
      scale = n / jnp.maximum(count, 1)
    else:
      t, scale = self.time_and_scale(levels)
      level = self.schedule.noise(t)
      xt = self.process.corrupt(keys, level, x0, eligible)
      t = self.told_time(t, level, eligible)
    scored = eligible & (xt == self.mask_id)
    scale = jnp.where(scored, scale[:, None], 0.0)
    level = jnp.broadcast_to(level[:, None], x0.shape)
    return Noised(
      tokens=xt,
      t=t,
      scored=scored,
      level=level,
      fields={'target': x0, 'scale': scale},
    )

  def told_time(
    self, t: jax.Array, level: jax.Array, eligible: jax.Array
  ) -> jax.Array:
    """The network's time [B] where a row of [B, L] is partly a prompt.

    That of the expected share of masks in the whole row, as samplers tell it;
    t itself where all of the row is eligible.
    """
    share = jnp.mean(eligible, axis=1)
    return jnp.where(share < 1, self.network_time(level * share), t)

  def time_and_scale(self, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The time that a level u in [0, 1) stands for, and the loss's scale there.

    Args:
      levels: [B].

    Returns:
      t [B] in (min_time, 1] and the factor of the cross entropy [B].
    """
    if self.num_timesteps:
      s, t = self.step_times(levels, self.num_timesteps)
      noise_t = self.schedule.noise(t)
      return t, (
        self.num_timesteps * (noise_t - self.schedule.noise(s)) / noise_t
      )
    t = 1 - levels * (1 - self.min_time)  # u in [0, 1), so t is never 0
    return t, -schedules.dalpha(self.schedule, t) / self.schedule.noise(t)

  def weighted_cross_entropy(
    self, logits: jax.Array, fields, vocab=categorical.WHOLE
  ) -> Terms:
    """scale * -log p(x0_i | xt), the loss of an x0 prediction."""
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    loss = fields['scale'] * ce
    return Terms(loss=loss, nll=loss, cross_entropy=ce, correct=correct)

  def step_times(
    self, levels: jax.Array, num_timesteps: int
  ) -> tuple[jax.Array, jax.Array]:
    """The ends s < t, [B] each, of the chain's step that each level picks."""
    first = int(self.min_time * num_timesteps)
    step = first + jnp.floor(levels * (num_timesteps - first))
    return step / num_timesteps, (step + 1) / num_timesteps

  def max_scored(self, batch_size: int, length: int) -> int:
    if self.noise == 'count':
      return batch_size // 2 * (length + 1)
    return batch_size * length

  def network_input(self, tokens: jax.Array) -> jax.Array:
    return tokens

  def network_time(self, level: jax.Array) -> jax.Array:
    return self.schedule.inverse(level)

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    return self.process.prior((keys.shape[0], length))

  def level_at(self, t: jax.Array, free_share: jax.Array) -> jax.Array:
    return free_share * self.schedule.noise(t)

  def reverse(
    self,
    logits: jax.Array,
    xt: jax.Array,
    s: jax.Array,
    t: jax.Array,
    draw: categorical.Draw,
  ) -> jax.Array:
    p_x0 = jnp.exp(draw.log_prob(logits))
    probability = self.reveal_probability(logits, s, t)
    # At s = 0 everything is revealed, whatever the network says.
    probability = jnp.where(s > 0, jnp.clip(probability, 0, 1), 1.0)
    p_xs = self.process.reveal(xt, p_x0, probability)
    return categorical.safe_log(p_xs)

  def reveal_probability(
    self, logits: jax.Array, s: jax.Array, t: jax.Array
  ) -> jax.Array:
    """P(a masked position is revealed between t and s), [B, L].

    Source: MDLM, arXiv 2406.07524, equation 6: (alpha_s - alpha_t) /
    (1 - alpha_t).
    """
    noise_s, noise_t = self.schedule.noise(s), self.schedule.noise(t)
    return jnp.full(logits.shape[:-1], (noise_t - noise_s) / noise_t)
