"""Parameters from checkpoints: those of a run, of another one, of a base."""

from collections.abc import Mapping
import dataclasses
import logging
import pathlib
from typing import Any

import jax

from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.config import Settings
from nanodlm.data.tokenizers.saved import load_tokenizer
from nanodlm.devices import mesh as meshes
from nanodlm.devices import multihost
from nanodlm.run import Run
from nanodlm.training import checkpoint, checksums
from nanodlm.training import state as states
from nanodlm.training.state import TrainState
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')


def load_params(run: Run, workdir: str, step: int = 0) -> tuple[Any, int]:
  """Returns the averaged parameters of a workdir's checkpoint, and its step.

  Args:
    run: the run that they must fit.
    workdir: workdir of the run that saved them.
    step: step of the checkpoint. 0 is the last one or, if that is damaged, the
      one before, with a warning.

  Raises:
    InputError: there is no such checkpoint, it is damaged or of another shape.
  """
  params, found = load_trained(run, workdir, step)
  if not run.settings.lora['rank']:
    return params, found
  meta = checkpoint.read_meta(workdir, found)['data']
  return states.join(params, load_base(run, meta['base'])[0]), found


def load_merged(run: Run, workdir: str) -> tuple[Run, Any, int]:
  """Returns a run without adapters, its float32 parameters, and their step.

  The adapters of the last checkpoint in `workdir` are added to the weights of
  checkpoint.init_from, as those were before they were cast.
  """
  adapters, found = load_trained(run, workdir)
  meta = checkpoint.read_meta(workdir, found)['data']
  base, _ = load_base(run, meta['base'], in_full=True)
  params = run.network.merge(states.join(adapters, base))
  return run.without_adapters(), params, found


def load_trained(run: Run, workdir: str, step: int = 0) -> tuple[Any, int]:
  """Returns what `load_params` does, without the base of adapters."""
  params, found, _ = _restore(run, workdir, run.shapes()[0], step)
  return params, found


def load_base(
  run: Run, expected: Mapping[str, Any] | None = None, in_full: bool = False
) -> tuple[Any, dict[str, Any]]:
  """Returns the frozen parameters of a run with adapters, and their identity.

  They are those of checkpoint.init_from, together with what its objective has
  learned, if anything.

  Args:
    run: a run with `config.lora`.
    expected: the identity that the checkpoint of the run has; None: any.
    in_full: whether they are float32, instead of what the network uses.

  Raises:
    InputError: they are not there, do not fit, or are others than `expected`.
  """
  saved = run.settings.checkpoint
  workdir, step = find_base(saved.init_from), saved.init_step
  if expected is None and workdir != saved.init_from:
    expected = _read_identity(saved.init_from, step)
  trained, shapes = run.shapes()
  if in_full:
    shapes = meshes.shapes_sharded(
      run.mesh,
      lambda: run.without_adapters().scorer.init_params(jax.random.key(0)),
    )
  elif 'objective' in trained:
    shapes = {**shapes, 'objective': trained['objective']}
  step = expected['step'] if expected else step
  base, found, digest = _restore(run, workdir, shapes, step)
  if in_full:
    base.pop('objective', None)
  identity = {'step': found, 'sha256': digest}
  if expected not in (None, identity):
    raise InputError(
      f'checkpoint.init_from={workdir!r}, step {found}, has changed '
      'since the adapters were trained'
    )
  return base, identity


def find_base(workdir: str) -> str:
  """Returns the workdir of the base of adapters in `workdir`.

  That is `workdir` itself if it holds a whole model.
  """
  config: Any = configs.read_run(workdir, 'checkpoint.init_from')
  if not config.lora.rank:
    return workdir
  return find_base(config.checkpoint.init_from)


def _read_identity(workdir: str, step: int) -> dict[str, Any]:
  """Returns the identity of the base of adapters; see `load_base`."""
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    found = multihost.on_process_0(lambda: checkpoint.find_step(manager, step))
    return checkpoint.restore_meta(manager, found)['data']['base']


def _restore(
  run: Run, workdir: str, shapes: Any, step: int
) -> tuple[Any, int, str]:
  """Returns averaged parameters, the step, and a digest of their files."""
  directory = pathlib.Path(workdir) / workdirs.CHECKPOINTS
  if not directory.is_dir():
    raise InputError(
      f'{workdir!r} is not the folder of a run: it lacks {workdirs.CHECKPOINTS}'
    )
  vocab_size = run.objective.mask_id + 1
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    found = multihost.on_process_0(lambda: checkpoint.find_step(manager, step))
    params = checkpoint.restore_params(manager, shapes, found, vocab_size)
    item = checkpoint.averaged_item(manager, found)
  return params, found, checksums.identify(directory / str(found), item)


def check_start(run: Run, workdir: str):
  """Raises InputError unless a run can start from the one in `workdir`."""
  config: Any = configs.read_run(workdir, 'checkpoint.init_from')
  if not workdirs.has_tokenizer(workdir):
    raise InputError(
      f'checkpoint.init_from={workdir!r} is not the folder of a run: it '
      f'lacks {workdirs.TOKENIZER}'
    )
  ours, theirs = run.settings.lora, config.lora
  keys = ('rank', 'alpha', 'rslora', 'targets')  # What the adapters compute.
  differing = {key: (theirs[key], ours[key]) for key in keys}
  differing = {key: x for key, x in differing.items() if x[0] != x[1]}
  if theirs.rank and differing:
    raise InputError(
      f'checkpoint.init_from={workdir!r} holds adapters, which can only be '
      f'trained further as they are; {{key of lora: (there, here)}} is '
      f'{differing}. For other adapters, or none, write the whole model with '
      '--mode=export and read it with --mode=import'
    )
  other = configs.make_settings(config)
  if run.trained is not run.objective:
    check_same_model(run, other)
  elif lines := _describe_changes(run, other, ('model.',)):
    if ours['rank']:
      raise InputError(
        f'checkpoint.init_from={workdir!r} cannot be the base of adapters of '
        f'this run; the networks differ in\n{lines}'
      )
    log.warning(
      'checkpoint.init_from=%r has the weights of another network; they differ '
      'in\n%s',
      workdir,
      lines,
    )


def check_same_model(run: Run, other: Settings):
  """Raises InputError unless another run has a model of the same kind.

  Its objective must be the same, up to how training draws times, and its
  network, up to how it is computed.
  """
  ours = run.objective.evaluation()
  theirs = runs.make_objective(other).evaluation()
  theirs = dataclasses.replace(theirs, mask_id=ours.mask_id)  # pyright: ignore
  lines = _describe_changes(
    run, other, ('objective.',) * (ours != theirs) + ('model.',)
  )
  if lines:
    raise InputError(
      f'checkpoint.init_from={run.settings.checkpoint.init_from!r} cannot be '
      f'what this run starts from with {runs.method_name(run.settings)}.name; '
      f'they differ in\n{lines}'
    )


def _describe_changes(
  run: Run, other: Settings, sections: tuple[str, ...]
) -> str:
  """Returns the keys that decide on the model and differ, one per line."""
  changed = configs.differing_keys(other.to_dict(), run.settings.to_dict())
  return '\n'.join(
    f'  {key}: {old!r} of that run, {new!r} of this run'
    for key, (old, new) in changed.items()
    if key.startswith(sections)
    and (key.startswith('objective.') or configs.is_bound(key))
    and key != 'model.dropout'
  )


def init_state(
  run: Run,
  training: runs.Training,
  init_from: str,
  before: Mapping[str, Any] | None,
) -> tuple[TrainState, dict[str, Any]]:
  """Draws the state of step 0, perhaps with the weights of another run.

  Args:
    run: a run with its tokenizer.
    training: what it trains with.
    init_from: workdir of the run whose weights it starts from; '' is none.
    before: metadata of the checkpoint that will be restored, or None.

  Returns:
    The state, and what a checkpoint records of where it comes from: the
    identity of the base of adapters, {} without adapters.

  Raises:
    InputError: the other run has another tokenizer, or its base has changed.
  """
  if init_from:
    other = load_tokenizer(init_from)
    if other.fingerprint != run.tokenizer.fingerprint:
      raise InputError(
        f'checkpoint.init_from={init_from!r} has a different tokenizer from '
        'this run'
      )
  saved, has_adapters = run.settings.checkpoint, run.settings.lora['rank']
  initial = None
  if init_from and not has_adapters:
    initial, step = load_params(run, init_from, saved.init_step)
    log.info('starting from the weights of %s, step %d', init_from, step)
  # The base of adapters is loaded next. XLA does not draw what is not used.
  init = lambda: dataclasses.replace(training.init_state(), base=None)
  state: Any = meshes.init_sharded(run.mesh, init)
  if initial is not None:
    state = _with_weights(run, state, initial)
  if not has_adapters:
    return state, {}
  base, identity = load_base(run, before['data']['base'] if before else None)
  state, whole = _with_base(state, base), find_base(saved.init_from)
  if init_from and whole != init_from:
    adapters, step = load_trained(run, init_from, saved.init_step)
    state = _with_weights(run, state, adapters)
    log.info('starting from the adapters of %s, step %d', init_from, step)
  log.info('training adapters of %s, step %d', whole, identity['step'])
  return state, {'base': identity}


def _with_weights(run: Run, state: Any, params: Any) -> Any:
  """Returns the state of step 0 that starts from these parameters."""
  copy = lambda: jax.tree.map(lambda x: x.copy(), params)
  if state.ema_params is not None:
    state = state.replace(ema_params=copy())
  if state.frozen is not None:
    state = state.replace(frozen=run.trained.init_frozen(params))
  return state.replace(params=params)


def _with_base(state: Any, base: dict[str, Any]) -> Any:
  """Adds the base of adapters, and what its objective has learned."""
  learned = base.pop('objective', None)
  if learned is not None:

    def start(params):
      copy = jax.tree.map(lambda x: x.copy(), learned)
      return params and {**params, 'objective': copy}

    state = state.replace(
      params=start(state.params),
      ema_params=start(state.ema_params),
      frozen=start(state.frozen),
    )
  return state.replace(base=base)
