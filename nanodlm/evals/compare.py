r"""--mode=compare: bounds of runs, and sample quality against network calls.

    python launch.py --mode=compare --workdirs=RUN1,RUN2 --output=cmp \
        --judge=AR_RUN --num_steps=16,64,256 --samplers=fixed_count,ancestral

--judge=law compares the samples to the law of the text, if that is known, as of
data.source='stories'. Writes comparison.json, comparison.txt and, if there are
samples, curves.png into a new folder. Apart from times, the same command gives
the same numbers.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
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
from nanodlm.samplers import prefix_cache, SAMPLERS
from nanodlm.training import metrics
from nanodlm.types import check_seed, InputError

AUTO = 'auto'
DRAW_FLAGS = ('temperature', 'top_k', 'top_p')
# Flags that only matter if texts are sampled.
SAMPLE_FLAGS = ('num_steps', 'num_samples', 'length', 'seed', *DRAW_FLAGS)


def define_flags():
  """Defines the flags of --mode=compare."""
  flags.DEFINE_list('workdirs', [], 'Folders of the runs to compare.')
  flags.DEFINE_string('output', None, 'A new or empty folder for the results.')
  flags.DEFINE_string(
    'source',
    '',
    'Held-out text for all runs, in the form of data.source; by default the '
    'text of each run.',
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
    "Samplers; each run uses those that fit it, and its default for 'auto'. By "
    "default 'auto' with --judge, otherwise none.",
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
  flags.DEFINE_bool('plot', True, 'Whether to draw curves.png.')


class Request(NamedTuple):
  """The samples asked of every run.

  Attributes:
    samplers: names, possibly with 'auto'; empty for no samples.
    num_steps: numbers of network calls to try.
    num_samples: texts per point of a curve.
    length: tokens per text; 0 for the run's own length.
    draw: temperature, top_k and top_p.
    seed: seed of the samples.
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
  size = objective.block_size or prefix_cache.DEFAULT_BLOCK_SIZE
  # The run's own sampler may have another rule than a number of steps.
  rules = {**request.draw, 'threshold': 0.0, 'entropy_budget': 0.0}
  rules['stop_at_eos'] = False  # Whole canvases are compared.
  names = [
    objective.default_sampler if name == AUTO else name
    for name in request.samplers
  ]
  for name in dict.fromkeys(names):
    if not SAMPLERS[name].fits(objective):
      continue
    changes = {'name': name, **rules, 'num_steps': request.num_steps[0]}
    sampler = run.with_sampler(changes).sampler
    if not runs.reads_steps(sampler):
      points.append({'name': name, **rules})
      continue
    share = -(-length // size) if hasattr(sampler, 'inner') else 1
    for num_steps in request.num_steps:
      points.append({**changes, 'num_steps': max(num_steps // share, 1)})
  return points


def sample_point(
  lm: LanguageModel, judge: judges.Judge | None, request: Request
) -> dict[str, Any]:
  """Samples texts and measures their quality.

  The speed is by wall clock, without compilation; see also
  `judge.measure_quality`.
  """
  length = request.length or lm.run.settings.data.length
  fill = lms.make_fill(lm.run)
  shape = (request.num_samples, length)
  tokens = np.full(shape, lm.tokenizer.mask_id, np.int32)
  fixed = np.zeros(shape, bool)
  keys = jax.random.split(jax.random.key(request.seed))
  fill(lm.params, keys[0], np.zeros_like(tokens), ~fixed)  # Compiles.
  start = time.perf_counter()
  tokens, num_calls = fill(lm.params, keys[1], tokens, fixed)
  secs = time.perf_counter() - start
  settings = lm.run.describe_sampler()
  for key in ('num_samples', 'length', 'seed'):
    del settings[key]
  return {
    'sampler': settings,
    'num_calls': num_calls,
    'tokens_per_call': lms.tokens_per_call(fixed, num_calls),
    'num_samples': request.num_samples,
    'length': length,
    'tokens_per_sec': tokens.size / secs,
    **judges.measure_quality(
      judge,
      _cut_ends(lm.run, tokens),
      lm.tokenizer,
      lm.run.settings.data.source,
    ),
  }


def _cut_ends(run: Run, tokens: np.ndarray) -> list[np.ndarray]:
  """Returns the texts of rows [N, L], each to its end if something ends it."""
  return [row[: prompts.find_end(row, run.eos_ids) + 1] for row in tokens]


def compare_run(
  workdir: str,
  settings: Settings,
  request: Request,
  judge: judges.Judge | None,
  max_examples: int,
) -> dict[str, Any]:
  """Measures a run: its bound, and a point for each sampler setting.

  With samples, the first point is the text, whose values are those of perfect
  samples if neither the run nor the judge was trained on it.
  """
  lm = lms.load(workdir, settings=settings)
  text, run = evaluate.open_text(lm), lm.run
  packed = text.packed
  make = evaluate.make_evaluate(run, packed, text.source)
  means = make(lm.params, max_examples) or {}
  result = {
    'workdir': workdir,
    'step': lm.step,
    'objective': settings.objective['name'],
    'is_exact': run.objective.exact,
    'num_params': run.num_params(),
    'tokenizer': lm.tokenizer.name,
    'vocab_size': lm.tokenizer.vocab_size,
    'source': text.source,
    'is_held_out': text.is_held_out,
    'trained_share': text.trained_share,
    **{key.partition('/')[2]: value for key, value in means.items()},
    'points': [],
  }
  length = request.length or packed.length
  planned = plan_points(run, request, length)
  if planned:
    real = evaluate.validation_rows(run, packed, request.num_samples).tokens
    name = 'held-out text' if text.is_held_out else 'the text'
    point = {
      'sampler': {'name': name},
      'num_calls': None,
      'tokens_per_call': None,
      'num_samples': len(real),
      'length': min(length, packed.length),
      'tokens_per_sec': None,
      'judge_trained_share': judge and judge.trained_share(real, lm.tokenizer),
      **judges.measure_quality(
        judge, _cut_ends(lm.run, real[:, :length]), lm.tokenizer, text.source
      ),
    }
    result['points'].append(point)
  for changes in planned:
    changed = lm.with_sampler(changes)
    point = sample_point(changed, judge, request)
    result['points'].append(point)
    print(
      f'{workdir}: {changes["name"]}, {point["num_calls"]:.0f} network calls, '
      f'setting {len(result["points"]) - 1} of {len(planned)}',
      file=sys.stderr,
    )
  return result


# Title, key and format of the columns of runs and of points.
_RUN_COLUMNS = (
  ('run', 'workdir', ''),
  ('objective', 'objective', ''),
  ('step', 'step', ''),
  ('params', 'num_params', ','),
  ('', 'relation', ''),
  ('nats/token', 'nll', '.4f'),
  ('ppl', 'ppl', '.2f'),
  ('bits/byte', 'bits_per_byte', '.4f'),
  ('trained on', 'shown_share', ''),
)
# Shown if a run has them.
_DOCUMENT_COLUMNS = (
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
_TEXT_COLUMNS = (
  ('entropy, all', 'unigram_entropy', '.3f'),
  ('entropy, each', 'sample_entropy', '.3f'),
  ('dist-1', 'distinct_1', '.4f'),
  ('dist-2', 'distinct_2', '.4f'),
  ('dist-3', 'distinct_3', '.4f'),
)


def format_table(
  results: Sequence[dict[str, Any]], judge: judges.Judge | None
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
  columns = [c for c in _DOCUMENT_COLUMNS if any(c[1] in row for row in rows)]
  lines = metrics.format_table((*_RUN_COLUMNS, *columns), rows)
  points = [
    {**point, 'workdir': run['workdir'], 'name': point['sampler']['name']}
    for run in results
    for point in run['points']
  ]
  if not points:
    return '\n'.join(lines)
  last = points[-1]
  draw = ', '.join(f'{key} {last["sampler"][key]:g}' for key in DRAW_FLAGS)
  lines += [
    '',
    *metrics.format_table(
      (*_POINT_COLUMNS, *(judge.columns if judge else ()), *_TEXT_COLUMNS),
      points,
    ),
    '',
    f'{last["num_samples"]} samples of {points[0]["length"]} tokens per line, '
    f'{draw}. entropy: nats/token, of all samples and of single '
    'texts.',
  ]
  if judge:
    lines += judge.remarks(points)
  return '\n'.join(lines)


def make_panels(judge: judges.Judge | None) -> dict[str, str]:
  """Returns what is plotted of the points, {key: label}."""
  own = judge.panels if judge else {}
  return {**own, 'sample_entropy': 'entropy of a sample, nats/token'}


def plot_curves(
  results: Sequence[dict[str, Any]],
  labels: Mapping[str, str],
  path: pathlib.Path,
):
  """Draws `labels`, {key: label}, against network calls, a line per sampler."""
  curves = {}
  for result in results:
    for point in result['points']:
      name = f'{result["workdir"]}: {point["sampler"]["name"]}'
      curves.setdefault(name, []).append(point)
  from matplotlib import figure

  size = (5.5 * len(labels), 4.5)
  fig = figure.Figure(figsize=size, layout='constrained')
  panels = fig.subplots(1, len(labels), squeeze=False)[0]
  for axes, (key, label) in zip(panels, labels.items()):
    for i, (name, points) in enumerate(curves.items()):
      style = {'color': f'C{i}', 'label': name}
      x = [point['num_calls'] for point in points]
      y = [point.get(key, math.nan) for point in points]
      if x[0] is not None:
        widths = [point.get(f'{key}_ci95', 0.0) for point in points]
        axes.errorbar(x, y, yerr=widths, marker='o', capsize=3, **style)
      else:  # Held-out text.
        axes.axhline(y[0], linestyle=':', **style)
    axes.set(xscale='log', xlabel='network calls', ylabel=label)
    calls = {point['num_calls'] for one in curves.values() for point in one}
    calls = sorted(calls - {None})
    axes.set_xticks(calls, [f'{x:.0f}' for x in calls])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  panels[0].legend(fontsize='small')
  fig.savefig(path, dpi=150)


def _parse_request(options: flags.FlagValues) -> Request:
  texts = options.num_steps
  num_steps = tuple(int(text) if text.isdigit() else 0 for text in texts)
  if not num_steps or 0 in num_steps:
    raise InputError(
      f'--num_steps={",".join(texts)} must be whole numbers >= 1, such as '
      '16,64,256'
    )
  names = options.samplers
  if names is None:
    names = [AUTO] if options.judge else []
  known = [AUTO, *sorted(SAMPLERS)]
  if unknown := sorted(set(names) - set(known)):
    raise InputError(f'--samplers={unknown} are not among {known}')
  for name in () if names else SAMPLE_FLAGS:
    if options[name].present:
      raise InputError(
        f'--{name}={options[name].value!r} is ignored without --samplers or '
        '--judge, because nothing is sampled'
      )
  draw = {key: getattr(options, key) for key in DRAW_FLAGS}
  check_seed(options.seed, '--seed')
  sizes = options.num_samples, options.length
  return Request(tuple(names), num_steps, *sizes, draw, options.seed)


def _open_settings(
  workdirs: Sequence[str], request: Request, source: str
) -> list[Settings]:
  """Returns the settings of each run, with `source` as its text if given.

  Raises:
    InputError: there is no such run, or a sampler fits none of them.
  """
  settings = [configs.make_settings(configs.read_run(x)) for x in workdirs]
  objectives = list(map(runs.make_objective, settings))
  for name in request.samplers:
    if name != AUTO and not any(map(SAMPLERS[name].fits, objectives)):
      names = sorted({one.objective['name'] for one in settings})
      raise InputError(
        f'--samplers={name} fits none of the runs, whose objectives are {names}'
      )
  if not source:
    return settings
  change = {'source': source, 'eval_source': '', 'long_documents': 'cut'}
  # The other crops, and the padding of pairs, do not apply to another text.
  cut = {**change, 'crop': 'chunk', 'padding': 'eos', 'long_documents': 'drop'}
  return [
    dataclasses.replace(
      one,
      data=dataclasses.replace(
        one.data, **(change if one.data.crop == 'document' else cut)
      ),
    )
    for one in settings
  ]


def main(start: Start) -> int:
  """Runs --mode=compare: writes a comparison of --workdirs to --output."""
  del start
  options = flags.FLAGS
  request = _parse_request(options)
  for name in ('workdirs', 'output'):
    if not options[name].value:
      raise InputError(f'--mode=compare needs --{name}')
  workdirs.check_writable(options.output, '--output')
  output = pathlib.Path(options.output)
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(
      f'--output={str(output)!r} exists and is not an empty folder'
    )
  settings = _open_settings(options.workdirs, request, options.source)
  judge = judges.make_judge(options.judge) if options.judge else None
  if judge:
    for one in settings:
      judge.check(one.data, request.length)
  results = [
    compare_run(workdir, one, request, judge, options.max_examples)
    for workdir, one in zip(options.workdirs, settings)
  ]
  table = format_table(results, judge)
  print(table)
  output.mkdir(parents=True, exist_ok=True)
  (output / 'comparison.txt').write_text(table + '\n')
  points = [point for result in results for point in result['points']]
  value = {
    'judge': options.judge,
    'panels': make_panels(judge),
    'remarks': judge.remarks(points) if judge and points else [],
    'request': request._asdict(),
    'runs': results,
  }
  # JSON has no NaN.
  value = json.loads(json.dumps(value), parse_constant=lambda _: None)
  text = json.dumps(value, indent=2) + '\n'
  (output / 'comparison.json').write_text(text)
  if options.plot and request.samplers:
    try:
      plot_curves(results, make_panels(judge), output / 'curves.png')
    except ModuleNotFoundError as error:
      print(f"curves.png is left out ({error}): pip install -e '.[plots]'")
  return 0
