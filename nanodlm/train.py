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
import datetime
import functools
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
from nanodlm.data.packed import PackedData
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.devices import hugepages, lock, multihost
from nanodlm.devices import mesh as meshes
from nanodlm.run import Run
from nanodlm.show import watch
from nanodlm.training import checkpoint, metrics, signals, writers
from nanodlm.training.state import TrainState
from nanodlm.types import Batch, Batches, InputError

log = logging.getLogger('nanodlm')

# The first step of a start that a profile traces: past compilation.
PROFILE_FIRST_STEP = 10


class TrainingDiverged(RuntimeError):
  """Several steps in a row had a loss or gradient that is not finite."""


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
  step = multihost.on_process_0(lambda: checkpoint.find_intact(workdir))
  init_from = settings.checkpoint.init_from if step < 0 else ''
  if init_from and not workdirs.has_tokenizer(init_from):
    raise InputError(
      f'checkpoint.init_from={init_from!r} is not the folder of a run: it '
      f'lacks {workdirs.TOKENIZER}'
    )
  is_new = not workdirs.has_tokenizer(workdir)
  if is_new:
    packed = prepare.prepare(settings.data, settings.tokenizer)
  else:
    packed = _open_same_text(settings, workdir, step)
  run = run.with_tokenizer(packed.tokenizer)
  training = runs.make_training(run)
  state = _initial_state(run, training, init_from)
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
    if not jax.process_index():
      _write_config(workdir, settings, saved, step)
      if is_new:
        save_tokenizer(run.tokenizer, workdir)
    _describe(run, packed)
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
      _loop(
        run,
        BATCHES[settings.train.batches](run, packed, step),
        state,
        training.step,
        save=functools.partial(_save, manager, run, packed),
        show=_make_show(run, packed, writer, caught),
        progress=_Progress(run, writer),
        trace=_make_trace(settings, workdir, step),
        caught=caught,
        began=began,
      )
    checkpoint.wait(manager)
  return caught.number


def _open_same_text(settings: Settings, workdir: str, step: int) -> PackedData:
  """Opens the text of the run in `workdir`.

  Args:
    settings: of the run.
    workdir: holds its tokenizer.
    step: of its checkpoint; -1 without one.

  Raises:
    InputError: it is not the text that the run was trained on until `step`.
  """
  tokenizer = evaluate.own_tokenizer(settings, workdir)
  packed = prepare.prepare(settings.data, tokenizer)
  if load_tokenizer(workdir).fingerprint != packed.tokenizer.fingerprint:
    raise InputError(
      f'workdir={workdir!r} holds a run whose tokenizer made other ids; the '
      'text it was trained on has changed. Give another workdir'
    )
  if step < 0:
    return packed
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    position = checkpoint.restore_meta(manager, step)['data']
  if position['fingerprint'] != packed.metadata['source_fingerprint']:
    raise InputError(
      f'data.source={packed.metadata["source"]!r} has changed since the run in '
      f'workdir={workdir!r} was trained on it. Give another workdir, or start '
      'one with checkpoint.init_from'
    )
  return packed


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
  log.info(
    f'data: {settings.data.source}, {len(packed.train) * packed.length:,} '
    f'tokens to train on, {len(packed.validation) * packed.length:,} held out, '
    f'{packed.length} tokens/example, tokenizer {tokenizer.name} with '
    f'{tokenizer.vocab_size} ids'
  )
  mesh = ', '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items())
  log.info(
    f'model: {run.num_params():,} parameters, {settings.objective["name"]} '
    f'objective, on {jax.device_count()} x {jax.devices()[0].device_kind} '
    f'({mesh})'
  )
  rows = meshes.sharding.padded(tokenizer.vocab_size, run.network.shards)
  if rows > tokenizer.vocab_size:
    log.info(
      f'vocabulary: padded from {tokenizer.vocab_size} to {rows} ids, for '
      f'mesh.tensor={run.network.shards.tensor}'
    )


class TextBatches:
  """The batches of the training text: shuffled, endless, read ahead.

  Args:
    run: the run.
    packed: its text.
    start_step: the step that is asked for first.
  """

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
BATCHES: dict[str, Callable[[Run, PackedData, int], Batches]] = {
  'text': TextBatches
}


def _loop(
  run: Run,
  batches: Batches,
  state: TrainState,
  train_step: Any,
  *,
  save: Callable[[TrainState], None],
  show: Callable[[int, Any], None],
  progress: '_Progress',
  trace: Callable[[int], None],
  caught: signals.Caught,
  began: float,
):
  """Trains `state` to the last step, or until a signal."""
  settings, train = run.settings, run.settings.train
  first_step = saved_step = step = int(state.step)
  log.info('compiling; the first step takes longest')
  while step < train.num_steps and not caught.should_stop(step):
    with progress.timing('wait'):
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
    trace(step)
    if is_log:
      progress.report(step)
    with progress.timing('pause'):
      if is_save:
        save(state)
        saved_step = step
      if is_eval:
        show(step, state.eval_params)
  progress.finish()
  if step > saved_step:  # A signal ended the run.
    save(state)
  if first_step >= train.num_steps and not caught.number:
    log.info(f'{step} of train.num_steps={train.num_steps} steps were taken')
    show(step, state.eval_params)


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
    self._flops_per_token = run.network.flops_per_token(length)
    self._in_flight = collections.deque()
    self._skipped = self._skipped_in_a_row = 0
    self._sums, self._last = [], {}
    self.restart_clock()

  def restart_clock(self):
    """Leaves out the time so far (compilation), not the sums."""
    self._start, self._num_steps = time.monotonic(), 0
    self._secs = {'wait': 0.0, 'pause': 0.0}

  @contextlib.contextmanager
  def timing(self, kind: str) -> Iterator[None]:
    """Measures a 'wait' for a batch, or a 'pause', which is not training."""
    start = time.monotonic()
    yield
    self._secs[kind] += time.monotonic() - start

  def add(self, step: int, values: Any, *, max_in_flight: int):
    """Takes the metrics of a step, and reads those of all but the last ones."""
    self._in_flight.append((step, values))
    self.finish(max_in_flight)

  def finish(self, max_in_flight: int = 0):
    """Reads the metrics of all but the last `max_in_flight` steps."""
    while len(self._in_flight) > max_in_flight:
      self._read(*self._in_flight.popleft())

  def _read(self, step, values):
    values = self._last = jax.device_get(values)
    self._num_steps += 1
    if not values['skipped']:
      self._skipped_in_a_row = 0
      self._sums.append(values)
      return
    self._skipped += 1
    self._skipped_in_a_row += 1
    loss = values['loss'] / max(values['weight'], 1)
    grad_norm = values['grad_norm']
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
    secs = time.monotonic() - self._start - self._secs['pause']
    secs_per_step = secs / max(self._num_steps, 1)
    rate = self._num_steps * self._tokens_per_step / secs
    means = metrics.train_means(metrics.add(self._sums)) if self._sums else {}
    scalars = {
      **means,
      'train/tokens_per_sec': rate,
      'train/secs_per_step': secs_per_step,
      'train/data_wait_share': self._secs['wait'] / secs,
      'train/skipped_steps': self._skipped,
    }
    for key in ('grad_norm', 'param_norm', 'learning_rate'):
      scalars[f'train/{key}'] = float(self._last[key])
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    if peak:
      peak *= jax.device_count()
      scalars['train/mfu'] = rate * self._flops_per_token / peak
    self._writer.write_scalars(step, scalars)
    self._writer.flush()
    if means:
      num_steps = self._train.num_steps
      left = datetime.timedelta(
        seconds=round((num_steps - step) * secs_per_step)
      )
      log.info(
        f'step {step:{len(str(num_steps))}}/{num_steps}  '
        f'loss {means["train/loss"]:.4f} nats/token  '
        f'{means["train/bits_per_byte"]:.4f} bits/byte  '
        f'{rate:,.0f} tokens/s  {left} left'
      )
    self._sums = []
    self.restart_clock()


def _save(manager: Any, run: Run, packed: PackedData, state: TrainState):
  step = int(state.step)
  position = {
    'step': step,
    'example': step * run.settings.train.batch_size,
    'fingerprint': packed.metadata['source_fingerprint'],
  }
  checkpoint.save(manager, state, run.settings.to_dict(), position)


def _make_show(
  run: Run, packed: PackedData, writer: Any, caught: signals.Caught
) -> Callable[[int, Any], None]:
  """Returns show(step, params), which evaluates and samples."""
  settings = run.settings
  evaluate_params = evaluate.make_evaluate(run, packed)
  num_samples = settings.train.num_samples
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
  run: Run, packed: PackedData, writer: Any
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
    texts = [tokenizer.decode(lms.shown_tokens(run, row)) for row in filled]
    blocks = {f'samples/{i}': f'```\n{x}\n```' for i, x in enumerate(texts)}
    writer.write_texts(step, blocks)
    for text in texts:
      lines = ''.join(f'    {line}\n' for line in text.splitlines())
      log.info('sample:\n%s', lines)

  return draw


def _first_prompt(run: Run, packed: PackedData):
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


def _make_trace(
  settings: Settings, workdir: str, first_step: int
) -> Callable[[int], None]:
  """Returns trace(step), which starts and ends the profile of a start."""
  begin = first_step + PROFILE_FIRST_STEP
  num_steps = settings.train.profile_steps

  def trace(step: int):
    if not num_steps or jax.process_index():
      return
    if step == begin:
      jax.profiler.start_trace(workdir)
    elif step == begin + num_steps:
      jax.profiler.stop_trace()

  return trace
