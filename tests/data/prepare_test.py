"""Tests of nanodlm.data.prepare: what is packed, when, and what a crash leaves."""

import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm.data import encoder, prepare, sources, tokenizers
from nanodlm.types import InputError
from tests import workdirs

REPO = pathlib.Path(__file__).resolve().parents[2]
SHAKESPEARE = REPO.parent / 'shared' / 'data' / 'tinyshakespeare.txt'

BYTES = types.SimpleNamespace(name='bytes', path='', vocab_size=0)
SENTENCEPIECE = types.SimpleNamespace(
  name='sentencepiece', path='', vocab_size=300
)

# A program that prepares what its arguments say, in a process of its own.
PROGRAM = """
import json, sys, time, types
if {no_tensorflow}:
  import importlib.machinery
  finder = importlib.machinery.PathFinder
  find = finder.find_spec
  finder.find_spec = lambda name, path=None, target=None: (
      None if name.split('.')[0] == 'tensorflow' else find(name, path, target))
from nanodlm import config
from nanodlm.data import prepare
from nanodlm.data import pipeline
def progress(*counts):
  if counts[1]:
    print('working', flush=True)
    time.sleep({sleep})
builder._PROGRESS_SECS = 0
data = config.DataConfig(
    source={source!r}, length=16, eval_fraction=0.1, eval_tokens=0,
    test_tokens=0, data_dir={data_dir!r},
    crop='random', segment_ids=True, padding='eos', clean_prefix_rate=0.0,
    clean_infill_rate=0.0, num_threads=1, prefetch_batches=1)
tokenizer = types.SimpleNamespace(name='bytes', path='', vocab_size=0)
packed = builder.prepare(data, tokenizer, progress)
batch = next(pipeline.make_train_iterator(packed, data, seed=0, batch_size=2))
assert batch['tokens'].shape == (2, 16)
assert len(list(pipeline.make_eval_batches(packed, data, batch_size=2)))
assert 'tensorflow' not in sys.modules
print('rows', len(packed.train), flush=True)
"""


def stream(rows):
  return np.concatenate([rows[i]['tokens'] for i in range(len(rows))])


class BuilderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.data_dir = os.path.join(self.folder, 'prepared')

  def write(self, name, text):
    path = os.path.join(self.folder, name)
    with open(path, 'w', encoding='utf-8', newline='') as file:
      file.write(text)
    return path

  def write_documents(self, number=40, size=50):
    for i in range(number):
      self.write(f'{i:04d}.txt', f'<{i:04d}>' + chr(97 + i % 26) * size)

  def config(self, source=None, **changes):
    values = dict(
      source=source or f'text:{self.folder}/*.txt', data_dir=self.data_dir
    )
    return workdirs.DataConfig(**{**values, **changes})

  def prepare(self, source=None, tokenizer=BYTES, **changes):
    return prepare.prepare(self.config(source, **changes), tokenizer)

  def run_program(self, no_tensorflow=False, sleep=0, **popen):
    program = PROGRAM.format(
      no_tensorflow=no_tensorflow,
      sleep=sleep,
      data_dir=self.data_dir,
      source=f'text:{self.folder}/*.txt',
    )
    return subprocess.Popen(
      [sys.executable, '-c', program],
      cwd=REPO,
      stdout=subprocess.PIPE,
      text=True,
      **popen,
    )

  def left_in_data_dir(self):
    return sorted(os.listdir(self.data_dir))

  # ------------------------------------------------------------- packing

  def test_documents_are_joined_by_separators_and_cut(self):
    self.write_documents()
    packed = self.prepare()
    self.assertEqual(packed.length, 16)
    seen = []
    for split in prepare.SPLITS:
      rows, counts = getattr(packed, split), packed.metadata[split]
      tokens = stream(rows)
      self.assertEqual(rows[0]['tokens'].dtype, np.int32)
      for i in range(len(rows)):
        self.assertEqual(
          rows[i]['num_bytes'],
          packed.tokenizer.num_bytes[rows[i]['tokens']].sum(),
        )
      self.assertEqual(counts['num_rows'], len(rows))
      self.assertEqual(counts['num_tokens'], tokens.size)
      self.assertEqual(counts['num_bytes'], (tokens < 256).sum())
      # 56 bytes and a separator per document, and nothing else.
      self.assertEqual(
        counts['num_documents'] * 57, tokens.size + counts['num_dropped_tokens']
      )
      self.assertLess(counts['num_dropped_tokens'], 16)
      np.testing.assert_array_equal(
        np.flatnonzero(tokens == packed.tokenizer.separator_id),
        np.arange(56, tokens.size, 57),
      )
      numbers = [
        int(packed.tokenizer.decode(tokens[i + 1 : i + 5]))
        for i in range(0, tokens.size - 5, 57)
      ]
      self.assertEqual(numbers, sorted(numbers))  # in the order of the source
      seen.extend(numbers)
    self.assertEqual(sorted(seen), list(range(40)))  # no document in both
    self.assertEqual(packed.metadata['validation']['num_documents'], 4)
    self.assertEqual(packed.metadata['tokenizer'], packed.tokenizer.to_json())

  def test_copies_of_a_document_stay_on_one_side(self):
    for i in range(60):
      self.write(f'{i:04d}.txt', f'text number {i % 10} ' * 5)
    packed = self.prepare(eval_fraction=0.2)
    found = {}
    for split in prepare.SPLITS:
      tokens = stream(getattr(packed, split))
      found[split] = {
        packed.tokenizer.decode(part)
        for part in np.split(tokens, np.flatnonzero(tokens == 256) + 1)[1:-1]
      }
    self.assertLen(found['validation'], 2)
    self.assertEmpty(found['train'] & found['validation'])
    self.assertEqual(packed.metadata['validation']['num_documents'], 12)

  @parameterized.parameters(0.01, 0.1, 0.5, 0.9)
  def test_share_of_the_bytes_is_as_asked(self, eval_fraction):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 1000, 3000)
    hashes = rng.integers(0, 1 << 63, 3000, np.uint64)
    chosen = prepare._choose(hashes, sizes, eval_fraction)
    self.assertAlmostEqual(
      sizes[chosen].sum() / sizes.sum(), eval_fraction, delta=1e-3
    )
    # Which documents are chosen does not follow their order.
    self.assertGreater(
      np.abs(np.diff(chosen.astype(int))).sum(),
      3000 * eval_fraction * (1 - eval_fraction),
    )

  @parameterized.parameters((1, 1, 0.1), (1, 1000, 0.1), (1000, 1, 0.9))
  def test_two_documents_are_one_for_each_side(self, a, b, eval_fraction):
    for hashes in ([1, 2], [2, 1]):
      chosen = prepare._choose(
        np.array(hashes, np.uint64), np.array([a, b]), eval_fraction
      )
      self.assertEqual(chosen.sum(), 1)

  def test_uneven_split_is_logged(self):
    self.write('a.txt', 'a' * 500)
    self.write('b.txt', 'b' * 500)
    with self.assertLogs('nanodlm', logging.WARNING) as logs:
      self.prepare()
    self.assertIn('validation has 0.5 of the bytes', logs.output[0])

  def test_counts_of_one_are_in_the_singular(self):
    self.write('a.txt', 'one text\n' * 50)
    with self.assertLogs('nanodlm', logging.INFO) as logs:
      self.prepare()
    self.assertRegex(logs.output[-1], 'in 1 document$')

  def test_one_document_is_cut_near_its_end_at_a_character(self):
    text = 'aé漢😀' * 100
    self.write('a.txt', text)
    self.write('empty.txt', '')
    packed = self.prepare(length=1, eval_fraction=0.1)
    train = packed.tokenizer.decode(stream(packed.train)[:-1])
    validation = packed.tokenizer.decode(stream(packed.validation)[:-1])
    self.assertEqual((train, validation), (text[:360], text[360:]))

  def test_pieces_of_a_long_document(self):
    text = ''.join(f'line {i}\n' for i in range(2000))
    self.write('a.txt', text)
    with (
      mock.patch.object(sources, 'PIECE_CHARS', 1000),
      mock.patch.object(encoder, 'BATCH_CHARS', 3000),
      mock.patch.object(prepare, '_SHARD_ROWS', 500),
    ):
      packed = self.prepare(length=8)
    tokens = np.concatenate([stream(packed.train), stream(packed.validation)])
    cut = int(len(text) * (1 - 0.1))
    expected = np.concatenate(
      [
        np.frombuffer(part.encode() + b'?', np.uint8)[
          : (len(part) + 1) // 8 * 8
        ]
        for part in (text[:cut], text[cut:])
      ]
    ).astype(np.int32)
    expected = np.where(expected == ord('?'), 256, expected)
    np.testing.assert_array_equal(tokens, expected)
    shards = list(pathlib.Path(packed.folders[0]).rglob('*train.array_record*'))
    self.assertGreater(len(shards), 3)

  def test_nanogpts_split_of_tiny_shakespeare(self):
    if not SHAKESPEARE.exists():
      self.skipTest('no shared data')
    packed = self.prepare(f'text:{SHAKESPEARE}', length=256)
    text = SHAKESPEARE.read_bytes()
    counts = packed.metadata
    self.assertEqual(
      counts['train']['num_tokens'] + counts['train']['num_dropped_tokens'],
      1003854 + 1,
    )
    self.assertEqual(
      counts['validation']['num_tokens']
      + counts['validation']['num_dropped_tokens'],
      111540 + 1,
    )
    self.assertEqual(
      bytes(packed.validation[0]['tokens'].tolist()),
      text[1003854 : 1003854 + 256],
    )

  def test_ids_beyond_16_bits(self):
    class Wide(tokenizers.BytesTokenizer):
      def encode(self, text):
        return super().encode(text) + 100_000

    tokenizer = Wide(pieces=(b'x',) * 100_256, separator_id=100_256)
    self.write('a.txt', 'hello world, ' * 30)
    with mock.patch.object(
      tokenizers, 'make_tokenizer', return_value=tokenizer
    ):
      packed = self.prepare()
    np.testing.assert_array_equal(
      packed.train[0]['tokens'][:5], np.array(list(b'hello')) + 100_000
    )

  def test_sentencepiece_is_trained_on_the_training_text_only(self):
    self.write(
      'a.txt',
      'some words to train on, again and again\n' * 100 + '\u0416' * 400,
    )  # falls into the last tenth
    with mock.patch.object(
      tokenizers, 'train_sentencepiece', wraps=tokenizers.train_sentencepiece
    ) as train:
      packed = self.prepare(tokenizer=SENTENCEPIECE)
      again = self.prepare(tokenizer=SENTENCEPIECE)
    self.assertEqual(train.call_count, 1)
    self.assertEqual(again.folders[0], packed.folders[0])
    self.assertEqual(packed.tokenizer.vocab_size, 302)
    self.assertTrue(packed.tokenizer.path.startswith(packed.folders[0]))
    self.assertEqual(packed.metadata['tokenizer'], packed.tokenizer.to_json())
    self.assertEqual(again.tokenizer.to_json(), packed.tokenizer.to_json())
    self.assertNotIn('\u0416'.encode(), packed.tokenizer.pieces)
    self.assertStartsWith(
      packed.tokenizer.decode(stream(packed.train)),
      'some words to train on, again',
    )

  # --------------------------------------------------------------- pairs

  def write_pairs(self, pairs, name='a.jsonl'):
    return 'pairs:' + self.write(
      name,
      ''.join(
        json.dumps({'prompt': p, 'response': r}) + '\n' for p, r in pairs
      ),
    )

  def test_a_pair_is_a_row(self):
    pairs = [(f'{i}é:', 'r' * (i % 9 + 1)) for i in range(50)]
    # Small groups: a prompt and its response are then in two of them.
    with (
      mock.patch.object(encoder, 'BATCH_CHARS', 5),
      mock.patch.object(prepare, '_SHARD_ROWS', 20),
    ):
      packed = self.prepare(self.write_pairs(pairs))
    self.assertTrue(packed.is_pairs)
    seen = []
    for split in prepare.SPLITS:
      rows, counts = getattr(packed, split), packed.metadata[split]
      for row in (rows[i] for i in range(len(rows))):
        tokens, start = row['tokens'], row['prompt_length']
        end = start + row['num_bytes']  # here a byte is a token
        seen.append(
          (
            bytes(tokens[:start].tolist()).decode(),
            bytes(tokens[start:end].tolist()).decode(),
          )
        )
        np.testing.assert_array_equal(tokens[end:], 256)
        self.assertLess(end, 16)
      self.assertEqual(counts['num_documents'], len(rows))
      self.assertEqual(counts['num_dropped_documents'], 0)
      self.assertEqual(
        counts['num_bytes'], sum(rows[i]['num_bytes'] for i in range(len(rows)))
      )
    self.assertCountEqual(seen, pairs)  # each in one split
    self.assertBetween(len(packed.validation), 3, 8)

  def test_copies_of_a_pair_stay_on_one_side(self):
    packed = self.prepare(
      self.write_pairs([(f'{i % 10}', 'answer') for i in range(60)]),
      eval_fraction=0.2,
    )
    found = [
      {packed.tokenizer.decode(rows[i]['tokens']) for i in range(len(rows))}
      for rows in (packed.train, packed.validation)
    ]
    self.assertEqual([len(texts) for texts in found], [8, 2])
    self.assertEmpty(found[0] & found[1])

  def test_pairs_that_do_not_fit_are_left_out_and_counted(self):
    # 16 tokens are 5 of the prompt, 10 of the response and a separator.
    pairs = [(f'p{i:04d}', 'r' * (10 if i % 2 else 11)) for i in range(40)]
    with self.assertLogs('nanodlm', logging.WARNING) as logs:
      packed = self.prepare(self.write_pairs(pairs))
    counts = [packed.metadata[split] for split in prepare.SPLITS]
    self.assertEqual(sum(c['num_rows'] for c in counts), 20)
    self.assertEqual(sum(c['num_dropped_documents'] for c in counts), 20)
    self.assertRegex(logs.output[0], r'left out \d+ of \d+ pairs of train.*17')
    for rows in (packed.train, packed.validation):
      for i in range(len(rows)):
        np.testing.assert_array_equal(rows[i]['tokens'][-2:], [ord('r'), 256])

  def test_errors_of_pairs(self):
    long = self.write_pairs([(f'{i}', 'r' * (20 + i)) for i in range(9)])
    with self.assertRaisesRegex(
      InputError,
      'data.length=16 is too short for all .* pairs of .*'
      r'at least 2\d tokens',
    ):
      self.prepare(long)
    with self.assertRaisesRegex(InputError, 'holds one pair only'):
      self.prepare(self.write_pairs([('p', 'r')]))
    with self.assertRaisesRegex(InputError, 'all the same text'):
      self.prepare(self.write_pairs([('p', 'r')] * 3))
    with self.assertRaisesRegex(InputError, 'holds no text'):
      self.prepare('pairs:' + self.write('b.jsonl', '\n\n'))
    self.assertEmpty(self.left_in_data_dir())

  def test_sentencepiece_of_pairs(self):
    # Encoded apart: no piece spans a prompt's end and a response's beginning.
    packed = self.prepare(
      self.write_pairs([(f'question {i} ', f'answer {i}') for i in range(99)]),
      SENTENCEPIECE,
      length=32,
    )
    tokenizer = packed.tokenizer
    for i in range(5):
      row = packed.train[i]
      prompt = tokenizer.decode(row['tokens'][: row['prompt_length']])
      self.assertRegex(prompt, r'^question \d+ $')
      np.testing.assert_array_equal(
        tokenizer.encode(prompt), row['tokens'][: row['prompt_length']]
      )
      self.assertEqual(
        row['num_bytes'], len(prompt) - len('question') + len('answer') - 1
      )

  # ------------------------------------------------------ key and reuse

  def test_opened_again_without_work(self):
    self.write_documents()
    first = self.prepare()
    with mock.patch.object(prepare, '_build', side_effect=AssertionError):
      again = self.prepare()
    self.assertEqual(again.folders[0], first.folders[0])
    np.testing.assert_array_equal(stream(again.train), stream(first.train))
    self.assertEqual(
      self.left_in_data_dir(), [os.path.basename(first.folders[0])]
    )

  def test_anything_that_matters_makes_another_dataset(self):
    self.write_documents()
    paths = [self.prepare().folders[0]]
    paths.append(self.prepare(length=17).folders[0])
    paths.append(self.prepare(eval_fraction=0.2).folders[0])
    paths.append(self.prepare(tokenizer=SENTENCEPIECE).folders[0])
    paths.append(
      self.prepare(
        tokenizer=types.SimpleNamespace(
          name='sentencepiece', path='', vocab_size=301
        )
      ).folders[0]
    )
    self.write('0000.txt', 'another text of whatever length')
    paths.append(self.prepare().folders[0])
    self.write('9999.txt', 'one more')
    paths.append(self.prepare().folders[0])
    os.remove(os.path.join(self.folder, '9999.txt'))
    self.assertLen(set(paths), len(paths))
    self.assertIn(self.prepare().folders[0], paths)

  def test_environment_says_where(self):
    self.write_documents()
    with mock.patch.dict(os.environ, NANODLM_DATA_DIR=self.data_dir):
      packed = self.prepare(data_dir='')
    self.assertEqual(os.path.dirname(packed.folders[0]), self.data_dir)

  def test_without_tensorflow(self):
    self.write_documents()
    process = self.run_program(no_tensorflow=True)
    output, _ = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 0)
    self.assertIn('rows 128', output)

  # ------------------------------------------- interruption and company

  def test_killed_preparation_leaves_nothing_that_looks_finished(self):
    self.write_documents()
    process = self.run_program(sleep=600)
    self.assertEqual(process.stdout.readline(), 'working\n')
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = self.left_in_data_dir()
    self.assertTrue(any('.incomplete-' in name for name in left), left)
    packed = self.prepare()
    self.assertLen(packed.train, 128)
    self.assertEqual(
      self.left_in_data_dir(), [os.path.basename(packed.folders[0])]
    )

  def test_leftovers_of_another_dataset_and_another_machine(self):
    self.write_documents()
    process = self.run_program(sleep=600)
    self.assertEqual(process.stdout.readline(), 'working\n')
    other = os.path.join(self.data_dir, 'text-x.incomplete-otherhost-abc')
    stale = os.path.join(self.data_dir, 'text-y.incomplete-otherhost-abc')
    os.mkdir(other)
    os.mkdir(stale)
    os.utime(stale, (time.time() - 1e6,) * 2)
    packed = self.prepare(length=8)  # beside the process that still works
    left = self.left_in_data_dir()
    process.kill()
    process.wait()
    process.stdout.close()
    self.assertLen([name for name in left if '.incomplete-' in name], 2, left)
    self.assertIn(os.path.basename(other), left)
    self.assertNotIn(os.path.basename(stale), left)
    # Now it is dead. Somebody may go on with it, but not after a day.
    mine = next(pathlib.Path(self.data_dir).glob('*.incomplete-*-work'))
    seven = self.prepare(length=7)
    self.assertTrue(mine.exists())
    for path in (mine, *mine.rglob('*')):
      os.utime(path, (time.time() - 1e6,) * 2)
    nine = self.prepare(length=9)
    self.assertSameElements(
      [name for name in self.left_in_data_dir() if name[0] != '.'],
      [
        os.path.basename(path)
        for path in (
          packed.folders[0],
          seven.folders[0],
          nine.folders[0],
          other,
        )
      ],
    )

  @parameterized.parameters(False, True)
  def test_age_decides_where_nothing_can_be_locked(self, is_old):
    self.write_documents()
    path = self.prepare().folders[0]
    os.rename(path, path + f'.incomplete-{socket.gethostname()}-1')
    (theirs,) = pathlib.Path(self.data_dir).iterdir()
    if is_old:
      for file in (theirs, *theirs.rglob('*')):
        os.utime(file, (time.time() - 1e6,) * 2)
    with mock.patch.object(prepare.fcntl, 'flock', side_effect=OSError(95, '')):
      self.assertEqual(self.prepare().folders[0], path)
    self.assertEqual(theirs.exists(), not is_old)

  @parameterized.parameters(False, True)
  def test_leftover_that_changes_while_it_is_looked_at(self, all_gone):
    self.write_documents()
    theirs = pathlib.Path(self.data_dir) / 'text-x.incomplete-otherhost-work'
    theirs.mkdir(parents=True)
    for name in ('part-0.partial-1', 'part-1.tokens'):
      (theirs / name).write_text('')
      os.utime(theirs / name, (time.time() - 1e6,) * 2)
    os.utime(theirs, (time.time() - 1e6,) * 2)
    stat = os.stat

    def gone(path, *args, **kwargs):
      if 'partial' in str(path) or all_gone and theirs.name in str(path):
        raise FileNotFoundError(2, 'gone')
      return stat(path, *args, **kwargs)

    with mock.patch.object(os, 'stat', gone):
      self.prepare()
    self.assertEqual(theirs.exists(), all_gone)

  def test_two_processes_at_once(self):
    self.write_documents()
    processes = [self.run_program(sleep=0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    self.assertEqual([process.returncode for process in processes], [0, 0])
    self.assertTrue(all('rows 128' in output for output in outputs), outputs)
    # One of them worked, the other waited.
    self.assertEqual(sum('working' in output for output in outputs), 1)
    self.assertLen(self.left_in_data_dir(), 1)

  def test_another_machine_finishes_first(self):
    self.write_documents()
    finish = prepare._publish

    def late(work, path):
      os.mkdir(path)
      with (
        mock.patch.object(prepare, '_publish', finish),
        mock.patch.object(prepare, '_remove_leftovers'),
      ):
        os.rmdir(path)
        theirs = tempfile.mkdtemp(dir=self.folder)
        subprocess.run(['cp', '-r', f'{work}/.', theirs], check=True)
        os.rename(theirs, path)
      finish(work, path)

    with mock.patch.object(prepare, '_publish', late):
      packed = self.prepare()
    self.assertLen(packed.train, 128)
    self.assertEqual(
      self.left_in_data_dir(), [os.path.basename(packed.folders[0])]
    )

  def test_progress_is_limited_and_counts(self):
    self.write_documents()
    calls = []
    with (
      mock.patch.object(prepare, '_PROGRESS_SECS', 0),
      mock.patch.object(sources, 'PART_BYTES', 500),
    ):
      prepare.prepare(
        self.config(), BYTES, lambda *counts: calls.append(counts)
      )
    self.assertEqual(calls[-1], (40, 40 * 57, 40 * 56, 1.0))
    self.assertGreater(len(calls), 3)
    self.assertEqual(calls, sorted(calls))
    calls.clear()
    prepare.prepare(
      self.config(length=17), BYTES, lambda *counts: calls.append(counts)
    )
    self.assertEmpty(calls)  # it took less than three seconds

  def test_prints_nothing(self):
    self.write_documents()
    process = self.run_program(stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=60)
    self.assertEqual(set(output.splitlines()), {'working', 'rows 128'})
    self.assertEmpty(errors)

  # -------------------------------------------------------------- errors

  @parameterized.parameters(0, 1, -0.1, 1.5)
  def test_eval_fraction_out_of_range(self, value):
    with self.assertRaisesRegex(InputError, f'data.eval_fraction={value}'):
      self.prepare(eval_fraction=value)

  def test_length_out_of_range(self):
    with self.assertRaisesRegex(InputError, 'data.length=0'):
      self.prepare(length=0)

  @parameterized.parameters((1000, 'validation'), (5000, 'train'))
  def test_text_shorter_than_a_row(self, length, split):
    self.write('a.txt', 'x' * 2000)
    with self.assertRaisesRegex(
      InputError,
      f'data.length={length} is longer .* tokens in {split}.*data.length<=201',
    ):
      self.prepare(length=length)
    self.assertEmpty(self.left_in_data_dir())

  def test_only_copies_of_one_text(self):
    self.write('a.txt', 'same' * 50)
    self.write('b.txt', 'same' * 50)
    with self.assertRaisesRegex(InputError, 'all the same text'):
      self.prepare()

  def test_no_text_at_all(self):
    self.write('a.jsonl', '{"text": ""}\n')
    with self.assertRaisesRegex(InputError, 'holds no text'):
      self.prepare(f'jsonl:{self.folder}/a.jsonl')

  def test_broken_source_leaves_nothing(self):
    self.write_documents()
    with open(os.path.join(self.folder, '0020.txt'), 'wb') as file:
      file.write(b'\xff')
    with self.assertRaisesRegex(InputError, '0020.txt is not UTF-8'):
      self.prepare()
    self.assertEmpty(self.left_in_data_dir())

  @parameterized.parameters('file', '/proc/nanodlm')
  def test_data_dir_that_cannot_be_written(self, data_dir):
    self.write_documents()
    data_dir = (
      os.path.join(self.write('file', 'in the way'), 'x')
      if (data_dir == 'file')
      else data_dir
    )
    with self.assertRaisesRegex(
      InputError, 'data.data_dir=.*cannot be written'
    ):
      self.prepare(data_dir=data_dir)

  def test_full_disk(self):
    self.write_documents()
    usage = types.SimpleNamespace(total=1, used=1, free=100)
    with mock.patch.object(prepare.shutil, 'disk_usage', return_value=usage):
      with self.assertRaisesRegex(InputError, 'the disk is full'):
        self.prepare()
    with mock.patch.object(prepare, '_encode', side_effect=OSError(28, 'full')):
      with self.assertRaisesRegex(InputError, 'the disk is full'):
        self.prepare()
    self.assertEmpty(self.left_in_data_dir())

  def test_source_that_changes_meanwhile(self):
    self.write_documents()
    encode = prepare._encode

    def change_then_encode(*args):
      self.write('0000.txt', 'changed')
      return encode(*args)

    with mock.patch.object(prepare, '_encode', change_then_encode):
      with self.assertRaisesRegex(InputError, 'changed while'):
        self.prepare()
    self.assertEmpty(self.left_in_data_dir())

  def test_source_with_its_own_validation_split(self):
    split_texts = {
      'train': 'training text ' * 20,
      'validation': 'held out ' * 9,
    }
    source = types.SimpleNamespace(
      spec='tfds:x',
      splits=prepare.SPLITS,
      fingerprint=lambda: 'x/1.0.0',
      parts=lambda split: iter([sources.Part(split, 1, ())]),
      read=lambda part: iter(
        [sources.document_of('x', split_texts[part.split])]
      ),
    )
    with mock.patch.object(sources, 'make_source', return_value=source):
      packed = self.prepare('tfds:x', length=9)
    self.assertEqual(
      packed.tokenizer.decode(stream(packed.validation)), 'held out ' * 9
    )
    self.assertStartsWith(
      packed.tokenizer.decode(stream(packed.train)), 'training text '
    )
    json.dumps(packed.metadata)


if __name__ == '__main__':
  absltest.main()
