"""Dream: Qwen2 without a causal mask, whose outputs stay shifted by one.

Source: arXiv 2508.15487; names as in the published `DreamModel`. Its forward pass
returns the logits unshifted, and its sampler shifts them. Its tokenizer is Qwen2's,
published as a vocabulary and merges.
"""

import json
import pathlib
from typing import Any, Collection

from nanodlm.interop.families import layout as layouts
from nanodlm.interop.families import llama

MASK_ID = 151666
# What Qwen2's merges do not cross.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def detect(config: dict[str, Any], names: Collection[str]) -> bool:
  del names
  return config.get('model_type') == 'Dream'


def describe(
  config: dict[str, Any], names: Collection[str]
) -> layouts.Description:
  del names
  config = {'use_sliding_window': False, 'mask_token_id': MASK_ID, **config}
  return llama.describe_decoder(
    config,
    {
      'objective.name': 'masked',
      'model.attention_bias': 'qkv',
      'model.shift_outputs': True,
    },
    mask_id=llama.token_id(config, 'mask_token_id'),
  )


def layout(network: Any, names: Collection[str]) -> layouts.Layout:
  return llama.decoder_layout(network, llama.prefix_of(names))


def tokenizer_json(folder: pathlib.Path) -> dict[str, Any] | None:
  """The tokenizer.json of a folder with vocab.json and merges.txt; None without."""
  files = [
    folder / name
    for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json')
  ]
  if not all(file.is_file() for file in files):
    return None
  vocab, merges, config = (file.read_text(encoding='utf-8') for file in files)
  # The first line of a merges.txt may tell its version.
  pairs = [
    line.split(' ')
    for line in merges.splitlines()
    if line and not line.startswith('#version')
  ]
  byte_level = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': False,
  }
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      {
        'id': int(i),
        'normalized': False,
        'lstrip': False,
        'rstrip': False,
        'single_word': False,
        'content': token['content'],
        'special': bool(token.get('special', True)),
      }
      for i, token in json.loads(config).get('added_tokens_decoder', {}).items()
    ],
    'normalizer': {'type': 'NFC'},
    'post_processor': None,
    'pre_tokenizer': {
      'type': 'Sequence',
      'pretokenizers': [
        {
          'type': 'Split',
          'pattern': {'Regex': _SPLIT},
          'behavior': 'Isolated',
          'invert': False,
        },
        byte_level,
      ],
    },
    'decoder': byte_level,
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': None,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': False,
      'byte_fallback': False,
      'vocab': json.loads(vocab),
      'merges': pairs,
    },
  }


def misfit(network: Any, objective: str) -> str:
  return layouts.misfit(
    network,
    objective,
    ('masked',),
    head_size=(0,),
    mlp=tuple(llama.GATED.values()),
    num_positions=(0,),
    norm=('rms',),
    qk_norm=(False,),
    shift_outputs=(True,),
    attention_bias=('qkv',),
    mlp_bias=(False,),
    time_conditioning=(False,),
  )


def to_config(network: Any, export: layouts.Export) -> dict[str, Any]:
  return {
    **llama.decoder_config(network, export),
    'model_type': 'Dream',
    'architectures': ['DreamModel'],
    'mask_token_id': export.mask_id,
    'bos_token_id': export.separator_id,
    'pad_token_id': export.separator_id,
    'use_sliding_window': False,
  }
