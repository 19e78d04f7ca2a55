"""Tokenizers: text to token ids and back, behind one protocol.

Four families: UTF-8 bytes (nothing to download), SentencePiece models, the
encodings that tiktoken ships, and the tokenizer.json of imported checkpoints. Every
one of them has the same two things: a separator that ends a document, and the mask,
which is always the last id. Text
is only ever text: '<|endoftext|>' or '</s>' written in a user's file is encoded
as ordinary characters and can never become a control token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import socket
import tempfile
from typing import Any, Protocol
import urllib.parse
import urllib.request

import numpy as np

from nanodlm.types import InputError

# What decode() prints for the token that ends a document.
SEPARATOR_TEXT = '\n\n'
# SentencePiece writes a space as this character.
_SPACE_MARK = '\u2581'
# SentencePiece silently skips training sentences longer than its limit, so the
# training text is cut into pieces of at most this many UTF-8 bytes.
_MAX_SENTENCE_BYTES = 4096
# Training sees a random million of those pieces (drawn by SentencePiece with a
# fixed seed): more costs gigabytes of memory and changes the pieces very little.
_MAX_SENTENCES = 1_000_000


# The tokenizer.name of another run's tokenizer, whose workdir is tokenizer.path.
RUN = 'run'
# The name inside such a workdir of a tokenizer.json of Hugging Face's.
HUGGING_FACE = 'huggingface'

# What `save` writes into a folder.
SAVED, SAVED_MODEL = 'tokenizer.json', 'tokenizer.model'


class Tokenizer(Protocol):
  """Text to ids and back.

  Attributes:
    name: what config.tokenizer.name said.
    vocab_size: number of ids, mask included.
    mask_id: always vocab_size - 1.
    separator_id: the token that ends a document.
    fingerprint: a hash of everything that determines the ids; two tokenizers
      with the same fingerprint are interchangeable.
    num_bytes: [vocab_size] int32, UTF-8 bytes of text that each id stands for;
      0 for the separator and the mask.
    pieces: the UTF-8 bytes that ids 0, 1, ... stand for; a separator or mask
      that is not the underlying tokenizer's own lies behind them.
  """

  name: str
  vocab_size: int
  mask_id: int
  separator_id: int
  fingerprint: str
  num_bytes: np.ndarray
  pieces: tuple[bytes, ...]

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, [n] int32; no separator is added."""

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = 0
  ) -> list[np.ndarray]:
    """Returns encode() of every text, with so many threads where it can.

    Args:
      texts: what to encode.
      num_threads: 0 is one for each core.
    """

  def decode(
    self, tokens: Sequence[int] | np.ndarray, mask_text: str = '_'
  ) -> str:
    """Returns the text of ids [n]; broken UTF-8 becomes U+FFFD.

    Args:
      tokens: [n] ids in [0, vocab_size).
      mask_text: what a masked position is printed as.

    Returns:
      The text. A separator is printed as an empty line.
    """

  def spell(
    self, tokens: Sequence[int] | np.ndarray, mask_text: str = '_'
  ) -> list[str]:
    """Returns the part of the text that each of the ids [n] stands for.

    A character that several ids spell is the first one's, and '' the others'; a
    byte that is no part of a character is U+FFFD.
    """

  def to_json(self) -> dict[str, Any]:
    """Returns what identifies this tokenizer, as plain JSON values."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
  """What the families share: a table of the bytes behind each id.

  Attributes:
    name: what config.tokenizer.name said.
    pieces: the UTF-8 bytes of each id of the underlying tokenizer; empty for
      its control tokens.
    separator_id: the token that ends a document.
    fingerprint: a hash of everything that determines the ids.
  """

  name: str
  pieces: tuple[bytes, ...]
  separator_id: int
  fingerprint: str

  @property
  def vocab_size(self) -> int:
    # A tokenizer without a separator of its own gets one before the mask.
    return max(len(self.pieces), self.separator_id + 1) + 1

  @property
  def mask_id(self) -> int:
    return self.vocab_size - 1

  @functools.cached_property
  def num_bytes(self) -> np.ndarray:
    sizes = np.zeros([self.vocab_size], np.int32)
    sizes[: len(self.pieces)] = [len(piece) for piece in self.pieces]
    sizes.setflags(write=False)
    return sizes

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = 0
  ) -> list[np.ndarray]:
    del num_threads  # for tokenizers that encode outside Python's lock
    return [self.encode(text) for text in texts]

  def decode(
    self, tokens: Sequence[int] | np.ndarray, mask_text: str = '_'
  ) -> str:
    special = {
      self.mask_id: mask_text.encode(),
      self.separator_id: SEPARATOR_TEXT.encode(),
    }
    ids = np.asarray(tokens).reshape(-1).tolist()
    text = b''.join(special[i] if i in special else self.pieces[i] for i in ids)
    return text.decode('utf-8', errors='replace')

  def spell(
    self, tokens: Sequence[int] | np.ndarray, mask_text: str = '_'
  ) -> list[str]:
    special = {
      self.mask_id: mask_text.encode(),
      self.separator_id: SEPARATOR_TEXT.encode(),
    }
    ids = np.asarray(tokens).reshape(-1).tolist()
    pieces = [special[i] if i in special else self.pieces[i] for i in ids]
    owners = [i for i, piece in enumerate(pieces) for _ in piece]
    texts, place = [''] * len(ids), 0
    # A broken byte becomes a lone surrogate: one character, one byte.
    for character in b''.join(pieces).decode('utf-8', 'surrogateescape'):
      is_broken = '\udc80' <= character <= '\udcff'
      texts[owners[place]] += '\ufffd' if is_broken else character
      place += 1 if is_broken else len(character.encode())
    return texts

  def to_json(self) -> dict[str, Any]:
    return {
      'name': self.name,
      'vocab_size': self.vocab_size,
      'mask_id': self.mask_id,
      'separator_id': self.separator_id,
      'fingerprint': self.fingerprint,
    }


@dataclasses.dataclass(frozen=True, eq=False)
class BytesTokenizer(_Table):
  """UTF-8 bytes: ids 0..255, then the separator 256 and the mask 257."""

  name: str = 'bytes'
  pieces: tuple[bytes, ...] = tuple(bytes([i]) for i in range(256))
  separator_id: int = 256
  fingerprint: str = 'bytes'

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePieceTokenizer(_Table):
  """A SentencePiece model.

  The separator is the model's own end-of-sentence piece, or an extra id where
  it has none. A model trained by `train_sentencepiece` is lossless; any other
  one may normalise the text, and an unknown piece stands for 0 bytes.

  Attributes:
    path: the .model file, as given.
    processor: sentencepiece.SentencePieceProcessor.
    space_mark_ids: ids that spell U+2581, which SentencePiece would otherwise
      read as a space; empty where the model has no byte pieces.
  """

  path: str
  processor: Any
  space_mark_ids: tuple[int, ...]

  def encode(self, text: str) -> np.ndarray:
    _utf8(text)
    parts = text.split(_SPACE_MARK) if self.space_mark_ids else [text]
    ids = list(self.processor.encode(parts[0]))
    for part in parts[1:]:
      ids.extend(self.space_mark_ids)
      ids.extend(self.processor.encode(part))
    return np.array(ids, np.int32)

  def to_json(self) -> dict[str, Any]:
    return {**super().to_json(), 'path': self.path}


@dataclasses.dataclass(frozen=True, eq=False)
class TiktokenTokenizer(_Table):
  """An encoding of tiktoken; the separator is its <|endoftext|>.

  Attributes:
    encoding: tiktoken.Encoding.
  """

  encoding: Any

  def encode(self, text: str) -> np.ndarray:
    _utf8(text)
    # Unlike encode_ordinary, it builds no Python list. Without special tokens
    # allowed or forbidden, all text is ordinary.
    return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(
      np.int32
    )

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = 0
  ) -> list[np.ndarray]:
    num_threads = min(len(texts), num_threads or os.cpu_count() or 1)
    if num_threads <= 1:
      return [self.encode(text) for text in texts]
    with futures.ThreadPoolExecutor(num_threads) as pool:
      return list(pool.map(self.encode, texts))


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer(_Table):
  """The tokenizer.json of an imported checkpoint, with the mask moved to the end.

  Attributes:
    path: the file, as given.
    processor: tokenizers.Tokenizer.
    mask_place: the file's id of the mask; where that is not the last id of the
      checkpoint's vocabulary, the two change places.
  """

  path: str
  processor: Any
  mask_place: int

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text], 1)[0]

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = 0
  ) -> list[np.ndarray]:
    for text in texts:
      _utf8(text)
    # Text is only ever text. (A pickled copy forgets it.)
    self.processor.encode_special_tokens = True
    if num_threads == 1:  # the library has one thread, or one for each core
      encoded = [
        self.processor.encode(text, add_special_tokens=False) for text in texts
      ]
    else:
      encoded = self.processor.encode_batch(
        list(texts), add_special_tokens=False
      )
    ids = [np.array(one.ids, np.int32) for one in encoded]
    return [np.where(row == self.mask_id, self.mask_place, row) for row in ids]

  def to_json(self) -> dict[str, Any]:
    return {
      **super().to_json(),
      'path': self.path,
      'mask_place': self.mask_place,
    }


def make_tokenizer(config: Any) -> Tokenizer:
  """Makes the tokenizer that config.tokenizer describes.

  Args:
    config: has `name` ('bytes', 'sentencepiece', a tiktoken encoding or 'run') and
      `path` (the .model file of 'sentencepiece', the workdir of 'run', else
      ignored). Its vocab_size matters only to train_sentencepiece.

  Returns:
    A Tokenizer.

  Raises:
    InputError: the name is unknown, the model file is missing or not a
      SentencePiece model, or tiktoken's files are neither cached nor reachable.
  """
  if config.name == 'bytes':
    return BytesTokenizer()
  if config.name == 'sentencepiece':
    return load_sentencepiece(config.path)
  if config.name == RUN:
    return load(config.path)
  return _load_tiktoken(config.name)


def save(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
  """Writes what `load` needs into a folder: a JSON file, and a model if any."""
  folder = pathlib.Path(folder)
  described = tokenizer.to_json()
  if path := described.pop('path', ''):
    # A copy, so that the folder is enough even when the original is gone.
    shutil.copyfile(path, folder / SAVED_MODEL)
  (folder / SAVED).write_text(json.dumps(described, indent=2) + '\n')


def load(folder: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer that `save` wrote.

  Raises:
    InputError: there is none, or it no longer makes the ids it made then.
  """
  folder = pathlib.Path(folder)
  try:
    described = json.loads((folder / SAVED).read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{folder / SAVED} cannot be read: {error}') from error
  try:
    return from_json(described, str(folder / SAVED_MODEL), str(folder / SAVED))
  except (KeyError, TypeError) as error:
    raise InputError(
      f'{folder / SAVED} is not what a tokenizer was saved as: {error!r}'
    ) from error


def from_json(
  described: dict[str, Any], model_path: str, where: str
) -> Tokenizer:
  """The tokenizer of a `to_json`.

  Args:
    described: from `Tokenizer.to_json`.
    model_path: its file, where it has one.
    where: for messages.

  Raises:
    InputError: it no longer makes the ids it made then.
  """
  if described['name'] == 'sentencepiece':
    tokenizer = load_sentencepiece(model_path)
  elif described['name'] == 'bytes':
    tokenizer = BytesTokenizer()
  elif described['name'] == HUGGING_FACE:
    tokenizer = load_hugging_face(
      model_path,
      described['vocab_size'],
      described['mask_place'],
      described['separator_id'],
    )
  else:
    tokenizer = _load_tiktoken(described['name'])
    spare = described['vocab_size'] - tokenizer.vocab_size
    if spare > 0:
      tokenizer = with_spare_ids(tokenizer, spare)
  if tokenizer.fingerprint != described['fingerprint']:
    raise InputError(
      f'{where}: the {described["name"]} tokenizer found here makes '
      'other ids than the one it was saved from'
    )
  return tokenizer


def with_spare_ids(tokenizer: Tokenizer, num: int) -> Tokenizer:
  """A tiktoken tokenizer with `num` more ids before the mask, of no text."""
  return dataclasses.replace(
    tokenizer,
    pieces=tokenizer.pieces + (b'',) * num,
    fingerprint=f'{tokenizer.fingerprint}+{num}',
  )


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int, model_path: str | os.PathLike[str]
) -> None:
  """Trains a lossless SentencePiece BPE model and writes it.

  No normalisation, no squeezed white space, no dummy prefix, byte pieces for
  every character that has no piece, and no control tokens: what is encoded
  decodes to the same string. Deterministic for the same texts.

  Args:
    texts: the training text; read once, in order.
    vocab_size: number of pieces, of which 256 are bytes and one is unknown.
    model_path: the .model file to write.

  Raises:
    InputError: vocab_size is too small or too large for the text.
  """
  import sentencepiece  # pylint: disable=g-import-not-at-top

  if vocab_size < 257:
    raise InputError(
      f'tokenizer.vocab_size={vocab_size} is too small to train a '
      'SentencePiece model: 257 pieces are the bytes and the unknown piece, '
      'and every character of the text needs one; a usual value is 8192'
    )
  sentencepiece.set_random_generator_seed(0)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sentences(texts),
      model_writer=model,
      vocab_size=vocab_size,
      model_type='bpe',
      normalization_rule_name='identity',
      byte_fallback=True,
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      # Rare characters are spelled as bytes instead of growing the table.
      character_coverage=0.9995,
      unk_id=0,
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      max_sentence_length=2 * _MAX_SENTENCE_BYTES,
      input_sentence_size=_MAX_SENTENCES,
      shuffle_input_sentence=True,
      minloglevel=2,
    )
  except RuntimeError as error:
    if 'KeyboardInterrupt' in str(error):  # the library's wrapping of Ctrl-C
      raise KeyboardInterrupt from error
    # The library's message ends with the largest (or smallest) value it takes.
    raise InputError(
      f'tokenizer.vocab_size={vocab_size} does not suit this text: '
      f'{str(error).rsplit("] ", maxsplit=1)[-1]}'
    ) from error
  pathlib.Path(model_path).write_bytes(model.getvalue())


def is_reachable(url: str, timeout_secs: float = 3.0) -> bool:
  """Whether a TCP connection towards `url` opens, through the proxy if any."""
  # Libraries that download retry for minutes without a network, so it is asked
  # here first, once, with a short limit.
  target = urllib.parse.urlsplit(url)
  proxy = urllib.request.getproxies().get(target.scheme)
  if proxy and not urllib.request.proxy_bypass(target.hostname or ''):
    target = urllib.parse.urlsplit(proxy if '://' in proxy else f'//{proxy}')
  port = target.port or {'http': 80, 'https': 443}[target.scheme or 'http']
  try:
    with socket.create_connection((target.hostname, port), timeout_secs):
      return True
  except OSError:
    return False


def _utf8(text: str) -> bytes:
  """The UTF-8 bytes of `text`, or an InputError where it has none."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f'the text holds {text[error.start]!r} at character {error.start}, '
      'half of a surrogate pair, which no UTF-8 text can hold'
    ) from error


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Cuts texts into lines of at most _MAX_SENTENCE_BYTES UTF-8 bytes."""
  step = _MAX_SENTENCE_BYTES // 4  # a character has at most 4 bytes
  for text in texts:
    for line in text.splitlines():
      # Ids 1..256 spell what is left out here: newlines, NUL and U+2581.
      line = line.replace('\0', ' ').replace(_SPACE_MARK, ' ')
      for start in range(0, len(line), step):
        yield line[start : start + step]


def load_sentencepiece(path: str) -> SentencePieceTokenizer:
  """Loads a .model file; InputError where it is not one."""
  import sentencepiece  # pylint: disable=g-import-not-at-top

  if not path:
    raise InputError(
      "tokenizer.path='' names no SentencePiece model; give a .model file "
      '(left empty, one is trained while the data is prepared)'
    )
  try:
    with open(path, 'rb') as file:
      model = file.read()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  except OSError as error:
    raise InputError(
      f'tokenizer.path={path!r} cannot be read ({error.strerror}); give a '
      'SentencePiece .model file'
    ) from error
  except RuntimeError as error:
    raise InputError(
      f'tokenizer.path={path!r} is not a SentencePiece model; give the .model '
      'file that SentencePiece wrote'
    ) from error
  num_pieces = processor.vocab_size()
  if not num_pieces:  # an empty file parses as a model without pieces
    raise InputError(
      f'tokenizer.path={path!r} is a SentencePiece model '
      'without pieces; give a trained one'
    )

  def piece_bytes(i: int) -> bytes:
    if processor.is_byte(i):  # spelled '<0x0A>'
      return bytes([int(processor.id_to_piece(i)[1:-1], 16)])
    if processor.is_control(i) or processor.is_unknown(i):
      return b''
    return processor.id_to_piece(i).replace(_SPACE_MARK, ' ').encode()

  byte_ids = {
    piece_bytes(i): i for i in range(num_pieces) if processor.is_byte(i)
  }
  eos_id = processor.eos_id()
  return SentencePieceTokenizer(
    name='sentencepiece',
    pieces=tuple(piece_bytes(i) for i in range(num_pieces)),
    separator_id=eos_id if eos_id >= 0 else num_pieces,
    fingerprint='sentencepiece-' + hashlib.sha256(model).hexdigest()[:16],
    path=path,
    processor=processor,
    space_mark_ids=tuple(byte_ids[bytes([b])] for b in _SPACE_MARK.encode())
    if byte_ids
    else (),
  )


def load_hugging_face(
  path: str, vocab_size: int, mask_place: int, separator_id: int
) -> HuggingFaceTokenizer:
  """Loads a tokenizer.json of Hugging Face's `tokenizers`.

  Args:
    path: the file.
    vocab_size: ids of the network, the mask among them; the file may have fewer.
    mask_place: the file's id of the mask, vocab_size - 1 where it has none.
    separator_id: OUR id of the token that ends a document.

  Raises:
    InputError: it is no such file, or has more ids than the network.
  """
  if importlib.util.find_spec('tokenizers') is None:
    raise InputError(
      f"{path} needs the tokenizers package: pip install -e '.[hub]'"
    )
  import tokenizers  # pylint: disable=g-import-not-at-top

  try:
    content = pathlib.Path(path).read_bytes()
    processor = tokenizers.Tokenizer.from_buffer(content)
  except OSError as error:
    raise InputError(f'{path} cannot be read ({error.strerror})') from error
  except Exception as error:  # pylint: disable=broad-exception-caught
    # (The library raises no narrower one.)
    raise InputError(f'{path} is not a tokenizer.json: {error}') from error
  processor.no_truncation()
  processor.no_padding()
  known = processor.get_vocab(with_added_tokens=True)
  if known and max(known.values()) >= vocab_size:
    raise InputError(
      f'{path} is of another vocabulary: it has ids up to '
      f'{max(known.values())}, the network {vocab_size} of them'
    )
  piece_bytes = _piece_reader(json.loads(content), processor)
  pieces = [b''] * vocab_size
  for text, i in known.items():
    pieces[i] = piece_bytes(text, i)
  # The mask and the last id change places, and the last one is no piece.
  pieces[mask_place] = pieces[-1]
  digest = hashlib.sha256(content)
  digest.update(f'{vocab_size} {mask_place} {separator_id}'.encode())
  return HuggingFaceTokenizer(
    name=HUGGING_FACE,
    pieces=tuple(pieces[:-1]),
    separator_id=separator_id,
    fingerprint=f'{HUGGING_FACE}-{digest.hexdigest()[:16]}',
    path=path,
    processor=processor,
    mask_place=mask_place,
  )


def byte_alphabet() -> dict[str, int]:
  """{character: byte} by which byte-level tokenizers spell their pieces (GPT-2).

  Printable characters are their own byte's; the other bytes follow from 256 on.
  """
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  return {chr(byte): byte for byte in plain} | {
    chr(256 + i): byte for i, byte in enumerate(others)
  }


def _piece_reader(
  content: dict[str, Any], processor: Any
) -> Callable[[str, int], bytes]:
  """(piece, id) -> its UTF-8 bytes, by the kind of decoder in the file."""
  added = processor.get_added_tokens_decoder()
  kinds = json.dumps(content.get('decoder') or {})
  alphabet = byte_alphabet()

  def read(text, i):
    if i in added:
      return b'' if added[i].special else text.encode()
    if 'ByteLevel' in kinds and all(c in alphabet for c in text):
      return bytes(alphabet[c] for c in text)
    if 'ByteFallback' in kinds and len(text) == 6 and text.startswith('<0x'):
      return bytes([int(text[3:5], 16)])
    if 'WordPiece' in kinds:
      return text[2:].encode() if text.startswith('##') else f' {text}'.encode()
    return text.replace(_SPACE_MARK, ' ').encode()

  return read


def _load_tiktoken(name: str) -> TiktokenTokenizer:
  import tiktoken  # pylint: disable=g-import-not-at-top

  allowed = ['bytes', 'sentencepiece', RUN, *tiktoken.list_encoding_names()]
  if name not in allowed:
    raise InputError(f'tokenizer.name={name!r} is not one of {allowed}')
  encoding = _offline_safe(tiktoken.get_encoding, name)

  def piece_bytes(i: int) -> bytes:
    try:
      return encoding.decode_single_token_bytes(i)
    except KeyError:  # o200k_base and others leave gaps among their ids
      return b''

  control = {
    encoding.encode_single_token(text) for text in encoding.special_tokens_set
  }
  pieces = tuple(
    b'' if i in control else piece_bytes(i) for i in range(encoding.n_vocab)
  )
  digest = hashlib.sha256(f'{name} {encoding.eot_token}'.encode())
  for piece in pieces:
    digest.update(len(piece).to_bytes(4, 'little') + piece)
  return TiktokenTokenizer(
    name=name,
    pieces=pieces,
    separator_id=encoding.eot_token,
    fingerprint=f'{name}-{digest.hexdigest()[:16]}',
    encoding=encoding,
  )


def _offline_safe(get_encoding: Callable[[str], Any], name: str) -> Any:
  """Calls tiktoken.get_encoding, failing in seconds where it would hang."""
  from tiktoken import load  # pylint: disable=g-import-not-at-top

  # tiktoken downloads with no time limit, and which files an encoding needs is
  # known only to its constructor: so the one function that downloads is guarded
  # for the duration of the call.
  download = load.read_file

  def guarded(url: str) -> bytes:
    if '://' in url and not is_reachable(url):
      raise ConnectionError(
        f'{urllib.parse.urlsplit(url).hostname} does not answer'
      )
    return download(url)

  load.read_file = guarded
  try:
    return get_encoding(name)
  except OSError as error:  # requests' errors and ConnectionError are OSErrors
    default = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    raise InputError(
      f"tokenizer.name={name!r} needs files that are not in tiktoken's cache "
      f'({os.environ.get("TIKTOKEN_CACHE_DIR", default)}) and could not be '
      f'downloaded ({error}); set the environment variable TIKTOKEN_CACHE_DIR '
      "to a folder that has them, or use tokenizer.name='bytes'"
    ) from error
  finally:
    load.read_file = download
