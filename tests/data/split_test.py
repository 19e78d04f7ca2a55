"""Tests of nanodlm.data.split: what is held out."""

import json
import logging
import random

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm.data import prepare
from nanodlm.data.packed import SPLITS
from nanodlm.data.split import choose
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.types import InputError
from tests.data import cases
from tests.data.cases import DataTest, REPO, stream

SHAKESPEARE = REPO.parent / 'shared' / 'data' / 'tinyshakespeare.txt'


class ChooseTest(DataTest):
  @parameterized.parameters(0.01, 0.1, 0.5, 0.9)
  def test_share_of_the_bytes_is_as_asked(self, eval_fraction):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 1000, 3000)
    hashes = rng.integers(0, 1 << 63, 3000, np.uint64)
    chosen = choose(hashes, sizes, eval_fraction)
    self.assertAlmostEqual(
      sizes[chosen].sum() / sizes.sum(), eval_fraction, delta=1e-3
    )
    # Which documents are chosen does not follow their order.
    self.assertGreater(
      np.abs(np.diff(chosen.astype(int))).sum(),
      3000 * eval_fraction * (1 - eval_fraction),
    )

  @parameterized.parameters((1, 1, 0.1), (1, 1000, 0.1), (1000, 1, 0.9))
  def test_two_documents_are_one_for_each_side(self, a, b, eval_fraction):
    for hashes in ([1, 2], [2, 1]):
      chosen = choose(
        np.array(hashes, np.uint64), np.array([a, b]), eval_fraction
      )
      self.assertEqual(chosen.sum(), 1)

  def test_alternatives_that_share_a_text_stay_together(self):
    # Groups a-b, b-a and b-c are one, and so is each copy of d-e.
    texts = 'abdefgbadebchijk'
    hashes = np.array([ord(x) for x in texts], np.uint64)
    for fraction in (0.2, 0.4, 0.6, 0.8):
      chosen = choose(hashes, np.ones(len(texts), int), fraction, 2)
      held_out, left = (
        {x for x, is_held_out in zip(texts, chosen) if is_held_out == side}
        for side in (True, False)
      )
      self.assertEmpty(held_out & left)
      self.assertIn({'a', 'b', 'c'} & held_out, (set(), {'a', 'b', 'c'}))
      self.assertTrue(held_out and left)

  def test_uneven_split_is_logged(self):
    self.write('a.txt', 'a' * 500)
    self.write('b.txt', 'b' * 500)
    with self.assertLogs('nanodlm', logging.WARNING) as logs:
      self.prepare()
    self.assertIn('validation has 0.5 of the bytes', logs.output[0])

  def test_copies_of_a_document_stay_on_one_side(self):
    for i in range(60):
      self.write(f'{i:04d}.txt', f'text number {i % 10} ' * 5)
    packed = self.prepare(eval_fraction=0.2)
    found = {}
    for split in SPLITS:
      tokens = stream(getattr(packed, split))
      found[split] = {
        packed.tokenizer.decode(part)
        for part in np.split(tokens, np.flatnonzero(tokens == 256) + 1)[1:-1]
      }
    self.assertLen(found['validation'], 2)
    self.assertEmpty(found['train'] & found['validation'])
    self.assertEqual(packed.metadata['validation']['num_documents'], 12)

  def test_one_document_is_cut_near_its_end_at_a_character(self):
    text = 'aé漢😀' * 100
    self.write('a.txt', text)
    self.write('empty.txt', '')
    packed = self.prepare(length=1, eval_fraction=0.1)
    train = packed.tokenizer.decode(stream(packed.train)[:-1])
    validation = packed.tokenizer.decode(stream(packed.validation)[:-1])
    self.assertEqual((train, validation), (text[:360], text[360:]))

  def test_nanogpts_split_of_tiny_shakespeare(self):
    if not SHAKESPEARE.exists():
      self.skipTest('no shared data')
    packed = self.prepare(f'text:{SHAKESPEARE}', length=256)
    text = SHAKESPEARE.read_bytes()
    counts = packed.metadata
    self.assertEqual(
      counts['train']['num_tokens'] + counts['train']['num_dropped_tokens'],
      1003854 + 1,
    )
    self.assertEqual(
      counts['validation']['num_tokens']
      + counts['validation']['num_dropped_tokens'],
      111540 + 1,
    )
    self.assertEqual(
      bytes(packed.validation[0]['tokens'].tolist()),
      text[1003854 : 1003854 + 256],
    )

  def test_only_copies_of_one_text(self):
    self.write('a.txt', 'same' * 50)
    self.write('b.txt', 'same' * 50)
    with self.assertRaisesRegex(InputError, 'all the same text'):
      self.prepare()


class HeldOutTest(DataTest):
  def test_tokens_of_documents(self):
    packed = self.prepare(self.write_jsonl(), eval_fraction=0, eval_tokens=2000)
    counts = packed.metadata['validation']
    self.assertBetween(
      counts['num_tokens'] + counts['num_dropped_tokens'], 1900, 2100
    )
    train = packed.tokenizer.decode(stream(packed.train)).split('\n\n')
    held_out = packed.tokenizer.decode(stream(packed.validation)).split('\n\n')
    self.assertEmpty(set(train) & set(held_out[:-1]))

  def test_last_characters_of_one_text_are_test_and_before_them_validation(
    self,
  ):
    text = ''.join(
      random.Random(0).choices('abcdefghijklmnopqrstuvwxyz ', k=5000)
    )
    path = self.folder / 'text8'
    path.write_text(text)
    sizes = dict(eval_fraction=0, eval_tokens=500, length=10)
    packed = self.prepare(f'text:{path}', test_tokens=500, **sizes)
    decode = packed.tokenizer.decode
    self.assertEqual(decode(stream(packed.train)), text[:4000])
    self.assertEqual(decode(stream(packed.validation)), text[4000:4500])
    test = self.prepare(f'text:{path}', **sizes)
    self.assertEqual(decode(stream(test.validation)), text[4500:])

  @parameterized.parameters('text', 'jsonl', 'tokens')
  def test_eval_source_is_evaluated_as_a_whole_and_the_other_trained_on(
    self, kind
  ):
    texts = {'train': 'one two ' * 30, 'validation': 'three ' * 40}
    specs = {}
    for name, text in texts.items():
      if kind == 'tokens':
        specs[name] = self.write_tokens([[*text.encode()]], f'{name}.parquet')
        continue
      path = self.folder / f'{name}.{kind}'
      path.write_text(text if kind == 'text' else json.dumps({'text': text}))
      specs[name] = f'{kind}:{path}'
    packed = self.prepare(
      specs['train'], eval_source=specs['validation'], eval_fraction=0, length=1
    )
    for name, text in texts.items():
      ids = stream(getattr(packed, name))
      self.assertEqual(bytes(ids[ids < 256].tolist()), text.encode())
    counts = packed.metadata
    self.assertEqual(
      counts['validation']['num_bytes'], len(texts['validation'])
    )
    # Another text to evaluate on is another dataset.
    other = self.prepare(
      specs['train'], eval_source=specs['train'], eval_fraction=0, length=1
    )
    self.assertNotEqual(other.fingerprint, packed.fingerprint)
    self.assertEqual(other.folders[0], packed.folders[0])
    self.assertLen(other.validation, len(packed.train))

  def test_another_text_is_evaluated_next_to_test_tokens(self):
    path = self.folder / 'other.txt'
    path.write_text('three ' * 40)
    config = self.config(
      eval_source=f'text:{path}', eval_tokens=5, test_tokens=5, eval_fraction=0
    )
    packed = prepare.prepare_whole(config, BytesTokenizer())
    self.assertEqual(packed.metadata['validation']['num_bytes'], 240)

  @parameterized.parameters(
    (
      dict(eval_fraction=0, eval_tokens=10, test_tokens=5),
      'data.test_tokens=5 .*has several documents',
    ),
    (
      dict(eval_tokens=5, test_tokens=5, eval_fraction=0, eval_source='OWN'),
      'data.test_tokens=5 must be 0 with data.eval_source',
    ),
    (
      dict(eval_fraction=0, eval_tokens=10**6),
      r'data.eval_tokens=1000000 .*leaves nothing to train on: .* \d+ tokens',
    ),
  )
  def test_mistakes(self, changes, message):
    source = self.write_jsonl()
    if 'eval_source' in changes:
      changes = {**changes, 'eval_source': source}
    with self.assertRaisesRegex(InputError, message):
      self.prepare(source, **changes)
    self.assertEmpty(list((self.folder / 'prepared').glob('*incomplete*')))

  def test_mistakes_of_one_text_and_of_a_tokenizer_to_be_trained(self):
    path = self.folder / 'a.txt'
    path.write_text('x' * 99)
    with self.assertRaisesRegex(
      InputError, 'data.eval_tokens=60 with data.test_tokens=60 leaves nothing'
    ):
      self.prepare(
        f'text:{path}', eval_fraction=0, eval_tokens=60, test_tokens=60
      )
    trained = cases.SENTENCEPIECE
    with self.assertRaisesRegex(
      InputError, 'data.eval_tokens=9 cannot be counted'
    ):
      self.prepare(f'text:{path}', trained, eval_fraction=0, eval_tokens=9)
    with self.assertRaisesRegex(
      InputError, 'trained on token ids.*tokenizer.name'
    ):
      self.prepare(self.write_tokens([[1]]), trained)


if __name__ == '__main__':
  absltest.main()
