"""Tests of self-conditioning: what the two calls compute, and who uses them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm import samplers
from nanodlm.devices import mesh as meshes
from nanodlm.model.network import TransformerNetwork
from nanodlm.noise.categorical import Draw
from nanodlm.objectives.block import Block
from nanodlm.objectives.masked import Masked
from nanodlm.objectives.mixture import Hybrid
from nanodlm.samplers import guidance
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps import network as networks
from nanodlm.steps import sample as sample_steps
from nanodlm.types import Batch, Canvas
from tests import toys
from tests.toys import LENGTH, MASK, TEXTS

WIDTH = 16
DRAW, MASKED = Draw(MASK), Masked(MASK)


def make(objective=MASKED, scale=1.0, self_conditioning=True):
  """Returns a scorer, and parameters whose every part matters."""
  config = toys.model_config(
    vocab_size=MASK + 1,
    num_layers=2,
    embed_dim=WIDTH,
    causal=objective.autoregressive is not None,
    block_size=objective.block_size,
    self_conditioning=self_conditioning,
  )
  params = jax.tree.map(lambda x: 4 * np.array(x), initial_params(config))
  if self_conditioning:
    kernel = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    params['self_conditioning'] = {'kernel': np.float32(scale * kernel)}
  return networks.Scorer(TransformerNetwork(config), objective, 64), params


@functools.cache
def initial_params(config):
  config = dataclasses.replace(config, self_conditioning=False)
  return TransformerNetwork(config).init_params(jax.random.key(0))


def one_device():
  return meshes.make_mesh(meshes.MeshConfig(1, 1, 1), jax.devices()[:1])


def batch_of(x0):
  num = np.full(len(x0), LENGTH, np.int32)
  weight = np.ones(len(x0), np.float32)
  index = np.arange(len(x0), dtype=np.int32)
  eligible = np.ones(x0.shape, bool)
  return Batch(x0, eligible, weight, num, num, index=index)


def score_rows(scorer, params, x0, num_draws=2):
  step = evaluate_steps.make_score_step(
    scorer, one_device(), num_draws=num_draws
  )
  return jax.device_get(step(params, jax.random.key(3), batch_of(x0)))


def exact_rows(scorer, params):
  mesh = one_device()
  run = evaluate_steps.make_eval_step(scorer, mesh, num_draws=2, seed=0)
  return jax.device_get(run(params, batch_of(TEXTS)))[0]['ar_nll']


def sample(scorer, params, sampler, num=64, fixed=None):
  fixed = np.zeros((num, LENGTH), bool) if fixed is None else fixed
  canvas = Canvas(np.full((num, LENGTH), MASK, np.int32), fixed)
  canvas = canvas._replace(tokens=np.where(fixed, 1, canvas.tokens))
  run = sample_steps.make_sample_step(scorer, sampler, one_device())
  return jax.device_get(run(params, jax.random.key(1), canvas))


def table_of(scorer, params):
  """Logits of the composite network on every canvas, [64, L, V]."""
  step = sample_steps.make_logits_step(scorer, one_device())
  canvases = toys.CANVASES
  level, length = jnp.zeros(len(canvases)), jnp.full(len(canvases), LENGTH)
  return np.array(step(params, canvases, level, length))


SAMPLERS = {
  'fixed_count': samplers.SAMPLERS['fixed_count'](DRAW, 2),
  'ancestral': samplers.SAMPLERS['ancestral'](DRAW, 4),
  'confidence': samplers.SAMPLERS['confidence'](DRAW, 2),
  'remask': samplers.SAMPLERS['remask'](DRAW, 3, eta=0.5),
  'posterior': samplers.SAMPLERS['posterior'](
    DRAW, 3, Hybrid(MASK), num_corrections=2
  ),
  'renoise': samplers.SAMPLERS['renoise'](DRAW, 3, Hybrid(MASK)),
  'edit': samplers.SAMPLERS['edit'](DRAW, 0.2, 0.2, num_corrections=1),
}


@pytest.mark.parametrize('name', SAMPLERS)
def test_without_weights_it_is_the_plain_network(name):
  sampler = SAMPLERS[name]
  is_hybrid = name in ('posterior', 'renoise', 'edit')
  objective = Hybrid(MASK) if is_hybrid else MASKED
  plain, zero = make(objective, self_conditioning=False), make(objective, 0.0)
  own, other, plain = (
    sample(*model, sampler) for model in (zero, make(objective), plain)
  )
  np.testing.assert_array_equal(own.tokens, plain.tokens)
  assert own.num_calls == plain.num_calls
  assert (other.tokens != plain.tokens).any()


def test_the_bound_without_weights_is_that_of_the_plain_network():
  zero, plain, own = (
    score_rows(*model, TEXTS)
    for model in (make(scale=0.0), make(self_conditioning=False), make())
  )
  jax.tree.map(np.testing.assert_array_equal, zero, plain)
  assert np.abs(own['nll'] - plain['nll']).max() > 0.1


def test_the_bound_is_that_of_two_calls():
  # The mean over all orders of the table of the composite network.
  scorer, params = make()
  table, x0 = table_of(scorer, params), TEXTS[[5, 16]]
  first = table_of(*make(self_conditioning=False))
  for text in x0:
    expected = toys.any_order_nll(table, text)
    values = score_rows(scorer, params, np.tile(text, (128, 1)), 16)['nll']
    error = values.mean() - expected
    assert abs(error) < 4 * values.std() / len(values) ** 0.5
    assert abs(values.mean() - toys.any_order_nll(first, text)) > 0.1


def test_the_condition_is_the_mean_embedding_of_the_first_call():
  scorer, params = make()
  network, tokens = scorer.network, toys.CANVASES
  t = jnp.zeros(len(tokens))
  first = table_of(*make(self_conditioning=False))
  p = np.exp(toys.log_softmax(first))
  condition = np.float32(p) @ params['embedding'][:MASK]
  states = network.hidden(params, tokens, t, condition=condition).states
  logits = network.logits(network.kernel(params), states)
  np.testing.assert_allclose(table_of(scorer, params), logits, atol=1e-4)


@pytest.mark.parametrize(
  'share', [0.5, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 1.0))]
)
def test_the_condition_has_no_gradient(share):
  # Against a loss whose condition is a constant, zero in some rows.
  scorer, params = make()
  network, objective, num = scorer.network, scorer.objective, 8
  x0 = jnp.asarray(TEXTS[:num])
  eligible = jnp.ones(x0.shape, bool)
  levels = objective.sample_levels(jax.random.key(0), num, LENGTH)
  keys = jax.random.split(jax.random.key(1), num)
  noised = objective.corrupt(keys, levels, x0, eligible)
  is_conditioned = jnp.arange(num) < share * num
  states = network.hidden(params, noised.tokens, noised.t).states
  condition = networks.mean_embedding(network, params, states, MASK)
  condition = jnp.where(is_conditioned[:, None, None], condition, 0)

  def dense(params):
    states = network.hidden(
      params, noised.tokens, noised.t, condition=condition
    ).states
    logits = network.logits(network.kernel(params), states)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    terms = objective.terms(flat(logits), jax.tree.map(flat, noised.fields))
    return jnp.sum(jnp.where(flat(noised.scored), terms.loss, 0))

  def own(params):
    score = scorer.scoring(params, is_conditioned=is_conditioned)
    return score(noised, eligible.astype(jnp.float32)).total

  gradient, known = jax.grad(own)(params), jax.grad(dense)(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    gradient,
    known,
  )
  weights = np.abs(gradient['self_conditioning']['kernel']).max()
  assert weights > 1e-3 if share else weights == 0


def test_a_sampler_remembers_its_previous_prediction():
  # By hand: zeros first, then the prediction of the call before.
  scorer, params = make()
  sampler = SAMPLERS['fixed_count']
  denoise = networks.Denoiser(scorer.network, scorer.objective, params)
  calls = []

  class Recorder:
    def recall(self, tokens, level, positions, memory):
      logits, new = denoise.recall(tokens, level, positions, memory)
      calls.append(jax.device_get((tokens, memory, new)))
      return logits, new

  canvas = Canvas(jnp.full((4, LENGTH), MASK), jnp.zeros((4, LENGTH), bool))
  memory = denoise.init_memory(canvas.tokens)
  keys = jax.random.split(jax.random.key(0), 4)
  with jax.disable_jit():
    out = sampler(keys, canvas._replace(memory=memory), Recorder())
  assert len(calls) == out.num_calls == 2
  assert not calls[0][1].any()
  np.testing.assert_array_equal(calls[1][1], calls[0][2])
  network = scorer.network
  for tokens, memory, new in calls:
    states = network.hidden(
      params, tokens, jnp.zeros(4), condition=memory
    ).states
    expected = networks.mean_embedding(network, params, states, MASK)
    np.testing.assert_allclose(new, expected, atol=1e-5)


def test_predictions_stay_with_their_tokens_where_room_moves():
  # The network reads [MASK, 2, 2] after the first token has become room.
  scorer, params = make(Masked(MASK, expand=True))
  params = jax.tree.map(jnp.asarray, params)
  denoise = networks.Denoiser(scorer.network, scorer.objective, params)
  first, second = jnp.array([[MASK, MASK, 2]]), jnp.array([[2, MASK, 2]])
  level, positions = jnp.zeros(1), jnp.arange(LENGTH)[None]
  memory = denoise.init_memory(first)
  _, memory = denoise.recall(first, level, positions, memory)
  logits, new = denoise.recall(second, level, positions, memory)
  states = scorer.network.hidden(
    params, second[:, [1, 0, 2]], level, condition=memory[:, [1, 0, 2]]
  ).states
  expected = networks.mean_embedding(scorer.network, params, states, MASK)
  np.testing.assert_allclose(new, expected[:, [1, 0, 1]], atol=1e-5)
  assert np.abs(memory[:, 1] - memory[:, 0]).max() > 1e-4
  assert logits.shape == (1, LENGTH, MASK + 1)


@pytest.mark.parametrize('name', ['ancestral', 'confidence', 'remask'])
def test_a_row_does_not_depend_on_its_neighbours(name):
  # Alone, a row takes no calls at steps that reveal tokens of others only.
  (scorer, params), num = make(), 24
  run = sample_steps.make_sample_step(scorer, SAMPLERS[name], one_device())

  def fill(rows):
    fixed = np.ones((num, LENGTH), bool)
    fixed[rows, 1:] = False
    canvas = Canvas(np.where(fixed, 1, MASK).astype(np.int32), fixed)
    return jax.device_get(run(params, jax.random.key(1), canvas).tokens[rows])

  together = fill(np.arange(num))
  alone = np.concatenate([fill(np.array([row])) for row in range(num)])
  np.testing.assert_array_equal(alone, together)


def test_samplers_that_do_not_remember_take_two_calls():
  model, inner = make(), SAMPLERS['fixed_count']
  guided = guidance.Guided(inner, 1e-9, MASK)
  assert not guided.remembers
  samples = sample(*model, guided)
  # Twice for guidance, and twice for the condition.
  assert samples.num_calls == 2 * 2 * 2
  # On a blank canvas guidance changes nothing: the law is that of the table.
  table = toys.CachedTable(table_of(*model))
  keys = networks.fold_in_each(jax.random.key(1), jnp.arange(64))
  blank = np.full((64, LENGTH), MASK, np.int32)
  canvas = Canvas(blank, np.zeros(blank.shape, bool))
  known = jax.jit(lambda keys: inner(keys, canvas, table))(keys)
  assert (np.asarray(known.tokens) == samples.tokens).mean() > 0.98


@pytest.mark.parametrize('ar_weight', [0.0, 0.5])
@pytest.mark.slow
def test_blocks(ar_weight):
  # The clean copy is not conditioned: it is the same in training, in the cache
  # and without it, and so is the autoregressive likelihood.
  objective = Block(MASK, block_size=1, ar_weight=ar_weight)
  model = make(objective)
  make_sampler = samplers.SAMPLERS['block']
  cached, whole = (
    sample(*model, make_sampler(SAMPLERS['fixed_count'], 1, MASK, cache=cache))
    for cache in (True, False)
  )
  np.testing.assert_array_equal(cached.tokens, whole.tokens)
  # A block of one token is exact, so that the probabilities of texts sum to 1.
  nll = score_rows(*model, TEXTS, num_draws=2)['nll']
  np.testing.assert_allclose(np.exp(-nll).sum(), 1, rtol=1e-4)
  plain = score_rows(*make(objective, self_conditioning=False), TEXTS)['nll']
  assert np.abs(nll - plain).max() > 0.1
  if ar_weight:
    plain = make(objective, self_conditioning=False)
    own, known = (exact_rows(*model) for model in (model, plain))
    np.testing.assert_array_equal(own, known)
