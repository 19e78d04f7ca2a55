"""Tests of nanodlm.data.encoder and of what prepares data at scale."""

import importlib.util
import itertools
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
import unittest
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanodlm.data import encoder, pipeline, prepare, sources, tokenizers
from nanodlm.types import InputError
from tests import workdirs

REPO = pathlib.Path(__file__).resolve().parents[2]
BYTES = types.SimpleNamespace(name='bytes', path='', vocab_size=0)

# Prepares with two workers, and is killed when it is half through.
PROGRAM = """
import os, signal, types
from nanodlm import config
from nanodlm.data import prepare
from nanodlm.data import encoder
from nanodlm.data import sources
if __name__ == '__main__':
  sources.PART_BYTES = 2000
  builder._PROGRESS_SECS = 0
  def progress(*counts):
    if counts[-1] > 0.5:
      os.kill(os.getpid(), signal.SIGKILL)
  data = config.DataConfig(
      source={source!r}, length=16, eval_fraction=0.1, eval_tokens=0,
      test_tokens=0, data_dir={data_dir!r}, crop='chunk', segment_ids=False,
      padding='eos', clean_prefix_rate=0.0, clean_infill_rate=0.0,
      num_threads=1, prefetch_batches=1)
  builder.prepare(data, types.SimpleNamespace(
      name='bytes', path='', vocab_size=0), progress, encoder.Workers(2))
"""


def stream(rows):
  return np.concatenate([rows[i]['tokens'] for i in range(len(rows))])


def files_of(folder):
  """{relative path: content} of a prepared folder."""
  folder = pathlib.Path(folder)
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


class DataTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def config(self, source, **changes):
    values = dict(source=source, data_dir=str(self.folder / 'prepared'))
    return workdirs.DataConfig(**{**values, **changes})

  def prepare(
    self, source, tokenizer=BYTES, engine=encoder.ThisProcess(), **changes
  ):
    return prepare.prepare(
      self.config(source, **changes), tokenizer, engine=engine
    )

  def write_jsonl(self, name='a.jsonl', number=300):
    rng = random.Random(name)
    (self.folder / name).write_text(
      ''.join(
        json.dumps({'text': f'{name} {i} ' + 'x' * rng.randrange(80)}) + '\n'
        for i in range(number)
      )
    )
    return f'jsonl:{self.folder}/{name}'

  def write_tokens(self, rows, name='a.parquet', kind=pa.list_(pa.int64())):
    pq.write_table(
      pa.table({'tokens': pa.array(rows, kind)}),
      self.folder / name,
      row_group_size=4,
    )
    return f'tokens:{self.folder}/{name}'


class EnginesTest(DataTest):
  def run_program(self, source, data_dir):
    program = self.folder / 'program.py'
    program.write_text(
      PROGRAM.format(source=source, data_dir=str(self.folder / data_dir))
    )
    return subprocess.run(
      [sys.executable, program],
      cwd=REPO,
      check=False,
      env={**os.environ, 'PYTHONPATH': str(REPO)},
      stderr=subprocess.PIPE,
      text=True,
    )

  def test_any_number_of_workers_and_a_kill_end_with_the_same_bytes(self):
    source = self.write_jsonl()
    killed = self.run_program(source, 'killed')
    self.assertEqual(killed.returncode, -signal.SIGKILL)
    (work,) = (self.folder / 'killed').glob('*.incomplete-*')
    before = None  # its workers end with it
    while before != (before := sorted(work.iterdir())):
      time.sleep(0.3)
    num_done = len(list(work.glob('*.npz')))
    torn = next(work.glob('*.tokens'))  # as if the disk had lost its end
    torn.write_bytes(torn.read_bytes()[:-2])
    self.enterContext(mock.patch.object(sources, 'PART_BYTES', 2000))
    with (
      mock.patch.object(
        encoder, 'encode_part', wraps=encoder.encode_part
      ) as encode,
      self.assertLogs('nanodlm') as logs,
    ):
      resumed = self.prepare(source, data_dir=str(self.folder / 'killed'))
    num_parts = len(list(sources.make_source(source).parts('train')))
    self.assertEqual(encode.call_count, num_parts - (num_done - 1))
    self.assertBetween(num_done, 3, num_parts - 1)
    self.assertIn(f'{num_done - 1} of {num_parts} parts', logs.output[0])
    plain = self.prepare(source, data_dir=str(self.folder / 'plain'))
    workers = self.prepare(
      source, data_dir=str(self.folder / 'workers'), engine=encoder.Workers(2)
    )
    self.assertIn('manifest.json', files_of(plain.folders[0]))
    self.assertEqual(files_of(workers.folders[0]), files_of(plain.folders[0]))
    self.assertEqual(files_of(resumed.folders[0]), files_of(plain.folders[0]))

  def test_parts_of_another_size_are_not_gone_on_with(self):
    source = self.write_jsonl()
    plain = self.prepare(source, data_dir=str(self.folder / 'plain'))
    with (
      mock.patch.object(sources, 'PART_BYTES', 2000),
      mock.patch.object(
        prepare, '_make_streams', side_effect=KeyboardInterrupt
      ),
    ):
      with self.assertRaises(KeyboardInterrupt):
        self.prepare(source)
    (work,) = (self.folder / 'prepared').glob('*.incomplete-*')
    self.assertGreater(len(list(work.glob('*.npz'))), 3)
    again = self.prepare(source)
    self.assertEqual(files_of(again.folders[0]), files_of(plain.folders[0]))

  def test_manifest(self):
    packed = self.prepare(self.write_jsonl())
    manifest = json.loads(
      pathlib.Path(packed.folders[0], 'manifest.json').read_text()
    )
    texts = [json.loads(line)['text'] for line in open(self.folder / 'a.jsonl')]
    size = sum(map(len, texts))
    self.assertEqual(manifest['num_documents'], 300)
    self.assertEqual(manifest['num_bytes'], size)
    self.assertEqual(manifest['num_tokens'], size + 300)
    self.assertEqual(manifest['tokenizer']['fingerprint'], 'bytes')
    self.assertIn('tensorflow-datasets', manifest['versions'])

  def test_beam_makes_the_same_tokens(self):
    if not importlib.util.find_spec('apache_beam'):
      self.skipTest('no apache-beam')
    source = self.write_jsonl()
    with (
      mock.patch.object(sources, 'PART_BYTES', 2000),
      mock.patch.object(prepare, '_SHARD_ROWS', 200),
    ):
      plain = self.prepare(source, data_dir=str(self.folder / 'plain'))
      beam = self.prepare(
        source,
        data_dir=str(self.folder / 'beam'),
        engine=encoder.Beam(('runner=DirectRunner',)),
      )
    self.assertGreater(len(beam.train.files), 1)
    for (
      split
    ) in prepare.SPLITS:  # TFDS's records have their fields in any order
      one, other = getattr(plain, split), getattr(beam, split)
      np.testing.assert_array_equal(stream(one), stream(other))
      self.assertEqual(
        [rows for _, rows in one.files], [rows for _, rows in other.files]
      )
    self.assertEqual(beam.metadata, plain.metadata)
    self.assertEqual(
      files_of(beam.folders[0]).keys(), files_of(plain.folders[0]).keys()
    )

  def test_mistakes_on_beam(self):
    if not importlib.util.find_spec('apache_beam'):
      self.skipTest('no apache-beam')
    with self.assertRaisesRegex(InputError, 'runner=Nonsense: .*DirectRunner'):
      encoder.Beam(('runner=Nonsense',))
    (self.folder / 'a.jsonl').write_text(
      '{"text": "a"}\n' * 9 + '{"text": 3}\n'
    )
    with self.assertRaisesRegex(InputError, r"a\.jsonl:10 .*:GLOB:FIELD'$"):
      self.prepare(f'jsonl:{self.folder}/a.jsonl', engine=encoder.Beam(()))
    self.assertEmpty(os.listdir(self.folder / 'prepared'))

  def test_beam_is_an_extra_and_its_options_have_one_form(self):
    with mock.patch.dict(sys.modules, {'apache_beam': None}):
      with self.assertRaisesRegex(InputError, r"pip install -e '\.\[beam\]'"):
        encoder.Beam(())
    with mock.patch.dict(sys.modules, {'apache_beam': types.ModuleType('b')}):
      with self.assertRaisesRegex(InputError, "write 'runner=X' instead of"):
        encoder.Beam(('--runner=X',))

  def test_worker_that_dies_is_told_and_its_work_kept(self):
    source = self.write_jsonl()
    engine = encoder.Workers(1)
    job = encoder.Job(sources.make_source(source), _Deadly(), self.folder, 1)
    with self.assertRaisesRegex(InputError, 'was killed, .*--prepare_workers'):
      prepare._encode(
        job,
        [encoder.Task(0, next(job.source.parts('train')), '')],
        None,
        engine,
      )

  @parameterized.parameters('write', 'read')
  def test_error_of_a_worker_that_cannot_be_sent(self, what):
    with self.assertRaisesRegex(RuntimeError, '(?s)Traceback.*broken: a task'):
      list(encoder.Workers(1).map(_fail, [f'a task to {what}']))

  def test_mistake_in_a_worker(self):
    (self.folder / 'a.jsonl').write_text(
      '{"text": "a"}\n' * 9 + '{"text": 3}\n'
    )
    with self.assertRaisesRegex(InputError, r'a\.jsonl:10 has no text'):
      self.prepare(f'jsonl:{self.folder}/a.jsonl', engine=encoder.Workers(1))
    self.assertEmpty(os.listdir(self.folder / 'prepared'))


class _Deadly(tokenizers.BytesTokenizer):
  """Kills the process that it encodes in."""

  def encode(self, text):
    os.kill(os.getpid(), signal.SIGKILL)


class _BrokenError(Exception):
  """Cannot be pickled, or what comes of it cannot be read."""

  def __init__(self, text, what):
    super().__init__(f'broken: {text}')
    if what == 'write':
      self.not_data = lambda: None


def _fail(task):
  raise _BrokenError(task, task.split()[-1])


class PartsTest(DataTest):
  def test_parts_of_one_text_change_nothing(self):
    text = ''.join(f'line {i} é\n  more\n' for i in range(3000))
    path = self.folder / 'a.txt'
    path.write_text(text)
    with (
      mock.patch.object(sources, 'PART_BYTES', 5000),
      mock.patch.object(sources, 'PIECE_CHARS', 700),
    ):
      source = sources.make_source(f'text:{path}')
      parts = list(source.parts('train'))
      documents = list(sources.documents(source, 'train'))
      self.assertEqual(
        [d.is_end for d in documents], [False] * (len(parts) - 1) + [True]
      )
      pieces = [piece for d in documents for piece in d.open()]
      self.assertEqual(''.join(pieces), text)
      cut = self.prepare(f'text:{path}')
    self.assertGreater(len(parts), 5)
    self.assertLessEqual(max(part.size for part in parts), 5100)
    whole = self.prepare(f'text:{path}', data_dir=str(self.folder / 'whole'))
    self.assertEqual(files_of(cut.folders[0]), files_of(whole.folders[0]))
    self.assertEqual(cut.metadata['train']['num_documents'], 1)

  def test_parts_of_files_and_lines_are_all_of_them_in_order(self):
    for i in range(20):
      (self.folder / f'{i:02d}.txt').write_text(f'document {i} ' * (i + 1))
    self.write_jsonl(number=99)
    for spec in (f'text:{self.folder}/*.txt', f'jsonl:{self.folder}/a.jsonl'):
      source = sources.make_source(spec)
      self.assertLen(list(source.parts('train')), 1)
      whole = [''.join(d.open()) for d in sources.documents(source, 'train')]
      with mock.patch.object(sources, 'PART_BYTES', 700):
        self.assertGreater(len(list(source.parts('train'))), 2)
        parts = [''.join(d.open()) for d in sources.documents(source, 'train')]
      self.assertEqual(parts, whole)

  def test_errors_in_a_later_part_say_where(self):
    path = self.folder / 'a.jsonl'
    path.write_text('{"text": "long enough"}\n' * 50 + '{"text": 3}\n')
    with (
      mock.patch.object(sources, 'PART_BYTES', 100),
      self.assertRaisesRegex(InputError, r'a\.jsonl:51 has no text'),
    ):
      self.prepare(f'jsonl:{path}')
    path = self.folder / 'a.txt'
    path.write_bytes(b'a line\n' * 100 + b'\xff')
    with (
      mock.patch.object(sources, 'PART_BYTES', 100),
      self.assertRaisesRegex(
        InputError, r'a\.txt is not UTF-8 text at byte 700'
      ),
    ):
      self.prepare(f'text:{path}')


class HeldOutTest(DataTest):
  def test_tokens_of_documents(self):
    packed = self.prepare(self.write_jsonl(), eval_fraction=0, eval_tokens=2000)
    counts = packed.metadata['validation']
    self.assertBetween(
      counts['num_tokens'] + counts['num_dropped_tokens'], 1900, 2100
    )
    train = packed.tokenizer.decode(stream(packed.train)).split('\n\n')
    held_out = packed.tokenizer.decode(stream(packed.validation)).split('\n\n')
    self.assertEmpty(set(train) & set(held_out[:-1]))

  def test_last_characters_of_one_text_are_test_and_before_them_validation(
    self,
  ):
    text = ''.join(
      random.Random(0).choices('abcdefghijklmnopqrstuvwxyz ', k=5000)
    )
    path = self.folder / 'text8'
    path.write_text(text)
    sizes = dict(eval_fraction=0, eval_tokens=500, length=10)
    packed = self.prepare(f'text:{path}', test_tokens=500, **sizes)
    decode = packed.tokenizer.decode
    self.assertEqual(decode(stream(packed.train)), text[:4000])
    self.assertEqual(decode(stream(packed.validation)), text[4000:4500])
    test = self.prepare(f'text:{path}', **sizes)
    self.assertEqual(decode(stream(test.validation)), text[4500:])

  @parameterized.parameters(
    (
      dict(eval_tokens=5),
      r'data.eval_tokens=5 and data.eval_fraction=0\.1 both',
    ),
    (dict(eval_fraction=0), 'data.eval_fraction=0 must be in'),
    (dict(eval_tokens=-1), 'data.eval_tokens=-1 .* must be >= 0'),
    (dict(test_tokens=5), 'data.test_tokens=5 needs data.eval_tokens'),
    (
      dict(eval_fraction=0, eval_tokens=10, test_tokens=5),
      'data.test_tokens=5 .*has several documents',
    ),
    (
      dict(eval_fraction=0, eval_tokens=10**6),
      r'data.eval_tokens=1000000 leaves nothing to train on: .* has \d+ tokens',
    ),
  )
  def test_mistakes(self, changes, message):
    source = self.write_jsonl()
    with self.assertRaisesRegex(InputError, message):
      self.prepare(source, **changes)
    self.assertEmpty(list((self.folder / 'prepared').glob('*incomplete*')))

  def test_mistakes_of_one_text_and_of_a_tokenizer_to_be_trained(self):
    path = self.folder / 'a.txt'
    path.write_text('x' * 99)
    with self.assertRaisesRegex(
      InputError, 'data.eval_tokens=60 with data.test_tokens=60 leaves nothing'
    ):
      self.prepare(
        f'text:{path}', eval_fraction=0, eval_tokens=60, test_tokens=60
      )
    trained = types.SimpleNamespace(
      name='sentencepiece', path='', vocab_size=300
    )
    with self.assertRaisesRegex(
      InputError, 'data.eval_tokens=9 cannot be counted'
    ):
      self.prepare(f'text:{path}', trained, eval_fraction=0, eval_tokens=9)
    with self.assertRaisesRegex(InputError, 'holds token ids.*tokenizer.name'):
      self.prepare(self.write_tokens([[1]]), trained)


class TokenRowsTest(DataTest):
  @parameterized.parameters(
    pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16(), 24)
  )
  def test_rows_are_one_stream_cut_into_rows(self, kind):
    rows = [[(24 * i + j) % 257 for j in range(24)] for i in range(20)]
    packed = self.prepare(
      self.write_tokens(rows, kind=kind),
      eval_fraction=0,
      eval_tokens=70,
      test_tokens=20,
    )
    tokens = np.concatenate(rows)  # 480: 30 rows of 16
    np.testing.assert_array_equal(stream(packed.train), tokens[: 16 * 24])
    np.testing.assert_array_equal(
      stream(packed.validation), tokens[16 * 24 : 16 * 28]
    )
    self.assertEqual(packed.metadata['train']['num_documents'], 1)
    self.assertEqual(packed.train[0]['num_bytes'], 16)

  def test_share_of_the_rows(self):
    packed = self.prepare(self.write_tokens([[7] * 16] * 20))
    self.assertEqual((len(packed.train), len(packed.validation)), (18, 2))

  @parameterized.parameters(
    (
      [[1]] * 5 + [[2, 257]],
      r'row 5 of .*a\.parquet holds the id 257, but those '
      "of tokenizer.name='bytes' are 0 to 256",
    ),
    ([[1], [-1]], 'row 1 of .* holds the id -1'),
    ([[1], None], "row 1 of .* has nothing in field 'tokens'"),
    (
      [[1], [], [2, 3, None]],
      "row 2 of .* has nothing in a place of field 'tok",
    ),
  )
  def test_bad_rows(self, rows, message):
    with self.assertRaisesRegex(InputError, 'data.source=.*' + message):
      self.prepare(self.write_tokens(rows))

  def test_bad_files(self):
    for rows in ([], [[]]):
      with self.assertRaisesRegex(InputError, 'holds no tokens'):
        self.prepare(self.write_tokens(rows))
    with self.assertRaisesRegex(InputError, 'data.length=16 is longer than'):
      self.prepare(self.write_tokens([[1] * 17]))
    source = self.write_tokens([[1]])
    with self.assertRaisesRegex(
      InputError, r"no field 'ids', but \['tokens'\]"
    ):
      self.prepare(source + ':ids')
    with self.assertRaisesRegex(InputError, r"no field 'text'"):
      self.prepare(source.replace('tokens:', 'parquet:'))
    with self.assertRaisesRegex(InputError, 'holds list<.*>, not text'):
      self.prepare(source.replace('tokens:', 'parquet:') + ':tokens')
    (self.folder / 'a.parquet').write_text('no parquet')
    with self.assertRaisesRegex(
      InputError, r'a\.parquet cannot be read as Parquet'
    ):
      self.prepare(source)

  def test_text_in_parquet(self):
    texts = [f'text number {i}' for i in range(60)]
    pq.write_table(
      pa.table({'body': texts}), self.folder / 'a.parquet', row_group_size=7
    )
    packed = self.prepare(f'parquet:{self.folder}/*.parquet:body', length=4)
    jsonl = self.folder / 'same.jsonl'
    jsonl.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    same = self.prepare(f'jsonl:{jsonl}', length=4)
    for split in prepare.SPLITS:
      np.testing.assert_array_equal(
        stream(getattr(packed, split)), stream(getattr(same, split))
      )


class HuggingFaceTest(DataTest):
  def setUp(self):
    super().setUp()
    if not importlib.util.find_spec('datasets'):
      self.skipTest('no datasets')
    import datasets

    self.enterContext(
      mock.patch.object(
        datasets.config, 'HF_DATASETS_CACHE', self.folder / 'cache'
      )
    )
    self.data = self.folder / 'set'
    self.data.mkdir()

  def write(self, split, texts):
    pq.write_table(
      pa.table(
        {'text': texts, 'tokens': [list(t.encode()) + [256] for t in texts]}
      ),
      self.data / f'{split}-00000-of-00001.parquet',
    )

  def test_text_tokens_and_workers(self):
    texts = [f'text number {i}' for i in range(100)]
    self.write('train', texts)
    jsonl = self.folder / 'same.jsonl'
    jsonl.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    same = self.prepare(f'jsonl:{jsonl}')
    with mock.patch.object(sources, 'PART_ROWS', 30):
      packed = self.prepare(f'hf:{self.data}', engine=encoder.Workers(1))
      rows = self.prepare(f'hf_tokens:{self.data}:tokens')
    for split in prepare.SPLITS:
      np.testing.assert_array_equal(
        stream(getattr(packed, split)), stream(getattr(same, split))
      )
    everything = ''.join(text + '\n\n' for text in texts)
    decoded = ''.join(
      rows.tokenizer.decode(stream(getattr(rows, split)))
      for split in prepare.SPLITS
    )
    self.assertStartsWith(everything, decoded)

  def test_its_own_validation_split(self):
    self.write('train', ['to train on'] * 9)
    self.write('validation', ['held out'] * 9)
    packed = self.prepare(f'hf:{self.data}:default:text', length=9)
    self.assertEqual(
      packed.tokenizer.decode(stream(packed.validation)), 'held out\n\n' * 9
    )

  def test_mistakes(self):
    self.write('train', ['text'])
    with self.assertRaisesRegex(InputError, "has no feature 'body', but"):
      self.prepare(f'hf:{self.data}:body')
    with self.assertRaisesRegex(InputError, 'cannot load .*nosuch'):
      self.prepare(f'hf:{self.data}:nosuch:text')
    import huggingface_hub

    with (
      mock.patch.object(sources, 'is_reachable', return_value=False),
      mock.patch.dict(os.environ),
      mock.patch.object(huggingface_hub.constants, 'HF_HUB_OFFLINE', True),
    ):
      with self.assertRaisesRegex(InputError, 'does not answer.*give a folder'):
        self.prepare('hf:nobody/nothing-of-this-name')
      # Read when the package is imported, which has happened here.
      self.assertEqual(os.environ['HF_HUB_OFFLINE'], '1')


class HuggingFaceAbsentTest(absltest.TestCase):
  def test_is_an_extra(self):
    with (
      mock.patch.dict(sys.modules, {'datasets': None}),
      mock.patch.dict(os.environ),
      mock.patch.object(sources, 'is_reachable', return_value=False),
    ):
      with self.assertRaisesRegex(InputError, r"pip install -e '\.\[hf\]'"):
        sources.make_source('hf:x/y')
    with self.assertRaisesRegex(InputError, 'not of the form'):
      sources.make_source('hf:a:b:c:d')


class MixtureTest(DataTest):
  def setUp(self):
    super().setUp()
    for letter, number in (('a', 40), ('b', 160)):
      (self.folder / f'{letter}.txt').write_text(letter * 16 * number)
    self.spec = (
      f'mix:0.75*text:{self.folder}/a*.txt+0.25*text:{self.folder}/b.txt'
    )
    self.settings = dict(eval_fraction=0.2)

  def letters(self, batch):
    return ''.join(chr(row[0]) for row in batch['tokens'])

  def test_shares_order_and_resuming(self):
    config = self.config(self.spec, **self.settings)
    packed = prepare.prepare(config, BYTES)
    self.assertEqual(packed.weights, (0.75, 0.25))
    self.assertLen(
      {
        path
        for folder in packed.folders
        for path in pathlib.Path(folder).glob('manifest.json')
      },
      2,
    )
    make = lambda **k: pipeline.make_train_iterator(
      packed, config, seed=3, batch_size=40, **k
    )
    batches = [next(it) for it in [make()] for _ in range(8)]
    for batch in batches:  # 240 of a's 32 rows, 80 of b's 128
      self.assertEqual(self.letters(batch).count('a'), 30)
    again = make(start_step=5, rows=(10, 30))
    for batch in batches[5:]:
      np.testing.assert_array_equal(
        next(again)['tokens'], batch['tokens'][10:30]
      )

  def test_what_is_held_out_has_the_same_shares(self):
    config = self.config(self.spec, **self.settings)
    packed = prepare.prepare(config, BYTES)
    # 8 rows of a, 32 of b: 3 to 1 as long as there are both.
    self.assertLen(packed.validation, 10)
    for size, share in ((4, 3), (8, 6)):
      batch = next(
        iter(pipeline.make_eval_batches(packed, config, batch_size=size))
      )
      self.assertEqual(self.letters(batch).count('a'), share)

  @parameterized.parameters(
    (0.2, 0.75, 'rows evaluated on: 10,.*: 8 of 8 of .*0.75.*, 2 of 32 of '),
    (0.9, 0.99, 'rows evaluated on: 36,.*: 36 of 36 of .*, 0 of 144 of '),
    (0.2, 0.2, None),
  )  # 40 rows, 8 of them of a
  def test_few_rows_are_told(self, eval_fraction, weight, message):
    spec = (
      f'mix:{weight}*text:{self.folder}/a.txt'
      f'+{1 - weight}*text:{self.folder}/b.txt'
    )
    with self.assertLogs('nanodlm') as logs:
      self.prepare(spec, eval_fraction=eval_fraction)
    warnings = [
      record.getMessage()
      for record in logs.records
      if record.levelname == 'WARNING'
    ]
    self.assertLen(warnings, 0 if message is None else 1)
    for warning in warnings:
      self.assertRegex(warning, message)

  def test_random_windows_stay_in_their_source(self):
    config = self.config(self.spec, **{**self.settings, 'crop': 'random'})
    packed = prepare.prepare(config, BYTES)
    batches = pipeline.make_train_iterator(
      packed, config, seed=0, batch_size=64
    )
    for _ in range(5):
      for row in next(batches)['tokens']:
        self.assertLen(set(row.tolist()) - {256}, 1)

  def test_each_source_is_prepared_once_and_alone(self):
    config = self.config(self.spec, **self.settings)
    packed = prepare.prepare(config, BYTES)
    b = self.config(f'text:{self.folder}/b.txt', **self.settings)
    with (
      mock.patch.object(prepare, '_build', side_effect=AssertionError),
      mock.patch.object(prepare, 'prepare', wraps=prepare.prepare) as inner,
    ):
      alone = prepare.prepare(b, BYTES)
      prepare.prepare(config, BYTES)
    self.assertEqual(packed.train.parts[1].files, alone.train.files)
    self.assertEqual(inner.call_args.args[0], b)  # nothing else of it changes
    json.dumps(packed.metadata)

  @parameterized.parameters(
    ('mix:text:a', "'text:a' is no positive weight"),
    ('mix:1*text:a', 'mixes one source only'),
    ('mix:0*text:a+1*text:b', "'0.text:a' is no positive weight"),
    ('mix:x*text:a+1*text:b', "'x.text:a' is no positive weight"),
    ('mix:1*text:a+2*pairs:b', "'pairs:b' cannot be part of a mixture"),
    ('mix:1*text:a+2*text:a', 'names a source twice'),
    ('mix:1*text:nosuchfile+2*embedded', 'matches no file'),
  )
  def test_mistakes(self, spec, message):
    with self.assertRaisesRegex(InputError, 'data.source=.*' + message):
      self.prepare(spec)

  def test_globs_may_hold_the_signs(self):
    self.assertEqual(
      sources.parse_mixture(
        'mix:3*text:a+b/*.txt+1*jsonl:c+2*d:body+4*embedded'
      ),
      (
        (0.375, 'text:a+b/*.txt'),
        (0.125, 'jsonl:c+2*d:body'),
        (0.5, 'embedded'),
      ),
    )

  def test_tokenizer_to_be_trained(self):
    with self.assertRaisesRegex(InputError, "tokenizer.path='' trains"):
      self.prepare(
        self.spec,
        types.SimpleNamespace(name='sentencepiece', path='', vocab_size=300),
      )


@unittest.skipUnless(
  os.environ.get('NANODLM_BIG_CORPUS'),
  'takes minutes and gigabytes; NANODLM_BIG_CORPUS=1 runs it',
)
class BigCorpusTest(DataTest):
  """Speed and memory, with the GPT-2 BPE and two workers; prints them, too."""

  def write_corpus(self, megabytes):
    """JSONL of CPython's documentation, in any order, some words exchanged."""
    texts = [text for _, text in sources._embedded_texts()]
    paragraphs = [
      part + '\n\n'
      for text in texts
      for part in text.split('\n\n')
      if len(part) > 80
    ]
    words = sorted(set(re.findall('[a-z]{4,}', ''.join(texts))))
    rng, size = random.Random(0), 0
    path = self.folder / f'{megabytes}.jsonl'
    with open(path, 'w', encoding='utf-8') as file:
      while size < megabytes * 1e6:
        text = ''.join(rng.choices(paragraphs, k=rng.randint(2, 30))).split(' ')
        for i in rng.sample(range(len(text)), len(text) // 40):
          text[i] = rng.choice(words)
        size += file.write(json.dumps({'text': ' '.join(text)}) + '\n')
    return path

  def measure(self, path):
    """Prepares; (tokens, processor seconds, peak bytes of all processes)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
      [
        sys.executable,
        'launch.py',
        '--mode=prepare',
        '--prepare_workers=2',
        f'--config.data.source=jsonl:{path}',
        '--config.data.length=1024',
        '--config.data.eval_fraction=0',
        '--config.data.eval_tokens=1000000',
        '--config.tokenizer.name=gpt2',
        f'--config.data.data_dir={self.folder}/prepared',
      ],
      cwd=REPO,
    )
    peak = 0
    while process.poll() is None:
      peak = max(peak, sum(map(self.resident, self.tree(process.pid))))
      time.sleep(0.1)
    self.assertEqual(process.returncode, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (manifest,) = (
      json.loads(file.read_text())
      for file in self.folder.glob('prepared/*/manifest.json')
      if str(path) in file.read_text()
    )
    return (
      manifest['num_tokens'],
      after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
      peak,
    )

  def tree(self, pid):
    try:
      children = [
        int(child)
        for file in pathlib.Path(f'/proc/{pid}/task').glob('*/children')
        for child in file.read_text().split()
      ]
    except OSError:  # it has just ended
      children = []
    return [pid, *(p for child in children for p in self.tree(child))]

  def resident(self, pid):
    try:
      return 4096 * int(
        pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1]
      )
    except OSError:
      return 0

  def test_a_gigabyte(self):
    encoding = tokenizers.make_tokenizer(
      types.SimpleNamespace(name='gpt2', path='', vocab_size=0)
    ).encoding
    small, big = self.write_corpus(100), self.write_corpus(1000)
    few, few_secs, few_peak = self.measure(small)
    many, many_secs, many_peak = self.measure(big)
    with open(small, encoding='utf-8') as file:
      texts = [
        json.loads(line)['text'] for line in itertools.islice(file, 5000)
      ]
    start = time.process_time()
    own = sum(len(encoding.encode_ordinary(text)) for text in texts)
    own /= time.process_time() - start
    # What the start of the program takes is in both.
    rate = (many - few) / (many_secs - few_secs)
    print(
      f'\n{many:,} tokens; per processor second {rate / 1e6:.2f} M, '
      f'tiktoken alone {own / 1e6:.2f} M, {rate / own:.0%} of it; peak memory '
      f'{few_peak / 1e6:.0f} MB at 100 MB, {many_peak / 1e6:.0f} MB at 1 GB'
    )
    self.assertGreater(rate, 2e6)
    self.assertLess(many_peak, 1.1 * few_peak)


if __name__ == '__main__':
  absltest.main()
