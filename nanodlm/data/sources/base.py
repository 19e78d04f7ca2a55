"""The interface of a source: documents in a fixed order, cut into parts.

A document is read in pieces of about a million characters, so a corpus of any
size needs a few megabytes of memory. The parts are always the same, and several
processes or machines can read them at once.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import re
from typing import Any, ClassVar

import numpy as np

from nanodlm.types import InputError, Law

# Documents with more characters than this are read and encoded in pieces.
PIECE_CHARS = 1 << 20
# Approximate size of a part, the unit of work and of a restart.
PART_BYTES = 16 << 20
PART_ROWS = 4096
# What a source needs to find a slice of it, which can be read independently.
Part = tuple[Any, ...]
# Where a text is cut, best first. Usually a piece ends with one newline after a
# visible character, and the next begins with a letter or digit: bytes and
# tiktoken's encodings never merge across such a place, so cutting there changes
# no token (SentencePiece: rarely one). A text without such places is cut at any
# line break before a visible character (CRLF, empty lines, bullets), at any
# line break, or before a space.
_CUTS = [
  re.compile(rf'.*{place}', re.DOTALL)
  for place in (
    r'\S\n(?=\w)',
    r'\S\n(?=\S)',
    r'[\n\r](?=\S)',
    r'(?:\n|\r(?=[^\n]))',
    r'\S(?= \S)',
  )
]


@dataclasses.dataclass(frozen=True)
class Document:
  """A text that can be read again and again.

  Attributes:
    open: returns a fresh iterator of the text's pieces, in order.
    is_end: False if the text of a source's only document continues in the next
      part.
  """

  open: Callable[[], Iterator[str]]
  is_end: bool = True


@dataclasses.dataclass(frozen=True)
class Conversation(Document):
  """A conversation, whose pieces are what is said.

  Attributes:
    place: returns the file and the line, for messages.
    messages: dicts with 'role' and 'content'.
  """

  place: Callable[[], str] = str
  messages: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRows:
  """Consecutive rows of token ids.

  Attributes:
    name: the file or split, for messages.
    first_row: the number of the first row in it.
    sizes: [rows] ids in each row.
    ids: [sum(sizes)] int64.
  """

  name: str
  first_row: int
  sizes: np.ndarray
  ids: np.ndarray

  def place(self, i: int) -> str:
    """Returns which row holds the i-th id, for messages."""
    row = int(np.searchsorted(np.cumsum(self.sizes), i, 'right'))
    return f'row {self.first_row + row} of {self.name}'


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
  """A fixed sequence of documents, in parts. Instances can be pickled.

  Attributes:
    forms: the values of config.data.source that name this class.
    is_tokens: whether `read` yields TokenRows instead of documents.
    is_pairs: whether a document is a pair: exactly two pieces, the prompt and
      the response.
    is_chat: whether documents are `Conversation`s.
    num_alternatives: number of consecutive documents that belong together, as a
      chosen and a rejected response; they are split, dropped and read together.
    has_law: whether `law` is known.
    spec: the config.data.source it was made from.
  """

  forms: ClassVar[tuple[str, ...]] = ()
  is_tokens: ClassVar[bool] = False
  is_pairs: ClassVar[bool] = False
  is_chat: ClassVar[bool] = False
  num_alternatives: ClassVar[int] = 1
  has_law: ClassVar[bool] = False

  spec: str

  @classmethod
  @abc.abstractmethod
  def make(cls, spec: str, name: str, data_dir: str) -> 'Source':
    """Makes the source of config.data.source, `spec`.

    `name` is what follows the kind and its colon in it. `data_dir` is a folder
    that may hold datasets or downloads.

    Raises:
      InputError: it names nothing that exists.
    """

  @property
  def has_validation(self) -> bool:
    """Whether the source has a validation split of its own."""
    return False

  @property
  def law(self) -> Law | None:
    """The distribution of the documents, if it is known exactly."""
    return None

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Returns a hash that changes whenever the text may have changed."""

  @abc.abstractmethod
  def parts(self, split: str) -> Iterator[Part]:
    """Yields the parts of a split, always the same in the same order."""

  @abc.abstractmethod
  def read(self, part: Part) -> Iterator[Any]:
    """Yields the documents of a part, or TokenRows if `is_tokens`."""

  def error(self, text: str) -> InputError:
    """Returns an error about this source."""
    return InputError(f'data.source={self.spec!r}: {text}')


class SplitSource(Source):
  """A dataset with named splits.

  Its validation split, or else its test split, is the validation text. A
  dataset that has only a train split is divided like any other source.
  """

  @abc.abstractmethod
  def num_rows(self) -> Mapping[str, int]:
    """Returns the number of rows of each split."""

  @property
  def has_validation(self) -> bool:
    return bool({'validation', 'test'} & set(self.num_rows()))

  def parts(self, split: str) -> Iterator[Part]:
    num_rows = self.num_rows()
    is_validation = split == 'validation' and split not in num_rows
    own = 'test' if is_validation else split
    if own not in num_rows:
      raise self.error(f'its splits are {sorted(num_rows)}, without {own!r}')
    for start in range(0, num_rows[own], PART_ROWS):
      yield own, start, min(start + PART_ROWS, num_rows[own])


def documents(source: Source, split: str) -> Iterator[Document]:
  """Yields the documents of one split of a source, in order."""
  for part in source.parts(split):
    yield from source.read(part)


def document_of(text: str) -> Document:
  """Returns a document whose text is in memory."""
  return Document(
    lambda: cut_at_lines(
      text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)
    )
  )


def cut_at_lines(chunks: Iterable[str]) -> Iterator[str]:
  """Moves the borders between chunks to where no token crosses them."""
  rest = ''
  for chunk in chunks:
    text = rest + chunk
    # A text without the best place is cut after four chunks, to bound memory.
    is_long = len(text) > 4 * PIECE_CHARS
    end = find_cut(text) if is_long or _CUTS[0].match(text) else 0
    if end and len(text) >= PIECE_CHARS:
      yield text[:end]
      text = text[end:]
    rest = text
  if rest:
    yield rest


def find_cut(text: str) -> int:
  """Returns how many characters of a text are before the best place to cut."""
  cuts = (cut.end() for place in _CUTS if (cut := place.match(text)))
  return next(cuts, len(text))
