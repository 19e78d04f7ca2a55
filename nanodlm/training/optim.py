"""Optimizers and learning-rate schedules by name, all from Optax."""

import dataclasses
import functools
import math
from typing import Any

import jax
import optax
import optax.contrib

from nanodlm.model import lora
from nanodlm.types import InputError

SCHEDULES = ('cosine', 'constant', 'wsd')
# Share of the steps in which a 'wsd' schedule decays, at the end of the run.
WSD_DECAY_SHARE = 0.2
# Relative change of the learning rate that a run is warned of.
RATE_TOLERANCE = 0.01
# Muon's updates are scaled to the root mean square of AdamW's, so that both
# take the same learning rates (arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """`config.optim`; configs/base.py explains the keys."""

  name: str
  learning_rate: float
  schedule: str
  warmup_steps: int
  decay_from_step: int
  final_fraction: float
  weight_decay: float
  b1: float
  b2: float
  momentum: float
  clip_norm: float
  ema_decay: float

  def __post_init__(self):
    names = sorted(OPTIMIZERS)
    self._check('name', self.name in names, f'is not one of {names}')
    is_known = self.schedule in SCHEDULES
    self._check('schedule', is_known, f'is not one of {list(SCHEDULES)}')
    self._check('learning_rate', self.learning_rate > 0, 'must be > 0')
    for key in ('warmup_steps', 'decay_from_step', 'weight_decay', 'clip_norm'):
      self._check(key, getattr(self, key) >= 0, 'must be >= 0')
    for key in ('learning_rate', 'weight_decay', 'clip_norm'):
      self._check(key, math.isfinite(getattr(self, key)), 'must be finite')
    for key in ('b1', 'b2', 'momentum', 'ema_decay'):
      self._check(key, 0 <= getattr(self, key) < 1, 'must be in [0, 1)')
    is_fraction = 0 <= self.final_fraction <= 1
    self._check('final_fraction', is_fraction, 'must be in [0, 1]')
    self._check(
      'decay_from_step',
      not self.decay_from_step or self.decay_from_step >= self.warmup_steps,
      f'must be at least optim.warmup_steps={self.warmup_steps!r}, or 0',
    )

  def check_steps(self, num_steps: int):
    """Raises InputError if a decay would start after the end of the run."""
    self._check(
      'decay_from_step',
      self.decay_from_step < num_steps,
      f'must be less than train.num_steps={num_steps!r}, where the decay ends',
    )

  def _check(self, key: str, is_right: bool, text: str):
    if not is_right:
      raise InputError(f'optim.{key}={getattr(self, key)!r} {text}')


def decay_mask(params):
  """Returns True for leaves with weight decay.

  Norms, biases and convolutions have none.
  """
  decayed = (
    *('kernel', 'embedding', 'output', 'position_embedding'),
    *lora.LEAVES,
  )
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in decayed, params
  )


def muon_dimensions(params):
  """Returns the axes of each leaf that Muon orthogonalises as a matrix.

  A leading layer axis is a batch axis. None leaves the leaf to AdamW:
  embeddings, the output projection, norms, convolutions, and the conditioning
  on time and on predictions, which starts at zero.
  """
  others = {
    'time_embedding',
    'modulation',
    'final_modulation',
    'embedding_in',
    'self_conditioning',
  }

  def dimensions(path, x):
    names = [part.key for part in path]
    if names[-1] not in ('kernel', *lora.LEAVES) or others & set(names):
      return None
    return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

  return jax.tree_util.tree_map_with_path(dimensions, params)


def _decoupled(make, config, learning_rate):
  return make(
    learning_rate,
    b1=config.b1,
    b2=config.b2,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )


def _muon(config, learning_rate):
  # Optax's Adam for the other parameters has Nesterov's momentum, as Muon has.
  return optax.chain(
    optax.contrib.muon(
      1.0,
      beta=config.momentum,
      adam_b1=config.b1,
      adam_b2=config.b2,
      consistent_rms=MUON_RMS,
      muon_weight_dimension_numbers=muon_dimensions,
    ),
    # Optax's own decay skips all that Muon leaves to Adam, embeddings too.
    optax.add_decayed_weights(-config.weight_decay, decay_mask),
    optax.scale_by_schedule(learning_rate),
  )


OPTIMIZERS = {
  'adamw': functools.partial(_decoupled, optax.adamw),
  'lion': functools.partial(_decoupled, optax.lion),
  'muon': _muon,
}


def reads(name: str, schedule: str) -> set[str]:
  """Returns the keys of `config.optim` that an optimizer and schedule use."""
  names = {field.name for field in dataclasses.fields(OptimConfig)}
  if name != 'muon':
    names -= {'momentum'}
  if schedule == 'constant':
    names -= {'final_fraction', 'decay_from_step'}
  return names


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
  """Makes the learning rate by step, for a run of `num_steps`.

  A run that ends during its warm-up does not decay.
  """
  peak, warmup_steps = config.learning_rate, config.warmup_steps
  left = max(num_steps - warmup_steps, 1)
  decay = left
  if config.schedule == 'wsd':
    decay = min(max(int(WSD_DECAY_SHARE * num_steps), 1), left)
  if config.decay_from_step:
    decay = num_steps - config.decay_from_step
  final = peak * config.final_fraction
  constant = optax.constant_schedule(peak)
  if config.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak, decay, config.final_fraction)
  elif config.schedule == 'wsd':
    after = optax.linear_schedule(peak, final, decay)
  else:
    after = constant
  if decay < left:
    after = optax.join_schedules([constant, after], [left - decay])
  if not warmup_steps:
    return after
  # From peak / warmup_steps, as a first step at rate 0 would be wasted.
  warmup = optax.linear_schedule(
    peak / warmup_steps, peak, max(warmup_steps - 1, 1)
  )
  return optax.join_schedules([warmup, after], [warmup_steps])


def describe_end(config: OptimConfig, num_steps: int) -> str:
  """Returns a warning if a run ends during its warm-up, else ''."""
  if config.warmup_steps < num_steps:
    return ''
  rate: Any = make_schedule(config, num_steps)
  return (
    f'optim.warmup_steps={config.warmup_steps} is not less than train.num_steps'
    f'={num_steps}: the learning rate of the last step is '
    f'{rate(num_steps - 1):.3g}, and optim.schedule={config.schedule!r} is not '
    'reached'
  )


def describe_change(
  before: Any, config: OptimConfig, num_steps: int, step: int
) -> str:
  """Returns a warning if a run does not continue as planned, else ''.

  Args:
    before: the schedule by which `step` >= 1 steps were taken.
    config: the config of the next steps.
    num_steps: number of steps of the run.
    step: step of its checkpoint.
  """
  schedule: Any = make_schedule(config, num_steps)
  planned, now = float(before(step)), float(schedule(step))
  if abs(now - planned) <= RATE_TOLERANCE * now:
    return ''
  text = (
    f'the learning rate was {before(step - 1):.3g} in step {step} and is '
    f'{now:.3g} in step {step + 1}, since the schedule has changed'
  )
  if config.schedule == 'constant' or config.decay_from_step == step:
    return text
  return (
    f'{text}. For a new decay from here, set optim.decay_from_step={step}, and '
    'optim.learning_rate to the rate that it starts from'
  )


def at_step(opt_state: Any, step: jax.Array) -> Any:
  """Sets the step that the optimizer's learning rate belongs to.

  Optax counts updates, which skipped steps do not make. Moments are still
  corrected by the number of updates.
  """
  is_rate = lambda x: isinstance(x, optax.ScaleByScheduleState)
  return jax.tree.map(
    lambda x: x._replace(count=step) if is_rate(x) else x,
    opt_state,
    is_leaf=is_rate,
  )


def make_optimizer(
  config: OptimConfig, num_steps: int
) -> optax.GradientTransformation:
  """Makes the optimizer with its schedule, after clipping."""
  optimizer = OPTIMIZERS[config.name](config, make_schedule(config, num_steps))
  if not config.clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
