"""One page about runs, finished or in progress: curves, quality, speed, samples.

    python -m nanodlm.show.report runs/a runs/b --output=report.html
    python -m nanodlm.show.report runs/* --output=report.md --compare=cmp

An .html page is one file that asks for nothing else: its plots are SVG. An .md page
has its plots as PNG files beside it (pip install -e '.[plots]'). Only what the runs
wrote is read: config.json, metrics.jsonl, eval.jsonl, samples.jsonl, and the
comparison.json of nanodlm.evals.compare, where it is given or lies beside the runs. JAX
is not imported, so that the page is there in a second.
"""

import argparse
import contextlib
import dataclasses
import html
import importlib.util
import json
import math
import os
import pathlib
import re
import statistics
import sys
import time
from typing import Any, Iterator, Sequence

from nanodlm.devices import lock
from nanodlm.show import plots
from nanodlm.show.plots import escape, printable
from nanodlm.types import InputError

CONFIG_FILE, METRICS_FILE = 'config.json', 'metrics.jsonl'
EVAL_FILE, SAMPLES_FILE = 'eval.jsonl', 'samples.jsonl'
COMPARISON_FILE = 'comparison.json'
# On the first lines of a page: it may be replaced.
MARK = 'Written by nanodlm.show.report'
# A value that no line of the file has.
MISSING = '–'
NUM_LEVELS = 10
# Rows of the table beside a plot: of a longer curve, evenly chosen ones.
MAX_TABLE_ROWS = 20
# Lines of metrics.jsonl that the speed in the table is the median of.
SPEED_LINES = 5
HELD_OUT = ('eval', 'eval_subset')


# ------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir holds, as far as it goes.

  Attributes:
    path: as it was given.
    name: the shortest end of its path that tells it from the other runs.
    config: {'section.key': value}; empty where there is none.
    metrics: {step: {metric: value}}, steps rising.
    evals: lines of eval.jsonl.
    samples: lines of samples.jsonl.
    state: 'finished', 'in progress', 'stopped', or why none of these.
    age_secs: since metrics.jsonl was written to, or None.
    num_params: of the last checkpoint, or None.
    problems: what is missing or could not be read.
  """

  path: str
  name: str
  config: dict[str, Any]
  metrics: dict[int, dict[str, Any]]
  evals: tuple[dict[str, Any], ...]
  samples: tuple[dict[str, Any], ...]
  state: str
  age_secs: float | None
  num_params: int | None
  problems: tuple[str, ...]

  def curve(self, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, where it is finite."""
    return [
      (step, line[metric])
      for step, line in self.metrics.items()
      if _is_number(line.get(metric))
    ]

  def last_line(self, metric: str) -> tuple[int, dict[str, Any]] | None:
    """The last (step, line) that has a metric."""
    return next(
      (
        (step, line)
        for step, line in reversed(self.metrics.items())
        if _is_number(line.get(metric))
      ),
      None,
    )

  def held_out(self) -> tuple[int, str, dict[str, Any]] | None:
    """The last (step, split, line) of a held-out value."""
    found = [
      (*last, split)
      for split in HELD_OUT
      if (last := self.last_line(f'{split}/nll'))
    ]
    if not found:
      return None
    step, line, split = max(found, key=lambda each: each[0])
    return step, split, line

  @property
  def tokens_per_step(self) -> int | None:
    """Rows times their length, where the config is known."""
    size, length = (
      self.config.get(key) for key in ('train.batch_size', 'data.length')
    )
    return size * length if _is_number(size) and _is_number(length) else None


def _is_number(value: Any) -> bool:
  return (
    isinstance(value, (int, float))
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def read_lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
  """The JSON objects of a file that may still be written to, and problems.

  A last line that is not whole yet is left out without a word.
  """
  try:
    lines = path.read_bytes().split(b'\n')
  except FileNotFoundError:
    return [], [f'no {path.name}']
  except OSError as error:
    return [], [f'{path.name} cannot be read ({error.strerror})']
  found, bad = [], []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError:  # not UTF-8, too
      value = None
    if isinstance(value, dict):
      found.append(value)
    elif number < len(lines):  # behind the last newline a line is being written
      bad.append(number)
  return found, [
    f'{path.name}: line{"s" if len(bad) > 1 else ""} '
    f'{", ".join(map(str, bad[:5]))}{", ..." if len(bad) > 5 else ""} '
    'left out, no JSON object'
  ] if bad else []


def join_steps(lines: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
  """Lines of metrics.jsonl by step; of a step written twice the later counts.

  Where steps go back, the run was started again from a checkpoint: what it wrote
  behind that place is left out, as it will write it again.
  """
  steps = {}
  for line in lines:
    step = line.get('step')
    if not isinstance(step, int) or isinstance(step, bool):
      continue
    while steps and next(reversed(steps)) > step:
      steps.popitem()
    steps[step] = steps.get(step, {}) | line
  return steps


def flatten(config: dict[str, Any]) -> dict[str, Any]:
  """{'section.key': value} of a config.json."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat |= {f'{key}.{leaf}': each for leaf, each in value.items()}
    else:
      flat[key] = value
  return flat


def count_params(workdir: pathlib.Path) -> int | None:
  """Parameters of the last checkpoint, by the shapes that Orbax notes.

  With mesh.tensor the padding of the vocabulary is counted too. None where there
  is no checkpoint, or nothing that can be read.
  """
  paths = [
    path
    for path in workdir.glob('checkpoints/*/params/_METADATA')
    if path.parent.parent.name.isdigit()
  ]
  try:
    path = max(paths, key=lambda path: int(path.parent.parent.name))
    tree = json.loads(path.read_text())['tree_metadata']
    return (
      sum(
        math.prod(leaf['value_metadata']['write_shape'])
        for leaf in tree.values()
      )
      or None
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _read_config(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
  try:
    config = json.loads(path.read_bytes())
  except FileNotFoundError:
    return {}, [f'no {path.name}']
  except (OSError, ValueError) as error:
    return {}, [f'{path.name} cannot be read ({error})']
  if not isinstance(config, dict):
    return {}, [f'{path.name} is not a config']
  return flatten(config), []


def is_run(path: pathlib.Path) -> bool:
  """Whether a folder holds what a training run writes first."""
  return any((path / name).is_file() for name in (CONFIG_FILE, METRICS_FILE))


def read_run(path: str, name: str) -> Run:
  """Reads a workdir; what is missing is told in `Run.problems`."""
  workdir = pathlib.Path(path)
  config, problems = _read_config(workdir / CONFIG_FILE)
  lines, said = read_lines(workdir / METRICS_FILE)
  problems += said
  metrics = join_steps(lines)
  num_bad = sum(
    value is None
    for line in metrics.values()
    for key, value in line.items()
    if not key.endswith('_ci95')
  )
  if num_bad:
    problems.append(f'{num_bad} value{"s" if num_bad > 1 else ""} not finite')
  evals, said = read_lines(workdir / EVAL_FILE)
  problems += [each for each in said if not each.startswith('no ')]
  samples, said = read_lines(workdir / SAMPLES_FILE)
  problems += [each for each in said if not each.startswith('no ')]
  kept = sorted(workdir.glob('config.until_step_*.json'))
  if kept:
    steps = [path.stem.rpartition('_')[2] for path in kept]
    problems.append(f'settings were changed at step {", ".join(steps)}')
  try:
    age = max(time.time() - (workdir / METRICS_FILE).stat().st_mtime, 0.0)
  except OSError:
    age = None
  held = lock.is_held(path)
  num_steps = config.get('train.num_steps')
  if num_steps is not None and not _is_number(num_steps):
    problems.append(
      f'train.num_steps={num_steps!r} in {CONFIG_FILE} is no number'
    )
    num_steps = config['train.num_steps'] = None
  last = max(metrics, default=0)
  if held:
    state = 'in progress'
  elif held is None:
    state = 'in progress or stopped (its lock cannot be read)'
  elif num_steps and last >= num_steps:
    state = 'finished'
  else:
    state = 'stopped'
  return Run(
    path,
    name,
    config,
    metrics,
    tuple(evals),
    tuple(samples),
    state,
    age,
    count_params(workdir),
    tuple(problems),
  )


def short_names(paths: Sequence[str]) -> list[str]:
  """The shortest ends of the paths that differ from each other."""
  parts = [pathlib.Path(os.path.abspath(path)).parts for path in paths]
  names = []
  for own in parts:
    for size in range(1, len(own) + 1):
      if sum(other[-size:] == own[-size:] for other in parts) == 1:
        break
    names.append('/'.join(own[-size:]))
  return names


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A comparison.json: its path, its judge and what it says of each run."""

  path: str
  judge: str
  runs: tuple[dict[str, Any], ...]


def read_comparison(path: pathlib.Path) -> Comparison:
  """Reads what `nanodlm.evals.compare` wrote.

  Raises:
    InputError: it is not that.
  """
  file = path / COMPARISON_FILE if path.is_dir() else path
  try:
    value = json.loads(file.read_bytes())
    runs = tuple(value['runs'])
    # Whatever is not as it is written raises one of the errors below.
    for run in runs:
      for point in run['points']:
        point['sampler']['name'], (point['num_calls'] or 0) + 0
      pathlib.Path(run['workdir']), run['nll']
    return Comparison(str(file), str(value['judge']), runs)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f'--compare={str(path)!r} is no {COMPARISON_FILE} of '
      f'nanodlm.evals.compare: {error!r}'
    ) from error


def find_comparisons(
  runs: Sequence[Run], given: Sequence[pathlib.Path]
) -> list[Comparison]:
  """The given ones, or those beside the runs that are of one of them."""
  if given:
    return [read_comparison(path) for path in given]
  parents = dict.fromkeys(
    pathlib.Path(run.path).resolve().parent for run in runs
  )
  found = []
  for path in sorted(
    file
    for parent in parents
    for pattern in (COMPARISON_FILE, f'*/{COMPARISON_FILE}')
    for file in parent.glob(pattern)
  ):
    try:
      comparison = read_comparison(path)
    except InputError:
      continue
    names = {pathlib.Path(run['workdir']).name for run in comparison.runs}
    if names & {pathlib.Path(run.path).resolve().name for run in runs}:
      found.append(comparison)
  return found


# -------------------------------------------------------------------- the page


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of text under a header."""

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Figure:
  """A plot with its numbers."""

  plot: plots.Plot
  table: Table


@dataclasses.dataclass(frozen=True)
class Sample:
  """A sample: where it comes from, and its text."""

  title: str
  text: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading, paragraphs, and what stands under them."""

  title: str
  notes: tuple[str, ...]
  parts: tuple[Table | Figure | Sample, ...]


def _interval(line: dict[str, Any], key: str) -> str:
  """'1.2345 ± 0.0123' of a line's value; without the interval of one row."""
  value, width = line.get(key), line.get(f'{key}_ci95')
  if not _is_number(value):
    return MISSING
  return f'{value:.4f}' + (f' ± {width:.4f}' if _is_number(width) else '')


def _age(secs: float) -> str:
  for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'min')):
    if secs >= size:
      return f'{secs / size:.0f} {unit} ago'
  return 'just now'


def differing_settings(runs: Sequence[Run]) -> Table | None:
  """The settings that are not the same in all runs."""
  keys = sorted({key for run in runs for key in run.config})
  rows = []
  for key in keys:
    values = [
      json.dumps(run.config[key]) if key in run.config else MISSING
      for run in runs
      if run.config
    ]
    if len(set(values)) > 1:
      rows.append(
        (
          key,
          *(
            json.dumps(run.config[key]) if key in run.config else MISSING
            for run in runs
          ),
        )
      )
  if not rows:
    return None
  return Table(
    'Settings that differ',
    ('setting', *(run.name for run in runs)),
    tuple(rows),
  )


def runs_section(
  runs: Sequence[Run], comparisons: Sequence[Comparison]
) -> Section:
  """Where each run stands, and what differs between their settings."""
  rows = []
  for run in runs:
    num_steps = run.config.get('train.num_steps')
    state = run.state
    if run.age_secs is not None and run.state != 'finished':
      state += f', last written {_age(run.age_secs)}'
    bound = bits = MISSING
    held_out = run.held_out()
    if held_out:
      step, split, line = held_out
      num = line.get(f'{split}/num_examples')
      rows_said = (f'{num:.0f}' if _is_number(num) else '?') + ' rows'
      bound = (
        f'{_interval(line, f"{split}/nll")} (step {step}, '
        + ('a subset of ' if split == 'eval_subset' else '')
        + f'{rows_said})'
      )
      bits = _interval(line, f'{split}/bits_per_byte')
    speeds = [value for _, value in run.curve('train/tokens_per_sec')]
    skipped = run.curve('train/skipped_steps')
    params = run.num_params or next(
      (
        said.get('num_params')
        for each in comparisons
        for said in each.runs
        if pathlib.Path(said['workdir']).resolve()
        == pathlib.Path(run.path).resolve()
      ),
      None,
    )
    rows.append(
      (
        run.name,
        str(run.config.get('objective.name', MISSING)),
        f'{params:,}' if params else MISSING,
        f'{max(run.metrics, default=0):,} / '
        + (f'{num_steps:,}' if num_steps else '?'),
        state,
        bound,
        bits,
        f'{statistics.median(speeds[-SPEED_LINES:]):,.0f}'
        if speeds
        else MISSING,
        f'{skipped[-1][1]:.0f}' if skipped else MISSING,
      )
    )
  table = Table(
    'Where they stand',
    (
      'run',
      'objective',
      'parameters',
      'step',
      'state',
      'held-out nats/token',
      'bits/byte',
      'tokens/s',
      'skipped steps',
    ),
    tuple(rows),
  )
  notes = [
    'Held-out: the bound (exact for ar) with the averaged weights and its '
    f'95% interval; tokens/s: the median of the last {SPEED_LINES} lines; '
    'skipped steps: since the last start.'
  ]
  for key, what in (('tokenizer.', 'tokenizers'), ('data.source', 'texts')):
    values = {
      tuple(
        sorted((k, str(v)) for k, v in run.config.items() if k.startswith(key))
      )
      for run in runs
      if run.config
    }
    if len(values) > 1:
      notes.append(
        f'These runs have different {what}: nats per token of one and of '
        'another are not the same thing'
        + ('; compare bits per byte.' if what == 'tokenizers' else '.')
      )
  notes += [
    f'{run.name}: {problem}.' for run in runs for problem in run.problems
  ]
  settings = differing_settings(runs)
  if settings is None and len(runs) > 1 and all(run.config for run in runs):
    notes.append('Their settings are all the same.')
  return Section(
    'Runs', tuple(notes), (table, *([settings] if settings else []))
  )


def make_figure(plot: plots.Plot) -> Figure:
  """A plot beside a table of its points, as many as one reads."""
  rows = []
  for series in plot.series:
    stride = max(-(-len(series.points) // MAX_TABLE_ROWS), 1)
    # From the end: the last one is what one looks for.
    chosen = series.points[::-1][::stride][::-1]
    for point in chosen:
      width = f' ± {point[2]:.4g}' if len(point) > 2 and point[2] else ''
      rows.append(
        (series.name, plots.format_number(point[0]), f'{point[1]:.5g}{width}')
      )
  num = sum(len(series.points) for series in plot.series)
  title = 'The numbers' + (
    f' ({len(rows)} of {num})' if len(rows) < num else ''
  )
  return Figure(
    plot, Table(title, ('', plot.x_label, plot.y_label), tuple(rows))
  )


def _figures(*all_plots: plots.Plot) -> tuple[Figure, ...]:
  """Those that have something to show."""
  kept = []
  for plot in all_plots:
    series = tuple(each for each in plot.series if each.points)
    if series:
      kept.append(make_figure(dataclasses.replace(plot, series=series)))
  return tuple(kept)


def _held_out_series(
  run: Run, style: int, scale: float
) -> Iterator[plots.Series]:
  """Held-out values against steps times `scale`: of all rows, and of a subset."""
  is_named = False
  for split in HELD_OUT:
    points = tuple(
      (
        step * scale,
        line[f'{split}/nll'],
        line[f'{split}/nll_ci95']
        if _is_number(line.get(f'{split}/nll_ci95'))
        else 0.0,
      )
      for step, line in run.metrics.items()
      if _is_number(line.get(f'{split}/nll'))
    )
    is_subset = split == 'eval_subset'
    yield plots.Series(
      run.name + (', subset' if is_subset else ''),
      points,
      style,
      hollow=is_subset,
      in_legend=not is_named,
    )
    is_named = bool(points)


def curves_section(runs: Sequence[Run]) -> Section:
  """Training and held-out values, by steps and by tokens."""
  made = []
  for unit, label in (('steps', 'step'), ('tokens', 'tokens trained on')):
    scales = [run.tokens_per_step if unit == 'tokens' else 1 for run in runs]
    known = [
      (i, run, scale)
      for i, (run, scale) in enumerate(zip(runs, scales))
      if scale
    ]
    made.append(
      plots.Plot(
        f'train-by-{unit}',
        f'Training loss by {unit}',
        'The mean of the steps since the line before, as it was minimised.',
        label,
        'train/loss, nats/token',
        tuple(
          plots.Series(
            run.name,
            tuple(
              (step * scale, value) for step, value in run.curve('train/loss')
            ),
            i,
          )
          for i, run, scale in known
        ),
      )
    )
    made.append(
      plots.Plot(
        f'held-out-by-{unit}',
        f'Held-out bound by {unit}',
        'With its 95% interval, which holds the spread of the text: runs on the '
        'same text differ more surely than that. Hollow: on a subset of the rows.',
        label,
        'nats/token',
        tuple(
          series
          for i, run, scale in known
          for series in _held_out_series(run, i, scale)
        ),
      )
    )
  return Section('Loss', (), _figures(*made))


def _levels(
  line: dict[str, Any], split: str
) -> tuple[tuple[float, float], ...]:
  """(middle of the bin, cross entropy) of a line."""
  keys = [f'{split}_by_level/cross_entropy_{i}' for i in range(NUM_LEVELS)]
  return tuple(
    ((i + 0.5) / NUM_LEVELS, line[key])
    for i, key in enumerate(keys)
    if _is_number(line.get(key))
  )


def levels_section(runs: Sequence[Run]) -> Section:
  """Cross entropy of a scored token by noise level."""
  held_out, training = [], []
  for i, run in enumerate(runs):
    last = run.held_out()
    if last:
      step, split, line = last
      held_out.append(
        plots.Series(f'{run.name}, step {step}', _levels(line, split), i)
      )
    lines = [
      (step, points)
      for step, line in run.metrics.items()
      if (points := _levels(line, 'train'))
    ]
    if lines:
      training.append(
        plots.Series(f'{run.name}, step {lines[-1][0]}', lines[-1][1], i)
      )
  label = 'noise level (masked noise: share of masked tokens)'
  return Section(
    'Loss by noise level',
    (
      'Cross entropy of one scored token, unweighted, in ten bins of the noise '
      'level: to the left nearly all of the text is known, to the right nearly '
      'nothing.',
    ),
    _figures(
      plots.Plot(
        'levels-held-out',
        'Held-out text',
        'The last evaluation.',
        label,
        'nats/scored token',
        tuple(held_out),
      ),
      plots.Plot(
        'levels-train',
        'Training text',
        'The last line.',
        label,
        'nats/scored token',
        tuple(training),
      ),
    ),
  )


def _comparison_plots(
  comparison: Comparison, number: int
) -> Iterator[plots.Plot]:
  """Quality against network calls, a line for each run's sampler."""
  names = short_names([run['workdir'] for run in comparison.runs])
  panels = (
    (
      'gen_bits_per_byte',
      f'Judged by {comparison.judge}',
      'bits/byte under the judge',
      'Lower is likelier text; with a low entropy it is repetition.',
    ),
    (
      'sample_entropy',
      'Entropy of a sample',
      'nats/token',
      'Of the histogram of its tokens: how varied a sample is.',
    ),
  )
  for key, title, label, text in panels:
    series, ticks, style, real = [], set(), 0, []
    for run, name in zip(comparison.runs, names):
      curves = {}
      for point in run['points']:
        if not _is_number(point.get(key)):
          continue
        if point['num_calls']:
          width = point.get(f'{key}_ci95')
          curves.setdefault(point['sampler']['name'], []).append(
            (
              point['num_calls'],
              point[key],
              width if _is_number(width) else 0.0,
            )
          )
        else:
          real.append((f'{name}, held-out text', point[key]))
      for sampler, points in curves.items():
        series.append(
          plots.Series(f'{name}, {sampler}', tuple(sorted(points)), style)
        )
        ticks |= {point[0] for point in points}
        style += 1
    if not ticks:
      continue
    ends = [min(ticks) / 1.2, max(ticks) * 1.2]
    for name, value in real:  # a line across: it has no calls
      series.append(
        plots.Series(name, tuple((x, value) for x in ends), style, hollow=True)
      )
      style += 1
    yield plots.Plot(
      f'calls-{number}-{key.replace("_", "-")}',
      title,
      text,
      'network calls',
      label,
      tuple(series),
      x_log=True,
      x_ticks=tuple(sorted(ticks)) if len(ticks) <= 6 else (),
    )


def _comparison_table(comparison: Comparison) -> Table:
  rows = []
  for run, name in zip(
    comparison.runs, short_names([run['workdir'] for run in comparison.runs])
  ):
    kind = '' if run.get('is_exact') else '≤ '
    rows.append(
      (
        name,
        str(run.get('objective', MISSING)),
        str(run.get('step', MISSING)),
        kind + _interval(run, 'nll'),
        kind + _interval(run, 'bits_per_byte'),
        str(run.get('source', MISSING)),
      )
    )
  return Table(
    f'Bounds in {comparison.path}',
    ('run', 'objective', 'step', 'nats/token', 'bits/byte', 'text'),
    tuple(rows),
  )


def _evals_table(runs: Sequence[Run]) -> Table | None:
  rows = tuple(
    (
      run.name,
      str(line.get('step', MISSING)),
      str(line.get('source', MISSING)),
      _interval(line, 'eval/nll'),
      _interval(line, 'eval/bits_per_byte'),
      f'{line["eval/calls_ratio"]:.1f}'
      if _is_number(line.get('eval/calls_ratio'))
      else MISSING,
    )
    for run in runs
    for line in run.evals
    if _is_number(line.get('eval/nll'))
  )
  return (
    Table(
      'Evaluations (eval.jsonl)',
      (
        'run',
        'step',
        'text',
        'nats/token',
        'bits/byte',
        'times the calls at independent times',
      ),
      rows,
    )
    if rows
    else None
  )


def _infill_figures(runs: Sequence[Run]) -> tuple[Figure, ...]:
  """Accuracy of filled gaps against network calls."""
  series = {}
  for run in runs:
    for line in run.evals:
      rows = line.get('infill')
      for row in rows if isinstance(rows, list) else ():
        if not (
          isinstance(row, dict)
          and row.get('num_calls')
          and all(
            _is_number(row.get(key))
            for key in ('accuracy', 'num_calls', 'ratio')
          )
        ):
          continue
        width = row.get('accuracy_ci95')
        name = f'{run.name}, {row["ratio"]:.0%} masked, {row.get("pattern")}'
        # Measured again with as many calls: the later one counts.
        series.setdefault(name, {})[row['num_calls']] = (
          row['num_calls'],
          row['accuracy'],
          width if _is_number(width) else 0.0,
        )
  ticks = sorted({calls for points in series.values() for calls in points})
  return _figures(
    plots.Plot(
      'infill',
      'Accuracy of filled gaps',
      'The share of masked tokens of held-out rows restored exactly '
      '(--mode=eval --infill), with its 95% interval.',
      'network calls',
      'accuracy',
      tuple(
        plots.Series(name, tuple(sorted(points.values())), i)
        for i, (name, points) in enumerate(series.items())
      ),
      x_log=True,
      x_ticks=tuple(ticks) if len(ticks) <= 6 else (),
    )
  )


def quality_section(
  runs: Sequence[Run], comparisons: Sequence[Comparison]
) -> Section:
  """What was measured of the samples against network calls."""
  parts = [
    part
    for i, comparison in enumerate(comparisons)
    for part in (
      *_figures(*_comparison_plots(comparison, i)),
      _comparison_table(comparison),
    )
  ]
  parts += _infill_figures(runs)
  evals = _evals_table(runs)
  if evals:
    parts.append(evals)
  notes = (
    ()
    if parts
    else (
      'Nothing measured yet: python -m nanodlm.evals.compare RUN... --output=FOLDER '
      '--judge=AR_RUN, or launch.py --mode=eval --workdir=RUN --infill=0.1,0.5.',
    )
  )
  return Section('Quality against network calls', notes, tuple(parts))


def speed_section(runs: Sequence[Run]) -> Section:
  """Tokens per second over the time of the training."""
  series = []
  for i, run in enumerate(runs):
    points, hours, before = [], 0.0, 0
    for step, line in run.metrics.items():
      secs = line.get('train/secs_per_step')
      if not (
        _is_number(secs) and _is_number(line.get('train/tokens_per_sec'))
      ):
        continue
      hours, before = hours + secs * (step - before) / 3600, step
      points.append((hours, line['train/tokens_per_sec']))
    series.append(plots.Series(run.name, tuple(points), i))
  longest = max(
    (each.points[-1][0] for each in series if each.points), default=0
  )
  label = 'hours'
  if longest < 2:  # minutes
    label = 'minutes'
    series = [
      dataclasses.replace(
        each, points=tuple((x * 60, y) for x, y in each.points)
      )
      for each in series
    ]
  return Section(
    'Throughput',
    (),
    _figures(
      plots.Plot(
        'throughput',
        'Tokens per second over time',
        'The time is that of training steps alone, without compilation, evaluation '
        'and samples.',
        f'{label} of training',
        'tokens/s',
        tuple(series),
      )
    ),
  )


def samples_section(runs: Sequence[Run], num_samples: int) -> Section:
  """The last samples of each run."""
  parts = []
  for run in runs:
    for line in run.samples[
      len(run.samples) - min(num_samples, len(run.samples)) :
    ]:
      text = line.get('shown', line.get('text'))
      if not isinstance(text, str):
        continue
      sampler = line.get('sampler')
      name = sampler.get('name') if isinstance(sampler, dict) else None
      prompt = line.get('prompt')
      said = [
        f'step {line["step"]}' if 'step' in line else '',
        name or '',
        f'{line["num_calls"]} network calls' if 'num_calls' in line else '',
        f'prompt {prompt!r}' if prompt else '',
      ]
      parts.append(
        Sample(f'{run.name}: ' + ', '.join(filter(None, said)), text)
      )
  notes = (
    ()
    if parts or not num_samples
    else ('None yet: python launch.py --mode=sample --workdir=RUN.',)
  )
  return Section('Samples', notes, tuple(parts))


def make_sections(
  runs: Sequence[Run], comparisons: Sequence[Comparison], num_samples: int
) -> list[Section]:
  """The whole page."""
  return [
    runs_section(runs, comparisons),
    curves_section(runs),
    levels_section(runs),
    quality_section(runs, comparisons),
    speed_section(runs),
    samples_section(runs, num_samples),
  ]


# ------------------------------------------------------------------- writing

_CSS = (
  plots.CSS
  + """
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--page);
color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem;
border-bottom:1px solid var(--rule)}h3{font-size:1rem;margin:.5rem 0}
p,figcaption,.soft{color:var(--soft);margin:.4rem 0}
.figures{display:grid;gap:1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
figure{margin:0;min-width:0}
.scroll{overflow-x:auto}details .scroll{max-height:24rem}
.scroll:focus-visible{outline:2px solid var(--s0)}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{text-align:left;padding:.25rem .7rem .25rem 0;vertical-align:top;
border-bottom:1px solid var(--rule)}
.short{white-space:nowrap}
summary{cursor:pointer;color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--rule);
padding:.6rem;margin:.3rem 0 1rem;max-height:24rem;overflow-y:auto}
"""
)


def _html_table(table: Table) -> str:
  short = ' class="short"'  # not broken after the sign of an interval
  head = ''.join(
    f'<th scope="col">{escape(cell)}</th>' for cell in table.header
  )
  rows = ''.join(
    '<tr>'
    + f'<th scope="row">{escape(row[0])}</th>'
    + ''.join(
      f'<td{short if len(cell) <= 20 else ""}>{escape(cell)}</td>'
      for cell in row[1:]
    )
    + '</tr>\n'
    for row in table.rows
  )
  title = escape(table.title)
  # Reachable by keyboard, since it may be wider than the page.
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
    f'<table><caption>{title}</caption><thead><tr>{head}</tr></thead>\n'
    f'<tbody>{rows}</tbody></table></div>'
  )


def _html_figure(figure: Figure) -> str:
  plot = figure.plot
  return (
    f'<figure><h3>{escape(plot.title)}</h3>{plots.to_svg(plot)}'
    f'{plots.to_legend(plot)}<figcaption>{escape(plot.text)}</figcaption>'
    f'<details><summary>{escape(figure.table.title)}</summary>'
    f'{_html_table(figure.table)}</details></figure>'
  )


def to_html(sections: Sequence[Section], title: str) -> str:
  """The page as one HTML file that loads nothing."""
  parts = [
    f'<!DOCTYPE html>\n<!-- {MARK} -->\n<html lang="en">\n<head>\n'
    '<meta charset="utf-8">\n<meta name="viewport" '
    'content="width=device-width,initial-scale=1">\n'
    # Whatever a sample holds: no script, no request.
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    f'<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n'
    f'<main>\n<h1>{escape(title)}</h1>'
  ]
  for section in sections:
    parts.append(f'<section>\n<h2>{escape(section.title)}</h2>')
    parts += [f'<p>{escape(note)}</p>' for note in section.notes]
    is_open = False
    for part in section.parts:
      if isinstance(part, Figure) != is_open:
        parts.append('</div>' if is_open else '<div class="figures">')
        is_open = not is_open
      if isinstance(part, Figure):
        parts.append(_html_figure(part))
      elif isinstance(part, Table):
        parts.append(_html_table(part))
      else:
        parts.append(
          f'<h3>{escape(part.title)}</h3>\n<pre>\n{escape(part.text)}</pre>'
        )
    parts.append(('</div>\n' if is_open else '') + '</section>')
  return '\n'.join([*parts, '</main>\n</body>\n</html>\n'])


def _md_text(text: str) -> str:
  """Text that Markdown takes for nothing else; on one line."""
  text = html.escape(' '.join(printable(text).split()), quote=False)
  return re.sub(r'([\\`*_\[\]|~#])', r'\\\1', text)


def _md_table(table: Table) -> str:
  lines = [
    f'**{_md_text(table.title)}**\n',
    '| ' + ' | '.join(map(_md_text, table.header)) + ' |',
    '|' + '---|' * len(table.header),
  ]
  lines += ['| ' + ' | '.join(map(_md_text, row)) + ' |' for row in table.rows]
  return '\n'.join(lines) + '\n'


def _md_sample(sample: Sample) -> str:
  text = printable(sample.text)
  longest = max((len(run) for run in re.findall('`+', text)), default=0)
  fence = '`' * max(longest + 1, 3)
  return f'{_md_text(sample.title)}\n\n{fence}\n{text}\n{fence}\n'


def to_markdown(sections: Sequence[Section], title: str, stem: str) -> str:
  """The page as Markdown, its plots in the files of `png_name`."""
  parts = [f'<!-- {MARK} -->\n\n# {_md_text(title)}\n']
  for section in sections:
    parts.append(f'## {_md_text(section.title)}\n')
    parts += [_md_text(note) + '\n' for note in section.notes]
    for part in section.parts:
      if isinstance(part, Figure):
        alt = _md_text(f'{part.plot.title}. {plots.describe(part.plot)}')
        name = png_name(stem, part.plot).replace(' ', '%20')
        parts.append(
          f'### {_md_text(part.plot.title)}\n\n![{alt}]({name})\n\n'
          f'{_md_text(part.plot.text)}\n\n<details>\n<summary>'
          f'{_md_text(part.table.title)}</summary>\n\n'
          f'{_md_table(part.table)}\n</details>\n'
        )
      else:
        parts.append(
          _md_table(part) if isinstance(part, Table) else _md_sample(part)
        )
  return '\n'.join(parts)


def png_name(stem: str, plot: plots.Plot) -> str:
  """The file of a plot beside a Markdown page."""
  return f'{stem}-{plot.name}.png'


def _is_ours(path: pathlib.Path) -> bool:
  """Whether a file is a page that was written here."""
  try:
    with open(path, 'rb') as file:
      return f'<!-- {MARK}'.encode() in file.read(200)
  except OSError:
    return False


def check_output(path: pathlib.Path, may_overwrite: bool):
  """Raises InputError where the page cannot be written, or something is there."""
  if path.suffix not in ('.html', '.md'):
    raise InputError(f'--output={str(path)!r} must end in .html or .md')
  if path.suffix == '.md' and importlib.util.find_spec('matplotlib') is None:
    raise InputError(
      f'--output={str(path)!r} needs matplotlib: pip install -e '
      "'.[plots]'; or take an .html file, which needs nothing"
    )
  if path.suffix == '.md' and printable(path.stem) != path.stem:
    raise InputError(
      f'--output={str(path)!r}: a page cannot name its pictures so; '
      'give a name without control characters, in UTF-8'
    )
  if path.is_dir() or not path.resolve().parent.is_dir():
    raise InputError(
      f'--output={str(path)!r} must be a file in a folder that exists'
    )
  if path.exists() and not may_overwrite and not _is_ours(path):
    raise InputError(
      f'--output={str(path)!r} exists and is no earlier report; '
      'give another file, or --overwrite'
    )


def write_page(
  path: pathlib.Path,
  sections: Sequence[Section],
  title: str,
  may_overwrite: bool,
):
  """Writes the page, whole or not at all.

  Raises:
    InputError: a picture of a Markdown page would replace one that is not its.
  """
  if path.suffix == '.html':
    _replace(path, to_html(sections, title))
    return
  figures = [
    part
    for section in sections
    for part in section.parts
    if isinstance(part, Figure)
  ]
  before = path.read_text(errors='replace') if _is_ours(path) else ''
  names = [png_name(path.stem, figure.plot) for figure in figures]
  for name in names:
    if (
      path.with_name(name).exists()
      and not may_overwrite
      and f']({name.replace(" ", "%20")})' not in before
    ):
      raise InputError(
        f'--output={str(path)!r} needs a file '
        f'{str(path.with_name(name))!r}, which exists; give another '
        'file, or --overwrite'
      )
  for figure, name in zip(figures, names):
    plots.save_png(figure.plot, path.with_name(name))
  _replace(path, to_markdown(sections, title, path.stem))


def _replace(path: pathlib.Path, text: str):
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)
  except OSError as error:
    raise InputError(
      f'--output={str(path)!r} cannot be written: {error.strerror}'
    ) from error
  finally:
    with contextlib.suppress(OSError):  # it is in its place
      temporary.unlink()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m nanodlm.show.report',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'workdirs', nargs='*', metavar='RUN', help='workdirs of runs'
  )
  parser.add_argument(
    '--output',
    default='report.html',
    metavar='FILE',
    help='the page: an .html file, or an .md file',
  )
  parser.add_argument(
    '--compare',
    action='append',
    default=[],
    metavar='FILE',
    help='a comparison.json of nanodlm.evals.compare, or its folder; may be repeated. '
    'By default those beside the runs that are of one of them',
  )
  parser.add_argument(
    '--num_samples',
    type=int,
    default=3,
    metavar='N',
    help='the last samples of each run',
  )
  parser.add_argument(
    '--overwrite',
    action='store_true',
    help='replace the file whoever wrote it; '
    'an earlier report is replaced without it',
  )
  return parser.parse_args(argv)


_NO_RUN = f'holds no run (no {CONFIG_FILE} or {METRICS_FILE} in it)'


def _main(args: argparse.Namespace):
  output = pathlib.Path(args.output)
  if args.num_samples < 0:
    raise InputError(f'--num_samples={args.num_samples!r} must be >= 0')
  check_output(output, args.overwrite)
  workdirs, others = [], []
  comparisons = [pathlib.Path(path) for path in args.compare]
  for path in dict.fromkeys(str(pathlib.Path(path)) for path in args.workdirs):
    folder = pathlib.Path(path)
    if is_run(folder):
      workdirs.append(path)
    elif (folder / COMPARISON_FILE).is_file():
      comparisons.append(folder)
    elif folder.is_dir():
      # Of RUNS/* perhaps a run that is about to begin.
      others.append(path)
    elif not (
      folder.is_file() and (folder.suffix == '.png' or _is_ours(folder))
    ):
      # Of RUNS/* an earlier report is neither.
      raise InputError(f'{path!r} {_NO_RUN}')
  if others and not workdirs:
    raise InputError(f'{others[0]!r} {_NO_RUN}')
  if not workdirs:
    raise InputError('name at least one workdir of a run')
  runs = [
    read_run(path, name) for path, name in zip(workdirs, short_names(workdirs))
  ]
  sections = make_sections(
    runs, find_comparisons(runs, comparisons), args.num_samples
  )
  names = ', '.join(run.name for run in runs)
  write_page(output, sections, f'nanodlm: {names}', args.overwrite)
  for path in others:
    print(f'{path} {_NO_RUN}: left out', file=sys.stderr)
  for run in runs:
    for problem in run.problems:
      print(f'{run.path}: {problem}', file=sys.stderr)
  print(
    f'{printable(str(output))}: {len(runs)} run{"s" if len(runs) > 1 else ""}'
  )


def main(argv: Sequence[str]) -> int:
  """Writes the report; a mistake in the arguments is one line and status 2."""
  try:
    _main(_parse(argv))
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
