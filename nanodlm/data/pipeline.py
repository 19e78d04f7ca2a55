"""Batches of packed rows: endless and shuffled, or once through in order.

The batch of step n is a pure function of (seed, n). A host reads only its own
rows of it, so hosts never talk about data, a run continues at step n by asking
for step n, and one host sees what sixteen would.

What is conditioned on is said here, by `weight`: a position of weight 0 stays
clean and is not scored. That is so for the prompt of a pair, always, and in
training for prefixes and for the surroundings of spans, at chosen rates. Nats
are divided by the bytes and tokens of text that is scored: padding has no
bytes, and of the separators behind a response one counts as a token, though all
that are scored cost nats. So what is reported bounds -log p(response and its end |
prompt), per token of these (and given the length too with padding='masked' and
a network that is not causal).
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
import sys
from typing import Any

import grain
import numpy as np

from nanodlm.data.prepare import MixedRows, PackedData, PackedRows
from nanodlm.types import InputError

Batch = dict[str, np.ndarray]
CROPS = ('chunk', 'random')
# Sets the draws of sample_clean apart from any other use of (seed, index).
_CLEAN_STREAM = 0xC1EA


def make_train_iterator(
  packed: PackedData,
  data_config: Any,
  *,
  seed: int,
  batch_size: int,
  start_step: int = 0,
  rows: slice | tuple[int, int] | None = None,
) -> Iterator[Batch]:
  """Makes the endless iterator of training batches.

  Every epoch visits every row once, in an order of its own; in a mixture, the
  epochs of its datasets have the lengths that the weights give them. With crop='chunk' an
  example is a row; with 'random' it is the L tokens that start at a random place
  inside the row, running into the next one, so that epochs differ in where texts
  are cut. With probability `clean_prefix_rate` an example is conditioned on a
  prefix of it, with `clean_infill_rate` on both ends; see sample_clean.

  A pair is conditioned on its prompt. With padding='eos' the response and all
  separators behind it are noised and scored: the model learns to end, and a
  sampler need not know the length (LLaDA, arXiv 2502.09992, supervised
  fine-tuning). With 'masked' the response and one separator are, and attention
  keeps the rest apart: a network that is not causal then knows the length.

  Args:
    packed: the dataset.
    data_config: config.data: `crop`, `segment_ids`, `padding`,
      `clean_prefix_rate`, `clean_infill_rate`, `num_threads` and
      `prefetch_batches` (how many batches are read ahead, by how many threads;
      num_threads=0 reads in the caller's).
    seed: of the order, of the crops and of what stays clean.
    batch_size: examples in the global batch.
    start_step: step of the first batch; a later one costs nothing.
    rows: which examples of the global batch this host reads, as a slice or
      (start, stop); all of them by default.

  Returns:
    An iterator of dicts of arrays, with B the number of `rows`: 'tokens' [B, L]
    int32; 'weight' [B, L] float32, 1 where a position is noised and scored;
    'num_bytes' [B] int32, UTF-8 bytes of text at those positions; for pairs
    'num_tokens' [B] int32, the response's tokens and one separator, whatever
    the padding; and where data_config.segment_ids asks for them, 'segment_ids'
    [B, L] int32, the number of documents that ended earlier in the row (for
    pairs with padding='masked', 1 at the padding).

  Raises:
    InputError: data.crop is unknown, or batch_size or rows make no sense.
  """
  if data_config.crop not in CROPS:
    raise InputError(f'data.crop={data_config.crop!r} is not one of {CROPS}')
  start, stop = _local_rows(rows, batch_size)
  rates = data_config.clean_prefix_rate, data_config.clean_infill_rate
  stream = _shuffled(packed, seed)
  if data_config.crop == 'random':
    # random_map's generator depends on (seed, global index) only.
    read = _Crops(packed)
    stream = stream.random_map(
      lambda row, rng: (row, int(rng.integers(packed.length)))
    )
  else:
    read = packed.train.__getitem__

  def batch_of(step: int) -> Batch:
    first = step * batch_size
    indices = range(first + start, first + stop)
    batch = _stack(
      [read(stream[i]) for i in indices], len(indices), packed, data_config
    )
    if any(rates):
      clean = np.stack(
        [sample_clean(seed, i, packed.length, *rates) for i in indices]
      )
      batch['weight'][clean] = 0
      num_bytes = packed.tokenizer.num_bytes[batch['tokens']]
      batch['num_bytes'] = np.sum(num_bytes, 1, np.int32, where=~clean)
    return batch

  steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
  return iter(steps.map(batch_of).to_iter_dataset(_read_options(data_config)))


def sample_clean(
  seed: int, index: int, length: int, prefix_rate: float, infill_rate: float
) -> np.ndarray:
  """Draws which positions of a training example are given, [L] bool.

  With probability `prefix_rate` a prefix, its length uniform on 0..L-1; with
  `infill_rate` all but a span, its length uniform on 1..L-2 and its place on
  those that leave a token at both ends; else nothing.

  Args:
    seed: of the run.
    index: the example's number in the whole training, step * batch_size + row:
      what is drawn depends on (seed, index) only.
    length: L; at least 3 for infilling.
    prefix_rate: in [0, 1].
    infill_rate: in [0, 1 - prefix_rate].
  """
  rng = np.random.default_rng([_CLEAN_STREAM, seed, index])
  position, kind = np.arange(length), rng.random()
  if kind < prefix_rate:
    return position < rng.integers(length)
  if kind < prefix_rate + infill_rate:
    size = rng.integers(1, length - 1)
    start = rng.integers(1, length - size)
    return (position < start) | (position >= start + size)
  return np.zeros([length], bool)


def make_eval_batches(
  packed: PackedData,
  data_config: Any,
  *,
  batch_size: int,
  rows: slice | tuple[int, int] | None = None,
  split: str = 'validation',
  max_examples: int | None = None,
) -> 'EvalBatches':
  """Makes the batches of one pass through a split, in order.

  Args:
    packed: the dataset.
    data_config: config.data: `segment_ids`, `padding`, `num_threads`,
      `prefetch_batches`. Nothing stays clean but the prompts of pairs.
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
  return EvalBatches(
    packed, data_config, examples, num_examples, batch_size, start, stop
  )


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
  examples: PackedRows | MixedRows
  num_examples: int
  batch_size: int
  start: int
  stop: int

  def __len__(self) -> int:
    return math.ceil(self.num_examples / self.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    def batch_of(step: int) -> Batch:
      first = step * self.batch_size
      indices = range(
        min(first + self.start, self.num_examples),
        min(first + self.stop, self.num_examples),
      )
      return _stack(
        [self.examples[i] for i in indices],
        self.stop - self.start,
        self.packed,
        self.data_config,
      )

    steps = grain.MapDataset.range(len(self)).map(batch_of)
    return iter(steps.to_iter_dataset(_read_options(self.data_config)))


def _shuffled(packed: PackedData, seed: int) -> grain.MapDataset:
  """The rows to train on: epochs of each dataset in turn, mixed by weight."""
  streams = [
    grain.MapDataset.range(start, stop).seed(seed).shuffle().repeat()
    for start, stop in itertools.pairwise(packed.train_borders)
  ]
  if len(streams) == 1:
    return streams[0]
  return grain.MapDataset.mix(streams, packed.weights)


@dataclasses.dataclass(frozen=True, eq=False)
class _Crops:
  """Reads the L tokens that begin `offset` tokens into a row."""

  packed: PackedData

  def __call__(self, row_and_offset: tuple[int, int]) -> dict[str, Any]:
    row, offset = row_and_offset
    rows = self.packed.train
    # The last row of a dataset has no next one.
    if offset == 0 or row + 1 in self.packed.train_borders:
      return rows[row]
    tokens = np.concatenate(
      [rows[row]['tokens'][offset:], rows[row + 1]['tokens'][:offset]]
    )
    num_bytes = self.packed.tokenizer.num_bytes[tokens].sum()
    return {'tokens': tokens, 'num_bytes': num_bytes}


def _stack(
  examples: list[dict[str, Any]],
  size: int,
  packed: PackedData,
  data_config: Any,
) -> Batch:
  """A batch of `size` rows from up to `size` examples; the rest weigh nothing."""
  batch = {
    'tokens': np.zeros([size, packed.length], np.int32),
    'num_bytes': np.zeros([size], np.int32),
    'weight': np.zeros([size, packed.length], np.float32),
  }
  for i, example in enumerate(examples):
    batch['tokens'][i] = example['tokens']
    batch['num_bytes'][i] = example['num_bytes']
  batch['weight'][: len(examples)] = 1
  is_separator = batch['tokens'] == packed.tokenizer.separator_id
  if data_config.segment_ids:
    batch['segment_ids'] = mark_documents(is_separator)
  if packed.is_pairs:
    start = np.zeros([size], np.int32)
    start[: len(examples)] = [example['prompt_length'] for example in examples]
    position = np.arange(packed.length)
    is_answer = position >= start[:, None]
    end = np.argmax(is_separator & is_answer, axis=1) + 1  # of the first one
    is_padding = position >= end[:, None]
    batch['weight'] *= is_answer
    if data_config.padding == 'masked':
      batch['weight'] *= ~is_padding
      batch['segment_ids'] = is_padding.astype(np.int32)
    batch['num_tokens'] = (end - start).astype(np.int32)
    batch['num_tokens'][len(examples) :] = 0
  return batch


def mark_documents(is_separator: np.ndarray) -> np.ndarray:
  """The number of its document in the row, for each token, [B, L] int32.

  A separator belongs to the document that it ends, so that a token's number
  follows from the tokens before it.
  """
  return np.cumsum(is_separator, axis=1, dtype=np.int32) - is_separator


def _local_rows(
  rows: slice | tuple[int, int] | None, batch_size: int
) -> tuple[int, int]:
  """Checks batch_size and rows; returns (start, stop)."""
  if batch_size < 1:
    raise InputError(f'batch_size={batch_size} must be at least 1')
  if rows is None:
    return 0, batch_size
  start, stop = (
    (rows.start or 0, rows.stop) if isinstance(rows, slice) else rows
  )
  stop = batch_size if stop is None else stop
  contiguous = not isinstance(rows, slice) or rows.step in (None, 1)
  if not (contiguous and 0 <= start < stop <= batch_size):
    raise InputError(
      f'rows={rows} must be contiguous rows of the global batch: '
      f'0 <= start < stop <= batch_size={batch_size}'
    )
  return start, stop


def _read_options(data_config: Any) -> grain.ReadOptions:
  # Without threads nothing can be read ahead.
  return grain.ReadOptions(
    num_threads=data_config.num_threads,
    prefetch_buffer_size=(
      data_config.prefetch_batches if data_config.num_threads else 0
    ),
  )
