"""The interface of a tokenizer: text to token ids and back."""

import abc
import collections
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import logging
import re
from typing import Any, ClassVar

import numpy as np

from nanodlm.types import InputError

_log = logging.getLogger('nanodlm')

# How decode() prints the token that ends a document.
SEPARATOR_TEXT = '\n\n'
# Characters that move the cursor of a terminal, or reorder text.
_CONTROLS = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')
Ids = Sequence[int] | np.ndarray


def count_lost(text: str, decoded: str) -> int:
  """Counts the UTF-8 bytes of the characters that a decoded text lacks."""
  lost = collections.Counter(text) - collections.Counter(decoded)
  return len(''.join(lost.elements()).encode())


def warn_of_loss(name: str, num_lost: int, num_bytes: int) -> None:
  """Logs that num_lost of num_bytes of text are lost, if any are.

  `name` is the setting that names the tokenizer, with its value.
  """
  if num_lost:
    _log.warning(
      f'{name} loses {num_lost / num_bytes:.2%} of the text, {num_lost:,} of '
      f'{num_bytes:,} bytes: it replaces or drops characters. Bits per byte '
      'are those of what it keeps, divided by the bytes of the whole text'
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(abc.ABC):
  """Text to ids and back. Instances can be pickled.

  The mask is always the last id. A tokenizer without a separator of its own
  gets one, the id before the mask.

  Attributes:
    reads_path: whether it reads config.tokenizer.path.
    min_trained_size: the smallest vocab_size that `train` accepts; 0 if such a
      tokenizer cannot be trained.
    is_lossless: whether the pieces of any text's ids are its bytes.
    adds_space: whether encode() puts a space before a text, which decode()
      leaves out.
    revision: increased if the ids or bytes of a text change; in the name of
      prepared data.
    name: config.tokenizer.name.
    pieces: the UTF-8 bytes of ids 0, 1, ...; empty for control tokens.
    separator_id: the token that ends a document.
    fingerprint: a hash of everything that determines the ids; two tokenizers
      with the same fingerprint are interchangeable.
    eos_ids: the tokens that end a text; by default the separator alone.
    chat_template: the Jinja template of conversations; see `chat`.
    start_id: the control token that the network itself reads before a text, so
      that a conversation does not begin with it a second time; -1 for none. A
      run that starts from another one keeps it.
  """

  reads_path: ClassVar[bool] = False
  min_trained_size: ClassVar[int] = 0
  # Constants of a class, or properties of what was loaded.
  is_lossless = True
  adds_space = False
  revision = 0

  name: str
  pieces: tuple[bytes, ...]
  separator_id: int
  fingerprint: str
  eos_ids: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)
  chat_template: str = dataclasses.field(default='', kw_only=True)
  start_id: int = dataclasses.field(default=-1, kw_only=True)

  def __post_init__(self):
    if not self.eos_ids:
      object.__setattr__(self, 'eos_ids', (self.separator_id,))

  @classmethod
  @abc.abstractmethod
  def make(cls, name: str, path: str) -> 'Tokenizer':
    """Makes the tokenizer of config.tokenizer.name and .path.

    Raises:
      InputError: it does not exist, or its files are missing or damaged.
    """

  @classmethod
  def from_json(cls, described: dict[str, Any], path: str) -> 'Tokenizer':
    """Makes the tokenizer again from its to_json() and a copy of its file."""
    return cls.make(described['name'], path)

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int, path: str) -> None:
    """Trains a model on texts, read once and in order, and writes it."""
    raise NotImplementedError(f'{cls.__name__} cannot be trained')

  @property
  def vocab_size(self) -> int:
    """The number of ids, including the mask."""
    return max(len(self.pieces), self.separator_id + 1) + 1

  @property
  def mask_id(self) -> int:
    """The id of the mask, vocab_size - 1."""
    return self.vocab_size - 1

  @property
  def controls(self) -> dict[str, int]:
    """The control tokens that a chat template can write, and their ids."""
    return {'<|endoftext|>': self.separator_id}

  @functools.cached_property
  def num_bytes(self) -> np.ndarray:
    """UTF-8 bytes of text of each id, [vocab_size] int32."""
    sizes = np.zeros([self.vocab_size], np.int32)
    sizes[: len(self.pieces)] = [len(piece) for piece in self.pieces]
    sizes.setflags(write=False)
    return sizes

  @functools.cached_property
  def joins_spaces(self) -> bool:
    """Whether a word and the space before it can be one token."""
    return any(piece[:1] == b' ' and piece.strip() for piece in self.pieces)

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, [n] int32, without a separator."""

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = 0
  ) -> list[np.ndarray]:
    """Returns encode() of every text.

    Tokenizers that encode without Python's lock use `num_threads` threads; 0 is
    one for each core.
    """
    del num_threads
    return [self.encode(text) for text in texts]

  def encode_to_score(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns encode() of texts, and warns if it loses some of their bytes."""
    rows = self.encode_batch(texts)
    num_lost = sum(map(self.lost_bytes, texts, rows))
    num_bytes = sum(len(text.encode()) for text in texts)
    warn_of_loss(f'tokenizer.name={self.name!r}', num_lost, num_bytes)
    return rows

  def encode_rest(self, text: str) -> np.ndarray:
    """Returns the ids of a text that continues another one, [n] int32.

    Unlike encode() it does not put a space before the text.
    """
    return self.encode(text)

  def count_bytes(
    self, text: str, ids: np.ndarray, is_start: bool = True
  ) -> np.ndarray:
    """Counts the UTF-8 bytes of a text that each of its ids [n] stands for.

    They add up to those of the text, also if the tokenizer changes it.

    `ids` are those of encode(text) if the text begins a document, `is_start`,
    and otherwise of encode_rest(text).
    """
    del text, is_start
    return self.num_bytes[ids]

  def lost_bytes(
    self, text: str, ids: np.ndarray, is_start: bool = True
  ) -> int:
    """Counts the UTF-8 bytes of the characters that decode(ids) lacks.

    See `count_bytes` for the arguments.
    """
    if self.is_lossless:
      return 0
    return count_lost(text, self.decode(ids, is_start=is_start))

  def decode(
    self, tokens: Ids, mask_text: str = '_', is_start: bool = True
  ) -> str:
    """Returns the text of ids [n]; invalid UTF-8 becomes U+FFFD.

    A mask is printed as `mask_text`, and a separator as an empty line. Ids that
    continue others need is_start=False to keep a space before them.
    """
    pieces = self._pieces_of(tokens, mask_text, SEPARATOR_TEXT, is_start)
    return b''.join(pieces).decode('utf-8', errors='replace')

  def text_bytes(self, tokens: Ids) -> int:
    """Returns the bytes of ids [n], without masks and separators."""
    return sum(map(len, self._pieces_of(tokens, '', '', is_start=True)))

  def spell(
    self, tokens: Ids, mask_text: str = '_', is_start: bool = True
  ) -> list[str]:
    """Returns the part of the text that each of the ids [n] accounts for.

    A character that several ids spell belongs to the first one, and the others
    get ''. The parts joined are the text of `decode`.
    """
    pieces = self._pieces_of(tokens, mask_text, SEPARATOR_TEXT, is_start)
    owners = [i for i, piece in enumerate(pieces) for _ in piece]
    texts, encoded, place = [''] * len(pieces), b''.join(pieces), 0
    while place < len(encoded):
      try:
        valid, num_invalid = encoded[place:].decode(), 0
      except UnicodeDecodeError as error:
        valid = encoded[place : place + error.start].decode()
        num_invalid = error.end - error.start
      for character in valid:
        texts[owners[place]] += character
        place += len(character.encode())
      if num_invalid:
        texts[owners[place]] += '\ufffd'
        place += num_invalid
    return texts

  def _pieces_of(
    self, tokens: Ids, mask_text: str, separator_text: str, is_start: bool
  ) -> list[bytes]:
    special = {
      self.mask_id: mask_text.encode(),
      self.separator_id: separator_text.encode(),
    }
    ids = np.asarray(tokens).reshape(-1).tolist()
    pieces = [special[i] if i in special else self.pieces[i] for i in ids]
    if self.adds_space:
      before = [self.separator_id if is_start else self.mask_id, *ids]
      for i, piece in enumerate(pieces):
        if before[i] == self.separator_id and ids[i] not in special:
          pieces[i] = piece.removeprefix(b' ')
    return pieces

  def piece(self, token: int) -> bytes:
    """Returns the UTF-8 bytes of an id, none of a control token."""
    return self.pieces[token] if token < len(self.pieces) else b''

  def swap_mask(self, ids: np.ndarray) -> np.ndarray:
    """Converts ids to those of the published tokenizer, or back.

    They differ if its mask is not the last id: the two are exchanged.
    """
    return ids

  def to_json(self) -> dict[str, Any]:
    """Returns what identifies this tokenizer, as plain JSON values.

    If it has a 'path', that file is saved and passed to from_json().
    """
    return {
      'name': self.name,
      'vocab_size': self.vocab_size,
      'mask_id': self.mask_id,
      'separator_id': self.separator_id,
      'fingerprint': self.fingerprint,
      'eos_ids': list(self.eos_ids),
      **({'chat_template': self.chat_template} if self.chat_template else {}),
      **({'start_id': self.start_id} if self.start_id >= 0 else {}),
    }


def escape_controls(text: str) -> str:
  """Returns a text that can be printed; newlines and tabs stay."""
  return _CONTROLS.sub(lambda match: f'‹U+{ord(match.group()):04X}›', text)


def utf8(text: str, what: str = 'the text') -> bytes:
  """Returns the UTF-8 bytes of `text`, which errors call `what`.

  Raises:
    InputError: the text holds half of a surrogate pair.
  """
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f'{what} holds {text[error.start]!r} at character {error.start}, '
      'half of a surrogate pair; write it as one character'
    ) from error
