"""Tests of nanodlm.config: a mistake is an error that names the key."""

import re

from absl.testing import parameterized
import jax
from ml_collections import config_dict

from configs import base, distil, flex, scarce, sft, sudoku
from configs import objectives as study
from nanodlm import config as configs
from nanodlm import objectives, samplers
from nanodlm import run as runs
from nanodlm.model.config import ModelConfig
from nanodlm.model.lora import LoraConfig
from nanodlm.noise import categorical
from nanodlm.samplers import guidance
from nanodlm.types import InputError


def changed(**changes):
  """The defaults with {'section.key': value} changed, 'section__key' here."""
  config = base.get_config()
  for key, value in changes.items():
    config.update_from_flattened_dict({key.replace('__', '.'): value})
  return config


def make_run(given=(), platform='', **changes):
  settings = configs.make_settings(changed(**changes), given)
  return runs.make_run(settings, devices=jax.devices()[:1], platform=platform)


def validate(**changes):
  given = {key.replace('__', '.') for key in changes}
  return make_run(given, **changes).settings


# The objectives that each sampler can be used with.
MASKED, REPLACING = ('masked', 'd3pm', 'sedd'), ('hybrid', 'uniform')
FITS = {
  **dict.fromkeys(samplers.SAMPLERS, MASKED),
  'ar': ('ar',),
  'block': ('block', 'block_hybrid', 'block_uniform'),
  'edit': ('hybrid',),
  'insert': ('flex',),
  'expand': (),  # It needs objective.expand.
  'renoise': REPLACING,
  **dict.fromkeys(('posterior', 'psi'), (*MASKED, *REPLACING, 'genmd4')),
  'speculate': (),  # It needs objective.ar_weight.
}


class ValidateTest(parameterized.TestCase):
  def test_the_defaults_are_valid(self):
    settings, config = validate(), base.get_config()
    self.assertEqual(settings.train.batch_size, config.train.batch_size)
    self.assertEqual(settings.sample.num_samples, config.sampler.num_samples)

  @parameterized.parameters(*objectives.OBJECTIVES)
  def test_every_objective(self, name):
    changes = {'objective__name': name}
    if objectives.OBJECTIVES[name].any_length is True:
      with self.assertRaisesRegex(InputError, "^data.crop='chunk' must be"):
        validate(**changes)
      changes['data__crop'] = 'document'
    if objectives.OBJECTIVES[name].needs_time:
      with self.assertRaisesRegex(InputError, '^model.time_conditioning=False'):
        validate(**changes)
      changes['model__time_conditioning'] = True
    if name == 'ar':
      # Shared with the defaults of 'masked': nothing else needs to change.
      self.assertEqual(make_run(**changes).sampler_name, 'ar')
    validate(**changes)
    run = make_run(**changes).with_vocabulary(9)
    self.assertIsInstance(run.objective, objectives.OBJECTIVES[name])
    self.assertEqual(run.objective.mask_id, 8)
    shape = run.network.config
    self.assertEqual(
      (shape.causal, shape.vocab_size), (run.objective.causal, 9)
    )

  def test_a_constant_is_no_time(self):
    with self.assertRaisesRegex(
      InputError, "^model.time_form='constant' must be"
    ):
      validate(
        objective__name='uniform',
        model__time_conditioning=True,
        model__time_form='constant',
      )

  def test_kernels_do_not_know_the_pattern_of_annealing(self):
    changes = {'model__attention': 'cudnn', 'model__dtype': 'bfloat16'}
    make_run(platform='gpu', **changes)
    changes['train__anneal_steps'] = 5
    with self.assertRaisesRegex(
      InputError, "'cudnn' does not support train.anneal_steps=5"
    ):
      make_run(platform='gpu', **changes)

  @parameterized.parameters(
    ('float32', 64), ('bfloat16', 12), ('bfloat16', 136)
  )
  def test_sizes_that_cudnn_refuses(self, dtype, head_size):
    with self.assertRaisesRegex(
      InputError, f"model.attention='cudnn' cannot take heads of {head_size} in"
    ):
      make_run(
        platform='gpu',
        model__attention='cudnn',
        model__dtype=dtype,
        model__head_size=head_size,
      )

  @parameterized.parameters(*samplers.SAMPLERS)
  def test_every_sampler_fits_what_it_says_and_nothing_else(self, name):
    for objective in objectives.OBJECTIVES:
      changes = {'objective__name': objective, 'sampler__name': name}
      if objectives.OBJECTIVES[objective].needs_time:
        changes['model__time_conditioning'] = True
      if objectives.OBJECTIVES[objective].any_length is True:
        changes['data__crop'] = 'document'
      if objective in FITS[name]:
        validate(**changes)
        sampler = make_run(**changes).with_vocabulary(8).sampler
        self.assertIsInstance(sampler, samplers.SAMPLERS[name])
        drawing = getattr(sampler, 'inner', sampler)
        self.assertEqual(drawing.draw.mask_id, 7)
      else:
        with self.assertRaisesRegex(
          InputError, r'sampler\.name=.*does not fit'
        ):
          validate(**changes)

  @parameterized.parameters('ar', 'block', 'speculate')
  def test_samplers_of_blocks_with_an_autoregressive_loss(self, name):
    changes = {'objective__name': 'block', 'objective__ar_weight': 0.5}
    run = make_run(**changes, sampler__name=name)
    self.assertIsInstance(run.sampler, samplers.SAMPLERS[name])
    self.assertEqual(run.objective.autoregressive.mask_id, 1)
    shape = run.network.config
    self.assertEqual((shape.causal, shape.block_size), (True, 16))
    if name != 'block':
      with self.assertRaisesRegex(
        InputError, rf"{name}'.*objective.name='block'.*objective.ar_weight > 0"
      ):
        validate(objective__name='block', sampler__name=name)

  @parameterized.parameters(
    *(name for name, cls in samplers.SAMPLERS.items() if cls.can_be_guided)
  )
  def test_guidance_wraps_the_sampler(self, name):
    plain = make_run(sampler__name=name)
    guided = make_run(sampler__name=name, sampler__guidance=1.5)
    self.assertEqual(
      guided.sampler, guidance.Guided(plain.sampler, 1.5, mask_id=1)
    )

  def test_values_reach_their_objects(self):
    run = make_run(
      objective__noise='uniform',
      objective__schedule='polynomial',
      objective__power=3.0,
      sampler__name='ancestral',
      sampler__num_steps=17,
      sampler__schedule='cosine',
      sampler__temperature=0.5,
      sampler__top_k=4,
    )
    objective, sampler = run.objective, run.sampler
    self.assertEqual(objective.noise, 'uniform')
    self.assertEqual(objective.schedule.power, 3.0)
    self.assertEqual(sampler.num_steps, 17)
    self.assertEqual(sampler.schedule.offset, 0.008)
    self.assertEqual((sampler.draw.temperature, sampler.draw.top_k), (0.5, 4))

  @parameterized.parameters(
    # Names.
    ('objective__name', 'maskd'),
    ('objective__noise', 'counts'),
    ('sampler__name', 'greedy'),
    ('optim__name', 'sgd'),
    ('optim__schedule', 'linear'),
    ('model__mlp', 'relu'),
    ('model__dtype', 'int8'),
    ('model__remat', 'yes'),
    ('model__attention', 'flash'),
    ('data__crop', 'middle'),
    # Ranges.
    ('data__length', 1),
    ('data__eval_fraction', 0.0),
    ('data__eval_fraction', 1.0),
    ('data__prefetch_batches', 0),
    ('data__num_threads', 0),
    ('data__padding', 'none'),
    ('data__padding', 'masked'),
    ('data__clean_prefix_rate', -0.1),
    ('data__clean_infill_rate', 1.5),
    ('train__batch_size', 0),
    ('train__num_steps', 0),
    ('train__anneal_steps', -1),
    ('model__num_kv_heads', 4),
    ('model__norm', 'group'),
    ('train__num_microbatches', 0),
    ('train__chunk_size', 0),
    ('train__log_every_steps', 0),
    ('train__eval_every_steps', -1),
    ('train__num_samples', -1),
    ('train__max_skipped_steps', 0),
    ('train__profile_steps', -1),
    ('eval__batch_size', 0),
    ('seed', 2**32),
    ('eval__seed', -1),
    ('eval__seed', 2**32),
    ('sampler__seed', 2**32),
    ('sampler__seed', 2**63),
    ('eval__num_draws', 0),
    ('eval__max_examples', -1),
    ('checkpoint__every_steps', 0),
    ('checkpoint__max_to_keep', 0),
    ('checkpoint__keep_period', -1),
    ('checkpoint__init_step', -1),
    ('mesh__data', 0),
    ('mesh__data', -2),
    ('mesh__fsdp', 0),
    ('mesh__tensor', -2),
    ('model__num_layers', 0),
    ('model__num_heads', 5),
    ('model__dropout', 1.0),
    ('optim__learning_rate', 0.0),
    ('optim__decay_from_step', 2000),
    ('optim__ema_decay', 1.0),
    ('sampler__temperature', -1.0),
    ('sampler__top_p', -0.5),
    ('sampler__num_steps', 0),
    ('sampler__num_samples', 0),
    ('sampler__length', -1),
    ('sampler__guidance', -0.5),
    # Rules across keys.
    ('model__norm_bias', True),
    ('eval__num_draws', 3),
    ('train__batch_size', 31),
  )
  def test_errors_name_the_key_and_the_value(self, key, value):
    pattern = rf'^{re.escape(key.replace("__", "."))}={re.escape(repr(value))}'
    with self.assertRaisesRegex(InputError, pattern):
      validate(**{key: value})

  @parameterized.parameters(
    (
      {'model__num_positions': 100},
      'data.length=256 must be at most model.num_positions=100',
    ),
    (
      {'model__num_positions': 256, 'sampler__length': 300},
      'sampler.length=300',
    ),
    (
      {'model__shift_outputs': True, 'sampler__name': 'prefix_cache'},
      "sampler.name='prefix_cache' does not fit model.shift_outputs=True",
    ),
    (
      {'model__conv_size': 3, 'sampler__name': 'prefix_cache'},
      "sampler.name='prefix_cache' does not fit model.conv_size=3",
    ),
    (
      {'model__conv_size': 3, 'objective__name': 'ar'},
      'model.conv_size=3 must be 0 with a causal network or blocks',
    ),
    (
      {'model__conv_size': 3, 'train__anneal_steps': 5},
      'train.anneal_steps=5 must be 0 with model.conv_size=3',
    ),
    (
      {'model__shift_outputs': True, 'objective__name': 'ar'},
      'model.shift_outputs=True',
    ),
    (
      {'model__self_conditioning': True, 'objective__name': 'ar'},
      'model.self_conditioning=True must be False',
    ),
    (
      {'train__anneal_steps': 5, 'objective__name': 'ar'},
      "train.anneal_steps=5 is ignored with objective.name='ar'",
    ),
    (
      {'train__anneal_steps': 5, 'objective__name': 'block'},
      'train.anneal_steps=5',
    ),
    (
      {
        'objective__name': 'uniform',
        'model__time_conditioning': True,
        'objective__tau': 0.1,
      },
      'objective.tau=0.1 is ignored',
    ),
    (
      {
        'objective__name': 'hybrid',
        'objective__p_uniform': 0.0,
        'objective__gamma': 1.5,
      },
      'objective.gamma=1.5 is ignored',
    ),
    (
      {'policy__name': 'one_step', 'policy__clip': 0.1, 'data__length': 64},
      'policy.clip=0.1 is ignored',
    ),
    (
      {
        'policy__name': 'sequence',
        'policy__num_draws': 4,
        'objective__name': 'ar',
      },
      'policy.num_draws=4 is ignored',
    ),
    ({'tokenizer__name': 'run'}, "tokenizer.path='' must be the workdir"),
    ({'tokenizer__path': 'runs/x'}, "tokenizer.path='runs/x' is ignored"),
  )
  def test_options_of_published_networks(self, changes, message):
    with self.assertRaisesRegex(InputError, f'^{re.escape(message)}'):
      validate(**changes)

  @parameterized.parameters(
    (
      {'objective__schedule': 'sine', 'objective__noise': 'uniform'},
      'objective.schedule',
    ),
    (
      {'objective__min_time': 1.0, 'objective__noise': 'uniform'},
      'objective.min_time',
    ),
    (
      {'objective__num_timesteps': -1, 'objective__noise': 'uniform'},
      'objective.num_timesteps',
    ),
    (
      {'objective__power': -1.0, 'objective__schedule': 'polynomial'},
      'objective.power',
    ),
    (
      {'objective__num_timesteps': 10, 'objective__noise': 'count'},
      "objective.noise='count'",
    ),
    ({'sampler__name': 'ancestral', 'sampler__grid': 'log'}, 'sampler.grid'),
    (
      {'sampler__name': 'posterior', 'sampler__grid': '1,0.2,0.4,0'},
      "sampler.grid='1,0.2,0.4,0'",
    ),
    (
      {'sampler__name': 'confidence', 'sampler__threshold': 0.9},
      'sampler.num_steps=128, sampler.threshold=0.9',
    ),
    ({'sampler__name': 'remask', 'sampler__eta': 1.1}, 'sampler.eta=1.1'),
    (
      {'objective__name': 'ar', 'sampler__guidance': 1.0},
      "sampler.guidance=1.0 does not fit sampler.name='ar'",
    ),
    (
      {'objective__name': 'hybrid', 'objective__p_uniform': 1.0},
      'objective.p_uniform=1.0',
    ),
    (
      {'objective__name': 'd3pm', 'sampler__num_corrections': 4},
      'sampler.num_corrections=4',
    ),
  )
  def test_errors_of_combinations(self, changes, message):
    with self.assertRaisesRegex(InputError, f'^{message}'):
      validate(**changes)

  @parameterized.parameters(
    (
      {'objective__name': 'ar', 'objective__noise': 'uniform'},
      'objective.noise',
    ),
    ({'objective__p_uniform': 0.2}, 'objective.p_uniform'),
    (
      {'objective__name': 'hybrid', 'objective__min_time': 0.1},
      'objective.min_time',
    ),
    ({'sampler__num_corrections': 4}, 'sampler.num_corrections'),
    ({'sampler__grid': 'cosine'}, 'sampler.grid'),
    (
      {'sampler__name': 'first_hitting', 'sampler__num_steps': 4},
      'sampler.num_steps',
    ),
    (
      {
        'sampler__name': 'ancestral',
        'sampler__grid': '1,0.5,0',
        'sampler__num_steps': 2,
      },
      'sampler.num_steps',
    ),
    (
      {
        'objective__name': 'block',
        'sampler__inner': 'remask',
        'sampler__grid': '1,0.5,0',
        'sampler__num_steps': 2,
      },
      'sampler.num_steps',
    ),
    ({'sampler__schedule': 'cosine'}, 'sampler.schedule'),
    ({'sampler__threshold': 0.9}, 'sampler.threshold'),
    ({'sampler__eta': 0.5}, 'sampler.eta'),
    (
      {'objective__noise': 'count', 'objective__schedule': 'cosine'},
      'objective.schedule',
    ),
    (
      {'objective__noise': 'uniform', 'objective__power': 3.0},
      'objective.power',
    ),
    ({'optim__name': 'lion', 'optim__momentum': 0.9}, 'optim.momentum'),
    (
      {'optim__schedule': 'constant', 'optim__final_fraction': 0.5},
      'optim.final_fraction',
    ),
    (
      {'optim__schedule': 'constant', 'optim__decay_from_step': 500},
      'optim.decay_from_step',
    ),
    (
      {'objective__name': 'block', 'sampler__block_size': 4},
      'sampler.block_size',
    ),
  )
  def test_a_key_that_nobody_reads_is_an_error(self, changes, key):
    with self.assertRaisesRegex(InputError, f'^{key}=.*is ignored'):
      validate(**changes)
    # A config file may set what another choice would read.
    make_run(**changes)

  def test_a_key_that_matters_with_the_others(self):
    validate(objective__schedule='cosine', model__time_conditioning=True)
    validate(
      objective__schedule='polynomial',
      objective__power=3.0,
      objective__noise='uniform',
    )
    validate(optim__name='muon', optim__momentum=0.9)
    validate(objective__name='sedd', objective__schedule='cosine')
    validate(sampler__name='ancestral', sampler__grid='1,0.5,0')
    validate(
      sampler__name='ancestral', sampler__grid='cosine', sampler__num_steps=2
    )

  @parameterized.parameters(
    ('masked', 'count'),
    ('sedd', 'count'),
    ('d3pm', 'stratified'),
    ('uniform', 'stratified'),
    ('hybrid', 'stratified'),
  )
  def test_auto_noise_is_the_first_that_the_objective_has(self, name, noise):
    changes = {'objective__name': name, 'model__time_conditioning': True}
    self.assertEqual(make_run(**changes).objective.noise, noise)
    changes['objective__noise'] = 'uniform'
    self.assertEqual(make_run(**changes).objective.noise, 'uniform')

  @parameterized.product(
    name=('masked', 'block', 'sedd', 'd3pm'),
    change=(
      {'objective__schedule': 'cosine'},
      {'objective__schedule': 'polynomial', 'objective__power': 3.0},
      {'objective__num_timesteps': 10},
      {'objective__min_time': 0.1},
    ),
  )
  def test_auto_noise_draws_the_times_that_are_described(self, name, change):
    objective = make_run(objective__name=name, **change).objective
    self.assertEqual(objective.noise, 'stratified')

  @parameterized.parameters('d3pm', 'hybrid')
  def test_noise_by_count_is_not_everyones(self, name):
    with self.assertRaisesRegex(InputError, "^objective.noise='count' is not"):
      validate(objective__name=name, objective__noise='count')

  def test_pairs(self):
    settings = validate(data__source='pairs:x', data__padding='masked')
    self.assertTrue(settings.data.is_pairs)
    self.assertFalse(validate(data__source='text:pairs:x').data.is_pairs)
    for key, value in (
      ('crop', 'random'),
      ('segment_ids', True),
      ('clean_prefix_rate', 0.5),
      ('clean_infill_rate', 0.5),
    ):
      with self.assertRaisesRegex(
        InputError, f"^data.{key}={value!r} .*data.source='pairs:x'"
      ):
        validate(data__source='pairs:x', **{f'data__{key}': value})

  def test_clean_prefixes_and_infills(self):
    rates = {'data__clean_prefix_rate': 0.75, 'data__clean_infill_rate': 0.25}
    self.assertEqual(validate(**rates).data.clean_prefix_rate, 0.75)
    rates['data__clean_infill_rate'] = 0.5
    with self.assertRaisesRegex(
      InputError,
      '^data.clean_prefix_rate=0.75 and '
      'data.clean_infill_rate=0.5 .* more than 1',
    ):
      validate(**rates)
    validate(objective__name='ar', data__clean_prefix_rate=0.5)
    with self.assertRaisesRegex(
      InputError, "^data.clean_infill_rate=0.5 is not .*objective.name='ar'"
    ):
      validate(objective__name='ar', data__clean_infill_rate=0.5)
    with self.assertRaisesRegex(
      InputError, "^data.clean_infill_rate=0.5 is .*objective.name='block'"
    ):
      validate(objective__name='block', data__clean_infill_rate=0.5)
    validate(
      objective__name='block',
      objective__block_size=256,
      data__clean_infill_rate=0.5,
    )
    with self.assertRaisesRegex(InputError, '^data.clean_infill_rate=0.5 need'):
      validate(data__length=2, data__clean_infill_rate=0.5)

  def test_single_rows_need_no_pairs(self):
    validate(objective__noise='uniform', train__batch_size=31)
    validate(objective__name='ar', train__batch_size=31, eval__num_draws=3)

  def test_every_key_is_read_by_something(self):
    # A key of configs/base.py is a field of exactly one section's dataclass, or
    # of an objective or sampler.
    read = {
      'data': configs.DataConfig,
      'tokenizer': configs.TokenizerConfig,
      'train': configs.TrainConfig,
      'eval': configs.EvalConfig,
      'checkpoint': configs.CheckpointConfig,
      'optim': configs.OptimConfig,
      'mesh': configs.MeshConfig,
      'model': ModelConfig,
      'lora': LoraConfig,
    }
    for section, values in base.get_config().items():
      if section in read:
        fields = set(read[section].__dataclass_fields__)
        if section == 'model':
          # Not the user's to choose.
          fields -= {'vocab_size', 'causal', 'block_size', 'platform', 'lora'}
          fields.add('name')
        self.assertEqual(set(values), fields, section)
      elif section in ('objective', 'distill', 'policy', 'sampler'):
        table = {
          'objective': objectives.OBJECTIVES,
          **objectives.METHODS,
          'sampler': samplers.SAMPLERS,
        }[section]
        fields = {'name'}.union(
          *(cls.__dataclass_fields__ for cls in table.values())
        )
        fields |= {'power'} & set(values)  # of a schedule
        if section == 'sampler':
          fields |= set(configs.SampleConfig.__dataclass_fields__)
          fields |= set(categorical.Draw.__dataclass_fields__)
        given = {'mask_id', 'draw', 'rule', 'rates'}  # the last is learned
        given |= {'base', 'round'}
        if section == 'sampler':
          given |= {'eos_ids'}
          fields |= {'stop_at_eos', 'guidance'}  # the latter wraps a sampler
        self.assertEqual(set(values), fields - given, section)
      else:
        self.assertEqual(section, 'seed')


class JsonTest(parameterized.TestCase):
  def read(self, text):
    return configs.from_json(text, 'x/config.json')

  def test_round_trip(self):
    config = changed(optim__learning_rate=3e-4, seed=5, data__source='text:a b')
    text = configs.make_settings(config).to_json()
    self.assertEqual(self.read(text).to_dict(), config.to_dict())
    self.assertEqual(configs.make_settings(self.read(text)).to_json(), text)

  def test_missing_keys_take_their_defaults(self):
    config = self.read('{"seed": 3, "model": {"num_layers": 2}}')
    self.assertEqual(
      config.to_dict(), changed(seed=3, model__num_layers=2).to_dict()
    )

  @parameterized.parameters(
    ('{', 'is not JSON'),
    ('[' * 100_000, 'is not JSON'),
    ('{"modle": {}}', "modle: unknown key; did you mean 'model'?"),
    ('{"model": 3}', 'model=3 is not of type ConfigDict'),
    ('{"seed": {"a": 1}}', "seed={'a': 1} is not of type int"),
    (
      '{"model": {"num_layers": "2"}}',
      "model.num_layers='2' is not of type int",
    ),
    (
      '{"model": {"num_layer": 2}}',
      "model.num_layer: unknown key; did you mean 'num_layers'?",
    ),
    (b'{"seed\xf3": 3}', 'is not JSON'),
    ('{"seed": "x"}', "seed='x' is not of type int"),
    (
      '{"model": {"num_layers": null}}',
      'model.num_layers=None is not of type int',
    ),
    ('{"data": null}', 'data=None is not of type ConfigDict'),
  )
  def test_errors_name_the_file(self, text, message):
    with self.assertRaisesRegex(
      InputError, 'x/config.json.*' + re.escape(message)
    ):
      self.read(text)

  def test_suggestions(self):
    self.assertEqual(
      configs.suggest('batchsize', ['batch_size', 'seed']),
      "; did you mean 'batch_size'?",
    )
    self.assertEqual(configs.suggest('zzz', ['b', 'a']), "; known: ['a', 'b']")


class ResumableTest(parameterized.TestCase):
  def check(self, **changes):
    saved = base.get_config().to_dict()
    settings = configs.make_settings(changed(**changes))
    configs.check_resumable(saved, settings, 'w')

  @parameterized.parameters(
    ('seed', 1),
    ('train__batch_size', 64),
    ('optim__name', 'lion'),
    ('data__length', 128),
    ('data__source', 'text:x'),
    ('data__crop', 'random'),
    ('tokenizer__name', 'gpt2'),
    ('model__num_layers', 2),
    ('model__dropout', 0.1),
    ('objective__noise', 'uniform'),
  )
  def test_what_makes_it_another_run(self, key, value):
    name = key.replace('__', '.')
    with self.assertRaisesRegex(
      InputError, f"'w'.*\n  {name}: .* {value!r} now"
    ):
      self.check(**{key: value})

  @parameterized.parameters(
    ('train__num_steps', 9999),
    ('train__num_microbatches', 4),
    ('train__log_every_steps', 7),
    ('optim__learning_rate', 1e-4),
    ('model__remat', 'full'),
    ('model__unroll', True),
    ('model__dtype', 'bfloat16'),
    ('data__num_threads', 5),
    ('data__data_dir', '/elsewhere'),
    ('mesh__data', 1),
    ('eval__num_draws', 16),
    ('sampler__num_steps', 9),
    ('checkpoint__every_steps', 10),
  )
  def test_what_does_not(self, key, value):
    self.check(**{key: value})

  def test_differing_keys(self):
    config = base.get_config()
    other = changed(seed=2, model__num_layers=1)
    self.assertEqual(
      configs.differing_keys(config.to_dict(), other.to_dict()),
      {
        'seed': (config.seed, 2),
        'model.num_layers': (config.model.num_layers, 1),
      },
    )

  def test_fine_tuning_takes_the_tokenizer_of_where_it_starts(self):
    config = sft.get_config()
    self.assertEqual(config.tokenizer.path, 'runs/docs')
    config.checkpoint.init_from = 'elsewhere'
    self.assertEqual(config.tokenizer.path, 'elsewhere')

  def test_configs_of_one_file_share_nothing(self):
    one, other = flex.get_config('expand'), flex.get_config('expand')
    one.checkpoint.init_from = 'elsewhere'
    self.assertEqual(one.tokenizer.path, 'elsewhere')
    self.assertEqual(other.tokenizer.path, 'runs/quickstart')

  @parameterized.parameters(*distil.VARIANTS)
  def test_distillation_takes_the_tokenizer_of_its_teacher(self, name):
    config = distil.get_config(name)
    config.checkpoint.init_from = 'elsewhere'
    self.assertEqual(config.tokenizer.path, 'elsewhere')
    runs.check_training(runs.make_run(configs.make_settings(config)))

  @parameterized.parameters(study, scarce, sudoku)
  def test_variants_differ_in_what_they_say_alone(self, file):
    before = configs.flatten(file.get_config().to_dict())
    for name, changes in file.VARIANTS.items():
      config = file.get_config(name)
      settings = configs.make_settings(config)
      runs.make_run(settings, devices=jax.devices()[:1])
      expected = {**before, **changes}
      self.assertEqual(configs.flatten(config.to_dict()), expected)

  def test_variants(self):
    variants = {'a': {'model.num_layers': 1, 'seed': 2}, 'b': {'model.x': 1}}
    config = configs.vary(configs.load(), variants, 'a')
    self.assertEqual((config.model.num_layers, config.seed), (1, 2))
    with self.assertRaisesRegex(InputError, "'A'.*(did you mean|known)"):
      configs.vary(config, variants, 'A')
    with self.assertRaisesRegex(InputError, 'model.x'):
      configs.vary(config, variants, 'b')

  def test_free_and_bound_keys_exist(self):
    known = configs.flatten(base.get_config().to_dict())
    self.assertContainsSubset(configs.FREE_KEYS | configs.BOUND_KEYS, known)
    self.assertContainsSubset(configs.BOUND_SECTIONS, base.get_config())


class LockedTest(parameterized.TestCase):
  def test_an_unknown_key_is_an_error(self):
    with self.assertRaises((AttributeError, KeyError)):
      base.get_config().lock().model.num_layer = 3
    self.assertIsInstance(base.get_config(), config_dict.ConfigDict)


class StartTest(parameterized.TestCase):
  @parameterized.parameters(
    ('runs/a', False, {}, "--workdir='runs/a' is ignored by --mode=report"),
    ('', True, {}, '--config is ignored by --mode=report'),
    ('', False, {'eval.seed': 3}, '--config.eval.seed=3 is ignored'),
  )
  def test_flags_that_a_mode_does_not_read(self, workdir, given, changes, text):
    start = configs.Start('report', workdir, configs.load(), given, changes)
    with self.assertRaisesRegex(InputError, text):
      start.check_ignored(('config', 'workdir'))
    start.check_ignored(())
    start.check_ignored(('config',) if workdir else ('workdir',))
