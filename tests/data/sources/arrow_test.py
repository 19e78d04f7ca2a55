"""Tests of Parquet files and Hugging Face datasets."""

import importlib.util
import json
import os
import sys
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanodlm.data import encoder, sources
from nanodlm.data.packed import SPLITS
from nanodlm.data.sources import arrow, base
from nanodlm.types import InputError
from tests import foreign_tokenizers
from tests.data.cases import DataTest, stream


class TokenRowsTest(DataTest):
  @parameterized.parameters(
    pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16(), 24)
  )
  def test_rows_are_one_stream_cut_into_rows(self, kind):
    rows = [[(24 * i + j) % 257 for j in range(24)] for i in range(20)]
    packed = self.prepare(
      self.write_tokens(rows, kind=kind),
      eval_fraction=0,
      eval_tokens=70,
      test_tokens=20,
    )
    tokens = np.concatenate(rows)  # 480: 30 rows of 16
    np.testing.assert_array_equal(stream(packed.train), tokens[: 16 * 24])
    np.testing.assert_array_equal(
      stream(packed.validation), tokens[16 * 24 : 16 * 28]
    )
    self.assertEqual(packed.metadata['train']['num_documents'], 1)
    self.assertEqual(packed.train[0]['num_bytes'], 16)

  def test_share_of_the_rows(self):
    packed = self.prepare(self.write_tokens([[7] * 16] * 20))
    self.assertEqual((len(packed.train), len(packed.validation)), (18, 2))

  @parameterized.parameters(
    (
      [[1]] * 5 + [[2, 257]],
      r'row 5 of .*a\.parquet holds the id 257, but the '
      "ids of tokenizer.name='bytes' are 0 to 256",
    ),
    ([[1], [-1]], 'row 1 of .* holds the id -1'),
    ([[1], None], "row 1 of .* has nothing in field 'tokens'"),
    (
      [[1], [], [2, 3, None]],
      "row 2 of .* has nothing in a place of field 'tok",
    ),
  )
  def test_bad_rows(self, rows, message):
    with self.assertRaisesRegex(InputError, 'data.source=.*' + message):
      self.prepare(self.write_tokens(rows))

  def test_published_ids(self):
    # The mask is in the middle, and changes places with the last id.
    tokenizer = foreign_tokenizers.make_word_piece(self.folder)
    mask, last = tokenizer.mask_place, tokenizer.mask_id
    packed = self.prepare(self.write_tokens([[5, last] * 8] * 20), tokenizer)
    np.testing.assert_array_equal(packed.train[0]['tokens'], [5, mask] * 8)
    with self.assertRaisesRegex(InputError, f'the id {mask}, .* is the mask'):
      self.prepare(self.write_tokens([[5, mask] * 8] * 20), tokenizer)

  def test_bad_files(self):
    for rows in ([], [[]]):
      with self.assertRaisesRegex(InputError, 'contains no token ids'):
        self.prepare(self.write_tokens(rows))
    with self.assertRaisesRegex(InputError, 'data.length=16 is longer than'):
      self.prepare(self.write_tokens([[1] * 17]))
    source = self.write_tokens([[1]])
    with self.assertRaisesRegex(
      InputError, r"has the fields \['tokens'\], not 'ids'"
    ):
      self.prepare(source + ':ids')
    with self.assertRaisesRegex(InputError, "not 'text'"):
      self.prepare(source.replace('tokens:', 'parquet:'))
    with self.assertRaisesRegex(InputError, 'holds list<.*>, not text'):
      self.prepare(source.replace('tokens:', 'parquet:') + ':tokens')
    (self.folder / 'a.parquet').write_text('no parquet')
    with self.assertRaisesRegex(
      InputError, r'a\.parquet cannot be read as Parquet'
    ):
      self.prepare(source)

  def test_kinds_of_text_in_parquet(self):
    path = f'{self.folder}/a.parquet'
    texts = pa.array(['one', 'two', 'one'])
    read = lambda: [
      ''.join(document.open())
      for document in base.documents(
        sources.make_source(f'parquet:{path}'), 'train'
      )
    ]
    kinds = (
      pa.large_string(),
      pa.string_view(),
      pa.dictionary(pa.int8(), pa.string()),
    )
    for kind in kinds:
      pq.write_table(pa.table({'text': texts.cast(kind)}), path)
      self.assertEqual(read(), ['one', 'two', 'one'])
    ends = np.array([0, 1, 2], np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b'a\xff')]
    bad = pa.Array.from_buffers(pa.string(), 2, buffers)
    pq.write_table(pa.table({'text': bad}), path)
    with self.assertRaisesRegex(InputError, "not UTF-8 text in field 'text'"):
      read()

  def test_text_in_parquet(self):
    texts = [f'text number {i}' for i in range(60)]
    pq.write_table(
      pa.table({'body': texts}), self.folder / 'a.parquet', row_group_size=7
    )
    packed = self.prepare(f'parquet:{self.folder}/*.parquet:body', length=4)
    jsonl = self.folder / 'same.jsonl'
    jsonl.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    same = self.prepare(f'jsonl:{jsonl}', length=4)
    for split in SPLITS:
      np.testing.assert_array_equal(
        stream(getattr(packed, split)), stream(getattr(same, split))
      )


class HuggingFaceTest(DataTest):
  def setUp(self):
    super().setUp()
    if not importlib.util.find_spec('datasets'):
      self.skipTest('no datasets')
    import datasets

    self.enterContext(
      mock.patch.object(
        datasets.config, 'HF_DATASETS_CACHE', self.folder / 'cache'
      )
    )
    self.data = self.folder / 'set'
    self.data.mkdir()

  def write(self, split, texts):
    pq.write_table(
      pa.table(
        {'text': texts, 'tokens': [list(t.encode()) + [256] for t in texts]}
      ),
      self.data / f'{split}-00000-of-00001.parquet',
    )

  def test_text_tokens_and_workers(self):
    texts = [f'text number {i}' for i in range(100)]
    self.write('train', texts)
    jsonl = self.folder / 'same.jsonl'
    jsonl.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    same = self.prepare(f'jsonl:{jsonl}')
    with mock.patch.object(base, 'PART_ROWS', 30):
      packed = self.prepare(f'hf:{self.data}', engine=encoder.Workers(1))
      rows = self.prepare(f'hf_tokens:{self.data}:tokens')
    for split in SPLITS:
      np.testing.assert_array_equal(
        stream(getattr(packed, split)), stream(getattr(same, split))
      )
    everything = ''.join(text + '\n\n' for text in texts)
    decoded = ''.join(
      rows.tokenizer.decode(stream(getattr(rows, split))) for split in SPLITS
    )
    self.assertStartsWith(everything, decoded)

  def test_its_own_validation_split(self):
    self.write('train', ['to train on'] * 9)
    self.write('validation', ['held out'] * 9)
    packed = self.prepare(f'hf:{self.data}:default:text', length=9)
    self.assertEqual(
      packed.tokenizer.decode(stream(packed.validation)), 'held out\n\n' * 9
    )

  def test_mistakes(self):
    self.write('train', ['text'])
    with self.assertRaisesRegex(InputError, "has the features .*, not 'body'"):
      self.prepare(f'hf:{self.data}:body')
    with self.assertRaisesRegex(InputError, 'cannot load .*nosuch'):
      self.prepare(f'hf:{self.data}:nosuch:text')
    import huggingface_hub

    with (
      mock.patch.object(arrow, 'is_reachable', return_value=False),
      mock.patch.dict(os.environ),
      mock.patch.object(huggingface_hub.constants, 'HF_HUB_OFFLINE', True),
    ):
      with self.assertRaisesRegex(InputError, 'does not answer.*give a folder'):
        self.prepare('hf:nobody/nothing-of-this-name')
      # Read when the package is imported, which has happened here.
      self.assertEqual(os.environ['HF_HUB_OFFLINE'], '1')


class HuggingFaceAbsentTest(absltest.TestCase):
  def test_is_an_extra(self):
    with (
      mock.patch.dict(sys.modules, {'datasets': None}),
      mock.patch.dict(os.environ),
      mock.patch.object(arrow, 'is_reachable', return_value=False),
    ):
      with self.assertRaisesRegex(InputError, r"pip install -e '\.\[hf\]'"):
        sources.make_source('hf:x/y')
    with self.assertRaisesRegex(InputError, 'is not one of'):
      sources.make_source('hf:a:b:c:d')


if __name__ == '__main__':
  absltest.main()
