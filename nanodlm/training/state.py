"""The training state: everything a run needs to go on, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from nanodlm.devices.sharding import Shards
from nanodlm.model import transformer
from nanodlm.model.config import ModelConfig
from nanodlm.types import Objective


@flax.struct.dataclass
class TrainState:
  """State after `step` steps.

  Attributes:
    step: [] int32, steps taken (skipped ones included).
    params: the network's parameters, float32.
    ema_params: their exponential moving average; None where it is off.
    opt_state: the optimiser's.
    key: the run's noise key. It never changes: step n's noise comes from
      fold_in(key, n).
  """

  step: jax.Array
  params: Any
  ema_params: Any
  opt_state: Any
  key: jax.Array

  @property
  def eval_params(self):
    """What evaluation and sampling use: the average where there is one."""
    return self.params if self.ema_params is None else self.ema_params


def init_params(
  config: ModelConfig,
  objective: Objective,
  key: jax.Array,
  shards: Shards = Shards(),
):
  """The network's parameters and, under 'objective', what the objective learns."""
  params, learned = (
    transformer.init_params(config, key, shards),
    objective.init_params(),
  )
  return {**params, 'objective': learned} if learned else params


def init_state(
  config: ModelConfig,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  seed: int,
  use_ema: bool,
  shards: Shards = Shards(),
) -> TrainState:
  """Draws the state of step 0 from the seed; see `model.init_params`."""
  init_key, noise_key = jax.random.split(jax.random.key(seed))
  params = init_params(config, objective, init_key, shards)
  ema_params = jax.tree.map(jnp.copy, params) if use_ema else None
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=ema_params,
    opt_state=optimizer.init(params),
    key=noise_key,
  )
