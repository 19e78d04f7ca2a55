"""Tests of nanodlm.data.pipeline: the batch is a function of (seed, step)."""

import itertools
import json
import os
import tempfile

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm.data import pipeline, prepare
from nanodlm.types import Batch
from tests import workdirs
from tests.data.cases import BYTES

LENGTH = 16


def take(iterator, number):
  return list(itertools.islice(iterator, number))


def assert_batches_equal(a, b):
  assert len(a) == len(b), (len(a), len(b))
  for left, right in zip(a, b):
    for name in Batch._fields:
      np.testing.assert_array_equal(
        getattr(left, name), getattr(right, name), name
      )


def join(batches):
  return Batch(
    *(
      None if arrays[0] is None else np.concatenate(arrays)
      for arrays in zip(*batches, strict=True)
    )
  )


def concatenate(shards):
  return [join(parts) for parts in zip(*shards, strict=True)]


class PipelineTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    for i in range(60):
      with open(os.path.join(folder, f'{i:02d}.txt'), 'w') as file:
        file.write(f'document {i:02d} é ' * (i % 7 + 1))
    cls.packed = prepare.prepare(
      workdirs.DataConfig(source=f'text:{folder}/*.txt', data_dir=folder), BYTES
    )
    cls.rows = np.stack(
      [cls.packed.train[i]['tokens'] for i in range(len(cls.packed.train))]
    )

  def train(
    self, number=5, seed=0, batch_size=8, start_step=0, rows=None, **changes
  ):
    return take(
      pipeline.make_train_iterator(
        self.packed,
        workdirs.DataConfig(**changes),
        seed=seed,
        batch_size=batch_size,
        start_step=start_step,
        rows=rows,
      ),
      number,
    )

  @parameterized.parameters('chunk', 'random')
  def test_batch_is_what_is_promised(self, crop):
    for batch in self.train(crop=crop):
      self.assertIsNone(batch.segment_ids)
      self.assertIsNone(batch.index)
      self.assertEqual(batch.tokens.shape, (8, LENGTH))
      self.assertEqual(batch.tokens.dtype, np.int32)
      self.assertEqual(batch.num_bytes.dtype, np.int32)
      self.assertEqual(batch.weight.dtype, np.float32)
      self.assertEqual(batch.eligible.dtype, np.bool_)
      self.assertEqual(batch.num_tokens.dtype, np.int32)
      np.testing.assert_array_equal(batch.weight, np.ones([8]))
      np.testing.assert_array_equal(batch.eligible, np.ones([8, LENGTH]))
      np.testing.assert_array_equal(batch.num_tokens, [LENGTH] * 8)
      np.testing.assert_array_equal(
        batch.num_bytes,
        self.packed.tokenizer.num_bytes[batch.tokens].sum(axis=1),
      )

  @parameterized.product(
    crop=('chunk', 'random'), num_hosts=(2, 4), num_threads=(0, 3)
  )
  def test_any_number_of_hosts_reads_the_same_global_batch(
    self, crop, num_hosts, num_threads
  ):
    settings = dict(crop=crop, segment_ids=True, num_threads=num_threads)
    share = 8 // num_hosts
    shards = [
      self.train(rows=slice(h * share, (h + 1) * share), **settings)
      for h in range(num_hosts)
    ]
    assert_batches_equal(concatenate(shards), self.train(**settings))
    sliced = self.train(rows=slice(share, 2 * share), **settings)
    assert_batches_equal(sliced, shards[1])

  @parameterized.product(crop=('chunk', 'random'), num_threads=(0, 2))
  def test_starting_at_a_step_is_skipping_to_it(self, crop, num_threads):
    settings = dict(crop=crop, num_threads=num_threads)
    assert_batches_equal(
      self.train(start_step=7, **settings),
      self.train(number=12, **settings)[7:],
    )

  def test_starting_late_costs_nothing(self):
    # 10^12 steps that were taken one by one would not end.
    (batch,) = self.train(number=1, start_step=10**12, crop='random')
    self.assertGreater(batch.num_tokens.min(), 0)

  @parameterized.parameters('chunk', 'random')
  def test_seed_and_step_matter(self, crop):
    one, two = self.train(crop=crop), self.train(crop=crop, seed=1)
    self.assertFalse((one[0].tokens == two[0].tokens).all())
    self.assertFalse((one[0].tokens == one[1].tokens).all())

  def test_every_epoch_visits_every_row_once_in_its_own_order(self):
    num_rows = len(self.rows)
    stream = np.concatenate(
      [batch.tokens for batch in self.train(number=2 * num_rows // 8 + 1)]
    )
    first, second = stream[:num_rows], stream[num_rows : 2 * num_rows]
    for epoch in (first, second):
      np.testing.assert_array_equal(
        np.sort(epoch.view('V64').ravel()),
        np.sort(self.rows.view('V64').ravel()),
      )
      self.assertFalse((epoch == self.rows).all())
    self.assertFalse((first == second).all())

  def test_random_crops_are_windows_of_the_stream(self):
    stream = self.rows.reshape(-1)
    windows = np.lib.stride_tricks.sliding_window_view(stream, LENGTH)
    places = {}
    for place, window in enumerate(windows):
      places.setdefault(window.tobytes(), set()).add(place)
    crops = np.concatenate(
      [batch.tokens for batch in self.train(number=100, crop='random')]
    )
    found = [places[crop.tobytes()] for crop in crops]  # KeyError: no window
    offsets = {min(places) % LENGTH for places in found if len(places) == 1}
    self.assertEqual(offsets, set(range(LENGTH)))
    # The same row is cut elsewhere in the next epoch.
    chunks = np.concatenate([b.tokens for b in self.train(number=100)])
    self.assertFalse((chunks == crops).all(axis=1).all())

  def test_segment_ids_count_separators_and_each_ends_its_document(self):
    batch = self.train(number=1, batch_size=64, segment_ids=True)[0]
    self.assertEqual(batch.segment_ids.dtype, np.int32)
    self.assertGreater(batch.segment_ids.max(), 0)
    for tokens, segments in zip(batch.tokens, batch.segment_ids):
      segment = 0
      for token, got in zip(tokens, segments):
        self.assertEqual(got, segment)
        segment += token == self.packed.tokenizer.separator_id

  @parameterized.product(num_hosts=(1, 2, 4), num_threads=(0, 2))
  def test_evaluation_is_the_split_once_in_order(self, num_hosts, num_threads):
    settings = workdirs.DataConfig(segment_ids=True, num_threads=num_threads)
    share = 8 // num_hosts
    shards = [
      pipeline.make_eval_batches(
        self.packed,
        settings,
        batch_size=8,
        rows=slice(h * share, (h + 1) * share),
      )
      for h in range(num_hosts)
    ]
    rows = self.packed.validation
    self.assertNotEqual(len(rows) % 8, 0)  # or the padding is not tested
    batches = concatenate([list(shard) for shard in shards])
    self.assertLen(batches, -(-len(rows) // 8))
    assert_batches_equal(
      concatenate([list(shard) for shard in shards]), batches
    )
    whole = join(batches)
    n = len(rows)
    np.testing.assert_array_equal(
      whole.tokens[:n], [rows[i]['tokens'] for i in range(n)]
    )
    np.testing.assert_array_equal(whole.weight, 1)
    np.testing.assert_array_equal(whole.index, np.arange(len(whole.index)))
    np.testing.assert_array_equal(whole.eligible[:n], True)
    np.testing.assert_array_equal(whole.num_tokens[:n], LENGTH)
    unscored = ('tokens', 'eligible', 'num_tokens', 'num_bytes', 'segment_ids')
    for name in unscored:
      np.testing.assert_array_equal(getattr(whole, name)[n:], 0)
    self.assertEqual(
      whole.num_bytes.sum(), self.packed.metadata['validation']['num_bytes']
    )

  @parameterized.parameters((1, 1), (8, 1), (9, 2), (10**9, None))
  def test_max_examples(self, max_examples, num_batches):
    batches = list(
      pipeline.make_eval_batches(
        self.packed,
        workdirs.DataConfig(),
        batch_size=8,
        max_examples=max_examples,
      )
    )
    rows = self.packed.validation
    num = min(max_examples, len(rows))
    whole = join(batches)
    self.assertEqual(whole.eligible.any(axis=1).sum(), num)
    # The rows are spread over the split and keep their own indices.
    part = np.arange(num + 1) * len(rows) // num
    self.assertTrue(np.all(whole.index[:num] >= part[:-1]))
    self.assertTrue(np.all(whole.index[:num] < part[1:]))
    np.testing.assert_array_equal(
      whole.tokens[:num], [rows[int(i)]['tokens'] for i in whole.index[:num]]
    )
    if num_batches:
      self.assertLen(batches, num_batches)

  def test_a_subset_has_all_that_alternates(self):
    for num in (600, 300, 150, 128):
      chosen = pipeline.spread_rows(1200, num)
      self.assertLen(np.unique(chosen), num)
      self.assertLess(abs(np.mean(chosen % 2) - 0.5), 2 / num**0.5)
    pairs = pipeline.spread_rows(1026, 513, num_together=2).reshape(-1, 2)
    self.assertLen(pairs, 256)
    np.testing.assert_array_equal(pairs[:, 0] % 2, 0)
    np.testing.assert_array_equal(pairs[:, 1], pairs[:, 0] + 1)
    np.testing.assert_array_equal(pipeline.spread_rows(7, 0), np.arange(7))
    np.testing.assert_array_equal(pipeline.spread_rows(7, 9), np.arange(7))
    self.assertEmpty(pipeline.spread_rows(0, 9))
    self.assertLen(pipeline.spread_rows(8, 1, num_together=2), 2)

  @parameterized.parameters('chunk', 'random')
  def test_what_stays_clean_in_training(self, crop):
    rates = dict(crop=crop, clean_prefix_rate=0.3, clean_infill_rate=0.2)
    batches, plain = self.train(**rates), self.train(crop=crop)
    for batch, other in zip(batches, plain):
      self.assertEqual(batch.num_bytes.dtype, np.int32)
      np.testing.assert_array_equal(batch.tokens, other.tokens)
      np.testing.assert_array_equal(
        batch.num_bytes,
        np.sum(
          self.packed.tokenizer.num_bytes[batch.tokens] * batch.eligible, axis=1
        ),
      )
      np.testing.assert_array_equal(
        batch.num_tokens, batch.eligible.sum(axis=1)
      )
      np.testing.assert_array_equal(batch.weight, 1)
    eligible = np.concatenate([batch.eligible for batch in batches])
    expected = np.stack(
      [~pipeline.sample_clean(0, i, LENGTH, 0.3, 0.2) for i in range(40)]
    )
    np.testing.assert_array_equal(eligible, expected)
    # Half of the examples, and the empty prefixes.
    self.assertBetween(eligible.all(1).mean(), 0.2, 0.8)
    self.assertTrue(eligible.any(1).all())
    other = self.train(seed=1, **rates)[0]
    self.assertFalse((other.eligible == batches[0].eligible).all())
    # The same for any host that reads it, and any first step.
    shards = [
      self.train(rows=slice(h * 2, h * 2 + 2), **rates) for h in range(4)
    ]
    assert_batches_equal(concatenate(shards), batches)
    assert_batches_equal(
      self.train(number=2, start_step=3, **rates), batches[3:]
    )

  def test_nothing_stays_clean_in_evaluation(self):
    settings = workdirs.DataConfig(clean_prefix_rate=0.5, clean_infill_rate=0.5)
    assert_batches_equal(
      list(pipeline.make_eval_batches(self.packed, settings, batch_size=8)),
      list(
        pipeline.make_eval_batches(
          self.packed, workdirs.DataConfig(), batch_size=8
        )
      ),
    )

  def test_one_row_is_enough(self):
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'a.txt')
      with open(path, 'w') as file:
        file.write('x' * 40)
      settings = workdirs.DataConfig(
        source=f'text:{path}', data_dir=folder, eval_fraction=0.5, crop='random'
      )
      packed = prepare.prepare(settings, BYTES)
      self.assertLen(packed.train, 1)
      batch = next(
        pipeline.make_train_iterator(packed, settings, seed=0, batch_size=3)
      )
    np.testing.assert_array_equal(batch.tokens, np.full([3, LENGTH], 120))


class SampleCleanTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 0.0), (0.3, 0.0), (0.0, 1.0), (0.5, 0.3))
  def test_law(self, prefix_rate, infill_rate):
    num, length = 12_000, 6
    clean = np.stack(
      [
        pipeline.sample_clean(3, i, length, prefix_rate, infill_rate)
        for i in range(num)
      ]
    )
    rows, counts = np.unique(clean, axis=0, return_counts=True)
    found = {tuple(row): count for row, count in zip(rows, counts)}
    position = np.arange(length)
    expected = {(False,) * length: 1 - prefix_rate - infill_rate}
    for end in range(length):  # the empty prefix is one of them
      row = tuple(position < end)
      expected[row] = expected.get(row, 0) + prefix_rate / length
    for size in range(1, length - 1):
      for start in range(1, length - size):
        row = tuple((position < start) | (position >= start + size))
        expected[row] = infill_rate / (length - 2) / (length - 1 - size)
    expected = {row: share for row, share in expected.items() if share > 1e-9}
    self.assertEqual(set(found), set(expected))
    for row, share in expected.items():
      error = (num * share * (1 - share)) ** 0.5
      self.assertLess(abs(found[row] - num * share), 4.5 * error + 1, row)

  def test_pure_function_of_seed_and_index(self):
    draw = lambda *args: pipeline.sample_clean(*args, 64, 1.0, 0.0).sum()
    self.assertEqual(draw(0, 5), draw(0, 5))
    self.assertGreater(len({draw(0, i) for i in range(99)}), 20)
    self.assertGreater(len({draw(seed, 5) for seed in range(99)}), 20)
    draw(2**32 - 1, 10**15)


class PreferencesTest(parameterized.TestCase):
  def test_what_belongs_together_stays_together(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = os.path.join(folder, 'a.jsonl')
    with open(path, 'w') as file:
      for i in range(30):
        # One of the two is too long for a row, or none.
        texts = {'prompt': f'{i}?', 'chosen': '+' * (20 if i % 5 == 0 else 3)}
        texts |= {'rejected': '-' * (20 if i % 7 == 0 else 2)}
        file.write(json.dumps(texts) + '\n')
    config = workdirs.DataConfig(
      source=f'preferences:{path}', data_dir=folder, eval_fraction=0.2
    )
    with self.assertLogs('nanodlm', 'WARNING') as logs:
      packed = prepare.prepare(config, BYTES)
    for line in logs.output:  # The partners of long ones are left out, too.
      self.assertIn('; 0 of them were cut', line)
    decode = lambda row: packed.tokenizer.decode(row).split('\n')[0]
    kept = [i for i in range(30) if i % 5 and i % 7]
    seen = []
    for split in (packed.train, packed.validation):
      texts = [decode(split[i]['tokens']) for i in range(len(split))]
      for chosen, rejected in zip(texts[::2], texts[1::2]):
        number = chosen.split('?')[0]
        self.assertTrue(chosen.startswith(f'{number}?+++'), chosen)
        self.assertTrue(rejected.startswith(f'{number}?--'), rejected)
        seen.append(int(number))
    self.assertCountEqual(seen, kept)
    self.assertGreater(len(packed.validation), 0)
    whole = make_rows(packed, config, None)
    for chosen, rejected in zip(whole[::2], whole[1::2]):
      self.assertIn('+', decode(chosen))
      self.assertEqual(
        decode(rejected).split('?')[0], decode(chosen).split('?')[0]
      )
      self.assertIn('-', decode(rejected))
    # An epoch has each of them once, and a host its own rows.
    self.assertLen({tuple(row) for row in whole}, len(packed.train))
    halves = [make_rows(packed, config, slice(i, i + 4)) for i in (0, 4)]
    np.testing.assert_array_equal(
      whole[:8], np.concatenate([half[:4] for half in halves])
    )


def make_rows(packed, config, rows):
  batches = pipeline.make_train_iterator(
    packed, config, seed=3, batch_size=8, rows=rows
  )
  num = len(packed.train)
  tokens = [next(batches).tokens for _ in range(-(-num // 8))]
  return np.concatenate(tokens)[:num]


class PairsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    path = os.path.join(folder, 'a.jsonl')
    with open(path, 'w') as file:
      for i in range(30):
        pair = {'prompt': f'{i}?', 'response': 'é' * (i % 6 + 1)}
        file.write(json.dumps(pair) + '\n')
    cls.source = f'pairs:{path}'
    cls.packed = prepare.prepare(
      workdirs.DataConfig(
        source=cls.source, data_dir=folder, eval_fraction=0.2
      ),
      BYTES,
    )

  def batches(self, split, padding, batch_size=4):
    settings = workdirs.DataConfig(source=self.source, padding=padding)
    if split == 'train':
      return take(
        pipeline.make_train_iterator(
          self.packed, settings, seed=0, batch_size=batch_size
        ),
        7,
      )
    return list(
      pipeline.make_eval_batches(self.packed, settings, batch_size=batch_size)
    )

  @parameterized.product(
    split=('train', 'validation'), padding=('eos', 'masked')
  )
  def test_what_is_scored_and_counted(self, split, padding):
    num_rows = 0
    for batch in self.batches(split, padding):
      self.assertEqual(batch.num_tokens.dtype, np.int32)
      self.assertEqual(batch.num_bytes.dtype, np.int32)
      np.testing.assert_array_equal(batch.weight, np.ones([4], np.float32))
      self.assertEqual(batch.segment_ids is None, padding == 'eos')
      self.assertEqual(batch.index is None, split == 'train')
      for i, tokens in enumerate(batch.tokens):
        if batch.num_tokens[i] == 0:  # fills the last batch of a split
          self.assertFalse(batch.eligible[i].any() or batch.num_bytes[i])
          continue
        num_rows += 1
        text = self.packed.tokenizer.decode(tokens)
        prompt = text[: text.index('?') + 1]
        response = text[len(prompt) :].rstrip('\n')
        self.assertRegex(response, '^é+$')
        start, num_bytes = len(prompt), len(response.encode())
        end = start + num_bytes + 1  # with the separator that ends it
        self.assertEqual(batch.num_bytes[i], num_bytes)
        self.assertEqual(batch.num_tokens[i], num_bytes + 1)
        scored = np.arange(LENGTH) >= start
        if padding == 'masked':
          np.testing.assert_array_equal(
            batch.segment_ids[i], np.arange(LENGTH) >= end
          )
          scored &= np.arange(LENGTH) < end
        np.testing.assert_array_equal(batch.eligible[i], scored)
    self.assertGreaterEqual(num_rows, len(self.packed.validation))


if __name__ == '__main__':
  absltest.main()
