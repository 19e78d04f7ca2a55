"""A prepared dataset: rows of exactly L tokens, read at random from disk."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import itertools
import logging
import pathlib
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from nanodlm.data import sources
from nanodlm.data.sources.tfds import quiet_tfds
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.types import InputError, reason

SPLITS = ('train', 'validation')
# The hashes of the documents of each split, in a prepared dataset's folder.
_DOCUMENTS = 'documents.npz'
# The TFDS dataset in the folder of a prepared dataset.
NAME, VERSION = 'packed_tokens', '1.0.0'
# Fewer validation rows of a mixture than this are reported.
_FEW_ROWS = 32

_log = logging.getLogger('nanodlm')
# Protocol buffers make their classes when they are imported.
Example: Any = getattr(tf_example_pb2, 'Example')  # noqa: B009


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
  """The rows of one split; `read` is several times faster for short rows.

  Attributes:
    records: random access to serialized tf.train.Example records.
    dtype: how ids are stored, uint16 or uint32.
    files: the (path, number of rows) of each file, in order.
  """

  records: Any
  dtype: np.dtype
  files: Sequence[tuple[pathlib.Path, int]]

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, i: int) -> dict[str, Any]:
    """Returns {'tokens': [L] int32, 'num_bytes': int} of row i >= 0.

    A pair also has its 'prompt_length', in tokens; its num_bytes are those of
    the response. The last row of a text to evaluate as a whole may have
    'num_given', the number of tokens at its start that are also in the row
    before. 'token_bytes' are the bytes of the text of each token, [L], if the
    tokenizer may change the text; otherwise they are those of its piece. Of
    conversations, 'marks' [L] are those of `encoder`, and num_bytes those of
    what is scored.

    Raises:
      InputError: the row is damaged, by the hash that ArrayRecord stores.
    """
    try:
      record = self.records[i]
    except (RuntimeError, OSError) as error:
      ends = np.cumsum([num_rows for _, num_rows in self.files])
      path, _ = self.files[int(np.searchsorted(ends, i, 'right'))]
      raise _damaged(path, reason(error)) from error
    return self._parse(record)

  def read(self, start: int, stop: int) -> list[dict[str, Any]]:
    """Returns rows [start, stop), each as `__getitem__` returns it.

    Raises:
      InputError: a row is damaged.
    """
    if start >= stop:
      return []
    try:
      records = self.records.__getitems__(range(start, stop))
    except (RuntimeError, OSError):
      # One by one, so that the error names the damaged file.
      return [self[i] for i in range(start, stop)]
    return [self._parse(record) for record in records]

  def _parse(self, record: bytes) -> dict[str, Any]:
    arrays = {'tokens': self.dtype, 'token_bytes': np.uint32, 'marks': np.uint8}
    row: dict[str, Any] = {}
    for name, feature in Example.FromString(record).features.feature.items():
      if name in arrays:
        data = feature.bytes_list.value[0]
        row[name] = np.frombuffer(data, arrays[name])
      else:
        row[name] = feature.int64_list.value[0]
    return row | {'tokens': row['tokens'].astype(np.int32)}


# PackedRows, or a grain.MapDataset of the rows of a mixture.
Rows = Any


def read_rows(rows: Rows, start: int, stop: int) -> list[dict[str, Any]]:
  """Returns rows [start, stop), read at once if they are in files."""
  if isinstance(rows, PackedRows):
    return rows.read(start, stop)
  return [rows[i] for i in range(start, stop)]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedData:
  """A prepared dataset, or a mixture of several.

  Attributes:
    folders: the folder of each dataset.
    length: L, tokens per row.
    tokenizer: the tokenizer that made the tokens.
    is_documents: whether a row is a whole document: a text, or a prompt and
      its response.
    is_chat: whether rows have conversations, each in a single row.
    train, validation: the rows of each split.
    metadata: JSON values: what determines the content, and for each of SPLITS a
      dict with 'num_rows', 'num_tokens' and 'num_bytes' in those rows,
      'num_documents', 'num_dropped_tokens' (at the end, less than a row) and
      'num_dropped_documents' (longer than a row).
    train_borders: the index of the first training row of each dataset, and the
      number of all.
    weights: the share of the examples that comes from each dataset.
    held_out: the weights and datasets of a mixture whose held-out text the
      validation rows are, otherwise none.
  """

  folders: tuple[str, ...]
  length: int
  tokenizer: Tokenizer
  is_documents: bool
  is_chat: bool
  train: Rows
  validation: Rows
  metadata: Mapping[str, Any]
  train_borders: tuple[int, ...]
  weights: tuple[float, ...] = (1.0,)
  held_out: tuple[tuple[float, 'PackedData'], ...] = ()

  @property
  def fingerprint(self) -> str:
    """A hash that changes if the training text may have changed."""
    held_out = self.metadata.get('held_out_elsewhere', '')
    return self.metadata['source_fingerprint'] + held_out


def open_packed(path: pathlib.Path, tokenizer: Tokenizer) -> PackedData:
  """Opens a prepared dataset; InputError if a file is missing or damaged."""
  folder = path / NAME / VERSION
  try:
    with quiet_tfds():
      builder: Any = tfds.builder_from_directory(folder)
      info = builder.info
      metadata = dict(info.metadata)
      rows = {
        split: PackedRows(
          builder.as_data_source(split).data_source,
          np.dtype(info.features['tokens'].np_dtype),
          _check_files(info.splits[split], metadata[split]['num_rows']),
        )
        for split in info.splits
      }
      train = rows.get('train', ())
      return PackedData(
        folders=(str(path),),
        length=metadata['length'],
        tokenizer=tokenizer,
        is_documents='prompt_length' in info.features,
        is_chat='marks' in info.features,
        train=train,
        validation=rows.get('validation', ()),
        metadata=metadata,
        train_borders=(0, len(train)),
      )
  except InputError:
    raise
  # TFDS raises errors of many classes for files that it did not write.
  except Exception as error:
    # An OSError's own text names the file, too.
    raise _damaged(folder, str(error) or reason(error)) from error


def _check_files(split: Any, num_rows: int) -> list[tuple[pathlib.Path, int]]:
  """Returns the files of a split and their rows, if none is missing or short.

  Their content is hashed, and checked when it is read.
  """
  paths, lengths = list(map(pathlib.Path, split.filepaths)), split.shard_lengths
  where = paths[0] if len(paths) == 1 else paths[0].parent
  size = sum(path.stat().st_size for path in paths)
  if size != split.num_bytes:
    raise _damaged(where, f'{size} bytes instead of {int(split.num_bytes)}')
  if sum(lengths) != num_rows:
    raise _damaged(where, f'{sum(lengths)} rows instead of {num_rows}')
  return list(zip(paths, lengths, strict=True))


def _damaged(path: pathlib.Path, text: str) -> InputError:
  folder = next(folder for folder in path.parents if folder.name == NAME)
  return InputError(
    f'prepared data {path} is damaged ({text}). Delete '
    f'{folder.parent}, and the next start prepares it again'
  )


def held_out_elsewhere(all_packed: Sequence[PackedData]) -> list[np.ndarray]:
  """Returns the hashes of documents that a dataset trains on and another not.

  One array, uint64, for each dataset of a mixture.
  """
  train, validation = (
    [_hashes(x, split) for x in all_packed] for split in SPLITS
  )
  held_out = np.concatenate(validation)
  return [np.intersect1d(hashes, held_out) for hashes in train]


def write_hashes(folder: pathlib.Path, hashes: Mapping[str, Any]) -> None:
  """Writes the hashes of the documents of each split of a dataset."""
  np.savez(folder / _DOCUMENTS, **hashes)


def _hashes(packed: PackedData, split: str) -> np.ndarray:
  path = pathlib.Path(*packed.folders) / _DOCUMENTS
  try:
    with np.load(path) as saved:
      return saved[split]
  # NumPy raises errors of many classes for a damaged file.
  except Exception as error:
    raise InputError(
      f'prepared data {path} cannot be read ({reason(error)}): it is damaged, '
      f'or written by an older version. Delete {path.parent}, and the next '
      'start prepares it again'
    ) from error


def mix(source: str, all_packed: Sequence[PackedData]) -> PackedData:
  """Combines the datasets of a source, several if it is a mixture."""
  if len(all_packed) == 1:
    return all_packed[0]
  mixture = sources.parse_mixture(source)
  weights = tuple(weight for weight, _ in mixture)
  train = [packed.train for packed in all_packed]
  train_borders = tuple(itertools.accumulate(map(len, train), initial=0))
  digest = hashlib.sha256(repr([p.fingerprint for p in all_packed]).encode())
  metadata = {**all_packed[0].metadata, 'source': source}
  metadata['source_fingerprint'] = digest.hexdigest()
  for split in metadata.keys() & set(SPLITS):
    counts = [packed.metadata[split] for packed in all_packed]
    metadata[split] = {key: sum(c[key] for c in counts) for key in counts[0]}
  mixed = dataclasses.replace(
    all_packed[0],
    folders=tuple(folder for packed in all_packed for folder in packed.folders),
    metadata=metadata,
    train_borders=train_borders,
    weights=weights,
    held_out=tuple(zip(weights, all_packed)),
  )
  if train_borders[-1]:
    train = grain.MapDataset.concatenate([*map(grain.MapDataset.source, train)])
    mixed = dataclasses.replace(mixed, train=train)
  held_out = [packed.validation for packed in all_packed]
  if not any(held_out):
    return mixed
  # The validation rows are in the shares of the weights and interleaved, so
  # that the first few are a sample of the mixture, too.
  mix_rows: Any = lambda parts: grain.MapDataset.mix(
    [*map(grain.MapDataset.source, parts)], weights
  )
  owners = mix_rows([[i] * len(rows) for i, rows in enumerate(held_out)])
  nums = np.bincount([*owners], minlength=len(held_out))
  uses = ', '.join(
    f'{num} of {len(rows)} of {part!r} (weight {weight:g})'
    for num, rows, (weight, part) in zip(nums, held_out, mixture)
  )
  text = f'data.source={source!r}: rows evaluated on: {len(owners)}: {uses}'
  if len(owners) < _FEW_ROWS or not nums.all():
    _log.warning(
      f'{text}. The weights would need more of a source than is held out: hold '
      'out more (data.eval_fraction, data.eval_tokens), or change the weights'
    )
  else:
    _log.info(text)
  return dataclasses.replace(mixed, validation=mix_rows(held_out))
