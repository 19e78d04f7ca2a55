"""Samples from a checkpoint: from nothing, after a prompt, or into gaps."""

import dataclasses
import json
import logging
import pathlib
import re
import time
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, types
from nanodlm.data import tokenizers
from nanodlm.devices import mesh as meshes
from nanodlm.show import live, replay, watch
from nanodlm.steps import train as steps
from nanodlm.types import Canvas, InputError

log = logging.getLogger('nanodlm')

# Doubled braces stand for themselves; {} is a gap that takes an equal share of
# the room that is left, {12} a gap of 12 tokens.
_PARTS = re.compile(r'\{\{|\}\}|\{(\d*)\}')


@dataclasses.dataclass(frozen=True)
class Gap:
  """A place to fill; `size` tokens, or None for a share of what is left."""

  size: int | None


def parse_prompt(prompt: str) -> list[str | Gap]:
  """Splits a prompt into texts and gaps.

  '{}' is a gap of automatic size, '{12}' one of 12 tokens; '{{' and '}}' are
  braces. Any other brace stands for itself. A prompt without a gap is continued
  to the end of the canvas.
  """
  parts, text, end = [], '', 0
  for match in _PARTS.finditer(prompt):
    text += prompt[end : match.start()]
    end = match.end()
    if match.group() in ('{{', '}}'):
      text += match.group()[0]
      continue
    if text:
      parts.append(text)
    # Too long a number for any canvas; int() of a very long one is refused.
    size = int(match.group(1)[:18]) if match.group(1) else None
    if size == 0:
      raise InputError(
        f'--prompt={prompt!r}: a gap of 0 tokens; give at least 1, '
        'or {} for a share of the room'
      )
    parts.append(Gap(size))
    text = ''
  text += prompt[end:]
  if text:
    parts.append(text)
  if not any(isinstance(part, Gap) for part in parts):
    parts.append(Gap(None))
  return parts


def literal_braces(prompt: str) -> list[str]:
  """What looks like a gap of a prompt and is none: '{x}', or a single brace."""
  rest = _PARTS.sub('\0', prompt)
  return list(dict.fromkeys(re.findall(r'\{[^{}\0]*\}|[{}]', rest)))


def make_canvas(
  prompt: str, tokenizer: tokenizers.Tokenizer, length: int, sees_right: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Lays a prompt out on at most `length` tokens.

  Args:
    prompt: see `parse_prompt`; '' is a blank canvas.
    tokenizer: the model's.
    length: of the canvas; shorter where every gap has a size of its own.
    sees_right: whether the model sees what is behind a gap; if not, a gap must be
      the prompt's end.

  Returns:
    tokens [n] int32 with mask_id in the gaps, and fixed [n] bool.

  Raises:
    InputError: the prompt does not fit, or has text behind a gap that the model
      would not see.
  """
  parts = parse_prompt(prompt)
  if not sees_right and any(isinstance(part, Gap) for part in parts[:-1]):
    raise InputError(
      f'--prompt={prompt!r}: a model that reads from left to right '
      '(by tokens or blocks) fills one gap at the end; text after a '
      'gap needs objective.name=masked'
    )
  pieces = [
    part if isinstance(part, Gap) else _encode(part, prompt, tokenizer)
    for part in parts
  ]
  used = sum(
    (piece.size or 0) if isinstance(piece, Gap) else len(piece)
    for piece in pieces
  )
  automatic = sum(
    isinstance(piece, Gap) and piece.size is None for piece in pieces
  )
  if used + automatic > length:
    shown = prompt if len(prompt) < 60 else prompt[:60] + '...'
    raise InputError(
      f'--prompt={shown!r} takes {used} tokens and has {automatic} '
      f'gap(s) of automatic size; the canvas has {length} tokens '
      '(sampler.length, by default data.length)'
    )
  room, share = length - used, 0
  tokens, fixed = [], []
  for piece in pieces:
    if not isinstance(piece, Gap):
      tokens.extend(piece)
      fixed.extend([True] * len(piece))
      continue
    size = piece.size
    if size is None:
      # Cumulative rounding: shares differ by at most one token.
      size = room * (share + 1) // automatic - room * share // automatic
      share += 1
    tokens.extend([tokenizer.mask_id] * size)
    fixed.extend([False] * size)
  return np.asarray(tokens, np.int32), np.asarray(fixed, bool)


def lay_out(
  run: evaluate.Run, prompt: str, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """`make_canvas` for a run's tokenizer and network."""
  return make_canvas(
    prompt, run.tokenizer, length, types.sees_right(run.objective, length)
  )


def _encode(
  text: str, prompt: str, tokenizer: tokenizers.Tokenizer
) -> np.ndarray:
  tokens = tokenizer.encode(text)
  # Only control tokens and the unknown token stand for no text at all.
  if np.any(tokenizer.num_bytes[tokens] == 0):
    raise InputError(
      f'--prompt={prompt!r}: {text!r} holds characters that the '
      f'{tokenizer.name} tokenizer does not know'
    )
  return tokens


def read_prompts(path: str) -> list[str]:
  """The prompts of a JSONL file: the field 'prompt' of every line.

  Raises:
    InputError: the file cannot be read, holds no prompt, or a line has no text
      in that field.
  """
  prompts = []
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8-sig').split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f'--prompt_file={path!r} cannot be read: {error}'
    ) from error
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      prompt = json.loads(line)['prompt']
    except (ValueError, RecursionError, KeyError, TypeError):
      prompt = None
    if not isinstance(prompt, str) or not prompt:
      raise InputError(
        f'--prompt_file={path!r}: line {number} must be a JSON object with a '
        'text in its field \'prompt\', as {"prompt": "def f("}'
      )
    prompts.append(prompt)
  if not prompts:
    raise InputError(
      f'--prompt_file={path!r} holds no prompt; give a JSON '
      "object a line, with a text in its field 'prompt'"
    )
  return prompts


def until_end(tokens: np.ndarray, separator_id: int) -> np.ndarray:
  """The tokens [n] before the first separator: what a response is."""
  ends = np.flatnonzero(tokens == separator_id)
  return tokens[: ends[0]] if ends.size else tokens


def shown_tokens(run: evaluate.Run, tokens: np.ndarray) -> np.ndarray:
  """What is shown to people of a sample [n]: of a response, up to its end."""
  if not run.settings.data.is_pairs:
    return tokens
  return until_end(tokens, run.tokenizer.separator_id)


def make_fill(
  run: evaluate.Run, batch_size: int = 0, view: watch.View | None = None
):
  """Returns fill(params, key, tokens, fixed) -> (tokens, calls), numpy.

  Args:
    run: the network, and the sampler in its config.
    batch_size: canvases filled at once; 0 is all of them.
    view: who watches each call, if anyone; rows that fill the batch up are
      among those shown.

  Returns:
    A function of parameters, a key, and canvases tokens [N, n] int32 and fixed
    [N, n] bool, the same on every process. calls is the number of network calls
    of a batch, the mean over batches.
  """
  sampler = configs.make_sampler(
    run.config, run.tokenizer.mask_id, run.tokenizer.separator_id
  )
  sample_step = steps.make_sample_step(
    run.network, run.objective, sampler, run.mesh, view
  )
  shards = meshes.num_batch_shards(run.mesh)

  def fill(
    params: Any, key: jax.Array, tokens: np.ndarray, fixed: np.ndarray
  ) -> tuple[np.ndarray, float]:
    size = -(-(batch_size or len(tokens)) // shards) * shards
    filled, calls = [], []
    for i, first in enumerate(range(0, len(tokens), size)):
      rows = evaluate.pad_rows(tokens[first : first + size], size)
      # Rows that fill the batch up have nothing to fill in.
      free = evaluate.pad_rows(~fixed[first : first + size], size)
      canvas = meshes.shard_whole_batch(run.mesh, Canvas(rows, ~free))
      samples = sample_step(params, jax.random.fold_in(key, i), canvas)
      filled.append(
        jax.device_get(
          jax.jit(jnp.asarray, out_shardings=meshes.replicated(run.mesh))(
            samples.tokens
          )
        )
      )
      calls.append(int(samples.num_calls))
    return np.concatenate(filled)[: len(tokens)], float(np.mean(calls))

  return fill


class _Watchers:
  """A `watch.Watch` of several, who change from canvas to canvas."""

  def __init__(self):
    self.those: list[watch.Watch] = []

  def __call__(self, event: watch.Asked | watch.Answered) -> bool:
    return all([one(event) for one in self.those])


def make_sample(run: evaluate.Run):
  """Returns sample(params, prompt, num_samples, key, length) -> what came of it.

  That is: tokens [num_samples, n], numpy, and the trajectories of those rows, the
  first ones, that this process computes.
  """
  watchers = _Watchers()
  fill = make_fill(run, view=watch.View(watchers, run.tokenizer.mask_id))

  def sample(
    params: Any, prompt: str, num_samples: int, key: jax.Array, length: int
  ) -> tuple[np.ndarray, list[watch.Trajectory]]:
    row, fixed = lay_out(run, prompt, length)
    canvas = np.tile(row, (num_samples, 1))
    recorder = watch.Recorder(whole_batch(run, canvas))
    watchers.those = [recorder]
    tokens, _ = fill(params, key, canvas, np.tile(fixed, (num_samples, 1)))
    return tokens, [
      trajectory
      for trajectory in recorder.trajectories(tokens)
      if trajectory.answers
    ]

  return sample


def sample_workdir(
  config: config_dict.ConfigDict,
  settings: configs.Settings,
  workdir: str,
  prompts: Sequence[str],
  samplers: Sequence[str] = (),
  display: live.Display | None = None,
  page: replay.Page | None = None,
):
  """--mode=sample: prints samples and appends them to workdir/samples.jsonl.

  A model of pairs has said what it has to say at the first separator: what is
  behind is counted, not printed. The file has all of it ('text', 'tokens'), and
  what was printed ('shown').

  Args:
    config: the run's, with its sampler section.
    settings: its checked sections.
    workdir: of the run.
    prompts: see `parse_prompt`; none is one blank canvas.
    samplers: see `replay.with_samplers`; all with the run's number, length and
      seed of samples.
    display: shows the canvases while they are filled.
    page: is written with the making of all of them.
  """
  run = evaluate.make_run(config, settings, tokenizers.load(workdir))
  runs = replay.with_samplers(run, samplers)
  length = settings.sample.length or settings.data.length
  prompts = prompts or ['']
  for prompt in prompts:  # before the slow part
    lay_out(run, prompt, length)
    if literal := literal_braces(prompt):
      log.warning(
        '--prompt=%r: %s is text, no gap; a gap is {} or {12}, and doubled '
        'braces are braces',
        prompt,
        ', '.join(map(repr, literal)),
      )
  params, step = evaluate.load_params(run, workdir)
  watchers = _Watchers()
  view = None
  if display or page:
    view = watch.View(
      watchers, run.tokenizer.mask_id, replay.NUM_RECORDED if page else 0
    )
  fills = [make_fill(changed, view=view) for _, changed in runs]
  num_samples = settings.sample.num_samples
  for i, prompt in enumerate(prompts):
    tokens, fixed = (
      np.tile(x, (num_samples, 1)) for x in lay_out(run, prompt, length)
    )
    for (label, changed), fill in zip(runs, fills):
      key = jax.random.fold_in(jax.random.key(settings.sample.seed), i)
      work = lambda: fill(params, key, tokens, fixed)  # pylint: disable=cell-var-from-loop
      recorder = watch.Recorder(whole_batch(run, tokens))
      watchers.those = [recorder] if page else []
      start = time.monotonic()
      if display:
        watchers.those.append(display.watch)
        title = f'{label}, step {step}' + (
          f', prompt {prompt!r}' if prompt else ''
        )
        samples, num_calls = display.run(
          work, run.tokenizer, title, tokens, fixed
        )
      else:
        samples, num_calls = work()
      secs = time.monotonic() - start
      if page:
        page.add(
          changed,
          label,
          prompt,
          fixed[0],
          recorder.trajectories(samples),
          [len(shown_tokens(run, row)) for row in samples],
        )
      if not jax.process_index():
        _report(
          changed,
          workdir,
          prompt,
          samples,
          int(num_calls),
          step,
          f', {label}' if len(runs) > 1 else '',
          secs,
        )
  if page:
    size = page.write(
      run.tokenizer,
      pathlib.Path(workdir).resolve().name,
      f'{config.objective.name}, step {step}, {length} tokens, '
      f'{run.config.tokenizer.name}',
    )
    print(f'--- {page.path}: {size / 2**20:.2f} MiB', flush=True)


def whole_batch(run: evaluate.Run, tokens: np.ndarray) -> np.ndarray:
  """Tokens [N, n] with the rows that `make_fill` adds for the devices' sake."""
  shards = meshes.num_batch_shards(run.mesh)
  return evaluate.pad_rows(tokens, -(-len(tokens) // shards) * shards)


def _report(
  run: evaluate.Run,
  workdir: str,
  prompt: str,
  tokens: np.ndarray,
  num_calls: int,
  step: int,
  label: str,
  secs: float,
):
  """Prints the samples [N, n] of a prompt and appends them to the file."""
  lines = []
  for j, row in enumerate(tokens):
    shown = shown_tokens(run, row)
    num_behind = np.sum(row[len(shown) :] != run.tokenizer.separator_id)
    print(
      f'--- sample {j + 1} of {len(tokens)}{label}'
      + (f', prompt {prompt!r}' if prompt else '')
      + (
        f', ends after {len(shown)} of {len(row)} tokens'
        if len(shown) < len(row)
        else ''
      )
      + (f', {num_behind} tokens of text behind its end' if num_behind else '')
    )
    shown = run.tokenizer.decode(shown)
    print(shown)
    lines.append(
      json.dumps(
        {
          'prompt': prompt,
          'text': run.tokenizer.decode(row),
          'shown': shown,
          'tokens': row.tolist(),
          'step': step,
          'num_calls': num_calls,
          'sampler': {
            **run.config.sampler.to_dict(),
            'name': configs.sampler_name(run.config),
          },
        }
      )
    )
  print(
    f'--- {tokens.size} tokens, {num_calls} network calls, {secs:.1f} s '
    'with compilation',
    flush=True,
  )
  with open(pathlib.Path(workdir) / 'samples.jsonl', 'a') as file:
    file.write('\n'.join(lines) + '\n')
