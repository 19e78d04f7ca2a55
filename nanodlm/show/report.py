"""One page about runs, finished or in progress: curves, quality, speed, texts.

    python launch.py --mode=report --workdirs=runs/a,runs/b

It is one self-contained file with SVG plots. Only the files in the workdirs are
read, and the comparison.json files of --mode=compare.
"""

from collections.abc import Iterator, Sequence
import json
import pathlib
import statistics
import sys
from typing import Any, NamedTuple

from absl import flags
import jinja2

from nanodlm import evaluate
from nanodlm import workdir as workdir_files
from nanodlm.show import pages
from nanodlm.show import runs as reading
from nanodlm.show.pages import printable
from nanodlm.show.plots import Plot, to_svg
from nanodlm.show.runs import half_interval, Line, Run
from nanodlm.training.metrics import is_number
from nanodlm.types import InputError

# In the first lines of every page; a file with it may be replaced.
MARK = '<!-- Written by nanodlm.show.report -->'
MISSING = '–'
NUM_LEVELS = 10
# Rows of the table below a plot for each of its curves, evenly chosen.
MAX_TABLE_ROWS = 20
# The speed of a run is the median of this many last lines of metrics.jsonl.
SPEED_LINES = 5
# Keys of config.sampler that set the number of calls, or which samples are
# drawn. A curve joins measurements that differ in them.
NOT_CONDITIONS = (
  'num_steps',
  'threshold',
  'entropy_budget',
  'edit_threshold',
  'num_samples',
  'length',
  'seed',
)
NO_QUALITY = (
  'Nothing measured yet: python launch.py --mode=compare --workdirs=RUN,RUN '
  '--output=FOLDER --judge=AR_RUN, or python launch.py --mode=eval '
  '--workdir=RUN --infill=0.1,0.5.'
)
NO_SAMPLES = 'No samples: python launch.py --mode=sample --workdir=RUN.'


class Table(NamedTuple):
  """Rows {column: text}, all with the same columns."""

  title: str
  rows: Sequence[dict[str, str]]


class Sample(NamedTuple):
  """A generated text; the title says where it comes from."""

  title: str
  text: str


# A string is a paragraph.
Part = str | Table | Plot | Sample


def _show(value: Any, spec: str, missing: str = MISSING) -> str:
  return format(value, spec) if is_number(value) else missing


def _interval(line: Line, key: str) -> str:
  """Returns '1.2345 ± 0.0123', or '1.2345' without an interval."""
  width = half_interval(line, key)
  return _show(line.get(key), '.4f') + (f' ± {width:.4f}' if width else '')


def _facts(line: Line, **keys: str) -> dict[str, str]:
  """Returns {column: text} of {column: key}."""
  return {name: str(line.get(key, MISSING)) for name, key in keys.items()}


def _conditions(line: Line) -> dict[str, Any]:
  """Returns what a measurement of infilling depends on, but for its calls."""
  settings = line.get('sampler')
  settings = dict(settings) if isinstance(settings, dict) else {}
  for key in NOT_CONDITIONS:
    settings.pop(key, None)
  facts = {'sampler': settings.pop('name', MISSING), **settings}
  facts |= _facts(line, step='step', source='source')
  facts['source'] += evaluate.shown_changes(line)
  return facts


def _summary(run: Run) -> dict[str, str]:
  line = run.last_line('eval/nll', 'eval_subset/nll')
  split = 'eval' if 'eval/nll' in line else 'eval_subset'
  bound = _interval(line, f'{split}/nll')
  if line:
    rows = _show(line.get(f'{split}/num_examples'), '.0f', '?')
    kind = 'a subset of ' if split == 'eval_subset' else ''
    bound += f' (step {line["step"]}, {kind}{rows} rows)'
  speeds = [y for _, y, _ in run.curve('train/tokens_per_sec')[-SPEED_LINES:]]
  skipped = run.last_line('train/skipped_steps')
  num_steps = _show(run.config.get('train.num_steps'), ',', '?')
  return {
    'run': run.name,
    **_facts(run.config, objective='objective.name'),
    'parameters': _show(run.num_params, ',')
    + (f' ({run.num_trained:,} trained)' if run.num_trained else ''),
    'step': f'{run.last_step:,} / {num_steps}',
    'state': run.state,
    'held-out nats/token': bound,
    'bits/byte': _interval(line, f'{split}/bits_per_byte'),
    'tokens/s': f'{statistics.median(speeds):,.0f}' if speeds else MISSING,
    'skipped steps': _show(skipped.get('train/skipped_steps'), '.0f'),
  }


def describe_runs(runs: Sequence[Run]) -> Iterator[Part]:
  """The state of each run, and the settings that differ."""
  configs = [run.config for run in runs if run.config]
  rows = []
  for key in sorted({key for config in configs for key in config}):
    show = lambda c: json.dumps(c[key]) if key in c else MISSING
    if len({show(config) for config in configs}) > 1:
      rows.append(
        {'setting': key} | {run.name: show(run.config) for run in runs}
      )
  yield (
    'Held-out: the bound (exact for ar) with the averaged weights and its '
    f'95% interval; tokens/s: the median of the last {SPEED_LINES} lines; '
    'skipped steps: since the last start.'
  )
  is_same = len({run.tokenizer for run in runs}) == 1 and runs[0].tokenizer
  for prefix in ('tokenizer', 'data.source'):
    if prefix == 'tokenizer' and is_same:
      continue
    if any(row['setting'].startswith(prefix) for row in rows):
      yield f'The runs differ in {prefix}: do not compare their nats per token.'
  for run in runs:
    yield from (f'{run.name}: {problem}.' for problem in run.problems)
  yield Table('Progress', [_summary(run) for run in runs])
  if rows:
    yield Table('Settings that differ', rows)
  elif len(configs) == len(runs) > 1:
    yield 'All settings are the same.'


def draw_losses(runs: Sequence[Run]) -> Iterator[Part]:
  """Training and held-out losses, by steps and by tokens."""
  yield (
    'The training loss is the mean since the previous line of what is '
    'minimised. The 95% interval of the held-out bound includes the variation '
    'of the text: differences of runs on the same text are more certain than '
    'that. Evaluations during training use a subset of the rows.'
  )
  for unit in ('steps', 'tokens'):
    training, whole, subset = {}, {}, {}
    for run in runs:
      scale = 1 if unit == 'steps' else run.tokens_per_step
      training[run.name] = run.curve('train/loss', scale)
      whole[run.name] = run.curve('eval/nll', scale)
      subset[f'{run.name}, subset'] = run.curve('eval_subset/nll', scale)
    yield Plot(f'Training loss by {unit}', unit, 'nats/token', training)
    yield Plot(f'Held-out bound by {unit}', unit, 'nats/token', whole | subset)


def draw_law(runs: Sequence[Run]) -> Iterator[Part]:
  """How far models and samples are from the law of the text, if it is known."""
  keys = 'eval/excess_nats', 'eval_subset/excess_nats', 'samples/valid_share'
  if not any(run.last_line(*keys) for run in runs):
    return
  yield (
    'The law of the text is known. Excess: the bound of held-out documents '
    'less their exact -log p, with the 95% interval of the differences; 0 is a '
    'perfect model. Possible: the share of the samples that the law allows.'
  )
  whole, subset, possible = keys
  excess = {run.name: run.curve(whole) for run in runs}
  excess |= {f'{run.name}, subset': run.curve(subset) for run in runs}
  yield Plot('Excess over the law by steps', 'steps', 'nats/document', excess)
  shares = {run.name: run.curve(possible) for run in runs}
  yield Plot('Possible samples by steps', 'steps', 'share of samples', shares)


def draw_levels(runs: Sequence[Run]) -> Iterator[Part]:
  """Cross entropy of a scored token by noise level."""
  yield (
    'Cross entropy of one scored token in the last line, unweighted, in ten '
    'bins of the noise level (for masked noise, the share of masked tokens): '
    'on the left nearly all of the text is known, on the right nearly nothing.'
  )
  for title, *splits in (
    ('Held-out text', 'eval_subset', 'eval'),
    ('Training text', 'train'),
  ):
    bins = [
      (f'{split}_by_level/cross_entropy_{i}', (i + 0.5) / NUM_LEVELS)
      for split in splits
      for i in range(NUM_LEVELS)
    ]
    curves = {}
    for run in runs:
      line = run.last_line(*dict(bins))
      # A line may have both splits; the last one is drawn.
      values = {x: line[key] for key, x in bins if key in line}
      points = [(x, values[x], 0.0) for x in sorted(values)]
      curves[f'{run.name}, step {line.get("step")}'] = points
    yield Plot(title, 'noise level', 'nats/token', curves)


def draw_comparison(comparison: Line) -> Iterator[Part]:
  """Quality against network calls for each run's samplers, and the bounds."""
  yield from comparison['remarks']
  runs = comparison['runs']
  names = reading.short_names([run['workdir'] for run in runs])
  for key, label in comparison['panels'].items():
    title = label[:1].upper() + label[1:]
    curves, real = {}, {}
    for run, name in zip(runs, names):
      for point in run['points']:
        calls, y = point['num_calls'], point.get(key)
        if calls and is_number(y):
          points = curves.setdefault(f'{name}, {point["sampler"]["name"]}', [])
          points.append((calls, y, half_interval(point, key)))
        elif is_number(y):
          what = 'held-out text' if run.get('is_held_out', True) else 'the text'
          real[f'{name}, {what}'] = y
    ticks = sorted(x for points in curves.values() for x, *_ in points)
    # A text that was not sampled takes no calls: it is a line across the plot.
    ends = ticks[:1] + ticks[-1:]
    curves = {name: sorted(points) for name, points in curves.items()}
    curves |= {k: [(x, y, 0.0) for x in ends] for k, y in real.items()}
    yield Plot(title, 'network calls', label, curves, x_log=True)
  rows = []
  for run, name in zip(runs, names):
    sign = '' if run.get('is_exact') else '≤ '
    bounds = {
      'nats/token': sign + _interval(run, 'nll'),
      'bits/byte': sign + _interval(run, 'bits_per_byte'),
      'parameters': _show(run.get('num_params'), ','),
    }
    facts = _facts(run, objective='objective', step='step', text='source')
    facts['trained on'] = evaluate.shown_share(run)
    rows.append({'run': name} | facts | bounds)
  yield Table(f'Bounds in {comparison["path"]}', rows)


def draw_evals(runs: Sequence[Run]) -> Iterator[Part]:
  """Accuracy of filled gaps against network calls, and all evaluations."""
  curves, rows = {}, []
  has_law = any('eval/law_nats' in line for run in runs for line in run.evals)
  for run in runs:
    measured = [_conditions(x) for x in run.evals if x.get('infill')]
    for line in run.evals:
      if is_number(line.get('eval/nll')):
        row = {'run': run.name} | _facts(line, step='step', text='source')
        row['text'] += evaluate.shown_changes(line)
        row['trained on'] = evaluate.shown_share(line)
        row['nats/token'] = _interval(line, 'eval/nll')
        row['bits/byte'] = _interval(line, 'eval/bits_per_byte')
        ratio = _show(line.get('eval/calls_ratio'), '.1f')
        row['calls at independent times'] = ratio
        if has_law:
          row['law, nats/document'] = _show(line.get('eval/law_nats'), '.2f')
          row['above the law'] = _interval(line, 'eval/excess_nats')
        rows.append(row)
      # What the measurements of this run do not have in common.
      differing = ''.join(
        f', {key} {value}'
        for key, value in _conditions(line).items()
        if any(other.get(key) != value for other in measured)
      )
      gaps = line.get('infill')
      for gap in gaps if isinstance(gaps, list) else ():
        gap = gap if isinstance(gap, dict) else {}
        calls, y, ratio = map(gap.get, ('num_calls', 'accuracy', 'ratio'))
        if calls and is_number(calls) and is_number(y) and is_number(ratio):
          name = f'{run.name}, {ratio:.0%} masked, {gap.get("pattern")}'
          unit = gap.get('unit', 'token')
          name += f' {unit}s' * (unit != 'token')
          name += differing
          if not line.get('is_held_out', True):
            name += f' ({evaluate.shown_share(line)} trained on)'
          # A later measurement with the same number of calls replaces it.
          curve = curves.setdefault(name, {})
          curve[calls] = (calls, y, half_interval(gap, 'accuracy'))
          if is_number(best := gap.get('bayes_accuracy')):
            curve = curves.setdefault(f'{name}, at most', {})
            curve[calls] = (calls, best, half_interval(gap, 'bayes_accuracy'))
  if curves:
    yield (
      'Filled gaps: the share of masked tokens of the text restored exactly '
      '(--mode=eval --infill), with its 95% interval. Of a text whose law is '
      'known, words are masked, and "at most" is the best possible accuracy.'
    )
    sets = {name: sorted(curve.values()) for name, curve in curves.items()}
    title = 'Accuracy of filled gaps'
    yield Plot(title, 'network calls', 'accuracy', sets, x_log=True)
  if rows:
    yield Table('Evaluations (eval.jsonl)', rows)


def draw_speed(runs: Sequence[Run]) -> Iterator[Part]:
  """Tokens per second over the time of training."""
  yield (
    'The time of the training steps alone, without compilation, evaluation '
    'and sampling.'
  )
  curves = {}
  for run in runs:
    curves[run.name], secs, previous = [], 0.0, 0
    speeds = {step: y for step, y, _ in run.curve('train/tokens_per_sec')}
    for step, secs_per_step, _ in run.curve('train/secs_per_step'):
      secs += secs_per_step * (step - previous)
      previous = step
      if step in speeds:
        curves[run.name].append((secs / 60, speeds[step], 0.0))
  yield Plot('Throughput', 'minutes', 'tokens/s', curves)


def show_samples(runs: Sequence[Run], num_samples: int) -> Iterator[Part]:
  """The last samples of each run."""
  for run in runs:
    # A run that resumes from an earlier step repeats its samples.
    lines = [*{json.dumps(line): line for line in run.samples}.values()]
    for line in lines[max(len(lines) - num_samples, 0) :]:
      text, sampler = line.get('shown', line.get('text')), line.get('sampler')
      title = f'{run.name}, step {line.get("step", "?")}'
      if isinstance(sampler, dict):
        title += (
          f', {sampler.get("name")}, {line.get("num_calls")} network calls'
        )
      if line.get('prompt'):
        title += f', prompt {line["prompt"]!r}'
      if isinstance(text, str):
        yield Sample(title, text)


def tabulate(plot: Plot) -> Table:
  """Returns the points of a plot, at most MAX_TABLE_ROWS of each curve."""
  rows = []
  for name, points in plot.curves.items():
    stride = max(-(-len(points) // MAX_TABLE_ROWS), 1)
    # The last point is always shown.
    for x, y, width in points[::-1][::stride][::-1]:
      x = f'{x:,}' if isinstance(x, int) else f'{x:.4g}'
      y = f'{y:.5g}' + (f' ± {width:.4g}' if width else '')
      rows.append({'curve': name, plot.x_label: x, plot.y_label: y})
  total = sum(map(len, plot.curves.values()))
  return Table(f'Numbers ({len(rows)} of {total})', rows)


def define_flags():
  """Defines the flags of --mode=report."""
  flags.DEFINE_list(
    'workdirs', [], 'Workdirs of the runs, such as runs/a,runs/b.'
  )
  flags.DEFINE_string('output', 'report.html', 'The page, an .html file.')
  flags.DEFINE_list(
    'compare',
    [],
    'Files comparison.json of --mode=compare, or their folders; by default '
    'those in folders next to the runs.',
  )
  flags.DEFINE_integer(
    'num_samples',
    3,
    'Number of samples of each run to show, from the last.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'overwrite',
    False,
    'Whether to replace the file even if it is not an earlier report.',
  )


_NO_RUN = (
  'is not the workdir of a run: it has neither '
  f'{workdir_files.CONFIG} nor {workdir_files.METRICS}'
)


def main(start: Any) -> int:
  """Runs --mode=report, which writes the page of the runs that flags name."""
  del start
  args = flags.FLAGS
  output = pathlib.Path(args.output)
  if output.suffix != '.html':
    raise InputError(f'--output={args.output!r} must end in .html')
  pages.check_path('--output', output, '' if args.overwrite else MARK)
  workdirs, others = [], []
  compared = list(map(pathlib.Path, args.compare))
  # RUNS/* also matches comparisons, runs about to begin and earlier reports.
  for path in dict.fromkeys(map(pathlib.Path, args.workdirs)):
    if reading.is_run(path):
      workdirs.append(path)
    elif (path / reading.COMPARISON_FILE).is_file():
      compared.append(path)
    elif path.is_dir():
      others.append(path)
    elif not pages.has_mark(path, MARK):
      raise InputError(f'{str(path)!r} {_NO_RUN}')
  for path in others:
    print(f'skipped: {str(path)!r} {_NO_RUN}', file=sys.stderr)
  if not workdirs:
    raise InputError('--workdirs must name at least one run')
  runs = list(map(reading.read_run, workdirs, reading.short_names(workdirs)))
  comparisons = list(map(reading.read_comparison, compared))
  quality = []
  for comparison in comparisons or reading.find_comparisons(workdirs):
    quality += draw_comparison(comparison)
  quality += draw_evals(runs)
  samples = list(show_samples(runs, args.num_samples))
  sections = {
    'Runs': list(describe_runs(runs)),
    'Loss': list(draw_losses(runs)),
    'Loss by noise level': list(draw_levels(runs)),
    'The law of the text': list(draw_law(runs)),
    'Quality against network calls': quality or [NO_QUALITY],
    'Throughput': list(draw_speed(runs)),
    'Samples': samples or [NO_SAMPLES],
  }
  title = f'nanodlm: {", ".join(run.name for run in runs)}'
  # Text of a run may hold characters that a page cannot.
  page = printable(
    jinja2.Template(pages.read('report.html'), autoescape=True).render(
      title=title, sections=sections, tabulate=tabulate, to_svg=to_svg
    )
  )
  pages.write('--output', output, page)
  for run, workdir in zip(runs, workdirs):
    for problem in run.problems:
      print(f'{workdir}: {problem}', file=sys.stderr)
  plural = 's' if len(runs) > 1 else ''
  print(f'{printable(str(output))}: {len(runs)} run{plural}')
  return 0
