"""Runs side by side: their bounds, and sample quality against network calls.

    python -m nanodlm.evals.compare RUN1 RUN2 --output=cmp --judge=AR_RUN \
        --num_steps=16,64,256 --samplers=fixed_count,ancestral

Writes comparison.json, comparison.txt and, with samples, curves.png into a new
folder. The same command gives the same numbers, times apart.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
import time
from typing import Any, Sequence

from nanodlm.devices import hugepages

if __name__ == '__main__':
  hugepages.restart_with_huge_pages()

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import app, flags, logging
import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, sample, samplers
from nanodlm.data import prepare
from nanodlm.evals import judge as judges
from nanodlm.model.config import num_params
from nanodlm.samplers import prefix_cache
from nanodlm.types import InputError

_OUTPUT = flags.DEFINE_string('output', None, 'A new or empty folder.')
_SOURCE = flags.DEFINE_string(
  'source',
  '',
  "Held-out text for all runs, as data.source; by default each run's own.",
)
_MAX_EXAMPLES = flags.DEFINE_integer(
  'max_examples', 0, 'Held-out rows of each run; 0: all.', lower_bound=0
)
_JUDGE = flags.DEFINE_string(
  'judge',
  '',
  'For generative perplexity: the workdir of an autoregressive run, '
  "or 'hf:NAME_OR_PATH'.",
)
# The benchmark has flags of these names too; both are imported where the reference
# of the API is made.
_SAMPLERS = flags.DEFINE_list(
  'samplers',
  None,
  'Samplers; each run takes those that fit it. By default '
  "'auto' with --judge, else none.",
  allow_override=True,
)
_NUM_STEPS = flags.DEFINE_list(
  'num_steps',
  ['16', '64', '256'],
  'Network calls of the samplers that have a choice.',
)
_NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples', 32, 'Texts for each point.', lower_bound=2, allow_override=True
)
_LENGTH = flags.DEFINE_integer(
  'length', 0, "Tokens of a sample; 0: each run's data.length.", lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'As sampler.temperature.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'As sampler.top_k.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'As sampler.top_p.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the samples.')
_PLOT = flags.DEFINE_bool(
  'plot', True, 'Whether to draw curves.png.', allow_override=True
)

AUTO = 'auto'


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked of every run, checked; see the flags.

  Attributes:
    samplers: names, 'auto' among them or not; empty for no samples.
    num_steps: network calls to try.
    num_samples: texts for each point.
    length: tokens of a text, 0 for the run's own.
    draw: temperature, top_k, top_p.
    seed: of the samples.
  """

  samplers: tuple[str, ...]
  num_steps: tuple[int, ...]
  num_samples: int
  length: int
  draw: dict[str, float]
  seed: int


def measure_bound(
  run: evaluate.Run, params: Any, packed: prepare.PackedData, max_examples: int
) -> dict[str, float]:
  """The held-out bound or exact value with its intervals, without prefixes."""
  means = evaluate.make_evaluate(run, packed)(params, max_examples)
  return {key.partition('/')[2]: value for key, value in means.items()}


def plan_points(
  objective_name: str, request: Request, length: int, block_size: int = 0
) -> list[dict[str, Any]]:
  """The changes to config.sampler of each point of a run's curves.

  A sampler without a num_steps of its own gives one point; where each block of
  the `length` tokens takes its own steps they get equal shares. Samplers that do
  not fit the objective are left out. block_size is the objective's, or 0.
  """
  fitting = configs.fitting_samplers(objective_name)
  names = [
    samplers.DEFAULTS[objective_name] if name == AUTO else name
    for name in request.samplers
  ]
  points = []
  for name in dict.fromkeys(names):
    if name not in fitting:
      continue
    fields = {
      field.name for field in dataclasses.fields(samplers.SAMPLERS[name])
    }
    size = block_size or prefix_cache.DEFAULT_BLOCK_SIZE
    share = -(-length // size) if 'inner' in fields else 1
    has_steps = fields & {'num_steps', 'inner'}
    for num_steps in request.num_steps if has_steps else (None,):
      steps = {}
      if num_steps is not None:
        steps = {'num_steps': max(num_steps // share, 1)}
      if 'threshold' in fields:  # exactly one of them may be set
        steps |= {'threshold': 0.0, 'entropy_budget': 0.0}
      points.append({'name': name, **request.draw, **steps})
  return points


def sample_point(
  run: evaluate.Run,
  params: Any,
  changes: dict[str, Any],
  judge: judges.Judge | None,
  request: Request,
) -> dict[str, Any]:
  """One point of a curve: samples and what can be said of them.

  Returns:
    sampler (its config.sampler), num_calls, num_samples, length, tokens_per_sec (wall
    clock, compilation apart), and `judge.measure_quality`'s values.
  """
  run = evaluate.with_sampler(run, changes)
  length = request.length or run.settings.data.length
  fill = sample.make_fill(run)
  tokens = np.full(
    (request.num_samples, length), run.tokenizer.mask_id, np.int32
  )
  fixed = np.zeros(tokens.shape, bool)
  keys = jax.random.split(jax.random.key(request.seed))
  fill(params, keys[0], np.zeros_like(tokens), ~fixed)  # compiles
  start = time.perf_counter()
  tokens, num_calls = fill(params, keys[1], tokens, fixed)
  secs = time.perf_counter() - start
  settings = {
    key: value
    for key, value in run.config.sampler.to_dict().items()
    if key not in ('num_samples', 'length', 'seed')
  }
  return {
    'sampler': settings,
    'num_calls': num_calls,
    'num_samples': request.num_samples,
    'length': length,
    'tokens_per_sec': tokens.size / secs,
    **judges.measure_quality(judge, tokens, run.tokenizer),
  }


def compare_run(
  workdir: str,
  request: Request,
  judge: judges.Judge | None,
  source: str,
  max_examples: int,
) -> dict[str, Any]:
  """Everything about one run: its bound, and a point for each sampler setting.

  With samples, the first point is held-out text itself: what the numbers would
  be if the samples were real.
  """
  run, params, step = evaluate.open_run(workdir)
  trained_on = run.settings.data.source
  if source:
    # What belongs to the text it was trained on does not matter here.
    data = dataclasses.replace(
      run.settings.data, source=source, crop='chunk', padding='eos'
    )
    run = dataclasses.replace(
      run, settings=dataclasses.replace(run.settings, data=data)
    )
  packed = evaluate.open_data(run.settings, workdir, run.tokenizer, trained_on)
  result = {
    'workdir': workdir,
    'step': step,
    'objective': run.config.objective.name,
    'is_exact': run.objective.exact,
    'num_params': num_params(params),
    'tokenizer': run.tokenizer.name,
    'vocab_size': run.tokenizer.vocab_size,
    'source': run.settings.data.source,
    **measure_bound(run, params, packed, max_examples),
    'points': [],
  }
  points = plan_points(
    run.config.objective.name,
    request,
    request.length or packed.length,
    run.objective.block_size,
  )
  if points:
    real = evaluate.validation_rows(run, packed, request.num_samples)['tokens']
    length = request.length or packed.length
    result['points'].append(
      {
        'sampler': {'name': 'held-out text'},
        'num_calls': 0,
        'num_samples': len(real),
        'length': min(length, packed.length),
        'tokens_per_sec': math.nan,
        **judges.measure_quality(judge, real[:, :length], run.tokenizer),
      }
    )
  for changes in points:
    result['points'].append(sample_point(run, params, changes, judge, request))
    print(f'{workdir}: {changes}', file=sys.stderr)
  return result


def format_table(results: Sequence[dict[str, Any]], judge_name: str) -> str:
  """The results for people."""
  width = max(len(result['workdir']) for result in results)
  lines = [
    f'{"run":{width}}  {"objective":10}{"step":>8}{"params":>13}'
    f'{"nats/token":>20}{"ppl":>10}{"bits/byte":>20}'
  ]
  for result in results:
    kind = '=' if result['is_exact'] else '<='
    lines.append(
      f'{result["workdir"]:{width}}  {result["objective"]:10}{result["step"]:8}'
      f'{result["num_params"]:13,}'
      f'{kind:>4}{result["nll"]:8.4f} ±{result["nll_ci95"]:6.4f}'
      f'{result["ppl"]:10.2f}'
      f'{kind:>4}{result["bits_per_byte"]:8.4f} '
      f'±{result["bits_per_byte_ci95"]:6.4f}'
    )
  points = [
    (result['workdir'], point)
    for result in results
    for point in result['points']
  ]
  if not points:
    return '\n'.join(lines)
  first = points[0][1]
  lines += [
    '',
    f'{"samples of":{width}}  {"sampler":14}{"calls":>7}'
    f'{"tokens/s":>10}{"gen ppl":>10}{"gen bits/byte":>18}'
    f'{"entropy":>9}{"/text":>7}{"dist-1":>8}{"dist-2":>8}{"dist-3":>8}',
  ]
  for workdir, point in points:
    gen = f'{"-":>10}{"-":>18}'
    if 'gen_ppl' in point:
      gen = (
        f'{point["gen_ppl"]:10.2f}{point["gen_bits_per_byte"]:10.4f} '
        f'±{point["gen_bits_per_byte_ci95"]:6.4f}'
      )
    speed = (
      ''
      if math.isnan(point['tokens_per_sec'])
      else (f'{point["tokens_per_sec"]:,.0f}')
    )
    lines.append(
      f'{workdir:{width}}  {point["sampler"]["name"]:14}'
      f'{point["num_calls"]:7.0f}{speed:>10}{gen}'
      f'{point["unigram_entropy"]:9.3f}{point["sample_entropy"]:7.3f}'
      f'{point["distinct_1"]:8.4f}{point["distinct_2"]:8.4f}'
      f'{point["distinct_3"]:8.4f}'
    )
  settings = {
    key: points[-1][1]['sampler'].get(key)
    for key in ('temperature', 'top_k', 'top_p')
  }
  lines += [
    '',
    f'{points[-1][1]["num_samples"]} samples of {first["length"]} tokens '
    f'for each line, {settings}. entropy: nats/token of all samples and '
    'of each one.',
  ]
  if judge_name:
    tokens = {point['judge_tokens'] for _, point in points}
    lines.append(
      f'Judge: {judge_name}; gen ppl is per token of the judge'
      + (
        ', which encoded the text of runs with another tokenizer anew: compare '
        'bits/byte'
        if 'text' in tokens
        else ''
      )
      + '. A low one with a low entropy is repetition.'
    )
  return '\n'.join(lines)


def plot_curves(
  results: Sequence[dict[str, Any]], judge_name: str, path: pathlib.Path
):
  """Quality and entropy against network calls, a line for each run's sampler."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(11, 4.5), layout='constrained')
  panels = {
    'gen_bits_per_byte': f'bits/byte under {judge_name}',
    'sample_entropy': 'entropy of a sample, nats/token',
  }
  if not judge_name:
    del panels['gen_bits_per_byte']
  all_axes = fig.subplots(1, len(panels), squeeze=False)[0]
  for axes, (key, label) in zip(all_axes, panels.items()):
    color = 0
    for result in results:
      run_name = pathlib.Path(result['workdir']).name
      curves = {}
      for point in result['points']:
        curves.setdefault(point['sampler']['name'], []).append(point)
      for name, points in curves.items():
        if not points[0]['num_calls']:
          axes.axhline(
            points[0][key],
            linestyle=':',
            color=f'C{color}',
            label=f'{run_name}: {name}',
          )
          continue
        axes.errorbar(
          [point['num_calls'] for point in points],
          [point[key] for point in points],
          yerr=[point.get(f'{key}_ci95', 0.0) for point in points],
          marker='o',
          capsize=3,
          color=f'C{color}',
          label=f'{run_name}: {name}',
        )
        color += 1
    axes.set(xscale='log', xlabel='network calls', ylabel=label)
    axes.grid(alpha=0.3)
  all_axes[0].legend(fontsize='small')
  fig.savefig(path, dpi=150)


def _parse_request() -> Request:
  try:
    num_steps = tuple(int(text) for text in _NUM_STEPS.value)
  except ValueError:
    num_steps = (0,)
  if not num_steps or min(num_steps) < 1:
    raise InputError(
      f'--num_steps={",".join(_NUM_STEPS.value)} must be whole '
      'numbers >= 1, as 16,64,256'
    )
  chosen = _SAMPLERS.value
  if chosen is None:
    chosen = [AUTO] if _JUDGE.value else []
  if unknown := set(chosen) - {AUTO, *samplers.SAMPLERS}:
    raise InputError(
      f'--samplers={sorted(unknown)} are not among '
      f'{[AUTO, *sorted(samplers.SAMPLERS)]}'
    )
  return Request(
    tuple(chosen),
    num_steps,
    _NUM_SAMPLES.value,
    _LENGTH.value,
    {
      'temperature': _TEMPERATURE.value,
      'top_k': _TOP_K.value,
      'top_p': _TOP_P.value,
    },
    _SEED.value,
  )


def _check_fits(workdirs: Sequence[str], request: Request):
  """Raises InputError where a run or a sampler has nothing to do."""
  names, defaults = set(), configs.load_base()
  for workdir in workdirs:
    config = evaluate.load_config(workdir, defaults)
    if config is None:
      raise InputError(
        f'{workdir!r} holds no run (no {evaluate.CONFIG_FILE} in it)'
      )
    names.add(config.objective.name)
  for name in request.samplers:
    if name != AUTO and not names & set(samplers.FITS[name]):
      raise InputError(
        f'--samplers={name} fits none of the runs, whose objectives are '
        f'{sorted(names)}; it fits {sorted(samplers.FITS[name])}'
      )


def _main(workdirs: Sequence[str]):
  request = _parse_request()
  if not workdirs:
    raise InputError('name at least one workdir')
  for name in (
    'num_steps',
    'num_samples',
    'length',
    'temperature',
    'top_k',
    'top_p',
    'seed',
  ):
    if flags.FLAGS[name].present and not request.samplers:
      raise InputError(
        f'--{name}={flags.FLAGS[name].value!r} has no effect without '
        '--samplers or --judge: nothing is sampled'
      )
  if not _OUTPUT.value:
    raise InputError('--output is needed: a new or empty folder')
  output = pathlib.Path(_OUTPUT.value)
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(
      f'--output={str(output)!r} exists and is not an empty folder'
    )
  draws = _PLOT.value and bool(request.samplers)
  if draws and importlib.util.find_spec('matplotlib') is None:
    if flags.FLAGS['plot'].present:
      raise InputError("--plot needs matplotlib: pip install -e '.[plots]'")
    print(
      "no curves.png without matplotlib: pip install -e '.[plots]'",
      file=sys.stderr,
    )
    draws = False
  _check_fits(workdirs, request)
  judge = judges.make_judge(_JUDGE.value) if _JUDGE.value else None
  results = [
    compare_run(workdir, request, judge, _SOURCE.value, _MAX_EXAMPLES.value)
    for workdir in workdirs
  ]
  table = format_table(results, _JUDGE.value)
  print(table)
  output.mkdir(parents=True, exist_ok=True)
  (output / 'comparison.txt').write_text(table + '\n')
  (output / 'comparison.json').write_text(
    json.dumps(
      {
        'judge': _JUDGE.value,
        'request': dataclasses.asdict(request),
        'runs': _without_nan(results),
      },
      indent=2,
    )
    + '\n'
  )
  if draws:
    plot_curves(results, _JUDGE.value, output / 'curves.png')


def _without_nan(tree: Any) -> Any:
  """JSON has no NaN: null."""
  if isinstance(tree, dict):
    return {key: _without_nan(value) for key, value in tree.items()}
  if isinstance(tree, list):
    return [_without_nan(value) for value in tree]
  return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def main(argv):
  """Compares the runs of the command line; 2 for a mistake in it."""
  # JAX tells on the terminal which devices it did not find.
  logging.set_verbosity(logging.ERROR)
  try:
    _main(argv[1:])
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  app.run(main)
