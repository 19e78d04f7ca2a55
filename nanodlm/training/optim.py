"""Optimisers and learning-rate schedules by name, all from Optax."""

import dataclasses

import jax
import optax
import optax.contrib

from nanodlm.types import InputError

SCHEDULES = ('cosine', 'constant', 'wsd')
# Share of the steps in which a 'wsd' schedule decays, at the end of the run.
WSD_DECAY_SHARE = 0.2
# Muon's updates are scaled to the root mean square that AdamW's have, so that
# both take the same learning rates (arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Each field is a key of `config.optim`.

  Attributes:
    name: 'adamw', 'lion' or 'muon' (matrices of the blocks; AdamW elsewhere).
    learning_rate: peak, > 0.
    schedule: 'cosine', 'constant' or 'wsd' (constant, then linear decay over
      the last fifth), each after a linear warm-up.
    warmup_steps: steps from 0 to the peak.
    final_fraction: learning rate at the end as a fraction of the peak.
    weight_decay: decoupled, on matrices and embeddings only.
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    momentum: Muon's momentum, in [0, 1).
    clip_norm: global gradient norm above which gradients are scaled down; 0 is
      off.
    ema_decay: of the averaged parameters, in [0, 1); 0 is off. Step n uses
      min(ema_decay, (1 + n) / (10 + n)), so that short runs are not evaluated
      on their initial weights.
  """

  name: str
  learning_rate: float
  schedule: str
  warmup_steps: int
  final_fraction: float
  weight_decay: float
  b1: float
  b2: float
  momentum: float
  clip_norm: float
  ema_decay: float

  def __post_init__(self):
    if self.name not in OPTIMIZERS:
      raise InputError(
        f'optim.name={self.name!r} is not one of {sorted(OPTIMIZERS)}'
      )
    if self.schedule not in SCHEDULES:
      raise InputError(
        f'optim.schedule={self.schedule!r} is not one of {list(SCHEDULES)}'
      )
    if not self.learning_rate > 0:
      raise InputError(
        f'optim.learning_rate={self.learning_rate!r} must be > 0'
      )
    for key in ('warmup_steps', 'weight_decay', 'clip_norm'):
      if not getattr(self, key) >= 0:
        raise InputError(f'optim.{key}={getattr(self, key)!r} must be >= 0')
    for key in ('b1', 'b2', 'momentum', 'ema_decay'):
      if not 0 <= getattr(self, key) < 1:
        raise InputError(
          f'optim.{key}={getattr(self, key)!r} must be in [0, 1)'
        )
    if not 0 <= self.final_fraction <= 1:
      raise InputError(
        f'optim.final_fraction={self.final_fraction!r} must be in [0, 1]'
      )


def leaf_name(path) -> str:
  """The last name on a tree path: 'kernel', 'scale', 'embedding', ..."""
  return path[-1].key


def decay_mask(params):
  """True for the leaves that weight decay applies to: no norms, no biases."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: (
      leaf_name(path) in ('kernel', 'embedding', 'output', 'position_embedding')
    ),
    params,
  )


def muon_dimensions(params):
  """Which axes of each leaf are the matrix that Muon orthogonalises.

  A layer axis in front is a batch axis. None leaves the leaf to AdamW:
  embeddings, the output projection, norms, and the time conditioning, which
  starts at zero.
  """

  def dimensions(path, x):
    names = [part.key for part in path]
    others = {
      'time_embedding',
      'modulation',
      'final_modulation',
      'embedding_in',
    }
    if leaf_name(path) != 'kernel' or others & set(names):
      return None
    return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

  return jax.tree_util.tree_map_with_path(dimensions, params)


def _adamw(config, learning_rate):
  return optax.adamw(
    learning_rate,
    b1=config.b1,
    b2=config.b2,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )


def _lion(config, learning_rate):
  return optax.lion(
    learning_rate,
    b1=config.b1,
    b2=config.b2,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )


def _muon(config, learning_rate):
  # Optax's own weight decay spares what it leaves to Adam, embeddings too.
  decay = optax.add_decayed_weights(-config.weight_decay, decay_mask)
  return optax.chain(
    optax.contrib.muon(
      1.0,
      beta=config.momentum,
      adam_b1=config.b1,
      adam_b2=config.b2,
      consistent_rms=MUON_RMS,
      muon_weight_dimension_numbers=muon_dimensions,
    ),
    decay,
    optax.scale_by_schedule(learning_rate),
  )


OPTIMIZERS = {'adamw': _adamw, 'lion': _lion, 'muon': _muon}


def reads(name: str, schedule: str) -> set[str]:
  """The keys of `config.optim` that matter to an optimiser and schedule."""
  names = {field.name for field in dataclasses.fields(OptimConfig)}
  if name != 'muon':
    names -= {'momentum'}
  if schedule == 'constant':
    names -= {'final_fraction'}
  return names


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
  """Learning rate by step, for a run of `num_steps`."""
  peak, final = (
    config.learning_rate,
    config.learning_rate * config.final_fraction,
  )
  rest = max(num_steps - config.warmup_steps, 1)
  if config.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
  elif config.schedule == 'wsd':
    decay = max(int(WSD_DECAY_SHARE * num_steps), 1)
    after = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, final, decay),
      ],
      [max(rest - decay, 0)],
    )
  else:
    after = optax.constant_schedule(peak)
  if not config.warmup_steps:
    return after
  # From peak / warmup_steps, so that the first step is not thrown away.
  warmup = optax.linear_schedule(
    peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1)
  )
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
  config: OptimConfig, num_steps: int
) -> optax.GradientTransformation:
  """Clipping, then the optimiser with its schedule."""
  optimizer = OPTIMIZERS[config.name](config, make_schedule(config, num_steps))
  if not config.clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
