"""Rows of Parquet files and of Hugging Face datasets: texts or token ids."""

import abc
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sys
from typing import Any

import numpy as np

from nanodlm.data.network import is_reachable
from nanodlm.data.sources import base, files
from nanodlm.types import InputError, reason


@dataclasses.dataclass(frozen=True)
class ArrowSource(base.Source):
  """Rows of a table, one document each, or rows of token ids.

  Rows of token ids are one stream of tokens, which contains the ends of its
  documents. `fields` is the name of the column.
  """

  fields: tuple[str, ...]

  def read(self, part: base.Part) -> Iterator[Any]:
    field = self.fields[0]
    for name, first_row, column in self._columns(part):
      self._check_type(name, column.type)
      if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise self.error(f'row {row} of {name} has nothing in field {field!r}')
      if not self.is_tokens:
        try:
          texts = column.to_pylist()
        except UnicodeDecodeError as error:
          raise self.error(
            f'a row of {name} from {first_row} to '
            f'{first_row + len(column) - 1} is not UTF-8 text in field '
            f'{field!r}: {reason(error)}'
          ) from error
        yield from map(base.document_of, texts)
        continue
      for chunk in column.chunks:
        ids = chunk.flatten()
        sizes = chunk.value_lengths().to_numpy(zero_copy_only=False)
        is_missing = ids.is_null().to_numpy(zero_copy_only=False)
        ids = ids.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        rows = base.TokenRows(name, first_row, sizes, ids)
        if is_missing.any():
          place = rows.place(is_missing.argmax())
          raise self.error(f'{place} has nothing in a place of field {field!r}')
        yield rows
        first_row += len(chunk)

  @abc.abstractmethod
  def _columns(self, part: base.Part) -> Iterator[tuple[str, int, Any]]:
    """Yields (name, number of the first row, pyarrow.ChunkedArray)."""

  def _check_type(self, name: str, kind: Any) -> None:
    from pyarrow import types

    if types.is_dictionary(kind):  # As pandas stores categories.
      kind = kind.value_type
    checks = types.is_string, types.is_large_string, types.is_string_view
    is_right = any(check(kind) for check in checks)
    if self.is_tokens:
      checks = types.is_list, types.is_large_list, types.is_fixed_size_list
      is_list = any(check(kind) for check in checks)
      is_right = is_list and types.is_integer(kind.value_type)
    if not is_right:
      wanted = 'lists of integers' if self.is_tokens else 'text'
      raise self.error(
        f'field {self.fields[0]!r} of {name} holds {kind}, not {wanted}'
      )


@dataclasses.dataclass(frozen=True)
class ParquetSource(ArrowSource, files.FileSource):
  """Rows of text in Parquet files; a part is a row group."""

  forms = ('parquet:GLOB', 'parquet:GLOB:FIELD')
  default_fields = ('text',)

  def parts(self, split: str) -> Iterator[base.Part]:
    for path in self.paths:
      with self._open_table(path) as file:
        names = file.schema_arrow.names
        if self.fields[0] not in names:
          raise self.error(
            f'{path} has the fields {names}, not {self.fields[0]!r}; name one '
            f'as in {self.forms[-1]!r}'
          )
        for group in range(file.num_row_groups):
          yield path, group

  def _columns(self, part: base.Part) -> Iterator[tuple[str, int, Any]]:
    import pyarrow as pa

    path, group = part
    with self._open_table(path) as file:
      first = sum(file.metadata.row_group(i).num_rows for i in range(group))
      # Row groups may be large, so a few thousand rows are read at a time.
      for batch in file.iter_batches(base.PART_ROWS, [group], self.fields):
        yield path, first, pa.chunked_array([batch.column(0)])
        first += batch.num_rows

  @contextlib.contextmanager
  def _open_table(self, path: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
      with pq.ParquetFile(path) as file:
        yield file
    except (pa.ArrowException, OSError) as error:
      raise self.error(
        f'{path} cannot be read as Parquet: {reason(error)}'
      ) from error


@dataclasses.dataclass(frozen=True)
class ParquetTokensSource(ParquetSource):
  """Rows of token ids in Parquet files."""

  forms = ('tokens:GLOB', 'tokens:GLOB:FIELD')
  is_tokens = True
  default_fields = ('tokens',)


@dataclasses.dataclass(frozen=True)
class HfSource(ArrowSource, base.SplitSource):
  """Rows of text of a dataset of the Hugging Face Hub, or of a folder."""

  forms = ('hf:NAME', 'hf:NAME:FEATURE', 'hf:NAME:CONFIG:FEATURE')
  default_field = 'text'

  dataset: Any  # datasets.DatasetDict

  @classmethod
  def make(cls, spec: str, name: str, data_dir: str) -> 'HfSource':
    """Loads a dataset, which may download it, or fails within seconds."""
    del data_dir
    name, *rest = name.split(':')
    if not name or len(rest) > 2:
      raise InputError(f'data.source={spec!r} is not one of {cls.forms}')
    *configs, field = rest or [cls.default_field]
    source = cls(spec, (field,), _load(spec, name, configs))
    if 'train' not in source.dataset:
      found = sorted(source.dataset)
      raise source.error(f"its splits are {found}, without a 'train'")
    for split, data in source.dataset.items():
      if field not in data.column_names:
        raise source.error(
          f'split {split!r} has the features {data.column_names}, not '
          f'{field!r}; name one as in {cls.forms[1]!r}'
        )
    return source

  def fingerprint(self) -> str:
    rows = []
    for split, data in sorted(self.dataset.items()):
      # The cache's folders contain the hash of the version; where the cache is
      # does not matter.
      paths = [pathlib.Path(file['filename']) for file in data.cache_files]
      names = sorted('/'.join(path.parts[-5:]) for path in paths)
      rows.append((split, data.num_rows, names))
    return hashlib.sha256(repr(rows).encode()).hexdigest()

  def num_rows(self) -> Mapping[str, int]:
    return {split: data.num_rows for split, data in self.dataset.items()}

  def _columns(self, part: base.Part) -> Iterator[tuple[str, int, Any]]:
    own, start, stop = part
    data = self.dataset[own].select_columns([*self.fields])
    column = data.with_format('arrow')[start:stop].column(0)
    yield f'split {own!r}', start, column


@dataclasses.dataclass(frozen=True)
class HfTokensSource(HfSource):
  """Rows of token ids of a dataset of the Hugging Face Hub, or of a folder."""

  forms = tuple(f'hf_tokens{form[2:]}' for form in HfSource.forms)
  is_tokens = True
  default_field = 'tokens'


def _load(spec: str, name: str, configs: list[str]) -> Any:
  """Calls datasets.load_dataset; its errors become InputErrors."""
  path = os.path.expanduser(name)
  endpoint, advice = os.environ.get('HF_ENDPOINT', 'https://huggingface.co'), ''
  if not os.path.isdir(path) and not is_reachable(endpoint):
    # Otherwise it retries for most of a minute before it reads its cache.
    os.environ['HF_HUB_OFFLINE'] = '1'
    advice = (
      f'; {endpoint} does not answer, and the dataset is not in the cache: '
      'connect to the network once, or give a folder that holds it'
    )
  try:
    import datasets  # pyright: ignore[reportMissingImports]  # An extra.
  except ModuleNotFoundError as error:
    raise InputError(
      f"data.source={spec!r} needs the package datasets: pip install -e '.[hf]'"
    ) from error
  if not sys.stderr.isatty():
    datasets.disable_progress_bars()
  try:
    return datasets.load_dataset(path, *configs)
  # The library raises errors of many classes for bad files and networks.
  except Exception as error:
    raise InputError(
      f'data.source={spec!r}: Hugging Face datasets cannot load {name!r}: '
      f'{" ".join(str(error).split())}{advice}'
    ) from error
