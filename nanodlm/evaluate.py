"""Evaluation of the bound on held-out text, after or during training."""

from collections.abc import Callable
import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm import workdir as workdirs
from nanodlm.config import Settings
from nanodlm.data import pipeline, prepare, tokenizers
from nanodlm.data.config import TokenizerConfig
from nanodlm.devices import mesh as meshes
from nanodlm.lm import LanguageModel
from nanodlm.run import Run
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps.network import check_batch_size
from nanodlm.training import metrics
from nanodlm.types import Batch, InputError

log = logging.getLogger('nanodlm')

# Number of independent evaluations that estimate the variance of one.
NUM_REPEATS = 8
# With fewer rows, the interval of a ratio of variances is unreliable.
FEW_NOISE_ROWS = 32


def make_evaluate(
  run: Run, packed: prepare.PackedData
) -> Callable[..., dict[str, float] | None]:
  """Builds evaluate(params, max_examples=0, should_stop=never) -> means.

  The means are those of `metrics.eval_means` over the validation rows of
  `packed`, or None if `should_stop()` returned True in between.
  """
  settings = run.settings.eval
  batch_size = settings.batch_size
  check_batch_size(batch_size, run.mesh, key='eval.batch_size')
  eval_step = evaluate_steps.make_eval_step(
    run.scorer, run.mesh, num_draws=settings.num_draws, seed=settings.seed
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
    for batch in batches:
      if should_stop():
        return None
      sums.append(eval_step(params, meshes.shard_batch(run.mesh, batch)))
      if len(sums) > 1:  # At most one step in flight, to stop promptly.
        jax.block_until_ready(sums[-2])
    split = 'eval_subset' if max_examples else 'eval'
    return metrics.eval_means(metrics.add(jax.device_get(sums)), split)

  return evaluate


def validation_rows(
  run: Run, packed: prepare.PackedData, num_examples: int
) -> Batch:
  """Returns the first `num_examples` rows of the validation split (0: all)."""
  num = min(num_examples or len(packed.validation), len(packed.validation))
  batches = pipeline.make_eval_batches(
    packed, run.settings.data, batch_size=num, max_examples=num
  )
  return next(iter(batches))


def check_noisy(run: Run, num_examples: int):
  """Raises InputError if the objective is exact."""
  if run.objective.exact:
    raise InputError(
      f'--noise_examples={num_examples!r} must be 0, since objective.name='
      f'{run.settings.objective["name"]!r} is exact, not noisy'
    )


def measure_noise(
  run: Run, packed: prepare.PackedData, params: Any, num_examples: int
) -> dict[str, float]:
  """Measures the share of the bound's uncertainty that is due to noise.

  Scores `num_examples` rows NUM_REPEATS times with independent noise, in the
  evaluation form and the naive form of the objective, with eval.num_draws
  network calls per row. The variance is that of a row's mean over draws, given
  the text, and thus reflects stratification within the row.

  Returns:
    noise_ci95 and naive_noise_ci95: half widths, in nats per token, of the
    interval of the whole split due to noise alone; calls_ratio: calls that the
    naive form needs for the same interval, relative to the evaluation form;
    calls_ratio_ci95: its half width.
  """
  check_noisy(run, num_examples)
  settings = run.settings.eval
  batch = validation_rows(run, packed, num_examples)
  variance = {}
  for name, form in (
    ('own', run.objective.evaluation()),
    ('naive', run.objective.naive()),
  ):
    score = lms.make_score(
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
  # Extrapolates to sum(nll) / sum(num_tokens) over the whole split.
  num_tokens = float(np.mean(batch.num_tokens, dtype=np.float32))
  scale = 1.96 / (len(packed.validation) ** 0.5 * num_tokens)
  return {
    'noise_ci95': float(scale * variance['own'].mean() ** 0.5),
    'naive_noise_ci95': float(scale * variance['naive'].mean() ** 0.5),
    'calls_ratio': ratio,
    'calls_ratio_ci95': half_width,
  }


def describe_noise(noise: dict[str, float]) -> str:
  """Describes the result of `measure_noise` in one line."""
  return (
    f'noise alone gives an interval of ± {noise["noise_ci95"]:.4f} nats/token; '
    f'independent times would give ± {noise["naive_noise_ci95"]:.4f} and need '
    f'{noise["calls_ratio"]:.1f} ± {noise["calls_ratio_ci95"]:.1f} times the '
    'network calls for the same interval'
  )


def describe(means: dict[str, float], exact: bool) -> str:
  """Describes an evaluation in one line, with intervals and units."""
  kind = 'exact value' if exact else 'bound'
  value = {key.partition('/')[2]: mean for key, mean in means.items()}
  subset = ' of a subset' if 'eval_subset/nll' in means else ''

  def interval(key):
    width = value[f'{key}_ci95']
    # A single example does not have an interval.
    return f'{value[key]:.4f}' + (
      '' if math.isnan(width) else f' ± {width:.4f}'
    )

  return (
    f'held-out {kind}{subset}: {interval("nll")} nats/token, perplexity '
    f'{value["ppl"]:.2f}, {interval("bits_per_byte")} bits/byte (95% '
    f'interval, {value["num_examples"]:.0f} examples)'
  )


def own_tokenizer(settings: Settings, workdir: str) -> TokenizerConfig:
  """Returns the tokenizer's settings, with the run's copy of its file."""
  wanted = settings.tokenizer
  if not wanted.path:
    return wanted
  # The original file, possibly of another run, may have been removed.
  is_run = wanted.name == tokenizers.RUN
  path = workdir if is_run else f'{workdir}/{workdirs.TOKENIZER_MODEL}'
  return TokenizerConfig(wanted.name, path, 0)


def open_data(settings: Settings, lm: LanguageModel) -> prepare.PackedData:
  """Returns settings.data.source, encoded with the model's tokenizer.

  Args:
    settings: settings whose data source may differ from that of training.
    lm: the model.

  Raises:
    InputError: the text has changed since training, and so has its tokenizer.
  """
  wanted = own_tokenizer(settings, lm.workdir)
  trained_on: Any = configs.read_run(lm.workdir).data
  if settings.data.source != trained_on.source:
    log.info(
      'evaluating on the validation split of %s, not of the training text',
      settings.data.source,
    )
    if wanted.name == 'sentencepiece':
      # Without a path, a new tokenizer would be trained on this text.
      path = f'{lm.workdir}/{workdirs.TOKENIZER_MODEL}'
      wanted = TokenizerConfig(wanted.name, path, 0)
  packed = prepare.prepare(settings.data, wanted)
  if packed.tokenizer.fingerprint != lm.tokenizer.fingerprint:
    raise InputError(
      f'data.source={settings.data.source!r} has changed since the run in '
      f'{lm.workdir!r} was trained, and its tokenizer now gives other ids'
    )
  return packed


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model and the held-out text that it is evaluated on.

  Attributes:
    lm: the model, possibly with another data source or sampler than its run.
    packed: the text.
  """

  lm: LanguageModel
  packed: prepare.PackedData

  def append(self, result: dict[str, Any]):
    """Appends a result to eval.jsonl in the workdir."""
    if jax.process_index() == 0:
      source = self.lm.run.settings.data.source
      line = {'step': self.lm.step, 'source': source, **result}
      workdirs.append(self.lm.workdir, workdirs.EVAL, line)


def open_subject(settings: Settings, workdir: str) -> Subject:
  """Loads the last checkpoint of a workdir and the text of the settings."""
  lm = lms.load(workdir, settings=settings)
  return Subject(lm, open_data(settings, lm))


def evaluate_subject(
  subject: Subject, noise_examples: int = 0
) -> dict[str, float]:
  """Evaluates on the whole validation split; logs and appends the result.

  `noise_examples` is the number of rows for `measure_noise`; 0 skips it.
  """
  run, packed, params = subject.lm.run, subject.packed, subject.lm.params
  if noise_examples:
    check_noisy(run, noise_examples)
  means = make_evaluate(run, packed)(params)
  assert means is not None
  text = describe(means, run.objective.exact)
  log.info('step %d, %s', subject.lm.step, text)
  if noise_examples:
    noise = measure_noise(run, packed, params, noise_examples)
    log.info('%s', describe_noise(noise))
    num_rows = min(noise_examples, len(packed.validation))
    if num_rows < FEW_NOISE_ROWS:
      log.warning(
        'the noise was measured on only %d row%s, so the estimates are rough '
        'and their interval may be too narrow; use --noise_examples=%d or more',
        num_rows,
        '' if num_rows == 1 else 's',
        2 * FEW_NOISE_ROWS,
      )
    means |= {f'eval/{key}': value for key, value in noise.items()}
  subject.append(metrics.finite_or_none(means))
  return means
