"""Sampling steps: run a sampler and a network on a mesh."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanodlm.devices import mesh as meshes
from nanodlm.devices import sharding
from nanodlm.noise import categorical
from nanodlm.show import watch
from nanodlm.steps import network
from nanodlm.steps.network import Scorer
from nanodlm.types import Canvas, Objective, Sampler, Samples


def make_sample_step(
  scorer: Scorer,
  sampler: Sampler,
  mesh: jax.sharding.Mesh,
  view: watch.View | None = None,
) -> Callable[[Any, jax.Array, Canvas], Samples]:
  """Builds the jitted sampler, (params, key, canvas) -> samples.

  The batch size is a multiple of the mesh's batch shards. Row i draws from
  fold_in(key, i), so its sample does not depend on the other rows. The network
  is without dropout; `view` observes its calls.
  """

  def step(params, key, canvas):
    keys = network.fold_in_each(key, network.row_index(canvas.tokens.shape[0]))
    return _sample(scorer, sampler, view, params, keys, canvas)

  return _jit(step, scorer, mesh, P(), P(meshes.BATCH_AXES))


def _jit(step, scorer, mesh, *in_specs):
  out_specs = Samples(tokens=P(meshes.BATCH_AXES), num_calls=P())
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(scorer.specs(), *in_specs), out_specs=out_specs
  )
  return jax.jit(sharded)


def _sample(scorer, sampler, view, params, keys, canvas) -> Samples:
  """Fills this device's rows of a batch under shard_map; keys [B]."""
  objective = scorer.objective
  num_rows = canvas.tokens.shape[0]
  denoise = network.Denoiser(
    scorer.network, objective, scorer.network.gather(params), canvas.segment_ids
  )
  if scorer.network.self_conditions and sampler.remembers:
    canvas = canvas._replace(memory=denoise.init_memory(canvas.tokens))
  watched = None
  if view is not None:
    written = None
    if view.reveals:
      denoise = denoise.keep_states(canvas.tokens)
      written = watch.Written.make(
        canvas, objective.mask_id, denoise.logits_again
      )
    first_row = network.row_index(num_rows)[0]
    watched = watch.Watched(denoise, view, num_rows, first_row, written=written)
  samples = sampler.with_rule(network.bind(objective, params))(
    keys, canvas, denoise if watched is None else watched
  )
  if watched is not None:
    samples = samples._replace(tokens=watched.finish(samples.tokens))
  num_calls = sharding.max_over_batch(samples.num_calls)
  return samples._replace(num_calls=num_calls)


class Rows(NamedTuple):
  """Canvases of different requests, sampled together.

  Attributes:
    key_data: [B, 2] uint32, `jax.random.key_data` of the key of each row.
    tokens: [B, L] int32; arbitrary in the padding.
    fixed: [B, L] bool; True in the padding.
    length: [B] int32, number of tokens before the padding.
    temperature: [B] float32, see `categorical.Draw`.
    top_k: [B] int32.
    top_p: [B] float32.
  """

  key_data: Any
  tokens: Any
  fixed: Any
  length: Any
  temperature: Any
  top_k: Any
  top_p: Any


def make_rows_step(
  scorer: Scorer,
  sampler: Sampler,
  mesh: jax.sharding.Mesh,
  view: watch.View | None = None,
) -> Callable[[Any, Rows], Samples]:
  """Builds the jitted sampler of `Rows`, (params, rows) -> samples.

  Each row has its own key and draw, so its sample depends only on the row and
  L. Networks do not attend to the padding. The arguments are those of
  `make_sample_step`; the sampler's own draw is replaced.
  """
  objective = scorer.objective

  def step(params, rows):
    segment_ids = _segments(objective, rows.tokens, rows.length)
    draw = categorical.RowDraw(
      objective.mask_id, rows.temperature, rows.top_k, rows.top_p
    )
    keys = jax.random.wrap_key_data(rows.key_data)
    canvas = Canvas(rows.tokens, rows.fixed, segment_ids=segment_ids)
    return _sample(scorer, sampler.with_draw(draw), view, params, keys, canvas)

  return _jit(step, scorer, mesh, P(meshes.BATCH_AXES))


def _segments(
  objective: Objective, tokens: jax.Array, length: jax.Array
) -> jax.Array | None:
  """Returns the segments [B, L] of tokens and of padding after `length` [B].

  None for a network that does not see what is after a token or its block.
  """
  if objective.causal or objective.block_size:
    return None
  where = jnp.arange(tokens.shape[1])[None]
  return (where >= length[:, None]).astype(jnp.int32)


@functools.lru_cache(maxsize=16)
def make_logits_step(
  scorer: Scorer, mesh: jax.sharding.Mesh
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
  """Builds the jitted (params, tokens, level, length) -> logits [B, L, V].

  tokens [B, L] are arbitrary after the first `length` [B] of each row, which do
  not attend to the others. B is a multiple of the mesh's batch shards.
  """

  def step(params, tokens, level, length):
    denoise = network.Denoiser(
      scorer.network,
      scorer.objective,
      scorer.network.gather(params),
      _segments(scorer.objective, tokens, length),
    )
    where = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return denoise(tokens, level, jnp.broadcast_to(where, tokens.shape))

  rows = P(meshes.BATCH_AXES)
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(scorer.specs(), rows, rows, rows), out_specs=rows
  )
  return jax.jit(sharded, out_shardings=meshes.replicated(mesh))
