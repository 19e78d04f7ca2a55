"""Qwen2 and Qwen2.5, whose queries, keys and values have biases; Qwen2ForCausalLM.

Source: arXiv 2407.10671; names as in Hugging Face's `Qwen2ForCausalLM`.
"""

from typing import Any, Collection

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families import llama


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') == 'qwen2'


def describe(
  config: dict[str, Any], names: Collection[str]
) -> layouts.Description:
  del names
  # Its window is off unless this says otherwise.
  config = {'use_sliding_window': False, **config}
  return llama.describe_decoder(config, {'model.attention_bias': 'qkv'})


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  return llama.decoder_layout(network, llama.prefix_of(names))


def misfit(network: Any, objective: str) -> str:
  return llama.misfit_decoder(
    network,
    objective,
    attention_bias=('qkv',),
    mlp_bias=(False,),
    qk_norm=(False,),
  )


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    **llama.decoder_config(network, export),
    'model_type': 'qwen2',
    'architectures': ['Qwen2ForCausalLM'],
    'attention_bias': network.attention_bias != 'none',
    'use_sliding_window': False,
  }
