"""Qwen3, with RMSNorm on the queries and keys of each head.

Source: arXiv 2505.09388; names as in Hugging Face's `Qwen3ForCausalLM`.
"""

from nanodlm.interop.families import llama
from nanodlm.interop.families.layout import Key


class Qwen3(llama.Llama):
  """Qwen3."""

  model_types = ('qwen3',)
  architecture = 'Qwen3ForCausalLM'
  keys = {
    **llama.KEYS,
    'head_dim': Key('head_size', 128),
    'attention_bias': Key('attention_bias', False, llama.BIASES),
  }
  defaults = {'use_sliding_window': False}
  network = {'qk_norm': True}
  written = {**llama.FLOAT32, 'use_sliding_window': False}
