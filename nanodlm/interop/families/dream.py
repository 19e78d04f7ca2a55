"""Dream: Qwen2 without a causal mask, whose outputs stay shifted by one.

Source: arXiv 2508.15487; names as in the published `DreamModel`. Its forward
pass returns the logits unshifted, and its sampler shifts them. Its tokenizer is
that of Qwen2, published as a vocabulary and merges.
"""

import json

from nanodlm.interop import tensors, tokenizer_json
from nanodlm.interop.families import llama

# Qwen2's merges do not cross the pieces that this cuts a text into.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


class Dream(llama.Llama):
  """Dream, arXiv 2508.15487."""

  model_types = ('dream',)
  architectures = ('DreamModel',)
  is_stock = False
  objective = 'masked'
  has_mask = True
  keys = llama.KEYS
  defaults = {'use_sliding_window': False, 'mask_token_id': 151666}
  # The published code does not read head_dim.
  network = {'attention_bias': 'qkv', 'shift_outputs': True, 'head_size': 0}
  written = {**llama.FLOAT32, 'use_sliding_window': False}

  def to_config(self, network, described):
    config = super().to_config(network, described)
    own = {'model_type': 'Dream', 'bos_token_id': described.separator_id}
    return {**config, **own}

  def tokenizer_json(self, folder):
    vocab, merges, config = (
      folder / name
      for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json')
    )
    if not all(path.is_file() for path in (vocab, merges, config)):
      return None
    tensors.require('tokenizers')
    from tokenizers.models import BPE

    added = json.loads(config.read_bytes()).get('added_tokens_decoder', {})
    ids, pairs = BPE.read_file(str(vocab), str(merges))
    return {
      **tokenizer_json.byte_level(ids, list(map(list, pairs)), _SPLIT),
      'normalizer': {'type': 'NFC'},
      'added_tokens': [
        tokenizer_json.added_token(
          int(i), token['content'], token.get('special', True)
        )
        for i, token in added.items()
      ],
    }
