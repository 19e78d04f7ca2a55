"""GPT-2: LayerNorm, learned positions, biases everywhere; GPT2LMHeadModel.

Source: Radford et al., 2019; names and settings as in Hugging Face's
`GPT2LMHeadModel`, whose projections keep [in, out].
"""

from typing import Any, Collection

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families import llama
from nanodlm.interop.families.layout import LAYER, Piece
from nanodlm.types import InputError

MLPS = {
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu': 'gelu',
}
# Settings of theirs that change the network, and the only value that is read.
FIXED = {
  'scale_attn_weights': True,
  'scale_attn_by_inverse_layer_idx': False,
  'add_cross_attention': False,
}
# transformers' defaults: the published file leaves some of them out.
DEFAULTS = {
  'n_inner': None,
  'activation_function': 'gelu_new',
  'layer_norm_epsilon': 1e-5,
  'tie_word_embeddings': True,
  'bos_token_id': 50256,
  'eos_token_id': 50256,
  **FIXED,
}


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') == 'gpt2'


def describe(
  config: dict[str, Any], names: Collection[str]
) -> layouts.Description:
  del names
  layouts.require(
    config, 'vocab_size', 'n_positions', 'n_embd', 'n_layer', 'n_head'
  )
  config = {**DEFAULTS, **config}
  for key, value in FIXED.items():
    if config[key] != value:
      raise InputError(
        f'{key}={config[key]!r} is not known here, only {value!r}'
      )
  activation = config['activation_function']
  if activation not in MLPS:
    raise InputError(
      f'activation_function={activation!r} is not one of {sorted(MLPS)}'
    )
  return layouts.Description(
    settings={
      'objective.name': 'ar',
      'model.num_layers': config['n_layer'],
      'model.embed_dim': config['n_embd'],
      'model.num_heads': config['n_head'],
      'model.mlp_dim': config['n_inner'] or 4 * config['n_embd'],
      'model.mlp': MLPS[activation],
      'model.qk_norm': False,
      'model.tie_embeddings': bool(config['tie_word_embeddings']),
      'model.num_positions': config['n_positions'],
      'model.norm': 'layer',
      'model.norm_bias': True,
      'model.norm_eps': float(config['layer_norm_epsilon']),
      'model.attention_bias': 'all',
      'model.mlp_bias': True,
    },
    vocab_size=config['vocab_size'],
    mask_id=None,
    separator_id=llama.token_id(config, 'eos_token_id'),
    start_id=llama.token_id(config, 'bos_token_id', 'eos_token_id'),
    max_length=config['n_positions'],
    tokenizer='gpt2',
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  # The published file holds the network without its output projection.
  prefix = '' if 'wte.weight' in names else 'transformer.'
  block, width = f'{prefix}h.{LAYER}.', network.embed_dim
  ends = {
    'embedding': Piece(f'{prefix}wte.weight', vocab=True),
    'position_embedding': Piece(f'{prefix}wpe.weight'),
    'final_norm/scale': Piece(f'{prefix}ln_f.weight'),
    'final_norm/bias': Piece(f'{prefix}ln_f.bias'),
  }
  same = {}
  if network.tie_embeddings:
    same['lm_head.weight'] = f'{prefix}wte.weight'
  else:
    ends['output'] = Piece('lm_head.weight', vocab=True)
  pieces = {}
  for ours, theirs in (('attention_norm', 'ln_1'), ('mlp_norm', 'ln_2')):
    pieces[f'{ours}/scale'] = Piece(f'{block}{theirs}.weight')
    pieces[f'{ours}/bias'] = Piece(f'{block}{theirs}.bias')
  for i, ours in enumerate(('query', 'key', 'value')):
    part = (i * width, (i + 1) * width)
    pieces[f'{ours}/kernel'] = Piece(
      f'{block}attn.c_attn.weight', cut=(1, *part)
    )
    pieces[f'{ours}/bias'] = Piece(f'{block}attn.c_attn.bias', cut=(0, *part))
  for ours, theirs in (
    ('attention_out', 'attn.c_proj'),
    ('mlp_in', 'mlp.c_fc'),
    ('mlp_out', 'mlp.c_proj'),
  ):
    pieces[f'{ours}/kernel'] = Piece(f'{block}{theirs}.weight')
    pieces[f'{ours}/bias'] = Piece(f'{block}{theirs}.bias')
  # Buffers: causal masks.
  return layouts.Layout(ends, pieces, (r'.*\.attn\.(masked_)?bias',), same)


def misfit(network: Any, objective: str) -> str:
  return layouts.misfit(
    network,
    objective,
    ('ar',),
    mlp=tuple(MLPS.values()),
    num_positions=(network.num_positions or None,),
    norm=('layer',),
    norm_bias=(True,),
    attention_bias=('all',),
    mlp_bias=(True,),
    qk_norm=(False,),
    head_size=(0,),
    kv_heads=(network.num_heads,),
    time_conditioning=(False,),
  )


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'vocab_size': export.vocab_size,
    'n_positions': network.num_positions,
    'n_embd': network.embed_dim,
    'n_layer': network.num_layers,
    'n_head': network.num_heads,
    'n_inner': network.mlp_width,
    'activation_function': {'gelu_tanh': 'gelu_new', 'gelu': 'gelu'}[
      network.mlp
    ],
    'layer_norm_epsilon': network.norm_eps,
    'tie_word_embeddings': network.tie_embeddings,
    'bos_token_id': export.mask_id,
    'eos_token_id': export.separator_id,
    'pad_token_id': export.separator_id,
    'dtype': 'float32',
    'torch_dtype': 'float32',
  }
