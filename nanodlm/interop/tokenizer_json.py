"""Writes tokenizers as the tokenizer.json of Hugging Face's tokenizers."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.data.tokenizers.huggingface import byte_alphabet
from nanodlm.data.tokenizers.normalizing import SPACE_MARK
from nanodlm.interop.tensors import require

# Texts that tokenizers treat differently: white space, U+2581, characters that
# Unicode's normal forms replace, rare and private ones, and names of tokens.
_ODD_TEXTS = (
  '',
  '  two  spaces ',
  '\ttab\r\n\n',
  'a\u2581b \u2581\u2581 c\u2581',
  'na\u00efve \u6f22\u5b57 \U0001f600 \U0010fffd\ue123\ufeff\x00',
  "e\u0301 \u212b \uff21\ufb01 \u00a0\u3000\u2028 12345 I'll",
  '<0x41><unk> </s>',
)


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


def from_merges(
  folder: pathlib.Path, pattern: str, special: Mapping[Any, Any]
) -> dict[str, Any] | None:
  """Returns the content for a folder's vocab.json and merges.txt, or None.

  Args:
    folder: may lack them.
    pattern: see `byte_level`.
    special: {id: entry of tokenizer_config.json's 'added_tokens_decoder'}.
  """
  vocab, merges = folder / 'vocab.json', folder / 'merges.txt'
  if not (vocab.is_file() and merges.is_file()):
    return None
  require('tokenizers')
  from tokenizers.models import BPE

  ids, pairs = BPE.read_file(str(vocab), str(merges))
  added = [
    added_token(int(i), token['content'], token.get('special', True))
    for i, token in special.items()
  ]
  content = byte_level(ids, list(map(list, pairs)), pattern)
  return content | {'added_tokens': added}


def begin_with(content: dict[str, Any], i: Any, text: str) -> None:
  """Makes a tokenizer.json put the token of id i before every text."""
  token = {'SpecialToken': {'id': text, 'type_id': 0}}
  first, second = ({'Sequence': {'id': x, 'type_id': 0}} for x in 'AB')
  content['post_processor'] = {
    'type': 'TemplateProcessing',
    'single': [token, first],
    'pair': [token, first, second],
    'special_tokens': {text: {'id': text, 'ids': [i], 'tokens': [text]}},
  }


def find_difference(
  content: dict[str, Any], tokenizer: Tokenizer
) -> str | None:
  """Returns a text that a tokenizer.json encodes differently, or None.

  Tries English text and what tokenizers treat differently.
  """
  from pydoc_data import topics

  import tokenizers as library

  theirs = library.Tokenizer.from_str(json.dumps(content))
  theirs.encode_special_tokens = True
  for text in (*_ODD_TEXTS, *list(topics.topics.values())[:40]):
    ids = theirs.encode(text, add_special_tokens=False).ids
    if ids != tokenizer.swap_mask(tokenizer.encode(text)).tolist():
      return text
  return None


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
  """Returns the content for a SentencePiece BPE model as it is trained here.

  A model that normalises its text, or is not a BPE, gets different ids from it.
  Its pieces are spelled with spaces, so that U+2581 is a character like others.
  """
  require('tokenizers')
  from tokenizers import decoders, models, Tokenizer

  pieces = [
    processor.id_to_piece(i).replace(SPACE_MARK, ' ')
    for i in range(processor.get_piece_size())
  ]
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
  tokenizer.decoder = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Fuse()]
  )
  vocab = {piece: i for i, piece in enumerate(pieces)}
  return _content(tokenizer, vocab, merges)
