"""Tests of nanodlm.show.live: what it draws, and how it leaves the terminal."""

import io
import os
import signal
import time

import numpy as np
import pytest
from rich import console as consoles
from rich.text import Text

from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.show import live, watch

BYTES = BytesTokenizer()
MASK = BYTES.mask_id


def make_console(width=40, height=20, **kwargs):
  return consoles.Console(
    file=io.StringIO(),
    force_terminal=True,
    width=width,
    height=height,
    color_system='standard',
    **kwargs,
  )


def asked(*texts, first_row=0):
  """Returns a call with these canvases; '_' is a mask."""
  tokens = [[MASK if c == '_' else ord(c) for c in text] for text in texts]
  return watch.Asked(
    first_row,
    np.zeros(len(texts), np.int32),
    np.array(tokens, np.int32),
    np.zeros((len(texts), 0), np.int32),
  )


def run(display, *events, texts=('____',), secs=0.15):
  """Runs `display.run` while a sampler makes these calls."""
  tokens = asked(*texts).tokens

  def work():
    time.sleep(secs)  # Compilation.
    for event in events:
      assert display.watch(event)
      time.sleep(secs)
    return 'done'

  return display.run(work, BYTES, 'a title', tokens, tokens != MASK)


def kinds(*frames):
  canvas = live._Canvas(asked(frames[0]).tokens[0], MASK)
  for frame in frames:
    fixed = np.array([c == 'P' for c in frame])
    canvas.see(asked(frame).tokens[0], 0)
    seen = canvas.kinds(fixed)
  return seen


def test_kinds():
  assert kinds('P___') == ['given', 'masked', 'masked', 'masked']
  assert kinds('P___', 'Pa__', 'Pab_') == ['given', 'said', 'new', 'masked']
  assert kinds('P___', 'Pa__', 'P_b_') == ['given', 'back', 'new', 'masked']
  assert kinds('Pxyz', 'Paxz') == ['given', 'changed', 'changed', 'said']


def test_visible():
  assert live.visible('a\n\t\0\x1b[2J\x7f\x9b\u202e\u200d') == (
    'a↵\n‹U+0009›‹U+0000›‹U+001B›[2J‹U+007F›‹U+009B›‹U+202E›‹U+200D›'
  )


@pytest.mark.parametrize('width', [2, 3, 7, 40])
def test_wrap(width):
  texts = ['ab', '漢字', '', 'c\n', '\n', 'x' * 9, 'é']
  kind = ['said', 'said', 'new', 'new', 'said', 'masked', 'said']
  lines = live.wrap(Text.assemble(*zip(texts, kind)), width)
  assert all(line.cell_len <= width for line in lines)
  assert ''.join(line.plain for line in lines) == (
    ''.join(texts).replace('\n', '')
  )
  if width == 40:
    assert lines == [
      Text.assemble(('ab', 'said'), ('漢字', 'said'), ('c', 'new')),
      Text(),
      Text.assemble(('x' * 9, 'masked'), ('é', 'said')),
    ]


def test_shows_calls_and_restores_the_cursor():
  console = make_console()
  display = live.Display(console)
  assert (
    run(
      display, asked('a___'), asked('ab__'), asked('a__\x1b'), texts=('a___',)
    )
    == 'done'
  )
  out = console.file.getvalue()
  for shown in (
    'a title',
    'compiling',
    'call 3, 1 of 3 tokens',
    'tokens/s',
    '×',
    '·',
    '‹U+001B›',
  ):
    assert shown in out
  assert out.count('\x1b[?25l') == out.count('\x1b[?25h') == 1
  # A token that is masked again is marked.
  assert '\x1b[1;31m×' in out


def test_no_color(monkeypatch):
  monkeypatch.setenv('NO_COLOR', '1')
  console = make_console()
  run(live.Display(console), asked('ab__'), asked('____'), texts=('____',))
  out = console.file.getvalue()
  assert '×' in out and '\x1b[2m·' in out  # Dim is not a color.
  assert '\x1b[1;31m' not in out and '31m' not in out


@pytest.mark.parametrize('width, height', [(2, 1), (10, 3), (30, 6), (30, 24)])
def test_fits_the_terminal(width, height):
  console = make_console(width, height)
  display = live.Display(console)
  text = 'abcdefghi_' * 12
  display._canvases = [
    live._Canvas(asked(text).tokens[0], MASK) for _ in range(5)
  ]
  fixed = np.zeros((5, 120), bool)
  lines = display._lines(BYTES, 'title\x1b' * 9, fixed)
  shown = [line.plain for line in lines]
  assert len(lines) <= max(height - 1, 1)
  assert all(live.cells.cell_len(line) <= width for line in shown)
  assert '\x1b' not in ''.join(shown)
  if height == 6:
    assert shown[-1] == 'and 4 more samples' and 'more lines' in shown[2]
  if height == 24:
    assert sum(line.startswith('sample ') for line in shown) == 4
    assert shown[-1] == 'and 1 more sample'


def test_long_canvas_shows_the_first_masked_line():
  masked = Text.assemble(('·', live.STYLES['masked']))
  lines = [Text('x')] * 10 + [masked] * 10
  assert live._window(lines, 4) == lines[10:14]
  assert live._window(lines[:10], 4) == lines[6:10]


def test_incomplete_bytes_and_padded_batches():
  console = make_console()
  display = live.Display(console)
  broken = asked('____', '____')
  broken.tokens[:] = [0xF0, 0x9F, MASK, 0xFF]
  run(display, broken, asked('____', first_row=7))
  assert 'call 1, 3 of 4 tokens' in console.file.getvalue()


def test_failure_and_signal_restore_the_terminal():
  before = signal.getsignal(signal.SIGINT)
  console = make_console()

  def fail():
    raise OSError('no')

  with pytest.raises(OSError, match='no'):
    live.Display(console).run(
      fail, BYTES, '', np.zeros((1, 4), np.int32), np.zeros((1, 4), bool)
    )
  assert '\x1b[?25h' in console.file.getvalue()

  def interrupt():
    time.sleep(0.15)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)

  console = make_console()
  shown = []

  def handle(number, frame):
    del number, frame
    shown.append('\x1b[?25h' in console.file.getvalue())

  signal.signal(signal.SIGINT, handle)
  try:
    live.Display(console).run(
      interrupt, BYTES, '', np.zeros((1, 4), np.int32), np.zeros((1, 4), bool)
    )
    # The cursor is restored before the program's own handler runs.
    assert shown == [True]
    assert signal.getsignal(signal.SIGINT) is handle
  finally:
    signal.signal(signal.SIGINT, before)


def test_needs_a_terminal():
  assert not live.is_possible(consoles.Console(file=io.StringIO()))
  # A pipe with FORCE_COLOR is not a terminal.
  assert not live.is_possible(make_console())
