"""Tokenizers as other projects make them, trained in a moment."""

import json
import pathlib

import sentencepiece
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nanodlm.data.config import TokenizerConfig
from nanodlm.data.tokenizers import make_tokenizer
from nanodlm.data.tokenizers.huggingface import load_hugging_face
from nanodlm.data.tokenizers.sentencepiece import SentencePieceTokenizer

WORDS = (
  'the quick brown fox jumps over the lazy dog and Hello of in ing'.split()
)
ENGLISH = [' '.join(WORDS[i % 5 :] + WORDS[: i % 7]) + '\n' for i in range(200)]
CHINESE = [
  '\u6f22\u5b57\u7684\u4e2d\u6587\u6587\u672c\u6ca1\u6709\u7a7a\n'
] * 100


def path_of_sentencepiece(folder, **options):
  """Trains a model with spm_train's options and returns its path."""
  path = pathlib.Path(folder, 'given.model')
  with open(path, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(ENGLISH),
      model_writer=file,
      minloglevel=2,
      hard_vocab_limit=False,
      **options,
    )
  return str(path)


def load_sentencepiece(path):
  return make_tokenizer(TokenizerConfig('sentencepiece', str(path), 0))


def make_own(folder, texts, vocab_size):
  """A model of SentencePieceTokenizer.train."""
  path = pathlib.Path(folder, 'own.model')
  SentencePieceTokenizer.train(iter(texts), vocab_size, str(path))
  return load_sentencepiece(path)


def make_default(folder):
  """spm_train's defaults: NFKC, joined white space, an unknown piece."""
  return load_sentencepiece(path_of_sentencepiece(folder, vocab_size=80))


def make_llama(folder):
  """SentencePiece's BPE with bytes and a space before the text, as Llama's."""
  return load_sentencepiece(
    path_of_sentencepiece(
      folder,
      vocab_size=400,
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
    )
  )


def load_json(folder, tokenizer, mask=None):
  """Loads a tokenizer.json, with two more ids for a separator and a mask."""
  path = pathlib.Path(folder, 'given.json')
  path.write_text(
    tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
  )
  ids = library.Tokenizer.from_file(str(path)).get_vocab().values()
  num = max(ids) + 1
  return load_hugging_face(
    str(path), num + 2, num + 1 if mask is None else mask, num
  )


def make_metaspace(folder):
  """A tokenizer.json like Llama's and Mistral's."""
  special = ['<unk>', '<s>', '</s>']
  pieces = [f'<0x{byte:02X}>' for byte in range(256)]
  tokenizer = library.Tokenizer(
    models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme='first', split=False
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=330, special_tokens=special + pieces, max_token_length=6
  )
  tokenizer.train_from_iterator(ENGLISH, trainer)
  content = json.loads(tokenizer.to_str())
  content['added_tokens'] = content['added_tokens'][: len(special)]
  return load_json(folder, json.dumps(content))


def make_word_piece(folder):
  """A tokenizer.json like BERT's, without capitals, its mask in the middle."""
  special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  tokenizer = library.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
  tokenizer.train_from_iterator(ENGLISH, trainer)
  return load_json(folder, tokenizer, mask=special.index('[MASK]'))


def make_nfc(folder):
  """A byte-level tokenizer.json that composes accents, as Qwen's."""
  tokenizer = library.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet)
  tokenizer.train_from_iterator(ENGLISH, trainer)
  return load_json(folder, tokenizer)


MAKERS = {
  'default': make_default,
  'llama': make_llama,
  'metaspace': make_metaspace,
  'word_piece': make_word_piece,
  'nfc': make_nfc,
}
