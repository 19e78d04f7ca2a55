"""Evaluation of a checkpoint, or of the parameters of a run in progress."""

import dataclasses
import json
import logging
import math
import pathlib
from typing import Any, Callable

import jax
from ml_collections import config_dict
import numpy as np

from nanodlm import config as configs
from nanodlm.data import pipeline, prepare, tokenizers
from nanodlm.devices import mesh as meshes
from nanodlm.devices import multihost
from nanodlm.noise import times
from nanodlm.steps import train as steps
from nanodlm.training import checkpoint, metrics
from nanodlm.types import InputError, Objective

log = logging.getLogger('nanodlm')

CONFIG_FILE = 'config.json'
EVAL_FILE = 'eval.jsonl'
# Independent evaluations that the variance of one is measured from.
NUM_REPEATS = 8
# On fewer rows the interval of a ratio of variances is a guess itself.
FEW_NOISE_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Run:
  """What training, evaluation and sampling all start from.

  Attributes:
    config: the full config.
    settings: its checked sections.
    mesh: the device mesh.
    tokenizer: what the network's ids stand for.
    network: the transformer.
    objective: the training objective.
  """

  config: config_dict.ConfigDict
  settings: configs.Settings
  mesh: jax.sharding.Mesh
  tokenizer: tokenizers.Tokenizer
  network: steps.Network
  objective: Objective


def load_config(
  workdir: str, defaults: config_dict.ConfigDict
) -> config_dict.ConfigDict | None:
  """The config of the run in `workdir`, or None where there is no run.

  Raises:
    InputError: there are checkpoints without a config, or it is not one.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  if path.is_file():
    return configs.from_json(path.read_bytes(), defaults, str(path))
  if (pathlib.Path(workdir) / checkpoint.FOLDER).exists():
    raise InputError(
      f'workdir={workdir!r} has checkpoints but no {CONFIG_FILE}; '
      'give another workdir'
    )
  return None


def fit_mesh(config: config_dict.ConfigDict):
  """Replaces a mesh that does not fit the devices here by all of them along data.

  A run need not be looked at where it was trained; one whose parameters do not
  fit into a device needs --config.mesh.fsdp.
  """
  try:
    meshes.make_mesh(configs.make_mesh_config(config))
  except InputError:
    log.info(
      'the mesh of the training, %s, does not fit the devices here: using '
      'mesh.data=%d',
      dict(config.mesh),
      jax.device_count(),
    )
    config.mesh.update(data=-1, fsdp=1, tensor=1)


def make_run(
  config: config_dict.ConfigDict,
  settings: configs.Settings,
  tokenizer: tokenizers.Tokenizer,
) -> Run:
  """Builds what does not depend on the data.

  Raises:
    InputError: see `mesh.make_mesh`.
  """
  mesh = meshes.make_mesh(settings.mesh)
  network = steps.Network(
    configs.make_model(config, tokenizer.vocab_size),
    settings.train.chunk_size,
    meshes.shards(mesh),
  )
  return Run(
    config,
    settings,
    mesh,
    tokenizer,
    network,
    configs.make_objective(config, tokenizer.mask_id),
  )


def make_evaluate(
  run: Run, packed: prepare.PackedData
) -> Callable[..., dict[str, float] | None]:
  """Builds evaluate(params, max_examples=0, should_stop=never) -> means.

  The means are those of `metrics.eval_means` over `packed`'s validation rows;
  None where `should_stop()` ended them early.
  """
  settings = run.settings.eval
  batch_size = settings.batch_size
  steps.check_batch_size(batch_size, run.mesh, 1, 1, 'eval.batch_size')
  eval_step = steps.make_eval_step(
    run.network,
    run.objective,
    run.mesh,
    num_draws=settings.num_draws,
    seed=settings.seed,
  )
  rows = meshes.local_rows(run.mesh, batch_size)

  def evaluate(
    params: Any,
    max_examples: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
  ) -> dict[str, float] | None:
    batches = pipeline.make_eval_batches(
      packed,
      run.settings.data,
      batch_size=batch_size,
      rows=rows,
      max_examples=max_examples or None,
    )
    sums = []
    for i, batch in enumerate(batches):
      if should_stop():
        return None
      first = i * batch_size
      index = np.arange(first + rows.start, first + rows.stop, dtype=np.int32)
      sums.append(
        eval_step(
          params, meshes.shard_batch(run.mesh, {**batch, 'index': index})
        )
      )
      if len(sums) > 1:  # one in flight, so that a signal is seen soon
        jax.block_until_ready(sums[-2])
    return metrics.eval_means(
      metrics.add(jax.device_get(sums)),
      'eval_subset' if max_examples else 'eval',
    )

  return evaluate


def load_params(run: Run, workdir: str, step: int = 0) -> tuple[Any, int]:
  """The (averaged) parameters of a workdir's checkpoint, and its step.

  Args:
    run: what they must fit.
    workdir: of the run that saved them.
    step: of the checkpoint; 0 is the last, or where that is damaged the one
      before, with a warning.

  Raises:
    InputError: there is no such checkpoint, it is damaged or of another shape.
  """
  abstract = meshes.shapes_sharded(
    run.mesh, lambda: run.network.init_params(run.objective, jax.random.key(0))
  )
  if not (pathlib.Path(workdir) / checkpoint.FOLDER).is_dir():
    raise InputError(f'{workdir!r} holds no run (no {checkpoint.FOLDER} in it)')
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    step = multihost.on_process_0(lambda: checkpoint.find_step(manager, step))
    return checkpoint.restore_params(
      manager, abstract, step, run.tokenizer.vocab_size
    ), step


def open_run(workdir: str) -> tuple[Run, Any, int]:
  """A run from its workdir alone: the run, its averaged parameters, its step.

  Raises:
    InputError: there is no such run.
  """
  defaults = configs.load_base()
  config = load_config(workdir, defaults)
  if config is None:
    raise InputError(f'{workdir!r} holds no run (no {CONFIG_FILE} in it)')
  fit_mesh(config)
  settings = configs.validate(config)
  run = make_run(config, settings, tokenizers.load(workdir))
  return run, *load_params(run, workdir)


def with_sampler(run: Run, changes: dict[str, Any]) -> Run:
  """The run with changes to its `config.sampler`.

  With another `name` than the run's own, what is not in `changes` takes its
  default: the run's keys were meant for another sampler. A `num_steps` replaces
  a grid that lists its times.

  Raises:
    InputError: it does not fit the objective, or a value is not allowed.
  """
  defaults = configs.load_base()
  config = run.config.copy_and_resolve_references()
  own = configs.sampler_name(config)
  if changes.get('name', own) != own:
    config.sampler = defaults.sampler
  if 'num_steps' in changes and times.is_listed(config.sampler.grid):
    config.sampler.grid = defaults.sampler.grid
  config.sampler.update(changes)
  return dataclasses.replace(
    run, config=config, settings=configs.validate(config)
  )


def make_score(
  run: Run,
  *,
  num_draws: int,
  batch_size: int,
  objective: Objective | None = None,
) -> Callable[..., Any]:
  """Builds score(params, key, batch) -> values [N], numpy, for any N.

  Args:
    run: the network, objective and mesh.
    num_draws: noise draws per row.
    batch_size: rows per network call, rounded up to whole devices.
    objective: the form to score with; None is the objective's evaluation form.

  Returns:
    A function of parameters, a key and a dict of numpy arrays, the same on every
    process: tokens, weight [N, L], and optionally segment_ids [N, L] and index
    [N]. Its values are those of `step.make_score_step`; row i has the noise of
    fold_in(key, index[i]), by default i.
  """
  if objective is None:
    objective = run.objective.evaluation()
  score_step = steps.make_score_step(
    run.network, objective, run.mesh, num_draws=num_draws
  )
  shards = meshes.num_batch_shards(run.mesh)
  batch_size = -(-batch_size // shards) * shards

  def score(
    params: Any, key: jax.Array, batch: dict[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    num = len(batch['tokens'])
    batch = {'index': np.arange(num, dtype=np.int32), **batch}
    parts = []
    for first in range(0, num, batch_size):
      part = {
        name: pad_rows(x[first : first + batch_size], batch_size)
        for name, x in batch.items()
      }
      parts.append(
        jax.device_get(
          score_step(
            params,
            jax.random.clone(key),
            meshes.shard_whole_batch(run.mesh, part),
          )
        )
      )
    return {
      name: np.concatenate([part[name] for part in parts])[:num]
      for name in parts[0]
    }

  return score


def pad_rows(x: np.ndarray, num_rows: int) -> np.ndarray:
  """x [n, ...] with rows of zeros up to `num_rows`."""
  return np.pad(x, ((0, num_rows - len(x)),) + ((0, 0),) * (x.ndim - 1))


def validation_rows(
  run: Run, packed: prepare.PackedData, num_examples: int
) -> dict[str, np.ndarray]:
  """The first rows of the validation split, at most `num_examples` (0: all)."""
  num = min(num_examples or len(packed.validation), len(packed.validation))
  return next(
    iter(
      pipeline.make_eval_batches(
        packed, run.settings.data, batch_size=num, max_examples=num
      )
    )
  )


def check_noisy(run: Run, num_examples: int):
  """Raises InputError where there is no noise to measure."""
  if run.objective.exact:
    raise InputError(
      f'--noise_examples={num_examples!r}: the objective '
      f'{run.config.objective.name!r} is exact, without noise'
    )


def measure_noise(
  run: Run, packed: prepare.PackedData, params: Any, num_examples: int
) -> dict[str, float]:
  """How much of the bound's uncertainty is noise, against the naive estimator.

  Scores `num_examples` rows NUM_REPEATS times with fresh noise, by the estimator
  of the evaluation and at independent times (its `naive` form), with eval.num_draws
  network calls per row each. The variance is over the noise, given the text, of
  a row's mean over its draws, so that stratification within a row counts.

  Returns:
    noise_ci95 and naive_noise_ci95: half widths, nats per token, that the noise
    alone would give the bound of the whole split; calls_ratio: how many times as
    many calls the naive estimator needs for the same interval; calls_ratio_ci95.
  """
  check_noisy(run, num_examples)
  settings = run.settings.eval
  rows = validation_rows(run, packed, num_examples)
  batch = {
    name: rows[name]
    for name in ('tokens', 'weight', 'segment_ids')
    if name in rows
  }
  variance = {}
  for name, form in (
    ('own', run.objective.evaluation()),
    ('naive', run.objective.naive()),
  ):
    score = make_score(
      run,
      num_draws=settings.num_draws,
      batch_size=settings.batch_size,
      objective=form,
    )
    key = jax.random.key(settings.seed)
    nll = [
      score(params, jax.random.fold_in(key, repeat), batch)['nll']
      for repeat in range(NUM_REPEATS)
    ]
    variance[name] = np.var(np.asarray(nll, np.float64), axis=0, ddof=1)
  ratio, half_width = metrics.ratio_interval(variance['naive'], variance['own'])
  # Of sum(nll) / sum(weight) over the split, were all its rows like these.
  num_tokens = float(steps.num_tokens(rows).mean())
  scale = 1.96 / (len(packed.validation) ** 0.5 * num_tokens)
  return {
    'noise_ci95': float(scale * variance['own'].mean() ** 0.5),
    'naive_noise_ci95': float(scale * variance['naive'].mean() ** 0.5),
    'calls_ratio': ratio,
    'calls_ratio_ci95': half_width,
  }


def describe_noise(noise: dict[str, float]) -> str:
  """One line for people, of `measure_noise`."""
  return (
    f'of the interval ± {noise["noise_ci95"]:.4f} nats/token is noise; at '
    f'independent times it would be ± {noise["naive_noise_ci95"]:.4f}, so '
    f'{noise["calls_ratio"]:.1f} ± {noise["calls_ratio_ci95"]:.1f} times as '
    'many network calls for the same'
  )


def describe(means: dict[str, float], exact: bool) -> str:
  """One line for people: the value, its interval, its units."""
  kind = 'exact value' if exact else 'bound'
  value = {key.partition('/')[2]: mean for key, mean in means.items()}
  subset = ' of a subset' if 'eval_subset/nll' in means else ''

  def interval(key):  # one example has none
    width = value[f'{key}_ci95']
    return f'{value[key]:.4f}' + (
      '' if math.isnan(width) else f' ± {width:.4f}'
    )

  return (
    f'held-out {kind}{subset}: {interval("nll")} nats/token, perplexity '
    f'{value["ppl"]:.2f}, {interval("bits_per_byte")} bits/byte (95% '
    f'interval, {value["num_examples"]:.0f} examples)'
  )


def own_tokenizer(
  settings: configs.Settings, workdir: str
) -> configs.TokenizerConfig:
  """Of a workdir with a tokenizer: where that came from a file, the copy here."""
  wanted = settings.tokenizer
  if not wanted.path:
    return wanted
  # The file, of another run perhaps, may be gone.
  path = (
    workdir
    if wanted.name == tokenizers.RUN
    else str(pathlib.Path(workdir) / tokenizers.SAVED_MODEL)
  )
  return configs.TokenizerConfig(wanted.name, path, 0)


def open_data(
  settings: configs.Settings,
  workdir: str,
  tokenizer: tokenizers.Tokenizer,
  trained_on: str,
) -> prepare.PackedData:
  """The text of settings.data.source as ids of the run's own tokenizer.

  Args:
    settings: the run's, perhaps with another data source.
    workdir: of the run.
    tokenizer: its tokenizer.
    trained_on: the run's own data.source.

  Raises:
    InputError: the text has changed since, so that other ids would be made.
  """
  wanted = own_tokenizer(settings, workdir)
  if settings.data.source != trained_on:
    log.info(
      'evaluating on %s, not the text it was trained on: its own split '
      'into training and validation is used',
      settings.data.source,
    )
    if wanted.name == 'sentencepiece':
      # The run's tokenizer, not a new one for this text.
      wanted = configs.TokenizerConfig(
        wanted.name, str(pathlib.Path(workdir) / tokenizers.SAVED_MODEL), 0
      )
  packed = prepare.prepare(settings.data, wanted)
  if packed.tokenizer.fingerprint != tokenizer.fingerprint:
    raise InputError(
      f'data.source={settings.data.source!r} has changed since the run in '
      f'{workdir!r} was trained: its tokenizer makes other ids now'
    )
  return packed


@dataclasses.dataclass(frozen=True)
class Subject:
  """What --mode=eval looks at: a run's averaged parameters and held-out text.

  Attributes:
    workdir: of the run.
    run: the run, perhaps with another data source or sampler.
    packed: the text.
    params: the parameters.
    step: of the checkpoint that they come from.
  """

  workdir: str
  run: Run
  packed: prepare.PackedData
  params: Any
  step: int

  def append(self, result: dict[str, Any]):
    """Appends a line to workdir/eval.jsonl."""
    if jax.process_index() == 0:
      line = {
        'step': self.step,
        'source': self.run.settings.data.source,
        **result,
      }
      with open(pathlib.Path(self.workdir) / EVAL_FILE, 'a') as file:
        file.write(json.dumps(line) + '\n')


def open_subject(
  config: config_dict.ConfigDict,
  settings: configs.Settings,
  workdir: str,
  trained_on: str,
) -> Subject:
  """Opens the last checkpoint of a workdir, and the text.

  Args:
    config: the run's, perhaps with another data source or sampler.
    settings: its checked sections.
    workdir: of the run.
    trained_on: the run's own data.source.
  """
  run = make_run(config, settings, tokenizers.load(workdir))
  packed = open_data(settings, workdir, run.tokenizer, trained_on)
  return Subject(workdir, run, packed, *load_params(run, workdir))


def evaluate_subject(
  subject: Subject, noise_examples: int = 0
) -> dict[str, float]:
  """--mode=eval: the whole validation split with the averaged weights.

  Prints the result and appends it to workdir/eval.jsonl.

  Args:
    subject: the run and its text.
    noise_examples: rows for `measure_noise`; 0 leaves it out.
  """
  run, packed, params = subject.run, subject.packed, subject.params
  if noise_examples:
    check_noisy(run, noise_examples)
  means = make_evaluate(run, packed)(params)
  log.info('step %d, %s', subject.step, describe(means, run.objective.exact))
  if noise_examples:
    noise = measure_noise(run, packed, params, noise_examples)
    log.info('%s', describe_noise(noise))
    num_rows = min(noise_examples, len(packed.validation))
    if num_rows < FEW_NOISE_ROWS:
      log.warning(
        'the noise was measured on %d row%s only, so its figures are rough '
        'and their interval may be too narrow; --noise_examples=%d or more '
        'says more',
        num_rows,
        '' if num_rows == 1 else 's',
        2 * FEW_NOISE_ROWS,
      )
    means |= {f'eval/{key}': value for key, value in noise.items()}
  subject.append(metrics.finite_or_none(means))
  return means
