"""A run: mesh, objective, network, sampler and tokenizer, each built once."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import types
from typing import Any, NamedTuple, TypeVar

import jax

from nanodlm import config as configs
from nanodlm import objectives, samplers
from nanodlm.config import Settings
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.devices import mesh as meshes
from nanodlm.devices.sharding import Shards, UNSPLIT
from nanodlm.model import NETWORKS
from nanodlm.noise import categorical, schedules, times
from nanodlm.samplers import guidance
from nanodlm.steps import train as train_steps
from nanodlm.steps.network import check_batch_size, Scorer
from nanodlm.training import optim
from nanodlm.training import state as states
from nanodlm.types import InputError, Network, Objective, Sampler

T = TypeVar('T')
# Stands for the vocabulary until the tokenizer is known.
STAND_IN_SIZE = 2


@dataclasses.dataclass(frozen=True)
class Run:
  """What training, evaluation and sampling all start from.

  Attributes:
    settings: the checked config.
    mesh: the device mesh.
    objective: the training objective.
    network: the network.
    sampler: the sampler of `settings.sampler`.
    platform: what programs are compiled for; '' is this machine's devices.
    known_tokenizer: what the network's ids stand for; None until it is known.
  """

  settings: Settings
  mesh: jax.sharding.Mesh
  objective: Objective
  network: Network
  sampler: Sampler
  platform: str = ''
  known_tokenizer: Tokenizer | None = None

  @property
  def tokenizer(self) -> Tokenizer:
    """What the network's ids stand for."""
    if self.known_tokenizer is None:
      raise ValueError('the tokenizer of this run is not known yet')
    return self.known_tokenizer

  @property
  def scorer(self) -> Scorer:
    """The network and the objective, put together."""
    settings = self.settings
    # Before a document is the separator that ends the one before it. Before a
    # conversation is nothing, as when the model answers.
    return Scorer(
      self.network,
      self.objective,
      settings.train.chunk_size,
      restarts=settings.data.is_chat,
    )

  @property
  def trained(self) -> Objective:
    """What training minimises: the objective, or that of a method."""
    return make_method(self.settings, self.objective) or self.objective

  @property
  def sampler_name(self) -> str:
    """`config.sampler.name`, with 'auto' resolved by the objective."""
    return _sampler_name(self.settings, self.objective)

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """The tokens that end a sampled text; () if nothing does."""
    settings = self.settings
    has_end = settings.data.has_documents or settings.sampler['stop_at_eos']
    return self.tokenizer.eos_ids if has_end else ()

  def check_positions(self, name: str, length: int, block_size: int = 1):
    """Raises InputError if there are fewer positions than tokens.

    Args:
      name: what the error calls the length.
      length: number of tokens.
      block_size: size of the blocks that are read as a whole, if any.
    """
    most, size = self.network.num_positions, block_size or 1
    if 0 < most < length + -length % size:
      blocks = f', in whole blocks of {size}' * (length <= most)
      raise InputError(
        f'{name}={length!r} must be at most model.num_positions={most!r}'
        f'{blocks}'
      )

  def check_canvas(self, name: str, length: int):
    """Raises InputError if the network cannot read canvases of that length.

    `name` is what the error calls it. Samplers extend them to whole blocks.
    """
    self.network.check(length)
    self.check_positions(name, length, self.objective.block_size)

  def num_params(self) -> int:
    """Returns the number of parameters, without what pads the vocabulary.

    With `config.lora` those of the base and of the adapters.
    """
    whole = dataclasses.replace(self.network, shards=Shards())  # pyright: ignore
    shapes = jax.eval_shape(
      lambda: states.init_params(whole, self.objective, jax.random.key(0))
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

  def flops_per_token(self) -> float:
    """Returns the model FLOPs of a training step per token; 0: unknown.

    They are unknown if the run starts from another network, since each such
    method has its own number of network calls.
    """
    is_plain = self.trained is self.objective
    num_calls = is_plain * self.objective.num_training_draws
    return num_calls * self.network.flops_per_token(self.settings.data.length)

  def num_trained(self) -> int:
    """Returns the number of those that `config.lora` trains."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.shapes()[0]))

  def shapes(self) -> tuple[Any, Any]:
    """Returns the two parts of `Network.split` as sharded abstract arrays."""
    init = lambda: self.network.split(
      self.scorer.init_params(jax.random.key(0))
    )
    return meshes.shapes_sharded(self.mesh, init)

  def with_vocabulary(self, vocab_size: int) -> 'Run':
    """Returns the run of a network with this number of ids, mask included."""
    objective = dataclasses.replace(self.objective, mask_id=vocab_size - 1)  # pyright: ignore
    return dataclasses.replace(
      self,
      objective=objective,
      network=make_network(
        self.settings, objective, self.network.shards, self.platform
      ),
      sampler=make_sampler(self.settings, objective),
    )

  def with_tokenizer(self, tokenizer: Tokenizer) -> 'Run':
    """Returns the run of a network of this tokenizer's ids."""
    run = self.with_vocabulary(tokenizer.vocab_size)
    sampler = make_sampler(run.settings, run.objective, tokenizer.eos_ids)
    return dataclasses.replace(run, sampler=sampler, known_tokenizer=tokenizer)

  def with_sampler(
    self, changes: Mapping[str, Any], *, is_given: bool = False
  ) -> 'Run':
    """Returns the run with changes to its `config.sampler`.

    With another `name` than the run's own, keys outside `changes` take their
    defaults: the run's were meant for another sampler. How much is sampled, and
    how texts end, stay. A `num_steps` replaces a grid that lists its times.

    Args:
      changes: {key: value}.
      is_given: whether each of them must have an effect.

    Raises:
      InputError: it does not fit the objective, or a value is not allowed.
    """
    defaults: Any = configs.load().sampler
    section = defaults.copy_and_resolve_references()
    own, name = self.settings.sampler, changes.get('name', self.sampler_name)
    if name == 'auto':
      name = self.objective.default_sampler
    kept = own if name == self.sampler_name else configs.EVERY_SAMPLER
    section.update({key: own[key] for key in kept})
    if 'num_steps' in changes and times.is_listed(section.grid):
      section.grid = defaults.grid
    for key, value in changes.items():
      configs.set_value(section, key, value, f'sampler.{key}')
    settings = dataclasses.replace(
      self.settings, sampler=types.MappingProxyType(section.to_dict())
    )
    tokenizer = self.known_tokenizer
    eos_ids = () if tokenizer is None else tokenizer.eos_ids
    run = dataclasses.replace(
      self,
      settings=settings,
      sampler=make_sampler(settings, self.objective, eos_ids),
    )
    _check_network(run)
    if is_given:
      given = [f'sampler.{key}' for key in changes]
      _check_effects(run, given)
    return run

  def without_adapters(self) -> 'Run':
    """Returns the run of the same network without `config.lora`."""
    lora = types.MappingProxyType({**self.settings.lora, 'rank': 0})
    settings = dataclasses.replace(self.settings, lora=lora)
    shards, platform = self.network.shards, self.platform
    network = make_network(settings, self.objective, shards, platform)
    return dataclasses.replace(self, settings=settings, network=network)

  def describe_sampler(self) -> dict[str, Any]:
    """Returns `config.sampler` with its name resolved, as JSON values."""
    return {**self.settings.sampler, 'name': self.sampler_name}


def make_run(
  settings: Settings,
  *,
  devices: Any = None,
  platform: str = '',
  refit: bool = False,
) -> Run:
  """Builds a run and checks all rules that cross sections.

  The tokenizer may not exist yet: `Run.with_tokenizer` adds it.

  Args:
    settings: the checked config.
    devices: devices of the mesh; all by default.
    platform: what programs are compiled for, if not this machine's devices.
    refit: use all devices along `data` if the configured mesh does not fit
      them and was not chosen by hand. A run may be evaluated on other devices
      than it was trained on.

  Raises:
    InputError: naming the key, its value and what is allowed.
  """
  is_chosen = any(key.startswith('mesh.') for key in settings.given)
  mesh = meshes.make_mesh(settings.mesh, devices, refit=refit and not is_chosen)
  objective = make_objective(settings)
  run = Run(
    settings=settings,
    mesh=mesh,
    objective=objective,
    network=make_network(settings, objective, meshes.shards(mesh), platform),
    sampler=make_sampler(settings, objective),
    platform=platform,
  )
  _check_network(run)
  _check_adapters(run)
  _check_batches(run)
  _check_effects(run, settings.given)
  return run


def make_objective(settings: Settings) -> Objective:
  """Builds the objective; its vocabulary comes with the tokenizer."""
  section = settings.objective
  cls = _choose(objectives.OBJECTIVES, section['name'], 'objective')
  given: dict[str, Any] = {
    'mask_id': STAND_IN_SIZE - 1,
    'schedule': schedules.make_schedule(section['schedule'], section['power']),
  }
  if section['noise'] == 'auto' and cls.noises:
    given['noise'] = cls.auto_noise({**section, **given})
  return _build(cls, section, given)


def method_name(settings: Settings) -> str:
  """Returns which of `objectives.METHODS` has a name; '' if none has one.

  Raises:
    InputError: several have one.
  """
  values = settings.to_dict()
  chosen = [key for key in objectives.METHODS if values[key]['name']]
  if len(chosen) > 1:
    raise InputError(
      ' and '.join(f'{key}.name={values[key]["name"]!r}' for key in chosen)
      + " exclude each other; set one of them to ''"
    )
  return ''.join(chosen)


def make_method(settings: Settings, objective: Objective) -> Any:
  """Builds the objective of `config.distill` or `config.policy`, if any.

  Raises:
    InputError: it does not fit the objective, or a value is not allowed.
  """
  if not (kind := method_name(settings)):
    return None
  section: Any = settings.to_dict()[kind]
  table: Any = objectives.METHODS[kind]
  cls = _choose(table, section['name'], kind, '')
  if not cls.fits(objective):
    raise InputError(
      f'{kind}.name={section["name"]!r} does not fit objective.name='
      f'{settings.objective["name"]!r}'
      + f' and objective.ar_weight={settings.objective["ar_weight"]!r}'
      * bool(objective.block_size and objective.autoregressive)
      + f'; allowed are {["", *(x for x in table if table[x].fits(objective))]}'
    )
  return _build(cls, section, {'base': objective})


def make_network(
  settings: Settings,
  objective: Objective,
  shards: Shards = UNSPLIT,
  platform: str = '',
) -> Network:
  """Builds the network of `config.model` for an objective and its ids."""
  cls = _choose(NETWORKS, settings.model['name'], 'model')
  return cls.make(
    settings.model,
    vocab_size=objective.mask_id + 1,
    objective=objective,
    shards=shards,
    platform=platform,
    lora=settings.lora if settings.lora['rank'] else None,
  )


def _sampler_name(settings: Settings, objective: Objective) -> str:
  name = settings.sampler['name']
  return objective.default_sampler if name == 'auto' else name


def fitting_samplers(objective: Objective) -> list[str]:
  """Returns the samplers that can be used with an objective's network."""
  return sorted(
    name for name, cls in samplers.SAMPLERS.items() if cls.fits(objective)
  )


def make_sampler(
  settings: Settings, objective: Objective, eos_ids: tuple[int, ...] = ()
) -> Sampler:
  """Builds the sampler of `config.sampler`, which must fit the objective.

  `types.Sampler` names the fields that do not come from the config.
  """
  section = settings.sampler
  name = _sampler_name(settings, objective)
  cls = _choose(samplers.SAMPLERS, name, 'sampler', 'auto')
  if not cls.fits(objective):
    raise InputError(
      f'sampler.name={name!r} does not fit objective.name='
      f'{settings.objective["name"]!r}; allowed are '
      f'{fitting_samplers(objective)}'
      + (cls.needs and f'. It needs {cls.needs}')
    )
  given: dict[str, Any] = {
    'mask_id': objective.mask_id,
    'eos_ids': eos_ids if section['stop_at_eos'] else (),
    'rule': objective,
    'schedule': schedules.make_schedule(
      section['schedule'], section['power'], 'sampler'
    ),
  }
  given['draw'] = _build(categorical.Draw, section, given)
  if 'inner' in _field_names(cls):
    of_block = objective.of_block
    given['rule'] = of_block
    able = {
      name: inner
      for name, inner in samplers.SAMPLERS.items()
      if inner.fills_blocks and inner.fits(of_block)
    }
    chosen = section['inner']
    if chosen == 'auto':
      is_masked = of_block.predicts_masked
      chosen = 'fixed_count' if is_masked else of_block.default_sampler
    inner = _choose(able, chosen, 'sampler', 'auto', key='inner')
    given['inner'] = _build(inner, section, given)
  if objective.block_size:
    given['block_size'] = objective.block_size
  sampler = _build(cls, section, given)
  strength = section['guidance']
  if not strength:
    return sampler
  if not cls.can_be_guided:
    able = sorted(
      name for name, cls in samplers.SAMPLERS.items() if cls.can_be_guided
    )
    raise InputError(
      f'sampler.guidance={strength!r} does not fit sampler.name={name!r}: '
      'guidance replaces the prompt by masks, which this sampler does not '
      f'support; samplers that support it are {able}'
    )
  return guidance.Guided(sampler, strength, objective.mask_id)


def _choose(
  table: Mapping[str, T], name: str, section: str, *more: str, key: str = 'name'
) -> T:
  if name not in table:
    raise InputError(
      f'{section}.{key}={name!r} is not one of {[*more, *sorted(table)]}'
      + configs.closest(name, table)
    )
  return table[name]


def _field_names(cls: Any) -> set[str]:
  return {field.name for field in dataclasses.fields(cls)}


def _build(
  cls: Callable[..., T], section: Mapping[str, Any], given: Mapping[str, Any]
) -> T:
  """Returns cls; its fields are from `given`, or else from the section."""
  values = {**section, **given}
  return cls(**{name: values[name] for name in _field_names(cls) & set(values)})


def _check_network(run: Run):
  """Checks that objective, sampler and network go together."""
  settings, objective, network = run.settings, run.objective, run.network
  name = settings.objective['name']
  data = settings.data
  if data.clean_infill_rate and not objective.sees_right(data.length):
    raise InputError(
      f'data.clean_infill_rate={data.clean_infill_rate!r} is not '
      f'supported by objective.name={name!r}, which sees nothing to the right '
      'of a gap; set it to 0 or use data.clean_prefix_rate'
    )
  if objective.any_length:
    for key, is_right, wanted in (
      ('crop', data.has_documents and not data.is_chat, "'document'"),
      ('padding', data.padding == 'eos', "'eos'"),
      ('long_documents', data.long_documents != 'cut', "'drop' or 'refuse'"),
    ):
      if not is_right:
        raise InputError(
          f'data.{key}={getattr(data, key)!r} must be {wanted} with '
          f'objective.name={name!r}, which models the length of whole '
          f'documents (data.source={data.source!r})'
        )
  network.check(data.length)
  run.check_positions('data.length', data.length)
  if settings.sample.length:
    run.check_canvas('sampler.length', settings.sample.length)
  steps = settings.train.anneal_steps
  if steps and (objective.causal or objective.block_size):
    raise InputError(
      f'train.anneal_steps={steps!r} is ignored with objective.name={name!r}: '
      'it is for networks that see the whole text'
    )
  if steps and settings.model['conv_size']:
    raise InputError(
      f'train.anneal_steps={steps!r} must be 0 with model.conv_size='
      f'{settings.model["conv_size"]!r}: convolutions see tokens on both sides'
    )
  if steps and settings.model['attention'] not in ('auto', 'xla'):
    raise InputError(
      f'model.attention={settings.model["attention"]!r} does not support '
      f"train.anneal_steps={steps!r}; use 'auto' or 'xla'"
    )
  if run.sampler.caches_noise and network.self_conditions:
    raise InputError(
      f'sampler.name={run.sampler_name!r} does not fit '
      f'model.self_conditioning={settings.model["self_conditioning"]!r}: it '
      'caches keys and values of tokens whose prediction changes'
    )
  if objective.curriculum_steps and not network.reads_soft:
    raise InputError(
      f'objective.curriculum_steps={objective.curriculum_steps!r} must be 0 '
      f'with objective.name={name!r} and model.name='
      f'{settings.model["name"]!r}, whose network does not read mixtures of '
      'tokens'
    )
  if run.sampler.needs_cache and not network.has_cache:
    key = 'conv_size' if settings.model['conv_size'] else 'shift_outputs'
    raise InputError(
      f'sampler.name={run.sampler_name!r} does not fit model.{key}='
      f'{settings.model[key]!r} and model.name={settings.model["name"]!r}: it '
      'caches keys and values of finished tokens, which this network does not '
      'support'
    )
  if objective.needs_time and not network.knows_time:
    is_on = settings.model['time_conditioning']
    key = 'time_form' if is_on else 'time_conditioning'
    wanted = "other than 'constant'" if is_on else 'True'
    raise InputError(
      f'model.{key}={settings.model[key]!r} must be {wanted} with '
      f'objective.name={name!r}: its noisy text does not show how noisy it is'
    )


def _check_adapters(run: Run):
  """Checks that the network has adapters, if there should be any."""
  lora, name = run.settings.lora, run.settings.model['name']
  if lora['rank'] and run.shapes()[1] is None:
    raise InputError(
      f'lora.rank={lora["rank"]!r} does not fit model.name={name!r}, whose '
      'network does not support adapters'
    )


def _check_batches(run: Run):
  """Checks that batches and draws are whole groups."""
  settings, objective = run.settings, run.objective
  objective.max_scored(objective.group_size, settings.data.length)  # or raises
  shared = objective.evaluation().group_size
  if settings.eval.num_draws % shared:
    raise InputError(
      f'eval.num_draws={settings.eval.num_draws!r} must be a '
      f'multiple of {shared} with this objective'
    )
  if settings.train.batch_size % run.trained.group_size:
    raise InputError(
      f'train.batch_size={settings.train.batch_size!r} must be a multiple of '
      f'{run.trained.group_size}: with objective.noise='
      f'{settings.objective["noise"]!r} examples share draws of the noise'
    )


def check_training(run: Run):
  """Raises InputError unless mesh, batches and numbers of steps go together.

  A method also needs a run to start from.
  """
  train = run.settings.train
  if (first := run.trained.curriculum_steps) > train.num_steps:
    raise InputError(
      f'objective.curriculum_steps={first!r} must be at most train.num_steps='
      f'{train.num_steps!r}'
    )
  data, method = run.settings.data, make_method(run.settings, run.objective)
  if data.num_alternatives != run.trained.num_alternatives:
    raise InputError(
      f'data.source={data.source!r} does not fit policy.name='
      f"{run.settings.policy['name']!r}: 'dpo' learns from "
      "'preferences:GLOB', and nothing else does"
    )
  if method:
    method.check(run.settings)
    kind = method_name(run.settings)
    chosen = f'{kind}.name={run.settings.to_dict()[kind]["name"]!r}'
    if not (init_from := run.settings.checkpoint.init_from):
      raise InputError(
        f'checkpoint.init_from={init_from!r} must be the workdir of a trained '
        f'run with {chosen}'
      )
    if train.anneal_steps:
      raise InputError(
        f'train.anneal_steps={train.anneal_steps!r} must be 0 with {chosen}, '
        'which starts from a network that sees the whole text'
      )
  lora, init_from = run.settings.lora, run.settings.checkpoint.init_from
  if lora['rank'] and not init_from:
    raise InputError(
      f'checkpoint.init_from={init_from!r} must be the workdir of the base '
      f'with lora.rank={lora["rank"]!r}'
    )
  group_size = run.trained.group_size
  check_batch_size(
    train.batch_size, run.mesh, train.num_microbatches, group_size
  )
  check_batch_size(
    run.settings.eval.batch_size, run.mesh, key='eval.batch_size'
  )


def _keys_of(thing: Any, unread: Collection[str]) -> set[str]:
  """Returns the names of the fields that a dataclass and its parts read."""
  keys = set()
  for field in dataclasses.fields(thing):
    if field.name in unread:
      continue
    keys.add(field.name)
    value = getattr(thing, field.name)
    if isinstance(value, Sampler):
      keys |= _keys_of(value, value.unread_keys())
    elif dataclasses.is_dataclass(value) and not isinstance(value, Objective):
      keys |= _keys_of(value, ())
  return keys


def reads_steps(sampler: Sampler) -> bool:
  """Returns whether a sampler reads sampler.num_steps."""
  return 'num_steps' in _keys_of(sampler, sampler.unread_keys())


def _check_effects(run: Run, given: Collection[str]):
  """Raises InputError if a key set by hand is ignored."""
  settings, objective, sampler = run.settings, run.objective, run.sampler
  sampled = _keys_of(sampler, sampler.unread_keys())
  if objective.block_size:  # It is the objective's.
    sampled.discard('block_size')
  sampled |= {*configs.EVERY_SAMPLER, 'guidance'}
  uses_time = settings.model['time_conditioning'] or 'rule' in sampled
  kind, method = method_name(settings), make_method(settings, objective)
  read = _keys_of(objective, objective.unread_keys(uses_time))
  effects = {
    'objective': read - method.ignored if method else read,
    **{
      key: _keys_of(method, method.unread_keys(uses_time))
      if key == kind
      else set()
      for key in objectives.METHODS
    },
    'sampler': sampled,
    'optim': optim.reads(settings.optim.name, settings.optim.schedule),
  }
  values = settings.to_dict()
  names = {
    'objective': settings.objective['name'],
    **{kind: values[kind]['name'] for kind in objectives.METHODS},
    'sampler': run.sampler_name,
    'optim': settings.optim.name,
  }
  for key in sorted(given):
    section, _, leaf = key.partition('.')
    if section == 'lora' and leaf != 'rank' and not settings.lora['rank']:
      raise InputError(
        f'{key}={values[section][leaf]!r} is ignored with lora.rank=0'
      )
    if section in effects and leaf != 'name' and leaf not in effects[section]:
      used = sorted(effects[section] & set(values[section]))
      raise InputError(
        f'{key}={values[section][leaf]!r} is ignored with {section}.name='
        f'{names[section]!r} and the other settings; the keys in effect are '
        f'{used}'
      )


class Training(NamedTuple):
  """What a run trains with.

  Attributes:
    step: see `steps.train.make_train_step`.
    init_state: () -> TrainState at step 0, whole; to be traced.
  """

  step: train_steps.Step
  init_state: Callable[[], states.TrainState]


def make_training(run: Run) -> Training:
  """Puts the training of a run together.

  Raises:
    InputError: the batch does not divide into devices and groups.
  """
  settings = run.settings
  num_steps, ema_decay = settings.train.num_steps, settings.optim.ema_decay
  optimizer = optim.make_optimizer(settings.optim, num_steps)
  objective = run.trained
  step = train_steps.make_train_step(
    dataclasses.replace(run.scorer, objective=objective),
    optimizer,
    optim.make_schedule(settings.optim, num_steps),
    run.mesh,
    batch_size=settings.train.batch_size,
    num_microbatches=settings.train.num_microbatches,
    ema_decay=ema_decay,
    anneal_steps=settings.train.anneal_steps,
  )
  init_state = lambda: states.init_state(
    run.network, objective, optimizer, settings.seed, ema_decay > 0
  )
  return Training(step, init_state)
