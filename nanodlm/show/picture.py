"""A moving picture of how one sample was made, in SVG, as for a README."""

import itertools
import re

import jinja2
import numpy as np

from nanodlm.show import pages, watch

# Characters per line, the width of one and the height of a line in pixels.
COLUMNS, WIDTH, HEIGHT = 64, 9.6, 26
# The seconds of a round, and the percent of it in which calls are shown.
SECS, FIRST, LAST = 12, 6, 74


def make_svg(texts: list[str], trajectory: watch.Trajectory, facts: str) -> str:
  """Draws when each token got its last value; until then it is masked.

  `texts` are those of the tokens that are shown, `facts` is a line below them.
  """
  calls, num_calls = trajectory.changed_at(), len(trajectory.answers)
  letters = [(i, letter) for i, text in enumerate(texts) for letter in text]
  pieces, x, y = [], 0, 0
  for word in re.finditer(r'\n|[^\S\n]*\S+', ''.join(texts)):
    start, end = word.span()
    if word.group() == '\n' or x + end - start > COLUMNS:
      x, y = 0, y + 1
      start = end - len(word.group().lstrip())
    for i, part in itertools.groupby(letters[start:end], lambda pair: pair[0]):
      text = ''.join(letter for _, letter in part)
      space = len(text) - len(text.lstrip())
      if text.strip():
        piece = {
          'x': round(24 + WIDTH * (x + space), 1),
          'y': HEIGHT * y + 28,
          'width': round(WIDTH * len(text.strip()), 1),
          'text': text.strip(),
          'call': calls[i],
        }
        pieces.append(piece)
      x += len(text)
  template = jinja2.Template(
    pages.read('picture.svg'), autoescape=True, trim_blocks=True
  )
  picture = template.render(
    height=HEIGHT * y + 90,
    pieces=pieces,
    times=FIRST + (LAST - FIRST) * np.arange(1, num_calls + 1) / num_calls,
    secs=SECS,
    facts=facts,
  )
  return pages.printable(picture)
