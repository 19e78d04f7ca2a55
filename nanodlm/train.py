"""The training loop: what happens around a step."""

import collections
import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import shutil
import signal
import time
from typing import Any, Iterator

import jax
from ml_collections import config_dict
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, sample
from nanodlm.data import pipeline, prepare, tokenizers
from nanodlm.devices import hugepages, lock, multihost, sharding
from nanodlm.devices import mesh as meshes
from nanodlm.model import transformer
from nanodlm.model.config import train_flops_per_token
from nanodlm.show import replay
from nanodlm.steps import train as steps
from nanodlm.training import checkpoint, metrics
from nanodlm.training import state as states
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

METRICS_FILE = 'metrics.jsonl'
# The first step of a start that a profile traces: past compilation.
PROFILE_FIRST_STEP = 10
# Values of each parameter that its histogram is made of, evenly spaced.
HISTOGRAM_VALUES = 20_000


class TrainingDiverged(RuntimeError):
  """Several steps in a row had a loss or gradient that is not finite."""


# What ends a run that was sound when it started.
STOPPED = (TrainingDiverged, checkpoint.SaveError)


def train(
  config: config_dict.ConfigDict,
  settings: configs.Settings,
  workdir: str,
  defaults: config_dict.ConfigDict,
) -> int:
  """--mode=train: trains to train.num_steps, or goes on where the run stands.

  Args:
    config: the full config.
    settings: its checked sections.
    workdir: gets config.json, metrics.jsonl, checkpoints/ and TensorBoard events.
    defaults: configs/base.py's, for configs saved by older versions.

  Returns:
    0, or the number of the signal that ended the run after a checkpoint.

  Raises:
    InputError: the workdir or a setting will not do; what was there is as it was.
    TrainingDiverged: see there; the last checkpoint is from before.
    SaveError: a checkpoint could not be written; the ones before stay.
  """
  start = time.monotonic()
  project = settings.train.wandb_project
  if project and importlib.util.find_spec('wandb') is None:
    raise InputError(
      f'train.wandb_project={project!r} needs the wandb package: '
      "pip install -e '.[wandb]'"
    )
  saved = evaluate.load_config(workdir, defaults)
  if saved is not None:
    if checkpoint.holds_weights_alone(workdir):
      raise InputError(
        f'workdir={workdir!r} holds imported weights and no run to '
        'go on with; give another workdir and start from them with '
        f'checkpoint.init_from={workdir!r}'
      )
    configs.check_resumable(saved, config, workdir)
  check_writable(workdir)
  _check_devices(config, settings)
  # Seen alike by all processes: it decides what they do together.
  has_checkpoint = bool(
    multihost.on_process_0(lambda: _has_checkpoint(workdir))
  )
  init_from = settings.checkpoint.init_from
  if init_from and not (has_checkpoint or _has_tokenizer(init_from)):
    raise InputError(
      f'checkpoint.init_from={init_from!r} holds no run (no '
      f'{tokenizers.SAVED} in it)'
    )
  packed = prepare.prepare(
    settings.data,
    evaluate.own_tokenizer(settings, workdir)
    if _has_tokenizer(workdir)
    else settings.tokenizer,
  )
  run = evaluate.make_run(config, settings, packed.tokenizer)
  training = steps.make_training(settings, run.network, run.objective, run.mesh)
  evaluate_params = evaluate.make_evaluate(run, packed)
  _check_same_text(workdir, packed, has_checkpoint)
  initial = None
  if settings.checkpoint.init_from and not has_checkpoint:
    other = tokenizers.load(settings.checkpoint.init_from)
    if other.fingerprint != run.tokenizer.fingerprint:
      raise InputError(
        f'checkpoint.init_from={settings.checkpoint.init_from!r} has '
        'another tokenizer than this run'
      )
    initial, step = evaluate.load_params(
      run, settings.checkpoint.init_from, settings.checkpoint.init_step
    )
    log.info(
      'starting from the weights of %s, step %d',
      settings.checkpoint.init_from,
      step,
    )
  state = meshes.init_sharded(run.mesh, training.init_state)
  if initial is not None:
    if state.ema_params is not None:
      state = state.replace(
        ema_params=jax.tree.map(lambda x: x.copy(), initial)
      )
    state = state.replace(params=initial)

  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'--workdir={workdir!r} cannot be written: {error}'
    ) from error
  with lock.hold(workdir):
    # Again: another run may have come and gone since.
    saved = evaluate.load_config(workdir, defaults)
    if saved is not None:
      configs.check_resumable(saved, config, workdir)
    step = multihost.on_process_0(lambda: checkpoint.set_damaged_aside(workdir))
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
      write_config(workdir, config, saved, int(state.step))
      if not jax.process_index() and not _has_tokenizer(workdir):
        tokenizers.save(run.tokenizer, workdir)
      _describe(run, packed, state)
      with contextlib.ExitStack() as stack:
        caught = stack.enter_context(_catch_signals())
        writer = stack.enter_context(_writers(workdir, config, settings))
        writer.write_hparams(configs.flatten(config))
        writer.write_texts(
          int(state.step), {'config': f'```json\n{configs.to_json(config)}```'}
        )
        _loop(
          run,
          packed,
          workdir,
          state,
          training.step,
          evaluate_params,
          manager,
          writer,
          caught,
          start,
        )
      checkpoint.wait(manager)
  return caught.number


def _has_checkpoint(workdir: str) -> bool:
  return bool(
    checkpoint.complete_steps(pathlib.Path(workdir) / checkpoint.FOLDER)
  )


def _has_tokenizer(workdir: str) -> bool:
  return (pathlib.Path(workdir) / tokenizers.SAVED).is_file()


def _check_same_text(
  workdir: str, packed: prepare.PackedData, has_checkpoint: bool
):
  """Raises InputError where the run in `workdir` was trained on other tokens."""
  if (
    _has_tokenizer(workdir)
    and tokenizers.load(workdir).fingerprint != packed.tokenizer.fingerprint
  ):
    raise InputError(
      f'workdir={workdir!r} holds a run whose tokenizer made other '
      'ids; the text it was trained on has changed. Give another '
      'workdir'
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


def _check_devices(config: config_dict.ConfigDict, settings: configs.Settings):
  """Checks batch sizes and network against the devices, before data is prepared."""
  mesh = meshes.make_mesh(settings.mesh)
  transformer.check_shards(
    configs.make_model(config, vocab_size=2),
    meshes.shards(mesh),
    settings.data.length,
  )
  group_size = configs.make_objective(config, mask_id=1).group_size
  steps.check_batch_size(
    settings.train.batch_size, mesh, settings.train.num_microbatches, group_size
  )
  steps.check_batch_size(
    settings.eval.batch_size, mesh, 1, 1, 'eval.batch_size'
  )


def check_writable(workdir: str):
  """Raises InputError where the workdir is not a folder one can write to."""
  path = pathlib.Path(workdir)
  parent = path
  while not parent.exists():
    parent = parent.parent
  if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
    raise InputError(
      f'--workdir={workdir!r} cannot be written: {parent} is not '
      'a writable folder'
    )


def write_config(
  workdir: str,
  config: config_dict.ConfigDict,
  saved: config_dict.ConfigDict | None,
  step: int,
):
  """Writes config.json, keeping an earlier one that differs."""
  if jax.process_index():
    return
  path = pathlib.Path(workdir) / evaluate.CONFIG_FILE
  if saved is not None:
    changed = configs.differing_keys(saved, config)
    if not changed:
      return
    for key, (old, new) in changed.items():
      log.info('changed since the last start: %s=%r, was %r', key, new, old)
    kept = path.with_name(f'config.until_step_{step}.json')
    if not kept.exists():
      shutil.copyfile(path, kept)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(configs.to_json(config))
  temporary.replace(path)


def _describe(
  run: evaluate.Run, data: prepare.PackedData, state: states.TrainState
):
  tokenizer = run.tokenizer
  device = jax.devices()[0]
  log.info(
    'data: %s, %s tokens to train on, %s held out, %d tokens/example, '
    'tokenizer %s with %d ids',
    run.config.data.source,
    f'{len(data.train) * data.length:,}',
    f'{len(data.validation) * data.length:,}',
    data.length,
    tokenizer.name,
    tokenizer.vocab_size,
  )
  log.info(
    'model: %s parameters, %s objective, on %d %s device%s',
    f'{run.network.num_params(run.objective):,}',
    run.config.objective.name,
    jax.device_count(),
    device.device_kind,
    's' if jax.device_count() > 1 else '',
  )
  shards = run.network.shards
  if max(shards.fsdp, shards.tensor) > 1:
    log.info(
      'mesh: %s',
      ', '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items()),
    )
  rows = sharding.padded(tokenizer.vocab_size, shards)
  if rows > tokenizer.vocab_size:
    log.info(
      'vocabulary: padded from %d to %d ids, for mesh.tensor=%d',
      tokenizer.vocab_size,
      rows,
      shards.tensor,
    )


class _Caught:
  """The number of the signal that arrived, 0 until then."""

  number = 0


@contextlib.contextmanager
def _catch_signals() -> Iterator[_Caught]:
  """Turns the first SIGTERM or SIGINT into a flag; a second one acts as usual."""
  caught = _Caught()
  # With several processes SIGTERM is JAX's own, which makes all of them stop at
  # the same step (see _should_stop), and SIGINT is made one.
  is_one = jax.process_count() == 1
  handled = (signal.SIGTERM, signal.SIGINT) if is_one else (signal.SIGINT,)

  def handle(number, frame):
    del frame
    for other in handled:
      signal.signal(other, before[other])
    if is_one:
      caught.number = number
    else:
      signal.raise_signal(signal.SIGTERM)
    log.info(
      '%s: saving a checkpoint, then exiting', signal.Signals(number).name
    )

  before = {number: signal.signal(number, handle) for number in handled}
  try:
    yield caught
  finally:
    for number in handled:
      signal.signal(number, before[number])


@contextlib.contextmanager
def _writers(
  workdir: str, config: config_dict.ConfigDict, settings: configs.Settings
):
  """CLU's writers, on process 0: TensorBoard, absl's log, metrics.jsonl."""
  # Here and not at the top: they import TensorFlow, which takes seconds.
  from clu import metric_writers  # pylint: disable=g-import-not-at-top

  class JsonLines(metric_writers.MetricWriter):
    """Scalars as one JSON object a line, to metrics.jsonl."""

    def __init__(self):
      self._file = open(pathlib.Path(workdir) / METRICS_FILE, 'a')

    def write_scalars(self, step, scalars):
      self._file.write(
        json.dumps({'step': step} | metrics.finite_or_none(scalars)) + '\n'
      )

    def flush(self):
      self._file.flush()

    def close(self):
      self._file.close()

    def _ignore(self, *args, **kwargs):
      """Only scalars are kept here."""

    write_summaries = write_images = write_videos = write_audios = _ignore
    write_texts = write_histograms = write_hparams = write_pointcloud = _ignore

  if jax.process_index():
    yield metric_writers.MultiWriter([])
    return
  if settings.train.wandb_project:
    import wandb  # pylint: disable=g-import-not-at-top

    wandb.init(
      project=settings.train.wandb_project,
      dir=workdir,
      config=config.to_dict(),
      sync_tensorboard=True,
    )
  writer = metric_writers.MultiWriter(
    [
      metric_writers.SummaryWriter(workdir),
      metric_writers.LoggingWriter(),
      JsonLines(),
    ]
  )
  try:
    yield writer
    writer.flush()
    writer.close()
  except OSError as error:  # a full disk, most likely
    raise checkpoint.SaveError(
      f'{workdir} could not be written: {error}'
    ) from error


class _Window:
  """What happened since the last line of the log."""

  def __init__(self):
    self.clear()

  def clear(self):
    self.sums, self.last = [], None
    self.restart_clock()

  def restart_clock(self):
    """Leaves out the time so far (compilation), not the sums."""
    self.start, self.num_steps = time.monotonic(), 0
    self.waited_secs, self.paused_secs = 0.0, 0.0

  @contextlib.contextmanager
  def pause(self):
    """Time that is not training: evaluation, samples."""
    start = time.monotonic()
    yield
    self.paused_secs += time.monotonic() - start

  def secs(self) -> float:
    return time.monotonic() - self.start - self.paused_secs


def _loop(
  run,
  packed,
  workdir,
  state,
  train_step,
  evaluate_params,
  manager,
  writer,
  caught,
  start,
):
  """Trains `state` to the last step, or until a signal."""
  settings, mesh = run.settings, run.mesh
  train, batch_size = settings.train, settings.train.batch_size
  length = settings.data.length
  num_steps, first_step = train.num_steps, int(state.step)
  step = first_step
  log.info('compiling; the first step takes longest')
  batches = pipeline.make_train_iterator(
    packed,
    settings.data,
    seed=settings.seed,
    batch_size=batch_size,
    start_step=step,
    rows=meshes.local_rows(mesh, batch_size),
  )
  draw = sample.make_sample(run) if train.num_samples else None
  prompt = _first_prompt(run, packed)
  peak = metrics.peak_flops(jax.devices()[0].device_kind)
  flops = train_flops_per_token(run.network.config, length)
  actions = _make_actions(settings, workdir, first_step)
  window, in_flight, skipped, in_a_row = _Window(), collections.deque(), 0, 0

  def collect():
    """Reads the metrics of the oldest step in flight."""
    nonlocal skipped, in_a_row
    number, values = in_flight.popleft()
    values = jax.device_get(values)
    window.last = values
    window.num_steps += 1
    if values['skipped']:
      skipped, in_a_row = skipped + 1, in_a_row + 1
      log.warning(
        'step %d skipped: loss %s, gradient norm %s',
        number,
        values['loss'] / max(values['weight'], 1),
        values['grad_norm'],
      )
      if in_a_row >= train.max_skipped_steps:
        writer.write_scalars(
          number,
          {
            'train/loss': values['loss'] / max(values['weight'], 1),
            'train/grad_norm': values['grad_norm'],
            'train/skipped_steps': skipped,
          },
        )
        raise TrainingDiverged(
          f'{in_a_row} steps in a row, the last one step {number}, had a loss '
          f'({values["loss"] / max(values["weight"], 1)}) or gradient norm '
          f'({values["grad_norm"]}) that is not finite; lower '
          'optim.learning_rate or look at the data. The last checkpoint is from '
          'before'
        )
    else:
      in_a_row = 0
      window.sums.append(values)

  def report(number):
    secs = window.secs()
    done = window.num_steps
    rate = done * batch_size * length / secs
    means = metrics.train_means(metrics.add(window.sums)) if window.sums else {}
    scalars = {
      **means,
      'train/tokens_per_sec': rate,
      'train/secs_per_step': secs / max(done, 1),
      'train/data_wait_share': window.waited_secs / secs,
      'train/grad_norm': float(window.last['grad_norm']),
      'train/param_norm': float(window.last['param_norm']),
      'train/learning_rate': float(window.last['learning_rate']),
      'train/skipped_steps': skipped,
    }
    if peak:
      scalars['train/mfu'] = rate * flops / (peak * jax.device_count())
    writer.write_scalars(number, scalars)
    writer.flush()
    if means:
      left = (num_steps - number) * secs / max(done, 1)
      log.info(
        'step %*d/%d  loss %.4f nats/token  %.4f bits/byte  %s tokens/s  '
        '%s left',
        len(str(num_steps)),
        number,
        num_steps,
        means['train/loss'],
        means['train/bits_per_byte'],
        f'{rate:,.0f}',
        _duration(left),
      )
    window.clear()

  def show(number, params):
    """Evaluates and samples."""
    is_last = number >= num_steps
    means = evaluate_params(
      params,
      0 if is_last else settings.eval.max_examples,
      # Several processes stop together, at a step: see _should_stop.
      lambda: jax.process_count() == 1 and bool(caught.number),
    )
    if means is None:
      return
    writer.write_scalars(number, means)
    if not jax.process_index():
      writer.write_histograms(number, some_values(params))
    log.info(
      'step %d, %s', number, evaluate.describe(means, run.objective.exact)
    )
    if draw:
      key = jax.random.fold_in(jax.random.key(settings.sample.seed), number)
      canvas_length = settings.sample.length or length
      rows, trajectories = draw(
        params, prompt, train.num_samples, key, canvas_length
      )
      if trajectories:
        _, fixed = sample.lay_out(run, prompt, canvas_length)
        writer.write_images(
          number,
          {
            'samples/reveal_order': replay.order_image(trajectories, fixed)[
              None
            ]
          },
        )
      texts = [
        run.tokenizer.decode(sample.shown_tokens(run, row)) for row in rows
      ]
      writer.write_texts(
        number,
        {f'samples/{i}': f'```\n{text}\n```' for i, text in enumerate(texts)},
      )
      for text in texts:
        log.info(
          'sample:\n%s\n',
          '\n'.join('    ' + line for line in text.splitlines()),
        )
    writer.flush()

  def save(number):
    checkpoint.save(
      manager,
      state,
      run.config,
      {
        'step': number,
        'example': number * batch_size,
        'fingerprint': packed.metadata['source_fingerprint'],
      },
    )

  while step < num_steps and not _should_stop(caught, step):
    waiting = time.monotonic()
    batch = next(batches)
    window.waited_secs += time.monotonic() - waiting
    batch = meshes.shard_batch(mesh, batch)
    if step == first_step:
      train_step = train_step.lower(state, batch).compile()
      hugepages.release_free_memory()
    state, values = train_step(state, batch)
    step += 1
    in_flight.append((step, values))
    is_log = step % train.log_every_steps == 0 or step == num_steps
    is_eval = step == num_steps or (
      train.eval_every_steps and step % train.eval_every_steps == 0
    )
    is_save = step == num_steps or step % settings.checkpoint.every_steps == 0
    # One step stays in flight, so that the device never waits for the host.
    while len(in_flight) > (0 if is_log or is_eval or is_save else 1):
      collect()
    if step == first_step + 1:
      while in_flight:
        collect()
      log.info('first step after %.1f s', time.monotonic() - start)
      window.restart_clock()
    for action in actions:
      action(step)
    if is_log:
      report(step)
    with window.pause():
      if is_save:
        save(step)
      if is_eval:
        show(step, state.eval_params)
  while in_flight:
    collect()
  if caught.number and manager.latest_step() != step:
    save(step)
  elif first_step >= num_steps:
    log.info(
      'the run has taken %d of train.num_steps=%d steps', first_step, num_steps
    )
    show(first_step, state.eval_params)


def some_values(params: Any) -> dict[str, np.ndarray]:
  """At most about HISTOGRAM_VALUES of each parameter, by its name.

  Of those that this process's devices hold: nothing is gathered, so that no other
  process takes part.
  """
  values = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    shards = {str(shard.index): shard.data for shard in leaf.addressable_shards}
    stride = -(-sum(x.size for x in shards.values()) // HISTOGRAM_VALUES)
    values[f'params/{name}'] = np.concatenate(
      [np.asarray(x.reshape(-1)[::stride]) for x in shards.values()]
    )
  return values


def _first_prompt(run: evaluate.Run, packed: prepare.PackedData) -> str:
  """What samples in training start from: of pairs the first held-out prompt.

  Nothing where it cannot be laid out: it holds characters that the tokenizer
  does not know, or sampler.length is too short.
  """
  if not packed.is_pairs:
    return ''
  pair = packed.validation[0]
  text = run.tokenizer.decode(pair['tokens'][: pair['prompt_length']])
  prompt = text.replace('{', '{{').replace('}', '}}')
  length = run.settings.sample.length or packed.length
  try:
    sample.lay_out(run, prompt, length)
  except InputError:
    return ''
  return prompt


def _should_stop(caught: _Caught, step: int) -> bool:
  """Whether to stop before this step: on every process at the same one."""
  if jax.process_count() == 1:
    return bool(caught.number)
  from jax.experimental import multihost_utils  # pylint: disable=g-import-not-at-top

  stop = multihost_utils.reached_preemption_sync_point(step)
  if stop and not caught.number:
    caught.number = signal.SIGTERM
  return stop


def _make_actions(
  settings: configs.Settings, workdir: str, first_step: int
) -> list[Any]:
  """CLU's periodic actions: progress for the platform, and a profile."""
  from clu import periodic_actions  # pylint: disable=g-import-not-at-top

  train = settings.train
  actions = [
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


def _duration(secs: float) -> str:
  if secs < 60:
    return f'{secs:.0f} s'
  if secs < 3600:
    return f'{secs // 60:.0f} min {secs % 60:02.0f} s'
  return f'{secs // 3600:.0f} h {secs % 3600 // 60:02.0f} min'
