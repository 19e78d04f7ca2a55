"""SEDD, MDLM, BD3-LM, Duo, UDLM and GIDD, which share a transformer.

Source: SEDD's published code, arXiv 2310.16834, after DiT, arXiv 2212.09748:
LayerNorm with a scale that the time shifts and scales further, rotary
positions, GELU (tanh), biases in the MLP and the output projection only. The
families differ in the input of the time embedding, which is `model.time_form`,
and in the meaning of the outputs, which is the objective.

Every tensor is kept, including the conditioning of networks whose time is
always 0 (time_form 'constant'), so that fine-tuning trains their network and
not one into which that constant was multiplied. The averaged weights ('ema') of
a trainer's file are used if it has them.

MDLM, BD3-LM and Duo are Lightning's .ckpt, or Hugging Face's form. The settings
in a .ckpt are Python objects, which are not read: a config.json next to it must
give model_type, n_heads, for BD3-LM block_size, and model_length (1024) and
time_conditioning (false) if they differ.
"""

from collections.abc import Collection

from nanodlm.interop.families.layout import (
  Family,
  HARMLESS,
  InBlocks,
  Key,
  refuse,
  refuse_unknown,
  require,
)
from nanodlm.types import InputError

# The vocabularies of these projects: GPT-2's, without a mask, and BERT's.
GPT2_SIZE, GPT2_END = 50_257, 50_256
BERT_SIZE, BERT_MASK, BERT_END = 30_522, 103, 102


class DDiT(Family):
  """The transformer of these families; its sizes come from the tensors."""

  keys = {
    'hidden_dim': Key('embed_dim', 0),
    'cond_dim': Key('time_dim', 0),
    'n_blocks': Key('num_layers', 0),
    'n_heads': Key('num_heads'),
  }
  network = {
    'mlp': 'gelu_tanh',
    'mlp_bias': True,
    'norm': 'layer',
    'norm_eps': 1e-5,
    'rope_theta': 10_000.0,
    'tie_embeddings': False,
    'output_bias': True,
    'time_conditioning': True,
  }
  harmless = ('dropout',)
  length = ('model_length', 1024)
  names = {
    'embedding': '{top}vocab_embed.embedding',
    'time_embedding/in': '{top}sigma_map.mlp.0',
    'time_embedding/out': '{top}sigma_map.mlp.2',
    'attention_norm': '{top}blocks.{layer}.norm1',
    'query': '{top}blocks.{layer}.attn_qkv',
    'key': '{top}blocks.{layer}.attn_qkv',
    'value': '{top}blocks.{layer}.attn_qkv',
    'attention_out': '{top}blocks.{layer}.attn_out',
    'mlp_norm': '{top}blocks.{layer}.norm2',
    'mlp_in': '{top}blocks.{layer}.mlp.0',
    'mlp_out': '{top}blocks.{layer}.mlp.2',
    'modulation': '{top}blocks.{layer}.adaLN_modulation',
    'final_norm': '{top}output_layer.norm_final',
    'final_modulation': '{top}output_layer.adaLN_modulation',
    'output': '{top}output_layer.linear.weight',
    'output_bias': '{top}output_layer.linear.bias',
  }
  # Lightning and Hugging Face prefix the names.
  prefixes = ('backbone.', '')
  # Rotary tables, and scalars for the projects' samplers.
  ignored = (
    r'.*rotary_emb\.(inv_freq|cos_cached|sin_cached)',
    r'(backbone\.)?(sampling_eps_(min|max)|logit_bias|noise\..*)',
  )

  def detect(self, config, names):
    return super().detect(config, names) and is_like(names)

  def describe(self, config, shapes):
    shapes = {name.removeprefix('backbone.'): x for name, x in shapes.items()}
    return super().describe(config, shapes)

  def settings(self, config, shapes):
    if not is_like(shapes):
      raise InputError("the tensors are not those of SEDD's transformer")
    blocks = {
      name.split('.')[1] for name in shapes if name.startswith('blocks.')
    }
    return {
      'model.num_layers': len(blocks),
      'model.embed_dim': shapes['vocab_embed.embedding'][1],
      'model.mlp_dim': shapes['blocks.0.mlp.0.weight'][0],
      'model.time_dim': shapes['blocks.0.adaLN_modulation.weight'][1],
    }

  def vocabulary(self, config, shapes):
    # The projects use the tokenizer's own mask, or append one to its ids. Their
    # config.json does not say it; mask_token_id and eos_token_id in it do.
    size = shapes['vocab_embed.embedding'][0]
    mask, end = size - 1, min(GPT2_END, size - 2)
    if size == BERT_SIZE:
      mask, end = BERT_MASK, BERT_END
    known = {key: value for key, value in config.items() if value is not None}
    config = {'mask_token_id': mask, 'eos_token_id': end, **known}
    found = super().vocabulary({**config, 'vocab_size': size}, shapes)
    # Ids that are neither GPT-2's nor the mask: a padding token without text.
    spare = size - GPT2_SIZE - self.has_mask
    if 0 <= spare <= 2:
      found |= {'tokenizer': 'gpt2', 'spare_ids': spare}
    return found

  def fixed(self, network):
    return {**super().fixed(network), 'mlp_width': 4 * network.embed_dim}

  def to_config(self, network, described):
    return {
      **super().to_config(network, described),
      'dropout': network.dropout,
      'time_conditioning': network.knows_time,
    }


def is_like(names: Collection[str]) -> bool:
  """Returns whether tensors of these names are such a transformer's."""
  wanted = {'vocab_embed.embedding', 'blocks.0.attn_qkv.weight'}
  return wanted <= {name.removeprefix('backbone.') for name in names}


class MDLM(DDiT):
  """MDLM, arXiv 2406.07524."""

  model_types = ('mdlm',)
  keys = {
    **DDiT.keys,
    'time_conditioning': Key(
      'time_form', False, {False: 'constant', True: 'sigma'}
    ),
  }
  # 'd3pm' and 'sedd' are other parametrisations of the same network.
  allowed = {'parameterization': ('subs',), 'backbone': ('dit',)}


class BD3LM(InBlocks, DDiT):
  """BD3-LM, arXiv 2503.09573."""

  model_types = ('bd3lm',)
  required = ('block_size',)
  allowed = {
    'cross_attn': (True,),
    'causal': (False,),
    'adaln': (True,),
    # Blocks have times of their own, and this network is given their mean.
    'time_conditioning': (False,),
    'parameterization': ('subs',),
  }
  network = {**DDiT.network, 'time_form': 'constant'}
  harmless = ('dropout', 'sampling_eps_max', 'sampling_eps_min')
  written = {
    'cross_attn': True,
    'adaln': True,
    'causal': False,
    'attn_backend': 'sdpa',
    'var_min': False,
  }


class Duo(DDiT):
  """Duo, arXiv 2506.10892, and UDLM, arXiv 2412.10193: uniform noise.

  None of the ids is a mask: one is added that occurs in no text and no noise.
  With GPT-2's ids Duo has one more than tokens: the padding token, which occurs
  in the noise like any other.
  """

  model_types = ('duo', 'udlm')
  is_exportable = False
  objective = 'uniform'
  has_mask = False
  allowed = {'causal': (False,), 'time_conditioning': (True,), 'cfg': (False,)}
  harmless = ('cfg_num_classes', 'dropout', 'var_min')
  network = {**DDiT.network, 'time_form': 'sigma'}


class GIDD(DDiT):
  """GIDD, arXiv 2503.04482, in Hugging Face's form (model_type 'dit').

  Its share of uniform tokens is config.json's p_uniform, and the mask its last
  id. A checkpoint of its trainer, whose vocabulary is padded, must be converted
  by its own convert_checkpoint.py first.
  """

  model_types = ('dit',)
  is_exportable = False
  objective = 'hybrid'
  keys = {'num_attention_heads': Key('num_heads')}
  required = ('p_uniform',)
  # The tensors have these sizes, and t_eps is for training and sampling.
  harmless = ('hidden_size', 'num_hidden_layers', 'timestep_cond_dim', 't_eps')
  network = {**DDiT.network, 'time_form': 'unit'}
  length = ('max_seq_len', 512)

  def detect(self, config, names):
    return 'p_uniform' in config and super().detect(config, names)

  def settings(self, config, shapes):
    return {
      **super().settings(config, shapes),
      'objective.p_uniform': float(config['p_uniform']),
      'objective.gamma': 1.0,
    }


class SEDD(DDiT):
  """SEDD, arXiv 2310.16834.

  The form on the Hugging Face hub has a config.json with the project's
  settings, in the sections 'model', 'graph' and 'noise'. The .hydra/config.yaml
  of a trainer's checkpoint.pth must be converted to a config.json next to it.

  The outputs are those before -log expm1(sigma) - log N, which objective 'sedd'
  adds. Uniform noise and unscaled outputs are refused: that objective has
  masked noise, and scales.
  """

  objective = 'sedd'
  keys = {
    'hidden_size': Key('embed_dim', 0),
    'cond_dim': Key('time_dim', 0),
    'n_blocks': Key('num_layers', 0),
    'n_heads': Key('num_heads'),
  }
  allowed = {'scale_by_sigma': (True,), 'type': ('ddit',)}
  harmless = ('dropout', 'name')
  # The sections that are read: {key: values}, and their harmless keys.
  sections = {
    'graph': ({'type': ('absorb',)}, ('file', 'report_all')),
    # At its ends another schedule has other times than 'sigma'.
    'noise': ({'type': ('loglinear',)}, ('sigma_min', 'sigma_max')),
  }
  others = 'model tokens ngpus training data sampling eval optim hydra'.split()
  network = {**DDiT.network, 'time_form': 'sigma'}
  length = ('length', 1024)
  prefixes = ('', 'backbone.')

  def detect(self, config, names):
    return 'graph' in config and 'tokens' in config and is_like(names)

  def describe(self, config, shapes):
    require(config, *self.sections, 'model')
    refuse_unknown(config, {*self.sections, *self.others, *HARMLESS})
    for name in (*self.sections, 'model'):
      if not isinstance(config[name], dict):
        raise InputError(
          f'config.json: {name}={config[name]!r} is not a section'
        )
    for name, (allowed, harmless) in self.sections.items():
      refuse(config[name], allowed)
      refuse_unknown(config[name], {*allowed, *harmless})
    # Ids that the tokenizer's files name are outside the sections.
    ids = {key: x for key, x in config.items() if key.endswith('_token_id')}
    return super().describe({**ids, **config['model']}, shapes)

  def to_config(self, network, described):
    model = {
      'name': 'nanodlm',
      'type': 'ddit',
      'length': described.max_length,
      'scale_by_sigma': True,
      'dropout': network.dropout,
      'mask_token_id': described.mask_id,
      'eos_token_id': described.ends,
    }
    return {
      'model': {**self.fields(network), **model},
      'graph': {'type': 'absorb'},
      'noise': {'type': 'loglinear'},
      'tokens': described.vocab_size - 1,
    }
