"""LLaDA: a Llama without a causal mask, trained as a masked diffusion model.

Source: arXiv 2502.09992; names of tensors and settings as in the published
`LLaDAModelLM` (blocks of type 'llama', OLMo's names).
"""

from typing import Any, Collection

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families import llama
from nanodlm.interop.families.layout import LAYER, Piece
from nanodlm.types import InputError

MASK_ID = 126336
# Settings of theirs that change the network, and the only value that is read; also
# what is meant where config.json leaves one out.
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
FALSY = ('bias_for_layer_norm', 'multi_query_attention', 'clip_qkv')
DEFAULTS = {
  'rms_norm_eps': 1e-5,
  'rope_theta': 10_000.0,
  'include_bias': False,
  'include_qkv_bias': False,
  'weight_tying': True,
  'mlp_ratio': 4,
  'max_sequence_length': 1024,
  'mask_token_id': MASK_ID,
  **FIXED,
}


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') == 'llada'


def describe(
  config: dict[str, Any], names: Collection[str]
) -> layouts.Description:
  del names
  layouts.require(config, 'vocab_size', 'd_model', 'n_layers', 'n_heads')
  config = {**DEFAULTS, **config}
  for key, value in (*FIXED.items(), *((key, None) for key in FALSY)):
    if config.get(key) != value and not (value is None and not config.get(key)):
      raise InputError(
        f'{key}={config[key]!r} is not known here, only {value!r}'
      )
  shared = config.get('n_kv_heads') or 0
  bias = (
    'all'
    if config['include_bias']
    else ('qkv' if config['include_qkv_bias'] else 'none')
  )
  return layouts.Description(
    settings={
      'objective.name': 'masked',
      'model.num_layers': config['n_layers'],
      'model.embed_dim': config['d_model'],
      'model.num_heads': config['n_heads'],
      'model.num_kv_heads': 0 if shared == config['n_heads'] else shared,
      'model.mlp_dim': (
        config.get('mlp_hidden_size') or config['mlp_ratio'] * config['d_model']
      ),
      'model.mlp': 'swiglu',
      'model.qk_norm': False,
      'model.tie_embeddings': bool(config['weight_tying']),
      'model.rope_theta': float(config['rope_theta']),
      'model.norm_eps': float(config['rms_norm_eps']),
      'model.attention_bias': bias,
      'model.mlp_bias': bool(config['include_bias']),
    },
    vocab_size=config.get('embedding_size') or config['vocab_size'],
    mask_id=llama.token_id(config, 'mask_token_id'),
    separator_id=llama.token_id(config, 'eos_token_id'),
    start_id=llama.token_id(config, 'eos_token_id'),
    max_length=config['max_sequence_length'],
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  del names
  top, block = 'model.transformer.', f'model.transformer.blocks.{LAYER}.'
  ends = {
    'embedding': Piece(f'{top}wte.weight', vocab=True),
    'final_norm/scale': Piece(f'{top}ln_f.weight'),
  }
  if not network.tie_embeddings:
    ends['output'] = Piece(f'{top}ff_out.weight', vocab=True)
  return layouts.Layout(
    ends,
    {
      'attention_norm/scale': Piece(f'{block}attn_norm.weight'),
      'mlp_norm/scale': Piece(f'{block}ff_norm.weight'),
      **llama.projections(
        network,
        {
          'query': f'{block}q_proj',
          'key': f'{block}k_proj',
          'value': f'{block}v_proj',
          'attention_out': f'{block}attn_out',
          'mlp_gate': f'{block}ff_proj',
          'mlp_in': f'{block}up_proj',
          'mlp_out': f'{block}ff_out',
        },
      ),
    },
  )


def misfit(network: Any, objective: str) -> str:
  bias = {'mlp_bias': (network.attention_bias == 'all',)}
  return layouts.misfit(
    network,
    objective,
    ('masked',),
    **bias,
    head_size=(0,),
    mlp=('swiglu',),
    num_positions=(0,),
    norm=('rms',),
    qk_norm=(False,),
    shift_outputs=(False,),
    time_conditioning=(False,),
  )


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    'model_type': 'llada',
    'architectures': ['LLaDAModelLM'],
    **FIXED,
    'd_model': network.embed_dim,
    'n_layers': network.num_layers,
    'n_heads': network.num_heads,
    'n_kv_heads': network.kv_heads,
    'mlp_hidden_size': network.mlp_width,
    'rms_norm_eps': network.norm_eps,
    'rope_theta': network.rope_theta,
    'bias_for_layer_norm': False,
    'include_bias': network.mlp_bias,
    'include_qkv_bias': network.attention_bias != 'none',
    'weight_tying': network.tie_embeddings,
    'vocab_size': export.vocab_size,
    'embedding_size': export.vocab_size,
    'mask_token_id': export.mask_id,
    'eos_token_id': export.separator_id,
    'pad_token_id': export.separator_id,
    'max_sequence_length': export.length,
  }
