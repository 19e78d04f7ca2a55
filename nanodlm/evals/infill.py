"""Infilling accuracy: held-out text with gaps, filled in by the run's sampler."""

import logging
from typing import Any, Sequence

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, sample, types
from nanodlm.training import metrics
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

# 'uniform': single tokens anywhere in the row; 'span': one gap of neighbours.
PATTERNS = ('uniform', 'span')


def parse_ratios(texts: Sequence[str]) -> list[float]:
  """The numbers of --infill=0.1,0.3; InputError unless all are in (0, 1]."""
  try:
    ratios = [float(text) for text in texts]
  except ValueError:
    ratios = [0.0]
  if not all(0 < ratio <= 1 for ratio in ratios):
    raise InputError(
      f'--infill={",".join(texts)!r} must be numbers in (0, 1], as 0.1,0.3,0.5'
    )
  return ratios


def sample_gaps(
  generator: np.random.Generator,
  eligible: np.ndarray,
  ratio: float,
  pattern: str,
) -> np.ndarray:
  """Which tokens of each row are to be guessed.

  Args:
    generator: of the places.
    eligible: [N, L] bool, the tokens that may be.
    ratio: share of a row's eligible tokens, in (0, 1], rounded; at least one.
    pattern: one of PATTERNS; the neighbours of 'span' are neighbours among the
      eligible tokens.

  Returns:
    [N, L] bool.
  """
  gaps = np.zeros(eligible.shape, bool)
  for row, places in enumerate(eligible):
    places = np.flatnonzero(places)
    if not places.size:
      continue
    num = max(1, round(ratio * places.size))
    if pattern == 'span':
      start = generator.integers(places.size - num + 1)
      chosen = places[start : start + num]
    else:
      chosen = generator.permutation(places)[:num]
    gaps[row, chosen] = True
  return gaps


def check_run(run: evaluate.Run):
  """Raises InputError where gaps cannot be filled from both sides."""
  if not types.sees_right(run.objective, run.settings.data.length):
    raise InputError(
      '--infill needs a network that sees both sides of a gap; objective.name='
      f'{run.config.objective.name!r} reads from left to right only'
    )
  if run.settings.data.segment_ids:
    raise InputError(
      '--infill does not know where documents end, which data.segment_ids=True '
      'tells the network'
    )


def measure_infilling(
  run: evaluate.Run,
  params: Any,
  rows: dict[str, np.ndarray],
  ratios: Sequence[float],
) -> list[dict[str, Any]]:
  """The share of masked tokens that the sampler restores exactly.

  Args:
    run: the network, and the sampler in its config.
    params: its parameters.
    rows: tokens and weight [N, L] of held-out text.
    ratios: shares of each row's tokens that are masked.

  Returns:
    For each pattern and ratio a dict: pattern, ratio; accuracy and
    accuracy_ci95, of the masked tokens, with the spread between rows; exact_match,
    the share of rows without a mistake; num_examples, num_tokens, num_calls.
  """
  check_run(run)
  settings = run.settings.eval
  fill = sample.make_fill(run, settings.batch_size)
  tokens, eligible = rows['tokens'], rows['weight'] > 0
  if 'num_tokens' in rows:  # the padding of a pair stays as it is
    eligible &= np.cumsum(eligible, 1) <= rows['num_tokens'][:, None]
  results = []
  for pattern in PATTERNS:
    for i, ratio in enumerate(ratios):
      seed = (settings.seed, PATTERNS.index(pattern), i)
      gaps = sample_gaps(np.random.default_rng(seed), eligible, ratio, pattern)
      canvas = np.where(gaps, run.tokenizer.mask_id, tokens).astype(np.int32)
      key = jax.random.fold_in(jax.random.key(settings.seed), len(results))
      filled, num_calls = fill(params, key, canvas, ~gaps)
      correct, masked = np.sum(gaps & (filled == tokens), 1), gaps.sum(1)
      accuracy, half_width = metrics.ratio_interval(correct, masked)
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


def infill_subject(
  subject: evaluate.Subject, ratios: Sequence[float], num_examples: int
):
  """--mode=eval --infill: prints a table and appends it to workdir/eval.jsonl.

  Args:
    subject: the run, its text and its sampler.
    ratios: see `measure_infilling`.
    num_examples: held-out rows used; 0 is all.
  """
  run = subject.run
  rows = evaluate.validation_rows(run, subject.packed, num_examples)
  log.info(
    'infilling %d of %d held-out rows (--infill_examples) at %d ratios',
    len(rows['tokens']),
    len(subject.packed.validation),
    len(ratios),
  )
  results = measure_infilling(run, subject.params, rows, ratios)
  sampler = {
    **run.config.sampler.to_dict(),
    'name': configs.sampler_name(run.config),
  }
  log.info(
    'infilling with %s, temperature %g:',
    sampler['name'],
    sampler['temperature'],
  )
  for row in results:
    log.info(
      '  %3.0f%% masked, %-7s  accuracy %.4f ± %.4f, all right %.4f  (%d '
      'tokens of %d examples, %.0f network calls)',
      100 * row['ratio'],
      row['pattern'],
      row['accuracy'],
      row['accuracy_ci95'],
      row['exact_match'],
      row['num_tokens'],
      row['num_examples'],
      row['num_calls'],
    )
  subject.append({'sampler': sampler, 'infill': results})
