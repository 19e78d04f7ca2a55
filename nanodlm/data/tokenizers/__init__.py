"""Tokenizers: text to token ids and back.

Every tokenizer has a separator, which ends a document, and a mask, which is
always the last id. Text is only ever text: '<|endoftext|>' or '</s>' in a
user's file is encoded as ordinary characters and never becomes a control token.

A new tokenizer is a subclass of `Tokenizer`, or of `NormalizingTokenizer` if it
may change a text, and one entry in `TOKENIZERS`.
"""

from typing import Any

from nanodlm.data.tokenizers import bytes as bytes_tokenizer
from nanodlm.data.tokenizers import (
  chat,
  huggingface,
  saved,
  sentencepiece,
  tiktoken,
)
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.types import InputError

# The tokenizer.name that stands for the tokenizer of another run.
RUN = 'run'
# The class of each name. All other names are encodings of tiktoken.
TOKENIZERS: dict[str, type[Tokenizer]] = {
  'bytes': bytes_tokenizer.BytesTokenizer,
  'sentencepiece': sentencepiece.SentencePieceTokenizer,
  RUN: saved.RunTokenizer,
  huggingface.NAME: huggingface.HuggingFaceTokenizer,
}


def find_class(name: str) -> type[Tokenizer]:
  """Returns the class of config.tokenizer.name.

  Raises:
    InputError: the name is unknown.
  """
  if name in TOKENIZERS:
    return TOKENIZERS[name]
  if name not in (encodings := tiktoken.encoding_names()):
    raise InputError(
      f'tokenizer.name={name!r} is not one of {[*TOKENIZERS, *encodings]}'
    )
  return tiktoken.TiktokenTokenizer


def make_tokenizer(config: Any) -> Tokenizer:
  """Makes the tokenizer of `config.tokenizer`, or of its checked settings.

  Raises:
    InputError: the name is unknown, or files are missing or damaged.
  """
  tokenizer = find_class(config.name).make(config.name, config.path)
  return chat.with_template(tokenizer, config.chat_template)
