"""MD4, arXiv 2406.04329: its trainer's Orbax checkpoints of text.

The folder is its workdir (or one of its checkpoints). Its settings must be in
it as config.json, which MD4 does not write: json.dump(config.to_dict(), file).
The averaged weights (ema_params) are used if there are any.

The mask has a row in the embedding but not in the output: one of zeros, which
no objective reads, is added. Its sinusoids are (sin, cos), those of nanodlm
(cos, sin).
"""

from typing import Any

import numpy as np

from nanodlm.interop.families import ddit
from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families.layout import Key, LAYER, Part, SAME
from nanodlm.types import InputError

_NET = 'classifier/Transformer_0'
_BLOCK = f'{_NET}/TransformerBlock_{LAYER}'
_FIRST = f'{_NET}/TransformerBlock_0'
_SCHEDULES = {'linear': 'linear', 'cosine': 'md4_cosine'}


def halves_from_pairs(num_heads: int, head_dim: int) -> layouts.How:
  """Reorders the features of rotary queries or keys, [..., H * Dh].

  MD4 rotates features 2i and 2i + 1 together, nanodlm i and i + Dh / 2.
  """
  pairs = (num_heads, head_dim // 2, 2)
  return lambda x: (
    x.reshape(*x.shape[:-1], *pairs).swapaxes(-1, -2).reshape(x.shape)
  )


class MD4(layouts.Family):
  """MD4, arXiv 2406.04329."""

  model_types = ('md4',)
  is_exportable = False
  keys = {
    'n_layers': Key('num_layers'),
    'num_heads': Key('num_heads'),
    # Flax's gelu is the tanh approximation.
    'mlp_type': Key(
      'mlp', None, {'glu': 'glu', 'swiglu': 'swiglu', 'geglu': 'geglu_tanh'}
    ),
  }
  required = (
    'model_type',
    'vocab_size',
    'data_shape',
    'noise_schedule',
    'outside_embed',
    'time_features',
    'feature_dim',
  )
  allowed = {
    'task_type': ('text',),
    'time_features': ('t', 'none'),
    'model_sharding': (False, None),
    # Discrete times have another bound.
    'cont_time': (True,),
  }
  others = ('classes',)
  # The network of images, and the settings of data, training and sampling.
  harmless = """
    batch_size b2 ch_mult check_nans checkpoint_every_steps
    checkpoint_keep_period clip cond_type dataset depth_scaled_init
    dit_hidden_size dit_num_heads dropout_rate ema_rate eval_every_steps
    eval_pad_last_batch grain_num_workers learning_rate learning_rate_schedule
    log_loss_every_steps n_dit_layers num_epochs num_eval_steps
    num_microbatches num_train_steps per_device_batch_size sampler
    sampling_grid seed test_in_colab timesteps topp trial use_attn_dropout
    use_v2_input_pipeline warmup_steps weight_decay
  """.split()
  network = {'norm_eps': 1e-5, 'tie_embeddings': False}

  def detect(self, config, names):
    return f'{_FIRST}/attention/wq/kernel' in names

  def settings(self, config, shapes):
    if config.get('classes', -1) > 0:
      raise InputError(
        f'config.json: classes={config["classes"]!r} is not supported: the '
        'network is conditioned on a class'
      )
    schedule, size = config['noise_schedule'], config['feature_dim']
    name = _SCHEDULES.get(schedule, 'polynomial')
    settings: dict[str, Any] = {'objective.schedule': name}
    if schedule not in _SCHEDULES:
      try:
        settings['objective.power'] = float(schedule.removeprefix('poly'))
      except ValueError as error:
        raise InputError(
          f'config.json: noise_schedule={schedule!r} is not one of '
          f'{[*_SCHEDULES, "polyK"]}'
        ) from error
    has_time = config['time_features'] == 't'
    return {
      **settings,
      'model.embed_dim': size * config['num_heads'],
      'model.mlp_dim': shapes[f'{_FIRST}/feed_forward/w1/kernel'][1],
      'model.norm': 'layer' if has_time else 'rms',
      'model.embedding_dim': size if config['outside_embed'] else 0,
      'model.time_conditioning': has_time,
      'model.time_form': 'md4' if has_time else 'dit',
      'model.time_dim': size if has_time else 0,
    }

  def vocabulary(self, config, shapes):
    mask = config['vocab_size']
    known = {
      'eos_token_id': min(ddit.GPT2_END, mask - 1),
      **config,
      'vocab_size': mask + 1,
      'mask_token_id': mask,
    }
    return {
      **super().vocabulary(known, shapes),
      'max_length': config['data_shape'][0],
      'tokenizer': 'gpt2' if mask == ddit.GPT2_SIZE else '',
    }

  def parts(self, network, paths, names):
    # [D, V] without the mask -> [V + 1, D].
    output = lambda x: np.pad(x.T, ((0, 1), (0, 0)))
    # Flax numbers the layers of one kind in the order of their use.
    order = iter(range(3))
    dense = lambda: f'{_NET}/Dense_{next(order)}'
    rotary = halves_from_pairs(network.num_heads, network.head_dim)
    embedding = f'{_NET}/Embed_0/embedding'
    modules = {
      'layers/query': (f'{_BLOCK}/attention/wq', rotary),
      'layers/key': (f'{_BLOCK}/attention/wk', rotary),
      'layers/value': (f'{_BLOCK}/attention/wv', SAME),
      'layers/attention_out': (f'{_BLOCK}/attention/wo', SAME),
      'layers/mlp_gate': (f'{_BLOCK}/feed_forward/w1', SAME),
      'layers/mlp_in': (f'{_BLOCK}/feed_forward/w3', SAME),
      'layers/mlp_out': (f'{_BLOCK}/feed_forward/w2', SAME),
    }
    if network.embedding_dim:
      embedding = 'classifier/Embed_0/embedding'
      modules['embedding_in'] = (dense(), SAME)
    if network.time_conditioning:
      time = 'classifier/CondEmbedding_0'
      swapped = lambda x: np.roll(x, len(x) // 2, axis=0)
      modules['time_embedding/in'] = (f'{time}/dense0', swapped)
      modules['time_embedding/out'] = (f'{time}/Dense_0', SAME)
      modules['layers/modulation'] = (f'{_BLOCK}/Dense_0', SAME)
      modules['final_modulation'] = (dense(), SAME)
    parts = {
      'embedding': Part(embedding),
      'layers/attention_norm/scale': Part(f'{_BLOCK}/RMSNorm_0/scale'),
      'layers/mlp_norm/scale': Part(f'{_BLOCK}/RMSNorm_1/scale'),
      'final_norm/scale': Part(f'{_NET}/RMSNorm_0/scale'),
      'output': Part(f'{dense()}/kernel', output),
    }
    for ours, (theirs, how) in modules.items():
      parts[f'{ours}/kernel'] = Part(f'{theirs}/kernel', how)
      parts[f'{ours}/bias'] = Part(f'{theirs}/bias')
    return parts
