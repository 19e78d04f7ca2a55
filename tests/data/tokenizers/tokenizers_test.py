"""Tests of tokenizers: nothing is lost, and text never becomes control."""

import json
import os
import pathlib
import pickle
import tempfile
import types
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm import workdir as workdirs
from nanodlm.data import network, tokenizers
from nanodlm.data.tokenizers import base, huggingface, tiktoken
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from nanodlm.interop import tokenizer_json
from nanodlm.types import InputError

SHARED = os.path.join(os.path.dirname(__file__), *['..'] * 4, 'shared', 'data')
TIKTOKEN_CACHE = os.path.abspath(os.path.join(SHARED, 'tiktoken_cache'))

TEXTS = (
  '',
  'plain words',
  '  two  spaces ',
  'a\n\nb\n',
  '\ttab\r\n',
  'naïve 漢字 😀',
  '\u2581 the mark \u2581\u2581',
  'nul \0 byte',
  '\ufffd',
  'e\u0301',
  '<|endoftext|>',
  '</s><s><unk><pad>',
  '<0x41>',
  'x' * 5000,
)


def config(name, path='', vocab_size=0):
  return types.SimpleNamespace(
    name=name, path=path, vocab_size=vocab_size, chat_template=''
  )


class TokenizersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(
      mock.patch.dict(os.environ, {'TIKTOKEN_CACHE_DIR': TIKTOKEN_CACHE})
    )

  def folder(self):
    return self.enterContext(tempfile.TemporaryDirectory())

  def make(self, name):
    if name == 'sentencepiece':
      path = os.path.join(self.folder(), 'a.model')
      words = (
        'the quick brown fox jumps over the lazy dog and runs away'.split()
      )
      texts = [' '.join(words[i % 5 :]) + '\n' for i in range(200)]
      SentencePieceTokenizer.train(iter(texts), 320, path)
      return tokenizers.make_tokenizer(config(name, path))
    if name == 'hugging_face':
      content = tokenizer_json.bytes_tokenizer()
      content['added_tokens'] = [
        {
          'id': i,
          'content': text,
          'single_word': False,
          'lstrip': False,
          'rstrip': False,
          'normalized': False,
          'special': True,
        }
        for i, text in ((256, '<|endoftext|>'), (257, '<mask>'))
      ]
      path = pathlib.Path(self.folder()) / 'tokenizer.json'
      path.write_text(json.dumps(content))
      return huggingface.load_hugging_face(str(path), 258, 257, 256)
    if name == 'gpt2' and not os.path.isdir(TIKTOKEN_CACHE):
      self.skipTest('no tiktoken files')
    return tokenizers.make_tokenizer(config(name))

  def test_an_end_that_is_not_an_added_token_spells_nothing(self):
    tokenizer = self.make('hugging_face')
    path = pathlib.Path(tokenizer.path)
    content = json.loads(path.read_text())
    for token in content.pop('added_tokens'):
      content['model']['vocab'][token['content']] = token['id']
    path.write_text(json.dumps(content))
    again = huggingface.load_hugging_face(str(path), 258, 257, 256)
    np.testing.assert_array_equal(again.num_bytes, tokenizer.num_bytes)
    self.assertEqual(again.num_bytes[256], 0)
    self.assertEqual(again.controls, tokenizer.controls)
    text = 'a<|endoftext|>'
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))

  @parameterized.parameters('bytes', 'sentencepiece', 'gpt2', 'hugging_face')
  def test_round_trip_and_protocol(self, name):
    tokenizer = self.make(name)
    self.assertEqual(tokenizer.mask_id, tokenizer.vocab_size - 1)
    self.assertNotEqual(tokenizer.separator_id, tokenizer.mask_id)
    self.assertEqual(tokenizer.eos_ids, (tokenizer.separator_id,))
    self.assertEqual(tokenizer.num_bytes.shape, (tokenizer.vocab_size,))
    self.assertEqual(tokenizer.num_bytes.dtype, np.int32)
    self.assertEqual(tokenizer.num_bytes[tokenizer.mask_id], 0)
    self.assertEqual(tokenizer.num_bytes[tokenizer.separator_id], 0)
    control = {tokenizer.mask_id, tokenizer.separator_id}
    # As other processes have it.
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text, *batches in zip(
      TEXTS,
      tokenizer.encode_batch(TEXTS),
      copy.encode_batch(TEXTS, 1),
      copy.encode_batch(TEXTS, 2),
      strict=True,
    ):
      tokens = tokenizer.encode(text)
      self.assertEqual(tokens.dtype, np.int32)
      for from_batch in batches:
        np.testing.assert_array_equal(tokens, from_batch)
      self.assertEqual(tokenizer.decode(tokens), text)
      self.assertEqual(tokenizer.num_bytes[tokens].sum(), len(text.encode()))
      self.assertEmpty(control & set(tokens.tolist()))
    described = tokenizer.to_json()
    self.assertEqual(described['vocab_size'], tokenizer.vocab_size)
    self.assertEqual(described['fingerprint'], tokenizer.fingerprint)

  @parameterized.parameters('bytes', 'sentencepiece', 'gpt2', 'hugging_face')
  def test_spell_is_decode_token_by_token(self, name):
    tokenizer = self.make(name)
    control = [tokenizer.mask_id, tokenizer.separator_id]
    for text in TEXTS:
      tokens = [*tokenizer.encode(text), *control]
      spelled = tokenizer.spell(tokens, mask_text='[M]')
      self.assertLen(spelled, len(tokens))
      self.assertEqual(''.join(spelled), tokenizer.decode(tokens, '[M]'))
      self.assertEqual(spelled[-2:], ['[M]', '\n\n'])

  def test_spell_of_broken_bytes(self):
    tokenizer = BytesTokenizer()
    whole = [*'é😀'.encode()]
    self.assertEqual(
      tokenizer.spell([97, *whole]), ['a', 'é', '', '😀', '', '', '']
    )
    broken = [whole[0], tokenizer.mask_id, *whole[2:5], 97, 255]
    spelled = tokenizer.spell(broken)
    self.assertEqual(spelled, ['\ufffd', '_', '\ufffd', '', '', 'a', '\ufffd'])
    self.assertEqual(''.join(spelled), tokenizer.decode(broken))

  @parameterized.parameters('bytes', 'sentencepiece', 'gpt2', 'hugging_face')
  def test_decode_prints_mask_and_separator(self, name):
    tokenizer = self.make(name)
    a, b = tokenizer.encode('fox'), tokenizer.encode('dog')
    tokens = [*a, tokenizer.mask_id, *b, tokenizer.separator_id, *a]
    self.assertEqual(tokenizer.decode(tokens), 'fox_dog\n\nfox')
    self.assertEqual(
      tokenizer.decode(np.array(tokens), mask_text='[M]'), 'fox[M]dog\n\nfox'
    )

  def test_escape_controls(self):
    text = 'a\n\tb\0\x1b[2J\r\x9b\u202e\u2067 é\u200d\ufffd'
    self.assertEqual(
      base.escape_controls(text),
      'a\n\tb‹U+0000›‹U+001B›[2J‹U+000D›‹U+009B›‹U+202E›‹U+2067› é\u200d\ufffd',
    )

  def test_bytes_ids(self):
    tokenizer = self.make('bytes')
    self.assertEqual(
      (tokenizer.separator_id, tokenizer.mask_id, tokenizer.vocab_size),
      (256, 257, 258),
    )
    np.testing.assert_array_equal(tokenizer.encode('é!'), [0xC3, 0xA9, 33])
    self.assertEqual(tokenizer.decode([0xC3, 257]), '\ufffd_')

  def test_gpt2_ids(self):
    tokenizer = self.make('gpt2')
    self.assertEqual(
      (tokenizer.separator_id, tokenizer.mask_id, tokenizer.vocab_size),
      (50256, 50257, 50258),
    )
    np.testing.assert_array_equal(tokenizer.encode('hello world'), [31373, 995])

  def test_spare_ids_of_gpt2_are_of_no_text_and_are_saved(self):
    tokenizer = self.make('gpt2').with_spare_ids(2)
    self.assertEqual(
      (tokenizer.separator_id, tokenizer.mask_id), (50256, 50259)
    )
    self.assertEqual(tokenizer.decode([31373, 50257, 50259, 50258]), 'hello_')
    self.assertEqual(tokenizer.num_bytes[50257:].sum(), 0)
    folder = self.folder()
    save_tokenizer(tokenizer, folder)
    again = load_tokenizer(folder)
    self.assertEqual(again.to_json(), tokenizer.to_json())
    np.testing.assert_array_equal(again.encode('hello world'), [31373, 995])

  def test_sentencepiece_extra_ids_and_training_is_deterministic(self):
    one, two = self.make('sentencepiece'), self.make('sentencepiece')
    self.assertEqual((one.separator_id, one.mask_id), (320, 321))
    self.assertEqual(one.fingerprint, two.fingerprint)
    # Trained pieces are used: it is not spelled letter by letter.
    self.assertLess(one.encode(' lazy dog').size, 9)

  def test_sentencepiece_uses_the_models_own_end_of_sentence(self):
    import sentencepiece

    path = os.path.join(self.folder(), 'eos.model')
    with open(path, 'wb') as file:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['some words to learn from'] * 10),
        model_writer=file,
        vocab_size=280,
        model_type='bpe',
        byte_fallback=True,
        eos_id=2,
        minloglevel=2,
        hard_vocab_limit=False,
      )
    tokenizer = tokenizers.make_tokenizer(config('sentencepiece', path))
    self.assertEqual(tokenizer.separator_id, 2)
    self.assertEqual(tokenizer.num_bytes[2], 0)
    self.assertNotIn(2, tokenizer.encode('words </s>').tolist())

  def test_vocab_size_that_does_not_suit_the_text(self):
    path = os.path.join(self.folder(), 'a.model')
    for vocab_size in (0, 256, 100_000):
      with self.assertRaisesRegex(
        InputError, f'tokenizer.vocab_size={vocab_size} '
      ):
        SentencePieceTokenizer.train(iter(['few words'] * 9), vocab_size, path)

  def test_not_a_sentencepiece_model(self):
    path = os.path.join(self.folder(), 'x.model')
    for content in (b'hello, I am text\n' * 9, b''):
      with open(path, 'wb') as file:
        file.write(content)
      with self.assertRaisesRegex(InputError, r'tokenizer\.path=.*x\.model'):
        tokenizers.make_tokenizer(config('sentencepiece', path))
    with self.assertRaisesRegex(InputError, r'tokenizer\.path=.*No such file'):
      tokenizers.make_tokenizer(config('sentencepiece', path + 'y'))
    with self.assertRaisesRegex(InputError, r"tokenizer\.path=''"):
      tokenizers.make_tokenizer(config('sentencepiece'))

  def test_unknown_name_lists_the_allowed_ones(self):
    with self.assertRaisesRegex(
      InputError, r"tokenizer\.name='gtp2' .*'bytes'.*'gpt2'"
    ):
      tokenizers.make_tokenizer(config('gtp2'))

  def test_offline_and_not_cached_fails_at_once(self):
    os.environ['TIKTOKEN_CACHE_DIR'] = self.folder()
    with (
      mock.patch.object(tiktoken, 'is_reachable', return_value=False),
      mock.patch('requests.get', side_effect=AssertionError('may hang')),
    ):
      with self.assertRaisesRegex(InputError, 'TIKTOKEN_CACHE_DIR'):
        tokenizers.make_tokenizer(config('p50k_base'))

  def test_is_reachable_gives_up(self):
    with mock.patch('socket.create_connection', side_effect=TimeoutError):
      self.assertFalse(network.is_reachable('https://example.com/x'))
    with mock.patch('socket.create_connection') as connect:
      self.assertTrue(network.is_reachable('https://example.com/x'))
    with mock.patch.dict(os.environ, {'https_proxy': 'http://proxy.test:3128'}):
      with mock.patch('socket.create_connection') as connect:
        network.is_reachable('https://example.com/x')
    self.assertEqual(connect.call_args.args[0], ('proxy.test', 3128))
    with mock.patch('socket.create_connection') as connect:
      network.is_reachable('ftp://example.com/x')
    self.assertEqual(connect.call_args.args[0], ('example.com', 21))

  def test_half_a_surrogate_pair(self):
    with self.assertRaisesRegex(InputError, 'surrogate'):
      BytesTokenizer().encode('a\ud800')

  @parameterized.parameters('bytes', 'sentencepiece', 'gpt2', 'hugging_face')
  def test_saved_folder_is_enough(self, name):
    tokenizer, folder = self.make(name), self.folder()
    save_tokenizer(tokenizer, folder)
    if name == 'sentencepiece':
      os.unlink(tokenizer.path)
    loaded = load_tokenizer(folder)
    self.assertEqual(loaded.fingerprint, tokenizer.fingerprint)
    np.testing.assert_array_equal(
      loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1])
    )

  def test_saved_tokenizer_that_changed_is_refused(self):
    folder = self.folder()
    save_tokenizer(self.make('sentencepiece'), folder)
    other = os.path.join(folder, workdirs.TOKENIZER_MODEL)
    SentencePieceTokenizer.train(
      iter(['entirely other text\n'] * 50), 270, other
    )
    with self.assertRaisesRegex(InputError, 'different ids'):
      load_tokenizer(folder)
    with self.assertRaisesRegex(InputError, 'cannot be read'):
      load_tokenizer(self.folder())

  @parameterized.parameters(
    (b'{"name": "by\xf4es"}', 'cannot be read'),
    (b'{', 'cannot be read'),
    (b'{"nbme": "bytes"}', "is not a saved .* KeyError\\('name'"),
    (b'[]', 'is not an object but list'),
  )
  def test_saved_tokenizer_that_is_damaged_is_refused(self, content, message):
    folder = self.folder()
    with open(os.path.join(folder, workdirs.TOKENIZER), 'wb') as file:
      file.write(content)
    with self.assertRaisesRegex(InputError, f'{workdirs.TOKENIZER} {message}'):
      load_tokenizer(folder)


if __name__ == '__main__':
  absltest.main()
