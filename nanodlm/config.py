"""From a ConfigDict to the frozen values that the code runs on, checked."""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
from typing import Any, Collection

from ml_collections import config_dict

from nanodlm import objectives, samplers, types
from nanodlm.data import sources
from nanodlm.devices import mesh, sharding
from nanodlm.model import transformer
from nanodlm.model.config import ModelConfig
from nanodlm.noise import categorical, schedules, times
from nanodlm.samplers import block, guidance
from nanodlm.training import optim
from nanodlm.types import InputError, Objective, Sampler


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """`config.data`; the keys' meaning stands in configs/base.py."""

  source: str
  length: int
  eval_fraction: float
  eval_tokens: int
  test_tokens: int
  data_dir: str
  crop: str
  segment_ids: bool
  padding: str
  clean_prefix_rate: float
  clean_infill_rate: float
  prefetch_batches: int
  num_threads: int

  @property
  def is_pairs(self) -> bool:
    """Whether the rows are prompts with responses."""
    return self.source.startswith(sources.PAIRS)

  def __post_init__(self):
    _check_at_least(self, 'data', length=2, prefetch_batches=1, num_threads=1)
    if self.crop not in ('chunk', 'random'):
      raise InputError(
        f"data.crop={self.crop!r} is not one of ['chunk', 'random']"
      )
    sources.check_held_out(self)
    if self.source.startswith(sources.MIX):
      sources.parse_mixture(self.source)
    if self.padding not in ('eos', 'masked'):
      raise InputError(
        f"data.padding={self.padding!r} is not one of ['eos', 'masked']"
      )
    rates = ('clean_prefix_rate', 'clean_infill_rate')
    for key in rates:
      if not 0 <= getattr(self, key) <= 1:
        raise InputError(f'data.{key}={getattr(self, key)!r} must be in [0, 1]')
    if self.clean_prefix_rate + self.clean_infill_rate > 1:
      raise InputError(
        f'data.clean_prefix_rate={self.clean_prefix_rate!r} and '
        f'data.clean_infill_rate={self.clean_infill_rate!r} may not add up '
        'to more than 1'
      )
    if self.clean_infill_rate and self.length < 3:
      raise InputError(
        f'data.clean_infill_rate={self.clean_infill_rate!r} needs '
        f'data.length of at least 3, not {self.length!r}'
      )
    if not self.is_pairs and self.padding != 'eos':
      raise InputError(
        f'data.padding={self.padding!r} has no effect with '
        f"data.source={self.source!r}, only with 'pairs:...'"
      )
    for key in ('segment_ids', *rates):
      if self.is_pairs and getattr(self, key):
        raise InputError(
          f'data.{key}={getattr(self, key)!r} is not for data.source='
          f'{self.source!r}: a row is one pair, given its prompt'
        )
    if self.is_pairs and self.crop != 'chunk':
      raise InputError(
        f"data.crop={self.crop!r} must be 'chunk' with data.source="
        f'{self.source!r}: a window would begin inside one pair'
      )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """`config.tokenizer`."""

  name: str
  path: str
  vocab_size: int

  def __post_init__(self):
    is_trained = self.name == 'sentencepiece' and not self.path
    if self.path and self.name not in ('sentencepiece', 'run'):
      raise InputError(
        f'tokenizer.path={self.path!r} has no effect with '
        f'tokenizer.name={self.name!r}, only with '
        "'sentencepiece' and 'run'"
      )
    if self.name == 'run' and not self.path:
      raise InputError(
        "tokenizer.path='' must be the workdir of a run with "
        "tokenizer.name='run'"
      )
    if self.vocab_size and not is_trained:
      raise InputError(
        f'tokenizer.vocab_size={self.vocab_size!r} has no effect with '
        f'tokenizer.name={self.name!r}, tokenizer.path={self.path!r}: it is the '
        'size of a SentencePiece model trained on the source; leave it at 0'
      )
    if is_trained and self.vocab_size < 257:
      raise InputError(
        f'tokenizer.vocab_size={self.vocab_size!r}: a SentencePiece model '
        'trained on the source needs at least 257 pieces (2048, say); or name a '
        'model in tokenizer.path'
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """`config.train`."""

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
    _check_at_least(
      self,
      'train',
      batch_size=1,
      num_steps=1,
      num_microbatches=1,
      anneal_steps=0,
      chunk_size=1,
      log_every_steps=1,
      eval_every_steps=0,
      num_samples=0,
      max_skipped_steps=1,
      profile_steps=0,
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


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """`config.checkpoint`."""

  every_steps: int
  max_to_keep: int
  keep_period: int
  init_from: str
  init_step: int

  def __post_init__(self):
    _check_at_least(
      self,
      'checkpoint',
      every_steps=1,
      max_to_keep=1,
      keep_period=0,
      init_step=0,
    )
    if self.init_step and not self.init_from:
      raise InputError(
        f'checkpoint.init_step={self.init_step!r} has no effect '
        "with checkpoint.init_from=''; name a workdir there"
      )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """What `config.sampler` says beside the sampler itself."""

  num_samples: int
  length: int
  seed: int

  def __post_init__(self):
    _check_at_least(self, 'sampler', num_samples=1, length=0)


@dataclasses.dataclass(frozen=True)
class Settings:
  """A whole config, checked; what depends on the tokenizer is made later."""

  seed: int
  data: DataConfig
  tokenizer: TokenizerConfig
  optim: optim.OptimConfig
  train: TrainConfig
  eval: EvalConfig
  checkpoint: CheckpointConfig
  sample: SampleConfig
  mesh: mesh.MeshConfig


def _check_at_least(section: Any, name: str, **bounds: int):
  for key, bound in bounds.items():
    if getattr(section, key) < bound:
      raise InputError(
        f'{name}.{key}={getattr(section, key)!r} must be >= {bound}'
      )


def _build(cls: type, section: config_dict.ConfigDict, **given: Any):
  """cls from the section's values of its fields, and `given` ones."""
  names = [field.name for field in dataclasses.fields(cls)]
  values = {
    name: section[name]
    for name in names
    if name not in given and name in section
  }
  return cls(**values, **given)


def validate(
  config: config_dict.ConfigDict,
  given: Collection[str] = (),
  platform: str = '',
) -> Settings:
  """Checks every section, and the rules that cross sections.

  Args:
    config: a full config.
    given: keys ('section.key') that the user set by hand: each of them must be
      read by the chosen objective, sampler or optimiser. (One that a config file
      sets may belong to another choice.)
    platform: that the run is for; see `model.ModelConfig`.

  Returns:
    The settings.

  Raises:
    InputError: naming the key, its value and what is allowed.
  """
  if not 0 <= config.seed < 2**32:
    raise InputError(f'seed={config.seed!r} must be in [0, 2^32)')
  settings = Settings(
    seed=config.seed,
    data=_build(DataConfig, config.data),
    tokenizer=_build(TokenizerConfig, config.tokenizer),
    optim=_build(optim.OptimConfig, config.optim),
    train=_build(TrainConfig, config.train),
    eval=_build(EvalConfig, config.eval),
    checkpoint=_build(CheckpointConfig, config.checkpoint),
    sample=_build(SampleConfig, config.sampler),
    mesh=make_mesh_config(config),
  )
  # With a stand-in vocabulary: the tokenizer may not exist yet.
  objective = make_objective(config, mask_id=1)
  if settings.data.clean_infill_rate and not types.sees_right(
    objective, settings.data.length
  ):
    raise InputError(
      f'data.clean_infill_rate={settings.data.clean_infill_rate!r} is not '
      f'for objective.name={config.objective.name!r}, which sees nothing to '
      'the right of a gap; data.clean_prefix_rate is'
    )
  network = make_model(config, 2, platform)
  for key, length in (
    ('data', settings.data.length),
    ('sampler', settings.sample.length),
  ):
    if length:
      transformer.check_shards(network, sharding.Shards(), length)
    if 0 < network.num_positions < length:
      raise InputError(
        f'{key}.length={length!r} must be at most '
        f'model.num_positions={network.num_positions!r}'
      )
  if settings.train.anneal_steps and (objective.causal or objective.block_size):
    raise InputError(
      f'train.anneal_steps={settings.train.anneal_steps!r} has no effect with '
      f'objective.name={config.objective.name!r}, only where the network sees '
      'the whole text'
    )
  if settings.train.anneal_steps and network.attention not in ('auto', 'xla'):
    raise InputError(
      f'model.attention={network.attention!r} does not know the pattern of '
      f"train.anneal_steps={settings.train.anneal_steps!r}; 'auto' and 'xla' do"
    )
  make_sampler(config, mask_id=1)
  reads = {
    'objective': _objective_reads(config, objective),
    'sampler': _sampler_reads(config, objective.block_size),
    'optim': optim.reads(config.optim.name, config.optim.schedule),
  }
  for key in sorted(given):
    _check_read(key, config, reads)
  objective.max_scored(objective.group_size, settings.data.length)  # or raises
  shared = objective.evaluation().group_size
  if settings.eval.num_draws % shared:
    raise InputError(
      f'eval.num_draws={settings.eval.num_draws!r} must be a '
      f'multiple of {shared} with this objective'
    )
  if settings.train.batch_size % objective.group_size:
    raise InputError(
      f'train.batch_size={settings.train.batch_size!r} must be a multiple of '
      f'{objective.group_size}: objective.noise={objective.noise!r} '
      'draws noise for pairs of examples'
    )
  if objective.needs_time and not network.knows_time:
    key = 'time_form' if config.model.time_conditioning else 'time_conditioning'
    wanted = "another than 'constant'" if key == 'time_form' else 'True'
    raise InputError(
      f'model.{key}={config.model[key]!r} must be {wanted} with objective.name='
      f'{config.objective.name!r}: nothing in its noisy text tells how noisy it '
      'is'
    )
  return settings


def _reads(cls: type) -> set[str]:
  names = {field.name for field in dataclasses.fields(cls)}
  return names | ({'power'} if 'schedule' in names else set())


def _objective_reads(config, objective) -> set[str]:
  names = _reads(type(objective))
  walks = 'rule' in _reads(samplers.SAMPLERS[sampler_name(config)])
  if (
    'noise' in names
    and objective.noise == 'count'
    and not walks
    and (not config.model.time_conditioning)
  ):
    names -= {'schedule', 'power'}  # a count has no time
  if config.objective.schedule != 'polynomial':
    names -= {'power'}
  return names


def _sampler_reads(config, block_size) -> set[str]:
  names = _reads(samplers.SAMPLERS[sampler_name(config)])
  if 'inner' in names:
    names |= _reads(samplers.SAMPLERS[config.sampler.inner])
  if config.sampler.schedule != 'polynomial':
    names -= {'power'}
  if 'grid' in names and times.is_listed(config.sampler.grid):
    names -= {'num_steps'}
  if block_size:  # the objective's
    names -= {'block_size'}
  names |= {
    'num_samples',
    'length',
    'seed',
    'temperature',
    'top_k',
    'top_p',
    'guidance',
  }
  return names | ({'stop_at_eos'} if 'eos_id' in names else set())


def reads_steps(config: config_dict.ConfigDict) -> bool:
  """Whether the sampler of a valid config reads sampler.num_steps."""
  block_size = make_objective(config, mask_id=1).block_size
  return 'num_steps' in _sampler_reads(config, block_size)


def _check_read(key: str, config, reads: dict[str, set[str]]):
  section, _, leaf = key.partition('.')
  if section not in reads or leaf == 'name' or leaf in reads[section]:
    return
  name = sampler_name(config) if section == 'sampler' else config[section].name
  used = sorted(k for k in config[section] if k in reads[section])
  raise InputError(
    f'{key}={config[section][leaf]!r} has no effect with {section}.name='
    f'{name!r} and the other settings as they are; {used} have'
  )


def make_mesh_config(config: config_dict.ConfigDict) -> mesh.MeshConfig:
  """The checked sizes of `config.mesh`."""
  return _build(mesh.MeshConfig, config.mesh)


def make_objective(config: config_dict.ConfigDict, mask_id: int) -> Objective:
  """The training objective of `config.objective`."""
  section = config.objective
  if section.name not in objectives.OBJECTIVES:
    raise InputError(
      f'objective.name={section.name!r} is not one of '
      f'{sorted(objectives.OBJECTIVES)}'
    )
  cls = objectives.OBJECTIVES[section.name]
  given = {}
  if 'schedule' in _reads(cls):
    given['schedule'] = schedules.make_schedule(section.schedule, section.power)
  if 'noise' in _reads(cls) and section.noise == 'auto':
    given['noise'] = cls.noises[0]
  return _build(cls, section, mask_id=mask_id, **given)


def make_model(
  config: config_dict.ConfigDict, vocab_size: int, platform: str = ''
) -> ModelConfig:
  """The network's shape, causal where the objective is."""
  objective = make_objective(config, vocab_size - 1)
  return _build(
    ModelConfig,
    config.model,
    vocab_size=vocab_size,
    causal=objective.causal,
    block_size=objective.block_size,
    platform=platform,
  )


def sampler_name(config: config_dict.ConfigDict) -> str:
  """`config.sampler.name`, with 'auto' resolved by the objective."""
  if config.sampler.name == 'auto':
    return samplers.DEFAULTS[config.objective.name]
  return config.sampler.name


def fitting_samplers(objective_name: str) -> list[str]:
  """The samplers that can be used with an objective's network."""
  return [
    name
    for name in sorted(samplers.SAMPLERS)
    if objective_name in samplers.FITS[name]
  ]


def make_sampler(
  config: config_dict.ConfigDict, mask_id: int, separator_id: int = block.NO_EOS
) -> Sampler:
  """The sampler of `config.sampler`, which must fit the objective.

  A sampler's field `rule` gets the objective itself, `inner` the sampler of a
  block, `eos_id` the separator where sampler.stop_at_eos is set.
  """
  name = sampler_name(config)
  if name not in samplers.SAMPLERS:
    raise InputError(
      f'sampler.name={name!r} is not one of '
      f'{["auto", *sorted(samplers.SAMPLERS)]}'
    )
  if config.objective.name not in samplers.FITS[name]:
    raise InputError(
      f'sampler.name={name!r} does not fit objective.name='
      f'{config.objective.name!r}; these do: '
      f'{fitting_samplers(config.objective.name)}'
    )
  given = {'mask_id': mask_id, 'eos_id': block.NO_EOS}
  if config.sampler.stop_at_eos:
    given['eos_id'] = separator_id
  objective = make_objective(config, mask_id)
  if objective.block_size:
    given['block_size'] = objective.block_size
  sampler = _make_sampler(name, config, objective, given)
  if name == 'prefix_cache' and config.model.shift_outputs:
    raise InputError(
      "sampler.name='prefix_cache' does not fit model.shift_outputs="
      'True, whose first output of a block is read before it'
    )
  strength = config.sampler.guidance
  if not strength:
    return sampler
  if name not in samplers.GUIDED:
    raise InputError(
      f'sampler.guidance={strength!r} does not fit sampler.name={name!r}, whose '
      'network knows no masks in place of a prompt; these do: '
      f'{sorted(samplers.GUIDED)}'
    )
  return guidance.Guided(sampler, strength, mask_id)


def _make_sampler(name: str, config, objective: Objective, given) -> Sampler:
  section, cls = config.sampler, samplers.SAMPLERS[name]
  reads = _reads(cls)
  given = {key: value for key, value in given.items() if key in reads}
  if 'draw' in reads:
    given['draw'] = _build(categorical.Draw, section, mask_id=objective.mask_id)
  if 'schedule' in reads:
    given['schedule'] = schedules.make_schedule(
      section.schedule, section.power, 'sampler'
    )
  if 'rule' in reads:
    given['rule'] = objective
  if 'inner' in reads:
    if section.inner not in samplers.INNER:
      raise InputError(
        f'sampler.inner={section.inner!r} is not one of '
        f'{sorted(samplers.INNER)}'
      )
    given['inner'] = _make_sampler(section.inner, config, objective, {})
  return _build(cls, section, **given)


# What decides the batches, the noise and the shape of the state: a workdir goes
# on only with the same. These keys may change between two starts of one run.
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
# Zero or not decides what the optimiser's state holds.
BOUND_SWITCHES = ('optim.ema_decay', 'optim.clip_norm')


def flatten(config: config_dict.ConfigDict) -> dict[str, Any]:
  """{'section.key': value}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      flat.update({f'{key}.{k}': v for k, v in flatten(value).items()})
    else:
      flat[key] = value
  return flat


def differing_keys(
  saved: config_dict.ConfigDict, config: config_dict.ConfigDict
) -> dict[str, tuple[Any, Any]]:
  """{key: (saved, new)} for all keys whose values differ."""
  old, new = flatten(saved), flatten(config)
  return {
    key: (old.get(key), new.get(key))
    for key in sorted(old | new)
    if old.get(key) != new.get(key)
  }


def is_bound(key: str) -> bool:
  """Whether a run cannot go on with another value of this key."""
  if key in FREE_KEYS:
    return False
  return key in BOUND_KEYS or key.split('.')[0] in BOUND_SECTIONS


def check_resumable(
  saved: config_dict.ConfigDict, config: config_dict.ConfigDict, workdir: str
):
  """Raises InputError where `config` cannot continue the run in `workdir`."""
  bound = {
    key: values
    for key, values in differing_keys(saved, config).items()
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
      + '\nUse the same settings to go on with it, or another workdir'
    )


def to_json(config: config_dict.ConfigDict) -> str:
  """The config as indented JSON, keys in order."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


# Every key with its default.
BASE = pathlib.Path(__file__).parent.parent / 'configs' / 'base.py'


def load_base() -> config_dict.ConfigDict:
  """configs/base.py's values: the default and the type of every key.

  Raises:
    InputError: it does not lie beside the package.
  """
  if not BASE.is_file():
    raise InputError(
      f'{BASE} is missing; install the package from its source '
      'folder: pip install -e .'
    )
  spec = importlib.util.spec_from_file_location('nanodlm_base_config', BASE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def from_json(
  text: str | bytes, defaults: config_dict.ConfigDict, where: str
) -> config_dict.ConfigDict:
  """A saved config; keys that it lacks take their defaults.

  Raises:
    InputError: not a config, a key that this version does not know, or a value
      of another type than its default.
  """
  try:
    saved = json.loads(text)
  # No UTF-8, no JSON, or thousands of brackets.
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where} is not JSON: {error}') from error
  if not isinstance(saved, dict):
    raise InputError(f'{where} is not a config but {type(saved).__name__}')
  config = config_dict.ConfigDict(defaults.to_dict())
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
          f'{where}: unknown key {section}.{key}{suggest(key, config[section])}'
        )
      set_value(config[section], key, leaf, f'{where}: {section}.{key}')
  return config


def set_value(section: config_dict.ConfigDict, key: str, value: Any, name: str):
  """Sets a key; InputError with its `name` where the value is of another type."""
  try:
    if value is None and section[key] is not None:  # which ml_collections takes
      raise TypeError(f'{name} has no value')
    section[key] = value
  except TypeError as error:
    raise InputError(
      f'{name}={value!r} is not of type {type(section[key]).__name__}'
    ) from error


def suggest(key: str, known) -> str:
  """'; did you mean ...?', or the known keys."""
  close = difflib.get_close_matches(key, list(known), n=1)
  return (
    f'; did you mean {close[0]!r}?' if close else f'; known: {sorted(known)}'
  )
