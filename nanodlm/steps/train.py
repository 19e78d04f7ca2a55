"""The training step, which takes the only mean over the global batch.

Under shard_map, each device scores its rows of the global batch, with noise
that depends on the GLOBAL index of each row. Devices exchange sums, not means.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from nanodlm.devices import mesh as meshes
from nanodlm.devices import sharding
from nanodlm.model import transformer
from nanodlm.steps.network import (
  bind,
  check_batch_size,
  fold_in_each,
  row_index,
  Scorer,
)
from nanodlm.training import optim
from nanodlm.training import state as states
from nanodlm.training.state import TrainState
from nanodlm.types import Batch

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


class _Rows(NamedTuple):
  """A device's examples and their noise; opening_keys are for annealing.

  is_conditioned [B] says which read their own prediction.
  """

  batch: Batch
  keys: jax.Array
  levels: jax.Array
  dropout_keys: jax.Array | None
  opening_keys: jax.Array | None
  is_conditioned: jax.Array | None


def make_train_step(
  scorer: Scorer,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  mesh: jax.sharding.Mesh,
  *,
  batch_size: int,
  num_microbatches: int,
  ema_decay: float,
  anneal_steps: int = 0,
) -> Step:
  """Builds the jitted training step, (state, batch) -> (state, metrics).

  The state is donated; the batch is sharded by `mesh.batch_sharding`. If the
  loss or the gradient is not finite, only `step` changes, and
  metrics['skipped'] is 1.

  With `anneal_steps` = N, a position attends to each position on its right with
  probability n / N at step n < N, and to all from step N (`opening_mask`).

  Raises:
    InputError: the batch does not divide into devices, micro-batches and the
      objective's groups, or its curriculum does not fit the vocabulary.
  """
  network, objective, shards = scorer.network, scorer.objective, scorer.shards
  curriculum = dataclasses.replace(scorer, objective=objective.curriculum())
  check_batch_size(batch_size, mesh, num_microbatches, objective.group_size)

  def opening_share(step):
    """Returns the probability that a position sees one to its right."""
    return jnp.minimum(step / max(anneal_steps, 1), 1.0)

  def loss(params, rows, scorer, rest, step):
    frozen, base = rest
    params = states.join(params, base)
    batch, seen = rows.batch, None
    if rows.opening_keys is not None:
      length, share = batch.tokens.shape[1], opening_share(step)
      seen = transformer.opening_mask(rows.opening_keys, share, length)
    score = scorer.scoring(
      params,
      frozen,
      base,
      segment_ids=batch.segment_ids,
      dropout_keys=rows.dropout_keys,
      seen=seen,
      is_conditioned=rows.is_conditioned,
    )
    own = bind(scorer.objective.at_step(step), params)
    scores = own.loss(batch, rows.levels, rows.keys, score)
    rows = {k: x for k, x in scores.rows._asdict().items() if x is not None}
    sums = jax.tree.map(jnp.sum, rows)
    if not own.trains_bound:
      sums['nll'] = jnp.full_like(sums['nll'], jnp.nan)
    sums['weight'] = jnp.sum(batch.num_tokens.astype(jnp.float32))
    sums['num_bytes'] = jnp.sum(batch.num_bytes.astype(jnp.float32))
    sums['num_rows'] = jnp.sum(jnp.ones_like(batch.weight))
    for name, values in (scores.reports or {}).items():
      sums[f'report/{name}'] = jnp.sum(values)
    return scores.total, {**sums, **scores.by_level}

  def local_gradient(scorer, params, rest, key, step, batch, is_opening):
    # Without options there are three keys, so that existing runs resume with
    # the same noise.
    num_keys = 3 + (anneal_steps > 0) + network.self_conditions
    level_key, noise_key, dropout_key, *keys = jax.random.split(key, num_keys)
    num_rows, length = batch.tokens.shape
    index, now = row_index(num_rows), objective.at_step(step)
    is_conditioned = None
    if network.self_conditions:
      draw = jax.vmap(jax.random.bernoulli)
      is_conditioned = draw(fold_in_each(keys[-1], index))
    rows = _Rows(
      batch,
      fold_in_each(noise_key, index),
      now.sample_levels(level_key, batch_size, length)[index],
      fold_in_each(dropout_key, index) if network.has_dropout else None,
      fold_in_each(keys[0], index) if is_opening else None,
      is_conditioned,
    )
    gradient = jax.grad(
      functools.partial(loss, scorer=scorer, rest=rest, step=step), has_aux=True
    )
    if num_microbatches == 1:
      return gradient(params, rows)
    rows = jax.tree.map(
      lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), rows
    )
    first = lambda rows: jax.tree.map(lambda x: x[0], rows)
    shapes = jax.eval_shape(lambda rows: gradient(params, first(rows)), rows)
    # The sums must vary over the same devices as the summands.
    zeros = lambda s: jax.lax.pcast(
      jnp.zeros(s.shape, s.dtype), meshes.BATCH_AXES, to='varying'
    )
    sums = jax.tree.map(jnp.zeros_like, params), jax.tree.map(zeros, shapes[1])

    def add(sums, micro):
      return jax.tree.map(jnp.add, sums, gradient(params, micro)), None

    return jax.lax.scan(add, sums, rows)[0]

  # If the batch has one part, its gradient is already the sum, and a reduction
  # would copy it on XLA's CPU backend.
  is_whole = meshes.num_batch_shards(mesh) == 1

  def global_gradient(params, rest, key, step, batch):
    """Sums the gradient of this device's parameters over the global batch."""
    frozen, base = rest
    params, base = sharding.local((params, base), shards)
    rest = frozen, base

    def of(scorer):
      of = functools.partial(
        local_gradient, scorer, params, rest, key, step, batch
      )
      if not anneal_steps:
        return of(False)
      # After annealing, any attention kernel applies.
      return jax.lax.cond(
        opening_share(step) < 1, lambda: of(True), lambda: of(False)
      )

    if num_first := objective.curriculum_steps:
      gradient, sums = jax.lax.cond(
        step < num_first, lambda: of(curriculum), lambda: of(scorer)
      )
    else:
      gradient, sums = of(scorer)
    if is_whole:
      gradient = jax.tree.map(lambda g: g[None], gradient)
    else:
      gradient = sharding.sum_gradients(gradient, shards)
    return gradient, jax.lax.psum(sums, meshes.BATCH_AXES)

  init_state = functools.partial(
    states.init_state, network, objective, optimizer, 0, use_ema=ema_decay > 0
  )
  shapes = jax.eval_shape(init_state)
  specs = sharding.specs(shapes.params, shards)
  rows = P(meshes.BATCH_AXES)
  whole_specs = jax.tree.map(lambda spec: P(meshes.BATCH_AXES, *spec), specs)

  def sharded_gradient(params, rest, key, step, batch):
    return jax.shard_map(
      global_gradient,
      mesh=mesh,
      in_specs=(specs, sharding.specs(rest, shards), P(), P(), rows),
      out_specs=(whole_specs if is_whole else specs, P()),
    )(params, rest, key, step, batch)

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(state.key, state.step)
    gradient, sums = sharded_gradient(
      state.params, (state.frozen, state.base), key, state.step, batch
    )
    if is_whole:
      gradient = jax.tree.map(lambda g: g[0], gradient)
    # Outside shard_map, arrays are global and each device updates its part.
    # Only norms and the matrix products of Muon need communication.
    total_weight = jnp.maximum(sums['weight'], 1.0)
    gradient = jax.tree.map(lambda g: g / total_weight, gradient)
    grad_norm = optax.tree.norm(gradient)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums['loss'])

    def update(gradient, old):
      params, ema_params, opt_state = old
      opt_state = optim.at_step(opt_state, state.step)
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
      pick = lambda n, o: jnp.where(is_finite, n, o)
      return jax.tree.map(pick, update(gradient, old), old)

    # XLA's CPU backend copies a state that a select both reads and overwrites.
    # A branch avoids the copy.
    params, ema_params, opt_state = jax.lax.platform_dependent(
      gradient,
      (state.params, state.ema_params, state.opt_state),
      cpu=branch,
      default=select,
    )
    frozen = state.frozen
    if objective.round_steps:
      is_over = (state.step + 1) % objective.round_steps == 0
      renew = lambda: objective.renew_frozen(state.frozen, params)
      frozen = jax.lax.cond(is_over, renew, lambda: state.frozen)
    metrics = {
      **sums,
      'grad_norm': grad_norm,
      'param_norm': optax.tree.norm(params),
      'learning_rate': jnp.asarray(learning_rate(state.step)),
      'skipped': 1.0 - is_finite,
    }
    return dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      ema_params=ema_params,
      opt_state=opt_state,
      frozen=frozen,
    ), metrics

  shardings = meshes.shardings(mesh, shapes), meshes.replicated(mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=shardings)
