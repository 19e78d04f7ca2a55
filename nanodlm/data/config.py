"""The checked settings of `config.data` and `config.tokenizer`."""

import dataclasses
from typing import get_args, Literal

from nanodlm.data import sources, tokenizers
from nanodlm.types import check_at_least, InputError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """`config.data`; configs/base.py explains the keys."""

  source: str
  eval_source: str
  length: int
  eval_fraction: float
  eval_tokens: int
  test_tokens: int
  data_dir: str
  crop: Literal['chunk', 'random', 'document']
  long_documents: Literal['drop', 'cut', 'refuse']
  segment_ids: bool
  padding: Literal['eos', 'masked']
  clean_prefix_rate: float
  clean_infill_rate: float
  prefetch_batches: int
  num_threads: int

  @property
  def is_pairs(self) -> bool:
    """Whether a row is a prompt and its response."""
    return sources.find_class(self.source).is_pairs

  @property
  def num_alternatives(self) -> int:
    """Number of consecutive rows that belong together; see `sources.base`."""
    return sources.find_class(self.source).num_alternatives

  @property
  def is_chat(self) -> bool:
    """Whether a row has whole conversations."""
    return sources.find_class(self.source).is_chat

  @property
  def fills_rows(self) -> bool:
    """Whether separators fill the rest of a row."""
    return self.has_documents or self.is_chat

  @property
  def has_documents(self) -> bool:
    """Whether a row is a whole document: a text or a pair."""
    return self.is_pairs or self.crop == 'document'

  def __post_init__(self):
    check_at_least(2, self, 'data', 'length')
    check_at_least(1, self, 'data', 'prefetch_batches', 'num_threads')
    check_at_least(0, self, 'data', 'eval_tokens', 'test_tokens')
    for field in dataclasses.fields(self):
      if allowed := [*get_args(field.type)]:
        is_allowed = getattr(self, field.name) in allowed
        self._check(field.name, is_allowed, f'is not one of {allowed}')
    sources.parse_mixture(self.source)
    if self.eval_source:
      sources.parse_mixture(self.eval_source, 'data.eval_source')
      own, other = map(sources.find_class, (self.source, self.eval_source))
      self._check(
        'eval_source',
        (own.is_pairs, own.is_chat, own.num_alternatives)
        == (other.is_pairs, other.is_chat, other.num_alternatives),
        f'and data.source={self.source!r} must both be pairs, both be '
        'preferences, both be conversations, or none of these',
      )
    # Text is held out in exactly one way.
    self._check(
      'eval_tokens',
      not (self.eval_tokens and self.eval_fraction),
      f'and data.eval_fraction={self.eval_fraction!r} both say how much is '
      'held out; set one of them to 0',
    )
    self._check(
      'eval_fraction',
      self.eval_source or self.eval_tokens or 0 < self.eval_fraction < 1,
      'must be in (0, 1), or 0 with data.eval_tokens or data.eval_source: '
      'every run is evaluated on text it was not trained on',
    )
    self._check(
      'test_tokens',
      self.eval_tokens or not self.test_tokens,
      'needs data.eval_tokens, the tokens before them',
    )
    for key in ('clean_prefix_rate', 'clean_infill_rate'):
      self._check(key, 0 <= getattr(self, key) <= 1, 'must be in [0, 1]')
    self._check(
      'clean_prefix_rate',
      self.clean_prefix_rate + self.clean_infill_rate <= 1,
      f'and data.clean_infill_rate={self.clean_infill_rate!r} must not add up '
      'to more than 1',
    )
    self._check(
      'clean_infill_rate',
      self.length >= 3 or not self.clean_infill_rate,
      f'needs data.length >= 3, not {self.length!r}',
    )
    where = f'with data.source={self.source!r}'
    if self.is_pairs or self.is_chat:
      text = f'is not allowed {where}: a window would begin inside a document'
      self._check('crop', self.crop != 'random', text)
      text = f'is not allowed {where}: what is to be answered is given already'
      for key in ('clean_prefix_rate', 'clean_infill_rate'):
        self._check(key, not getattr(self, key), text)
    if self.is_chat and not self.has_documents:
      text = (
        f'{where}: several conversations share a row, which need '
        "data.segment_ids=True and data.padding='masked'; or use "
        "data.crop='document', a row for each"
      )
      self._check('segment_ids', self.segment_ids, text)
      self._check('padding', self.padding == 'masked', text)
      return
    if not self.has_documents:
      text = f"is ignored {where}, except with data.crop='document'"
      self._check('padding', self.padding == 'eos', text)
      self._check('long_documents', self.long_documents == 'drop', text)
      return
    text = f'is not allowed {where}: a row is a single document or pair'
    self._check('segment_ids', not self.segment_ids, text)
    for _, source in sources.parse_mixture(self.source):
      self._check(
        'crop',
        not sources.find_class(source).is_tokens,
        f'does not apply to {source!r}: rows of ids are not documents',
      )

  def _check(self, key: str, is_right: object, text: str) -> None:
    if not is_right:
      raise InputError(f'data.{key}={getattr(self, key)!r} {text}')


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """`config.tokenizer`; configs/base.py explains the keys."""

  name: str
  path: str
  vocab_size: int
  chat_template: str = ''

  @property
  def is_trained(self) -> bool:
    """Whether a model is trained on the training text."""
    cls = tokenizers.find_class(self.name)
    return bool(cls.min_trained_size) and not self.path

  def __post_init__(self):
    cls = tokenizers.find_class(self.name)
    name = f'tokenizer.name={self.name!r}'
    path = f'tokenizer.path={self.path!r}'
    vocab_size = f'tokenizer.vocab_size={self.vocab_size!r}'
    if self.path and not cls.reads_path:
      readers = [k for k, c in tokenizers.TOKENIZERS.items() if c.reads_path]
      raise InputError(f'{path} is ignored by {name}; it is read by {readers}')
    if cls.reads_path and not self.path and not self.is_trained:
      raise InputError(
        f'{path} must be the workdir (or the file) that {name} reads'
      )
    if self.vocab_size and not self.is_trained:
      raise InputError(
        f'{vocab_size} is ignored with {name}, {path}: it is the size of a '
        'model that is trained on the source; leave it at 0'
      )
    if self.is_trained and self.vocab_size < cls.min_trained_size:
      raise InputError(
        f'{vocab_size} must be >= {cls.min_trained_size} (2048, for example) '
        'to train a model on the source; or name a model in tokenizer.path'
      )
