"""Tests of nanodlm.show.plots."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from nanodlm.show import plots

pytest.importorskip('matplotlib')


def plot_of(*curves, **kwargs):
  named = {f'run {i}': points for i, points in enumerate(curves)}
  return plots.Plot('A title', 'step', 'nats', named, **kwargs)


def texts_of(svg):
  texts = ET.fromstring(svg).iter('{http://www.w3.org/2000/svg}text')
  return [text.text for text in texts]


def test_curves_differ_and_are_described():
  curves = [[(1, i, 0.0), (2, i + 1.5, 0.0)] for i in range(7)]
  plot = plot_of(*curves, [])
  svg = plots.to_svg(plot)
  label = ET.fromstring(svg).get('aria-label', '')
  assert label.startswith('nats against step. run 0: 2 points, from 0 at 1 to ')
  assert svg.count('role="img"') == 1 and 'http://purl' not in svg
  names = {'step', 'nats', *(f'run {i}' for i in range(7))}
  assert names <= set(texts_of(svg))
  assert 'run 7' not in svg  # A curve without points.
  lines = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="([^"]*)"', svg)
  looks = {(look, plots.MARKERS[i % 5]) for i, look in enumerate(lines[-7:])}
  assert len(looks) == 7


def test_error_bars():
  # Each bar is a line; its two caps are defined once.
  count = lambda *widths: plots.to_svg(
    plot_of([(x, 1.0 + x, width) for x, width in enumerate(widths)])
  ).count('<path')
  assert count(0.5, 0.25, 0.5) - count(0.0, 0.0, 0.0) >= 3 + 2


def test_few_numbers_of_calls_are_ticks():
  plot = plot_of([(x, 1.0, 0.0) for x in (4, 16, 100)], x_log=True)
  assert texts_of(plots.to_svg(plot))[:4] == ['4', '16', '100', 'step']


def test_long_curves_stay_small():
  # A peak of one step is kept.
  y = np.random.default_rng(0).normal(size=100_000)
  y[4321] = 99
  points = [(i, value, 0.0) for i, value in enumerate(y.tolist())]
  svg = plots.to_svg(plot_of(points))
  assert len(svg) < 250_000
  short = plots.to_svg(plot_of(points[4300:4350]))
  top = lambda text: min(
    float(value) for value in re.findall(r'[ML] [\d.]+ ([\d.]+)', text)
  )
  assert abs(top(svg) - top(short)) < 2


def _luminance(color):
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color
  ]
  return np.dot(linear, (0.2126, 0.7152, 0.0722))


# The filter of dark pages, invert(1) hue-rotate(180deg), in sRGB.
_HUE = np.array([[0.213, 0.715, 0.072]] * 3) * 2 - np.eye(3)


@pytest.mark.parametrize('color', plots.COLORS)
@pytest.mark.parametrize('is_dark', [False, True])
def test_contrast(color, is_dark):
  color = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
  page = np.ones(3)
  if is_dark:
    color, page = np.clip(_HUE @ (1 - color), 0, 1), np.full(3, 0x12 / 255)
  low, high = sorted((_luminance(color), _luminance(page)))
  assert (high + 0.05) / (low + 0.05) >= 3
