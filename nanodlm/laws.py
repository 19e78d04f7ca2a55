"""Texts against the exact law of their source: what they cost, what is wrong.

A law is that of whole documents, so each row of the run must hold one:
data.crop='document'. The law's texts end with certainty where they end; what a
model pays for the end of a text and for the padding after it is therefore part
of what it pays in excess of the law.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import logging
import math

import numpy as np

from nanodlm import prompts
from nanodlm.data import sources
from nanodlm.data.config import DataConfig
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.training import metrics
from nanodlm.types import Batch, InputError, Law

log = logging.getLogger('nanodlm')

# Samples of a law that give the frequencies of its features.
NUM_REFERENCES = 10_000
# Features of a smaller share of the law's texts are not compared.
MIN_FREQUENCY = 0.005
# Batches of the law's own samples, to which the samples of a model compare.
NUM_BATCHES = 8
# Gaps of a prompt whose law is printed.
MAX_SHOWN_GAPS = 16
# Seeds of `Law.sample`; sources use 0.
_REFERENCE_SEED, _OWN_SEED = 1, 2


def law_of_rows(data: DataConfig, source: str = '') -> Law | None:
  """Returns the law of rows; None, with the reason logged, if it is not known.

  Args:
    data: `config.data`.
    source: where the text comes from; by default data.source.
  """
  try:
    return require_law(data, source)
  except InputError as error:
    if sources.law_of(source or data.source):
      _log_once(f'nothing is compared to the law of the text: {error}')
    return None


def require_law(data: DataConfig, source: str = '') -> Law:
  """Returns the law of rows; see `law_of_rows`.

  Raises:
    InputError: it is not known, or rows are not whole documents.
  """
  source = source or data.source
  law = sources.law_of(source)
  if law is None:
    known = [
      form
      for cls in sources.SOURCES.values()
      for form in cls.forms
      if cls.has_law
    ]
    raise InputError(
      f'the law of data.source={source!r} is unknown; it is known for {known}'
    )
  if data.crop != 'document':
    raise InputError(
      f'data.crop={data.crop!r} cuts the documents of data.source={source!r}; '
      "a law applies to whole documents: train with data.crop='document'"
    )
  return law


@functools.cache
def _log_once(text: str):
  log.info(text)


def read_text(tokenizer: Tokenizer, row: np.ndarray) -> tuple[str, bool]:
  """Returns the document in a row of ids, and whether its end is there."""
  size = prompts.find_end(row, tokenizer.eos_ids)
  return tokenizer.decode(row[:size]), size < len(row)


def read_texts(tokenizer: Tokenizer, rows: Iterable[np.ndarray]) -> list[str]:
  """Returns the documents in rows of ids."""
  return [read_text(tokenizer, row)[0] for row in rows]


class HeldOut:
  """The nats of held-out documents under their law, each computed once.

  A document that was cut is not compared. It warns of documents that are
  impossible as the tokenizer decodes them, which are not compared either.
  """

  def __init__(self, law: Law, tokenizer: Tokenizer):
    self._law, self._tokenizer = law, tokenizer
    self._known: dict[int, float] = {}
    self._warned: set[bool] = set()

  def nats(self, batch: Batch) -> np.ndarray:
    """Returns -log p of the rows of a batch with an index, [B] float32.

    NaN for rows that are not compared, and for those that fill the batch.
    """
    nats = np.full(len(batch.tokens), math.nan, np.float32)
    for row in np.flatnonzero(batch.num_tokens):
      i = int(batch.index[row])
      if i not in self._known:
        self._known[i] = self._nats_of(batch.tokens[row])
      nats[row] = self._known[i]
    return nats

  def _nats_of(self, row: np.ndarray) -> float:
    text, is_whole = read_text(self._tokenizer, row)
    nats = -self._law.log_prob(text) if is_whole else math.nan
    if math.isfinite(nats):
      return nats
    if text and is_whole not in self._warned:
      self._warned.add(is_whole)
      log.warning(
        'some held-out documents are not compared to the law, such as %r: %s',
        text,
        f'as tokenizer.name={self._tokenizer.name!r} decodes it, '
        f'{self._law.explain(text)}'
        if is_whole
        else 'it is longer than data.length. If training left out such text, '
        'the excess of the bound over the law is too low',
      )
    return math.nan


def describe_gaps(law: Law, tokenizer: Tokenizer, prompt: str) -> str:
  """Describes the exact law of the words in the gaps of a prompt.

  '' if no gap of the prompt has a given size, or tokens are not words.
  """
  parts = prompts.parse_prompt(prompt)
  gaps = [part.size for part in parts if isinstance(part, prompts.Gap)]
  if not all(gaps):
    return ''
  text = ''.join(
    part if isinstance(part, str) else ' '.join([law.gap] * (part.size or 0))
    for part in parts
  )
  example = law.sample(_OWN_SEED, 0)
  if len(tokenizer.encode(example)) != law.num_words(example):
    return ''
  try:
    marginals = law.posterior(text).marginals()
  except InputError as error:
    return f'no exact law of the gaps: {error}'
  shown = [
    ', '.join(f'{word} {share:.0%}' for word, share in list(gap.items())[:3])
    for gap in marginals[:MAX_SHOWN_GAPS]
  ]
  more = len(marginals) - len(shown)
  return (
    'the exact law of the gaps: '
    + ' | '.join(shown)
    + (f' | and of {more} more' if more else '')
  )


def warn_of_other_law(trained: str, source: str):
  """Warns if documents of a source are impossible in that of the training."""
  own, law = sources.law_of(trained), sources.law_of(source)
  if own is None or law is None or trained == source:
    return
  texts = [law.sample(_OWN_SEED, i) for i in range(100)]
  reasons = [own.explain(text) for text in texts]
  if any(reasons):
    num = len(texts) - reasons.count(None)
    log.warning(
      f'the run was trained on {trained!r}, in which {num} of {len(texts)} '
      f'documents of {source!r} are impossible (in one of them '
      f'{next(filter(None, reasons))}): it cannot have learned the law of '
      f'{source!r}, to which it is compared'
    )


def sample_means(law: Law, texts: Sequence[str]) -> dict[str, float]:
  """Measures N >= 1 sampled documents.

  Returns:
    valid_share, of the texts that are possible, and the ends of its 95%
    interval (Wilson's), valid_share_low and valid_share_high; law_nats, the
    mean -log p of the possible ones, and law_nats_ci95, omitted if there are
    none; distinct_share, of different texts.
  """
  nats = -np.array([law.log_prob(text) for text in texts])
  valid = nats[np.isfinite(nats)]
  low, high = metrics.share_interval(len(valid), len(texts))
  means = {
    'valid_share': len(valid) / len(texts),
    'valid_share_low': low,
    'valid_share_high': high,
    'distinct_share': len(set(texts)) / len(texts),
  }
  if len(valid):
    mean, half_width = metrics.ratio_interval(valid, np.ones(len(valid)))
    means |= {'law_nats': mean, 'law_nats_ci95': half_width}
  return {key: x for key, x in means.items() if math.isfinite(x)}


def describe_samples(means: Mapping[str, float], num: int) -> str:
  """Describes the means of `num` samples in one line."""
  share = means['valid_share']
  text = (
    f'{share * num:.0f} of {num} samples possible ({share:.1%}, 95% interval '
    f'{means["valid_share_low"]:.1%} to {means["valid_share_high"]:.1%}), '
    f'{means["distinct_share"]:.1%} distinct'
  )
  if 'law_nats' in means:
    text += f'; -log p by the law: {means["law_nats"]:.1f} nats each'
  return text


class Features:
  """How often the features of a law occur in its documents.

  Attributes:
    law: the law.
    frequencies: {feature: share of the documents}.
  """

  def __init__(self, law: Law):
    self.law = law
    counts = self._count(
      [law.sample(_REFERENCE_SEED, i) for i in range(NUM_REFERENCES)]
    )
    least = MIN_FREQUENCY * NUM_REFERENCES
    self.frequencies = {
      name: num / NUM_REFERENCES
      for name, num in sorted(counts.items())
      if num >= least
    }

  def _count(self, texts: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
      for name in self.law.features(text):
        counts[name] = counts.get(name, 0) + 1
    return counts

  def divergence(self, texts: Sequence[str]) -> float:
    """Returns the divergence of texts, possible or not, from the law.

    It is the Jensen-Shannon divergence between the Bernoulli distributions of a
    feature, in nats, averaged over the features: 0 to log(2).
    """
    counts = self._count(texts)
    frequencies = np.array([counts.get(name, 0) for name in self.frequencies])
    return divergence(
      frequencies / len(texts), np.array([*self.frequencies.values()])
    )

  def own_divergence(self, num_samples: int) -> float:
    """Returns the mean divergence of `num_samples` samples of the law."""
    law, batches = self.law, range(NUM_BATCHES)
    texts = [law.sample(_OWN_SEED, i) for i in range(NUM_BATCHES * num_samples)]
    return float(
      np.mean([self.divergence(texts[i::NUM_BATCHES]) for i in batches])
    )


def divergence(p: np.ndarray, q: np.ndarray) -> float:
  """Returns the mean Jensen-Shannon divergence of Bernoulli variables, nats.

  `p` and `q` [n] are their probabilities.
  """

  def entropy(p):
    x = np.stack([p, 1 - p])
    return -np.sum(x * np.log(np.where(x > 0, x, 1.0)), axis=0)

  mixed = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
  return float(np.mean(np.maximum(mixed, 0.0)))
