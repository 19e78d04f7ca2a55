"""MD4, arXiv 2406.04329: its trainer's Orbax checkpoints of text.

The folder is its workdir (or one of its checkpoints); its settings must lie in it
as config.json, which MD4 itself does not write: json.dump(config.to_dict(), file).
The averaged weights (ema_params) are taken where there are any.

The mask has a row in the embedding and none in the output: one of zeros is added,
which no objective reads. Its sinusoids stand as (sin, cos), ours as (cos, sin).
"""

from typing import Any, Collection, Mapping

import numpy as np

from nanodlm.interop.families import ddit
from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families.layout import LAYER, Piece
from nanodlm.types import InputError

_NET = 'classifier/Transformer_0/'
_BLOCK = f'{_NET}TransformerBlock_{LAYER}/'
# Flax's gelu is the tanh approximation.
_MLPS = {'glu': 'glu', 'swiglu': 'swiglu', 'geglu': 'geglu_tanh'}
_SCHEDULES = {'linear': 'linear', 'cosine': 'md4_cosine'}
# [D, V] without the mask -> [V + 1, D], and back.
_OUTPUT = layouts.How(
  lambda x: np.pad(x.T, ((0, 1), (0, 0))), lambda x: x[:-1].T
)


def _swap_halves(x):
  half = len(x) // 2
  return np.concatenate([x[half:], x[:half]])


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del config
  return f'{_NET}TransformerBlock_0/attention/wq/kernel' in names


def describe(
  config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> layouts.Description:
  layouts.require(
    config,
    'model_type',
    'vocab_size',
    'data_shape',
    'noise_schedule',
    'outside_embed',
    'time_features',
    'n_layers',
    'feature_dim',
    'num_heads',
    'mlp_type',
  )
  ddit.refuse(
    config,
    {
      'model_type': ('md4',),
      'task_type': ('text',),
      'mlp_type': tuple(_MLPS),
      'time_features': ('t', 'none'),
      'model_sharding': (False, None),
    },
  )
  if config.get('classes', -1) > 0:
    raise InputError(
      f'classes={config["classes"]!r} in config.json: networks told a '
      'class are not read'
    )
  schedule = config['noise_schedule']
  objective = {'objective.schedule': _SCHEDULES.get(schedule, 'polynomial')}
  if schedule not in _SCHEDULES:
    try:
      objective['objective.power'] = float(schedule.removeprefix('poly'))
    except ValueError as error:
      raise InputError(
        f'noise_schedule={schedule!r} in config.json is not one of '
        f'{[*_SCHEDULES, "polyK"]}'
      ) from error
  is_told = config['time_features'] == 't'
  vocab_size = config['vocab_size'] + 1
  ffn = shapes.get(f'{_NET}TransformerBlock_0/feed_forward/w1/kernel', (0, 0))
  separator = min(ddit.GPT2_END, vocab_size - 2)
  return layouts.Description(
    settings={
      'objective.name': 'masked',
      **objective,
      'model.num_layers': config['n_layers'],
      'model.embed_dim': config['feature_dim'] * config['num_heads'],
      'model.num_heads': config['num_heads'],
      'model.mlp_dim': ffn[1],
      'model.mlp': _MLPS[config['mlp_type']],
      'model.qk_norm': False,
      'model.norm': 'layer' if is_told else 'rms',
      'model.norm_eps': 1e-5,
      'model.tie_embeddings': False,
      'model.embedding_dim': (
        config['feature_dim'] if config['outside_embed'] else 0
      ),
      'model.time_conditioning': is_told,
      'model.time_form': 'md4' if is_told else 'dit',
      'model.time_dim': config['feature_dim'] if is_told else 0,
    },
    vocab_size=vocab_size,
    mask_id=vocab_size - 1,
    separator_id=separator,
    start_id=separator,
    max_length=config['data_shape'][0],
    tokenizer='gpt2' if vocab_size == ddit.GPT2_SIZE + 1 else '',
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  del names

  def dense(ours, theirs, how=layouts.SAME):  # how: of the kernel's rows
    return {
      f'{ours}/kernel': Piece(f'{theirs}/kernel', how),
      f'{ours}/bias': Piece(f'{theirs}/bias'),
    }

  # Flax numbers the layers of one kind in the order of their use.
  ends, order = {}, iter(range(3))
  if network.embedding_dim:
    ends['embedding'] = Piece('classifier/Embed_0/embedding', vocab=True)
    ends |= dense('embedding_in', f'{_NET}Dense_{next(order)}')
  else:
    ends['embedding'] = Piece(f'{_NET}Embed_0/embedding', vocab=True)
  rotary = layouts.chain(
    layouts.TRANSPOSED,
    layouts.halves_from_pairs(network.num_heads, network.head_dim),
    layouts.TRANSPOSED,
  )
  block = {
    'query/kernel': Piece(f'{_BLOCK}attention/wq/kernel', rotary),
    'key/kernel': Piece(f'{_BLOCK}attention/wk/kernel', rotary),
    'value/kernel': Piece(f'{_BLOCK}attention/wv/kernel'),
    'attention_out/kernel': Piece(f'{_BLOCK}attention/wo/kernel'),
    'mlp_gate/kernel': Piece(f'{_BLOCK}feed_forward/w1/kernel'),
    'mlp_in/kernel': Piece(f'{_BLOCK}feed_forward/w3/kernel'),
    'mlp_out/kernel': Piece(f'{_BLOCK}feed_forward/w2/kernel'),
  }
  if network.time_conditioning:
    swapped = layouts.How(_swap_halves, _swap_halves)
    time = 'classifier/CondEmbedding_0/'
    ends |= dense('time_embedding/in', f'{time}dense0', swapped)
    ends |= dense('time_embedding/out', f'{time}Dense_0')
    ends |= dense('final_modulation', f'{_NET}Dense_{next(order)}')
    block |= dense('modulation', f'{_BLOCK}Dense_0')
  else:
    ends['final_norm/scale'] = Piece(f'{_NET}RMSNorm_0/scale')
    block |= {
      'attention_norm/scale': Piece(f'{_BLOCK}RMSNorm_0/scale'),
      'mlp_norm/scale': Piece(f'{_BLOCK}RMSNorm_1/scale'),
    }
  ends['output'] = Piece(f'{_NET}Dense_{next(order)}/kernel', _OUTPUT)
  return layouts.Layout(ends, block)
