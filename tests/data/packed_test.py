"""Tests of nanodlm.data.packed: rows read together, mixtures."""

import json
import pathlib
import random
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm.data import pack, pipeline, prepare, sources
from nanodlm.data import packed as packed_data
from nanodlm.types import InputError
from tests.data import cases
from tests.data.cases import BYTES, DataTest


class ReadTest(DataTest):
  def setUp(self):
    super().setUp()
    (self.folder / 'a.txt').write_text('abcdefghijklmnop' * 40)
    config = self.config(f'text:{self.folder}/a.txt')
    with mock.patch.object(pack, 'SHARD_ROWS', 16):
      self.packed = prepare.prepare(config, BYTES)

  def test_rows_read_together_are_those_read_one_by_one(self):
    rows = self.packed.train
    first = rows.files[0][1]
    self.assertGreater(len(rows.files), 1)
    together = rows.read(first - 2, first + 2)
    self.assertLen(together, 4)
    for i, row in enumerate(together, first - 2):
      np.testing.assert_equal(row, rows[i])
    self.assertEqual(rows.read(3, 3), [])

  def test_a_damaged_row_among_them_names_its_file(self):
    path, _ = self.packed.train.files[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    packed = packed_data.open_packed(path.parents[2], BYTES)
    with self.assertRaisesRegex(InputError, path.name):
      packed.train.read(0, len(packed.train))


class MixtureTest(DataTest):
  def setUp(self):
    super().setUp()
    for letter, number in (('a', 40), ('b', 160)):
      (self.folder / f'{letter}.txt').write_text(letter * 16 * number)
    self.spec = (
      f'mix:0.75*text:{self.folder}/a*.txt+0.25*text:{self.folder}/b.txt'
    )
    self.settings = dict(eval_fraction=0.2)

  def letters(self, batch):
    return ''.join(chr(row[0]) for row in batch.tokens)

  def test_shares_order_and_resuming(self):
    config = self.config(self.spec, **self.settings)
    packed = prepare.prepare(config, BYTES)
    self.assertEqual(packed.weights, (0.75, 0.25))
    self.assertLen(
      {
        path
        for folder in packed.folders
        for path in pathlib.Path(folder).glob('manifest.json')
      },
      2,
    )
    make = lambda **k: pipeline.make_train_iterator(
      packed, config, seed=3, batch_size=40, **k
    )
    batches = [next(it) for it in [make()] for _ in range(8)]
    for batch in batches:  # 240 of a's 32 rows, 80 of b's 128
      self.assertEqual(self.letters(batch).count('a'), 30)
    again = make(start_step=5, rows=slice(10, 30))
    for batch in batches[5:]:
      np.testing.assert_array_equal(next(again).tokens, batch.tokens[10:30])

  def test_what_is_held_out_has_the_same_shares(self):
    config = self.config(self.spec, **self.settings)
    packed = prepare.prepare(config, BYTES)
    # 8 rows of a, 32 of b: 3 to 1 while both last.
    self.assertLen(packed.validation, 10)
    for size, share in ((4, 3), (8, 6)):
      batch = next(
        iter(pipeline.make_eval_batches(packed, config, batch_size=size))
      )
      self.assertEqual(self.letters(batch).count('a'), share)

  @parameterized.parameters(
    (0.2, 0.75, 'rows evaluated on: 10: 8 of 8 of .*0.75.*, 2 of 32 of '),
    (0.9, 0.99, 'rows evaluated on: 36: 36 of 36 of .*, 0 of 144 of '),
    (0.2, 0.2, None),
  )  # 40 rows, 8 of them of a
  def test_few_rows_are_told(self, eval_fraction, weight, message):
    spec = (
      f'mix:{weight}*text:{self.folder}/a.txt'
      f'+{1 - weight}*text:{self.folder}/b.txt'
    )
    with self.assertLogs('nanodlm') as logs:
      self.prepare(spec, eval_fraction=eval_fraction)
    warnings = [
      record.getMessage()
      for record in logs.records
      if record.levelname == 'WARNING'
    ]
    self.assertLen(warnings, 0 if message is None else 1)
    for warning in warnings:
      self.assertRegex(warning, message)

  def test_a_document_is_held_out_wherever_it_occurs(self):
    rng = random.Random(0)
    draw = lambda: ''.join(rng.choices('abcdefgh', k=rng.randrange(40, 90)))
    texts = [draw() for _ in range(300)]
    lines = [json.dumps({'text': text}) for text in texts]
    (self.folder / 'a.jsonl').write_text('\n'.join(lines))
    (self.folder / 'good.jsonl').write_text('\n'.join(lines[::15]))
    everything = f'jsonl:{self.folder}/a.jsonl'
    spec = f'mix:0.5*{everything}+0.5*jsonl:{self.folder}/good.jsonl'
    for changes in (
      dict(eval_fraction=0.3),
      dict(eval_fraction=0, eval_tokens=900),
    ):
      parts = prepare.prepare_parts(self.config(spec, **changes), BYTES)
      rows = {
        split: [
          ''.join(map(chr, rows[i]['tokens']))
          for part in parts.values()
          for rows in [getattr(part, split)]
          for i in range(len(rows))
        ]
        for split in ('train', 'validation')
      }
      train = ''.join(rows['train'])
      self.assertEqual(sum(row in train for row in rows['validation']), 0)
      # Nothing is lost, except ends that are shorter than a row.
      self.assertBetween(
        len(rows['train']) + len(rows['validation']),
        (sum(map(len, texts + texts[::15])) + 320) // 16 - 4,
        (sum(map(len, texts + texts[::15])) + 320) // 16,
      )
      # A source alone is divided as before.
      alone = self.prepare(everything, **changes)
      mixed = self.prepare(spec, **changes)
      self.assertNotEqual(alone.fingerprint, mixed.fingerprint)
    # All of one source is held out of the other.
    (self.folder / 'one.jsonl').write_text('\n'.join(lines[:2]))
    spec = f'mix:0.5*{everything}+0.5*jsonl:{self.folder}/one.jsonl'
    with self.assertRaisesRegex(InputError, 'one.jsonl.*held out'):
      self.prepare(spec, eval_fraction=0.9, length=4)

  def test_random_windows_stay_in_their_source(self):
    config = self.config(self.spec, **{**self.settings, 'crop': 'random'})
    packed = prepare.prepare(config, BYTES)
    batches = pipeline.make_train_iterator(
      packed, config, seed=0, batch_size=64
    )
    for _ in range(5):
      for row in next(batches).tokens:
        self.assertLen(set(row.tolist()) - {256}, 1)

  def test_each_source_is_prepared_once_and_alone(self):
    config = self.config(self.spec, **self.settings)
    packed = prepare.prepare(config, BYTES)
    b = self.config(f'text:{self.folder}/b.txt', **self.settings)
    with (
      mock.patch.object(prepare, '_build', side_effect=AssertionError),
      mock.patch.object(
        prepare, '_prepare_one', wraps=prepare._prepare_one
      ) as inner,
    ):
      alone = prepare.prepare(b, BYTES)
      prepare.prepare(config, BYTES)
    self.assertEqual(packed.folders[1], alone.folders[0])
    self.assertEqual(inner.call_args.args[0], b)  # nothing else of it changes
    json.dumps(packed.metadata)

  @parameterized.parameters(
    ('mix:text:a', "'text:a' is not a positive weight"),
    ('mix:1*text:a', 'needs at least two sources'),
    ('mix:0*text:a+1*text:b', "'0.text:a' is not a positive weight"),
    ('mix:x*text:a+1*text:b', "'x.text:a' is not a positive weight"),
    ('mix:1*text:a+2*pairs:b', "'pairs:b' cannot be part of a mixture"),
    ('mix:1*text:a+2*text:a', "names 'text:a' twice"),
    ('mix:1*text:nosuchfile+2*embedded', 'matches no file'),
  )
  def test_mistakes(self, spec, message):
    with self.assertRaisesRegex(InputError, 'data.source=.*' + message):
      self.prepare(spec)

  def test_globs_may_hold_the_signs(self):
    self.assertEqual(
      sources.parse_mixture(
        'mix:3*text:a+b/*.txt+1*jsonl:c+2*d:body+4*embedded'
      ),
      (
        (0.375, 'text:a+b/*.txt'),
        (0.125, 'jsonl:c+2*d:body'),
        (0.5, 'embedded'),
      ),
    )

  def test_tokenizer_to_be_trained(self):
    with self.assertRaisesRegex(InputError, "tokenizer.path='' trains"):
      self.prepare(self.spec, cases.SENTENCEPIECE)


if __name__ == '__main__':
  absltest.main()
