"""Masked noise and its loss weights, shared by several objectives."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical, schedules
from nanodlm.objectives import diffusion
from nanodlm.types import InputError, Noised, Terms

# The least noise in MDLM's published code (arXiv 2406.07524). Without it, the
# variance at independent times is infinite.
NAIVE_MIN_NOISE = 1e-3
_COUNTED = 'count', 'overlap'


@dataclasses.dataclass(frozen=True)
class MaskedNoise(diffusion.Diffusion):
  """Chooses the masked tokens and the scale of the loss of each.

  - continuous time (num_timesteps = 0, noise 'stratified' or 'uniform'):
    scale = -dalpha_t / (1 - alpha_t), t ~ U(min_time, 1].
  - discrete time (num_timesteps = T): t = j/T, j uniform on 1..T, s = t - 1/T,
    scale = T (alpha_s - alpha_t) / (1 - alpha_t).
  - fixed count (noise 'count'): k uniform on 1..n, exactly k of the n eligible
    positions masked, scale = n / k. Rows 2p and 2p + 1 mask k and n + 1 - k
    positions, so that the number of scored positions in a batch is constant.
  - overlapping counts (noise 'overlap'): as before, but rows 2p and 2p + 1 mask
    the first k and the last n + 1 - k positions of one random order. If they
    are the same text, as in evaluation, each of its tokens is scored, and one
    of them twice. In training they are not, and the variance is the same.
    Evaluation by count has 1.02 +- 0.10 times the variance for masked diffusion
    of stories, and 1.23 +- 0.11 times for block diffusion with S = 4.

  Attributes:
    schedule: alpha(t).
    num_timesteps: T of the discrete-time form; 0 is continuous time.
    min_time: t is drawn from (min_time, 1]. A positive value bounds the scale.
      The TRAINING loss, the mean over these times, is then not a bound;
      evaluation always uses overlapping counts.
  """

  schedule: schedules.Schedule = schedules.Linear()
  noise: str = dataclasses.field(default='count', kw_only=True)
  num_timesteps: int = 0
  min_time: float = 0.0

  predicts_masked = True
  noises = ('count', 'overlap', 'stratified', 'uniform')

  @classmethod
  def auto_noise(cls, settings):
    """Returns the first of `noises`, or the first that draws the times."""
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    of_times = 'schedule', 'num_timesteps', 'min_time'
    has_times = any(settings[key] != fields[key] for key in of_times)
    return next(x for x in cls.noises if x not in _COUNTED or not has_times)

  def __post_init__(self):
    super().__post_init__()
    if self.num_timesteps < 0:
      raise InputError(
        f'objective.num_timesteps={self.num_timesteps!r} must be '
        '>= 0 (0: continuous time)'
      )
    if not 0 <= self.min_time < 1:
      raise InputError(
        f'objective.min_time={self.min_time!r} must be in [0, 1)'
      )
    if self.is_counted and (self.num_timesteps or self.min_time):
      raise InputError(
        f'objective.noise={self.noise!r} draws no times: set '
        f'objective.num_timesteps={self.num_timesteps!r} and '
        f'objective.min_time={self.min_time!r} to 0, or objective.noise to '
        "'stratified' or 'uniform'"
      )

  @property
  def trains_bound(self):  # pyright: ignore
    return not self.min_time

  @property
  def is_counted(self) -> bool:
    """Whether the number of masks is drawn, not the time."""
    return self.noise in _COUNTED

  @property
  def group_size(self) -> int:
    """Two for noise by count, drawn in pairs (k, n + 1 - k), else one."""
    return 2 if self.is_counted else 1

  def evaluation(self):
    """Returns overlapping counts: no truncation, least variance."""
    return dataclasses.replace(
      self, noise='overlap', num_timesteps=0, min_time=0.0
    )

  def naive(self):
    """Returns the bound at independent times, truncated as in MDLM."""
    min_time = float(self.schedule.inverse(NAIVE_MIN_NOISE))  # pyright: ignore
    return dataclasses.replace(super().naive(), min_time=min_time)

  def corrupt(self, keys, levels, x0, eligible):
    if self.is_counted:
      n = jnp.sum(eligible, axis=1)
      offset = jnp.minimum((levels * n).astype(jnp.int32), n - 1)
      row = jnp.arange(x0.shape[0])
      is_mirrored = row % 2 == 1
      count = jnp.where(is_mirrored, n - offset, 1 + offset)
      count = jnp.where(n > 0, count, 0)
      from_end = None
      if self.noise == 'overlap':
        keys, from_end = keys[row - is_mirrored], is_mirrored
      xt = self.process.corrupt_count(keys, count, x0, eligible, from_end)
      level = count / jnp.maximum(n, 1)
      t = self.network_time(count / x0.shape[1])
      scale = n / jnp.maximum(count, 1)
    else:
      t, scale = self.time_and_scale(levels)
      level = self.schedule.noise(t)
      xt = self.process.corrupt(keys, level, x0, eligible)
      t = self.input_time(t, level, eligible)
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

  def input_time(
    self, t: jax.Array, level: jax.Array, eligible: jax.Array
  ) -> jax.Array:
    """Returns the network's time [B] for eligible positions [B, L].

    In a row with a prompt, it is the time of the expected share of masks in the
    whole row, as in sampling; otherwise, t.
    """
    share = jnp.mean(eligible, axis=1)
    return jnp.where(share < 1, self.network_time(level * share), t)

  def time_and_scale(self, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the time t in (min_time, 1] and the scale, [B], of levels [B]."""
    if self.num_timesteps:
      s, t = self.step_times(levels, self.num_timesteps)
      noise_t = self.schedule.noise(t)
      reveal = noise_t - self.schedule.noise(s)
      return t, self.num_timesteps * reveal / noise_t
    t = 1 - levels * (1 - self.min_time)  # Not 0, since levels are below 1.
    return t, -schedules.dalpha(self.schedule, t) / self.schedule.noise(t)

  def weighted_cross_entropy(
    self, logits: jax.Array, fields, vocab=categorical.WHOLE
  ) -> Terms:
    """Computes scale * -log p(x0_i | xt), the loss of an x0 prediction."""
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    loss = fields['scale'] * ce
    return Terms(loss=loss, nll=loss, cross_entropy=ce, correct=correct)

  def step_times(
    self, levels: jax.Array, num_timesteps: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the ends s < t, [B] each, of the step selected by each level."""
    first = int(self.min_time * num_timesteps)
    step = first + jnp.floor(levels * (num_timesteps - first))
    return step / num_timesteps, (step + 1) / num_timesteps

  def max_scored(self, batch_size, length):
    if self.is_counted:
      return batch_size // 2 * (length + 1)
    return batch_size * length

  def network_time(self, level):
    return self.schedule.inverse(level)

  def unread_keys(self, uses_time):
    is_timeless = self.is_counted and not uses_time
    return frozenset({'schedule'} if is_timeless else ())

  def noise_at(self, t):
    return self.schedule.noise(t)

  def level_at(self, t, free_share):
    return free_share * self.schedule.noise(t)

  def reverse(self, logits, xt, s, t, draw):
    p_x0 = jnp.exp(draw.log_prob(logits))
    probability = self.reveal_probability(logits, s, t)
    # At s = 0 every mask is revealed, regardless of the network.
    probability = jnp.where(s > 0, jnp.clip(probability, 0, 1), 1.0)
    p_xs = self.process.reveal(xt, p_x0, probability)
    return categorical.safe_log(p_xs)

  def reveal_probability(
    self, logits: jax.Array, s: jax.Array, t: jax.Array
  ) -> jax.Array:
    """Returns P(a masked position is revealed between t and s), [B, L].

    Source: MDLM, arXiv 2406.07524, equation 6: (alpha_s - alpha_t) /
    (1 - alpha_t).
    """
    noise_s, noise_t = self.schedule.noise(s), self.schedule.noise(t)
    return jnp.full(logits.shape[:-1], (noise_t - noise_s) / noise_t)
