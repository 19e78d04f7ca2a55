"""Reads workdirs of runs, finished or in progress.

Files may be missing, incomplete or of another shape. `Run.problems` lists what
cannot be read.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import datetime
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

from nanodlm import workdir as workdir_files
from nanodlm.devices import lock
from nanodlm.model import lora
from nanodlm.training import checkpoint, metrics
from nanodlm.training.metrics import is_number
from nanodlm.types import InputError, reason

COMPARISON_FILE = 'comparison.json'

Line = dict[str, Any]
# x, y and half the width of the interval of y, or 0.
Points = list[tuple[float, float, float]]


class Run(NamedTuple):
  """The contents of a workdir.

  Attributes:
    name: the shortest suffix of its path that distinguishes it from other runs.
    config: {'section.key': value}; empty if it cannot be read.
    metrics: {metric: number} with 'step', for each step in order.
    evals: the lines of eval.jsonl.
    samples: the lines of samples.jsonl.
    state: 'finished', 'in progress' or 'stopped', and the time since the last
      write.
    num_params: number of parameters in the last checkpoint, or None; with
      `config.lora` together with the base's.
    problems: files that are missing or cannot be read, and other warnings.
    num_trained: number of those that `config.lora` trains; None without it.
    tokenizer: the files of its tokenizer, to compare; empty if it has none.
  """

  name: str
  config: dict[str, Any]
  metrics: list[dict[str, float]]
  evals: list[Line]
  samples: list[Line]
  state: str
  num_params: int | None
  problems: list[str]
  num_trained: int | None = None
  tokenizer: tuple[bytes, ...] = ()

  @property
  def last_step(self) -> int:
    """The last step with metrics, or 0."""
    return int(self.metrics[-1]['step']) if self.metrics else 0

  @property
  def tokens_per_step(self) -> int:
    """Tokens of a global batch; 0 if the config does not say."""
    size = self.config.get('train.batch_size', 0)
    return size * self.config.get('data.length', 0)

  def curve(self, key: str, scale: int = 1) -> Points:
    """Returns (step * scale, value, half interval), or [] if scale is 0."""
    return [
      (line['step'] * scale, line[key], half_interval(line, key))
      for line in self.metrics
      if scale and key in line
    ]

  def last_line(self, *keys: str) -> dict[str, float]:
    """Returns the last line that has any of the metrics, or {}."""
    found = (line for line in reversed(self.metrics) if line.keys() & keys)
    return next(found, {})


def half_interval(line: Line, key: str) -> float:
  """Returns half the width of a value's interval; 0 if it has none."""
  width = line.get(f'{key}_ci95')
  return width if is_number(width) else 0.0


def _read(path: pathlib.Path, problems: list[str]) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError:
    if path.name in (workdir_files.CONFIG, workdir_files.METRICS):
      problems.append(f'no {path.name}')
  except OSError as error:
    problems.append(f'{path.name} cannot be read ({reason(error)})')
  return b''


def _read_lines(path: pathlib.Path, problems: list[str]) -> list[Line]:
  found, bad = workdir_files.parse_lines(_read(path, problems))
  if bad:
    problems.append(f'{path.name}: lines {bad[:5]} are not JSON objects')
  return found


def _read_config(path: pathlib.Path, problems: list[str]) -> dict[str, Any]:
  flat = {}
  try:
    for name, value in json.loads(_read(path, problems) or '{}').items():
      section = value if isinstance(value, dict) else {}
      flat |= {f'{name}.{key}': each for key, each in section.items()}
      flat |= {} if section else {name: value}
  except (ValueError, AttributeError) as error:
    problems.append(f'{path.name} is not a JSON object ({reason(error)})')
  for key in ('train.num_steps', 'train.batch_size', 'data.length'):
    if key in flat and not is_number(flat[key]):
      problems.append(f'{key}={flat.pop(key)!r} is not a number')
  return flat


def _count_params(
  workdir: pathlib.Path, config: Mapping[str, Any]
) -> tuple[int | None, int | None]:
  """Returns num_params and num_trained of `Run`, from the last checkpoint.

  With mesh.tensor the first includes the padding of the vocabulary.
  """
  folders = workdir.glob(f'{workdir_files.CHECKPOINTS}/*/params')
  by_step = {int(x.parts[-2]): x for x in folders if x.parts[-2].isdigit()}
  try:
    shapes = checkpoint.read_shapes(by_step[max(by_step)])
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None, None
  sizes = {name: math.prod(shape) for name, shape in shapes.items()}
  num = sum(sizes.values()) or None
  if not num or not config.get('lora.rank'):
    return num, None
  origin = pathlib.Path(config.get('checkpoint.init_from', ''))
  other = _read_config(origin / workdir_files.CONFIG, [])
  whole, num_adapters = _count_params(origin, other)
  if whole and num_adapters is None:  # A base, which has none of them yet.
    ends = tuple(f'/{leaf}' for leaf in lora.LEAVES)
    whole += sum(x for name, x in sizes.items() if name.endswith(ends))
  return whole, num


def _find_state(workdir: pathlib.Path, is_complete: bool) -> str:
  is_held = lock.is_held(str(workdir))
  if is_complete and is_held is False:
    return 'finished'
  state = 'in progress' if is_held else 'stopped'
  if is_held is None:
    state = 'in progress or stopped (its lock cannot be read)'
  with contextlib.suppress(OSError):
    age = time.time() - (workdir / workdir_files.METRICS).stat().st_mtime
    state += f', last written {datetime.timedelta(seconds=round(age))} ago'
  return state


def is_run(path: pathlib.Path) -> bool:
  """Returns whether a folder has a file that a run writes at its start."""
  return any(
    (path / name).is_file()
    for name in (workdir_files.CONFIG, workdir_files.METRICS)
  )


def read_run(workdir: pathlib.Path, name: str) -> Run:
  """Reads a workdir."""
  problems = []
  config = _read_config(workdir / workdir_files.CONFIG, problems)
  lines = _read_lines(workdir / workdir_files.METRICS, problems)
  # A value that is not finite is written as null.
  values = [v for line in lines for k, v in line.items() if 'ci95' not in k]
  if None in values:
    problems.append(f'{values.count(None)} values of metrics are not finite')
  for path in sorted(workdir.glob('config.until_step_*.json')):
    step = path.stem.rpartition('_')[2]
    problems.append(f'settings were changed at step {step}')
  num_params, num_trained = _count_params(workdir, config)
  run = Run(
    name,
    config,
    metrics=metrics.join_steps(lines),
    evals=_read_lines(workdir / workdir_files.EVAL, problems),
    samples=_read_lines(workdir / workdir_files.SAMPLES, problems),
    state='',
    num_params=num_params,
    problems=problems,
    num_trained=num_trained,
    tokenizer=tuple(
      path.read_bytes()
      for name in (workdir_files.TOKENIZER, workdir_files.TOKENIZER_MODEL)
      if (path := workdir / name).is_file()
    ),
  )
  is_complete = run.last_step >= config.get('train.num_steps', math.inf)
  return run._replace(state=_find_state(workdir, is_complete))


def short_names(paths: Sequence[str | pathlib.Path]) -> list[str]:
  """Returns the shortest suffixes that distinguish the paths."""
  all_parts = [pathlib.Path(path).absolute().parts for path in paths]
  is_unique = lambda end: sum(p[-len(end) :] == end for p in all_parts) == 1
  names = []
  for parts in all_parts:
    ends = [parts[-size:] for size in range(1, len(parts) + 1)]
    names.append('/'.join(next(filter(is_unique, ends), parts)))
  return names


def read_comparison(path: pathlib.Path) -> dict[str, Any]:
  """Reads the output of --mode=compare, a file or its folder.

  Raises:
    InputError: the file is invalid.
  """
  file = path / COMPARISON_FILE if path.is_dir() else path
  try:
    value = json.loads(file.read_bytes())
    for run in value['runs']:
      _ = pathlib.Path(run['workdir']), run['nll'], value['judge']
      for point in run['points']:
        _ = point['sampler']['name'], (point['num_calls'] or 0) + 0
    # Older versions always had these panels.
    panels = {
      'gen_bits_per_byte': f'bits/byte under {value["judge"]}',
      'sample_entropy': 'entropy of a sample, nats/token',
    }
    value = {'panels': panels, 'remarks': [], **value, 'path': str(file)}
    _ = [text + '' for text in [*value['panels'].values(), *value['remarks']]]
    return value
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f'--compare={str(path)!r} is not a {COMPARISON_FILE} of '
      f'nanodlm.evals.compare: {error!r}'
    ) from error


def find_comparisons(workdirs: Sequence[pathlib.Path]) -> Iterator[Line]:
  """Yields comparisons of these runs from folders next to the workdirs."""
  folders = [workdir.resolve() for workdir in workdirs]
  for parent in dict.fromkeys(folder.parent for folder in folders):
    nested = parent.glob(f'*/{COMPARISON_FILE}')
    for path in sorted([*nested, parent / COMPARISON_FILE]):
      with contextlib.suppress(InputError):
        comparison = read_comparison(path)
        names = {
          pathlib.Path(run['workdir']).name for run in comparison['runs']
        }
        if not names.isdisjoint(folder.name for folder in folders):
          yield comparison
