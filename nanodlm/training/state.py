"""The training state: everything a run needs to resume, and nothing else."""

from typing import Any

from flax import traverse_util
import flax.struct
import jax
import jax.numpy as jnp
import optax

from nanodlm.types import Network, Objective


@flax.struct.dataclass
class TrainState:
  """State after `step` steps.

  Attributes:
    step: [] int32, steps taken, skipped ones included.
    params: the trained parameters, float32; under 'objective' those of the
      objective, if it has any.
    ema_params: their exponential moving average; None if it is off.
    opt_state: the optimiser's.
    key: the run's noise key. It never changes: step n's noise comes from
      fold_in(key, n).
    frozen: parameters that are used but not trained (a teacher, or a reference
      and what wrote the batch), or None; see `Objective.init_frozen`.
    base: the parameters without the adapters in `params`, `ema_params` and
      `frozen`, which never change, or None; see `Network.split`. Checkpoints
      leave them out.
  """

  step: jax.Array
  params: Any
  ema_params: Any
  opt_state: Any
  key: jax.Array
  frozen: Any = None
  base: Any = None

  @property
  def eval_params(self):
    """What evaluation and sampling use: the average, if there is one."""
    trained = self.params if self.ema_params is None else self.ema_params
    return join(trained, self.base)


def join(trained: Any, base: Any) -> Any:
  """Merges the two parts of `Network.split` into all parameters."""
  if base is None:
    return trained
  flat = [traverse_util.flatten_dict(part) for part in (trained, base)]
  # What is trained comes last: the base may hold its first value.
  return traverse_util.unflatten_dict({**flat[1], **flat[0]})


def init_params(network: Network, objective: Objective, key: jax.Array) -> Any:
  """Draws the network's parameters and, under 'objective', the objective's."""
  params, learned = network.init_params(key), objective.init_params()
  return {**params, 'objective': learned} if learned else params


def init_state(
  network: Network,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  seed: int,
  use_ema: bool,
) -> TrainState:
  """Draws the state of step 0 from the seed."""
  init_key, noise_key = jax.random.split(jax.random.key(seed))
  params, base = network.split(init_params(network, objective, init_key))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params) if use_ema else None,
    opt_state=optimizer.init(params),
    key=noise_key,
    frozen=objective.init_frozen(params) if objective.uses_frozen else None,
    base=base,
  )
