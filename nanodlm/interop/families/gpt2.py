"""GPT-2: LayerNorm, learned positions, biases everywhere; GPT2LMHeadModel.

Source: Radford et al., 2019; names and settings as in Hugging Face's
`GPT2LMHeadModel`, whose projections keep their weights as [in, out].
"""

from nanodlm import workdir as workdirs
from nanodlm.data.tokenizers import chat
from nanodlm.interop import tokenizer_json
from nanodlm.interop.families.layout import Family, Key
from nanodlm.types import InputError

# {activation: config.model.mlp}.
MLPS = {
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu': 'gelu',
}
# Pieces of text that its merges do not cross: its authors' expression.
_SPLIT = (
  r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_END = '<|endoftext|>'


class GPT2(Family):
  """GPT-2 in Hugging Face's form.

  Its tokenizer may be published as a vocabulary and merges.
  """

  model_types = ('gpt2',)
  architectures = ('GPT2LMHeadModel', 'GPT2Model')
  is_stock = True
  objective = 'ar'
  has_mask = False
  # The published file leaves out what transformers has as a default.
  keys = {
    'n_positions': Key('num_positions'),
    'n_embd': Key('embed_dim'),
    'n_layer': Key('num_layers'),
    'n_head': Key('num_heads'),
    'n_inner': Key('mlp_dim', 0),
    'activation_function': Key('mlp', 'gelu_new', MLPS),
    'layer_norm_epsilon': Key('norm_eps', 1e-5),
    'tie_word_embeddings': Key('tie_embeddings', True),
  }
  defaults = {'bos_token_id': 50256, 'eos_token_id': 50256}
  allowed = {
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
  }
  harmless = """
    attn_pdrop embd_pdrop n_ctx n_special predict_special_tokens
    reorder_and_upcast_attn resid_pdrop summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj
  """.split()
  network = {
    'norm': 'layer',
    'norm_bias': True,
    'attention_bias': 'all',
    'mlp_bias': True,
  }
  written = {'dtype': 'float32', 'torch_dtype': 'float32'}
  length = ('n_positions', 1024)
  tokenizer = 'gpt2'
  names = {
    'embedding': '{top}wte.weight',
    'position_embedding': '{top}wpe.weight',
    'attention_norm': '{top}h.{layer}.ln_1',
    'query': '{top}h.{layer}.attn.c_attn',
    'key': '{top}h.{layer}.attn.c_attn',
    'value': '{top}h.{layer}.attn.c_attn',
    'attention_out': '{top}h.{layer}.attn.c_proj',
    'mlp_norm': '{top}h.{layer}.ln_2',
    'mlp_in': '{top}h.{layer}.mlp.c_fc',
    'mlp_out': '{top}h.{layer}.mlp.c_proj',
    'final_norm': '{top}ln_f',
    'output': 'lm_head.weight',
  }
  # The published file holds the network without its output projection.
  prefixes = ('transformer.', '')
  is_transposed = False
  ignored = (r'.*\.attn\.(masked_)?bias',)  # Causal masks.

  def tokenizer_json(self, folder):
    described = chat.read_described(folder)
    if described.get('add_prefix_space'):
      raise InputError(
        'tokenizer_config.json: add_prefix_space=True is not supported'
      )
    added = described.get('added_tokens_decoder', {})
    content = tokenizer_json.from_merges(folder, _SPLIT, added)
    if content is None:
      return None
    path, vocab = folder / 'added_tokens.json', content['model']['vocab']
    ids = workdirs.read_json(path) if path.is_file() else {}
    ids |= {_END: vocab[_END]} if _END in vocab else {}
    known = {token['content'] for token in added.values()}
    content['added_tokens'] += [
      tokenizer_json.added_token(i, text)
      for text, i in ids.items()
      if text not in known
    ]
    return content

  def fixed(self, network):
    return {
      **super().fixed(network),
      'num_positions': network.num_positions or 'more than 0',
    }
