"""Where text comes from: files, TFDS datasets, or what ships with Python.

A source is a sequence of documents in a fixed order, read as a stream: a document
is opened, as often as needed, as an iterator of pieces of about a million
characters, so a 20 GB file and a corpus of 8 million articles both need a few
megabytes of memory. A pair of a prompt and a response is a document of exactly
those two pieces.
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
import os
import pathlib
import re
import sys
import sysconfig
from typing import Any, Protocol
import warnings
import zlib

from absl import logging

from nanodlm.tokenizers import is_reachable
from nanodlm.types import InputError

# Documents longer than this many characters are read and encoded in pieces.
PIECE_CHARS = 1 << 20
# Files are fingerprinted by content up to this many bytes in all (under a second
# to read), and by path, size and times beyond it.
_MAX_HASHED_BYTES = 256 << 20
# A piece ends with one newline after a visible character, and the next begins with
# a letter or digit: bytes and tiktoken's encodings never merge across such a
# place, so cutting there changes no token (SentencePiece: rarely one per piece).
_CUT = re.compile(r'.*\S\n(?=\w)', re.DOTALL)

_ALLOWED = ("'embedded', 'text:GLOB', 'jsonl:GLOB', 'jsonl:GLOB:FIELD', "
            "'pairs:GLOB', 'pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD', "
            "'tfds:NAME' or 'tfds:NAME:FEATURE'")
# What config.data.source begins with where it names pairs.
PAIRS = 'pairs:'


@dataclasses.dataclass(frozen=True)
class Document:
  """A text that can be read again and again.

  Attributes:
    name: where it is, for messages.
    open: returns a fresh iterator of the text's pieces, in order; str.
  """

  name: str
  open: Callable[[], Iterator[str]]


class Source(Protocol):
  """A fixed sequence of documents.

  Attributes:
    spec: the config.data.source it was made from.
    splits: ('train',) where the text has no split of its own, otherwise
      ('train', 'validation').
  """

  spec: str
  splits: tuple[str, ...]

  def fingerprint(self) -> str:
    """Returns a hash that changes whenever the text may have changed."""

  def documents(self, split: str) -> Iterator[Document]:
    """Yields the documents of one of `splits`, always in the same order."""


def make_source(spec: str, data_dir: str = '') -> Source:
  """Makes the source that config.data.source names.

  Args:
    spec: 'embedded', 'text:GLOB', 'jsonl:GLOB', 'jsonl:GLOB:FIELD',
      'pairs:GLOB', 'pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD', 'tfds:NAME' or
      'tfds:NAME:FEATURE'. Globs know '**'; files may be compressed (.gz, .bz2,
      .xz, .zst).
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
  raise InputError(f'data.source={spec!r} is not one of {_ALLOWED}')


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
  """Text files in UTF-8, one document each; see Source."""

  def documents(self, split: str) -> Iterator[Document]:
    del split  # there is only one
    for path in self.paths:
      yield Document(path, functools.partial(self._pieces, path))

  def _pieces(self, path: str) -> Iterator[str]:
    with _open_binary(self.spec, path) as file:
      yield from _cut_at_lines(_decode(self.spec, path, file))


@dataclasses.dataclass(frozen=True)
class JsonlSource(_Files):
  """JSON objects, one per line and one document each; see Source."""

  field: str

  def documents(self, split: str) -> Iterator[Document]:
    del split  # there is only one
    for where, record in _json_lines(self.spec, self.paths):
      yield document_of(where, _text_field(
          self.spec, where, record, self.field, 'jsonl:GLOB:FIELD'))


@dataclasses.dataclass(frozen=True)
class PairsSource(_Files):
  """Prompts with their responses, one JSON object a line; see Source.

  A document is a pair: its pieces are the prompt and the response, in this
  order, neither of them empty.
  """

  prompt_field: str
  response_field: str

  def documents(self, split: str) -> Iterator[Document]:
    del split  # there is only one
    for where, record in _json_lines(self.spec, self.paths):
      pair = []
      for field in (self.prompt_field, self.response_field):
        text = _text_field(self.spec, where, record, field,
                           'pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD')
        if not text:
          raise InputError(
              f'data.source={self.spec!r}: {where} has an empty text in field '
              f'{field!r}; a pair needs at least one character in each')
        pair.append(text)
      yield Document(where, functools.partial(iter, tuple(pair)))


def _json_lines(spec: str, paths: Iterable[str]) -> Iterator[tuple[str, Any]]:
  """('path:line', value) of every line that is not blank."""
  for path in paths:
    with _open_binary(spec, path) as file:
      for number, line in enumerate(file, start=1):
        if not line.strip():
          continue
        where = f'{path}:{number}'
        try:
          record = json.loads(line.decode('utf-8-sig'))
        except UnicodeDecodeError as error:
          raise InputError(
              f'data.source={spec!r}: {where} is not UTF-8 text at byte '
              f'{error.start} of the line; convert the file to UTF-8'
          ) from error
        except json.JSONDecodeError as error:
          raise InputError(f'data.source={spec!r}: {where} is not a JSON '
                           f'object: {error}') from error
        yield where, record


def _text_field(spec: str, where: str, record: Any, field: str,
                form: str) -> str:
  """record[field], which must be text; `form` says how fields are named."""
  if not isinstance(record, dict) or not isinstance(record.get(field), str):
    found = sorted(record) if isinstance(record, dict) else type(record)
    raise InputError(
        f'data.source={spec!r}: {where} has no text in field {field!r}; it has '
        f'{found}. Name the fields as {form!r}')
  text = record[field]
  try:
    text.encode()
  except UnicodeEncodeError as error:  # JSON can spell one: "\\ud800"
    raise InputError(
        f'data.source={spec!r}: {where} holds half of a surrogate pair at '
        f'character {error.start} of field {field!r}; write it as one '
        'character') from error
  return text


def document_of(name: str, text: str) -> Document:
  """Returns a document whose text is in memory."""
  return Document(name, lambda: _cut_at_lines(
      text[i:i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)))


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


def _find_files(spec: str, pattern: str) -> tuple[str, ...]:
  """The files that a glob matches, sorted; at least one, not all empty."""
  paths = sorted(path for path in glob.glob(
      os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
  if not paths and os.path.isdir(os.path.expanduser(pattern)):
    raise InputError(f'data.source={spec!r} is a folder; all that is in it is '
                     f"{spec.rstrip('/') + '/**/*'!r}")
  if not paths:
    raise InputError(f'data.source={spec!r} matches no file; give a glob that '
                     'matches at least one text file (from the folder '
                     f'{os.getcwd()}, or an absolute one)')
  if not any(os.path.getsize(path) for path in paths):
    raise InputError(f'data.source={spec!r} matches {len(paths)} file(s), all '
                     'of them empty; give files that hold text')
  return tuple(paths)


def _split_fields(rest: str, *defaults: str) -> tuple[str, tuple[str, ...]]:
  """'GLOB' or 'GLOB:FIELD...' as (glob, fields); a glob may hold ':' itself."""
  pattern, *fields = rest.rsplit(':', len(defaults))
  if (len(fields) == len(defaults) and pattern
      and all(re.fullmatch(r'[^\W\d]\w*', field) for field in fields)
      and not glob.glob(os.path.expanduser(rest), recursive=True)):
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
    raise InputError(f'data.source={spec!r}: {path} needs the package '
                     'zstandard; pip install zstandard, or decompress the '
                     'file') from error
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise InputError(
        f'data.source={spec!r}: {path} cannot be read: {error}') from error


def _decode(spec: str, path: str, file: Any) -> Iterator[str]:
  """The text of a binary file in chunks of about PIECE_CHARS bytes."""
  decoder = codecs.getincrementaldecoder('utf-8-sig')()  # drops a BOM
  num_bytes = 0
  try:
    while block := file.read(PIECE_CHARS):
      if b'\0' in block:
        raise InputError(
            f'data.source={spec!r}: {path} holds NUL bytes (the first at byte '
            f'{num_bytes + block.index(0)}), so it is not a text file; give a '
            'glob that matches only UTF-8 text files')
      num_bytes += len(block)
      yield decoder.decode(block)
    yield decoder.decode(b'', final=True)
  except UnicodeDecodeError as error:
    # error.object is what was left of the last block plus this one.
    offset = num_bytes - len(error.object) + error.start
    raise InputError(
        f'data.source={spec!r}: {path} is not UTF-8 text at byte {offset}; '
        'convert it, for example with iconv -f latin1 -t utf-8') from error


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
        raise InputError(f'data.source: {path} cannot be read '
                         f'({error.strerror})') from error
  else:
    for path, stat in stats:
      # The change time cannot be set back by a copy that keeps times.
      digest.update(repr((os.path.abspath(path), stat.st_size,
                          stat.st_mtime_ns, stat.st_ctime_ns)).encode())
  return digest.hexdigest()


# ---------------------------------------------------------------- embedded

# Folders of the standard library without prose of their own: tests, programs,
# other people's packages, and tables.
_SKIPPED_FOLDERS = frozenset([
    'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3',
    'turtledemo', 'ensurepip', 'pydoc_data', 'encodings', 'lib-dynload',
    '__pycache__'])
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

  def documents(self, split: str) -> Iterator[Document]:
    del split  # there is only one
    for name, text in _embedded_texts():
      yield document_of(name, text)


@functools.cache  # 2 MB, parsed in about 4 seconds
def _embedded_texts() -> tuple[tuple[str, str], ...]:
  """(name, text) of the embedded documents, in order."""
  from pydoc_data import topics  # pylint: disable=g-import-not-at-top
  texts = [(f'pydoc topic {name}', text.strip() + '\n')
           for name, text in sorted(topics.topics.items())]
  texts.extend((name, _docstrings(path)) for name, path in _stdlib_files())
  return tuple((name, text) for name, text in texts
               if len(text) >= _MIN_TEXT_CHARS)


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
  owners = [node for node in ast.walk(tree) if isinstance(
      node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
  owners.sort(key=lambda node: getattr(node, 'lineno', 0))
  texts = [(ast.get_docstring(node) or '').strip() for node in owners]
  # dict.fromkeys: the same docstring on several methods is kept once.
  texts = [text for text in dict.fromkeys(texts)
           if len(text) >= _MIN_DOCSTRING_CHARS]
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

  def documents(self, split: str) -> Iterator[Document]:
    self._prepare()
    own = self._own_validation() if split == 'validation' else split
    if self.builder.info.file_format.value == 'array_record':
      examples = self.builder.as_data_source(own)
    else:  # somebody prepared it as TFRecord, which only TensorFlow reads
      import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top
      examples = tfds.as_numpy(self.builder.as_dataset(own))
    for i, example in enumerate(examples):
      yield document_of(f'{self.builder.name} {own} {i}',
                        example[self.feature].decode())

  def _own_validation(self) -> str:
    splits = self.builder.info.splits
    return next((s for s in ('validation', 'test') if s in splits), '')

  def _prepare(self) -> None:
    """Downloads and prepares the dataset, or fails within seconds."""
    if _is_prepared(self.builder):
      return
    url = next(iter(self.builder.url_infos or ()),
               'https://storage.googleapis.com')
    if not _has_downloads(self.builder) and not is_reachable(url):
      raise InputError(
          f'data.source={self.spec!r}: the dataset {self.builder.info.full_name} '
          f'is not prepared in {self.builder.data_dir} and {url} does not '
          'answer; connect to the network once, or copy the prepared dataset '
          'there')
    try:
      with quiet_tfds():
        self.builder.download_and_prepare(file_format='array_record')
    except (ImportError, OSError, RuntimeError) as error:
      raise InputError(
          f'data.source={self.spec!r}: TFDS could not prepare '
          f'{self.builder.info.full_name}: {error}') from error


def _make_tfds_source(spec: str, name: str, feature: str,
                      data_dir: str) -> TfdsSource:
  """Finds the dataset and its text feature; downloads nothing."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  base = name.partition('/')[0]
  roots = [os.path.expanduser(root)
           for root in (data_dir, tfds.core.constants.DATA_DIR) if root]
  known = tfds.list_builders(with_community_datasets=False)
  if base not in known and not any(
      os.path.isdir(os.path.join(root, base)) for root in roots):
    raise InputError(
        f'data.source={spec!r}: TFDS has no dataset {base!r}; close names: '
        f'{difflib.get_close_matches(base, sorted(set(known)))}')
  try:
    with quiet_tfds():
      builders = [tfds.builder(name, data_dir=root) for root in roots]
  except ValueError as error:  # for example an unknown config or version
    raise InputError(f'data.source={spec!r}: {str(error).strip()}') from error
  # TFDS's own folder comes last: it is shared with other programs, so what has
  # to be downloaded goes there.
  builder = next(itertools.chain(
      (b for b in builders if _is_prepared(b)),
      (b for b in builders if _has_downloads(b)),
      builders[-1:]))

  texts = sorted(key for key, value in builder.info.features.items()
                 if isinstance(value, tfds.features.Text))
  default = 'text' if 'text' in texts or len(texts) != 1 else texts[0]
  if (feature or default) not in texts:
    raise InputError(f"data.source={spec!r}: give a text feature as "
                     f"'tfds:{name}:FEATURE', one of {texts}")
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
