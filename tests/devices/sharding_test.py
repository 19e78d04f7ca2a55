"""Tests that parameters split over fsdp and tensor change no numbers."""

import dataclasses
import functools
import re

from absl.testing import absltest, parameterized
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from nanodlm import objectives, samplers, types
from nanodlm.devices import mesh as meshes
from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model.lora import LoraConfig
from nanodlm.model.network import TransformerNetwork
from nanodlm.noise.categorical import Draw
from nanodlm.objectives import (
  ar,
  block,
  d3pm,
  flex,
  genmd4,
  masked,
  mixture,
  sedd,
  uniform,
)
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps import sample as sample_steps
from nanodlm.steps import train as train_steps
from nanodlm.steps.network import Scorer
from nanodlm.training import state as states
from nanodlm.types import InputError
from tests import toys

VOCAB = 13  # Not a multiple of 2, so that the tensor axis needs padding.
MASK = VOCAB - 1
BATCH, LENGTH, WIDTH = 16, 8, 32
LEARNING_RATE = 0.02
OBJECTIVES = {
  'masked': masked.Masked(MASK),
  'hybrid': mixture.Hybrid(MASK),
  'block': block.Block(MASK, block_size=4),
  'block_ar': block.Block(MASK, block_size=4, ar_weight=0.5),
  'ar': ar.Autoregressive(MASK),
  'd3pm': d3pm.D3PM(MASK),
  'expand': masked.Masked(MASK, expand=True),
  'flex': flex.Flex(MASK),
  'genmd4': genmd4.GenMD4(MASK),
  'sedd': sedd.ScoreEntropy(MASK),
  'uniform': uniform.Uniform(MASK),
  'curriculum': uniform.Uniform(MASK, curriculum_steps=1, tau=0.3),
  'block_uniform': block.BlockUniform(MASK, block_size=4),
  'self_conditioning': mixture.Hybrid(MASK),
}
OBJECTIVES |= {
  'sdtt': objectives.DISTILLATIONS['sdtt'](OBJECTIVES['masked'], round_steps=2),
  'dcd': objectives.DISTILLATIONS['dcd'](OBJECTIVES['uniform'], round_steps=2),
  'sdtt_block_ar': objectives.DISTILLATIONS['sdtt'](
    OBJECTIVES['block_ar'], round_steps=2
  ),
  'sequence': objectives.POLICIES['sequence'](
    OBJECTIVES['masked'], kl_weight=0.1, num_updates=2
  ),
  'coupled': objectives.POLICIES['coupled'](
    OBJECTIVES['masked'], kl_weight=0.1, num_updates=2
  ),
  'dpo': objectives.POLICIES['dpo'](OBJECTIVES['masked'], kl_weight=0.1),
}
# A device has two rows on the first mesh and one on the second, where each kind
# of loop is tried: a set number of calls, one per token, and caches.
SAMPLING_MESHES = (2, 2, 2), (1, 8, 1)
ON_ALL_MESHES = 'fixed_count', 'first_hitting', 'block', 'ar', 'speculate'


def make_mesh(shape):
  num = int(np.prod(shape))
  return meshes.make_mesh(meshes.MeshConfig(*shape), jax.devices()[:num])


def make_network(name, shape, **changes):
  objective = OBJECTIVES[name]
  objective = getattr(objective, 'base', objective)
  config = toys.model_config(
    **{
      **dict(
        vocab_size=VOCAB,
        num_layers=3,
        embed_dim=WIDTH,
        num_heads=8,
        mlp_dim=64,
        mlp='swiglu',
        qk_norm=True,
        causal=objective.autoregressive is not None,
        block_size=objective.block_size,
        time_conditioning='hybrid' in name
        or 'uniform' in name
        or name in ('curriculum', 'dcd', 'flex'),
        tie_embeddings=name != 'ar',
        self_conditioning=name == 'self_conditioning',
      ),
      **changes,
    }
  )
  return TransformerNetwork(config, Shards(*shape[1:]))


def make_scorer(name, network):
  return Scorer(network, OBJECTIVES[name], 20)


def make_optimizer():
  # Adam's first steps are signs of gradients, and rounding decides some.
  return optax.sgd(LEARNING_RATE, momentum=0.9)


@functools.cache
def initial_params(config, scale):
  """Larger weights than initial ones, so that each has an effect."""
  config = dataclasses.replace(config, remat='none', unroll=False)
  params = jax.tree.map(np.copy, toys.large_params(config, scale))
  if config.self_conditioning:  # Initially, its weights are 0.
    kernel = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    params['self_conditioning'] = {'kernel': 0.3 * np.float32(kernel)}
  for name in ('layers', 'last_layer') if config.conv_size else ():
    for conv in 'attention_conv', 'residual_conv':  # Initially, they are 0.
      shape = params[name][conv].shape
      params[name][conv] = np.random.default_rng(0).normal(size=shape) / 3
      params[name][conv] = np.float32(params[name][conv])
  if config.lora:
    flat = traverse_util.flatten_dict(params)
    rng = np.random.default_rng(0)
    for path, x in flat.items():
      if path[-1] == 'lora_b':
        flat[path] = rng.normal(size=x.shape).astype(np.float32)
    params = traverse_util.unflatten_dict(flat)
  return params


def make_params(network, mesh, name, scale=3):
  padding = sharding.padded(VOCAB, network.shards) - VOCAB
  params = dict(initial_params(network.config, scale))
  if name == 'genmd4':
    params['objective'] = {'rate': np.linspace(-1, 2, MASK, dtype=np.float32)}
  for name in sharding.BY_VOCABULARY & set(params):
    x = params[name]
    params[name] = np.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
  return jax.device_put(params, meshes.shardings(mesh, params))


def make_state(network, mesh, name, scale=3):
  params = jax.device_get(make_params(network, mesh, name, scale))
  params, base = network.split(params)
  state = states.TrainState(
    step=np.int32(0),
    params=params,
    ema_params=params,
    opt_state=jax.device_get(make_optimizer().init(params)),
    key=jax.random.key(7),
    base=base,
  )
  if OBJECTIVES[name].uses_frozen:
    frozen = make_params(network, mesh, name, scale / 2)
    frozen = jax.device_get(OBJECTIVES[name].init_frozen(frozen))
    state = state.replace(frozen=frozen)
  return jax.device_put(state, meshes.shardings(mesh, state))


def make_batch(seed):
  rng = np.random.default_rng(seed)
  eligible = np.ones((BATCH, LENGTH), bool)
  eligible[1, :3] = eligible[9] = False
  tokens = rng.integers(MASK, size=eligible.shape).astype(np.int32)
  num = eligible.sum(1).astype(np.int32)
  return types.Batch(tokens, eligible, np.ones(BATCH, np.float32), num, num)


def unpadded(tree):
  """Copies parameters to the host, without the padding of the vocabulary."""

  def cut(path, x):
    name = getattr(path[-1], 'key', '')
    x = np.asarray(x)
    return x[:VOCAB] if name in sharding.BY_VOCABULARY else x

  return jax.tree_util.tree_map_with_path(cut, jax.device_get(tree))


def train(name, shape, num_microbatches=1, scale=3, anneal_steps=0, **changes):
  """Takes a step; returns changes of parameters and average, and metrics."""
  mesh, network = make_mesh(shape), make_network(name, shape, **changes)
  train_step = train_steps.make_train_step(
    make_scorer(name, network),
    make_optimizer(),
    optax.constant_schedule(LEARNING_RATE),
    mesh,
    batch_size=BATCH,
    num_microbatches=num_microbatches,
    ema_decay=0.5,
    anneal_steps=anneal_steps,
  )
  state = make_state(network, mesh, name, scale)
  if anneal_steps:  # Half open.
    state = state.replace(step=state.step + 1)
  initial = unpadded((state.params, state.ema_params))
  batch = meshes.shard_whole_batch(mesh, make_batch(0))
  state, metrics = train_step(state, batch)
  final = unpadded((state.params, state.ema_params))
  state, _ = train_step(state, batch)
  if OBJECTIVES[name].round_steps:  # A round has two steps.
    renewed = OBJECTIVES[name].renew_frozen(state.frozen, state.params)
    jax.tree.map(
      np.testing.assert_array_equal, unpadded(state.frozen), unpadded(renewed)
    )
  assert train_step._cache_size() == 1  # Outputs are inputs again.
  return jax.tree.map(np.subtract, final, initial), jax.device_get(metrics)


@functools.cache
def on_one_device(name):
  return train(name, (1, 1, 1))


def assert_close(a, b, rtol=1e-3):
  """Compares relative to the whole array, as errors would be factors."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  np.testing.assert_equal(np.isnan(a), np.isnan(b))
  a, b = np.nan_to_num(a), np.nan_to_num(b)
  error, size = np.linalg.norm(a - b), np.linalg.norm(a)
  assert error <= rtol * size, (error, size)


flat_leaves = jax.tree_util.tree_leaves_with_path


class TrainTest(parameterized.TestCase):
  @parameterized.parameters(
    ('masked', (2, 2, 2), 2),
    ('hybrid', (2, 4, 1), 1),
    ('block', (8, 1, 1), 1),
    ('ar', (2, 4, 1), 1),
  )
  def test_is_the_same_on_a_mesh(self, name, shape, num_microbatches):
    expected = on_one_device(name)
    jax.tree.map(assert_close, expected, train(name, shape, num_microbatches))

  @parameterized.parameters((8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 1, 8))
  @pytest.mark.slow
  def test_is_the_same_on_every_mesh(self, *shape):
    expected = on_one_device('masked')
    jax.tree.map(assert_close, expected, train('masked', shape))

  @parameterized.parameters(
    ('masked', (1, 4, 2), 1, 'full', False),
    ('masked', (2, 2, 1), 2, 'dots', True),
    ('hybrid', (1, 4, 1), 2, 'dots', False),
    ('block', (2, 2, 2), 1, 'full', True),
    ('block_ar', (2, 2, 2), 2, 'none', False),
    ('block_uniform', (2, 2, 2), 2, 'full', False),
    ('flex', (2, 2, 2), 2, 'none', False),
    ('expand', (2, 2, 2), 2, 'none', False),
    ('ar', (1, 2, 4), 2, 'full', False),
  )
  @pytest.mark.slow
  def test_is_the_same_with_remat_and_microbatches(
    self, name, shape, num_microbatches, remat, unroll
  ):
    jax.tree.map(
      assert_close,
      on_one_device(name),
      train(name, shape, num_microbatches, remat=remat, unroll=unroll),
    )

  @pytest.mark.slow
  def test_is_the_same_with_options_of_imported_networks(self):
    changes = dict(
      time_form='sigma',
      time_dim=16,
      output_bias=True,
      embedding_dim=24,
      tie_embeddings=False,
      norm='layer',
      mlp='gelu_tanh',
      mlp_bias=True,
      num_layers=2,
      conv_size=3,
    )
    one, four = (
      train('hybrid', shape, **changes) for shape in ((1, 1, 1), (1, 2, 2))
    )
    jax.tree.map(assert_close, one, four)

  @parameterized.parameters(
    ('ar', (1, 2, 2)), ('masked', (2, 2, 2)), ('block_ar', (2, 2, 2))
  )
  @pytest.mark.slow
  def test_options_of_published_networks(self, name, shape):
    # Keys shared by two queries each, biases, LayerNorm, learned positions, and
    # a cap and a sink of attention; and the options that turn an autoregressive
    # network into a masked one.
    options = dict(
      num_layers=2,
      num_kv_heads=4,
      attention_bias='all',
      mlp_bias=True,
      attention_cap=2.0,
      attention_sink=True,
    )
    if name == 'ar':
      options |= dict(norm='layer', norm_bias=True, num_positions=LENGTH)
    else:
      options |= dict(shift_outputs=True)
    if name == 'masked':
      options |= dict(anneal_steps=2)
    if name == 'block_ar':
      options |= dict(start_token=3)
    jax.tree.map(
      assert_close,
      train(name, (1, 1, 1), **options),
      train(name, shape, **options),
    )

  @parameterized.parameters(
    ('masked', (2, 2, 2), 1, {'remat': 'full'}),
    ('block_ar', (1, 2, 4), 2, {}),
    ('genmd4', (8, 1, 1), 1, {'unroll': True}),
  )
  @pytest.mark.slow
  def test_adapters_are_the_same(self, name, shape, num_microbatches, changes):
    options = dict(
      lora=LoraConfig(3, 6.0, '.*', dropout=0.3, rslora=False), num_kv_heads=4
    )
    expected = train(name, (1, 1, 1), **options)
    names = {path[-1].key for path, _ in flat_leaves(expected[0][0])}
    self.assertEqual(names - {'rate'}, {'lora_a', 'lora_b'})
    found = train(name, shape, num_microbatches, **options, **changes)
    jax.tree.map(assert_close, expected, found)

  @parameterized.parameters(
    ('sdtt', (2, 2, 2), 2),
    ('dcd', (2, 2, 2), 4),
    ('sdtt_block_ar', (2, 2, 2), 1),
    ('sequence', (2, 2, 2), 2),
    ('coupled', (1, 2, 4), 1),
    ('dpo', (2, 1, 2), 4),
  )
  @pytest.mark.slow
  def test_what_starts_from_a_network_is_the_same(
    self, name, shape, num_microbatches
  ):
    jax.tree.map(
      assert_close, on_one_device(name), train(name, shape, num_microbatches)
    )

  @parameterized.parameters('genmd4', 'sedd')
  def test_own_losses_sum_over_a_split_vocabulary(self, name):
    jax.tree.map(assert_close, on_one_device(name), train(name, (1, 2, 4)))

  @parameterized.parameters('d3pm', 'flex', 'curriculum', 'self_conditioning')
  @pytest.mark.slow
  def test_other_losses_sum_over_a_split_vocabulary(self, name):
    jax.tree.map(assert_close, on_one_device(name), train(name, (1, 2, 4)))

  @pytest.mark.slow
  def test_is_the_same_in_low_precision(self):
    # Parameters are gathered in bfloat16, their gradients in float32. A wrong
    # sum over devices would be wrong by a factor.
    changes = {'dtype': 'bfloat16', 'scale': 1}
    (one, _), (four, _) = (
      train('masked', shape, **changes) for shape in ((1, 1, 1), (1, 4, 1))
    )
    jax.tree.map(functools.partial(assert_close, rtol=0.03), one, four)


@functools.cache
def evaluate(name, shape):
  """Returns the values of a batch of an objective in OBJECTIVES."""
  mesh, network = make_mesh(shape), make_network(name, shape)
  run = evaluate_steps.make_eval_step(
    make_scorer(name, network), mesh, num_draws=2, seed=3
  )
  batch = make_batch(5)._replace(index=np.arange(BATCH, dtype=np.int32))
  batch = meshes.shard_whole_batch(mesh, batch)
  return jax.device_get(run(make_params(network, mesh, name), batch))


class EvalAndSampleTest(parameterized.TestCase):
  @parameterized.parameters(
    ('masked', (2, 2, 2)), ('block_ar', (2, 2, 2)), ('ar', (1, 8, 1))
  )
  def test_evaluation_is_the_same(self, name, shape):
    jax.tree.map(assert_close, evaluate(name, (1, 1, 1)), evaluate(name, shape))

  @parameterized.parameters(
    ('masked', (1, 8, 1)),
    ('hybrid', (2, 2, 2)),
    ('block', (2, 2, 2)),
    ('block_uniform', (2, 2, 2)),
    ('ar', (2, 2, 2)),
    ('flex', (2, 2, 2)),
  )
  @pytest.mark.slow
  def test_other_evaluations_are_the_same(self, name, shape):
    jax.tree.map(assert_close, evaluate(name, (1, 1, 1)), evaluate(name, shape))

  @parameterized.parameters('posterior', *ON_ALL_MESHES)
  def test_samples_are_the_same_and_no_device_waits(self, name):
    self.check_samples(name)

  @parameterized.parameters(
    'ancestral',
    'confidence',
    'remask',
    'psi',
    'edit',
    'renoise',
    'prefix_cache',
    'block_uniform',
    'block_shifted',
    'genmd4',
    'self_conditioning',
    'insert',
  )
  @pytest.mark.slow
  def test_other_samples_are_the_same(self, name):
    self.check_samples(name)

  def check_samples(self, name):
    # Each row, and so each device, has another number of tokens to fill: loops
    # of different lengths would wait for each other forever.
    shapes = SAMPLING_MESHES[: 1 + (name in ON_ALL_MESHES)]
    objective = name if name in OBJECTIVES else 'masked'
    replacing = {'psi': 'uniform', 'renoise': 'uniform', 'edit': 'hybrid'}
    replacing['insert'] = 'flex'
    objective = replacing.get(name, objective)
    draw = Draw(MASK)
    inner = samplers.SAMPLERS['fixed_count'](draw, 2)
    sampler = {
      'block': lambda cls: cls(inner, 4, MASK),
      'prefix_cache': lambda cls: cls(inner, 4, MASK, refresh_calls=1),
      'posterior': lambda cls: cls(draw, 4, OBJECTIVES[objective]),
      'edit': lambda cls: cls(draw, 0.2, 0.2, num_corrections=3),
      'renoise': lambda cls: cls(draw, 4, OBJECTIVES['uniform']),
      'insert': lambda cls: cls(draw, 4, OBJECTIVES['flex']),
      'psi': lambda cls: cls(draw, 4, OBJECTIVES['uniform'], greedy_tail=True),
      # At random, since on a blank canvas confidences are tied up to rounding.
      'confidence': lambda cls: cls(draw, 4, 'random'),
      'ar': lambda cls: cls(draw),
      'speculate': lambda cls: cls(draw, 4),
      'first_hitting': lambda cls: cls(draw),
    }
    changes = {}
    if name == 'speculate':
      objective = 'block_ar'
    if name == 'block_shifted':
      name = objective = 'block'
      changes = dict(shift_outputs=True, self_conditioning=True)
    if objective == 'block_uniform':
      name = 'block'
      inner = samplers.SAMPLERS['posterior'](draw, 2, OBJECTIVES['uniform'])
    # With the learned rates; with the memory of predictions.
    if objective in ('genmd4', 'self_conditioning'):
      name = 'posterior'
    sampler = sampler.get(name, lambda cls: cls(draw, 4))(
      samplers.SAMPLERS[name]
    )
    num_fixed = np.array([[LENGTH, LENGTH, 0, 2, 6, 7, 1, 3]]).T
    if objective == 'ar':
      num_fixed = np.full((8, 1), 3)
    fixed = np.arange(LENGTH)[None] < num_fixed
    if name == 'insert':
      fixed[:, -1] = True
    tokens = np.where(fixed, 5, MASK).astype(np.int32)
    if name == 'insert':
      tokens[:, -1] = 6

    def sample(shape):
      mesh = make_mesh(shape)
      network = make_network(objective, shape, **changes)
      run = sample_steps.make_sample_step(
        make_scorer(objective, network), sampler, mesh
      )
      canvas = meshes.shard_whole_batch(mesh, types.Canvas(tokens, fixed))
      return jax.device_get(
        run(make_params(network, mesh, objective), jax.random.key(1), canvas)
      ).tokens

    expected = sample((1, 1, 1))
    for shape in shapes:
      np.testing.assert_array_equal(sample(shape), expected, str(shape))


class MaxOverBatchTest(parameterized.TestCase):
  @parameterized.parameters((), ('data',), ('fsdp',), ('data', 'fsdp'))
  def test_of_a_value_that_differs_along_some_axes(self, *axes):
    def largest(x):
      return sharding.max_over_batch(jnp.max(x))

    x = np.arange(24).reshape(12, 2)
    run = jax.shard_map(
      largest, mesh=make_mesh((2, 2, 2)), in_specs=P(axes), out_specs=P()
    )
    self.assertEqual(jax.jit(run)(x), 23)


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 8, 1),), ((2, 4, 1),), ((1, 4, 2),), ((2, 2, 2),), ((1, 1, 8),)
  )
  def test_a_device_holds_its_share_of_the_state(self, shape):
    mesh = make_mesh(shape)
    network = make_network('masked', shape, vocab_size=64, embed_dim=128)
    init = lambda: states.init_state(
      network, OBJECTIVES['masked'], optax.adamw(1e-3), 0, True
    )
    state = meshes.init_sharded(mesh, init)
    leaves = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
    whole = sum(x.nbytes for x in leaves)
    own = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    self.assertLess(own, 1.05 * whole / (shape[1] * shape[2]))

  def test_blocks_are_gathered_one_at_a_time(self):
    shape, num_layers = (1, 8, 1), 5
    mesh = make_mesh(shape)
    network = make_network('masked', shape, num_layers=num_layers)
    train_step = train_steps.make_train_step(
      make_scorer('masked', network),
      make_optimizer(),
      optax.constant_schedule(LEARNING_RATE),
      mesh,
      batch_size=BATCH,
      num_microbatches=1,
      ema_decay=0.5,
    )
    state = make_state(network, mesh, 'masked')
    batch = meshes.shard_whole_batch(mesh, make_batch(0))
    text = train_step.lower(state, batch).compile().as_text()
    results = re.findall(r'= (.*?) all-gather(?:-start)?\(', text)
    sizes = [
      np.prod([int(n) for n in dims.split(',') if n])
      for result in results
      for dims in re.findall(r'f32\[([\d,]*)\]', result)
    ]
    self.assertNotEmpty(sizes)
    self.assertIn('reduce-scatter', text)
    # The largest matrix of one block; a stack of them would be 4 times that.
    self.assertLessEqual(max(sizes), WIDTH * 64)


class SpecTest(parameterized.TestCase):
  def test_every_matrix_is_split(self):
    network = make_network(
      'hybrid', (1, 2, 2), tie_embeddings=False, num_positions=LENGTH
    )
    params = jax.eval_shape(lambda: network.init_params(jax.random.key(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      if path[-1].key == 'position_embedding':
        self.assertIn('fsdp', sharding.spec(path, leaf.ndim, network.shards))
      if path[-1].key not in ('kernel', 'embedding', 'output'):
        continue
      spec = sharding.spec(path, leaf.ndim, network.shards)
      self.assertIn('fsdp', spec, jax.tree_util.keystr(path))
      if 'time_embedding' not in jax.tree_util.keystr(path):
        self.assertIn('tensor', spec, jax.tree_util.keystr(path))

  @parameterized.parameters(
    ((1, 3, 1), r'mesh.fsdp=3 must divide model.embed_dim=32'),
    ((1, 1, 3), r'mesh.tensor=3 must divide model.num_heads=8'),
    ((1, 1, 4), r'mesh.tensor=4 must divide model.num_kv_heads=2'),
    ((1, 1, 2), r'mesh.tensor=2 must be 1 with model.joint_qk_norm', True),
  )
  def test_a_network_that_cannot_be_split(self, shape, message, joint=False):
    with self.assertRaisesRegex(InputError, message):
      make_network('masked', shape, num_kv_heads=2, joint_qk_norm=joint)

  @parameterized.parameters(
    ((-1, 2, 2), (2, 2, 2)), ((2, -1, 1), (2, 4, 1)), ((1, 1, -1), (1, 1, 8))
  )
  def test_minus_one_takes_the_remaining_devices(self, sizes, shape):
    mesh = meshes.make_mesh(meshes.MeshConfig(*sizes))
    self.assertEqual(tuple(mesh.shape.values()), shape)

  @parameterized.parameters(
    ((-1, -1, 1), 'only one axis can be -1'),
    ((-1, 3, 1), 'must multiply to the 8 devices'),
    ((2, 2, 1), 'must multiply to the 8 devices'),
    ((1, 0, 1), 'mesh.fsdp=0 must be >= 1, or -1'),
  )
  def test_sizes_that_do_not_fit(self, sizes, message):
    with self.assertRaisesRegex(InputError, message):
      meshes.make_mesh(meshes.MeshConfig(*sizes))


if __name__ == '__main__':
  absltest.main()
