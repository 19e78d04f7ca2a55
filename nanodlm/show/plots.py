"""Line plots with error bars, as SVG text for a page."""

from collections.abc import Mapping, Sequence
import io
import re
from typing import Any, NamedTuple
import warnings

from nanodlm.show.pages import escape, printable
from nanodlm.types import InputError

# The palette of Okabe and Ito, which is safe for colour-blind readers, darkened
# to a contrast of 3 : 1 with white (WCAG 2.2, 1.4.11). Curves also differ in
# dashes and markers.
COLORS = ('#0072b2', '#c44900', '#00805c', '#a8447f', '#8a6500', '#3a3a3a')
DASHES = ('-', (0, (5, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)))
MARKERS = 'os^DX'
# Longer curves have about this number of markers.
MAX_MARKERS = 12
# On a logarithmic axis, up to this number of values of x are ticks themselves.
MAX_TICKS = 6
_RC: Any = {
  'axes.grid': True,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'font.size': 11,
  'grid.alpha': 0.3,
  # Text stays text, for search and screen readers.
  'svg.fonttype': 'none',
  'text.parse_math': False,
}


class Plot(NamedTuple):
  """Curves, {name: points}, and labels.

  A point is x, y and half the width of y's interval or 0; x rises. Colors,
  dashes and markers go by the number of the curve, including curves without
  points, which are not drawn.
  """

  title: str
  x_label: str
  y_label: str
  curves: Mapping[str, Sequence[tuple[float, float, float]]]
  x_log: bool = False


def describe(plot: Plot) -> str:
  """Describes a plot in words, for readers who cannot see it."""
  lines = [
    f'{name}: {len(points)} points, from {points[0][1]:.4g} at '
    f'{points[0][0]:.6g} to {points[-1][1]:.4g} at {points[-1][0]:.6g}'
    for name, points in plot.curves.items()
    if points
  ]
  return f'{plot.y_label} against {plot.x_label}. {"; ".join(lines)}.'


def to_svg(plot: Plot) -> str:
  """Returns the plot as an <svg> element with a transparent background."""
  try:
    import matplotlib
    from matplotlib import figure
  except ImportError as error:
    raise InputError(
      "plots need matplotlib, which is not installed: pip install -e '.[plots]'"
    ) from error
  with (
    # Plots of the same page must not have the same ids.
    matplotlib.rc_context(_RC | {'svg.hashsalt': str(plot)}),
    warnings.catch_warnings(),
  ):
    # The font may lack a character of a run's name.
    warnings.simplefilter('ignore')
    size = (5.2, 3.2 + 0.22 * sum(map(bool, plot.curves.values())))
    fig = figure.Figure(figsize=size, layout='constrained')
    axes = fig.subplots()
    lines = {}
    for i, (name, points) in enumerate(plot.curves.items()):
      if not points:
        continue
      x, y, widths = zip(*points)
      # The markers of neighboring curves are apart.
      stride = max(len(x) // MAX_MARKERS, 1)
      every = (i * stride // len(MARKERS) % stride, stride)
      look = {
        'color': COLORS[i % len(COLORS)],
        'linestyle': DASHES[i % len(DASHES)],
        'marker': MARKERS[i % len(MARKERS)],
      }
      bars = {'yerr': widths, 'capsize': 3} if any(widths) else {}
      bars |= {'errorevery': every, 'markevery': every}
      lines[printable(name)] = axes.errorbar(x, y, **look, **bars)
    axes.set(xlabel=printable(plot.x_label), ylabel=printable(plot.y_label))
    ticks = sorted({x for points in plot.curves.values() for x, *_ in points})
    if not plot.x_log:
      axes.locator_params(axis='x', nbins=5)
    else:
      axes.set_xscale('log')
      if len(ticks) <= MAX_TICKS:
        axes.set_xticks([], minor=True)
        axes.set_xticks(ticks, [f'{x:g}' for x in ticks])
    names, handles = list(lines), list(lines.values())
    fig.legend(handles, names, loc='outside lower left', frameon=False)
    # Metadata would name addresses on the web.
    no_metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    file = io.StringIO()
    fig.savefig(file, format='svg', transparent=True, metadata=no_metadata)
  svg = file.getvalue().partition('<svg ')[2]
  # Names of groups, which repeat in the next plot of the page.
  svg = re.sub(r'<g id="[\w.]+">', '<g>', svg)
  return f'<svg role="img" aria-label="{escape(describe(plot))}" {svg}'
