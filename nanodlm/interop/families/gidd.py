"""GIDD at 3B and 10B, arXiv 2512.10858, in Hugging Face's form.

Names of tensors and settings as in the published `GiddForDiffusionLM`. Its
constants, by which branches, products and outputs are multiplied, are
multiplied into the weights, and 1 is added to the scales of its norms: the
function is the same one, and so is the set of functions that fine-tuning can
reach, but not the size of an update.

Its samplers keep a prompt from seeing the noise after it, as its training does
for texts with a clean beginning. Here all positions see each other, as in its
training for texts without one: samples with a prompt have another law.
"""

import numpy as np

from nanodlm.interop.families import llama
from nanodlm.interop.families.layout import Family, Key, refuse
from nanodlm.types import InputError

# Noise is random tokens with probability sigmoid(log SNR + noise_type), and
# masks otherwise. From this |noise_type| on, with a log SNR within 9, that is 0
# or 1 in float32.
_PURE = 25.0


class ScaledGIDD(Family):
  """GIDD in the form of its scaling study: masked or uniform noise."""

  model_types = ('gidd',)
  architectures = ('GiddForDiffusionLM',)
  is_exportable = False
  keys = {
    'hidden_size': Key('embed_dim'),
    'num_hidden_layers': Key('num_layers'),
    'num_attention_heads': Key('num_heads'),
    'intermediate_size': Key('mlp_dim'),
    'attention_bias': Key('attention_sink', False),
    'attn_soft_cap': Key('attention_cap', 30.0),
    'mlp_bias': Key('mlp_bias', False),
    'rms_norm_eps': Key('norm_eps', 1e-6),
    'rope_theta': Key('rope_theta', 10_000.0),
    'tie_word_embeddings': Key('tie_embeddings', False),
    'use_qk_norm': Key('joint_qk_norm', True),
  }
  # What the published code takes for absent keys.
  defaults = {
    'bos_token_id': 0,
    'eos_token_id': 1,
    'head_scaling': 1.0,
    'mask_token_id': 3,
    'noise_type': 0.0,
    'resid_scale': 4.0,
    'weight_scaling': 'fan_in',
  }
  allowed = {'is_causal': (False,), 'rope_scaling': (None,)}
  others = ('head_dim',)
  # The range of noise levels in training, and initial weights.
  harmless = """
    attn_performer emb_init_scale head_init_scale init_scale max_log_snr
    min_log_snr
  """.split()
  network = {'mlp': 'relu2'}
  length = ('max_position_embeddings', 1024)
  names = {
    **llama.Llama.names,
    'attention_norm': '{top}layers.{layer}.attn_layernorm',
    'sink_key': '{top}layers.{layer}.self_attn.k_bias',
    'sink_value': '{top}layers.{layer}.self_attn.v_bias',
    'mlp_norm': '{top}layers.{layer}.mlp_layernorm',
  }
  prefixes = ('model.',)

  def settings(self, config, shapes):
    noise, width = config['noise_type'], config['hidden_size']
    if abs(noise) < _PURE:
      raise InputError(
        f'config.json: noise_type={noise!r} is not supported: the share of '
        'random tokens in its noise changes with the noise level in a way that '
        f"objective.name='hybrid' does not have; {_PURE} and above is "
        f'uniform noise, {-_PURE} and below masks'
      )
    refuse(config, {'head_dim': (None, width // config['num_attention_heads'])})
    uniform = {'objective.name': 'uniform', 'objective.needs_time': False}
    return {
      **(uniform if noise > 0 else {'objective.name': 'masked'}),
      'model.qk_norm': config.get('use_qk_norm', True),
    }

  def vocabulary(self, config, shapes):
    width, inner = config['hidden_size'], config['intermediate_size']
    branch = config['resid_scale'] / config['num_hidden_layers']

    def scale(key, fan_in, fan_out):
      fans = {'fan_in': fan_in**-0.5, 'fan_out': fan_out**-0.5}
      return float(fans.get(config[key], config[key]))

    up, down = (
      scale('weight_scaling', *sizes)
      for sizes in ((width, inner), (inner, width))
    )
    square = scale('weight_scaling', width, width)
    kernels = {
      **dict.fromkeys(('query', 'key', 'value'), square),
      'attention_out': branch * square,
      'mlp_in': up,
      'mlp_out': branch * down,
    }
    factors = {f'layers/{name}/kernel': x for name, x in kernels.items()}
    factors['layers/mlp_out/bias'] = branch
    factors['output'] = scale('head_scaling', width, config['vocab_size'])
    return {**super().vocabulary(config, shapes), 'factors': factors}

  def parts(self, network, paths, names):
    parts = super().parts(network, paths, names)
    for path in (path for path in parts if path.endswith('/scale')):
      parts[path] = parts[path]._replace(how=lambda x: np.float32(1) + x)
    return parts
