"""Tests of nanodlm.data.config: settings that are refused before any work."""

import dataclasses

from absl.testing import absltest, parameterized

from nanodlm.data.config import DataConfig, TokenizerConfig
from nanodlm.types import InputError
from tests import workdirs


def make(**changes):
  values = {'source': 'embedded', 'num_threads': 1, **changes}
  return DataConfig(**dataclasses.asdict(workdirs.DataConfig(**values)))


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(length=1), 'data.length=1 must be >= 2'),
    (dict(crop='chunks'), r"data\.crop='chunks'.*'random'"),
    (dict(crop='document', segment_ids=True), 'data.segment_ids=True is not'),
    (dict(crop='document', source='tokens:x'), "'tokens:x'"),
    (dict(long_documents='cut'), "data.long_documents='cut' is ignored"),
    (dict(padding='masked'), "data.padding='masked' is ignored"),
    (dict(padding='no'), r"data\.padding='no'.*'masked'"),
    (dict(eval_tokens=5), r'data.eval_tokens=5 .*eval_fraction=0\.1 both'),
    (dict(eval_tokens=-1), 'data.eval_tokens=-1 must be >= 0'),
    (dict(test_tokens=-1), 'data.test_tokens=-1 must be >= 0'),
    (dict(eval_source='mix:a'), "'mix:a'"),
    (dict(eval_source='pairs:a'), "data.eval_source='pairs:a' .*'embedded'"),
    (dict(test_tokens=5), 'data.test_tokens=5 needs data.eval_tokens'),
    *[
      (dict(eval_fraction=x), f'data.eval_fraction={x} must be in')
      for x in (0, 1, -0.1, 1.5)
    ],
  )
  def test_data(self, changes, message):
    with self.assertRaisesRegex(InputError, message):
      make(**changes)

  @parameterized.parameters(
    (('bytes', 'x', 0), "tokenizer.path='x' is ignored.*'bytes'"),
    (('run', '', 0), "tokenizer.path='' must be.*'run'"),
    (('bytes', '', 9), "tokenizer.vocab_size=9 is ignored.*'bytes'"),
    (('sentencepiece', '', 256), 'tokenizer.vocab_size=256 must be >= 257'),
    (('gtp2', '', 0), "tokenizer.name='gtp2' .*'bytes'.*'gpt2'"),
  )
  def test_tokenizer(self, values, message):
    with self.assertRaisesRegex(InputError, message):
      TokenizerConfig(*values)

  def test_kinds_with_a_meaning(self):
    self.assertFalse(make().is_pairs)
    self.assertTrue(TokenizerConfig('sentencepiece', '', 300).is_trained)
    self.assertFalse(TokenizerConfig('sentencepiece', 'x', 0).is_trained)
    self.assertFalse(TokenizerConfig('gpt2', '', 0).is_trained)


if __name__ == '__main__':
  absltest.main()
