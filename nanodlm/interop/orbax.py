"""Training states that other projects saved with Orbax."""

from collections.abc import Iterator
import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nanodlm import workdir as workdirs
from nanodlm.training import checkpoint
from nanodlm.types import InputError

# The item of such a checkpoint that holds the parameters.
_ITEM = 'train_state'


def find(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of a whole training state, or None.

  Args:
    path: the folder itself, the checkpoint that it is an item of, the folder of
      the checkpoints, or a workdir. The last checkpoint is used.
  """
  if not path.is_dir():
    return None
  if (path / '_METADATA').is_file():
    return path
  for folder in (path, path / workdirs.CHECKPOINTS):
    steps = checkpoint.complete_steps(folder)
    if steps:
      folder = folder / str(steps[-1])
    if (folder / _ITEM / '_METADATA').is_file():
      return folder / _ITEM
  return None


@contextlib.contextmanager
def _open(folder: pathlib.Path) -> Iterator[ocp.PyTreeCheckpointer]:
  with ocp.PyTreeCheckpointer() as checkpointer:
    try:
      yield checkpointer
    # Orbax raises nothing narrower for data that cannot be read.
    except Exception as error:
      raise InputError(f'{folder} cannot be read: {error}') from error


def metadata(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the tree of a folder from `find`, with shapes for leaves."""
  with _open(folder) as checkpointer:
    found: Any = checkpointer.metadata(folder.absolute())
    return found.item_metadata.tree


def restore(folder: pathlib.Path, item: str) -> Any:
  """Returns one entry of that tree as NumPy arrays."""
  tree = {item: metadata(folder)[item]}
  as_numpy = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
  )
  args = ocp.args.PyTreeRestore(
    item=tree, restore_args=as_numpy, partial_restore=True
  )
  with _open(folder) as checkpointer:
    return checkpointer.restore(folder.absolute(), args=args)[item]
