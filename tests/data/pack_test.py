"""Tests of nanodlm.data.pack: the rows of pairs."""

import logging
from unittest import mock

from absl.testing import absltest
import numpy as np

from nanodlm.data import encoder, pack
from nanodlm.data.packed import SPLITS
from nanodlm.types import InputError
from tests.data import cases
from tests.data.cases import DataTest


class PairsTest(DataTest):
  def test_a_pair_is_a_row(self):
    pairs = [(f'{i}é:', 'r' * (i % 9 + 1)) for i in range(50)]
    # Small groups: a prompt and its response are then in two of them.
    with (
      mock.patch.object(encoder, 'BATCH_CHARS', 5),
      mock.patch.object(pack, 'SHARD_ROWS', 20),
    ):
      packed = self.prepare(self.write_pairs(pairs))
    self.assertTrue(packed.is_pairs)
    seen = []
    for split in SPLITS:
      rows, counts = getattr(packed, split), packed.metadata[split]
      for row in (rows[i] for i in range(len(rows))):
        tokens, start = row['tokens'], row['prompt_length']
        end = start + row['num_bytes']  # here a byte is a token
        seen.append(
          (
            bytes(tokens[:start].tolist()).decode(),
            bytes(tokens[start:end].tolist()).decode(),
          )
        )
        np.testing.assert_array_equal(tokens[end:], 256)
        self.assertLess(end, 16)
      self.assertEqual(counts['num_documents'], len(rows))
      self.assertEqual(counts['num_dropped_documents'], 0)
      self.assertEqual(
        counts['num_bytes'], sum(rows[i]['num_bytes'] for i in range(len(rows)))
      )
    self.assertCountEqual(seen, pairs)  # each in one split
    self.assertBetween(len(packed.validation), 3, 8)

  def test_copies_of_a_pair_stay_on_one_side(self):
    packed = self.prepare(
      self.write_pairs([(f'{i % 10}', 'answer') for i in range(60)]),
      eval_fraction=0.2,
    )
    found = [
      {packed.tokenizer.decode(rows[i]['tokens']) for i in range(len(rows))}
      for rows in (packed.train, packed.validation)
    ]
    self.assertEqual([len(texts) for texts in found], [8, 2])
    self.assertEmpty(found[0] & found[1])

  def test_pairs_that_do_not_fit_are_left_out_and_counted(self):
    # 16 tokens are 5 of the prompt, 10 of the response and a separator.
    pairs = [(f'p{i:04d}', 'r' * (10 if i % 2 else 11)) for i in range(40)]
    with self.assertLogs('nanodlm', logging.WARNING) as logs:
      packed = self.prepare(self.write_pairs(pairs))
    counts = [packed.metadata[split] for split in SPLITS]
    self.assertEqual(sum(c['num_rows'] for c in counts), 20)
    self.assertEqual(sum(c['num_dropped_documents'] for c in counts), 20)
    self.assertRegex(logs.output[0], r'left out \d+ of \d+ pairs of train.*17')
    for rows in (packed.train, packed.validation):
      for i in range(len(rows)):
        np.testing.assert_array_equal(rows[i]['tokens'][-2:], [ord('r'), 256])

  def test_errors_of_pairs(self):
    long = self.write_pairs([(f'{i}', 'r' * (20 + i)) for i in range(9)])
    with self.assertRaisesRegex(
      InputError,
      'data.length=16 is too short for all .* pairs of .*'
      r'at least 2\d tokens',
    ):
      self.prepare(long)
    with self.assertRaisesRegex(InputError, 'only one pair'):
      self.prepare(self.write_pairs([('p', 'r')]))
    with self.assertRaisesRegex(InputError, 'all the same text'):
      self.prepare(self.write_pairs([('p', 'r')] * 3))
    with self.assertRaisesRegex(InputError, 'contains no text'):
      self.prepare('pairs:' + self.write('b.jsonl', '\n\n'))
    self.assertEmpty(self.left_in_data_dir())

  def test_sentencepiece_of_pairs(self):
    # Encoded apart: no piece spans a prompt's end and a response's beginning.
    packed = self.prepare(
      self.write_pairs([(f'question {i} ', f'answer {i}') for i in range(99)]),
      cases.SENTENCEPIECE,
      length=32,
    )
    tokenizer = packed.tokenizer
    for i in range(5):
      row = packed.train[i]
      prompt = tokenizer.decode(row['tokens'][: row['prompt_length']])
      self.assertRegex(prompt, r'^question \d+ $')
      np.testing.assert_array_equal(
        tokenizer.encode(prompt), row['tokens'][: row['prompt_length']]
      )
      self.assertEqual(
        row['num_bytes'], len(prompt) - len('question') + len('answer') - 1
      )


if __name__ == '__main__':
  absltest.main()
