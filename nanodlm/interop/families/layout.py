"""How a family's checkpoint becomes our parameters, and the way back: values.

A parameter of ours is named by its path: 'embedding', 'final_norm/scale', and in
a block 'query/kernel', 'mlp_norm/scale', ... Kernels are [in, out].
"""

import dataclasses
from typing import Any, Callable, NamedTuple

import numpy as np

from nanodlm.types import InputError

# Of the layer's number, in the names of tensors.
LAYER = '{layer}'


class How(NamedTuple):
  """A change of shape and its inverse; neither may change a number.

  Attributes:
    read: theirs -> ours.
    write: ours -> theirs.
  """

  read: Callable[[np.ndarray], np.ndarray]
  write: Callable[[np.ndarray], np.ndarray]


SAME = How(lambda x: x, lambda x: x)
# PyTorch's Linear keeps [out, in].
TRANSPOSED = How(np.transpose, np.transpose)


def reshaped(ours: tuple[int, ...], theirs: tuple[int, ...]) -> How:
  """The same numbers in the same order."""
  return How(lambda x: x.reshape(ours), lambda x: x.reshape(theirs))


def chain(*hows: How) -> How:
  """One after the other, reading from left to right."""

  def read(x):
    for how in hows:
      x = how.read(x)
    return x

  def write(x):
    for how in reversed(hows):
      x = how.write(x)
    return x

  return How(read, write)


def halves_from_pairs(num_heads: int, head_dim: int) -> How:
  """Output features of rotary queries or keys, [H * Dh, ...].

  Theirs rotate features 2i and 2i + 1 together, ours i and i + Dh / 2.
  """

  def turn(x, shape):
    x = x.reshape(num_heads, *shape, *x.shape[1:])
    return x.swapaxes(1, 2).reshape(-1, *x.shape[3:])

  return How(
    lambda x: turn(x, (head_dim // 2, 2)), lambda x: turn(x, (2, head_dim // 2))
  )


@dataclasses.dataclass(frozen=True)
class Piece:
  """Where a parameter of ours stands in their file.

  Attributes:
    name: of their tensor, with LAYER in it where it is a block's.
    how: their tensor, or the part `cut` of it, to ours.
    cut: (axis, start, stop) of a tensor that holds several of our parameters;
      the pieces of one tensor must make up all of it. None: the whole tensor.
    vocab: whether the first axis of OUR array is the vocabulary: rows are moved
      where their mask is not the last id.
  """

  name: str
  how: How = SAME
  cut: tuple[int, int, int] | None = None
  vocab: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
  """The whole mapping of one checkpoint.

  Attributes:
    ends: {our path: piece} of what belongs to no block.
    block: {our path inside a block: piece}, names with LAYER.
    ignored: regular expressions of their tensors that carry no weight of their
      own (buffers, as a causal mask or rotary frequencies).
    same: {their tensor: another} that must hold the same numbers, as the output
      projection beside the embedding it is tied to; read from the other one.
  """

  ends: dict[str, Piece]
  block: dict[str, Piece]
  ignored: tuple[str, ...] = ()
  same: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Export:
  """What a config.json says beside the network.

  Attributes:
    vocab_size: ids, the mask included.
    mask_id: the mask's place in the file.
    separator_id: of the token that ends a document, in the file.
    length: tokens of a text.
  """

  vocab_size: int
  mask_id: int
  separator_id: int
  length: int


def misfit(
  network: Any,
  objective: str,
  objectives: tuple[str, ...],
  **allowed: tuple[Any, ...],
) -> str:
  """What of a network a family cannot express, '' where there is nothing.

  Args:
    network: a `ModelConfig`.
    objective: the run's objective.name.
    objectives: those that the family stands for.
    **allowed: the values that a field may have.
  """
  allowed = {'output_bias': (False,), 'embedding_dim': (0,), **allowed}
  found = [
    f'model.{key}={getattr(network, key)!r}'
    for key, values in allowed.items()
    if getattr(network, key) not in values
  ]
  if objective not in objectives:
    found.insert(0, f'objective.name={objective!r}')
  return ', '.join(found)


@dataclasses.dataclass(frozen=True)
class Description:
  """What a family reads from a checkpoint's config.json.

  Attributes:
    settings: {'section.key': value} of our config, its differences from
      configs/base.py ('model.num_layers': 12, 'objective.name': 'ar', ...).
    vocab_size: rows of their embedding.
    mask_id: their mask's id; None where they have none: a row is added behind
      the last, a copy of row `start_id`, so that an autoregressive network begins
      a text as theirs does behind its start token.
    separator_id: their id of the token that ends a document.
    start_id: their id of the token that begins one; read without a mask_id.
    max_length: the longest text it was made for, in tokens.
    tokenizer: `tokenizer.name` where the folder holds no tokenizer.json; '': none.
    spare_ids: how many of the network's ids are neither tokens of it nor the mask.
  """

  settings: dict[str, Any]
  vocab_size: int
  mask_id: int | None
  separator_id: int
  start_id: int
  max_length: int
  tokenizer: str = ''
  spare_ids: int = 0


def require(config: dict[str, Any], *keys: str):
  """Raises InputError naming the keys that config.json lacks."""
  missing = [key for key in keys if config.get(key) is None]
  if missing:
    raise InputError(
      f'config.json has no {missing}, or is missing: the tensors do not say it. '
      'Write one beside them, with model_type too'
    )
