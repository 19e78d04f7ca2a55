"""Line plots for pages: as SVG drawn here, or as PNG by matplotlib; no JAX.

Series are told apart three times, by colour, dashes and markers. The colours are
those of Okabe and Ito, which people with any colour vision tell apart, darkened
on white and lightened on black until they stand out from it 3 : 1 (WCAG 2.2,
1.4.11).
"""

import dataclasses
import html
import math
import pathlib
import re
from typing import Iterator, Sequence

LIGHT = ('#0072b2', '#c44900', '#00805c', '#a8447f', '#8a6500', '#3a3a3a')
DARK = ('#56b4e9', '#ff9146', '#25c79a', '#e79bc6', '#e6c229', '#d5d5d5')
LIGHT_PAGE, DARK_PAGE = '#ffffff', '#16181c'
DASHES = ('', '7 3', '2 3', '9 3 2 3')
MARKERS = ('circle', 'square', 'triangle', 'diamond', 'cross')
_MATPLOTLIB_MARKERS = dict(zip(MARKERS, 'os^DX'))
# More would say no more on a screen, and make a page of many megabytes.
MAX_POINTS = 400
# Up to so many points each has a marker; of more, about so many have.
MAX_MARKERS = 12
# In units of the picture; on a phone one is a little less than a pixel.
_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 44
# What XML and HTML have no place for, and halves of surrogate pairs.
_UNPRINTABLE = re.compile(
  r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff'
  r'\ufffe\uffff]'
)


@dataclasses.dataclass(frozen=True)
class Series:
  """A line of a plot.

  Attributes:
    name: in the legend and in tables.
    points: (x, y) or (x, y, half width of its interval), x rising.
    style: its colour, dashes and marker, from 0.
    joined: whether neighbours are joined by a line.
    hollow: whether markers are not filled.
    in_legend: whether the legend has it.
  """

  name: str
  points: tuple[tuple[float, ...], ...]
  style: int
  joined: bool = True
  hollow: bool = False
  in_legend: bool = True


@dataclasses.dataclass(frozen=True)
class Plot:
  """What is drawn.

  Attributes:
    name: a word for files and anchors.
    title: what it shows, in a few words.
    text: what one must know to read it.
    x_label: with unit.
    y_label: with unit.
    series: its lines.
    x_log: whether x is on a logarithmic axis, x > 0.
    x_ticks: where x has its ticks; empty: round numbers.
  """

  name: str
  title: str
  text: str
  x_label: str
  y_label: str
  series: tuple[Series, ...]
  x_log: bool = False
  x_ticks: tuple[float, ...] = ()


def printable(text: str) -> str:
  """The text with a U+FFFD for what a page cannot hold."""
  return _UNPRINTABLE.sub('\ufffd', text)


def escape(text: str) -> str:
  """The text as HTML or XML has it, in an element or an attribute."""
  return html.escape(printable(text))


def format_number(value: float) -> str:
  """A number for people: four figures, thousands as k, M, G."""
  if not math.isfinite(value):
    return str(value)
  for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= 10 * size or (abs(value) >= size and unit != 'k'):
      return f'{value / size:.4g}{unit}'
  return f'{value:.4g}'


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
  """Multiples of 1, 2 or 5 times a power of ten in [low, high]."""
  if not high > low:
    return [low]
  step = 10.0 ** math.floor(math.log10((high - low) / most))
  step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= most)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def thin(
  points: Sequence[tuple[float, ...]], most: int = MAX_POINTS
) -> list[tuple[float, ...]]:
  """At most `most` of the points: the highest and lowest of each stretch.

  So that a peak of one step stays. The first and the last stay too.
  """
  if len(points) <= most:
    return list(points)
  kept, num = {0, len(points) - 1}, (most - 2) // 2
  for i in range(num):
    part = range(len(points) * i // num, len(points) * (i + 1) // num)
    kept |= {
      min(part, key=lambda j: points[j][1]),
      max(part, key=lambda j: points[j][1]),
    }
  return [points[i] for i in sorted(kept)]


@dataclasses.dataclass(frozen=True)
class _Axis:
  """From values to a coordinate of the picture."""

  low: float
  high: float
  start: float
  end: float
  is_log: bool = False

  def __call__(self, value: float) -> float:
    scale = math.log if self.is_log else float
    low, high = scale(self.low), scale(self.high)
    return self.start + (self.end - self.start) * (scale(value) - low) / (
      high - low
    )


def _range(
  values: Sequence[float], is_log: bool, margin: float
) -> tuple[float, float]:
  """The ends of an axis that holds the values."""
  low, high = min(values), max(values)
  if is_log:
    wider = (high / low) ** margin if high > low else 2.0
    return low / wider, high * wider
  wider = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
  return low - wider, high + wider


def _axes(plot: Plot) -> tuple[_Axis, _Axis]:
  points = [point for series in plot.series for point in series.points]
  x_low, x_high = _range([p[0] for p in points], plot.x_log, 0.03)
  y_low, y_high = _range(
    [
      p[1] + sign * (p[2] if len(p) > 2 else 0)
      for p in points
      for sign in (-1, 1)
    ],
    False,
    0.05,
  )
  return (
    _Axis(x_low, x_high, _LEFT, _WIDTH - _RIGHT, plot.x_log),
    _Axis(y_low, y_high, _HEIGHT - _BOTTOM, _TOP),
  )


def _marker(kind: str, x: float, y: float) -> str:
  r = 4.0
  if kind == 'circle':
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
  corners = {
    'square': ((-r, -r), (r, -r), (r, r), (-r, r)),
    'triangle': ((0, -5), (5, 4), (-5, 4)),
    'diamond': ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    'cross': (
      (-5, -2),
      (-2, -2),
      (-2, -5),
      (2, -5),
      (2, -2),
      (5, -2),
      (5, 2),
      (2, 2),
      (2, 5),
      (-2, 5),
      (-2, 2),
      (-5, 2),
    ),
  }[kind]
  text = ' '.join(f'{x + dx:.1f},{y + dy:.1f}' for dx, dy in corners)
  return f'<polygon points="{text}"/>'


def marked(
  points: Sequence[tuple[float, ...]], style: int
) -> list[tuple[float, ...]]:
  """The points that get a marker; those of neighbouring styles are apart."""
  if len(points) <= MAX_MARKERS:
    return list(points)
  stride = len(points) // MAX_MARKERS
  first = style * stride // len(MARKERS) % stride
  return list(points[first::stride])


def _draw_series(series: Series, x_axis: _Axis, y_axis: _Axis) -> Iterator[str]:
  points = thin(series.points)
  style = series.style
  yield f'<g class="s{style % len(LIGHT)}{" hollow" if series.hollow else ""}">'
  for point in points:
    if len(point) > 2 and point[2]:
      x = x_axis(point[0])
      ends = [y_axis(point[1] + sign * point[2]) for sign in (-1, 1)]
      yield (
        f'<path class="interval" d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}'
        + ''.join(f'M{x - 3:.1f} {y:.1f}h6' for y in ends)
        + '"/>'
      )
  if series.joined and len(points) > 1:
    line = ' '.join(f'{x_axis(p[0]):.1f},{y_axis(p[1]):.1f}' for p in points)
    dash = DASHES[style % len(DASHES)]
    yield (
      f'<polyline points="{line}"'
      + (f' stroke-dasharray="{dash}"' if dash else '')
      + '/>'
    )
  kind = MARKERS[style % len(MARKERS)]
  for point in marked(points, style):
    yield _marker(kind, x_axis(point[0]), y_axis(point[1]))
  yield '</g>'


def describe(plot: Plot) -> str:
  """In words what the plot shows, for those who do not see it."""
  parts = []
  for series in plot.series:
    if series.points:
      first, last = series.points[0], series.points[-1]
      parts.append(
        f'{series.name}: {len(series.points)} points, from '
        f'{format_number(first[1])} at {format_number(first[0])} to '
        f'{format_number(last[1])} at {format_number(last[0])}'
      )
  return f'{plot.y_label} against {plot.x_label}. ' + '; '.join(parts) + '.'


def to_svg(plot: Plot) -> str:
  """The plot as an <svg> element; its colours are those of `CSS`."""
  x_axis, y_axis = _axes(plot)
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
  parts = [
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="plot" '
    f'aria-labelledby="{plot.name}-title {plot.name}-desc">'
    f'<title id="{plot.name}-title">{escape(plot.title)}</title>'
    f'<desc id="{plot.name}-desc">{escape(describe(plot))}</desc>'
  ]
  ticks = plot.x_ticks or round_ticks(x_axis.low, x_axis.high, 5)
  for value in ticks:
    x = x_axis(value)
    parts.append(
      f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/><text '
      f'x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
      f'{format_number(value)}</text>'
    )
  for value in round_ticks(y_axis.low, y_axis.high):
    y = y_axis(value)
    parts.append(
      f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/><text '
      f'x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
      f'{format_number(value)}</text>'
    )
  middle = (_TOP + bottom) / 2
  parts.append(
    f'<path class="frame" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>'
    f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
    f'{escape(plot.x_label)}</text><text transform="translate(13 {middle}) '
    f'rotate(-90)" text-anchor="middle">{escape(plot.y_label)}</text>'
  )
  for series in plot.series:
    parts += _draw_series(series, x_axis, y_axis)
  return '\n'.join([*parts, '</svg>'])


def to_legend(plot: Plot) -> str:
  """The names of the series with their lines, as an HTML list."""
  items = []
  for series in plot.series:
    if not series.in_legend:
      continue
    style = series.style
    dash = DASHES[style % len(DASHES)]
    line = (
      '<polyline points="0,8 34,8"'
      + (f' stroke-dasharray="{dash}"' if dash else '')
      + '/>'
      if series.joined
      else ''
    )
    hollow = ' hollow' if series.hollow else ''
    items.append(
      f'<li><svg viewBox="0 0 34 16" class="key" aria-hidden="true"><g class='
      f'"s{style % len(LIGHT)}{hollow}">{line}'
      f'{_marker(MARKERS[style % len(MARKERS)], 17, 8)}</g></svg>'
      f'{escape(series.name)}</li>'
    )
  return f'<ul class="legend">{"".join(items)}</ul>'


def _colours(colours: Sequence[str]) -> str:
  return ''.join(f'--s{i}:{colour};' for i, colour in enumerate(colours))


CSS = (
  f':root{{color-scheme:light dark;--page:{LIGHT_PAGE};--ink:#1b1f24;'
  f'--soft:#57606a;--rule:#d7dbe0;{_colours(LIGHT)}}}\n'
  '@media(prefers-color-scheme:dark){:root{'
  f'--page:{DARK_PAGE};--ink:#e6e8eb;--soft:#a3abb5;--rule:#363b42;'
  f'{_colours(DARK)}}}}}\n'
  '.plot{width:100%;height:auto;display:block}\n'
  '.plot text{font:13px system-ui,sans-serif;fill:var(--ink)}\n'
  '.grid{stroke:var(--rule);stroke-width:1}\n'
  '.frame{stroke:var(--soft);fill:none}\n'
  'polyline{fill:none;stroke-width:2;stroke-linejoin:round}\n'
  '.interval{fill:none;stroke-width:1.5}\n'
  '.hollow>circle,.hollow>polygon{fill:var(--page);stroke-width:1.5}\n'
  '.key{width:34px;height:16px;flex:none}\n'
  '.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;'
  'padding:0;margin:.3rem 0}\n'
  '.legend li{display:flex;align-items:center;gap:.4rem}\n'
  + ''.join(
    f'.s{i}{{stroke:var(--s{i});fill:var(--s{i})}}\n' for i in range(len(LIGHT))
  )
)


def save_png(plot: Plot, path: pathlib.Path):
  """Draws the plot with matplotlib."""
  from matplotlib import figure  # pylint: disable=g-import-not-at-top

  fig = figure.Figure(figsize=(6.4, 4.4), layout='constrained')
  axes = fig.subplots()
  for series in plot.series:
    points = thin(series.points)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    dash = DASHES[series.style % len(DASHES)]
    style = {
      'color': LIGHT[series.style % len(LIGHT)],
      'marker': _MATPLOTLIB_MARKERS[MARKERS[series.style % len(MARKERS)]],
      'markevery': max(len(points) // MAX_MARKERS, 1),
      'markerfacecolor': 'white' if series.hollow else None,
      'linestyle': 'none'
      if not series.joined
      else ((0, tuple(map(float, dash.split()))) if dash else '-'),
      'label': printable(series.name) if series.in_legend else None,
    }
    if any(len(p) > 2 for p in points):
      style |= {
        'yerr': [p[2] if len(p) > 2 else 0 for p in points],
        'capsize': 3,
        'markevery': 1,
      }
      axes.errorbar(xs, ys, **style)
    else:
      axes.plot(xs, ys, **style)
  axes.set(
    xlabel=printable(plot.x_label),
    ylabel=printable(plot.y_label),
    title=printable(plot.title),
  )
  if plot.x_log:
    axes.set_xscale('log')
  if plot.x_ticks:
    axes.set_xticks([], minor=True)
    axes.set_xticks(plot.x_ticks, map(format_number, plot.x_ticks))
  axes.grid(alpha=0.3)
  axes.legend(fontsize='small')
  fig.savefig(path, dpi=120)
