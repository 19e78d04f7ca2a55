"""Shows the canvases of a sampler in the terminal while they are filled."""

from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import itertools
import re
import signal
import time
from typing import Any, TypeVar

from absl import flags
import jax
import numpy as np
from rich import cells, live, style
from rich import console as consoles
from rich.text import Text

from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.show import watch
from nanodlm.types import InputError

T = TypeVar('T')

# The least time between two frames, and the share of time spent on drawing.
MIN_SECS, MAX_SHARE = 0.1, 0.05
MASK, TAKEN_BACK = '·', '×'
# The colors of tokens.css.
STYLES = {
  'masked': style.Style(dim=True),
  'back': style.Style(color='red', bold=True),
  'given': style.Style(color='cyan'),
  'said': style.Style(),
  'new': style.Style(color='green', bold=True),
  'changed': style.Style(color='yellow', bold=True, underline=True),
  'label': style.Style(dim=True, italic=True),
}
# Control characters, and characters that hide or reorder text.
_HIDDEN = re.compile(
  '[\0-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]'
)


def is_possible(console: consoles.Console) -> bool:
  """Whether a console is a terminal in UTF-8 that can move its cursor."""
  return (
    console.file.isatty()
    and console.is_terminal
    and not console.is_dumb_terminal
    and console.encoding.startswith('utf')
  )


def define_flag():
  """Defines --live."""
  flags.DEFINE_bool(
    'live',
    None,
    'Whether to show the canvases during sampling; by default, if the output '
    'is a terminal.',
  )


def make_display() -> 'Display | None':
  """Returns the display that --live asks for; None is plain text."""
  console, is_wanted = consoles.Console(), flags.FLAGS.live
  can_show = is_possible(console) and jax.process_count() == 1
  if is_wanted and not can_show:
    raise InputError(
      '--live needs a single process and a terminal with UTF-8 and cursor '
      'movement'
    )
  return Display(console) if can_show and is_wanted is not False else None


def visible(text: str) -> str:
  """Replaces characters without a shape; newlines also stay."""
  shape = lambda c: '↵\n' if c == '\n' else f'‹U+{ord(c):04X}›'
  return _HIDDEN.sub(lambda match: shape(match.group()), text)


def wrap(text: Text, width: int) -> list[Text]:
  """Breaks text into lines of at most `width` >= 2 columns."""
  lines = []
  for line in text.split('\n', allow_blank=True):
    parts = cells.chop_cells(line.plain, width)[:-1]
    lines += line.divide(itertools.accumulate(map(len, parts)))
  return lines


class _Canvas:
  """One sample while it is made."""

  def __init__(self, tokens: np.ndarray, mask_id: int, room: Any = False):
    self.tokens, self.mask_id = np.array(tokens, np.int32), mask_id
    # Where a gap has any length, in which tokens move.
    self.room = np.broadcast_to(room, tokens.shape)
    # Numbers of calls: so far, and when it was last drawn.
    self.calls, self.drawn_at = 0, 0
    # The call that last changed a position, or 0, and if it replaced a token.
    self.changed_at = np.zeros(tokens.shape, np.int32)
    self.replaced = np.zeros(tokens.shape, bool)

  def see(self, tokens: np.ndarray, start: int):
    before = self.tokens.copy()
    watch.paste(self.tokens, tokens, start)
    # The canvas of the first call may be noise, which is not a change.
    changed = (before != self.tokens) & (self.calls > 0)
    self.calls += 1
    self.changed_at[changed] = self.calls
    was_token = (before != self.mask_id) & ~self.room
    self.replaced[changed] = was_token[changed]

  def kinds(self, fixed: np.ndarray) -> list[str]:
    """Returns a key of STYLES per position; new is new since the last call."""
    new = self.changed_at > self.drawn_at
    self.drawn_at = self.calls
    masked = self.tokens == self.mask_id
    kinds = {
      'given': fixed,
      'back': masked & self.replaced,
      'masked': masked,
      'changed': new & self.replaced,
      'new': new,
    }
    return np.select([*kinds.values()], [*kinds], 'said').tolist()


class Display:
  """Draws the canvases of a sampler.

  The sampler runs in a second thread: the main thread draws and handles signals
  at once.

  Args:
    console: a terminal, see `is_possible`.
  """

  def __init__(self, console: consoles.Console):
    self._console = console
    self._canvases: list[_Canvas] = []
    self._first_call = 0.0

  def watch(self, event: watch.Asked | watch.Answered) -> bool:
    """A `watch.Watch`."""
    if isinstance(event, watch.Asked):
      self._first_call = self._first_call or time.monotonic()
      rows = self._canvases[event.first_row :]  # Without padding of the batch.
      for canvas, tokens, start in zip(rows, event.tokens, event.start):
        canvas.see(tokens, start)
    return True

  def run(
    self,
    work: Callable[[], T],
    tokenizer: Tokenizer,
    title: str,
    tokens: np.ndarray,
    fixed: np.ndarray,
  ) -> T:
    """Returns work(), and draws the calls that `watch` is shown meanwhile.

    `tokens` and `fixed` [N, L] are the canvases, with mask_id in the gaps.
    """
    self._canvases = [
      _Canvas(row, tokenizer.mask_id, ~given & (row != tokenizer.mask_id))
      for row, given in zip(tokens, fixed)
    ]
    self._first_call = 0.0

    def draw() -> Text:
      lines = self._lines(tokenizer, title, fixed)
      return Text('\n', no_wrap=True).join(lines)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
      future = executor.submit(work)
      display = live.Live(
        draw(), console=self._console, auto_refresh=False, transient=True
      )
      with display, _restored(display):
        pause = MIN_SECS
        while not concurrent.futures.wait([future], pause).done:
          start = time.monotonic()
          display.update(draw(), refresh=True)
          pause = max(MIN_SECS, (time.monotonic() - start) / MAX_SHARE)
    return future.result()

  def _lines(
    self, tokenizer: Tokenizer, title: str, fixed: np.ndarray
  ) -> list[Text]:
    """Returns the lines of a frame, which fit in the terminal."""
    width, height = max(self._console.width, 2), self._console.height - 1
    lines = [
      _label(visible(title).replace('\n', ''), width),
      _label(self._progress(fixed), width),
    ]
    num = len(self._canvases)
    for i, canvas in enumerate(self._canvases):
      kinds = canvas.kinds(fixed[i])
      body = wrap(_paint(tokenizer, canvas.tokens, kinds, canvas.room), width)
      # A label, and a line for the number of further samples.
      room = max(height - len(lines) - 1 - (i < num - 1), 0)
      if i and len(body) > room:
        plural = 's' if num - i > 1 else ''
        lines.append(_label(f'and {num - i} more sample{plural}', width))
        break
      label = f'sample {i + 1} of {num}'
      if len(body) > room:
        label += f', {len(body) - room} more lines'
        body = _window(body, room)
      lines += [_label(label, width), *body]
    return lines[: max(height, 1)]

  def _progress(self, fixed: np.ndarray) -> str:
    if not self._first_call:
      return 'compiling'
    tokens = np.stack([canvas.tokens for canvas in self._canvases])
    num_free = np.sum(~fixed)
    is_written = ~fixed & (tokens != self._canvases[0].mask_id)
    # What is left of the room of a row is as at its end.
    room = np.stack([canvas.room for canvas in self._canvases])
    written = np.sum(is_written & ~(room & (tokens == tokens[:, -1:])))
    # A canvas of noise is full from the start.
    changed = sum(np.sum(canvas.changed_at > 0) for canvas in self._canvases)
    secs = max(time.monotonic() - self._first_call, 1e-3)
    return (
      f'call {max(canvas.calls for canvas in self._canvases)}, '
      f'{written:,} of {num_free:,} tokens, '
      f'{min(written, changed) / secs:,.0f} tokens/s'
    )


def _paint(
  tokenizer: Tokenizer,
  tokens: np.ndarray,
  kinds: Sequence[str],
  room: np.ndarray,
) -> Text:
  """Returns the text of tokens, each in the style of its kind."""
  painted = Text()
  shapes = {'back': TAKEN_BACK, 'masked': MASK}
  ends = {tokenizer.separator_id, *tokenizer.eos_ids}
  texts = tokenizer.spell(tokens, MASK)
  for text, token, kind, is_room in zip(texts, tokens, kinds, room):
    end = '' if is_room else '¶\n'
    text = end if token in ends else visible(text)
    painted.append(shapes.get(kind, text), STYLES[kind])
  return painted


def _label(text: str, width: int) -> Text:
  label = Text(text, STYLES['label'])
  label.truncate(width, overflow='ellipsis')
  return label


def _window(lines: list[Text], height: int) -> list[Text]:
  """Returns `height` lines, from the first with a masked token if possible."""
  first = last = len(lines) - height
  masked = STYLES['masked'], STYLES['back']
  for i, line in enumerate(lines):
    if any(span.style in masked for span in line.spans):
      first = min(i, last)
      break
  return lines[first : first + height]


@contextlib.contextmanager
def _restored(display: live.Live):
  """On SIGINT or SIGTERM, restores the cursor, then calls the old handler."""
  previous = {}

  def handle(number, frame):
    del frame
    display.stop()
    signal.signal(number, previous[number])
    signal.raise_signal(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.signal(number, handle)
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
