"""Infilling accuracy: the run's sampler fills gaps in held-out text."""

from collections.abc import Sequence
import logging
from typing import Any

import jax
import numpy as np

from nanodlm import evaluate
from nanodlm import lm as lms
from nanodlm.lm import LanguageModel
from nanodlm.run import Run
from nanodlm.training import metrics
from nanodlm.types import Batch, InputError

log = logging.getLogger('nanodlm')

# 'uniform' masks single tokens anywhere in the row, 'span' one run of tokens.
PATTERNS = ('uniform', 'span')


def parse_ratios(texts: Sequence[str]) -> list[float]:
  """Parses --infill=0.1,0.3; InputError unless all are in (0, 1]."""
  try:
    ratios = [float(text) for text in texts]
  except ValueError:
    ratios = [0.0]
  if not all(0 < ratio <= 1 for ratio in ratios):
    raise InputError(
      f'--infill={",".join(texts)!r} must be numbers in (0, 1], such as '
      '0.1,0.3,0.5'
    )
  return ratios


def sample_gaps(
  generator: np.random.Generator,
  eligible: np.ndarray,
  ratio: float,
  pattern: str,
) -> np.ndarray:
  """Draws the tokens of each row to be filled in.

  `ratio` of the `eligible` tokens, [N, L] bool, of each row is chosen, rounded,
  but at least one token. A 'span' skips tokens that are not eligible.

  Returns:
    [N, L] bool.
  """
  gaps = np.zeros(eligible.shape, bool)
  for row in np.flatnonzero(eligible.any(axis=1)):
    places = np.flatnonzero(eligible[row])
    num = max(1, round(ratio * places.size))
    if pattern == 'span':
      start = generator.integers(places.size - num + 1)
      chosen = places[start : start + num]
    else:
      chosen = generator.permutation(places)[:num]
    gaps[row, chosen] = True
  return gaps


def check_run(run: Run):
  """Raises InputError if the run cannot fill gaps from both sides."""
  if not run.objective.sees_right(run.settings.data.length):
    raise InputError(
      '--infill needs a network that sees both sides of a gap; that of '
      f'objective.name={run.settings.objective["name"]!r} reads from left to '
      'right'
    )
  if run.settings.data.segment_ids:
    raise InputError(
      '--infill does not support data.segment_ids=True, because it does not '
      'know where documents end'
    )


def measure_infilling(
  lm: LanguageModel, rows: Batch, ratios: Sequence[float]
) -> list[dict[str, Any]]:
  """Measures the share of masked tokens that the sampler restores exactly.

  Only eligible tokens of `rows` are masked, the given `ratios` of each row's.

  Returns:
    For each pattern and ratio a dict: pattern; ratio; accuracy, of the masked
    tokens, and accuracy_ci95 (see `metrics.ratio_interval`); exact_match, the
    share of rows without an error; num_examples; num_tokens; num_calls.
  """
  check_run(lm.run)
  settings = lm.run.settings.eval
  fill = lms.make_fill(lm.run, settings.batch_size)
  tokens, eligible = rows.tokens, rows.eligible
  # The padding of a pair stays as it is.
  eligible = eligible & (np.cumsum(eligible, 1) <= rows.num_tokens[:, None])
  results = []
  for pattern in PATTERNS:
    for i, ratio in enumerate(ratios):
      seed = (settings.seed, PATTERNS.index(pattern), i)
      gaps = sample_gaps(np.random.default_rng(seed), eligible, ratio, pattern)
      canvas = np.where(gaps, lm.tokenizer.mask_id, tokens).astype(np.int32)
      key = jax.random.fold_in(jax.random.key(settings.seed), len(results))
      filled, num_calls = fill(lm.params, key, canvas, ~gaps)
      correct, masked = np.sum(gaps & (filled == tokens), 1), gaps.sum(1)
      accuracy, half_width = metrics.ratio_interval(
        correct, masked, lm.run.settings.data.has_documents
      )
      results.append(
        {
          'pattern': pattern,
          'ratio': ratio,
          'accuracy': accuracy,
          'accuracy_ci95': half_width,
          'exact_match': float(np.mean((correct == masked)[masked > 0])),
          'num_examples': int(np.sum(masked > 0)),
          'num_tokens': int(masked.sum()),
          'num_calls': num_calls,
        }
      )
  return results


def infill_text(
  lm: LanguageModel,
  text: evaluate.Text,
  ratios: Sequence[float],
  num_examples: int,
):
  """Runs --mode=eval --infill: logs a table, appends it to workdir/eval.jsonl.

  `num_examples` is the number of rows to use, 0 for all.
  """
  rows = evaluate.validation_rows(lm.run, text.packed, num_examples)
  log.info(
    'infilling %d of %d %srows (--infill_examples) at %d ratios%s',
    len(rows.tokens),
    len(text.packed.validation),
    'held-out ' * text.is_held_out,
    len(ratios),
    text.describe(),
  )
  results = measure_infilling(lm, rows, ratios)
  sampler = lm.run.describe_sampler()
  log.info('infilling with %(name)s, temperature %(temperature)g:', sampler)
  for row in results:
    log.info(
      '  %(ratio).0f%% masked, %(pattern)-7s  accuracy %(accuracy).4f ± '
      '%(accuracy_ci95).4f, rows without error %(exact_match).4f '
      '(%(num_tokens)d tokens of %(num_examples)d examples, %(num_calls).0f '
      'network calls)',
      row | {'ratio': 100 * row['ratio']},
    )
  evaluate.append_result(lm, text, {'sampler': sampler, 'infill': results})
