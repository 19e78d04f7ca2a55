"""Qwen3, with RMSNorm on the queries and keys of each head; Qwen3ForCausalLM.

Source: arXiv 2505.09388; names as in Hugging Face's `Qwen3ForCausalLM`.
"""

from typing import Any, Collection

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families import llama


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') == 'qwen3'


def describe(
  config: dict[str, Any], names: Collection[str]
) -> layouts.Description:
  del names
  config = {'use_sliding_window': False, 'head_dim': 128, **config}
  return llama.describe_decoder(
    config,
    {
      'model.qk_norm': True,
      'model.attention_bias': 'all' if config.get('attention_bias') else 'none',
    },
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  return llama.decoder_layout(network, llama.prefix_of(names))


def misfit(network: Any, objective: str) -> str:
  return llama.misfit_decoder(
    network,
    objective,
    attention_bias=('none', 'all'),
    mlp_bias=(False,),
    qk_norm=(True,),
  )


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    **llama.decoder_config(network, export),
    'model_type': 'qwen3',
    'architectures': ['Qwen3ForCausalLM'],
    'attention_bias': network.attention_bias != 'none',
    'use_sliding_window': False,
  }
