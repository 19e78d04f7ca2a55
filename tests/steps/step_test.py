"""Tests of nanodlm.steps, which are invariant to devices and micro-batches."""

import dataclasses
import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanodlm.devices import mesh as meshes
from nanodlm.model import transformer
from nanodlm.model.network import TransformerNetwork
from nanodlm.noise.categorical import Draw
from nanodlm.objectives.ar import Autoregressive
from nanodlm.objectives.block import Block
from nanodlm.objectives.flex import Flex
from nanodlm.objectives.genmd4 import GenMD4
from nanodlm.objectives.masked import Masked
from nanodlm.objectives.mixture import Hybrid
from nanodlm.objectives.uniform import Uniform
from nanodlm.samplers.ar import LeftToRight
from nanodlm.samplers.block import Block as BlockSampler
from nanodlm.samplers.confidence import Confidence
from nanodlm.samplers.fixed_count import FixedCount
from nanodlm.samplers.guidance import Guided
from nanodlm.samplers.posterior import Posterior
from nanodlm.samplers.prefix_cache import PrefixCache
from nanodlm.samplers.remask import Remask
from nanodlm.samplers.speculate import Speculate
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps import sample as sample_steps
from nanodlm.steps import train as train_steps
from nanodlm.steps.network import check_batch_size, Denoiser, Scorer
from nanodlm.training import state as states
from nanodlm.types import Batch, Canvas, InputError, Sampler
from tests import toys

MASK = 11
BATCH, LENGTH = 16, 8
LEARNING_RATE = 0.1
EMA_DECAY = 0.15  # above step 0's (1 + 0) / (10 + 0), below step 1's 2 / 11
OBJECTIVES = {
  'count': Masked(MASK),
  'stratified': Masked(MASK, noise='stratified'),
  'uniform': Masked(MASK, noise='uniform', min_time=0.05),
  'hybrid': Hybrid(MASK),
  'ar': Autoregressive(MASK),
  'block': Block(MASK, block_size=4),
  'block_ar': Block(MASK, block_size=4, ar_weight=0.5),
  'block_shifted': Block(MASK, block_size=4),
  'block_ar_shifted': Block(MASK, block_size=4, ar_weight=0.5),
  'genmd4': GenMD4(MASK),
  'flex': Flex(MASK),
  # The first of two steps.
  'curriculum': Uniform(MASK, curriculum_steps=1, tau=0.3),
  'self_conditioning': Masked(MASK),
}
# Weights that matter.
CONDITIONING = {
  'kernel': np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
}


@dataclasses.dataclass(frozen=True)
class Spy:
  """An objective that records its noise."""

  inner: object
  seen: list

  def __getattr__(self, name):
    return getattr(self.inner, name)

  def bind(self, params):
    return dataclasses.replace(self, inner=self.inner.bind(params))

  def curriculum(self):
    return dataclasses.replace(self, inner=self.inner.curriculum())

  def at_step(self, step):
    return dataclasses.replace(self, inner=self.inner.at_step(step))

  def loss(self, *args):
    return type(self.inner).loss(self, *args)

  def corrupt(self, keys, levels, x0, eligible):
    noised = self.inner.corrupt(keys, levels, x0, eligible)
    record = {
      'key': jax.random.key_data(keys),
      'level': levels,
      'x0': x0,
      'eligible': eligible,
      'tokens': noised.tokens,
      't': noised.t,
      'scored': noised.scored,
      **noised.fields,
    }
    jax.debug.callback(
      lambda record: self.seen.append(jax.tree.map(np.array, record)), record
    )
    return noised

  def records(self):
    """Returns the noise since the last call, rows sorted by key."""
    jax.effects_barrier()
    record = jax.tree.map(lambda *x: np.concatenate(x), *self.seen)
    self.seen.clear()
    order = np.lexsort(record['key'].T)
    return jax.tree.map(lambda x: x[order], record)


def network(name, dropout=0.0):
  config = toys.model_config(
    num_layers=2,
    causal=OBJECTIVES[name].autoregressive is not None,
    block_size=OBJECTIVES[name].block_size,
    shift_outputs=name.endswith('_shifted'),
    dropout=dropout,
    self_conditioning=name == 'self_conditioning',
  )
  return TransformerNetwork(config)


def scorer(name, objective=None, dropout=0.0):
  objective = objective or OBJECTIVES[name]
  return Scorer(network(name, dropout), objective, chunk_size=20)


def make_mesh(num_devices):
  return meshes.make_mesh(
    meshes.MeshConfig(num_devices, 1, 1), jax.devices()[:num_devices]
  )


def initial_params():
  """Parameters on the host, for causal networks too."""
  return toys.large_params(network('count').config)


def make_state(mesh, name='count'):
  params = initial_params()
  if name == 'genmd4':
    rate = np.linspace(-1, 2, MASK, dtype=np.float32)
    params = {**params, 'objective': {'rate': rate}}
  if name == 'self_conditioning':
    params = {**params, 'self_conditioning': CONDITIONING}
  state = states.TrainState(
    step=np.int32(0),
    params=params,
    ema_params=params,
    opt_state=optax.sgd(LEARNING_RATE, momentum=0.9).init(params),
    key=jax.random.key(7),
  )
  return jax.device_put(state, meshes.replicated(mesh))


def make_batch(seed=0, segments=False):
  """A batch with a prompt, padding, a row of padding, and whole rows."""
  rng = np.random.default_rng(seed)
  eligible = np.ones((BATCH, LENGTH), bool)
  eligible[1, :3] = eligible[4, 5:] = eligible[9] = False
  num = eligible.sum(1).astype(np.int32)
  segment_ids = None
  if segments:
    ends = (np.arange(LENGTH) > 3).astype(np.int32)
    segment_ids = np.tile(ends, (BATCH, 1))
  tokens = rng.integers(MASK, size=eligible.shape).astype(np.int32)
  weight = np.ones(BATCH, np.float32)
  return Batch(tokens, eligible, weight, num, num, segment_ids)


@functools.cache
def trainer(name, num_devices, num_microbatches, dropout):
  """Returns (jitted step, spy, mesh), compiled once for all tests."""
  spy, mesh = Spy(OBJECTIVES[name], []), make_mesh(num_devices)
  optimizer = optax.sgd(LEARNING_RATE, momentum=0.9)
  return (
    train_steps.make_train_step(
      scorer(name, spy, dropout),
      optimizer,
      optax.constant_schedule(1e-3),
      mesh,
      batch_size=BATCH,
      num_microbatches=num_microbatches,
      ema_decay=EMA_DECAY,
    ),
    spy,
    mesh,
  )


def host(tree):
  return jax.tree.map(np.array, tree)


@functools.cache
def two_steps(name, num_devices, num_microbatches, dropout=0.1):
  """Returns states and metrics after each of two steps, and their noise."""
  train, spy, mesh = trainer(name, num_devices, num_microbatches, dropout)
  jax.effects_barrier()
  spy.seen.clear()  # Noise of other tests.
  state, history, noise = make_state(mesh, name), [], []
  for seed in range(2):
    state, metrics = train(state, meshes.shard_batch(mesh, make_batch(seed)))
    # NumPy cannot represent keys.
    history.append(
      (host((state.step, state.params, state.ema_params)), host(metrics))
    )
    noise.append(spy.records())
  return history, noise


def assert_close(a, b, rtol=1e-4, atol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


class TrainStepTest(parameterized.TestCase):
  @parameterized.parameters(
    ('count', 4, 2), ('stratified', 4, 2), ('ar', 8, 1), ('block', 4, 2)
  )
  def test_devices_and_microbatches_change_nothing(
    self, name, num_devices, num_microbatches
  ):
    self.check_devices_and_microbatches(name, num_devices, num_microbatches)

  @parameterized.parameters(
    ('count', 8, 1),
    ('count', 1, 4),
    ('uniform', 4, 2),
    ('ar', 1, 4),
    ('block_ar', 4, 2),
    ('hybrid', 4, 2),
    ('genmd4', 4, 2),
    ('flex', 4, 2),
    ('curriculum', 4, 2),
    ('self_conditioning', 4, 2),
  )
  @pytest.mark.slow
  def test_other_devices_and_objectives(
    self, name, num_devices, num_microbatches
  ):
    self.check_devices_and_microbatches(name, num_devices, num_microbatches)

  def check_devices_and_microbatches(self, name, num_devices, num_microbatches):
    # With dropout, whose masks also belong to the example.
    history, noise = two_steps(name, 1, 1)
    others, other_noise = two_steps(name, num_devices, num_microbatches)
    # Other programs may round the many products of such noise differently.
    rtol = 1e-5 if name in ('hybrid', 'curriculum') else 0
    assert_close(noise, other_noise, rtol, atol=0)
    assert_close(history, others)
    train, _, _ = trainer(name, num_devices, num_microbatches, 0.1)
    self.assertEqual(train._cache_size(), 1)  # Both steps used one program.

  def test_a_truncated_loss_is_not_a_bound(self):
    for name in 'uniform', 'stratified':  # The first has a min_time.
      (_, metrics), _ = two_steps(name, 1, 1)[0]
      assert np.isfinite(metrics['loss'])
      assert np.isnan(metrics['nll']) == (name == 'uniform')

  @parameterized.parameters(*OBJECTIVES)
  def test_rows_and_steps_have_noise_of_their_own(self, name):
    _, noise = two_steps(name, 1, 1)
    noise = jax.tree.map(lambda *x: np.concatenate(x), *noise)
    num_draws = 2 if name == 'genmd4' else 1
    self.assertLen(np.unique(noise['key'], axis=0), 2 * BATCH * num_draws)
    if name == 'ar':
      return
    # Which positions of whole rows are noisy, if some but not all are.
    whole = noise['eligible'].all(1)
    masked = (noise['tokens'] != noise['x0'])[whole]
    some = masked[(masked.sum(1) > 1) & (masked.sum(1) < LENGTH - 1)]
    self.assertGreater(len(np.unique(some, axis=0)), 0.7 * len(some))
    levels = len(np.unique(noise['level'])) * num_draws
    levels *= OBJECTIVES[name].group_size
    self.assertEqual(levels, noise['level'].size)

  def test_what_an_objective_learns_has_the_gradient_of_its_noise(self):
    @dataclasses.dataclass(frozen=True)
    class Shifted(GenMD4):
      slope: float = 0.0

      def loss(self, *args):
        scores = super().loss(*args)
        extra = self.slope * jnp.sum(self.rates)
        return scores._replace(total=scores.total + extra)

    mesh, batch = make_mesh(2), make_batch(3)
    rates = {}
    for slope in (0.0, 7.0):
      train = train_steps.make_train_step(
        scorer('genmd4', Shifted(MASK, slope=slope)),
        optax.sgd(LEARNING_RATE),
        optax.constant_schedule(1e-3),
        mesh,
        batch_size=BATCH,
        num_microbatches=2,
        ema_decay=EMA_DECAY,
      )
      state = make_state(mesh, 'genmd4').replace(
        opt_state=jax.device_put(
          optax.sgd(LEARNING_RATE).init({}), meshes.replicated(mesh)
        )
      )
      raw = np.array(state.params['objective']['rate'])
      state, metrics = train(state, meshes.shard_batch(mesh, batch))
      rates[slope] = np.array(state.params['objective']['rate'])
    # An example is drawn twice, and counted once.
    for key in ('weight', 'num_bytes'):
      self.assertEqual(metrics[key], batch.eligible.sum())
    self.assertGreater(np.min(abs(rates[0.0] - raw)), 0)
    total = 2 * 2 * 7 / batch.eligible.sum()  # devices, micro-batches
    np.testing.assert_allclose(
      rates[7.0] - rates[0.0],
      -LEARNING_RATE * total / (1 + np.exp(-raw)),
      rtol=1e-3,
    )

  def test_a_curriculum(self):
    # The first step reads soft tokens and reports no bound; the next one is
    # that of the plain objective, with the same key.
    (_, first), (_, second) = two_steps('curriculum', 1, 1)[0]
    self.assertTrue(np.isnan(first['nll']) and np.isfinite(first['loss']))
    mesh = make_mesh(1)
    plain = train_steps.make_train_step(
      scorer('curriculum', Uniform(MASK), 0.1),
      optax.sgd(LEARNING_RATE, momentum=0.9),
      optax.constant_schedule(1e-3),
      mesh,
      batch_size=BATCH,
      num_microbatches=1,
      ema_decay=EMA_DECAY,
    )
    step, params, ema_params = two_steps('curriculum', 1, 1)[0][0][0]
    state = make_state(mesh).replace(
      step=step, params=params, ema_params=ema_params
    )
    state = jax.device_put(state, meshes.replicated(mesh))
    _, metrics = plain(state, meshes.shard_batch(mesh, make_batch(1)))
    np.testing.assert_allclose(second['loss'], metrics['loss'], rtol=1e-6)
    np.testing.assert_array_equal(metrics['loss'], metrics['nll'])

  def test_dropout_matters(self):
    with_dropout, noise = two_steps('count', 1, 1)
    without, other_noise = two_steps('count', 2, 2, 0.0)
    jax.tree.map(np.testing.assert_array_equal, noise, other_noise)
    self.assertGreater(
      abs(with_dropout[0][1]['loss'] - without[0][1]['loss']), 1e-2
    )

  @parameterized.parameters('count', 'uniform', 'ar')
  def test_the_gradient_is_that_of_a_dense_loss(self, name):
    # Recomputes sum(loss * weight) / sum(weight) from the recorded noise, with
    # the logits of all tokens.
    train, spy, mesh = trainer(name, 2, 2, 0.0)
    batch = make_batch(3)
    state, metrics = train(make_state(mesh), meshes.shard_batch(mesh, batch))
    noise, config = spy.records(), network(name).config

    def loss(params):
      network = transformer.Transformer(config)
      hidden = network.apply({'params': params}, noise['tokens'], noise['t'])
      logits = transformer.output_logits(
        transformer.output_kernel(params), hidden
      )
      ce = optax.softmax_cross_entropy_with_integer_labels(
        logits[..., :MASK], noise['x0']
      )
      scale = noise.get('scale', 1.0) * noise['scored']
      return jnp.sum(scale * ce * noise['eligible'])

    params, total = initial_params(), batch.eligible.sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    expected = jax.tree.map(
      lambda p, g: p - LEARNING_RATE * g / total, params, gradient
    )
    np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
    assert_close(host(state.params), host(expected))
    np.testing.assert_allclose(
      metrics['grad_norm'], optax.tree.norm(gradient) / total, rtol=1e-4
    )
    np.testing.assert_allclose(
      metrics['param_norm'], optax.tree.norm(expected), rtol=1e-4
    )

  def test_blocks_with_an_autoregressive_loss(self):
    # What is trained is the bound and the likelihood of the text, from one pass
    # with the same noise; each is what evaluation and scoring say of it.
    train, _, mesh = trainer('block_ar', 2, 2, 0.0)
    batch = make_batch(3)
    batch.weight[:8] = -0.5, 2, 0, 1, 1, 3, 1, 1
    state = make_state(mesh)
    _, metrics = train(state, meshes.shard_batch(mesh, batch))
    score = evaluate_steps.make_score_step(
      scorer('ar'), make_mesh(1), num_draws=1
    )
    index = np.arange(BATCH, dtype=np.int32)
    exact = host(
      score(initial_params(), jax.random.key(0), batch._replace(index=index))
    )
    ar_nll = np.sum(exact['nll'] * batch.weight)
    np.testing.assert_allclose(metrics['ar_nll'], ar_nll, rtol=1e-4)
    np.testing.assert_allclose(
      metrics['loss'], metrics['nll'] + 0.5 * ar_nll, rtol=1e-4
    )
    # The clean copy is not counted in the statistics of the bound.
    plain, _, _ = trainer('block', 2, 2, 0.0)
    _, others = plain(make_state(mesh), meshes.shard_batch(mesh, batch))
    for key in ('scored', 'bin_scored'):
      np.testing.assert_array_equal(metrics[key], others[key])

  def test_sums(self):
    batch, (history, noise) = make_batch(1), two_steps('count', 1, 1)
    metrics = history[1][1]
    self.assertEqual(metrics['weight'], batch.eligible.sum())
    self.assertEqual(metrics['num_bytes'], batch.num_bytes.sum())
    self.assertEqual(metrics['scored'], noise[1]['scored'].sum())
    self.assertEqual(metrics['bin_scored'].sum(), metrics['scored'])
    np.testing.assert_allclose(
      metrics['bin_cross_entropy'].sum(), metrics['cross_entropy'], rtol=1e-5
    )
    np.testing.assert_allclose(metrics['loss'], metrics['nll'], rtol=1e-6)
    self.assertBetween(metrics['correct'], 0, metrics['scored'])

  def test_padding_that_is_scored_is_not_counted_as_text(self):
    train, _, mesh = trainer('count', 4, 2, 0.1)
    batch, plain = make_batch(0), two_steps('count', 1, 1)[0][0][1]
    self.assertEqual(plain['weight'], batch.eligible.sum())
    few = np.minimum(batch.num_tokens, 3)
    batch = batch._replace(num_tokens=few)
    _, metrics = train(make_state(mesh), meshes.shard_batch(mesh, batch))
    self.assertEqual(metrics['weight'], batch.num_tokens.sum())
    for name in ('loss', 'nll', 'scored', 'num_bytes'):  # the same sums
      np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-5)
    np.testing.assert_allclose(  # and another denominator
      metrics['grad_norm'] * metrics['weight'],
      plain['grad_norm'] * plain['weight'],
      rtol=1e-4,
    )

  def test_average_of_the_parameters(self):
    history = two_steps('count', 1, 1)[0]
    ema = initial_params()
    for (_, params, ema_params), decay in zip(
      [h[0] for h in history], (1 / 10, EMA_DECAY)
    ):
      ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
      assert_close(ema_params, ema, rtol=1e-5)

  @parameterized.parameters('weight', 'params')
  def test_a_step_that_is_not_finite_is_skipped(self, where):
    train, _, mesh = trainer('count', 1, 1, 0.1)
    state, batch = make_state(mesh), make_batch(0)
    state, metrics = train(state, meshes.shard_batch(mesh, batch))
    self.assertEqual(metrics['skipped'], 0)
    if where == 'params':
      norm = state.params['final_norm']
      norm['scale'] = norm['scale'].at[3].set(jnp.nan)
      state = jax.device_put(state, meshes.replicated(mesh))
    else:
      batch.weight[2] = np.inf
    content = lambda s: host((s.params, s.ema_params, s.opt_state))
    before = content(state)
    state, metrics = train(state, meshes.shard_batch(mesh, batch))
    jax.tree.map(np.testing.assert_array_equal, content(state), before)
    self.assertEqual(metrics['skipped'], 1)
    self.assertEqual(state.step, 2)
    if where == 'weight':  # Training continues.
      state, metrics = train(state, meshes.shard_batch(mesh, make_batch(1)))
      self.assertEqual(metrics['skipped'], 0)
      self.assertTrue(np.isfinite(metrics['param_norm']))
      self.assertNotEqual(metrics['param_norm'], 0)

  @parameterized.parameters((15, 1, 1), (16, 8, 2), (24, 8, 1), (0, 1, 1))
  def test_a_batch_that_does_not_divide_is_an_error(
    self, batch_size, num_devices, num_microbatches
  ):
    with self.assertRaisesRegex(InputError, r'^train\.(batch_size|num_micro)'):
      check_batch_size(
        batch_size, make_mesh(num_devices), num_microbatches, group_size=2
      )


@functools.cache
def evaluator(name, num_devices):
  mesh = make_mesh(num_devices)
  return evaluate_steps.make_eval_step(
    scorer(name, dropout=0.1), mesh, num_draws=4, seed=5
  ), mesh


def evaluate(name, num_devices, batch, params=None):
  run, mesh = evaluator(name, num_devices)
  params = jax.device_put(params or initial_params(), meshes.replicated(mesh))
  rows, sums = host(run(params, meshes.shard_batch(mesh, batch)))
  return jax.tree.map(np.sum, rows) | sums


def eval_batch():
  return make_batch()._replace(index=np.arange(BATCH, dtype=np.int32) + 100)


class EvalStepTest(parameterized.TestCase):
  def test_devices_order_and_repetition_change_nothing(self):
    batch = eval_batch()
    sums = evaluate('count', 1, batch)
    again = evaluate('count', 1, batch)
    jax.tree.map(np.testing.assert_array_equal, again, sums)
    order = np.random.default_rng(0).permutation(BATCH)
    mixed = jax.tree.map(lambda x: x[order], batch)
    assert_close(evaluate('count', 8, mixed), sums, rtol=1e-5)

  def test_padded_batches_add_up(self):
    batch = eval_batch()
    sums = evaluate('count', 1, batch)
    parts = []
    for rows in (slice(0, 5), slice(5, BATCH)):
      # Like the last batch of a split: its rows, then padding rows.
      part = jax.tree.map(np.zeros_like, batch)
      for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(batch)):
        ours[: rows.stop - rows.start] = theirs[rows]
      parts.append(evaluate('count', 1, part))
    assert_close(jax.tree.map(np.add, *parts), sums, rtol=1e-5)
    self.assertEqual(sums['weight'], batch.eligible.sum())

  def test_noise_is_the_examples_own(self):
    batch = eval_batch()
    other = batch._replace(index=batch.index + BATCH)
    self.assertGreater(
      abs(
        evaluate('count', 1, batch)['nll'] - evaluate('count', 1, other)['nll']
      ),
      1e-2,
    )

  def test_evaluates_the_evaluation_form(self):
    # Trained on truncated uniform times, evaluated like the fixed count.
    batch = eval_batch()
    assert_close(
      evaluate('uniform', 8, batch), evaluate('count', 1, batch), rtol=1e-5
    )

  def test_evaluates_what_the_objective_has_learned(self):
    sums = []
    for num_devices, rate in ((1, 0.0), (8, 0.0), (1, 1.0)):
      params = {
        **initial_params(),
        'objective': {'rate': np.linspace(rate, 2, MASK, dtype=np.float32)},
      }
      sums.append(evaluate('genmd4', num_devices, eval_batch(), params))
    assert_close(sums[0], sums[1], rtol=1e-5)
    for key in ('nll', 'scored'):  # the loss and the noise
      self.assertNotEqual(sums[0][key], sums[2][key])

  @parameterized.parameters('count', 'ar')
  def test_a_network_that_knows_nothing(self, name):
    # Equal logits: log V for each token, exactly, whatever the noise.
    zeros = jax.tree.map(np.zeros_like, initial_params())
    sums = evaluate(name, 1, eval_batch(), zeros)
    np.testing.assert_allclose(
      sums['nll'] / sums['weight'], np.log(MASK), rtol=1e-5
    )

  @parameterized.parameters('count', 'ar')
  def test_tokens_that_nats_are_reported_per(self, name):
    # Equal logits: log V for each of the 8 positions, of which 2 are counted.
    zeros = jax.tree.map(np.zeros_like, initial_params())
    batch = eval_batch()._replace(
      eligible=np.ones((BATCH, LENGTH), bool),
      num_tokens=np.full(BATCH, 2, np.int32),
    )
    sums = evaluate(name, 1, batch, zeros)
    self.assertEqual(sums['weight'], 2 * BATCH)
    np.testing.assert_allclose(
      sums['nll'] / sums['weight'], LENGTH / 2 * np.log(MASK), rtol=1e-5
    )

  def test_autoregressive_is_exact(self):
    batch, config = eval_batch(), network('ar').config
    params = initial_params()
    tokens = OBJECTIVES['ar'].network_input(batch.tokens)
    hidden = transformer.Transformer(config).apply({'params': params}, tokens)
    logits = transformer.output_logits(
      transformer.output_kernel(params), hidden
    )
    ce = optax.softmax_cross_entropy_with_integer_labels(
      logits[..., :MASK], batch.tokens
    )
    np.testing.assert_allclose(
      evaluate('ar', 1, batch)['nll'], np.sum(ce * batch.eligible), rtol=1e-5
    )

  @parameterized.parameters(1, 8)
  def test_the_autoregressive_likelihood_of_blocks(self, num_devices):
    # Exactly that of the same parameters as an autoregressive network.
    sums = evaluate('block_ar', num_devices, eval_batch())
    expected = evaluate('ar', 1, eval_batch())
    np.testing.assert_allclose(sums['ar_nll'], expected['nll'], rtol=1e-6)
    self.assertNotIn('ar_nll', expected)
    self.assertNotIn('ar_nll', evaluate('block', 1, eval_batch()))

  @parameterized.parameters(0, 3)
  def test_draws_are_whole_groups(self, num_draws):
    with self.assertRaisesRegex(InputError, f'eval.num_draws={num_draws}'):
      evaluate_steps.make_eval_step(
        scorer('count'), make_mesh(1), num_draws=num_draws, seed=0
      )


class ScoreStepTest(parameterized.TestCase):
  @parameterized.parameters('count', 'ar')
  def test_rows_are_those_of_the_evaluation(self, name):
    batch = eval_batch()
    values = []
    form = scorer(name, OBJECTIVES[name].evaluation())
    for num_devices in (1, 8):
      mesh = make_mesh(num_devices)
      score = evaluate_steps.make_score_step(form, mesh, num_draws=4)
      params = jax.device_put(initial_params(), meshes.replicated(mesh))
      values.append(
        host(score(params, jax.random.key(5), meshes.shard_batch(mesh, batch)))
      )
    assert_close(values[0], values[1], rtol=1e-5)
    sums = evaluate(name, 1, batch)
    for key in ('nll', 'correct', 'scored'):
      self.assertEqual(values[0][key].shape, (BATCH,))
      np.testing.assert_allclose(values[0][key].sum(), sums[key], rtol=1e-5)

  def test_uses_the_form_it_is_given(self):
    mesh = make_mesh(1)
    rows = eval_batch()
    rows = rows._replace(eligible=np.ones_like(rows.eligible))
    zeros = jax.device_put(
      jax.tree.map(np.zeros_like, initial_params()), meshes.replicated(mesh)
    )
    spread = {}
    for name in ('count', 'uniform'):
      score = evaluate_steps.make_score_step(scorer(name), mesh, num_draws=2)
      nll = score(zeros, jax.random.key(5), meshes.shard_batch(mesh, rows))[
        'nll'
      ]
      spread[name] = np.std(nll)
    self.assertLess(spread['count'], 1e-3)
    self.assertGreater(spread['uniform'], 1.0)

  def test_draws_are_whole_groups(self):
    with self.assertRaisesRegex(InputError, 'eval.num_draws=3'):
      evaluate_steps.make_score_step(scorer('count'), make_mesh(1), num_draws=3)


class AnnealTest(absltest.TestCase):
  def test_attention_opens_and_is_then_as_without(self):
    mesh = make_mesh(8)

    def losses_at(anneal_steps, numbers):
      train = train_steps.make_train_step(
        scorer('count'),
        optax.sgd(LEARNING_RATE, momentum=0.9),
        optax.constant_schedule(1e-3),
        mesh,
        batch_size=BATCH,
        num_microbatches=1,
        ema_decay=EMA_DECAY,
        anneal_steps=anneal_steps,
      )
      batch = meshes.shard_batch(mesh, make_batch())
      values = []
      for number in numbers:
        state = make_state(mesh)
        state = state.replace(step=state.step + number)
        values.append(float(train(state, batch)[1]['loss']))
      return values

    opening = losses_at(2, (0, 1, 2, 7))
    plain = losses_at(0, (0, 1, 2, 7))
    np.testing.assert_allclose(opening[2:], plain[2:], rtol=1e-6)
    for ours, theirs in zip(opening[:2], plain[:2]):
      self.assertNotAlmostEqual(ours, theirs, places=3)


class SampleStepTest(parameterized.TestCase):
  def test_samples_with_what_the_objective_has_learned(self):
    rate, objective = np.linspace(-3, 3, MASK, dtype=np.float32), GenMD4(MASK)
    params = jax.device_put({**initial_params(), 'objective': {'rate': rate}})
    canvas = Canvas(
      np.full((8, LENGTH), MASK, np.int32), np.zeros((8, LENGTH), bool)
    )
    sampler = Posterior(Draw(MASK), 4, objective)
    run = sample_steps.make_sample_step(scorer('genmd4'), sampler, make_mesh(1))
    tokens = run(params, jax.random.key(1), canvas).tokens
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(
      jnp.arange(8)
    )
    denoise = Denoiser(network('genmd4'), objective, params)
    for rates, is_same in ((np.log1p(np.exp(rate)), True), (None, False)):
      alone = dataclasses.replace(sampler, rule=GenMD4(MASK, rates=rates))
      sample = jax.jit(lambda keys: alone(keys, canvas, denoise).tokens)
      expected = sample(jax.random.clone(keys))
      self.assertEqual(np.array_equal(tokens, expected), is_same)

  @parameterized.parameters(
    ('ar', lambda cache: LeftToRight(Draw(MASK), cache), (5, 6)),
    *(
      (
        name,
        lambda cache: BlockSampler(FixedCount(Draw(MASK), 3), 4, MASK, cache),
        (4, 5),
      )
      for name in ('block', 'block_ar', 'block_shifted', 'block_ar_shifted')
    ),
    ('block_ar', lambda cache: LeftToRight(Draw(MASK), cache), (5, 6)),
  )
  def test_a_cache_changes_nothing(self, name, sampler, num_calls):
    # A canvas of the training length, and one that is 1.5 times as long.
    for num_devices, length in ((8, LENGTH), (1, 3 * LENGTH // 2)):
      fixed = np.arange(length)[None] < np.full((BATCH, 1), 3)
      canvas = Canvas(np.where(fixed, 3, MASK).astype(np.int32), fixed)
      mesh = make_mesh(num_devices)
      params = jax.device_put(initial_params(), meshes.replicated(mesh))
      samples = [
        host(
          sample_steps.make_sample_step(scorer(name), sampler(cache), mesh)(
            params, jax.random.key(0), meshes.shard_batch(mesh, canvas)
          )
        )
        for cache in (False, True)
      ]
      np.testing.assert_array_equal(samples[0].tokens, samples[1].tokens)
      self.assertLess(samples[0].tokens.max(), MASK)
      self.assertLen(np.unique(samples[0].tokens, axis=0), BATCH)
      if length == LENGTH:
        self.assertEqual(tuple(s.num_calls for s in samples), num_calls)

  @parameterized.parameters(
    (8, 'block_ar'), (1, 'block_ar'), (8, 'block_ar_shifted')
  )
  def test_greedy_speculation_changes_nothing(self, num_devices, name):
    # Prompts of every length, and gaps.
    fixed = np.arange(LENGTH)[None] < np.arange(BATCH)[:, None] % LENGTH
    fixed |= (np.arange(BATCH) > 8)[:, None] & (np.arange(LENGTH) == 5)[None]
    prompts = np.random.default_rng(0).integers(MASK, size=fixed.shape)
    canvas = Canvas(np.where(fixed, prompts, MASK).astype(np.int32), fixed)
    mesh, draw = make_mesh(num_devices), Draw(MASK, temperature=0.0)
    params = jax.device_put(initial_params(), meshes.replicated(mesh))
    exact, fast = (
      host(
        sample_steps.make_sample_step(scorer(name), sampler, mesh)(
          params, jax.random.key(0), meshes.shard_batch(mesh, canvas)
        )
      )
      for sampler in (LeftToRight(draw), Speculate(draw, 4))
    )
    np.testing.assert_array_equal(exact.tokens, fast.tokens)
    self.assertLess(fast.tokens.max(), MASK)
    self.assertGreater(len(np.unique(exact.tokens[:, -3:], axis=0)), 4)

  def test_an_objective_with_blocks_has_a_clean_copy(self):
    class Blocks(Masked):
      block_size = 4

    canvas = np.full((2, LENGTH), MASK, np.int32)
    params = jax.device_put(initial_params())
    logits, expected = (
      Denoiser(network('block'), objective, params)(
        canvas, np.ones(2, np.float32), np.int32([[3], [5]])
      )
      for objective in (Blocks(MASK), OBJECTIVES['block'])
    )
    np.testing.assert_array_equal(logits, expected)

  def test_a_stale_cache_of_one_block_is_exact(self):
    # One block is the whole canvas: nothing lies outside it to be stale.
    canvas = Canvas(
      np.full((BATCH, LENGTH), MASK, np.int32), np.zeros((BATCH, LENGTH), bool)
    )
    mesh, inner = make_mesh(8), FixedCount(Draw(MASK), num_steps=3)
    params = jax.device_put(initial_params(), meshes.replicated(mesh))
    sample = lambda sampler: host(
      sample_steps.make_sample_step(scorer('count'), sampler, mesh)(
        params, jax.random.key(0), meshes.shard_batch(mesh, canvas)
      )
    )
    whole = sample(PrefixCache(inner, LENGTH, MASK))
    halves = sample(PrefixCache(inner, LENGTH // 2, MASK))
    self.assertEqual((whole.num_calls, halves.num_calls), (4, 8))

    class Plain(Sampler):
      """The inner sampler with PrefixCache's keys of block 0."""

      fits = None

      def __call__(self, keys, canvas, denoise):
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        return inner(keys, canvas, denoise)

    np.testing.assert_array_equal(whole.tokens, sample(Plain()).tokens)
    self.assertLess(halves.tokens.max(), MASK)

  @parameterized.parameters((0, 9), (1, 14), (2, 11))
  def test_a_cache_that_is_refreshed_before_each_call_is_exact(
    self, refresh_calls, num_calls
  ):
    # Three free positions in the first block, four in the second.
    fixed = np.arange(LENGTH)[None] < np.full((BATCH, 1), 1)
    canvas = Canvas(np.where(fixed, 3, MASK).astype(np.int32), fixed)
    sampler = PrefixCache(
      FixedCount(Draw(MASK), 4), LENGTH // 2, MASK, refresh_calls
    )
    params = jax.tree.map(lambda x: 5 * x, initial_params())

    def sample(sampler, num_devices):
      mesh = make_mesh(num_devices)
      return host(
        sample_steps.make_sample_step(scorer('count'), sampler, mesh)(
          jax.device_put(params, meshes.replicated(mesh)),
          jax.random.key(0),
          meshes.shard_batch(mesh, canvas),
        )
      )

    class Whole:
      """A `CachedDenoise` that runs the whole canvas in each call."""

      def __init__(self, denoise):
        self.denoise, self.init_cache = denoise, jnp.asarray

      def advance(self, cache, tokens, start, visible, level):
        return tokens

      def within(self, cache, tokens, start, level, positions, visible):
        cache = jax.lax.dynamic_update_slice_in_dim(cache, tokens, start, 1)
        return self.denoise(cache, level, start + positions), cache

    class Uncached(Sampler):
      """The sampler without the network's cache."""

      fits = None

      def __call__(self, keys, canvas, denoise):
        return sampler(keys, canvas, Whole(denoise))

    cached, exact = sample(sampler, 8), sample(Uncached(), 1)
    is_same = np.array_equal(cached.tokens, exact.tokens)
    self.assertEqual(is_same, refresh_calls == 1)
    self.assertEqual((cached.num_calls, exact.num_calls), (num_calls,) * 2)

  def test_a_cache_is_refreshed_by_the_calls_of_its_row(self):
    # The first row reveals a token in each call; in some, the others do not.
    fixed = np.random.default_rng(0).random((32, LENGTH)) < 0.4
    fixed[0] = False
    canvas = Canvas(np.where(fixed, 3, MASK).astype(np.int32), fixed)
    params = jax.tree.map(lambda x: jnp.asarray(5 * x), initial_params())
    denoise = Denoiser(network('count'), OBJECTIVES['count'], params)
    sampler = PrefixCache(FixedCount(Draw(MASK), 4), LENGTH // 2, MASK, 2)
    sample = jax.jit(lambda *rows: sampler(*rows, denoise).tokens)
    rows = jax.random.split(jax.random.key(0), len(fixed)), canvas
    alone = [
      sample(*jax.tree.map(lambda x: x[i : i + 1], rows))
      for i in range(len(fixed))
    ]
    np.testing.assert_array_equal(sample(*rows), np.concatenate(alone))

  @parameterized.parameters(
    (
      'count',
      lambda draw: Guided(Remask(draw, 3, remask='conf', eta=1.0), 0.5, MASK),
    ),
    ('count', lambda draw: PrefixCache(FixedCount(draw, 2), 4, MASK)),
    ('block', lambda draw: BlockSampler(FixedCount(draw, 3), 4, MASK)),
    ('ar', LeftToRight),
  )
  def test_rows_with_settings_of_their_own(self, name, make_sampler):
    # Compares with the same settings compiled in, on one device.
    fixed = np.arange(LENGTH)[None] < np.full((BATCH, 1), 3)
    tokens = np.where(fixed, 3, MASK).astype(np.int32)
    settings = [(1.0, 0, 1.0), (0.7, 3, 0.9)]
    mine = np.arange(BATCH) % 2  # The setting of each row.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(0), np.arange(BATCH)
    )
    rows = sample_steps.Rows(
      np.asarray(jax.random.key_data(keys)),
      tokens,
      fixed,
      np.full(BATCH, LENGTH, np.int32),
      *(np.array(x)[mine] for x in zip(*settings)),
    )
    expected = np.zeros_like(tokens)
    for i, setting in enumerate(settings):
      mesh = make_mesh(1)
      params = jax.device_put(initial_params(), meshes.replicated(mesh))
      sample = sample_steps.make_sample_step(
        scorer(name), make_sampler(Draw(MASK, *setting)), mesh
      )
      expected[mine == i] = host(
        sample(
          params,
          jax.random.key(0),
          meshes.shard_batch(mesh, Canvas(tokens, fixed)),
        )
      ).tokens[mine == i]
    mesh = make_mesh(8)
    params = jax.device_put(initial_params(), meshes.replicated(mesh))
    sample = sample_steps.make_rows_step(
      scorer(name), make_sampler(Draw(MASK)), mesh
    )
    samples = host(sample(params, meshes.shard_batch(mesh, rows)))
    np.testing.assert_array_equal(samples.tokens, expected)

  @parameterized.parameters(
    (FixedCount(Draw(MASK), num_steps=3), 3),
    (Confidence(Draw(MASK), num_steps=4, block_size=2), 4),
    (Guided(Remask(Draw(MASK), 3, remask='conf', eta=1.0), 0.5, MASK), 6),
  )
  def test_devices_change_nothing(self, sampler, num_calls):
    fixed = np.arange(LENGTH)[None] < np.arange(BATCH)[:, None] // 4
    canvas = Canvas(np.where(fixed, 3, MASK).astype(np.int32), fixed)
    samples = []
    for num_devices in (1, 8):
      mesh = make_mesh(num_devices)
      sample = sample_steps.make_sample_step(scorer('count'), sampler, mesh)
      params = jax.device_put(initial_params(), meshes.replicated(mesh))
      rows = meshes.shard_batch(mesh, canvas)
      samples.append(host(sample(params, jax.random.key(0), rows)))
    np.testing.assert_array_equal(samples[0].tokens, samples[1].tokens)
    np.testing.assert_array_equal(samples[0].tokens[fixed], 3)
    self.assertLess(samples[0].tokens.max(), MASK)
    self.assertLen(np.unique(samples[0].tokens, axis=0), BATCH)
    self.assertEqual([s.num_calls for s in samples], [num_calls] * 2)
