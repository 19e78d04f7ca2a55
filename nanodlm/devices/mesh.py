"""The device mesh: named axes `data`, `fsdp`, `tensor`, and what lies on them."""

import dataclasses
import math
from typing import Any, Callable

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from nanodlm.devices import sharding
from nanodlm.devices.sharding import AXES, BATCH_AXES
from nanodlm.types import InputError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; each field is a key of `config.mesh`.

  One of them may be -1: the devices that the other axes leave.

  Attributes:
    data: copies of the parameters, each with its part of the batch.
    fsdp: devices that split a copy of the parameters, and its part of the batch.
    tensor: devices that split the heads, the MLP and the vocabulary.
  """

  data: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    sizes = {axis: getattr(self, axis) for axis in AXES}
    for axis, size in sizes.items():
      if size == 0 or size < -1:
        raise InputError(
          f'mesh.{axis}={size!r} must be >= 1, or -1 for the '
          'devices that the other axes leave'
        )
    if sum(size == -1 for size in sizes.values()) > 1:
      raise InputError(
        f'mesh={sizes}: only one axis can be -1, the devices '
        'that the others leave'
      )


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
  """Lays the devices (default: all, of all processes) out over AXES.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: getattr(config, axis) for axis in AXES}
  given = math.prod(size for size in sizes.values() if size != -1)
  for axis in AXES:
    if sizes[axis] == -1 and len(devices) % given == 0:
      sizes[axis] = len(devices) // given
  if math.prod(sizes.values()) != len(devices):
    raise InputError(
      f'mesh={sizes}: the sizes must multiply to the {len(devices)} devices '
      'there are, one of them may be -1 for the rest; the product of the given '
      f'ones is {given}'
    )
  # By process, so that each one's rows of the batch are contiguous; jax.make_mesh
  # would follow the topology.
  devices = sorted(
    devices, key=lambda device: (device.process_index, device.id)
  )
  return jax.sharding.Mesh(
    np.asarray(devices).reshape(tuple(sizes.values())),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def shards(mesh: jax.sharding.Mesh) -> sharding.Shards:
  """Over how many devices the parameters are split."""
  return sharding.Shards(mesh.shape[sharding.FSDP], mesh.shape[sharding.TENSOR])


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Where the leaves of a parameter tree, or of a state of some, lie."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), sharding.specs(tree, shards(mesh))
  )


def place(shardings: Any, tree: Any) -> Any:
  """Abstract arrays with their shardings (one for all, or a tree of them)."""
  if isinstance(shardings, jax.sharding.Sharding):
    one = shardings
    shardings = jax.tree.map(lambda _: one, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings,
  )


def init_sharded(mesh: jax.sharding.Mesh, init: Callable[[], Any]) -> Any:
  """What `init` makes, parameters or a state of some, each device its part."""
  return jax.jit(init, out_shardings=shardings(mesh, jax.eval_shape(init)))()


def shapes_sharded(mesh: jax.sharding.Mesh, init: Callable[[], Any]) -> Any:
  """`init_sharded` as abstract arrays: nothing is computed."""
  shapes = jax.eval_shape(init)
  return place(shardings(mesh, shapes), shapes)


def bytes_per_device(tree: Any) -> int:
  """Bytes of arrays, abstract or not, on one device; keys as their words."""
  total = 0
  for x in jax.tree.leaves(tree):
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    total += (8 if is_key else x.dtype.itemsize) * math.prod(
      x.sharding.shard_shape(x.shape)
    )
  return total


def num_batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Devices that hold different rows of the batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of the leading axis split over the batch axes, in device order."""
  return NamedSharding(mesh, P(BATCH_AXES))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> slice:
  """The contiguous rows of the global batch that this process's devices hold."""
  index = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  starts = [rows[0].start or 0 for rows in index.values()]
  stops = [
    batch_size if rows[0].stop is None else rows[0].stop
    for rows in index.values()
  ]
  return slice(min(starts), max(stops))


def shard_batch(mesh: jax.sharding.Mesh, batch):
  """Puts this process's rows (numpy, `local_rows`) on its devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def shard_whole_batch(mesh: jax.sharding.Mesh, batch):
  """The same for a batch of which every process has all rows."""

  def put(x):
    return shard_batch(mesh, x[local_rows(mesh, x.shape[0])])

  return jax.tree.map(put, batch)
