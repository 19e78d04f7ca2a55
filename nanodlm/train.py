"""The training loop: what happens around a step.

The same command resumes a run; --workdir alone is enough. A run that is killed
at any moment and started again ends with the same parameters, bit for bit, as
one that never stopped, on any number of devices and processes and on any mesh.
A workdir with other model, data or objective settings is refused, with the keys
that differ. metrics.jsonl may then contain a step twice: the later line counts.

    SIGKILL at any moment    Resumes from the last complete checkpoint.
    SIGTERM, Ctrl-C          Saves a checkpoint; the exit status is 128 + the
                             number of the signal. Of several processes, which
                             take SIGTERM only, all save at the same step.
    damaged checkpoint       Found by the SHA-256 of every file. A warning says
                             what is lost, and the checkpoint before is used.
    full disk                One line and exit status 1; complete checkpoints
                             remain.
    non-finite gradient      The step is skipped and counted, and nothing is
                             saved until the next one that is taken;
                             train.max_skipped_steps in a row end the run. What
                             it saved of the parameters that failed is deleted
                             if there is an earlier checkpoint.
    damaged prepared data    One line names the file and the folder to delete.
    a second training run    Is refused at once; evaluation and sampling of the
                             workdir are not.
    a clock that jumps       Has no effect.
    a process is lost        The others end with an error: at once if its
                             connection breaks, otherwise after
                             --heartbeat_timeout_secs.

50 kills in a row, 39 of them during a save, left the parameters of an
undisturbed run (NANODLM_KILLS=50 pytest tests/training/faults_test.py -k
killed).
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import importlib.util
import logging
import math
import os
import pathlib
import shlex
import shutil
import sys
import time
from typing import Any

import jax

from nanodlm import config as configs
from nanodlm import evaluate, laws, rollouts, sample, weights
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.config import Settings, Start
from nanodlm.data import guesses, overlap, pipeline, prepare
from nanodlm.data.packed import PackedData
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.devices import hugepages, lock, multihost
from nanodlm.devices import mesh as meshes
from nanodlm.run import Run
from nanodlm.training import checkpoint, optim, signals, writers
from nanodlm.training.progress import Progress, TrainingDiverged
from nanodlm.training.state import TrainState
from nanodlm.types import Batch, Batches, InputError, Objective

log = logging.getLogger('nanodlm')

# The first step of a start that a profile traces: past compilation.
PROFILE_FIRST_STEP = 10


def define_flags():
  """Does nothing: --mode=train only reads the config."""


def main(start: Start) -> int:
  """Runs --mode=train: trains to train.num_steps, from where the run stopped.

  Returns:
    0; 128 + the number of the signal that ended the run after a checkpoint; or
    1 if training diverged or a checkpoint could not be written.

  Raises:
    InputError: the workdir or a setting is not usable; nothing was changed.
  """
  began = time.monotonic()
  workdirs.check_writable(start.workdir)
  with _claim(start.workdir):
    settings, saved = start.resolve()
    if saved is None and not (start.is_given or start.changes):
      raise InputError(
        f'--workdir={start.workdir!r} does not hold a run to resume; a new one '
        'needs a --config, such as configs/quickstart.py'
      )
    try:
      number = train(settings, start.workdir, saved, began)
    except (TrainingDiverged, checkpoint.SaveError) as error:
      print(f'error: {error}', file=sys.stderr)
      if isinstance(error, checkpoint.SaveError):
        # Threads of the save may wait for what never comes.
        multihost.leave(1)
      return 1
  return 128 + number if number else 0


@contextlib.contextmanager
def _claim(workdir: str) -> Iterator[None]:
  """Holds the workdir's lock; removes a new folder if nothing was written."""
  path = pathlib.Path(workdir)
  is_new = not path.exists()
  workdirs.make(workdir)
  try:
    with lock.hold(workdir):
      yield
  except InputError:
    if is_new and not jax.process_index():
      if {file.name for file in path.iterdir()} <= {workdirs.LOCK}:
        shutil.rmtree(path)
    raise


def train(
  settings: Settings, workdir: str, saved: dict[str, Any] | None, began: float
) -> int:
  """Trains a run whose workdir is locked.

  Args:
    settings: the checked config.
    workdir: gets config.json, metrics.jsonl, checkpoints/, TensorBoard events.
    saved: the config that the workdir holds, or None.
    began: time.monotonic() at the program's start.

  Returns:
    0, or the number of the signal that ended the run after a checkpoint.
  """
  if saved is not None:
    if checkpoint.holds_weights_alone(workdir):
      raise InputError(
        f'workdir={workdir!r} holds imported weights, which cannot be resumed; '
        'give another workdir and start from them with checkpoint.init_from='
        f'{workdir!r}'
      )
    configs.check_resumable(saved, settings, workdir)
  run = runs.make_run(settings)
  runs.check_training(run)
  make_batches = _find_batches(run)
  # All processes must see the same, since it decides what they do together.
  step = multihost.on_process_0(lambda: checkpoint.find_intact(workdir))
  if step > settings.train.num_steps:
    raise InputError(
      f'train.num_steps={settings.train.num_steps!r} must be at least {step}, '
      f'the step that workdir={workdir!r} has reached'
    )
  init_from = settings.checkpoint.init_from if step < 0 else ''
  if init_from:
    weights.check_start(run, init_from)
  is_new = not workdirs.has_tokenizer(workdir)
  before = checkpoint.read_meta(workdir, step) if step >= 0 else None
  if before is not None and not settings.lora['rank']:
    _check_same_start(before['config']['checkpoint'], settings, workdir)
  if is_new:
    packed = prepare.prepare(settings.data, settings.tokenizer)
  else:
    packed = open_own_text(settings, workdir)
  if before is not None:
    check_same_text(packed, before, workdir)
  run = run.with_tokenizer(packed.tokenizer)
  training = runs.make_training(run)
  state, origin = weights.init_state(run, training, init_from, before)
  with checkpoint.open_manager(
    workdir,
    max_to_keep=settings.checkpoint.max_to_keep,
    keep_period=settings.checkpoint.keep_period,
  ) as manager:
    if step >= 0:
      state = checkpoint.restore_state(
        manager, state, step, run.tokenizer.vocab_size
      )
      log.info('resuming %s at step %d', workdir, step)
    step = int(state.step)
    is_shown = saved == settings.to_dict() and bool(
      multihost.on_process_0(lambda: was_evaluated(workdir, step))
    )
    evaluated = None

    def write() -> int:
      nonlocal evaluated
      _write_config(workdir, settings, saved, step)
      share = overlap.remember(workdir, packed, settings.checkpoint.init_from)
      if source := settings.data.eval_source:
        evaluated = evaluate.Text(packed, source, False, share)
        laws.warn_of_other_law(settings.data.source, source)
      if is_new:
        save_tokenizer(run.tokenizer, workdir)
      return 0

    multihost.on_process_0(write)
    _describe(run, packed)
    _warn(settings, before['config'] if before else None, step)
    config = settings.to_dict()
    with (
      signals.catch() as caught,
      writers.open_writers(
        workdir, config, settings.train.wandb_project
      ) as writer,
    ):
      writer.write_hparams(configs.flatten(config))
      text = f'```json\n{settings.to_json()}```'
      writer.write_texts(step, {'config': text})
      try:
        _loop(
          run,
          make_batches(run, packed, step),
          state,
          training.step,
          save=functools.partial(_save, manager, run, packed, origin),
          show=_make_show(run, packed, evaluated, writer, caught, workdir),
          progress=Progress(
            settings.train, settings.data.length, run.flops_per_token(), writer
          ),
          trace=_make_trace(settings, workdir, step),
          caught=caught,
          began=began,
          is_shown=is_shown,
        )
      except TrainingDiverged as error:
        # A single failure may be the fault of its batch.
        is_certain = settings.train.max_skipped_steps > 1
        is_own = is_certain and error.step > step
        text = _after_divergence(manager, error.step, is_own)
        raise TrainingDiverged(f'{error}. {text}', error.step) from None
    checkpoint.wait(manager)
    if caught.number:
      last = manager.latest_step()
      if last is None:
        log.info('nothing was saved; the same command starts again')
      else:
        log.info(f'saved step {last}; the same command resumes')
    elif not jax.process_index():
      has_chat = bool(run.tokenizer.chat_template)
      log.info('%s', _what_next(workdir, has_chat))
  return caught.number


def _what_next(workdir: str, has_chat: bool) -> str:
  """Returns the commands that show what a finished run has learnt."""
  is_script = pathlib.Path(sys.argv[0]).name == 'launch.py'
  program = f'python {sys.argv[0]}' if is_script else 'python -m nanodlm'
  run = shlex.quote(workdir)
  commands = (
    (f'{"chat" if has_chat else "sample"} --workdir={run}', 'jax', ''),
    (f'serve --workdir={run}', 'fastapi', 'serve'),
    (f'report --workdirs={run} --output=report.html', 'matplotlib', 'plots'),
  )
  lines = ['next:']
  for command, package, extra in commands:
    is_missing = importlib.util.find_spec(package) is None
    needs = f"  # pip install -e '.[{extra}]'" * is_missing
    lines.append(f'  {program} --mode={command}{needs}')
  return '\n'.join(lines)


def open_own_text(settings: Settings, workdir: str) -> PackedData:
  """Opens the text with the tokenizer that the run in `workdir` has."""
  tokenizer = evaluate.own_tokenizer(settings, workdir)
  packed = prepare.prepare(settings.data, tokenizer)
  saved = load_tokenizer(workdir)
  if saved.fingerprint != packed.tokenizer.fingerprint:
    raise InputError(
      f'workdir={workdir!r} holds a run whose tokenizer made different ids; '
      'the text it was trained on has changed. Give another workdir'
    )
  if saved.chat_template != packed.tokenizer.chat_template:
    raise InputError(
      f'workdir={workdir!r} holds a run with another chat template; '
      f'tokenizer.chat_template={settings.tokenizer.chat_template!r} has '
      'changed. Give another workdir'
    )
  return packed


def check_same_text(packed: PackedData, meta: dict[str, Any], workdir: str):
  """Raises InputError if a checkpoint was trained on another text."""
  if meta['data']['fingerprint'] != packed.fingerprint:
    raise InputError(
      f'data.source={packed.metadata["source"]!r} has changed since the run in '
      f'workdir={workdir!r} was trained on it. Give another workdir, or start '
      'one with checkpoint.init_from'
    )


def _check_same_start(before: Any, settings: Settings, workdir: str):
  """Raises InputError if weights that were set by hand would not be read.

  The base of adapters is read, and may have moved. So may the run that this one
  started from.

  Args:
    before: config.checkpoint of the checkpoint that is resumed.
    settings: the run's settings.
    workdir: folder of the run.
  """
  now, was = settings.checkpoint, before.get('init_from', '')
  has_moved = was and not os.path.isdir(was)
  is_same = was and os.path.abspath(was) == os.path.abspath(now.init_from)
  is_given = now.init_from and 'checkpoint.init_from' in settings.given
  if is_given and not (is_same or has_moved):
    raise InputError(
      f'checkpoint.init_from={now.init_from!r} is ignored by workdir='
      f'{workdir!r}, which has checkpoints of its own and started from '
      f'{was!r}; resume it with --workdir alone, or give another workdir'
    )


def _warn(settings: Settings, before: Any, step: int):
  """Warns of schedules that do not end or continue, and of unmet periods.

  Args:
    settings: the run's settings.
    before: the config that its checkpoint was trained with, or None.
    step: the checkpoint's step.
  """
  num_steps, anneal_steps = (
    settings.train.num_steps,
    settings.train.anneal_steps,
  )
  warnings = [optim.describe_end(settings.optim, num_steps)]
  if before is not None and 0 < step < num_steps:
    defaults: Any = configs.load().optim
    old = optim.OptimConfig(**{**defaults, **before['optim']})
    planned = optim.make_schedule(old, before['train']['num_steps'])
    text = optim.describe_change(planned, settings.optim, num_steps, step)
    warnings.append(text)
  if anneal_steps > num_steps:
    warnings.append(
      f'train.anneal_steps={anneal_steps} is more than train.num_steps='
      f'{num_steps}: the run ends before its attention is full, as it is in '
      'evaluation and sampling'
    )
  saved = settings.checkpoint
  if kept := saved.keep_period:
    first = math.lcm(kept, saved.every_steps)
    if first > num_steps and num_steps % kept:
      warnings.append(
        f'checkpoint.keep_period={kept} keeps no checkpoint of this run: with '
        f'checkpoint.every_steps={saved.every_steps}, the first would be step '
        f'{first}, after train.num_steps={num_steps}'
      )
  for text in filter(None, warnings):
    log.warning(text)


def was_evaluated(workdir: str, step: int) -> bool:
  """Returns whether metrics.jsonl has the held-out bound of a step."""
  path = pathlib.Path(workdir) / workdirs.METRICS
  lines = path.read_text().splitlines() if path.exists() else []
  return any(f'"step": {step},' in x and '"eval/nll"' in x for x in lines)


def _write_config(
  workdir: str, settings: Settings, saved: dict[str, Any] | None, step: int
):
  """Writes config.json, keeping an earlier one that differs."""
  path = pathlib.Path(workdir) / workdirs.CONFIG
  if saved is not None:
    changed = configs.differing_keys(saved, settings.to_dict())
    if not changed:
      return
    for key, (old, new) in changed.items():
      log.info('changed since the last start: %s=%r, was %r', key, new, old)
    kept = path.with_name(f'config.until_step_{step}.json')
    if not kept.exists():
      shutil.copyfile(path, kept)
  workdirs.write(path, settings.to_json())


def _describe(run: Run, packed: PackedData):
  settings, tokenizer = run.settings, run.tokenizer
  if (
    settings.data.is_chat
    and settings.data.padding == 'masked'
    and run.objective.sees_right(packed.length)
  ):
    log.warning(
      "data.padding='masked' shows a network that sees the text to the right "
      'how long an answer is, and it does not learn to end one; to chat with '
      "the model, use data.crop='document' with data.padding='eos'"
    )
  unit, size = 'tokens', packed.length
  if packed.is_documents:
    unit, size = 'documents', 1
  log.info(
    f'data: {settings.data.source}, {len(packed.train) * size:,} {unit} to '
    f'train on, {len(packed.validation) * size:,} held out, {packed.length} '
    f'tokens/example, tokenizer {tokenizer.name} with {tokenizer.vocab_size} '
    'ids'
  )
  if not jax.process_index():
    log.info(guesses.describe(guesses.measure(packed, settings.data)))
  trained = ''
  if settings.lora['rank']:
    trained = f' ({run.num_trained():,} trained)'
  mesh = ', '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items())
  log.info(
    f'model: {run.num_params():,} parameters{trained}, '
    f'{settings.objective["name"]} objective, on {jax.device_count()} x '
    f'{jax.devices()[0].device_kind} ({mesh})'
  )
  rows = meshes.sharding.padded(tokenizer.vocab_size, run.network.shards)
  if rows > tokenizer.vocab_size:
    log.info(
      f'vocabulary: padded from {tokenizer.vocab_size} to {rows} ids, for '
      f'mesh.tensor={run.network.shards.tensor}'
    )


class TextBatches(Batches):
  """The batches of the training text: shuffled, endless, read ahead."""

  def __init__(self, run: Run, packed: PackedData, start_step: int):
    self._run, self._packed = run, packed
    self._open(start_step)

  def _open(self, step):
    settings, self._next_step = self._run.settings, step
    batch_size = settings.train.batch_size
    self._batches = pipeline.make_train_iterator(
      self._packed,
      settings.data,
      seed=settings.seed,
      batch_size=batch_size,
      start_step=step,
      rows=meshes.local_rows(self._run.mesh, batch_size),
    )

  def __call__(self, state: TrainState, step: int) -> Batch:
    if step != self._next_step:
      self._open(step)
    self._next_step += 1
    return meshes.shard_batch(self._run.mesh, next(self._batches))


# Where batches come from, by config.train.batches.
BATCHES: dict[str, type[Batches]] = {
  'rollouts': rollouts.Rollouts,
  'text': TextBatches,
}


def _find_batches(run: Run) -> type[Batches]:
  """Returns the entry of BATCHES for train.batches."""
  name, reward = run.settings.train.batches, run.settings.train.reward
  wanted, method = run.trained.batches, run.settings.policy['name']
  needs_own = wanted != Objective.batches
  if name not in ('auto', *BATCHES):
    raise InputError(
      f'train.batches={name!r} is not one of {["auto", *sorted(BATCHES)]}'
    )
  if needs_own and name not in ('auto', wanted):
    raise InputError(
      f'train.batches={name!r} must be {wanted!r} with policy.name={method!r}'
    )
  if reward and not needs_own:
    raise InputError(
      f'train.reward={reward!r} is ignored with policy.name={method!r}'
    )
  batches = BATCHES[wanted if name == 'auto' else name]
  batches.check(run)
  return batches


def _loop(
  run: Run,
  batches: Batches,
  state: TrainState,
  train_step: Any,
  *,
  save: Callable[[TrainState], None],
  show: Callable[[int, Any], bool],
  progress: Progress,
  trace: Callable[[int], None],
  caught: signals.Caught,
  began: float,
  is_shown: bool,
):
  """Trains `state` to the last step, or until a signal.

  After a skipped step nothing is saved until one is taken, since the parameters
  may be what made it fail; at the end of the run, unless they can be evaluated.

  `is_shown` says whether the last step was evaluated by an earlier start.

  Raises:
    TrainingDiverged: too many steps in a row were skipped.
  """
  settings, train = run.settings, run.settings.train
  first_step = saved_step = step = int(state.step)
  is_last = is_sound = is_due = False
  if step < train.num_steps:
    log.info('compiling; the first step takes longest')
  while step < train.num_steps and not caught.should_stop(step):
    try:
      with progress.timing('wait'):
        batch = batches(state, step)
    except InputError:
      progress.finish()
      if step > saved_step and not progress.num_skipped:
        save(state)
        log.info(f'saved step {step}; the same command resumes')
      raise
    if step == first_step:
      train_step = train_step.lower(state, batch).compile()
      hugepages.release_free_memory()
    state, values = train_step(state, batch)
    step += 1
    is_last = step == train.num_steps
    is_log = is_last or step % train.log_every_steps == 0
    is_save = is_last or step % settings.checkpoint.every_steps == 0
    every = train.eval_every_steps
    is_eval = is_last or bool(every) and step % every == 0
    is_due = is_due or is_save
    # One step stays in flight, so that the device never waits for the host.
    is_busy = is_log or is_eval or is_due or step == first_step + 1
    progress.add(step, values, max_in_flight=0 if is_busy else 1)
    if step == first_step + 1:
      log.info('first step after %.1f s', time.monotonic() - began)
      progress.restart_clock()
    trace(step)
    if is_log:
      progress.report(step)
    with progress.timing('pause'):
      if is_due and not progress.num_skipped:
        save(state)
        saved_step, is_due = step, False
      if is_eval:
        is_sound = show(step, state.eval_params)
  progress.finish()
  if progress.num_skipped and not (is_last and is_sound):
    if not caught.number:
      raise progress.divergence()
    log.warning(f'step {step} was skipped, so that it is not saved')
  elif step > saved_step:
    save(state)
  if first_step >= train.num_steps and not caught.number:
    log.info(
      f'{step} of train.num_steps={train.num_steps} steps were taken; raise it '
      'to train on'
    )
    if not is_shown:
      show(step, state.eval_params)


def _after_divergence(manager: Any, failed: int, can_delete: bool) -> str:
  """Says what the next start resumes from, after deleting what it must not.

  Args:
    manager: manager of the run's checkpoints.
    failed: the step whose parameters no later step could train.
    can_delete: whether to delete its checkpoint, if there is an earlier one.
  """
  checkpoint.wait(manager)
  steps = sorted(manager.all_steps())
  if can_delete and failed in steps[1:]:
    steps.remove(failed)
    manager.delete(failed)
  if not steps:
    return 'Without a checkpoint, the next start begins at step 0'
  text = f'The next start resumes from the checkpoint of step {steps[-1]}'
  if steps[-1] == failed:
    before = f'from step {steps[-2]}' if len(steps) > 1 else 'at step 0'
    text += (
      '. If that fails at once, its parameters are what fails: move '
      f'{manager.directory / str(failed)} away to start {before}'
    )
  return text


def _save(
  manager: Any,
  run: Run,
  packed: PackedData,
  origin: Mapping[str, Any],
  state: TrainState,
):
  step = int(state.step)
  position = {
    'step': step,
    'example': step * run.settings.train.batch_size,
    'fingerprint': packed.fingerprint,
    **origin,
  }
  checkpoint.save(manager, state, run.settings.to_dict(), position)


def _make_show(
  run: Run,
  packed: PackedData,
  text: evaluate.Text | None,
  writer: Any,
  caught: signals.Caught,
  workdir: str,
) -> Callable[[int, Any], bool]:
  """Returns show(step, params), which evaluates and samples.

  It returns whether the held-out loss is finite.
  """
  settings = run.settings
  evaluate_params = evaluate.make_evaluate(run, packed)
  draw = None
  if settings.train.num_samples:
    draw = sample.make_draw(run, packed, writer, workdir)

  def show(step: int, params: Any) -> bool:
    is_last = step >= settings.train.num_steps
    means = evaluate_params(
      params,
      0 if is_last else settings.eval.max_examples,
      # Several processes stop together at a step; see signals.
      lambda: jax.process_count() == 1 and bool(caught.number),
    )
    if means is None:
      return False
    writer.write_scalars(step, means)
    if not jax.process_index():
      trained, _ = run.network.split(params)
      writer.write_histograms(step, writers.some_values(trained))
    line = evaluate.describe(means, run.objective.exact, text)
    log.info('step %d, %s', step, line)
    if draw:
      draw(step, params)
    writer.flush()
    return all(math.isfinite(means[k]) for k in means if k.endswith('/nll'))

  return show


def _make_trace(
  settings: Settings, workdir: str, first_step: int
) -> Callable[[int], None]:
  """Returns trace(step), which starts and ends the profile of a start."""
  num_steps, last_step = settings.train.profile_steps, settings.train.num_steps
  begin = first_step + PROFILE_FIRST_STEP
  if num_steps and begin >= last_step:
    log.warning(
      f'train.profile_steps={num_steps} is ignored: tracing begins at step '
      f'{begin}, and the run ends at train.num_steps={last_step}'
    )

  def trace(step: int):
    if not num_steps or jax.process_index():
      return
    if step == begin < last_step:
      jax.profiler.start_trace(workdir)
    elif begin < step == min(begin + num_steps, last_step):
      jax.profiler.stop_trace()

  return trace
