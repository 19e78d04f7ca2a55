"""Tests of nanodlm.data.pack: the rows of pairs."""

import json
import logging
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm.data import encoder, overlap, pack, pipeline, prepare
from nanodlm.data.packed import SPLITS
from nanodlm.data.sources import base
from nanodlm.types import InputError
from tests.data import cases
from tests.data.cases import DataTest


class WholeTest(DataTest):
  @parameterized.parameters((16, 1), (15, 2), (13, 100), (10, 3))
  def test_every_token_of_a_text_to_evaluate_is_scored_once(
    self, length, shard_rows
  ):
    texts = {'train': 'text ' * 30, 'held_out': 'one\n\ntwo three\té' * 10}
    for kind in ('text', 'jsonl'):
      specs = {}
      for name, text in texts.items():
        path = self.folder / f'{name}.{kind}'
        lines = f'{json.dumps({"text": text})}\n' * 2
        path.write_text(text if kind == 'text' else lines)
        specs[name] = f'{kind}:{path}'
      config = self.config(
        specs['train'], eval_source=specs['held_out'], length=length
      )
      with mock.patch.object(pack, 'SHARD_ROWS', shard_rows):
        packed = prepare.prepare(config, cases.BYTES)
      num_documents = 1 + (kind == 'jsonl')
      expected = [*texts['held_out'].encode(), 256] * num_documents
      num_bytes = sum(x < 256 for x in expected)
      batches = [*pipeline.make_eval_batches(packed, config, batch_size=4)]
      found = np.concatenate([x.tokens[x.eligible] for x in batches])
      self.assertEqual(found.tolist(), expected)
      for batch in batches:
        np.testing.assert_array_equal(
          batch.num_tokens, batch.eligible.sum(axis=1)
        )
      self.assertEqual(sum(x.num_bytes.sum() for x in batches), num_bytes)
      counts = packed.metadata['validation']
      self.assertEqual(counts['num_tokens'], len(expected))
      self.assertEqual(counts['num_bytes'], num_bytes)
      self.assertEqual(counts['num_documents'], num_documents)
      self.assertEqual(counts['num_dropped_tokens'], 0)
      # What is given is what the row before ends with.
      last = packed.validation[len(packed.validation) - 1]
      self.assertEqual(last['tokens'].tolist(), expected[-length:])
      # Passages of the text that was not trained on are still found.
      record = overlap.make_record(packed)
      self.assertEqual(record.share(packed), 0.0)


class PairsTest(DataTest):
  def test_a_pair_is_a_row(self):
    pairs = [(f'{i}é:', 'r' * (i % 9 + 1)) for i in range(50)]
    # Small groups: a prompt and its response are then in two of them.
    with (
      mock.patch.object(encoder, 'BATCH_CHARS', 5),
      mock.patch.object(pack, 'SHARD_ROWS', 20),
    ):
      packed = self.prepare(self.write_pairs(pairs))
    self.assertTrue(packed.is_documents)
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
    self.assertRegex(
      logs.output[0], r'documents of train, \d+ are longer \(up to 17 tokens\)'
    )
    for rows in (packed.train, packed.validation):
      for i in range(len(rows)):
        np.testing.assert_array_equal(rows[i]['tokens'][-2:], [ord('r'), 256])

  def test_errors_of_pairs(self):
    long = self.write_pairs([(f'{i}', 'r' * (20 + i)) for i in range(9)])
    with self.assertRaisesRegex(
      InputError,
      'data.length=16 is too short for all .* documents of .*'
      r'shortest has 2\d tokens',
    ):
      self.prepare(long)
    with self.assertRaisesRegex(InputError, 'only one document'):
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


class DocumentsTest(DataTest):
  def write_lines(self, lengths):
    lines = [f'{i:02d}'.ljust(n, 'x') for i, n in enumerate(lengths)]
    text = ''.join(json.dumps({'text': line}) + '\n' for line in lines)
    return 'jsonl:' + self.write('lines.jsonl', text), lines

  def texts(self, packed):
    """The text of each row, up to the separators that fill it."""
    found = []
    for rows in (packed.train, packed.validation):
      for i in range(len(rows)):
        tokens = rows[i]['tokens']
        is_separator = tokens == packed.tokenizer.separator_id
        end = len(tokens) - int(is_separator.sum())
        self.assertFalse(is_separator[:end].any())
        self.assertEqual(rows[i]['num_bytes'], end)
        found.append(bytes(tokens[:end].tolist()).decode())
    return found

  def test_a_document_is_a_row(self):
    source, lines = self.write_lines([i % 14 + 2 for i in range(60)])
    packed = self.prepare(source, crop='document')
    self.assertCountEqual(self.texts(packed), lines)
    self.assertTrue(packed.is_documents)
    self.assertEqual(
      sum(packed.metadata[split]['num_documents'] for split in SPLITS), 60
    )
    # The same file in rows of a stream is another dataset.
    self.assertFalse(self.prepare(source).is_documents)

  @parameterized.parameters(('drop', 30), ('cut', 0))
  def test_long_documents(self, long_documents, num_dropped):
    # With its end, a document of 15 bytes fills the row.
    source, lines = self.write_lines([15, 18] * 30)
    with self.assertLogs('nanodlm', logging.WARNING) as logs:
      packed = self.prepare(
        source, crop='document', long_documents=long_documents
      )
    self.assertIn('19 tokens', logs.output[0])
    kept = lines[::2] if num_dropped else [line[:16] for line in lines]
    self.assertCountEqual(self.texts(packed), kept)
    self.assertEqual(
      sum(packed.metadata[x]['num_dropped_documents'] for x in SPLITS),
      num_dropped,
    )

  def test_the_rest_of_a_long_text_is_no_document(self):
    source, lines = self.write_lines([3, 4])
    long = self.write('long.txt', 'one line of a text\n' * 20)
    with mock.patch.object(base, 'PART_BYTES', 64):  # It is read in slices.
      packed = self.prepare(
        source,
        eval_source=f'text:{long}',
        eval_fraction=0,
        crop='document',
        long_documents='cut',
      )
    self.assertEqual(self.texts(packed), [*lines, 'one line of a te'])

  def test_long_documents_can_be_refused(self):
    source, _ = self.write_lines([9] * 20 + [30])
    with self.assertRaisesRegex(InputError, "data.length=16 .* 'cut'"):
      self.prepare(source, crop='document', long_documents='refuse')
    self.assertEmpty(self.left_in_data_dir())

  def test_what_is_scored_of_a_document(self):
    source, _ = self.write_lines([3, 18] * 10)
    for padding, num_scored in (('eos', 16), ('masked', 4)):
      config = self.config(
        source, crop='document', long_documents='cut', padding=padding
      )
      packed = prepare.prepare(config, cases.BYTES)
      batches = pipeline.make_eval_batches(packed, config, batch_size=1)
      for batch in batches:
        is_cut = batch.num_bytes[0] == 16
        self.assertEqual(batch.num_tokens[0], 16 if is_cut else 4)
        self.assertEqual(batch.eligible.sum(), 16 if is_cut else num_scored)

  def test_a_single_text_cannot_be_divided(self):
    source = 'text:' + self.write('a.txt', 'x' * 100)
    with self.assertRaisesRegex(InputError, 'only one document'):
      self.prepare(source, crop='document')


if __name__ == '__main__':
  absltest.main()
