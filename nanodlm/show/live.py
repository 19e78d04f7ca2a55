"""The canvases of a sampler in the terminal, while they are filled."""

import concurrent.futures
import contextlib
import os
import re
import signal
import threading
import time
from typing import Callable, Sequence, TypeVar

import numpy as np
from rich import cells, live, segment, style
from rich import console as consoles

from nanodlm.data import tokenizers
from nanodlm.show import watch

T = TypeVar('T')

# Between two drawings, and the share of the time that drawing may take.
MIN_SECS, MAX_SHARE = 0.1, 0.05
MASK, TAKEN_BACK = '·', '×'
STYLES = {
  'masked': style.Style(dim=True),
  'back': style.Style(color='red', bold=True),
  'given': style.Style(color='cyan'),
  'said': style.Style(),
  'new': style.Style(color='green', bold=True),
  'changed': style.Style(color='yellow', bold=True, underline=True),
  'label': style.Style(dim=True, italic=True),
}
# Controls, and what hides or reorders text: never sent to a terminal as it is.
_HIDDEN = re.compile(
  '[\0-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]'
)


def is_possible(console: consoles.Console) -> bool:
  """Whether a console is a terminal that can move its cursor, in UTF-8."""
  return (
    console.file.isatty()
    and console.is_terminal
    and not console.is_dumb_terminal
    and console.encoding.startswith('utf')
  )


def visible(text: str) -> str:
  """Text with a shape for each of its characters; newlines also stay."""

  def shape(match):
    if match.group() == '\n':
      return '↵\n'
    return f'‹U+{ord(match.group()):04X}›'

  return _HIDDEN.sub(shape, text)


Line = list[tuple[str, str]]


def wrap(texts: Sequence[str], kinds: Sequence[str], width: int) -> list[Line]:
  """Lays texts out in lines of at most `width` columns.

  Args:
    texts: the cells, one behind the other; may hold newlines.
    kinds: of each, a key of STYLES.
    width: in columns, >= 2.

  Returns:
    Lines of (text, kind), neighbours of one kind joined.
  """
  lines, used = [[]], 0

  def put(text, kind):
    line = lines[-1]
    if line and line[-1][1] == kind:
      text = line.pop()[0] + text
    line.append((text, kind))

  for cell, kind in zip(texts, kinds):
    for i, text in enumerate(cell.split('\n')):
      if i:
        lines.append([])
        used = 0
      size = cells.cell_len(text)
      if used + size <= width:
        put(text, kind)
        used += size
        continue
      for character in text:
        size = cells.cell_len(character)
        if used + size > width:
          lines.append([])
          used = 0
        put(character, kind)
        used += size
  return [[part for part in line if part[0]] for line in lines]


class _Canvas:
  """One sample in the making.

  Attributes:
    tokens: [L] int32.
    calls: that were made for it.
    changed_at: [L] int32, the number of calls when a position changed last; 0:
      not yet.
    replaced: [L] bool, positions whose last change took a token's place.
  """

  def __init__(self, tokens: np.ndarray, mask_id: int):
    self.tokens, self.mask_id = np.array(tokens, np.int32), mask_id
    self.calls, self.drawn_at = 0, 0
    self.changed_at = np.zeros(tokens.shape, np.int32)
    self.replaced = np.zeros(tokens.shape, bool)

  def see(self, tokens: np.ndarray, start: int):
    before = self.tokens.copy()
    watch.paste(self.tokens, tokens, start)
    # What the canvas was at the first call is no change: noise, perhaps.
    changed = (before != self.tokens) & (self.calls > 0)
    self.calls += 1
    self.changed_at[changed] = self.calls
    self.replaced[changed] = before[changed] != self.mask_id

  def kinds(self, fixed: np.ndarray) -> list[str]:
    """Of each position, a key of STYLES; new is what changed since the last."""
    new = self.changed_at > self.drawn_at
    kinds = np.where(
      new & self.replaced, 'changed', np.where(new, 'new', 'said')
    )
    masked = self.tokens == self.mask_id
    kinds = np.where(masked, np.where(self.replaced, 'back', 'masked'), kinds)
    self.drawn_at = self.calls
    return np.where(fixed, 'given', kinds).tolist()


class Display:
  """Draws what it is shown of a sampler's calls.

  The work is done in a thread of its own, so that the one that draws also
  hears of signals at once.

  Args:
    console: the terminal; see `is_possible`.
  """

  def __init__(self, console: consoles.Console):
    self._console = console
    self._canvases: list[_Canvas] = []
    self._first_call = 0.0

  def watch(self, event: watch.Asked | watch.Answered) -> bool:
    """A `watch.Watch`."""
    if isinstance(event, watch.Asked):
      self._first_call = self._first_call or time.monotonic()
      for row, tokens in enumerate(event.tokens, event.first_row):
        if row < len(self._canvases):  # others fill the batch up
          self._canvases[row].see(tokens, event.start)
    return True

  def run(
    self,
    work: Callable[[], T],
    tokenizer: tokenizers.Tokenizer,
    title: str,
    tokens: np.ndarray,
    fixed: np.ndarray,
  ) -> T:
    """Returns work(), whose calls `watch` is shown, and draws meanwhile.

    Args:
      work: fills the canvases.
      tokenizer: of their ids.
      title: one line.
      tokens: [N, L] int32, the canvases, with mask_id in the gaps.
      fixed: [N, L] bool.
    """
    self._canvases = [_Canvas(row, tokenizer.mask_id) for row in tokens]
    self._first_call = 0.0
    draw = lambda: Picture(self._lines(tokenizer, title, fixed))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
      future = executor.submit(work)
      with (
        live.Live(
          draw(), console=self._console, auto_refresh=False, transient=True
        ) as display,
        _restored(display),
      ):
        pause = MIN_SECS
        while not concurrent.futures.wait([future], pause).done:
          start = time.monotonic()
          display.update(draw(), refresh=True)
          pause = max(MIN_SECS, (time.monotonic() - start) / MAX_SHARE)
    return future.result()

  def _lines(
    self, tokenizer: tokenizers.Tokenizer, title: str, fixed: np.ndarray
  ) -> list[Line]:
    """What fits the terminal."""
    width, height = max(self._console.width, 2), self._console.height - 1
    lines = [
      _cut(visible(title).replace('\n', ''), width),
      _cut(self._progress(fixed), width),
    ]
    for number, (canvas, is_given) in enumerate(
      zip(self._canvases, fixed), start=1
    ):
      room = height - len(lines)
      is_last = number == len(self._canvases)
      kinds = canvas.kinds(is_given)
      texts = _texts(tokenizer, canvas.tokens, kinds)
      body = wrap(texts, kinds, width)
      needed = 1 + len(body) + (not is_last)
      if number > 1 and needed > room:
        rest = len(self._canvases) - number + 1
        lines.append(
          _cut(f'and {rest} more sample{"s" if rest > 1 else ""}', width)
        )
        break
      label = f'sample {number} of {len(self._canvases)}'
      if needed > room:
        body, hidden = _window(body, max(room - 1 - (not is_last), 0))
        label += f', {hidden} more lines'
      lines += [_cut(label, width), *body]
    return lines[: max(height, 1)]

  def _progress(self, fixed: np.ndarray) -> str:
    if not self._first_call:
      return 'compiling'
    free = ~fixed
    tokens = np.stack([canvas.tokens for canvas in self._canvases])
    written = int(np.sum(free & (tokens != self._canvases[0].mask_id)))
    # Noise of tokens is full from the start.
    changed = int(
      sum(np.sum(canvas.changed_at > 0) for canvas in self._canvases)
    )
    secs = max(time.monotonic() - self._first_call, 1e-3)
    return (
      f'call {max(canvas.calls for canvas in self._canvases)}, '
      f'{written:,} of {int(free.sum()):,} tokens, '
      f'{min(written, changed) / secs:,.0f} tokens/s'
    )


def _texts(
  tokenizer: tokenizers.Tokenizer, tokens: np.ndarray, kinds: Sequence[str]
) -> list[str]:
  texts = tokenizer.spell(tokens, MASK)
  return [
    TAKEN_BACK
    if kind == 'back'
    else MASK
    if kind == 'masked'
    else '¶\n'
    if token == tokenizer.separator_id
    else visible(text)
    for text, token, kind in zip(texts, tokens, kinds)
  ]


def _cut(text: str, width: int) -> Line:
  """A line of its own kind, shortened where it is too long."""
  if cells.cell_len(text) > width:
    text = cells.set_cell_size(text, width - 1) + '…'
  return [(text, 'label')]


def _window(lines: list[Line], height: int) -> tuple[list[Line], int]:
  """`height` lines from the first that is not finished; how many are left out."""
  unfinished = [
    i
    for i, line in enumerate(lines)
    if any(kind in ('masked', 'back') for _, kind in line)
  ]
  first = min(unfinished[0] if unfinished else len(lines), len(lines) - height)
  return lines[first : first + height], len(lines) - height


class Picture:
  """Lines, for rich."""

  def __init__(self, lines: Sequence[Line]):
    self._lines = lines

  def __rich_console__(self, console, options):
    del console, options
    for i, line in enumerate(self._lines):
      if i:
        yield segment.Segment.line()
      for text, kind in line:
        yield segment.Segment(text, STYLES[kind])


@contextlib.contextmanager
def _restored(display: live.Live):
  """Gives the terminal its cursor back before a signal acts as it would."""
  handled = (signal.SIGINT, signal.SIGTERM)
  if threading.current_thread() is not threading.main_thread():
    handled = ()
  before = {number: signal.getsignal(number) for number in handled}

  def handle(number, frame):
    display.stop()
    signal.signal(number, before[number])
    if callable(before[number]):
      before[number](number, frame)
    else:
      os.kill(os.getpid(), number)

  for number in handled:
    signal.signal(number, handle)
  try:
    yield
  finally:
    for number in handled:
      signal.signal(number, before[number])
