"""Tests of what guesses without a network cost."""

import json
import math

import pytest

from nanodlm.data import guesses, prepare
from tests import workdirs
from tests.data.cases import BYTES


def test_values_of_a_text_of_two_letters(tmp_path):
  # 48 tokens to train on, 36 a and 12 b; 16 held out, 4 a and 12 b.
  (tmp_path / 'text.txt').write_text('aaab' * 12 + 'abbb' * 4)
  config = workdirs.DataConfig(
    source=f'text:{tmp_path}/text.txt',
    data_dir=str(tmp_path),
    eval_fraction=0.25,
    length=8,
  )
  values = guesses.measure(prepare.prepare(config, BYTES), config)
  num_ids = 257  # 256 bytes and the separator
  total = 48 + num_ids
  unigram = -(math.log(37 / total) + 3 * math.log(13 / total)) / 4
  assert values == {
    'uniform_nll': pytest.approx(math.log(num_ids)),
    'unigram_nll': pytest.approx(unigram),
    'bytes_per_token': 1,
    'num_tokens': 16,
  }


@pytest.mark.parametrize('padding', ['eos', 'masked'])
def test_separators_that_fill_a_row_are_certain(tmp_path, padding):
  source = tmp_path / 'texts.jsonl'
  # Three documents to train on, two of them the same, and one held out.
  lines = [json.dumps({'text': text}) for text in ('aab', 'aab', 'a', 'bb')]
  source.write_text('\n'.join(lines))
  config = workdirs.DataConfig(
    source=f'jsonl:{source}',
    data_dir=str(tmp_path),
    eval_fraction=0.25,
    crop='document',
    padding=padding,
    length=8,
  )
  packed = prepare.prepare(config, BYTES)
  values = guesses.measure(packed, config)
  held_out = packed.tokenizer.decode(packed.validation[0]['tokens'])
  text = held_out.partition('\n\n')[0]
  rest = ''.join(x for x in ('aab', 'aab', 'a', 'bb') if x != text)
  num_ends = 4 - (text == 'aab') - 1
  counts = {'a': rest.count('a'), 'b': rest.count('b'), '': num_ends}
  total = sum(counts.values()) + 257
  nats = [-math.log((counts[x] + 1) / total) for x in (*text, '')]
  assert values == {
    'uniform_nll': pytest.approx(math.log(257)),
    'unigram_nll': pytest.approx(sum(nats) / len(nats)),
    'bytes_per_token': pytest.approx(len(text) / len(nats)),
    'num_tokens': len(nats),
  }


def test_a_mixture_has_the_frequencies_of_its_examples(tmp_path):
  # One text has ten times the rows of the other; the shares are equal.
  parts = []
  for letter, num in (('a', 1000), ('b', 100)):
    path = tmp_path / f'{letter}.txt'
    path.write_text(letter * 8 * num)
    parts.append(f'0.5*text:{path}')
  config = workdirs.DataConfig(
    source=f'mix:{"+".join(parts)}',
    data_dir=str(tmp_path),
    eval_fraction=0.1,
    length=8,
  )
  packed = prepare.prepare(config, BYTES)
  size = len(packed.train) * 8
  assert size == 8 * 990
  expected = -math.log((size / 2 + 1) / (size + 257))
  unigram = guesses.measure(packed, config)['unigram_nll']
  assert unigram == pytest.approx(expected)
