r"""A checkpoint under EleutherAI's lm-evaluation-harness.

    python -m nanodlm.evals.lm_eval --workdir=RUN \
        --tasks=arc_easy,lambada_openai

With --chat, contexts are the user's part of a conversation, in the chat
template of the run's tokenizer.

`TextModel` scores and continues texts and is independent of the harness;
`make_lm` wraps it in the interface of the harness, which needs
pip install -e '.[lm_eval]'.
"""

from collections.abc import Mapping, Sequence
import functools
import importlib
import json
import os
import sys
from typing import Any
import warnings

from absl import app, flags, logging
import jax
import numpy as np

from nanodlm import lm as lms
from nanodlm import prompts as prompting
from nanodlm.data.tokenizers import chat
from nanodlm.lm import LanguageModel
from nanodlm.samplers import SAMPLERS
from nanodlm.types import Batch, check_seed, InputError

# Rows are padded to multiples of this, so that few shapes are compiled.
LENGTH_STEP = 32
# The first of these that fits the objective generates, by default.
GENERATION_SAMPLERS = ('block', 'confidence')
# The default of the harness.
MAX_NEW_TOKENS = 256
_GREEDY = (('temperature', 0.0),)
# Not a character; around the messages of a conversation in a context.
_CHAT = '\ufdd0'


class TextModel:
  """Log-likelihoods and continuations of texts by a run.

  Args:
    lm: the model and its sampler.
    num_draws: noise draws per log-likelihood; an exact objective needs one.
    batch_size: rows per network call.
    seed: seed of the noise and the samples.
    is_greedy: whether to determine if a continuation is the greedy one.
  """

  def __init__(
    self,
    lm: LanguageModel,
    num_draws: int = 32,
    batch_size: int = 32,
    seed: int = 0,
    is_greedy: bool = True,
  ):
    if lm.run.objective.any_length:
      name = lm.run.settings.objective['name']
      raise InputError(
        f'objective.name={name!r} scores whole documents, not the parts of a '
        'text that the harness asks for'
      )
    self.lm, self.batch_size, self.is_greedy = lm, batch_size, is_greedy
    self.length, self.key = lm.run.settings.data.length, jax.random.key(seed)
    score = lms.make_score(lm.run, num_draws=num_draws, batch_size=batch_size)
    self.score = functools.partial(score, lm.params, self.key)
    run_of = lambda draw: lm.with_sampler(dict(draw)).run
    self.fill = functools.cache(
      lambda draw: lms.make_fill(run_of(draw), batch_size)
    )
    self._chats: set[str] = set()

  def write_chat(
    self, messages: Sequence[chat.Message], generation: bool
  ) -> str:
    """Writes a conversation as a context, which `encode` reads."""
    text = f'{_CHAT}{json.dumps([list(messages), generation])}{_CHAT}'
    self._chats.add(text)
    return text

  def _chat_of(self, text: str) -> str:
    """Returns what `write_chat` wrote at the start of a text, or ''."""
    head = text[: text.find(_CHAT, 1) + 1]
    return head if head in self._chats else ''

  def encode(self, text: str) -> np.ndarray:
    """Encodes a text that may begin with a conversation."""
    tokenizer, head = self.lm.tokenizer, self._chat_of(text)
    if not head:
      return tokenizer.encode(text)
    rest = text.removeprefix(head)
    messages, generation = json.loads(head.strip(_CHAT))
    encoded = chat.make_format(tokenizer).encode(
      tokenizer, messages, generation
    )
    ids = encoded.ids
    if not generation:  # The text continues the last message.
      ids = ids[: np.flatnonzero(encoded.ends)[-1]]
    return np.concatenate([ids, tokenizer.encode_rest(rest)]) if rest else ids

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
    encode = self.encode
    stripped = context.rstrip(' ')
    continuation = context[len(stripped) :] + continuation
    head = encode(stripped)
    tail = encode(stripped + continuation)[len(head) :]
    if continuation and not tail.size:  # The two merged into fewer tokens.
      tail = self.lm.tokenizer.encode_rest(continuation)
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

    Unless the run is autoregressive, the value is minus the bound on the tokens
    of the continuation, given the clean context and no text after it, with
    num_draws draws of the evaluation noise. Continuations of one context share
    their noise, so that their differences have less variance.

    Also returns whether the continuation is greedy: each token is the most
    probable one or, unless the run is autoregressive, the sampler writes it at
    temperature 0 in a row of `_padded` tokens. False if `is_greedy` is off.
    """
    encoded = [self.encode_pair(*pair) for pair in pairs]
    contexts: dict[str, int] = {}
    index = [contexts.setdefault(x, len(contexts)) for x, _ in pairs]
    index = np.array(index, np.int32)
    starts = np.array([len(head) for head, _ in encoded], np.int32)
    ends = starts + [len(tail) for _, tail in encoded]
    lengths = np.array([self._padded(end) for end in ends])
    results: list[Any] = [None] * len(pairs)
    for length in np.unique(lengths):
      (members,) = np.nonzero(lengths == length)
      rows = [np.concatenate(encoded[i]) for i in members]
      tokens, is_text = lms.pad(rows, length)
      scored = is_text & (np.arange(length) >= starts[members, None])
      batch = self._batch(tokens, scored, is_text, index[members])
      values = self.score(batch)
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
    # Everything from the first scored token on is to be filled.
    fixed = ~np.logical_or.accumulate(scored, axis=1)
    canvas = np.where(fixed, tokens, np.int32(self.lm.tokenizer.mask_id))
    filled, _ = self.fill(_GREEDY)(self.lm.params, self.key, canvas, fixed)
    return np.all((filled == tokens) | ~scored, axis=1)

  def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
    """Scores log p(text), nats, of texts of any length.

    Texts are cut into rows of the model's length, and each row is scored
    without the ones before it; the harness's own models slide a window instead.
    """
    rows = self.lm.tokenizer.encode_to_score(texts)
    tokens, is_text, owner = lms.cut_windows(rows, self.length)
    if not len(tokens):
      return [0.0] * len(texts)
    nll = self.score(self._batch(tokens, is_text, is_text))['nll']
    return [-x for x in np.bincount(owner, nll, len(texts)).tolist()]

  def generate(
    self,
    prompts: Sequence[str],
    stops: Sequence[str],
    max_new_tokens: int,
    draw: tuple[tuple[str, float], ...] = (),
  ) -> list[str]:
    """Continues each prompt with the run's sampler.

    Args:
      prompts: texts; cut on the left to leave at least half a row free.
      stops: the continuation ends before the first of these, or at the end of
        the document.
      max_new_tokens: per continuation.
      draw: changes of the sampler's temperature, top_k and top_p, (key, value).
    """
    tokenizer = self.lm.tokenizer
    heads, totals, texts = [], [], [''] * len(prompts)
    for prompt in prompts:
      is_pairs = self.lm.run.settings.data.is_pairs
      head = self.encode(prompting.before_gap(prompt, tokenizer, is_pairs))
      room = min(max_new_tokens, self.length - min(len(head), self.length // 2))
      heads.append(head[max(0, len(head) + room - self.length) :])
      totals.append(len(heads[-1]) + room)
    order = np.argsort(totals, kind='stable')
    for number, first in enumerate(range(0, len(order), self.batch_size)):
      members = order[first : first + self.batch_size]
      length = self._padded(max(totals[i] for i in members))
      tokens, fixed = lms.pad([heads[i] for i in members], length)
      # Padding is filled as well, then cut off.
      tokens = np.where(fixed, tokens, np.int32(tokenizer.mask_id))
      key = jax.random.fold_in(self.key, number)
      filled, _ = self.fill(draw)(self.lm.params, key, tokens, fixed)
      for row, i in zip(filled, members):
        new = row[len(heads[i]) : totals[i]]
        is_chat = self._chat_of(prompts[int(i)])
        ends = lms.answer_ends(self.lm.run) if is_chat else tokenizer.eos_ids
        new = new[: prompting.find_end(new, ends)]
        texts[i] = cut_at(tokenizer.decode(new, is_start=False), stops)
    return texts


def cut_at(text: str, stops: Sequence[str]) -> str:
  """Returns the text before the first of the stops that occurs in it."""
  ends = [text.find(stop) for stop in stops if stop]
  return text[: min([end for end in ends if end >= 0], default=len(text))]


def open_text_model(
  workdir: str, sampler: dict[str, Any] | None = None, **options: Any
) -> TextModel:
  """Opens a workdir as a `TextModel` with `options`.

  `sampler` changes its config.sampler. Without a name, the first of
  GENERATION_SAMPLERS that fits the objective, else the run's own, is used.
  """
  lm = lms.load(workdir)
  fits = lambda name: SAMPLERS[name].fits(lm.run.objective)
  fitting = [{'name': name} for name in GENERATION_SAMPLERS if fits(name)]
  chosen, changes = next(iter(fitting), {}), dict(sampler or {})
  if 'name' not in changes:
    lm = lm.with_sampler(chosen)
  return TextModel(lm.with_sampler(changes, is_given=True), **options)


def _import(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(
      f'{error.name} is not installed, which the lm-evaluation-harness needs: '
      "pip install -e '.[lm_eval]'"
    ) from error


def make_lm(text_model: TextModel) -> Any:
  """Returns the harness's model interface, an lm_eval.api.model.LM."""

  class Adapter(_import('lm_eval.api.model').LM):
    def loglikelihood(self, requests, disable_tqdm=False):
      return text_model.log_likelihoods([r.args for r in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      return text_model.rolling_log_likelihoods([r.args[0] for r in requests])

    def generate_until(self, requests, disable_tqdm=False):
      options = [_generation_options(r.args[1]) for r in requests]
      texts: dict[int, str] = {}
      for one in dict.fromkeys(options):
        members = [i for i, other in enumerate(options) if other == one]
        prompts = [requests[i].args[0] for i in members]
        texts |= zip(members, text_model.generate(prompts, *one))
      return [texts[i] for i in range(len(requests))]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      return text_model.write_chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template=False):
      return text_model.lm.tokenizer.chat_template

    @property
    def tokenizer_name(self):
      return text_model.lm.tokenizer.fingerprint

  return Adapter()


def _generation_options(
  options: Mapping[str, Any],
) -> tuple[tuple[str, ...], int, tuple[tuple[str, float], ...]]:
  """Returns the last arguments of `TextModel.generate` from gen_kwargs."""
  given = {key: x for key, x in options.items() if x is not None}
  stops = given.pop('until', ())
  stops = (stops,) if isinstance(stops, str) else tuple(stops)
  num_tokens = [
    given.pop(key) for key in ('max_gen_toks', 'max_new_tokens') if key in given
  ]
  temperature = given.pop('temperature', None)
  cut = {key: given.pop(key) for key in ('top_k', 'top_p') if key in given}
  draw = dict(_GREEDY)
  if given.pop('do_sample', bool(temperature)):
    draw = {'temperature': 1.0 if temperature is None else temperature} | cut
  if given:
    text = f'these generation options are ignored: {given}'
    warnings.warn(text, stacklevel=2)
  return (
    stops,
    int(min(num_tokens, default=MAX_NEW_TOKENS)),
    tuple(draw.items()),
  )


def define_flags():
  """Defines the flags that `run_tasks` reads."""
  flags.DEFINE_string('workdir', None, 'Folder of the run.')
  flags.DEFINE_list('tasks', [], 'Names of tasks of the harness.')
  flags.DEFINE_string('include_path', None, 'A folder with your own tasks.')
  flags.DEFINE_integer('num_fewshot', None, 'Examples in each context.')
  flags.DEFINE_float('limit', None, 'Documents per task.')
  flags.DEFINE_integer('num_draws', 32, 'Noise draws per log-likelihood.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per network call.')
  flags.DEFINE_integer('seed', 0, 'Seed of the noise and the samples.')
  flags.DEFINE_bool(
    'chat', False, 'Whether to ask in the chat template of the tokenizer.'
  )
  flags.DEFINE_bool(
    'greedy',
    True,
    'Whether to determine if a continuation is the greedy one, which the '
    'accuracy of LAMBADA needs; costs samples.',
  )
  flags.DEFINE_string(
    'sampler',
    '',
    "The sampler; by default block or confidence, else the run's.",
  )
  flags.DEFINE_integer(
    'num_steps', 0, "Steps of the sampler; 0: the run's or the default."
  )
  flags.DEFINE_string('output', None, 'A new JSON file for the results.')


def run_tasks():
  """Runs the harness on --workdir and prints the results."""
  options = flags.FLAGS
  harness, tasks, tables = map(
    _import, ('lm_eval', 'lm_eval.tasks', 'lm_eval.utils')
  )
  if not options.workdir or not options.tasks:
    raise InputError('--workdir and --tasks are needed')
  check_seed(options.seed, '--seed')
  if options.output and os.path.exists(options.output):
    raise InputError(f'--output={options.output!r} exists')
  given = {'name': options.sampler, 'num_steps': options.num_steps}
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
    {key: value for key, value in given.items() if value},
    num_draws=options.num_draws,
    batch_size=options.batch_size,
    seed=options.seed,
    is_greedy=options.greedy,
  )
  if options.chat:
    chat.make_format(text_model.lm.tokenizer)  # Raises if there is none.
  results = harness.simple_evaluate(
    make_lm(text_model),
    tasks=options.tasks,
    num_fewshot=options.num_fewshot,
    limit=options.limit,
    task_manager=manager,
    apply_chat_template=options.chat,
    fewshot_as_multiturn=options.chat,
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
