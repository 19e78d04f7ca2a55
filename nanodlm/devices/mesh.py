"""The device mesh with axes `data`, `fsdp`, `tensor`, and placement on it.

config.mesh divides the devices: `data` copies of the parameters, `fsdp` devices
that split each copy (gathered layer by layer in the forward pass and again in
the backward pass), and `tensor` devices that split heads, MLP and vocabulary.
Losses, gradients, samples and checkpoints are the same on all meshes.
XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight devices of a
CPU to try it.

Sequence parallelism is missing: a device holds whole rows, because the
positions of the last layer, noise by count and the canvases of samplers are of
whole rows. It would take a ring over a fourth mesh axis in model/attention.py,
and gathers by row in steps/ and model/losses.py.
"""

from collections.abc import Callable
import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from nanodlm.devices import sharding
from nanodlm.devices.sharding import AXES, BATCH_AXES
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """`config.mesh`; configs/base.py explains the keys."""

  data: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    for axis, size in vars(self).items():
      if size == 0 or size < -1:
        raise InputError(
          f'mesh.{axis}={size!r} must be >= 1, or -1 for the devices that the '
          'other axes leave'
        )
    if list(vars(self).values()).count(-1) > 1:
      raise InputError(f'mesh={vars(self)}: only one axis can be -1')


def make_mesh(
  config: MeshConfig, devices=None, *, refit: bool = False
) -> jax.sharding.Mesh:
  """Arranges the devices (default: all, of all processes) along AXES.

  With `refit`, sizes that do not fit are replaced by all devices along `data`.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  num, sizes = len(devices), vars(config)
  given = math.prod(size for size in sizes.values() if size != -1)
  shape = [num // given if size == -1 else size for size in sizes.values()]
  if math.prod(shape) != num and refit:
    log.info(
      f'mesh {sizes} does not fit the {num} devices here: using all of them '
      'along data'
    )
    shape = [num, 1, 1]
  if math.prod(shape) != num:
    raise InputError(
      f'mesh={sizes}: the sizes must multiply to the {num} devices there are, '
      f'those given multiply to {given}; one of them may be -1 for the rest'
    )
  # In the order of processes, so that the batch rows of each are contiguous;
  # jax.make_mesh would follow the topology.
  devices = sorted(
    devices, key=lambda device: (device.process_index, device.id)
  )
  return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES)


def shards(mesh: jax.sharding.Mesh) -> sharding.Shards:
  """Returns the numbers of devices that split the parameters."""
  return sharding.Shards(mesh.shape[sharding.FSDP], mesh.shape[sharding.TENSOR])


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Returns the sharding of each leaf of a tree of parameters or of a state."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), sharding.specs(tree, shards(mesh))
  )


def place(shardings: Any, tree: Any) -> Any:
  """Makes abstract arrays with the given shardings: a tree, or one for all."""
  return jax.tree.map(
    lambda where, part: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), part
    ),
    shardings,
    tree,
  )


def init_sharded(mesh: jax.sharding.Mesh, init: Callable[[], Any]) -> Any:
  """Computes init(), parameters or a state; each device computes its part."""
  return jax.jit(init, out_shardings=shardings(mesh, jax.eval_shape(init)))()


def shapes_sharded(mesh: jax.sharding.Mesh, init: Callable[[], Any]) -> Any:
  """Returns the abstract arrays of `init_sharded`, computing nothing."""
  shapes = jax.eval_shape(init)
  return place(shardings(mesh, shapes), shapes)


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes per device of a tree of arrays, abstract or not."""
  total = 0
  for x in jax.tree.leaves(tree):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    itemsize = 8 if is_key else x.dtype.itemsize
    total += itemsize * math.prod(x.sharding.shard_shape(x.shape))
  return total


def num_batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Returns the number of parts that the batch is split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding by which every device has the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding that splits the leading axis, in device order."""
  return NamedSharding(mesh, P(BATCH_AXES))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> slice:
  """Returns the rows of the global batch that this process's devices hold."""
  index = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  rows = [rows[0].indices(batch_size) for rows in index.values() if rows]
  return slice(min(row[0] for row in rows), max(row[1] for row in rows))


def shard_batch(mesh: jax.sharding.Mesh, batch):
  """Makes a sharded batch; each process has its `local_rows` in NumPy."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def shard_whole_batch(mesh: jax.sharding.Mesh, batch):
  """Makes a sharded batch of a NumPy batch that every process holds whole."""
  return shard_batch(
    mesh, jax.tree.map(lambda x: x[local_rows(mesh, x.shape[0])], batch)
  )
