"""Tokenizers that may change a text before they cut it into pieces."""

import abc
from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from nanodlm.data.tokenizers import base
from nanodlm.types import InputError

# SentencePiece, and what imitates it, writes a space as this character.
SPACE_MARK = '\u2581'
# Code points that are not characters: neither texts nor vocabularies have them.
_CONTEXT, *_STAND_INS = map(chr, range(0xFDD0, 0xFDF0))
# A tokenizer that gives these back loses nothing: white space at the ends and
# in runs, capitals, characters that Unicode's normal forms replace, rare ones.
_PROBES = (
  ' a  B \t\r\n\n c\n',
  '\u2581x\u2581\u2581 \xa0y\u200b\u3000\x00',
  '\uff21\ufb01 e\u0301 \u212b \uf900 \u0130\xdf',
  '\U0001f600\u6f22\ue123\U0010fffd <unk> </s> ##a',
)


@dataclasses.dataclass(frozen=True, eq=False)
class NormalizingTokenizer(base.Tokenizer):
  """A tokenizer of a library that may change a text before it encodes it.

  It may replace characters, join white space, put a space before the text, or
  have no ids for some characters. U+2581 in a text is spelled by bytes if there
  are ids for them, and is otherwise read as a space.

  Attributes:
    byte_ids: the library's ids of the 256 bytes, by which it spells characters
      without a piece; empty if it has none.
    has_space: whether a piece spells a single space. Otherwise a byte does.
  """

  byte_ids: tuple[int, ...]
  has_space: bool

  @abc.abstractmethod
  def _run(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
    """Returns the library's ids of texts, [n] int32 each."""

  @abc.abstractmethod
  def _find_ends(self, text: str) -> np.ndarray:
    """Returns how many bytes of text precede the end of each id of `_run`."""

  def _own_ids(self, ids: np.ndarray) -> np.ndarray:
    """Returns our ids of the library's."""
    return ids

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text], 1)[0]

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = 0
  ) -> list[np.ndarray]:
    stand_ins = [self._stand_in(text) for text in texts]
    hidden = [text.replace(SPACE_MARK, x) for text, x in zip(texts, stand_ins)]
    rows = self._run(hidden, num_threads)
    return [self._restore(*row)[0] for row in zip(rows, stand_ins, strict=True)]

  def _stand_in(self, text: str) -> str:
    """Returns what U+2581 is replaced by while a text is encoded."""
    base.utf8(text)
    if not self.byte_ids or SPACE_MARK not in text:
      return SPACE_MARK
    return next((x for x in _STAND_INS if x not in text), SPACE_MARK)

  def _restore(
    self, ids: np.ndarray, stand_in: str
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns our ids, and their places among the library's."""
    places = np.arange(len(ids))
    if self.byte_ids and not self.has_space:
      # The library spells a space as the bytes of U+2581.
      for i in self._find(ids, SPACE_MARK)[::-1]:
        ids[i], places[i + 1 : i + 3] = self.byte_ids[ord(' ')], -1
    for i in self._find(ids, stand_in) if stand_in != SPACE_MARK else ():
      ids[i : i + 3] = [self.byte_ids[byte] for byte in SPACE_MARK.encode()]
    places = places[places >= 0]
    return self._own_ids(ids[places]), places

  def _find(self, ids: np.ndarray, character: str) -> np.ndarray:
    """Returns where the three bytes of a character begin."""
    first, second, third = (self.byte_ids[byte] for byte in character.encode())
    pairs = (ids[:-2] == first) & (ids[1:-1] == second)
    return np.flatnonzero(pairs & (ids[2:] == third))

  @functools.cached_property
  def is_lossless(self) -> bool:
    spell = lambda ids: b''.join(self.pieces[i] for i in ids)
    return all(spell(self.encode(text)) == text.encode() for text in _PROBES)

  @functools.cached_property
  def revision(self) -> int:
    has_no_space = bool(self.byte_ids) and not self.has_space
    return int(has_no_space or not self.is_lossless)

  @functools.cached_property
  def adds_space(self) -> bool:
    spelled = b''.join(self.pieces[i] for i in self.encode('a'))
    return spelled.startswith(b' ')

  @functools.cached_property
  def _context(self) -> str:
    """A text that precedes one that does not begin a document, if it helps."""
    ids = self.encode(f'{_CONTEXT}a')
    helps = self.adds_space and ids.size and self.pieces[ids[-1]] == b'a'
    return _CONTEXT if helps else ''

  def encode_rest(self, text: str) -> np.ndarray:
    context = self._context
    before, ids = self.encode_batch([context, context + text], 1)
    num = len(before)
    if num and not self.num_bytes[before[-1]]:
      # The library joins unknown characters, here those on both sides.
      num -= self._ends(context + text)[num - 1] > len(context.encode())
    ids = ids[num:]
    first = self.pieces[ids[0]] if ids.size else b''
    inside = first.removeprefix(b' ')
    if not context and first != inside in self.pieces and text[0].isalnum():
      # The piece of WordPiece that is spelled '##...'.
      ids[0] = self.pieces.index(inside)
    return ids

  def _ends(self, text: str) -> np.ndarray:
    stand_in = self._stand_in(text)
    hidden = text.replace(SPACE_MARK, stand_in)
    (ids,) = self._run([hidden], 1)
    return self._find_ends(hidden)[self._restore(ids, stand_in)[1]]

  def count_bytes(
    self, text: str, ids: np.ndarray, is_start: bool = True
  ) -> np.ndarray:
    sizes, num = self.num_bytes[ids], len(text.encode())
    if sizes.sum() == num:
      return sizes
    if self.is_lossless:
      raise InputError(
        f'tokenizer.name={self.name!r} gives back common texts, but makes '
        f'{sizes.sum():,} bytes of {num:,} of this one, {text[:40]!r}...; use '
        'another tokenizer'
      )
    if not ids.size:
      return sizes
    before = '' if is_start else self._context
    ends = self._ends(before + text)[-len(ids) :] - len(before.encode())
    ends[-1] = num
    ends = np.maximum.accumulate(np.clip(ends, 0, num))
    return np.diff(ends, prepend=0).astype(np.int32)
