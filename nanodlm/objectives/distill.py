"""Distillation: a student learns in one step what its teacher does in two."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical, times
from nanodlm.objectives import diffusion, masking
from nanodlm.types import InputError, Noised, Objective, Terms

DIVERGENCES = ('bwd', 'fwd')
# Teacher's steps in a step of the student, as in the papers; the number of
# steps is halved in each round.
NUM_TEACHER_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
  """The divergence between a student's prediction and its teacher's.

  The student, at zt, predicts what its teacher predicts later in the same
  reverse trajectory, h earlier in time:

      loss_i = KL(student(zt)_i || teacher_i)            'bwd', the default
               KL(teacher_i || student(zt)_i)            'fwd'

  summed over the noisy positions without the weights of the bound: it is none.
  A clean copy that is autoregressive, too, adds this divergence from that of
  the teacher at all positions, times objective.ar_weight.
  The student starts as its teacher. In round r, h = 2^r / num_steps; at its end
  the teacher becomes a copy of the student's parameters, not of their average.
  Evaluation and samplers are those of `base`.

  All noise of a row comes from one key, so that texts at different times are
  noised together: whatever is noisy at s < t is noisy at t.

  Attributes:
    base: the objective that trained the teacher; decides on the noise.
    num_steps: steps in which the student of the first round samples.
    round_steps: training steps of a round.
    divergence: 'bwd' or 'fwd'.
    teacher_temperature: divides the teacher's logits, > 0; 1 in the papers.
    round: r, [], set by `at_step`.
  """

  base: diffusion.Diffusion
  num_steps: int = 32
  round_steps: int = 1000
  divergence: str = 'bwd'
  teacher_temperature: float = 1.0
  round: Any = 0

  uses_frozen = True
  ignored = diffusion.LOSS_FIELDS

  def __post_init__(self):
    for key in 'num_steps', 'round_steps':
      if getattr(self, key) < 1:
        raise InputError(f'distill.{key}={getattr(self, key)!r} must be >= 1')
    if self.divergence not in DIVERGENCES:
      raise InputError(
        f'distill.divergence={self.divergence!r} is not one of '
        f'{list(DIVERGENCES)}'
      )
    if not 0 < self.teacher_temperature <= categorical.MAX_TEMPERATURE:
      raise InputError(
        f'distill.teacher_temperature={self.teacher_temperature!r} must be in '
        f'(0, {categorical.MAX_TEMPERATURE:g}]'
      )

  @classmethod
  def fits(cls, base: Objective) -> bool:
    """Returns whether networks of an objective can be distilled."""
    return (
      isinstance(base, diffusion.Diffusion)
      and base.is_normalised
      and not base.any_length
    )

  def check(self, settings: Any):
    """Raises InputError unless training steps are whole rounds."""
    num_steps = settings.train.num_steps
    rounds, left = divmod(num_steps, self.round_steps)
    if left:
      raise InputError(
        f'distill.round_steps={self.round_steps!r} does not divide '
        f'train.num_steps={num_steps!r}'
      )
    if self.num_steps % 2 ** (rounds - 1):
      raise InputError(
        f'distill.num_steps={self.num_steps!r} cannot be halved '
        f'{rounds - 1} times, once after each of the {rounds} rounds of '
        f'distill.round_steps={self.round_steps!r} but the last'
      )

  @property
  def mask_id(self) -> int:  # pyright: ignore
    return self.base.mask_id

  @property
  def autoregressive(self):
    return self.base.autoregressive

  def init_params(self):
    return self.base.init_params()

  def bind(self, params):
    return dataclasses.replace(self, base=self.base.bind(params))

  def at_step(self, step):
    return dataclasses.replace(self, round=step // self.round_steps)

  def evaluation(self):
    return self.base.evaluation()

  def sample_levels(self, key, batch_size, length):
    return times.sample_stratified(key, batch_size)

  def trajectory(self, levels: jax.Array, num: int) -> jax.Array:
    """Returns times [num + 1, B], t to s = t - h in even steps; levels [B].

    t = min(u + h, 1), u ~ U(0, 1]: the student's last step ends at s = 0.
    """
    step = 2.0**self.round / self.num_steps
    t = jnp.minimum(1 - levels + step, 1.0)
    fractions = jnp.linspace(0, 1, num + 1)[:, None]
    return jnp.maximum(t[None] - step * fractions, 0.0)

  def noise(
    self, keys: jax.Array, t: jax.Array, x0: jax.Array, eligible: jax.Array
  ) -> jax.Array:
    """Noises x0 [B, L] at times t [n, B], together; returns [n, B, L]."""

    def of_row(key, t, x0, eligible):
      renoise = self.base.renoise
      return renoise(key[None], x0[None], t, eligible[None])[0]

    of_rows = jax.vmap(of_row)
    return jax.vmap(of_rows, (None, 0, None, None))(keys, t, x0, eligible)

  def noised(
    self, xt: jax.Array, t: jax.Array, x0: jax.Array, eligible: jax.Array
  ) -> Noised:
    """Returns the input of a network at times t [B]; xt and x0 [B, L].

    Of positions that are not masked, only networks that can correct them say
    anything.
    """
    base, whole = self.base, jnp.ones_like(t)
    is_noisy = jnp.full_like(eligible, base.can_correct) | (xt == base.mask_id)
    level = base.level_at(t, whole)[:, None]
    # As in training, the time is that of a row, or of each block.
    size = base.block_size or x0.shape[1]
    share = jnp.mean(eligible.reshape(len(x0), -1, size), axis=2)
    levels = jax.vmap(base.level_at, (None, 1), 1)(t, share)
    time = base.network_time(levels)
    noised = Noised(
      tokens=xt,
      t=time if base.block_size else time[:, 0],
      scored=eligible & is_noisy,
      level=jnp.broadcast_to(level, x0.shape),
      fields={'target': x0},
      clean=base.clean_input(x0),
    )
    return base.with_clean(noised, eligible)

  def corrupt(self, keys, levels, x0, eligible):
    t = self.trajectory(levels, 1)[:1]
    return self.noised(self.noise(keys, t, x0, eligible)[0], t[0], x0, eligible)

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    reference = fields['reference'] / self.teacher_temperature
    student, teacher = (
      categorical.log_prob(x, self.mask_id, vocab) for x in (logits, reference)
    )
    is_forward = self.divergence == 'fwd'
    p, q = (teacher, student) if is_forward else (student, teacher)
    log_x0 = vocab.pick(student, fields['target'])
    return Terms(
      loss=vocab.sum(jnp.exp(p) * (p - q)),
      nll=jnp.full_like(log_x0, jnp.nan),
      cross_entropy=-log_x0,
      correct=(log_x0 >= vocab.max(student)).astype(jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class DiscreteConsistency(Distillation):
  """The teacher sees zs, the text less noisy in the same noise trajectory.

  Source: Sahoo et al., DCD, arXiv 2506.10892, for uniform noise, with zs and zt
  the argmax of Gaussian noise of one eps at two times. Such a token is x0 until
  some time and then the best of the others, which does not change: the same law
  as one uniform u and one random token for both times, which needs no Gaussian
  and applies to any noise. For masks, zs is zt with some tokens back, and the
  loss is over the masks of zs.

  Differs from the paper: times are those of the objective's schedule.
  """

  def loss(self, batch, levels, keys, score):
    x0, eligible = batch.tokens, jnp.asarray(batch.eligible)
    t = self.trajectory(levels, 1)
    z = self.noise(keys, t, x0, eligible)
    student, teacher = (self.noised(*zt, x0, eligible) for zt in zip(z, t))
    student = student._replace(
      scored=teacher.scored, reference=score.frozen_states(teacher)
    )
    weight = eligible * batch.weight[:, None]
    return self.base.score_copies(score, student, weight)


@dataclasses.dataclass(frozen=True)
class SelfDistillation(Distillation):
  """The teacher samples two steps; its prediction at the one that revealed i.

  For tokens that it did not reveal, it is that of the last step. Source:
  Deschenaux and Gulcehre, SDTT, arXiv 2410.21035, for masked noise. Of an exact
  teacher, whose predictions are a martingale, 'fwd' would teach nothing; 'bwd'
  makes the student more certain.
  """

  @classmethod
  def fits(cls, base):
    return super().fits(base) and isinstance(base, masking.MaskedNoise)

  def loss(self, batch, levels, keys, score):
    x0, eligible = batch.tokens, jnp.asarray(batch.eligible)
    draw = categorical.Draw(self.mask_id, self.teacher_temperature)
    keys = jax.vmap(lambda key: jax.random.split(key, NUM_TEACHER_STEPS))(keys)
    t = self.trajectory(levels, NUM_TEACHER_STEPS)[:-1]
    # A token that is masked at both times of a step stays masked in it.
    masked = self.noise(keys[:, 0], t, x0, eligible) == self.mask_id
    masked &= eligible[None]
    z = jnp.where(masked[0], self.mask_id, x0)
    student = self.noised(z, t[0], x0, eligible)
    reference = score.frozen_states(student)
    for i in range(1, NUM_TEACHER_STEPS):
      drawn = score.draw_frozen(keys[:, i], reference[: len(x0)], draw)
      z = jnp.where(masked[i - 1] & ~masked[i], drawn, z)
      states = score.frozen_states(self.noised(z, t[i], x0, eligible))
      # What the clean copy says stays that of the first call.
      later = jnp.zeros_like(student.scored).at[: len(x0)].set(masked[i])
      reference = jnp.where(later[..., None], states, reference)
    student = student._replace(reference=reference)
    weight = eligible * batch.weight[:, None]
    return self.base.score_copies(score, student, weight)
