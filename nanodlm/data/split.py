"""Divides a source into training and validation text, and into tasks."""

import array
from collections.abc import Iterator, Mapping, Sequence
import hashlib
import itertools
import logging
import math

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from nanodlm.data import encoder
from nanodlm.data.config import DataConfig
from nanodlm.data.packed import SPLITS
from nanodlm.data.sources.base import Document, documents, Part, Source
from nanodlm.types import InputError

_log = logging.getLogger('nanodlm')


def plan(
  source: Source, data_config: DataConfig, whole: str = ''
) -> list[encoder.Task]:
  """Returns the tasks of encoding a source, with their splits.

  A single document is cut near its end: at a character for data.eval_fraction,
  between two tokens for data.eval_tokens. Several documents are assigned later.
  With `whole`, one of SPLITS, the source is not divided: all of it is of that
  split, or what the source itself has for it.

  Raises:
    InputError: the source is empty, or data.test_tokens is ignored.
  """
  splits = [whole] if whole else SPLITS
  if not source.has_validation:
    splits = ['train']
  parts = [(split, part) for split in splits for part in source.parts(split)]
  num_documents = 1  # 2 stands for more than one.
  if not source.is_tokens:
    # Only the last part of a single document ends it.
    ends = (1 for document in _documents(source) if document.is_end)
    num_documents = sum(itertools.islice(ends, 2))
  if not parts or not num_documents:
    raise _empty(source)
  if whole == 'train' and data_config.test_tokens:
    raise InputError(
      f'data.test_tokens={data_config.test_tokens!r} must be 0 with data.'
      f'eval_source={data_config.eval_source!r}: all of the other text is '
      'trained on'
    )
  if whole:
    return [encoder.Task(i, part, whole) for i, (_, part) in enumerate(parts)]
  is_whole = num_documents == 1 and not source.has_validation
  if data_config.test_tokens and not is_whole:
    raise InputError(
      f'data.test_tokens={data_config.test_tokens!r} are cut off the end of '
      f'one document or of rows of tokens; data.source={source.spec!r} has '
      + ('a validation split' if source.has_validation else 'several documents')
    )
  if is_whole and data_config.fills_rows:
    raise source.error(
      'it contains only one document; give at least two if each is a row'
    )
  is_stream = is_whole and (source.is_tokens or data_config.eval_tokens > 0)
  if is_whole and not is_stream:
    return _cut(source, [part for _, part in parts], data_config.eval_fraction)
  split = 'stream' if is_stream else 'any'
  return [
    encoder.Task(i, part, own if source.has_validation else split)
    for i, (own, part) in enumerate(parts)
  ]


def _empty(source: Source) -> InputError:
  what = 'token ids' if source.is_tokens else 'text'
  return source.error(f'it contains no {what}')


def _documents(source: Source) -> Iterator[Document]:
  """Yields the documents of the train split that are not empty."""
  for document in documents(source, 'train'):
    if next(document.open(), ''):
      yield document


def _cut(
  source: Source, parts: list[Part], eval_fraction: float
) -> list[encoder.Task]:
  """Cuts a single document between training and validation."""
  sizes = [
    sum(len(piece) for doc in source.read(part) for piece in doc.open())
    for part in parts
  ]
  # The first character to hold out, counted from the start of each part.
  position = int(sum(sizes) * (1 - eval_fraction))
  halves = []
  for part, size in zip(parts, sizes, strict=True):
    if position > size:
      halves.append((part, 'train'))
    elif position > 0:
      halves.append((part, 'train', 0, position))
      halves.append((part, 'validation', position))
    else:
      halves.append((part, 'validation'))
    position -= size
  return [encoder.Task(i, *half) for i, half in enumerate(halves)]


def choose(
  hashes: np.ndarray,
  sizes: np.ndarray,
  eval_fraction: float,
  num_alternatives: int = 1,
) -> np.ndarray:
  """Chooses the validation documents, [n] bool, in the order of their hashes.

  Copies of a text stay on one side, as do alternatives, and all groups of them
  that share a text. If all are the same text, none is chosen; otherwise neither
  side is empty.

  Args:
    hashes: [n] uint64, of the documents' texts.
    sizes: [n] int64, in bytes or tokens.
    eval_fraction: the share of the sizes to choose, in (0, 1).
    num_alternatives: see `Source`.
  """
  # np.unique sorts the hashes: an order that does not depend on the texts.
  text_of = np.unique(hashes, return_inverse=True)[1]
  if num_alternatives > 1:
    first = np.repeat(text_of[::num_alternatives], num_alternatives)
    size = text_of.max(initial=-1) + 1
    links = np.ones(len(first)), (first, text_of)
    graph = sparse.coo_array(links, shape=(size, size))
    text_of = csgraph.connected_components(graph, directed=False)[1][text_of]
  text_sizes = np.bincount(text_of, weights=sizes)
  chosen = np.zeros(text_sizes.shape, bool)
  missing = eval_fraction * text_sizes.sum()
  for i, size in enumerate(text_sizes.tolist()):
    if missing <= 0:
      break
    if abs(missing - size) < missing:  # The share becomes more accurate.
      chosen[i] = True
      missing -= size
  if chosen.size == 1:
    chosen[:] = False
  elif chosen.all() or not chosen.any():
    chosen[text_sizes.argmin()] ^= True
  return chosen[text_of]


def assign(
  source: Source,
  tasks: Sequence[encoder.Task],
  tables: Sequence[np.ndarray],
  data_config: DataConfig,
  elsewhere: np.ndarray,
) -> dict[str, list[np.ndarray]]:
  """Returns which documents of each table belong to each of SPLITS, bool.

  Documents whose hashes are in `elsewhere`, uint64, are held out of another
  source of a mixture, and therefore of this one.

  Raises:
    InputError: nothing would be left to train or to evaluate on.
  """
  if tasks[0].split == 'stream':
    return {}
  also = [np.isin(table['hash'], elsewhere) for table in tables]
  if tasks[0].split == 'any':
    validation = _held_out(source, tables, data_config)
    validation = [a | b for a, b in zip(validation, also)]
  else:
    validation = [
      np.full(len(table), task.split == 'validation')
      for task, table in zip(tasks, tables, strict=True)
    ]
  train = [~(a | b) for a, b in zip(validation, also)]
  if elsewhere.size and not any(map(np.any, train)):
    raise source.error(
      'all of its documents are also held out of another source of the '
      'mixture, so none is left to train on; leave it out'
    )
  return {'train': train, 'validation': validation}


def hashes_of(
  source: Source,
  tables: Sequence[np.ndarray],
  sides: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, np.ndarray]:
  """Returns the hashes of each split's documents, uint64 and in order.

  Token ids and a text that is cut between two of them have none.
  """
  hashes: dict[str, np.ndarray] = {
    name: np.zeros([0], np.uint64) for name in SPLITS
  }
  is_cut = any((table['num_ends'] == 0).any() for table in tables)
  for name in () if source.is_tokens or is_cut else sides:
    chosen = [t['hash'][side] for t, side in zip(tables, sides[name])]
    hashes[name] = np.unique(np.concatenate(chosen))
  return hashes


def _held_out(
  source: Source, tables: Sequence[np.ndarray], data_config: DataConfig
) -> list[np.ndarray]:
  key, column = 'eval_fraction', 'num_bytes'
  if data_config.eval_tokens:
    key, column = 'eval_tokens', 'num_tokens'
  sizes = np.concatenate([table[column] for table in tables])
  total = int(sizes.sum())
  wanted = data_config.eval_tokens / total or data_config.eval_fraction
  if wanted >= 1:
    raise _nothing_to_train(data_config, total)
  hashes = np.concatenate([table['hash'] for table in tables])
  chosen = choose(hashes, sizes, wanted, source.num_alternatives)
  share = sizes[chosen].sum() / total
  if share == 0:
    raise source.error(
      f'its {sizes.size} documents are all the same text, so none is left to '
      'evaluate on; give other text'
    )
  if not 0.5 < share / wanted < 2:
    _log.warning(
      f'data.{key}={getattr(data_config, key):g}, but validation has '
      f'{share:.2g} of the {column.removeprefix("num_")}: documents are '
      f'assigned whole, and there are only {sizes.size}'
    )
  return np.split(chosen, np.cumsum([len(table) for table in tables])[:-1])


def stream_borders(
  source: Source, total: int, data_config: DataConfig
) -> dict[str, tuple[int, int]]:
  """Returns the first token of each split of one stream, and one past its last.

  Raises:
    InputError: nothing would be left to train on.
  """
  if not total:
    raise _empty(source)
  eval_tokens, test_tokens = data_config.eval_tokens, data_config.test_tokens
  text_tokens = total - 1  # without the separator
  if source.is_tokens:
    # In whole rows: each split begins with a row.
    length = data_config.length
    text_tokens = total // length * length
    eval_tokens = eval_tokens or int(data_config.eval_fraction * total)
    eval_tokens = max(eval_tokens // length * length, length)
    test_tokens = math.ceil(test_tokens / length) * length
  stop = text_tokens - test_tokens
  start = stop - eval_tokens
  if start <= 0 and data_config.eval_tokens:
    raise _nothing_to_train(data_config, total)
  start = max(start, 0)  # A text shorter than a row is reported later.
  return {
    'train': (0, start),
    'validation': (start, stop if test_tokens else total),
  }


def _nothing_to_train(data_config: DataConfig, total: int) -> InputError:
  return InputError(
    f'data.eval_tokens={data_config.eval_tokens!r} with data.test_tokens='
    f'{data_config.test_tokens!r} leaves nothing to train on: data.source='
    f'{data_config.source!r} has {total} tokens'
  )


def training_texts(
  source: Source, tasks: Sequence[encoder.Task], eval_fraction: float
) -> Iterator[str]:
  """Yields the text that is not held out, without encoding it.

  Several documents without a split of their own are read twice.
  """
  if tasks[0].split != 'any':
    for task in tasks:
      if task.split == 'train':
        for document in source.read(task.part):
          yield from encoder.cut(document.open(), task.start, task.stop)
    return
  hashes, sizes = array.array('Q'), array.array('q')
  for document in _documents(source):
    digest, num_bytes = hashlib.blake2b(digest_size=8), 0
    for piece in document.open():
      data = piece.encode()
      digest.update(data)
      num_bytes += len(data)
    hashes.append(int.from_bytes(digest.digest(), 'little'))
    sizes.append(num_bytes)
  chosen = choose(
    np.array(hashes), np.array(sizes), eval_fraction, source.num_alternatives
  )
  for is_held_out, document in zip(chosen, _documents(source), strict=True):
    if not is_held_out:
      yield from document.open()
