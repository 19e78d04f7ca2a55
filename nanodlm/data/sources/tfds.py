"""Text datasets of TensorFlow Datasets (TFDS).

TensorFlow is imported only if TFDS itself needs it.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import sys
from typing import Any

from absl import logging

from nanodlm.data.network import is_reachable
from nanodlm.data.sources import base
from nanodlm.types import InputError, reason


@dataclasses.dataclass(frozen=True)
class TfdsSource(base.SplitSource):
  """A dataset with a text feature, one document per example."""

  forms = ('tfds:NAME', 'tfds:NAME:FEATURE')

  builder: Any  # tfds.core.DatasetBuilder
  feature: str

  @classmethod
  def make(cls, spec: str, name: str, data_dir: str) -> 'TfdsSource':
    """Finds the dataset and its text feature; downloads nothing."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    name, _, feature = name.partition(':')
    # TFDS's own folder is last. Other programs share it, so it receives what
    # has to be downloaded.
    roots = [root for root in (data_dir, constants.DATA_DIR) if root]
    builders = []
    for root in roots:
      try:
        with quiet_tfds():
          builders.append(tfds.builder(name, data_dir=root))
      except tfds.core.DatasetNotFoundError:
        pass  # A dataset that TFDS does not know may be in another folder.
      except ValueError as error:  # For example an unknown config or version.
        text = reason(error).strip()
        raise InputError(f'data.source={spec!r}: {text}') from error
    if not builders:
      known = tfds.list_builders(with_community_datasets=False)
      close = difflib.get_close_matches(name.partition('/')[0], known)
      raise InputError(
        f'data.source={spec!r}: TFDS lacks the dataset {name!r}, and it is not '
        f'in {" or ".join(roots)}; close names: {close}{_hint()}'
      )
    ready = [*filter(_is_prepared, builders), *filter(_has_downloads, builders)]
    builder = [*ready, builders[-1]][0]
    features: Any = builder.info.features
    is_text = lambda key: isinstance(features[key], tfds.features.Text)
    texts = sorted(filter(is_text, features))
    feature = feature or (texts[0] if len(texts) == 1 else 'text')
    source = cls(spec, builder, feature)
    if feature not in texts:
      raise source.error(
        f"give a text feature as 'tfds:{name}:FEATURE', one of {texts}"
      )
    return source

  def fingerprint(self) -> str:
    # A version stands for its text, as TFDS asks of datasets.
    return self.builder.info.full_name  # name/config/version

  def num_rows(self) -> Mapping[str, int]:
    self._prepare()
    splits = self.builder.info.splits
    return {name: split.num_examples for name, split in splits.items()}

  def read(self, part: base.Part) -> Iterator[base.Document]:
    own, start, stop = part
    row = start
    try:
      if self.builder.info.file_format.value == 'array_record':
        rows = self.builder.as_data_source(own)
        examples = (rows[i] for i in range(start, stop))
      else:  # Prepared by another program as TFRecord, which needs TensorFlow.
        import tensorflow_datasets as tfds

        dataset = self.builder.as_dataset(f'{own}[{start}:{stop}]')
        examples = tfds.as_numpy(dataset)
      for example in examples:
        yield base.document_of(example[self.feature].decode())
        row += 1
    # The readers raise errors of many classes for damaged files.
    except Exception as error:
      raise self.error(
        f'row {row} of split {own!r} in {self.builder.data_dir} cannot be '
        f'read: {reason(error)}{_hint()}'
      ) from error

  def _prepare(self) -> None:
    """Downloads and prepares the dataset, or fails within seconds."""
    if _is_prepared(self.builder):
      return
    name, urls = self.builder.info.full_name, self.builder.url_infos
    url = next(iter(urls or ['https://storage.googleapis.com']))
    if not _has_downloads(self.builder) and not is_reachable(url):
      raise self.error(
        f'the dataset {name} is not prepared in {self.builder.data_dir} and '
        f'{url} does not answer; connect to the network once, or copy the '
        'prepared dataset there'
      )
    try:
      with quiet_tfds():
        self.builder.download_and_prepare(file_format='array_record')
    except (ImportError, OSError, RuntimeError) as error:
      raise self.error(
        f'TFDS could not prepare {name}: {reason(error)}{_hint()}'
      ) from error


def _hint() -> str:
  """Returns what may be missing if TensorFlow is not installed, else ''."""
  if importlib.util.find_spec('tensorflow'):
    return ''
  return (
    '. TFDS needs TensorFlow for TFRecord files and for almost half of its '
    "datasets: pip install -e '.[tfds]'"
  )


def _is_prepared(builder: Any) -> bool:
  # builder.is_prepared() warns about a missing folder.
  return os.path.exists(os.path.join(builder.data_dir, 'dataset_info.json'))


def _has_downloads(builder: Any) -> bool:
  folder = os.path.join(builder.data_dir_root, 'downloads', builder.name)
  return os.path.isdir(folder) and bool(os.listdir(folder))


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
  """Keeps TFDS from printing and logging."""
  import tensorflow_datasets as tfds

  verbosity = logging.get_verbosity()
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)
