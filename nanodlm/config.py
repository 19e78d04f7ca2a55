"""Turns a ConfigDict, which is parsed, into Settings: frozen and checked.

A config is consumed here: nothing after `resolve` or `make_settings` takes one.
What each key means is written in configs/base.py.
"""

from collections.abc import Collection, Mapping
import dataclasses
import difflib
import importlib.util
import json
import pathlib
import types
from typing import Any

from ml_collections import config_dict

from nanodlm import workdir as workdirs
from nanodlm.data.config import DataConfig, TokenizerConfig
from nanodlm.devices.mesh import MeshConfig
from nanodlm.training.optim import OptimConfig
from nanodlm.types import check_seed, InputError

# The keys of a section whose readers are classes chosen by its `name`.
Section = Mapping[str, Any]


def _check_at_least(section: Any, name: str, **bounds: int):
  for key, bound in bounds.items():
    if getattr(section, key) < bound:
      raise InputError(
        f'{name}.{key}={getattr(section, key)!r} must be >= {bound}'
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """`config.train`."""

  batches: str
  batch_size: int
  num_steps: int
  num_microbatches: int
  anneal_steps: int
  chunk_size: int
  log_every_steps: int
  eval_every_steps: int
  num_samples: int
  max_skipped_steps: int
  profile_steps: int
  wandb_project: str

  def __post_init__(self):
    at_least_1 = (
      'batch_size',
      'num_steps',
      'num_microbatches',
      'chunk_size',
      'log_every_steps',
      'max_skipped_steps',
    )
    _check_at_least(self, 'train', **dict.fromkeys(at_least_1, 1))
    at_least_0 = 'anneal_steps', 'eval_every_steps', 'num_samples'
    _check_at_least(self, 'train', **dict.fromkeys(at_least_0, 0))
    _check_at_least(self, 'train', profile_steps=0)
    if self.wandb_project and importlib.util.find_spec('wandb') is None:
      raise InputError(
        f'train.wandb_project={self.wandb_project!r} needs the wandb package: '
        "pip install -e '.[wandb]'"
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """`config.eval`."""

  batch_size: int
  num_draws: int
  max_examples: int
  seed: int

  def __post_init__(self):
    _check_at_least(self, 'eval', batch_size=1, num_draws=1, max_examples=0)
    check_seed(self.seed, 'eval.seed')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """`config.checkpoint`."""

  every_steps: int
  max_to_keep: int
  keep_period: int
  init_from: str
  init_step: int

  def __post_init__(self):
    _check_at_least(self, 'checkpoint', every_steps=1, max_to_keep=1)
    _check_at_least(self, 'checkpoint', keep_period=0, init_step=0)
    if self.init_step and not self.init_from:
      raise InputError(
        f'checkpoint.init_step={self.init_step!r} is ignored with '
        "checkpoint.init_from=''; name a workdir there"
      )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The keys of `config.sampler` that say how much to sample."""

  num_samples: int
  length: int
  seed: int

  def __post_init__(self):
    _check_at_least(self, 'sampler', num_samples=1, length=0)
    check_seed(self.seed, 'sampler.seed')


@dataclasses.dataclass(frozen=True)
class Settings:
  """A whole config, checked section by section.

  `model`, `objective` and `sampler` are read-only mappings, since the classes
  that they name decide which keys matter; `run.make_run` builds those.

  Attributes:
    given: keys ('section.key') that the user set by hand. A config file may set
      what another choice would read; a key set by hand must have an effect.
  """

  seed: int
  data: DataConfig
  tokenizer: TokenizerConfig
  model: Section
  objective: Section
  sampler: Section
  optim: OptimConfig
  train: TrainConfig
  eval: EvalConfig
  checkpoint: CheckpointConfig
  mesh: MeshConfig
  given: frozenset[str] = frozenset()

  @property
  def sample(self) -> SampleConfig:
    """How much to sample."""
    return _build(SampleConfig, self.sampler)

  def check_sample(self):
    """Raises InputError unless the keys of `sample` are allowed."""
    _build(SampleConfig, self.sampler)

  @property
  def sample_length(self) -> int:
    """Tokens of a sample."""
    return self.sampler['length'] or self.data.length

  def to_dict(self) -> dict[str, Any]:
    """Returns {section: {key: value}}, the config's content."""
    plain = lambda x: dict(x) if isinstance(x, Mapping) else x
    values = {
      field.name: plain(getattr(self, field.name))
      for field in dataclasses.fields(self)
      if field.name != 'given'
    }
    return {
      key: dataclasses.asdict(value)
      if dataclasses.is_dataclass(value) and not isinstance(value, type)
      else value
      for key, value in values.items()
    }

  def to_json(self) -> str:
    """Returns the config as indented JSON, keys in order."""
    return json.dumps(self.to_dict(), indent=2, sort_keys=True) + '\n'

  def replace(self, **changes: Any) -> 'Settings':
    """Returns the settings with other sections."""
    return dataclasses.replace(self, **changes)


def _build(cls: type, section: Mapping[str, Any] | config_dict.ConfigDict):
  return cls(**{field.name: section[field.name] for field in _fields(cls)})


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
  return dataclasses.fields(cls)


def make_settings(
  config: config_dict.ConfigDict, given: Collection[str] = ()
) -> Settings:
  """Checks every section of a full config.

  Args:
    config: with all keys of configs/base.py.
    given: keys ('section.key') that the user set by hand.

  Raises:
    InputError: naming the key, its value and what is allowed.
  """
  check_seed(config.seed, 'seed')
  for key in 'eval_fraction', 'eval_tokens', 'test_tokens':
    if config.data.eval_source and f'data.{key}' in given:
      raise InputError(
        f'data.{key}={config.data[key]!r} is ignored with data.eval_source='
        f'{config.data.eval_source!r}, all of which is evaluated'
      )
  frozen = lambda section: types.MappingProxyType(section.to_dict())
  settings = Settings(
    seed=config.seed,
    data=_build(DataConfig, config.data),
    tokenizer=_build(TokenizerConfig, config.tokenizer),
    model=frozen(config.model),
    objective=frozen(config.objective),
    sampler=frozen(config.sampler),
    optim=_build(OptimConfig, config.optim),
    train=_build(TrainConfig, config.train),
    eval=_build(EvalConfig, config.eval),
    checkpoint=_build(CheckpointConfig, config.checkpoint),
    mesh=_build(MeshConfig, config.mesh),
    given=frozenset(given),
  )
  settings.check_sample()
  return settings


@dataclasses.dataclass(frozen=True)
class Start:
  """What a command line asks for; parsed, not yet checked.

  Attributes:
    mode: of --mode.
    workdir: of --workdir; '' if it is absent.
    config: of --config, or the defaults, with `changes` applied.
    is_given: whether --config names a file.
    changes: {'section.key': value} of --config.SECTION.KEY=VALUE.
  """

  mode: str
  workdir: str
  config: config_dict.ConfigDict
  is_given: bool
  changes: Mapping[str, Any]

  def check_ignored(self, names: Collection[str]):
    """Raises InputError if a flag among 'config' and 'workdir' is given."""
    flags = [f'workdir={self.workdir!r}'] if self.workdir else []
    flags += ['config'] if self.is_given else []
    flags += [f'config.{key}={value!r}' for key, value in self.changes.items()]
    for flag in flags:
      if flag.startswith(tuple(names)):
        raise InputError(
          f'--{flag} is ignored by --mode={self.mode}; --mode={self.mode} '
          '--help lists the flags that it reads'
        )

  def resolve(self) -> tuple[Settings, dict[str, Any] | None]:
    """Returns the settings, and the config saved in its workdir.

    Without --config they are those saved in the workdir; for a new run with
    checkpoint.init_from, those of the run that it starts from.

    Raises:
      InputError: there is neither, or a value is not allowed.
    """
    saved = read(self.workdir) if self.workdir else None
    source = self.changes.get('checkpoint.init_from')
    config = saved
    if self.is_given:
      config = self.config
    elif saved is None and source:
      config = read(source)
      if config is None:
        raise InputError(
          f'checkpoint.init_from={source!r} is not the folder of a run: it '
          f'lacks {workdirs.CONFIG}'
        )
      config.checkpoint.init_step = 0
      if config.tokenizer.name in ('run', 'sentencepiece'):
        config.tokenizer.update(name='run', path=source, vocab_size=0)
    elif saved is None:
      config = self.config
    was = saved.to_dict() if saved is not None else None
    return make_settings(_changed(config, self.changes), self.changes), was

  def resolve_reading(
    self, reads: tuple[str, ...], unread: Collection[str] = ()
  ) -> Settings:
    """Returns the settings of the run in the workdir, for a mode that reads it.

    Args:
      reads: sections that the mode reads, as 'sampler.': only their keys may be
        changed, and none that the trained network depends on.
      unread: keys of these sections that the mode does not read.

    Raises:
      InputError: the workdir lacks a run, or a change is not allowed.
    """
    if self.is_given:
      raise InputError(
        f'--mode={self.mode} reads its config from --workdir; leave --config '
        'out (--config.SECTION.KEY=VALUE is fine)'
      )
    config = read_run(self.workdir)
    for key, value in sorted(self.changes.items()):
      if key in unread or not key.startswith((*reads, 'train.chunk_size')):
        raise InputError(
          f'--config.{key}={value!r} is ignored by --mode={self.mode}; it '
          f'reads {", ".join(part + "*" for part in reads)}'
        )
      if is_bound(key) and not key.startswith('data.'):
        raise InputError(
          f'--config.{key}={value!r}: the network in --workdir was trained '
          'with its own; it cannot be changed here'
        )
    return make_settings(_changed(config, self.changes), self.changes)


def _changed(config, changes: Mapping[str, Any]) -> config_dict.ConfigDict:
  for key, value in changes.items():
    section, _, leaf = key.rpartition('.')
    set_value(config[section] if section else config, leaf, value, key)
  return config


def read(workdir: str) -> config_dict.ConfigDict | None:
  """Returns the config of the run in `workdir`, or None without one.

  Raises:
    InputError: there are checkpoints without a config, or it is not one.
  """
  path = pathlib.Path(workdir) / workdirs.CONFIG
  if path.is_file():
    return from_json(path.read_bytes(), str(path))
  if (path.parent / workdirs.CHECKPOINTS).exists():
    raise InputError(
      f'workdir={workdir!r} has checkpoints but no {workdirs.CONFIG}; give '
      'another workdir'
    )
  return None


def read_run(workdir: str) -> config_dict.ConfigDict:
  """Returns the config of the run in `workdir`; InputError if there is none."""
  config = read(workdir)
  if config is None:
    raise InputError(
      f'--workdir={workdir!r} is not the folder of a run: it lacks '
      f'{workdirs.CONFIG}'
    )
  return config


# A workdir may be resumed only with the same batches, noise and shape of the
# state. These keys may change between two starts of one run.
FREE_KEYS = frozenset(
  {
    'data.data_dir',
    'data.prefetch_batches',
    'data.num_threads',
    'model.remat',
    'model.unroll',
    'model.attention',
    'model.dtype',
  }
)
BOUND_KEYS = frozenset(
  {'seed', 'train.batch_size', 'train.anneal_steps', 'optim.name'}
)
BOUND_SECTIONS = ('data', 'tokenizer', 'model', 'objective')
# Whether these are zero decides what the optimiser's state holds.
BOUND_SWITCHES = ('optim.ema_decay', 'optim.clip_norm')


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {'section.key': value}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat.update({f'{key}.{k}': v for k, v in flatten(value).items()})
    else:
      flat[key] = value
  return flat


def differing_keys(
  saved: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns {key: (saved, new)} for all keys whose values differ."""
  old, new = flatten(saved), flatten(config)
  return {
    key: (old.get(key), new.get(key))
    for key in sorted(old | new)
    if old.get(key) != new.get(key)
  }


def is_bound(key: str) -> bool:
  """Returns whether a run cannot be resumed with another value of this key."""
  if key in FREE_KEYS:
    return False
  return key in BOUND_KEYS or key.split('.')[0] in BOUND_SECTIONS


def check_resumable(saved: Mapping[str, Any], settings: Settings, workdir: str):
  """Raises InputError if `settings` cannot resume the run in `workdir`."""
  bound = {
    key: values
    for key, values in differing_keys(saved, settings.to_dict()).items()
    if is_bound(key)
    or key in BOUND_SWITCHES
    and bool(values[0]) != bool(values[1])
  }
  if bound:
    lines = [
      f'  {key}: {old!r} there, {new!r} here'
      for key, (old, new) in bound.items()
    ]
    raise InputError(
      f'workdir={workdir!r} holds a run with other settings:\n'
      + '\n'.join(lines)
      + '\nUse the same settings to resume it, or another workdir'
    )


def find_file(name: str) -> pathlib.Path:
  """Returns the path of a config that comes with the project, as 'tiny'."""
  package = pathlib.Path(__file__).parent
  folder = package / 'configs'  # In an installed wheel.
  if not folder.is_dir():
    folder = package.parent / 'configs'
  return folder / f'{name}.py'


def load(name: str = 'base') -> config_dict.ConfigDict:
  """Returns a config that comes with the project; by default all defaults."""
  path = find_file(name)
  spec = importlib.util.spec_from_file_location(f'nanodlm_config_{name}', path)
  if spec is None or spec.loader is None or not path.is_file():
    raise InputError(f'the config {str(path)!r} does not exist')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def from_json(text: str | bytes, where: str) -> config_dict.ConfigDict:
  """Returns a saved config; keys that it lacks take their defaults.

  Raises:
    InputError: not a config, a key that this version does not know, or a value
      of another type than its default.
  """
  try:
    saved = json.loads(text)
  # Bytes that are not UTF-8, not JSON, or thousands of brackets.
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where} is not JSON: {error}') from error
  if not isinstance(saved, dict):
    raise InputError(f'{where} is not a config but {type(saved).__name__}')
  config = load()
  for section, value in saved.items():
    if section not in config:
      raise InputError(
        f'{where}: unknown section {section!r}; known: {sorted(config)}'
      )
    if not (
      isinstance(value, dict)
      and isinstance(config[section], config_dict.ConfigDict)
    ):
      set_value(config, section, value, f'{where}: {section}')
      continue
    for key, leaf in value.items():
      if key not in config[section]:
        raise InputError(
          f'{where}: unknown key {section}.{key}'
          + suggest(key, config[section])
        )
      set_value(config[section], key, leaf, f'{where}: {section}.{key}')
  return config


def set_value(section: Any, key: str, value: Any, name: str):
  """Sets a key; InputError with its `name` if the value's type is wrong."""
  try:
    # ml_collections would accept None for any type, and True for a number.
    kinds = {type(value), type(section[key])}
    if len(kinds) > 1 and kinds & {type(None), bool}:
      raise TypeError(f'{name} is {value!r}')
    section[key] = value
  except TypeError as error:
    raise InputError(
      f'{name}={value!r} is not of type {type(section[key]).__name__}'
    ) from error


def suggest(key: str, known) -> str:
  """Returns '; did you mean ...?', or the known keys."""
  close = difflib.get_close_matches(key, list(known), n=1)
  return (
    f'; did you mean {close[0]!r}?' if close else f'; known: {sorted(known)}'
  )


def unknown_key(path: str) -> str:
  """Returns what is wrong with 'section.key', '' if there is such a key."""
  base: Any = load()
  sections = {
    name: part for name, part in base.items() if hasattr(part, 'keys')
  }
  section, _, key = path.rpartition('.')
  if section and section not in sections:
    return f'unknown section {section!r}{suggest(section, sections)}'
  known = sections[section] if section else base
  if key in known:
    return ''
  others = [
    f'config.{name}.{key}' for name, part in sections.items() if key in part
  ]
  if others:
    return f'unknown key; did you mean {" or ".join(others)}?'
  return f'unknown key{suggest(key, known)}'
