"""A page that replays how samples came to be: one HTML file, nothing beside it."""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple, Sequence

import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate
from nanodlm.data import tokenizers
from nanodlm.show import pages, watch
from nanodlm.types import InputError

# In the first bytes of every page written here: such a file may be replaced.
MARK = '<meta name="generator" content="nanodlm replay">'
# Tokens per position among which the probability of the one that was drawn is
# looked up; the page lists fewer.
NUM_RECORDED = 64
_PLACE = '/*DATA*/'


class Take(NamedTuple):
  """One sample and its making.

  Attributes:
    sampler: its name.
    settings: what was asked of it, as 'num_steps=0, threshold=0.9'.
    prompt: see `sample.parse_prompt`.
    sample: its number among those of the prompt and sampler, from 1.
    fixed: [L] bool, the prompt's positions.
    trajectory: its making.
    num_shown: tokens before its end, see `sample.shown_tokens`.
  """

  sampler: str
  settings: str
  prompt: str
  sample: int
  fixed: np.ndarray
  trajectory: watch.Trajectory
  num_shown: int


def parse_sampler(text: str) -> dict[str, Any]:
  """The changes of `config.sampler` in 'NAME' or 'NAME:KEY=VALUE;KEY=VALUE'.

  Raises:
    InputError: no such key, or a value that is not of the key's type.
  """
  defaults = configs.load_base().sampler
  name, _, rest = text.partition(':')
  changes = {'name': name}
  for pair in rest.split(';') if rest else ():
    key, equals, value = (part.strip() for part in pair.partition('='))
    if not equals or key not in defaults or key == 'name':
      raise InputError(
        f'--samplers={text!r}: {pair!r} is not KEY=VALUE with a key '
        f'of config.sampler{configs.suggest(key, defaults)}'
      )
    kind = type(defaults[key])
    try:
      changes[key] = (
        {'true': True, 'false': False}[value.lower()]
        if kind is bool
        else kind(value)
      )
    except (ValueError, KeyError) as error:
      raise InputError(
        f'--samplers={text!r}: {key}={value!r} is not of type {kind.__name__}'
      ) from error
  return changes


def split_samplers(text: str) -> list[str]:
  """The parts of --samplers=NAME,NAME:KEY=VALUE; a listed grid has commas too."""
  return re.split(r',(?=[a-z_]+(?:[:,]|$))', text) if text else []


def with_samplers(
  run: evaluate.Run, texts: Sequence[str]
) -> list[tuple[str, evaluate.Run]]:
  """(what was asked for, the run with that sampler) for each of --samplers.

  Args:
    run: the run.
    texts: see `parse_sampler`; none is the run's own sampler. What a text leaves
      open is as in the run where its sampler is meant, else the default.

  Raises:
    InputError: a sampler does not fit the run, or a setting does not fit it.
  """
  runs = []
  for text in texts:
    changes = parse_sampler(text)
    try:
      changed = evaluate.with_sampler(run, changes)
      configs.validate(
        changed.config, [f'sampler.{key}' for key in changes if key != 'name']
      )
    except InputError as error:
      raise InputError(f'--samplers={text!r}: {error}') from error
    runs.append((text, changed))
  return runs or [(configs.sampler_name(run.config), run)]


def check_path(path: str):
  """Raises InputError where a page cannot be written to `path`."""
  file = pathlib.Path(path)
  if file.is_dir() or not file.parent.is_dir():
    raise InputError(f'--html={path!r} is not a file in a folder that exists')
  if not file.exists():
    if not os.access(file.parent, os.W_OK):
      raise InputError(
        f'--html={path!r} cannot be written: {file.parent} is not writable'
      )
    return
  try:
    with open(file, 'rb') as opened:
      start = opened.read(1024)
  except OSError as error:
    raise InputError(f'--html={path!r} cannot be read: {error}') from error
  if MARK.encode() not in start:
    raise InputError(
      f'--html={path!r} exists and is no page written by --html; '
      'give another name'
    )


class Page:
  """--html: gathers takes and writes the page.

  Args:
    path: of the page.
    num_top: alternatives listed for each position.

  Raises:
    InputError: see `check_path`.
  """

  def __init__(self, path: str, num_top: int):
    check_path(path)
    self.path, self.num_top = path, num_top
    self.takes: list[Take] = []

  def add(
    self,
    run: evaluate.Run,
    label: str,
    prompt: str,
    fixed: np.ndarray,
    trajectories: Sequence[watch.Trajectory],
    num_shown: Sequence[int],
  ):
    """Adds the samples of one prompt and sampler; fixed is [L]."""
    _, _, settings = label.partition(':')
    self.takes.extend(
      Take(
        configs.sampler_name(run.config),
        settings.replace(';', ', '),
        prompt,
        number,
        fixed,
        trajectory,
        num,
      )
      for number, (trajectory, num) in enumerate(
        zip(trajectories, num_shown), start=1
      )
    )

  def write(
    self, tokenizer: tokenizers.Tokenizer, title: str, facts: str
  ) -> int:
    """Writes the page of what was gathered; returns its bytes."""
    page = make_page(
      make_data(self.takes, tokenizer, self.num_top, title, facts)
    )
    check_path(self.path)  # again: sampling took its time
    file = pathlib.Path(self.path)
    temporary = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    try:
      temporary.write_bytes(page)
      temporary.replace(file)
    except OSError as error:
      temporary.unlink(missing_ok=True)
      raise InputError(
        f'--html={self.path!r} could not be written: {error}'
      ) from error
    return len(page)


def make_data(
  takes: Sequence[Take],
  tokenizer: tokenizers.Tokenizer,
  num_top: int,
  title: str,
  facts: str,
) -> dict[str, Any]:
  """What the page shows, as JSON values.

  Ids are those of `vocab`, a list of the tokens that occur, the mask first: text,
  or bytes that are no text by themselves. `takes[i].calls[j]` has `c`, flat triples
  (position, id, probability in 1/1000 or -1) of what the call changed, and `a`,
  flat (position, n, then n times id, probability) of what it said.
  """
  vocab = {tokenizer.mask_id: 0}
  local = lambda token: vocab.setdefault(int(token), len(vocab))
  prompts = list(dict.fromkeys(take.prompt for take in takes))
  shown, takes_back, changes = [], False, False
  # Side by side lie the samplers, not the samples of one.
  for take in sorted(takes, key=lambda take: take.sample):
    frames, answers = take.trajectory
    calls = []
    for before, after, answer in zip(frames[:-1], frames[1:], answers):
      changed = np.flatnonzero(before != after)
      takes_back |= bool(np.any(after[changed] == tokenizer.mask_id))
      changes |= bool(
        np.any(
          (before != tokenizer.mask_id)[changed]
          & (after != tokenizer.mask_id)[changed]
        )
      )
      said, rows = [], {}
      if answer is not None:
        rows = {int(p): i for i, p in enumerate(answer.positions)}
        wanted = (before != after) | (before == tokenizer.mask_id)
        for position, row in rows.items():
          # What is said of a text that stands and stays is not looked at.
          if not take.fixed[position] and wanted[position]:
            said.extend(
              _alternatives(
                position,
                answer.top_tokens[row],
                answer.top_probs[row],
                num_top,
                local,
              )
            )
      revealed = []
      for position in changed:
        token, probability = after[position], -1
        if int(position) in rows:
          row = rows[int(position)]
          place = np.flatnonzero(answer.top_tokens[row] == token)
          if place.size:
            probability = _permille(answer.top_probs[row, place[0]])
        revealed.extend([int(position), local(token), probability])
      calls.append({'c': revealed, 'a': said})
    shown.append(
      {
        'sampler': take.sampler,
        'settings': take.settings,
        'prompt': prompts.index(take.prompt),
        'sample': take.sample,
        'fixed': np.flatnonzero(take.fixed).tolist(),
        'start': [local(token) for token in frames[0]],
        'calls': calls,
        'text': tokenizer.decode(frames[-1][: take.num_shown]),
      }
    )
  separator = vocab.get(tokenizer.separator_id, -1)
  return {
    'title': title,
    'facts': facts,
    'prompts': prompts,
    'recorded': NUM_RECORDED,
    'separator': separator,
    'takes_back': takes_back,
    'changes': changes,
    'vocab': [_piece(tokenizer, token) for token in vocab],
    'takes': shown,
  }


def _alternatives(position, tokens, probs, num_top, local) -> list[int]:
  """(position, n, id, probability, ...) of tokens that are not negligible."""
  flat = []
  for token, probability in zip(tokens[:num_top], probs[:num_top]):
    if flat and probability < 0.0005:
      break
    flat.extend([local(token), _permille(probability)])
  return [position, len(flat) // 2, *flat]


def _permille(probability: float) -> int:
  return int(round(1000 * float(probability)))


def _piece(tokenizer: tokenizers.Tokenizer, token: int) -> str | list[int]:
  if token >= len(tokenizer.pieces):
    return ''
  try:
    return tokenizer.pieces[token].decode()
  except UnicodeDecodeError:
    return list(tokenizer.pieces[token])


def make_page(data: dict[str, Any]) -> bytes:
  """The HTML file."""
  # ASCII without '<': no text can end the element or begin another one.
  text = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')
  before, after = pages.read('replay.html').split(_PLACE)
  return (before + text + after).encode()


# The first call is dark, the last one light: purple, blue, green, yellow.
_COLOURS = np.array(
  [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]],
  np.float64,
)
_GIVEN = np.array([128, 128, 128])
_CELL, _GAP = (12, 4), 2  # pixels: height and width of a token, between rows


def order_image(
  trajectories: Sequence[watch.Trajectory], fixed: np.ndarray
) -> np.ndarray:
  """When each token was written last: rows are samples, columns positions.

  Args:
    trajectories: of N samples.
    fixed: [L] bool, the prompt's positions, which are grey.

  Returns:
    [H, W, 3] uint8; the colour is the call's share of all calls of its sample.
  """
  rows = []
  for trajectory in trajectories:
    num_calls = len(trajectory.answers)
    share = np.maximum(trajectory.changed_at(), 0) / max(num_calls - 1, 1)
    anchors = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack(
      [np.interp(share, anchors, channel) for channel in _COLOURS.T], axis=-1
    )
    colours = np.where(fixed[:, None], _GIVEN, colours).round().astype(np.uint8)
    row = np.repeat(np.tile(colours, (_CELL[0], 1, 1)), _CELL[1], axis=1)
    rows.append(np.pad(row, ((0, _GAP), (0, 0), (0, 0)), constant_values=255))
  return np.concatenate(rows)[:-_GAP]
