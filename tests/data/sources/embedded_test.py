"""Tests of the embedded text."""

import os

from absl.testing import absltest

from nanodlm.data import sources
from nanodlm.data.sources import base, embedded

SHARED = os.path.join(os.path.dirname(__file__), *['..'] * 4, 'shared', 'data')


def texts(source, split='train'):
  return [
    ''.join(document.open()) for document in base.documents(source, split)
  ]


class EmbeddedTest(absltest.TestCase):
  def test_two_megabytes_of_english_in_order(self):
    source = sources.make_source('embedded')
    documents = texts(source)
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
    names = [name for name, _ in embedded._stdlib_files()]
    self.assertFalse([name for name in names if 'test' in name.split('/')])


if __name__ == '__main__':
  absltest.main()
