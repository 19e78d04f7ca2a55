"""SentencePiece models: given as a file, or trained on the training text."""

from collections.abc import Iterable, Iterator
import dataclasses
import hashlib
import io
import pathlib
from typing import Any

import numpy as np

from nanodlm.data.tokenizers.normalizing import NormalizingTokenizer, SPACE_MARK
from nanodlm.types import InputError, reason

# SentencePiece silently skips longer training sentences, so the text is cut.
_MAX_SENTENCE_BYTES = 4096
# Training uses a random million sentences, drawn with a fixed seed. More would
# cost gigabytes of memory and change the model little.
_MAX_SENTENCES = 1_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePieceTokenizer(NormalizingTokenizer):
  """A SentencePiece model.

  The separator is the model's end-of-sentence piece, or an extra id if it has
  none. A model from `train` is lossless.
  """

  reads_path = True
  min_trained_size = 257  # 256 bytes and the unknown piece

  path: str  # The .model file, as given.
  processor: Any  # sentencepiece.SentencePieceProcessor

  @classmethod
  def make(cls, name: str, path: str) -> 'SentencePieceTokenizer':
    import sentencepiece

    if not path:
      raise InputError(
        f"tokenizer.path='' with tokenizer.name={name!r}: give a .model file; "
        'only the preparation of data trains one'
      )
    try:
      model = pathlib.Path(path).read_bytes()
      processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
      num_pieces = processor.vocab_size()
      if not num_pieces:
        raise RuntimeError('it is empty')
    except (OSError, RuntimeError) as error:
      raise InputError(
        f'tokenizer.path={path!r} is not a trained SentencePiece model '
        f'({reason(error)}); give the .model file that SentencePiece wrote'
      ) from error

    def piece_bytes(i: int) -> bytes:
      if processor.is_byte(i):  # spelled '<0x0A>'
        return bytes([int(processor.id_to_piece(i)[1:-1], 16)])
      if processor.is_control(i) or processor.is_unknown(i):
        return b''
      return processor.id_to_piece(i).replace(SPACE_MARK, ' ').encode()

    pieces = tuple(map(piece_bytes, range(num_pieces)))
    has_bytes = any(map(processor.is_byte, range(num_pieces)))
    spelled = [f'<0x{byte:02X}>' for byte in range(256 if has_bytes else 0)]
    eos_id = processor.eos_id()
    return cls(
      name=name,
      pieces=pieces,
      separator_id=eos_id if eos_id >= 0 else num_pieces,
      fingerprint='sentencepiece-' + hashlib.sha256(model).hexdigest()[:16],
      byte_ids=tuple(map(processor.piece_to_id, spelled)),
      has_space=processor.piece_to_id(SPACE_MARK) != processor.unk_id(),
      path=path,
      processor=processor,
    )

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int, path: str) -> None:
    """Trains a lossless BPE model and writes it; deterministic.

    No normalisation, no squeezed white space, no dummy prefix, byte pieces for
    every character without a piece, and no control tokens: what is encoded
    decodes to the same string. `vocab_size` counts 256 bytes and the unknown
    piece.

    Raises:
      InputError: vocab_size is too small or too large for the text.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(0)
    trainer: Any = sentencepiece.SentencePieceTrainer
    model = io.BytesIO()
    try:
      trainer.train(
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
      if 'KeyboardInterrupt' in str(error):  # the library's form of Ctrl-C
        raise KeyboardInterrupt from error
      # The library's message ends with the largest or smallest allowed value.
      raise InputError(
        f'tokenizer.vocab_size={vocab_size} does not suit this text: '
        f'{str(error).rsplit("] ", maxsplit=1)[-1]}'
      ) from error
    pathlib.Path(path).write_bytes(model.getvalue())

  def _run(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
    del num_threads
    return [np.array(self.processor.encode(text), np.int32) for text in texts]

  def _find_ends(self, text: str) -> np.ndarray:
    from sentencepiece import sentencepiece_pb2

    encoded = self.processor.encode(text, out_type='serialized_proto')
    found: Any = sentencepiece_pb2
    pieces = found.SentencePieceText.FromString(encoded).pieces
    return np.array([piece.end for piece in pieces], np.int64)

  def to_json(self) -> dict[str, Any]:
    return {**super().to_json(), 'path': self.path}


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Cuts texts into lines of at most _MAX_SENTENCE_BYTES UTF-8 bytes."""
  step = _MAX_SENTENCE_BYTES // 4  # A character has at most 4 bytes.
  for text in texts:
    for line in text.splitlines():
      # Byte pieces spell what is left out here: newlines, NUL and U+2581.
      line = line.replace('\0', ' ').replace(SPACE_MARK, ' ')
      for start in range(0, len(line), step):
        yield line[start : start + step]
