"""Text, JSONL and pairs in files that a glob names."""

import bz2
import codecs
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import importlib
import itertools
import json
import lzma
import os
import pathlib
import re
from typing import Any, ClassVar, Self
import zlib

from nanodlm.data.sources import base
from nanodlm.types import InputError

# Files are fingerprinted by content up to this many bytes in all (read in less
# than a second), and by path, size and times beyond it.
_MAX_HASHED_BYTES = 256 << 20
# base._CUT in bytes, with an ASCII character on each side.
_CUT_BYTES = re.compile(rb'[!-~]\n(?=[0-9A-Za-z])')
_LINE_END = re.compile(rb'\n')


_OPENERS: dict[str, Callable[[str], Any]] = {
  '.gz': gzip.open,
  '.bz2': bz2.open,
  '.xz': lzma.open,
  '.zst': lambda path: importlib.import_module('zstandard').open(path, 'rb'),
}


@dataclasses.dataclass(frozen=True)
class FileSource(base.Source):
  """The files that match a glob, sorted by name; not all are empty.

  Attributes:
    default_fields: fields that are read if the spec names none.
    fields: the names of the fields that hold the text.
  """

  default_fields: ClassVar[tuple[str, ...]] = ()

  paths: tuple[str, ...]
  fields: tuple[str, ...]

  @classmethod
  def make(cls, spec: str, name: str, data_dir: str) -> Self:
    del data_dir
    pattern, fields = name, cls.default_fields
    start, *given = name.rsplit(':', len(fields))
    # A glob may contain colons, too.
    if start and given and len(given) == len(fields) and not _matches(name):
      if all(map(str.isidentifier, given)):
        pattern, fields = start, tuple(given)
    paths = tuple(path for path in _matches(pattern) if os.path.isfile(path))
    source = cls(spec, paths, fields)
    if not any(map(os.path.getsize, paths)):
      found = f'{len(paths)} file(s), all of them empty' if paths else 'no file'
      is_folder = os.path.isdir(os.path.expanduser(pattern))
      hint = f'; all files of this folder are {spec.rstrip("/")}/**/*'
      raise source.error(
        f'it matches {found}; give a glob that matches text files, an absolute '
        f'one or one relative to {os.getcwd()}{hint if is_folder else ""}'
      )
    return source

  def fingerprint(self) -> str:
    stats = [os.stat(path) for path in self.paths]
    digest = hashlib.sha256()
    hashes_content = sum(s.st_size for s in stats) <= _MAX_HASHED_BYTES
    for path, stat in zip(self.paths, stats, strict=True):
      if hashes_content:
        with self._open(path, compressed=False) as file:
          digest.update(hashlib.file_digest(file, 'sha256').digest())
      else:
        # A copy that preserves times cannot set back the change time.
        times = stat.st_mtime_ns, stat.st_ctime_ns
        key = (os.path.abspath(path), stat.st_size, *times)
        digest.update(repr(key).encode())
    return digest.hexdigest()

  @contextlib.contextmanager
  def _open(
    self, path: str, start: int = 0, compressed: bool = True
  ) -> Iterator[Any]:
    """Opens a file at byte `start`, decompressing it by its suffix."""
    opener = _OPENERS.get(pathlib.Path(path).suffix) if compressed else None
    try:
      with opener(path) if opener else open(path, 'rb') as file:
        if start:
          file.seek(start)
        yield file
    except ModuleNotFoundError as error:
      raise self.error(
        f"{path} needs the package zstandard: pip install -e '.[zstd]', or "
        'decompress the file'
      ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
      raise self.error(f'{path} cannot be read: {error}') from error

  def _slices(self, path: str, place: re.Pattern[bytes]) -> Iterator[base.Part]:
    """Yields (path, first byte, one past the last or None at the file's end).

    A slice has about PART_BYTES and ends with a match of `place`.
    """
    size, borders = os.path.getsize(path), [0]
    if pathlib.Path(path).suffix in _OPENERS:
      size = 0  # Only the whole file can be decompressed.
    with self._open(path) as file:
      while (start := borders[-1] + base.PART_BYTES) < size:
        found = None
        while start < size and not found:
          file.seek(start)
          block = file.read(base.PIECE_CHARS)
          if not (found := place.search(block)):
            start += max(len(block) - 1, 1)  # The match may span two blocks.
        if not found or start + found.end() >= size:
          break
        borders.append(start + found.end())
    for start, stop in itertools.pairwise([*borders, None]):
      yield path, start, stop


def _matches(pattern: str) -> list[str]:
  return sorted(glob.glob(os.path.expanduser(pattern), recursive=True))


@dataclasses.dataclass(frozen=True)
class TextSource(FileSource):
  """Text files in UTF-8, one document each.

  A part is several files, or, if there is only one file, a slice of it.
  """

  forms = ('text:GLOB',)

  def parts(self, split: str) -> Iterator[base.Part]:
    del split
    if len(self.paths) == 1:
      yield from ((where,) for where in self._slices(*self.paths, _CUT_BYTES))
      return
    group, size = [], 0
    for path in self.paths:
      group.append((path, 0, None))
      size += os.path.getsize(path)
      if size >= base.PART_BYTES or path == self.paths[-1]:
        yield tuple(group)
        group, size = [], 0

  def read(self, part: base.Part) -> Iterator[base.Document]:
    for where in part:
      is_end = where[-1] is None
      yield base.Document(functools.partial(self._pieces, *where), is_end)

  def _pieces(self, path: str, start: int, stop: int | None) -> Iterator[str]:
    with self._open(path, start) as file:
      yield from base.cut_at_lines(self._decode(path, file, start, stop))

  def _decode(
    self, path: str, file: Any, start: int, stop: int | None
  ) -> Iterator[str]:
    """Yields the text of bytes [start, stop) in chunks of PIECE_CHARS bytes."""
    # A byte order mark at the beginning of the file is dropped.
    decoder = codecs.getincrementaldecoder('utf-8' if start else 'utf-8-sig')()
    place, block = start, b'-'
    try:
      while block:
        rest = base.PIECE_CHARS if stop is None else stop - place
        block = file.read(min(base.PIECE_CHARS, rest))
        if b'\0' in block:
          raise self.error(
            f'{path} holds NUL bytes (the first at byte '
            f'{place + block.index(0)}), so it is not a text file; give a glob '
            'that matches only UTF-8 text files'
          )
        place += len(block)
        yield decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
      # error.object is the end of the previous block and this block.
      offset = place - len(error.object) + error.start
      raise self.error(
        f'{path} is not UTF-8 text at byte {offset}; convert it, for example '
        'with iconv -f latin1 -t utf-8'
      ) from error


@dataclasses.dataclass(frozen=True)
class JsonlSource(FileSource):
  """JSON objects, one document per line. A part is some lines of a file."""

  forms = ('jsonl:GLOB', 'jsonl:GLOB:FIELD')
  default_fields = ('text',)

  def parts(self, split: str) -> Iterator[base.Part]:
    del split
    for path in self.paths:
      yield from self._slices(path, _LINE_END)

  def read(self, part: base.Part) -> Iterator[base.Document]:
    path, start, stop = part
    with self._open(path, start) as file:
      position = start
      for number, line in enumerate(file, start=1):
        if stop is not None and position >= stop:
          break
        position += len(line)
        if not line.strip():
          continue
        try:
          texts = self._texts(line)
        except InputError as error:
          number += _count_lines(path, start)
          raise self.error(f'{path}:{number} {error}') from error
        if self.is_pairs:
          yield base.Document(functools.partial(iter, texts))
        else:
          yield base.document_of(texts[0])

  def _texts(self, line: bytes) -> list[str]:
    """Returns the text of each of `fields`; an error describes the line."""
    try:
      record = json.loads(line.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
      raise InputError(
        f'is not UTF-8 text at byte {error.start} of the line; convert the '
        'file to UTF-8'
      ) from error
    # Python refuses numbers of thousands of digits and deep nesting.
    except (ValueError, RecursionError) as error:
      raise InputError(f'is not a JSON object: {error}') from error
    if not isinstance(record, dict):
      raise InputError(f'is not a JSON object, but a {type(record).__name__}')
    texts = []
    for field in self.fields:
      text = record.get(field)
      if not isinstance(text, str):
        raise InputError(
          f'lacks a text in field {field!r}; its fields are {sorted(record)}. '
          f'Name the fields as {self.forms[-1]!r}'
        )
      if not text and self.is_pairs:
        raise InputError(f'has an empty text in field {field!r} of a pair')
      try:
        text.encode()
      except UnicodeEncodeError as error:  # JSON can spell one: "\\ud800"
        raise InputError(
          f'holds half of a surrogate pair at character {error.start} of field '
          f'{field!r}; write it as one character'
        ) from error
      texts.append(text)
    return texts


@dataclasses.dataclass(frozen=True)
class PairsSource(JsonlSource):
  """Prompts with their responses, one JSON object per line."""

  forms = ('pairs:GLOB', 'pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD')
  is_pairs = True
  default_fields = ('prompt', 'response')


def _count_lines(path: str, stop: int) -> int:
  """Returns the number of lines in the first `stop` bytes of a file."""
  with open(path, 'rb') as file:
    return sum(
      file.read(min(base.PIECE_CHARS, stop - i)).count(b'\n')
      for i in range(0, stop, base.PIECE_CHARS)
    )
