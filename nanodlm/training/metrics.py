"""Sums become means here: names, units and intervals of what is reported."""

import math
from typing import Any, Sequence

import numpy as np

# Dense matrix rate of one device in its 16-bit format, FLOP/s, from the makers'
# data sheets (without sparsity); keyed by the start of jax's device_kind.
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
  """The device's peak, FLOP/s, or None where it is not known."""
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
  """Scalars as JSON can hold them: None for what is not finite."""
  values = {key: float(value) for key, value in values.items()}
  return {
    key: value if math.isfinite(value) else None
    for key, value in values.items()
  }


def _ratio(total, count) -> float:
  return float(total / count) if count else math.nan


def level_means(sums: dict[str, np.ndarray], split: str) -> dict[str, float]:
  """Cross entropy per scored token by noise level, in ten equal bins.

  `split_by_level/cross_entropy_3` is the mean over tokens whose noise level (see
  `types.Noised`) was 0.3 to 0.4, nats; a bin that saw no token is left out.
  """
  return {
    f'{split}_by_level/cross_entropy_{i}': float(total / count)
    for i, (total, count) in enumerate(
      zip(sums['bin_cross_entropy'], sums['bin_scored'])
    )
    if count
  }


def train_means(sums: dict[str, np.ndarray]) -> dict[str, float]:
  """Means over the steps that were added up (see `step._sums`).

  Returns:
    train/loss, nats per token; train/nll and train/bits_per_byte, of the noisy
    bound on the training text; train/accuracy of the scored tokens; and the cross
    entropy by noise level.
  """
  return {
    'train/loss': _ratio(sums['loss'], sums['weight']),
    'train/nll': _ratio(sums['nll'], sums['weight']),
    'train/bits_per_byte': _ratio(sums['nll'] / math.log(2), sums['num_bytes']),
    'train/accuracy': _ratio(sums['correct'], sums['scored']),
    **level_means(sums, 'train'),
  }


def _half_width(sums: dict[str, np.ndarray], per: str) -> float:
  """1.96 standard errors of sum(nll) / sum(per), a ratio over examples."""
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


def ratio_interval(total: np.ndarray, count: np.ndarray) -> tuple[float, float]:
  """sum(total) / sum(count) over rows, and the half width of its 95% interval.

  Args:
    total: [N], of each row: correct tokens, nats.
    count: [N], of each row: tokens, bytes; rows of count 0 are left out.

  Returns:
    The ratio and 1.96 standard errors, which hold the spread between rows; NaN
    where there are fewer than two.
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


# The n of distinct-n.
DISTINCT_N = (1, 2, 3)


def text_statistics(tokens: np.ndarray) -> dict[str, float]:
  """How varied texts are: what a low perplexity alone does not show.

  Args:
    tokens: [N, L] int ids of N texts.

  Returns:
    unigram_entropy, of the histogram of all tokens; sample_entropy, the mean over
    texts of the entropy of each one's own histogram (the "entropy" printed beside
    generative perplexity since Zheng et al., arXiv 2409.02908), nats per token;
    distinct_1, distinct_2, distinct_3: different n-grams among all n-grams, in
    [0, 1] (Li et al., arXiv 1510.03055).
  """
  tokens = np.asarray(tokens)
  statistics = {
    'unigram_entropy': _entropy(tokens),
    'sample_entropy': float(np.mean([_entropy(row) for row in tokens])),
  }
  for n in DISTINCT_N:
    if tokens.shape[1] < n:
      statistics[f'distinct_{n}'] = math.nan
      continue
    ngrams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
    ngrams = ngrams.reshape(-1, n)
    statistics[f'distinct_{n}'] = len(np.unique(ngrams, axis=0)) / len(ngrams)
  return statistics


def _entropy(tokens: np.ndarray) -> float:
  """Of the histogram of the ids, nats."""
  counts = np.unique(tokens, return_counts=True)[1]
  share = counts / counts.sum()
  return float(-np.sum(share * np.log(share)))


def eval_means(
  sums: dict[str, np.ndarray], split: str = 'eval'
) -> dict[str, float]:
  """The held-out bound (or exact value) with its interval.

  The intervals are 1.96 standard errors of a ratio of sums over examples, each
  the mean of its noise draws: they hold the spread of the text and of the noise.

  Args:
    sums: see `step.make_eval_step`.
    split: the metrics' prefix.

  Returns:
    split/nll and split/nll_ci95 (half width), nats per token; split/ppl;
    split/bits_per_token; split/bits_per_byte and split/bits_per_byte_ci95;
    split/accuracy and the cross entropy by noise level, of all scored tokens
    (padding too, where it is scored); and split/num_examples.
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
  return {
    **{f'{split}/{key}': value for key, value in means.items()},
    **level_means(sums, split),
  }
