"""What a family of checkpoints is, and how its tensors become our parameters.

Paths name our parameters: 'embedding', 'final_norm/scale', and for all blocks
'layers/query/kernel', 'layers/mlp_norm/scale', ... Kernels are [in, out].
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import pathlib
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
ARRAYS = ('embedding', 'position_embedding', 'output', 'output_bias')
# Values of `config.model`, unless a family says something else.
PLAIN = {
  'num_kv_heads': 0,
  'head_size': 0,
  'qk_norm': False,
  'time_conditioning': False,
  'output_bias': False,
  'embedding_dim': 0,
  'num_positions': 0,
  'norm': 'rms',
  'norm_bias': False,
  'attention_bias': 'none',
  'mlp_bias': False,
  'shift_outputs': False,
}
# Fields of `config.model` in which 0 means a default, and where its value is.
RESOLVED = {
  'num_kv_heads': 'kv_heads',
  'head_size': 'head_dim',
  'mlp_dim': 'mlp_width',
  'time_dim': 'time_width',
}

How = Callable[[np.ndarray], np.ndarray]
SAME: How = np.asarray


class Part(NamedTuple):
  """A parameter of ours, or a layer of it, in a tensor of theirs.

  Attributes:
    name: name of the tensor, with LAYER for the number of the block.
    how: turns the tensor, or the share of it, into ours; in a family that is
      exportable it is its own inverse.
    share: (axis, i, n) for part i of n equal parts of that axis.
    path: path of our parameter; of all layers if there are.
    layer: number of the block, if it is in one.
  """

  name: str
  how: How = SAME
  share: tuple[int, int, int] | None = None
  path: str = ''
  layer: int | None = None

  def of(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns a view of its numbers in {path: array}, our parameters."""
    if self.layer is None:
      return params[self.path]
    # The stack holds all layers but the last one.
    if self.layer < len(params.get(self.path, ())):
      return params[self.path][self.layer, ...]
    return params[self.path.replace('layers/', 'last_layer/', 1)]


class Layout(NamedTuple):
  """The mapping of one checkpoint.

  Attributes:
    tensors: {name: our parameters in it, in their order}.
    same: {tensor: another} that must hold the same numbers, such as an output
      projection and the embedding that it is tied to.
  """

  tensors: dict[str, list[Part]]
  same: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint's config.json, or a run of ours, says about the network.

  Attributes:
    vocab_size: rows of their embedding.
    mask_id: their id of the mask. If it is None, row `start_id` is copied to
      the end: an autoregressive network of ours begins a text with the mask.
    separator_id: their id of the token that ends a document.
    start_id: their id of the token that begins one; read if mask_id is None.
    max_length: tokens of the longest text that the network is made for.
    settings: {'section.key': value} for our config, on top of configs/base.py.
    tokenizer: `tokenizer.name` for a folder without a tokenizer.json, or ''.
    spare_ids: number of ids that are neither that tokenizer's nor the mask.
  """

  vocab_size: int
  mask_id: int | None
  separator_id: int
  start_id: int
  max_length: int
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: str = ''
  spare_ids: int = 0

  def __post_init__(self):
    start = 'start_id' if self.mask_id is None else 'mask_id'
    for key in ('vocab_size', 'max_length', 'separator_id', start):
      value, first, end = getattr(self, key), 1, 2**31
      if key.endswith('_id'):
        first, end = 0, self.vocab_size
      if not (isinstance(value, int) and first <= value < end):
        raise InputError(
          f'config.json gives {key}={value!r}, which must be an integer in '
          f'[{first}, {end})'
        )
    if self.mask_id == self.separator_id:
      raise InputError(
        f'config.json gives {self.mask_id} as the mask and as the end of a '
        'document; the mask must have an id of its own'
      )

  @property
  def rows(self) -> np.ndarray:
    """Their row of each of our ids, of which the last is the mask."""
    mask = self.mask_id
    rows = np.arange(self.vocab_size + (mask is None))
    if mask is None:
      rows[-1] = self.start_id
    else:
      rows[[mask, -1]] = rows[[-1, mask]]
    return rows


class Key(NamedTuple):
  """The field of `config.model` that a key of their config.json sets.

  Attributes:
    field: its name.
    default: their value for an absent key or null; None if the key is required.
      A bool or float also converts the value.
    values: {their value: ours}; {} if they are the same.
  """

  field: str
  default: Any = None
  values: Mapping[Any, Any] = {}

  def read(self, config: Config, name: str) -> Any:
    """Returns our value for the key `name` of a config.json."""
    value = self.default if config.get(name) is None else config[name]
    if isinstance(self.default, bool | float):
      value = type(self.default)(value)
    if not self.values:
      return value
    refuse({name: value}, {name: tuple(self.values)})
    return self.values[value]

  def write(self, network: ModelConfig) -> Any:
    """Returns their value for a network; the inverse of `read`."""
    value = getattr(network, RESOLVED.get(self.field, self.field))
    return next((k for k, ours in self.values.items() if ours == value), value)


class Family:
  """A form in which networks are published; most only set these attributes.

  Attributes:
    model_types: values of model_type; an export writes the first.
    architecture: its name in config.json's `architectures`, or ''.
    is_exportable: whether runs can be exported in this form.
    is_stock: whether transformers loads an export without remote code.
    objective: the `objective.name` that the network was trained with.
    has_mask: whether one of their ids is the mask.
    keys: {key of config.json: Key}.
    defaults: {key: value} for other keys that a config.json may leave out.
    required: other keys that config.json must have.
    allowed: {key: values}, the supported values of other keys.
    network: {field of config.model: value}, on top of PLAIN.
    written: {key: value} for an export's config.json.
    length: the key of config.json with the longest text, and its default.
    tokenizer: `Description.tokenizer`.
    names: {our array or module: theirs}, with {top} for the prefix and {layer}
      for the block. Modules of the same name are equal parts of a tensor.
    prefixes: values of {top}; an export uses the first.
    is_transposed: whether their kernels are [out, in], as PyTorch's Linear.
    ignored: regular expressions for tensors that are not weights.
  """

  model_types: tuple[str, ...] = ()
  architecture: str = ''
  is_exportable: bool = True
  is_stock: bool = False
  objective: str = 'masked'
  has_mask: bool = True
  keys: Mapping[str, Key] = {}
  defaults: Mapping[str, Any] = {}
  required: tuple[str, ...] = ()
  allowed: Mapping[str, tuple[Any, ...]] = {}
  network: Mapping[str, Any] = {}
  written: Mapping[str, Any] = {}
  length: tuple[str, int] = ('max_position_embeddings', 2048)
  tokenizer: str = ''
  names: Mapping[str, str] = {}
  prefixes: tuple[str, ...] = ('',)
  is_transposed: bool = True
  ignored: tuple[str, ...] = ()

  def detect(self, config: Config, names: Collection[str]) -> bool:
    """Returns whether a checkpoint with such tensors is of this family."""
    return config.get('model_type') in self.model_types

  def describe(self, config: Config, shapes: Shapes) -> Description:
    """Reads a checkpoint's config.json.

    Raises:
      InputError: a key is missing, or has a value that is not supported.
    """
    config = {**self.defaults, **config}
    needed = [name for name, key in self.keys.items() if key.default is None]
    require(config, *self.required, *needed)
    refuse(config, self.allowed)
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
    return {
      'vocab_size': config['vocab_size'],
      'mask_id': token_id(config, 'mask_token_id') if self.has_mask else None,
      'separator_id': token_id(config, 'eos_token_id', 'bos_token_id'),
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

  def fixed(self, network: ModelConfig) -> dict[str, Any]:
    """Returns {field: the only value with which `network` has this form}."""
    fields = {key.field for key in self.keys.values()}
    fixed = {key: value for key, value in PLAIN.items() if key not in fields}
    if 'num_kv_heads' in fixed:
      # 0 and the number of heads are the same.
      fixed['num_kv_heads'] = network.num_kv_heads and network.num_heads
    return {**fixed, **self.network}

  def misfit(self, network: ModelConfig, objective: str) -> str:
    """Returns what it cannot express of a run with that objective, or ''."""
    allowed = {key: (value,) for key, value in self.fixed(network).items()}
    for key in self.keys.values():
      if key.values:
        allowed[key.field] = tuple(key.values.values())
    found = [
      f'model.{key}={getattr(network, key)!r}'
      for key, values in allowed.items()
      if getattr(network, key) not in values
    ]
    if objective != self.objective:
      found.insert(0, f'objective.name={objective!r}')
    return ', '.join(found)

  def fields(self, network: ModelConfig) -> dict[str, Any]:
    """Returns what `keys` say about a network, for a config.json."""
    return {name: key.write(network) for name, key in self.keys.items()}

  def to_config(self, network: ModelConfig, described: Description) -> Config:
    """Returns the config.json of an export of a network without a `misfit`."""
    # An autoregressive network of ours begins a text with the mask.
    mask = 'mask_token_id' if self.has_mask else 'bos_token_id'
    return {
      'model_type': self.model_types[0],
      **({'architectures': [self.architecture]} if self.architecture else {}),
      'vocab_size': described.vocab_size,
      self.length[0]: described.max_length,
      mask: described.mask_id,
      'eos_token_id': described.separator_id,
      'pad_token_id': described.separator_id,
      **self.fields(network),
      **self.written,
    }


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
        f'config.json: {key}={config[key]!r} is not one of {list(values)}'
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
