"""Helpers shared by the tests of the data path."""

import json
import os
import pathlib
import random
import tempfile

from absl.testing import parameterized
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanodlm.config import TokenizerConfig
from nanodlm.data import prepare
from tests import workdirs

REPO = pathlib.Path(__file__).resolve().parents[2]
BYTES = TokenizerConfig(name='bytes', path='', vocab_size=0)
SENTENCEPIECE = TokenizerConfig(name='sentencepiece', path='', vocab_size=300)


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
    self.data_dir = str(self.folder / 'prepared')

  def config(self, source='', **changes):
    source = source or f'text:{self.folder}/*.txt'
    values = dict(source=source, data_dir=self.data_dir)
    return workdirs.DataConfig(**{**values, **changes})

  def prepare(self, source='', tokenizer=BYTES, engine=None, **changes):
    return prepare.prepare(self.config(source, **changes), tokenizer, engine)

  def write_jsonl(self, name='a.jsonl', number=300):
    rng = random.Random(name)
    (self.folder / name).write_text(
      ''.join(
        json.dumps({'text': f'{name} {i} ' + 'x' * rng.randrange(80)}) + '\n'
        for i in range(number)
      )
    )
    return f'jsonl:{self.folder}/{name}'

  def write_tokens(self, rows, name='a.parquet', kind=None):
    kind = kind or pa.list_(pa.int64())
    pq.write_table(
      pa.table({'tokens': pa.array(rows, kind)}),
      self.folder / name,
      row_group_size=4,
    )
    return f'tokens:{self.folder}/{name}'

  def write(self, name, text):
    path = os.path.join(self.folder, name)
    with open(path, 'w', encoding='utf-8', newline='') as file:
      file.write(text)
    return path

  def write_documents(self, number=40, size=50):
    for i in range(number):
      self.write(f'{i:04d}.txt', f'<{i:04d}>' + chr(97 + i % 26) * size)

  def left_in_data_dir(self):
    """The names in data_dir, except those of locks."""
    names = sorted(os.listdir(self.data_dir))
    return [name for name in names if not name.endswith('.lock')]

  def write_pairs(self, pairs, name='a.jsonl'):
    lines = [json.dumps({'prompt': p, 'response': r}) + '\n' for p, r in pairs]
    return 'pairs:' + self.write(name, ''.join(lines))
