"""The diffusion transformer that SEDD, MDLM, BD3-LM, Duo and GIDD share.

Source: SEDD's published code, arXiv 2310.16834, after DiT, arXiv 2212.09748:
LayerNorm with a scale that the time shifts and scales further, rotary
positions, GELU (tanh), biases in the MLP and the output projection only. The
families differ in the input of the time embedding, which is `model.time_form`,
and in the meaning of the outputs, which is the objective.

Every tensor is kept, including the conditioning of networks whose time is
always 0 (time_form 'constant'), so that fine-tuning trains their network and
not one into which that constant was multiplied.
"""

from collections.abc import Collection

from nanodlm.interop.families.layout import Family, Key
from nanodlm.types import InputError

# The vocabularies of these projects: GPT-2's, without a mask, and BERT's.
GPT2_SIZE, GPT2_END = 50_257, 50_256
BERT_SIZE, BERT_MASK, BERT_END = 30_522, 103, 102


class DDiT(Family):
  """The shared transformer. Its sizes are those of the tensors."""

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
    kind = str(config.get('model_type', '')).lower()
    return kind in self.model_types and is_like(names)

  def describe(self, config, shapes):
    shapes = {name.removeprefix('backbone.'): x for name, x in shapes.items()}
    return super().describe(config, shapes)

  def settings(self, config, shapes):
    if not is_like(shapes):
      raise InputError('the tensors are not those of the transformer of SEDD')
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
