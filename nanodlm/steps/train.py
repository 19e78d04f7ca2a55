"""The training and evaluation steps, and the only sum of losses over the batch.

Both run under shard_map: each device scores its own rows of the global batch,
with noise tied to each row's GLOBAL index, and sums, never means, cross devices.
"""

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from nanodlm import config as configs
from nanodlm import types
from nanodlm.devices import mesh as meshes
from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model import losses, transformer
from nanodlm.model.config import ModelConfig, num_params
from nanodlm.noise import categorical
from nanodlm.show import watch
from nanodlm.training import optim
from nanodlm.training import state as states
from nanodlm.training.state import TrainState
from nanodlm.types import InputError, Objective

NUM_LEVEL_BINS = 10


@dataclasses.dataclass(frozen=True)
class Network:
  """The transformer and how its output is scored.

  Attributes:
    config: the transformer's.
    chunk_size: positions that go through the output projection at once.
    shards: over how many devices its parameters are split.
  """

  config: ModelConfig
  chunk_size: int
  shards: Shards = Shards()

  def __post_init__(self):
    transformer.check_shards(self.config, self.shards)

  @property
  def transformer(self) -> transformer.Transformer:
    """The module, its parameters apart."""
    return transformer.Transformer(self.config, self.shards)

  def init_params(self, objective: Objective, key: jax.Array):
    """Draws the initial parameters, whole."""
    return states.init_params(self.config, objective, key, self.shards)

  def num_params(self, objective: Objective) -> int:
    """Number of parameters, without what pads the vocabulary."""
    return num_params(
      jax.eval_shape(
        lambda: states.init_params(self.config, objective, jax.random.key(0))
      )
    )

  def specs(self, objective: Objective) -> Any:
    """How the parameters lie on the mesh, a tree of partitions."""
    shapes = jax.eval_shape(
      lambda: self.init_params(objective, jax.random.key(0))
    )
    return sharding.specs(shapes, self.shards)

  def score(
    self,
    objective: Objective,
    params,
    noised,
    weight,
    segment_ids,
    dropout_keys,
    seen=None,
  ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Runs the network on a noised batch and sums the objective's terms.

    Returns:
      sum(weight * loss) []; a dict of [B] sums over each row's positions: loss,
      nll (weighted), cross_entropy, correct, scored (plain); and a dict of
      [NUM_LEVEL_BINS] sums by noise level: bin_cross_entropy, bin_scored.
    """
    batch, length = noised.scored.shape
    capacity = objective.max_scored(batch, length)
    if capacity < batch * length:
      positions, is_real = losses.gather_scored(noised.scored, capacity)
      take = lambda x: x.reshape(-1)[positions]
    else:
      positions, is_real = None, noised.scored.reshape(-1)
      take = lambda x: x.reshape(-1)
    params = transformer.gather_ends(params, self.shards)
    hidden = self.transformer.apply(
      {'params': params},
      noised.tokens,
      noised.t,
      clean=noised.clean,
      segment_ids=segment_ids,
      dropout_keys=dropout_keys,
      seen=seen,
      positions=positions,
    )
    weight = jnp.where(is_real, take(weight), 0.0)
    vocab = categorical.Vocab(
      sharding.TENSOR if self.shards.tensor > 1 else None
    )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    terms_of = lambda logits, learned, fields: objective.bind(learned).terms(
      logits, fields, vocab=vocab
    )
    total, terms = losses.projected_terms(
      transformer.output_logits,
      terms_of,
      self.chunk_size,
      transformer.output_kernel(params),
      params.get('objective', {}),
      sharding.split(hidden, self.shards),
      jax.tree.map(take, noised.fields),
      weight,
    )
    row = (
      jnp.arange(batch * length) if positions is None else positions
    ) // length
    counted = (weight > 0).astype(jnp.float32)
    per_row = lambda x: jax.ops.segment_sum(x, row, batch)
    return (
      total,
      {
        'loss': per_row(terms.loss * weight),
        'nll': per_row(terms.nll * weight),
        'cross_entropy': per_row(terms.cross_entropy * counted),
        'correct': per_row(terms.correct * counted),
        'scored': per_row(counted),
      },
      _level_sums(take(noised.level), terms.cross_entropy * counted, counted),
    )


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """The network as a sampler calls it; see `types.CachedDenoise`.

  Of a block-diffusion network the plain call takes one canvas for both copies of
  the text: right for a block whose predecessors are finished.

  Attributes:
    network: the transformer.
    objective: what it was trained with.
    params: its parameters, of `model.gather_ends`.
    segment_ids: [B, L] int32 or None; what the plain call sees of each other.
  """

  network: Network
  objective: Objective
  params: Any
  segment_ids: jax.Array | None = None

  def __call__(self, tokens, level, positions):
    clean = tokens if self.objective.block_size else None
    segment_ids = self.segment_ids
    if segment_ids is not None:  # a guided call has the rows twice
      segment_ids = jnp.tile(segment_ids, (len(tokens) // len(segment_ids), 1))
    hidden = self.network.transformer.apply(
      {'params': self.params},
      self.objective.network_input(tokens),
      self.objective.network_time(level),
      clean=clean,
      segment_ids=segment_ids,
      positions=_flat(positions, tokens.shape[1]),
    )
    return self._logits(hidden, positions)

  def init_cache(self, tokens):
    cache = transformer.init_cache(
      self.network.config, *tokens.shape, self.network.shards
    )
    # Varies over devices like the tokens and heads do, as shard_map's loops ask.
    zero = sharding.split(jnp.zeros_like(tokens[0, 0]), self.network.shards)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), cache)

  def advance(self, cache, tokens, start, visible, level=None):
    return self._advance(cache, tokens, start, visible, level, None)[1]

  def within(self, cache, tokens, start, level, positions, visible):
    hidden, cache = self._advance(
      cache, tokens, start, visible, level, _flat(positions, tokens.shape[1])
    )
    return self._logits(hidden, positions), cache

  def _advance(self, cache, tokens, start, visible, level, positions):
    if level is None:
      level = jnp.zeros((tokens.shape[0],))
    return self.network.transformer.apply(
      {'params': self.params},
      tokens,
      self.objective.network_time(level),
      start,
      cache,
      visible,
      positions,
      method='advance',
    )

  def _logits(self, hidden, positions):
    logits = sharding.concatenate(
      transformer.output_logits(transformer.output_kernel(self.params), hidden),
      self.network.shards,
    )
    # Without padding: the noise of a draw depends on the number of its outcomes.
    logits = logits[..., : self.network.config.vocab_size]
    return logits.reshape(*positions.shape, -1)


def _flat(positions: jax.Array, length: int) -> jax.Array:
  """[B, K] indices into rows -> [B * K] into B * length."""
  row = jnp.arange(positions.shape[0])[:, None]
  return (row * length + positions).reshape(-1)


def bind(objective: Objective, params: Any) -> Objective:
  """The objective with what it has learned, among all parameters."""
  return objective.bind(params.get('objective', {}))


def _repeat_rows(rows: dict[str, Any], num_draws: int) -> dict[str, Any]:
  """Each row so many times, with keys of its own and a share of its weight."""
  if num_draws == 1:
    return rows
  keys = jax.vmap(lambda key: jax.random.split(key, num_draws))(rows['keys'])
  shares = {
    name: rows[name] / num_draws
    for name in ('weight', 'num_bytes', 'num_tokens')
    if name in rows
  }
  rows = jax.tree.map(
    lambda x: jnp.repeat(x, num_draws, axis=0), {**rows, **shares}
  )
  return {**rows, 'keys': keys.reshape(-1)}


def _row_index(num_rows: int) -> jax.Array:
  """Global indices [num_rows] of this device's rows of a batch."""
  shard = jax.lax.axis_index(meshes.BATCH_AXES)
  return shard * num_rows + jnp.arange(num_rows)


def _fold_in_each(key: jax.Array, index: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


class Training(NamedTuple):
  """What a run trains with.

  Attributes:
    step: see `make_train_step`.
    init_state: () -> TrainState at step 0, whole; to be traced.
  """

  step: Callable[[TrainState, Any], tuple[TrainState, Any]]
  init_state: Callable[[], TrainState]


def make_training(
  settings: configs.Settings,
  network: Network,
  objective: Objective,
  mesh: jax.sharding.Mesh,
) -> Training:
  """Puts a run's training together from its settings.

  Raises:
    InputError: see `make_train_step`.
  """
  num_steps, ema_decay = settings.train.num_steps, settings.optim.ema_decay
  optimizer = optim.make_optimizer(settings.optim, num_steps)
  step = make_train_step(
    network,
    objective,
    optimizer,
    optim.make_schedule(settings.optim, num_steps),
    mesh,
    batch_size=settings.train.batch_size,
    num_microbatches=settings.train.num_microbatches,
    ema_decay=ema_decay,
    anneal_steps=settings.train.anneal_steps,
  )
  return Training(
    step,
    lambda: states.init_state(
      network.config,
      objective,
      optimizer,
      settings.seed,
      ema_decay > 0,
      network.shards,
    ),
  )


def make_train_step(
  network: Network,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  mesh: jax.sharding.Mesh,
  *,
  batch_size: int,
  num_microbatches: int,
  ema_decay: float,
  anneal_steps: int = 0,
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
  """Builds the jitted training step, (state, batch) -> (state, metrics).

  The state is donated. The batch holds tokens [B, L] int32, weight [B, L],
  num_bytes [B] and optionally segment_ids [B, L] and num_tokens [B] (see
  `num_tokens`), sharded by `mesh.batch_sharding`. A step whose loss or
  gradient is not finite leaves everything but `step` as it was and has
  metrics['skipped'] = 1.

  With `anneal_steps` = N the network sees a position to its right with probability
  n / N at step n < N, and all from N on (`model.opening_mask`).

  Raises:
    InputError: the batch does not divide into devices, micro-batches and the
      objective's groups.
  """
  check_batch_size(batch_size, mesh, num_microbatches, objective.group_size)
  shards = network.shards

  def local_gradient(params, key, share, batch, is_opening):
    # (Three keys as ever where there is no annealing: the same noise as ever.)
    level_key, noise_key, dropout_key, *opening_key = jax.random.split(
      key, 4 if anneal_steps else 3
    )
    num_rows, length = batch['tokens'].shape
    index = _row_index(num_rows)
    levels = objective.sample_levels(level_key, batch_size, length)[index]
    rows = {**batch, 'keys': _fold_in_each(noise_key, index), 'levels': levels}
    if network.config.dropout:
      rows['dropout_keys'] = _fold_in_each(dropout_key, index)
    if is_opening:
      rows['opening_keys'] = _fold_in_each(*opening_key, index)

    def loss(params, rows):
      rows = _repeat_rows(rows, objective.num_draws)
      own = bind(objective, params)
      noised = own.corrupt(
        rows['keys'], rows['levels'], rows['tokens'], rows['weight']
      )
      seen = None
      if is_opening:
        seen = transformer.opening_mask(rows['opening_keys'], share, length)
      total, per_row, by_level = network.score(
        objective,
        params,
        noised,
        rows['weight'],
        rows.get('segment_ids'),
        rows.get('dropout_keys'),
        seen,
      )
      total += own.noise_surrogate(
        noised, rows['tokens'], rows['weight'], per_row['loss']
      )
      return total, {**_sums(rows, per_row), **by_level}

    gradient = jax.grad(loss, has_aux=True)
    if num_microbatches == 1:
      return gradient(params, rows)
    rows = jax.tree.map(
      lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), rows
    )
    shapes = jax.eval_shape(
      lambda rows: gradient(params, jax.tree.map(lambda x: x[0], rows)), rows
    )
    # Typed as varying over the devices over which what is added to them does.
    zeros = (
      jax.tree.map(jnp.zeros_like, params),
      jax.tree.map(
        lambda s: jax.lax.pcast(
          jnp.zeros(s.shape, s.dtype), meshes.BATCH_AXES, to='varying'
        ),
        shapes[1],
      ),
    )
    add = lambda sums, micro: jax.tree.map(
      jnp.add, sums, gradient(params, micro)
    )
    return jax.lax.scan(
      lambda sums, micro: (add(sums, micro), None), zeros, rows
    )[0]

  # Of one part of the batch the gradient is the sum: XLA's CPU backend would copy it.
  is_whole = meshes.num_batch_shards(mesh) == 1

  def global_gradient(params, key, share, batch):
    """The sums over the global batch, of this device's part of the parameters."""
    of = functools.partial(
      local_gradient, sharding.local(params, shards), key, share, batch
    )
    if anneal_steps:  # past it, attention without a pattern, by any kernel
      gradient, sums = jax.lax.cond(
        share < 1, lambda: of(True), lambda: of(False)
      )
    else:
      gradient, sums = of(False)
    gradient = (
      jax.tree.map(lambda g: g[None], gradient)
      if is_whole
      else sharding.sum_gradients(gradient, shards)
    )
    return gradient, jax.lax.psum(sums, meshes.BATCH_AXES)

  specs = network.specs(objective)
  sharded_gradient = jax.shard_map(
    global_gradient,
    mesh=mesh,
    in_specs=(specs, P(), P(), P(meshes.BATCH_AXES)),
    out_specs=(
      jax.tree.map(lambda spec: P(meshes.BATCH_AXES, *spec), specs)
      if is_whole
      else specs,
      P(),
    ),
  )
  state_shapes = jax.eval_shape(
    lambda: states.init_state(
      network.config, objective, optimizer, 0, ema_decay > 0, shards
    )
  )

  def step(state, batch):
    key = jax.random.fold_in(state.key, state.step)
    share = jnp.minimum(state.step / max(anneal_steps, 1), 1.0)
    gradient, sums = sharded_gradient(state.params, key, share, batch)
    if is_whole:
      gradient = jax.tree.map(lambda g: g[0], gradient)
    # From here on arrays are whole to the code, and each device updates its part
    # of them: elementwise rules talk to no one, a norm or Muon's products do.
    total_weight = jnp.maximum(sums['weight'], 1.0)
    gradient = jax.tree.map(lambda g: g / total_weight, gradient)
    grad_norm = optax.tree.norm(gradient)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums['loss'])

    def update(gradient, old):
      params, ema_params, opt_state = old
      updates, opt_state = optimizer.update(gradient, opt_state, params)
      params = optax.apply_updates(params, updates)
      if ema_params is not None:
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = jax.tree.map(
          lambda e, p: e + (1 - decay) * (p - e), ema_params, params
        )
      return params, ema_params, opt_state

    def branch(gradient, old):
      return jax.lax.cond(is_finite, update, lambda _, old: old, gradient, old)

    def select(gradient, old):
      return jax.tree.map(
        lambda n, o: jnp.where(is_finite, n, o), update(gradient, old), old
      )

    # On a CPU XLA would copy what is read and overwritten at once, the state, and
    # that at the step's start; in a branch it finds an order that needs no copies.
    params, ema_params, opt_state = jax.lax.platform_dependent(
      gradient,
      (state.params, state.ema_params, state.opt_state),
      cpu=branch,
      default=select,
    )
    metrics = {
      **sums,
      'grad_norm': grad_norm,
      'param_norm': optax.tree.norm(params),
      'learning_rate': jnp.asarray(learning_rate(state.step)),
      'skipped': 1.0 - is_finite,
    }
    return TrainState(
      step=state.step + 1,
      params=params,
      ema_params=ema_params,
      opt_state=opt_state,
      key=state.key,
    ), metrics

  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(
      meshes.shardings(mesh, state_shapes),
      meshes.replicated(mesh),
    ),
  )


def _level_sums(level, cross_entropy, counted):
  """Sums of [N] terms by noise level [N], [NUM_LEVEL_BINS] each."""
  level_bin = jnp.clip(
    (level * NUM_LEVEL_BINS).astype(jnp.int32), 0, NUM_LEVEL_BINS - 1
  )
  in_bin = jax.nn.one_hot(level_bin, NUM_LEVEL_BINS)
  in_bin = jnp.where(jnp.isnan(level)[:, None], 0.0, in_bin)
  return {
    'bin_cross_entropy': cross_entropy @ in_bin,
    'bin_scored': counted @ in_bin,
  }


def _sums(rows, per_row):
  """A (micro-)batch's sums; means are taken in `metrics`."""
  return {
    **{name: jnp.sum(x) for name, x in per_row.items()},
    'weight': jnp.sum(num_tokens(rows)),
    'num_bytes': jnp.sum(rows['num_bytes'].astype(jnp.float32)),
  }


def num_tokens(rows) -> jax.Array:
  """Tokens [B] that a row's nats are divided by, float32.

  Those of its weight, unless the batch says otherwise: padding that is scored
  costs nats, and must not make them look fewer by being counted.
  """
  if 'num_tokens' in rows:
    return rows['num_tokens'].astype(jnp.float32)
  return jnp.sum(rows['weight'], 1)


def _check_draws(objective: Objective, num_draws: int) -> int:
  """The draws per example: one where there is no noise, else whole groups."""
  if objective.exact:
    return 1
  if num_draws < 1 or num_draws % objective.group_size:
    raise InputError(
      f'eval.num_draws={num_draws!r} must be a positive multiple '
      f'of {objective.group_size}'
    )
  return num_draws


def _score_rows(network, objective, num_draws, params, key, batch):
  """Scores each example `num_draws` times, at levels drawn together for it.

  Returns:
    A dict of [B]: nll, the mean over the draws, and correct and scored, sums over
    them; and the sums by noise level of `Network.score`.
  """
  group, length = objective.group_size, batch['tokens'].shape[1]
  own = bind(objective, params)
  keys = _fold_in_each(key, batch['index'])
  level_keys, noise_keys = jax.vmap(lambda key: tuple(jax.random.split(key)))(
    keys
  )
  levels = jax.vmap(lambda key: objective.eval_levels(key, num_draws, length))(
    level_keys
  )
  repeat = lambda x: jnp.repeat(x, group, axis=0)
  weight = repeat(batch['weight'])
  segment_ids = batch.get('segment_ids')
  if segment_ids is not None:
    segment_ids = repeat(segment_ids)

  def draw(_, j):
    index = j * group + jnp.arange(group)
    draw_keys = jax.vmap(lambda key: _fold_in_each(key, index))(noise_keys)
    noised = own.corrupt(
      draw_keys.reshape(-1),
      levels[:, index].reshape(-1, *levels.shape[2:]),
      repeat(batch['tokens']),
      weight,
    )
    _, per_row, by_level = network.score(
      objective, params, noised, weight, segment_ids, None
    )
    by_example = jax.tree.map(lambda x: x.reshape(-1, group).sum(1), per_row)
    return None, (by_example, by_level)

  _, stacked = jax.lax.scan(draw, None, jnp.arange(num_draws // group))
  rows, level_sums = jax.tree.map(lambda x: jnp.sum(x, 0), stacked)
  return {
    'nll': rows['nll'] / num_draws,
    'correct': rows['correct'],
    'scored': rows['scored'],
  }, level_sums


def make_eval_step(
  network: Network,
  objective: Objective,
  mesh: jax.sharding.Mesh,
  *,
  num_draws: int,
  seed: int,
) -> Callable[[Any, Any], dict[str, jax.Array]]:
  """Builds the jitted evaluation step, (params, batch) -> sums.

  Each example is scored `num_draws` times (once by an exact objective) at noise
  levels stratified within the example, with keys from (seed, its index in the
  split), so that every evaluation sees the same noise.

  Args:
    network: the network; dropout is off.
    objective: its `evaluation()` form is used.
    mesh: the device mesh.
    num_draws: draws per example, a multiple of the objective's group size.
    seed: of the evaluation noise.

  Returns:
    A function whose batch holds tokens, weight, num_bytes and index [B] (int32,
    the example's number in the split), and what is optional in training. Its
    sums: nll, weight (the tokens of `num_tokens`), num_bytes; for the
    intervals of their ratios the sums of squares nll2, weight2, num_bytes2 and
    of products nll_weight, nll_num_bytes over the rows; num_examples, correct,
    scored, bin_cross_entropy, bin_scored.
  """
  objective = objective.evaluation()
  num_draws = _check_draws(objective, num_draws)

  def step(params, batch):
    rows, level_sums = _score_rows(
      network, objective, num_draws, params, jax.random.key(seed), batch
    )
    nll, weight = rows['nll'], num_tokens(batch)
    num_bytes = batch['num_bytes'].astype(jnp.float32)
    sums = {
      'nll': nll,
      'weight': weight,
      'num_bytes': num_bytes,
      'nll2': nll * nll,
      'nll_weight': nll * weight,
      'weight2': weight * weight,
      'nll_num_bytes': nll * num_bytes,
      'num_bytes2': num_bytes * num_bytes,
      'num_examples': (weight > 0).astype(jnp.float32),
      'correct': rows['correct'],
      'scored': rows['scored'],
    }
    sums = {**jax.tree.map(jnp.sum, sums), **level_sums}
    return jax.lax.psum(sums, meshes.BATCH_AXES)

  return jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(network.specs(objective), P(meshes.BATCH_AXES)),
      out_specs=P(),
    )
  )


def make_score_step(
  network: Network,
  objective: Objective,
  mesh: jax.sharding.Mesh,
  *,
  num_draws: int,
) -> Callable[[Any, jax.Array, Any], dict[str, jax.Array]]:
  """Builds the jitted (params, key, batch) -> values of each example.

  Args:
    network: the network; dropout is off.
    objective: used as it is; pass its `evaluation()` form for the bound.
    mesh: the device mesh.
    num_draws: noise draws per example, a multiple of the objective's group size.

  Returns:
    A function of the parameters, a noise key and a batch of tokens, weight [B, L]
    and index [B]; example i draws from fold_in(key, index[i]). Where weight is 0
    a token is given, not scored. It returns a dict of [B]: nll, in nats, summed
    over positions and averaged over draws; correct and scored, sums over both.
  """
  num_draws = _check_draws(objective, num_draws)

  def step(params, key, batch):
    return _score_rows(network, objective, num_draws, params, key, batch)[0]

  rows = P(meshes.BATCH_AXES)
  return jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(network.specs(objective), P(), rows),
      out_specs=rows,
    ),
    out_shardings=meshes.replicated(mesh),
  )


def make_sample_step(
  network: Network,
  objective: Objective,
  sampler: types.Sampler,
  mesh: jax.sharding.Mesh,
  view: watch.View | None = None,
) -> Callable[[Any, jax.Array, types.Canvas], types.Samples]:
  """Builds the jitted sampler, (params, key, canvas) -> samples.

  The canvas's batch is a multiple of the mesh's batch shards. Row i draws from
  fold_in(key, i): its sample does not depend on the rest of the batch.

  Args:
    network: the network; dropout is off.
    objective: what it was trained with.
    sampler: the reverse rule.
    mesh: the device mesh.
    view: who watches the calls of the network, if anyone.
  """

  def step(params, key, canvas):
    keys = _fold_in_each(key, _row_index(canvas.tokens.shape[0]))
    return _sample(network, objective, sampler, view, params, keys, canvas)

  rows = P(meshes.BATCH_AXES)
  return jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(network.specs(objective), P(), types.Canvas(rows, rows)),
      out_specs=types.Samples(tokens=rows, num_calls=P()),
    )
  )


def _sample(
  network, objective, sampler, view, params, keys, canvas, segment_ids=None
) -> types.Samples:
  """This device's rows of a batch, under shard_map; keys [B]."""
  num_rows = canvas.tokens.shape[0]
  params = transformer.gather_ends(params, network.shards)
  run = sampler.with_rule(bind(objective, params))
  denoise = Denoiser(network, objective, params, segment_ids)
  if view is not None:
    denoise = watch.Watched(
      denoise,
      view,
      num_rows,
      _row_index(num_rows)[0],
      shift=-watch.AHEAD if objective.causal else 0,
    )
  samples = run(keys, canvas, denoise)
  return samples._replace(num_calls=sharding.max_over_batch(samples.num_calls))


class Rows(NamedTuple):
  """Canvases that have nothing to do with each other, sampled together.

  Attributes:
    key_data: [B, 2] uint32, `jax.random.key_data` of each row's own key.
    tokens: [B, L] int32; anything from each row's length on.
    fixed: [B, L] bool; True from there on.
    length: [B] int32, tokens of the row that are not padding.
    temperature: [B] float32, top_k: [B] int32, top_p: [B] float32; see
      `categorical.Draw`.
  """

  key_data: Any
  tokens: Any
  fixed: Any
  length: Any
  temperature: Any
  top_k: Any
  top_p: Any


def make_rows_step(
  network: Network,
  objective: Objective,
  sampler: types.Sampler,
  mesh: jax.sharding.Mesh,
  view: watch.View | None = None,
) -> Callable[[Any, Rows], types.Samples]:
  """Builds the jitted sampler of `Rows`, (params, rows) -> samples.

  As `make_sample_step`, with the key and the draw of each row its own: a row's
  sample depends on nothing but that row and L. Where the network reads to the
  right, it does not see the padding.

  Args:
    network: the network; dropout is off.
    objective: what it was trained with.
    sampler: the reverse rule; its own draw is not used.
    mesh: the device mesh.
    view: who watches the calls of the network, if anyone.
  """
  is_one_way = objective.causal or objective.block_size

  def step(params, rows):
    segment_ids = None
    if not is_one_way:
      where = jnp.arange(rows.tokens.shape[1])[None]
      segment_ids = (where >= rows.length[:, None]).astype(jnp.int32)
    draw = categorical.RowDraw(
      objective.mask_id, rows.temperature, rows.top_k, rows.top_p
    )
    return _sample(
      network,
      objective,
      sampler.with_draw(draw),
      view,
      params,
      jax.random.wrap_key_data(rows.key_data),
      types.Canvas(rows.tokens, rows.fixed),
      segment_ids,
    )

  split = P(meshes.BATCH_AXES)
  return jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(network.specs(objective), Rows(*[split] * len(Rows._fields))),
      out_specs=types.Samples(tokens=split, num_calls=P()),
    )
  )


def check_batch_size(
  batch_size: int,
  mesh: jax.sharding.Mesh,
  num_microbatches: int,
  group_size: int,
  key: str = 'train.batch_size',
):
  """Raises InputError unless every micro-batch of every device is whole groups."""
  shards = meshes.num_batch_shards(mesh)
  unit = shards * num_microbatches * group_size
  if num_microbatches < 1:
    raise InputError(
      f'train.num_microbatches={num_microbatches!r} must be >= 1'
    )
  if batch_size < 1 or batch_size % unit:
    raise InputError(
      f'{key}={batch_size!r} must be a positive multiple of {unit} = {shards} '
      f'devices x {num_microbatches} micro-batches x {group_size} (examples '
      'that share one noise draw)'
    )
