"""Generative perplexity: how probable another model finds sampled text.

A judge is an autoregressive checkpoint of nanodlm, or a Hugging Face causal
language model where `transformers` and PyTorch are installed. A low perplexity
alone means little, since repetition is probable (Zheng et al., arXiv 2409.02908):
`measure_quality` never returns it without the entropies and distinct-n.
"""

import dataclasses
import functools
import importlib.util
import math
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from nanodlm import evaluate
from nanodlm.data import pipeline, tokenizers
from nanodlm.training import metrics
from nanodlm.types import InputError

HUGGING_FACE = 'hf:'


class Judged(NamedTuple):
  """What a judge says of N texts.

  Attributes:
    nll: [N], nats of each text; all its tokens count, the first one is predicted
      from the judge's start symbol.
    num_tokens: [N], tokens of the JUDGE.
    num_bytes: [N], UTF-8 bytes.
  """

  nll: np.ndarray
  num_tokens: np.ndarray
  num_bytes: np.ndarray


class Judge(Protocol):
  """An autoregressive model that scores texts.

  Attributes:
    name: what it was made from.
    window: tokens that it sees at once; longer texts are cut into such windows,
      each without the ones before it.
  """

  name: str
  window: int

  def score(
    self, tokens: np.ndarray, tokenizer: tokenizers.Tokenizer
  ) -> Judged:
    """Scores texts given as ids [N, L] of `tokenizer`."""

  def reads_ids_of(self, tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether `tokenizer`'s ids are scored as they are, not the text of them."""


def make_judge(spec: str, batch_size: int = 32) -> Judge:
  """A judge by name.

  Args:
    spec: the workdir of an autoregressive run, or 'hf:NAME_OR_PATH'.
    batch_size: windows scored at once.

  Raises:
    InputError: there is no such model, it is not autoregressive, or transformers
      is not installed.
  """
  if spec.startswith(HUGGING_FACE):
    return _load_hugging_face(spec, batch_size)
  run, params, _ = evaluate.open_run(spec)
  if not run.objective.exact:
    raise InputError(
      f'--judge={spec!r} is a run of objective.name='
      f'{run.config.objective.name!r}, which gives a bound; a judge must be '
      "autoregressive (objective.name='ar'), or 'hf:NAME_OR_PATH'"
    )
  return NanodlmJudge(spec, run, params, batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class NanodlmJudge:
  """An autoregressive checkpoint. Texts of another tokenizer are re-encoded.

  Attributes:
    name: its workdir.
    run: the run.
    params: its parameters.
    batch_size: windows scored at once.
  """

  name: str
  run: evaluate.Run
  params: Any
  batch_size: int

  @property
  def window(self) -> int:
    """Tokens that it reads at once: those of a row of its training."""
    return self.run.settings.data.length

  @functools.cached_property
  def _score(self):
    return evaluate.make_score(
      self.run, num_draws=1, batch_size=self.batch_size
    )

  def reads_ids_of(self, tokenizer: tokenizers.Tokenizer) -> bool:
    return tokenizer.fingerprint == self.run.tokenizer.fingerprint

  def score(
    self, tokens: np.ndarray, tokenizer: tokenizers.Tokenizer
  ) -> Judged:
    num_bytes = tokenizer.num_bytes[tokens].sum(1)
    if self.reads_ids_of(tokenizer):
      rows = list(np.asarray(tokens, np.int32))
    else:
      texts = [tokenizer.decode(row) for row in tokens]
      rows = self.run.tokenizer.encode_batch(texts)
    windows, weight, owner = cut_windows(rows, self.window)
    if not len(windows):  # no text at all
      return Judged(np.zeros(len(rows)), np.zeros(len(rows), int), num_bytes)
    batch = {'tokens': windows, 'weight': weight}
    if self.run.settings.data.segment_ids:
      is_separator = windows == self.run.tokenizer.separator_id
      batch['segment_ids'] = pipeline.mark_documents(is_separator)
    nll = self._score(self.params, jax.random.key(0), batch)['nll']
    total = np.bincount(owner, weights=nll, minlength=len(rows))
    return Judged(total, np.array([len(row) for row in rows]), num_bytes)


def cut_windows(
  rows: list[np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts rows of any length into windows.

  Args:
    rows: N arrays of ids, [n] each.
    size: of a window.

  Returns:
    tokens [M, size] int32, padded with zeros behind; weight [M, size] float32, 0
    on the padding; and the row of each window, [M].
  """
  parts = [
    (i, row[first : first + size])
    for i, row in enumerate(rows)
    for first in range(0, len(row), size)
  ]
  tokens = np.zeros((len(parts), size), np.int32)
  weight = np.zeros((len(parts), size), np.float32)
  for j, (_, part) in enumerate(parts):
    tokens[j, : len(part)], weight[j, : len(part)] = part, 1
  return tokens, weight, np.array([i for i, _ in parts], np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceJudge:
  """A causal language model of `transformers`, in float32. It reads the text.

  Attributes:
    name: 'hf:...'.
    tokenizer: transformers' tokenizer.
    model: transformers' model.
    window: tokens that it sees at once, its start symbol not counted.
    batch_size: windows scored at once.
  """

  name: str
  tokenizer: Any
  model: Any
  window: int
  batch_size: int

  def reads_ids_of(self, tokenizer: tokenizers.Tokenizer) -> bool:
    del tokenizer
    return False

  @property
  def start_id(self) -> int:
    """What the first token is predicted from."""
    ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
    return next(i for i in ids if i is not None)

  def score(
    self, tokens: np.ndarray, tokenizer: tokenizers.Tokenizer
  ) -> Judged:
    import torch  # pylint: disable=g-import-not-at-top

    texts = [tokenizer.decode(row) for row in tokens]
    rows = [
      np.asarray(
        self.tokenizer(text, add_special_tokens=False, verbose=False)[
          'input_ids'
        ],
        np.int64,
      )
      for text in texts
    ]
    num_bytes = tokenizer.num_bytes[tokens].sum(1)
    size = min(self.window, max(len(row) for row in rows))
    if not size:  # no text at all
      return Judged(np.zeros(len(rows)), np.zeros(len(rows), int), num_bytes)
    windows, weight, owner = cut_windows(rows, size)
    parts = []
    for first in range(0, len(windows), self.batch_size):
      target = torch.tensor(
        windows[first : first + self.batch_size], dtype=torch.long
      )
      start = torch.full_like(target[:, :1], self.start_id)
      # Padding stands behind the text, where a causal model does not look.
      given = torch.cat([start, target[:, :-1]], dim=1)
      with torch.inference_mode():
        logits = self.model(given.to(self.model.device)).logits.float()
        nll = torch.nn.functional.cross_entropy(
          logits.transpose(1, 2), target.to(logits.device), reduction='none'
        )
      parts.append(nll.cpu().numpy())
    nll = np.sum(np.concatenate(parts) * weight, 1)
    return Judged(
      np.bincount(owner, weights=nll, minlength=len(rows)),
      np.array([len(row) for row in rows]),
      num_bytes,
    )


def _load_hugging_face(spec: str, batch_size: int) -> HuggingFaceJudge:
  missing = [
    name
    for name in ('torch', 'transformers')
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise InputError(
      f'--judge={spec!r} needs {" and ".join(missing)}: pip install '
      "-e '.[judge]', or give the workdir of an autoregressive run"
    )
  import transformers  # pylint: disable=g-import-not-at-top

  name = spec.removeprefix(HUGGING_FACE)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
  except (OSError, ValueError) as error:
    raise InputError(f'--judge={spec!r} cannot be loaded: {error}') from error
  if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
    raise InputError(
      f'--judge={spec!r} has no start or end symbol to predict the '
      'first token from'
    )
  import torch  # pylint: disable=g-import-not-at-top

  model = (
    model.float().eval().to('cuda' if torch.cuda.is_available() else 'cpu')
  )
  # One place is the start symbol's.
  window = getattr(model.config, 'max_position_embeddings', 1024) - 1
  return HuggingFaceJudge(spec, tokenizer, model, window, batch_size)


def measure_quality(
  judge: Judge | None, tokens: np.ndarray, tokenizer: tokenizers.Tokenizer
) -> dict[str, float]:
  """What can be said of sampled text without looking at it.

  Args:
    judge: for the perplexity; None leaves it out.
    tokens: [N, L] ids of `tokenizer`.
    tokenizer: the sampling model's.

  Returns:
    The values of `metrics.text_statistics`, in tokens of `tokenizer`. With a
    judge: gen_nll and gen_ppl, nats and perplexity per token of the judge;
    gen_bits_per_byte and its interval gen_bits_per_byte_ci95, over texts, which
    compare between tokenizers and judges; judge_tokens, 'own' where the judge
    scored the very ids and 'text' where it encoded the text anew.
  """
  quality = metrics.text_statistics(tokens)
  if judge is None:
    return quality
  judged = judge.score(tokens, tokenizer)
  nll, _ = metrics.ratio_interval(judged.nll, judged.num_tokens)
  per_byte, half_width = metrics.ratio_interval(judged.nll, judged.num_bytes)
  return {
    'gen_nll': nll,
    'gen_ppl': math.exp(min(nll, 700.0)),
    'gen_bits_per_byte': per_byte / math.log(2),
    'gen_bits_per_byte_ci95': half_width / math.log(2),
    'judge_tokens': 'own' if judge.reads_ids_of(tokenizer) else 'text',
    **quality,
  }
