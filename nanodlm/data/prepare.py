"""Text to rows of exactly L tokens on disk, once, as a TFDS dataset.

Documents are encoded, a separator is put after each, and the resulting stream is
cut into rows of L tokens; train and validation are packed separately and nothing
else is inserted (no BOS or EOS per row: they would be free tokens). Rows of token
ids are one stream already and are cut as they are. A pair of a
prompt and a response is a row of its own instead: the prompt, the response, and
separators to the end of the row, at least one. The two texts are encoded apart,
as a prompt is when sampling. Pairs that do not fit are left out. The result is
an ArrayRecord dataset in data_dir, in a folder whose name is a hash of everything
that determines its content, so a changed file, tokenizer or length is prepared
anew and anything else is opened in milliseconds. Nothing here needs TensorFlow.

Two stages, each by one process, several, or Beam (see encoder.Engine): parts of
the source to plain files of token ids, which is nearly all of the work and is kept
if it is interrupted; then shards of rows from those files. Between them it is
decided which document is held out. TFDS's own way for ordered data
(GeneratorBasedBuilder with disable_shuffling) holds all rows in memory to sort
them, and would read and encode the source once per split.
"""

import array
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
from importlib import metadata as packages
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from nanodlm.data import encoder, sources, tokenizers
from nanodlm.types import InputError

SPLITS = ('train', 'validation')
# Part of the folder's name: increase it when the content of the rows changes.
_FORMAT_VERSION = 1
# With Beam, TFDS holds the rows of the shards that it writes in memory.
_SHARD_ROWS = 1 << 17
_SHARD_BYTES = 64 << 20
# Rows are read so many bytes at a time.
_BLOCK_BYTES = 1 << 20
_PROGRESS_SECS = 3.0
# Of a mixture, so few rows are too few to evaluate on.
_FEW_ROWS = 32
# Leftovers of another machine that shares the folder cannot be told from work in
# progress, except by not having been touched for this long; and those of this one
# may be gone on with.
_STALE_SECS = 24 * 3600

_INCOMPLETE = '.incomplete-'
_MODEL_NAME = 'sentencepiece.model'
_MANIFEST_NAME = 'manifest.json'
_PLAN_NAME = 'plan.sha256'

_log = logging.getLogger('nanodlm')

# Documents, tokens and bytes so far, and the share of the work if it is known.
Progress = Callable[[int, int, int, float | None], None]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
  """The rows of one split, read from disk at random in about 30 microseconds.

  Attributes:
    records: random access to serialized tf.train.Example records.
    length: tokens per row.
    dtype: how ids are stored, uint16 or uint32.
    files: the path and number of rows of each file, in order.
  """

  records: Any
  length: int
  dtype: np.dtype
  files: tuple[tuple[pathlib.Path, int], ...]

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, i: int) -> dict[str, Any]:
    """Returns {'tokens': [L] int32, 'num_bytes': int} of row i >= 0.

    A pair also has its 'prompt_length', in tokens; its num_bytes are those of
    the response.

    Raises:
      InputError: the row's place on the disk is damaged: ArrayRecord keeps a hash
        of every row and of its own structure.
    """
    try:
      record = self.records[i]
    except (RuntimeError, OSError) as error:
      ends = itertools.accumulate(num_rows for _, num_rows in self.files)
      path = self.files[[i < end for end in ends].index(True)][0]
      raise _damaged(path, error) from error
    features = tf_example_pb2.Example.FromString(record).features.feature
    tokens = np.frombuffer(features['tokens'].bytes_list.value[0], self.dtype)
    scalars = {
      name: feature.int64_list.value[0]
      for name, feature in features.items()
      if name != 'tokens'
    }
    return {'tokens': tokens.astype(np.int32), **scalars}


@dataclasses.dataclass(frozen=True, eq=False)
class MixedRows:
  """The rows of several datasets behind one another, or some of them.

  Attributes:
    parts: the rows of each dataset.
    order: which of all rows, counted through, are in it, in order; None is all.
  """

  parts: tuple[PackedRows, ...]
  order: np.ndarray | None = None

  def __len__(self) -> int:
    return sum(map(len, self.parts)) if self.order is None else len(self.order)

  def __getitem__(self, i: int) -> dict[str, Any]:
    """Returns row i >= 0; see PackedRows."""
    i = i if self.order is None else int(self.order[i])
    for rows in self.parts:
      if i < len(rows):
        return rows[i]
      i -= len(rows)
    raise IndexError(i)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedData:
  """A prepared dataset, or a mixture of some.

  Attributes:
    folders: where it lies; of a mixture, of each of its datasets.
    length: L, tokens per row.
    tokenizer: what made the tokens.
    train: rows of the training text.
    validation: rows of the validation text.
    weights: of a mixture, the share of the examples that comes from each of
      train.parts; otherwise (1,).
    metadata: JSON values: 'source', 'source_fingerprint', 'tokenizer' (its
      to_json()), 'length', 'eval_fraction', and for each of SPLITS a dict with
      'num_rows', 'num_tokens' (in rows), 'num_bytes' (of text, in rows),
      'num_documents', 'num_dropped_tokens' (at the end, less than a row) and
      'num_dropped_documents' (pairs longer than a row).
  """

  folders: tuple[str, ...]
  length: int
  tokenizer: tokenizers.Tokenizer
  train: PackedRows | MixedRows
  validation: PackedRows | MixedRows
  metadata: Mapping[str, Any]
  weights: tuple[float, ...] = (1.0,)

  @property
  def is_pairs(self) -> bool:
    """Whether a row is a prompt and its response."""
    return self.metadata['source'].startswith(sources.PAIRS)

  @property
  def train_borders(self) -> tuple[int, ...]:
    """Where the training rows of each dataset begin, and their number at last."""
    parts = (
      self.train.parts if isinstance(self.train, MixedRows) else (self.train,)
    )
    return tuple(itertools.accumulate(map(len, parts), initial=0))


class PackedTokens(tfds.core.ShardBasedBuilder):
  """The TFDS builder: writes the rows of two streams of token ids, in order."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    *,
    data_dir: str,
    streams: 'Mapping[str, _Stream]',
    metadata: Mapping[str, Any],
    engine: encoder.Engine,
  ):
    """Describes the dataset; download_and_prepare() writes it.

    Args:
      data_dir: where its folder is made.
      streams: the tokens of each of SPLITS.
      metadata: JSON values kept with the dataset; see PackedData.
      engine: who writes the shards. With Beam it is TFDS that drives it.
    """
    self._streams, self._metadata, self._engine = streams, metadata, engine
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    train = self._streams['train']
    is_pairs = train.prompt_lengths is not None
    return tfds.core.DatasetInfo(
      builder=self,
      description='Text packed into rows of token ids.',
      features=tfds.features.FeaturesDict(
        {
          # 'bytes' keeps the ids as they are in memory: nothing to decode.
          'tokens': tfds.features.Tensor(
            shape=(train.length,),
            dtype=train.dtype,
            encoding=tfds.features.Encoding.BYTES,
          ),
          'num_bytes': tfds.features.Scalar(np.int32),
          **(
            {'prompt_length': tfds.features.Scalar(np.int32)}
            if is_pairs
            else {}
          ),
        }
      ),
      metadata=tfds.core.MetadataDict(self._metadata),
      disable_shuffling=True,
    )

  def _shard_iterators_per_split(self, dl_manager) -> dict[str, Sequence[Any]]:
    del dl_manager  # nothing to download
    # TFDS runs the pipeline of the first split again with that of the second, so
    # the short one comes first.
    return {
      split: [
        functools.partial(_enumerated, shard)
        for shard in self._streams[split].shards()
      ]
      for split in reversed(SPLITS)
    }

  def _download_and_prepare(self, dl_manager, download_config=None) -> None:
    if isinstance(self._engine, encoder.Beam):
      super()._download_and_prepare(dl_manager, download_config)
      return
    # What the method does, with the engine's processes; and TFDS's own way to
    # make a record takes 80 microseconds of the 200 that the tokens of a row do.
    infos, shards = [], []
    for split in SPLITS:
      template = self._get_filename_template(split_name=split)
      streams = self._streams[split].shards()
      paths = [
        template.sharded_filepath(shard_index=i, num_shards=len(streams))
        for i in range(len(streams))
      ]
      shards += [
        (stream, os.fspath(path))
        for stream, path in zip(streams, paths, strict=True)
      ]
      infos.append(
        (split, template, paths, [stream.num_rows for stream in streams])
      )
    for _ in self._engine.map(
      functools.partial(_write_shard, self._example_writer()), shards
    ):
      pass
    self.info.set_splits(
      tfds.core.splits.SplitDict(
        [
          tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths,
            filename_template=template,
            num_bytes=sum(os.path.getsize(path) for path in paths),
          )
          for split, template, paths, lengths in infos
        ]
      )
    )


def _enumerated(stream: '_Stream') -> Iterator[tuple[int, dict[str, Any]]]:
  return enumerate(stream.rows())


def _write_shard(writer: Any, shard: 'tuple[_Stream, str]') -> None:
  """Writes the records that TFDS would write for the same rows."""

  def records() -> Iterator[tuple[int, bytes]]:
    for i, row in enumerate(shard[0].rows()):
      example = tf_example_pb2.Example()
      for name, value in row.items():
        feature = example.features.feature[name]
        if name == 'tokens':
          feature.bytes_list.value.append(value.tobytes())
        else:
          feature.int64_list.value.append(value)
      yield i, example.SerializeToString(deterministic=True)

  writer.write(path=shard[1], examples=records())


def prepare(
  data_config: Any,
  tokenizer_config: Any,
  progress: Progress | None = None,
  engine: encoder.Engine = encoder.ThisProcess(),
) -> PackedData:
  """Opens the dataset that the config describes, building it if missing.

  Safe against interruption (nothing unfinished is ever opened; the next
  preparation goes on with the finished parts) and against several processes
  preparing at once (they wait for each other on one machine; elsewhere the first
  to finish wins).

  Args:
    data_config: config.data, a dataclass: `source`, `length` (tokens per row),
      what is held out where the source has no validation split of its own:
      `eval_fraction` (of the text's bytes, in (0, 1)) or `eval_tokens`, the
      other being 0, and `test_tokens` behind those; `data_dir` ('' is
      $NANODLM_DATA_DIR or ~/.cache/nanodlm).
    tokenizer_config: config.tokenizer: `name`, `path`, `vocab_size`. With name
      'sentencepiece' and no path, a model of vocab_size pieces is trained on
      the training text and kept with the dataset.
    progress: called every few seconds with the numbers of documents, tokens and
      bytes so far, and the share of the work; by default they are logged.
    engine: who does the work; the result is the same.

  Returns:
    The dataset.

  Raises:
    InputError: a value is out of range, the source or tokenizer is missing or
      broken, the text is shorter than a row, or data_dir cannot be written.
  """
  length, eval_fraction = data_config.length, data_config.eval_fraction
  if length < 1:
    raise InputError(f'data.length={length} must be at least 1')
  sources.check_held_out(data_config)
  if data_config.source.startswith(sources.MIX):
    return _prepare_mixture(data_config, tokenizer_config, progress, engine)
  root = _data_dir(data_config.data_dir)
  source = sources.make_source(data_config.source, str(root))
  trains_tokenizer = (
    tokenizer_config.name == 'sentencepiece' and not tokenizer_config.path
  )
  if trains_tokenizer:
    _check_trainable(source, data_config)
    tokenizer = None
    tokenizer_key = f'sentencepiece-trained-{tokenizer_config.vocab_size}'
  else:
    tokenizer = tokenizers.make_tokenizer(tokenizer_config)
    tokenizer_key = tokenizer.fingerprint

  source_fingerprint = source.fingerprint()
  identity = {
    'format': _FORMAT_VERSION,
    'source': source.spec,
    'source_fingerprint': source_fingerprint,
    'tokenizer': tokenizer_key,
    'length': length,
    'eval_fraction': eval_fraction,
    # Left out at 0: what was prepared before they existed keeps its name.
    **{
      key: getattr(data_config, key)
      for key in ('eval_tokens', 'test_tokens')
      if getattr(data_config, key)
    },
  }
  digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
  kind = source.spec.partition(':')[0]
  path = root / (
    f'{kind}-{tokenizer_config.name}-{length}-{digest.hexdigest()[:16]}'
  )
  if path.exists():
    return _open(path, tokenizer)

  _check_writable(root)
  with _lock(path) as is_held:
    if path.exists():  # another process finished while this one waited
      return _open(path, tokenizer)
    # Where nothing can be locked, several processes may be at work at once.
    work = root / (
      f'{path.name}{_INCOMPLETE}{socket.gethostname()}-'
      + ('work' if is_held else str(os.getpid()))
    )
    _remove_leftovers(root, path, keep=work, is_held=is_held)
    work.mkdir(exist_ok=True)
    try:
      tasks = _plan(source, data_config)
      if tokenizer is None:
        tokenizer = _train_tokenizer(
          source,
          tasks,
          eval_fraction,
          progress,
          tokenizer_config.vocab_size,
          work,
          path,
        )
      job = encoder.Job(source, tokenizer, work, engine.num_threads)
      _build(
        job,
        tasks,
        data_config,
        {**identity, 'tokenizer': tokenizer.to_json()},
        progress,
        engine,
      )
      if source.fingerprint() != source_fingerprint:
        raise InputError(
          f'data.source={source.spec!r} changed while it was '
          'being prepared; run again when it is complete'
        )
      _publish(work, path)
    except encoder.WorkerLost:
      raise
    except InputError:
      shutil.rmtree(work, ignore_errors=True)
      raise
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      shutil.rmtree(work, ignore_errors=True)
      raise _disk_full(root) from error
  return _open(path, tokenizer)


def _check_trainable(source: sources.Source, data_config: Any) -> None:
  """Raises InputError where no SentencePiece model can be trained on a source."""
  if data_config.eval_tokens:
    raise InputError(
      f'data.eval_tokens={data_config.eval_tokens!r} cannot be counted before '
      'the tokenizer is trained on the rest; use data.eval_fraction, or name a '
      'model in tokenizer.path'
    )
  if _is_tokens(source):
    raise InputError(
      f'data.source={source.spec!r} holds token ids, on which no '
      'SentencePiece model can be trained; name in tokenizer.name '
      'or tokenizer.path what made them'
    )


def _prepare_mixture(
  data_config: Any,
  tokenizer_config: Any,
  progress: Progress | None,
  engine: encoder.Engine,
) -> PackedData:
  """Prepares each source by itself, and puts them beside one another."""
  mixture = sources.parse_mixture(data_config.source)
  if tokenizer_config.name == 'sentencepiece' and not tokenizer_config.path:
    raise InputError(
      f"tokenizer.path='' trains a SentencePiece model on the source, but "
      f'data.source={data_config.source!r} has several; name a model'
    )
  weights = tuple(weight for weight, _ in mixture)
  all_packed = [
    prepare(
      dataclasses.replace(data_config, source=source),
      tokenizer_config,
      progress,
      engine,
    )
    for _, source in mixture
  ]
  first = all_packed[0]
  held_out = [packed.validation for packed in all_packed]
  borders = list(itertools.accumulate(map(len, held_out), initial=0))
  # As many of each as its weight says, and in turn, so that the first few are
  # a sample of the mixture, too.
  mixed = grain.MapDataset.mix(
    [
      grain.MapDataset.range(start, stop)
      for start, stop in itertools.pairwise(borders)
    ],
    weights,
  )
  order = np.array([mixed[i] for i in range(len(mixed))], np.int64)
  _log.info(
    'mixture: %d of the %d rows held out are evaluated on, in the shares '
    'of the weights',
    len(order),
    borders[-1],
  )
  nums = np.histogram(order, borders)[0]
  if len(order) < _FEW_ROWS or not nums.all():
    _log.warning(
      'data.source=%r: rows evaluated on: %d, for they end where keeping to the '
      'weights needs more of a source than is held out: %s. Hold out more '
      '(data.eval_fraction, data.eval_tokens), or change the weights',
      data_config.source,
      len(order),
      ', '.join(
        f'{num} of {len(rows)} of {source!r} (weight {weight:g})'
        for num, rows, (weight, source) in zip(
          nums, held_out, mixture, strict=True
        )
      ),
    )
  fingerprints = [
    packed.metadata['source_fingerprint'] for packed in all_packed
  ]
  metadata = {
    **first.metadata,
    'source': data_config.source,
    'source_fingerprint': hashlib.sha256(
      repr(fingerprints).encode()
    ).hexdigest(),
    **{
      split: {
        key: sum(packed.metadata[split][key] for packed in all_packed)
        for key in first.metadata[split]
      }
      for split in SPLITS
    },
  }
  return PackedData(
    folders=sum((packed.folders for packed in all_packed), ()),
    length=first.length,
    tokenizer=first.tokenizer,
    train=MixedRows(tuple(packed.train for packed in all_packed)),
    validation=MixedRows(tuple(held_out), order),
    metadata=metadata,
    weights=weights,
  )


def _open(
  path: pathlib.Path, tokenizer: tokenizers.Tokenizer | None
) -> PackedData:
  """Opens a finished dataset; without a tokenizer it has its own."""
  if tokenizer is None:
    tokenizer = tokenizers.load_sentencepiece(str(path / _MODEL_NAME))
  folder = path / 'packed_tokens' / '1.0.0'
  try:
    with sources.quiet_tfds():
      builder = tfds.builder_from_directory(folder)
      metadata = dict(builder.info.metadata)
      dtype = np.dtype(builder.info.features['tokens'].np_dtype)
      rows = {
        split: PackedRows(
          builder.as_data_source(split).data_source,
          metadata['length'],
          dtype,
          _checked_files(
            builder.info.splits[split], metadata[split]['num_rows']
          ),
        )
        for split in SPLITS
      }
  except InputError:
    raise
  # Whatever TFDS makes of files that are not what it wrote: JSON, protocol buffer,
  # key and assertion errors.
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise _damaged(folder, error) from error
  return PackedData(
    folders=(str(path),),
    length=metadata['length'],
    tokenizer=tokenizer,
    metadata=metadata,
    **rows,
  )


def _checked_files(
  split: Any, num_rows: int
) -> tuple[tuple[pathlib.Path, int], ...]:
  """The files of a split and their rows, if all are there and as long as written.

  Their content has hashes, which are checked as it is read.
  """
  paths = [pathlib.Path(path) for path in split.filepaths]
  size = sum(path.stat().st_size for path in paths)
  if size != split.num_bytes:
    raise _damaged(
      paths[0] if len(paths) == 1 else paths[0].parent,
      f'{size} bytes instead of {int(split.num_bytes)}',
    )
  if sum(split.shard_lengths) != num_rows:
    raise _damaged(
      paths[0].parent, f'{sum(split.shard_lengths)} rows instead of {num_rows}'
    )
  return tuple(zip(paths, split.shard_lengths, strict=True))


def _damaged(path: pathlib.Path, error: Exception | str) -> InputError:
  """What to say of a file of a prepared dataset, or of the folder it lies in."""
  folder = next(
    parent for parent in (path, *path.parents) if parent.name == 'packed_tokens'
  ).parent
  return InputError(
    f'prepared data {path} is damaged ({error}). Delete '
    f'{folder}, and the next start prepares it again'
  )


# ------------------------------------------------------------------- split


def _is_tokens(source: sources.Source) -> bool:
  return getattr(source, 'is_tokens', False)


def _plan(source: sources.Source, data_config: Any) -> list[encoder.Task]:
  """The tasks of the first stage, with the split of each where it is known.

  One document is cut near its end, at a character, for data.eval_fraction. What
  is held out of several documents, or is counted in tokens, is chosen later.
  """
  splits = source.splits
  if splits == SPLITS:
    parts = [(part, split) for split in SPLITS for part in source.parts(split)]
  else:
    parts = [(part, '') for part in source.parts('train')]
  tasks = [encoder.Task(i, *part) for i, part in enumerate(parts)]
  if splits == SPLITS and data_config.test_tokens:
    raise InputError(
      f'data.test_tokens={data_config.test_tokens!r} has no effect with '
      f'data.source={source.spec!r}, which has a validation split of its own'
    )
  if _is_tokens(source):
    return tasks
  num_documents = _count_documents(source)
  if not num_documents:
    raise InputError(f'data.source={source.spec!r} holds no text')
  if splits == SPLITS:
    return tasks
  if num_documents == 1 and isinstance(source, sources.PairsSource):
    raise InputError(
      f'data.source={source.spec!r} holds one pair only; give '
      'at least two, to train on and to evaluate on'
    )
  if num_documents > 1:
    if data_config.test_tokens:
      raise InputError(
        f'data.test_tokens={data_config.test_tokens!r} are cut off the end of '
        f'one document or of rows of tokens; data.source={source.spec!r} has '
        'several documents'
      )
    return tasks
  if data_config.eval_tokens:
    # All that is in it is one stream, to be cut between two tokens.
    return [dataclasses.replace(task, split='all') for task in tasks]
  sizes = [
    sum(
      len(piece)
      for document in source.read(task.part)
      for piece in document.open()
    )
    for task in tasks
  ]
  position = int(sum(sizes) * (1 - data_config.eval_fraction))
  cut_tasks = []
  for task, size in zip(tasks, sizes, strict=True):
    common = dict(number=len(cut_tasks), part=task.part)
    if 0 < position <= size:
      cut_tasks.append(
        encoder.Task(**common, split='train', stop=position, is_end=True)
      )
      common['number'] += 1
      cut_tasks.append(
        encoder.Task(**common, split='validation', start=position)
      )
    else:
      cut_tasks.append(
        encoder.Task(**common, split='train' if position > 0 else 'validation')
      )
    position -= size
  return cut_tasks


def _count_documents(source: sources.Source) -> int:
  """How many documents with text: 0, 1, or 2 for more than one."""
  number, has_text = 0, False
  for document in sources.documents(source, 'train'):
    has_text = has_text or bool(next(document.open(), ''))
    if document.is_end:
      number, has_text = number + has_text, False
      if number == 2:
        break
  return number


def _choose(
  hashes: np.ndarray, sizes: np.ndarray, eval_fraction: float
) -> np.ndarray:
  """Which documents are validation: [n] bool from hashes and bytes, [n] each.

  Where all are the same text, none is; otherwise neither side is empty.
  """
  texts, text_of = np.unique(
    hashes, return_inverse=True
  )  # sorted: random order
  text_sizes = np.bincount(text_of, weights=sizes)
  chosen = np.zeros([texts.size], bool)
  if texts.size == 1:
    return chosen[text_of]
  missing = eval_fraction * text_sizes.sum()
  for i, size in enumerate(text_sizes.tolist()):
    if missing <= 0:
      break
    if abs(missing - size) < missing:  # brings the share nearer
      chosen[i] = True
      missing -= size
  smallest = text_sizes.argmin()
  if not chosen.any():
    chosen[smallest] = True
  if chosen.all():
    chosen[smallest] = False
  return chosen[text_of]


def _held_out(
  source: sources.Source, tables: Sequence[encoder.Table], data_config: Any
) -> np.ndarray:
  """Which of several documents are validation, [n] bool.

  They are assigned whole, in the order of the hash of their text (so copies of a
  text stay on one side), until there are enough.
  """
  hashes = np.concatenate([table.hashes for table in tables])
  key, column = (
    ('eval_tokens', 'num_tokens')
    if data_config.eval_tokens
    else ('eval_fraction', 'num_bytes')
  )
  sizes = np.concatenate([getattr(table, column) for table in tables])
  total = int(sizes.sum())
  wanted = data_config.eval_tokens / total or data_config.eval_fraction
  if wanted >= 1:
    raise InputError(
      f'data.eval_tokens={data_config.eval_tokens!r} leaves nothing to train '
      f'on: data.source={source.spec!r} has {total} tokens'
    )
  chosen = _choose(hashes, sizes, wanted)
  share = sizes[chosen].sum() / total
  if share == 0:
    raise InputError(
      f'data.source={source.spec!r}: its {sizes.size} documents are all the '
      'same text, so none is left to evaluate on; give other text'
    )
  if not 0.5 < share / wanted < 2:
    _log.warning(
      'data.%s=%g, but validation has %.2g of the %s: documents are assigned '
      'whole, and there are only %d',
      key,
      getattr(data_config, key),
      share,
      column.removeprefix('num_'),
      sizes.size,
    )
  return chosen


# ----------------------------------------------------------------- packing


@dataclasses.dataclass(frozen=True, eq=False)
class _Stream:
  """Tokens in plain files, and how they become rows.

  Attributes:
    folder: of the files.
    dtype: of their ids.
    length: tokens per row.
    token_bytes: [vocab_size] int32, bytes of text of each id.
    separator_id: what ends a document.
    ranges: [n, 3] int64, the number of a file, the first token in it and one
      past the last. With prompt_lengths, a range is a row that separators fill.
    prompt_lengths: [n], for pairs.
    num_dropped_documents: pairs longer than a row.
  """

  folder: pathlib.Path
  dtype: np.dtype
  length: int
  token_bytes: np.ndarray
  separator_id: int
  ranges: np.ndarray
  prompt_lengths: np.ndarray | None = None
  num_dropped_documents: int = 0

  @property
  def num_tokens(self) -> int:
    if self.prompt_lengths is not None:
      return len(self.ranges) * self.length
    return int((self.ranges[:, 2] - self.ranges[:, 1]).sum())

  @property
  def num_rows(self) -> int:
    return self.num_tokens // self.length

  def shards(self) -> 'list[_Stream]':
    """The rows in pieces, each with the ranges that it needs."""
    row_bytes = self.length * self.dtype.itemsize
    shard_rows = min(_SHARD_ROWS, max(_SHARD_BYTES // row_bytes, 1))
    num_shards = math.ceil(self.num_rows / shard_rows)
    borders = [self.num_rows * i // num_shards for i in range(num_shards + 1)]
    if self.prompt_lengths is not None:
      return [
        dataclasses.replace(
          self,
          ranges=self.ranges[start:stop],
          prompt_lengths=self.prompt_lengths[start:stop],
        )
        for start, stop in itertools.pairwise(borders)
      ]
    return [
      dataclasses.replace(
        self,
        ranges=_part_of(self.ranges, start * self.length, stop * self.length),
      )
      for start, stop in itertools.pairwise(borders)
    ]

  def rows(self) -> Iterator[dict[str, Any]]:
    """Yields the examples; a rest of less than a row is left out."""
    if self.prompt_lengths is not None:
      for tokens, start in zip(
        self._read(), self.prompt_lengths.tolist(), strict=True
      ):
        row = np.full([self.length], self.separator_id, self.dtype)
        row[: tokens.size] = tokens
        yield {
          'tokens': row,
          'prompt_length': start,
          'num_bytes': int(self.token_bytes[row[start:]].sum()),
        }
      return
    rest = np.zeros([0], self.dtype)
    for tokens in self._read():
      tokens = np.concatenate([rest, tokens]) if rest.size else tokens
      block = tokens[: tokens.size // self.length * self.length]
      block = block.reshape(-1, self.length)
      rest = tokens[block.size :]
      num_bytes = self.token_bytes[block].sum(1).tolist()
      for row, size in zip(block, num_bytes, strict=True):
        yield {'tokens': row, 'num_bytes': size}

  def count(self) -> tuple[int, int]:
    """The bytes in rows, and the separators in the whole stream."""
    if self.prompt_lengths is not None:
      return sum(row['num_bytes'] for row in self.rows()), len(self.ranges)
    num_bytes = num_separators = 0
    missing = self.num_rows * self.length
    for tokens in self._read():
      num_bytes += int(self.token_bytes[tokens[:missing]].sum())
      num_separators += int((tokens == self.separator_id).sum())
      missing = max(missing - tokens.size, 0)
    return num_bytes, num_separators

  def _read(self) -> Iterator[np.ndarray]:
    """Yields the tokens of the ranges, in blocks if those are long."""
    size = max(_BLOCK_BYTES // self.dtype.itemsize, self.length)
    with contextlib.ExitStack() as stack:
      opened, file = -1, None
      for number, start, stop in self.ranges.tolist():
        if number != opened:
          stack.close()
          file = stack.enter_context(
            open(encoder.tokens_path(self.folder, number), 'rb')
          )
          opened = number
        file.seek(start * self.dtype.itemsize)
        for i in range(start, stop, size):
          # Plain reads: pages of a mapped file would count as this process's.
          yield np.fromfile(file, self.dtype, min(size, stop - i))


def _part_of(ranges: np.ndarray, start: int, stop: int) -> np.ndarray:
  """The ranges of tokens [start, stop) of a stream."""
  ends = np.cumsum(ranges[:, 2] - ranges[:, 1])
  first = np.searchsorted(ends, start, 'right')
  last = np.searchsorted(ends, stop, 'left') + 1
  part, ends = ranges[first:last].copy(), ends[first:last]
  if len(part):
    begin = ends[0] - (part[0, 2] - part[0, 1])
    part[-1, 2] -= max(ends[-1] - stop, 0)
    part[0, 1] += start - begin
  return part[part[:, 2] > part[:, 1]]


def _encode(
  job: encoder.Job,
  tasks: Sequence[encoder.Task],
  progress: Progress | None,
  engine: encoder.Engine,
) -> list[encoder.Table]:
  """The first stage: does what is not done yet; the tables of all tasks."""
  # Parts that were cut otherwise, by another version, are no use.
  plan = hashlib.sha256(repr(tasks).encode()).hexdigest()
  plan_path = job.folder / _PLAN_NAME
  if not plan_path.exists() or plan_path.read_text() != plan:
    for file in job.folder.glob('part-*'):
      file.unlink()
    plan_path.write_text(plan)
  done = {task.number: encoder.finished(job, task) for task in tasks}
  missing = [task for task in tasks if done[task.number] is None]
  counts = np.zeros([3], np.int64)  # documents, tokens, bytes
  size = 0

  def add(table: encoder.Table) -> None:
    nonlocal counts
    counts += [len(table.hashes), table.num_tokens.sum(), table.num_bytes.sum()]

  for task in tasks:
    if done[task.number]:
      add(done[task.number])
      size += task.part.size
  if size:
    _log.info(
      'going on with what an earlier preparation left: %d of %d parts',
      len(tasks) - len(missing),
      len(tasks),
    )
  total = sum(task.part.size for task in tasks)
  start_tokens, start = counts[1], time.monotonic()
  progress = _limited(progress or _log_progress(int(start_tokens)))
  for task, table in engine.map(
    functools.partial(encoder.encode_part, job), missing
  ):
    add(table)
    size += task.part.size
    progress(*counts.tolist(), size / max(total, 1))
  for task in missing:
    done[task.number] = encoder.finished(job, task)
    if done[task.number] is None:
      raise InputError(
        f'part {task.number} of data.source={job.source.spec!r} is not in '
        f'{job.folder}: workers on other machines must see data.data_dir under '
        'the same path'
      )
  tables = [done[task.number] for task in tasks]
  num_tokens = sum(int(table.num_tokens.sum()) for table in tables)
  secs = time.monotonic() - start
  _log.info(
    'encoded %s tokens in %.1f s, %.2f M tokens/s',
    f'{num_tokens - int(start_tokens):,}',
    secs,
    (num_tokens - start_tokens) / max(secs, 1e-9) / 1e6,
  )
  return tables


def _build(
  job: encoder.Job,
  tasks: Sequence[encoder.Task],
  data_config: Any,
  metadata: Mapping[str, Any],
  progress: Progress | None,
  engine: encoder.Engine,
) -> None:
  """Writes the dataset into job.folder."""
  work = job.folder
  tables = _encode(job, tasks, progress, engine)
  streams = _make_streams(job, tasks, tables, data_config)
  shortest = min(stream.num_tokens for stream in streams.values())
  if shortest < data_config.length:
    sizes = ' and '.join(
      f'{stream.num_tokens} tokens in {split}'
      for split, stream in streams.items()
    )
    raise InputError(
      f'data.length={data_config.length} is longer than the text: there are '
      f'{sizes}. Use data.length<={shortest}, more text, or another '
      f'data.eval_fraction (now {data_config.eval_fraction}) or '
      f'data.eval_tokens ({data_config.eval_tokens})'
    )
  metadata = dict(metadata)
  for split, stream in streams.items():
    num_bytes, num_documents = stream.count()
    metadata[split] = {
      'num_rows': stream.num_rows,
      'num_tokens': stream.num_rows * stream.length,
      'num_bytes': num_bytes,
      'num_documents': max(num_documents, 1),  # a cut one may end nowhere
      'num_dropped_tokens': stream.num_tokens % stream.length,
      'num_dropped_documents': stream.num_dropped_documents,
    }
  needed = (
    sum(stream.num_tokens for stream in streams.values()) * job.dtype.itemsize
  )
  # ArrayRecord's index and framing come to a few percent at short lengths.
  if shutil.disk_usage(work).free < 1.2 * needed:
    raise _disk_full(work.parent, needed)
  num_rows = sum(stream.num_rows for stream in streams.values())
  _log.info('writing %s rows of %d tokens', f'{num_rows:,}', data_config.length)
  shutil.rmtree(work / 'packed_tokens', ignore_errors=True)  # interrupted
  with sources.quiet_tfds():
    options = {}
    if isinstance(engine, encoder.Beam):
      options = dict(
        beam_runner=engine.runner, beam_options=engine.pipeline_options
      )
    PackedTokens(
      data_dir=str(work), streams=streams, metadata=metadata, engine=engine
    ).download_and_prepare(
      download_config=tfds.download.DownloadConfig(**options)
    )
  for file in (
    *work.glob('part-*'),
    *work.rglob('*.shard_infos.json'),
    work / _PLAN_NAME,
  ):
    file.unlink()
  shutil.rmtree(work / 'downloads', ignore_errors=True)  # TFDS made it, empty
  _write_manifest(work, tables, metadata)
  for split in SPLITS:
    counts = metadata[split]
    _log.info(
      '%s: %s tokens of %s bytes in %s',
      split,
      f'{counts["num_tokens"]:,}',
      f'{counts["num_bytes"]:,}',
      _documents(counts['num_documents']),
    )


def _write_manifest(
  work: pathlib.Path,
  tables: Sequence[encoder.Table],
  metadata: Mapping[str, Any],
) -> None:
  """Says what was prepared, for people; nothing reads it."""
  versions = {'python': '.'.join(map(str, sys.version_info[:3]))}
  for name in (
    'nanodlm',
    'tensorflow-datasets',
    'array_record',
    'tiktoken',
    'sentencepiece',
    'datasets',
  ):
    with contextlib.suppress(packages.PackageNotFoundError):
      versions[name] = packages.version(name)
  manifest = {
    **metadata,
    'num_documents': sum(metadata[split]['num_documents'] for split in SPLITS),
    # Of all that was read, with the separators and what fills no row.
    'num_tokens': sum(int(table.num_tokens.sum()) for table in tables),
    'num_bytes': sum(int(table.num_bytes.sum()) for table in tables),
    'versions': versions,
  }
  (work / _MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + '\n')


def _make_streams(
  job: encoder.Job,
  tasks: Sequence[encoder.Task],
  tables: Sequence[encoder.Table],
  data_config: Any,
) -> dict[str, _Stream]:
  """The tokens of each split, in the order of the source."""
  common = dict(
    folder=job.folder,
    dtype=job.dtype,
    length=data_config.length,
    token_bytes=job.tokenizer.num_bytes,
    separator_id=job.tokenizer.separator_id,
  )
  splits = {task.split for task in tasks}
  if splits == {'all'} or _is_tokens(job.source) and not splits & set(SPLITS):
    sizes = [int(table.num_tokens.sum()) for table in tables]
    ranges = np.array(
      [(task.number, 0, size) for task, size in zip(tasks, sizes, strict=True)],
      np.int64,
    ).reshape(-1, 3)
    borders = _stream_borders(job.source, sum(sizes), data_config)
    return {
      split: _Stream(ranges=_part_of(ranges, *border), **common)
      for split, border in borders.items()
    }
  if '' not in splits:
    is_held_out = [
      np.full(len(table.num_tokens), task.split == 'validation')
      for task, table in zip(tasks, tables, strict=True)
    ]
  else:
    is_held_out = np.split(
      _held_out(job.source, tables, data_config),
      np.cumsum([len(table.num_tokens) for table in tables])[:-1],
    )
  return {
    split: _Stream(
      **_documents_of(
        job.is_pairs,
        tasks,
        tables,
        [side == (split == 'validation') for side in is_held_out],
        split,
        data_config.length,
      ),
      **common,
    )
    for split in SPLITS
  }


def _documents_of(
  is_pairs: bool,
  tasks: Sequence[encoder.Task],
  tables: Sequence[encoder.Table],
  sides: Sequence[np.ndarray],
  split: str,
  length: int,
) -> dict[str, Any]:
  """What a stream of chosen documents has of its own; see _Stream.

  Part by part: neighbours become one range, so that few stay in memory.

  Args:
    is_pairs: whether a document is a row.
    tasks: of the first stage.
    tables: their tables.
    sides: which documents of each table are chosen, bool.
    split: their name.
    length: of a row.
  """
  sizes = [
    table.num_tokens[side] for table, side in zip(tables, sides, strict=True)
  ]
  if is_pairs:
    _report_pairs(split, np.concatenate(sizes), length)
  ranges = []
  for task, table, side in zip(tasks, tables, sides, strict=True):
    stops = np.cumsum(table.num_tokens)
    number = np.full(len(stops), task.number)
    part = np.stack([number, stops - table.num_tokens, stops], 1)
    if is_pairs:
      ranges.append(part[side & (table.num_tokens <= length)])
    else:
      ranges.append(_merged(part[side]))
  if not is_pairs:
    return {'ranges': np.concatenate(ranges)}
  return {
    'ranges': np.concatenate(ranges),
    'prompt_lengths': np.concatenate(
      [
        table.prompt_lengths[side & (table.num_tokens <= length)]
        for table, side in zip(tables, sides, strict=True)
      ]
    ),
    'num_dropped_documents': sum(int((s > length).sum()) for s in sizes),
  }


def _stream_borders(
  source: sources.Source, total: int, data_config: Any
) -> dict[str, tuple[int, int]]:
  """The first token of each split, and one past its last, in one stream."""
  if not total:
    raise InputError(f'data.source={source.spec!r} holds no tokens')
  if _is_tokens(source):
    # In whole rows: what is held out begins where a row does.
    length = data_config.length
    text_tokens = total // length * length
    eval_tokens = (
      (data_config.eval_tokens or int(data_config.eval_fraction * total))
      // length
      * length
    )
    eval_tokens = max(eval_tokens, length)
    test_tokens = math.ceil(data_config.test_tokens / length) * length
  else:
    text_tokens = total - 1  # without the separator
    eval_tokens, test_tokens = data_config.eval_tokens, data_config.test_tokens
  stop = text_tokens - test_tokens
  start = stop - eval_tokens
  if start <= 0 and data_config.eval_tokens:
    raise InputError(
      f'data.eval_tokens={data_config.eval_tokens!r} with data.test_tokens='
      f'{data_config.test_tokens!r} leaves nothing to train on: data.source='
      f'{source.spec!r} has {total} tokens'
    )
  start = max(start, 0)  # too short for a row of each, which is said later
  return {
    'train': (0, start),
    'validation': (start, stop if test_tokens else total),
  }


def _merged(ranges: np.ndarray) -> np.ndarray:
  """Fewer ranges for the same tokens: one where two of a file touch."""
  if not len(ranges):
    return ranges
  joins = (ranges[1:, 0] == ranges[:-1, 0]) & (ranges[1:, 1] == ranges[:-1, 2])
  first = np.flatnonzero(np.concatenate([[True], ~joins]))
  last = np.append(first[1:], len(ranges)) - 1
  return np.column_stack([ranges[first, :2], ranges[last, 2]])


def _report_pairs(split: str, sizes: np.ndarray, length: int) -> None:
  """Says which pairs have no room in a row; an error where that is all."""
  fits = sizes <= length
  num, kept = len(sizes), int(fits.sum())
  if not kept:
    raise InputError(
      f'data.length={length} is too short for all {num} pairs of {split}: '
      'prompt, response and a separator take at least '
      f'{min(sizes)} tokens. Use a larger data.length, or shorter '
      'pairs'
    )
  if kept < num:
    _log.warning(
      'data.length=%d: left out %d of %d pairs of %s, which are '
      'longer (up to %d tokens)',
      length,
      num - kept,
      num,
      split,
      max(sizes),
    )
  _log.info(
    '%s: %d pairs in rows of %d tokens, %.0f%% of them padding',
    split,
    kept,
    length,
    100 * (1 - sizes[fits].sum() / (kept * length)),
  )


def _train_tokenizer(
  source: sources.Source,
  tasks: Sequence[encoder.Task],
  eval_fraction: float,
  progress: Progress | None,
  vocab_size: int,
  work: pathlib.Path,
  path: pathlib.Path,
) -> tokenizers.Tokenizer:
  """Trains a SentencePiece model in `work`, which is to be renamed to `path`."""
  model, partial = work / _MODEL_NAME, work / f'{_MODEL_NAME}.partial'
  if not model.exists():
    _log.info('training a SentencePiece model of %d pieces', vocab_size)
    tokenizers.train_sentencepiece(
      _training_texts(source, tasks, eval_fraction, progress),
      vocab_size,
      partial,
    )
    os.replace(partial, model)
  tokenizer = tokenizers.load_sentencepiece(str(model))
  return dataclasses.replace(tokenizer, path=str(path / _MODEL_NAME))


def _training_texts(
  source: sources.Source,
  tasks: Sequence[encoder.Task],
  eval_fraction: float,
  progress: Progress | None,
) -> Iterator[str]:
  """The text that is not held out; of several documents it is read twice."""
  if tasks[0].split:
    for task in tasks:
      if task.split == 'train':
        for document in source.read(task.part):
          yield from encoder.cut(document.open(), task.start, task.stop)
    return
  hashes, sizes = array.array('Q'), array.array('q')
  progress = _limited(progress or _log_progress(0))
  for document in sources.documents(source, 'train'):
    digest, num_bytes = hashlib.blake2b(digest_size=8), 0
    for piece in document.open():
      data = piece.encode()
      digest.update(data)
      num_bytes += len(data)
    hashes.append(int.from_bytes(digest.digest(), 'little'))
    sizes.append(num_bytes)
    progress(len(sizes), 0, 0, None)
  full = np.array(sizes) > 0
  is_train = np.zeros([len(sizes)], bool)
  is_train[full] = ~_choose(
    np.array(hashes)[full], np.array(sizes)[full], eval_fraction
  )
  for keep, document in zip(
    is_train, sources.documents(source, 'train'), strict=True
  ):
    if keep:
      yield from document.open()


def _limited(progress: Progress) -> Progress:
  """The same callback, called at most once per _PROGRESS_SECS."""
  due = time.monotonic() + _PROGRESS_SECS

  def call(*counts: Any) -> None:
    nonlocal due
    if time.monotonic() >= due:
      progress(*counts)
      due = time.monotonic() + _PROGRESS_SECS

  return call


def _documents(num: int) -> str:
  return f'{num:,} document{"" if num == 1 else "s"}'


def _log_progress(start_tokens: int) -> Progress:
  """A callback that logs the counts and the speed since it was made.

  Args:
    start_tokens: of the count, those that are not this preparation's work.
  """
  start = time.monotonic()

  def log(
    num_documents: int, num_tokens: int, num_bytes: int, share: float | None
  ) -> None:
    if share is None:
      _log.info('reading the source: %s', _documents(num_documents))
    else:
      _log.info(
        'encoding: %s, %.1f M tokens, %.1f MB, %.2f M tokens/s, %.0f%% done',
        _documents(num_documents),
        num_tokens / 1e6,
        num_bytes / 1e6,
        (num_tokens - start_tokens) / 1e6 / (time.monotonic() - start),
        100 * share,
      )

  return log


# ------------------------------------------------------------------ folder


def _data_dir(given: str) -> pathlib.Path:
  """config.data.data_dir with its default, absolute; need not exist."""
  path = given or os.environ.get('NANODLM_DATA_DIR') or '~/.cache/nanodlm'
  return pathlib.Path(path).expanduser().absolute()


def _check_writable(root: pathlib.Path) -> None:
  try:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root):
      pass
  except OSError as error:
    if error.errno == errno.ENOSPC:
      raise _disk_full(root) from error
    raise InputError(
      f'data.data_dir={str(root)!r} cannot be written ({error.strerror}); '
      'give a folder that can, or set NANODLM_DATA_DIR'
    ) from error


def _disk_full(root: pathlib.Path, needed: int = 0) -> InputError:
  amount = f', about {math.ceil(2.2 * needed / 1e6)} MB of it' if needed else ''
  return InputError(
    f'data.data_dir={str(root)!r}: the disk is full; free some '
    f'space{amount}, or give a folder on another disk'
  )


@contextlib.contextmanager
def _lock(path: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Excludes other processes of this machine from the preparation of `path`.

  Yields True once the lock is held. With wait=False, yields False at once where
  somebody else holds it. On a file system without locks, everyone who waits is
  let in, with False: then only the final rename decides.
  """
  lock_path = path.with_name(f'.{path.name}.lock')
  while True:
    with open(lock_path, 'wb') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if not wait:
          yield False
          return
        _log.info('waiting for another process that prepares %s', path)
        fcntl.flock(file, fcntl.LOCK_EX)
      except OSError:
        yield False
        return
      # The previous holder removed the file that this process had opened.
      if not _same_file(file.fileno(), lock_path):
        continue
      try:
        yield True
        return
      finally:
        lock_path.unlink()


def _same_file(descriptor: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def _remove_leftovers(
  root: pathlib.Path, path: pathlib.Path, keep: pathlib.Path, is_held: bool
) -> None:
  """Removes what interrupted preparations left in `root`.

  With the lock of `path` held, what this machine left of this same preparation
  goes at once, except `keep`, in which it will go on; of others of this machine,
  which may be gone on with, what is older than a day and locked by nobody. What
  another machine left goes by its age alone, and so does everything where
  nothing can be locked.

  Args:
    root: the folder of all datasets.
    path: the dataset to be prepared.
    keep: where it is prepared.
    is_held: whether its lock is held; see _lock.
  """
  for work in root.glob(f'*{_INCOMPLETE}*'):
    if work == keep:
      continue
    name, _, owner = work.name.partition(_INCOMPLETE)
    abandoned = time.time() - _last_change(work) > _STALE_SECS
    # A lock may not be seen by other machines.
    if is_held and owner.rpartition('-')[0] == socket.gethostname():
      if name == path.name:
        abandoned = True
      elif abandoned:
        with _lock(root / name, wait=False) as abandoned:
          pass
    if abandoned:
      _log.info('removing what an interrupted preparation left: %s', work)
      shutil.rmtree(work, ignore_errors=True)


def _last_change(folder: pathlib.Path) -> float:
  """When something in it last changed, in seconds; inf if it is gone.

  Whoever works in it renames and removes files meanwhile.
  """
  newest = []
  for parent, _, names in os.walk(folder):
    for path in (parent, *(os.path.join(parent, name) for name in names)):
      with contextlib.suppress(OSError):
        newest.append(os.stat(path).st_mtime)
  return max(newest, default=math.inf)


def _publish(work: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a finished dataset its name, in one step."""
  try:
    os.rename(work, path)
  except OSError as error:
    # Another machine was faster, and wrote the same rows.
    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
      raise
    shutil.rmtree(work, ignore_errors=True)
