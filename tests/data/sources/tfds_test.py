"""Tests of TFDS datasets."""

import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
import array_record.python.array_record_module as array_record

from nanodlm.data import sources
from nanodlm.data.packed import Example
from nanodlm.data.sources import base
from nanodlm.data.sources import tfds as tfds_source
from nanodlm.types import InputError

SHARED = os.path.join(os.path.dirname(__file__), *['..'] * 4, 'shared', 'data')


def texts(source, split='train'):
  return [
    ''.join(document.open()) for document in base.documents(source, split)
  ]


class SplitsTest(absltest.TestCase):
  def test_a_test_split_is_no_training_text(self):
    class Tiny(base.SplitSource):
      spec = 'tfds:tiny'
      num_rows = lambda self: {'test': 3}

    Tiny.__abstractmethods__ = frozenset()
    source = Tiny.__new__(Tiny)
    self.assertEqual([*source.parts('validation')], [('test', 0, 3)])
    with self.assertRaisesRegex(InputError, "are .'test'., without 'train'"):
      next(source.parts('train'))


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

  def test_says_if_tensorflow_may_be_what_is_missing(self):
    with mock.patch.object(importlib.util, 'find_spec', return_value=None):
      with self.assertRaisesRegex(InputError, r"'\.\[tfds\]'"):
        sources.make_source('tfds:c5')

  def test_features(self):
    self.assertEqual(sources.make_source('tfds:pg19').feature, 'book_text')
    if not importlib.util.find_spec('tensorflow'):
      self.skipTest('TFDS lists these datasets only with TensorFlow')
    self.assertEqual(sources.make_source('tfds:c4:url').feature, 'url')
    with self.assertRaisesRegex(InputError, r"one of \['text', 'title'\]"):
      sources.make_source('tfds:wikipedia/20230601.en:body')

  def test_no_network(self):
    source = sources.make_source('tfds:tiny_shakespeare')
    with mock.patch.object(tfds_source, 'is_reachable', return_value=False):
      with self.assertRaisesRegex(InputError, 'tiny_shakespeare/1.0.0'):
        source.num_rows()
    self.assertEmpty(os.listdir(self.folder))

  def test_a_dataset_of_ones_own_whole_and_damaged(self):
    import tensorflow_datasets as tfds

    rows = [f'row {i}'.encode() for i in range(9)] + [b'caf\xe9']
    splits = {'train': rows[:9], 'test': rows}
    folder = pathlib.Path(self.folder, 'own/own/1.0.0')
    folder.mkdir(parents=True)
    for split, rows in splits.items():
      path = folder / f'own-{split}.array_record-00000-of-00001'
      writer = array_record.ArrayRecordWriter(str(path), 'group_size:1')
      for text in rows:
        example = Example()
        example.features.feature['text'].bytes_list.value.append(text)
        writer.write(example.SerializeToString())
      writer.close()
    tfds.folder_dataset.write_metadata(
      data_dir=folder,
      features={'text': tfds.features.Text()},
      split_infos=[
        tfds.core.SplitInfo(name=split, shard_lengths=[len(rows)], num_bytes=0)
        for split, rows in splits.items()
      ],
      check_data=False,
    )
    source = sources.make_source('tfds:own', f'{self.folder}/own')
    self.assertEqual(texts(source), [f'row {i}' for i in range(9)])
    for split, row in (('validation', 9), ('train', 0)):
      with self.assertRaisesRegex(InputError, f'row {row} of split .*: .'):
        texts(source, split)
      (path,) = folder.glob('own-train.array_record*')
      data = path.read_bytes()
      path.write_bytes(data[: len(data) // 2])  # for the next one

  def test_tiny_shakespeare_from_a_copied_file(self):
    if not os.path.isdir(SHARED):
      self.skipTest('no shared data')
    if not importlib.util.find_spec('tensorflow'):
      self.skipTest('this dataset is read with TensorFlow')
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
    with mock.patch.object(tfds_source, 'is_reachable', return_value=False):
      self.assertTrue(source.has_validation)
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
