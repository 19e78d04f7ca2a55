"""SEDD, arXiv 2310.16834, with absorbing (masked) noise.

The hub's form has a config.json of the project's own settings, with the sections
'model', 'graph' and 'noise'. A checkpoint.pth of its trainer holds both 'model' and
'ema'; the averaged weights are taken, and its .hydra/config.yaml must lie beside it,
as config.json.

The outputs are taken raw, before -log expm1(sigma) - log N, which objective 'sedd'
adds itself. Uniform noise and unscaled outputs are refused: that objective is of
masked noise, and scales.
"""

from typing import Any, Collection, Mapping

from nanodlm.interop.families import ddit
from nanodlm.interop.families import layout as layouts
from nanodlm.types import InputError

layout = ddit.layout


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  return 'graph' in config and 'tokens' in config and ddit.is_like(names)


def describe(
  config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> layouts.Description:
  layouts.require(config, 'model', 'graph', 'noise')
  model = config['model']
  for name, section, allowed in (
    ('graph', config['graph'], {'type': ('absorb',)}),
    # Another schedule is told other times at the ends than 'sigma' knows.
    ('noise', config['noise'], {'type': ('loglinear',)}),
    ('model', model, {'scale_by_sigma': (True,)}),
  ):
    if not isinstance(section, dict):
      raise InputError(f'{name}={section!r} in config.json is not a section')
    ddit.refuse(section, allowed)
  layouts.require(model, 'n_heads')
  return ddit.describe(
    model,
    shapes,
    num_heads_key='n_heads',
    has_mask=True,
    length=model.get('length', 1024),
    objective__name='sedd',
    model__time_form='sigma',
  )


def misfit(network: Any, objective: str) -> str:
  return ddit.misfit(network, objective, ('sedd',), ('sigma',))


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    'model': {
      'name': 'nanodlm',
      'type': 'ddit',
      'hidden_size': network.embed_dim,
      'cond_dim': network.time_width,
      'length': export.length,
      'n_blocks': network.num_layers,
      'n_heads': network.num_heads,
      'scale_by_sigma': True,
      'dropout': network.dropout,
      'mask_token_id': export.mask_id,
      'eos_token_id': export.separator_id,
    },
    'graph': {'type': 'absorb'},
    'noise': {'type': 'loglinear'},
    'tokens': export.vocab_size - 1,
  }
