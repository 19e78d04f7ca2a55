"""Tests of nanodlm.data.prepare: what is packed, and when."""

import os
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm.data import encoder, pack, prepare, tokenizers
from nanodlm.data.config import TokenizerConfig
from nanodlm.data.packed import SPLITS
from nanodlm.data.sources import base
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from nanodlm.types import InputError
from tests.data import cases
from tests.data.cases import DataTest, stream


class PrepareTest(DataTest):
  def test_documents_are_joined_by_separators_and_cut(self):
    self.write_documents()
    packed = self.prepare()
    self.assertEqual(packed.length, 16)
    seen = []
    for split in SPLITS:
      rows, counts = getattr(packed, split), packed.metadata[split]
      tokens = stream(rows)
      self.assertEqual(rows[0]['tokens'].dtype, np.int32)
      for i in range(len(rows)):
        self.assertEqual(
          rows[i]['num_bytes'],
          packed.tokenizer.num_bytes[rows[i]['tokens']].sum(),
        )
      self.assertEqual(counts['num_rows'], len(rows))
      self.assertEqual(counts['num_tokens'], tokens.size)
      self.assertEqual(counts['num_bytes'], (tokens < 256).sum())
      # 56 bytes and a separator per document, and nothing else.
      self.assertEqual(
        counts['num_documents'] * 57, tokens.size + counts['num_dropped_tokens']
      )
      self.assertLess(counts['num_dropped_tokens'], 16)
      np.testing.assert_array_equal(
        np.flatnonzero(tokens == packed.tokenizer.separator_id),
        np.arange(56, tokens.size, 57),
      )
      numbers = [
        int(packed.tokenizer.decode(tokens[i + 1 : i + 5]))
        for i in range(0, tokens.size - 5, 57)
      ]
      self.assertEqual(numbers, sorted(numbers))  # in the order of the source
      seen.extend(numbers)
    self.assertEqual(sorted(seen), list(range(40)))  # no document in both
    self.assertEqual(packed.metadata['validation']['num_documents'], 4)
    self.assertEqual(packed.metadata['tokenizer'], packed.tokenizer.to_json())

  def test_pieces_of_a_long_document(self):
    text = ''.join(f'line {i}\n' for i in range(2000))
    self.write('a.txt', text)
    with (
      mock.patch.object(base, 'PIECE_CHARS', 1000),
      mock.patch.object(encoder, 'BATCH_CHARS', 3000),
      mock.patch.object(pack, 'SHARD_ROWS', 500),
    ):
      packed = self.prepare(length=8)
    tokens = np.concatenate([stream(packed.train), stream(packed.validation)])
    cut = int(len(text) * (1 - 0.1))
    expected = np.concatenate(
      [
        np.frombuffer(part.encode() + b'?', np.uint8)[
          : (len(part) + 1) // 8 * 8
        ]
        for part in (text[:cut], text[cut:])
      ]
    ).astype(np.int32)
    expected = np.where(expected == ord('?'), 256, expected)
    np.testing.assert_array_equal(tokens, expected)
    shards = list(pathlib.Path(packed.folders[0]).rglob('*train.array_record*'))
    self.assertGreater(len(shards), 3)

  def test_ids_beyond_16_bits(self):
    class Wide(BytesTokenizer):
      def encode(self, text):
        return super().encode(text) + 100_000

    tokenizer = Wide(pieces=(b'x',) * 100_256, separator_id=100_256)
    self.write('a.txt', 'hello world, ' * 30)
    with mock.patch.object(
      tokenizers, 'make_tokenizer', return_value=tokenizer
    ):
      packed = self.prepare()
    np.testing.assert_array_equal(
      packed.train[0]['tokens'][:5], np.array(list(b'hello')) + 100_000
    )

  def test_sentencepiece_is_trained_on_the_training_text_only(self):
    self.write(
      'a.txt',
      'some words to train on, again and again\n' * 100 + '\u0416' * 400,
    )  # falls into the last tenth
    cls = SentencePieceTokenizer
    with mock.patch.object(cls, 'train', wraps=cls.train) as train:
      packed = self.prepare(tokenizer=cases.SENTENCEPIECE)
      again = self.prepare(tokenizer=cases.SENTENCEPIECE)
    self.assertEqual(train.call_count, 1)
    self.assertEqual(again.folders[0], packed.folders[0])
    self.assertEqual(packed.tokenizer.vocab_size, 302)
    self.assertTrue(packed.tokenizer.path.startswith(packed.folders[0]))
    self.assertEqual(packed.metadata['tokenizer'], packed.tokenizer.to_json())
    self.assertEqual(again.tokenizer.to_json(), packed.tokenizer.to_json())
    self.assertNotIn('\u0416'.encode(), packed.tokenizer.pieces)
    self.assertStartsWith(
      packed.tokenizer.decode(stream(packed.train)),
      'some words to train on, again',
    )

  def test_opened_again_without_work(self):
    self.write_documents()
    first = self.prepare()
    with mock.patch.object(prepare, '_build', side_effect=AssertionError):
      again = self.prepare()
    self.assertEqual(again.folders[0], first.folders[0])
    np.testing.assert_array_equal(stream(again.train), stream(first.train))
    self.assertEqual(
      self.left_in_data_dir(), [os.path.basename(first.folders[0])]
    )

  def test_anything_that_matters_makes_another_dataset(self):
    self.write_documents()
    paths = [self.prepare().folders[0]]
    paths.append(self.prepare(length=17).folders[0])
    paths.append(self.prepare(eval_fraction=0.2).folders[0])
    paths.append(self.prepare(tokenizer=cases.SENTENCEPIECE).folders[0])
    paths.append(
      self.prepare(tokenizer=TokenizerConfig('sentencepiece', '', 301)).folders[
        0
      ]
    )
    self.write('0000.txt', 'another text of whatever length')
    paths.append(self.prepare().folders[0])
    self.write('9999.txt', 'one more')
    paths.append(self.prepare().folders[0])
    os.remove(os.path.join(self.folder, '9999.txt'))
    self.assertLen(set(paths), len(paths))
    self.assertIn(self.prepare().folders[0], paths)

  @parameterized.parameters((1000, 'validation'), (5000, 'train'))
  def test_text_shorter_than_a_row(self, length, split):
    self.write('a.txt', 'x' * 2000)
    with self.assertRaisesRegex(
      InputError,
      f'data.length={length} is longer .* tokens in {split}.*data.length<=201',
    ):
      self.prepare(length=length)
    self.assertEmpty(self.left_in_data_dir())

  def test_no_text_at_all(self):
    self.write('a.jsonl', '{"text": ""}\n')
    with self.assertRaisesRegex(InputError, 'contains no text'):
      self.prepare(f'jsonl:{self.folder}/a.jsonl')

  def test_broken_source_leaves_nothing(self):
    self.write_documents()
    with open(os.path.join(self.folder, '0020.txt'), 'wb') as file:
      file.write(b'\xff')
    with self.assertRaisesRegex(InputError, '0020.txt is not UTF-8'):
      self.prepare()
    self.assertEmpty(self.left_in_data_dir())

  def test_source_that_changes_meanwhile(self):
    self.write_documents()
    encode = encoder.encode

    def change_then_encode(*args):
      self.write('0000.txt', 'changed')
      return encode(*args)

    with mock.patch.object(encoder, 'encode', change_then_encode):
      with self.assertRaisesRegex(InputError, 'changed while'):
        self.prepare()
    self.assertEmpty(self.left_in_data_dir())


if __name__ == '__main__':
  absltest.main()
