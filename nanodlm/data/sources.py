"""Where text comes from: files, TFDS, Hugging Face, or what ships with Python.

A source is a sequence of documents in a fixed order, read as a stream: a document
is opened, as often as needed, as an iterator of pieces of about a million
characters, so a 20 GB file and a corpus of 8 million articles both need a few
megabytes of memory. A pair of a prompt and a response is a document of exactly
those two pieces. The sequence is cut into parts, the same ones always, that
several processes or machines can read at once; what they read are token ids
already where the source holds those.
"""

import ast
import bz2
import codecs
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import difflib
import functools
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import os
import pathlib
import re
import sys
import sysconfig
from typing import Any, Protocol
import warnings
import zlib

from absl import logging
import numpy as np

from nanodlm.data.tokenizers import is_reachable
from nanodlm.types import InputError

# Documents longer than this many characters are read and encoded in pieces.
PIECE_CHARS = 1 << 20
# Files are fingerprinted by content up to this many bytes in all (under a second
# to read), and by path, size and times beyond it.
_MAX_HASHED_BYTES = 256 << 20
# A part has about so many bytes, or so many rows of a dataset. Everything is
# read and encoded part by part, so this is the unit of work and of a restart.
PART_BYTES = 16 << 20
PART_ROWS = 4096
# A piece ends with one newline after a visible character, and the next begins with
# a letter or digit: bytes and tiktoken's encodings never merge across such a
# place, so cutting there changes no token (SentencePiece: rarely one per piece).
_CUT = re.compile(r'.*\S\n(?=\w)', re.DOTALL)

# The same place in bytes, at an ASCII character on each side.
_CUT_BYTES = re.compile(rb'[!-~]\n(?=[0-9A-Za-z])')

_ALLOWED = (
  "'embedded', 'text:GLOB', 'jsonl:GLOB', 'jsonl:GLOB:FIELD', "
  "'pairs:GLOB', 'pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD', "
  "'tfds:NAME', 'tfds:NAME:FEATURE', 'hf:NAME', 'hf:NAME:FEATURE', "
  "'hf:NAME:CONFIG:FEATURE', the same with 'hf_tokens:', "
  "'parquet:GLOB', 'parquet:GLOB:FIELD', 'tokens:GLOB', "
  "'tokens:GLOB:FIELD' or a mixture 'mix:0.7*SOURCE+0.3*SOURCE'"
)
# What config.data.source begins with where it names pairs, or a mixture.
PAIRS, MIX = 'pairs:', 'mix:'
# Where a mixture's next source begins; '+' and '*' may stand in a glob, too.
_MIX_KINDS = (
  'embedded|text:|jsonl:|tfds:|hf:|hf_tokens:|parquet:|tokens:|pairs:|mix:'
)
_MIX_BORDER = re.compile(rf'\+(?=[^+*:/]*\*(?:{_MIX_KINDS}))')


@dataclasses.dataclass(frozen=True)
class Document:
  """A text that can be read again and again.

  Attributes:
    name: where it is, for messages; str() says it.
    open: returns a fresh iterator of the text's pieces, in order; str.
    is_end: False where the text goes on in the next document, which is then the
      first of the next part; only in a source of one document.
  """

  name: Any
  open: Callable[[], Iterator[str]]
  is_end: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
  """A slice of a source that can be read on its own; it can be pickled.

  Attributes:
    split: the one it belongs to.
    size: its share of the work, in bytes or rows.
    where: what the source needs to find it.
  """

  split: str
  size: int
  where: tuple[Any, ...]


class Source(Protocol):
  """A fixed sequence of documents, in parts; it can be pickled.

  Attributes:
    spec: the config.data.source it was made from.
    splits: ('train',) where the text has no split of its own, otherwise
      ('train', 'validation').
  """

  spec: str
  splits: tuple[str, ...]

  def fingerprint(self) -> str:
    """Returns a hash that changes whenever the text may have changed."""

  def parts(self, split: str) -> Iterator[Part]:
    """Yields the parts of one of `splits`, always the same ones in order."""

  def read(self, part: Part) -> Iterator[Any]:
    """Yields the documents of a part, or TokenRows where it holds ids."""


def documents(source: Source, split: str) -> Iterator[Document]:
  """Yields the documents of one of a source's splits, in order."""
  for part in source.parts(split):
    yield from source.read(part)


def make_source(spec: str, data_dir: str = '') -> Source:
  """Makes the source that config.data.source names.

  Args:
    spec: 'embedded', 'text:GLOB', 'jsonl:GLOB', 'jsonl:GLOB:FIELD',
      'pairs:GLOB', 'pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD', 'tfds:NAME',
      'tfds:NAME:FEATURE', 'parquet:GLOB', 'parquet:GLOB:FIELD', 'hf:NAME',
      'hf:NAME:FEATURE' or 'hf:NAME:CONFIG:FEATURE', NAME being a dataset of the
      Hugging Face Hub or a folder. Rows of token ids: 'tokens:GLOB',
      'tokens:GLOB:FIELD' (Parquet files) and 'hf_tokens:...'. Globs know '**';
      text and JSONL files may be compressed (.gz, .bz2, .xz, .zst).
    data_dir: a folder that may hold TFDS datasets or their downloads, asked
      before TFDS's own folder ($TFDS_DATA_DIR or ~/tensorflow_datasets).

  Returns:
    A Source.

  Raises:
    InputError: the spec is of no known form, or names nothing that exists.
  """
  kind, _, rest = spec.partition(':')
  if spec == 'embedded':
    return EmbeddedSource()
  if kind == 'text' and rest:
    return TextSource(spec, _find_files(spec, rest))
  if kind == 'jsonl' and rest:
    pattern, (field,) = _split_fields(rest, 'text')
    return JsonlSource(spec, _find_files(spec, pattern), field)
  if spec.startswith(PAIRS) and rest:
    pattern, fields = _split_fields(rest, 'prompt', 'response')
    return PairsSource(spec, _find_files(spec, pattern), *fields)
  if kind == 'tfds' and rest:
    name, _, feature = rest.partition(':')
    return _make_tfds_source(spec, name, feature, data_dir)
  if kind in ('parquet', 'tokens') and rest:
    is_tokens = kind == 'tokens'
    pattern, (field,) = _split_fields(rest, 'tokens' if is_tokens else 'text')
    return ParquetSource(spec, is_tokens, field, _find_files(spec, pattern))
  if kind in ('hf', 'hf_tokens') and rest:
    return _make_hf_source(spec, kind == 'hf_tokens', rest)
  raise InputError(f'data.source={spec!r} is not one of {_ALLOWED}')


def check_held_out(data_config: Any) -> None:
  """Raises InputError where config.data holds out nothing, or in two ways."""
  fraction, tokens = data_config.eval_fraction, data_config.eval_tokens
  if tokens < 0 or data_config.test_tokens < 0:
    raise InputError(
      f'data.eval_tokens={tokens!r} and data.test_tokens='
      f'{data_config.test_tokens!r} must be >= 0'
    )
  if tokens and fraction:
    raise InputError(
      f'data.eval_tokens={tokens!r} and data.eval_fraction={fraction!r} both '
      'say how much is held out; set one of them to 0'
    )
  if not tokens and not 0 < fraction < 1:
    raise InputError(
      f'data.eval_fraction={fraction!r} must be in (0, 1), or 0 with '
      'data.eval_tokens: every run is evaluated on text it was not trained on'
    )
  if data_config.test_tokens and not tokens:
    raise InputError(
      f'data.test_tokens={data_config.test_tokens!r} needs '
      'data.eval_tokens, the tokens in front of them'
    )


def parse_mixture(spec: str) -> tuple[tuple[float, str], ...]:
  """Returns the (weight, source) pairs of 'mix:WEIGHT*SOURCE+...'.

  The weights are shares of the training examples and are divided by their sum.

  Raises:
    InputError: it is not of this form, or a weight is not positive.
  """
  form = "write it as 'mix:0.7*text:a/*.txt+0.3*jsonl:b/*.jsonl'"
  parts = []
  for item in _MIX_BORDER.split(spec.removeprefix(MIX)):
    number, star, source = item.partition('*')
    try:
      weight = float(number)
    except ValueError:
      weight = math.nan
    if not star or not source or not 0 < weight < math.inf:
      raise InputError(
        f'data.source={spec!r}: {item!r} is no positive weight, '
        f"'*' and a source; {form}"
      )
    if source.startswith((PAIRS, MIX)):
      raise InputError(
        f'data.source={spec!r}: {source!r} cannot be part of a '
        'mixture; texts and rows of tokens can'
      )
    parts.append((weight, source))
  if len(parts) < 2:
    raise InputError(f'data.source={spec!r} mixes one source only; {form}')
  names = [source for _, source in parts]
  if len(set(names)) < len(names):
    raise InputError(
      f'data.source={spec!r} names a source twice; add up its weights'
    )
  total = sum(weight for weight, _ in parts)
  return tuple((weight / total, source) for weight, source in parts)


# ------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class _Files:
  """What sources that are files share; see Source."""

  spec: str
  paths: tuple[str, ...]

  splits = ('train',)

  def fingerprint(self) -> str:
    return _fingerprint_files(self.paths)


@dataclasses.dataclass(frozen=True)
class TextSource(_Files):
  """Text files in UTF-8, one document each; see Source.

  Several files make a part, or a single one several.
  """

  def parts(self, split: str) -> Iterator[Part]:
    if len(self.paths) == 1 and not _is_compressed(self.paths[0]):
      (path,) = self.paths
      for start, stop in itertools.pairwise(
        _borders(self.spec, path, _CUT_BYTES)
      ):
        yield Part(split, stop - start, (path, start, stop))
      return
    for paths, size in _grouped(self.paths):
      yield Part(split, size, (paths,))

  def read(self, part: Part) -> Iterator[Document]:
    if len(part.where) == 1:
      for path in part.where[0]:
        yield Document(path, functools.partial(self._pieces, path))
      return
    path, start, stop = part.where
    yield Document(
      path,
      functools.partial(self._pieces, path, start, stop),
      stop == os.path.getsize(path),
    )

  def _pieces(
    self, path: str, start: int = 0, stop: int | None = None
  ) -> Iterator[str]:
    with _open_binary(self.spec, path) as file:
      if start:
        file.seek(start)
      yield from _cut_at_lines(_decode(self.spec, path, file, start, stop))


@dataclasses.dataclass(frozen=True)
class _LineFiles(_Files):
  """What sources that are lines share: a part is some lines of a file."""

  def parts(self, split: str) -> Iterator[Part]:
    for path in self.paths:
      if _is_compressed(path):
        yield Part(split, os.path.getsize(path), (path, 0, None))
        continue
      for start, stop in itertools.pairwise(
        _borders(self.spec, path, re.compile(b'\n'))
      ):
        yield Part(split, stop - start, (path, start, stop))


@dataclasses.dataclass(frozen=True)
class JsonlSource(_LineFiles):
  """JSON objects, one per line and one document each; see Source."""

  field: str

  def read(self, part: Part) -> Iterator[Document]:
    for where, record in _json_lines(self.spec, *part.where):
      yield document_of(
        where,
        _text_field(self.spec, where, record, self.field, 'jsonl:GLOB:FIELD'),
      )


@dataclasses.dataclass(frozen=True)
class PairsSource(_LineFiles):
  """Prompts with their responses, one JSON object a line; see Source.

  A document is a pair: its pieces are the prompt and the response, in this
  order, neither of them empty.
  """

  prompt_field: str
  response_field: str

  def read(self, part: Part) -> Iterator[Document]:
    for where, record in _json_lines(self.spec, *part.where):
      pair = []
      for field in (self.prompt_field, self.response_field):
        text = _text_field(
          self.spec,
          where,
          record,
          field,
          'pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD',
        )
        if not text:
          raise InputError(
            f'data.source={self.spec!r}: {where} has an empty text in field '
            f'{field!r}; a pair needs at least one character in each'
          )
        pair.append(text)
      yield Document(where, functools.partial(iter, tuple(pair)))


@dataclasses.dataclass(frozen=True)
class _Line:
  """A line of a file, for messages: 'path:line', counted only when printed."""

  path: str
  start: int  # where the part begins, in bytes
  number: int  # of the line in the part, from 1

  def __str__(self) -> str:
    number = self.number
    if self.start:
      with open(self.path, 'rb') as file:
        number += sum(
          file.read(min(PIECE_CHARS, self.start - i)).count(b'\n')
          for i in range(0, self.start, PIECE_CHARS)
        )
    return f'{self.path}:{number}'


def _json_lines(
  spec: str, path: str, start: int, stop: int | None
) -> Iterator[tuple[_Line, Any]]:
  """(place, value) of every line in bytes [start, stop) that is not blank."""
  with _open_binary(spec, path) as file:
    if start:
      file.seek(start)
    position = start
    for number, line in enumerate(file, start=1):
      if stop is not None and position >= stop:
        break
      position += len(line)
      if not line.strip():
        continue
      where = _Line(path, start, number)
      try:
        record = json.loads(line.decode('utf-8-sig'))
      except UnicodeDecodeError as error:
        raise InputError(
          f'data.source={spec!r}: {where} is not UTF-8 text at byte '
          f'{error.start} of the line; convert the file to UTF-8'
        ) from error
      # Numbers of thousands of digits and thousands of brackets are not read.
      except (ValueError, RecursionError) as error:
        raise InputError(
          f'data.source={spec!r}: {where} is not a JSON object: {error}'
        ) from error
      yield where, record


def _text_field(
  spec: str, where: Any, record: Any, field: str, form: str
) -> str:
  """record[field], which must be text; `form` says how fields are named."""
  if not isinstance(record, dict) or not isinstance(record.get(field), str):
    found = sorted(record) if isinstance(record, dict) else type(record)
    raise InputError(
      f'data.source={spec!r}: {where} has no text in field {field!r}; it has '
      f'{found}. Name the fields as {form!r}'
    )
  text = record[field]
  try:
    text.encode()
  except UnicodeEncodeError as error:  # JSON can spell one: "\\ud800"
    raise InputError(
      f'data.source={spec!r}: {where} holds half of a surrogate pair at '
      f'character {error.start} of field {field!r}; write it as one '
      'character'
    ) from error
  return text


def document_of(name: Any, text: str) -> Document:
  """Returns a document whose text is in memory."""
  return Document(
    name,
    lambda: _cut_at_lines(
      text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)
    ),
  )


def _cut_at_lines(chunks: Iterable[str]) -> Iterator[str]:
  """Moves the borders between chunks to where no token crosses them."""
  rest = ''
  for chunk in chunks:
    text = rest + chunk
    # A text without such a place for four chunks is cut anyway, to bound memory.
    cut = _CUT.match(text)
    end = cut.end() if cut else len(text) if len(text) > 4 * PIECE_CHARS else 0
    if end and len(text) >= PIECE_CHARS:
      yield text[:end]
      text = text[end:]
    rest = text
  if rest:
    yield rest


def _is_compressed(path: str) -> bool:
  return pathlib.Path(path).suffix in ('.gz', '.bz2', '.xz', '.zst')


def _borders(spec: str, path: str, place: re.Pattern[bytes]) -> Iterator[int]:
  """Where the parts of a file begin, in bytes, and its size at last.

  They are about PART_BYTES apart, each at the end of a match of `place`.
  """
  yield 0
  with _open_binary(spec, path) as file:
    size, last = os.fstat(file.fileno()).st_size, 0
    while last + PART_BYTES < size:
      start = last + PART_BYTES
      while start < size:
        file.seek(start)
        block = file.read(PIECE_CHARS)
        found = place.search(block)
        if found:
          break
        start += max(len(block) - 1, 1)  # a place may lie across two blocks
      if not found or start + found.end() >= size:
        break
      last = start + found.end()
      yield last
  yield size


def _grouped(paths: Iterable[str]) -> Iterator[tuple[tuple[str, ...], int]]:
  """Groups of consecutive files of about PART_BYTES together, and their size."""
  group, size = [], 0
  for path in paths:
    group.append(path)
    size += os.path.getsize(path)
    if size >= PART_BYTES:
      yield tuple(group), size
      group, size = [], 0
  if group:
    yield tuple(group), size


def _find_files(spec: str, pattern: str) -> tuple[str, ...]:
  """The files that a glob matches, sorted; at least one, not all empty."""
  paths = sorted(
    path
    for path in glob.glob(os.path.expanduser(pattern), recursive=True)
    if os.path.isfile(path)
  )
  if not paths and os.path.isdir(os.path.expanduser(pattern)):
    raise InputError(
      f'data.source={spec!r} is a folder; all that is in it is '
      f'{spec.rstrip("/") + "/**/*"!r}'
    )
  if not paths:
    raise InputError(
      f'data.source={spec!r} matches no file; give a glob that '
      'matches at least one text file (from the folder '
      f'{os.getcwd()}, or an absolute one)'
    )
  if not any(os.path.getsize(path) for path in paths):
    raise InputError(
      f'data.source={spec!r} matches {len(paths)} file(s), all '
      'of them empty; give files that hold text'
    )
  return tuple(paths)


def _split_fields(rest: str, *defaults: str) -> tuple[str, tuple[str, ...]]:
  """'GLOB' or 'GLOB:FIELD...' as (glob, fields); a glob may hold ':' itself."""
  pattern, *fields = rest.rsplit(':', len(defaults))
  if (
    len(fields) == len(defaults)
    and pattern
    and all(re.fullmatch(r'[^\W\d]\w*', field) for field in fields)
    and not glob.glob(os.path.expanduser(rest), recursive=True)
  ):
    return pattern, tuple(fields)
  return rest, defaults


@contextlib.contextmanager
def _open_binary(spec: str, path: str) -> Iterator[Any]:
  """Opens a file for reading bytes, decompressing it by its ending."""
  suffix = pathlib.Path(path).suffix
  try:
    if suffix == '.gz':
      file = gzip.open(path)
    elif suffix == '.bz2':
      file = bz2.open(path)
    elif suffix == '.xz':
      file = lzma.open(path)
    elif suffix == '.zst':
      file = importlib.import_module('zstandard').open(path, 'rb')
    else:
      file = open(path, 'rb')
    with file:
      yield file
  except ModuleNotFoundError as error:
    raise InputError(
      f'data.source={spec!r}: {path} needs the package '
      "zstandard: pip install -e '.[zstd]', or decompress the "
      'file'
    ) from error
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise InputError(
      f'data.source={spec!r}: {path} cannot be read: {error}'
    ) from error


def _decode(
  spec: str, path: str, file: Any, start: int = 0, stop: int | None = None
) -> Iterator[str]:
  """The text of bytes [start, stop), in chunks of about PIECE_CHARS bytes."""
  # At the beginning of a file, a byte order mark is dropped.
  decoder = codecs.getincrementaldecoder('utf-8' if start else 'utf-8-sig')()
  num_bytes = start
  try:
    while block := file.read(
      PIECE_CHARS if stop is None else min(PIECE_CHARS, stop - num_bytes)
    ):
      if b'\0' in block:
        raise InputError(
          f'data.source={spec!r}: {path} holds NUL bytes (the first at byte '
          f'{num_bytes + block.index(0)}), so it is not a text file; give a '
          'glob that matches only UTF-8 text files'
        )
      num_bytes += len(block)
      yield decoder.decode(block)
    yield decoder.decode(b'', final=True)
  except UnicodeDecodeError as error:
    # error.object is what was left of the last block plus this one.
    offset = num_bytes - len(error.object) + error.start
    raise InputError(
      f'data.source={spec!r}: {path} is not UTF-8 text at byte {offset}; '
      'convert it, for example with iconv -f latin1 -t utf-8'
    ) from error


def _fingerprint_files(paths: Iterable[str]) -> str:
  """A hash of the files' contents, or of their names and times if large."""
  stats = [(path, os.stat(path)) for path in paths]
  digest = hashlib.sha256()
  if sum(stat.st_size for _, stat in stats) <= _MAX_HASHED_BYTES:
    for path, _ in stats:
      try:
        with open(path, 'rb') as file:
          digest.update(hashlib.file_digest(file, 'sha256').digest())
      except OSError as error:
        raise InputError(
          f'data.source: {path} cannot be read ({error.strerror})'
        ) from error
  else:
    for path, stat in stats:
      # The change time cannot be set back by a copy that keeps times.
      digest.update(
        repr(
          (
            os.path.abspath(path),
            stat.st_size,
            stat.st_mtime_ns,
            stat.st_ctime_ns,
          )
        ).encode()
      )
  return digest.hexdigest()


# ---------------------------------------------------------------- embedded

# Folders of the standard library without prose of their own: tests, programs,
# other people's packages, and tables.
_SKIPPED_FOLDERS = frozenset(
  [
    'site-packages',
    'dist-packages',
    'test',
    'tests',
    'idlelib',
    'lib2to3',
    'turtledemo',
    'ensurepip',
    'pydoc_data',
    'encodings',
    'lib-dynload',
    '__pycache__',
  ]
)
_MIN_DOCSTRING_CHARS = 40
_MIN_TEXT_CHARS = 200


@dataclasses.dataclass(frozen=True)
class EmbeddedSource:
  """English that ships with CPython: about 2 MB, no download; see Source.

  The language reference that pydoc prints (one document per topic), then the
  docstrings of the standard library (one document per module). The library's
  files are parsed, never imported. Another Python version has another text.
  """

  spec: str = 'embedded'
  splits: tuple[str, ...] = ('train',)

  def fingerprint(self) -> str:
    files = [(name, os.path.getsize(path)) for name, path in _stdlib_files()]
    return hashlib.sha256(repr((sys.version, files)).encode()).hexdigest()

  def parts(self, split: str) -> Iterator[Part]:
    yield Part(split, 1, ())

  def read(self, part: Part) -> Iterator[Document]:
    for name, text in _embedded_texts():
      yield document_of(name, text)


@functools.cache  # 2 MB, parsed in about 4 seconds
def _embedded_texts() -> tuple[tuple[str, str], ...]:
  """(name, text) of the embedded documents, in order."""
  from pydoc_data import topics  # pylint: disable=g-import-not-at-top

  texts = [
    (f'pydoc topic {name}', text.strip() + '\n')
    for name, text in sorted(topics.topics.items())
  ]
  texts.extend((name, _docstrings(path)) for name, path in _stdlib_files())
  return tuple(
    (name, text) for name, text in texts if len(text) >= _MIN_TEXT_CHARS
  )


def _stdlib_files() -> Iterator[tuple[str, str]]:
  """(relative name, path) of the standard library's modules, sorted."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
    for name in sorted(names):
      path = pathlib.Path(folder, name)
      if path.suffix == '.py':
        yield path.relative_to(root).as_posix(), str(path)


def _docstrings(path: str) -> str:
  """All docstrings of a Python file in the order of the file, cleaned."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # some modules hold odd escapes
    tree = ast.parse(pathlib.Path(path).read_bytes())
  owners = [
    node
    for node in ast.walk(tree)
    if isinstance(
      node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    )
  ]
  owners.sort(key=lambda node: getattr(node, 'lineno', 0))
  texts = [(ast.get_docstring(node) or '').strip() for node in owners]
  # dict.fromkeys: the same docstring on several methods is kept once.
  texts = [
    text for text in dict.fromkeys(texts) if len(text) >= _MIN_DOCSTRING_CHARS
  ]
  return ''.join(text + '\n\n' for text in texts)


# -------------------------------------------------------------------- TFDS


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A text dataset of TensorFlow Datasets, one document per example.

  Its own validation split (or, lacking one, its test split) is the validation
  text; a dataset with only a train split is split like any other source.
  TensorFlow is imported only where TFDS itself needs it.

  Attributes:
    spec: see Source.
    builder: tfds.core.DatasetBuilder.
    feature: the text feature.
  """

  spec: str
  builder: Any
  feature: str

  @property
  def splits(self) -> tuple[str, ...]:
    """See Source; the dataset is prepared first."""
    self._prepare()
    return ('train', 'validation') if self._own_validation() else ('train',)

  def fingerprint(self) -> str:
    return self.builder.info.full_name  # name/config/version

  def parts(self, split: str) -> Iterator[Part]:
    self._prepare()
    own = self._own_validation() if split == 'validation' else split
    num_rows = self.builder.info.splits[own].num_examples
    for start, stop in _row_ranges(num_rows):
      yield Part(split, stop - start, (own, start, stop))

  def read(self, part: Part) -> Iterator[Document]:
    own, start, stop = part.where
    if self.builder.info.file_format.value == 'array_record':
      rows = self.builder.as_data_source(own)
      examples = (rows[i] for i in range(start, stop))
    else:  # somebody prepared it as TFRecord, which only TensorFlow reads
      import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

      examples = tfds.as_numpy(
        self.builder.as_dataset(f'{own}[{start}:{stop}]')
      )
    for i, example in enumerate(examples, start):
      yield document_of(
        f'{self.builder.name} {own} {i}', example[self.feature].decode()
      )

  def _own_validation(self) -> str:
    splits = self.builder.info.splits
    return next((s for s in ('validation', 'test') if s in splits), '')

  def _prepare(self) -> None:
    """Downloads and prepares the dataset, or fails within seconds."""
    if _is_prepared(self.builder):
      return
    url = next(
      iter(self.builder.url_infos or ()), 'https://storage.googleapis.com'
    )
    if not _has_downloads(self.builder) and not is_reachable(url):
      raise InputError(
        f'data.source={self.spec!r}: the dataset {self.builder.info.full_name} '
        f'is not prepared in {self.builder.data_dir} and {url} does not '
        'answer; connect to the network once, or copy the prepared dataset '
        'there'
      )
    try:
      with quiet_tfds():
        self.builder.download_and_prepare(file_format='array_record')
    except (ImportError, OSError, RuntimeError) as error:
      raise InputError(
        f'data.source={self.spec!r}: TFDS could not prepare '
        f'{self.builder.info.full_name}: {error}'
      ) from error


def _make_tfds_source(
  spec: str, name: str, feature: str, data_dir: str
) -> TfdsSource:
  """Finds the dataset and its text feature; downloads nothing."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  base = name.partition('/')[0]
  roots = [
    os.path.expanduser(root)
    for root in (data_dir, tfds.core.constants.DATA_DIR)
    if root
  ]
  known = tfds.list_builders(with_community_datasets=False)
  if base not in known and not any(
    os.path.isdir(os.path.join(root, base)) for root in roots
  ):
    raise InputError(
      f'data.source={spec!r}: TFDS has no dataset {base!r}; close names: '
      f'{difflib.get_close_matches(base, sorted(set(known)))}'
    )
  try:
    with quiet_tfds():
      builders = [tfds.builder(name, data_dir=root) for root in roots]
  except ValueError as error:  # for example an unknown config or version
    raise InputError(f'data.source={spec!r}: {str(error).strip()}') from error
  # TFDS's own folder comes last: it is shared with other programs, so what has
  # to be downloaded goes there.
  builder = next(
    itertools.chain(
      (b for b in builders if _is_prepared(b)),
      (b for b in builders if _has_downloads(b)),
      builders[-1:],
    )
  )

  texts = sorted(
    key
    for key, value in builder.info.features.items()
    if isinstance(value, tfds.features.Text)
  )
  default = 'text' if 'text' in texts or len(texts) != 1 else texts[0]
  if (feature or default) not in texts:
    raise InputError(
      f'data.source={spec!r}: give a text feature as '
      f"'tfds:{name}:FEATURE', one of {texts}"
    )
  return TfdsSource(spec, builder, feature or default)


def _is_prepared(builder: Any) -> bool:
  # builder.is_prepared() warns about a folder that is not there.
  return os.path.exists(os.path.join(builder.data_dir, 'dataset_info.json'))


def _has_downloads(builder: Any) -> bool:
  """Whether files were downloaded, or put by hand, for a TFDS builder."""
  folder = pathlib.Path(builder.data_dir_root, 'downloads', builder.name)
  return any(names for _, _, names in os.walk(folder))


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
  """Keeps TFDS from printing and logging about every dataset it touches."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  verbosity = logging.get_verbosity()
  if not sys.stderr.isatty():  # bars are for people who wait for a download
    tfds.disable_progress_bar()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


# ------------------------------------------------- Arrow: Parquet, Hugging Face


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRows:
  """Consecutive rows of token ids.

  Attributes:
    name: of the file or split.
    first_row: number of the first row in it.
    sizes: [rows] ids in each row.
    ids: [sum(sizes)] int64.
  """

  name: str
  first_row: int
  sizes: np.ndarray
  ids: np.ndarray

  def place(self, i: int) -> str:
    """Which row id number i belongs to, for messages."""
    row = int(np.searchsorted(np.cumsum(self.sizes), i, 'right'))
    return f'row {self.first_row + row} of {self.name}'


@dataclasses.dataclass(frozen=True)
class ArrowSource:
  """Rows of a table, one document each, or rows of token ids; see Source.

  With is_tokens, `read` yields TokenRows instead of documents. Nothing is put
  between the rows: they are one stream of tokens that ends its documents itself.

  Attributes:
    spec: see Source.
    is_tokens: whether a row is ids instead of text.
    field: the column.
  """

  spec: str
  is_tokens: bool
  field: str

  def read(self, part: Part) -> Iterator[Any]:
    for name, first_row, column in self._columns(part):
      self._check_type(name, column)
      if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise InputError(
          f'data.source={self.spec!r}: row {row} of {name} has '
          f'nothing in field {self.field!r}'
        )
      if self.is_tokens:
        for chunk in column.chunks:
          ids = chunk.flatten()
          sizes = chunk.value_lengths().to_numpy(zero_copy_only=False)
          if ids.null_count:
            rows = TokenRows(name, first_row, sizes, np.zeros([0], np.int64))
            place = rows.place(ids.is_null().to_pylist().index(True))
            raise InputError(
              f'data.source={self.spec!r}: {place} has nothing in a '
              f'place of field {self.field!r}'
            )
          ids = ids.to_numpy(zero_copy_only=False)
          yield TokenRows(name, first_row, sizes, ids.astype(np.int64))
          first_row += len(chunk)
      else:
        for row, text in enumerate(column.to_pylist(), first_row):
          yield document_of(f'row {row} of {name}', text)

  def _columns(self, part: Part) -> Iterator[tuple[str, int, Any]]:
    """Yields (name, number of the first row, pyarrow.ChunkedArray) of a part."""
    raise NotImplementedError

  def _check_type(self, name: str, column: Any) -> None:
    from pyarrow import types  # pylint: disable=g-import-not-at-top

    kind = column.type
    if self.is_tokens:
      is_right = (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
      ) and types.is_integer(kind.value_type)
    else:
      is_right = types.is_string(kind) or types.is_large_string(kind)
    if not is_right:
      wanted = 'lists of integers' if self.is_tokens else 'text'
      raise InputError(
        f'data.source={self.spec!r}: field {self.field!r} of '
        f'{name} holds {kind}, not {wanted}'
      )


def _row_ranges(num_rows: int) -> Iterator[tuple[int, int]]:
  for start in range(0, num_rows, PART_ROWS):
    yield start, min(start + PART_ROWS, num_rows)


@dataclasses.dataclass(frozen=True)
class ParquetSource(ArrowSource):
  """Parquet files; a part is a row group. See ArrowSource."""

  paths: tuple[str, ...]

  splits = ('train',)

  def fingerprint(self) -> str:
    return _fingerprint_files(self.paths)

  def parts(self, split: str) -> Iterator[Part]:
    for path in self.paths:
      with self._open(path) as file:
        if self.field not in file.schema_arrow.names:
          kind = 'tokens' if self.is_tokens else 'parquet'
          raise InputError(
            f'data.source={self.spec!r}: {path} has no field {self.field!r}, '
            f"but {file.schema_arrow.names}; name one as '{kind}:GLOB:FIELD'"
          )
        for group in range(file.num_row_groups):
          yield Part(
            split, file.metadata.row_group(group).num_rows, (path, group)
          )

  def _columns(self, part: Part) -> Iterator[tuple[str, int, Any]]:
    import pyarrow as pa  # pylint: disable=g-import-not-at-top

    path, group = part.where
    with self._open(path) as file:
      first = sum(file.metadata.row_group(i).num_rows for i in range(group))
      # Row groups may be large: a few thousand rows at a time.
      for batch in file.iter_batches(PART_ROWS, [group], [self.field]):
        yield path, first, pa.chunked_array([batch.column(0)])
        first += batch.num_rows

  @contextlib.contextmanager
  def _open(self, path: str) -> Iterator[Any]:
    import pyarrow as pa  # pylint: disable=g-import-not-at-top
    import pyarrow.parquet as pq  # pylint: disable=g-import-not-at-top

    try:
      with pq.ParquetFile(path) as file:
        yield file
    except (pa.ArrowException, OSError) as error:
      raise InputError(
        f'data.source={self.spec!r}: {path} cannot be read as Parquet: {error}'
      ) from error


@dataclasses.dataclass(frozen=True)
class HfSource(ArrowSource):
  """A dataset of the Hugging Face Hub, or of a folder; see ArrowSource.

  Its own validation split (or, lacking one, its test split) is the validation
  text, as with TFDS.

  Attributes:
    dataset: datasets.DatasetDict.
  """

  dataset: Any

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that the dataset has itself."""
    return ('train', 'validation') if self._own_validation() else ('train',)

  def fingerprint(self) -> str:
    rows = [
      (
        split,
        data.num_rows,
        sorted(
          # The cache's folders carry the version's hash; not where the cache is.
          '/'.join(pathlib.Path(file['filename']).parts[-5:])
          for file in data.cache_files
        ),
      )
      for split, data in sorted(self.dataset.items())
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()

  def parts(self, split: str) -> Iterator[Part]:
    own = self._own_validation() if split == 'validation' else split
    for start, stop in _row_ranges(self.dataset[own].num_rows):
      yield Part(split, stop - start, (own, start, stop))

  def _columns(self, part: Part) -> Iterator[tuple[str, int, Any]]:
    own, start, stop = part.where
    data = self.dataset[own].select_columns([self.field]).with_format('arrow')
    yield f'split {own!r}', start, data[start:stop].column(0)

  def _own_validation(self) -> str:
    return next((s for s in ('validation', 'test') if s in self.dataset), '')


def _make_hf_source(spec: str, is_tokens: bool, rest: str) -> HfSource:
  """Loads (which may download) a dataset, or fails within seconds."""
  name, *middle, field = (
    rest.split(':')
    if ':' in rest
    else (rest, 'tokens' if is_tokens else 'text')
  )
  if not name or len(middle) > 1:
    raise InputError(
      f"data.source={spec!r} is not of the form 'hf:NAME', "
      "'hf:NAME:FEATURE' or 'hf:NAME:CONFIG:FEATURE'"
    )
  is_folder = os.path.isdir(os.path.expanduser(name))
  endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')
  is_online = is_folder or is_reachable(endpoint)
  if not is_online:
    # Else it retries for most of a minute before it looks into its cache.
    os.environ['HF_HUB_OFFLINE'] = '1'
  try:
    import datasets  # pylint: disable=g-import-not-at-top
  except ModuleNotFoundError as error:
    raise InputError(
      f"data.source={spec!r} needs the package datasets: pip install -e '.[hf]'"
    ) from error
  if not sys.stderr.isatty():
    datasets.disable_progress_bars()
  try:
    dataset = datasets.load_dataset(
      os.path.expanduser(name) if is_folder else name, *middle
    )
  # Whatever goes wrong in files and networks that belong to somebody else.
  except Exception as error:  # pylint: disable=broad-exception-caught
    advice = (
      ''
      if is_online
      else (
        f'; {endpoint} does not answer, and the dataset is not in the cache: '
        'connect to the network once, or give a folder that holds it'
      )
    )
    raise InputError(
      f'data.source={spec!r}: Hugging Face datasets cannot load {name!r}: '
      f'{" ".join(str(error).split())}{advice}'
    ) from error
  if 'train' not in dataset:
    raise InputError(
      f"data.source={spec!r} has no split 'train', but {sorted(dataset)}"
    )
  for split, data in dataset.items():
    if field not in data.column_names:
      raise InputError(
        f'data.source={spec!r}: split {split!r} has no feature {field!r}, but '
        f"{data.column_names}; name one as 'hf:NAME:FEATURE'"
      )
  return HfSource(spec, is_tokens, field, dataset)
