"""Tests of text, JSONL and pairs in files."""

import bz2
import contextlib
import functools
import gzip
import importlib.util
import json
import logging
import lzma
import os
import random
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized
import pyarrow as pa
import pyarrow.parquet as pq

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

  def compress(self, suffix, data):
    if suffix == '.zst':
      if not importlib.util.find_spec('zstandard'):
        self.skipTest('no zstandard')
      import zstandard

      return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return {
      '.gz': gzip.compress,
      '.bz2': bz2.compress,
      '.xz': lzma.compress,
      '.GZ': gzip.compress,
    }[suffix](data)

  def read_error(self, spec):
    with self.assertRaises(InputError) as caught:
      texts(sources.make_source(spec))
    return str(caught.exception)

  @parameterized.parameters('.gz', '.bz2', '.xz', '.zst', '.GZ')
  def test_compressed(self, suffix):
    compress = functools.partial(self.compress, suffix)
    self.write('a.txt' + suffix, compress('zipped é'.encode()))
    record = b'{"text": "%d", "prompt": "p%d", "response": "r"}\n'
    lines = [record % (i, i) for i in range(5000)]
    # Two streams, as pbzip2, pzstd and cat write them; a line spans both.
    half = b''.join(lines)[:100_003]
    data = compress(half) + compress(b''.join(lines)[len(half) :])
    self.write('a.jsonl' + suffix, data)
    self.assertEqual(
      texts(sources.make_source(f'text:{self.folder}/a.txt*')), ['zipped é']
    )
    path = f'{self.folder}/a.jsonl{suffix}'
    numbers = [str(i) for i in range(5000)]
    self.assertEqual(texts(sources.make_source(f'jsonl:{path}')), numbers)
    self.assertEqual(
      texts(sources.make_source(f'pairs:{path}')),
      [f'p{number}r' for number in numbers],
    )

  @parameterized.parameters('.gz', '.bz2', '.xz', '.zst')
  def test_damaged_or_truncated_compressed_file(self, suffix):
    text = random.Random(0).randbytes(60_000).hex().encode()
    one = self.compress(suffix, text)
    two = one + one
    ends = [0, 1, 3, len(one) // 2, len(one) - 1, len(one) + 3, len(two) - 1]
    self.write('whole.txt', 'whole')  # An empty file among others is none.
    name = 'a.txt' + suffix
    for data in (
      *(two[:end] for end in ends),
      b'not compressed at all',
      one + b'not compressed',
      one[:9999] + bytes(len(one) - 9999),  # The disk was full.
      one[:9999] + b'?' + one[10_000:],
    ):
      with self.subTest(len(data)):
        self.write(name, data)
        error = self.read_error(f'text:{self.folder}/*.txt*')
        self.assertRegex(error, rf'data.source=.*{name} cannot be read: \w')
    self.write(name, one)
    self.assertEqual(
      texts(sources.make_source(f'text:{self.folder}/a*')), [text.decode()]
    )

  def test_padding_and_frames_to_be_skipped(self):
    self.write('a.gz', gzip.compress(b'a') + bytes(600))
    self.write('b.xz', lzma.compress(b'b') + bytes(8) + lzma.compress(b'c'))
    expected = ['a', 'bc']
    if importlib.util.find_spec('zstandard'):
      import zstandard

      # As `zstd --long=31` writes it, after a frame with pzstd's own data.
      parameters = zstandard.ZstdCompressionParameters(
        window_log=30, hash_log=6, chain_log=6
      )
      stream = zstandard.ZstdCompressor(
        compression_params=parameters
      ).compressobj()
      frame = stream.compress(b'dense') + stream.flush()
      skipped = b'\x50\x2a\x4d\x18' + b'\4\0\0\0' + b'1234'
      self.write('c.zst', skipped + frame)
      expected.append('dense')
    self.assertEqual(
      texts(sources.make_source(f'text:{self.folder}/*')), expected
    )

  def test_zstandard_is_an_extra(self):
    self.write('a.zst', b'x')
    with mock.patch.dict(sys.modules, {'zstandard': None}):
      for kind in ('text', 'jsonl'):
        error = self.read_error(f'{kind}:{self.folder}/*')
        self.assertIn("install -e '.[zstd]'", error)

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
    for other in ('\n', '\r\n', '\n- ', ' '):
      changed = text.replace('\n', other)
      with mock.patch.object(base, 'PIECE_CHARS', 500):
        pieces = list(base.document_of(changed).open())
      self.assertGreater(len(pieces), 8)
      self.assertEqual(
        sum(map(encoding.encode_ordinary, pieces), []),
        encoding.encode_ordinary(changed),
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
    'my-text', 'meta.text', 'the text', 'dc:title', 'a/b', '*', 'é', '1'
  )
  def test_fields_of_any_name(self, field):
    record = {field: 'right', 'a': 'prompt', 'text': 'wrong'}
    self.write('x.jsonl', json.dumps(record))
    for name in ('x.jsonl', '*.jsonl'):
      source = sources.make_source(f'jsonl:{self.folder}/{name}:{field}')
      self.assertEqual(texts(source), ['right'])
    table = pa.table({'text': ['wrong'], field: ['right']})
    pq.write_table(table, f'{self.folder}/x.parquet')
    source = sources.make_source(f'parquet:{self.folder}/x.parquet:{field}')
    self.assertEqual(texts(source), ['right'])
    if ':' not in field:
      source = sources.make_source(f'pairs:{self.folder}/*.jsonl:a:{field}')
      self.assertEqual(texts(source), ['promptright'])

  @parameterized.parameters(
    ('jsonl', ':'), ('pairs', ':a'), ('pairs', ':a:'), ('pairs', ':a:b:c'),
    ('text', ':a'), ('parquet', ':'),
  )  # fmt: skip
  def test_wrong_number_of_fields(self, kind, fields):
    path = self.write('x.jsonl', '{"text": "a"}')
    error = self.read_error(f'{kind}:{path}{fields}')
    self.assertIn(repr(fields), error)
    self.assertIn(repr(sources.SOURCES[kind].forms[-1]), error)

  def test_a_name_that_is_also_a_glob(self):
    self.write('A book [1].txt', 'a')
    source = sources.make_source(f'text:{self.folder}/A book [1].txt')
    self.assertEqual(texts(source), ['a'])

  def test_links(self):
    self.write('data/a.txt', 'a')
    self.write('data/deep/b.txt', 'b')
    self.write('elsewhere/c.txt', 'c')
    self.write('elsewhere/.hidden/d.txt', 'd')
    link = lambda target, name: os.symlink(target, f'{self.folder}/data/{name}')
    link('.', 'loop')  # Two loops: 2 ** 40 paths, if they were followed.
    link('..', 'deep/loop')
    link('../..', 'deep/up')  # Contains the folder of the glob.
    link('self', 'self')
    link('deep', 'again')  # Sorted before the folder that it leads to.
    link('a.txt', 'the same.txt')
    link(f'{self.folder}/elsewhere', 'linked')
    for glob in ('**/*.txt', '**', '**/*', '**/**/*.txt'):
      source = sources.make_source(f'text:{self.folder}/data/{glob}')
      names = [os.path.relpath(path, self.folder) for path in source.paths]
      self.assertEqual(
        names, ['data/a.txt', 'data/deep/b.txt', 'data/linked/c.txt']
      )
      self.assertEqual(texts(source), ['a', 'b', 'c'])
    for glob in ('data/*/b.txt', 'data/**/deep/*.txt', '*/again/b.txt'):
      source = sources.make_source(f'text:{self.folder}/{glob}')
      self.assertEqual(texts(source), ['b'])
    with (
      mock.patch.object(os, 'listdir', side_effect=PermissionError(13, 'shut')),
      self.assertLogs('nanodlm', logging.WARNING) as logs,
    ):
      source = sources.make_source(f'text:{self.folder}/data/**/*.txt')
    self.assertIn(f'{self.folder}/data/ is left out: shut', logs.output[0])
    with contextlib.chdir(f'{self.folder}/data'):
      source = sources.make_source('text:**/*.txt')
      self.assertEqual(source.paths, ('a.txt', 'deep/b.txt', 'linked/c.txt'))
    self.write('around/e.txt', 'e')
    self.write('around/in/f.txt', 'f')
    self.write('around/in/g.txt', 'g')
    os.makedirs(f'{self.folder}/links')
    for name, target in (('1', 'around/in'), ('2', 'around')):
      os.symlink(f'../{target}', f'{self.folder}/links/{name}')
    source = sources.make_source(f'text:{self.folder}/links/*/**/*.txt')
    self.assertEqual(texts(source), ['f', 'g', 'e'])
    link('gone', 'lost.txt')
    error = self.read_error(f'text:{self.folder}/**/*.txt')
    self.assertRegex(error, r'data/lost\.txt is a link to .*data/gone')

  @parameterized.parameters(
    'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'cp1251', 'gb18030'
  )
  def test_other_encodings(self, encoding):
    text = 'Все счастливые семьи, all of them.\n'
    data = (text * 99).encode(encoding)
    name = encoding.replace('16-', '16')
    expected = f'iconv -f {name} -t utf-8'
    if not encoding.startswith('utf'):
      expected = 'iconv -f latin1 -t utf-8'
    self.write('a.txt', data)
    self.assertIn(expected, self.read_error(f'text:{self.folder}/a.txt'))
    record = json.dumps({'text': text}, ensure_ascii=False) + '\n'
    self.write('a.jsonl', record.encode(encoding))
    for kind in ('jsonl', 'pairs'):
      error = self.read_error(f'{kind}:{self.folder}/a.jsonl')
      self.assertIn(expected, error)
      self.assertIn('a.jsonl:1 ', error)

  @parameterized.parameters('.gz', '.bz2', '.xz', '.zst')
  def test_compressed_without_the_suffix(self, suffix):
    self.write('a.txt', self.compress(suffix, random.Random(0).randbytes(999)))
    error = self.read_error(f'text:{self.folder}/a.txt')
    self.assertIn(f'let its name end in {suffix}', error)

  @parameterized.parameters(
    (b'{"text": "ok"}\n{"text": null}\n', r'a\.jsonl:2 .* holds null;'),
    (b'{"text": ["a"]}\n', r'a\.jsonl:1 .* holds \["a"\];'),
    (b'{"text": "ok"}\n{"text": \n', r'a\.jsonl:2 is not a JSON object'),
    (
      b'{"text": "ok"}\n{"text": "", "id": ' + b'1' * 5000 + b'}\n',
      r'a\.jsonl:2 is not a JSON object: Exceeds the limit',
    ),
    (b'{"text": "ok"}\n' + b'[' * 100_000, r'a\.jsonl:2 is not a JSON object'),
    (b'{"text": "ok"}\n["text"]\n', r'a\.jsonl:2 is not a JSON object.*list'),
    (b'{"body": "ok"}\n', r"a\.jsonl:1 must have a text in field 'text'.*body"),
    (b'{"text": 3}\n', r'a\.jsonl:1 must have a text'),
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
    self.assertEqual(
      pairs(f'preferences:{self.folder}/x.jsonl:q:a:response'),
      [['q1', 'a1'], ['q1', 'r\n'], ['q2', 'a2'], ['q2', ' ']],
    )
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
      r"a\.jsonl:1 must have a text in field 'response'; its fields are "
      r"\['prompt'\]\. Name the fields as in 'pairs:GLOB:PROMPT_FIELD",
    ),
    (b'{"response": "r"}\n', r"a\.jsonl:1 must have a text in field 'prompt'"),
    (
      b'{"prompt": ["p"], "response": "r"}\n',
      r"must have a text in field 'prompt'",
    ),
    (
      b'{"prompt": "p", "response": 3}\n',
      r"must have a text in field 'response'",
    ),
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
