"""Duo, arXiv 2506.10892, and UDLM, arXiv 2412.10193: uniform noise.

As of MDLM, with model_type 'duo' or 'udlm'; both are always told the time. None of
their ids is a mask: one is added that no text and no noise has. GPT-2's ids with
Duo are one more than its tokens: the padding token, which is noise as any other.
"""

from typing import Any, Collection, Mapping

from nanodlm.interop.families import ddit
from nanodlm.interop.families import layout as layouts

layout = ddit.layout


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  return any(ddit.is_of(config, kind, names) for kind in ('duo', 'udlm'))


def describe(
  config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> layouts.Description:
  ddit.refuse(
    config, {'causal': (False,), 'time_conditioning': (True,), 'cfg': (False,)}
  )
  return ddit.describe(
    config,
    shapes,
    num_heads_key='n_heads',
    has_mask=False,
    length=config.get('model_length', 1024),
    objective__name='uniform',
    model__time_form='sigma',
  )
