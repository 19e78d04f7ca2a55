"""Turns sums into the reported means: their names, units and intervals."""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

# Matrix products of one device in its 16-bit format, dense, in FLOP/s, from the
# makers' data sheets. Keys are prefixes of JAX's device_kind.
PEAK_FLOPS = {
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA A100': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the device's peak in FLOP/s, or None if it is unknown."""
  for prefix, value in PEAK_FLOPS.items():
    if device_kind.startswith(prefix):
      return value
  return None


def add(sums: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Adds dicts of arrays key by key, in float64."""
  return {
    key: np.sum([np.asarray(s[key], np.float64) for s in sums], axis=0)
    for key in sums[0]
  }


def finite_or_none(values: dict[str, Any]) -> dict[str, float | None]:
  """Converts scalars for JSON, with None for those that are not finite."""
  return {
    key: float(value) if math.isfinite(value) else None
    for key, value in values.items()
  }


def _ratio(total, count) -> float:
  return float(total / count) if count else math.nan


def level_means(sums: dict[str, np.ndarray], split: str) -> dict[str, float]:
  """Returns the cross entropy per scored token in ten bins of noise level.

  `split_by_level/cross_entropy_3` is the mean, in nats, over tokens with a
  noise level (see `types.Noised`) of 0.3 to 0.4. Empty bins are omitted.
  """
  return {
    f'{split}_by_level/cross_entropy_{i}': float(total / count)
    for i, (total, count) in enumerate(
      zip(sums['bin_cross_entropy'], sums['bin_scored'])
    )
    if count
  }


def train_means(sums: dict[str, np.ndarray]) -> dict[str, float]:
  """Returns the means of training steps from their added sums.

  They are train/loss in nats per token; train/nll and train/bits_per_byte of
  the noisy bound on the training text; train/accuracy of the scored tokens; and
  `level_means`.
  """
  return {
    'train/loss': _ratio(sums['loss'], sums['weight']),
    'train/nll': _ratio(sums['nll'], sums['weight']),
    'train/bits_per_byte': _ratio(sums['nll'] / math.log(2), sums['num_bytes']),
    'train/accuracy': _ratio(sums['correct'], sums['scored']),
    **level_means(sums, 'train'),
  }


def _half_width(sums: dict[str, np.ndarray], per: str) -> float:
  """Returns 1.96 standard errors of sum(nll) / sum(per) over examples."""
  num = sums['num_examples']
  if num < 2:
    return math.nan
  ratio = _ratio(sums['nll'], sums[per])
  # sum_i (nll_i - ratio * per_i)^2, the residuals of the ratio estimator.
  residual = (
    sums['nll2']
    - 2 * ratio * sums[f'nll_{per}']
    + ratio * ratio * sums[f'{per}2']
  )
  spread = math.sqrt(max(residual, 0.0) * num / (num - 1))
  return float(1.96 * spread / sums[per])


def _mean_interval(total: Any, squares: Any, num: Any) -> tuple[float, float]:
  """Returns the mean of values, and 1.96 standard errors, from their sums."""
  sums = {'nll': total, 'nll2': squares, 'nll_one': total}
  sums |= {'one': num, 'one2': num, 'num_examples': num}
  return _ratio(total, num), _half_width(sums, 'one')


def share_interval(num: int, total: int) -> tuple[float, float]:
  """Returns the ends of the 95% interval of a share, num of total > 0.

  Source: Wilson, 1927, Probable inference, the law of succession, and
  statistical inference.
  """
  share, z2 = num / total, 1.96**2 / total
  center = (share + z2 / 2) / (1 + z2)
  half_width = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
  return max(center - half_width, 0.0), min(center + half_width, 1.0)


def ratio_interval(total: np.ndarray, count: np.ndarray) -> tuple[float, float]:
  """Returns sum(total) / sum(count) and the half width of its 95% interval.

  Args:
    total: [N], per row: correct tokens, or nats.
    count: [N], per row: tokens, or bytes; rows with count 0 are omitted.

  Returns:
    The ratio and 1.96 standard errors, from the spread between rows; the latter
    is NaN for fewer than two rows.
  """
  total, count = (
    np.asarray(x, np.float64)[np.asarray(count) > 0] for x in (total, count)
  )
  sums = {
    'nll': total.sum(),
    'nll2': (total * total).sum(),
    'nll_count': (total * count).sum(),
    'count': count.sum(),
    'count2': (count * count).sum(),
    'num_examples': len(count),
  }
  return _ratio(sums['nll'], sums['count']), _half_width(sums, 'count')


# The values of n in distinct_n.
DISTINCT_N = (1, 2, 3)


def text_statistics(tokens: np.ndarray) -> dict[str, float]:
  """Measures the variety of texts, which a low perplexity alone does not show.

  Args:
    tokens: [N, L] int ids of N texts.

  Returns:
    unigram_entropy of the histogram of all tokens, and sample_entropy, the mean
    over texts of the entropy of each one's own histogram, in nats per token
    (reported with generative perplexity since Zheng et al., arXiv 2409.02908);
    distinct_1, distinct_2, distinct_3: distinct n-grams among all n-grams, in
    [0, 1] (Li et al., arXiv 1510.03055).
  """
  tokens = np.asarray(tokens)

  def distinct(n):
    if tokens.shape[1] < n:
      return math.nan
    ngrams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
    ngrams = ngrams.reshape(-1, n)
    return len(np.unique(ngrams, axis=0)) / len(ngrams)

  return {
    'unigram_entropy': _entropy(tokens),
    'sample_entropy': float(np.mean([_entropy(row) for row in tokens])),
    **{f'distinct_{n}': distinct(n) for n in DISTINCT_N},
  }


def _entropy(tokens: np.ndarray) -> float:
  """Returns the entropy of the histogram of the ids, in nats."""
  counts = np.unique(tokens, return_counts=True)[1]
  share = counts / counts.sum()
  return float(-np.sum(share * np.log(share)))


def eval_means(
  sums: dict[str, np.ndarray], split: str = 'eval', has_documents: bool = False
) -> dict[str, float]:
  """Returns the held-out bound (or exact value) and its interval.

  Intervals are 1.96 standard errors of a ratio of sums over examples, each the
  mean of its noise draws: they contain the spread of the text and of the noise.

  Args:
    sums: from `steps.make_eval_step`.
    split: the metrics' prefix.
    has_documents: whether an example is a whole document.

  Returns:
    nll and nll_ci95 (half width) in nats per token; ppl; bits_per_token;
    bits_per_byte and bits_per_byte_ci95; accuracy and `level_means` of all
    scored tokens, padding included if it is scored; num_examples. With
    has_documents, nats_per_document and nats_per_document_ci95, too. If the
    sums hold the nats of a law: law_nats, its cross entropy in nats per
    document; excess_nats and excess_nats_ci95, by how much the bound exceeds
    it, from the difference of each document.
  """
  nll = _ratio(sums['nll'], sums['weight'])
  means = {
    'nll': nll,
    'nll_ci95': _half_width(sums, 'weight'),
    'ppl': math.exp(min(nll, 700.0)),
    'bits_per_token': nll / math.log(2),
    'bits_per_byte': _ratio(sums['nll'], sums['num_bytes']) / math.log(2),
    'bits_per_byte_ci95': _half_width(sums, 'num_bytes') / math.log(2),
    'accuracy': _ratio(sums['correct'], sums['scored']),
    'num_examples': float(sums['num_examples']),
  }
  if has_documents:
    mean, half_width = _mean_interval(
      sums['nll'], sums['nll2'], sums['num_examples']
    )
    means['nats_per_document'] = mean
    means['nats_per_document_ci95'] = half_width
  if num := sums.get('num_with_law', 0):
    mean, half_width = _mean_interval(sums['excess'], sums['excess2'], num)
    means['law_nats'] = _ratio(sums['law_nats'], num)
    means['excess_nats'] = mean
    means['excess_nats_ci95'] = half_width
  return {
    **{f'{split}/{key}': value for key, value in means.items()},
    **level_means(sums, split),
  }


def format_table(
  columns: Sequence[tuple[Any, ...]], rows: Sequence[dict[str, Any]]
) -> list[str]:
  """Formats rows as the lines of a table with aligned columns.

  Args:
    columns: title, key, format and, if there is one, the unit that values are
      divided by.
    rows: values by key, with half widths of intervals as KEY_ci95; '-' is shown
      for a value that is absent or None.
  """

  def cell(row, key, form, unit=1):
    value = row.get(key)
    if value is None:
      return '-'
    width = f' ± {row[f"{key}_ci95"]:.4f}' if f'{key}_ci95' in row else ''
    return format(value / unit if unit != 1 else value, form) + width

  cells = [[column[0] for column in columns]]
  cells += [[cell(row, *column[1:]) for column in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return [
    '  '.join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
    for first, *rest in cells
  ]
