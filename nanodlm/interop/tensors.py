"""Tensors of a checkpoint's folder by name, read one at a time.

safetensors files are memory-mapped and hold nothing but numbers. PyTorch's own
files are pickles, which can hold any program: they are read only where that is
asked for, and even then by PyTorch's reader of weights alone.
"""

import contextlib
import functools
import importlib.util
import pathlib
import re
from typing import Any, Protocol

import numpy as np

from nanodlm.training import checkpoint
from nanodlm.types import InputError

SAFETENSORS = '.safetensors'
# What PyTorch, Lightning and plain pickle write.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
# Pickles in a folder that are no weights.
_NOT_WEIGHTS = ('training_args', 'optimizer', 'scheduler', 'rng_state')
# Where a PyTorch file that holds more than weights keeps them.
_NESTED = ('state_dict', 'model', 'module')


class Tensors(Protocol):
  """Arrays by name.

  Attributes:
    where: the file or folder, for messages.
    shapes: {name: shape} of all of them.
  """

  where: str
  shapes: dict[str, tuple[int, ...]]

  def read(self, name: str) -> np.ndarray:
    """One of them, in its own dtype (bfloat16 as ml_dtypes has it)."""

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    """Replaces weights by their averages, where the file holds them beside.

    Args:
      ignored: regular expressions of the names that are no weights.

    Returns:
      Whether it did.
    """


class SafeTensors:
  """The safetensors files of a folder, or one such file."""

  def __init__(self, paths: list[pathlib.Path], where: str):
    require('safetensors')
    import safetensors  # pylint: disable=g-import-not-at-top

    self.where, self.shapes, self._files = where, {}, {}
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
      twice = sorted(set(shapes) & set(self.shapes))
      if twice:
        raise InputError(f'{where} holds {twice} in more than one file')
      self.shapes.update(shapes)
      self._files.update(dict.fromkeys(shapes, file))

  def read(self, name: str) -> np.ndarray:
    return self._files[name].get_tensor(name)

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    return False


class TorchTensors:
  """PyTorch's files, read as weights only, memory-mapped where they can be.

  Attributes:
    rest: what else the first file holds, as Lightning's 'ema'; {} if nothing.
  """

  def __init__(self, paths: list[pathlib.Path], where: str):
    require('torch')
    import torch  # pylint: disable=g-import-not-at-top

    self.where, self.shapes, self._tensors, self.rest = where, {}, {}, {}
    for path in paths:
      try:
        with _inert(path):
          loaded = torch.load(
            path, map_location='cpu', weights_only=True, mmap=is_zip(path)
          )
      # The reader of weights raises UnpicklingError for anything that could be a
      # program, and others for damage.
      except Exception as error:  # pylint: disable=broad-exception-caught
        raise InputError(
          f'{path} is not a file of weights alone: '
          f'{(str(error).strip().splitlines() or [repr(error)])[0]}. Nothing else is unpickled'
        ) from error
      for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
          self.rest = self.rest or {k: v for k, v in loaded.items() if k != key}
          loaded = loaded[key]
          break
      if not isinstance(loaded, dict):
        raise InputError(
          f'{path} holds {type(loaded).__name__}, not tensors by name'
        )
      self._tensors.update(
        (name, tensor)
        for name, tensor in loaded.items()
        if isinstance(tensor, torch.Tensor)
      )
    self.shapes = {
      name: tuple(tensor.shape) for name, tensor in self._tensors.items()
    }

  def read(self, name: str) -> np.ndarray:
    return as_numpy(self._tensors[name])

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    # As torch_ema has them, and SEDD, MDLM, BD3-LM and Duo after it: a list, in
    # the order of the parameters.
    average = self.rest.get('ema')
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
        f'{self.where}: its averaged weights (ema) are not of the '
        'shapes of its weights, in their order'
      )
    self._tensors.update(zip(names, shadows))
    return True


class Inert:
  """Stands for an object of another class in a file of weights: does nothing."""

  def __init__(self, *args: Any, **kwargs: Any):
    del args, kwargs

  def __setstate__(self, state: Any):
    del state


# Whose classes Lightning's files hold beside the weights: settings, a tokenizer.
_SETTINGS = re.compile(
  r'(omegaconf|transformers|tokenizers|lightning|pytorch_lightning|dataloader)\..*'
  r'|typing\.Any|collections\.defaultdict'
  r'|builtins\.(dict|list|tuple|set|int|float|str|bool)'
)


@contextlib.contextmanager
def _inert(path: pathlib.Path):
  """Has `torch.load` put `Inert` for the settings in a file of weights.

  Their classes are neither imported nor called; any others still make the reader
  of weights refuse the file.
  """
  import torch  # pylint: disable=g-import-not-at-top

  if not is_zip(path):
    yield
    return
  unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
  # One class for each: the reader tells them apart by it.
  stubs = [
    (type('Inert', (Inert,), {}), name)
    for name in unknown
    if _SETTINGS.fullmatch(name)
  ]
  with torch.serialization.safe_globals(stubs):
    yield


class OrbaxTensors:
  """The parameters in a training state that Orbax saved, the averaged if any."""

  def __init__(self, folder: pathlib.Path, where: str):
    self.where = where
    tree = checkpoint.foreign_metadata(folder)
    named = [name for name in ('ema_params', 'params') if tree.get(name)]
    if not named:
      raise InputError(f'{folder} holds {sorted(tree)}: no params')
    self._folder, self._item = folder, named[0]
    self.is_averaged = self._item == 'ema_params'
    self.shapes = {
      name: tuple(leaf.shape)
      for name, leaf in checkpoint.flatten(tree[self._item]).items()
    }

  @functools.cached_property
  def _arrays(self):
    return checkpoint.flatten(
      checkpoint.restore_foreign(self._folder, self._item)
    )

  def read(self, name: str) -> np.ndarray:
    return self._arrays[name]

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    return self.is_averaged


def as_numpy(tensor: Any) -> np.ndarray:
  """A PyTorch tensor's values; bfloat16, which NumPy has not, as float32."""
  import torch  # pylint: disable=g-import-not-at-top

  if tensor.dtype == torch.bfloat16:
    tensor = tensor.float()
  return tensor.detach().cpu().numpy()


def is_zip(path: pathlib.Path) -> bool:
  """Whether PyTorch's file is of the kind that can be memory-mapped."""
  with open(path, 'rb') as file:
    return file.read(2) == b'PK'


def require(package: str):
  """Raises InputError where an optional package is not installed."""
  if importlib.util.find_spec(package) is None:
    extra = 'judge' if package == 'torch' else 'hub'
    raise InputError(
      f"this needs the {package} package: pip install -e '.[{extra}]'"
    )


def open_tensors(path: pathlib.Path, allow_pickle: bool) -> Tensors:
  """The weights in a folder, or in one file.

  safetensors are preferred where there are both.

  Raises:
    InputError: there are none, or only pickles, which were not allowed.
  """
  orbax = checkpoint.find_foreign(path)
  if orbax is not None:
    return OrbaxTensors(orbax, str(path))
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
      f'--from={str(path)!r} holds no weights: no *{SAFETENSORS} '
      f'and none of {list(PICKLES)}'
    )
  if not allow_pickle:
    raise InputError(
      f'--from={str(path)!r} holds weights only as {pickles[0].name}, a pickle: '
      'such a file can run any program when it is read. Give a safetensors '
      'file, or --allow_pickle, where you trust its source (then too it is read '
      'as weights only)'
    )
  return TorchTensors(pickles, str(path))
