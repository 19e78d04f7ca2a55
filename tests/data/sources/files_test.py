"""Tests of text, JSONL and pairs in files."""

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from nanodlm.data import sources
from nanodlm.data.sources import base, files
from nanodlm.types import InputError

SHARED = os.path.join(os.path.dirname(__file__), *['..'] * 4, 'shared', 'data')


def texts(source, split='train'):
  return [
    ''.join(document.open()) for document in base.documents(source, split)
  ]


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())

  def write(self, name, data):
    path = os.path.join(self.folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
      file.write(data if isinstance(data, bytes) else data.encode())
    return path

  def test_text_files_sorted_recursive_unchanged(self):
    self.write('b.txt', 'second\r\n')
    self.write('a.txt', '\ufefffirst é\n')  # the byte order mark goes
    self.write('deep/er/c.txt', 'third')
    source = sources.make_source(f'text:{self.folder}/**/*.txt')
    self.assertEqual(texts(source), ['first é\n', 'second\r\n', 'third'])
    self.assertEqual(texts(source), texts(source))
    self.assertFalse(source.has_validation)

  @parameterized.parameters(
    ('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress)
  )
  def test_compressed(self, suffix, compress):
    self.write('a.txt' + suffix, compress('zipped é'.encode()))
    self.write('a.jsonl' + suffix, compress(b'{"text": "one"}\n'))
    self.assertEqual(
      texts(sources.make_source(f'text:{self.folder}/a.txt*')), ['zipped é']
    )
    self.assertEqual(
      texts(sources.make_source(f'jsonl:{self.folder}/*.jsonl{suffix}')),
      ['one'],
    )

  @parameterized.parameters('a.txt.gz', 'a.txt.bz2', 'a.txt.xz')
  def test_damaged_compressed_file(self, name):
    self.write(name, b'not compressed at all')
    with self.assertRaisesRegex(InputError, f'data.source=.*{name}'):
      texts(sources.make_source(f'text:{self.folder}/*'))

  def test_truncated_gzip(self):
    self.write('a.gz', gzip.compress(os.urandom(9999))[:500])
    with self.assertRaisesRegex(InputError, r'a\.gz cannot be read'):
      texts(sources.make_source(f'text:{self.folder}/*'))

  def test_zst(self):
    self.write('a.zst', b'x')
    with mock.patch.dict(sys.modules, {'zstandard': None}):
      with self.assertRaisesRegex(InputError, r"install -e '\.\[zstd\]'"):
        texts(sources.make_source(f'text:{self.folder}/*'))
    if importlib.util.find_spec('zstandard'):
      import zstandard

      self.write('a.zst', zstandard.compress(b'dense'))
      self.assertEqual(
        texts(sources.make_source(f'text:{self.folder}/*')), ['dense']
      )

  def test_long_documents_come_in_pieces_cut_between_tokens(self):
    line = 'Some words, "quoted"\n\n  and indented é\nNext line.\n'
    text = line * (3 * base.PIECE_CHARS // len(line))
    self.write('a.txt', text)
    self.write('b.txt', 'x' * (9 * base.PIECE_CHARS))  # nowhere to cut
    one, two = base.documents(
      sources.make_source(f'text:{self.folder}/*'), 'train'
    )
    pieces = list(one.open())
    self.assertEqual(''.join(pieces), text)
    self.assertLen(pieces, 3)
    for left, right in zip(pieces[:-1], pieces[1:]):
      self.assertRegex(left[-2:], r'\S\n')
      self.assertRegex(right[0], r'\w')
    pieces = list(two.open())
    self.assertEqual(sum(map(len, pieces)), 9 * base.PIECE_CHARS)
    self.assertLessEqual(max(map(len, pieces)), 5 * base.PIECE_CHARS)
    in_memory = base.document_of(text)
    self.assertEqual(''.join(in_memory.open()), text)

  def test_cutting_changes_no_gpt2_token(self):
    if not os.path.isdir(SHARED):
      self.skipTest('no shared data')
    import tiktoken

    with mock.patch.dict(
      os.environ, {'TIKTOKEN_CACHE_DIR': os.path.join(SHARED, 'tiktoken_cache')}
    ):
      encoding = tiktoken.get_encoding('gpt2')
    with open(os.path.join(SHARED, 'tinyshakespeare.txt')) as file:
      text = file.read()[:20000]
    with mock.patch.object(base, 'PIECE_CHARS', 1000):
      pieces = list(base.document_of(text).open())
    self.assertGreater(len(pieces), 10)
    self.assertEqual(
      sum(map(encoding.encode_ordinary, pieces), []),
      encoding.encode_ordinary(text),
    )

  def test_jsonl_fields(self):
    lines = [{'text': 'a', 'body': 'b\nc'}, {'text': '', 'body': 'd'}]
    self.write('x:body.jsonl', '\n'.join(map(json.dumps, lines)) + '\n\n')
    glob = f'{self.folder}/x:body.jsonl'
    self.assertEqual(texts(sources.make_source(f'jsonl:{glob}')), ['a', ''])
    self.assertEqual(
      texts(sources.make_source(f'jsonl:{glob}:body')), ['b\nc', 'd']
    )
    os.rename(glob, f'{self.folder}/x:body')  # ends like a field, but is a file
    self.assertEqual(
      texts(sources.make_source(f'jsonl:{self.folder}/x:body')), ['a', '']
    )

  @parameterized.parameters(
    (b'{"text": "ok"}\n{"text": \n', r'a\.jsonl:2 is not a JSON object'),
    (
      b'{"text": "ok"}\n{"text": "", "id": ' + b'1' * 5000 + b'}\n',
      r'a\.jsonl:2 is not a JSON object: Exceeds the limit',
    ),
    (b'{"text": "ok"}\n' + b'[' * 100_000, r'a\.jsonl:2 is not a JSON object'),
    (b'{"text": "ok"}\n["text"]\n', r'a\.jsonl:2 is not a JSON object.*list'),
    (b'{"body": "ok"}\n', r"a\.jsonl:1 lacks a text in field 'text'.*body"),
    (b'{"text": 3}\n', r'a\.jsonl:1 lacks a text'),
    (b'{"text": "\xff"}\n', r'a\.jsonl:1 is not UTF-8 text at byte 10'),
    (b'{"text": "\\ud800"}\n', r'a\.jsonl:1 holds half of a surrogate'),
  )
  def test_jsonl_errors(self, data, message):
    self.write('a.jsonl', data)
    with self.assertRaisesRegex(InputError, message):
      texts(sources.make_source(f'jsonl:{self.folder}/a.jsonl'))

  def test_pairs(self):
    lines = [
      {'prompt': 'p', 'response': 'r\n', 'q': 'q1', 'a': 'a1'},
      {'prompt': 'é', 'response': ' ', 'q': 'q2', 'a': 'a2'},
    ]
    data = '\n\n'.join(map(json.dumps, lines)).encode()
    self.write('x.jsonl', data)
    self.write('y.jsonl.gz', gzip.compress(data))
    pairs = lambda spec: [
      list(document.open())
      for document in base.documents(sources.make_source(spec), 'train')
    ]
    default = [['p', 'r\n'], ['é', ' ']]
    self.assertEqual(pairs(f'pairs:{self.folder}/x.jsonl'), default)
    self.assertEqual(pairs(f'pairs:{self.folder}/*'), default * 2)
    self.assertEqual(
      pairs(f'pairs:{self.folder}/x.jsonl:q:a'), [['q1', 'a1'], ['q2', 'a2']]
    )
    document = next(
      base.documents(
        sources.make_source(f'pairs:{self.folder}/x.jsonl'), 'train'
      )
    )
    self.assertEqual(list(document.open()), list(document.open()))
    os.rename(f'{self.folder}/x.jsonl', f'{self.folder}/x:q:a')  # a file's name
    self.assertEqual(pairs(f'pairs:{self.folder}/x:q:a'), default)

  @parameterized.parameters(
    (
      b'{"prompt": "p", "response": "r"}\n{"prompt": \n',
      r'a\.jsonl:2 is not a JSON object',
    ),
    (b'"prompt"\n', r'a\.jsonl:1 is not a JSON object.*str'),
    (
      b'{"prompt": "p"}\n',
      r"a\.jsonl:1 lacks a text in field 'response'; its fields are "
      r"\['prompt'\]\. Name the fields as 'pairs:GLOB:PROMPT_FIELD:RESPONSE_F",
    ),
    (b'{"response": "r"}\n', r"a\.jsonl:1 lacks a text in field 'prompt'"),
    (
      b'{"prompt": ["p"], "response": "r"}\n',
      r"lacks a text in field 'prompt'",
    ),
    (b'{"prompt": "p", "response": 3}\n', r"lacks a text in field 'response'"),
    (
      b'{"prompt": "", "response": "r"}\n',
      r"a\.jsonl:1 has an empty text in field 'prompt'",
    ),
    (
      b'{"prompt": "p", "response": ""}\n',
      r"a\.jsonl:1 has an empty text in field 'response' of a pair",
    ),
    (
      b'{"prompt": "p", "response": "\\ud800"}\n',
      r"a\.jsonl:1 holds half of a surrogate.*field 'response'",
    ),
  )
  def test_pairs_errors(self, data, message):
    self.write('a.jsonl', data)
    with self.assertRaisesRegex(InputError, 'data.source=.*' + message):
      texts(sources.make_source(f'pairs:{self.folder}/a.jsonl'))

  def test_not_text(self):
    self.write('a.txt', b'fine\n' + b'x' * base.PIECE_CHARS + b'\0rest')
    with self.assertRaisesRegex(
      InputError, f'a.txt holds NUL bytes .*byte {base.PIECE_CHARS + 5}'
    ):
      texts(sources.make_source(f'text:{self.folder}/*'))

  @parameterized.parameters(
    (b'caf\xe9\n', 3),
    (b'\xef\xbb\xbfcaf\xe9\n', 6),
    (b'cut\xc3', 3),
    # A character that spans two blocks, and then a bad byte.
    (
      b'x' * (base.PIECE_CHARS - 1) + 'é'.encode() + b'abc\xff',
      base.PIECE_CHARS + 4,
    ),
  )
  def test_not_utf8_says_where(self, data, offset):
    self.write('a.txt', data)
    with self.assertRaisesRegex(
      InputError, rf'a\.txt is not UTF-8 text at byte {offset};'
    ):
      texts(sources.make_source(f'text:{self.folder}/*'))

  def test_nothing_there(self):
    with self.assertRaisesRegex(InputError, 'matches no file'):
      sources.make_source(f'text:{self.folder}/*.txt')
    self.write('a.txt', b'')
    with self.assertRaisesRegex(InputError, 'all of them empty'):
      sources.make_source(f'text:{self.folder}/*.txt')

  @parameterized.parameters(
    '', 'text', 'text:', 'csv:x', 'embedded:x', 'tfds:', 'pairs', 'pairs:'
  )
  def test_unknown_spec(self, spec):
    with self.assertRaisesRegex(InputError, 'is not one of'):
      sources.make_source(spec)

  @parameterized.parameters(False, True)
  def test_fingerprint_changes_with_the_files(self, large):
    if large:
      self.enterContext(mock.patch.object(files, '_MAX_HASHED_BYTES', 0))
    path = self.write('a.txt', 'one')
    make = lambda: sources.make_source(
      f'text:{self.folder}/*.txt'
    ).fingerprint()
    before = make()
    self.assertEqual(make(), before)
    stat = os.stat(path)
    time.sleep(0.02)  # the clock that stamps files ticks in milliseconds
    self.write('a.txt', 'two')  # the same size and, below, the same time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = make()
    self.assertNotEqual(changed, before)
    self.write('b.txt', 'more')
    self.assertNotEqual(make(), changed)


if __name__ == '__main__':
  absltest.main()
