"""Writes tokenizers as the tokenizer.json of Hugging Face's tokenizers."""

import json
from typing import Any

from nanodlm.data.tokenizers.huggingface import byte_alphabet
from nanodlm.interop.tensors import require


def byte_level(
  vocab: dict[str, int], merges: list[list[str]], pattern: str = ''
) -> dict[str, Any]:
  """Returns the content for a byte-pair encoding spelled in `byte_alphabet`.

  Args:
    vocab: {piece: id}.
    merges: the pairs of pieces that are merged, in the order of their rank.
    pattern: a regular expression for pieces of text that merges do not cross.
  """
  require('tokenizers')
  from tokenizers import decoders, models, pre_tokenizers, Regex, Tokenizer

  tokenizer = Tokenizer(models.BPE())
  first = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  if pattern:
    split = pre_tokenizers.Split(Regex(pattern), 'isolated')
    first = pre_tokenizers.Sequence([split, first])
  tokenizer.pre_tokenizer = first
  tokenizer.decoder = decoders.ByteLevel()
  return _content(tokenizer, vocab, merges)


def _content(
  tokenizer: Any, vocab: dict[str, int], merges: list[list[str]]
) -> dict[str, Any]:
  content = json.loads(tokenizer.to_str())
  content['model'] |= {'vocab': vocab, 'merges': merges}
  return content


def added_token(i: int, text: str, special: bool = True) -> dict[str, Any]:
  """Returns an entry of 'added_tokens'."""
  options = ('single_word', 'lstrip', 'rstrip', 'normalized')
  return {
    'id': i,
    'content': text,
    **dict.fromkeys(options, False),
    'special': special,
  }


def bytes_tokenizer() -> dict[str, Any]:
  """Returns the content for UTF-8 bytes, which are never merged."""
  return byte_level(byte_alphabet(), [])


def tiktoken_tokenizer(encoding: Any) -> dict[str, Any]:
  """Returns the content for a tiktoken.Encoding, without its control tokens.

  tiktoken keeps the rank of each piece but not the two that it was merged from:
  those are what the merges of lower ranks make of its bytes.
  """
  ranks = encoding._mergeable_ranks
  chars = {byte: char for char, byte in byte_alphabet().items()}
  spell = lambda piece: ''.join(chars[byte] for byte in piece)
  merges = [
    [spell(part) for part in _halves(ranks, piece, rank)]
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1])
    if len(piece) > 1
  ]
  vocab = {spell(piece): i for piece, i in ranks.items()}
  return byte_level(vocab, merges, encoding._pat_str)


def _halves(ranks: dict[bytes, int], piece: bytes, rank: int) -> list[bytes]:
  """Returns the two pieces that `piece` was merged from."""
  parts = [bytes([byte]) for byte in piece]
  while len(parts) > 2:
    pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
    best = min(range(len(pairs)), key=pairs.__getitem__)
    if pairs[best] >= rank:
      break
    parts[best : best + 2] = [parts[best] + parts[best + 1]]
  return parts


def sentencepiece_tokenizer(processor: Any) -> dict[str, Any]:
  """Returns the content for a SentencePiece BPE model of `train_sentencepiece`.

  A model that normalises its text, or is not a BPE, gets other ids from it.
  Unlike the run's tokenizer it also reads U+2581 as a space.
  """
  require('tokenizers')
  from tokenizers import decoders, models, normalizers, Tokenizer

  pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
  is_other = lambda i: (
    processor.is_byte(i) or processor.is_unknown(i) or processor.is_control(i)
  )
  known = {piece for i, piece in enumerate(pieces) if not is_other(i)}
  # In the order of the pieces that they make.
  merges = [
    [piece[:cut], piece[cut:]]
    for piece in pieces
    if piece in known
    for cut in range(1, len(piece))
    if piece[:cut] in known and piece[cut:] in known
  ]
  unknown = pieces[processor.unk_id()]
  model = models.BPE(unk_token=unknown, fuse_unk=True, byte_fallback=True)
  tokenizer = Tokenizer(model)
  tokenizer.normalizer = normalizers.Replace(' ', '\u2581')
  spaces = decoders.Replace('\u2581', ' ')
  tokenizer.decoder = decoders.Sequence(
    [spaces, decoders.ByteFallback(), decoders.Fuse()]
  )
  vocab = {piece: i for i, piece in enumerate(pieces)}
  return _content(tokenizer, vocab, merges)
