"""The encodings of tiktoken: 'gpt2', 'cl100k_base', ..."""

from collections.abc import Sequence
from concurrent import futures
import dataclasses
import hashlib
import os
import tempfile
from typing import Any
from unittest import mock
import urllib.parse

import numpy as np

from nanodlm.data.network import is_reachable
from nanodlm.data.tokenizers import base
from nanodlm.types import InputError, reason


@dataclasses.dataclass(frozen=True, eq=False)
class TiktokenTokenizer(base.Tokenizer):
  """An encoding of tiktoken; the separator is its <|endoftext|>."""

  encoding: Any  # tiktoken.Encoding

  @classmethod
  def make(cls, name: str, path: str) -> 'TiktokenTokenizer':
    del path
    encoding = _get_encoding(name)

    # o200k_base and others leave gaps among their ids.
    pieces = [b''] * encoding.n_vocab
    for piece in encoding.token_byte_values():
      pieces[encoding.encode_single_token(piece)] = piece
    digest = hashlib.sha256(f'{name} {encoding.eot_token}'.encode())
    for piece in pieces:
      digest.update(len(piece).to_bytes(4, 'little') + piece)
    fingerprint = f'{name}-{digest.hexdigest()[:16]}'
    return cls(name, tuple(pieces), encoding.eot_token, fingerprint, encoding)

  @classmethod
  def from_json(
    cls, described: dict[str, Any], path: str
  ) -> 'TiktokenTokenizer':
    own = cls.make(described['name'], path)
    return own.with_spare_ids(described['vocab_size'] - own.vocab_size)

  def with_spare_ids(self, num: int) -> 'TiktokenTokenizer':
    """Returns this tokenizer with `num` textless ids before the mask."""
    if num <= 0:
      return self
    pieces, fingerprint = (b'',) * num, f'{self.fingerprint}+{num}'
    return dataclasses.replace(
      self, pieces=self.pieces + pieces, fingerprint=fingerprint
    )

  def encode(self, text: str) -> np.ndarray:
    base.utf8(text)
    # Unlike encode_ordinary, this builds no Python list. With nothing
    # disallowed, special tokens are encoded as ordinary text.
    ids = self.encoding.encode_to_numpy(text, disallowed_special=())
    return ids.astype(np.int32)

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = 0
  ) -> list[np.ndarray]:
    num_threads = min(len(texts), num_threads or os.cpu_count() or 1)
    if num_threads <= 1:
      return [self.encode(text) for text in texts]
    with futures.ThreadPoolExecutor(num_threads) as pool:
      return list(pool.map(self.encode, texts))


def encoding_names() -> list[str]:
  """Returns the names of tiktoken's encodings."""
  import tiktoken

  return tiktoken.list_encoding_names()


def _get_encoding(name: str) -> Any:
  """Calls tiktoken.get_encoding, failing in seconds if it would hang."""
  import tiktoken
  from tiktoken import load

  # tiktoken downloads without a time limit, and only an encoding's constructor
  # knows which files it needs, so the function that downloads is guarded.
  download = load.read_file

  def guarded(url: str) -> bytes:
    if '://' in url and not is_reachable(url):
      host = urllib.parse.urlsplit(url).hostname
      raise ConnectionError(f'{host} does not answer')
    return download(url)

  try:
    with mock.patch.object(load, 'read_file', guarded):
      return tiktoken.get_encoding(name)
  except OSError as error:  # The errors of requests are OSErrors, too.
    default = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    folder = os.environ.get('TIKTOKEN_CACHE_DIR', default)
    raise InputError(
      f"tokenizer.name={name!r} needs files that are not in tiktoken's cache "
      f'({folder}) and could not be downloaded ({reason(error)}); set the '
      'environment variable TIKTOKEN_CACHE_DIR to a folder that has them, or '
      "use tokenizer.name='bytes'"
    ) from error
