"""The tensors of a checkpoint by name, read one at a time.

safetensors files are memory-mapped and contain nothing but numbers. PyTorch's
own files are pickles, which can contain any program: they are read only on
request, and even then by PyTorch's reader for weights alone.
"""

import abc
import functools
import importlib.util
import pathlib
import re
from typing import Any

import numpy as np

from nanodlm.interop import orbax
from nanodlm.training import checkpoint
from nanodlm.types import InputError

SAFETENSORS = '.safetensors'
# What PyTorch, Lightning and plain pickle write.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
# Pickles in a folder that do not hold weights.
_NOT_WEIGHTS = ('training_args', 'optimizer', 'scheduler', 'rng_state')
# The entry with the weights in a PyTorch file that holds other things too.
_NESTED = ('state_dict', 'model', 'module')
# Classes of the settings and tokenizers in Lightning's files.
_SETTINGS = re.compile(
  r'(omegaconf|transformers|tokenizers|lightning|pytorch_lightning|dataloader)'
  r'\..*|typing\.Any|collections\.defaultdict'
  r'|builtins\.(dict|list|tuple|set|int|float|str|bool)'
)


class Tensors(abc.ABC):
  """Arrays by name.

  Attributes:
    where: the file or folder, for messages.
    shapes: {name: shape} of all of them.
  """

  def __init__(self, where: str):
    self.where = where
    self.shapes: dict[str, tuple[int, ...]] = {}

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """Returns an array in its own dtype (bfloat16 is that of ml_dtypes)."""

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    """Replaces the weights by their averages if the file holds both.

    Args:
      ignored: regular expressions for the names that are not weights.

    Returns:
      Whether the arrays are averages.
    """
    del ignored
    return False


class SafeTensors(Tensors):
  """The safetensors files of a folder, or one such file."""

  def __init__(self, paths: list[pathlib.Path], where: str):
    super().__init__(where)
    require('safetensors')
    import safetensors

    self._files = {}
    for path in paths:
      try:
        file = safetensors.safe_open(path, framework='numpy')
        shapes = {
          name: tuple(file.get_slice(name).get_shape()) for name in file.keys()
        }
      except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
          f'{path} is not a whole safetensors file: {error}'
        ) from error
      if twice := sorted(set(shapes) & set(self.shapes)):
        raise InputError(f'{where} holds {twice} in more than one file')
      self.shapes.update(shapes)
      self._files.update(dict.fromkeys(shapes, file))

  def read(self, name: str) -> np.ndarray:
    return self._files[name].get_tensor(name)


class TorchTensors(Tensors):
  """PyTorch's files, read as weights only, memory-mapped if possible."""

  def __init__(self, paths: list[pathlib.Path], where: str):
    super().__init__(where)
    # What else the first file holds, such as Lightning's 'ema'.
    self._tensors, self._rest = {}, {}
    for path in paths:
      loaded = _load_weights(path)
      for key in _NESTED:
        if isinstance(loaded.get(key), dict):
          rest = {name: x for name, x in loaded.items() if name != key}
          self._rest = self._rest or rest
          loaded = loaded[key]
          break
      # Other entries are not tensors.
      self._tensors |= {k: x for k, x in loaded.items() if hasattr(x, 'detach')}
    self.shapes = {name: tuple(x.shape) for name, x in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name].detach().cpu()
    # PyTorch does not convert bfloat16 to NumPy.
    is_bfloat16 = str(tensor.dtype) == 'torch.bfloat16'
    return (tensor.float() if is_bfloat16 else tensor).numpy()

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    # torch_ema, which SEDD, MDLM, BD3-LM and Duo use, keeps a list in the order
    # of the parameters.
    average = self._rest.get('ema')
    if not isinstance(average, dict) or 'shadow_params' not in average:
      return False
    names = [
      name
      for name in self._tensors
      if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    shadows = average['shadow_params']
    if [tuple(x.shape) for x in shadows] != [self.shapes[n] for n in names]:
      raise InputError(
        f'{self.where}: the averaged weights (ema) are not of the shapes of '
        'the weights, in their order'
      )
    self._tensors.update(zip(names, shadows))
    return True


class _Inert:
  """Replaces an object of another class in a file of weights; does nothing."""

  def __init__(self, *args: Any, **kwargs: Any):
    del args, kwargs

  def __setstate__(self, state: Any):
    del state


def _load_weights(path: pathlib.Path) -> dict[str, Any]:
  """Loads a file of PyTorch's with `_Inert` objects in place of the settings.

  The classes of the settings are neither imported nor called; any other class
  makes the reader refuse the file.
  """
  require('torch')
  import torch  # pyright: ignore[reportMissingImports]  # An extra.

  try:
    with open(path, 'rb') as file:
      is_zip = file.read(2) == b'PK'
    find = torch.serialization.get_unsafe_globals_in_checkpoint
    # The reader distinguishes the classes: each one needs its own replacement.
    stubs = [
      (type('Inert', (_Inert,), {}), name)
      for name in (find(path) if is_zip else ())
      if _SETTINGS.fullmatch(name)
    ]
    with torch.serialization.safe_globals(stubs):
      # Only the zip format can be memory-mapped.
      loaded = torch.load(
        path, map_location='cpu', weights_only=True, mmap=is_zip
      )
  # It raises UnpicklingError for anything that could be a program, and other
  # errors for damage.
  except Exception as error:
    why = (str(error).strip().splitlines() or [repr(error)])[0]
    raise InputError(
      f'{path} is not a file of weights alone, and nothing else is unpickled: '
      f'{why}'
    ) from error
  if not isinstance(loaded, dict):
    raise InputError(
      f'{path} holds {type(loaded).__name__}, not tensors by name'
    )
  return loaded


class OrbaxTensors(Tensors):
  """The parameters in a training state of Orbax, averages if it has any."""

  def __init__(self, folder: pathlib.Path):
    super().__init__(str(folder))
    tree = orbax.metadata(folder)
    items = [name for name in ('ema_params', 'params') if tree.get(name)]
    if not items:
      raise InputError(f'{folder} holds {sorted(tree)}, but not params')
    self._folder, self._item = folder, items[0]
    leaves = checkpoint.flatten(tree[self._item])
    self.shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}

  @functools.cached_property
  def _arrays(self):
    return checkpoint.flatten(orbax.restore(self._folder, self._item))

  def read(self, name: str) -> np.ndarray:
    return self._arrays[name]

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    return self._item == 'ema_params'


def require(package: str):
  """Raises InputError if an optional package is not installed."""
  if importlib.util.find_spec(package) is None:
    extra = 'judge' if package == 'torch' else 'hub'
    raise InputError(
      f"the package {package} is not installed: pip install -e '.[{extra}]'"
    )


def open_tensors(path: pathlib.Path, allow_pickle: bool) -> Tensors:
  """Opens the weights in a folder, or in one file.

  If there are both, safetensors are used and not pickles.

  Raises:
    InputError: weights are missing, or are pickles without `allow_pickle`.
  """
  state = orbax.find(path)
  if state is not None:
    return OrbaxTensors(state)
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  safe = [file for file in files if file.suffix == SAFETENSORS]
  if safe:
    return SafeTensors(safe, str(path))
  pickles = [
    file
    for file in files
    if file.suffix in PICKLES and not file.name.startswith(_NOT_WEIGHTS)
  ]
  if not pickles:
    raise InputError(
      f'--from={str(path)!r} does not hold weights: neither *{SAFETENSORS} nor '
      f'{list(PICKLES)}'
    )
  if not allow_pickle:
    raise InputError(
      f'--from={str(path)!r} has weights only in {pickles[0].name}, a pickle: '
      'such a file can run any program when it is read. Give a safetensors '
      'file, or --allow_pickle if you trust its source (it is then read as '
      'weights only)'
    )
  return TorchTensors(pickles, str(path))
