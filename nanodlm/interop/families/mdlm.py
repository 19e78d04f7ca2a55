"""MDLM, arXiv 2406.07524: Lightning's .ckpt, or Hugging Face's form.

Of a .ckpt, the averaged weights (its 'ema') are taken where it has them. Its
settings lie in it as Python objects, which are not read: config.json beside it must
give model_type 'mdlm' and n_heads, and where they differ model_length (1024) and
time_conditioning (false).
"""

from typing import Any, Collection, Mapping

from nanodlm.interop.families import ddit
from nanodlm.interop.families import layout as layouts


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  return ddit.is_of(config, 'mdlm', names)


def describe(
  config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> layouts.Description:
  # d3pm and sedd are MDLM's other parametrisations of the same network.
  ddit.refuse(config, {'parameterization': ('subs',), 'backbone': ('dit',)})
  is_told = config.get('time_conditioning', False)
  return ddit.describe(
    config,
    shapes,
    num_heads_key='n_heads',
    has_mask=True,
    length=config.get('model_length', 1024),
    objective__name='masked',
    model__time_form='sigma' if is_told else 'constant',
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  return ddit.layout(network, names, exported='backbone.')


def misfit(network: Any, objective: str) -> str:
  return ddit.misfit(network, objective, ('masked',), ('constant', 'sigma'))


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return ddit.to_config(network, export, 'mdlm')
