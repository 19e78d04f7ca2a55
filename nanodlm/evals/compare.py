r"""--mode=compare: bounds of runs, and sample quality against network calls.

    python launch.py --mode=compare --workdirs=RUN1,RUN2 --output=cmp \
        --judge=AR_RUN --num_steps=16,64,256 --samplers=fixed_count,ancestral

--judge=law compares the samples to the law of the text, if that is known, as of
data.source='stories'. --mauve adds MAUVE (Pillutla et al., arXiv 2102.01454),
which compares features of samples and of held-out text; faiss warns that its
clusters, a tenth of the samples, are many, as they are in the paper. Writes
comparison.json, comparison.txt and, if there are samples, curves.png into a new
folder. Apart from times, the same command gives the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import pathlib
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, prompts
from nanodlm import lm as lms
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.config import Settings, Start
from nanodlm.evals import judge as judges
from nanodlm.lm import LanguageModel
from nanodlm.run import Run
from nanodlm.samplers import SAMPLERS
from nanodlm.training import metrics
from nanodlm.types import check_seed, InputError

AUTO = 'auto'
ALL = 'all'
# The markers of samplers in a plot.
MARKERS = 'osvD^P*X<>'
DRAW_FLAGS = ('temperature', 'top_k', 'top_p')
# Flags that only matter if texts are sampled.
SAMPLE_FLAGS = (
  *('num_steps', 'num_samples', 'length', 'seed', *DRAW_FLAGS, 'mauve'),
)
# With fewer samples, whose clusters are fewer, MAUVE is far too high.
MIN_MAUVE_SAMPLES = 500


def define_flags():
  """Defines the flags of --mode=compare."""
  flags.DEFINE_list('workdirs', [], 'Folders of the runs to compare.')
  flags.DEFINE_string(
    'source',
    '',
    'Held-out text for all runs, in the form of data.source; by default the '
    'text of each run.',
  )
  define_measurements()


def define_measurements():
  """Defines the flags that say what to measure, and where to write it."""
  flags.DEFINE_string(
    'output',
    None,
    'A folder for the results: new or empty, except to resume a study.',
  )
  flags.DEFINE_integer(
    'max_examples', 0, 'Held-out rows per run; 0 for all.', lower_bound=0
  )
  flags.DEFINE_string(
    'judge',
    '',
    "What measures samples: 'law', the known law of the text; or a model for "
    'generative perplexity, the workdir of an autoregressive run or '
    "'hf:NAME_OR_PATH'.",
  )
  flags.DEFINE_list(
    'samplers',
    None,
    "Samplers; each run uses those that fit it, for 'auto' its own, and for "
    "'all' every one that fits. By default 'auto' with --judge, otherwise "
    'none.',
  )
  flags.DEFINE_list(
    'num_steps', ['16', '64', '256'], 'Network calls to try for each sampler.'
  )
  flags.DEFINE_integer(
    'num_samples', 32, 'Texts per sampler and number of calls.', lower_bound=2
  )
  flags.DEFINE_integer(
    'length', 0, 'Tokens per text; 0 for data.length of the run.', lower_bound=0
  )
  flags.DEFINE_float('temperature', 1.0, 'Overrides sampler.temperature.')
  flags.DEFINE_integer('top_k', 0, 'Overrides sampler.top_k.')
  flags.DEFINE_float('top_p', 1.0, 'Overrides sampler.top_p.')
  flags.DEFINE_integer('seed', 0, 'Seed of the samples.')
  flags.DEFINE_bool(
    'mauve',
    False,
    'Whether to measure MAUVE too, by the package mauve-text, on features of '
    '--judge, which must be a model.',
  )
  flags.DEFINE_bool('plot', True, 'Whether to draw the curves.')


class Request(NamedTuple):
  """The samples asked of every run, as `define_measurements` explains.

  `draw` holds the values of DRAW_FLAGS.
  """

  samplers: tuple[str, ...]
  num_steps: tuple[int, ...]
  num_samples: int
  length: int
  draw: dict[str, float]
  seed: int


def plan_points(
  run: Run, request: Request, length: int
) -> list[dict[str, Any]]:
  """Plans the points of a run's curves, as changes to config.sampler.

  A sampler without num_steps gives one point. A sampler of blocks divides the
  steps among the blocks of the `length` tokens. Samplers that do not fit the
  objective are left out.
  """
  objective, points = run.objective, []
  # The run's own sampler may have another rule than a number of steps.
  rules = {**request.draw, 'threshold': 0.0, 'entropy_budget': 0.0}
  rules['stop_at_eos'] = False  # Whole canvases are compared.
  groups = {AUTO: [run.sampler_name], ALL: runs.fitting_samplers(objective)}
  names = [
    name for group in request.samplers for name in groups.get(group, [group])
  ]
  for name in dict.fromkeys(names):
    if not SAMPLERS[name].fits(objective):
      continue
    changes = {'name': name, **rules, 'num_steps': request.num_steps[0]}
    try:
      sampler = run.with_sampler(changes).sampler
    except InputError:
      if ALL in request.samplers:  # It needs another network.
        continue
      raise
    if not runs.reads_steps(sampler):
      points.append({'name': name, **rules})
      continue
    num_blocks = sampler.num_blocks(length)
    shares = [max(x // num_blocks, 1) for x in request.num_steps]
    points += [{**changes, 'num_steps': x} for x in dict.fromkeys(shares)]
  return points


def sample_point(
  lm: LanguageModel,
  judge: judges.Judge,
  request: Request,
  reference: np.ndarray | None = None,
) -> dict[str, Any]:
  """Samples texts and measures their quality.

  The speed is by wall clock, without compilation; see also
  `judge.measure_quality`.
  """
  length = request.length or lm.run.settings.data.length
  fill = lms.make_fill(lm.run)
  tokens, fixed = (
    np.tile(x, (request.num_samples, 1))
    for x in lms.lay_out(lm.run, '', length)
  )
  keys = jax.random.split(jax.random.key(request.seed))
  fill(lm.params, keys[0], np.zeros_like(tokens), ~fixed)  # Compiles.
  start = time.perf_counter()
  tokens, num_calls = fill(lm.params, keys[1], tokens, fixed)
  secs = time.perf_counter() - start
  tokens, own = lms.without_room(lm.run, tokens, fixed)
  settings = lm.run.describe_sampler()
  for key in configs.SAMPLE_KEYS:
    del settings[key]
  return {
    'sampler': settings,
    'num_calls': num_calls,
    'tokens_per_call': lms.tokens_per_call(own, num_calls),
    'num_samples': request.num_samples,
    'length': length,
    'tokens_per_sec': np.sum(~own) / secs,
    **judges.measure_quality(
      judge,
      _cut_ends(lm.run, tokens),
      lm.tokenizer,
      lm.run.settings.data.source,
      reference,
    ),
  }


def _cut_ends(run: Run, tokens: np.ndarray) -> list[np.ndarray]:
  """Returns the texts of rows [N, L], each to its end if the run has ends.

  Samples are whole canvases, see `plan_points`, and so is what they are
  compared to.
  """
  data, eos_ids = run.settings.data, run.tokenizer.eos_ids
  if not data.has_documents:
    return [*tokens]
  if data.is_chat:  # Its messages end too.
    last = [np.flatnonzero(~np.isin(row, eos_ids)) for row in tokens]
    return [row[: max(x, default=-1) + 2] for row, x in zip(tokens, last)]
  return [row[: prompts.find_end(row, eos_ids) + 1] for row in tokens]


class Subject:
  """A run to be measured, which is loaded when it is first needed.

  Args:
    workdir: its folder.
    settings: its settings, perhaps with another text.
    step: the step of the checkpoint; 0 is the last one.
  """

  def __init__(self, workdir: str, settings: Settings, step: int = 0):
    self.workdir, self.settings, self._step = workdir, settings, step

  @functools.cached_property
  def lm(self) -> LanguageModel:
    """The trained model."""
    return lms.load(self.workdir, step=self._step, settings=self.settings)

  @functools.cached_property
  def text(self) -> evaluate.Text:
    """The text that it is evaluated on."""
    return evaluate.open_text(self.lm)

  @functools.cached_property
  def run(self) -> Run:
    """The run without its vocabulary and parameters."""
    return runs.make_run(self.settings, refit=True)


# Takes a description, {key: value}, and what computes the result that it
# describes, as a JSON value; may return the result of an earlier start instead.
Recall = Callable[[dict[str, Any], Callable[[], Any]], Any]


def compare_run(
  subject: Subject,
  request: Request,
  judge: judges.Judge,
  max_examples: int,
  recall: Recall = lambda description, compute: compute(),
) -> dict[str, Any]:
  """Measures a run: its bound, and a point for each sampler setting.

  With samples, the first point is the text, whose values are those of perfect
  samples if neither the run nor the judge was trained on it.
  """
  has_mauve = judge.mauve_seed is not None

  @functools.cache
  def read_rows() -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of held-out text, and others that MAUVE compares to."""
    num = request.num_samples * (1 + has_mauve)
    lm, packed = subject.lm, subject.text.packed
    rows = evaluate.validation_rows(lm.run, packed, num).tokens
    if not has_mauve:
      return rows, rows[:0]
    if len(rows) < num:
      raise InputError(
        f'--num_samples={request.num_samples!r} is too large for --mauve: it '
        f'needs {num} rows of held-out text, of which {subject.workdir!r} has '
        f'{len(rows)}'
      )
    # Texts of different kinds may alternate.
    rows = np.random.default_rng(0).permutation(rows)
    return rows[::2], rows[1::2]

  @functools.cache
  def reference() -> np.ndarray | None:
    if not has_mauve:
      return None
    lm, (_, others) = subject.lm, read_rows()
    texts = _cut_ends(lm.run, others[:, :length])
    return judge.features(texts, lm.tokenizer)

  length = request.length or subject.settings.data.length
  planned = plan_points(subject.run, request, length)
  if has_mauve and planned:
    read_rows()  # Raises what is wrong before anything takes long.
  bound = functools.partial(measure_bound, subject, max_examples)
  result = {
    'workdir': subject.workdir,
    **recall({'what': 'bound', 'max_examples': max_examples}, bound),
    'points': [],
  }
  if not planned:
    return result
  what = {
    'what': 'samples',
    'judge': judge.name or None,
    'num_samples': request.num_samples,
    'length': length,
  }
  if has_mauve:
    what['mauve_seed'] = judge.mauve_seed

  def measure_text():
    rows, _ = read_rows()
    return _measure_text(subject, judge, rows, length, reference())

  points = [recall({**what, 'sampler': None}, measure_text)]

  def sample(changes):
    lm = subject.lm.with_sampler(changes)
    point = sample_point(lm, judge, request, reference())
    print(
      f'{subject.workdir}: {changes["name"]}, {point["num_calls"]:.0f} network '
      f'calls, setting {len(points)} of {len(planned)}',
      file=sys.stderr,
    )
    return point

  for changes in planned:
    one = {**what, 'sampler': changes, 'seed': request.seed}
    points.append(recall(one, functools.partial(sample, changes)))
  return {**result, 'points': points}


def measure_bound(subject: Subject, max_examples: int) -> dict[str, Any]:
  """Bounds `max_examples` held-out rows, 0 for all, and describes the run."""
  lm, text = subject.lm, subject.text
  make = evaluate.make_evaluate(lm.run, text.packed, text.source)
  means = make(lm.params, max_examples) or {}
  return {
    'step': lm.step,
    'objective': lm.run.settings.objective['name'],
    'is_exact': lm.run.objective.exact,
    'num_params': lm.run.num_params(),
    'tokenizer': lm.tokenizer.name,
    'vocab_size': lm.tokenizer.vocab_size,
    'source': text.source,
    'is_held_out': text.is_held_out,
    'trained_share': text.trained_share,
    **{key.partition('/')[2]: value for key, value in means.items()},
  }


def _measure_text(
  subject: Subject,
  judge: judges.Judge,
  rows: np.ndarray,
  length: int,
  reference: np.ndarray | None,
) -> dict[str, Any]:
  lm, text = subject.lm, subject.text
  return {
    'sampler': {'name': 'held-out text' if text.is_held_out else 'the text'},
    'num_calls': None,
    'tokens_per_call': None,
    'num_samples': len(rows),
    'length': min(length, text.packed.length),
    'tokens_per_sec': None,
    'judge_trained_share': judge.trained_share(rows, lm.tokenizer),
    **judges.measure_quality(
      judge,
      _cut_ends(lm.run, rows[:, :length]),
      lm.tokenizer,
      text.source,
      reference,
    ),
  }


# Title, key and format of the columns of runs and of points. A column is shown
# if a run has it.
RUN_COLUMNS = (
  ('run', 'workdir', ''),
  ('objective', 'objective', ''),
  ('step', 'step', ''),
  ('params', 'num_params', ','),
  ('', 'relation', ''),
  ('nats/token', 'nll', '.4f'),
  ('ppl', 'ppl', '.2f'),
  ('bits/byte', 'bits_per_byte', '.4f'),
  ('trained on', 'shown_share', ''),
  ('nats/document', 'nats_per_document', '.2f'),
  ('above the law', 'excess_nats', '.2f'),
)
_POINT_COLUMNS = (
  ('samples of', 'workdir', ''),
  ('sampler', 'name', ''),
  ('calls', 'num_calls', '.0f'),
  ('tokens/call', 'tokens_per_call', '.2f'),
  ('tokens/s', 'tokens_per_sec', ',.0f'),
)
TEXT_COLUMNS = (
  ('entropy, all', 'unigram_entropy', '.3f'),
  ('entropy, each', 'sample_entropy', '.3f'),
  ('dist-1', 'distinct_1', '.4f'),
  ('dist-2', 'distinct_2', '.4f'),
  ('dist-3', 'distinct_3', '.4f'),
)


def format_table(
  results: Sequence[dict[str, Any]],
  judge: judges.Judge,
  run_columns: Sequence[tuple[str, str, str]] = RUN_COLUMNS,
  text_columns: Sequence[tuple[str, str, str]] = TEXT_COLUMNS,
) -> str:
  """Formats the results as tables with remarks."""
  rows = [
    {
      **run,
      'relation': '=' if run['is_exact'] else '<=',
      'shown_share': evaluate.shown_share(run),
    }
    for run in results
  ]
  columns = [c for c in run_columns if any(c[1] in row for row in rows)]
  lines = metrics.format_table(columns, rows)
  points = [
    {**point, 'workdir': run['workdir'], 'name': point['sampler']['name']}
    for run in results
    for point in run['points']
  ]
  if not points:
    return '\n'.join(lines)
  last, own, other = points[-1], _lengths(points, True), _lengths(points, False)
  remark = (
    f'The rows of the text have {other} tokens; longer texts have a higher '
    'entropy and fewer distinct words.'
  )
  draw = ', '.join(f'{key} {last["sampler"][key]:g}' for key in DRAW_FLAGS)
  lines += [
    '',
    *metrics.format_table(
      (*_POINT_COLUMNS, *judge.columns, *text_columns), points
    ),
    '',
    f'{last["num_samples"]} samples of {own} tokens per '
    f'line, {draw}. entropy: nats/token, of all samples and of single texts.',
    *[remark] * (own != other),
    *judge.remarks(points),
  ]
  return '\n'.join(lines)


def _lengths(points: Sequence[Mapping[str, Any]], are_samples: bool) -> str:
  """Returns the lengths of the samples, or of the rows of text, as '16, 32'."""
  found = {
    point['length']
    for point in points
    if (point['num_calls'] is not None) == are_samples
  }
  return ', '.join(map(str, sorted(found)))


def make_panels(judge: judges.Judge) -> dict[str, str]:
  """Returns what is plotted of the points, {key: label}."""
  own = {'sample_entropy': 'entropy of a sample, nats/token'}
  return {**judge.panels, **own}


def draw_curve(
  axes: Any,
  points: Sequence[Mapping[str, Any]],
  x_key: str,
  key: str,
  style: Mapping[str, Any],
):
  """Draws points with intervals; see `metrics.format_table`.

  A point whose x is None is a horizontal line.
  """
  points = [point for point in points if point.get(key) is not None]
  if not points:
    return
  x, y = ([point[name] for point in points] for name in (x_key, key))
  if x[0] is None:
    axes.axhline(y[0], **style)
    return
  lows, highs = [], []
  for point in points:
    width = point.get(f'{key}_ci95') or 0.0
    lows.append(point[key] - point.get(f'{key}_low', point[key] - width))
    highs.append(point.get(f'{key}_high', point[key] + width) - point[key])
  axes.errorbar(x, y, yerr=(lows, highs), capsize=3, **style)


def plot_curves(
  results: Sequence[dict[str, Any]],
  labels: Mapping[str, str],
  path: pathlib.Path,
  draw_first: Callable[[Any, Mapping[str, Any]], None] | None = None,
):
  """Draws `labels`, {key: label}, against network calls, three in a row.

  A run has a color, ten dark ones before ten light ones, and a sampler a marker
  and dashes. `draw_first` draws a plot before the others, on axes, with
  {workdir: color}.
  """
  try:
    from matplotlib import colormaps, figure, lines
  except ModuleNotFoundError as error:
    print(f"{path.name} is left out ({error}): pip install -e '.[plots]'")
    return
  colors = {
    run['workdir']: colormaps['tab20']((2 * i + i // 10) % 20)
    for i, run in enumerate(results)
  }
  looks, curves = {}, {}
  for result in results:
    for point in result['points']:
      name = point['sampler']['name']
      if point['num_calls'] is None:
        looks[name] = {'linestyle': ':', 'color': 'black'}
      elif name not in looks:
        i = sum('marker' in look for look in looks.values())
        dashes = (0, (1 + i, i // 2))
        looks[name] = {'marker': MARKERS[i % len(MARKERS)], 'linestyle': dashes}
      curves.setdefault((result['workdir'], name), []).append(point)
  num = len(labels) + (draw_first is not None)
  num_rows, num_columns = -(-num // 3), min(num, 3)
  size = (5.5 * num_columns + 2, 4.5 * num_rows)
  fig = figure.Figure(figsize=size, layout='constrained')
  plots = [fig.add_subplot(num_rows, num_columns, i + 1) for i in range(num)]
  if draw_first:
    draw_first(plots[0], colors)
  for axes, (key, label) in zip(plots[num - len(labels) :], labels.items()):
    for (run, name), points in curves.items():
      style = {'color': colors[run], **looks[name]}
      draw_curve(axes, points, 'num_calls', key, style)
    axes.set(xlabel='network calls', ylabel=label)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
  for axes in plots:
    axes.grid(alpha=0.3)
  legend: list[tuple[str, Any]]
  legend = [(name, {'color': color}) for name, color in colors.items()]
  legend += [(name, {**look, 'color': 'black'}) for name, look in looks.items()]
  handles = [lines.Line2D([], [], label=x, **style) for x, style in legend]
  fig.legend(handles=handles, loc='outside right upper')
  fig.savefig(path, dpi=150)


def parse_request(options: flags.FlagValues, judge: str) -> Request:
  """Returns the samples that the flags ask for; `judge` measures them.

  Raises:
    InputError: a value is not allowed, or has no effect.
  """
  texts = options.num_steps
  num_steps = tuple(int(text) if text.isdigit() else 0 for text in texts)
  if not num_steps or 0 in num_steps:
    raise InputError(
      f'--num_steps={",".join(texts)} must be whole numbers >= 1, such as '
      '16,64,256'
    )
  names = options.samplers
  if names is None:
    names = [AUTO] if judge else []
  known = [AUTO, ALL, *sorted(SAMPLERS)]
  if unknown := sorted(set(names) - set(known)):
    raise InputError(f'--samplers={unknown} are not among {known}')
  for name in () if names else SAMPLE_FLAGS:
    if options[name].present:
      raise InputError(
        f'--{name}={options[name].value!r} is ignored without --samplers or '
        '--judge, because nothing is sampled'
      )
  if options.mauve and options.num_samples < MIN_MAUVE_SAMPLES:
    raise InputError(
      f'--num_samples={options.num_samples!r} are too few for --mauve, which '
      f'needs {MIN_MAUVE_SAMPLES}; papers take 5,000'
    )
  draw = {key: getattr(options, key) for key in DRAW_FLAGS}
  check_seed(options.seed, '--seed')
  sizes = options.num_samples, options.length
  return Request(tuple(names), num_steps, *sizes, draw, options.seed)


def make_judge(options: flags.FlagValues, spec: str) -> judges.Judge:
  """Makes what measures the samples that the flags ask for."""
  seed = options.seed if options.mauve else None
  return judges.make_judge(spec, mauve_seed=seed)


def check(settings: Sequence[Settings], request: Request, judge: judges.Judge):
  """Raises InputError if a sampler fits no run, or the judge not each run."""
  made = [runs.make_run(one, refit=True) for one in settings]
  for run in made if request.length else ():
    run.check_canvas('--length', request.length)
  objectives = [run.objective for run in made]
  for name in request.samplers:
    if name in SAMPLERS and not any(map(SAMPLERS[name].fits, objectives)):
      names = sorted({one.objective['name'] for one in settings})
      raise InputError(
        f'--samplers={name} fits none of the runs, whose objectives are {names}'
      )
  for one in settings:
    judge.check(one.data, request.length)


def _open_settings(workdirs: Sequence[str], source: str) -> list[Settings]:
  """Returns the settings of each run, with `source` as its text if given.

  Raises:
    InputError: a folder is not that of a run, or one run is given twice.
  """
  seen: dict[pathlib.Path, str] = {}
  for workdir in workdirs:
    path = pathlib.Path(workdir).resolve()
    if path in seen:
      raise InputError(
        f'--workdirs names one run twice: {workdir!r} is also {seen[path]!r}'
      )
    seen[path] = workdir
  found: list[Any] = [configs.read_run(workdir) for workdir in workdirs]
  for config in found if source else ():
    configs.set_source(config.data, source)
  settings = list(map(configs.make_settings, found))
  # Some networks read whole documents only; all runs read the same text.
  is_whole = any(runs.make_objective(one).any_length for one in settings)
  for config in found if source else ():
    if config.data.crop == 'document':
      config.data.long_documents = 'drop' if is_whole else 'cut'
  return list(map(configs.make_settings, found))


def main(start: Start) -> int:
  """Runs --mode=compare: writes a comparison of --workdirs to --output."""
  del start
  options = flags.FLAGS
  request = parse_request(options, options.judge)
  for name in ('workdirs', 'output'):
    if not options[name].value:
      raise InputError(f'--mode=compare needs --{name}')
  workdirs.check_writable(options.output, '--output')
  output = pathlib.Path(options.output)
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(
      f'--output={str(output)!r} exists and is not an empty folder'
    )
  settings = _open_settings(options.workdirs, options.source)
  judge = make_judge(options, options.judge)
  check(settings, request, judge)
  results = [
    compare_run(Subject(*run), request, judge, options.max_examples)
    for run in zip(options.workdirs, settings)
  ]
  table = format_table(results, judge)
  print(table)
  output.mkdir(parents=True, exist_ok=True)
  (output / 'comparison.txt').write_text(table + '\n')
  value = describe(results, request, judge)
  (output / 'comparison.json').write_text(workdirs.to_json(value, 2))
  if options.plot and request.samplers:
    plot_curves(results, make_panels(judge), output / 'curves.png')
  return 0


def describe(
  results: Sequence[dict[str, Any]], request: Request, judge: judges.Judge
) -> dict[str, Any]:
  """Returns the content of comparison.json."""
  points = [point for result in results for point in result['points']]
  return {
    'judge': judge.name,
    'panels': make_panels(judge),
    'remarks': judge.remarks(points) if points else [],
    'request': request._asdict(),
    'runs': results,
  }
