"""Evaluation of the bound on held-out text, after or during training."""

from collections.abc import Callable
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
      max_examples=max_examples,
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
  num_rows = len(packed.validation)
  num = min(num_examples or num_rows, num_rows)
  batches = pipeline.make_eval_batches(
    packed, run.settings.data, batch_size=num, max_examples=num
  )
  return next(iter(batches))


def measure_noise(
  run: Run, packed: prepare.PackedData, params: Any, num_examples: int
) -> dict[str, float]:
  """Measures the share of the bound's uncertainty that is due to noise.

  Scores `num_examples` rows NUM_REPEATS times with independent noise, in the
  evaluation form and the naive form of the objective. The variance is that of a
  row's mean over eval.num_draws draws, given the text.

  Returns:
    noise_ci95 and naive_noise_ci95: half widths, in nats per token, of the
    interval of the whole split due to noise alone; calls_ratio: calls that the
    naive form needs for the same interval, relative to the evaluation form;
    calls_ratio_ci95: its half width.

  Raises:
    InputError: the objective is exact.
  """
  if run.objective.exact:
    raise InputError(
      f'--noise_examples={num_examples!r} must be 0, since objective.name='
      f'{run.settings.objective["name"]!r} is exact, not noisy'
    )
  settings = run.settings.eval
  batch = validation_rows(run, packed, num_examples)
  key = jax.random.key(settings.seed)
  keys = [jax.random.fold_in(key, i) for i in range(NUM_REPEATS)]

  def variances(form):
    score = lms.make_score(
      run,
      num_draws=settings.num_draws,
      batch_size=settings.batch_size,
      objective=form,
    )
    nll = [score(params, jax.random.clone(key), batch)['nll'] for key in keys]
    return np.var(np.asarray(nll, np.float64), axis=0, ddof=1)

  own, naive = map(
    variances, (run.objective.evaluation(), run.objective.naive())
  )
  ratio, half_width = metrics.ratio_interval(naive, own)
  # Extrapolates to sum(nll) / sum(num_tokens) over the whole split.
  num_tokens = float(np.mean(batch.num_tokens, dtype=np.float32))
  scale = 1.96 / (len(packed.validation) ** 0.5 * num_tokens)
  noise = {
    'noise_ci95': float(scale * own.mean() ** 0.5),
    'naive_noise_ci95': float(scale * naive.mean() ** 0.5),
    'calls_ratio': ratio,
    'calls_ratio_ci95': half_width,
  }
  log.info(
    'noise alone gives an interval of ± %(noise_ci95).4f nats/token; '
    'independent times would give ± %(naive_noise_ci95).4f and need '
    '%(calls_ratio).1f ± %(calls_ratio_ci95).1f times the network calls for '
    'the same interval',
    noise,
  )
  if len(own) < FEW_NOISE_ROWS:
    log.warning(
      'the noise was measured on only %d row(s), so the estimates are rough '
      'and their interval may be too narrow; use --noise_examples=%d or more',
      len(own),
      2 * FEW_NOISE_ROWS,
    )
  return noise


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


def open_data(lm: LanguageModel) -> prepare.PackedData:
  """Returns the text of a model's settings, encoded with its tokenizer.

  Its data.source may differ from that of training.

  Raises:
    InputError: the text has changed since training, and so has its tokenizer.
  """
  settings = lm.run.settings
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


def append_result(lm: LanguageModel, result: dict[str, Any]):
  """Appends a result to eval.jsonl in the workdir."""
  if jax.process_index() == 0:
    source = lm.run.settings.data.source
    line = {'step': lm.step, 'source': source, **result}
    workdirs.append(lm.workdir, workdirs.EVAL, line)


def evaluate_text(
  lm: LanguageModel, packed: prepare.PackedData, noise_examples: int = 0
) -> dict[str, float]:
  """Evaluates on the whole validation split; logs and appends the result.

  `noise_examples` is the number of rows for `measure_noise`; 0 skips it.
  """
  noise = {}
  if noise_examples:
    noise = measure_noise(lm.run, packed, lm.params, noise_examples)
  means = make_evaluate(lm.run, packed)(lm.params) or {}
  text = describe(means, lm.run.objective.exact)
  log.info('step %d, %s', lm.step, text)
  means |= {f'eval/{key}': value for key, value in noise.items()}
  append_result(lm, metrics.finite_or_none(means))
  return means
