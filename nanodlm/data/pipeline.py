"""Batches of packed rows: endless and shuffled, or once through in order.

The batch of step n is a pure function of (seed, n). Hosts read only their own
rows of it and never communicate about data; a run resumes at step n by asking
for step n.

A position that is not eligible is given: it stays clean and is not scored, as
the prompt of a pair, the user's part of a conversation or, in training, a
prefix or the surroundings of a span. Nats are divided by the bytes and tokens
of the text that is scored. Padding has 0 bytes, and of the separators after a
document or a response only one counts as a token (after a conversation, whose
last token is its end, none), although all that are scored cost nats. The
reported value therefore bounds -log p(text and its end | prompt) per such
token; with padding='masked' and a network that is not causal, the length is
given, too. Of several answers in a conversation, such a network sees what
follows an earlier one.
"""

from collections.abc import Iterable, Iterator, Sequence
import itertools
import math
import sys
from typing import Any

import grain
import numpy as np

from nanodlm.data import encoder
from nanodlm.data.config import DataConfig
from nanodlm.data.packed import PackedData
from nanodlm.types import Batch

# Separates the draws of sample_clean from any other use of (seed, index).
_CLEAN_STREAM = 0xC1EA


def make_train_iterator(
  packed: PackedData,
  data_config: DataConfig,
  *,
  seed: int,
  batch_size: int,
  start_step: int = 0,
  rows: slice | None = None,
) -> Iterator[Batch]:
  """Makes the endless iterator of training batches.

  Every epoch visits every row once, in an order of its own; in a mixture, the
  weights determine the lengths of the datasets' epochs. With crop='chunk' an
  example is a row; with 'random' it is the L tokens from a random place in the
  row into the next one, so that each epoch cuts texts at other places.

  A row that is a document or pair is filled up with separators. The prompt of a
  pair is always given. With padding='eos' the text and all separators after it
  are noised and scored: the model learns to end, and a sampler need not know
  the length (LLaDA, arXiv 2502.09992, supervised fine-tuning). With 'masked'
  the text and one separator are, and attention excludes the rest.

  Args:
    packed: the dataset.
    data_config: `config.data`. num_threads=0 reads in the caller's thread.
    seed: determines the order, the crops and what is given.
    batch_size: examples in the global batch.
    start_step: step of the first batch; a late one costs nothing.
    rows: the contiguous examples of the global batch that this host reads;
      None is all of them.

  Returns:
    An iterator of Batches of NumPy arrays, where B is the number of `rows`. Of
    a document or response, num_tokens counts the tokens and one separator. With
    data_config.segment_ids, segment_ids counts the documents that ended earlier
    in the row; with padding='masked' it is 1 at the padding.
  """
  rows = rows or slice(0, batch_size)
  rates = data_config.clean_prefix_rate, data_config.clean_infill_rate
  num_together = data_config.num_alternatives
  stream: Any = _shuffled(packed, seed, num_together)
  is_random = data_config.crop == 'random'
  if is_random:
    # The generator of random_map depends only on (seed, global index).
    stream = stream.random_map(
      lambda row, rng: (row, int(rng.integers(packed.length)))
    )

  def read(i: int) -> dict[str, Any]:
    if is_random:
      return _read_crop(packed, *stream[i])
    group, i = divmod(i, num_together)
    return packed.train[stream[group] * num_together + i]

  def batch_of(step: int) -> Batch:
    first = step * batch_size
    indices = range(first + rows.start, first + rows.stop)
    examples = [read(i) for i in indices]
    batch = _stack(examples, len(indices), packed, data_config)
    if not any(rates):
      return batch
    eligible = batch.eligible & ~np.stack(
      [sample_clean(seed, i, packed.length, *rates) for i in indices]
    )
    is_counted = np.arange(packed.length) < batch.num_tokens[:, None]
    num_bytes = np.stack(
      [_token_bytes(example, packed) for example in examples]
    )
    return batch._replace(
      eligible=eligible,
      # The first of the separators that fill a row counts.
      num_tokens=(eligible & is_counted).sum(axis=1, dtype=np.int32),
      num_bytes=num_bytes.sum(axis=1, dtype=np.int32, where=eligible),
    )

  steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
  return iter(steps.map(batch_of).to_iter_dataset(_read_options(data_config)))


def sample_clean(
  seed: int, index: int, length: int, prefix_rate: float, infill_rate: float
) -> np.ndarray:
  """Draws which positions of a training example are given, [L] bool.

  With probability `prefix_rate` a prefix, its length uniform in 0..L-1; with
  `infill_rate` all but a span, its length uniform in 1..L-2 (so L >= 3) and its
  place uniform among those that leave a token at both ends; otherwise nothing.
  `index` is the example's number in the whole training, step * batch_size +
  row; the draw depends only on (seed, index).
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
  data_config: DataConfig,
  *,
  batch_size: int,
  rows: slice | None = None,
  max_examples: int = 0,
) -> Iterable[Batch]:
  """Makes the batches of one pass through the validation split, in order.

  Only the prompts of pairs are given, and what the last row of a whole text has
  in common with the row before it. `max_examples` is the number of rows to use,
  see `spread_rows`; 0 is all. See make_train_iterator for the other arguments.

  Returns:
    A re-iterable of Batches with an index. The last batch is filled up with
    examples without eligible tokens and bytes.
  """
  rows = rows or slice(0, batch_size)
  chosen = eval_rows(packed, data_config, max_examples)

  def batch_of(step: int) -> Batch:
    first = step * batch_size
    index = chosen[first + rows.start : first + rows.stop]
    examples = [packed.validation[int(i)] for i in index]
    num_empty = rows.stop - rows.start - len(index)
    index = np.append(index, np.full(num_empty, len(packed.validation)))
    batch = _stack(examples, len(index), packed, data_config)
    return batch._replace(index=index.astype(np.int32))

  steps = grain.MapDataset.range(math.ceil(len(chosen) / batch_size))
  return steps.map(batch_of).to_iter_dataset(_read_options(data_config))


def eval_rows(
  packed: PackedData, data_config: DataConfig, max_examples: int
) -> np.ndarray:
  """Returns the validation rows that `make_eval_batches` reads."""
  num_together = data_config.num_alternatives
  return spread_rows(len(packed.validation), max_examples, num_together)


def spread_rows(
  num_rows: int, max_examples: int, num_together: int = 1
) -> np.ndarray:
  """Returns the rows of a subset, in ascending order.

  The rows are divided into equal parts, and each gives one at random, always
  the same: neighbouring rows are often of one document, and the rows of a
  mixture are interleaved, so that equal distances could meet one source alone.

  Of `num_rows`, `max_examples` are chosen; 0 is all. Of each `num_together`
  rows, which belong together, all or none are, and at least one group is.
  """
  num_groups, num = num_rows // num_together, max_examples // num_together
  num = min(max(num, 1), num_groups) if max_examples else num_groups
  borders = np.arange(num + 1) * num_groups // max(num, 1)
  group = np.random.default_rng(0).integers(borders[:-1], borders[1:])
  return (group[:, None] * num_together + np.arange(num_together)).reshape(-1)


def _shuffled(
  packed: PackedData, seed: int, num_together: int = 1
) -> grain.MapDataset:
  """Returns the rows to train on: epochs of each dataset, mixed by weight.

  Of rows that belong together, the number of each group.
  """
  streams = [
    grain.MapDataset.range(start // num_together, stop // num_together)
    .seed(seed)
    .shuffle()
    .repeat()
    for start, stop in itertools.pairwise(packed.train_borders)
  ]
  if len(streams) == 1:
    return streams[0]
  return grain.MapDataset.mix(streams, packed.weights)


def _read_crop(packed: PackedData, row: int, offset: int) -> dict[str, Any]:
  """Reads the L tokens that begin `offset` tokens into a row."""
  rows = packed.train
  # Nothing follows the last row of a dataset.
  if offset == 0 or row + 1 in packed.train_borders:
    return rows[row]
  join = lambda a, b: np.concatenate([a[offset:], b[:offset]])
  first, second = rows[row], rows[row + 1]
  sizes = join(*(_token_bytes(example, packed) for example in (first, second)))
  return {
    'tokens': join(first['tokens'], second['tokens']),
    'token_bytes': sizes,
    'num_bytes': sizes.sum(),
  }


def _token_bytes(example: dict[str, Any], packed: PackedData) -> np.ndarray:
  """Returns the bytes of the text of each token of an example, [L]."""
  if 'token_bytes' in example:
    return example['token_bytes']
  return packed.tokenizer.num_bytes[example['tokens']]


def _stack(
  examples: Sequence[dict[str, Any]],
  size: int,
  packed: PackedData,
  data_config: DataConfig,
) -> Batch:
  """Returns a batch of `size` rows; those without an example are not scored."""
  num, shape = len(examples), [size, packed.length]
  tokens, num_bytes = np.zeros(shape, np.int32), np.zeros([size], np.int32)
  eligible = np.zeros(shape, bool)
  for i, example in enumerate(examples):
    tokens[i], num_bytes[i] = example['tokens'], example['num_bytes']
    eligible[i, example.get('num_given', 0) :] = True
  num_tokens = eligible.sum(axis=1, dtype=np.int32)
  segment_ids = None
  is_separator = tokens == packed.tokenizer.separator_id
  if data_config.segment_ids:
    segment_ids = mark_documents(is_separator)
  if data_config.is_chat:
    marks = np.full(shape, encoder.GIVEN, np.uint8)
    for i, example in enumerate(examples):
      marks[i] = example['marks']
    is_padding = marks & encoder.FILL > 0
    eligible &= marks & encoder.GIVEN == 0
    num_tokens = (eligible & ~is_padding).sum(axis=1, dtype=np.int32)
    if data_config.padding == 'masked':
      eligible &= ~is_padding
      starts = marks & encoder.START > 0
      segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
  elif packed.is_documents:
    start = np.zeros([size], np.int32)
    start[:num] = [example['prompt_length'] for example in examples]
    position = np.arange(packed.length)
    eligible &= position >= start[:, None]
    is_end = is_separator & eligible
    end = np.argmax(is_end, axis=1) + 1  # The first one's.
    end[~is_end.any(axis=1)] = packed.length  # Of a document that was cut.
    is_padding = position >= end[:, None]
    if data_config.padding == 'masked':
      eligible &= ~is_padding
      segment_ids = is_padding.astype(np.int32)
    num_tokens[:num] = (end - start)[:num]
  weight = np.ones([size], np.float32)
  return Batch(tokens, eligible, weight, num_tokens, num_bytes, segment_ids)


def mark_documents(is_separator: np.ndarray) -> np.ndarray:
  """Returns the number of its document in the row for each token, [B, L] int32.

  A separator belongs to the document that it ends, so a token's number follows
  from the tokens before it.
  """
  return np.cumsum(is_separator, axis=1, dtype=np.int32) - is_separator


def _read_options(data_config: DataConfig) -> grain.ReadOptions:
  num_threads = data_config.num_threads
  # Without threads nothing can be read ahead.
  buffer_size = data_config.prefetch_batches if num_threads else 0
  return grain.ReadOptions(num_threads, buffer_size)
