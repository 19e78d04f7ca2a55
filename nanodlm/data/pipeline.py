"""Batches of packed rows: endless and shuffled, or once through in order.

The batch of step n is a pure function of (seed, n). A host reads only its own
rows of it, so hosts never talk about data, a run continues at step n by asking
for step n, and one host sees what sixteen would.
"""

from collections.abc import Iterator
import dataclasses
import math
import sys
from typing import Any

import grain
import numpy as np

from nanodlm.data.builder import PackedData, PackedRows
from nanodlm.types import InputError

Batch = dict[str, np.ndarray]
CROPS = ('chunk', 'random')


def make_train_iterator(packed: PackedData, data_config: Any, *, seed: int,
                        batch_size: int, start_step: int = 0,
                        rows: slice | tuple[int, int] | None = None
                        ) -> Iterator[Batch]:
  """Makes the endless iterator of training batches.

  Every epoch visits every row once, in an order of its own. With crop='chunk' an
  example is a row; with 'random' it is the L tokens that start at a random place
  inside the row, running into the next one, so that epochs differ in where texts
  are cut.

  Args:
    packed: the dataset.
    data_config: config.data: `crop`, `segment_ids`, `num_threads` and
      `prefetch_batches` (how many batches are read ahead, by how many threads;
      num_threads=0 reads in the caller's).
    seed: of the order and of the crops.
    batch_size: examples in the global batch.
    start_step: step of the first batch; a later one costs nothing.
    rows: which examples of the global batch this host reads, as a slice or
      (start, stop); all of them by default.

  Returns:
    An iterator of dicts of arrays, with B the number of `rows`: 'tokens' [B, L]
    int32; 'num_bytes' [B] int32, UTF-8 bytes of text behind each example;
    'weight' [B, L] float32, all 1; and where data_config.segment_ids asks for
    them, 'segment_ids' [B, L] int32, the number of documents that ended earlier
    in the row.

  Raises:
    InputError: data.crop is unknown, or batch_size or rows make no sense.
  """
  if data_config.crop not in CROPS:
    raise InputError(f'data.crop={data_config.crop!r} is not one of {CROPS}')
  start, stop = _local_rows(rows, batch_size)
  stream = grain.MapDataset.range(
      len(packed.train)).seed(seed).shuffle().repeat()
  if data_config.crop == 'random':
    # random_map's generator depends on (seed, global index) only.
    read = _Crops(packed)
    stream = stream.random_map(
        lambda row, rng: (row, int(rng.integers(packed.length))))
  else:
    read = packed.train.__getitem__

  def batch_of(step: int) -> Batch:
    first = step * batch_size
    examples = [read(stream[i]) for i in range(first + start, first + stop)]
    return _stack(examples, len(examples), packed, data_config.segment_ids)

  steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
  return iter(steps.map(batch_of).to_iter_dataset(_read_options(data_config)))


def make_eval_batches(packed: PackedData, data_config: Any, *, batch_size: int,
                      rows: slice | tuple[int, int] | None = None,
                      split: str = 'validation',
                      max_examples: int | None = None) -> 'EvalBatches':
  """Makes the batches of one pass through a split, in order.

  Args:
    packed: the dataset.
    data_config: config.data: `segment_ids`, `num_threads`, `prefetch_batches`.
    batch_size: examples in the global batch.
    rows: which of them this host reads; see make_train_iterator.
    split: 'validation' or 'train'.
    max_examples: stop after this many rows of the split; None is all of them.

  Returns:
    A re-iterable of dicts as in make_train_iterator, with a len(). The last
    batch is filled up with examples of weight 0 and 0 bytes.

  Raises:
    InputError: split, batch_size, rows or max_examples make no sense.
  """
  if split not in ('train', 'validation'):
    raise InputError(f"split={split!r} is not one of ('train', 'validation')")
  if max_examples is not None and max_examples < 1:
    raise InputError(f'max_examples={max_examples} must be at least 1, or None')
  start, stop = _local_rows(rows, batch_size)
  examples = packed.train if split == 'train' else packed.validation
  num_examples = min(len(examples), max_examples or sys.maxsize)
  return EvalBatches(packed, data_config, examples, num_examples, batch_size,
                     start, stop)


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
  """One host's rows of all batches of a split; see make_eval_batches.

  Attributes:
    packed: the dataset.
    data_config: config.data.
    examples: the rows of the split.
    num_examples: how many of them are used, counted over all hosts.
    batch_size: examples in the global batch.
    start: first example of the global batch that this host reads.
    stop: one past the last.
  """

  packed: PackedData
  data_config: Any
  examples: PackedRows
  num_examples: int
  batch_size: int
  start: int
  stop: int

  def __len__(self) -> int:
    return math.ceil(self.num_examples / self.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    def batch_of(step: int) -> Batch:
      first = step * self.batch_size
      indices = range(min(first + self.start, self.num_examples),
                      min(first + self.stop, self.num_examples))
      return _stack([self.examples[i] for i in indices], self.stop - self.start,
                    self.packed, self.data_config.segment_ids)

    steps = grain.MapDataset.range(len(self)).map(batch_of)
    return iter(steps.to_iter_dataset(_read_options(self.data_config)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Crops:
  """Reads the L tokens that begin `offset` tokens into a row."""

  packed: PackedData

  def __call__(self, row_and_offset: tuple[int, int]) -> dict[str, Any]:
    row, offset = row_and_offset
    rows = self.packed.train
    if offset == 0 or row + 1 == len(rows):  # the last row has no next one
      return rows[row]
    tokens = np.concatenate([rows[row]['tokens'][offset:],
                             rows[row + 1]['tokens'][:offset]])
    num_bytes = self.packed.tokenizer.num_bytes[tokens].sum()
    return {'tokens': tokens, 'num_bytes': num_bytes}


def _stack(examples: list[dict[str, Any]], size: int, packed: PackedData,
           segment_ids: bool) -> Batch:
  """A batch of `size` rows from up to `size` examples; the rest weigh nothing."""
  batch = {
      'tokens': np.zeros([size, packed.length], np.int32),
      'num_bytes': np.zeros([size], np.int32),
      'weight': np.zeros([size, packed.length], np.float32),
  }
  for i, example in enumerate(examples):
    batch['tokens'][i] = example['tokens']
    batch['num_bytes'][i] = example['num_bytes']
  batch['weight'][:len(examples)] = 1
  if segment_ids:
    # The separator belongs to the document that it ends.
    ends = batch['tokens'] == packed.tokenizer.separator_id
    batch['segment_ids'] = np.cumsum(ends, axis=1, dtype=np.int32) - ends
  return batch


def _local_rows(rows: slice | tuple[int, int] | None,
                batch_size: int) -> tuple[int, int]:
  """Checks batch_size and rows; returns (start, stop)."""
  if batch_size < 1:
    raise InputError(f'batch_size={batch_size} must be at least 1')
  if rows is None:
    return 0, batch_size
  start, stop = (rows.start or 0, rows.stop) if isinstance(
      rows, slice) else rows
  stop = batch_size if stop is None else stop
  contiguous = not isinstance(rows, slice) or rows.step in (None, 1)
  if not (contiguous and 0 <= start < stop <= batch_size):
    raise InputError(f'rows={rows} must be contiguous rows of the global batch: '
                     f'0 <= start < stop <= batch_size={batch_size}')
  return start, stop


def _read_options(data_config: Any) -> grain.ReadOptions:
  # Without threads nothing can be read ahead.
  return grain.ReadOptions(
      num_threads=data_config.num_threads,
      prefetch_buffer_size=(
          data_config.prefetch_batches if data_config.num_threads else 0))
