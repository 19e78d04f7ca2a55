"""Llama, and Mistral without a sliding window; in transformers, LlamaForCausalLM.

Source: arXiv 2302.13971; names of tensors and settings as in Hugging Face's
`LlamaForCausalLM`, `MistralForCausalLM`.
"""

from typing import Any, Collection

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families.layout import LAYER, Piece, TRANSPOSED
from nanodlm.types import InputError

TYPES = ('llama', 'mistral')
# Their activations, in a gated MLP, and ours.
GATED = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu': 'geglu'}


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') in TYPES


def describe(
  config: dict[str, Any], names: Collection[str]
) -> layouts.Description:
  del names
  return describe_decoder(
    config,
    {
      'model.attention_bias': 'all' if config.get('attention_bias') else 'none',
      'model.mlp_bias': bool(config.get('mlp_bias')),
    },
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  return decoder_layout(network, prefix_of(names))


def misfit(network: Any, objective: str) -> str:
  return misfit_decoder(
    network,
    objective,
    qk_norm=(False,),
    attention_bias=('none', 'all'),
    mlp_bias=(False, True),
  )


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    **decoder_config(network, export),
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': network.attention_bias == 'all',
    'mlp_bias': network.mlp_bias,
  }


def misfit_decoder(
  network: Any, objective: str, **allowed: tuple[Any, ...]
) -> str:
  """`layout.misfit` of the causal families like Llama."""
  return layouts.misfit(
    network,
    objective,
    ('ar',),
    mlp=tuple(GATED.values()),
    num_positions=(0,),
    norm=('rms',),
    time_conditioning=(False,),
    **allowed,
  )


def decoder_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  """The keys that the Llama-like families share; the mask begins a text."""
  return {
    'vocab_size': export.vocab_size,
    'hidden_size': network.embed_dim,
    'num_hidden_layers': network.num_layers,
    'num_attention_heads': network.num_heads,
    'num_key_value_heads': network.kv_heads,
    'head_dim': network.head_dim,
    'intermediate_size': network.mlp_width,
    'hidden_act': {'swiglu': 'silu', 'geglu': 'gelu'}[network.mlp],
    'rms_norm_eps': network.norm_eps,
    'rope_theta': network.rope_theta,
    'max_position_embeddings': export.length,
    'tie_word_embeddings': network.tie_embeddings,
    'bos_token_id': export.mask_id,
    'eos_token_id': export.separator_id,
    'pad_token_id': export.separator_id,
    'dtype': 'float32',
    'torch_dtype': 'float32',
  }


def describe_decoder(
  config: dict[str, Any], settings: dict[str, Any], mask_id: int | None = None
) -> layouts.Description:
  """What the Llama-like families share; `settings` are a family's own."""
  layouts.require(
    config,
    'vocab_size',
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'intermediate_size',
  )
  activation = config.get('hidden_act', 'silu')
  if activation not in GATED:
    raise InputError(f'hidden_act={activation!r} is not one of {sorted(GATED)}')
  has_window = (
    config.get('sliding_window')
    and config.get('use_sliding_window', True)
    or 'sliding_attention' in (config.get('layer_types') or ())
  )
  if has_window:
    raise InputError(
      f'sliding_window={config.get("sliding_window")!r}: attention '
      'here has no window; only null is read'
    )
  separator = token_id(config, 'eos_token_id', 'bos_token_id')
  start = token_id(config, 'bos_token_id', 'eos_token_id')
  return layouts.Description(
    settings={
      'objective.name': 'ar',
      'model.num_layers': config['num_hidden_layers'],
      'model.embed_dim': config['hidden_size'],
      'model.num_heads': config['num_attention_heads'],
      'model.num_kv_heads': shared_heads(config),
      'model.head_size': config.get('head_dim') or 0,
      'model.mlp_dim': config['intermediate_size'],
      'model.mlp': GATED[activation],
      'model.qk_norm': False,
      'model.tie_embeddings': bool(config.get('tie_word_embeddings', False)),
      'model.rope_theta': rope_theta(config),
      'model.norm_eps': float(config.get('rms_norm_eps', 1e-6)),
      **settings,
    },
    vocab_size=config['vocab_size'],
    mask_id=mask_id,
    separator_id=separator,
    start_id=start,
    max_length=config.get('max_position_embeddings', 2048),
  )


def decoder_layout(network: Any, prefix: str) -> layouts.Layout:
  """Tensors of a Llama-like network under `prefix` ('model.')."""
  block = f'{prefix}layers.{LAYER}.'
  ends = {
    'embedding': Piece(f'{prefix}embed_tokens.weight', vocab=True),
    'final_norm/scale': Piece(f'{prefix}norm.weight'),
  }
  same = {}
  if network.tie_embeddings:
    same['lm_head.weight'] = f'{prefix}embed_tokens.weight'
  else:
    ends['output'] = Piece('lm_head.weight', vocab=True)
  pieces = {
    'attention_norm/scale': Piece(f'{block}input_layernorm.weight'),
    'mlp_norm/scale': Piece(f'{block}post_attention_layernorm.weight'),
    **projections(
      network,
      {
        'query': f'{block}self_attn.q_proj',
        'key': f'{block}self_attn.k_proj',
        'value': f'{block}self_attn.v_proj',
        'attention_out': f'{block}self_attn.o_proj',
        'mlp_gate': f'{block}mlp.gate_proj',
        'mlp_in': f'{block}mlp.up_proj',
        'mlp_out': f'{block}mlp.down_proj',
      },
    ),
  }
  if network.qk_norm:
    pieces['q_norm/scale'] = Piece(f'{block}self_attn.q_norm.weight')
    pieces['k_norm/scale'] = Piece(f'{block}self_attn.k_norm.weight')
  return layouts.Layout(
    ends, pieces, ignored=(r'.*rotary_emb\.inv_freq',), same=same
  )


def projections(network: Any, names: dict[str, str]) -> dict[str, Piece]:
  """Kernels and the biases that the network has; names are of PyTorch's Linear."""
  has_bias = {
    'query': network.attention_bias != 'none',
    'attention_out': network.attention_bias == 'all',
    'mlp_in': network.mlp_bias,
  }
  has_bias |= {
    'key': has_bias['query'],
    'value': has_bias['query'],
    'mlp_gate': network.mlp_bias,
    'mlp_out': network.mlp_bias,
  }
  pieces = {}
  for ours, theirs in names.items():
    pieces[f'{ours}/kernel'] = Piece(f'{theirs}.weight', TRANSPOSED)
    if has_bias[ours]:
      pieces[f'{ours}/bias'] = Piece(f'{theirs}.bias')
  return pieces


def shared_heads(config: dict[str, Any]) -> int:
  """`model.num_kv_heads`."""
  heads = config.get('num_key_value_heads') or 0
  return 0 if heads == config['num_attention_heads'] else heads


def prefix_of(names: Collection[str]) -> str:
  """'model.', or '' where the file holds the decoder alone."""
  return '' if 'embed_tokens.weight' in names else 'model.'


def token_id(config: dict[str, Any], *keys: str) -> int:
  """The first of these ids that is set; of a list its first."""
  for key in keys:
    value = config.get(key)
    if isinstance(value, list) and value:
      value = value[0]
    if isinstance(value, int):
      return value
  raise InputError(f'config.json has none of {list(keys)}')


def rope_theta(config: dict[str, Any]) -> float:
  """The rotary base; InputError where positions are scaled."""
  # Newer files keep both in 'rope_parameters'.
  rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind != 'default':
    raise InputError(
      f'rope_scaling of type {kind!r} is not known here; only '
      "'default' (none) is"
    )
  return float(rope.get('rope_theta') or config.get('rope_theta') or 10_000.0)
