"""Each seam takes a method from outside the package, added by one line."""

import dataclasses
import functools
import json
import math
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm import model, objectives, samplers, train
from nanodlm import run as runs
from nanodlm.devices import mesh as meshes
from nanodlm.model.network import TransformerNetwork
from nanodlm.noise import categorical
from nanodlm.noise.categorical import Draw
from nanodlm.objectives.masked import Masked
from nanodlm.samplers import reveal
from nanodlm.steps import train as train_steps
from nanodlm.steps.network import Scorer
from nanodlm.training import checkpoint
from nanodlm.training.state import TrainState
from nanodlm.types import (
  Batch,
  Batches,
  Canvas,
  Hidden,
  InputError,
  Network,
  Noised,
  Objective,
  Sampler,
  Terms,
)
from tests import toys, workdirs

MASK, LENGTH, BATCH = 11, 8, 16
BETA = 0.5


@dataclasses.dataclass(frozen=True)
class Preference(Objective):
  """-log sigmoid of how much likelier the chosen text is than the rejected.

  Rows 2i are chosen, rows 2i + 1 rejected; likelihoods are a causal network's,
  relative to the frozen network if `with_reference`.
  """

  mask_id: int
  with_reference: bool = False

  default_sampler = 'ar'
  causal = True
  exact = True
  group_size = 2

  @property
  def uses_frozen(self):
    return self.with_reference

  def sample_levels(self, key, batch_size, length):
    return jnp.zeros((batch_size,))

  def network_input(self, tokens):
    start = jnp.full_like(tokens[:, :1], self.mask_id)
    return jnp.concatenate([start, tokens[:, :-1]], axis=1)

  def corrupt(self, keys, levels, x0, eligible):
    level = jnp.full(x0.shape, jnp.nan)
    inputs = self.network_input(x0)
    return Noised(inputs, levels, eligible, level, {'target': x0})

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    return Terms(loss=ce, nll=ce, cross_entropy=ce, correct=correct)

  def loss(self, batch, levels, keys, score):
    noised = self.corrupt(keys, levels, batch.tokens, batch.eligible)
    weight = batch.eligible.astype(jnp.float32)
    reference = 0.0
    if self.with_reference:
      reference = score(noised, weight, params=score.frozen).rows.loss

    def of_losses(nll):
      pairs = (nll.sum(axis=1) - reference).reshape(-1, 2)
      return jnp.sum(-jax.nn.log_sigmoid(BETA * (pairs[:, 1] - pairs[:, 0])))

    return score(noised, weight, of_losses)


def make_pairs():
  tokens = np.random.default_rng(0).integers(MASK, size=(BATCH, LENGTH))
  eligible = np.ones((BATCH, LENGTH), bool)
  eligible[:, :2] = False
  num = eligible.sum(1).astype(np.int32)
  return Batch(
    tokens.astype(np.int32), eligible, np.ones(BATCH, np.float32), num, num
  )


@functools.cache
def preference_network():
  return TransformerNetwork(toys.model_config(num_layers=2, causal=True))


@functools.cache
def some_params(seed):
  params = preference_network().init_params(jax.random.key(seed))
  return jax.tree.map(lambda x: 3 * np.array(x), params)


def dense_loss(params, frozen, batch):
  """The loss of `Preference`, from all logits."""
  objective, network = Preference(MASK), preference_network()

  def nll(params):
    hidden = network.hidden(
      params, objective.network_input(batch.tokens), jnp.zeros(BATCH)
    )
    logits = network.logits(network.kernel(params), hidden.states)
    ce = optax.softmax_cross_entropy_with_integer_labels(
      logits[..., :MASK], batch.tokens
    )
    return jnp.sum(ce * batch.eligible, axis=1)

  rows = nll(params) - (0.0 if frozen is None else nll(frozen))
  chosen, rejected = rows.reshape(-1, 2).T
  return jnp.sum(-jax.nn.log_sigmoid(BETA * (rejected - chosen)))


@pytest.mark.parametrize(
  'num_devices, num_microbatches', [(1, 1), (1, 2), (4, 2)]
)
@pytest.mark.parametrize('with_reference', [False, True])
def test_an_objective_on_pairs_of_texts(
  num_devices, num_microbatches, with_reference
):
  mesh = meshes.make_mesh(
    meshes.MeshConfig(num_devices, 1, 1), jax.devices()[:num_devices]
  )
  objective = Preference(MASK, with_reference)
  params, frozen = some_params(0), some_params(1) if with_reference else None
  optimizer, batch = optax.sgd(0.1), make_pairs()
  step = train_steps.make_train_step(
    Scorer(preference_network(), objective, chunk_size=20),
    optimizer,
    optax.constant_schedule(0.1),
    mesh,
    batch_size=BATCH,
    num_microbatches=num_microbatches,
    ema_decay=0.0,
  )
  state = TrainState(
    np.int32(0), params, None, optimizer.init(params), jax.random.key(0), frozen
  )
  state = jax.device_put(state, meshes.replicated(mesh))
  state, metrics = step(state, meshes.shard_batch(mesh, batch))
  value, gradient = jax.jit(jax.value_and_grad(dense_loss))(
    params, frozen, batch
  )
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  total = batch.num_tokens.sum()
  jax.tree.map(
    lambda new, old, g: np.testing.assert_allclose(
      (old - np.array(new)) / 0.1, g / total, rtol=1e-3, atol=1e-5
    ),
    state.params,
    params,
    gradient,
  )
  if with_reference:
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


def test_an_objective_by_name():
  with mock.patch.dict(objectives.OBJECTIVES, preference=Preference):
    config = configs.load()
    config.objective.name = 'preference'
    run = runs.make_run(configs.make_settings(config))
  assert isinstance(run.objective, Preference)
  assert run.sampler_name == 'ar' and run.network.config.causal


def test_frozen_parameters_are_saved(tmp_path):
  run = lms.load(workdirs.make_workdir(tmp_path)).run
  training = runs.make_training(run)
  state = meshes.init_sharded(run.mesh, training.init_state)
  assert state.frozen is None
  frozen = {'teacher': jnp.arange(3.0)}
  with checkpoint.open_manager(str(tmp_path / 'saved')) as manager:
    saved = dataclasses.replace(state, frozen=frozen)
    checkpoint.save(manager, saved, run.settings.to_dict(), {})
    checkpoint.wait(manager)
    blank = dataclasses.replace(state, frozen={'teacher': jnp.zeros(3)})
    again = checkpoint.restore_state(manager, blank, 0, 258)
  np.testing.assert_array_equal(again.frozen['teacher'], frozen['teacher'])


@dataclasses.dataclass(frozen=True)
class RightToLeft(Sampler):
  """Reveals the last masked token first."""

  draw: Draw

  is_final = True

  @classmethod
  def fits(cls, objective):
    return objective.predicts_masked

  def __call__(self, keys, canvas, denoise):
    free = ~canvas.fixed
    rank = jnp.cumsum(free[:, ::-1], axis=1)[:, ::-1] - 1
    num_free = jnp.sum(free, axis=1, keepdims=True)
    level = (num_free - jnp.arange(free.shape[1])[None]) / free.shape[1]
    plan = reveal.Plan(rank.astype(jnp.int32), level)
    return reveal.sample_plan(keys, canvas, plan, denoise, self.draw, 1)


def test_a_sampler():
  num, joint = 4000, toys.random_joint(0)
  denoise = toys.CachedTable(toys.posterior_table(joint))
  config = configs.load()
  config.sampler.name = 'right_to_left'
  with mock.patch.dict(samplers.SAMPLERS, right_to_left=RightToLeft):
    run = runs.make_run(configs.make_settings(config))
    sampler = run.with_vocabulary(toys.MASK + 1).sampler
  assert isinstance(sampler, RightToLeft)
  blank = np.full((num, toys.LENGTH), toys.MASK, np.int32)
  keys = jax.random.split(jax.random.key(0), num)
  canvas = Canvas(blank, np.zeros(blank.shape, bool))
  samples = jax.jit(lambda keys: sampler(keys, canvas, denoise))(keys)
  assert samples.num_calls == toys.LENGTH
  counts = np.bincount(toys.text_index(samples.tokens), minlength=27)
  assert toys.chi_square(counts, joint) > 1e-3


@dataclasses.dataclass(frozen=True)
class Mlp(Network):
  """A two-layer MLP of a position's token and the mean of all of them."""

  vocab_size: int
  embed_dim: int
  shards: object = None
  aux_weight: float = 0.0

  @classmethod
  def make(cls, section, *, vocab_size, objective, shards, **_):
    return cls(vocab_size, section['embed_dim'], shards)

  def init_params(self, key):
    keys, width = jax.random.split(key, 4), self.embed_dim
    normal = lambda key, *shape: 0.2 * jax.random.normal(key, shape)
    return {
      'table': normal(keys[0], self.vocab_size, width),
      'first': normal(keys[1], 2 * width, width),
      'second': normal(keys[2], width, width),
      'head': normal(keys[3], self.vocab_size, width),
    }

  def hidden(self, params, tokens, t, *, positions=None, **_):
    x = params['table'][tokens]
    mean = jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
    x = jnp.concatenate([x, mean], axis=-1) @ params['first']
    x = jax.nn.relu(x) @ params['second']
    if positions is not None:
      x = x.reshape(-1, x.shape[-1])[positions]
    aux_loss = None
    if self.aux_weight:
      aux_loss = self.aux_weight * jnp.sum(params['table'] ** 2)
    return Hidden(x, aux_loss)

  def kernel(self, params):
    return params['head']

  def logits(self, kernel, states):
    return states @ kernel.T

  def flops_per_token(self, length):
    return 6.0 * (3 * self.embed_dim**2 + self.vocab_size * self.embed_dim)


def start_of(tmp_path, **changes):
  """A command line's start of a small run."""
  (tmp_path / 'text.txt').write_text(workdirs.TEXT)
  config = configs.load()
  config.data.update(
    source=f'text:{tmp_path}/text.txt',
    length=16,
    eval_fraction=0.3,
    data_dir=str(tmp_path / 'data'),
  )
  config.model.update(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32)
  config.train.update(
    batch_size=16, num_steps=8, log_every_steps=4, eval_every_steps=0
  )
  # Steps are the same whatever the number of steps that are planned.
  config.optim.update(schedule='constant', warmup_steps=2)
  config.eval.update(num_draws=2, batch_size=16)
  config.checkpoint.every_steps = 4
  config.sampler.num_steps = 4
  for key, value in changes.items():
    section, _, leaf = key.partition('__')
    config[section][leaf] = value
  return configs.Start('train', str(tmp_path / 'run'), config, True, {})


def start_from(tmp_path, workdir, **changes):
  """The same for a run that starts from one of `workdirs.make_workdir`."""
  tmp_path.mkdir(exist_ok=True)
  own = dict(
    checkpoint__init_from=workdir,
    checkpoint__every_steps=2,
    checkpoint__max_to_keep=5,
    model__num_layers=2,
    model__unroll=True,
    train__log_every_steps=1,
    train__num_samples=0,
  )
  return start_of(tmp_path, **{**own, **changes})


def losses(start):
  path = pathlib.Path(start.workdir) / 'metrics.jsonl'
  lines = map(json.loads, path.read_text().splitlines())
  return {x['step']: x['train/loss'] for x in lines if 'train/loss' in x}


def test_a_network(tmp_path):
  with mock.patch.dict(model.NETWORKS, mlp=Mlp):
    start = start_of(tmp_path, model__name='mlp', train__num_steps=20)
    assert train.main(start) == 0
    assert losses(start)[20] < losses(start)[4]
    lm = lms.load(start.workdir)
    (sample,) = lm.sample('ab{4}', details=True)
  assert isinstance(lm.run.network, Mlp)
  assert sample.tokens.shape == (6,) and sample.tokens.max() < 257


CURRICULUM = dict(
  objective__name='uniform',
  objective__curriculum_steps=4,
  objective__tau=0.1,
  model__time_conditioning=True,
)


@pytest.mark.slow
def test_a_curriculum(tmp_path):
  start = start_of(
    tmp_path, **CURRICULUM, train__num_samples=0, train__log_every_steps=2
  )
  assert train.main(start) == 0
  path = pathlib.Path(start.workdir) / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  has_bound = {x['step']: 'train/nll' in x for x in lines if 'train/loss' in x}
  assert has_bound == {2: False, 4: False, 6: True, 8: True}
  assert all(math.isfinite(x['eval/nll']) for x in lines if 'eval/nll' in x)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'objective__curriculum_steps': 9}, 'objective.curriculum_steps=9 must'),
    ({'objective__num_soft_tokens': 300}, 'objective.num_soft_tokens=300 must'),
    ({'model__name': 'mlp'}, 'objective.curriculum_steps=4 must be 0 with'),
  ],
)
def test_a_curriculum_that_does_not_fit(tmp_path, changes, message):
  class Timed(Mlp):
    knows_time = True

  start = start_of(tmp_path, **{**CURRICULUM, **changes})
  with mock.patch.dict(model.NETWORKS, mlp=Timed):
    with pytest.raises(InputError, match=message):
      train.main(start)
  assert not pathlib.Path(start.workdir).exists()


@pytest.mark.slow
def test_self_conditioning(tmp_path):
  start = start_of(
    tmp_path, model__self_conditioning=True, train__log_every_steps=8
  )
  assert train.main(start) == 0
  assert math.isfinite(losses(start)[8])
  lm = lms.load(start.workdir)
  assert np.abs(lm.params['self_conditioning']['kernel']).max() > 0
  (sample,) = lm.sample('ab{4}', details=True)
  assert sample.tokens.shape == (6,) and sample.tokens.max() < 257


def test_a_network_with_a_loss_of_its_own():
  batch, steps = make_pairs(), []
  for aux_weight in (0.0, 2.0):
    network = Mlp(MASK + 1, 8, TransformerNetwork.shards, aux_weight)
    params = jax.tree.map(np.array, network.init_params(jax.random.key(0)))
    mesh = meshes.make_mesh(meshes.MeshConfig(1, 1, 1), jax.devices()[:1])
    step = train_steps.make_train_step(
      Scorer(network, Masked(MASK), 20),
      optax.sgd(1.0),
      optax.constant_schedule(1.0),
      mesh,
      batch_size=BATCH,
      num_microbatches=1,
      ema_decay=0.0,
    )
    state = TrainState(
      np.int32(0), params, None, optax.sgd(1.0).init(params), jax.random.key(0)
    )
    state = jax.device_put(state, meshes.replicated(mesh))
    state, _ = step(state, meshes.shard_batch(mesh, batch))
    steps.append(np.array(state.params['table']))
  expected = -2.0 * 2 * params['table'] / batch.num_tokens.sum()
  np.testing.assert_allclose(steps[1] - steps[0], expected, atol=1e-6)


class Rollouts(Batches):
  """Batches that the current parameters write."""

  def __init__(self, run, packed, start_step):
    del packed, start_step
    self._run, self._fill = run, lms.make_fill(run)

  def __call__(self, state, step):
    run = self._run
    shape = run.settings.train.batch_size, run.settings.data.length
    tokens = np.full(shape, run.tokenizer.mask_id, np.int32)
    fixed = np.zeros(shape, bool)
    key = jax.random.fold_in(jax.random.key(5), step)
    tokens, _ = self._fill(state.params, key, tokens, fixed)
    batch = lms.make_batch(tokens, ~fixed)
    return meshes.shard_whole_batch(run.mesh, batch)


def test_batches_from_the_current_parameters(tmp_path):
  with mock.patch.dict(train.BATCHES, written=Rollouts):
    whole = start_of(tmp_path, train__batches='written')
    assert train.main(whole) == 0
    first = start_of(tmp_path, train__batches='written', train__num_steps=4)
    first = dataclasses.replace(first, workdir=str(tmp_path / 'two'))
    assert train.main(first) == 0
    second = dataclasses.replace(whole, workdir=first.workdir)
    assert train.main(second) == 0
  assert losses(second)[8] == losses(whole)[8]


@pytest.mark.parametrize('base', [Objective, Sampler, Network])
def test_a_forgotten_method_is_an_error_at_construction(base):
  with pytest.raises(TypeError, match='abstract'):
    type('Forgetful', (base,), {})()
