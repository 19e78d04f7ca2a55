"""Checkpoints with Orbax: asynchronous, atomic, checksummed, with their config.

A checkpoint holds four items: `params`, `ema_params` (where there are any), `rest`
(step, optimiser state, key) and `meta` (JSON: config, data position). Evaluation
and sampling read one of the first two only.

It also holds the checksums of its files, which Orbax leaves to the disk. They are
written after the files and before the folder gets its name, so that every complete
checkpoint has them, except those of older versions. They are checked before a
checkpoint is read: where it is damaged, the one before is taken.
"""

from concurrent import futures
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
from typing import Any

import jax
from ml_collections import config_dict
import numpy as np
import orbax.checkpoint as ocp

from nanodlm.devices import sharding
from nanodlm.training.state import TrainState
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

FOLDER = 'checkpoints'
# {path: [bytes, SHA-256]} of the files of a checkpoint's items.
CHECKSUMS = 'checksums.json'
PARAMS = ('params', 'ema_params')
_CONCURRENT_GB = 96  # Orbax's own default
# Of a large array, that are compressed and written at once by `save_params`.
_CHUNK_BYTES = 2**25
# Orbax gives up on a save after so long, by the clock of the wall: a laptop that
# slept, or a clock that was set, would end the run. Several processes may wait for
# one whose save has failed, so that there it cannot be forever.
_SAVE_TIMEOUT_SECS = {'one': 100 * 365 * 86400, 'several': 3600}


class SaveError(RuntimeError):
  """A checkpoint could not be written; the complete ones are as they were."""


def open_manager(
  workdir: str,
  *,
  max_to_keep: int | None = None,
  keep_period: int = 0,
  read_only: bool = False,
  concurrent_gb: int = _CONCURRENT_GB,
) -> ocp.CheckpointManager:
  """The manager of `workdir`/checkpoints; a half-written checkpoint is no
  checkpoint to it.

  At most `concurrent_gb` x 10^9 bytes of parameters are being written at a time;
  the largest array must be smaller.
  """
  directory = pathlib.Path(workdir).absolute() / FOLDER
  several = 'one' if jax.process_count() == 1 else 'several'
  async_options = (
    None
    if read_only
    else ocp.AsyncOptions(
      timeout_secs=_SAVE_TIMEOUT_SECS[several],
      # Else threads wait for the folders, by that clock too.
      create_directories_asynchronously=False,
      post_finalization_callback=functools.partial(_write_checksums, directory),
    )
  )
  return ocp.CheckpointManager(
    directory,
    item_handlers={
      'params': ocp.StandardCheckpointHandler(save_concurrent_gb=concurrent_gb),
      'ema_params': ocp.StandardCheckpointHandler(),
      'rest': ocp.StandardCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep,
      keep_period=keep_period or None,
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      enable_async_checkpointing=not read_only,
      async_options=async_options,
    ),
  )


def _rest(state: TrainState) -> dict[str, Any]:
  return {
    'step': state.step,
    'opt_state': state.opt_state,
    'key': jax.random.key_data(state.key),
  }


def save(
  manager: ocp.CheckpointManager,
  state: TrainState,
  config: config_dict.ConfigDict,
  position: dict[str, Any],
):
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
  items = {
    'params': ocp.args.StandardSave(state.params),
    'rest': ocp.args.StandardSave(_rest(state)),
    'meta': ocp.args.JsonSave({'config': config.to_dict(), 'data': position}),
  }
  if state.ema_params is not None:
    items['ema_params'] = ocp.args.StandardSave(state.ema_params)
  with _explaining(manager):
    manager.save(int(state.step), args=ocp.args.Composite(**items))


def save_params(
  manager: ocp.CheckpointManager,
  params: Any,
  config: config_dict.ConfigDict,
  origin: dict[str, Any],
):
  """Saves parameters alone, as step 0: to evaluate, sample and start from.

  Args:
    manager: from `open_manager`.
    params: arrays, of NumPy or JAX.
    config: of the network.
    origin: where they come from, JSON values.

  Raises:
    SaveError: as `save`.
  """
  chunks = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params
  )
  with _explaining(manager):
    manager.save(
      0,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params, save_args=chunks),
        meta=ocp.args.JsonSave({'config': config.to_dict(), 'data': origin}),
      ),
    )


def holds_weights_alone(workdir: str) -> bool:
  """Whether a workdir's only checkpoint is one of `save_params`."""
  directory = pathlib.Path(workdir) / FOLDER
  steps = complete_steps(directory)
  if not steps or (directory / str(steps[-1]) / 'rest').exists():
    return False
  written = _read_checksums(directory / str(steps[-1]))
  return written is not None and not any(
    name.startswith('rest/') for name in written
  )


def wait(manager: ocp.CheckpointManager):
  """Returns when the last save is complete; raises SaveError as `save` does."""
  with _explaining(manager):
    manager.wait_until_finished()


@contextlib.contextmanager
def _explaining(manager: ocp.CheckpointManager):
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    raise SaveError(
      f'a checkpoint in {manager.directory} could not be written: '
      f'{error}. The complete ones there: '
      f'{complete_steps(manager.directory)}'
    ) from error


def complete_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, read off the disk, rising."""
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name) for path in directory.iterdir() if path.name.isdigit()
  )


def _write_checksums(directory: pathlib.Path):
  """Writes CHECKSUMS for the checkpoint that waits in `directory` for its name.

  Orbax calls this on process 0, when the files of all processes are there.
  """
  # The only one: those of a killed run are gone before the first save.
  (folder,) = directory.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}')
  names = [
    path.relative_to(folder).as_posix()
    for path in folder.glob('*/**/*')
    if path.is_file()
  ]
  with open(folder / CHECKSUMS, 'w') as file:
    json.dump(
      {
        name: [size, digest]
        for name, size, digest in _digests(folder, sorted(names))
      },
      file,
      indent=1,
    )
    file.flush()
    os.fsync(file.fileno())


def _read_checksums(folder: pathlib.Path) -> dict[str, tuple[int, str]] | None:
  """{name: (bytes, SHA-256)}; None where CHECKSUMS is absent or unreadable."""
  try:
    return {
      name: (int(size), str(digest))
      for name, (size, digest) in json.loads(
        (folder / CHECKSUMS).read_bytes()
      ).items()
    }
  except (OSError, ValueError, TypeError, AttributeError, RecursionError):
    return None


def _digests(
  folder: pathlib.Path, names: list[str]
) -> list[tuple[str, int, str]]:
  """(name, bytes, SHA-256) of files."""

  def digest(name):
    with open(folder / name, 'rb') as file:
      value = hashlib.file_digest(file, 'sha256').hexdigest()
      return name, file.tell(), value

  with futures.ThreadPoolExecutor() as pool:
    return list(pool.map(digest, names))


def find_damage(folder: pathlib.Path, items: tuple[str, ...] = ()) -> str:
  """What is wrong with the files of a checkpoint; '' where nothing is.

  Args:
    folder: of the checkpoint. One without CHECKSUMS is of an older version, and
      passes, unless one before it has them or an item is missing.
    items: those that matter; all by default.
  """
  path = folder / CHECKSUMS
  if not path.exists():
    for item in ('params', 'rest', 'meta'):
      if not (folder / item).is_dir():
        return f'{item} is missing'
    before = [
      step for step in complete_steps(folder.parent) if step < int(folder.name)
    ]
    if any((folder.parent / str(step) / CHECKSUMS).exists() for step in before):
      return f'{CHECKSUMS} is missing'
    return ''
  written = _read_checksums(folder)
  if written is None:
    return f'{CHECKSUMS} is unreadable'
  written = {
    name: said
    for name, said in written.items()
    if not items or name.split('/')[0] in items
  }
  try:
    for name, (size, _) in written.items():
      if not (folder / name).is_file():
        return f'{name} is missing'
      found = os.path.getsize(folder / name)
      if found != size:
        return f'{name} has {found} bytes instead of {size}'
    for name, _, digest in _digests(folder, list(written)):
      if digest != written[name][1]:
        return f'the content of {name} has changed'
  except OSError as error:
    return f'it cannot be read: {error}'
  return ''


def set_damaged_aside(workdir: str) -> int:
  """Renames the damaged checkpoints behind the last intact one.

  They become STEP.damaged, so that a run that goes on from before can save at the
  same steps; none is deleted.

  Returns:
    The step of the last intact checkpoint, -1 where there is none at all.

  Raises:
    InputError: all are damaged. None is renamed then.
  """
  directory = pathlib.Path(workdir).absolute() / FOLDER
  damage = {}
  for step in reversed(complete_steps(directory)):
    damage[step] = find_damage(directory / str(step))
    if not damage[step]:
      break
  else:
    if damage:
      raise InputError(
        _all_damaged(directory, damage)
        + '. Move that folder away to start again at step 0'
      )
    return -1
  for other in damage:
    if other != step:
      aside = directory / f'{other}.damaged'
      while aside.exists():
        aside = aside.with_name(f'{aside.name}.damaged')
      (directory / str(other)).rename(aside)
      log.warning(
        'checkpoint %s is DAMAGED: %s. It is now called %s; going on '
        'from step %d, %d steps are lost and will be trained again',
        directory / str(other),
        damage[other],
        aside.name,
        step,
        other - step,
      )
  return step


def _all_damaged(directory, damage):
  return f'{directory} holds no checkpoint that is not damaged: ' + '; '.join(
    f'of {step}, {text}' for step, text in damage.items()
  )


def restore_state(
  manager: ocp.CheckpointManager, state: TrainState, step: int, vocab_size: int
) -> TrainState:
  """The saved state of `step`, with the shapes and shardings of `state`.

  It may have been saved on any number of devices and processes.

  Args:
    manager: from `open_manager`.
    state: of the shapes and shardings wanted.
    step: of the checkpoint.
    vocab_size: rows of the embeddings behind it are padding, of which the saved
      state may have had more or fewer.

  Raises:
    InputError: the checkpoint is of another shape.
  """
  strict = check_shapes(manager, step, 'params', state.params, vocab_size)
  abstract = lambda tree: ocp.args.StandardRestore(
    jax.tree.map(ocp.utils.to_shape_dtype_struct, tree), strict=strict
  )
  items = {'params': abstract(state.params), 'rest': abstract(_rest(state))}
  if state.ema_params is not None:
    items['ema_params'] = abstract(state.ema_params)
  saved = _restore(manager, step, items)
  key = jax.random.wrap_key_data(saved['rest']['key'])
  return TrainState(
    step=saved['rest']['step'],
    params=saved['params'],
    ema_params=saved['ema_params'] if state.ema_params is not None else None,
    opt_state=saved['rest']['opt_state'],
    key=jax.device_put(key, state.key.sharding),
  )


def restore_params(
  manager: ocp.CheckpointManager, params: Any, step: int, vocab_size: int
) -> Any:
  """The averaged parameters of `step`, or the plain ones where there are none.

  Args:
    manager: from `open_manager`.
    params: arrays or ShapeDtypeStructs with the shapes and shardings wanted.
    step: of the checkpoint.
    vocab_size: as in `restore_state`.

  Raises:
    InputError: the checkpoint is of another shape.
  """
  item = 'params'
  if (manager.directory / str(step) / 'ema_params').exists():
    item = 'ema_params'
  strict = check_shapes(manager, step, item, params, vocab_size)
  return _restore(
    manager, step, {item: ocp.args.StandardRestore(params, strict=strict)}
  )[item]


def _restore(manager, step, items):
  try:
    return manager.restore(step, args=ocp.args.Composite(**items))
  except jax.errors.JaxRuntimeError:  # of the devices, not of the files
    raise
  except Exception as error:  # pylint: disable=broad-exception-caught
    # (For data that cannot be read Orbax raises no narrower one.)
    folder = manager.directory / str(step)
    hint = (
      ''
      if (folder / CHECKSUMS).exists()
      else (
        f'. It has no {CHECKSUMS}, so it may be damaged: move that folder away to '
        'use the one before'
      )
    )
    raise InputError(
      f'checkpoint {folder} cannot be read into this model: {error}{hint}'
    ) from error


def check_shapes(
  manager: ocp.CheckpointManager,
  step: int,
  item: str,
  params: Any,
  vocab_size: int,
) -> bool:
  """Whether the shapes are the same; False where only padding differs.

  Raises:
    InputError: they differ in more, naming the parameters.
  """
  there, here = _shapes(manager.item_metadata(step)[item]), _shapes(params)
  saved, wanted = (
    {
      name: (min(shape[0], vocab_size), *shape[1:])
      if name in sharding.BY_VOCABULARY
      else shape
      for name, shape in shapes.items()
    }
    for shapes in (there, here)
  )
  lines = [
    f'  {name}: {saved.get(name, "absent")} there, '
    f'{wanted.get(name, "absent")} here'
    for name in sorted(saved | wanted)
    if saved.get(name) != wanted.get(name)
  ]
  if lines:
    raise InputError(
      f'checkpoint {manager.directory / str(step)} is of another '
      'shape:\n' + '\n'.join(lines)
    )
  return there == here


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  tree = getattr(tree, 'tree', tree)
  return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


def restore_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """{'config': ..., 'data': ...} of a checkpoint."""
  return _restore(manager, step, {'meta': ocp.args.JsonRestore()})['meta']


def find_step(
  manager: ocp.CheckpointManager, step: int = 0, items: tuple[str, ...] = PARAMS
) -> int:
  """`step`, or for 0 the last one whose `items` are not damaged.

  Args:
    manager: from `open_manager`.
    step: of the checkpoint wanted.
    items: what will be read of it.

  Raises:
    InputError: there is no such checkpoint; says which there are, or what is
      wrong with it.
  """
  # Off the disk: a run that goes on here may save and delete meanwhile.
  steps = complete_steps(manager.directory)
  if not steps:
    raise InputError(f'{manager.directory} holds no complete checkpoint')
  if step:
    if step not in steps:
      raise InputError(
        f'{manager.directory} holds no checkpoint of step {step}; '
        f'it has {steps}'
      )
    damage = find_damage(manager.directory / str(step), items)
    if damage:
      raise InputError(
        f'checkpoint {manager.directory / str(step)} is damaged: '
        f'{damage}. There are those of steps {steps}'
      )
    return step
  damage = {}
  for step in reversed(steps):
    damage[step] = find_damage(manager.directory / str(step), items)
    if not damage[step]:
      return step
    if complete_steps(manager.directory)[-1:] != steps[-1:]:
      return find_step(manager, 0, items)  # it was being deleted, not damaged
    log.warning(
      'checkpoint %s is DAMAGED: %s. Using the one before',
      manager.directory / str(step),
      damage[step],
    )
  raise InputError(_all_damaged(manager.directory, damage))


# The item of other projects' checkpoint managers that holds the parameters.
_FOREIGN_ITEM = 'train_state'


def find_foreign(path: pathlib.Path) -> pathlib.Path | None:
  """The folder of a whole training state that Orbax saved, or None.

  Args:
    path: it, the checkpoint that it is an item of, the folder of those, or a
      workdir; the last checkpoint is taken.
  """
  if not path.is_dir():
    return None
  if (path / '_METADATA').is_file():
    return path
  for folder in (path, path / FOLDER):
    steps = complete_steps(folder)
    if steps:
      folder = folder / str(steps[-1])
    if (folder / _FOREIGN_ITEM / '_METADATA').is_file():
      return folder / _FOREIGN_ITEM
  return None


def foreign_metadata(folder: pathlib.Path) -> dict[str, Any]:
  """The tree of `find_foreign`'s folder, with shapes for leaves."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    try:
      return checkpointer.metadata(folder.absolute()).item_metadata.tree
    except Exception as error:  # pylint: disable=broad-exception-caught
      # (For data that cannot be read Orbax raises no narrower one.)
      raise InputError(f'{folder} cannot be read: {error}') from error


def restore_foreign(folder: pathlib.Path, item: str) -> Any:
  """One entry of that tree, NumPy arrays."""
  tree = {item: foreign_metadata(folder)[item]}
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  with ocp.PyTreeCheckpointer() as checkpointer:
    try:
      return checkpointer.restore(
        folder.absolute(),
        args=ocp.args.PyTreeRestore(
          item=tree, restore_args=args, partial_restore=True
        ),
      )[item]
    except Exception as error:  # pylint: disable=broad-exception-caught
      raise InputError(f'{folder} cannot be read: {error}') from error


def flatten(tree: Any) -> dict[str, Any]:
  """{path with '/': leaf}."""
  return {
    '/'.join(str(getattr(part, 'key', part)) for part in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
