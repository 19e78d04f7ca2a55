"""GIDD, arXiv 2503.04482, in Hugging Face's form (model_type 'dit').

Its share of uniform tokens is config.json's p_uniform. The mask is its last id, as
its code adds it to GPT-2's tokenizer; a checkpoint of its trainer, whose vocabulary
is padded, must be converted by its own convert_checkpoint.py first.
"""

from typing import Any, Collection, Mapping

from nanodlm.interop.families import ddit
from nanodlm.interop.families import layout as layouts

layout = ddit.layout


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  return 'p_uniform' in config and ddit.is_of(config, 'dit', names)


def describe(
  config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> layouts.Description:
  layouts.require(config, 'p_uniform')
  return ddit.describe(
    config,
    shapes,
    num_heads_key='num_attention_heads',
    has_mask=True,
    length=config.get('max_seq_len', 512),
    objective__name='hybrid',
    objective__p_uniform=float(config['p_uniform']),
    objective__gamma=1.0,
    model__time_form='unit',
  )
