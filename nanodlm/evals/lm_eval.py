"""A checkpoint under EleutherAI's lm-evaluation-harness.

    python -m nanodlm.evals.lm_eval --workdir=RUN --tasks=arc_easy,lambada_openai

Needs the harness (pip install -e '.[lm_eval]'). `TextModel` does the work and
knows nothing of it; `make_lm` is the harness's interface around that.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
from typing import Any, Sequence

from absl import app, flags, logging
import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, sample
from nanodlm.types import InputError

# Rows are padded to multiples of it, so that few shapes are compiled.
LENGTH_STEP = 32
# What generates, where it fits the run's objective; else the run's own sampler.
GENERATION_SAMPLERS = ('block', 'confidence')
# The harness's own default.
MAX_NEW_TOKENS = 256
# Segments of a row: padding is not seen from the text.
TEXT, PADDING = 0, 1


@dataclasses.dataclass(frozen=True, eq=False)
class TextModel:
  """Log-likelihoods and continuations of texts by a run.

  Attributes:
    run: the network, and the sampler in its config.
    params: its parameters.
    num_draws: of the noise, for each log-likelihood; 1 for an exact objective.
    batch_size: rows per network call.
    seed: of the noise and the samples.
    is_greedy: whether to find out if a continuation is the greedy one.
  """

  run: evaluate.Run
  params: Any
  num_draws: int = 32
  batch_size: int = 32
  seed: int = 0
  is_greedy: bool = True

  @property
  def length(self) -> int:
    """The most tokens that a text and its context may have."""
    return self.run.settings.data.length

  @functools.cached_property
  def _score(self):
    return evaluate.make_score(
      self.run, num_draws=self.num_draws, batch_size=self.batch_size
    )

  @functools.cached_property
  def _fills(self) -> dict[float, Any]:
    return {}

  def _fill(self, temperature: float):
    """`sample.make_fill`, made once for each temperature."""
    if temperature not in self._fills:
      run = evaluate.with_sampler(self.run, {'temperature': temperature})
      self._fills[temperature] = sample.make_fill(run, self.batch_size)
    return self._fills[temperature]

  def _padded(self, num_tokens: int) -> int:
    """The length of a row that holds so many tokens."""
    block = self.run.objective.block_size or 1
    step = -(-LENGTH_STEP // block) * block
    return min(-(-max(num_tokens, 1) // step) * step, self.length)

  def encode_pair(
    self, context: str, continuation: str
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a context, cut on its left to fit, and of its continuation.

    Spaces at the end of the context count to the continuation, and the two are
    encoded together, as the harness's own models do.

    Raises:
      InputError: the continuation alone is longer than the model's rows.
    """
    encode = self.run.tokenizer.encode
    stripped = context.rstrip(' ')
    continuation = context[len(stripped) :] + continuation
    head = encode(stripped)
    whole = encode(stripped + continuation)
    tail = whole[len(head) :]
    if continuation and not tail.size:  # the two merged into fewer tokens
      tail = encode(continuation)
    if len(tail) > self.length:
      raise InputError(
        f'a continuation of {len(tail)} tokens ({continuation[:40]!r}...) is '
        f'longer than the rows of the run, data.length={self.length}'
      )
    head = head[max(0, len(head) + len(tail) - self.length) :]
    return head, tail

  def log_likelihoods(
    self, pairs: Sequence[tuple[str, str]]
  ) -> list[tuple[float, bool]]:
    """log p(continuation | context), nats, for each pair of texts.

    Exact for an autoregressive run. Otherwise minus the bound on the
    continuation's own tokens, with the context clean and nothing behind it: noise
    on the continuation only, in the evaluation form, num_draws stratified draws.
    Continuations of one context share their noise, which their comparison is then
    freer of.

    Returns:
      The log-likelihood, and whether the continuation is greedy: for an
      autoregressive run, each token is the most probable one; otherwise, the run's
      sampler at temperature 0 writes it behind the context (in a row of
      `_padded` tokens). False where `is_greedy` is off.
    """
    encoded = [self.encode_pair(*pair) for pair in pairs]
    contexts = {}
    index = [
      contexts.setdefault(context, len(contexts)) for context, _ in pairs
    ]
    lengths = [self._padded(len(head) + len(tail)) for head, tail in encoded]
    results = [None] * len(pairs)
    for length in sorted(set(lengths)):
      members = [i for i, other in enumerate(lengths) if other == length]
      batch = self._layout([encoded[i] for i in members], length)
      batch['index'] = np.array([index[i] for i in members], np.int32)
      values = self._score(self.params, jax.random.key(self.seed), batch)
      greedy = self._find_greedy(batch, values)
      for i, nll, is_greedy in zip(members, values['nll'], greedy):
        results[i] = (-float(nll), bool(is_greedy))
    return results

  def _layout(self, pairs, length: int) -> dict[str, np.ndarray]:
    shape = (len(pairs), length)
    batch = {
      'tokens': np.zeros(shape, np.int32),
      'weight': np.zeros(shape, np.float32),
    }
    segments = np.full(shape, PADDING, np.int32)
    for row, (head, tail) in enumerate(pairs):
      end = len(head) + len(tail)
      batch['tokens'][row, :end] = np.concatenate([head, tail])
      batch['weight'][row, len(head) : end] = 1
      segments[row, :end] = TEXT
    # A causal network does not look at what stands behind.
    return (
      batch if self.run.objective.causal else {**batch, 'segment_ids': segments}
    )

  def _find_greedy(self, batch, values) -> np.ndarray:
    weight = batch['weight'] > 0
    if not self.is_greedy:
      return np.zeros(len(weight), bool)
    if self.run.objective.exact:
      return values['correct'] == values['scored']
    start = np.where(weight.any(1), weight.argmax(1), weight.shape[1])
    free = np.arange(weight.shape[1])[None] >= start[:, None]
    canvas = np.where(free, self.run.tokenizer.mask_id, batch['tokens'])
    filled, _ = self._fill(0.0)(
      self.params, jax.random.key(self.seed), canvas.astype(np.int32), ~free
    )
    return np.all((filled == batch['tokens']) | ~weight, axis=1)

  def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
    """log p(text), nats, of texts of any length.

    They are cut into rows of the model's length, each scored without the ones
    before it. Differs from the harness's own models, which slide.
    """
    cuts = []
    for text in texts:
      tokens = self.run.tokenizer.encode(text)
      cuts.append(
        [
          tokens[first : first + self.length]
          for first in range(0, len(tokens), self.length)
        ]
      )
    rows = [(np.zeros(0, np.int32), part) for parts in cuts for part in parts]
    if not rows:
      return [0.0] * len(texts)
    batch = self._layout(rows, self.length)
    nll = self._score(self.params, jax.random.key(self.seed), batch)['nll']
    owner = np.repeat(np.arange(len(texts)), [len(parts) for parts in cuts])
    return [
      -float(x) for x in np.bincount(owner, weights=nll, minlength=len(texts))
    ]

  def generate(
    self,
    prompts: Sequence[str],
    stops: Sequence[str],
    max_new_tokens: int,
    temperature: float,
  ) -> list[str]:
    """Continues each prompt with the run's sampler.

    Args:
      prompts: texts; cut on the left to leave room for half a row at least.
      stops: the continuation ends before the first of these, or at the end of
        the document.
      max_new_tokens: of the continuation.
      temperature: 0 takes the most probable tokens.
    """
    tokenizer = self.run.tokenizer
    heads = []
    for prompt in prompts:
      head = tokenizer.encode(prompt)
      room = min(max_new_tokens, self.length - min(len(head), self.length // 2))
      heads.append((head[max(0, len(head) + room - self.length) :], room))
    order = sorted(
      range(len(heads)),
      key=lambda i: sum(map(int, (len(heads[i][0]), heads[i][1]))),
    )
    texts = [''] * len(heads)
    for number, first in enumerate(range(0, len(order), self.batch_size)):
      members = order[first : first + self.batch_size]
      length = self._padded(
        max(len(heads[i][0]) + heads[i][1] for i in members)
      )
      tokens = np.full((len(members), length), tokenizer.mask_id, np.int32)
      for row, i in enumerate(members):
        tokens[row, : len(heads[i][0])] = heads[i][0]
      # The room that rounding leaves is filled as well, then cut off.
      fixed = tokens != tokenizer.mask_id
      key = jax.random.fold_in(jax.random.key(self.seed), number)
      filled, _ = self._fill(temperature)(self.params, key, tokens, fixed)
      for row, i in enumerate(members):
        head, room = heads[i]
        new = filled[row, len(head) : len(head) + room]
        new = sample.until_end(new, tokenizer.separator_id)
        texts[i] = cut_at(tokenizer.decode(new), stops)
    return texts


def cut_at(text: str, stops: Sequence[str]) -> str:
  """The text before the first of the stops that occurs in it."""
  ends = [text.find(stop) for stop in stops if stop]
  return text[: min([end for end in ends if end >= 0], default=len(text))]


def open_text_model(
  workdir: str, sampler: dict[str, Any] | None = None, **options: Any
) -> TextModel:
  """A `TextModel` of a workdir.

  Args:
    workdir: of the run.
    sampler: changes to its config.sampler. Without a name there, the first of
      GENERATION_SAMPLERS that fits the objective is taken, else the run's own.
    **options: of TextModel.

  Raises:
    InputError: there is no such run, or the sampler does not fit.
  """
  run, params, _ = evaluate.open_run(workdir)
  sampler = dict(sampler or {})
  fitting = configs.fitting_samplers(run.config.objective.name)
  for name in GENERATION_SAMPLERS:
    if name in fitting:
      sampler.setdefault('name', name)
  return TextModel(evaluate.with_sampler(run, sampler), params, **options)


def _check_installed():
  if importlib.util.find_spec('lm_eval') is None:
    raise InputError(
      "the lm-evaluation-harness is not installed: pip install -e '.[lm_eval]'"
    )


def make_lm(text_model: TextModel) -> Any:
  """The harness's model interface, an lm_eval.api.model.LM.

  Raises:
    InputError: the harness is not installed.
  """
  _check_installed()
  from lm_eval.api import model as lm_model  # pylint: disable=g-import-not-at-top

  class Adapter(lm_model.LM):
    """`TextModel` as the harness calls it."""

    def loglikelihood(self, requests, disable_tqdm=False):
      del disable_tqdm
      return text_model.log_likelihoods([r.args for r in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      del disable_tqdm
      return text_model.rolling_log_likelihoods([r.args[0] for r in requests])

    def generate_until(self, requests, disable_tqdm=False):
      del disable_tqdm
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
  """stops, max_new_tokens and temperature of the harness's gen_kwargs."""
  stops = options.get('until') or ()
  stops = (stops,) if isinstance(stops, str) else tuple(stops)
  samples = options.get('do_sample', options.get('temperature', 0) > 0)
  temperature = float(options.get('temperature', 1.0)) if samples else 0.0
  return stops, int(options.get('max_gen_toks', MAX_NEW_TOKENS)), temperature


def _define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the run.')
  flags.DEFINE_list('tasks', [], 'Tasks of the harness.')
  flags.DEFINE_string('include_path', None, 'A folder with tasks of your own.')
  flags.DEFINE_integer('num_fewshot', None, 'Examples in the context.')
  flags.DEFINE_float('limit', None, 'Documents of each task.')
  flags.DEFINE_integer('num_draws', 32, 'Of the noise, per log-likelihood.')
  flags.DEFINE_integer('batch_size', 32, 'Rows per network call.')
  flags.DEFINE_integer('seed', 0, 'Of the noise and the samples.')
  flags.DEFINE_bool(
    'greedy',
    True,
    'Whether to find out if a continuation is the '
    'greedy one (accuracy of LAMBADA); costs samples.',
  )
  flags.DEFINE_string(
    'sampler',
    '',
    "By default the block or confidence sampler, else the run's own.",
  )
  flags.DEFINE_integer(
    'num_steps',
    0,
    "Of the sampler; 0: the run's, or "
    "base.py's where the sampler is not the run's own.",
  )
  flags.DEFINE_string('output', None, 'A new JSON file for the results.')


def _main(options: flags.FlagValues):
  _check_installed()
  if not options.workdir or not options.tasks:
    raise InputError('--workdir and --tasks are needed')
  if options.output and os.path.exists(options.output):
    raise InputError(f'--output={options.output!r} exists')
  sampler = {'name': options.sampler} if options.sampler else {}
  if options.num_steps:
    sampler['num_steps'] = options.num_steps
  import lm_eval  # pylint: disable=g-import-not-at-top
  from lm_eval import (
    tasks,  # pylint: disable=g-import-not-at-top
    utils,  # pylint: disable=g-import-not-at-top
  )

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
  results = lm_eval.simple_evaluate(
    make_lm(text_model),
    tasks=options.tasks,
    num_fewshot=options.num_fewshot,
    limit=options.limit,
    task_manager=manager,
  )
  print(utils.make_table(results))
  if options.output:
    kept = {key: results[key] for key in ('results', 'n-shot', 'versions')}
    kept['nanodlm'] = {
      'workdir': options.workdir,
      'num_draws': options.num_draws,
      'sampler': text_model.run.config.sampler.to_dict(),
    }
    with open(options.output, 'w') as file:
      json.dump(kept, file, indent=2, default=str)


def main(argv):
  """Runs the harness on the workdir of the command line; 2 for a mistake in it."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.ERROR)
  try:
    _main(flags.FLAGS)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  _define_flags()
  app.run(main)
