"""Our own form, for every run that fits no other: a tensor for each parameter.

A block's tensors are 'layers.3.query.kernel', kernels are [in, out]. It is read
back with the folder `nanodlm` that an export holds, by nothing else.
"""

from typing import Any, Collection

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families.layout import LAYER, Piece
from nanodlm.types import InputError

TYPE = 'nanodlm'


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') == TYPE


def describe(
  config: dict[str, Any], names: Collection[str]
) -> layouts.Description:
  del config, names
  raise InputError(
    "a checkpoint of model_type='nanodlm' is read with the folder "
    "'nanodlm' of its export, which is missing"
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  del network
  ends, block = {}, {}
  for name in names:
    first, _, rest = name.partition('.')
    layer, _, inside = rest.partition('.')
    if first == 'layers' and layer.isdigit():
      block[inside.replace('.', '/')] = Piece(f'layers.{LAYER}.{inside}')
    else:
      ends[name.replace('.', '/')] = Piece(name)
  return layouts.Layout(ends, block)


def misfit(network: Any, objective: str) -> str:
  del network, objective
  return ''


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  del network
  return {
    'model_type': TYPE,
    'vocab_size': export.vocab_size,
    'mask_token_id': export.mask_id,
    'eos_token_id': export.separator_id,
  }
