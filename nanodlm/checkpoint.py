"""Checkpoints with Orbax: asynchronous, atomic, with their config.

A checkpoint holds four items: `params`, `ema_params` (where there are any), `rest`
(step, optimiser state, key) and `meta` (JSON: config, data position). Evaluation
and sampling read one of the first two only.
"""

import contextlib
import pathlib
from typing import Any

import jax
from ml_collections import config_dict
import orbax.checkpoint as ocp

from nanodlm.state import TrainState
from nanodlm.types import InputError

FOLDER = 'checkpoints'


class SaveError(RuntimeError):
  """A checkpoint could not be written; the complete ones are as they were."""


def open_manager(workdir: str, *, max_to_keep: int | None = None,
                 keep_period: int = 0, read_only: bool = False
                 ) -> ocp.CheckpointManager:
  """The manager of `workdir`/checkpoints; a half-written checkpoint is no
  checkpoint to it."""
  directory = pathlib.Path(workdir).absolute() / FOLDER
  return ocp.CheckpointManager(
      directory, item_handlers={
          'params': ocp.StandardCheckpointHandler(),
          'ema_params': ocp.StandardCheckpointHandler(),
          'rest': ocp.StandardCheckpointHandler(),
          'meta': ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
          max_to_keep=max_to_keep, keep_period=keep_period or None,
          create=not read_only, read_only=read_only,
          cleanup_tmp_directories=not read_only,
          enable_async_checkpointing=not read_only))


def _rest(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'opt_state': state.opt_state,
          'key': jax.random.key_data(state.key)}


def save(manager: ocp.CheckpointManager, state: TrainState,
         config: config_dict.ConfigDict, position: dict[str, Any]):
  """Starts saving `state`; returns when the state may be donated again.

  Args:
    manager: from `open_manager`.
    state: to be saved, at state.step.
    config: the run's.
    position: where the data stands: {'step': n, 'example': n * batch_size,
      'fingerprint': of the text}.

  Raises:
    SaveError: this or an EARLIER save failed (a full disk, say).
  """
  items = {'params': ocp.args.StandardSave(state.params),
           'rest': ocp.args.StandardSave(_rest(state)),
           'meta': ocp.args.JsonSave(
               {'config': config.to_dict(), 'data': position})}
  if state.ema_params is not None:
    items['ema_params'] = ocp.args.StandardSave(state.ema_params)
  with _explaining(manager):
    manager.save(int(state.step), args=ocp.args.Composite(**items))


def wait(manager: ocp.CheckpointManager):
  """Returns when the last save is complete; raises SaveError as `save` does."""
  with _explaining(manager):
    manager.wait_until_finished()


@contextlib.contextmanager
def _explaining(manager: ocp.CheckpointManager):
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    raise SaveError(f'a checkpoint in {manager.directory} could not be written: '
                    f'{error}. The complete ones there: '
                    f'{complete_steps(manager.directory)}') from error


def complete_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, read off the disk, rising."""
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir()
                if path.name.isdigit())


def restore_state(manager: ocp.CheckpointManager, state: TrainState, step: int
                  ) -> TrainState:
  """The saved state of `step`, with the shapes and shardings of `state`.

  Raises:
    InputError: the checkpoint is of another shape.
  """
  abstract = lambda tree: ocp.args.StandardRestore(
      jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
  items = {'params': abstract(state.params), 'rest': abstract(_rest(state))}
  if state.ema_params is not None:
    items['ema_params'] = abstract(state.ema_params)
  check_shapes(manager, step, 'params', state.params)
  saved = _restore(manager, step, items)
  key = jax.random.wrap_key_data(saved['rest']['key'])
  return TrainState(
      step=saved['rest']['step'], params=saved['params'],
      ema_params=saved['ema_params'] if state.ema_params is not None else None,
      opt_state=saved['rest']['opt_state'],
      key=jax.device_put(key, state.key.sharding))


def restore_params(manager: ocp.CheckpointManager, params: Any, step: int) -> Any:
  """The averaged parameters of `step`, or the plain ones where there are none.

  Args:
    manager: from `open_manager`.
    params: arrays or ShapeDtypeStructs with the shapes and shardings wanted.
    step: of the checkpoint.

  Raises:
    InputError: the checkpoint is of another shape.
  """
  item = 'params'
  if (manager.directory / str(step) / 'ema_params').exists():
    item = 'ema_params'
  check_shapes(manager, step, item, params)
  return _restore(manager, step, {item: ocp.args.StandardRestore(params)})[item]


def _restore(manager, step, items):
  try:
    return manager.restore(step, args=ocp.args.Composite(**items))
  except (ValueError, KeyError, FileNotFoundError) as error:
    raise InputError(f'checkpoint {manager.directory / str(step)} cannot be read '
                     f'into this model: {error}') from error


def check_shapes(manager: ocp.CheckpointManager, step: int, item: str,
                 params: Any):
  """Raises InputError naming the parameters whose shapes differ."""
  saved = _shapes(manager.item_metadata(step)[item])
  wanted = _shapes(params)
  lines = [f'  {name}: {saved.get(name, "absent")} there, '
           f'{wanted.get(name, "absent")} here'
           for name in sorted(saved | wanted)
           if saved.get(name) != wanted.get(name)]
  if lines:
    raise InputError(f'checkpoint {manager.directory / str(step)} is of another '
                     'shape:\n' + '\n'.join(lines))


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  tree = getattr(tree, 'tree', tree)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {'/'.join(str(getattr(part, 'key', part)) for part in path):
          tuple(leaf.shape) for path, leaf in leaves}


def restore_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """{'config': ..., 'data': ...} of a checkpoint."""
  return _restore(manager, step, {'meta': ocp.args.JsonRestore()})['meta']


def find_step(manager: ocp.CheckpointManager, step: int = 0) -> int:
  """`step`, or the last one for 0.

  Raises:
    InputError: there is no such checkpoint; says which there are.
  """
  steps = sorted(manager.all_steps())
  if not steps:
    raise InputError(f'{manager.directory} holds no complete checkpoint')
  if step and step not in steps:
    raise InputError(f'{manager.directory} holds no checkpoint of step {step}; it '
                     f'has {steps}')
  return step or steps[-1]
