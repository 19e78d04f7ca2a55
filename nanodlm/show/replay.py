"""Writes a self-contained HTML page that replays how samples were made.

Slider and keys step through the calls; color shows the call or probability of
each token; hover, focus or tap shows the alternatives. 4 x 256 tokens in 64
calls take 0.08 MiB with fixed_count, and 1.2 MiB with confidence, which asks
for all masked positions at each call.
"""

from collections.abc import Sequence
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from nanodlm import lm as lms
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.show import pages, picture, watch

# In the first bytes of every page; a file with it may be replaced.
MARK = '<meta name="generator" content="nanodlm replay">'
# Less probable alternatives would be listed with 0.0%.
MIN_PROB = 0.0005


class Take(NamedTuple):
  """One sample and how it was made.

  Attributes:
    sampler: the sampler's name.
    settings: its requested settings, as in 'num_steps=0, threshold=0.9'.
    prompt: the text with gaps.
    sample: its number among the samples of one prompt and sampler, from 1.
    fixed: [L] bool, positions of the prompt.
    trajectory: the calls of the network.
    num_shown: number of tokens before its end, see `lm.shown_tokens`.
    room: [L] bool, positions of gaps of any length.
  """

  sampler: str
  settings: str
  prompt: str
  sample: int
  fixed: np.ndarray
  trajectory: watch.Trajectory
  num_shown: int
  room: Any = np.False_

  def shown_places(self, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the positions [n] of the text, without what is left of room."""
    is_left = self.room & (self.trajectory.frames[-1] == tokenizer.separator_id)
    return np.flatnonzero(~is_left)[: self.num_shown]


class Page:
  """The page of --html: collects takes and writes them.

  Args:
    path: the file to write.
    num_top: number of alternatives listed for each position.

  Raises:
    InputError: the page cannot be written there.
  """

  def __init__(self, path: str, num_top: int):
    pages.check_path('--html', pathlib.Path(path), MARK)
    self.path, self.num_top = path, num_top
    self.takes: list[Take] = []

  def add(
    self,
    sampler: str,
    label: str,
    prompt: str,
    fixed: np.ndarray,
    trajectories: Sequence[watch.Trajectory],
    num_shown: Sequence[int],
    room: Any = np.False_,
  ):
    """Adds the samples of one prompt and sampler; fixed and room are [L]."""
    settings = label.partition(':')[2].replace(';', ', ')
    for i, (trajectory, num) in enumerate(zip(trajectories, num_shown), 1):
      take = Take(sampler, settings, prompt, i, fixed, trajectory, num, room)
      self.takes.append(take)

  def write(self, tokenizer: Tokenizer, title: str, facts: str) -> int:
    """Writes the page and returns its size in bytes."""
    path, first = pathlib.Path(self.path), self.takes[0]
    if path.suffix == '.svg':
      frames, answers = first.trajectory
      frames = frames[:, first.shown_places(tokenizer)]
      facts = (
        f'{title}: {np.sum(~first.fixed)} tokens in {len(answers)} network '
        f'calls, {first.sampler}'
      )
      page = picture.make_svg(
        tokenizer.spell(frames[-1]), watch.Trajectory(frames, answers), facts
      )
    else:
      data = make_data(self.takes, tokenizer, self.num_top, title, facts)
      page = make_page(data)
    # Another file may have appeared there while sampling.
    pages.check_path('--html', path, MARK)
    pages.write('--html', path, page)
    return path.stat().st_size


def make_data(
  takes: Sequence[Take],
  tokenizer: Tokenizer,
  num_top: int,
  title: str,
  facts: str,
) -> dict[str, Any]:
  """Returns the content of the page as JSON values.

  Ids are indices of `vocab`, a list of the tokens that occur, the mask first:
  text, or bytes that are not UTF-8 alone. `takes[i].calls[j]` has the changes
  `c` of the call, [position, id, probability in 1/1000 or -1], and its
  alternatives `a`, {position: flat pairs (id, probability)}.
  """
  mask_id = tokenizer.mask_id
  vocab = {mask_id: 0}
  local = lambda token: vocab.setdefault(int(token), len(vocab))
  prompts = list(dict.fromkeys(take.prompt for take in takes))
  shown, takes_back, changes = [], False, False
  # Samplers are next to each other, rather than samples of the same one.
  for take in sorted(takes, key=lambda take: take.sample):
    frames, answers = take.trajectory
    calls = []
    for before, after, answer in zip(frames[:-1], frames[1:], answers):
      changed = before != after
      was_text, is_text = before != mask_id, after != mask_id
      stays = changed & ~take.room
      takes_back |= bool(np.any(stays & ~is_text))
      changes |= bool(np.any(stays & was_text & is_text))
      said, probs = {}, {}
      for position, tokens, top in zip(*answer) if answer else ():
        permille = [round(1000 * p) for p in top.tolist()]
        probs[position] = dict(zip(tokens.tolist(), permille))
        # Alternatives of text that stays are not shown.
        if take.fixed[position] or (was_text & ~changed)[position]:
          continue
        num = max(int(np.sum(top[:num_top] >= MIN_PROB)), 1)
        said[str(position)] = [
          x for pair in zip(map(local, tokens[:num]), permille) for x in pair
        ]
      revealed = []
      for position in np.flatnonzero(changed):
        token = int(after[position])
        share = probs.get(position, {}).get(token, -1)
        revealed.append([int(position), local(token), share])
      calls.append({'c': revealed, 'a': said})
    text = frames[-1][take.shown_places(tokenizer)]
    shown.append(
      {
        'sampler': take.sampler,
        'settings': take.settings,
        'prompt': prompts.index(take.prompt),
        'sample': take.sample,
        'fixed': np.flatnonzero(take.fixed).tolist(),
        'room': np.flatnonzero(take.room).tolist(),
        'start': [local(token) for token in frames[0]],
        'calls': calls,
        'text': tokenizer.decode(text),
      }
    )
  ends = {tokenizer.separator_id, *tokenizer.eos_ids}
  return {
    'title': title,
    'facts': facts,
    'prompts': prompts,
    'recorded': lms.NUM_RECORDED,
    'ends': [vocab[token] for token in sorted(ends & vocab.keys())],
    'takes_back': takes_back,
    'changes': changes,
    'vocab': [_piece(tokenizer, token) for token in vocab],
    'takes': shown,
    'separator': vocab.get(tokenizer.separator_id, -1),
  }


def _piece(tokenizer: Tokenizer, token: int) -> str | list[int]:
  piece = tokenizer.piece(token)
  try:
    return piece.decode()
  except UnicodeDecodeError:
    return list(piece)


def make_page(data: dict[str, Any]) -> str:
  """Returns the HTML page of `make_data`."""
  # ASCII without '<': no text can end the element or begin another one.
  text = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')
  return pages.read('replay.html').replace('/*DATA*/', text)
