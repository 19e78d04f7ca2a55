"""Tests of nanodlm.data.overlap: how much of a text is in another."""

import itertools
import json
from unittest import mock

from absl.testing import absltest
import numpy as np

from nanodlm.data import overlap
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.types import InputError
from tests.data import cases

SEPARATOR = 256


class Packed:
  """The attributes of PackedData that are read, for ids in memory."""

  weights, held_out, is_chat = (1.0,), (), False
  tokenizer = BytesTokenizer.make('bytes', '')

  def __init__(self, train, validation=(), length=64, is_documents=False):
    self.length, self.is_documents = length, is_documents
    cut = lambda ids: [
      {'tokens': ids[i : i + length]}
      for i in range(0, len(ids) - length + 1, length)
    ]
    self.train, self.validation = cut(train), cut(validation)
    self.metadata = {
      split: {'num_bytes': n, 'num_tokens': n, 'num_rows': max(n // length, 1)}
      for split, n in (('train', len(train)), ('validation', len(validation)))
    }


class OverlapTest(cases.DataTest):
  def setUp(self):
    super().setUp()
    self.rng = np.random.default_rng(0)
    self.text = self.draw(40_000)

  def draw(self, size):
    return self.rng.integers(0, 256, size)

  def share(self, train, validation, **kwargs):
    packed = Packed(train, validation, **kwargs)
    return overlap.make_record(packed).share(packed)

  def test_a_part_of_one_text(self):
    other = self.draw(8000)
    self.assertEqual(self.share(self.text, other), 0)
    # From any place on, whatever the length of a row.
    for length in (16, 64, 256):
      found = self.text[1001:9001]
      self.assertEqual(self.share(self.text, found, length=length), 1)
      half = np.concatenate([other[: 20 * 256], self.text[: 20 * 256]])
      share = self.share(self.text, half, length=length)
      self.assertAlmostEqual(share, 0.5, delta=0.01)
    # Passages are longer than a few words.
    words = [self.text[i : i + 30] for i in self.rng.integers(0, 39_000, 300)]
    self.assertEqual(self.share(self.text, np.concatenate(words)), 0)

  def test_documents_in_another_order(self):
    draw = lambda: np.append(self.draw(self.rng.integers(5, 150)), SEPARATOR)
    documents, others = ([draw() for _ in range(n)] for n in (500, 100))
    chosen = [documents[i] for i in self.rng.permutation(500)[:100]]
    train = np.concatenate(documents)
    share = lambda texts: self.share(train, np.concatenate(texts))
    self.assertEqual(share(others), 0)
    self.assertGreater(share(chosen), 0.9)
    both = [*itertools.chain(*zip(chosen, others))]
    sizes = [sum(map(len, texts)) for texts in (chosen, both)]
    self.assertAlmostEqual(share(both), sizes[0] / sizes[1], delta=0.1)

  def test_rows_that_are_documents_are_compared_as_a_whole(self):
    documents = np.full([60, 128], SEPARATOR)
    documents[:, :100] = self.draw(100)  # All begin with the same 80 bytes.
    documents[:, 80:100] = self.draw((60, 20))
    seen, unseen = documents[:40].ravel(), documents[40:].ravel()
    share = lambda texts, has_documents: self.share(
      seen, texts, length=128, is_documents=has_documents
    )
    self.assertEqual(share(unseen, True), 0)
    self.assertGreater(share(unseen, False), 0.2)
    half = share(documents[30:50].ravel(), True)
    self.assertAlmostEqual(half, 1 / 2)

  def test_documents_that_were_cut(self):
    # Every other one fills its row, without a separator.
    documents = np.full([40, 64], SEPARATOR)
    documents[::2] = self.draw((20, 64))
    documents[1::2, :40] = self.draw((20, 40))
    seen, unseen = documents[:30], documents[30:]
    share = lambda texts: self.share(
      seen.ravel(), texts.ravel(), is_documents=True
    )
    self.assertEqual(share(seen[self.rng.permutation(30)]), 1)
    self.assertEqual(share(unseen), 0)

  def test_documents_that_fill_a_row_weigh_as_much(self):
    documents = self.draw((20, 64))
    documents[10:, 63] = SEPARATOR
    share = self.share(
      documents[:10].ravel(), documents.ravel(), is_documents=True
    )
    self.assertAlmostEqual(share, 1 / 2)

  def test_a_mixture(self):
    # Rows have the length of a passage: most short documents are whole in a
    # row, but one row in 64 has a whole passage of a long text.
    short = self.draw((300, 16))
    short[:, 15] = SEPARATOR
    packed = Packed(self.text)
    parts = [Packed((), x) for x in (self.text[7:], short.ravel())]
    for share in (0.5, 0.2):
      packed.held_out = tuple(zip((share, 1 - share), parts))
      found = overlap.make_record(packed).share(packed)
      self.assertAlmostEqual(found, share, delta=0.01)

  def test_a_mixture_of_documents(self):
    # Documents have 10 or 60 tokens with their ends, and rows the same length.
    parts = []
    for size in 10, 60:
      rows = np.full((200, 64), SEPARATOR)
      rows[:, : size - 1] = self.draw((200, size - 1))
      parts.append(Packed((), rows.ravel(), is_documents=True))
    short = np.concatenate([row['tokens'] for row in parts[0].validation])
    packed = Packed(short, is_documents=True)
    packed.held_out = ((0.5, parts[0]), (0.5, parts[1]))
    found = overlap.make_record(packed).share(packed)
    self.assertAlmostEqual(found, 10 / 70, delta=1e-6)

  def test_another_text_next_to_a_mixture(self):
    for name in 'abc':
      texts = [
        bytes((97 + self.draw(80) % 26).tolist()).decode() for _ in range(40)
      ]
      lines = (json.dumps({'text': text}) + '\n' for text in texts)
      self.write(f'{name}.jsonl', ''.join(lines))
    mixture = '+'.join(f'0.5*jsonl:{self.folder}/{name}.jsonl' for name in 'ab')
    spec = lambda name: f'jsonl:{self.folder}/{name}.jsonl'
    for train, held_out, share in (
      (f'mix:{mixture}', spec('b'), 1),
      (f'mix:{mixture}', spec('c'), 0),
      (spec('a'), f'mix:{mixture}', 0.5),
      (f'mix:{mixture}', f'mix:0.2*{spec("b")}+0.8*{spec("c")}', 0.2),
    ):
      packed = self.prepare(train, eval_source=held_out, eval_fraction=0)
      found = overlap.make_record(packed).share(packed)
      self.assertAlmostEqual(found, share, delta=0.02)

  def test_few_hashes_and_few_rows_give_an_estimate(self):
    half = np.concatenate([self.text[:20_000], self.draw(20_000)])
    packed = Packed(self.text, half, length=32)
    with (
      mock.patch.object(overlap, 'MAX_HASHES', 5000),
      mock.patch.object(overlap, '_MAX_ROWS', 625),
      mock.patch.object(overlap, '_BLOCK_TOKENS', 512),
    ):
      record = overlap.make_record(packed)
    self.assertAlmostEqual(record.coverage, 0.5, delta=0.02)
    self.assertBetween(len(record.hashes), 1, 5000)
    self.assertGreater(record.num_bits, 0)
    self.assertAlmostEqual(record.share(packed), 0.5, delta=0.1)
    short = Packed(self.text, self.text[:32], length=32)
    self.assertIn(record.share(short), (None, 0, 1))

  def test_what_is_remembered_of_earlier_runs(self):
    first, second = self.draw(5000), self.draw(5000)
    folders = [str(self.folder), f'{self.folder}/b', f'{self.folder}/c']
    for path in folders[1:]:
      (self.folder / path).mkdir()
    self.assertEqual(overlap.remember(folders[0], Packed(first)), None)
    overlap.remember(folders[1], Packed(second), folders[0])
    overlap.remember(folders[2], Packed(second), f'{self.folder}/gone')
    # It is written once.
    overlap.remember(folders[0], Packed(second))
    for folder, share in zip(folders, (1, 1, 0)):
      record = overlap.load(folder)
      self.assertEqual(record.share(Packed(first, first)), share)
      self.assertEqual(bool(record.unknown), folder == folders[2])
      self.assertEqual('gone' in record.unknown, folder == folders[2])
    unknown = overlap.load(f'{self.folder}/gone')
    self.assertIsNone(unknown.share(Packed(first, first)))
    path = self.folder / 'trained_on.npz'
    path.write_bytes(path.read_bytes()[:100])
    with self.assertRaisesRegex(InputError, 'trained_on.npz'):
      overlap.load(folders[0])


if __name__ == '__main__':
  absltest.main()
