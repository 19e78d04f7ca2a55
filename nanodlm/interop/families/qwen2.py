"""Qwen2 and Qwen2.5, whose queries, keys and values have biases.

Source: arXiv 2407.10671; names as in Hugging Face's `Qwen2ForCausalLM`.
"""

from nanodlm.interop.families import llama


class Qwen2(llama.Llama):
  """Qwen2 and Qwen2.5."""

  model_types = ('qwen2',)
  architecture = 'Qwen2ForCausalLM'
  keys = llama.KEYS
  # Its window is off unless this key turns it on.
  defaults = {'use_sliding_window': False}
  network = {'attention_bias': 'qkv'}
  written = {
    **llama.FLOAT32,
    'attention_bias': True,
    'use_sliding_window': False,
  }
