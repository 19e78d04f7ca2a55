"""LLaDA: a Llama without a causal mask, trained as a masked diffusion model.

Source: arXiv 2502.09992; names of tensors and settings as in the published
`LLaDAModelLM` (blocks of type 'llama', OLMo's names).
"""

from nanodlm.interop.families.layout import Family, Key, LLAMA_CPP

# The settings that change the network, with the only supported value.
FIXED = {
  'block_type': 'llama',
  'block_group_size': 1,
  'alibi': False,
  'rope': True,
  'attention_layer_norm': False,
  'input_emb_norm': False,
  'scale_logits': False,
  'layer_norm_type': 'rms',
  'layer_norm_with_affine': True,
  'activation_type': 'silu',
}
OFF = ('bias_for_layer_norm', 'multi_query_attention', 'clip_qkv')


class LLaDA(Family):
  """LLaDA, arXiv 2502.09992."""

  model_types = ('llada',)
  architectures = ('LLaDAModelLM',)
  keys = {
    'd_model': Key('embed_dim'),
    'n_layers': Key('num_layers'),
    'n_heads': Key('num_heads'),
    'n_kv_heads': Key('num_kv_heads', 0),
    'mlp_hidden_size': Key('mlp_dim', 0),
    'rms_norm_eps': Key('norm_eps', 1e-5),
    'rope_theta': Key('rope_theta', 10_000.0),
    'weight_tying': Key('tie_embeddings', True),
    'include_bias': Key('mlp_bias', False),
  }
  # What the published code takes for absent keys.
  defaults = {
    'block_type': 'sequential',
    'layer_norm_type': 'default',
    'mask_token_id': 126336,
    'mlp_ratio': 4,
    'rope': False,
  }
  required = ('vocab_size',)
  allowed = {
    **{key: (value,) for key, value in FIXED.items()},
    **{key: (False, None) for key in OFF},
  }
  others = ('embedding_size', 'include_qkv_bias', 'mlp_ratio')
  harmless = """
    alibi_bias_max attention_layer_norm_with_affine embedding_dropout
    flash_attention init_cutoff_factor init_device init_fn init_std precision
    residual_dropout rope_full_precision
  """.split()
  network = {'mlp': 'swiglu'}
  written = {**FIXED, 'bias_for_layer_norm': False}
  loading = LLAMA_CPP
  length = ('max_sequence_length', 1024)
  names = {
    'embedding': '{top}wte.weight',
    'attention_norm': '{top}blocks.{layer}.attn_norm',
    'query': '{top}blocks.{layer}.q_proj',
    'key': '{top}blocks.{layer}.k_proj',
    'value': '{top}blocks.{layer}.v_proj',
    'attention_out': '{top}blocks.{layer}.attn_out',
    'mlp_norm': '{top}blocks.{layer}.ff_norm',
    'mlp_gate': '{top}blocks.{layer}.ff_proj',
    'mlp_in': '{top}blocks.{layer}.up_proj',
    'mlp_out': '{top}blocks.{layer}.ff_out',
    'final_norm': '{top}ln_f',
    'output': '{top}ff_out.weight',
  }
  prefixes = ('model.transformer.',)

  def settings(self, config, shapes):
    width = config.get('mlp_hidden_size')
    bias = 'qkv' if config.get('include_qkv_bias') else 'none'
    return {
      'model.mlp_dim': width or config['mlp_ratio'] * config['d_model'],
      'model.attention_bias': 'all' if config.get('include_bias') else bias,
    }

  def vocabulary(self, config, shapes):
    size = config.get('embedding_size') or config['vocab_size']
    return super().vocabulary({**config, 'vocab_size': size}, shapes)

  def fixed(self, network):
    fixed = super().fixed(network)
    # One key of config.json turns on all biases, another those of 'qkv'.
    fixed['attention_bias'] = network.attention_bias
    return {**fixed, 'mlp_bias': network.attention_bias == 'all'}

  def to_config(self, network, described):
    return {
      **super().to_config(network, described),
      'embedding_size': described.vocab_size,
      # llama.cpp begins a prompt with it.
      'bos_token_id': described.separator_id,
      'include_qkv_bias': network.attention_bias != 'none',
    }
