"""What a run was trained on, as hashes: how much of a text is in it verbatim.

A passage is the tokens that make up about 64 bytes, or a whole document that is
shorter. If rows are documents, it is a whole document, and of conversations
always a whole conversation, so that one which was cut is another one. Of all
passages of the training text, those with the smallest hashes are kept, at most
a million. The same choice among the passages of another text gives an estimate
of the share that was trained on, in any order and from any file. It includes
what texts have in common by chance. If only a part of a large training text was
read, passages that it repeats count too much, as do those of an earlier run:
it is then an overestimate. Documents that were joined, divided or changed are
not recognised.

Source: FracMinHash, Hera et al., Genome Research 33 (2023) 1061.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import logging
import pathlib
from typing import Any

import numpy as np

from nanodlm import workdir as workdirs
from nanodlm.data import encoder
from nanodlm.data import packed as packed_data
from nanodlm.data.packed import PackedData
from nanodlm.types import InputError, reason

PASSAGE_BYTES = 64
MAX_HASHES = 1 << 20
# In a larger text, evenly spaced blocks are read, which takes a few seconds.
_MAX_ROWS = 1 << 17
_BLOCK_TOKENS = 1 << 18
# Smaller shares of a text that was trained on round to 0.0%.
MIN_SHOWN_SHARE = 0.0005

_log = logging.getLogger('nanodlm')
# Since 2, passages of conversations are whole conversations.
_VERSION = 2
_BASE, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # SplitMix64.


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
  """Hashes of passages of a training text.

  Attributes:
    window: tokens of a passage.
    num_bits: leading zero bits of the hashes that are kept.
    coverage: the share of the training text that was read.
    hashes: [n] uint64, in ascending order.
    unknown: why the record is incomplete; '' if it is not.
    version: of what the hashes are.
  """

  window: int
  num_bits: int
  coverage: float
  hashes: np.ndarray
  unknown: str = ''
  version: int = _VERSION

  def share(self, packed: PackedData) -> float | None:
    """Returns the share of the validation text that was trained on.

    None if the text has too few passages to say, or the record is too old.
    """
    if packed.held_out:
      shares = [
        (share, weight * _tokens_per_row(part))
        for weight, part in packed.held_out
        if (share := self.share(part)) is not None
      ]
      if not shares:
        return None
      found, weights = zip(*shares)
      return float(np.average(found, weights=weights))
    window = self.window
    if packed.is_chat:
      if self.version < _VERSION:
        return None
      window = packed.length
    texts, _ = _blocks(packed, packed.validation)
    return self.share_of(texts, packed.tokenizer.separator_id, window)

  def share_of(
    self, texts: Iterable[np.ndarray], separator_id: int, window: int = 0
  ) -> float | None:
    """Returns the share of texts, ids [n] each, that was trained on.

    `window` is that of the passages; 0: that of the record.
    """
    num_found = num = 0
    if not self.hashes.size:
      return None
    for text in texts:
      hashes, sizes = _passages(text, window or self.window, separator_id)
      kept = _has_zero_bits(hashes, self.num_bits)
      places = np.searchsorted(self.hashes[:-1], hashes[kept])
      is_found = self.hashes[places] == hashes[kept]
      num_found += sizes[kept][is_found].sum()
      num += sizes[kept].sum()
    return min(float(num_found / num / self.coverage), 1.0) if num else None


def remember(
  workdir: str, packed: PackedData, init_from: str = ''
) -> float | None:
  """Writes what a run is trained on into its workdir, unless it is there.

  `init_from` is the workdir whose weights training starts from, if any. Returns
  the share of the validation text that is in the training text.
  """
  path = pathlib.Path(workdir) / workdirs.TRAINED_ON
  if not path.exists():
    _log.info('looking for the held-out text in the training text')
    record = make_record(packed, load(init_from) if init_from else None)
    partial = path.with_name(f'.{path.name}.tmp')
    with open(partial, 'wb') as file:
      np.savez(file, **dataclasses.asdict(record))
    partial.replace(path)
  share = load(workdir).share(packed)
  if share is not None and share >= MIN_SHOWN_SHARE:
    _log.log(
      logging.WARNING if share > 0.1 else logging.INFO,
      '%.1f%% of the held-out text is also in the training text, word for word',
      100 * share,
    )
  return share


def load(workdir: str) -> Record:
  """Returns what the run in a workdir was trained on, as far as it is known.

  Raises:
    InputError: the file is damaged.
  """
  path = pathlib.Path(workdir) / workdirs.TRAINED_ON
  if not path.exists():
    unknown = f'{workdir} does not hold a record of it, {path.name}'
    return Record(0, 0, 1.0, np.zeros([0], np.uint64), unknown)
  try:
    with np.load(path) as saved:
      values: Any = {name: saved[name] for name in saved.files}
      values.setdefault('version', np.array(1))
      hashes = values.pop('hashes')
      return Record(hashes=hashes, **{k: v.item() for k, v in values.items()})
  # NumPy raises errors of many classes for a damaged file.
  except Exception as error:
    raise InputError(
      f'{path}, the record of the training text, is damaged ({reason(error)}); '
      'without the file it is unknown what was trained on'
    ) from error


def make_record(packed: PackedData, earlier: Record | None = None) -> Record:
  """Returns the record of a dataset's training text.

  It includes `earlier`, that of the run whose weights training starts from.
  """
  counts = packed.metadata['train']
  per_token = max(counts['num_bytes'] / counts['num_tokens'], 1)
  window = packed.length
  if not _has_whole_documents(packed):
    window = min(max(round(PASSAGE_BYTES / per_token), 2), window)
  num_bits, coverage, unknown = 0, 1.0, ''
  hashes = np.zeros([0], np.uint64)
  if earlier:
    unknown = earlier.unknown
    if earlier.window > packed.length:
      unknown = 'passages of an earlier run are longer than data.length'
    elif earlier.hashes.size:
      window, num_bits = earlier.window, earlier.num_bits
      hashes, coverage = earlier.hashes, earlier.coverage
  own = packed.length if packed.is_chat else window
  blocks, share = _blocks(packed, packed.train)
  for block in blocks:
    more, _ = _passages(block, own, packed.tokenizer.separator_id)
    hashes = np.append(hashes, more[_has_zero_bits(more, num_bits)])
    if hashes.size > 2 * MAX_HASHES:
      hashes, num_bits = _smallest(hashes, num_bits)
  hashes, num_bits = _smallest(hashes, num_bits)
  return Record(window, num_bits, min(share, coverage), hashes, unknown)


def _smallest(hashes: np.ndarray, num_bits: int) -> tuple[np.ndarray, int]:
  """Returns at most MAX_HASHES of them, and their leading zero bits."""
  hashes = np.unique(hashes)
  while hashes.size > MAX_HASHES:
    num_bits += 1
    hashes = hashes[_has_zero_bits(hashes, num_bits)]
  return hashes, num_bits


def _blocks(
  packed: PackedData, rows: Any
) -> tuple[Iterator[np.ndarray], float]:
  """Returns blocks of the text and their share.

  A block of packed text includes the next row, in which passages end.
  """
  size = max(_BLOCK_TOKENS // packed.length, 1)
  num, last = -(-len(rows) // size), size + (not _has_whole_documents(packed))
  num_read = min(num, max(_MAX_ROWS // size, 1))
  starts = [i * num // num_read * size for i in range(num_read)]
  blocks = (
    np.concatenate(
      [
        _ids(packed, row)
        for row in packed_data.read_rows(
          rows, start, min(start + last, len(rows))
        )
      ]
    )
    for start in starts
  )
  return blocks, num_read / num if num else 1.0


def _tokens_per_row(packed: PackedData) -> float:
  counts = packed.metadata['validation']
  if not packed.is_documents:
    return counts['num_tokens'] / counts['num_rows']
  # Separators fill the rows after the end of a document.
  blocks, share = _blocks(packed, packed.validation)
  end = packed.tokenizer.separator_id
  num_tokens = sum(int(np.sum(text != end)) for text in blocks)
  return 1 + num_tokens / (share * len(packed.validation))


def _has_whole_documents(packed: PackedData) -> bool:
  """Returns whether no document continues in another row."""
  return packed.is_documents or packed.is_chat


def _ids(packed: PackedData, row: Mapping[str, Any]) -> np.ndarray:
  """Returns the ids of a row, after a separator if a document begins there.

  The document in the row before may have been cut, without a separator. The
  separators in a conversation, such as those after messages, become masks.
  """
  ids = row['tokens'][row.get('num_given', 0) :]
  separator = packed.tokenizer.separator_id
  if packed.is_chat:
    is_text = row['marks'] & encoder.FILL == 0
    ids = np.where(ids == separator, packed.tokenizer.mask_id, ids)[is_text]
    starts = np.flatnonzero(row['marks'][is_text] & encoder.START)
    ids = np.append(np.insert(ids, starts, separator), separator)
  elif packed.is_documents:
    ids = np.append(separator, ids)
  return ids


def _has_zero_bits(hashes: np.ndarray, num_bits: int) -> np.ndarray:
  return hashes >> np.uint64(63 - num_bits) >> np.uint64(1) == 0


def _passages(
  tokens: np.ndarray, window: int, separator_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the hashes of all passages in ids [n], and their sizes in tokens.

  A passage does not contain a separator. What begins before the tokens
  or ends after them counts if it fills a window.
  """
  n = tokens.size
  powers = np.cumprod(np.full(n, _BASE, np.uint64))
  inverse = np.cumprod(np.full(n, pow(_BASE, -1, 1 << 64), np.uint64))
  # sums[j] - sums[i] is the polynomial of tokens i to j - 1, times a power.
  values = _mix(tokens.astype(np.uint64) + np.uint64(1))
  sums = np.append(np.uint64(0), np.cumsum(values * powers))
  is_separator = tokens == separator_id
  counts = np.append(0, np.cumsum(is_separator))
  starts = np.arange(max(n - window + 1, 0))
  starts = starts[counts[starts + window] == counts[starts]]
  stops, ends_before = starts + window, np.append(False, is_separator)
  # A document that fills a window is a single passage.
  is_whole = ends_before[starts] & np.append(is_separator, True)[stops]
  sizes = np.where(is_whole, window, 1)
  # Documents shorter than a window; their separators are hashed as well.
  ends = np.flatnonzero(is_separator) + 1
  is_short = (np.diff(ends) <= window) & (np.diff(ends) > 1)
  starts = np.append(starts, ends[:-1][is_short])
  stops = np.append(stops, ends[1:][is_short])
  sizes = np.append(sizes, np.diff(ends)[is_short])
  return _mix((sums[stops] - sums[starts]) * inverse[starts]), sizes


def _mix(x: np.ndarray) -> np.ndarray:
  """Mixes the bits of uint64 numbers, one to one."""
  x = (x ^ x >> np.uint64(30)) * np.uint64(_MIX)
  return x ^ x >> np.uint64(31)
