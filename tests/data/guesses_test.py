"""Tests of what guesses without a network cost."""

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
