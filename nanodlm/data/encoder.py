"""Encodes the parts of a source to files of token ids, the slow stage.

A part becomes a file of ids and a table of its documents. The table is written
last and renamed into place: a part with a table is finished, and is never done
again. The ids follow from the source and the tokenizer alone, so any engine
with any number of workers leaves the same files.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
import dataclasses
import functools
import hashlib
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import threading
import time
import traceback
from typing import Any

import numpy as np

from nanodlm.data.folder import Interrupted
from nanodlm.data.sources.base import Part, Source
from nanodlm.data.tokenizers import chat
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.types import InputError, reason

# Texts are passed to the tokenizer's threads in groups of about this size; a
# single thread gains nothing from large groups.
BATCH_CHARS = 4 << 20
ONE_THREAD_CHARS = 1 << 18
PROGRESS_SECS = 3.0
# A row of the table of a part: a document that is not empty. `num_bytes` is the
# size of its text in UTF-8, `num_lost_bytes` the part of it that decoding does
# not give back, `num_tokens` includes the separator at its end, and
# `prompt_length` counts the ids of the prompt of a pair.
# `num_ends` is 0 if the document continues in another row; the rows of token
# ids in a part are one row, in which several documents may end.
DOCUMENT = np.dtype(
  [
    ('hash', np.uint64),
    ('num_bytes', np.int64),
    ('num_lost_bytes', np.int64),
    ('num_tokens', np.int64),
    ('prompt_length', np.int64),
    ('num_ends', np.int64),
  ]
)
Row = tuple[int, ...]  # The values of these fields.

# Marks of a token of a conversation: it is not scored; it ends a turn that is;
# it is the first one of a conversation, or of what fills the row after it; it
# fills the row.
GIVEN, END, START, FILL = 1, 2, 4, 8

_log = logging.getLogger('nanodlm')


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What all parts share; it can be pickled.

  Attributes:
    folder: where the files are written; the same for all workers.
    num_threads: threads that encode in each process; 0 is one for each core.
  """

  source: Source
  tokenizer: Tokenizer
  folder: pathlib.Path
  num_threads: int

  @functools.cached_property
  def dtype(self) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id."""
    is_small = self.tokenizer.vocab_size <= 1 << 16
    return np.dtype(np.uint16 if is_small else np.uint32)

  @functools.cached_property
  def record(self) -> np.dtype:
    """The dtype of a stored token.

    'token' is its id. If the tokenizer may change the text, 'num_bytes' are the
    bytes of the text that it stands for, which its piece does not show. Of a
    conversation, 'marks' is a sum of GIVEN, END and START.
    """
    fields: list[Any] = [('token', self.dtype)]
    if not self.tokenizer.is_lossless:
      fields.append(('num_bytes', np.uint32))
    if self.source.is_chat:
      fields.append(('marks', np.uint8))
    return np.dtype(fields)

  def records(self, ids: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """Returns an array of `record`."""
    records = np.zeros(ids.shape, self.record)
    records['token'] = ids
    if not self.tokenizer.is_lossless:
      records['num_bytes'] = num_bytes
    return records


@dataclasses.dataclass(frozen=True)
class Task:
  """A part, or some characters of one that belongs to a single document.

  Attributes:
    number: the number of its files.
    part: the part.
    split: 'train' or 'validation'; 'any' if its documents are assigned later;
      'stream' if the whole source is one stream of tokens, which is cut later.
    start: its first character.
    stop: one past its last character, where the text then ends although its
      document does not; None is the end of the part.
  """

  number: int
  part: Part
  split: str
  start: int = 0
  stop: int | None = None


class Engine(abc.ABC):
  """What runs the work; the result is the same with each."""

  num_threads = 1  # That encode in each process; see Job.

  @abc.abstractmethod
  def map(self, function: Callable[[Any], None], tasks: Sequence) -> Iterator:
    """Calls function(task) for all tasks; yields finished tasks in any order.

    An engine may yield none of them: the files show what is done.
    """


def encode(job: Job, tasks: Sequence[Task], engine: Engine) -> list[np.ndarray]:
  """Encodes the parts that are not finished; returns the table of each part.

  Raises:
    InputError: the source is damaged, or a worker was lost.
  """
  missing = [task for task in tasks if _read_table(job, task) is None]
  if num_done := len(tasks) - len(missing):
    _log.info(
      f'resuming an earlier preparation: {num_done} of {len(tasks)} parts done'
    )
  start = due = time.monotonic()
  millions = 0.0
  work = engine.map(functools.partial(encode_part, job), missing)
  for i, task in enumerate(work, start=1):
    table = _read_table(job, task)
    millions += 0 if table is None else table['num_tokens'].sum() / 1e6
    if time.monotonic() - due >= PROGRESS_SECS:
      due = time.monotonic()
      _log.info(
        f'encoding: {millions:.1f} M tokens, {millions / (due - start):.2f} M '
        f'tokens/s, {i / len(missing):.0%} done'
      )
  tables = []
  for task in tasks:
    if (table := _read_table(job, task)) is None:
      raise job.source.error(
        f'part {task.number} is not in {job.folder}: workers on other machines '
        'must see data.data_dir under the same path'
      )
    tables.append(table)
  secs = time.monotonic() - start
  _log.info(f'encoded the text (parts: {len(missing)}) in {secs:.1f} s')
  return tables


def tokens_path(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Returns the path of the ids of a part."""
  return folder / f'part-{number:06d}.tokens'


def encode_part(job: Job, task: Task) -> None:
  """Writes the two files of a part.

  Raises:
    InputError: the source is damaged, or holds ids outside the vocabulary.
  """
  path = tokens_path(job.folder, task.number)
  # Some engines retry a part while another process still works on it.
  partial = path.with_suffix(f'.partial-{os.getpid()}')
  with open(partial, 'wb') as file:
    write = _write_ids if job.source.is_tokens else _write_documents
    write = _write_conversations if job.source.is_chat else write
    documents = np.fromiter(write(job, task, file), DOCUMENT)
  os.replace(partial, path)
  with open(partial, 'wb') as file:
    np.savez(file, documents=documents, task=repr(task))
  os.replace(partial, path.with_suffix('.npz'))


def _read_table(job: Job, task: Task) -> np.ndarray | None:
  """Returns the table of a part; None if the part is not finished."""
  path = tokens_path(job.folder, task.number)
  try:
    with np.load(path.with_suffix('.npz')) as saved:
      table, cut = saved['documents'], saved['task']
    size = table['num_tokens'].sum() * job.record.itemsize
    # Another version may have written another table, or cut into other parts.
    is_same = table.dtype == DOCUMENT and cut == repr(task)
    return table if is_same and path.stat().st_size == size else None
  # NumPy raises errors of many classes for a truncated file.
  except Exception:
    return None


def _write_documents(job: Job, task: Task, file: Any) -> Iterator[Row]:
  """Writes documents, each followed by a separator; yields their table."""
  tokenizer, separator = job.tokenizer, np.array([job.tokenizer.separator_id])
  digest = None  # None: the next piece begins a document.
  num_bytes = num_lost = num_counted = num_tokens = prompt_length = 0
  for batch in _batches(job, task):
    texts = [text for text, _, _ in batch]
    encoded = tokenizer.encode_batch(texts, job.num_threads)
    for (text, is_last, is_end), ids in zip(batch, encoded, strict=True):
      is_start = digest is None
      is_prompt = is_start and job.source.is_pairs
      if digest is None:
        digest = hashlib.blake2b(digest_size=8)
        num_bytes, num_lost, num_counted, num_tokens = 0, 0, 0, 0
        prompt_length = ids.size * is_prompt
      elif tokenizer.adds_space:
        ids = tokenizer.encode_rest(text)
      data = text.encode()
      digest.update(data)
      sizes = tokenizer.count_bytes(text, ids, is_start)
      file.write(job.records(ids, sizes).tobytes())
      num_bytes += len(data)
      num_lost += tokenizer.lost_bytes(text, ids, is_start)
      # What a prompt loses is not of the response.
      num_counted += len(data) if is_prompt else int(sizes.sum())
      num_tokens += ids.size
      if is_last:
        if is_end:
          # The bytes of a text without ids are counted here.
          rest = np.array([num_bytes - num_counted])
          file.write(job.records(separator, rest).tobytes())
          num_tokens += 1
        own_hash = int.from_bytes(digest.digest(), 'little')
        num_ends = int(is_end and task.stop is None)
        yield own_hash, num_bytes, num_lost, num_tokens, prompt_length, num_ends
        digest = None


def _write_conversations(job: Job, task: Task, file: Any) -> Iterator[Row]:
  """Writes conversations up to their last scored turn; yields their table."""
  chat_format = chat.make_format(job.tokenizer)
  for document in job.source.read(task.part):
    try:
      encoded = chat_format.encode(job.tokenizer, document.messages).to_score()
    except InputError as error:
      raise job.source.error(f'{document.place()}: {error}') from error
    records = job.records(encoded.ids, encoded.num_bytes)
    records['marks'] = np.where(encoded.scored, 0, GIVEN) + END * encoded.ends
    records['marks'][0] += START
    file.write(records.tobytes())
    said = ''.join(document.open()).encode()
    digest = hashlib.blake2b(said, digest_size=8).digest()
    own_hash = int.from_bytes(digest, 'little')
    yield own_hash, len(said), encoded.num_lost, len(records), 0, 1


def cut(pieces: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
  """Yields characters [start, stop) of a text in pieces, in pieces."""
  position = 0
  for piece in pieces:
    end = len(piece) if stop is None else max(stop - position, 0)
    part = piece[max(start - position, 0) : end]
    position += len(piece)
    if part:
      yield part


def _batches(job: Job, task: Task) -> Iterator[list[tuple[str, bool, bool]]]:
  """Yields pieces of text in groups for the tokenizer's threads.

  A piece is (text, whether it ends its document, whether the text ends).
  """
  num_chars = ONE_THREAD_CHARS if job.num_threads == 1 else BATCH_CHARS
  batch, size = [], 0
  for document in job.source.read(task.part):
    is_end = document.is_end or task.stop is not None
    pieces = cut(document.open(), task.start, task.stop)
    piece = next(pieces, '')
    while piece:
      following = next(pieces, '')
      batch.append((piece, not following, is_end))
      size += len(piece)
      piece = following
      if size >= num_chars:
        yield batch
        batch, size = [], 0
  if batch:
    yield batch


def _write_ids(job: Job, task: Task, file: Any) -> Iterator[Row]:
  """Writes rows of ids unchanged, if the tokenizer has all of them."""
  num_bytes = num_tokens = num_ends = 0
  num_ids = job.tokenizer.mask_id
  for rows in job.source.read(task.part):
    # The published id of the mask becomes one that no text has.
    ids = job.tokenizer.swap_mask(rows.ids)
    bad = np.flatnonzero((ids < 0) | (ids >= num_ids))
    if bad.size:
      name, own = job.tokenizer.name, f'are 0 to {num_ids - 1}'
      if ids[bad[0]] != rows.ids[bad[0]]:
        own = 'of texts lack it: it is the mask'
      raise job.source.error(
        f'{rows.place(bad[0])} holds the id {rows.ids[bad[0]]}, but the ids of '
        f'tokenizer.name={name!r} {own}; name the tokenizer that made the ids'
      )
    sizes = job.tokenizer.num_bytes[ids]
    file.write(job.records(ids, sizes).tobytes())
    num_tokens += ids.size
    num_bytes += int(sizes.sum())
    num_ends += int((ids == job.tokenizer.separator_id).sum())
  yield 0, num_bytes, 0, num_tokens, 0, num_ends


class ThisProcess(Engine):
  """Encodes with the threads of this process."""

  num_threads = 0

  def map(self, function: Callable[[Any], None], tasks: Sequence) -> Iterator:
    for task in tasks:
      function(task)
      yield task


@dataclasses.dataclass(frozen=True)
class Workers(Engine):
  """Encodes with `num_workers` >= 1 processes of this machine."""

  num_workers: int

  def map(self, function: Callable[[Any], None], tasks: Sequence) -> Iterator:
    others = set(multiprocessing.active_children())
    # Forking would copy the locks of JAX's and TFDS's threads.
    context = multiprocessing.get_context('spawn')
    # A worker receives the function, which may be large, only once.
    executor = futures.ProcessPoolExecutor(
      self.num_workers, context, _start_worker, (function,)
    )
    try:
      work = [executor.submit(_work, task) for task in tasks]
      for done in futures.as_completed(work):
        yield done.result()
    except process.BrokenProcessPool as error:
      raise Interrupted(
        'a process of the preparation was killed, probably because memory ran '
        'out. Run again with a smaller --prepare_workers; finished parts are '
        'kept'
      ) from error
    finally:
      # After an error or Ctrl-C, nothing waits for tasks in progress.
      for worker in set(multiprocessing.active_children()) - others:
        worker.kill()
      executor.shutdown(cancel_futures=True)


_function: Callable[[Any], None]  # Of this process, if it is a worker.


def _start_worker(function: Callable[[Any], None]) -> None:
  """Leaves Ctrl-C to the parent, and ends if the parent is killed."""
  global _function
  _function = function
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent: Any = multiprocessing.parent_process()
  end = lambda: (parent.join(), os._exit(1))
  threading.Thread(target=end, daemon=True).start()


def _work(task: Any) -> Any:
  try:
    _function(task)
  except (InputError, OSError):
    raise
  # Errors of other classes may not survive being sent to another process.
  except Exception:
    raise RuntimeError(traceback.format_exc()) from None
  return task


@dataclasses.dataclass(frozen=True)
class Beam(Engine):
  """Encodes with Apache Beam and options such as 'runner=FlinkRunner'."""

  options: tuple[str, ...]

  def __post_init__(self):
    try:
      self._make_pipeline()
    # Beam raises errors of several classes for names and missing packages.
    except Exception as error:
      raise InputError(
        f'--prepare_engine=beam with --beam_options={list(self.options)}: '
        f"{reason(error)}. Beam itself is installed by pip install -e '.[beam]'"
      ) from error

  def _make_pipeline(self) -> Any:
    from apache_beam import Pipeline  # pyright: ignore[reportMissingImports]  # An extra.
    from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]

    given = [f'--{option.lstrip("-")}' for option in self.options]
    return Pipeline(options=pipeline_options.PipelineOptions(given))

  def map(self, function: Callable[[Any], None], tasks: Sequence) -> Iterator:
    import apache_beam as beam  # pyright: ignore[reportMissingImports]

    try:
      with self._make_pipeline() as pipeline:
        # Without Reshuffle, a runner may fuse all tasks into one worker.
        todo = pipeline | beam.Create(tasks) | beam.Reshuffle()
        _ = todo | 'Encode' >> beam.Map(function)
    # A worker's error arrives as another one, which contains its text.
    except Exception as error:
      text = f'{type(error).__name__}: {error}'
      if found := _WORKER_ERROR.search(text):
        raise InputError(found[1]) from error
      raise
    return iter(())


_WORKER_ERROR = re.compile(r'\bInputError: (.*?)(?: \[while running|\n|$)')
