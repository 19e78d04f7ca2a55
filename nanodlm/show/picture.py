"""A moving picture of how one sample was made, in SVG, as for a README."""

import re
import string

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
  owners = [i for i, text in enumerate(texts) for _ in text]
  parts, x, y = [], 0, 0
  for word in re.finditer(r'\n|[^\S\n]*\S+', ''.join(texts)):
    start, end = word.span()
    if word.group() == '\n' or x + end - start > COLUMNS:
      x, y = 0, y + 1
      start = end - len(word.group().lstrip())
    while start < end:
      owner, first = owners[start], start
      while start < end and owners[start] == owner:
        start += 1
      text = word.string[first:start]
      space = len(text) - len(text.lstrip())
      left, top = 24 + WIDTH * (x + space), HEIGHT * y + 28
      x, text, call = x + len(text), text.strip(), calls[owner]
      size = WIDTH * len(text)
      if text and call >= 0:
        parts.append(
          f'<rect class="hole m{call}" x="{left:.1f}" y="{top}" '
          f'width="{size:.1f}" height="16" rx="3" opacity="0"/>'
        )
      if text:
        kind = 'given' if call < 0 else f'c{call}'
        parts.append(
          f'<text class="{kind}" x="{left:.1f}" y="{top + 13}" '
          f'textLength="{size:.1f}">{pages.escape(text)}</text>'
        )
  rules = []
  for i in range(num_calls):
    at = FIRST + (LAST - FIRST) * (i + 1) / num_calls
    before, after = f'0%, {at:.2f}%', f'{at + 0.01:.2f}%'
    rules.append(
      f'.c{i} {{ animation: c{i} {SECS}s infinite; }}\n'
      f'.m{i} {{ animation: m{i} {SECS}s infinite; }}\n'
      f'@keyframes c{i} {{ {before}, 100% {{ opacity: 0; }} {after}, '
      f'{at + 8:.2f}% {{ opacity: 1; color: var(--new); }} '
      f'{at + 12:.2f}%, 98% {{ opacity: 1; }} }}\n'
      f'@keyframes m{i} {{ {before}, 100% {{ opacity: 1; }} '
      f'{after}, 98% {{ opacity: 0; }} }}'
    )
  return string.Template(pages.read('picture.svg')).substitute(
    height=HEIGHT * y + 90,
    card=HEIGHT * y + 88,
    bottom=HEIGHT * y + 72,
    facts=pages.escape(facts),
    parts='\n'.join(parts),
    rules='\n'.join(rules),
  )
