"""Dream: Qwen2 without a causal mask, whose outputs stay shifted by one.

Source: arXiv 2508.15487; names as in the published `DreamModel`. Its forward pass
returns the logits unshifted, and its sampler shifts them.
"""

from typing import Any, Collection

from nanodlm.families import layout as layouts
from nanodlm.families import llama

MASK_ID = 151666


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') == 'Dream'


def describe(config: dict[str, Any], names: Collection[str]
             ) -> layouts.Description:
  del names
  config = {'use_sliding_window': False, 'mask_token_id': MASK_ID, **config}
  return llama.describe_decoder(
      config, {'objective.name': 'masked', 'model.attention_bias': 'qkv',
               'model.shift_outputs': True},
      mask_id=llama.token_id(config, 'mask_token_id'))


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  return llama.decoder_layout(network, llama.prefix_of(names))


def misfit(network: Any, objective: str) -> str:
  return layouts.misfit(network, objective, ('masked',), head_size=(0,),
                        mlp=tuple(llama.GATED.values()), num_positions=(0,),
                        norm=('rms',), qk_norm=(False,), shift_outputs=(True,),
                        attention_bias=('qkv',), mlp_bias=(False,),
                        time_conditioning=(False,))


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {**llama.decoder_config(network, export), 'model_type': 'Dream',
          'architectures': ['DreamModel'], 'mask_token_id': export.mask_id,
          'bos_token_id': export.separator_id,
          'pad_token_id': export.separator_id, 'use_sliding_window': False}
