"""Evaluation steps: the bound of a batch and of each example."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanodlm.devices import mesh as meshes
from nanodlm.steps.network import bind, fold_in_each, Scorer
from nanodlm.types import Batch, InputError, Objective


def make_eval_step(
  scorer: Scorer, mesh: jax.sharding.Mesh, *, num_draws: int, seed: int
) -> Callable[[Any, Batch], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
  """Builds the jitted evaluation step, (params, batch) -> (rows, sums).

  Each example is scored `num_draws` times (once if the objective is exact), at
  noise levels stratified within the example. Keys depend on `seed` and the
  example's index, so that all evaluations use the same noise.

  Without dropout; the objective's `evaluation()` form is used.
  `num_draws` is a multiple of the objective's group size. A batch has an index.

  Returns:
    A function that returns values of each row, [B]: those of `make_score_step`,
    ar_nll of `Scorer.autoregressive` if there is one, weight (the denominator
    of nats per token), num_bytes and, if the batch has them, law_nats; and sums
    over all rows: bin_cross_entropy, bin_scored.
  """
  scorer = dataclasses.replace(scorer, objective=scorer.objective.evaluation())
  num_draws = _check_draws(scorer.objective, num_draws)

  def step(params, batch):
    key = jax.random.key(seed)
    rows, level_sums = _score_rows(scorer, num_draws, params, key, batch)
    if own := scorer.autoregressive():
      exact = _score_rows(own, 1, params, jax.random.key(seed), batch)[0]
      rows['ar_nll'] = exact['nll']
    rows |= {'weight': batch.num_tokens, 'num_bytes': batch.num_bytes}
    if batch.law_nats is not None:
      rows['law_nats'] = batch.law_nats
    return rows, jax.lax.psum(level_sums, meshes.BATCH_AXES)

  rows = P(meshes.BATCH_AXES)
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(scorer.specs(), rows), out_specs=(rows, P())
  )
  return jax.jit(sharded, out_shardings=meshes.replicated(mesh))


@functools.lru_cache(maxsize=16)
def make_score_step(
  scorer: Scorer, mesh: jax.sharding.Mesh, *, num_draws: int
) -> Callable[[Any, jax.Array, Batch], dict[str, jax.Array]]:
  """Builds the jitted (params, key, batch) -> values of each example.

  As `make_eval_step`, but the objective is used as given: pass its
  `evaluation()` form for the bound. Example i uses fold_in(key, index[i]).

  Returns:
    A function that returns a dict of [B]: nll in nats, summed over positions
    and averaged over draws; correct and scored, summed over both.
  """
  num_draws = _check_draws(scorer.objective, num_draws)

  def step(params, key, batch):
    return _score_rows(scorer, num_draws, params, key, batch)[0]

  rows = P(meshes.BATCH_AXES)
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(scorer.specs(), P(), rows), out_specs=rows
  )
  return jax.jit(sharded, out_shardings=meshes.replicated(mesh))


@functools.lru_cache(maxsize=16)
def make_states_step(
  scorer: Scorer, mesh: jax.sharding.Mesh
) -> Callable[[Any, Any], jax.Array]:
  """Builds the jitted (params, (tokens, place, segment_ids)) -> states [B, D].

  These are the last hidden states at a place [B] of each row of tokens [B, L],
  whose network input shifts the tokens if the objective does; segment_ids
  [B, L] or None.
  """

  def step(params, rows):
    tokens, place, segment_ids = rows
    num, length = tokens.shape
    return scorer.network.hidden(
      scorer.network.gather(params),
      scorer.objective.network_input(tokens),
      scorer.objective.network_time(jnp.zeros(num)),
      segment_ids=segment_ids,
      positions=jnp.arange(num) * length + place,
    ).states.reshape(num, -1)

  rows = P(meshes.BATCH_AXES)
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(scorer.specs(), rows), out_specs=rows
  )
  return jax.jit(sharded, out_shardings=meshes.replicated(mesh))


def _check_draws(objective: Objective, num_draws: int) -> int:
  """Returns the number of draws per example; 1 if the objective is exact."""
  if objective.exact:
    return 1
  if num_draws < 1 or num_draws % objective.group_size:
    raise InputError(
      f'eval.num_draws={num_draws!r} must be a positive multiple '
      f'of {objective.group_size}'
    )
  return num_draws


def _score_rows(scorer, num_draws, params, key, batch):
  """Returns the values of `make_score_step`, and `Scores.by_level`."""
  objective = bind(scorer.objective, params)
  group, length = objective.group_size, batch.tokens.shape[1]
  keys = fold_in_each(key, batch.index)
  level_keys, noise_keys = jax.vmap(lambda key: tuple(jax.random.split(key)))(
    keys
  )
  levels = jax.vmap(lambda key: objective.eval_levels(key, num_draws, length))(
    level_keys
  )
  repeat = lambda x: jnp.repeat(x, group, axis=0)
  tokens, eligible = repeat(batch.tokens), repeat(batch.eligible)
  score = scorer.scoring(params, segment_ids=batch.segment_ids)

  def draw(_, j):
    index = j * group + jnp.arange(group)
    draw_keys = jax.vmap(lambda key: fold_in_each(key, index))(noise_keys)
    level = levels[:, index].reshape(-1, *levels.shape[2:])
    noised = objective.corrupt(draw_keys.reshape(-1), level, tokens, eligible)
    scores = score(noised, noised.scored.astype(jnp.float32))
    by_example = jax.tree.map(
      lambda x: x.reshape(-1, group).sum(1), scores.rows
    )
    return None, (by_example, scores.by_level)

  _, stacked = jax.lax.scan(draw, None, jnp.arange(num_draws // group))
  rows, level_sums = jax.tree.map(lambda x: jnp.sum(x, 0), stacked)
  return {
    'nll': rows.nll / num_draws,
    'correct': rows.correct,
    'scored': rows.scored,
  }, level_sums
