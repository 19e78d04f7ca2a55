"""Parts of a source to files of token ids, by one process, several, or Beam.

A part becomes a file of ids and a table of its documents, under its number. The
table is written last and renamed into place: what has one is finished, whoever
made it, and is never made again. The ids follow from the source and the tokenizer
alone, so that any engine with any number of workers leaves the same files.
"""

import array
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import re
import signal
import traceback
from typing import Any, Protocol

import numpy as np

from nanodlm.data import sources, tokenizers
from nanodlm.types import InputError

# Texts are handed to the tokenizer's threads in groups of about this size, and
# of a part of it where there is one thread, which gains nothing from more.
BATCH_CHARS = 4 << 20
ONE_THREAD_CHARS = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What is the same for all parts; it can be pickled.

  Attributes:
    source: see sources.Source.
    tokenizer: see tokenizers.Tokenizer.
    folder: where the files go; the same for all workers.
    num_threads: that encode in a process; 0 is one for each core.
  """

  source: sources.Source
  tokenizer: tokenizers.Tokenizer
  folder: pathlib.Path
  num_threads: int

  @property
  def dtype(self) -> np.dtype:
    """The smaller of 16 and 32 bits that holds every id."""
    return np.dtype(
      np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
    )

  @property
  def is_pairs(self) -> bool:
    """Whether each document is a row: a prompt and its response."""
    return isinstance(self.source, sources.PairsSource)


@dataclasses.dataclass(frozen=True)
class Task:
  """A part, or some characters of one that is all of one document.

  Attributes:
    number: of its files.
    part: see sources.Part.
    split: 'train' or 'validation', '' where it is not known yet.
    start: its first character.
    stop: one past the last; None is the end of the part.
    is_end: whether the text ends here though its document does not.
  """

  number: int
  part: sources.Part
  split: str
  start: int = 0
  stop: int | None = None
  is_end: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """The documents of a part that are not empty, [n] each.

  Attributes:
    hashes: uint64 of their text.
    num_bytes: of their text in UTF-8.
    num_tokens: ids, a separator at the end included.
    prompt_lengths: int32, ids of the prompts of pairs; else none, [0].
  """

  hashes: np.ndarray
  num_bytes: np.ndarray
  num_tokens: np.ndarray
  prompt_lengths: np.ndarray


def tokens_path(folder: pathlib.Path, number: int) -> pathlib.Path:
  """The file of the ids of a part."""
  return folder / f'part-{number:06d}.tokens'


def _table_path(folder: pathlib.Path, number: int) -> pathlib.Path:
  return folder / f'part-{number:06d}.npz'


def encode_part(job: Job, task: Task) -> tuple[Task, Table]:
  """Writes the two files of a part; returns the task and its table.

  Raises:
    InputError: the source is broken, or has ids that the tokenizer has not.
  """
  path = tokens_path(job.folder, task.number)
  # Two processes may be at the same part where an engine tries a thing twice.
  partial = path.with_suffix(f'.partial-{os.getpid()}')
  with open(partial, 'wb') as file:
    if getattr(job.source, 'is_tokens', False):
      table = _write_ids(job, task, file)
    else:
      table = _write_documents(job, task, file)
  os.replace(partial, path)
  with open(partial, 'wb') as file:
    np.savez(file, **dataclasses.asdict(table))
  os.replace(partial, _table_path(job.folder, task.number))
  return task, table


def finished(job: Job, task: Task) -> Table | None:
  """The table of a part that is done, else None."""
  try:
    with np.load(_table_path(job.folder, task.number)) as arrays:
      table = Table(**arrays)
    size = tokens_path(job.folder, task.number).stat().st_size
  # Whatever NumPy makes of a file that the disk lost a piece of.
  except Exception:  # pylint: disable=broad-exception-caught
    return None
  whole = int(table.num_tokens.sum()) * job.dtype.itemsize
  return table if size == whole else None


def _write_documents(job: Job, task: Task, file: Any) -> Table:
  """Writes documents, each with a separator behind it."""
  separator = np.array([job.tokenizer.separator_id], job.dtype).tobytes()
  hashes, num_bytes = array.array('Q'), array.array('q')
  num_tokens, prompt_lengths = array.array('q'), array.array('i')
  digest = None  # None: the next piece begins a document
  num_chars = ONE_THREAD_CHARS if job.num_threads == 1 else BATCH_CHARS
  for batch in _batches(_pieces(job.source.read(task.part), task), num_chars):
    encoded = job.tokenizer.encode_batch(
      [text for text, _, _ in batch], job.num_threads
    )
    for (text, is_last, is_end), ids in zip(batch, encoded, strict=True):
      if digest is None:
        digest = hashlib.blake2b(digest_size=8)
        num_bytes.append(0)
        num_tokens.append(0)
        if job.is_pairs:
          prompt_lengths.append(ids.size)
      data = text.encode()
      digest.update(data)
      file.write(ids.astype(job.dtype).tobytes())
      num_bytes[-1] += len(data)
      num_tokens[-1] += ids.size
      if is_last:
        hashes.append(int.from_bytes(digest.digest(), 'little'))
        digest = None
        if is_end:
          file.write(separator)
          num_tokens[-1] += 1
  return Table(
    np.array(hashes, np.uint64),
    np.array(num_bytes, np.int64),
    np.array(num_tokens, np.int64),
    np.array(prompt_lengths, np.int32),
  )


def _pieces(
  documents: Iterable[sources.Document], task: Task
) -> Iterator[tuple[str, bool, bool]]:
  """(text, whether it is its document's last piece, and ends the text)."""
  for document in documents:
    pieces = cut(document.open(), task.start, task.stop)
    piece = next(pieces, '')
    while piece:
      following = next(pieces, '')
      yield piece, not following, document.is_end or task.is_end
      piece = following


def cut(pieces: Iterator[str], start: int, stop: int | None) -> Iterator[str]:
  """Characters [start, stop) of a text in pieces, in pieces."""
  position = 0
  for piece in pieces:
    end = len(piece) if stop is None else max(stop - position, 0)
    part = piece[max(start - position, 0) : end]
    position += len(piece)
    if part:
      yield part


def _batches(
  pieces: Iterator[tuple[str, bool, bool]], num_chars: int
) -> Iterator[list[tuple[str, bool, bool]]]:
  """Groups of about num_chars characters."""
  batch, size = [], 0
  for item in pieces:
    batch.append(item)
    size += len(item[0])
    if size >= num_chars:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _write_ids(job: Job, task: Task, file: Any) -> Table:
  """Writes rows of ids as they are, if the tokenizer has all of them."""
  num_bytes = num_tokens = 0
  num_ids = job.tokenizer.vocab_size - 1  # without the mask
  for rows in job.source.read(task.part):
    bad = np.flatnonzero((rows.ids < 0) | (rows.ids >= num_ids))
    if bad.size:
      raise InputError(
        f'data.source={job.source.spec!r}: {rows.place(bad[0])} holds the id '
        f'{rows.ids[bad[0]]}, but those of tokenizer.name='
        f'{job.tokenizer.name!r} are 0 to {num_ids - 1}; name the tokenizer '
        'that made the ids'
      )
    file.write(rows.ids.astype(job.dtype).tobytes())
    num_tokens += rows.ids.size
    num_bytes += int(job.tokenizer.num_bytes[rows.ids].sum())
  return Table(
    np.zeros([1], np.uint64),
    np.array([num_bytes]),
    np.array([num_tokens]),
    np.zeros([0], np.int32),
  )


# ----------------------------------------------------------------- engines


class Engine(Protocol):
  """Who does the work.

  Attributes:
    num_threads: that each process encodes with; see Job.
  """

  num_threads: int

  def map(
    self, function: Callable[[Any], Any], tasks: Sequence[Any]
  ) -> Iterator[Any]:
    """Calls function(task) for all tasks; yields results, in no order.

    An engine may yield none of them: what was done is seen in the files.
    """


@dataclasses.dataclass(frozen=True)
class ThisProcess:
  """Encodes with the threads of this process; see Engine."""

  num_threads: int = 0

  def map(
    self, function: Callable[[Any], Any], tasks: Sequence[Any]
  ) -> Iterator[Any]:
    return map(function, tasks)


class WorkerLost(InputError):
  """A worker died; what it and the others finished is kept."""


@dataclasses.dataclass(frozen=True)
class Workers:
  """So many processes of this machine; see Engine.

  Attributes:
    num_workers: at least 1.
    num_threads: see Engine.
  """

  num_workers: int
  num_threads: int = 1

  def __post_init__(self):
    if self.num_workers < 1:
      raise InputError(
        f'--prepare_workers={self.num_workers} must be at least 1'
      )

  def map(
    self, function: Callable[[Any], Any], tasks: Sequence[Any]
  ) -> Iterator[Any]:
    # Forking would copy the locks of JAX's and TFDS's threads. An executor of
    # concurrent.futures can wait for its workers forever after two Ctrl-C.
    context = multiprocessing.get_context('spawn')
    rest, busy, workers = iter(tasks), [], []
    try:
      for task in itertools.islice(rest, self.num_workers):
        ours, theirs = context.Pipe()
        worker = context.Process(
          target=_serve, args=(theirs, function), daemon=True
        )
        worker.start()
        theirs.close()  # so that the end of the worker is the end of the pipe
        workers.append(worker)
        busy.append(ours)
        ours.send(task)
      while busy:
        for pipe in connection.wait(busy):
          error, result = pipe.recv()
          if error is not None:
            raise error
          busy.remove(pipe)
          for task in itertools.islice(rest, 1):
            busy.append(pipe)
            pipe.send(task)
          yield result
    except (EOFError, ConnectionError) as error:
      raise WorkerLost(
        'a process of the preparation was killed, most likely for want of '
        'memory. Run again, with a smaller --prepare_workers: what is finished '
        'is kept'
      ) from error
    finally:
      for worker in workers:
        worker.kill()  # idle, or at work for nobody
      for worker in workers:
        worker.join()


def _serve(pipe: connection.Connection, function: Callable[[Any], Any]) -> None:
  """A worker: answers tasks with (error, result), until the pipe ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
  with contextlib.suppress(EOFError, ConnectionError):  # so is its own end
    while True:
      task = pipe.recv()
      try:
        answer = None, function(task)
      # Raised again by the parent.
      except Exception as error:  # pylint: disable=broad-exception-caught
        answer = _sendable(error, traceback.format_exc()), None
      pipe.send(answer)


def _sendable(error: Exception, text: str) -> Exception:
  """An error that any process can read; `text` is its traceback."""
  if isinstance(error, InputError):
    return error
  if type(error) in (OSError, FileNotFoundError, PermissionError, MemoryError):
    error.add_note(text)
    return error
  # Of a class of somebody else's, which may not survive the way.
  return RuntimeError(text)


@dataclasses.dataclass(frozen=True)
class Beam:
  """Apache Beam, on the runner that its options name; see Engine.

  Attributes:
    options: of the pipeline, as 'runner=FlinkRunner'.
    num_threads: see Engine.
  """

  options: tuple[str, ...]
  num_threads: int = 1

  def __post_init__(self):
    try:
      import apache_beam  # pylint: disable=g-import-not-at-top
    except ModuleNotFoundError as error:
      raise InputError(
        "--prepare_engine='beam' needs the package apache-beam: "
        "pip install -e '.[beam]'"
      ) from error
    for option in self.options:
      if option.startswith('-'):
        raise InputError(
          f'--beam_options: write {option.lstrip("-")!r} instead of {option!r}'
        )
    try:
      apache_beam.runners.runner.create_runner(self.runner)
    # Beam raises errors of several kinds for names and for missing packages.
    except Exception as error:  # pylint: disable=broad-exception-caught
      raise InputError(
        f'--beam_options: runner={self.runner}: {error}'
      ) from error

  @property
  def pipeline_options(self) -> Any:
    """apache_beam's PipelineOptions."""
    from apache_beam.options import pipeline_options  # pylint: disable=g-import-not-at-top

    return pipeline_options.PipelineOptions(
      [f'--{option}' for option in self.options]
    )

  @property
  def runner(self) -> str:
    """The name of the runner, by default Beam's local one."""
    from apache_beam.options import pipeline_options  # pylint: disable=g-import-not-at-top

    return (
      self.pipeline_options.view_as(pipeline_options.StandardOptions).runner
      or 'DirectRunner'
    )

  def map(
    self, function: Callable[[Any], Any], tasks: Sequence[Any]
  ) -> Iterator[Any]:
    import apache_beam as beam  # pylint: disable=g-import-not-at-top

    try:
      with beam.Pipeline(self.runner, self.pipeline_options) as pipeline:
        _ = (
          pipeline
          | beam.Create(tasks)
          | beam.Reshuffle()  # else a runner may fuse all into one worker
          | 'Encode' >> beam.Map(_run, function)
        )
    # A worker's error comes as another one that holds its text somewhere.
    except Exception as error:  # pylint: disable=broad-exception-caught
      text = f'{type(error).__name__}: {error}'
      if found := _WORKER_ERROR.search(text):
        raise InputError(found[1]) from error
      raise
    return iter(())


_WORKER_ERROR = re.compile(r'\bInputError: (.*?)(?: \[while running|\n|$)')


def _run(task: Any, function: Callable[[Any], Any]) -> None:
  function(task)
