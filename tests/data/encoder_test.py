"""Tests of nanodlm.data.encoder: parts, engines and restarts."""

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
import time
import types
import unittest
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from nanodlm.data import encoder, pack, sources, tokenizers
from nanodlm.data.packed import SPLITS
from nanodlm.data.sources import base, embedded
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.types import InputError
from tests.data.cases import DataTest, files_of, REPO, stream

# Prepares with two workers, and is killed when it is half through.
PROGRAM = """
import logging, os, re, signal
from nanodlm import config
from nanodlm.data import encoder, prepare
from nanodlm.data.sources import base
class Kill(logging.Handler):
  def emit(self, record):
    found = re.search('([0-9]+)% done', record.getMessage())
    if found and int(found[1]) > 2:
      os.kill(os.getpid(), signal.SIGKILL)
if __name__ == '__main__':
  base.PART_BYTES = 2000
  encoder.PROGRESS_SECS = 0
  log = logging.getLogger('nanodlm')
  log.setLevel(logging.INFO)
  log.addHandler(Kill())
  data = config.DataConfig(
      source={source!r}, eval_source='', length=16, eval_fraction=0.1,
      eval_tokens=0, test_tokens=0, data_dir={data_dir!r}, crop='chunk',
      long_documents='drop',
      segment_ids=False,
      padding='eos', clean_prefix_rate=0.0, clean_infill_rate=0.0,
      num_threads=1, prefetch_batches=1)
  prepare.prepare(data, config.TokenizerConfig('bytes', '', 0),
                  encoder.Workers(2))
"""


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
    source = self.write_jsonl(number=3000)
    killed = self.run_program(source, 'killed')
    self.assertEqual(killed.returncode, -signal.SIGKILL, killed.stderr)
    (work,) = (self.folder / 'killed').glob('*.incomplete-*')
    before = None  # its workers end with it
    while before != (before := sorted(work.iterdir())):
      time.sleep(0.3)
    num_done = len(list(work.glob('*.npz')))
    torn = next(work.glob('*.tokens'))  # as if the disk had lost its end
    torn.write_bytes(torn.read_bytes()[:-2])
    self.enterContext(mock.patch.object(base, 'PART_BYTES', 2000))
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
      mock.patch.object(base, 'PART_BYTES', 2000),
      mock.patch.object(pack, 'make_streams', side_effect=KeyboardInterrupt),
    ):
      with self.assertRaises(KeyboardInterrupt):
        self.prepare(source)
    (work,) = (self.folder / 'prepared').glob('*.incomplete-*')
    self.assertGreater(len(list(work.glob('*.npz'))), 3)
    again = self.prepare(source)
    self.assertEqual(files_of(again.folders[0]), files_of(plain.folders[0]))

  def manifests(self, packed):
    return [
      json.loads(pathlib.Path(folder, 'manifest.json').read_text())
      for folder in packed.folders
    ]

  @parameterized.parameters(
    dict(eval_fraction=0.1),
    dict(eval_fraction=0, eval_tokens=300),
    dict(eval_fraction=0, eval_tokens=300, test_tokens=300),
  )
  def test_a_document_is_counted_once(self, **held_out):
    for name in 'ab':
      self.write(f'{name}.txt', f'one document, {name}.\n' * 200)
    self.write_tokens([[5] * 23 + [256]] * 150)  # 256 ends each of the rows.
    rows = f'tokens:{self.folder}/a.parquet'
    mixture = f'mix:1*text:{self.folder}/a.txt+1*text:{self.folder}/b.txt'
    with mock.patch.object(base, 'PART_BYTES', 1000):
      (manifest,) = self.manifests(self.prepare(rows, **held_out))
      self.assertEqual(manifest['num_documents'], 150)
      packed = self.prepare(mixture, **held_out)
    for manifest in self.manifests(packed):
      self.assertEqual(manifest['num_documents'], 1)
      for split in SPLITS:
        self.assertEqual(manifest[split]['num_documents'], 1)
    for split in SPLITS:
      self.assertEqual(packed.metadata[split]['num_documents'], 2)

  def test_manifest(self):
    packed = self.prepare(self.write_jsonl())
    (manifest,) = self.manifests(packed)
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
      mock.patch.object(base, 'PART_BYTES', 2000),
      mock.patch.object(pack, 'SHARD_ROWS', 200),
    ):
      plain = self.prepare(source, data_dir=str(self.folder / 'plain'))
      beam = self.prepare(
        source,
        data_dir=str(self.folder / 'beam'),
        engine=encoder.Beam(('runner=DirectRunner',)),
      )
    self.assertGreater(len(beam.train.files), 1)
    for split in SPLITS:  # TFDS's records have their fields in any order
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
    message = '--beam_options=.*runner=Nonsense.*: .*DirectRunner'
    with self.assertRaisesRegex(InputError, message):
      encoder.Beam(('runner=Nonsense',))
    (self.folder / 'a.jsonl').write_text(
      '{"text": "a"}\n' * 9 + '{"text": 3}\n'
    )
    with self.assertRaisesRegex(InputError, r"a\.jsonl:10 .*:GLOB:FIELD'$"):
      self.prepare(f'jsonl:{self.folder}/a.jsonl', engine=encoder.Beam(()))
    self.assertEmpty(self.left_in_data_dir())

  def test_beam_is_an_extra(self):
    with mock.patch.dict(sys.modules, {'apache_beam': None}):
      with self.assertRaisesRegex(InputError, r"pip install -e '\.\[beam\]'"):
        encoder.Beam(())

  def test_worker_that_dies_is_told_and_its_work_kept(self):
    source = self.write_jsonl()
    engine = encoder.Workers(1)
    job = encoder.Job(sources.make_source(source), _Deadly(), self.folder, 1)
    with self.assertRaisesRegex(InputError, 'was killed.*--prepare_workers'):
      encoder.encode(
        job, [encoder.Task(0, next(job.source.parts('train')), 'any')], engine
      )

  @parameterized.parameters('write', 'read')
  def test_error_of_a_worker_that_cannot_be_sent(self, what):
    with self.assertRaisesRegex(RuntimeError, '(?s)Traceback.*broken: a task'):
      list(encoder.Workers(1).map(_fail, [f'a task to {what}']))

  def test_mistake_in_a_worker(self):
    (self.folder / 'a.jsonl').write_text(
      '{"text": "a"}\n' * 9 + '{"text": 3}\n'
    )
    with self.assertRaisesRegex(InputError, r'a\.jsonl:10 must have a text'):
      self.prepare(f'jsonl:{self.folder}/a.jsonl', engine=encoder.Workers(1))
    self.assertEmpty(self.left_in_data_dir())


class _Deadly(BytesTokenizer):
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
      mock.patch.object(base, 'PART_BYTES', 5000),
      mock.patch.object(base, 'PIECE_CHARS', 700),
    ):
      source = sources.make_source(f'text:{path}')
      parts = list(source.parts('train'))
      documents = list(base.documents(source, 'train'))
      self.assertEqual(
        [d.is_end for d in documents], [False] * (len(parts) - 1) + [True]
      )
      pieces = [piece for d in documents for piece in d.open()]
      self.assertEqual(''.join(pieces), text)
      cut = self.prepare(f'text:{path}')
    self.assertGreater(len(parts), 5)
    ends = [len(''.join(d.open()).encode()) for d in documents]
    self.assertLessEqual(max(ends), 5700)
    whole = self.prepare(f'text:{path}', data_dir=str(self.folder / 'whole'))
    self.assertEqual(files_of(cut.folders[0]), files_of(whole.folders[0]))
    self.assertEqual(cut.metadata['train']['num_documents'], 1)

  @parameterized.parameters(
    ('道可道，非常道。\n', '\n'),
    ('Слово за словом\n', '\n'),
    ('- a point\n', '\n'),
    ('"Yes," he said.\r\n', '\r\n'),
    ('A paragraph.\r\n\r\n', '\r\n'),
    ('　　一段。\n\n', '\n'),
    ('  indented\n', '\n'),
    ('an old Mac\r', '\r'),
    ('one long line ', ''),
    ('无空格', ''),
  )
  def test_a_text_is_cut_at_any_line_break(self, line, end):
    text = line * (20_000 // len(line.encode()))
    (self.folder / 'a.txt').write_bytes(text.encode())
    with (
      mock.patch.object(base, 'PART_BYTES', 2000),
      mock.patch.object(base, 'PIECE_CHARS', 500),
    ):
      source = sources.make_source(f'text:{self.folder}/a.txt')
      documents = list(base.documents(source, 'train'))
      parts = [''.join(document.open()) for document in documents]
      packed = self.prepare()
    self.assertBetween(len(parts), 8, 10)
    self.assertEqual(''.join(parts), text)
    for part, following in itertools.pairwise(parts):
      self.assertEndsWith(part, end)
      self.assertNotStartsWith(following, '\n')
      if line == 'one long line ':
        self.assertStartsWith(following, ' ')
    whole = self.prepare(data_dir=str(self.folder / 'whole'))
    self.assertEqual(files_of(packed.folders[0]), files_of(whole.folders[0]))

  def test_parts_of_files_and_lines_are_all_of_them_in_order(self):
    for i in range(20):
      (self.folder / f'{i:02d}.txt').write_text(f'document {i} ' * (i + 1))
    self.write_jsonl(number=99)
    for spec in (f'text:{self.folder}/*.txt', f'jsonl:{self.folder}/a.jsonl'):
      source = sources.make_source(spec)
      self.assertLen(list(source.parts('train')), 1)
      whole = [''.join(d.open()) for d in base.documents(source, 'train')]
      with mock.patch.object(base, 'PART_BYTES', 700):
        self.assertGreater(len(list(source.parts('train'))), 2)
        parts = [''.join(d.open()) for d in base.documents(source, 'train')]
      self.assertEqual(parts, whole)

  def test_errors_in_a_later_part_say_where(self):
    path = self.folder / 'a.jsonl'
    path.write_text('{"text": "long enough"}\n' * 50 + '{"text": 3}\n')
    with (
      mock.patch.object(base, 'PART_BYTES', 100),
      self.assertRaisesRegex(InputError, r'a\.jsonl:51 must have a text'),
    ):
      self.prepare(f'jsonl:{path}')
    path = self.folder / 'a.txt'
    path.write_bytes(b'a line\n' * 100 + b'\xff')
    with (
      mock.patch.object(base, 'PART_BYTES', 100),
      self.assertRaisesRegex(
        InputError, r'a\.txt is not UTF-8 text at byte 700'
      ),
    ):
      self.prepare(f'text:{path}')


@unittest.skipUnless(
  os.environ.get('NANODLM_BIG_CORPUS'),
  'takes minutes and gigabytes; NANODLM_BIG_CORPUS=1 runs it',
)
class BigCorpusTest(DataTest):
  """Speed and memory, with the GPT-2 BPE and two workers; prints them, too."""

  def write_corpus(self, megabytes):
    """JSONL of CPython's documentation, in any order, some words exchanged."""
    texts = [text for _, text in embedded.embedded_texts()]
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
    self.assertGreater(rate, 0.5 * own)
    self.assertLess(many_peak, 1.1 * few_peak)


if __name__ == '__main__':
  absltest.main()
