"""UTF-8 bytes as tokens."""

import dataclasses

import numpy as np

from nanodlm.data.tokenizers import base


@dataclasses.dataclass(frozen=True, eq=False)
class BytesTokenizer(base.Tokenizer):
  """UTF-8 bytes: ids 0..255, then the separator 256 and the mask 257."""

  name: str = 'bytes'
  pieces: tuple[bytes, ...] = tuple(bytes([i]) for i in range(256))
  separator_id: int = 256
  fingerprint: str = 'bytes'

  @classmethod
  def make(cls, name: str, path: str) -> 'BytesTokenizer':
    del name, path
    return cls()

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(base.utf8(text), np.uint8).astype(np.int32)
