"""Which axis of which parameter lies on which axis of the mesh: the one table.

`fsdp` splits the parameters, their averages and the optimiser's state over the
devices that also split the batch: a block's parameters are gathered when the
block runs, in the forward and again in the backward pass, and the transpose of
that gather sums and splits their gradients. `tensor` splits the work of one
example: the heads, the MLP's width and the vocabulary; what the devices of a
tensor group hold of the residual stream is the same.

The functions here are the collectives of these two axes. All of them do nothing
on an axis of one device, so that the network also runs without a mesh.
"""

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
# The batch is split over both.
BATCH_AXES = (DATA, FSDP)

_COLUMNS = {'kernel': (FSDP, TENSOR), 'bias': (TENSOR,)}
_ROWS = {'kernel': (TENSOR, FSDP), 'bias': (FSDP,)}
_WIDTH = {'scale': (FSDP,), 'bias': (FSDP,)}
# Mesh axes of the LAST dimensions of a parameter, by its module's name and its
# own, or by its own alone. What is not listed is replicated.
_BY_MODULE = {
  'query': _COLUMNS,
  'key': _COLUMNS,
  'value': _COLUMNS,
  'attention_out': _ROWS,
  'mlp_in': _COLUMNS,
  'mlp_gate': _COLUMNS,
  'mlp_out': _ROWS,
  'modulation': _COLUMNS,
  'in': {'kernel': (None, FSDP)},
  'out': {'kernel': (None, FSDP)},  # of the time
  'attention_norm': _WIDTH,
  'mlp_norm': _WIDTH,
  'final_norm': _WIDTH,
}
_BY_NAME = {
  'embedding': (TENSOR, FSDP),
  'output': (TENSOR, FSDP),
  'output_bias': (TENSOR,),
  'position_embedding': (None, FSDP),
}
# Those with a row for each id; rows behind the vocabulary are padding.
BY_VOCABULARY = frozenset({'embedding', 'output', 'output_bias'})


@dataclasses.dataclass(frozen=True)
class Shards:
  """Over how many devices a network's parameters are split.

  Attributes:
    fsdp: devices that each hold a part of every matrix, gathered when used.
    tensor: devices that each compute with a part of every matrix.
  """

  fsdp: int = 1
  tensor: int = 1


def spec(path: Any, ndim: int, shards: Shards) -> P:
  """The partition of the leaf at a tree path: a parameter, its average, moment.

  Args:
    path: from jax.tree_util, of a parameter tree or of one that holds such trees.
    ndim: of the leaf; 0 is replicated.
    shards: an axis of one device is left out: nothing differs along it.
  """
  names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
  axes = ()
  if ndim and names:
    module = _BY_MODULE.get(names[-2] if len(names) > 1 else '', {})
    axes = module.get(names[-1], _BY_NAME.get(names[-1], ()))
  sizes = {FSDP: shards.fsdp, TENSOR: shards.tensor, None: 1}
  axes = [axis if sizes[axis] > 1 else None for axis in axes]
  if not any(axes):
    return P()  # one way to write it: another would be compiled for anew
  return P(*(None,) * (ndim - len(axes)), *axes)


def specs(tree: Any, shards: Shards) -> Any:
  """`spec` of every leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: spec(path, leaf.ndim, shards), tree
  )


def gather(params: Any, shards: Shards, dtype: Any = jnp.float32) -> Any:
  """A tree of this device's parameters with the fsdp axes whole again.

  Matrices travel in `dtype`; their gradients come back, and are summed, in float32.
  """
  if shards.fsdp == 1:
    return params

  def whole(path, leaf):
    axes = spec(path, leaf.ndim, shards)
    if FSDP not in axes:
      return leaf
    return _all_gather(
      leaf, axes.index(FSDP), dtype if leaf.ndim > 1 else leaf.dtype
    )

  return jax.tree_util.tree_map_with_path(whole, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x, axis, dtype):
  return jax.lax.all_gather(x.astype(dtype), FSDP, axis=axis, tiled=True)


def _gather_forward(x, axis, dtype):
  return _all_gather(x, axis, dtype), None


def _gather_backward(axis, dtype, _, gradient):
  del dtype
  return (
    jax.lax.psum_scatter(
      gradient.astype(jnp.float32), FSDP, scatter_dimension=axis, tiled=True
    ),
  )


_all_gather.defvjp(_gather_forward, _gather_backward)


def save_all_but_gathered(primitive: Any, *args: Any, **params: Any) -> bool:
  """A policy of jax.checkpoint: the backward pass gathers a block anew."""
  del args, params
  return primitive is not jax.lax.all_gather_p


def split(x: jax.Array, shards: Shards) -> jax.Array:
  """x, about to be used by each device of a tensor group for its own part.

  Its transpose is the sum of the parts' gradients.
  """
  if shards.tensor == 1:
    return x
  return jax.lax.pcast(x, (TENSOR,), to='varying')


def join(x: jax.Array, shards: Shards) -> jax.Array:
  """The sum over a tensor group of its parts' contributions."""
  return x if shards.tensor == 1 else jax.lax.psum(x, TENSOR)


def concatenate(x: jax.Array, shards: Shards) -> jax.Array:
  """The parts of a tensor group side by side along the last axis."""
  if shards.tensor == 1:
    return x
  # A sum with zeros and not a gather, so that the result counts as the same on
  # every device of the group.
  own = jax.lax.axis_index(TENSOR)
  parts = [jnp.where(own == part, x, 0) for part in range(shards.tensor)]
  return jax.lax.psum(jnp.concatenate(parts, axis=-1), TENSOR)


def sum_gradients(gradient: Any, shards: Shards) -> Any:
  """Sums the gradients of a tree of parameters over the batch axes.

  Those of a parameter that is split over fsdp were summed there by the transpose
  of its gather.
  """

  def total(path, leaf):
    axes = spec(path, leaf.ndim, shards)
    return jax.lax.psum(leaf, tuple(a for a in BATCH_AXES if a not in axes))

  return jax.tree_util.tree_map_with_path(total, gradient)


def local(params: Any, shards: Shards) -> Any:
  """Parameters marked as differing between the devices that split the batch.

  So their gradients stay local sums until `sum_gradients`.
  """

  def mark(path, leaf):
    axes = spec(path, leaf.ndim, shards)
    return jax.lax.pcast(
      leaf, tuple(a for a in BATCH_AXES if a not in axes), to='varying'
    )

  return jax.tree_util.tree_map_with_path(mark, params)


def on_any_device(flag: jax.Array) -> jax.Array:
  """Where flag, any shape, holds on any device that must stay in step with this.

  A network whose parameters are split over fsdp is called by all devices of that
  axis together: a loop around it must go on for all as long as for one.
  """
  try:
    if jax.lax.axis_size(FSDP) == 1:
      return flag
  except NameError:  # no mesh
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
  """make() -> [] int32 on the first of the devices that share their rows.

  All of them have its value: those of the axis `tensor`, and of `fsdp` the
  smallest of theirs, since they go on together or not at all.
  """
  try:
    index = jax.lax.axis_index(TENSOR)
  except NameError:  # no mesh
    return make()
  # What the host returns counts as the same on all devices, and is not.
  own = lambda: jax.lax.pcast(make(), AXES, to='varying')
  value = jax.lax.cond(index == 0, own, lambda: zeros_like(own))
  return jax.lax.pmin(jax.lax.psum(value, TENSOR), FSDP)


def zeros_like(make: Callable[[], Any]) -> Any:
  """Zeros of the shapes of make(), which vary over devices like its values."""

  def zeros(x):
    axes = tuple(x.manual_axis_type.varying)
    value = jnp.zeros(x.shape, x.dtype)
    return jax.lax.pcast(value, axes, to='varying') if axes else value

  return jax.tree.map(zeros, jax.eval_shape(make))


def padded(size: int, shards: Shards) -> int:
  """The vocabulary's size rounded up to a whole number a device."""
  return -(-size // shards.tensor) * shards.tensor
