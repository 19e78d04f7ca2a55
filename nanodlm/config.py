"""Turns a ConfigDict, which is parsed, into Settings: frozen and checked.

A config is consumed here: nothing after `resolve` or `make_settings` takes one.
What each key means is written in configs/base.py.
"""

from collections.abc import Collection, Mapping
import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import runpy
import types
from typing import Any

from flax import traverse_util
from ml_collections import config_dict

from nanodlm import workdir as workdirs
from nanodlm.data import sources
from nanodlm.data.config import DataConfig, TokenizerConfig
from nanodlm.devices.mesh import MeshConfig
from nanodlm.training.optim import OptimConfig
from nanodlm.types import check_at_least, check_seed, InputError, reason

# The keys of a section whose readers are classes chosen by its `name`.
Section = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """`config.train`."""

  batches: str
  reward: str
  reward_secs: float
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
    sizes = 'batch_size', 'num_steps', 'num_microbatches', 'chunk_size'
    check_at_least(1, self, 'train', *sizes)
    check_at_least(1, self, 'train', 'log_every_steps', 'max_skipped_steps')
    counts = 'anneal_steps', 'eval_every_steps', 'num_samples', 'profile_steps'
    check_at_least(0, self, 'train', *counts)
    if not self.reward_secs > 0:
      raise InputError(f'train.reward_secs={self.reward_secs!r} must be > 0')
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
    check_at_least(1, self, 'eval', 'batch_size', 'num_draws')
    check_at_least(0, self, 'eval', 'max_examples')
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
    check_at_least(1, self, 'checkpoint', 'every_steps', 'max_to_keep')
    check_at_least(0, self, 'checkpoint', 'keep_period', 'init_step')
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
    check_at_least(1, self, 'sampler', 'num_samples')
    check_at_least(0, self, 'sampler', 'length')
    check_seed(self.seed, 'sampler.seed')


SAMPLE_KEYS = tuple(field.name for field in dataclasses.fields(SampleConfig))
# The keys of `config.sampler` that do not depend on the sampler.
EVERY_SAMPLER = (*SAMPLE_KEYS, 'stop_at_eos')


@dataclasses.dataclass(frozen=True)
class Settings:
  """A whole config, checked section by section.

  `model`, `objective`, `distill`, `policy`, `sampler` and `lora` are read-only
  mappings, since the classes that they name decide which keys matter;
  `run.make_run` builds those.

  Attributes:
    given: keys ('section.key') that the user set by hand. A config file may set
      what another choice would read; a key set by hand must have an effect.
  """

  seed: int
  data: DataConfig
  tokenizer: TokenizerConfig
  model: Section
  objective: Section
  distill: Section
  policy: Section
  sampler: Section
  lora: Section
  optim: OptimConfig
  train: TrainConfig
  eval: EvalConfig
  checkpoint: CheckpointConfig
  mesh: MeshConfig
  given: frozenset[str] = frozenset()

  def __post_init__(self):
    check_seed(self.seed, 'seed')
    _ = self.sample  # Checks its keys.
    self.optim.check_steps(self.train.num_steps)

  @property
  def sample(self) -> SampleConfig:
    """How much to sample."""
    return SampleConfig(**{key: self.sampler[key] for key in SAMPLE_KEYS})

  @property
  def sample_length(self) -> int:
    """Tokens of a sample."""
    return self.sampler['length'] or self.data.length

  def to_dict(self) -> dict[str, Any]:
    """Returns {section: {key: value}}, the config's content."""
    plain = lambda x: dict(x) if isinstance(x, Mapping) else vars(x).copy()
    sections = {
      field.name: plain(getattr(self, field.name))
      for field in dataclasses.fields(self)
      if field.name not in ('seed', 'given')
    }
    return {'seed': self.seed, **sections}

  def to_json(self) -> str:
    """Returns the config as indented JSON, keys in order."""
    return json.dumps(self.to_dict(), indent=2, sort_keys=True) + '\n'


def make_settings(config: Any, given: Collection[str] = ()) -> Settings:
  """Checks every section of a full config.

  Args:
    config: a ConfigDict with all keys of configs/base.py.
    given: keys ('section.key') that the user set by hand.

  Raises:
    InputError: naming the key, its value and what is allowed.
  """
  for key in 'eval_fraction', 'eval_tokens', 'test_tokens':
    value = config.data[key]
    if config.data.eval_source and f'data.{key}' in given and value:
      raise InputError(
        f'data.{key}={value!r} is ignored with data.eval_source='
        f'{config.data.eval_source!r}, all of which is evaluated'
      )
  saved = dict(config.checkpoint)
  if config.lora.rank and saved['init_from']:
    # Adapters are useless without their base, wherever they are loaded.
    saved['init_from'] = os.path.abspath(saved['init_from'])
  frozen = lambda section: types.MappingProxyType(section.to_dict())
  return Settings(
    seed=config.seed,
    data=DataConfig(**config.data),
    tokenizer=TokenizerConfig(**config.tokenizer),
    model=frozen(config.model),
    objective=frozen(config.objective),
    distill=frozen(config.distill),
    policy=frozen(config.policy),
    sampler=frozen(config.sampler),
    lora=frozen(config.lora),
    optim=OptimConfig(**config.optim),
    train=TrainConfig(**config.train),
    eval=EvalConfig(**config.eval),
    checkpoint=CheckpointConfig(**saved),
    mesh=MeshConfig(**config.mesh),
    given=frozenset(given),
  )


@dataclasses.dataclass(frozen=True)
class Start:
  """What a command line asks for; parsed, not yet checked.

  Attributes:
    mode: value of --mode.
    workdir: value of --workdir; '' if it is absent.
    config: config in --config, or the defaults, with `changes` applied.
    is_given: whether --config names a file.
    changes: {'section.key': value} from --config.SECTION.KEY=VALUE.
    path: the file in --config, perhaps with a colon and a variant's name.
  """

  mode: str
  workdir: str
  config: config_dict.ConfigDict
  is_given: bool
  changes: Mapping[str, Any]
  path: str = ''

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
    was = saved.to_dict() if saved is not None else None
    config: Any = self.config
    if saved is not None and not self.is_given:
      config = saved
    elif source and not self.is_given:
      config = start_from(source)
    return self._settings(config), was

  def resolve_reading(
    self, reads: tuple[str, ...], unread: Collection[str] = ()
  ) -> Settings:
    """Returns the settings of the run in the workdir, for a mode that reads it.

    Args:
      reads: sections that the mode reads, such as 'sampler.': only their keys
        may be changed, and none that the trained network depends on.
      unread: keys of these sections that the mode does not read.

    Raises:
      InputError: the workdir lacks a run, or a change is not allowed.
    """
    if self.is_given:
      raise InputError(
        f'--mode={self.mode} reads its config from --workdir; leave --config '
        'out (--config.SECTION.KEY=VALUE is fine)'
      )
    config: Any = read_run(self.workdir)
    if 'data.source' in self.changes:
      set_source(config.data, self.changes['data.source'], self.changes)
    for key, value in sorted(self.changes.items()):
      if key == 'checkpoint.init_from' and config.lora.rank:
        continue  # The base of the adapters may have moved.
      if key in unread or not key.startswith((*reads, 'train.chunk_size')):
        own = ', '.join(part + '*' * part.endswith('.') for part in reads)
        own += f', without {", ".join(unread)}' if key in unread else ''
        raise InputError(
          f'--config.{key}={value!r} is ignored by --mode={self.mode}; it '
          f'reads {own}'
        )
      if is_bound(key) and not key.startswith(('data.', 'tokenizer.chat_')):
        raise InputError(
          f'--config.{key}={value!r}: the network in --workdir was trained '
          'with its own; it cannot be changed here'
        )
    return self._settings(config)

  def _settings(self, config: config_dict.ConfigDict) -> Settings:
    for key, value in self.changes.items():
      set_value(config, key, value)
    return make_settings(config, self.changes)


def set_source(data: Any, source: str, changes: Collection[str] = ()):
  """Sets `config.data` of a run to read another source.

  Settings that this source may not allow are reset, unless they are among the
  `changes` that are made next. So are random crops, data.clean_prefix_rate and
  data.clean_infill_rate, since only training reads them.
  """
  data.source = source
  if data.crop == 'random':
    data.crop = 'chunk'
  data.update(clean_prefix_rate=0.0, clean_infill_rate=0.0)
  cls = sources.find_class(source)
  if data.crop != 'document' and not (cls.is_pairs or cls.is_chat):
    data.update(padding='eos', long_documents='drop')
  if data.eval_source and 'data.eval_source' not in changes:
    data.eval_source = ''
    if not (data.eval_tokens or 'data.eval_tokens' in changes):
      # It may be 0 with an eval_source.
      defaults: Any = load().data
      data.eval_fraction = data.eval_fraction or defaults.eval_fraction


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


def read_run(workdir: str, key: str = 'workdir') -> config_dict.ConfigDict:
  """Returns the config of the run in `workdir`; InputError if there is none."""
  config = read(workdir)
  if config is None:
    problem = 'does not exist'
    if pathlib.Path(workdir).is_dir():
      problem = f'is not the folder of a run: it lacks {workdirs.CONFIG}'
    raise InputError(f'{key}={workdir!r} {problem}')
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
  {
    'seed',
    'train.reward',
    'train.batch_size',
    'train.anneal_steps',
    'optim.name',
  }
)
BOUND_SECTIONS = (
  'data',
  'tokenizer',
  'model',
  'lora',
  'objective',
  'distill',
  'policy',
)
# Whether these are zero decides what the optimiser's state holds.
BOUND_SWITCHES = ('optim.ema_decay', 'optim.clip_norm')


def start_from(workdir: str) -> config_dict.ConfigDict:
  """Returns the config of a new run that starts from the one in `workdir`.

  Raises:
    InputError: `workdir` lacks a run.
  """
  config: Any = read_run(workdir, 'checkpoint.init_from')
  config.checkpoint.update(init_from=workdir, init_step=0)
  # How the other run was trained is not how this one is.
  config.distill.name = config.policy.name = config.train.reward = ''
  config.train.batches, config.objective.curriculum_steps = 'auto', 0
  config.train.anneal_steps = config.train.profile_steps = 0
  config.optim.decay_from_step = 0
  if config.tokenizer.name in ('run', 'sentencepiece'):
    config.tokenizer.update(name='run', path=workdir, vocab_size=0)
  return config


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {'section.key': value}."""
  return traverse_util.flatten_dict(config, sep='.')


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
  lines = [
    f'  {key}: {old!r} saved, {new!r} now'
    for key, (old, new) in differing_keys(saved, settings.to_dict()).items()
    if is_bound(key) or key in BOUND_SWITCHES and bool(old) != bool(new)
  ]
  if lines:
    raise InputError(
      f'workdir={workdir!r} holds a run with different settings:\n'
      + '\n'.join(lines)
      + '\nUse the same settings to resume it, or another workdir'
    )


def find_file(name: str) -> pathlib.Path:
  """Returns the path of a config that comes with the project, e.g. 'tiny'."""
  package = pathlib.Path(__file__).parent
  folder = package / 'configs'  # In an installed wheel.
  if not folder.is_dir():
    folder = package.parent / 'configs'
  return folder / f'{name}.py'


def load(name: str = 'base') -> config_dict.ConfigDict:
  """Returns a config that comes with the project; by default all defaults."""
  return runpy.run_path(str(find_file(name)))['get_config']()


def from_json(text: str | bytes, where: str) -> config_dict.ConfigDict:
  """Returns a saved config; keys that it lacks take their defaults.

  Raises:
    InputError: not a config, a key that this version does not know, or a value
      of a type that differs from its default's.
  """
  try:
    saved = json.loads(text)
  # Bytes that are not UTF-8, not JSON, or thousands of brackets.
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where} is not JSON: {reason(error)}') from error
  if not isinstance(saved, dict):
    raise InputError(f'{where} is not a JSON object but {type(saved).__name__}')
  if {'model_type', 'architectures'} & set(saved):
    raise InputError(
      f'{where} is that of an export or a published checkpoint, not of a run: '
      'make a run of its folder with --mode=import --from=FOLDER '
      '--workdir=NEW_FOLDER'
    )
  config = load()
  for section, value in saved.items():
    leaves = {section: value}
    is_section = section in config and hasattr(config[section], 'keys')
    if is_section and isinstance(value, dict):
      leaves = {f'{section}.{key}': leaf for key, leaf in value.items()}
    for key, leaf in leaves.items():
      set_value(config, key, leaf, f'{where}: {key}')
  return config


def set_value(config: Any, path: str, value: Any, name: str = ''):
  """Sets a key or 'section.key'; an InputError calls it by its `name`."""
  name = name or path
  if problem := unknown_key(path, config):
    raise InputError(f'{name}: {problem}')
  section, _, key = path.rpartition('.')
  part = config[section] if section else config
  try:
    # ml_collections would accept None for any type, and True for a number.
    kinds = {type(value), type(part[key])}
    if len(kinds) > 1 and kinds & {type(None), bool}:
      raise TypeError(f'{name} is {value!r}')
    part[key] = value
  except TypeError as error:
    raise InputError(
      f'{name}={value!r} is not of type {type(part[key]).__name__}'
    ) from error


def vary(
  config: Any, variants: Mapping[str, Mapping[str, Any]], name: str
) -> Any:
  """Changes a config to one of its file's variants, and returns it.

  Args:
    config: a ConfigDict.
    variants: {name: {'section.key': value}}.
    name: the variant.

  Raises:
    InputError: there is no such variant, key or type of value.
  """
  if name not in variants:
    raise InputError(
      f'the config lacks a variant {name!r}{suggest(name, variants)}'
    )
  for key, value in variants[name].items():
    set_value(config, key, value)
  return config


def set_start(config: Any, workdir: str):
  """Makes a config start from a run's weights, with its tokenizer.

  Both paths are a single reference, so that --config.checkpoint.init_from=OTHER
  also changes the tokenizer.
  """
  start = config_dict.FieldReference(workdir)
  config.checkpoint.init_from = config.tokenizer.path = start
  config.tokenizer.name = 'run'
  config.tokenizer.vocab_size = 0


def suggest(key: str, known) -> str:
  """Returns '; did you mean ...?', or the known keys."""
  return closest(key, known) or f'; known: {sorted(known)}'


def closest(name: str, known) -> str:
  """Returns '; did you mean ...?', or '' if no name is close."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f'; did you mean {close[0]!r}?' if close else ''


def settings_named(key: str, config: Any) -> list[str]:
  """Returns 'config.section.key' for each section that has the key."""
  return [
    f'config.{name}.{key}'
    for name, part in config.items()
    if hasattr(part, 'keys') and key in part
  ]


def unknown_key(path: str, config: Any) -> str:
  """Returns what is wrong with 'section.key', '' if there is such a key."""
  sections = {k: part for k, part in config.items() if hasattr(part, 'keys')}
  section, _, key = path.rpartition('.')
  if section and section not in sections:
    return f'unknown section {section!r}{suggest(section, sections)}'
  known = sections[section] if section else config
  if key in known:
    return ''
  if others := settings_named(key, config):
    return f'unknown key; did you mean {" or ".join(others)}?'
  return f'unknown key{suggest(key, known)}'
