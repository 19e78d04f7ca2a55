"""The diffusion transformer that SEDD, MDLM, BD3-LM, Duo and GIDD share.

Source: SEDD's published code, arXiv 2310.16834, after DiT, arXiv 2212.09748:
LayerNorm with a scale that the time shifts and scales further, rotary positions,
GELU (tanh), biases in the MLP and behind the last layer only. What differs is what
the time embedding is given, which is `model.time_form`, and what the outputs mean,
which is the objective.

Every tensor is kept as it is, the conditioning of networks that are always told
time 0 too (time_form 'constant'): fine-tuning goes on with their network, not with
one in which that constant was multiplied out.
"""

from typing import Any, Collection, Mapping

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families.layout import LAYER, Piece, TRANSPOSED
from nanodlm.types import InputError

EMBEDDING = 'vocab_embed.embedding'
# Ids of tokenizers that these projects use: GPT-2's text, and the BERT vocabulary,
# which has a mask of its own.
GPT2_SIZE, GPT2_END = 50_257, 50_256
BERT_SIZE, BERT_MASK, BERT_END = 30_522, 103, 102
# Rotary tables, and scalars that only their samplers read.
IGNORED = (
  r'.*rotary_emb\.(inv_freq|cos_cached|sin_cached)',
  r'sampling_eps_(min|max)',
  r'logit_bias',
  r'noise\..*',
)


def is_like(names: Collection[str]) -> bool:
  """Whether tensors of these names are such a transformer's."""
  prefix = prefix_of(names)
  return {f'{prefix}{EMBEDDING}', f'{prefix}blocks.0.attn_qkv.weight'} <= set(
    names
  )


def prefix_of(names: Collection[str], exported: str = '') -> str:
  """'backbone.', Lightning's and Hugging Face's, or ''; `exported` in an export."""
  for prefix in ('backbone.', ''):
    if f'{prefix}{EMBEDDING}' in names:
      return prefix
  return exported


def describe(
  config: dict[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  *,
  num_heads_key: str,
  length: int,
  has_mask: bool,
  **settings: Any,
) -> layouts.Description:
  """What these families share.

  Args:
    config: theirs.
    shapes: of their tensors, which say the rest.
    num_heads_key: the name in `config` of the number of heads.
    length: the longest text.
    has_mask: whether a mask is among their ids.
    **settings: a family's own, with '__' for the dot.

  Raises:
    InputError: it is no such transformer.
  """
  prefix = prefix_of(shapes)
  layouts.require(config, num_heads_key)
  for name in (
    EMBEDDING,
    'blocks.0.mlp.0.weight',
    'blocks.0.adaLN_modulation.weight',
  ):
    if len(shapes.get(f'{prefix}{name}', ())) != 2:
      raise InputError(
        f'the tensor {prefix}{name} is missing; without it this is '
        'no DiT as SEDD and MDLM have it'
      )
  vocab_size, width = shapes[f'{prefix}{EMBEDDING}']
  blocks = {
    name.removeprefix(f'{prefix}blocks.').split('.')[0]
    for name in shapes
    if name.startswith(f'{prefix}blocks.')
  }
  known = find_vocabulary(config, vocab_size, has_mask)
  return layouts.Description(
    settings={
      'model.num_layers': len(blocks),
      'model.embed_dim': width,
      'model.num_heads': config[num_heads_key],
      'model.mlp_dim': shapes[f'{prefix}blocks.0.mlp.0.weight'][0],
      'model.mlp': 'gelu_tanh',
      'model.mlp_bias': True,
      'model.qk_norm': False,
      'model.norm': 'layer',
      'model.norm_eps': 1e-5,
      'model.tie_embeddings': False,
      'model.output_bias': True,
      'model.time_conditioning': True,
      'model.time_dim': shapes[f'{prefix}blocks.0.adaLN_modulation.weight'][1],
      **{key.replace('__', '.'): value for key, value in settings.items()},
    },
    max_length=length,
    **known,
  )


def find_vocabulary(
  config: dict[str, Any], vocab_size: int, has_mask: bool
) -> dict[str, Any]:
  """The fields of a Description that depend on the vocabulary.

  The projects take the tokenizer's own mask, or add one behind its ids. Their
  config.json does not say it; `mask_token_id` and `eos_token_id` in it do.
  """
  is_bert = vocab_size == BERT_SIZE
  mask_id = config.get('mask_token_id')
  if mask_id is None:
    mask_id = BERT_MASK if is_bert else vocab_size - 1
  separator = config.get('eos_token_id')
  if separator is None:
    separator = BERT_END if is_bert else min(GPT2_END, vocab_size - 2)
  # Ids that are neither GPT-2's nor the mask: a padding token, which no text has.
  spare = vocab_size - GPT2_SIZE - has_mask
  return {
    'vocab_size': vocab_size,
    'mask_id': mask_id if has_mask else None,
    'separator_id': separator,
    'start_id': separator,
    'tokenizer': 'gpt2' if 0 <= spare <= 2 else '',
    'spare_ids': spare if 0 <= spare <= 2 else 0,
  }


def layout(
  network: Any, names: Collection[str], exported: str = ''
) -> layouts.Layout:
  """The mapping; `exported` is the prefix of an export's tensors."""
  prefix, width = prefix_of(names, exported), network.embed_dim
  block = f'{prefix}blocks.{LAYER}.'

  def dense(ours, theirs):
    return {
      f'{ours}/kernel': Piece(f'{theirs}.weight', TRANSPOSED),
      f'{ours}/bias': Piece(f'{theirs}.bias'),
    }

  qkv = {
    f'{name}/kernel': Piece(
      f'{block}attn_qkv.weight', TRANSPOSED, (0, i * width, (i + 1) * width)
    )
    for i, name in enumerate(('query', 'key', 'value'))
  }
  return layouts.Layout(
    {
      'embedding': Piece(f'{prefix}{EMBEDDING}', vocab=True),
      **dense('time_embedding/in', f'{prefix}sigma_map.mlp.0'),
      **dense('time_embedding/out', f'{prefix}sigma_map.mlp.2'),
      'final_norm/scale': Piece(f'{prefix}output_layer.norm_final.weight'),
      **dense('final_modulation', f'{prefix}output_layer.adaLN_modulation'),
      'output': Piece(f'{prefix}output_layer.linear.weight', vocab=True),
      'output_bias': Piece(f'{prefix}output_layer.linear.bias', vocab=True),
    },
    {
      'attention_norm/scale': Piece(f'{block}norm1.weight'),
      **qkv,
      'attention_out/kernel': Piece(f'{block}attn_out.weight', TRANSPOSED),
      'mlp_norm/scale': Piece(f'{block}norm2.weight'),
      **dense('mlp_in', f'{block}mlp.0'),
      **dense('mlp_out', f'{block}mlp.2'),
      **dense('modulation', f'{block}adaLN_modulation'),
    },
    ignored=tuple(f'({prefix})?{pattern}' for pattern in IGNORED),
  )


def misfit(
  network: Any,
  objective: str,
  objectives: tuple[str, ...],
  time_forms: tuple[str, ...],
) -> str:
  """What of our network it is not."""
  return layouts.misfit(
    network,
    objective,
    objectives,
    mlp=('gelu_tanh',),
    mlp_bias=(True,),
    mlp_width=(4 * network.embed_dim,),
    norm=('layer',),
    norm_eps=(1e-5,),
    norm_bias=(False,),
    attention_bias=('none',),
    qk_norm=(False,),
    head_size=(0,),
    kv_heads=(network.num_heads,),
    num_positions=(0,),
    rope_theta=(10_000.0,),
    shift_outputs=(False,),
    tie_embeddings=(False,),
    output_bias=(True,),
    time_conditioning=(True,),
    time_form=time_forms,
  )


def to_config(
  network: Any, export: layouts.Export, model_type: str
) -> dict[str, Any]:
  """The config.json of MDLM, in which its relatives write theirs."""
  return {
    'model_type': model_type,
    'vocab_size': export.vocab_size,
    'model_length': export.length,
    'hidden_dim': network.embed_dim,
    'cond_dim': network.time_width,
    'n_blocks': network.num_layers,
    'n_heads': network.num_heads,
    'dropout': network.dropout,
    'time_conditioning': network.knows_time,
    'mask_token_id': export.mask_id,
    'eos_token_id': export.separator_id,
  }


def is_of(
  config: dict[str, Any], model_type: str, names: Collection[str]
) -> bool:
  """Whether config.json is of a type and the tensors are such a transformer's."""
  return str(config.get('model_type', '')).lower() == model_type and is_like(
    names
  )


def refuse(config: dict[str, Any], allowed: dict[str, tuple[Any, ...]]):
  """Raises InputError where a key of config.json is set to what is not allowed."""
  for key, values in allowed.items():
    if key in config and config[key] not in values:
      raise InputError(
        f'{key}={config[key]!r} in config.json is not one of '
        f'{list(values)}, which are read'
      )
