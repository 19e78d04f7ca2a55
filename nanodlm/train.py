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
    non-finite gradient      The step is skipped and counted;
                             train.max_skipped_steps in a row end the run.
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

import collections
from collections.abc import Callable, Iterator
import contextlib
import logging
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, sample
from nanodlm import lm as lms
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.config import Settings, Start
from nanodlm.data import pipeline, prepare
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.devices import hugepages, lock, multihost
from nanodlm.devices import mesh as meshes
from nanodlm.run import Run
from nanodlm.show import watch
from nanodlm.training import checkpoint, checksums, metrics, signals, writers
from nanodlm.training.state import TrainState
from nanodlm.types import Batch, Batches, InputError

log = logging.getLogger('nanodlm')

# The first step of a start that a profile traces: past compilation.
PROFILE_FIRST_STEP = 10


class TrainingDiverged(RuntimeError):
  """Several steps in a row had a loss or gradient that is not finite."""


class TextBatches:
  """The batches of the training text: shuffled, endless, read ahead.

  Args:
    run: the run.
    packed: its text.
    start_step: the step that is asked for first.
  """

  def __init__(self, run: Run, packed: prepare.PackedData, start_step: int):
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
BATCHES: dict[str, Callable[[Run, prepare.PackedData, int], Batches]] = {
  'text': TextBatches
}


def define_flags():
  """Does nothing: --mode=train only reads the config."""


def main(start: Start) -> int:
  """--mode=train: trains to train.num_steps, from where the run stopped.

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
        'needs a --config, as configs/quickstart.py'
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
  # All processes must see the same, since it decides what they do together.
  has_checkpoint = bool(
    multihost.on_process_0(lambda: _has_checkpoint(workdir))
  )
  init_from = '' if has_checkpoint else settings.checkpoint.init_from
  if init_from and not workdirs.has_tokenizer(init_from):
    raise InputError(
      f'checkpoint.init_from={init_from!r} is not the folder of a run: it '
      f'lacks {workdirs.TOKENIZER}'
    )
  own = workdirs.has_tokenizer(workdir)
  packed = prepare.prepare(
    settings.data,
    evaluate.own_tokenizer(settings, workdir) if own else settings.tokenizer,
  )
  run = run.with_tokenizer(packed.tokenizer)
  _check_same_text(workdir, packed, has_checkpoint)
  training = runs.make_training(run)
  evaluate_params = evaluate.make_evaluate(run, packed)
  state = _initial_state(run, training, init_from)
  step = multihost.on_process_0(lambda: checkpoint.find_intact(workdir))
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
    _write_config(workdir, settings, saved, int(state.step))
    if not jax.process_index() and not own:
      save_tokenizer(run.tokenizer, workdir)
    _describe(run, packed)
    with contextlib.ExitStack() as stack:
      caught = stack.enter_context(signals.catch())
      writer = stack.enter_context(
        writers.open_writers(
          workdir, settings.to_dict(), settings.train.wandb_project
        )
      )
      writer.write_hparams(configs.flatten(settings.to_dict()))
      text = f'```json\n{settings.to_json()}```'
      writer.write_texts(int(state.step), {'config': text})
      _loop(
        run,
        BATCHES[settings.train.batches](run, packed, int(state.step)),
        state,
        training.step,
        save=_make_save(manager, run, packed, int(state.step)),
        show=_make_show(run, packed, evaluate_params, writer, caught),
        progress=_Progress(run, writer),
        actions=_make_actions(settings, workdir, int(state.step)),
        caught=caught,
        began=began,
      )
    checkpoint.wait(manager)
  return caught.number


def _has_checkpoint(workdir: str) -> bool:
  folder = pathlib.Path(workdir) / workdirs.CHECKPOINTS
  return bool(checksums.complete_steps(folder))


def _check_same_text(workdir, packed, has_checkpoint):
  """Raises InputError if the run in `workdir` was trained on other tokens."""
  if workdirs.has_tokenizer(workdir) and (
    load_tokenizer(workdir).fingerprint != packed.tokenizer.fingerprint
  ):
    raise InputError(
      f'workdir={workdir!r} holds a run whose tokenizer made other ids; the '
      'text it was trained on has changed. Give another workdir'
    )
  if not has_checkpoint:
    return
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    step = multihost.on_process_0(
      lambda: checkpoint.find_step(manager, items=('meta',))
    )
    position = checkpoint.restore_meta(manager, step)
  if position['data']['fingerprint'] != packed.metadata['source_fingerprint']:
    raise InputError(
      f'data.source={packed.metadata["source"]!r} has changed since the run in '
      f'workdir={workdir!r} was trained on it. Give another workdir, or start '
      'one with checkpoint.init_from'
    )


def _initial_state(
  run: Run, training: runs.Training, init_from: str
) -> TrainState:
  """Draws the state of step 0, perhaps with the weights of another run."""
  initial = None
  if init_from:
    other = load_tokenizer(init_from)
    if other.fingerprint != run.tokenizer.fingerprint:
      raise InputError(
        f'checkpoint.init_from={init_from!r} has another tokenizer than this '
        'run'
      )
    initial, step = runs.load_params(
      run, init_from, run.settings.checkpoint.init_step
    )
    log.info('starting from the weights of %s, step %d', init_from, step)
  state = meshes.init_sharded(run.mesh, training.init_state)
  if initial is not None:
    if state.ema_params is not None:
      copies = jax.tree.map(lambda x: x.copy(), initial)
      state = state.replace(ema_params=copies)
    state = state.replace(params=initial)
  return state


def _write_config(workdir, settings, saved, step):
  """Writes config.json, keeping an earlier one that differs."""
  if jax.process_index():
    return
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


def _make_save(
  manager: Any, run: Run, packed: prepare.PackedData, first_step: int
) -> Callable[[TrainState], None]:
  """Returns save(state), which saves each step once."""
  last_step = first_step if manager.latest_step() == first_step else -1

  def save(state: TrainState):
    nonlocal last_step
    step = int(state.step)
    if step == last_step:
      return
    last_step = step
    position = {
      'step': step,
      'example': step * run.settings.train.batch_size,
      'fingerprint': packed.metadata['source_fingerprint'],
    }
    checkpoint.save(manager, state, run.settings.to_dict(), position)

  return save


def _describe(run: Run, data: prepare.PackedData):
  settings, tokenizer = run.settings, run.tokenizer
  log.info(
    'data: %s, %s tokens to train on, %s held out, %d tokens/example, '
    'tokenizer %s with %d ids',
    settings.data.source,
    f'{len(data.train) * data.length:,}',
    f'{len(data.validation) * data.length:,}',
    data.length,
    tokenizer.name,
    tokenizer.vocab_size,
  )
  log.info(
    'model: %s parameters, %s objective, on %d %s device%s',
    f'{run.num_params():,}',
    settings.objective['name'],
    jax.device_count(),
    jax.devices()[0].device_kind,
    's' if jax.device_count() > 1 else '',
  )
  shards = run.network.shards
  if max(shards.fsdp, shards.tensor) > 1:
    sizes = (f'{axis} {size}' for axis, size in run.mesh.shape.items())
    log.info('mesh: %s', ', '.join(sizes))
  rows = meshes.sharding.padded(tokenizer.vocab_size, shards)
  if rows > tokenizer.vocab_size:
    log.info(
      'vocabulary: padded from %d to %d ids, for mesh.tensor=%d',
      tokenizer.vocab_size,
      rows,
      shards.tensor,
    )


class _Progress:
  """Gathers the metrics of steps, and reports those since the last report.

  Args:
    run: the run.
    writer: gets the scalars.
  """

  def __init__(self, run: Run, writer: Any):
    self._train, self._writer = run.settings.train, writer
    length = run.settings.data.length
    self._tokens_per_step = self._train.batch_size * length
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    self._max_rate = None
    if peak:
      flops = run.network.flops_per_token(length)
      self._max_rate = peak * jax.device_count() / flops
    self._in_flight = collections.deque()
    self._skipped = self._skipped_in_a_row = 0
    self._sums, self._last = [], {}
    self.restart_clock()

  def restart_clock(self):
    """Leaves out the time so far (compilation), not the sums."""
    self._start, self._num_steps = time.monotonic(), 0
    self._waited_secs = self._paused_secs = 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Measures time in which the next batch is waited for."""
    start = time.monotonic()
    yield
    self._waited_secs += time.monotonic() - start

  @contextlib.contextmanager
  def pause(self):
    """Leaves out time that is not training: evaluation, samples."""
    start = time.monotonic()
    yield
    self._paused_secs += time.monotonic() - start

  def add(self, step: int, values: Any, *, max_in_flight: int):
    """Takes the metrics of a step, and reads those of all but the last ones."""
    self._in_flight.append((step, values))
    while len(self._in_flight) > max_in_flight:
      self._collect(*self._in_flight.popleft())

  def finish(self):
    """Reads the metrics of all steps."""
    while self._in_flight:
      self._collect(*self._in_flight.popleft())

  def _collect(self, step, values):
    values = self._last = jax.device_get(values)
    self._num_steps += 1
    if not values['skipped']:
      self._skipped_in_a_row = 0
      self._sums.append(values)
      return
    self._skipped += 1
    self._skipped_in_a_row += 1
    loss, grad_norm = (
      values['loss'] / max(values['weight'], 1),
      values['grad_norm'],
    )
    log.warning(
      'step %d skipped: loss %s, gradient norm %s', step, loss, grad_norm
    )
    if self._skipped_in_a_row >= self._train.max_skipped_steps:
      scalars = {
        'train/loss': loss,
        'train/grad_norm': grad_norm,
        'train/skipped_steps': self._skipped,
      }
      self._writer.write_scalars(step, scalars)
      raise TrainingDiverged(
        f'{self._skipped_in_a_row} steps in a row, the last one step {step}, '
        f'had a loss ({loss}) or gradient norm ({grad_norm}) that is not '
        'finite; lower optim.learning_rate or look at the data. The last '
        'checkpoint is from before'
      )

  def report(self, step: int):
    """Writes and logs what happened since the last report."""
    secs = time.monotonic() - self._start - self._paused_secs
    done, last = self._num_steps, self._last
    rate = done * self._tokens_per_step / secs
    means = metrics.train_means(metrics.add(self._sums)) if self._sums else {}
    scalars = {
      **means,
      'train/tokens_per_sec': rate,
      'train/secs_per_step': secs / max(done, 1),
      'train/data_wait_share': self._waited_secs / secs,
      'train/grad_norm': float(last['grad_norm']),
      'train/param_norm': float(last['param_norm']),
      'train/learning_rate': float(last['learning_rate']),
      'train/skipped_steps': self._skipped,
    }
    if self._max_rate:
      scalars['train/mfu'] = rate / self._max_rate
    self._writer.write_scalars(step, scalars)
    self._writer.flush()
    if means:
      num_steps = self._train.num_steps
      left = (num_steps - step) * secs / max(done, 1)
      log.info(
        'step %*d/%d  loss %.4f nats/token  %.4f bits/byte  %s tokens/s  '
        '%s left',
        len(str(num_steps)),
        step,
        num_steps,
        means['train/loss'],
        means['train/bits_per_byte'],
        f'{rate:,.0f}',
        _duration(left),
      )
    self._sums = []
    self.restart_clock()


def _duration(secs: float) -> str:
  if secs < 60:
    return f'{secs:.0f} s'
  if secs < 3600:
    return f'{secs // 60:.0f} min {secs % 60:02.0f} s'
  return f'{secs // 3600:.0f} h {secs % 3600 // 60:02.0f} min'


def _loop(
  run: Run,
  batches: Batches,
  state: TrainState,
  train_step: Any,
  *,
  save: Callable[[TrainState], None],
  show: Callable[[int, Any], None],
  progress: _Progress,
  actions: list[Any],
  caught: signals.Caught,
  began: float,
):
  """Trains `state` to the last step, or until a signal."""
  settings, train = run.settings, run.settings.train
  first_step = step = int(state.step)
  log.info('compiling; the first step takes longest')
  while step < train.num_steps and not caught.should_stop(step):
    with progress.waiting():
      batch = batches(state, step)
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
    # One step stays in flight, so that the device never waits for the host.
    is_busy = is_log or is_eval or is_save or step == first_step + 1
    progress.add(step, values, max_in_flight=0 if is_busy else 1)
    if step == first_step + 1:
      log.info('first step after %.1f s', time.monotonic() - began)
      progress.restart_clock()
    for action in actions:
      action(step)
    if is_log:
      progress.report(step)
    with progress.pause():
      if is_save:
        save(state)
      if is_eval:
        show(step, state.eval_params)
  progress.finish()
  if caught.number:
    save(state)
  elif first_step >= train.num_steps:
    log.info(
      'the run has taken %d of train.num_steps=%d steps',
      first_step,
      train.num_steps,
    )
    show(first_step, state.eval_params)


def _make_show(
  run: Run,
  packed: prepare.PackedData,
  evaluate_params: Callable[..., dict[str, float] | None],
  writer: Any,
  caught: signals.Caught,
) -> Callable[[int, Any], None]:
  """Returns show(step, params), which evaluates and samples."""
  settings, num_samples = run.settings, run.settings.train.num_samples
  draw = _make_sample(run, packed, writer) if num_samples else None

  def show(step: int, params: Any):
    is_last = step >= settings.train.num_steps
    means = evaluate_params(
      params,
      0 if is_last else settings.eval.max_examples,
      # Several processes stop together at a step; see signals.
      lambda: jax.process_count() == 1 and bool(caught.number),
    )
    if means is None:
      return
    writer.write_scalars(step, means)
    if not jax.process_index():
      writer.write_histograms(step, writers.some_values(params))
    text = evaluate.describe(means, run.objective.exact)
    log.info('step %d, %s', step, text)
    if draw:
      draw(step, params)
    writer.flush()

  return show


def _make_sample(
  run: Run, packed: prepare.PackedData, writer: Any
) -> Callable[[int, Any], None]:
  """Returns draw(step, params), which samples, logs and writes the samples."""
  settings, tokenizer = run.settings, run.tokenizer
  watchers = sample.Watchers()
  fill = lms.make_fill(run, view=watch.View(watchers, tokenizer.mask_id))
  row, fixed = _first_prompt(run, packed)
  tokens, is_fixed = (
    np.tile(x, (settings.train.num_samples, 1)) for x in (row, fixed)
  )

  def draw(step: int, params: Any):
    recorder = watch.Recorder(lms.whole_batch(run, tokens))
    watchers.those = [recorder]
    key = jax.random.fold_in(jax.random.key(settings.sample.seed), step)
    filled, _ = fill(params, key, tokens, is_fixed)
    trajectories = recorder.trajectories(filled)
    # Rows that other processes compute have empty trajectories.
    if trajectories := [one for one in trajectories if one.answers]:
      image = watch.order_image(trajectories, fixed)[None]
      writer.write_images(step, {'samples/reveal_order': image})
    texts = [
      tokenizer.decode(lms.shown_tokens(run, row, fixed)) for row in filled
    ]
    blocks = {f'samples/{i}': f'```\n{x}\n```' for i, x in enumerate(texts)}
    writer.write_texts(step, blocks)
    for text in texts:
      lines = ''.join(f'    {line}\n' for line in text.splitlines())
      log.info('sample:\n%s', lines)

  return draw


def _first_prompt(run: Run, packed: prepare.PackedData):
  """Lays out what samples in training start from: for pairs the first prompt.

  A blank canvas if that cannot be laid out: it holds characters that the
  tokenizer does not know, or sampler.length is too short.
  """
  length, prompt = run.settings.sample_length, ''
  if packed.is_pairs:
    pair = packed.validation[0]
    text = run.tokenizer.decode(pair['tokens'][: pair['prompt_length']])
    prompt = text.replace('{', '{{').replace('}', '}}')
  try:
    return lms.lay_out(run, prompt, length)
  except InputError:
    return lms.lay_out(run, '', length)


def _make_actions(
  settings: Settings, workdir: str, first_step: int
) -> list[Any]:
  """Returns CLU's periodic actions: progress for the platform, a profile."""
  from clu import periodic_actions  # Imports TensorFlow.

  train = settings.train
  actions: list[Any] = [
    periodic_actions.ReportProgress(
      num_train_steps=train.num_steps,
      every_steps=train.log_every_steps,
      every_secs=None,
    )
  ]
  if train.profile_steps and not jax.process_index():
    actions.append(
      periodic_actions.Profile(
        logdir=workdir,
        num_profile_steps=train.profile_steps,
        first_profile=first_step + PROFILE_FIRST_STEP,
        every_secs=None,
      )
    )
  return actions
