"""Evaluation of the bound on held-out text, after or during training."""

from collections.abc import Callable, Mapping
import dataclasses
import logging
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import laws
from nanodlm import lm as lms
from nanodlm import workdir as workdirs
from nanodlm.config import Settings
from nanodlm.data import (
  guesses,
  overlap,
  pipeline,
  prepare,
  sources,
  tokenizers,
)
from nanodlm.data.config import TokenizerConfig
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.data.tokenizers.saved import load_tokenizer
from nanodlm.devices import mesh as meshes
from nanodlm.lm import LanguageModel
from nanodlm.run import Run
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps.network import check_batch_size
from nanodlm.training import checkpoint, metrics, progress
from nanodlm.types import Batch, InputError

log = logging.getLogger('nanodlm')

# Number of independent evaluations that estimate the variance of one.
NUM_REPEATS = 8
# With fewer rows, the interval of a ratio of variances is unreliable.
FEW_NOISE_ROWS = 32


def make_evaluate(
  run: Run, packed: prepare.PackedData, source: str = ''
) -> Callable[..., dict[str, float] | None]:
  """Builds evaluate(params, max_examples=0, should_stop=never) -> means.

  The means are those of `metrics.eval_means` over the validation rows of
  `packed`, or None if `should_stop()` returned True in between. If each row is
  a document whose law is known, the bound is compared to the law: it includes
  the end of the text and, with data.padding='eos', all separators after it,
  which follow from the text with certainty.

  Args:
    run: the run.
    packed: the text.
    source: where its validation rows come from; by default as the run's.
  """
  settings, data = run.settings.eval, run.settings.data
  source = source or data.eval_source or data.source
  held_out = _make_held_out(run, packed, source)
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
    results = []
    num = len(pipeline.eval_rows(packed, run.settings.data, max_examples))
    countdown = progress.Countdown('evaluating', -(-num // batch_size))
    for batch in batches:
      if should_stop():
        return None
      if held_out is not None:
        batch = batch._replace(law_nats=held_out.nats(batch))
      results.append(eval_step(params, meshes.shard_batch(run.mesh, batch)))
      if len(results) > 1:  # At most one step in flight, to stop promptly.
        jax.block_until_ready(results[-2])
      countdown.count()
    values, sums = zip(*jax.device_get(results), strict=True)
    split = 'eval_subset' if max_examples else 'eval'
    return metrics.eval_means(
      metrics.join(values),
      metrics.add(sums),
      split,
      packed.is_documents,
      run.settings.data.num_alternatives,
    )

  return evaluate


def _make_held_out(
  run: Run, packed: prepare.PackedData, source: str
) -> laws.HeldOut | None:
  """Returns what compares the rows of a source to its law, if it is known."""
  data = run.settings.data
  if (law := laws.law_of_rows(data, source)) is None:
    return None
  if data.padding == 'masked' and not run.objective.causal:
    log.info(
      "the bound is not compared to the law of the text: data.padding='masked' "
      'gives the network the length of each document'
    )
    return None
  counts = packed.metadata['validation']
  if num_dropped := counts['num_dropped_documents']:
    share = num_dropped / (num_dropped + counts['num_documents'])
    log.warning(
      f'data.length={packed.length}: {share:.1%} of the documents are longer '
      'and left out. The law includes them, so the excess of the bound over it '
      f'is about {-math.log1p(-share):.2f} nats/document too low'
    )
  return laws.HeldOut(law, run.tokenizer)


def validation_rows(
  run: Run, packed: prepare.PackedData, num_examples: int
) -> Batch:
  """Returns `num_examples` spread rows of the validation split (0: all)."""
  data = run.settings.data
  num = len(pipeline.eval_rows(packed, data, num_examples))
  batches = pipeline.make_eval_batches(
    packed, data, batch_size=num, max_examples=num
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


def describe(
  means: dict[str, float], exact: bool, text: 'Text | None' = None
) -> str:
  """Describes an evaluation in one line, with intervals and units."""
  kind = 'exact value' if exact else 'bound'
  if text is None or text.is_held_out:
    kind = f'held-out {kind}'
  value = {key.partition('/')[2]: mean for key, mean in means.items()}
  subset = ' of a subset' if 'eval_subset/nll' in means else ''
  num_blocks = value['num_blocks']
  is_one_each = num_blocks == value['num_examples']
  blocks = '' if is_one_each else f' in {num_blocks:.0f} blocks'

  def interval(key, spec='.4f'):
    width = value[f'{key}_ci95']
    # A single example does not have an interval.
    return f'{value[key]:{spec}}' + (
      '' if math.isnan(width) else f' ± {width:{spec}}'
    )

  excess = ''
  if 'excess_nats' in value:
    excess = (
      f'; {interval("excess_nats", ".2f")} nats/document above the truth '
      f'({value["law_nats"]:.1f})'
    )
  exact_ar = ''
  if 'ar_nll' in value:
    exact_ar = f'; ar, exact: {interval("ar_nll")} nats/token'
  return (
    f'{kind}{subset}: {interval("nll")} nats/token, perplexity '
    f'{value["ppl"]:.2f}, {interval("bits_per_byte")} bits/byte (95% '
    f'interval, {value["num_examples"]:.0f} examples{blocks})'
    + excess
    + exact_ar
    + (text.describe() if text else '')
  )


def own_tokenizer(
  settings: Settings, workdir: str
) -> TokenizerConfig | Tokenizer:
  """Returns a run's own tokenizer, or its settings if the text determines it.

  The files that it and its chat template came from may have changed.
  """
  wanted = settings.tokenizer
  if wanted.is_trained:
    return wanted
  if wanted.name == tokenizers.RUN:  # Prepared data has this name.
    return TokenizerConfig(wanted.name, workdir, 0)
  return load_tokenizer(workdir)


class Text(NamedTuple):
  """A text to evaluate on, and what is known of its use in training.

  Attributes:
    packed: the text, as validation rows.
    source: what names it, in the form of data.source.
    is_own_split: whether the run itself held it out.
    trained_share: share of the text that was trained on; None if unknown. Of
      the run's own split, it is what the two parts have in common.
    unknown: why more of it may have been trained on; '' if that is known.
  """

  packed: prepare.PackedData
  source: str
  is_own_split: bool = True
  trained_share: float | None = None
  unknown: str = ''

  @property
  def is_held_out(self) -> bool:
    """Whether it is known that the text was not trained on."""
    return not self.unknown and (self.is_own_split or self.trained_share == 0)

  def describe(self) -> str:
    """Describes the overlap with the training text; '' if there is none."""
    share, parts = self.trained_share, []
    if share is not None and (
      share >= overlap.MIN_SHOWN_SHARE or not self.is_own_split
    ):
      what = 'is also in the training text' * self.is_own_split
      parts.append(f'{share:.1%} of the text {what or "was trained on"}')
    if self.unknown:
      what = 'was trained on before' if self.is_own_split else 'was trained on'
      parts.append(f'it is unknown how much of the text {what}: {self.unknown}')
    return ''.join(f'; {part}' for part in parts)


def open_text(lm: LanguageModel) -> Text:
  """Opens the text of a model's settings, encoded with its tokenizer.

  If its source is neither that of training nor a part of its mixture, all of it
  is used, unless data.eval_fraction or data.eval_tokens is set by hand.

  Raises:
    InputError: the text has changed since training, and so has its tokenizer.
  """
  settings, data = lm.run.settings, lm.run.settings.data
  config = configs.make_settings(configs.read_run(lm.workdir))
  trained, fingerprint, is_own = config.data, _fingerprint(lm), False
  is_named = data.source != trained.source or 'data.source' in settings.given
  if is_named and data.eval_source == trained.eval_source:
    data = dataclasses.replace(data, eval_source='')
  source = data.eval_source or data.source
  if source != trained.source:
    log.info('evaluating on %s', source)
  mixture = [part for _, part in sources.parse_mixture(trained.source)]
  is_same = not (data.eval_source or trained.eval_source)
  if is_same and source in (trained.source, *mixture):
    data = dataclasses.replace(data, source=trained.source)
    keys = ['eval_fraction', 'eval_tokens', 'test_tokens']
    classes = map(sources.find_class, mixture)
    if any(cls.is_tokens for cls in classes):
      keys.append('length')  # Token ids are divided between two rows.
    is_split = all(getattr(data, key) == getattr(trained, key) for key in keys)
    # A tokenizer trained on another part of the text would be another one.
    wanted = own_tokenizer(config, lm.workdir) if is_split else lm.tokenizer
    packed = prepare.prepare(data, wanted)
    is_own = is_split and packed.fingerprint == fingerprint
    if source != trained.source:
      packed = prepare.prepare_parts(data, wanted)[source]
  elif settings.given & {'data.eval_fraction', 'data.eval_tokens'}:
    packed = prepare.prepare(data, lm.tokenizer)
  else:
    key = 'data.eval_source' if data.eval_source else 'data.source'
    data = dataclasses.replace(data, eval_source=source)
    packed = prepare.prepare_whole(data, lm.tokenizer, key=key)
  if packed.tokenizer.fingerprint != lm.tokenizer.fingerprint:
    raise InputError(
      f'data.source={source!r} has changed since the run in {lm.workdir!r} was '
      'trained, and its tokenizer now makes different ids'
    )
  if packed.tokenizer.chat_template != lm.tokenizer.chat_template:
    raise InputError(
      f'tokenizer.chat_template={config.tokenizer.chat_template!r} has changed '
      f'since the run in {lm.workdir!r} was trained'
    )
  laws.warn_of_other_law(trained.source, source)
  record = overlap.load(lm.workdir)
  is_older = not (record.hashes.size or config.checkpoint.init_from)
  if is_older and fingerprint is not None:
    # What is evaluated is prepared, too; an unrelated text should not be.
    engine = (
      None if source in (trained.source, *mixture) else prepare.Prepared()
    )
    record = _record_of(config, lm.workdir, fingerprint, engine) or record
  # Runs of older versions keep no record, but were trained on their own text.
  unknown = '' if is_own and is_older else record.unknown
  share = record.share(packed)
  if share is None and not (is_own or unknown):
    unknown = 'it is too short to compare'
  if config.checkpoint.init_from:
    # The run that it started from may have held out another part.
    is_own &= (share or 0.0) < overlap.MIN_SHOWN_SHARE
  return Text(packed, source, is_own, share, unknown)


def _record_of(
  settings: Settings, workdir: str, fingerprint: str, engine: Any
) -> overlap.Record | None:
  """Makes the record of a run from its training text, if that still exists."""
  wanted = own_tokenizer(settings, workdir)
  try:
    packed = prepare.prepare(settings.data, wanted, engine)
  except InputError:
    return None
  return (
    overlap.make_record(packed) if packed.fingerprint == fingerprint else None
  )


def _fingerprint(lm: LanguageModel) -> str | None:
  """Returns the training text's fingerprint; None if weights were imported."""
  return checkpoint.read_meta(lm.workdir, lm.step)['data'].get('fingerprint')


def shown_share(line: Mapping[str, Any]) -> str:
  """Returns how much of the text of a result was trained on, for a table."""
  share = line.get('trained_share')
  shown = f'{share:.1%}' if isinstance(share, int | float) else 'unknown'
  if not line.get('is_held_out'):
    return shown
  is_shared = (
    isinstance(share, int | float) and share >= overlap.MIN_SHOWN_SHARE
  )
  return 'held out' + f' ({shown} also in training)' * is_shared


def changes(lm: LanguageModel) -> dict[str, Any]:
  """Returns {key: value} of what was set by hand, and changes a measurement.

  Where the text comes from and the sampler are recorded on their own.
  """
  settings, saved = lm.run.settings, configs.read_run(lm.workdir)
  others = configs.FREE_KEYS - {'model.dtype'} | {'eval.batch_size'}
  others |= {'data.source', 'data.eval_source'}
  return {
    key: value
    for key, (_, value) in configs.differing_keys(
      saved.to_dict(), settings.to_dict()
    ).items()
    if key in settings.given - others
    and key.startswith(('data.', 'eval.', 'model.'))
  }


def shown_changes(line: Mapping[str, Any]) -> str:
  """Returns the changes of a line of eval.jsonl, as ' (data.length=64)'."""
  changed = line.get('changed')
  pairs = changed.items() if isinstance(changed, dict) else ()
  return f' ({", ".join(f"{k}={x}" for k, x in pairs)})' * bool(pairs)


def append_result(lm: LanguageModel, text: Text, result: dict[str, Any]):
  """Appends a result to eval.jsonl in the workdir."""
  if jax.process_index() == 0:
    line = {
      'step': lm.step,
      'source': text.source,
      'is_held_out': text.is_held_out,
      'trained_share': text.trained_share,
      'changed': changes(lm),
      **result,
    }
    workdirs.append(lm.workdir, workdirs.EVAL, line)


def evaluate_text(
  lm: LanguageModel, text: Text, noise_examples: int = 0
) -> dict[str, float]:
  """Evaluates on all rows of a text; logs and appends the result.

  `noise_examples` is the number of rows for `measure_noise`; 0 skips it.
  """
  noise = {}
  if noise_examples:
    noise = measure_noise(lm.run, text.packed, lm.params, noise_examples)
  evaluate = make_evaluate(lm.run, text.packed, text.source)
  means = evaluate(lm.params) or {}
  log.info(
    'step %d, %s', lm.step, describe(means, lm.run.objective.exact, text)
  )
  guessed = guesses.measure(text.packed, lm.run.settings.data)
  log.info(guesses.describe(guessed))
  means |= {f'eval/{key}': value for key, value in noise.items()}
  append_result(lm, text, metrics.finite_or_none(means))
  return means
