"""Text to rows of exactly L tokens on disk, once, as a TFDS dataset.

Documents are encoded, a separator is put after each, and the resulting stream is
cut into rows of L tokens; train and validation are packed separately and nothing
else is inserted (no BOS or EOS per row: they would be free tokens). A pair of a
prompt and a response is a row of its own instead: the prompt, the response, and
separators to the end of the row, at least one. The two texts are encoded apart,
as a prompt is when sampling. Pairs that do not fit are left out. The result is
an ArrayRecord dataset in data_dir, in a folder whose name is a hash of everything
that determines its content, so a changed file, tokenizer or length is prepared
anew and anything else is opened in milliseconds. Nothing here needs TensorFlow.

The stream goes through a plain file of token ids, then into the dataset. TFDS's
own way for ordered data (GeneratorBasedBuilder with disable_shuffling) holds all
rows in memory to sort them, and would read and encode the source once per split.
"""

import array
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import tempfile
import time
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from nanodlm import tokenizers
from nanodlm.data import sources
from nanodlm.types import InputError

SPLITS = ('train', 'validation')
# Part of the folder's name: increase it when the content of the rows changes.
_FORMAT_VERSION = 1
# TFDS holds an object per row of the shard that it writes, about 500 bytes each.
_SHARD_ROWS = 1 << 17
# Texts are handed to the tokenizer's threads in groups of about this size.
_BATCH_CHARS = 4 << 20
_PROGRESS_SECS = 1.0
# Leftovers of another machine that shares the folder cannot be told from work in
# progress, except by not having been touched for this long.
_STALE_SECS = 24 * 3600

_INCOMPLETE = '.incomplete-'
_MODEL_NAME = 'sentencepiece.model'

_log = logging.getLogger('nanodlm')

Progress = Callable[[int, int, int], None]


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
    scalars = {name: feature.int64_list.value[0]
               for name, feature in features.items() if name != 'tokens'}
    return {'tokens': tokens.astype(np.int32), **scalars}


@dataclasses.dataclass(frozen=True, eq=False)
class PackedData:
  """A prepared dataset.

  Attributes:
    path: its folder.
    length: L, tokens per row.
    tokenizer: what made the tokens.
    train: rows of the training text.
    validation: rows of the validation text.
    metadata: JSON values: 'source', 'source_fingerprint', 'tokenizer' (its
      to_json()), 'length', 'eval_fraction', and for each of SPLITS a dict with
      'num_rows', 'num_tokens' (in rows), 'num_bytes' (of text, in rows),
      'num_documents', 'num_dropped_tokens' (at the end, less than a row) and
      'num_dropped_documents' (pairs longer than a row).
  """

  path: str
  length: int
  tokenizer: tokenizers.Tokenizer
  train: PackedRows
  validation: PackedRows
  metadata: Mapping[str, Any]

  @property
  def is_pairs(self) -> bool:
    """Whether a row is a prompt and its response."""
    return self.metadata['source'].startswith(sources.PAIRS)


class PackedTokens(tfds.core.ShardBasedBuilder):
  """The TFDS builder: writes the rows of two files of token ids, in order."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, data_dir: str, spools: 'Mapping[str, _Spool]',
               metadata: Mapping[str, Any]):
    """Describes the dataset; download_and_prepare() writes it.

    Args:
      data_dir: where its folder is made.
      spools: the tokens of each of SPLITS.
      metadata: JSON values kept with the dataset; see PackedData.
    """
    self._spools, self._metadata = spools, metadata
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    train = self._spools['train']
    is_pairs = train.prompt_lengths is not None
    return tfds.core.DatasetInfo(
        builder=self,
        description='Text packed into rows of token ids.',
        features=tfds.features.FeaturesDict({
            # 'bytes' keeps the ids as they are in memory: nothing to decode.
            'tokens': tfds.features.Tensor(
                shape=(train.length,), dtype=train.dtype,
                encoding=tfds.features.Encoding.BYTES),
            'num_bytes': tfds.features.Scalar(np.int32),
            **({'prompt_length': tfds.features.Scalar(np.int32)}
               if is_pairs else {}),
        }),
        metadata=tfds.core.MetadataDict(self._metadata),
        disable_shuffling=True)

  def _shard_iterators_per_split(self, dl_manager) -> dict[str, Sequence[Any]]:
    del dl_manager  # nothing to download
    return {split: spool.shards() for split, spool in self._spools.items()}


def prepare(data_config: Any, tokenizer_config: Any,
            progress: Progress | None = None) -> PackedData:
  """Opens the dataset that the config describes, building it if missing.

  Safe against interruption (nothing unfinished is ever opened, and leftovers go
  at the next preparation) and against several processes preparing at once (they
  wait for each other on one machine; elsewhere the first to finish wins).

  Args:
    data_config: config.data: `source`, `length` (tokens per row),
      `eval_fraction` (of the text's bytes, in (0, 1); unused where the source
      has its own validation split), `data_dir` ('' is $NANODLM_DATA_DIR or
      ~/.cache/nanodlm).
    tokenizer_config: config.tokenizer: `name`, `path`, `vocab_size`. With name
      'sentencepiece' and no path, a model of vocab_size pieces is trained on
      the training text and kept with the dataset.
    progress: called about once a second with the numbers of documents, tokens
      and bytes so far; by default they are logged.

  Returns:
    The dataset.

  Raises:
    InputError: a value is out of range, the source or tokenizer is missing or
      broken, the text is shorter than a row, or data_dir cannot be written.
  """
  length, eval_fraction = data_config.length, data_config.eval_fraction
  if length < 1:
    raise InputError(f'data.length={length} must be at least 1')
  if not 0 < eval_fraction < 1:
    raise InputError(
        f'data.eval_fraction={eval_fraction} must be between 0 and 1, both '
        'excluded: every run is evaluated on text it was not trained on')
  root = _data_dir(data_config.data_dir)
  source = sources.make_source(data_config.source, str(root))
  trains_tokenizer = (
      tokenizer_config.name == 'sentencepiece' and not tokenizer_config.path)
  if trains_tokenizer:
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
  }
  digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
  kind = source.spec.partition(':')[0]
  path = root / (f'{kind}-{tokenizer_config.name}-{length}-'
                 f'{digest.hexdigest()[:16]}')
  if path.exists():
    return _open(path, tokenizer)

  _check_writable(root)
  with _lock(path):
    if path.exists():  # another process finished while this one waited
      return _open(path, tokenizer)
    _remove_leftovers(root, path)
    progress = _limited(progress or _log_progress())
    plan = _plan_split(source, eval_fraction, progress)
    work = pathlib.Path(tempfile.mkdtemp(
        prefix=f'{path.name}{_INCOMPLETE}{socket.gethostname()}-', dir=root))
    try:
      if tokenizer is None:
        tokenizer = _train_tokenizer(
            plan(), tokenizer_config.vocab_size, work, path)
      encode = (_encode_pairs if isinstance(source, sources.PairsSource)
                else _encode)
      _build(work, plan, encode, tokenizer, length,
             {**identity, 'tokenizer': tokenizer.to_json()}, progress)
      if source.fingerprint() != source_fingerprint:
        raise InputError(f'data.source={source.spec!r} changed while it was '
                         'being prepared; run again when it is complete')
      _publish(work, path)
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      raise _disk_full(root) from error
    finally:
      shutil.rmtree(work, ignore_errors=True)
  return _open(path, tokenizer)


def _open(path: pathlib.Path,
          tokenizer: tokenizers.Tokenizer | None) -> PackedData:
  """Opens a finished dataset; without a tokenizer it has its own."""
  if tokenizer is None:
    tokenizer = tokenizers.load_sentencepiece(str(path / _MODEL_NAME))
  folder = path / 'packed_tokens' / '1.0.0'
  try:
    with sources.quiet_tfds():
      builder = tfds.builder_from_directory(folder)
      metadata = dict(builder.info.metadata)
      dtype = np.dtype(builder.info.features['tokens'].np_dtype)
      rows = {split: PackedRows(
          builder.as_data_source(split).data_source, metadata['length'], dtype,
          _checked_files(builder.info.splits[split], metadata[split]['num_rows']))
              for split in SPLITS}
  except InputError:
    raise
  # Whatever TFDS makes of files that are not what it wrote: JSON, protocol buffer,
  # key and assertion errors.
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise _damaged(folder, error) from error
  return PackedData(path=str(path), length=metadata['length'], tokenizer=tokenizer,
                    metadata=metadata, **rows)


def _checked_files(split: Any, num_rows: int) -> tuple[tuple[pathlib.Path, int], ...]:
  """The files of a split and their rows, if all are there and as long as written.

  Their content has hashes, which are checked as it is read.
  """
  paths = [pathlib.Path(path) for path in split.filepaths]
  size = sum(path.stat().st_size for path in paths)
  if size != split.num_bytes:
    raise _damaged(paths[0] if len(paths) == 1 else paths[0].parent,
                   f'{size} bytes instead of {int(split.num_bytes)}')
  if sum(split.shard_lengths) != num_rows:
    raise _damaged(paths[0].parent, f'{sum(split.shard_lengths)} rows instead of '
                                    f'{num_rows}')
  return tuple(zip(paths, split.shard_lengths, strict=True))


def _damaged(path: pathlib.Path, error: Exception | str) -> InputError:
  """What to say of a file of a prepared dataset, or of the folder it lies in."""
  folder = next(parent for parent in (path, *path.parents)
                if parent.name == 'packed_tokens').parent
  return InputError(f'prepared data {path} is damaged ({error}). Delete '
                    f'{folder}, and the next start prepares it again')


# ------------------------------------------------------------------- split

# The documents in order, each with the split that it belongs to.
_Plan = Callable[[], Iterator[tuple[str, sources.Document]]]


def _plan_split(source: sources.Source, eval_fraction: float,
                progress: Progress) -> _Plan:
  """Decides which text is train and which is validation.

  Reads the whole source once, which also finds what is wrong with it before
  anything is written. One document is cut near its end, at a character. Several
  are assigned whole, in the order of the hash of their text (so copies of a text
  stay on one side), until the validation text has its share of the bytes.
  """
  if source.splits == SPLITS:
    return lambda: ((split, document) for split in SPLITS
                    for document in source.documents(split))

  hashes, sizes = array.array('Q'), array.array('Q')
  num_chars = 0
  for document in source.documents('train'):
    digest, num_bytes = hashlib.blake2b(digest_size=8), 0
    for piece in document.open():
      data = piece.encode()
      digest.update(data)
      num_bytes += len(data)
      num_chars += len(piece)
    hashes.append(int.from_bytes(digest.digest(), 'little'))
    sizes.append(num_bytes)
    progress(len(sizes), 0, 0)
  full = np.flatnonzero(sizes)  # empty documents are left out
  if not full.size:
    raise InputError(f'data.source={source.spec!r} holds no text')

  if full.size == 1 and isinstance(source, sources.PairsSource):
    raise InputError(f'data.source={source.spec!r} holds one pair only; give '
                     'at least two, to train on and to evaluate on')
  if full.size == 1:
    cut = int(num_chars * (1 - eval_fraction))

    def two_parts() -> Iterator[tuple[str, sources.Document]]:
      document = next(itertools.islice(
          source.documents('train'), int(full[0]), None))
      for split, start, stop in (('train', 0, cut),
                                 ('validation', cut, num_chars)):
        yield split, dataclasses.replace(document, open=functools.partial(
            _cut, document, start, stop))

    return two_parts

  side = np.full([len(sizes)], -1, np.int8)  # -1 nowhere, 0 train, 1 validation
  sizes = np.asarray(sizes)[full]
  side[full] = _choose(np.asarray(hashes)[full], sizes, eval_fraction)
  share = sizes[side[full] == 1].sum() / sizes.sum()
  if share == 0:
    raise InputError(
        f'data.source={source.spec!r}: its {full.size} documents are all the '
        'same text, so none is left to evaluate on; give other text')
  if not 0.5 < share / eval_fraction < 2:
    _log.warning(
        'data.eval_fraction=%g, but validation has %.2g of the bytes: documents '
        'are assigned whole, and there are only %d', eval_fraction, share,
        full.size)

  return lambda: ((SPLITS[i], document) for i, document in zip(
      side, source.documents('train'), strict=True) if i >= 0)


def _choose(hashes: np.ndarray, sizes: np.ndarray,
            eval_fraction: float) -> np.ndarray:
  """Which documents are validation: [n] bool from hashes and bytes, [n] each.

  Where all are the same text, none is; otherwise neither side is empty.
  """
  texts, text_of = np.unique(hashes, return_inverse=True)  # sorted: random order
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


def _cut(document: sources.Document, start: int, stop: int) -> Iterator[str]:
  """Characters [start, stop) of a document, in pieces."""
  position = 0
  for piece in document.open():
    part = piece[max(start - position, 0):max(stop - position, 0)]
    position += len(piece)
    if part:
      yield part


# ----------------------------------------------------------------- packing


@dataclasses.dataclass(frozen=True)
class _Spool:
  """The tokens of one split in a plain file, and how they become rows."""

  path: pathlib.Path
  dtype: np.dtype
  length: int
  token_bytes: np.ndarray  # [vocab_size] int32
  num_tokens: int
  num_documents: int
  prompt_lengths: Sequence[int] | None = None  # of every row, for pairs
  num_dropped_documents: int = 0

  @property
  def num_rows(self) -> int:
    return self.num_tokens // self.length

  def counts(self) -> dict[str, int]:
    """The split's metadata; see PackedData."""
    return {
        'num_rows': self.num_rows,
        'num_tokens': self.num_rows * self.length,
        'num_bytes': sum(example['num_bytes']
                         for _, example in self._rows(0, self.num_rows)),
        'num_documents': self.num_documents,
        'num_dropped_tokens': self.num_tokens % self.length,
        'num_dropped_documents': self.num_dropped_documents,
    }

  def shards(self) -> list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]:
    """Functions that yield the (key, example) pairs of each shard."""
    num_shards = math.ceil(self.num_rows / _SHARD_ROWS)
    borders = [self.num_rows * i // num_shards for i in range(num_shards + 1)]
    return [functools.partial(self._rows, start, stop)
            for start, stop in itertools.pairwise(borders)]

  def _rows(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    tokens = np.memmap(self.path, self.dtype, 'r')
    for i in range(start, stop):
      row = tokens[i * self.length:(i + 1) * self.length]
      if self.prompt_lengths is None:
        yield i, {'tokens': row, 'num_bytes': int(self.token_bytes[row].sum())}
        continue
      start = self.prompt_lengths[i]
      yield i, {'tokens': row, 'prompt_length': start,
                'num_bytes': int(self.token_bytes[row[start:]].sum())}


def _build(work: pathlib.Path, plan: _Plan,
           encode: Callable[..., dict[str, _Spool]],
           tokenizer: tokenizers.Tokenizer, length: int,
           metadata: Mapping[str, Any], progress: Progress) -> None:
  """Writes the dataset into the folder `work`."""
  spools = encode(plan(), tokenizer, work, length, progress)
  shortest = min(spool.num_tokens for spool in spools.values())
  if shortest < length:
    sizes = ' and '.join(f'{spool.num_tokens} tokens in {split}'
                         for split, spool in spools.items())
    raise InputError(
        f'data.length={length} is longer than the text: there are {sizes}. Use '
        f'data.length<={shortest}, more text, or another data.eval_fraction '
        f'(now {metadata["eval_fraction"]})')
  metadata = {**metadata, **{split: spool.counts()
                             for split, spool in spools.items()}}
  needed = sum(spool.path.stat().st_size for spool in spools.values())
  # ArrayRecord's index and framing come to a few percent at short lengths.
  if shutil.disk_usage(work).free < 1.2 * needed:
    raise _disk_full(work.parent, needed)
  with sources.quiet_tfds():
    PackedTokens(data_dir=str(work), spools=spools,
                 metadata=metadata).download_and_prepare()
  for spool in spools.values():
    spool.path.unlink()
  shutil.rmtree(work / 'downloads', ignore_errors=True)  # TFDS made it, empty
  for split in SPLITS:
    counts = metadata[split]
    _log.info('%s: %s tokens of %s bytes in %s', split,
              f'{counts["num_tokens"]:,}', f'{counts["num_bytes"]:,}',
              _documents(counts['num_documents']))


def _id_dtype(tokenizer: tokenizers.Tokenizer) -> np.dtype:
  """The smaller of 16 and 32 bits that holds every id."""
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _encode(documents: Iterator[tuple[str, sources.Document]],
            tokenizer: tokenizers.Tokenizer, work: pathlib.Path, length: int,
            progress: Progress) -> dict[str, _Spool]:
  """Writes the ids of documents, each ended by a separator, to a file a split."""
  dtype = _id_dtype(tokenizer)
  separator = np.array([tokenizer.separator_id], dtype)
  num_tokens = dict.fromkeys(SPLITS, 0)
  num_documents = dict.fromkeys(SPLITS, 0)
  num_bytes = 0
  with contextlib.ExitStack() as stack:
    files = {split: stack.enter_context(open(work / f'{split}.tokens', 'wb'))
             for split in SPLITS}
    for batch in _batches(documents):
      encoded = tokenizer.encode_batch([text for _, text, _ in batch])
      for (split, _, is_last), tokens in zip(batch, encoded, strict=True):
        files[split].write(tokens.astype(dtype).tobytes())
        num_tokens[split] += tokens.size
        num_bytes += int(tokenizer.num_bytes[tokens].sum())
        if is_last:
          files[split].write(separator.tobytes())
          num_tokens[split] += 1
          num_documents[split] += 1
      progress(sum(num_documents.values()), sum(num_tokens.values()), num_bytes)
  return {split: _Spool(work / f'{split}.tokens', dtype, length,
                        tokenizer.num_bytes, num_tokens[split],
                        num_documents[split])
          for split in SPLITS}


def _encode_pairs(documents: Iterator[tuple[str, sources.Document]],
                  tokenizer: tokenizers.Tokenizer, work: pathlib.Path,
                  length: int, progress: Progress) -> dict[str, _Spool]:
  """Writes a row of `length` ids a pair to a file a split."""
  dtype = _id_dtype(tokenizer)
  prompt_lengths = {split: array.array('i') for split in SPLITS}
  sizes = {split: array.array('q') for split in SPLITS}  # of all, in tokens
  num_tokens = num_bytes = 0
  prompt = np.zeros([0], dtype)
  with contextlib.ExitStack() as stack:
    files = {split: stack.enter_context(open(work / f'{split}.tokens', 'wb'))
             for split in SPLITS}
    for batch in _batches(documents):
      encoded = tokenizer.encode_batch([text for _, text, _ in batch])
      for (split, _, is_response), tokens in zip(batch, encoded, strict=True):
        num_tokens += tokens.size
        num_bytes += int(tokenizer.num_bytes[tokens].sum())
        if not is_response:
          prompt = tokens
          continue
        size = prompt.size + tokens.size + 1  # with its separator
        sizes[split].append(size)
        if size > length:
          continue
        row = np.full([length], tokenizer.separator_id, dtype)
        row[:size - 1] = np.concatenate([prompt, tokens])
        files[split].write(row.tobytes())
        prompt_lengths[split].append(prompt.size)
      progress(sum(map(len, sizes.values())), num_tokens, num_bytes)
  spools = {}
  for split in SPLITS:
    num, kept = len(sizes[split]), len(prompt_lengths[split])
    if not kept:
      raise InputError(
          f'data.length={length} is too short for all {num} pairs of {split}: '
          'prompt, response and a separator take at least '
          f'{min(sizes[split])} tokens. Use a larger data.length, or shorter '
          'pairs')
    if kept < num:
      _log.warning('data.length=%d: left out %d of %d pairs of %s, which are '
                   'longer (up to %d tokens)', length, num - kept, num, split,
                   max(sizes[split]))
    used = sum(size for size in sizes[split] if size <= length)
    _log.info('%s: %d pairs in rows of %d tokens, %.0f%% of them padding',
              split, kept, length, 100 * (1 - used / (kept * length)))
    spools[split] = _Spool(
        work / f'{split}.tokens', dtype, length, tokenizer.num_bytes,
        kept * length, kept, prompt_lengths[split], num - kept)
  return spools


def _batches(
    documents: Iterator[tuple[str, sources.Document]]
) -> Iterator[list[tuple[str, str, bool]]]:
  """Groups of (split, piece, whether it ends its document)."""
  batch, num_chars = [], 0
  for split, document in documents:
    pieces = document.open()
    piece = next(pieces, '')
    while piece:
      following = next(pieces, '')
      batch.append((split, piece, not following))
      num_chars += len(piece)
      if num_chars >= _BATCH_CHARS:
        yield batch
        batch, num_chars = [], 0
      piece = following
  if batch:
    yield batch


def _train_tokenizer(
    documents: Iterator[tuple[str, sources.Document]], vocab_size: int,
    work: pathlib.Path, path: pathlib.Path) -> tokenizers.Tokenizer:
  """Trains a SentencePiece model in `work`, which is to be renamed to `path`."""
  _log.info('training a SentencePiece model of %d pieces', vocab_size)
  tokenizers.train_sentencepiece(
      (piece for split, document in documents if split == 'train'
       for piece in document.open()),
      vocab_size, work / _MODEL_NAME)
  tokenizer = tokenizers.load_sentencepiece(str(work / _MODEL_NAME))
  return dataclasses.replace(tokenizer, path=str(path / _MODEL_NAME))


def _limited(progress: Progress) -> Progress:
  """The same callback, called at most once per _PROGRESS_SECS."""
  due = time.monotonic() + _PROGRESS_SECS

  def call(num_documents: int, num_tokens: int, num_bytes: int) -> None:
    nonlocal due
    if time.monotonic() >= due:
      progress(num_documents, num_tokens, num_bytes)
      due = time.monotonic() + _PROGRESS_SECS

  return call


def _documents(num: int) -> str:
  return f'{num:,} document{"" if num == 1 else "s"}'


def _log_progress() -> Progress:
  """A callback that logs the counts and the speed since it was made."""
  start = time.monotonic()

  def log(num_documents: int, num_tokens: int, num_bytes: int) -> None:
    if not num_tokens:
      _log.info('reading the source: %s', _documents(num_documents))
    else:
      _log.info(
          'encoding: %s, %.1f M tokens, %.1f MB, %.2f M tokens/s',
          _documents(num_documents), num_tokens / 1e6, num_bytes / 1e6,
          num_tokens / 1e6 / (time.monotonic() - start))

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
        'give a folder that can, or set NANODLM_DATA_DIR') from error


def _disk_full(root: pathlib.Path, needed: int = 0) -> InputError:
  amount = f', about {math.ceil(2.2 * needed / 1e6)} MB of it' if needed else ''
  return InputError(f'data.data_dir={str(root)!r}: the disk is full; free some '
                    f'space{amount}, or give a folder on another disk')


@contextlib.contextmanager
def _lock(path: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Excludes other processes of this machine from the preparation of `path`.

  Yields True once the lock is held. With wait=False, yields False at once where
  somebody else holds it. On a file system without locks, everyone who waits is
  let in: then only the final rename decides.
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
        yield wait
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


def _remove_leftovers(root: pathlib.Path, path: pathlib.Path) -> None:
  """Removes what interrupted preparations left in `root`; `path` is locked."""
  for work in root.glob(f'*{_INCOMPLETE}*'):
    name, _, owner = work.name.partition(_INCOMPLETE)
    if owner.rpartition('-')[0] != socket.gethostname():
      # A lock may not be seen by other machines.
      newest = max(os.stat(file).st_mtime for file in (work, *work.rglob('*')))
      abandoned = time.time() - newest > _STALE_SECS
    elif name == path.name:
      abandoned = True
    else:
      with _lock(root / name, wait=False) as abandoned:
        pass
    if abandoned:
      _log.info('removing what an interrupted preparation left: %s', work)
      shutil.rmtree(work, ignore_errors=True)


def _publish(work: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a finished dataset its name, in one step."""
  os.chmod(work, 0o755)  # mkdtemp makes it private
  try:
    os.rename(work, path)
  except OSError as error:
    # Another machine was faster, and wrote the same rows.
    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
      raise
