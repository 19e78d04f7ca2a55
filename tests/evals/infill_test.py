"""Tests of the infilling accuracy: masked tokens and restored ones."""

from unittest import mock

import numpy as np
import pytest

from nanodlm import evaluate
from nanodlm import lm as lms
from nanodlm.data import sources
from nanodlm.evals import infill
from nanodlm.types import InputError
from tests import workdirs


@pytest.mark.parametrize('pattern', infill.PATTERNS)
@pytest.mark.parametrize('ratio, num', [(0.1, 1), (0.25, 3), (1.0, 12)])
def test_gaps(pattern, ratio, num):
  eligible = np.ones((50, 16), bool)
  eligible[:, :4] = False
  eligible[7] = False
  gaps = infill.sample_gaps(np.random.default_rng(0), eligible, ratio, pattern)
  assert not np.any(gaps & ~eligible)
  expected = np.where(np.arange(50) == 7, 0, num)
  np.testing.assert_array_equal(gaps.sum(1), expected)
  # Each eligible place is masked in some row.
  np.testing.assert_array_equal(gaps.any(0), eligible[0])
  runs = np.sum(np.diff(gaps.astype(int), axis=1, prepend=0) == 1, axis=1)
  assert pattern == 'uniform' or runs.max() == 1
  assert pattern == 'span' or num in (1, 12) or runs.max() > 1


def test_accuracy(tmp_path):
  workdir = workdirs.make_workdir(tmp_path, scale=0.0, sampler__temperature=0.0)
  lm = lms.load(workdir)
  # With equal logits at temperature 0, the sampler writes 0 everywhere.
  tokens = np.zeros((20, 16), np.int32)
  tokens[15:] = 65
  tokens[:5, 0] = 65  # Not eligible.
  eligible = np.ones(tokens.shape, bool)
  eligible[:5, 0] = False
  rows = lms.make_batch(tokens, eligible)
  results = list(infill.measure_infilling(lm, rows, [0.25, 1.0]))
  assert [(r['pattern'], r['ratio']) for r in results] == [
    ('uniform', 0.25),
    ('uniform', 1.0),
    ('span', 0.25),
    ('span', 1.0),
  ]
  for result in results:
    assert result['exact_match'] == 0.75
    assert result['num_examples'] == 20
    assert abs(result['accuracy'] - 0.75) < 0.01
    assert 0.1 < result['accuracy_ci95'] < 0.3
    assert result['num_calls'] == 4
    assert result['tokens_per_call'] == result['num_tokens'] / 20 / 4
  assert results[1]['num_tokens'] == 20 * 16 - 5


def test_answers_that_agree_have_an_interval():
  count = np.full(36, 5)
  for correct, expected in ((0 * count, 0.0), (count, 1.0)):
    accuracy, half_width = infill._accuracy(correct, count)
    assert accuracy == expected
    # Clopper and Pearson's would be 0.097.
    assert 0.09 < half_width < 0.1
  assert np.isnan(infill._accuracy(count[:1], count[:1])[1])
  # Neighbours of packed text count less.
  dependent = infill._accuracy(np.zeros(500), np.full(500, 5), False)[1]
  assert dependent > 2 * infill._accuracy(np.zeros(500), np.full(500, 5))[1]


def test_padding_that_training_hides_is_hidden(tmp_path):
  path = tmp_path / 'lines.jsonl'
  words = ('fox', 'lazy dog', 'jumps over')
  path.write_text(
    '\n'.join(f'{{"text": "{x} {i}"}}' for x in words for i in range(20))
  )
  workdir = workdirs.make_workdir(
    tmp_path,
    data__source=f'jsonl:{path}',
    data__crop='document',
    data__padding='masked',
  )
  lm = lms.load(workdir)
  rows = evaluate.validation_rows(lm.run, evaluate.open_text(lm).packed, 0)
  assert rows.segment_ids is not None
  other = np.where(rows.segment_ids == 1, 65, rows.tokens)
  assert np.any(other != rows.tokens)
  make_fill = lms.make_fill

  def filled(batch):
    found = []

    def keep(*args):
      fill = make_fill(*args)

      def call(*args):
        found.append(fill(*args)[0])
        return found[-1], 1.0

      return call

    with mock.patch.object(lms, 'make_fill', keep):
      assert list(infill.measure_infilling(lm, batch, [0.5]))
    return np.where(rows.segment_ids == 0, found, 0)

  first = filled(rows)
  np.testing.assert_array_equal(filled(rows._replace(tokens=other)), first)
  seen = rows._replace(tokens=other, segment_ids=None)
  assert np.any(filled(seen) != first)


@pytest.mark.parametrize(
  'changes',
  [
    {'objective__name': 'ar'},
    {'objective__name': 'block', 'objective__block_size': 4},
  ],
)
def test_networks_that_read_left_to_right_are_refused(changes, tmp_path):
  lm = lms.load(workdirs.make_workdir(tmp_path, **changes))
  with pytest.raises(InputError, match='both sides'):
    infill.check_run(lm.run)


@pytest.mark.parametrize('texts', [['x'], ['0'], ['0.5', '1.5'], ['nan']])
def test_ratios(texts):
  assert infill.parse_ratios(['0.1', '1']) == [0.1, 1.0]
  with pytest.raises(InputError, match='--infill='):
    infill.parse_ratios(texts)


def test_the_law_of_a_gap_of_any_number_of_words():
  law = sources.law_of('stories:small')
  text = law.sample(3, 1)
  start = text.index('and Carl had a')
  stop = start + len('and Carl had a')
  before, after = text[:start], text[stop:]
  found = infill.any_number(law, before, after, 12)
  assert sorted(found.lengths) == [4, 10, 11]
  np.testing.assert_allclose(sum(found.fills.values()), 1)
  # Independently: what each filled text costs under the law.
  names = [
    ' '.join(fill).replace(' ,', ',').replace(' .', '.') for fill in found.fills
  ]
  weights = np.exp([law.log_prob(before + name + after) for name in names])
  np.testing.assert_allclose([*found.fills.values()], weights / weights.sum())
  for num, p in found.lengths.items():
    own = [x for fill, x in found.fills.items() if len(fill) == num]
    np.testing.assert_allclose(sum(own), p)


def test_gaps_of_any_length(tmp_path, monkeypatch):
  workdir = workdirs.make_workdir(
    tmp_path,
    objective__name='flex',
    model__time_conditioning=True,
    data__source='stories:small:0-60',
    data__crop='document',
    data__length=100,
    tokenizer__name='sentencepiece',
    tokenizer__vocab_size=512,
  )
  lm = lms.load(workdir)
  law, encode = sources.law_of('stories:small'), lm.tokenizer.encode
  texts = [law.sample(3, i) for i in range(30)]
  end = lm.tokenizer.separator_id
  tokens = np.full((30, 100), end, np.int32)
  for row, text in zip(tokens, texts):
    row[: len(encode(text))] = encode(text)
  rows = lms.make_batch(tokens, np.ones(tokens.shape, bool))

  def make_fill(run, batch_size):
    def fill(params, key, canvas, fixed):
      """Fills half of the gaps with the truth, others with one token."""
      filled = canvas.copy()
      for i, (row, given) in enumerate(zip(filled, fixed)):
        places = np.flatnonzero(~given)
        (text,) = [
          x for x in tokens if np.array_equal(x[: places[0]], row[: places[0]])
        ]
        size = int(np.argmax(text == end)) - np.sum(given & (row != end))
        own = text[places[0] : places[0] + size]
        own = own if i % 2 else own[:1]
        row[places[: len(own)]] = own
      return filled, 7.0

    return fill

  monkeypatch.setattr(lms, 'make_fill', make_fill)
  (result,) = infill.measure_lengths(lm, law, rows, [0.3])
  num = result['num_examples']
  assert num + result['num_left_out'] == 30 and num > 1
  assert result['accuracy'] == result['exact_match'] == num // 2 / num
  assert result['length_accuracy'] == num // 2 / num
  for key in ('', 'length_'):
    best = result[f'bayes_{key}accuracy']
    assert 0 < result[f'exact_{key}accuracy'] <= best < 1
  assert 'of the length' in infill.describe(result)
