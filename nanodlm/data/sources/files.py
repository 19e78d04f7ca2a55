"""Text, JSONL and pairs in files that a glob names."""

import bz2
import codecs
import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import pathlib
from typing import Any, BinaryIO, ClassVar, Self
import zlib

from nanodlm.data.sources import base
from nanodlm.data.tokenizers import chat
from nanodlm.types import InputError, reason

_log = logging.getLogger('nanodlm')
# Files are fingerprinted by content up to this many bytes in all (read in less
# than a second), and by path, size and times beyond it.
_MAX_HASHED_BYTES = 256 << 20
# Bytes that are not UTF-8, decoded with 'surrogateescape'.
_HALVES = ''.join(map(chr, range(0xDC80, 0xDD00)))
# Compressed bytes that are read at once; their text may be 1000 times as long.
_BLOCK_BYTES = 1 << 14


def _zstd_frame() -> Any:
  import zstandard

  # The window of `zstd --long=31`, the largest there is.
  return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# For each suffix: what decompresses one stream, the padding that is allowed
# after a stream, and the first bytes of a file.
_FORMATS: dict[str, tuple[Callable[[], Any], bytes, bytes]] = {
  '.gz': (lambda: zlib.decompressobj(31), b'\0', b'\x1f\x8b'),
  '.bz2': (bz2.BZ2Decompressor, b'', b'BZh'),
  '.xz': (lzma.LZMADecompressor, b'\0', b'\xfd7zXZ\0'),
  '.zst': (_zstd_frame, b'', b'\x28\xb5\x2f\xfd'),
}
# UTF-32 comes last, because its mark may begin with that of UTF-16.
_BYTE_ORDER_MARKS = {
  'utf-16': (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
  'utf-32': (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
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
    pattern, given = name, []
    # A glob may contain colons, too: the longest one that matches counts.
    while not (found := _matches(pattern)) and ':' in pattern:
      pattern, _, field = pattern.rpartition(':')
      given.insert(0, field)
    fields = tuple(given) or cls.default_fields
    if len(cls.default_fields) == 1:
      fields = (':'.join(fields),)
    paths = tuple(path for path in found if os.path.isfile(path))
    source = cls(spec, paths, fields)
    if not any(map(os.path.getsize, paths)):
      what = f'{len(paths)} file(s), all of them empty' if paths else 'no file'
      is_folder = os.path.isdir(os.path.expanduser(name))
      hint = f'; all files of this folder are {spec.rstrip("/")}/**/*'
      raise source.error(
        f'it matches {what}; give a glob that matches text files, an absolute '
        f'one or one relative to {os.getcwd()}{hint if is_folder else ""}'
      )
    if len(fields) != len(cls.default_fields) or '' in fields:
      raise source.error(
        f'{":".join(["", *given])!r} after {pattern!r} does not fit the form '
        f'{cls.forms[-1]!r}'
      )
    for path in found:
      if os.path.islink(path) and not os.path.lexists(os.path.realpath(path)):
        raise source.error(
          f'{path} is a link to {os.path.realpath(path)}, which does not exist'
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
    suffix = _compression(path) if compressed else ''
    try:
      with open(path, 'rb') as file:
        file.seek(start)
        yield io.BufferedReader(_Streams(file, suffix)) if suffix else file
    except ModuleNotFoundError as error:
      raise self.error(
        f"{path} needs the package zstandard: pip install -e '.[zstd]', or "
        'decompress the file'
      ) from error
    except (OSError, EOFError) as error:
      raise self.error(f'{path} cannot be read: {reason(error)}') from error

  def _slices(
    self, path: str, next_border: Callable[[BinaryIO], int]
  ) -> Iterator[base.Part]:
    """Yields (path, first byte, one past the last or None at the file's end).

    A slice has about PART_BYTES; a compressed file is one slice. `next_border`
    returns how far from the position of the file a slice may end.
    """
    size = 0 if _compression(path) else os.path.getsize(path)
    borders = [0]
    with self._open(path, compressed=False) as file:
      while (start := borders[-1] + base.PART_BYTES) < size:
        file.seek(start)
        borders.append(start + next_border(file))
    if borders[-1] >= size > 0:
      borders.pop()
    for start, stop in itertools.pairwise([*borders, None]):
      yield path, start, stop

  def _advice(self, path: str) -> str:
    """Returns what to do with a file that is not UTF-8 text."""
    with self._open(path) as file:
      head = file.read(1 << 12)
    for suffix, (_, _, magic) in _FORMATS.items():
      if head.startswith(magic):
        return f'it is compressed, so let its name end in {suffix}'
    # One of the two bytes of an ASCII character in UTF-16 is zero.
    num_even, num_odd = head[::2].count(0), head[1::2].count(0)
    encoding, looks = 'latin1', ''
    if not min(num_even, num_odd) and num_even + num_odd > len(head) / 20:
      encoding = 'utf-16be' if num_even else 'utf-16le'
    for name, marks in _BYTE_ORDER_MARKS.items():
      if head.startswith(marks):
        encoding = name
    if encoding != 'latin1':
      looks = f'it looks like {encoding.upper()}; '
    return (
      f'{looks}convert it, for example with iconv -f {encoding} -t utf-8, or '
      'give a glob that matches only UTF-8 text files'
    )


def _compression(path: str) -> str:
  """Returns the suffix of a compressed file, or '' for any other."""
  suffix = pathlib.Path(path).suffix.lower()
  return suffix if suffix in _FORMATS else ''


class _Streams(io.RawIOBase):
  """The text of a compressed file, whose streams must all be complete.

  The standard library mistakes a damaged second stream for padding, and
  zstandard a file without its end for a whole one.

  Raises:
    OSError: the file is damaged.
    EOFError: it ends early.
  """

  def __init__(self, file: BinaryIO, suffix: str):
    self._blocks, self._rest = self._decompress(file, suffix), memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._rest:
      block = next(self._blocks, None)
      if block is None:
        return 0
      self._rest = memoryview(block)
    size = min(len(buffer), len(self._rest))
    buffer[:size], self._rest = self._rest[:size], self._rest[size:]
    return size

  def _decompress(self, file: BinaryIO, suffix: str) -> Iterator[bytes]:
    make_stream, padding, _ = _FORMATS[suffix]
    stream, is_complete = make_stream(), False
    while block := file.read(_BLOCK_BYTES):
      while block:
        if is_complete:
          block = block.lstrip(padding)
          if not block:
            break
          stream = make_stream()
        try:
          data = stream.decompress(block)
        # Each library has errors of its own.
        except Exception as error:
          raise OSError(f'it is damaged ({reason(error)})') from error
        yield data
        is_complete = stream.eof
        block = stream.unused_data if is_complete else b''
    if not is_complete:
      raise EOFError('the compressed file ends early; copy it again')


def _matches(pattern: str) -> list[str]:
  """Returns the paths that match, sorted, without links to one another.

  As in `glob`, '**' stands for folders at any depth, but each is entered once.
  """
  names = os.path.expanduser(pattern).split('/')
  if os.path.isfile('/'.join(names)):  # Such as 'a book [1].txt'.
    found = ['/'.join(names)]
  elif '**' in names:
    place, seen = names.index('**'), set()
    rest = '/'.join(names[place + 1 :]) or '*'
    roots = glob.glob('/'.join([*names[:place], ''])) if place else ['']
    folders = (path for root in sorted(roots) for path in _folders(root, seen))
    globs = (os.path.join(glob.escape(folder), rest) for folder in folders)
    found = [path for pattern in globs for path in _matches(pattern)]
  else:
    found = glob.glob('/'.join(names))
  real_folder = functools.cache(os.path.realpath)
  files: dict[str, str] = {}
  for path in sorted(found):
    real = os.path.join(
      real_folder(os.path.dirname(path)), os.path.basename(path)
    )
    if os.path.islink(path):
      real = os.path.realpath(path)
    if real == os.path.abspath(path):
      files[real] = path
    files.setdefault(real, path)
  return sorted(files.values())


def _folders(root: str, seen: set[str]) -> Iterator[str]:
  """Yields a folder and those in it that are not `seen`, links last.

  A link to a folder around it is a loop, and is not followed.
  """
  waiting = collections.deque([root])
  while waiting:
    folder = waiting.popleft()
    if (real := os.path.realpath(folder)) in seen:
      continue
    seen.add(real)
    yield folder
    try:
      names = sorted(os.listdir(folder or '.'))
    except OSError as error:
      _log.warning('%s is left out: %s', folder, reason(error))
      continue
    for path in (os.path.join(folder, n) for n in names if n[0] != '.'):
      if os.path.isdir(path) and not os.path.islink(path):
        waiting.appendleft(path)
      elif os.path.isdir(path):
        target = os.path.join(os.path.realpath(path), '')
        if not os.path.join(real, '').startswith(target):
          waiting.append(path)


@dataclasses.dataclass(frozen=True)
class TextSource(FileSource):
  """Text files in UTF-8, one document each.

  A part is several files, or, if there is only one file, a slice of it.
  """

  forms = ('text:GLOB',)

  def parts(self, split: str) -> Iterator[base.Part]:
    del split
    if len(self.paths) == 1:
      yield from ((where,) for where in self._slices(*self.paths, _next_cut))
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
            f'{place + block.index(0)}), so it is not UTF-8 text; '
            f'{self._advice(path)}'
          )
        place += len(block)
        yield decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
      # error.object is the end of the previous block and this block.
      offset = place - len(error.object) + error.start
      raise self.error(
        f'{path} is not UTF-8 text at byte {offset}; {self._advice(path)}'
      ) from error


def _next_cut(file: BinaryIO) -> int:
  """Returns how many bytes of a text are before a good place to cut it."""
  # Half a character at either end becomes surrogates, one for each byte.
  text = file.read(base.PIECE_CHARS).decode('utf-8', 'surrogateescape')
  text = text[: base.find_cut(text)].rstrip(_HALVES)
  return len(text.encode('utf-8', 'surrogateescape'))


@dataclasses.dataclass(frozen=True)
class JsonlSource(FileSource):
  """JSON objects, one document per line. A part is some lines of a file."""

  forms = ('jsonl:GLOB', 'jsonl:GLOB:FIELD')
  default_fields = ('text',)

  def parts(self, split: str) -> Iterator[base.Part]:
    del split
    for path in self.paths:
      yield from self._slices(path, lambda file: len(file.readline()))

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
        place = functools.partial(_place, path, start, number)
        try:
          document = self._document(self._record(path, line))
        except InputError as error:
          raise self.error(f'{place()} {error}') from error
        if self.is_chat:
          document = dataclasses.replace(document, place=place)
        yield document

  def _document(self, record: dict[str, Any]) -> base.Document:
    """Returns the document of a line; an error describes the line."""
    return base.document_of(*self._texts(record))

  def _record(self, path: str, line: bytes) -> dict[str, Any]:
    """Returns the JSON object of a line; an error describes the line."""
    try:
      record = json.loads(line.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
      raise InputError(
        f'is not UTF-8 text at byte {error.start} of the line; '
        f'{self._advice(path)}'
      ) from error
    # Python refuses numbers of thousands of digits and deep nesting.
    except (ValueError, RecursionError) as error:
      advice = f'; {self._advice(path)}' if b'\0' in line else ''
      raise InputError(f'is not a JSON object: {error}{advice}') from error
    if not isinstance(record, dict):
      raise InputError(f'is not a JSON object, but a {type(record).__name__}')
    return record

  def _texts(self, record: dict[str, Any]) -> list[str]:
    """Returns the text of each of `fields`."""
    texts = []
    for field in self.fields:
      text = record.get(field)
      if not isinstance(text, str):
        holds = ''
        if field in record:
          holds = f', which holds {json.dumps(text)[:40]}'
        raise InputError(
          f'must have a text in field {field!r}{holds}; its fields are '
          f'{sorted(record)}. Name the fields as in {self.forms[-1]!r}'
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

  def _document(self, record: dict[str, Any]) -> base.Document:
    return base.Document(functools.partial(iter, self._texts(record)))


@dataclasses.dataclass(frozen=True)
class PreferencesSource(PairsSource):
  """Prompts, each with a chosen and a rejected response: two pairs."""

  forms = (
    'preferences:GLOB',
    'preferences:GLOB:PROMPT_FIELD:CHOSEN_FIELD:REJECTED_FIELD',
  )
  num_alternatives = 2
  default_fields = ('prompt', 'chosen', 'rejected')

  def read(self, part: base.Part) -> Iterator[base.Document]:
    for document in super().read(part):
      prompt, *responses = document.open()
      for response in responses:
        yield base.Document(functools.partial(iter, (prompt, response)))


@dataclasses.dataclass(frozen=True)
class ChatSource(JsonlSource):
  """Conversations, one JSON object with a list of messages per line."""

  forms = ('chat:GLOB', 'chat:GLOB:FIELD')
  is_chat = True
  default_fields = ('messages',)

  def _document(self, record: dict[str, Any]) -> base.Document:
    (field,) = self.fields
    if field not in record and 'conversations' in record:
      raise InputError(f'lacks the field {field!r}; {chat.SHAREGPT}')
    if field not in record:
      raise InputError(
        f'lacks the field {field!r}, the list of messages; its fields are '
        f'{sorted(record)}. Name the field as in {self.forms[-1]!r}'
      )
    try:
      chat.check_messages(record[field])
    except InputError as error:
      raise InputError(f'is not a conversation: {error}') from error
    messages = tuple(
      {'role': one['role'], 'content': one['content']} for one in record[field]
    )
    said = [one['content'] for one in messages if one['content']]
    return base.Conversation(functools.partial(iter, said), messages=messages)


def _place(path: str, start: int, number: int) -> str:
  """Returns a file and a line of it, the `number`-th after byte `start`."""
  with open(path, 'rb') as file:
    for i in range(0, start, base.PIECE_CHARS):
      number += file.read(min(base.PIECE_CHARS, start - i)).count(b'\n')
  return f'{path}:{number}'
