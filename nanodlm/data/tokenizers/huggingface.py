"""The tokenizer.json of imported checkpoints."""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from nanodlm.data.tokenizers import chat
from nanodlm.data.tokenizers.normalizing import NormalizingTokenizer, SPACE_MARK
from nanodlm.types import InputError, reason

NAME = 'huggingface'
# The usual names of tokens, for files without a tokenizer_config.json.
_ENDS = ('<|endoftext|>', '<|end_of_text|>', '<|im_end|>', '</s>', '<eos>')
_MASKS = ('<|mdm_mask|>', '<|mask|>', '<|MASK|>', '[MASK]', '<mask>')


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer(NormalizingTokenizer):
  """A tokenizer.json of Hugging Face's `tokenizers`, with the mask moved last.

  Attributes:
    path: the file, as given.
    processor: tokenizers.Tokenizer.
    mask_place: the file's id of the mask. If that is not the last id of the
      checkpoint's vocabulary, the two are exchanged.
  """

  reads_path = True

  path: str
  processor: Any
  mask_place: int

  @classmethod
  def make(cls, name: str, path: str) -> 'HuggingFaceTokenizer':
    """Loads a published tokenizer.json, or the one in a folder.

    The tokens that end a text and mask, and the chat template, are those of the
    tokenizer_config.json next to it. A tokenizer without a mask gets one.
    """
    del name
    file = pathlib.Path(path)
    file = file / 'tokenizer.json' if file.is_dir() else file
    described = chat.read_described(file.parent)
    processor, _ = _open(str(file))
    known = processor.get_vocab(with_added_tokens=True)
    find = lambda key, usual: next(
      (x for x in (chat.token_text(described, key), *usual) if x in known), ''
    )
    end, mask = find('eos_token', _ENDS), find('mask_token', _MASKS)
    if not end:
      raise InputError(
        f'tokenizer.path={path!r} lacks a token that ends a text: eos_token of '
        f'tokenizer_config.json next to it, or one of {list(_ENDS)}'
      )
    size = max(known.values()) + 1 + (not mask)
    place = known[mask] if mask else size - 1
    ids = {size - 1: place, place: size - 1}
    separator_id = ids.get(known[end], known[end])
    tokenizer = load_hugging_face(str(file), size, place, separator_id)
    template = chat.read_template(file.parent)
    return dataclasses.replace(tokenizer, chat_template=template)

  @classmethod
  def from_json(
    cls, described: dict[str, Any], path: str
  ) -> 'HuggingFaceTokenizer':
    keys = ('vocab_size', 'mask_place', 'separator_id')
    return load_hugging_face(path, *(described[key] for key in keys))

  def _encode(self, texts: list[str]) -> list[Any]:
    # Encodes special tokens as ordinary text. (A pickled copy forgets it.)
    self.processor.encode_special_tokens = True
    return self.processor.encode_batch(texts, add_special_tokens=False)

  def _run(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
    # The library uses one thread for each core, except in batches of one.
    batches = [[text] for text in texts] if num_threads == 1 else [texts]
    encoded = [one for batch in batches for one in self._encode(batch)]
    return [np.array(one.ids, np.int32) for one in encoded]

  def _find_ends(self, text: str) -> np.ndarray:
    ends = [end for _, end in self._encode([text])[0].offsets]
    codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    sizes = np.sum([codes >= code for code in (0, 0x80, 0x800, 1 << 16)], 0)
    return np.append(0, np.cumsum(sizes))[ends]

  def _own_ids(self, ids: np.ndarray) -> np.ndarray:
    return np.where(ids == self.mask_id, self.mask_place, ids)

  @property
  def controls(self) -> dict[str, int]:
    tokens = self.processor.get_added_tokens_decoder()
    own = {
      token.content: int(self.swap_mask(np.array(i)))
      for i, token in tokens.items()
      if token.special
    }
    own = {text: i for text, i in own.items() if i != self.mask_id}
    return own if self.separator_id in own.values() else super().controls | own

  def swap_mask(self, ids: np.ndarray) -> np.ndarray:
    swapped = np.where(ids == self.mask_place, self.mask_id, ids)
    return np.where(ids == self.mask_id, self.mask_place, swapped)

  def to_json(self) -> dict[str, Any]:
    own = dict(path=self.path, mask_place=self.mask_place)
    return super().to_json() | own


def load_hugging_face(
  path: str, vocab_size: int, mask_place: int, separator_id: int
) -> HuggingFaceTokenizer:
  """Loads a tokenizer.json of Hugging Face's `tokenizers`.

  Args:
    path: the file.
    vocab_size: ids of the network, including the mask; the file may have fewer.
    mask_place: the file's id of the mask, or vocab_size - 1 if it has none.
    separator_id: the id, after the exchange, of the token that ends a document.

  Raises:
    InputError: it is not such a file, or has more ids than the network.
  """
  places = {mask_place: vocab_size - 1, vocab_size - 1: mask_place}
  end_place = places.get(separator_id, separator_id)
  processor, content = _open(path, (mask_place, end_place))
  known = processor.get_vocab(with_added_tokens=True)
  if (last := max(known.values(), default=0)) >= vocab_size:
    raise InputError(
      f'{path} has ids up to {last}, but the network has only {vocab_size}'
    )
  described = json.loads(content)
  piece_bytes = _piece_reader(described, processor)
  pieces = [b''] * vocab_size
  for text, i in known.items():
    pieces[i] = piece_bytes(text, i)
  # The mask and the last id are exchanged, and the mask spells nothing.
  pieces[mask_place] = pieces[-1]
  byte_ids = [known.get(f'<0x{byte:02X}>') for byte in range(256)]
  has_bytes = described['model'].get('byte_fallback') and None not in byte_ids
  digest = hashlib.sha256(content)
  digest.update(f'{vocab_size} {mask_place} {separator_id}'.encode())
  return HuggingFaceTokenizer(
    name=NAME,
    pieces=tuple(pieces[:-1]),
    separator_id=separator_id,
    fingerprint=f'{NAME}-{digest.hexdigest()[:16]}',
    byte_ids=tuple(i for i in byte_ids if i is not None) if has_bytes else (),
    has_space=SPACE_MARK in known,
    path=path,
    processor=processor,
    mask_place=mask_place,
  )


def _open(path: str, controls: Sequence[int] = ()) -> tuple[Any, bytes]:
  """Returns the tokenizers.Tokenizer of a file, and its content.

  The ids of `controls` are special, whatever the file says: they spell nothing.
  """
  if importlib.util.find_spec('tokenizers') is None:
    raise InputError(
      f"{path} needs the tokenizers package: pip install -e '.[hub]'"
    )
  import tokenizers

  try:
    content = pathlib.Path(path).read_bytes()
    described = json.loads(content)
    added = described.get('added_tokens') or []
    known = {token['id'] for token in added}
    for token in added:
      token['special'] |= token['id'] in controls
    load = lambda: tokenizers.Tokenizer.from_buffer(
      json.dumps(described).encode()
    )
    processor = load()
    others = {i: processor.id_to_token(i) for i in {*controls} - known}
    if any(others.values()):  # Only the vocabulary of the model has them.
      flags = ('single_word', 'lstrip', 'rstrip', 'normalized')
      added += [
        {'id': i, 'content': text, 'special': True}
        | dict.fromkeys(flags, False)
        for i, text in others.items()
        if text
      ]
      described['added_tokens'] = sorted(added, key=lambda token: token['id'])
      processor = load()
  except OSError as error:
    raise InputError(f'{path} cannot be read ({reason(error)})') from error
  except Exception as error:  # The library raises no narrower class.
    raise InputError(
      f'{path} is not a tokenizer.json: {reason(error)}'
    ) from error
  processor.no_truncation()
  processor.no_padding()
  return processor, content


def byte_alphabet() -> dict[str, int]:
  """Returns {character: byte}: how byte-level tokenizers (GPT-2) spell pieces.

  A printable character is its own byte; the other bytes are U+0100 and on.
  """
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  codes = [*plain, *range(256, 256 + len(others))]
  return dict(zip(map(chr, codes), [*plain, *others]))


def _piece_reader(
  content: dict[str, Any], processor: Any
) -> Callable[[str, int], bytes]:
  """Returns the function (piece, id) -> UTF-8 bytes for the file's decoder."""
  added = processor.get_added_tokens_decoder()
  kinds = json.dumps(content.get('decoder') or {})
  alphabet = byte_alphabet()

  def read(text: str, i: int) -> bytes:
    if i in added:
      return b'' if added[i].special else text.encode()
    if 'ByteLevel' in kinds and all(c in alphabet for c in text):
      return bytes(alphabet[c] for c in text)
    if 'ByteFallback' in kinds and len(text) == 6 and text.startswith('<0x'):
      return bytes([int(text[3:5], 16)])
    if 'WordPiece' in kinds:
      return text[2:].encode() if text.startswith('##') else f' {text}'.encode()
    return text.replace(SPACE_MARK, ' ').encode()

  return read
