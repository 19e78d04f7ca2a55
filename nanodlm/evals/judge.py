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
import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, laws
from nanodlm import lm as lms
from nanodlm.data import overlap, pipeline, sources
from nanodlm.data.config import DataConfig
from nanodlm.data.tokenizers.base import count_lost, Tokenizer, warn_of_loss
from nanodlm.steps import evaluate as evaluate_steps
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


class Judge:
  """What measures samples; this one measures nothing.

  Attributes:
    name: value of --judge.
    columns: columns of what it measures, for `metrics.format_table`.
    panels: which of them are plotted, {key: label}.
    mauve_seed: seed of the clusters of MAUVE; None: it is not measured.
  """

  mauve_seed: int | None = None
  name = ''
  columns: tuple[tuple[str, str, str], ...] = ()
  panels: Mapping[str, str] = {}

  def check(self, data: DataConfig, length: int = 0):
    """Raises InputError if it cannot judge texts like those of a run.

    `length` is that of the texts in tokens; 0: data.length.
    """
    del data, length

  def features(
    self, tokens: Sequence[np.ndarray], tokenizer: Tokenizer
  ) -> np.ndarray:
    """Returns features [N, D] of texts, for MAUVE."""
    raise NotImplementedError

  def measure(
    self,
    tokens: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    source: str,
    reference: np.ndarray | None = None,
  ) -> dict[str, Any]:
    """Measures texts, ids [N, L] of a tokenizer, of a run on a source.

    `reference` [N, D] are the features of texts that MAUVE compares them to.
    """
    del tokens, tokenizer, source, reference
    return {}

  def remarks(self, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Explains the columns of points, in lines below the table."""
    del points
    return []

  def trained_share(
    self, tokens: np.ndarray, tokenizer: Tokenizer
  ) -> float | None:
    """Returns the share of texts [N, L] that it was trained on, if known."""
    del tokens, tokenizer


class LawJudge(Judge):
  """The exact law of the text that a run was trained on."""

  name = LAW
  columns = (
    ('possible', 'valid_share', '.4f'),
    ('law nats', 'law_nats', '.2f'),
    ('distinct', 'distinct_share', '.4f'),
    ('divergence', 'divergence', '.5f'),
    ('of the law', 'own_divergence', '.5f'),
  )
  panels = {
    'valid_share': 'share of possible samples',
    'law_nats': 'nats of a possible sample',
    'divergence': 'divergence of features, nats',
  }

  def __init__(self):
    self._features = {}

  def check(self, data, length=0):
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

  def measure(self, tokens, tokenizer, source, reference=None):
    del reference
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

  def remarks(self, points):
    nums = sorted({point['num_features'] for point in points})
    return [
      'possible: share of the samples that the law of the text allows; law '
      'nats: mean -log p of those. divergence: Jensen-Shannon, in nats, from '
      f'the law, averaged over {" or ".join(map(str, nums))} features; of the '
      'law: its value for the same number of samples of the law itself.'
    ]


class ModelJudge(Judge, abc.ABC):
  """An autoregressive model that scores texts.

  Texts longer than `window` tokens are cut, and each part is scored without the
  ones before it.
  """

  columns = (
    ('gen ppl', 'gen_ppl', '.2f'),
    ('gen bits/byte', 'gen_bits_per_byte', '.4f'),
  )
  window: int

  def __init__(self, name: str, mauve_seed: int | None = None):
    self.name, self.mauve_seed = name, mauve_seed
    self.panels = {'gen_bits_per_byte': f'bits/byte under {name}'}
    if mauve_seed is not None:
      self.columns += (('MAUVE', 'mauve', '.4f'),)
      self.panels['mauve'] = f'MAUVE, features of {name}'

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

  @abc.abstractmethod
  def last_states(self, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the last hidden state [N, D] at the last of each row's ids.

    Of a longer row, that of the last id which fits into a network call.
    """

  def features(self, tokens, tokenizer):
    return self.last_states(self._own_ids(tokens, tokenizer))

  def measure(self, tokens, tokenizer, source, reference=None):
    del source
    judged = self.score(tokens, tokenizer)
    nll, _ = metrics.ratio_interval(judged.nll, judged.num_tokens)
    per_byte, half_width = metrics.ratio_interval(
      judged.nll, judged.num_bytes, where=judged.num_tokens > 0
    )
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
      **self._mauve(tokens, tokenizer, reference),
    }

  def _mauve(self, tokens, tokenizer, reference) -> dict[str, Any]:
    if reference is None or self.mauve_seed is None:
      return {}
    import mauve  # pyright: ignore[reportMissingImports]  (optional)

    result = mauve.compute_mauve(
      p_features=reference,
      q_features=self.features(tokens, tokenizer),
      seed=self.mauve_seed,
    )
    return {
      'mauve': float(result.mauve),
      'mauve_clusters': result.num_buckets,
      'mauve_seed': self.mauve_seed,
    }

  def remarks(self, points):
    is_text = 'text' in {point['judge_tokens'] for point in points}
    shares = {
      evaluate.shown_share({'trained_share': point['judge_trained_share']})
      for point in points
      if 'judge_trained_share' in point
    }
    remark = ', which re-encoded other tokenizers: compare bits/byte' * is_text
    clusters = {
      str(point['mauve_clusters'])
      for point in points
      if 'mauve_clusters' in point
    }
    of_mauve = [
      'MAUVE: by the package mauve-text, on the last hidden state of '
      f'{self.name} at the last token of a text. Samples are compared to the '
      'same number of held-out texts. The line of the held-out text compares '
      'these to other held-out texts: what perfect samples reach. '
      f'{" or ".join(sorted(clusters))} clusters, seed {self.mauve_seed}. It '
      'does not compare to values of another judge, length or number of '
      'samples; papers take 5,000.'
    ]
    return [
      f'Judge: {self.name}; gen ppl is per token of the judge{remark}. A low '
      'value with a low entropy means repetition.',
      f'Share of the texts of the runs that the judge was trained on: '
      f'{", ".join(sorted(shares))}.',
      *(of_mauve if clusters else []),
    ]

  def _own_ids(self, tokens, tokenizer) -> list[np.ndarray]:
    """Returns the ids of texts in the judge's own vocabulary."""
    if self.reads_ids_of(tokenizer):
      return [np.asarray(row, np.int32) for row in tokens]
    return self.encode([tokenizer.decode(row) for row in tokens])

  def score(self, tokens: Sequence[np.ndarray], tokenizer: Tokenizer) -> Judged:
    """Scores N texts given as ids of `tokenizer`.

    A judge of text reads them as they are decoded: its bytes are those of line
    breaks for separators, and of U+FFFD for bytes that are not UTF-8. A judge
    that reads the ids pays for separators as well, which have no bytes.
    """
    rows = self._own_ids(tokens, tokenizer)
    if self.reads_ids_of(tokenizer):
      num_bytes = [tokenizer.text_bytes(row) for row in tokens]
    else:
      num_bytes = [len(tokenizer.decode(row).encode()) for row in tokens]
    windows, is_text, owner = lms.cut_windows(rows, self.window)
    nll = self.score_windows(windows, is_text) if len(windows) else []
    return Judged(
      np.bincount(owner, weights=nll, minlength=len(rows)),
      np.array([len(row) for row in rows]),
      np.array(num_bytes),
    )


class NanodlmJudge(ModelJudge):
  """An autoregressive run. Texts of another tokenizer are re-encoded."""

  def __init__(self, spec: str, batch_size: int, mauve_seed: int | None = None):
    super().__init__(spec, mauve_seed)
    if not pathlib.Path(spec).is_dir():
      raise InputError(
        f"--judge={spec!r} is not 'law', 'hf:NAME_OR_PATH' or a folder of a run"
      )
    settings = configs.make_settings(configs.read_run(spec, '--judge'))
    self.lm = lms.load(spec, settings=settings)
    self.batch_size = batch_size
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

  def reads_ids_of(self, tokenizer):
    return tokenizer.fingerprint == self.lm.tokenizer.fingerprint

  def trained_share(self, tokens, tokenizer):
    rows = self._own_ids(tokens, tokenizer)
    separator_id = self.lm.tokenizer.separator_id
    if self.lm.run.settings.data.has_documents:  # The start of each row is one.
      rows = [np.append(separator_id, row) for row in rows]
    return overlap.load(self.lm.workdir).share_of(rows, separator_id)

  def encode(self, texts):
    return self.lm.tokenizer.encode_to_score(texts)

  def score_windows(self, tokens, is_text):
    segment_ids = self._mark(tokens == self.lm.tokenizer.separator_id)
    batch = lms.make_batch(tokens, is_text, segment_ids)
    return self._score(self.lm.params, jax.random.key(0), batch)['nll']

  def _mark(self, is_separator: np.ndarray) -> np.ndarray | None:
    """Returns the segments of rows, as in training; None without segments."""
    if not self.lm.run.settings.data.segment_ids:
      return None
    return pipeline.mark_documents(is_separator)

  def last_states(self, rows):
    # The state that has read id i is at position i + 1, that of the next one.
    tokens, is_text = lms.pad([x[: self.window - 1] for x in rows], self.window)
    places = is_text.sum(1, dtype=np.int32)
    is_last = np.arange(self.window) == places[:, None] - 1
    # The last separator begins no other segment.
    is_separator = tokens == self.lm.tokenizer.separator_id
    segment_ids = self._mark(is_separator & ~is_last)
    step = evaluate_steps.make_states_step(self.lm.run.scorer, self.lm.run.mesh)
    return lms.map_batches(
      self.lm.run,
      functools.partial(step, self.lm.params),
      (tokens, places, segment_ids),
      self.batch_size,
    )


class HuggingFaceJudge(ModelJudge):
  """A causal language model of `transformers`, in float32. It reads text."""

  def __init__(self, spec: str, batch_size: int, mauve_seed: int | None = None):
    try:
      import torch  # pyright: ignore[reportMissingImports]  (optional)
      import transformers  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
      raise InputError(
        f"--judge={spec!r} needs {error.name}: pip install -e '.[judge]', or "
        'give the workdir of an autoregressive run'
      ) from error
    super().__init__(spec, mauve_seed)
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

  def reads_ids_of(self, tokenizer):
    return False

  def encode(self, texts):
    ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)
    rows = ids['input_ids']
    decoded = self.tokenizer.batch_decode(
      rows, clean_up_tokenization_spaces=False
    )
    num_lost = sum(map(count_lost, texts, decoded))
    num_bytes = sum(len(text.encode()) for text in texts)
    warn_of_loss(f'--judge={self.name!r}', num_lost, num_bytes)
    return [np.asarray(row, np.int64) for row in rows]

  def score_windows(self, tokens, is_text):
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

  def last_states(self, rows):
    import torch  # pyright: ignore[reportMissingImports]  (optional)

    states = []
    for row in rows:
      given = torch.tensor([[self._start_id, *row[: self.window]]])
      with torch.inference_mode():
        called = self.model(
          given.to(self.model.device), output_hidden_states=True
        )
      states.append(called.hidden_states[-1][0, -1].cpu().numpy())
    return np.stack(states)


def make_judge(
  spec: str, batch_size: int = 32, mauve_seed: int | None = None
) -> Judge:
  """Makes a judge: 'law', a workdir of an 'ar' run, 'hf:NAME_OR_PATH', or ''.

  Args:
    spec: value of --judge.
    batch_size: number of windows that are scored at once.
    mauve_seed: see `Judge`.

  Raises:
    InputError: the model cannot be loaded or is not autoregressive, or MAUVE
      cannot be measured.
  """
  if mauve_seed is not None:
    if spec in ('', LAW):
      raise InputError(
        f'--mauve compares features of a model, which --judge={spec!r} lacks: '
        f"give a model as --judge; {LAW!r} measures the texts' divergence from "
        'their law instead'
      )
    try:
      import mauve  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise InputError(
        f"--mauve needs {error.name}: pip install -e '.[mauve]'"
      ) from error
  if not spec:
    return Judge()
  if spec == LAW:
    return LawJudge()
  cls = HuggingFaceJudge if spec.startswith(HUGGING_FACE) else NanodlmJudge
  return cls(spec, batch_size, mauve_seed)


def measure_quality(
  judge: Judge,
  tokens: Sequence[np.ndarray],
  tokenizer: Tokenizer,
  source: str = '',
  reference: np.ndarray | None = None,
) -> dict[str, Any]:
  """Measures the quality of sampled texts.

  Args:
    judge: what measures more than the statistics.
    tokens: N arrays of ids of `tokenizer`, the sampling model's.
    tokenizer: their tokenizer.
    source: data.source of the model; read by the law alone.
    reference: features of texts for MAUVE, see `Judge.features`; None: it is
      not measured.

  Returns:
    The values of `metrics.text_statistics`, in tokens of `tokenizer`. With a
    model as the judge also gen_nll and gen_ppl, nats and perplexity per token
    of the judge; gen_bits_per_byte, which compares across tokenizers and
    judges, and its interval over texts, gen_bits_per_byte_ci95; judge_tokens,
    'own' if the judge scored the ids themselves, 'text' if it encoded their
    text; num_empty, the number of samples without text; and with a reference
    mauve, mauve_clusters and mauve_seed. With the law those of
    `laws.sample_means`; divergence, own_divergence and num_features, see
    `laws.Features`. What is undefined for lack of texts is left out.
  """
  statistics = metrics.text_statistics(tokens)
  return statistics | judge.measure(tokens, tokenizer, source, reference)
