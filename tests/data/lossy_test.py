"""Prepared text of tokenizers that change it: the bytes are the text's."""

import json
import pathlib
import random
import shutil
from unittest import mock

from absl.testing import absltest
import numpy as np

from nanodlm.data import config, pipeline
from nanodlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from nanodlm.types import InputError
from tests import foreign_tokenizers as foreign
from tests.data.cases import DataTest

TEXT = (
  'the \uff21\ufb01x dog\n\n  and \u6f22\u5b57 caf\u00e9 \u20ac\u20ac fox\n'
)


class LossyTest(DataTest):
  def given(self, **options):
    path = foreign.path_of_sentencepiece(self.folder, **options)
    return config.TokenizerConfig('sentencepiece', path, 0)

  def test_every_byte_of_a_text_is_counted_once(self):
    text = TEXT * 30
    self.write('a.txt', text)
    tokenizer = self.given(vocab_size=80)
    with self.assertLogs('nanodlm', 'WARNING') as logs:
      packed = self.prepare(tokenizer=tokenizer, length=1)
    counts = [packed.metadata[name] for name in ('train', 'validation')]
    num_bytes = sum(one['num_bytes'] for one in counts)
    self.assertEqual(num_bytes, len(text.encode()))
    # In a line: A and fi in other forms, both Chinese characters, an accented
    # letter, both euros and three line breaks, which become spaces.
    lost = 30 * (3 + 3 + 6 + 2 + 6 + 3)
    manifest = json.loads(
      (pathlib.Path(packed.folders[0]) / 'manifest.json').read_text()
    )
    self.assertEqual(manifest['num_bytes'], num_bytes)
    # The spaces at the ends of both splits are dropped.
    self.assertBetween(manifest['num_lost_bytes'], lost, lost + 2)
    self.assertIn(f'{manifest["num_lost_bytes"]:,} of', logs.output[0])

  def test_what_a_prompt_loses_is_not_of_the_response(self):
    pairs = [('\n' * 50, f'the fox and dog {i}') for i in range(30)]
    packed = self.prepare(
      self.write_pairs(pairs), tokenizer=self.given(vocab_size=80), length=32
    )
    for row in (packed.train[i] for i in range(len(packed.train))):
      self.assertBetween(row['num_bytes'], 16, 18)

  def test_bytes_of_crops_and_of_what_is_scored(self):
    words = random.Random(0).choices(TEXT.split(), k=400)
    self.write('a.txt', '  '.join(words))
    tokenizer = self.given(vocab_size=80)
    packed = self.prepare(tokenizer=tokenizer, length=16)
    rows = [packed.train[i] for i in range(len(packed.train))]
    stream = np.concatenate([row['tokens'] for row in rows])
    sizes = np.concatenate([row['token_bytes'] for row in rows])
    for row in rows:
      self.assertEqual(row['num_bytes'], row['token_bytes'].sum())
    windows = np.lib.stride_tricks.sliding_window_view(stream, 16)
    for changes in ({'clean_prefix_rate': 1.0}, {'crop': 'random'}):
      data_config = self.config(length=16, **changes)
      batches = pipeline.make_train_iterator(
        packed, data_config, seed=0, batch_size=8
      )
      batch = next(batches)
      for tokens, scored, num_bytes in zip(
        batch.tokens, batch.eligible, batch.num_bytes
      ):
        (place,) = np.flatnonzero((windows == tokens).all(1))
        self.assertEqual(num_bytes, sizes[place : place + 16][scored].sum())

  def test_data_of_an_earlier_version_is_not_used(self):
    self.write('a.txt', ''.join(foreign.CHINESE) + 'a b')
    tokenizer = config.TokenizerConfig('sentencepiece', '', 268)
    cls = SentencePieceTokenizer
    with mock.patch.object(cls, 'revision', 0):
      packed = self.prepare(tokenizer=tokenizer)
    with self.assertRaisesRegex(InputError, packed.folders[0]):
      self.prepare(tokenizer=tokenizer)
    shutil.rmtree(packed.folders[0])
    packed = self.prepare(tokenizer=tokenizer)
    self.assertEqual(packed.metadata['tokenizer_revision'], 1)
    self.assertEqual(self.prepare(tokenizer=tokenizer).folders, packed.folders)

  def test_a_response_gains_no_space(self):
    pairs = [('the fox', f'dog {i}') for i in range(20)]
    path = self.folder / 'a.jsonl'
    path.write_text(
      ''.join(
        json.dumps({'prompt': prompt, 'response': response}) + '\n'
        for prompt, response in pairs
      )
    )
    options = dict(
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      vocab_size=400,
    )
    packed = self.prepare(f'pairs:{path}', self.given(**options))
    self.assertTrue(packed.tokenizer.adds_space)
    for row in (packed.train[i] for i in range(len(packed.train))):
      text = packed.tokenizer.decode(row['tokens']).partition('\n\n')[0]
      prompt, response = pairs[int(text.removeprefix('the foxdog '))]
      self.assertEqual(text, prompt + response)
      self.assertEqual(row['num_bytes'], len(response))


if __name__ == '__main__':
  absltest.main()
