"""Llama, Mistral, Qwen2, Qwen2.5 and Qwen3.

Source: arXiv 2302.13971, 2310.06825, 2407.10671, 2505.09388; names of tensors
and settings as in Hugging Face's `LlamaForCausalLM` and so on. Sliding windows
are read if they change nothing: if no text is longer.
"""

import math

from nanodlm.data.tokenizers import chat
from nanodlm.interop import tokenizer_json
from nanodlm.interop.families.layout import Family, Key, refuse, require
from nanodlm.types import InputError

# {activation of a gated MLP: config.model.mlp}.
GATED = {
  'silu': 'swiglu',
  'swish': 'swiglu',
  'gelu': 'geglu',
  'gelu_pytorch_tanh': 'geglu_tanh',
  'gelu_new': 'geglu_tanh',
}
# {whether the projections have biases: config.model.attention_bias}.
BIASES = {False: 'none', True: 'all'}
# The keys that the families after Llama share.
KEYS = {
  'hidden_size': Key('embed_dim'),
  'num_hidden_layers': Key('num_layers'),
  'num_attention_heads': Key('num_heads'),
  'num_key_value_heads': Key('num_kv_heads', 0),
  'head_dim': Key('head_size', 0),
  'intermediate_size': Key('mlp_dim'),
  'hidden_act': Key('mlp', 'silu', GATED),
  'rms_norm_eps': Key('norm_eps', 1e-6),
  'rope_theta': Key('rope_theta', 10_000.0),
  'tie_word_embeddings': Key('tie_embeddings', False),
}
# The values that leave the rotary positions as they are.
ROPE = {
  'rope_type': ('default', None),
  'type': ('default', None),
  'partial_rotary_factor': (1.0, None),
}
# What their scalings have besides the factor and the length, with the supported
# values, of which an export writes the first.
SCALINGS = {
  'llama3': {'low_freq_factor': (1.0,), 'high_freq_factor': (4.0,)},
  'yarn': {
    'attention_factor': (1.0,),
    'beta_fast': (32.0, None),
    'beta_slow': (1.0, None),
    'truncate': (True, None),
  },
}
LENGTH = 'original_max_position_embeddings'
FLOAT32 = {'dtype': 'float32', 'torch_dtype': 'float32'}


# Qwen2's merges do not cross the pieces that this cuts a text into.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


class Llama(Family):
  """Llama, arXiv 2302.13971, in Hugging Face's form."""

  model_types = ('llama',)
  architectures = ('LlamaForCausalLM', 'LlamaModel', 'LLaMAForCausalLM')
  is_stock = True
  objective = 'ar'
  has_mask = False
  keys = {
    **KEYS,
    'attention_bias': Key('attention_bias', False, BIASES),
    'mlp_bias': Key('mlp_bias', False),
  }
  allowed = {
    # Qwen2.5 has it.
    'use_mrope': (False,),
    # SmolLM2 has it.
    'rope_interleaved': (False,),
    'partial_rotary_factor': (1.0, None),
  }
  others = (
    'layer_types rope_parameters rope_scaling sliding_window use_sliding_window'
  ).split()
  # The second says which layers have a window, if there is one.
  harmless = ('max_sequence_length', 'max_window_layers')
  written = FLOAT32
  names = {
    'embedding': '{top}embed_tokens.weight',
    'attention_norm': '{top}layers.{layer}.input_layernorm',
    'query': '{top}layers.{layer}.self_attn.q_proj',
    'key': '{top}layers.{layer}.self_attn.k_proj',
    'value': '{top}layers.{layer}.self_attn.v_proj',
    'q_norm': '{top}layers.{layer}.self_attn.q_norm',
    'k_norm': '{top}layers.{layer}.self_attn.k_norm',
    'attention_out': '{top}layers.{layer}.self_attn.o_proj',
    'mlp_norm': '{top}layers.{layer}.post_attention_layernorm',
    'mlp_gate': '{top}layers.{layer}.mlp.gate_proj',
    'mlp_in': '{top}layers.{layer}.mlp.up_proj',
    'mlp_out': '{top}layers.{layer}.mlp.down_proj',
    'final_norm': '{top}norm',
    'output': 'lm_head.weight',
  }
  # The decoder may also be published without the output projection.
  prefixes = ('model.', '')
  ignored = (r'.*rotary_emb\.inv_freq',)

  def settings(self, config, shapes):
    # Newer files keep the base of the rotary frequencies in rope_parameters.
    name = 'rope_scaling' if config.get('rope_scaling') else 'rope_parameters'
    rope = dict(config.get(name) or {})
    theta, allowed, settings = rope.pop('rope_theta', None), ROPE, {}
    if theta:
      settings['model.rope_theta'] = float(theta)
    for kind in set(SCALINGS) & {rope.get('rope_type'), rope.get('type')}:
      allowed = {**ROPE, **SCALINGS[kind]}
      allowed |= dict.fromkeys(('rope_type', 'type'), (kind, None))
      factor, length = rope.pop('factor', None), rope.pop(LENGTH, None)
      if factor is None or length is None:
        raise InputError(
          f'config.json: {name}={rope!r} lacks factor or {LENGTH}'
        )
      if kind == 'yarn' and rope.get('attention_factor') is None:
        rope['attention_factor'] = temperature(
          factor, rope.pop('mscale', 0), rope.pop('mscale_all_dim', 0)
        )
      if factor != 1:
        settings |= {
          'model.rope_factor': float(factor),
          'model.rope_scaling': kind,
          'model.rope_length': length,
        }
    for key, value in {**dict.fromkeys(allowed), **rope}.items():
      if value not in allowed.get(key, (None,)):
        raise InputError(
          f'config.json: {name}={rope!r} is not supported: {key} must be one '
          f'of {allowed.get(key, (None,))}'
        )
    return settings

  def vocabulary(self, config, shapes):
    found = super().vocabulary(config, shapes)
    window, kinds = config.get('sliding_window'), config.get('layer_types')
    for kind in kinds or ():
      allowed = ('full_attention', 'sliding_attention')
      refuse({'layer_types': kind}, {'layer_types': allowed})
    slides = 'sliding_attention' in (kinds or ())
    if slides:
      require(config, 'sliding_window')
    if window and (slides or config.get('use_sliding_window') is not False):
      found |= {
        'window': window,
        'max_length': min(window, found['max_length']),
      }
    return found

  def fixed(self, network):
    free = ('rope_factor', 'rope_scaling', 'rope_length')
    return {
      **super().fixed(network),
      **{key: getattr(network, key) for key in free},
    }

  def fields(self, network):
    fields = super().fields(network)
    if network.rope_factor != 1:
      kind = network.rope_scaling
      fields['rope_scaling'] = {
        'rope_type': kind,
        'factor': network.rope_factor,
        LENGTH: network.rope_length,
        **{key: values[0] for key, values in SCALINGS[kind].items()},
      }
    return fields


def temperature(factor: float, mscale: float, mscale_all_dim: float) -> float:
  """Returns the factor of queries and keys in YaRN, arXiv 2309.00071."""
  scale = lambda m: 1 + 0.1 * m * math.log(max(factor, 1))
  both = mscale and mscale_all_dim
  return scale(mscale) / scale(mscale_all_dim) if both else scale(1)


class Mistral(Llama):
  """Mistral, with texts no longer than its sliding window."""

  model_types = ('mistral',)
  architectures = ('MistralForCausalLM', 'MistralModel')
  is_exportable = False
  # What transformers takes for absent keys.
  defaults = {'sliding_window': 4096, 'num_key_value_heads': 8}


class Qwen2(Llama):
  """Qwen2 and Qwen2.5, whose queries, keys and values have biases.

  Their tokenizer may be published as a vocabulary and merges.
  """

  model_types = ('qwen2',)
  architectures = ('Qwen2ForCausalLM', 'Qwen2Model')
  keys = KEYS
  # Its window is off unless this key turns it on.
  defaults = {'use_sliding_window': False, 'num_key_value_heads': 32}
  network = {'attention_bias': 'qkv'}
  written = {**FLOAT32, 'attention_bias': True, 'use_sliding_window': False}

  def tokenizer_json(self, folder):
    described = chat.read_described(folder)
    if not described:
      return None
    added = described.get('added_tokens_decoder', {})
    content = tokenizer_json.from_merges(folder, _SPLIT, added)
    return content and content | {'normalizer': {'type': 'NFC'}}


class Qwen3(Llama):
  """Qwen3, with RMSNorm on the queries and keys of each head."""

  model_types = ('qwen3',)
  architectures = ('Qwen3ForCausalLM', 'Qwen3Model')
  keys = {
    **KEYS,
    'head_dim': Key('head_size', 128),
    'attention_bias': Key('attention_bias', False, BIASES),
  }
  defaults = Qwen2.defaults
  network = {'qk_norm': True}
  written = {**FLOAT32, 'use_sliding_window': False}
