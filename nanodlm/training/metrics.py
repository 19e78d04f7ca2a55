"""The reported metrics: means of sums, intervals, tables, and their lines."""

from collections.abc import Iterable, Sequence
import math
from typing import Any, TypeGuard

import numpy as np
from scipy import special

# Number of blocks for the interval of rows that are not independent.
NUM_BLOCKS = 30
# Matrix products of one device in its 16-bit format, dense, in FLOP/s, from the
# makers' data sheets. Keys are prefixes of JAX's device_kind. The first match
# counts.
PEAK_FLOPS = {
  'NVIDIA H100 NVL': 835e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200 NVL': 835e12,
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


def join(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Concatenates dicts of arrays [B], key by key, in float64."""
  return {
    key: np.concatenate([np.asarray(row[key], np.float64) for row in rows])
    for key in rows[0]
  }


def finite_or_none(values: dict[str, Any]) -> dict[str, float | None]:
  """Converts scalars for JSON, with None for those that are not finite."""
  return {
    key: float(value) if math.isfinite(value) else None
    for key, value in values.items()
  }


def is_number(value: Any) -> TypeGuard[float]:
  """Returns whether a value is a finite number."""
  return type(value) in (int, float) and math.isfinite(value)


def join_steps(lines: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
  """Merges the lines of each step; later values replace earlier ones.

  When the step decreases, the run was restarted from a checkpoint: the lines
  after that step belong to the earlier attempt and are dropped.
  """
  steps = {}
  for line in lines:
    if type(step := line.get('step')) is int:
      while steps and next(reversed(steps)) > step:
        steps.popitem()
      steps[step] = steps.get(step, {}) | line
  return [
    {key: value for key, value in line.items() if is_number(value)}
    for line in steps.values()
  ]


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
  the noisy bound on the training text, unless a step has none (`types.Terms`,
  `Objective.trains_bound`);
  train/ar_nll, which is exact, of a block model that has it; train/accuracy of
  the scored tokens; `Scores.reports`; and `level_means`.
  """
  own = {
    key: sums[key]
    for key in ('loss', 'nll', 'ar_nll')
    if key == 'loss' or not math.isnan(sums.get(key, math.nan))
  }
  bits = {
    'train/bits_per_byte': _ratio(sums['nll'] / math.log(2), sums['num_bytes'])
  }
  if math.isnan(bits['train/bits_per_byte']):
    del bits['train/bits_per_byte']
  reports = {
    key.replace('report', 'train'): _ratio(x, sums['num_rows'])
    for key, x in sums.items()
    if key.startswith('report/')
  }
  return {
    **{f'train/{key}': _ratio(x, sums['weight']) for key, x in own.items()},
    **reports,
    **bits,
    'train/accuracy': _ratio(sums['correct'], sums['scored']),
    **level_means(sums, 'train'),
  }


def num_blocks(num_rows: int, independent: bool) -> int:
  """Returns how many blocks of rows an interval is formed from.

  Neighbouring rows of packed text are often of one document, or of one stretch
  of it, and their errors are alike. At most NUM_BLOCKS blocks are long enough
  to be nearly independent. With `independent`, every row is a block.
  """
  return num_rows if independent else min(num_rows, NUM_BLOCKS)


def share_interval(num: int, total: int) -> tuple[float, float]:
  """Returns the ends of the 95% interval of a share, num of total > 0.

  Source: Wilson, 1927, Probable inference, the law of succession, and
  statistical inference.
  """
  share, z2 = num / total, 1.96**2 / total
  center = (share + z2 / 2) / (1 + z2)
  half_width = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
  return max(center - half_width, 0.0), min(center + half_width, 1.0)


def sum_groups(x: Any, num_together: int) -> np.ndarray:
  """Adds each `num_together` consecutive entries of x [N]."""
  x = np.asarray(x)
  return np.add.reduceat(x, np.arange(0, len(x), num_together))


def ratio_interval(
  total: Any, count: Any, independent: bool = True, where: Any = None
) -> tuple[float, float]:
  """Returns sum(total) / sum(count) and the half width of its 95% interval.

  The interval is that of a ratio estimator over blocks of consecutive rows, by
  Student's t. It does not depend on how rows were batched.

  Source: Cochran, Sampling Techniques, 3rd edition, section 6.3.

  Args:
    total: [N], per row, in the order of the text: correct tokens, or nats.
    count: [N], per row: tokens, or bytes.
    independent: whether the rows are; see `num_blocks`.
    where: [N] bool, the rows to use; None: those with a count above 0.

  Returns:
    The ratio and the half width, which is NaN for fewer than two rows.
  """
  where = np.asarray(count) > 0 if where is None else where
  total, count = (np.asarray(x, np.float64)[where] for x in (total, count))
  ratio = _ratio(total.sum(), count.sum())
  num = num_blocks(len(count), independent)
  if num < 2:
    return ratio, math.nan
  starts = np.arange(num) * len(count) // num
  residuals = np.add.reduceat(total - ratio * count, starts)
  spread = math.sqrt(np.sum(residuals**2) * num / (num - 1))
  quantile = special.stdtrit(num - 1, 0.975)
  return ratio, float(quantile * spread / count.sum())


def text_statistics(texts: Sequence[np.ndarray]) -> dict[str, float]:
  """Measures the variety of texts, which a low perplexity alone does not show.

  Args:
    texts: N arrays of int ids, at least one id altogether.

  Returns:
    unigram_entropy of the histogram of all tokens, and sample_entropy, the mean
    over texts of the entropy of each one's own histogram, in nats per token
    (reported with generative perplexity since Zheng et al., arXiv 2409.02908);
    distinct_1, distinct_2, distinct_3: distinct n-grams among all n-grams, in
    [0, 1] (Li et al., arXiv 1510.03055).
  """

  def distinct(n):
    windows = [
      np.lib.stride_tricks.sliding_window_view(text, n)
      for text in texts
      if len(text) >= n
    ]
    if not windows:
      return math.nan
    ngrams = np.concatenate(windows)
    return len(np.unique(ngrams, axis=0)) / len(ngrams)

  return {
    'unigram_entropy': _entropy(np.concatenate(texts)),
    'sample_entropy': float(np.mean([_entropy(text) for text in texts])),
    **{f'distinct_{n}': distinct(n) for n in (1, 2, 3)},
  }


def _entropy(tokens: np.ndarray) -> float:
  """Returns the entropy of the histogram of the ids, in nats."""
  counts = np.unique(tokens, return_counts=True)[1]
  share = counts / counts.sum()
  return float(-np.sum(share * np.log(share)))


def eval_means(
  rows: dict[str, np.ndarray],
  sums: dict[str, np.ndarray],
  split: str = 'eval',
  has_documents: bool = False,
  num_together: int = 1,
) -> dict[str, float]:
  """Returns the held-out bound (or exact value) and its interval.

  An interval contains the spread of the text and of the noise: a row's value is
  the mean of its noise draws; see `ratio_interval`.

  Args:
    rows: [N] each, in the order of the text, from `steps.make_eval_step`.
    sums: sums from the same steps.
    split: the metrics' prefix.
    has_documents: whether a row is a whole document. Rows are then independent.
    num_together: number of consecutive rows that depend on each other, such as
      the answers to one prompt, which are equally hard.

  Returns:
    nll and nll_ci95 (half width) in nats per token, and the same of ar_nll, the
    exact value of a block model that has it; ppl; bits_per_token;
    bits_per_byte and bits_per_byte_ci95; accuracy and `level_means` of all
    scored tokens, padding included if it is scored; num_examples; num_blocks,
    of which the intervals are formed. With has_documents, nats_per_document and
    nats_per_document_ci95, too. If rows have the finite nats of a law: their
    mean law_nats, in nats per document; excess_nats and excess_nats_ci95, by
    how much the bound exceeds it, from the difference of each document.
  """
  num_examples = float(np.sum(rows['weight'] > 0))
  rows = {**rows, 'num_rows': (rows['weight'] > 0).astype(np.float64)}
  rows = {key: sum_groups(x, num_together) for key, x in rows.items()}
  nats, weight = rows['nll'], rows['weight']
  nll, half_width = ratio_interval(nats, weight, has_documents)
  per_byte, byte_half_width = ratio_interval(
    nats, rows['num_bytes'], has_documents, weight > 0
  )
  num = int(np.sum(weight > 0))
  means = {
    'nll': nll,
    'nll_ci95': half_width,
    'ppl': math.exp(min(nll, 700.0)),
    'bits_per_token': nll / math.log(2),
    'bits_per_byte': per_byte / math.log(2),
    'bits_per_byte_ci95': byte_half_width / math.log(2),
    'accuracy': _ratio(np.sum(rows['correct']), np.sum(rows['scored'])),
    'num_examples': num_examples,
    'num_blocks': float(num_blocks(num, has_documents)),
  }
  if 'ar_nll' in rows:
    means['ar_nll'], means['ar_nll_ci95'] = ratio_interval(
      rows['ar_nll'], weight, has_documents
    )
  if has_documents:
    means['nats_per_document'], means['nats_per_document_ci95'] = (
      ratio_interval(nats, rows['num_rows'])
    )
  law_nats = rows.get('law_nats', np.full(len(nats), np.nan))
  has_law = np.isfinite(law_nats) & (weight > 0)
  if has_law.any():
    means['law_nats'] = float(np.mean(law_nats[has_law]))
    means['excess_nats'], means['excess_nats_ci95'] = ratio_interval(
      nats - law_nats, has_law
    )
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
    rows: values by key, with half widths of intervals as KEY_ci95 or their ends
      as KEY_low and KEY_high; '-' is shown for a value that is absent or None.
  """

  def cell(row, key, form, unit=1):
    value = row.get(key)
    if value is None:
      return '-'
    interval = ''
    if (half_width := row.get(f'{key}_ci95')) is not None:
      interval = f' ± {format(half_width, form)}'
    if f'{key}_low' in row:
      low, high = (format(row[f'{key}_{end}'], form) for end in ('low', 'high'))
      interval = f' ({low} to {high})'
    return format(value / unit if unit != 1 else value, form) + interval

  cells = [[column[0] for column in columns]]
  cells += [[cell(row, *column[1:]) for column in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return [
    '  '.join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
    for first, *rest in cells
  ]
