"""BD3-LM, arXiv 2503.09573: Lightning's .ckpt, or Hugging Face's form.

As of MDLM; config.json must give block_size as well.
"""

from typing import Any, Collection, Mapping

from nanodlm.interop.families import ddit
from nanodlm.interop.families import layout as layouts


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  return ddit.is_of(config, 'bd3lm', names)


def describe(
  config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> layouts.Description:
  layouts.require(config, 'block_size')
  ddit.refuse(
    config,
    {
      'cross_attn': (True,),
      'causal': (False,),
      'adaln': (True,),
      # Blocks have times of their own, and they give the network their mean.
      'time_conditioning': (False,),
      'parameterization': ('subs',),
    },
  )
  return ddit.describe(
    config,
    shapes,
    num_heads_key='n_heads',
    has_mask=True,
    length=config.get('model_length', 1024),
    objective__name='block',
    objective__block_size=config['block_size'],
    model__time_form='constant',
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  return ddit.layout(network, names, exported='backbone.')


def misfit(network: Any, objective: str) -> str:
  return ddit.misfit(network, objective, ('block',), ('constant',))


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    **ddit.to_config(network, export, 'bd3lm'),
    'block_size': network.block_size,
    'cross_attn': True,
    'adaln': True,
    'causal': False,
    'attn_backend': 'sdpa',
    'var_min': False,
  }
