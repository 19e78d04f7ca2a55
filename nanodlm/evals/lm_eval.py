r"""A checkpoint under EleutherAI's lm-evaluation-harness.

    python -m nanodlm.evals.lm_eval --workdir=RUN \
        --tasks=arc_easy,lambada_openai

`TextModel` scores and continues texts and is independent of the harness;
`make_lm` wraps it in the interface of the harness, which needs
pip install -e '.[lm_eval]'.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib
import json
import os
import sys
from typing import Any

from absl import app, flags, logging
import jax
import numpy as np

from nanodlm import lm as lms
from nanodlm import prompts as prompting
from nanodlm.evals import judge
from nanodlm.lm import LanguageModel
from nanodlm.samplers import SAMPLERS
from nanodlm.types import Batch, InputError

# Rows are padded to multiples of this, so that few shapes are compiled.
LENGTH_STEP = 32
# The first of these that fits the objective generates, by default.
GENERATION_SAMPLERS = ('block', 'confidence')
# The default of the harness.
MAX_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class TextModel:
  """Log-likelihoods and continuations of texts by a run.

  Attributes:
    lm: the model and its sampler.
    num_draws: noise draws per log-likelihood; an exact objective needs one.
    batch_size: rows per network call.
    seed: of the noise and the samples.
    is_greedy: whether to determine if a continuation is the greedy one.
  """

  lm: LanguageModel
  num_draws: int = 32
  batch_size: int = 32
  seed: int = 0
  is_greedy: bool = True

  @property
  def length(self) -> int:
    """The maximum number of tokens of a text with its context."""
    return self.lm.run.settings.data.length

  @functools.cached_property
  def _score(self):
    return lms.make_score(
      self.lm.run, num_draws=self.num_draws, batch_size=self.batch_size
    )

  @functools.cached_property
  def _fill(self) -> Callable[[float], Any]:
    """Returns the function of `lm.make_fill` at a temperature, made once."""

    @functools.cache
    def fill(temperature: float):
      changed = self.lm.with_sampler({'temperature': temperature})
      return lms.make_fill(changed.run, self.batch_size)

    return fill

  def _padded(self, num_tokens: int) -> int:
    """Returns the length of a row that holds a number of tokens."""
    block = self.lm.run.objective.block_size or 1
    step = -(-LENGTH_STEP // block) * block
    return min(-(-max(num_tokens, 1) // step) * step, self.length)

  def encode_pair(
    self, context: str, continuation: str
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a context, cut on its left to fit, and its continuation.

    Like the harness's own models it moves spaces at the end of the context to
    the continuation and encodes the two together.

    Raises:
      InputError: the continuation alone is longer than the model's rows.
    """
    encode = self.lm.tokenizer.encode
    stripped = context.rstrip(' ')
    continuation = context[len(stripped) :] + continuation
    head = encode(stripped)
    tail = encode(stripped + continuation)[len(head) :]
    if continuation and not tail.size:  # The two merged into fewer tokens.
      tail = encode(continuation)
    if len(tail) > self.length:
      raise InputError(
        f'a continuation of {len(tail)} tokens ({continuation[:40]!r}...) is '
        f'longer than the rows of the run, data.length={self.length}'
      )
    return head[max(0, len(head) + len(tail) - self.length) :], tail

  def log_likelihoods(
    self, pairs: Sequence[tuple[str, str]]
  ) -> list[tuple[float, bool]]:
    """Scores log p(continuation | context), nats, for each pair of texts.

    The value is exact for an autoregressive run. Otherwise it is minus the
    bound on the tokens of the continuation alone, given the clean context and
    no text after the continuation, with num_draws stratified draws of the
    evaluation noise. Continuations of the same context share their noise, so
    that their differences have less variance.

    Returns:
      The log-likelihood, and whether the continuation is greedy. For an
      autoregressive run that means that each token is the most probable one,
      otherwise that the run's sampler writes it at temperature 0, given the
      context, in a row of `_padded` tokens. False if `is_greedy` is off.
    """
    encoded = [self.encode_pair(*pair) for pair in pairs]
    contexts = {}
    for context, _ in pairs:
      contexts.setdefault(context, len(contexts))
    index = np.array([contexts[context] for context, _ in pairs], np.int32)
    lengths = [self._padded(len(head) + len(tail)) for head, tail in encoded]
    results: list[Any] = [None] * len(pairs)
    for length in sorted(set(lengths)):
      members = np.flatnonzero(np.equal(lengths, length))
      shape = (len(members), length)
      tokens, scored = np.zeros(shape, np.int32), np.zeros(shape, bool)
      is_text = np.zeros(shape, bool)
      for row, i in enumerate(members):
        head, tail = encoded[i]
        end = len(head) + len(tail)
        tokens[row, :end] = np.concatenate([head, tail])
        scored[row, len(head) : end] = True
        is_text[row, :end] = True
      batch = self._batch(tokens, scored, is_text, index[members])
      values = self._score(self.lm.params, jax.random.key(self.seed), batch)
      greedy = self._find_greedy(batch, values)
      for i, nll, is_greedy in zip(members, values['nll'], greedy):
        results[i] = (-float(nll), bool(is_greedy))
    return results

  def _batch(self, tokens, scored, is_text, index=None) -> Batch:
    # Text must not attend to the padding on its right, a segment of its own.
    segment_ids = (~is_text).astype(np.int32)
    if self.lm.run.objective.causal:
      segment_ids = None
    return lms.make_batch(tokens, scored, segment_ids, index)

  def _find_greedy(self, batch: Batch, values) -> np.ndarray:
    tokens, scored = batch.tokens, batch.eligible
    if not self.is_greedy:
      return np.zeros(len(scored), bool)
    if self.lm.run.objective.exact:
      return values['correct'] == values['scored']
    length = scored.shape[1]
    start = np.where(scored.any(1), scored.argmax(1), length)
    fixed = np.arange(length)[None] < start[:, None]
    canvas = np.where(fixed, tokens, np.int32(self.lm.tokenizer.mask_id))
    key = jax.random.key(self.seed)
    filled, _ = self._fill(0.0)(self.lm.params, key, canvas, fixed)
    return np.all((filled == tokens) | ~scored, axis=1)

  def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
    """Scores log p(text), nats, of texts of any length.

    Texts are cut into rows of the model's length, and each row is scored
    without the ones before it; the harness's own models slide a window instead.
    """
    rows = [self.lm.tokenizer.encode(text) for text in texts]
    tokens, is_text, owner = judge.cut_windows(rows, self.length)
    if not len(tokens):
      return [0.0] * len(texts)
    batch = self._batch(tokens, is_text, is_text)
    nll = self._score(self.lm.params, jax.random.key(self.seed), batch)['nll']
    return [-x for x in np.bincount(owner, nll, len(texts)).tolist()]

  def generate(
    self,
    prompts: Sequence[str],
    stops: Sequence[str],
    max_new_tokens: int,
    temperature: float,
  ) -> list[str]:
    """Continues each prompt with the run's sampler.

    Args:
      prompts: texts; cut on the left to leave at least half a row free.
      stops: the continuation ends before the first of these, or at the end of
        the document.
      max_new_tokens: per continuation.
      temperature: 0 takes the most probable tokens.
    """
    tokenizer = self.lm.tokenizer
    heads, rooms = [], []
    for prompt in prompts:
      head = tokenizer.encode(prompt)
      room = min(max_new_tokens, self.length - min(len(head), self.length // 2))
      heads.append(head[max(0, len(head) + room - self.length) :])
      rooms.append(room)
    totals = [len(head) + room for head, room in zip(heads, rooms)]
    order = np.argsort(totals, kind='stable')
    texts = [''] * len(heads)
    for number, first in enumerate(range(0, len(order), self.batch_size)):
      members = order[first : first + self.batch_size]
      length = self._padded(max(totals[i] for i in members))
      tokens = np.full((len(members), length), tokenizer.mask_id, np.int32)
      for row, i in enumerate(members):
        tokens[row, : len(heads[i])] = heads[i]
      # Padding is filled as well, then cut off.
      fixed = tokens != tokenizer.mask_id
      key = jax.random.fold_in(jax.random.key(self.seed), number)
      filled, _ = self._fill(temperature)(self.lm.params, key, tokens, fixed)
      for row, i in enumerate(members):
        new = filled[row, len(heads[i]) : totals[i]]
        new = new[: prompting.find_end(new, tokenizer.eos_ids)]
        texts[i] = cut_at(tokenizer.decode(new), stops)
    return texts


def cut_at(text: str, stops: Sequence[str]) -> str:
  """Returns the text before the first of the stops that occurs in it."""
  ends = [text.find(stop) for stop in stops if stop]
  return text[: min([end for end in ends if end >= 0], default=len(text))]


def open_text_model(
  workdir: str, sampler: dict[str, Any] | None = None, **options: Any
) -> TextModel:
  """Opens a workdir as a `TextModel`.

  Args:
    workdir: of the run.
    sampler: changes to its config.sampler. Without a name, the first of
      GENERATION_SAMPLERS that fits the objective, else the run's own, is used.
    **options: of TextModel.

  Raises:
    InputError: there is no such run, or the sampler does not fit.
  """
  lm = lms.load(workdir)
  fitting = [
    x for x in GENERATION_SAMPLERS if SAMPLERS[x].fits(lm.run.objective)
  ]
  name = {'name': fitting[0]} if fitting else {}
  return TextModel(lm.with_sampler(name | (sampler or {})), **options)


def _import(name: str) -> Any:
  """Imports a module of the harness; InputError if it is not installed."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(
      f'{error.name} is not installed, which the lm-evaluation-harness needs: '
      "pip install -e '.[lm_eval]'"
    ) from error


def make_lm(text_model: TextModel) -> Any:
  """Returns the harness's model interface, an lm_eval.api.model.LM.

  Raises:
    InputError: the harness is not installed.
  """
  lm_model = _import('lm_eval.api.model')

  class Adapter(lm_model.LM):
    """`TextModel` as the harness calls it."""

    def loglikelihood(self, requests, disable_tqdm=False):
      return text_model.log_likelihoods([r.args for r in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      return text_model.rolling_log_likelihoods([r.args[0] for r in requests])

    def generate_until(self, requests, disable_tqdm=False):
      texts = [''] * len(requests)
      groups = {}
      for i, request in enumerate(requests):
        groups.setdefault(_generation_options(request.args[1]), []).append(i)
      for options, members in groups.items():
        prompts = [requests[i].args[0] for i in members]
        for i, text in zip(members, text_model.generate(prompts, *options)):
          texts[i] = text
      return texts

  return Adapter()


def _generation_options(
  options: dict[str, Any],
) -> tuple[tuple[str, ...], int, float]:
  """Reads stops, max_new_tokens and temperature from gen_kwargs."""
  stops = options.get('until') or ()
  stops = (stops,) if isinstance(stops, str) else tuple(stops)
  samples = options.get('do_sample', options.get('temperature', 0) > 0)
  temperature = float(options.get('temperature', 1.0)) if samples else 0.0
  return stops, int(options.get('max_gen_toks', MAX_NEW_TOKENS)), temperature


def define_flags():
  """Defines the flags that `run_tasks` reads."""
  flags.DEFINE_string('workdir', None, 'Folder of the run.')
  flags.DEFINE_list('tasks', [], 'Tasks of the harness.')
  flags.DEFINE_string('include_path', None, 'A folder with your own tasks.')
  flags.DEFINE_integer('num_fewshot', None, 'Examples in the context.')
  flags.DEFINE_float('limit', None, 'Documents per task.')
  flags.DEFINE_integer('num_draws', 32, 'Noise draws per log-likelihood.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per network call.')
  flags.DEFINE_integer('seed', 0, 'Seed of the noise and the samples.')
  flags.DEFINE_bool(
    'greedy',
    True,
    'Whether to determine if a continuation is the greedy one, which the '
    'accuracy of LAMBADA needs; costs samples.',
  )
  flags.DEFINE_string(
    'sampler',
    '',
    "By default the block or confidence sampler, else the run's own.",
  )
  flags.DEFINE_integer(
    'num_steps',
    0,
    "Steps of the sampler; 0 for the run's, or base.py's for another sampler "
    "than the run's.",
  )
  flags.DEFINE_string('output', None, 'A new JSON file for the results.')


def run_tasks():
  """Runs the harness on a workdir and prints the results; see `define_flags`.

  Raises:
    InputError: the harness is not installed, there is no such run, or a flag
      has a value that is not allowed.
  """
  options = flags.FLAGS
  harness, tasks, tables = map(
    _import, ('lm_eval', 'lm_eval.tasks', 'lm_eval.utils')
  )
  if not options.workdir or not options.tasks:
    raise InputError('--workdir and --tasks are needed')
  if options.output and os.path.exists(options.output):
    raise InputError(f'--output={options.output!r} exists')
  sampler = {'name': options.sampler} if options.sampler else {}
  if options.num_steps:
    sampler['num_steps'] = options.num_steps
  manager = tasks.TaskManager(include_path=options.include_path)
  for name in options.tasks:
    if name not in manager.all_tasks:
      raise InputError(
        f"--tasks={name!r} is not one of the harness's "
        f'{len(manager.all_tasks)} tasks, nor in --include_path='
        f'{options.include_path!r}'
      )
  text_model = open_text_model(
    options.workdir,
    sampler,
    num_draws=options.num_draws,
    batch_size=options.batch_size,
    seed=options.seed,
    is_greedy=options.greedy,
  )
  results = harness.simple_evaluate(
    make_lm(text_model),
    tasks=options.tasks,
    num_fewshot=options.num_fewshot,
    limit=options.limit,
    task_manager=manager,
  )
  print(tables.make_table(results))
  if options.output:
    kept = {key: results[key] for key in ('results', 'n-shot', 'versions')}
    kept['nanodlm'] = {
      'workdir': options.workdir,
      'num_draws': options.num_draws,
      'sampler': text_model.lm.run.describe_sampler(),
    }
    with open(options.output, 'w') as file:
      json.dump(kept, file, indent=2, default=str)


def main(argv: Sequence[str]) -> int:
  """Runs the harness as the command line says; returns the exit status."""
  logging.set_verbosity(logging.ERROR)  # JAX warns of missing accelerators.
  try:
    if argv[1:]:
      raise InputError(f'unexpected arguments: {argv[1:]}')
    run_tasks()
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  define_flags()
  app.run(main)
