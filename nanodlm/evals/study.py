r"""--mode=study: trains variants of a config with several seeds, compares them.

    python launch.py --mode=study --config=configs/objectives.py \
        --output=runs/objectives --seeds=0,1,2

The file of --config has a dict VARIANTS, {name: {'section.key': value}}, and
get_config(name), so that each can also be trained alone, with
--config=configs/objectives.py:block4. Each run is trained in OUTPUT/NAME-seedN
as by --mode=train, and measured as by --mode=compare and --mode=eval --infill,
by default against the law of the text if that is known. A variant whose
checkpoint.init_from is the name of one before it starts from the run of that
one with the same seed, as the student of a distillation does.

Runs take turns by seed, and after each of them study.txt, study.json and
study.png show what is known so far. The same command resumes: nothing that was
trained or measured is done again. With other flags of what to measure, only
what is missing is measured; other settings need another OUTPUT. The tables are
of the variants and seeds that the last command names.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import logging
import pathlib
import runpy
import statistics
import time
from typing import Any, NamedTuple

from absl import flags
import jax

from nanodlm import config as configs
from nanodlm import evaluate, laws, train
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.config import Settings, Start
from nanodlm.evals import compare, infill
from nanodlm.evals import judge as judges
from nanodlm.evals.compare import Recall, Subject
from nanodlm.training import checkpoint, checksums, metrics
from nanodlm.training.metrics import is_number
from nanodlm.training.progress import describe_secs
from nanodlm.types import check_seed, InputError

log = logging.getLogger('nanodlm')

RESULTS = 'study.json'
_RATE = 'train/tokens_per_sec'
# What a learning curve shows, if each evaluation has it, and its unit.
_CURVES = {'excess_nats': 'nats/document above the law', 'nll': 'nats/token'}
_RUN_COLUMNS = (
  ('variant', 'workdir', ''),
  ('seeds', 'num_seeds', ''),
  ('step', 'step', ''),
  ('', 'relation', ''),
  ('nats/token', 'nll', '.4f'),
  ('nats/document', 'nats_per_document', '.2f'),
  ('above the law', 'excess_nats', '.2f'),
  ('trained on', 'shown_share', ''),
  ('lowest', 'lowest', '.3f'),
  ('at epoch', 'lowest_at', '.1f'),
  ('of', 'epochs', '.1f'),
  ('training tokens/s', 'train_tokens_per_sec', ',.0f'),
)
_TEXT_COLUMNS = (('entropy, each', 'sample_entropy', '.3f'),)
_INFILL_COLUMNS = (
  ('infilling of', 'workdir', ''),
  ('masked', 'ratio', '.0%'),
  ('as', 'pattern', ''),
  ('calls', 'num_calls', '.0f'),
  ('accuracy', 'accuracy', '.4f'),
  ('best possible', 'bayes_accuracy', '.4f'),
)


def define_flags():
  """Defines the flags of --mode=study."""
  flags.DEFINE_list('variants', [], 'Variants of --config; by default all.')
  flags.DEFINE_list('seeds', ['0'], 'Values of config.seed, such as 0,1,2.')
  flags.DEFINE_enum(
    'checkpoint',
    'last',
    ['last', 'best'],
    'Whether to measure the last checkpoint of a run, or the one, among those '
    'that checkpoint.max_to_keep keeps, whose held-out bound was the lowest.',
  )
  compare.define_measurements()
  infill.define_flags(['0.1', '0.5'])
  flags.adopt_module_key_flags(compare)
  flags.adopt_module_key_flags(infill)


class Member(NamedTuple):
  """A run of the study: a variant with a seed."""

  variant: str
  seed: int
  start: Start
  settings: Settings

  @property
  def workdir(self) -> pathlib.Path:
    """Its folder."""
    return pathlib.Path(self.start.workdir)


def plan_members(
  start: Start, output: str, variants: Sequence[str], seeds: Sequence[str]
) -> list[Member]:
  """Returns the checked runs of a study, in the order of training.

  Raises:
    InputError: there is no such variant or seed, or the run in its folder has
      other settings.
  """
  path, _, name = start.path.partition(':')
  if not start.is_given or name:
    raise InputError(
      f'--config={start.path!r}: --mode=study needs the file of a study, such '
      'as configs/objectives.py, and takes names of its variants in --variants'
    )
  if 'seed' in start.changes:
    raise InputError(
      f'--config.seed={start.changes["seed"]!r} is ignored by --mode=study; '
      'give --seeds'
    )
  module = runpy.run_path(path)
  known = module.get('VARIANTS')
  if not isinstance(known, Mapping) or not known:
    raise InputError(
      f'--config={path!r} lacks VARIANTS={{name: {{key: value}}}}, as a study '
      'needs; see configs/objectives.py'
    )
  if unknown := sorted(set(variants) - set(known)):
    raise InputError(f'--variants={unknown} are not among {list(known)}')
  numbers = [int(seed) for seed in seeds if seed.isdecimal()]
  if not numbers or len(set(numbers)) < len(seeds):
    raise InputError(
      f'--seeds={",".join(seeds)} must be different whole numbers, such as '
      '0,1,2'
    )
  chosen = [name for name in known if name in (variants or known)]
  varied = {key for name in chosen for key in known[name]}
  if both := sorted(varied & set(start.changes)):
    raise InputError(
      f'--config.{both[0]}={start.changes[both[0]]!r} would undo what the '
      f'variants of {path!r} set; leave it out, or choose others in --variants'
    )
  members = []
  for seed in numbers:
    check_seed(seed, '--seeds')
    folders = {
      name: str(pathlib.Path(output) / f'{name}-seed{seed}') for name in known
    }
    for variant in chosen:
      config = module['get_config'](variant)
      if (origin := config.checkpoint.init_from) in folders:
        names = list(known)
        if names.index(origin) >= names.index(variant):
          raise InputError(
            f'{path!r}: the variant {variant!r} starts from {origin!r}, which '
            'must come before it'
          )
        config.checkpoint.init_from = folder = folders[origin]
        if origin not in chosen and not _is_trained(folder):
          raise InputError(
            f'--variants={list(variants)}: {variant!r} starts from {origin!r}, '
            f'which is neither among them nor trained in {folder}'
          )
      one = Start(
        'train', folders[variant], config, True, {**start.changes, 'seed': seed}
      )
      settings, saved = one.resolve()
      if seed == numbers[0]:
        runs.check_training(runs.make_run(settings))
      changed = configs.differing_keys(
        saved or settings.to_dict(), settings.to_dict()
      )
      if changed:
        lines = [
          f'  {k}: {a!r} saved, {b!r} now' for k, (a, b) in changed.items()
        ]
        raise InputError(
          f'--output={output!r} holds a study with other settings, in '
          f'{one.workdir}:\n' + '\n'.join(lines) + '\nGive another --output'
        )
      members.append(Member(variant, seed, one, settings))
  return members


def _check_output(output: str, name: str):
  """Raises InputError unless a study of the config `name` can be written."""
  if not output:
    raise InputError('--mode=study needs --output')
  workdirs.check_writable(output, '--output')
  folder = pathlib.Path(output)
  if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
    return
  try:
    other = json.loads((folder / RESULTS).read_bytes())['config']
  except (OSError, ValueError, KeyError, TypeError):
    raise InputError(
      f'--output={output!r} is neither new or empty nor the folder of a study'
    ) from None
  if other != name:
    raise InputError(
      f'--output={output!r} holds a study of {other!r}, not of {name!r}; give '
      'another folder'
    )


def _is_trained(workdir: str) -> bool:
  """Returns whether a run has ended, with a checkpoint and its bound."""
  config: Any = configs.read(workdir)
  if config is None:
    return False
  checkpoints = pathlib.Path(workdir) / workdirs.CHECKPOINTS
  last = config.train.num_steps
  is_saved = checksums.complete_steps(checkpoints)[-1:] == [last]
  return is_saved and train.was_evaluated(workdir, last)


def make_recall(path: pathlib.Path, step: int) -> Recall:
  """Makes what keeps the results of measuring a step in a JSON file."""
  known = json.loads(path.read_text()) if path.exists() else []

  def recall(description, compute):
    # The rows of older results were at equal distances.
    asked = {'step': step, 'rows': 'spread', **description}
    asked = json.loads(json.dumps(asked))
    for entry in known:
      if entry['asked'] == asked:
        return entry['result']
    # As it will be read.
    result = json.loads(workdirs.to_json(compute()))
    known.append({'asked': asked, 'result': result})
    workdirs.write(path, workdirs.to_json(known, 2))
    return result

  return recall


def learning_curve(
  lines: Sequence[Mapping[str, float]], steps_per_epoch: float
) -> list[dict[str, float]]:
  """Returns step, epochs and the values of _CURVES of each evaluation."""
  curve = []
  for line in lines:
    split = 'eval/' if 'eval/nll' in line else 'eval_subset/'
    values = {key.removeprefix(split): value for key, value in line.items()}
    if 'nll' not in values:
      continue
    point = {'step': line['step'], 'epochs': line['step'] / steps_per_epoch}
    kept = [key for key in values if key.removesuffix('_ci95') in _CURVES]
    curve.append(point | {key: values[key] for key in kept})
  return curve


def _curve_key(curves: Sequence[Sequence[Mapping[str, float]]]) -> str:
  """Returns what all evaluations of several curves have."""
  return next(
    key
    for key in _CURVES
    if all(key in point for curve in curves for point in curve)
  )


def measure(
  member: Member,
  request: compare.Request,
  judge: judges.Judge,
  ratios: Sequence[float],
  options: flags.FlagValues,
) -> dict[str, Any] | None:
  """Measures a trained run, unless its folder has the results.

  Returns None if its held-out bound was never finite.
  """
  # Text that was set by hand is that of training, not what to evaluate on.
  settings = dataclasses.replace(member.settings, given=frozenset())
  workdir, path = str(member.workdir), member.workdir / workdirs.MEASURED
  steps = checksums.complete_steps(member.workdir / workdirs.CHECKPOINTS)
  step, num = steps[-1], settings.eval.max_examples
  subject, recall = Subject(workdir, settings, step), make_recall(path, step)
  packed = train.open_own_text(settings, workdir)
  train.check_same_text(packed, checkpoint.read_meta(workdir, step), workdir)
  data = (member.workdir / workdirs.METRICS).read_bytes()
  lines = metrics.join_steps(workdirs.parse_lines(data)[0])
  num_rows = len(packed.train) * subject.run.trained.num_reads
  curve = learning_curve(lines, num_rows / settings.train.batch_size)
  if not curve:
    return None
  if num and curve[-1]['step'] == step:
    # Training evaluates the last step, alone, on all of the held-out text.
    bound = functools.partial(compare.measure_bound, subject, num)
    asked = {'what': 'end of the curve', 'max_examples': num}
    means = recall(asked, bound)
    curve[-1] |= {
      key: means[key]
      for key in curve[-1]
      if key.removesuffix('_ci95') in _CURVES
    }
  key = _curve_key([curve])
  if options.checkpoint == 'best':
    kept = [point for point in curve if point['step'] in steps]
    best = min(kept, key=lambda point: point[key], default={'step': step})
    if (best_step := int(best['step'])) != step:
      subject = Subject(workdir, settings, best_step)
      recall = make_recall(path, best_step)

  def fill_gaps() -> list[dict[str, Any]]:
    lm, text = subject.lm, subject.text
    rows = evaluate.validation_rows(
      lm.run, text.packed, options.infill_examples
    )
    return list(infill.measure(lm, text, rows, ratios))

  result = compare.compare_run(
    subject, request, judge, options.max_examples, recall
  )
  lowest = min(curve, key=lambda point: point[key])
  rates = [x[_RATE] for x in lines if _RATE in x]
  result |= {
    'variant': member.variant,
    'seed': member.seed,
    'curve': curve,
    'lowest': lowest[key],
    'lowest_at': lowest['epochs'],
    'epochs': curve[-1]['epochs'],
    'train_tokens_per_sec': statistics.median(rates) if rates else None,
    'infill': [],
  }
  if ratios:
    asked = {
      'what': 'infilling',
      'ratios': ratios,
      'num_examples': options.infill_examples,
    }
    try:
      infill.check_run(subject.run)
      result['infill'] = recall(asked, fill_gaps)
    except InputError as error:
      log.info('%s: infilling is left out: %s', workdir, error)
  return result


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the means of results over seeds, with their ranges.

  KEY_low and KEY_high are the ends of the range of KEY, in place of the
  intervals of single results. What is not a number, or is the same in all, is
  kept; lists are summarized element by element. What one of them lacks, such as
  the nats of possible samples if there are none, is that of the others.
  """
  first = results[0]
  if len(results) == 1:
    return dict(first)
  summary: dict[str, Any] = {}
  for key in dict.fromkeys(key for result in results for key in result):
    values = [result[key] for result in results if result.get(key) is not None]
    if key.endswith(('_ci95', '_low', '_high')):
      continue
    if values and isinstance(values[0], list):
      summary[key] = [summarize(rows) for rows in zip(*values)]
    elif all(map(is_number, values)) and len(set(values)) > 1:
      summary[key] = statistics.fmean(values)
      summary |= {f'{key}_low': min(values), f'{key}_high': max(values)}
    else:
      summary[key] = values[0] if values else None
  return summary


def summarize_variants(
  results: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
  """Returns a summary of each variant, called by its name like a run.

  Held-out text that was measured for an earlier one is left out.
  """
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for result in results:
    groups.setdefault(result['variant'], []).append(result)
  summaries, texts = [], []
  for name, group in groups.items():
    # A run that was interrupted in an evaluation lacks it.
    steps = [{point['step'] for point in result['curve']} for result in group]
    curves = [
      [x for x in result['curve'] if x['step'] in set.intersection(*steps)]
      for result in group
    ]
    group = [{**x, 'curve': curve} for x, curve in zip(group, curves)]
    summary = {**summarize(group), 'workdir': name}
    summary['seed'] = [result['seed'] for result in group]
    summary['num_seeds'] = len(group)
    text = [x for x in summary['points'] if x['num_calls'] is None]
    if text and text[0] in texts:
      summary['points'] = summary['points'][1:]
    texts += text
    summaries.append(summary)
  return summaries


def format_table(
  summaries: Sequence[dict[str, Any]], judge: judges.Judge
) -> str:
  """Formats summaries of variants as tables with remarks."""
  lines = [compare.format_table(summaries, judge, _RUN_COLUMNS, _TEXT_COLUMNS)]
  gaps = [
    {**gap, 'workdir': summary['workdir']}
    for summary in summaries
    for gap in summary['infill']
  ]
  if gaps:
    lines += ['', *metrics.format_table(_INFILL_COLUMNS, gaps)]
  key = _curve_key([summary['curve'] for summary in summaries])
  lines += [
    '',
    'Means over seeds, with their ranges, or values of one seed with 95% '
    'intervals. lowest: that of the evaluations '
    f'during training, {_CURVES[key]}. Infilling is left out for networks that '
    'do not see both sides of a gap, and where the log says so.',
  ]
  return '\n'.join(lines)


def draw_curves(
  summaries: Sequence[Mapping[str, Any]], axes: Any, colors: Mapping[str, Any]
):
  """Draws learning curves on axes, with a star at each minimum."""
  key = _curve_key([x['curve'] for x in summaries])
  for summary in summaries:
    style, curve = {'color': colors[summary['workdir']]}, summary['curve']
    compare.draw_curve(axes, curve, 'epochs', key, style)
    best = min(curve, key=lambda point: point[key])
    lowest = {'epochs': best['epochs'], key: best[key]}
    style = {**style, 'marker': '*', 'markersize': 12}
    compare.draw_curve(axes, [lowest], 'epochs', key, style)
  axes.set(xlabel='epochs', ylabel=_CURVES[key])


def main(start: Start) -> int:
  """Runs --mode=study: trains and measures runs, writes tables to --output."""
  options = flags.FLAGS
  _check_output(options.output, name := pathlib.Path(start.path).stem)
  ratios = infill.parse_ratios(options.infill)
  members = plan_members(start, options.output, options.variants, options.seeds)
  settings = [member.settings for member in members]
  has_law = all(
    laws.law_of_rows(one.data, source)
    for one in settings
    for source in (one.data.source, one.data.eval_source or one.data.source)
  )
  spec = options.judge or (judges.LAW if has_law else '')
  request = compare.parse_request(options, spec)
  judge = compare.make_judge(options, spec)
  compare.check(settings, request, judge)
  output = pathlib.Path(options.output)
  workdirs.make(options.output)
  if not (output / RESULTS).exists():
    workdirs.write(output / RESULTS, workdirs.to_json({'config': name}, 2))
  results, failed, secs = [], [], []
  for i, member in enumerate(members):
    left = statistics.fmean(secs) * (len(members) - i) if secs else 0
    log.info(
      'run %d of %d: %s, seed %d%s',
      i + 1,
      len(members),
      member.variant,
      member.seed,
      f', about {describe_secs(left)} left' if left else '',
    )
    began, is_new = time.monotonic(), not _is_trained(member.start.workdir)
    if is_new:  # What was measured is of another training.
      (member.workdir / workdirs.MEASURED).unlink(missing_ok=True)
    lost = {str(output / name) for name in failed}
    if member.settings.checkpoint.init_from in lost:
      status = 1
    else:
      status = train.main(member.start) if is_new else 0
    if status > 1:
      return status
    result = None
    if not status:
      result = measure(member, request, judge, ratios, options)
    if result is None:
      failed.append(member.workdir.name)
    else:
      results.append(result)
    if not results:
      continue
    # Programs of other networks are of no use to the next run.
    jax.clear_caches()
    if is_new:
      secs.append(time.monotonic() - began)
    summaries = summarize_variants(results)
    table = format_table(summaries, judge)
    if failed:
      table += f'\nLeft out, since training failed: {", ".join(failed)}.'
    workdirs.write(output / 'study.txt', table + '\n')
    value = compare.describe(results, request, judge)
    value |= {'config': name, 'variants': summaries, 'failed': failed}
    workdirs.write(output / RESULTS, workdirs.to_json(value, 2))
    if options.plot:
      panels = compare.make_panels(judge) if request.samplers else {}
      draw = functools.partial(draw_curves, summaries)
      compare.plot_curves(summaries, panels, output / 'study.png', draw)
  if results:
    print((output / 'study.txt').read_text(), end='')
    files = ['study.txt', RESULTS, *['study.png'] * options.plot]
    log.info('written to %s: %s', output, ', '.join(files))
  return bool(failed)
