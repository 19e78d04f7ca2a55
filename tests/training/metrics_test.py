"""Tests of nanodlm.training.metrics: means, units and intervals."""

import math

import numpy as np

from nanodlm import evaluate
from nanodlm.training import metrics

SUMS = {
  'bin_cross_entropy': np.array([2.0, 0.0]),
  'bin_scored': np.array([4.0, 0.0]),
}


def means_of(nll, weight, num_bytes, independent=True, **others):
  rows = {'nll': nll, 'weight': weight, 'num_bytes': num_bytes, **others}
  rows |= {'correct': [3.0], 'scored': [4.0]}
  return metrics.eval_means(metrics.join([rows]), SUMS, 'eval', independent)


def test_answers_to_one_prompt_are_not_independent():
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(500):
    nll = np.repeat(rng.normal(10, 3, 50), 2) + rng.normal(0, 1, 100)
    rows = {'nll': nll, 'weight': np.full(100, 10.0)}
    rows |= {'num_bytes': rows['weight'], 'correct': nll, 'scored': nll}
    means = metrics.eval_means(rows, SUMS, 'eval', True, num_together=2)
    assert means['eval/num_examples'] == 100
    assert means['eval/num_blocks'] == 50
    np.testing.assert_allclose(means['eval/nats_per_document'], nll.mean())
    hits += abs(means['eval/nll'] - 1) < means['eval/nll_ci95']
  assert 0.92 < hits / 500 < 0.98


def test_a_row_without_bytes_costs_bits():
  means = means_of([8.0, 12.0, 3.0], [10, 10, 1], [20, 20, 0])
  assert math.isclose(means['eval/bits_per_byte'], 23 / 40 / math.log(2))


def test_units():
  means = means_of([8.0, 12.0], [10, 10], [20, 20])
  assert means['eval/nll'] == 1.0
  assert math.isclose(means['eval/ppl'], math.e)
  assert math.isclose(means['eval/bits_per_token'], 1 / math.log(2))
  assert math.isclose(means['eval/bits_per_byte'], 0.5 / math.log(2))
  assert means['eval/accuracy'] == 0.75
  assert means['eval_by_level/cross_entropy_0'] == 0.5
  assert 'eval_by_level/cross_entropy_1' not in means


def test_the_exact_value_of_a_block_model():
  columns = [8.0, 12.0], [10, 10], [20, 20]
  own, other = (
    means_of(*columns, **{key: [6.0, 4.0]}) for key in ('ar_nll', 'other_nll')
  )
  assert own['eval/ar_nll'] == 0.5 and own['eval/nll'] == 1.0
  # Each row is 1 nat from the mean; t with one degree of freedom: 12.7062.
  expected = 12.7062 * math.sqrt(2 * (1 + 1)) / 20
  assert math.isclose(own['eval/ar_nll_ci95'], expected, rel_tol=1e-5)
  assert other == means_of(*columns)
  assert '; ar, exact: 0.5000 ± 1.2706 nats' in evaluate.describe(own, False)
  assert 'exact' not in evaluate.describe(other, False)


def test_steps_without_a_bound():
  sums = {'loss': 6.0, 'nll': 5.0, 'weight': 10, 'num_bytes': 20}
  sums = {**SUMS, **sums, 'correct': 3.0, 'scored': 4.0}
  means = metrics.train_means(sums)
  assert means['train/nll'] == 0.5 and 'train/bits_per_byte' in means
  means = metrics.train_means({**sums, 'nll': math.nan})
  assert means['train/loss'] == 0.6
  assert not any(math.isnan(x) for x in means.values())


def test_interval_covers_the_mean_about_19_times_in_20():
  generator = np.random.default_rng(0)
  hits, byte_hits = 0, 0
  for _ in range(2000):
    weight = np.full(60, 16.0)
    num_bytes = generator.integers(20, 60, 60)  # Mean 39.5 per row.
    nll = generator.gamma(4.0, 4.0, 60)  # Mean 16: 1 nat per token.
    means = means_of(nll, weight, num_bytes)
    hits += abs(means['eval/nll'] - 1.0) < means['eval/nll_ci95']
    byte_hits += (
      abs(means['eval/bits_per_byte'] - 16 / 39.5 / math.log(2))
      < means['eval/bits_per_byte_ci95']
    )
  assert 0.92 < hits / 2000 < 0.97
  assert 0.92 < byte_hits / 2000 < 0.97


def test_interval_of_blocks_by_hand():
  # 60 rows: 30 blocks of two, which cost 1 + 3 and 3 + 5 nats in turn.
  nll, weight = np.tile([1.0, 3.0, 3.0, 5.0], 15), np.full(60, 3.0)
  means = means_of(nll, weight, weight, independent=False)
  assert means['eval/nll'] == 1.0 and means['eval/num_blocks'] == 30
  # Each is 2 nats from the 6 of its tokens, so that the standard deviation of
  # the sum is sqrt(30 * 30 * 2^2 / 29); t with 29 degrees of freedom: 2.04523.
  expected = 2.04523 * math.sqrt(30 * 30 * 4 / 29) / 180
  assert math.isclose(means['eval/nll_ci95'], expected, rel_tol=1e-5)
  # Fewer rows than blocks: t with one degree of freedom, 12.7062.
  few = means_of([8.0, 12.0], [10, 10], [20, 20], independent=False)
  assert few['eval/num_blocks'] == 2
  expected = 12.7062 * math.sqrt(2 * (2**2 + 2**2)) / 20
  assert math.isclose(few['eval/nll_ci95'], expected, rel_tol=1e-5)
  # Documents of their own.
  each = means_of(nll, weight, weight)
  assert each['eval/num_blocks'] == 60 and each['eval/nats_per_document'] == 3
  # t with 59 degrees of freedom: 2.00100.
  expected = 2.001 * math.sqrt(60 * (2 * 15 * 4) / 59) / 60
  width = each['eval/nats_per_document_ci95']
  assert math.isclose(width, expected, rel_tol=1e-5)


def test_interval_of_rows_that_are_alike():
  # Documents of 16 rows, each with a mean of its own.
  generator = np.random.default_rng(0)
  hits = {True: 0, False: 0}
  for _ in range(1000):
    documents = np.repeat(generator.normal(16.0, 2.0, 100), 16)[5:-3]
    nll = documents + generator.normal(0.0, 2.0, documents.size)
    weight = np.full(documents.size, 16.0)
    for independent in hits:
      means = means_of(nll, weight, weight, independent)
      hits[independent] += abs(means['eval/nll'] - 1) < means['eval/nll_ci95']
  assert 0.92 < hits[False] / 1000 < 0.97
  assert hits[True] / 1000 < 0.6


def test_interval_per_byte_holds_the_spread_of_bytes_alone():
  means = means_of([8, 8, 8], [8, 8, 8], [10, 20, 30])
  assert means['eval/nll_ci95'] == 0
  assert means['eval/bits_per_byte_ci95'] > 0


def test_empty_rows_change_nothing():
  full = means_of([8.0, 12.0], [10, 10], [20, 20])
  padded = means_of([8.0, 12.0, 0.0], [10, 10, 0], [20, 20, 0])
  assert full == padded


def test_join():
  rows = metrics.join([{'a': np.ones(2)}, {'a': np.zeros(1)}])
  np.testing.assert_array_equal(rows['a'], [1.0, 1.0, 0.0])


def test_add():
  total = metrics.add([{'a': np.ones(2)}, {'a': np.ones(2)}])
  np.testing.assert_array_equal(total['a'], [2.0, 2.0])


def test_a_later_value_that_is_not_finite():
  lines = [{'step': 10, 'a': 3.0, 'b': 1.0}, {'step': 10, 'a': None}]
  assert metrics.join_steps(lines) == [{'step': 10, 'b': 1.0}]


def test_peak_flops():
  assert metrics.peak_flops('NVIDIA H100 80GB HBM3') == 989e12
  assert metrics.peak_flops('NVIDIA H100 PCIe') == 756e12
  assert metrics.peak_flops('NVIDIA H200 NVL') == 835e12
  assert metrics.peak_flops('NVIDIA H200') == 989e12
  assert metrics.peak_flops('TPU v5 lite') == 197e12
  assert metrics.peak_flops('cpu') is None


def test_ratio_interval_is_that_of_the_evaluation():
  nll, num_bytes = np.array([8.0, 12.0, 5.0]), np.array([20, 20, 7])
  means = means_of(nll, [10, 10, 4], num_bytes)
  ratio, half_width = metrics.ratio_interval(
    np.append(nll, 3.0), np.append(num_bytes, 0)
  )
  assert math.isclose(ratio / math.log(2), means['eval/bits_per_byte'])
  assert math.isclose(
    half_width / math.log(2), means['eval/bits_per_byte_ci95']
  )
  assert math.isnan(metrics.ratio_interval([1.0], [2.0])[1])


def test_text_statistics():
  same = metrics.text_statistics(np.full((2, 8), 5))
  assert same['unigram_entropy'] == same['sample_entropy'] == 0
  assert [same[f'distinct_{n}'] for n in (1, 2, 3)] == [1 / 16, 1 / 14, 1 / 12]
  # Each text repeats one of two tokens.
  two = metrics.text_statistics(np.repeat([[3], [9]], 8, axis=1))
  assert math.isclose(two['unigram_entropy'], math.log(2))
  assert two['sample_entropy'] == 0 and two['distinct_2'] == 2 / 14
  varied = metrics.text_statistics(np.arange(16).reshape(2, 8))
  assert math.isclose(varied['unigram_entropy'], math.log(16))
  assert math.isclose(varied['sample_entropy'], math.log(8))
  # Texts may differ in length.
  ragged = metrics.text_statistics([np.array([1]), np.array([1, 2, 1])])
  assert ragged['distinct_1'] == 2 / 4 and ragged['distinct_2'] == 1
  assert math.isclose(
    ragged['unigram_entropy'], math.log(4) - 0.75 * math.log(3)
  )
  # An n-gram lies within one text.
  assert varied['distinct_1'] == varied['distinct_3'] == 1
  assert math.isnan(metrics.text_statistics(np.zeros((3, 2)))['distinct_3'])
