"""LoRA: low-rank matrices that are trained next to frozen ones.

    y = x W + scale * dropout(x) A B,   A [D, r], B [r, F]

W stays as it was; A is random and B is 0 at first, so that training starts from
the network as it was. Source: arXiv 2106.09685; with scale = alpha / sqrt(r)
rsLoRA, arXiv 2312.03732.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.types import InputError

# The dense layers of a block, which can have adapters.
LAYERS = (
  'query',
  'key',
  'value',
  'attention_out',
  'mlp_gate',
  'mlp_in',
  'mlp_out',
)
A, B = LEAVES = sharding.LORA_A, sharding.LORA_B
# The base is stored in the dtype of matrix products, to which it would be cast
# (the embedding after learned positions are added). Norms and biases are small,
# and stay as they are.
_MATRICES = ('kernel', 'embedding', 'output')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """`config.lora`; configs/base.py explains the keys."""

  rank: int
  alpha: float
  targets: str
  dropout: float
  rslora: bool

  def __post_init__(self):
    for key, rule, is_valid in (
      ('rank', 'must be >= 0 (0: no adapters)', self.rank >= 1),
      ('alpha', 'must be > 0', self.alpha > 0),
      ('dropout', 'must be in [0, 1)', 0 <= self.dropout < 1),
    ):
      if not is_valid:
        raise InputError(f'lora.{key}={getattr(self, key)!r} {rule}')
    try:
      re.compile(self.targets)
    except re.error as error:
      raise InputError(
        f'lora.targets={self.targets!r} is not a regular expression: {error}'
      ) from None

  def check_targets(self, layers: Sequence[str]):
    """Raises InputError if no layer of a network with these has an adapter."""
    if not any(map(self.fits, layers)):
      raise InputError(
        f'lora.targets={self.targets!r} matches none of the dense layers '
        f'{list(layers)}'
      )

  @property
  def scale(self) -> float:
    """The factor of A B."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

  def fits(self, layer: str) -> bool:
    """Returns whether a layer of LAYERS has an adapter."""
    return re.fullmatch(self.targets, layer) is not None


def split(params: Any, dtype: Any) -> tuple[Any, Any]:
  """Splits parameters into those that are trained, and the base in `dtype`."""
  trained, base = {}, {}
  flat: Any = traverse_util.flatten_dict(params)
  for path, leaf in flat.items():
    if path[-1] in LEAVES or path[0] == 'objective':
      trained[path] = leaf
    else:
      base[path] = leaf.astype(dtype) if path[-1] in _MATRICES else leaf
  nest = traverse_util.unflatten_dict
  return nest(trained), nest(base)


def merge(params: Mapping[str, Any], config: LoraConfig) -> Any:
  """Returns float32 parameters of the network without adapters: W + scale A B.

  Matrices may have leading axes of layers.
  """
  flat: Any = traverse_util.flatten_dict(params)
  merged = {}
  for path, leaf in flat.items():
    if path[-1] in LEAVES:
      continue
    leaf = jnp.asarray(leaf, jnp.float32)
    if path[-1] == 'kernel' and (*path[:-1], A) in flat:
      a, b = (flat[*path[:-1], name] for name in LEAVES)
      leaf += config.scale * jnp.matmul(a, b, precision='highest')
    merged[path] = leaf
  return traverse_util.unflatten_dict(merged)
