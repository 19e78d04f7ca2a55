"""A source and a tokenizer from outside the package, one line each."""

import dataclasses
from unittest import mock

from absl.testing import absltest
import numpy as np

from nanodlm.data import config, pipeline, sources, tokenizers
from nanodlm.data.sources import base
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.types import InputError
from tests.data.cases import DataTest, stream


@dataclasses.dataclass(frozen=True)
class CountingSource(base.Source):
  """Documents that count: 'counting:40' is forty, in parts of five."""

  forms = ('counting:NUMBER',)

  number: int

  @classmethod
  def make(cls, spec, name, data_dir):
    del data_dir
    return cls(spec, int(name))

  @property
  def has_validation(self):
    return True

  def fingerprint(self):
    return str(self.number)

  def parts(self, split):
    numbers = range(self.number) if split == 'train' else range(900, 920)
    for start in numbers[::5]:
      yield (start,)

  def read(self, part):
    (start,) = part
    for i in range(start, start + 5):
      yield base.document_of(f'document {i:03d}')


@dataclasses.dataclass(frozen=True, eq=False)
class UpperTokenizer(Tokenizer):
  """Letters without case, and a separator of its own."""

  @classmethod
  def make(cls, name, path):
    del path
    pieces = tuple(bytes([i]) for i in range(96))
    return cls(name, pieces, separator_id=96, fingerprint=name)

  def encode(self, text):
    return np.frombuffer(text.upper().encode(), np.uint8).astype(np.int32)


UPPER = mock.patch.dict(tokenizers.TOKENIZERS, upper=UpperTokenizer)
COUNTING = mock.patch.dict(sources.SOURCES, counting=CountingSource)


class ExtendTest(DataTest):
  def setUp(self):
    super().setUp()
    self.enterContext(UPPER)
    self.enterContext(COUNTING)
    self.tokenizer_config = config.TokenizerConfig('upper', '', 0)

  def test_prepared_and_read(self):
    data_config = config.DataConfig(
      **dataclasses.asdict(self.config('counting:40', num_threads=1))
    )
    packed = self.prepare('counting:40', self.tokenizer_config)
    text = packed.tokenizer.decode(stream(packed.train))
    self.assertStartsWith(text, 'DOCUMENT 000\n\nDOCUMENT 001\n\n')
    validation = packed.tokenizer.decode(stream(packed.validation))
    self.assertStartsWith(validation, 'DOCUMENT 900\n\n')
    batch = next(
      pipeline.make_train_iterator(packed, data_config, seed=0, batch_size=4)
    )
    self.assertEqual(batch.tokens.shape, (4, 16))
    self.assertTrue((batch.tokens <= packed.tokenizer.separator_id).all())
    again = self.prepare('counting:40', self.tokenizer_config)
    self.assertEqual(again.folders, packed.folders)

  def test_mixed_and_saved(self):
    packed = self.prepare(
      'mix:1*counting:40+3*counting:80', self.tokenizer_config
    )
    self.assertEqual(packed.weights, (0.25, 0.75))
    save_tokenizer(packed.tokenizer, self.folder)
    loaded = load_tokenizer(self.folder)
    self.assertIsInstance(loaded, UpperTokenizer)
    self.assertEqual(loaded.fingerprint, 'upper')

  def test_a_forgotten_method_fails_at_construction(self):
    class NoRead(CountingSource):
      read = base.Source.read

    class NoEncode(UpperTokenizer):
      encode = Tokenizer.encode

    with self.assertRaisesRegex(TypeError, 'abstract.*read'):
      NoRead.make('counting:5', '5', '')
    with self.assertRaisesRegex(TypeError, 'abstract.*encode'):
      NoEncode.make('upper', '')

  def test_unknown_names_list_the_new_ones(self):
    with self.assertRaisesRegex(InputError, "'count:4'.*'counting:NUMBER'"):
      sources.make_source('count:4')
    with self.assertRaisesRegex(InputError, "'lower'.*'upper'"):
      tokenizers.find_class('lower')


if __name__ == '__main__':
  absltest.main()
