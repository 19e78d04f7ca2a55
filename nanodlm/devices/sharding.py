"""How parameters are split over the mesh, and the collectives of that split.

Three named axes: `data` copies the parameters. `fsdp` splits them, their
  averages and the optimizer's state over devices that also split the batch: a
  block gathers its parameters when it runs, in the forward and again in the
  backward pass, and the transpose of that gather sums and splits their
  gradients. `tensor` splits the work on one example (heads, MLP width and
  vocabulary); the residual stream is the same on all devices of a tensor group.

Every collective is the identity on an axis of one device, so that the network
also runs without a mesh.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
# The axes that split the batch.
BATCH_AXES = (DATA, FSDP)

# The names of a dense layer's adapter, matrices [D, r] and [r, F].
LORA_A, LORA_B = 'lora_a', 'lora_b'


def _dense(inputs: str, outputs: str) -> dict[str, tuple[str | None, ...]]:
  return {
    'kernel': (inputs, outputs),
    'bias': (outputs,),
    LORA_A: (inputs, None),
    LORA_B: (None, outputs),
  }


_COLUMNS, _ROWS = _dense(FSDP, TENSOR), _dense(TENSOR, FSDP)
_WIDTH = {'scale': (FSDP,), 'bias': (FSDP,)}
_TIME = {'kernel': (None, FSDP)}
# The mesh axes of a parameter's LAST dimensions, by module and parameter name
# or by parameter name alone. All other parameters are replicated.
_BY_MODULE = {
  **dict.fromkeys(('query', 'key', 'value', 'modulation'), _COLUMNS),
  **dict.fromkeys(('mlp_in', 'mlp_gate'), _COLUMNS),
  **dict.fromkeys(('attention_out', 'mlp_out'), _ROWS),
  **dict.fromkeys(('attention_norm', 'mlp_norm', 'final_norm'), _WIDTH),
  **dict.fromkeys(('in', 'out', 'self_conditioning'), _TIME),
}
_BY_NAME = {
  'embedding': (TENSOR, FSDP),
  'output': (TENSOR, FSDP),
  'output_bias': (TENSOR,),
  'position_embedding': (None, FSDP),
  'sink_key': (TENSOR, None),
  'sink_value': (TENSOR, None),
}
# Parameters with one row per id. Rows after the last id are padding.
BY_VOCABULARY = frozenset({'embedding', 'output', 'output_bias'})


@dataclasses.dataclass(frozen=True)
class Shards:
  """The numbers of devices that split a network's parameters.

  Attributes:
    fsdp: devices that each store a part of every matrix and gather it for use.
    tensor: devices that each compute with a part of every matrix.
  """

  fsdp: int = 1
  tensor: int = 1


UNSPLIT = Shards()


def spec(path: Any, ndim: int, shards: Shards) -> P:
  """Returns the partition of one leaf: a parameter, its average or its moment.

  Args:
    path: path of jax.tree_util, in a tree that is or contains parameters.
    ndim: number of dimensions of the leaf; scalars are replicated.
    shards: axes of one device are left out of the result.
  """
  names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
  axes = ()
  if ndim and names:
    module = _BY_MODULE.get(names[-2] if len(names) > 1 else '', {})
    axes = module.get(names[-1], _BY_NAME.get(names[-1], ()))
  sizes = {FSDP: shards.fsdp, TENSOR: shards.tensor, None: 1}
  axes = [axis if sizes[axis] > 1 else None for axis in axes]
  # P() and P(None) are equivalent, but JAX would compile once for each.
  return P(*(None,) * (ndim - len(axes)), *axes) if any(axes) else P()


def specs(tree: Any, shards: Shards) -> Any:
  """Returns the `spec` of every leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: spec(path, leaf.ndim, shards), tree
  )


def gather(params: Any, shards: Shards, dtype: Any = jnp.float32) -> Any:
  """Gathers this device's parameters over fsdp.

  Matrices are sent in `dtype`; their gradients are sent and summed in float32.
  """
  if shards.fsdp == 1:
    return params

  def whole(leaf, axes):
    if FSDP not in axes:
      return leaf
    wire = dtype if leaf.ndim > 1 else leaf.dtype
    return _all_gather(leaf, axes.index(FSDP), wire)

  return jax.tree.map(whole, params, specs(params, shards))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x, axis, dtype):
  return jax.lax.all_gather(x.astype(dtype), FSDP, axis=axis, tiled=True)


def _gather_backward(axis, dtype, _, gradient):
  del dtype
  gradient = gradient.astype(jnp.float32)
  return (
    jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=axis, tiled=True),
  )


_all_gather.defvjp(
  lambda x, axis, dtype: (_all_gather(x, axis, dtype), None), _gather_backward
)


def save_all_but_gathered(primitive: Any, *args: Any, **params: Any) -> bool:
  """A jax.checkpoint policy under which the backward pass gathers again."""
  del args, params
  return primitive is not jax.lax.all_gather_p


def split(x: jax.Array, shards: Shards) -> jax.Array:
  """Marks x as the input of work that is split over a tensor group.

  Its transpose sums the gradients of the parts.
  """
  return x if shards.tensor == 1 else jax.lax.pcast(x, TENSOR, to='varying')


def join(x: jax.Array, shards: Shards) -> jax.Array:
  """Sums the contributions of a tensor group."""
  return x if shards.tensor == 1 else jax.lax.psum(x, TENSOR)


def same(x: jax.Array, shards: Shards) -> jax.Array:
  """Marks x, which a tensor group has in common, as common to it."""
  if shards.tensor == 1:
    return x
  return join(jnp.where(jax.lax.axis_index(TENSOR) == 0, x, 0), shards)


def concatenate(x: jax.Array, shards: Shards) -> jax.Array:
  """Concatenates the parts of a tensor group along the last axis."""
  if shards.tensor == 1:
    return x
  # A sum with zeros rather than a gather: its result is known to be the same on
  # every device of the group.
  own = jax.lax.axis_index(TENSOR)
  parts = [jnp.where(own == part, x, 0) for part in range(shards.tensor)]
  return jax.lax.psum(jnp.concatenate(parts, axis=-1), TENSOR)


def _unsplit(axes: P) -> tuple[str, ...]:
  return tuple(axis for axis in BATCH_AXES if axis not in axes)


def sum_gradients(gradient: Any, shards: Shards) -> Any:
  """Sums the gradients of a tree of parameters over the batch axes.

  The transpose of the gather has summed those of split parameters over fsdp.
  """
  return jax.tree.map(
    lambda leaf, axes: jax.lax.psum(leaf, _unsplit(axes)),
    gradient,
    specs(gradient, shards),
  )


def local(params: Any, shards: Shards) -> Any:
  """Marks parameters as differing between the devices that split the batch.

  Their gradients then stay local sums until `sum_gradients`.
  """
  return jax.tree.map(
    lambda leaf, axes: jax.lax.pcast(leaf, _unsplit(axes), to='varying'),
    params,
    specs(params, shards),
  )


def on_any_device(flag: jax.Array) -> jax.Array:
  """Returns whether flag, of any shape, holds on any device of the fsdp axis.

  These devices call a network with split parameters together, so a loop around
  it must not end on one of them before the others.
  """
  try:
    if jax.lax.axis_size(FSDP) == 1:
      return flag
  except NameError:  # Called without a mesh.
    return flag
  return jax.lax.pmax(flag.astype(jnp.int32), FSDP) > 0


def max_over_batch(x: jax.Array) -> jax.Array:
  """The largest x, any shape, of the devices that split the batch."""
  # What was reduced over one of the axes already differs along the other alone,
  # and JAX 0.12 refuses a reduction over axes of both kinds.
  varying = jax.typeof(x).manual_axis_type.varying
  axes = tuple(axis for axis in BATCH_AXES if axis in varying)
  return jax.lax.pmax(x, axes) if axes else x


def on_first_device(make: Callable[[], jax.Array]) -> jax.Array:
  """Calls make() -> [] int32 on the first device of each tensor group.

  All devices of the group get its value, and all of fsdp the smallest of these:
  they continue together or not at all.
  """
  try:
    index = jax.lax.axis_index(TENSOR)
  except NameError:  # Called without a mesh.
    return make()
  # JAX takes a value from the host to be the same on all devices; it is not.
  own = lambda: jax.lax.pcast(make(), AXES, to='varying')
  value = jax.lax.cond(index == 0, own, lambda: zeros_like(own))
  return jax.lax.pmin(jax.lax.psum(value, TENSOR), FSDP)


def zeros_like(make: Callable[[], Any]) -> Any:
  """Returns zeros with the shapes and the varying axes of make()'s result."""

  def zeros(x):
    kind = x.manual_axis_type  # None outside of shard_map.
    axes = tuple(kind.varying) if kind else ()
    value = jnp.zeros(x.shape, x.dtype)
    return jax.lax.pcast(value, axes, to='varying') if axes else value

  return jax.tree.map(zeros, jax.eval_shape(make))


def padded(size: int, shards: Shards) -> int:
  """Rounds the vocabulary's size up to a multiple of the tensor devices."""
  return -(-size // shards.tensor) * shards.tensor
