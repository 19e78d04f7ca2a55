"""Judges of sampled text: a language model, or the law of the text.

A model is an autoregressive run of nanodlm, or a causal language model of
Hugging Face (with `transformers` and PyTorch installed), and gives generative
perplexity: how probable it finds the text. A low perplexity alone means little
because repetition is probable (Zheng et al., arXiv 2409.02908);
`measure_quality` never returns it without the entropies and distinct-n.

The law, if it is known, says which samples are possible, and how much their
distribution differs from that of the text.
"""

import abc
from collections.abc import Mapping, Sequence
import math
import types
from typing import Any, NamedTuple

import jax
import numpy as np

from nanodlm import evaluate, laws
from nanodlm import lm as lms
from nanodlm.data import overlap, pipeline, sources
from nanodlm.data.config import DataConfig
from nanodlm.data.tokenizers.base import count_lost, Tokenizer, warn_of_loss
from nanodlm.training import metrics
from nanodlm.types import InputError, reason

HUGGING_FACE = 'hf:'
LAW = 'law'


class Judged(NamedTuple):
  """Nats, tokens of the judge and UTF-8 bytes of N texts, [N] each.

  All tokens count; the first is predicted from the judge's start symbol.
  """

  nll: np.ndarray
  num_tokens: np.ndarray
  num_bytes: np.ndarray


class Judge(abc.ABC):
  """What measures samples.

  Attributes:
    name: value of --judge.
    columns: columns of what it measures, for `metrics.format_table`.
    panels: which of them are plotted, {key: label}.
  """

  name: str
  columns: tuple[tuple[str, str, str], ...]
  panels: Mapping[str, str]

  def check(self, data: DataConfig, length: int = 0):
    """Raises InputError if it cannot judge texts like those of a run.

    `length` is that of the texts in tokens; 0: data.length.
    """
    del data, length  # By default, it judges any text.

  @abc.abstractmethod
  def measure(
    self, tokens: Sequence[np.ndarray], tokenizer: Tokenizer, source: str
  ) -> dict[str, Any]:
    """Measures texts, ids [N, L] of a tokenizer, of a run on a source."""

  @abc.abstractmethod
  def remarks(self, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Explains the columns of points, in lines below the table."""

  def trained_share(
    self, tokens: np.ndarray, tokenizer: Tokenizer
  ) -> float | None:
    """Returns the share of texts [N, L] that it was trained on, if known."""
    del tokens, tokenizer


class LawJudge(Judge):
  """The exact law of the text that a run was trained on."""

  columns = (
    ('possible', 'valid_share', '.4f'),
    ('law nats', 'law_nats', '.2f'),
    ('distinct', 'distinct_share', '.4f'),
    ('divergence', 'divergence', '.5f'),
    ('of the law', 'own_divergence', '.5f'),
  )
  panels = types.MappingProxyType(
    {
      'valid_share': 'share of possible samples',
      'law_nats': 'nats of a possible sample',
      'divergence': 'divergence of features, nats',
    }
  )

  def __init__(self):
    self.name = LAW
    self._features = {}

  def check(self, data: DataConfig, length: int = 0):
    for key in ('source', 'eval_source'):
      try:
        laws.require_law(data, getattr(data, key))
      except InputError as error:
        text = str(error).replace('data.source=', f'data.{key}=')
        raise InputError(f'--judge={LAW}: {text}') from error
    if 0 < length < data.length:
      raise InputError(
        f'--judge={LAW}: --length={length} cuts the documents of a run with '
        f'data.length={data.length}; a law is that of whole ones'
      )

  def measure(
    self, tokens: Sequence[np.ndarray], tokenizer: Tokenizer, source: str
  ) -> dict[str, Any]:
    if source not in self._features:
      law = sources.law_of(source)
      assert law is not None  # See `check`.
      self._features[source] = laws.Features(law)
    features = self._features[source]
    texts = laws.read_texts(tokenizer, tokens)
    return {
      **laws.sample_means(features.law, texts),
      'divergence': features.divergence(texts),
      'own_divergence': features.own_divergence(len(texts)),
      'num_features': len(features.frequencies),
    }

  def remarks(self, points: Sequence[Mapping[str, Any]]) -> list[str]:
    nums = sorted({point['num_features'] for point in points})
    return [
      'possible: share of the samples that the law of the text allows; law '
      'nats: mean -log p of those. divergence: Jensen-Shannon, in nats, from '
      f'the law, averaged over {" or ".join(map(str, nums))} features; of the '
      'law: its value for the same number of samples of the law itself.'
    ]


class ModelJudge(Judge):
  """An autoregressive model that scores texts.

  Texts longer than `window` tokens are cut, and each part is scored without the
  ones before it.
  """

  columns = (
    ('gen ppl', 'gen_ppl', '.2f'),
    ('gen bits/byte', 'gen_bits_per_byte', '.4f'),
  )
  window: int

  def __init__(self, name: str):
    self.name = name
    self.panels = {'gen_bits_per_byte': f'bits/byte under {name}'}

  @abc.abstractmethod
  def reads_ids_of(self, tokenizer: Tokenizer) -> bool:
    """Returns whether it scores a tokenizer's ids as they are, not as text."""

  @abc.abstractmethod
  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Encodes texts as ids of the judge, without special tokens."""

  @abc.abstractmethod
  def score_windows(
    self, tokens: np.ndarray, is_text: np.ndarray
  ) -> np.ndarray:
    """Returns the nats [M] of the text in windows of `cut_windows`, M >= 1."""

  def measure(
    self, tokens: Sequence[np.ndarray], tokenizer: Tokenizer, source: str
  ) -> dict[str, Any]:
    del source
    judged = self.score(tokens, tokenizer)
    nll, _ = metrics.ratio_interval(judged.nll, judged.num_tokens)
    per_byte, half_width = metrics.ratio_interval(judged.nll, judged.num_bytes)
    values = {
      'gen_nll': nll,
      'gen_ppl': math.exp(min(nll, 700.0)),
      'gen_bits_per_byte': per_byte / math.log(2),
      'gen_bits_per_byte_ci95': half_width / math.log(2),
    }
    return {
      **{key: value for key, value in values.items() if math.isfinite(value)},
      'judge_tokens': 'own' if self.reads_ids_of(tokenizer) else 'text',
      'num_empty': int(np.sum(judged.num_bytes == 0)),
    }

  def remarks(self, points: Sequence[Mapping[str, Any]]) -> list[str]:
    is_text = 'text' in {point['judge_tokens'] for point in points}
    shares = {
      evaluate.shown_share({'trained_share': point['judge_trained_share']})
      for point in points
      if 'judge_trained_share' in point
    }
    remark = ', which re-encoded other tokenizers: compare bits/byte' * is_text
    return [
      f'Judge: {self.name}; gen ppl is per token of the judge{remark}. A low '
      'value with a low entropy means repetition.',
      f'Share of the texts of the runs that the judge was trained on: '
      f'{", ".join(sorted(shares))}.',
    ]

  def score(self, tokens: Sequence[np.ndarray], tokenizer: Tokenizer) -> Judged:
    """Scores N texts given as ids of `tokenizer`.

    A judge of text reads them as they are decoded: its bytes are those of line
    breaks for separators, and of U+FFFD for bytes that are not UTF-8. A judge
    that reads the ids pays for separators as well, which have no bytes.
    """
    if self.reads_ids_of(tokenizer):
      rows = [np.asarray(row, np.int32) for row in tokens]
      num_bytes = [tokenizer.text_bytes(row) for row in tokens]
    else:
      texts = [tokenizer.decode(row) for row in tokens]
      rows, num_bytes = self.encode(texts), [len(x.encode()) for x in texts]
    windows, is_text, owner = lms.cut_windows(rows, self.window)
    nll = self.score_windows(windows, is_text) if len(windows) else []
    return Judged(
      np.bincount(owner, weights=nll, minlength=len(rows)),
      np.array([len(row) for row in rows]),
      np.array(num_bytes),
    )


class NanodlmJudge(ModelJudge):
  """An autoregressive run. Texts of another tokenizer are re-encoded."""

  def __init__(self, spec: str, batch_size: int):
    super().__init__(spec)
    self.lm = lms.load(spec)
    settings = self.lm.run.settings
    if not self.lm.run.objective.exact:
      raise InputError(
        f'--judge={spec!r} is a run of objective.name='
        f'{settings.objective["name"]!r}, which gives a bound; a judge must be '
        "autoregressive: a run of objective.name='ar', or 'hf:NAME_OR_PATH'"
      )
    self.window = settings.data.length
    self._score = lms.make_score(
      self.lm.run, num_draws=1, batch_size=batch_size
    )

  def reads_ids_of(self, tokenizer: Tokenizer) -> bool:
    return tokenizer.fingerprint == self.lm.tokenizer.fingerprint

  def trained_share(
    self, tokens: np.ndarray, tokenizer: Tokenizer
  ) -> float | None:
    rows = tokens
    if not self.reads_ids_of(tokenizer):
      rows = self.encode([tokenizer.decode(row) for row in tokens])
    separator_id = self.lm.tokenizer.separator_id
    if self.lm.run.settings.data.has_documents:  # The start of each row is one.
      rows = [np.append(separator_id, row) for row in rows]
    return overlap.load(self.lm.workdir).share_of(rows, separator_id)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return self.lm.tokenizer.encode_to_score(texts)

  def score_windows(
    self, tokens: np.ndarray, is_text: np.ndarray
  ) -> np.ndarray:
    segment_ids = None
    if self.lm.run.settings.data.segment_ids:
      is_separator = tokens == self.lm.tokenizer.separator_id
      segment_ids = pipeline.mark_documents(is_separator)
    batch = lms.make_batch(tokens, is_text, segment_ids)
    return self._score(self.lm.params, jax.random.key(0), batch)['nll']


class HuggingFaceJudge(ModelJudge):
  """A causal language model of `transformers`, in float32. It reads text."""

  def __init__(self, spec: str, batch_size: int):
    try:
      import torch  # pyright: ignore[reportMissingImports]  (optional)
      import transformers  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
      raise InputError(
        f"--judge={spec!r} needs {error.name}: pip install -e '.[judge]', or "
        'give the workdir of an autoregressive run'
      ) from error
    super().__init__(spec)
    name, self.batch_size = spec.removeprefix(HUGGING_FACE), batch_size
    try:
      self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
      model = transformers.AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
      raise InputError(
        f'--judge={spec!r} cannot be loaded: {reason(error)}'
      ) from error
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self.model = model.float().eval().to(device)
    # The start symbol takes one position.
    longest = getattr(model.config, 'max_position_embeddings', 1024)
    self.window = longest - 1
    ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
    self._start_id = next((i for i in ids if i is not None), None)
    if self._start_id is None:
      raise InputError(
        f'--judge={spec!r} needs a tokenizer with a start or end symbol, from '
        'which the first token is predicted'
      )

  def reads_ids_of(self, tokenizer: Tokenizer) -> bool:
    return False

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)
    rows = ids['input_ids']
    decoded = self.tokenizer.batch_decode(
      rows, clean_up_tokenization_spaces=False
    )
    num_lost = sum(map(count_lost, texts, decoded))
    num_bytes = sum(len(text.encode()) for text in texts)
    warn_of_loss(f'--judge={self.name!r}', num_lost, num_bytes)
    return [np.asarray(row, np.int64) for row in rows]

  def score_windows(
    self, tokens: np.ndarray, is_text: np.ndarray
  ) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]  (optional)

    longest = int(is_text.sum(1).max())
    parts = []
    for first in range(0, len(tokens), self.batch_size):
      rows = tokens[first : first + self.batch_size, :longest]
      target = torch.tensor(rows, dtype=torch.long)
      start = torch.full_like(target[:, :1], self._start_id)
      # The text does not attend to the padding on its right.
      given = torch.cat([start, target[:, :-1]], dim=1)
      with torch.inference_mode():
        logits = self.model(given.to(self.model.device)).logits.float()
        nll = torch.nn.functional.cross_entropy(
          logits.transpose(1, 2), target.to(logits.device), reduction='none'
        )
      parts.append(nll.cpu().numpy())
    return np.sum(np.concatenate(parts) * is_text[:, :longest], 1)


def make_judge(spec: str, batch_size: int = 32) -> Judge:
  """Makes a judge: 'law', a workdir of an 'ar' run, or 'hf:NAME_OR_PATH'.

  `batch_size` windows are scored at once. Raises InputError if the model cannot
  be loaded or is not autoregressive.
  """
  if spec == LAW:
    return LawJudge()
  cls = HuggingFaceJudge if spec.startswith(HUGGING_FACE) else NanodlmJudge
  return cls(spec, batch_size)


def measure_quality(
  judge: Judge | None,
  tokens: Sequence[np.ndarray],
  tokenizer: Tokenizer,
  source: str = '',
) -> dict[str, Any]:
  """Measures the quality of sampled texts.

  Args:
    judge: what measures more than the statistics; None is nothing.
    tokens: N arrays of ids of `tokenizer`, the sampling model's.
    tokenizer: their tokenizer.
    source: data.source of the model; read by the law alone.

  Returns:
    The values of `metrics.text_statistics`, in tokens of `tokenizer`. With a
    model as the judge also gen_nll and gen_ppl, nats and perplexity per token
    of the judge; gen_bits_per_byte, which compares across tokenizers and
    judges, and its interval over texts, gen_bits_per_byte_ci95; judge_tokens,
    'own' if the judge scored the ids themselves, 'text' if it encoded their
    text; num_empty, the number of samples without text. With the law those of
    `laws.sample_means`; divergence, own_divergence and num_features, see
    `laws.Features`. What is undefined for lack of texts is left out.
  """
  quality = metrics.text_statistics(tokens)
  if judge is not None:
    quality |= judge.measure(tokens, tokenizer, source)
  return quality
