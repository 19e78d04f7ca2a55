"""Tests of nanodlm.data.sources."""

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import shutil
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from nanodlm.data import sources
from nanodlm.types import InputError

SHARED = os.path.join(
  os.path.dirname(__file__), '..', '..', '..', 'shared', 'data'
)


def texts(source, split='train'):
  return [
    ''.join(document.open()) for document in sources.documents(source, split)
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
    self.assertEqual(source.splits, ('train',))

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
    text = line * (3 * sources.PIECE_CHARS // len(line))
    self.write('a.txt', text)
    self.write('b.txt', 'x' * (9 * sources.PIECE_CHARS))  # nowhere to cut
    one, two = sources.documents(
      sources.make_source(f'text:{self.folder}/*'), 'train'
    )
    pieces = list(one.open())
    self.assertEqual(''.join(pieces), text)
    self.assertLen(pieces, 3)
    for left, right in zip(pieces[:-1], pieces[1:]):
      self.assertRegex(left[-2:], r'\S\n')
      self.assertRegex(right[0], r'\w')
    pieces = list(two.open())
    self.assertEqual(sum(map(len, pieces)), 9 * sources.PIECE_CHARS)
    self.assertLessEqual(max(map(len, pieces)), 5 * sources.PIECE_CHARS)
    in_memory = sources.document_of('x', text)
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
    with mock.patch.object(sources, 'PIECE_CHARS', 1000):
      pieces = list(sources.document_of('x', text).open())
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
    (b'{"text": "ok"}\n["text"]\n', r'a\.jsonl:2 has no text in field'),
    (b'{"body": "ok"}\n', r"a\.jsonl:1 has no text in field 'text'.*body"),
    (b'{"text": 3}\n', r'a\.jsonl:1 has no text'),
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
      for document in sources.documents(sources.make_source(spec), 'train')
    ]
    default = [['p', 'r\n'], ['é', ' ']]
    self.assertEqual(pairs(f'pairs:{self.folder}/x.jsonl'), default)
    self.assertEqual(pairs(f'pairs:{self.folder}/*'), default * 2)
    self.assertEqual(
      pairs(f'pairs:{self.folder}/x.jsonl:q:a'), [['q1', 'a1'], ['q2', 'a2']]
    )
    document = next(
      sources.documents(
        sources.make_source(f'pairs:{self.folder}/x.jsonl'), 'train'
      )
    )
    self.assertEqual(list(document.open()), list(document.open()))
    self.assertEndsWith(str(document.name), 'x.jsonl:1')
    os.rename(f'{self.folder}/x.jsonl', f'{self.folder}/x:q:a')  # a file's name
    self.assertEqual(pairs(f'pairs:{self.folder}/x:q:a'), default)

  @parameterized.parameters(
    (
      b'{"prompt": "p", "response": "r"}\n{"prompt": \n',
      r'a\.jsonl:2 is not a JSON object',
    ),
    (b'"prompt"\n', r'a\.jsonl:1 has no text in field'),
    (
      b'{"prompt": "p"}\n',
      r"a\.jsonl:1 has no text in field 'response'; it has \['prompt'\]\. "
      "Name the fields as 'pairs:GLOB:PROMPT_FIELD:RESPONSE_F",
    ),
    (b'{"response": "r"}\n', r"a\.jsonl:1 has no text in field 'prompt'"),
    (b'{"prompt": ["p"], "response": "r"}\n', r"no text in field 'prompt'"),
    (b'{"prompt": "p", "response": 3}\n', r"no text in field 'response'"),
    (
      b'{"prompt": "", "response": "r"}\n',
      r"a\.jsonl:1 has an empty text in field 'prompt'",
    ),
    (
      b'{"prompt": "p", "response": ""}\n',
      r"a\.jsonl:1 has an empty text in field 'response'.*at least one char",
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
    self.write('a.txt', b'fine\n' + b'x' * sources.PIECE_CHARS + b'\0rest')
    with self.assertRaisesRegex(
      InputError, f'a.txt holds NUL bytes .*byte {sources.PIECE_CHARS + 5}'
    ):
      texts(sources.make_source(f'text:{self.folder}/*'))

  @parameterized.parameters(
    (b'caf\xe9\n', 3),
    (b'\xef\xbb\xbfcaf\xe9\n', 6),
    (b'cut\xc3', 3),
    # A character that spans two blocks, and then a bad byte.
    (
      b'x' * (sources.PIECE_CHARS - 1) + 'é'.encode() + b'abc\xff',
      sources.PIECE_CHARS + 4,
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
      self.enterContext(mock.patch.object(sources, '_MAX_HASHED_BYTES', 0))
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


class EmbeddedTest(absltest.TestCase):
  def test_two_megabytes_of_english_in_order(self):
    source = sources.make_source('embedded')
    start = time.monotonic()
    documents = texts(source)
    self.assertLess(time.monotonic() - start, 30)  # 4 s on an idle core
    self.assertEqual(documents, texts(source))
    text = ''.join(documents)
    self.assertGreater(len(text), 1_900_000)
    self.assertGreater(len(documents), 300)
    ascii_share = sum(c.isascii() for c in text) / len(text)
    self.assertGreater(ascii_share, 0.999)
    self.assertGreater(text.count(' the '), 10_000)
    self.assertEqual(
      source.fingerprint(), sources.make_source('embedded').fingerprint()
    )
    names = [document.name for document in sources.documents(source, 'train')]
    self.assertFalse([name for name in names if 'test' in name.split('/')])


class TfdsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    import tensorflow_datasets as tfds

    self.enterContext(
      mock.patch.object(tfds.core.constants, 'DATA_DIR', self.folder)
    )

  def test_unknown_dataset_names_close_ones(self):
    with self.assertRaisesRegex(
      InputError, "close names: .*'tiny_shakespeare'"
    ):
      sources.make_source('tfds:tiny_shakespear')
    with self.assertRaisesRegex(InputError, 'nosuch'):
      sources.make_source('tfds:wikipedia/nosuch')

  def test_features(self):
    self.assertEqual(sources.make_source('tfds:pg19').feature, 'book_text')
    self.assertEqual(sources.make_source('tfds:c4:url').feature, 'url')
    with self.assertRaisesRegex(InputError, r"one of \['text', 'title'\]"):
      sources.make_source('tfds:wikipedia/20230601.en:body')

  def test_no_network(self):
    source = sources.make_source('tfds:tiny_shakespeare')
    with mock.patch.object(sources, 'is_reachable', return_value=False):
      with self.assertRaisesRegex(InputError, 'tiny_shakespeare/1.0.0'):
        source.splits  # pylint: disable=pointless-statement
    self.assertEmpty(os.listdir(self.folder))

  def test_tiny_shakespeare_from_a_copied_file(self):
    if not os.path.isdir(SHARED):
      self.skipTest('no shared data')
    if not importlib.util.find_spec('tensorflow'):
      self.skipTest('TFDS prepares this dataset with tensorflow')
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import resource

    builder = tfds.builder('tiny_shakespeare', data_dir=self.folder)
    downloads = os.path.join(self.folder, 'downloads', 'tiny_shakespeare')
    os.makedirs(downloads)
    original = os.path.join(SHARED, 'tinyshakespeare.txt')
    for url, info in builder.url_infos.items():
      path = os.path.join(downloads, resource.get_dl_fname(url, info.checksum))
      shutil.copyfile(original, path)
      with open(path + '.INFO', 'w') as file:
        json.dump(
          {
            'original_fname': info.filename,
            'urls': [url],
            'dataset_names': ['tiny_shakespeare'],
            'url_info': {
              'size': int(info.size),
              'checksum': info.checksum,
              'filename': info.filename,
            },
          },
          file,
        )
    source = sources.make_source('tfds:tiny_shakespeare', self.folder)
    with mock.patch.object(sources, 'is_reachable', return_value=False):
      self.assertEqual(source.splits, ('train', 'validation'))
    (train,) = texts(source)
    (validation,) = texts(source, 'validation')
    with open(original) as file:
      text = file.read()
    self.assertEqual(train, text[: len(train)])
    self.assertEqual(
      validation, text[len(train) : len(train) + len(validation)]
    )
    self.assertGreater(len(validation), 50_000)


if __name__ == '__main__':
  absltest.main()
