"""Token ids in plain files to rows of exactly L tokens in a TFDS dataset.

A separator follows each document, and the resulting stream is cut into rows;
train and validation are packed separately. Nothing else is inserted: a BOS or
EOS in every row would be a token that costs nothing to predict. Rows of token
ids are a stream already and are cut as they are. With data.crop='document' a
document is a row of its own, and so is a pair: the prompt, the response, and
separators to the end of the row, at least one. Conversations are never cut
inside a turn: a row has one, or all that fit. The last tokens of a stream,
less than a row, are dropped, unless it is a text to evaluate as a whole: then
its last row is the last L tokens, of which those that the row before has, too,
are given.
TFDS's own builder for ordered data would hold all rows in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import logging
import math
import operator
import pathlib
import shutil
from typing import Any

import array_record.python.array_record_module as array_record
import numpy as np
import tensorflow_datasets as tfds

from nanodlm.data import encoder, split
from nanodlm.data.config import DataConfig
from nanodlm.data.packed import Example, NAME, VERSION
from nanodlm.data.sources.tfds import quiet_tfds
from nanodlm.types import InputError

# The largest shard, in rows and in bytes.
SHARD_ROWS = 1 << 17
_SHARD_BYTES = 64 << 20
# Ids are read in blocks of this many bytes.
_BLOCK_BYTES = 1 << 20

_log = logging.getLogger('nanodlm')


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Token ids in the files of parts, and how they become rows.

  Attributes:
    job: what wrote the files.
    length: tokens per row.
    ranges: [n, 5] int64, the number of a part, the first token in it, one past
      the last, the tokens of a pair's prompt, and the row, if rows are filled.
    fills_rows: whether separators fill each row after its ranges.
    num_dropped_documents: those longer than a row.
    num_given: tokens of the last row that the row before has, too.
  """

  job: encoder.Job
  length: int
  ranges: np.ndarray
  fills_rows: bool
  num_dropped_documents: int = 0
  num_given: int = 0

  @property
  def num_tokens(self) -> int:
    """The number of tokens; including the separators that fill rows."""
    if self.fills_rows:
      return self.length * (int(self.ranges[:, 4].max(initial=-1)) + 1)
    return int((self.ranges[:, 2] - self.ranges[:, 1]).sum())

  @property
  def num_rows(self) -> int:
    """The number of whole rows."""
    return self.num_tokens // self.length

  def shards(self) -> 'list[Stream]':
    """Returns the rows in pieces, each with the ranges that it needs."""
    row_bytes = self.length * self.job.record.itemsize
    shard_rows = min(SHARD_ROWS, max(_SHARD_BYTES // row_bytes, 1))
    num_shards = math.ceil(self.num_rows / shard_rows)
    borders = [self.num_rows * i // num_shards for i in range(num_shards + 1)]
    shards = []
    for start, stop in itertools.pairwise(borders):
      if self.fills_rows:
        first, last = np.searchsorted(self.ranges[:, 4], [start, stop])
        ranges = self.ranges[first:last] - [0, 0, 0, 0, start]
      else:
        ranges = part_of(self.ranges, start * self.length, stop * self.length)
      num_given = self.num_given if stop == self.num_rows else 0
      shards.append(
        dataclasses.replace(self, ranges=ranges, num_given=num_given)
      )
    return shards

  def with_last_row(self) -> 'Stream':
    """Returns the stream with its last L tokens as a row, if some are left."""
    num_left = self.num_tokens % self.length
    if self.fills_rows or not num_left or self.num_tokens < self.length:
      return self
    rows = part_of(self.ranges, 0, self.num_tokens - num_left)
    last = part_of(self.ranges, self.num_tokens - self.length, self.num_tokens)
    return dataclasses.replace(
      self,
      ranges=np.concatenate([rows, last]),
      num_given=self.length - num_left,
    )

  def rows(self) -> Iterator[dict[str, Any]]:
    """Yields the examples; the last tokens, less than a row, are dropped."""
    job = self.job
    if self.fills_rows:
      places = self.ranges[:, 3:].tolist()
      items = zip(self._read(), places)
      for _, group in itertools.groupby(items, lambda item: item[1][1]):
        parts, places = zip(*group)
        row = np.zeros([self.length], job.record)
        row['token'] = job.tokenizer.separator_id
        if job.source.is_chat:
          row['marks'] = encoder.FILL
        records = np.concatenate(parts)
        row[: records.size] = records
        if job.source.is_chat and records.size < self.length:
          row['marks'][records.size] += encoder.START
        (example,) = self._examples(row[None], start := places[0][0])
        yield example | {'prompt_length': start}
      return
    rest, num_left = np.zeros([0], job.record), self.num_rows
    for records in self._read():
      records = np.concatenate([rest, records])
      block = records[: records.size // self.length * self.length]
      rest = records[block.size :]
      rows = block.reshape(-1, self.length)
      num_left -= len(rows)
      has_given = self.num_given > 0 and num_left == 0 and len(rows) > 0
      yield from self._examples(rows[: len(rows) - has_given])
      if has_given:
        (example,) = self._examples(rows[-1:], self.num_given)
        yield example | {'num_given': self.num_given}

  def _examples(
    self, block: np.ndarray, start: int = 0
  ) -> Iterator[dict[str, Any]]:
    """Yields rows of records, with the bytes of what is scored.

    That is what follows the first `start` tokens or, of conversations, what
    their marks say.
    """
    tokens, job = block['token'], self.job
    is_lossless, is_chat = job.tokenizer.is_lossless, job.source.is_chat
    piece_bytes = job.tokenizer.num_bytes[tokens]
    sizes = piece_bytes if is_lossless else block['num_bytes']
    is_scored = np.arange(self.length) >= start
    if is_chat:
      is_scored = (block['marks'] & (encoder.GIVEN | encoder.FILL)) == 0
    totals = sizes.sum(axis=1, where=is_scored).tolist()
    for i, num_bytes in enumerate(totals):
      example = {'tokens': tokens[i], 'num_bytes': num_bytes}
      if not is_lossless:
        example['token_bytes'] = sizes[i]
      if is_chat:
        example['marks'] = block['marks'][i]
      yield example

  def count(self) -> dict[str, int]:
    """Returns the counts of PackedData.metadata."""
    num_documents, num_bytes = len(self.ranges), 0
    separator = self.job.tokenizer.separator_id
    if not self.fills_rows:
      num_documents = sum(
        int((records['token'] == separator).sum()) for records in self._read()
      )
    for row in self.rows():
      num_bytes += row['num_bytes']
      given = row['tokens'][: row.get('num_given', 0)]
      num_documents -= int((given == separator).sum())
    return {
      'num_rows': self.num_rows,
      'num_tokens': self.num_rows * self.length - self.num_given,
      'num_bytes': num_bytes,
      'num_documents': max(num_documents, 1),  # A cut one may end elsewhere.
      'num_dropped_tokens': self.num_tokens % self.length,
      'num_dropped_documents': self.num_dropped_documents,
    }

  def _read(self) -> Iterator[np.ndarray]:
    """Yields the records of the ranges, in blocks if those are long."""
    folder, dtype = self.job.folder, self.job.record
    size = max(_BLOCK_BYTES // dtype.itemsize, self.length)
    ranges = self.ranges.tolist()
    for number, group in itertools.groupby(ranges, operator.itemgetter(0)):
      with open(encoder.tokens_path(folder, number), 'rb') as file:
        for _, start, stop, *_ in group:
          file.seek(start * dtype.itemsize)
          for i in range(start, stop, size):
            # Pages of a mapped file would count as memory of this process, and
            # np.fromfile is slow for short documents.
            num_bytes = min(size, stop - i) * dtype.itemsize
            yield np.frombuffer(file.read(num_bytes), dtype)


def part_of(ranges: np.ndarray, start: int, stop: int) -> np.ndarray:
  """Returns the ranges of tokens [start, stop) of a stream."""
  ends = np.cumsum(ranges[:, 2] - ranges[:, 1])
  first = np.searchsorted(ends, start, 'right')
  last = np.searchsorted(ends, stop, 'left') + 1
  part, ends = ranges[first:last].copy(), ends[first:last]
  if len(part):
    begin = ends[0] - (part[0, 2] - part[0, 1])
    part[-1, 2] -= max(ends[-1] - stop, 0)
    part[0, 1] += start - begin
  return part[part[:, 2] > part[:, 1]]


def make_streams(
  job: encoder.Job,
  tasks: Sequence[encoder.Task],
  tables: Sequence[np.ndarray],
  data_config: DataConfig,
  sides: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, Stream]:
  """Returns the tokens of each split, in the order of the source.

  `sides` has the documents of each split; see `split.assign`.

  Raises:
    InputError: nothing would be left to train on, or a split is shorter than a
      row.
  """
  length, fills_rows = data_config.length, data_config.fills_rows
  streams = {}
  if tasks[0].split == 'stream':
    everything = [
      [task.number, 0, table['num_tokens'].sum(), 0, 0]
      for task, table in zip(tasks, tables, strict=True)
    ]
    ranges = np.array(everything, np.int64)
    total = int(ranges[:, 2].sum())
    borders = split.stream_borders(job.source, total, data_config)
    for name, border in borders.items():
      streams[name] = Stream(job, length, part_of(ranges, *border), fills_rows)
  else:
    for name in sides:
      # One part at a time, so that few ranges are in memory.
      ranges, is_end = [], True
      for task, table, side in zip(tasks, tables, sides[name], strict=True):
        if fills_rows and not is_end:  # It begins within a document.
          side = side & (np.arange(len(side)) > 0)
        ranges.append(_ranges(task.number, table, side, fills_rows))
        if len(table):
          is_end = bool(table['num_ends'][-1])
      streams[name] = Stream(job, length, np.concatenate(ranges), fills_rows)
      if fills_rows:
        streams[name] = _fit(name, streams[name], data_config)
  shortest = min(stream.num_tokens for stream in streams.values())
  if shortest < length:
    sizes = ' and '.join(
      f'{stream.num_tokens} tokens in {name}'
      for name, stream in streams.items()
    )
    advice = f'data.length<={shortest} or more text'
    if len(streams) > 1:
      advice += (
        f', or another data.eval_fraction (now {data_config.eval_fraction}) or '
        f'data.eval_tokens ({data_config.eval_tokens})'
      )
    raise InputError(
      f'data.length={length} is longer than the text: there are {sizes}. Use '
      + advice
    )
  return streams


def _ranges(
  number: int, table: np.ndarray, side: np.ndarray, fills_rows: bool
) -> np.ndarray:
  """Returns the ranges of the documents of a part that `side` chooses.

  Neighbours become one range, unless rows are filled.
  """
  stops = np.cumsum(table['num_tokens'])
  starts = stops - table['num_tokens']
  numbers = np.full(len(table), number)
  columns = [numbers, starts, stops, table['prompt_length'], 0 * numbers]
  ranges = np.stack(columns, axis=1)[side]
  if fills_rows or not len(ranges):
    return ranges
  is_border = ranges[1:, 1] != ranges[:-1, 2]
  merged = ranges[np.append(True, is_border)]
  merged[:, 2] = ranges[np.append(is_border, True), 2]
  return merged


def _fit(name: str, stream: Stream, data_config: DataConfig) -> Stream:
  """Assigns documents to rows, and reports those that are too long.

  Raises:
    InputError: nothing is left, or what is too long is refused.
  """
  length, ranges = stream.length, stream.ranges.copy()
  long_documents = data_config.long_documents
  sizes = ranges[:, 2] - ranges[:, 1]
  num, num_long = len(sizes), int((sizes > length).sum())
  setting = f'data.length={length}'
  if num_long and long_documents == 'refuse':
    raise InputError(
      f'{setting} is too short for {num_long} of {num} documents of {name}, of '
      f'up to {max(sizes)} tokens including the separator, and '
      "data.long_documents='refuse'. Use a larger data.length, or 'drop' or "
      "'cut'"
    )
  is_kept = sizes <= length
  if long_documents == 'cut':
    if stream.job.source.is_chat:
      for i in np.flatnonzero(sizes > length):
        ranges[i, 2] = ranges[i, 1] + _turns_that_fit(stream, ranges[i])
    ranges[:, 2] = np.minimum(ranges[:, 2], ranges[:, 1] + length)
    # Something of the response, or of the conversation, is left.
    is_kept = (ranges[:, 3] < length) & (ranges[:, 1] < ranges[:, 2])
  num_together = data_config.num_alternatives
  is_kept = is_kept.reshape(-1, num_together).all(axis=1).repeat(num_together)
  num_dropped = int((~is_kept).sum())
  if num_dropped == num:
    raise InputError(
      f'{setting} is too short for all {num} documents of {name}: the shortest '
      f'has {min(sizes)} tokens including the separator. Use a larger '
      "data.length, shorter documents, or data.long_documents='cut'"
    )
  if num_long:
    num_cut = int((is_kept & (sizes > length)).sum())
    _log.warning(
      f'{setting}: of {num} documents of {name}, {num_long} are longer (up to '
      f'{max(sizes)} tokens); {num_cut} of them were cut and '
      f'{num_dropped} left out'
    )
  ranges = ranges[is_kept]
  sizes = ranges[:, 2] - ranges[:, 1]
  ranges[:, 4] = np.arange(len(ranges))
  if not data_config.has_documents:
    ranges[:, 4] = share_rows(sizes.tolist(), length)
    ranges = ranges[np.argsort(ranges[:, 4], kind='stable')]
  padding = 1 - sizes.sum() / (ranges[-1, 4] + 1) / length
  _log.info(
    f'{name}: {len(ranges)} documents; {padding:.0%} of their rows is padding'
  )
  return dataclasses.replace(
    stream, ranges=ranges, num_dropped_documents=num_dropped
  )


def _turns_that_fit(stream: Stream, place: np.ndarray) -> int:
  """Returns the tokens of the turns of a conversation that fit into a row."""
  first = dataclasses.replace(stream, ranges=place[None])
  (records,) = itertools.islice(first._read(), 1)
  ends = np.flatnonzero(records['marks'][: stream.length] & encoder.END)
  return int(ends[-1]) + 1 if ends.size else 0


def share_rows(sizes: Sequence[int], length: int) -> list[int]:
  """Assigns documents of 1 to `length` tokens to rows.

  Each goes to the row with the least space that is enough (best fit).
  """
  rows: list[list[int]] = [[] for _ in range(length + 1)]  # By their space.
  spaces, num, chosen = 0, 0, []
  for size in sizes:
    # The lowest bit is the least space of a row.
    enough = spaces >> size
    if enough:
      space = size + (enough & -enough).bit_length() - 1
      row = rows[space].pop()
      spaces ^= (not rows[space]) << space
    else:
      space, row, num = length, num, num + 1
    chosen.append(row)
    if left := space - size:
      rows[left].append(row)
      spaces |= 1 << left
  return chosen


def write(
  folder: pathlib.Path,
  streams: Mapping[str, Stream],
  metadata: Mapping[str, Any],
  engine: encoder.Engine,
  has_documents: bool,
) -> None:
  """Writes the rows of each split and PackedData.metadata as a TFDS dataset."""
  shutil.rmtree(folder / NAME, ignore_errors=True)  # of an interrupted write
  target = folder / NAME / VERSION
  target.mkdir(parents=True)
  shards = {}
  for name, stream in streams.items():
    parts = stream.shards()
    file = f'{NAME}-{name}.array_record'
    shards[name] = [
      (part, target / f'{file}-{i:05d}-of-{len(parts):05d}')
      for i, part in enumerate(parts)
    ]
  blank = dataclasses.replace(
    next(iter(streams.values())), ranges=np.zeros([0, 5], np.int64)
  )
  tasks = [
    (part.ranges, part.num_given, path)
    for name in shards
    for part, path in shards[name]
  ]
  for _ in engine.map(functools.partial(_write_shard, blank), tasks):
    pass
  job = blank.job

  def row_of(dtype: Any) -> tfds.features.Tensor:
    # Encoding.BYTES stores the numbers as they are in memory.
    encoding = tfds.features.Encoding.BYTES
    return tfds.features.Tensor(
      shape=(blank.length,), dtype=dtype, encoding=encoding
    )

  features: dict[str, Any] = {
    'tokens': row_of(job.dtype),
    'num_bytes': tfds.features.Scalar(np.int32),
  }
  if not job.tokenizer.is_lossless:
    features['token_bytes'] = row_of(np.uint32)
  if job.source.is_chat:
    features['marks'] = row_of(np.uint8)
  if has_documents:
    features['prompt_length'] = tfds.features.Scalar(np.int32)
  with quiet_tfds():
    tfds.folder_dataset.write_metadata(
      data_dir=target,
      features=features,
      split_infos=[
        tfds.core.SplitInfo(
          name=name,
          shard_lengths=[part.num_rows for part, _ in written],
          num_bytes=sum(path.stat().st_size for _, path in written),
        )
        for name, written in shards.items()
      ],
      check_data=False,
      description='Text packed into rows of token ids.',
      metadata=tfds.core.MetadataDict(metadata),
      disable_shuffling=True,
    )


def _write_shard(
  stream: Stream, task: tuple[np.ndarray, int, pathlib.Path]
) -> None:
  """Writes the records that TFDS would write for the same rows, but faster."""
  ranges, num_given, path = task
  writer = array_record.ArrayRecordWriter(str(path), 'group_size:1')
  shard = dataclasses.replace(stream, ranges=ranges, num_given=num_given)
  for row in shard.rows():
    example = Example()
    for name, value in row.items():
      feature = example.features.feature[name]
      if isinstance(value, np.ndarray):
        feature.bytes_list.value.append(value.tobytes())
      else:
        feature.int64_list.value.append(value)
    writer.write(example.SerializeToString(deterministic=True))
  writer.close()
