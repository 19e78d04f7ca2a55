"""Tests of nanodlm.training.optim: weight decay, schedules and descent."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanodlm.model import lora
from nanodlm.model.network import TransformerNetwork
from nanodlm.training import optim
from nanodlm.types import InputError
from tests import toys


def config(**changes):
  fields = dict(
    name='adamw',
    learning_rate=0.1,
    schedule='cosine',
    warmup_steps=4,
    decay_from_step=0,
    final_fraction=0.1,
    weight_decay=0.0,
    b1=0.9,
    b2=0.99,
    momentum=0.95,
    clip_norm=1.0,
    ema_decay=0.0,
  )
  return optim.OptimConfig(**{**fields, **changes})


def shapes():
  return jax.eval_shape(
    TransformerNetwork(
      toys.model_config(
        qk_norm=True,
        time_conditioning=True,
        time_form='sigma',
        embedding_dim=8,
        output_bias=True,
        num_positions=4,
        tie_embeddings=False,
        mlp='swiglu',
      )
    ).init_params,
    jax.random.key(0),
  )


def flat(tree, is_leaf=None):
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {'/'.join(part.key for part in path): leaf for path, leaf in leaves}


class OptimTest(parameterized.TestCase):
  def test_matrices_and_embeddings_decay(self):
    decayed = flat(optim.decay_mask(shapes()))
    for path, shape in flat(shapes()).items():
      ndim = shape.ndim - ('layers' in path)
      self.assertEqual(decayed[path], ndim == 2, path)

  def test_adapters_decay_and_are_matrices(self):
    params = {'mlp_in': {name: jnp.ones((2, 3)) for name in lora.LEAVES}}
    self.assertTrue(all(flat(optim.decay_mask(params)).values()))
    self.assertNotIn(None, optim.muon_dimensions(params)['mlp_in'].values())

  def test_muon_takes_the_matrices_of_the_blocks(self):
    is_leaf = lambda x: (
      x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
    )
    dimensions = flat(optim.muon_dimensions(shapes()), is_leaf)
    layers = (
      'query',
      'key',
      'value',
      'attention_out',
      'mlp_in',
      'mlp_gate',
      'mlp_out',
    )
    expected = {
      f'{block}/{layer}/kernel'
      for layer in layers
      for block in ('layers', 'last_layer')
    }
    self.assertEqual({path for path, x in dimensions.items() if x}, expected)
    for path in expected:
      ndim = flat(shapes())[path].ndim
      self.assertEqual(ndim, 3 if path.startswith('layers') else 2)
      self.assertEqual(
        dimensions[path], optax.contrib.MuonDimensionNumbers(ndim - 2, ndim - 1)
      )

  @parameterized.parameters(*optim.OPTIMIZERS)
  def test_decays_by_the_learning_rate_times_the_decay(self, name):
    # Without a gradient only the decay remains.
    params = {
      'embedding': jnp.ones((4, 2)),
      'norm': {'scale': jnp.ones(2)},
      'dense': {'kernel': jnp.ones((2, 4)), 'bias': jnp.ones(4)},
    }
    decayed = {'embedding', 'dense/kernel'}
    optimizer = optim.make_optimizer(
      config(
        name=name,
        schedule='constant',
        warmup_steps=0,
        weight_decay=0.2,
        clip_norm=0.0,
      ),
      num_steps=10,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in flat(updates).items():
      np.testing.assert_allclose(
        update, -0.1 * 0.2 * (path in decayed), rtol=1e-5, err_msg=path
      )

  @parameterized.parameters(*optim.OPTIMIZERS)
  def test_descends(self, name):
    rng = np.random.default_rng(0)
    target = {
      'embedding': rng.normal(size=(6, 4)),
      'norm': {'scale': np.ones(4)},
      'dense': {'kernel': rng.normal(size=(4, 5))},
    }
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), target)
    loss = lambda params: sum(
      jnp.sum((x - y) ** 2)
      for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(target))
    )
    optimizer = optim.make_optimizer(config(name=name), num_steps=60)

    @jax.jit
    def step(_, carry):
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      return optax.apply_updates(params, updates), state

    start = loss(params)
    params, _ = jax.lax.fori_loop(0, 60, step, (params, optimizer.init(params)))
    self.assertLess(loss(params), 0.1 * start)

  def test_clips_the_global_norm(self):
    params = {'kernel': jnp.zeros((2, 2)), 'scale': jnp.zeros(2)}
    gradient = {'kernel': jnp.full((2, 2), 30.0), 'scale': jnp.full(2, 40.0)}
    scaled = jax.tree.map(lambda g: g / optax.tree.norm(gradient), gradient)
    moments = []
    for clip_norm, g in ((1.0, gradient), (0.0, scaled)):
      optimizer = optim.make_optimizer(config(clip_norm=clip_norm), 10)
      _, state = optimizer.update(g, optimizer.init(params), params)
      moments.append(optax.tree.get(state, 'mu'))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *moments
    )

  @parameterized.parameters(
    # Steps: 0, end of the warm-up, after it, half of the rest, last, end.
    ('cosine', [0.025, 0.1, 0.1, 0.055, None, 0.01]),
    ('constant', [0.025, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ('wsd', [0.025, 0.1, 0.1, 0.1, None, 0.01]),
  )
  def test_learning_rates(self, name, expected):
    schedule = optim.make_schedule(config(schedule=name), num_steps=104)
    for step, rate in zip((0, 3, 4, 54, 103, 104), expected):
      if rate is not None:
        np.testing.assert_allclose(
          schedule(step), rate, rtol=1e-5, err_msg=step
        )
    rates = np.array([schedule(step) for step in range(105)])
    self.assertTrue(np.all(np.diff(rates[:4]) > 0))
    self.assertTrue(np.all(np.diff(rates[4:]) <= 1e-8))

  def test_wsd_decays_over_the_last_fifth(self):
    schedule = optim.make_schedule(
      config(schedule='wsd', warmup_steps=10, final_fraction=0.0), 100
    )
    np.testing.assert_allclose(
      [schedule(s) for s in (79, 80, 90, 100)], [0.1, 0.1, 0.05, 0.0], atol=1e-7
    )

  @parameterized.product(
    name=['cosine', 'wsd'],
    warmup_steps=[0, 1, 50, 85, 99],
    decay_from_step=[0, 99],
  )
  def test_every_decay_ends_with_the_run(
    self, name, warmup_steps, decay_from_step
  ):
    changes = dict(
      schedule=name, warmup_steps=warmup_steps, decay_from_step=decay_from_step
    )
    schedule = optim.make_schedule(config(**changes), 100)
    np.testing.assert_allclose(
      [schedule(max(warmup_steps, decay_from_step)), schedule(100)],
      [0.1, 0.01],
      rtol=1e-5,
    )

  def test_a_decay_from_a_step(self):
    changes = dict(warmup_steps=10, decay_from_step=60, final_fraction=0.0)
    for name, expected in (
      ('wsd', [0.1, 0.1, 0.1, 0.05, 0.0]),
      ('cosine', [0.1, 0.1, 0.1, 0.05, 0.0]),
    ):
      schedule = optim.make_schedule(config(schedule=name, **changes), 100)
      found = [schedule(step) for step in (10, 59, 60, 80, 100)]
      np.testing.assert_allclose(found, expected, atol=1e-7)

  def test_a_run_that_ends_in_its_warmup_is_warned_of(self):
    self.assertEqual(optim.describe_end(config(warmup_steps=9), 10), '')
    text = optim.describe_end(config(warmup_steps=20), 10)
    for words in ('optim.warmup_steps=20', 'train.num_steps=10', ' 0.05,'):
      self.assertIn(words, text)

  def test_a_changed_schedule_is_warned_of(self):
    before = optim.make_schedule(config(), 20)
    self.assertEqual(optim.describe_change(before, config(), 20, 9), '')
    new = config(learning_rate=0.3, schedule='constant')
    text = optim.describe_change(before, new, 20, 5)
    self.assertRegex(text, ' was 0.1 in step 5 and is 0.3 in step 6')

  @parameterized.parameters(*optim.OPTIMIZERS)
  def test_skipped_steps_count_for_the_rate(self, name):
    # Without a gradient, an update is the rate times the decay.
    optimizer = optim.make_optimizer(
      config(name=name, weight_decay=0.2, warmup_steps=0), num_steps=10
    )
    params = {'dense': {'kernel': jnp.ones((2, 4))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optim.at_step(optimizer.init(params), jnp.int32(5))
    updates, _ = optimizer.update(zeros, state, params)
    np.testing.assert_allclose(
      updates['dense']['kernel'], -0.2 * 0.055, rtol=1e-5
    )

  @parameterized.parameters(0, 1)
  def test_without_a_warmup_the_first_step_is_at_the_peak(self, warmup_steps):
    schedule = optim.make_schedule(config(warmup_steps=warmup_steps), 10)
    np.testing.assert_allclose(schedule(0), 0.1, rtol=1e-6)

  @parameterized.parameters(
    ('name', 'sgd'),
    ('schedule', 'linear'),
    ('learning_rate', 0.0),
    ('warmup_steps', -1),
    ('weight_decay', -0.1),
    ('clip_norm', -1.0),
    ('b1', 1.0),
    ('b2', -0.1),
    ('momentum', 1.0),
    ('ema_decay', 1.0),
    ('final_fraction', 1.1),
    ('learning_rate', float('nan')),
    ('learning_rate', float('inf')),
    ('weight_decay', float('inf')),
    ('decay_from_step', -1),
    ('decay_from_step', 3),  # Less than warmup_steps.
  )
  def test_errors(self, key, value):
    with self.assertRaisesRegex(InputError, f'^optim.{key}={value!r} '):
      config(**{key: value})
