"""Checkpoints with Orbax: asynchronous, atomic, checksummed, with their config.

A checkpoint holds the items `params`, `ema_params` (if there is an average),
`frozen` (if there are such parameters), `rest` (step, optimizer state, key) and
`meta` (JSON: config, data position). Evaluation and sampling read one of the
first two only. Its checksums are written after its files and before its folder
gets its name, so every complete checkpoint has them, except those of older
versions. They are checked before it is read; if it is damaged, the one before
is used.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import logging
import pathlib
from typing import Any

from absl import logging as absl_logging
import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from nanodlm import workdir as workdirs
from nanodlm.devices import sharding
from nanodlm.training import checksums
from nanodlm.training.checksums import CHECKSUMS, complete_steps, find_damage
from nanodlm.training.state import TrainState
from nanodlm.types import InputError, reason

log = logging.getLogger('nanodlm')

PARAMS = ('params', 'ema_params')
# Chunk size, in bytes, in which `save_params` compresses and writes large
# arrays.
_CHUNK_BYTES = 2**25


class SaveError(RuntimeError):
  """A checkpoint could not be written; the complete ones are unchanged."""


def open_manager(
  workdir: str,
  *,
  max_to_keep: int | None = None,
  keep_period: int = 0,
  read_only: bool = False,
  concurrent_gb: int = 96,  # Orbax's default.
) -> ocp.CheckpointManager:
  """Opens the manager of `workdir`/checkpoints, which ignores incomplete ones.

  At most `concurrent_gb` x 10^9 bytes of parameters are being written at a
  time; the largest array must be smaller.
  """
  directory = pathlib.Path(workdir).absolute() / workdirs.CHECKPOINTS

  def write_checksums():
    # Called on process 0 when all files of a checkpoint are written. There is
    # one: those of a killed run are removed before the first save.
    (folder,) = directory.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}')
    checksums.write(folder)

  # Orbax aborts a save after this time on the wall clock, by which a laptop
  # that slept would end its run. Several processes may wait for one whose save
  # failed, so their wait must be finite.
  is_alone = jax.process_count() == 1
  async_options = ocp.AsyncOptions(
    timeout_secs=100 * 365 * 86400 if is_alone else 3600,
    # Asynchronous creation would wait for the folders by the wall clock, too.
    create_directories_asynchronously=False,
    post_finalization_callback=write_checksums,
  )
  arrays = ocp.StandardCheckpointHandler
  verbosity = absl_logging.get_verbosity()
  if read_only:  # Orbax warns of it.
    absl_logging.set_verbosity(min(verbosity, absl_logging.ERROR))
  try:
    return ocp.CheckpointManager(
      directory,
      item_handlers={
        'params': arrays(save_concurrent_gb=concurrent_gb),
        'ema_params': arrays(),
        'frozen': arrays(),
        'rest': arrays(),
        'meta': ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        keep_period=keep_period or None,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=not read_only,
        async_options=None if read_only else async_options,
      ),
    )
  finally:
    absl_logging.set_verbosity(verbosity)


def _items(state: TrainState) -> dict[str, Any]:
  """Returns the items of a checkpoint that hold arrays."""
  items = {
    'params': state.params,
    'ema_params': state.ema_params,
    'frozen': state.frozen,
    'rest': {
      'step': state.step,
      'opt_state': state.opt_state,
      'key': jax.random.key_data(state.key),
    },
  }
  return {name: tree for name, tree in items.items() if tree is not None}


def save(
  manager: ocp.CheckpointManager,
  state: TrainState,
  config: Mapping[str, Any],
  position: dict[str, Any],
):
  """Starts saving `state`; returns once the state may be donated again.

  Checkpoints of this step or a later one are deleted: a run that resumed from
  before them has found them damaged.

  `position` is the place in the data: {'step': n, 'example': n * batch_size,
  'fingerprint': that of the text}.

  Raises:
    SaveError: this save or an EARLIER one failed, on a full disk for example.
  """
  items = {
    **{name: ocp.args.StandardSave(x) for name, x in _items(state).items()},
    'meta': ocp.args.JsonSave({'config': dict(config), 'data': position}),
  }
  step = int(state.step)
  with _explaining(manager):
    for damaged in manager.all_steps():
      if damaged >= step:
        log.warning('replacing the damaged checkpoint of step %d', damaged)
        manager.delete(damaged)
    manager.save(step, args=ocp.args.Composite(**items))


def save_params(
  workdir: str, params: Any, config: Mapping[str, Any], origin: dict[str, Any]
):
  """Saves parameters alone, as step 0: to evaluate, sample and start from.

  `origin` describes their source in JSON values. Needs memory for little more
  than the largest array at a time.

  Raises:
    SaveError: as `save`.
  """
  chunks = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params
  )
  items = {
    'params': ocp.args.StandardSave(params, save_args=chunks),
    'meta': ocp.args.JsonSave({'config': dict(config), 'data': origin}),
  }
  largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
  with open_manager(workdir, concurrent_gb=largest // 10**9 + 1) as manager:
    with _explaining(manager):
      manager.save(0, args=ocp.args.Composite(**items))
      manager.wait_until_finished()


def holds_weights_alone(workdir: str) -> bool:
  """Returns whether a workdir's last checkpoint holds parameters alone."""
  directory = pathlib.Path(workdir) / workdirs.CHECKPOINTS
  steps = complete_steps(directory)
  if not steps or (directory / str(steps[-1]) / 'rest').exists():
    return False
  written = checksums.read(directory / str(steps[-1]))
  return written is not None and not any(
    name.startswith('rest/') for name in written
  )


def wait(manager: ocp.CheckpointManager):
  """Waits until the last save is complete; raises SaveError as `save` does."""
  with _explaining(manager):
    manager.wait_until_finished()


@contextlib.contextmanager
def _explaining(manager: ocp.CheckpointManager):
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    directory = pathlib.Path(manager.directory)
    raise SaveError(
      f'a checkpoint in {directory} could not be written: {reason(error)}. '
      f'The complete ones there: {complete_steps(directory)}'
    ) from error


def restore_state(
  manager: ocp.CheckpointManager, state: TrainState, step: int, vocab_size: int
) -> TrainState:
  """Restores the state of `step` with the shapes and shardings of `state`.

  It may have been saved on any number of devices and processes. Embedding rows
  from `vocab_size` on are padding, whose number may differ.

  Raises:
    InputError: shapes in the checkpoint differ.
  """
  strict = check_shapes(manager, step, 'params', state.params, vocab_size)
  abstract = lambda tree: ocp.args.StandardRestore(
    jax.tree.map(ocp.utils.to_shape_dtype_struct, tree), strict=strict
  )
  items = {name: abstract(tree) for name, tree in _items(state).items()}
  saved = _restore(manager, step, items)
  rest = saved['rest']
  key = jax.random.wrap_key_data(rest['key'])
  return dataclasses.replace(
    state,
    step=rest['step'],
    params=saved['params'],
    ema_params=saved.get('ema_params'),
    frozen=saved.get('frozen'),
    opt_state=rest['opt_state'],
    key=jax.device_put(key, state.key.sharding),
  )


def restore_params(
  manager: ocp.CheckpointManager, params: Any, step: int, vocab_size: int
) -> Any:
  """Restores the averaged parameters of `step`, else the others.

  `params` are arrays or ShapeDtypeStructs; see `restore_state`.
  """
  item = averaged_item(manager, step)
  strict = check_shapes(manager, step, item, params, vocab_size)
  return _restore(
    manager, step, {item: ocp.args.StandardRestore(params, strict=strict)}
  )[item]


def averaged_item(manager: ocp.CheckpointManager, step: int) -> str:
  """Returns the item of the averaged parameters of `step`, else the others."""
  has_average = (manager.directory / str(step) / 'ema_params').exists()
  return 'ema_params' if has_average else 'params'


def restore_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """Restores {'config': ..., 'data': ...} of a checkpoint."""
  return _restore(manager, step, {'meta': ocp.args.JsonRestore()})['meta']


def read_meta(workdir: str, step: int) -> dict[str, Any]:
  """Returns what `restore_meta` does, of a workdir that may be in use."""
  with open_manager(workdir, read_only=True) as manager:
    return restore_meta(manager, step)


def read_origin(workdir: str) -> dict[str, Any]:
  """Returns what the last checkpoint of a run says about its text or source."""
  steps = complete_steps(pathlib.Path(workdir) / workdirs.CHECKPOINTS)
  return read_meta(workdir, steps[-1])['data'] if steps else {}


def _restore(manager, step, items):
  try:
    return manager.restore(step, args=ocp.args.Composite(**items))
  except jax.errors.JaxRuntimeError:  # From the devices, not the files.
    raise
  except Exception as error:  # Orbax raises no narrower one for bad data.
    folder, hint = pathlib.Path(manager.directory) / str(step), ''
    if not (folder / CHECKSUMS).exists():
      hint = (
        f'. It has no {CHECKSUMS}, so it may be damaged: move that folder away '
        'to use the one before'
      )
    raise InputError(
      f'checkpoint {folder} cannot be read into this model: '
      f'{reason(error)}{hint}'
    ) from error


def check_shapes(
  manager: ocp.CheckpointManager,
  step: int,
  item: str,
  params: Any,
  vocab_size: int,
) -> bool:
  """Returns whether all shapes agree; False if only the padding differs.

  Raises:
    InputError: any other shapes differ; the message names the parameters.
  """
  there, here = _shapes(manager.item_metadata(step)[item]), _shapes(params)

  def unpadded(shapes):
    return {
      name: (min(shape[0], vocab_size), *shape[1:])
      if name in sharding.BY_VOCABULARY
      else shape
      for name, shape in shapes.items()
    }

  saved, wanted = unpadded(there), unpadded(here)
  lines = [
    f'  {name}: {saved.get(name, "absent")} saved, '
    f'{wanted.get(name, "absent")} in this model'
    for name in sorted(saved | wanted)
    if saved.get(name) != wanted.get(name)
  ]
  if lines:
    raise InputError(
      f'checkpoint {manager.directory / str(step)} does not fit this model:\n'
      + '\n'.join(lines)
    )
  return there == here


def read_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Returns {path with '/': shape} of the parameters that a folder holds.

  Unlike `ocp`, it starts no JAX backend, which a run in progress may occupy.

  Raises:
    OSError, ValueError, KeyError, TypeError: the folder is damaged.
  """
  tree = json.loads((folder / '_METADATA').read_text())['tree_metadata']
  names = [[str(x['key']) for x in y['key_metadata']] for y in tree.values()]
  spec = {'driver': 'ocdbt', 'base': f'file://{folder.absolute()}/'}
  store = ts.KvStore.open(spec).result()
  # The shapes in _METADATA are those of the parts that devices wrote.
  read = lambda name: json.loads(store[f'{".".join(name)}/.zarray'])
  return {'/'.join(name): tuple(read(name)['shape']) for name in names}


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  tree = getattr(tree, 'tree', tree)
  return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


def find_step(
  manager: ocp.CheckpointManager, step: int = 0, items: tuple[str, ...] = PARAMS
) -> int:
  """Returns `step`, or for 0 the last one whose `items` are intact.

  Raises:
    InputError: there is no such checkpoint, or it is damaged.
  """
  # Read from the disk: a run that is active here saves and deletes meanwhile.
  directory = pathlib.Path(manager.directory)
  steps = complete_steps(directory)
  if not steps:
    raise InputError(f'{directory} does not hold a complete checkpoint')
  if not step:
    return _last_intact(directory, items)
  if step not in steps:
    raise InputError(
      f'{directory} does not hold step {step}; its steps are {steps}'
    )
  damage = find_damage(directory / str(step), items)
  if damage:
    raise InputError(
      f'checkpoint {directory / str(step)} is damaged: {damage}. The steps '
      f'there are {steps}'
    )
  return step


def find_intact(workdir: str) -> int:
  """Returns the step that training resumes from, -1 for a new run.

  It is that of the last intact checkpoint. Later ones are damaged; they stay
  until the run saves their step again.

  Raises:
    InputError: all checkpoints are damaged.
  """
  directory = pathlib.Path(workdir).absolute() / workdirs.CHECKPOINTS
  steps = complete_steps(directory)
  step = _last_intact(directory) if steps else -1
  if steps and step != steps[-1]:
    log.warning(
      f'{steps[-1] - step} steps are lost and will be trained again, from step '
      f'{step} on'
    )
  return step


def _last_intact(directory: pathlib.Path, items: tuple[str, ...] = ()) -> int:
  steps, damage = complete_steps(directory), {}
  for step in reversed(steps):
    damage[step] = find_damage(directory / str(step), items)
    if not damage[step]:
      return step
    if complete_steps(directory)[-1:] != steps[-1:]:
      return _last_intact(directory, items)  # The run has deleted this one.
    log.warning(
      f'checkpoint {directory / str(step)} is DAMAGED: {damage[step]}. Using '
      'the one before'
    )
  raise InputError(
    f'all checkpoints in {directory} are damaged ('
    + '; '.join(f'of step {step}, {text}' for step, text in damage.items())
    + '). Move that folder away to start again at step 0'
  )


def flatten(tree: Any) -> dict[str, Any]:
  """Returns {path with '/': leaf}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): leaf for path, leaf in leaves}
