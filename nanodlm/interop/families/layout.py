"""What a family of checkpoints is, and how its tensors become our parameters.

Paths name our parameters: 'embedding', 'final_norm/scale', and for all blocks
'layers/query/kernel', 'layers/mlp_norm/scale', ... Kernels are [in, out].
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import pathlib
import reprlib
from typing import Any, NamedTuple

import numpy as np

from nanodlm.model.config import ModelConfig
from nanodlm.types import InputError

# The content of a config.json, and {name: shape} of the tensors.
Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

# The number of a block, in the name of a tensor.
LAYER = '{layer}'
# Our parameters that are arrays; all others belong to a module, which is a norm
# (scale and bias) or a projection (kernel and bias).
ARRAYS = (
  *('embedding', 'position_embedding', 'output', 'output_bias'),
  *('sink_key', 'sink_value'),
)
# Values of `config.model`, unless a family says something else.
PLAIN = {
  'num_kv_heads': 0,
  'head_size': 0,
  'qk_norm': False,
  'joint_qk_norm': False,
  'attention_cap': 0.0,
  'attention_sink': False,
  'time_conditioning': False,
  'output_bias': False,
  'embedding_dim': 0,
  'num_positions': 0,
  'keep_rotary': False,
  'conv_size': 0,
  'rope_factor': 1.0,
  'rope_scaling': 'llama3',
  'rope_length': 8192,
  'norm': 'rms',
  'norm_bias': False,
  'attention_bias': 'none',
  'mlp_bias': False,
  'shift_outputs': False,
  'start_token': -1,
  'self_conditioning': False,
}
# Fields of `config.model` in which 0 means a default, and where its value is.
RESOLVED = {
  'num_kv_heads': 'kv_heads',
  'head_size': 'head_dim',
  'mlp_dim': 'mlp_width',
  'time_dim': 'time_width',
}
# Keys of any config.json that do not change what a network computes: ids of
# tokens, settings of generation, of training and of other tasks, and notes.
HARMLESS = """
  _attn_implementation _attn_implementation_autoset _commit_hash
  _flash_attn_2_enabled _name_or_path _num_labels attention_dropout
  attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
  chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample
  dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
  exponential_decay_length_penalty finetuning_task forced_bos_token_id
  forced_eos_token_id gradient_checkpointing hidden_dropout id2label
  initializer_range is_decoder is_llama_config label2id length_penalty
  mask_token_id max_length max_new_tokens min_length model_name model_type
  name_or_path neftune_noise_alpha no_repeat_ngram_size num_beam_groups
  num_beams num_labels num_return_sequences output_attentions
  output_hidden_states output_past output_scores pad_token_id prefix
  pretraining_tp problem_type remove_invalid_values repetition_penalty
  return_dict return_dict_in_generate sep_token_id suppress_tokens
  task_specific_params temperature tf_legacy_loss tie_encoder_decoder
  tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
  transformers_version typical_p unk_token_id unsloth_fixed unsloth_version
  use_bfloat16 use_cache vocab_size xla_device
""".split()
# Other keys of any config.json, with the values that change nothing.
INERT = {
  'add_cross_attention': (False, None),
  'cross_attention_hidden_size': (None,),
  'is_encoder_decoder': (False, None),
  'pruned_heads': ({}, None),
}

# How to load two of the families, for a model card.
LLAMA_CPP = """The code that was published with this form loads it, and so does
dLLM (github.com/ZHZisZZ/dllm). llama.cpp's converter knows the tensors:

```
python convert_hf_to_gguf.py THIS_FOLDER --outfile model.gguf
llama-diffusion-cli -m model.gguf -p PROMPT -ub 512 --diffusion-eps 0.001
```

The converter refuses tokenizers that it does not know, such as bytes."""

How = Callable[[np.ndarray], np.ndarray]
SAME: How = np.asarray


class Part(NamedTuple):
  """A parameter of nanodlm, or a layer of it, in a tensor of a checkpoint.

  Attributes:
    name: name of the tensor, with LAYER for the number of the block.
    how: turns the tensor, or the share of it, into the parameter; in a family
      that is exportable it is its own inverse.
    share: (axis, i, n) for part i of n equal parts of that axis.
    path: path of the parameter, which stacks all layers if it is in a block.
    layer: number of the block, if it is in one.
  """

  name: str
  how: How = SAME
  share: tuple[int, int, int] | None = None
  path: str = ''
  layer: int | None = None

  def of(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns a view of its numbers in the parameters, {path: array}."""
    if self.layer is None:
      return params[self.path]
    # The stack holds all layers but the last one.
    if self.layer < len(params.get(self.path, ())):
      return params[self.path][self.layer, ...]
    return params[self.path.replace('layers/', 'last_layer/', 1)]


class Layout(NamedTuple):
  """The mapping of one checkpoint.

  Attributes:
    tensors: {name: parameters in it, in their order}.
    same: {tensor: another} that must hold the same numbers, such as an output
      projection and the embedding that it is tied to.
  """

  tensors: dict[str, list[Part]]
  same: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint's config.json, or a run's config, says about the network.

  Attributes:
    vocab_size: rows of the checkpoint's embedding. All ids here are its ids.
    mask_id: id of the mask. If it is None, row `start_id` is copied to the end:
      autoregressive networks of nanodlm begin a text with the mask.
    separator_id: id of the token that ends a document.
    start_id: id of the token that begins one; read if mask_id is None.
    max_length: tokens of the longest text that the network is made for.
    window: tokens of a sliding window, or of the texts whose queries are not
      scaled, which longer texts need; 0: none.
    factors: {path of a parameter: number by which its tensor is multiplied}.
    settings: {'section.key': value}, on top of configs/base.py.
    tokenizer: `tokenizer.name` for a folder without a tokenizer.json, or ''.
    spare_ids: number of ids that are neither that tokenizer's nor the mask.
    eos_ids: ids of the tokens that end a text.
  """

  vocab_size: int
  mask_id: int | None
  separator_id: int
  start_id: int
  max_length: int
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: str = ''
  spare_ids: int = 0
  eos_ids: tuple[int, ...] = ()
  window: int = 0
  factors: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    start = 'start_id' if self.mask_id is None else 'mask_id'
    keys = ('vocab_size', 'max_length', 'separator_id', start)
    checked = [(key, getattr(self, key)) for key in keys]
    for key, value in (*checked, *(('eos_token_id', i) for i in self.eos_ids)):
      first, end = (0, self.vocab_size) if key.endswith('_id') else (1, 2**31)
      if not (isinstance(value, int) and first <= value < end):
        raise InputError(
          f'config.json gives {key}={value!r}, which must be an integer in '
          f'[{first}, {end})'
        )
    if self.mask_id in (self.separator_id, *self.eos_ids):
      raise InputError(
        f'config.json gives {self.mask_id} as the mask and as the end of a '
        'document; the mask must have an id of its own'
      )

  @property
  def rows(self) -> np.ndarray:
    """The checkpoint's row of each id of the run, whose last id is the mask."""
    mask = self.mask_id
    rows = np.arange(self.vocab_size + (mask is None))
    if mask is None:
      rows[-1] = self.start_id
    else:
      rows[[mask, -1]] = rows[[-1, mask]]
    return rows

  @property
  def ends(self) -> int | list[int]:
    """The `eos_token_id` of an export."""
    return list(self.eos_ids) if self.eos_ids[1:] else self.separator_id


class Key(NamedTuple):
  """The field of `config.model` that a key of config.json sets.

  Attributes:
    field: its name.
    default: the key's value if it is absent or null; None if it is required.
      A bool or float also converts the value.
    values: {value of the key: value of the field}; {} if they are equal.
  """

  field: str
  default: Any = None
  values: Mapping[Any, Any] = {}

  def read(self, config: Config, name: str) -> Any:
    """Returns the field's value from the key `name` of a config.json."""
    value = self.default if config.get(name) is None else config[name]
    if isinstance(self.default, bool | float):
      value = type(self.default)(value)
    if not self.values:
      return value
    refuse({name: value}, {name: tuple(self.values)})
    return self.values[value]

  def write(self, network: ModelConfig) -> Any:
    """Returns the key's value for a network; the inverse of `read`."""
    value = getattr(network, RESOLVED.get(self.field, self.field))
    return next((k for k, ours in self.values.items() if ours == value), value)


class Family:
  """A form in which networks are published; most only set these attributes.

  Attributes:
    model_types: values of model_type; an export writes the first.
    architectures: values in config.json's `architectures`, of which an export
      writes the first; () for all.
    is_exportable: whether runs can be exported in this form.
    is_published: whether it is a form of others, that their programs load.
    is_stock: whether transformers loads an export without remote code.
    objective: the `objective.name` that the network was trained with.
    also: other objectives of runs that can be exported; an import does not see
      them.
    has_mask: whether one of their ids is the mask.
    keys: {key of config.json: Key}.
    defaults: {key: value} for other keys that a config.json may leave out.
    required: other keys that config.json must have.
    allowed: {key: values}, the supported values of other keys.
    others: other keys that `settings` reads.
    harmless: other keys that do not change what the network computes, on top of
      HARMLESS. All other keys are refused.
    network: {field of config.model: value}, on top of PLAIN.
    written: {key: value} for an export's config.json.
    files: {name: content} of other files of an export.
    loading: which programs load an export, for its card, unless `is_stock`.
    length: the key of config.json with the longest text, and its default.
    tokenizer: `Description.tokenizer`.
    names: {array or module: name in the checkpoint}, with {top} for the prefix
      and {layer} for the block. Modules of the same name are equal parts of a
      tensor.
    prefixes: values of {top}; an export uses the first.
    is_transposed: whether kernels are stored [out, in], as PyTorch's Linear.
    ignored: regular expressions for tensors that are not weights.
  """

  model_types: tuple[str, ...] = ()
  architectures: tuple[str, ...] = ()
  is_exportable: bool = True
  is_published: bool = True
  is_stock: bool = False
  objective: str = 'masked'
  also: tuple[str, ...] = ()
  has_mask: bool = True
  keys: Mapping[str, Key] = {}
  defaults: Mapping[str, Any] = {}
  required: tuple[str, ...] = ()
  allowed: Mapping[str, tuple[Any, ...]] = {}
  others: Collection[str] = ()
  harmless: Collection[str] = ()
  network: Mapping[str, Any] = {}
  written: Mapping[str, Any] = {}
  files: Mapping[str, str] = {}
  loading: str = 'No architecture of transformers fits this network.'
  length: tuple[str, int] = ('max_position_embeddings', 2048)
  tokenizer: str = ''
  names: Mapping[str, str] = {}
  prefixes: tuple[str, ...] = ('',)
  is_transposed: bool = True
  ignored: tuple[str, ...] = ()

  def detect(self, config: Config, names: Collection[str]) -> bool:
    """Returns whether a checkpoint with such tensors is of this family."""
    return str(config.get('model_type')).lower() in self.model_types

  def check_fields(self, config: Config):
    """Raises InputError if a key may change what the network computes."""
    for key in ('quantization_config', 'quantization', 'compression_config'):
      if config.get(key):
        raise InputError(
          f'config.json: {key}={reprlib.repr(config[key])}: quantised weights '
          'are not supported, only floating-point ones'
        )
    known = {*HARMLESS, *self.required, *self.others, *self.harmless}
    known.add(self.length[0])
    for table in (self.keys, self.defaults, self.allowed, self.written, INERT):
      known.update(table)
    names = set(config.get('architectures') or ())
    if not self.architectures or names <= set(self.architectures):
      known.add('architectures')
    if not self.is_stock:  # The projects have code of their own.
      known.add('auto_map')
    if str(config.get('model_type')).lower() not in self.model_types:
      known.discard('model_type')
    refuse_unknown(config, known)

  def describe(self, config: Config, shapes: Shapes) -> Description:
    """Reads a checkpoint's config.json.

    Raises:
      InputError: a key is missing, is not known, or has a value that is not
        supported.
    """
    self.check_fields(config)
    config = {**self.defaults, **config}
    needed = [name for name, key in self.keys.items() if key.default is None]
    require(config, *self.required, *needed)
    refuse(config, {**INERT, **self.allowed})
    read = {
      key.field: key.read(config, name) for name, key in self.keys.items()
    }
    model = {**PLAIN, **self.network, **read}
    settings = {
      'objective.name': self.objective,
      **{f'model.{field}': value for field, value in model.items()},
      **self.settings(config, shapes),
    }
    if settings['model.num_kv_heads'] == settings['model.num_heads']:
      settings['model.num_kv_heads'] = 0
    return Description(settings=settings, **self.vocabulary(config, shapes))

  def settings(self, config: Config, shapes: Shapes) -> dict[str, Any]:
    """Returns the settings that `keys` and `network` do not give."""
    return {}

  def vocabulary(self, config: Config, shapes: Shapes) -> dict[str, Any]:
    """Returns the other fields of the `Description`."""
    require(config, 'vocab_size')
    separator = token_id(config, 'eos_token_id', 'bos_token_id')
    ends = config.get('eos_token_id')
    return {
      'vocab_size': config['vocab_size'],
      'mask_id': token_id(config, 'mask_token_id') if self.has_mask else None,
      'separator_id': separator,
      'eos_ids': tuple(ends) if isinstance(ends, list) else (separator,),
      'start_id': token_id(config, 'bos_token_id', 'eos_token_id'),
      'max_length': config.get(*self.length),
      'tokenizer': self.tokenizer,
    }

  def layout(
    self, network: ModelConfig, params: Iterable[str], names: Collection[str]
  ) -> Layout:
    """Returns the mapping of a checkpoint.

    Args:
      network: the network that its `Description` makes.
      params: the paths of its parameters in a tree.
      names: the names of its tensors; () for an export.

    Raises:
      InputError: the network has parameters that this family lacks.
    """
    paths = sorted({p.replace('last_layer/', 'layers/') for p in params})
    parts = self.parts(network, paths, names)
    if unknown := [path for path in paths if path not in parts]:
      raise InputError(
        f'the network has parameters that the checkpoint lacks: {unknown}'
      )
    tensors: dict[str, list[Part]] = {}
    for path in paths:
      part = parts[path]._replace(path=path)
      in_block = LAYER in part.name
      for layer in range(network.num_layers) if in_block else [None]:
        name = part.name.replace(LAYER, str(layer))
        tensors.setdefault(name, []).append(part._replace(layer=layer))
    for shares in tensors.values():
      shares.sort(key=lambda part: part.share or ())
    is_tied = 'output' in parts and 'output' not in paths
    same = {parts['output'].name: parts['embedding'].name} if is_tied else {}
    return Layout(tensors, same)

  def parts(
    self, network: ModelConfig, paths: list[str], names: Collection[str]
  ) -> dict[str, Part]:
    """Returns {path: part} of all parameters that such a network may have."""
    embedding = self.names['embedding']
    found = [top for top in self.prefixes if embedding.format(top=top) in names]
    top = (found or self.prefixes)[0]
    parts, all_names = {}, list(self.names.values())
    for i, (ours, name) in enumerate(self.names.items()):
      theirs = name.format(top=top, layer=LAYER)
      path = f'layers/{ours}' if LAYER in theirs else ours
      if ours in ARRAYS:
        parts[path] = Part(theirs)
        continue
      leaf, how, kernel, bias = 'scale', SAME, None, None
      if not ours.endswith('norm'):
        leaf, how = 'kernel', np.transpose if self.is_transposed else SAME
      if (count := all_names.count(name)) > 1:
        place = (i - all_names.index(name), count)
        kernel, bias = (int(not self.is_transposed), *place), (0, *place)
      parts[f'{path}/{leaf}'] = Part(f'{theirs}.weight', how, kernel)
      parts[f'{path}/bias'] = Part(f'{theirs}.bias', share=bias)
    return parts

  def tokenizer_json(self, folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns a tokenizer.json for a folder without one, or None."""
    return None

  def loaded_by(self, network: ModelConfig) -> str:
    """Returns `loading` for a network."""
    return self.loading

  def fixed(self, network: ModelConfig) -> dict[str, Any]:
    """Returns {field: the only value with which `network` has this form}."""
    fields = {key.field for key in self.keys.values()}
    fixed = {key: value for key, value in PLAIN.items() if key not in fields}
    if 'num_kv_heads' in fixed:
      # 0 and the number of heads are the same.
      fixed['num_kv_heads'] = network.num_kv_heads and network.num_heads
    return {**fixed, **self.network}

  def misread(self, network: ModelConfig, objective: Mapping[str, Any]) -> str:
    """Returns what programs of this form would read otherwise, or ''.

    `objective` is a run's `config.objective`.
    """
    if not self.is_published:
      return ''
    found = []
    if objective['expand']:  # Masks also stand for two tokens, or for none.
      found.append('objective.expand=True (needs False)')
    # The forms compute the time from the noise.
    if network.knows_time and (name := objective['schedule']) != 'linear':
      found.append(f"objective.schedule={name!r} (needs 'linear')")
    return ', '.join(found)

  def misfit(self, network: ModelConfig, objective: str) -> str:
    """Returns what it cannot express of a run with that objective, or ''."""
    allowed = {key: (value,) for key, value in self.fixed(network).items()}
    for key in self.keys.values():
      if key.values:
        allowed[key.field] = tuple(dict.fromkeys(key.values.values()))
    checks = [
      ('objective.name', objective, (self.objective, *self.also)),
      *((f'model.{x}', getattr(network, x), y) for x, y in allowed.items()),
    ]
    found = [
      f'{name}={value!r} (needs {" or ".join(map(repr, values))})'
      for name, value, values in checks
      if value not in values
    ]
    if network.block_size and network.causal and network.start_token < 0:
      # No form's clean copy begins with a mask at the place of the first token.
      found.append('objective.ar_weight > 0')
    return ', '.join(found)

  def fields(self, network: ModelConfig) -> dict[str, Any]:
    """Returns what `keys` say about a network, for a config.json."""
    return {name: key.write(network) for name, key in self.keys.items()}

  def to_config(self, network: ModelConfig, described: Description) -> Config:
    """Returns the config.json of an export of a network without a `misfit`."""
    # Autoregressive networks of nanodlm begin a text with the mask.
    mask = 'mask_token_id' if self.has_mask else 'bos_token_id'
    names = list(self.architectures[:1])
    named = {'architectures': names} if names else {}
    return {
      'model_type': self.model_types[0],
      **named,
      'vocab_size': described.vocab_size,
      self.length[0]: described.max_length,
      mask: described.mask_id,
      'eos_token_id': described.ends,
      'pad_token_id': described.separator_id,
      **self.fields(network),
      **self.written,
    }


class InBlocks(Family):
  """A family of block diffusion, whose clean copy sees the whole of a block.

  Attributes:
    block_key: the key of config.json with the size of a block.
  """

  objective = 'block'
  block_key = 'block_size'

  def settings(self, config, shapes):
    size = {'objective.block_size': config[self.block_key]}
    return {**super().settings(config, shapes), **size}

  def to_config(self, network, described):
    config = super().to_config(network, described)
    return {**config, self.block_key: network.block_size}


def require(config: Config, *keys: str):
  """Raises InputError with the keys that config.json lacks."""
  missing = [key for key in keys if config.get(key) is None]
  if missing:
    raise InputError(
      f'config.json has no {missing}, or is missing, and the tensors do not '
      'say it: write a config.json next to them, with model_type too'
    )


def refuse(config: Config, allowed: Mapping[str, tuple[Any, ...]]):
  """Raises InputError if a key of config.json has a value not in `allowed`."""
  for key, values in allowed.items():
    if key in config and config[key] not in values:
      raise InputError(
        f'config.json: {key}={config[key]!r} is not supported, only '
        f'{list(values)}'
      )


def refuse_unknown(config: Config, known: Collection[str]):
  """Raises InputError if config.json has keys, not null, outside of `known`."""
  unknown = {
    key: f'{key}={reprlib.repr(value)}'
    for key, value in config.items()
    if key not in known and value is not None
  }
  if unknown:
    hint = 'If it changes nothing, leave it out in a copy of config.json'
    if 'model_type' in unknown:
      hint = 'Tensors of the same names do not mean that it is the same network'
    raise InputError(
      f'config.json: {", ".join(unknown.values())} may change what the network '
      f'computes and is not supported. {hint}'
    )


def token_id(config: Config, *keys: str) -> int:
  """Returns the first of these ids that is set; of a list, its first."""
  for key in keys:
    value = config.get(key)
    if isinstance(value, list) and value:
      value = value[0]
    if isinstance(value, int):
      return value
  raise InputError(f'config.json has none of {list(keys)}')
