"""Tests of adapters, next to the weights and merged into them."""

import dataclasses
import functools

from flax import traverse_util
import jax
import numpy as np
import optax
import pytest

from nanodlm.model import transformer
from nanodlm.model.lora import LAYERS, LoraConfig
from nanodlm.model.network import TransformerNetwork
from nanodlm.training import state as states
from nanodlm.types import InputError
from tests import toys

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def make_config(rank=2, alpha=3.0, targets='.*', dropout=0.0, rslora=False):
  return LoraConfig(rank, alpha, targets, dropout, rslora)


def make_network(config, **changes):
  shape = dict(num_layers=3, mlp='swiglu', mlp_bias=True, attention_bias='all')
  shape |= changes
  return TransformerNetwork(toys.model_config(**shape, lora=config))


def random_params(network):
  """Parameters of which each has an effect."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(network.init_params, jax.random.key(0))
  draw = lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32)
  return jax.tree.map(draw, shapes)


def leaves(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(network, params, dropout_keys=None):
  return network.hidden(params, TOKENS, None, dropout_keys=dropout_keys).states


@pytest.mark.parametrize('rslora', [False, True])
def test_merged_weights_are_the_network(rslora):
  config = make_config(rslora=rslora)
  network = make_network(config)
  params = random_params(network)
  whole = make_network(None)
  merged = network.merge(params)
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  assert shapes(merged) == shapes(
    jax.eval_shape(whole.init_params, jax.random.key(0))
  )
  np.testing.assert_allclose(
    hidden_of(network, params), hidden_of(whole, merged), atol=1e-5
  )
  # By hand, of one matrix.
  found, given = (leaves(x) for x in (merged, params))
  path = 'last_layer/mlp_out'
  scale = 3 / 2**0.5 if rslora else 3 / 2
  product = given[f'{path}/lora_a'] @ given[f'{path}/lora_b']
  np.testing.assert_allclose(
    found[f'{path}/kernel'],
    given[f'{path}/kernel'] + scale * product,
    atol=1e-6,
  )


def test_training_starts_from_the_base():
  network = make_network(make_config(dropout=0.5))
  params = network.init_params(jax.random.key(0))
  trained, base = network.split(params)
  assert {path.split('/')[-1] for path in leaves(trained)} == {
    'lora_a',
    'lora_b',
  }
  expected = hidden_of(make_network(None), base)
  keys = jax.random.split(jax.random.key(1), 2)
  np.testing.assert_array_equal(hidden_of(network, params, keys), expected)
  # In every layer that has them.
  assert len(leaves(trained)) == 2 * 2 * len(LAYERS)
  joined = states.join(trained, base)
  jax.tree.map(np.testing.assert_array_equal, joined, params)


def test_the_base_has_the_dtype_of_products():
  network = make_network(make_config(), dtype='bfloat16')
  params = random_params(network)
  trained, base = network.split({**params, 'objective': {'rate': np.ones(3)}})
  assert set(trained) == {'layers', 'last_layer', 'objective'}
  dtypes = {path: str(x.dtype) for path, x in leaves((trained, base)).items()}
  assert dtypes['1/embedding'] == dtypes['1/layers/query/kernel'] == 'bfloat16'
  assert (
    dtypes['1/final_norm/scale'] == dtypes['0/layers/query/lora_a'] == 'float32'
  )
  # The products are in bfloat16 either way.
  np.testing.assert_array_equal(
    hidden_of(network, params),
    hidden_of(network, states.join(*network.split(params))),
  )


@pytest.mark.slow
def test_full_rank_reaches_the_loss_of_full_training():
  # Both train the same layers, to fit texts of random tokens.
  config = make_config(rank=16, alpha=16.0)
  network, plain = make_network(config), make_network(None)
  params = network.init_params(jax.random.key(0))
  params = jax.tree.map(lambda x: 5 * x, params)
  rng = np.random.default_rng(0)
  tokens = rng.integers(12, size=(8, 6)).astype(np.int32)
  target = jax.nn.one_hot(rng.integers(12, size=(8, 6)), 12)

  def fit(network, rate, trained, rest):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, 300))

    def loss(trained):
      params = states.join(trained, rest)
      hidden = network.hidden(params, tokens, None).states
      logits = network.logits(network.kernel(params), hidden)
      return optax.softmax_cross_entropy(logits, target).mean()

    def step(carry, _):
      trained, state = carry
      value, gradient = jax.value_and_grad(loss)(trained)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(trained, updates), state), value

    init = trained, optimizer.init(trained)
    return jax.jit(lambda: jax.lax.scan(step, init, length=300)[1])()

  adapters, base = network.split(params)
  flat = traverse_util.flatten_dict(base)
  is_dense = lambda path: path[-1] == 'kernel'
  dense, rest = (
    traverse_util.unflatten_dict(
      {path: x for path, x in flat.items() if is_dense(path) == wanted}
    )
    for wanted in (True, False)
  )
  full = fit(plain, 1e-2, dense, rest)
  # A step of both factors moves their product further, and twice this rate ends
  # elsewhere on another processor.
  low = fit(network, 2e-3, adapters, base)
  np.testing.assert_allclose(low[0], full[0], rtol=1e-6)
  assert full[-1] < 0.05 * full[0] and low[-1] < 1.1 * full[-1] + 0.01


def test_targets():
  network = make_network(make_config(targets='query|value|mlp_.*'))
  trained, _ = network.split(random_params(network))
  layers = {path.split('/')[1] for path in leaves(trained)}
  assert layers == {'query', 'value', 'mlp_gate', 'mlp_in', 'mlp_out'}


def test_dropout_is_of_the_input_of_adapters():
  config = make_config(dropout=0.5)
  network = make_network(config)
  params = random_params(network)
  keys = jax.random.split(jax.random.key(1), 2)
  plain, dropped = hidden_of(network, params), hidden_of(network, params, keys)
  assert np.abs(plain - dropped).max() > 1e-2
  # Its mean over keys is the network without, if the network is linear in it.
  last = make_network(
    dataclasses.replace(config, targets='mlp_out'), num_layers=1
  )
  params = random_params(last)
  params['final_norm']['scale'] = np.ones(16, np.float32)
  apply = jax.jit(jax.vmap(lambda key: transformer_output(last, params, key)))
  mean = apply(jax.random.split(jax.random.key(2), 4000)).mean(0)
  expected = transformer_output(last, params, None)
  np.testing.assert_allclose(mean, expected, atol=0.05 * np.abs(expected).max())


def transformer_output(network, params, key):
  """The residual stream of one layer, without the final norm."""
  config = network.config
  x = 0.5 * jax.random.normal(jax.random.key(3), (2, 6, 16))
  keys = None if key is None else jax.random.split(key, 2)
  context = transformer.Context(
    rotary=transformer.rotary_table(np.arange(6), config.head_dim, 1e4),
    dropout_keys=keys,
  )
  block = transformer.Block(config)
  return block.apply({'params': params['last_layer']}, x, 0, None, context)[0]


@pytest.mark.parametrize('targets', ['q_proj', 'mlp_gate'])
def test_targets_that_a_network_lacks(targets):
  with pytest.raises(InputError, match=f"^lora.targets='{targets}' matches"):
    toys.model_config(lora=make_config(targets=targets), mlp='gelu')


@pytest.mark.parametrize(
  'key, value',
  [('rank', -1), ('alpha', 0.0), ('dropout', 1.0), ('targets', '(')],
)
def test_errors(key, value):
  words = f'^lora.{key}={value!r}'.replace('(', r'\(')
  with pytest.raises(InputError, match=words):
    make_config(**{key: value})
