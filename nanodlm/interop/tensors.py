"""The tensors of a checkpoint by name, read one at a time.

safetensors files are memory-mapped and contain nothing but numbers. PyTorch's
own files are pickles, which can contain any program: they are read only on
request, and even then by PyTorch's reader for weights alone.
"""

import abc
from collections.abc import Callable, Iterable
import functools
import importlib.util
import logging
import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nanodlm import workdir as workdirs
from nanodlm.training import checkpoint
from nanodlm.types import InputError, reason

log = logging.getLogger('nanodlm')

SAFETENSORS = '.safetensors'
# The files that transformers reads, in this order, or their indices.
SINGLE = ('model.safetensors', 'pytorch_model.bin')
# What PyTorch, Lightning and plain pickle write.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
# Files in a folder that do not hold the weights of a whole network.
_NOT_WEIGHTS = (
  'adapter',
  'training_args',
  'optimizer',
  'scheduler',
  'rng_state',
)
# The types of numbers that are read, as the formats name them.
_FLOATS = re.compile(r'(torch\.)?b?f(loat)?(16|32|64)', re.IGNORECASE)
# The entry with the weights in a PyTorch file that holds other things too.
_NESTED = ('state_dict', 'model', 'module')
# The item with the parameters in an Orbax checkpoint of a training state.
_ITEM = 'train_state'
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
    dtypes: {name: type of the numbers, as the format calls it}.
  """

  def __init__(self, where: str):
    self.where = where
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}

  def weights(self, ignored: tuple[str, ...]) -> list[str]:
    """Returns the names that none of these regular expressions matches."""
    is_ignored = lambda name: any(re.fullmatch(one, name) for one in ignored)
    return [name for name in self.shapes if not is_ignored(name)]

  def check_dtypes(self, names: Iterable[str]):
    """Raises InputError if an array does not hold floating-point numbers."""
    wrong = [name for name in names if not _FLOATS.fullmatch(self.dtypes[name])]
    if wrong:
      raise InputError(
        f'{self.where}: tensor {wrong[0]} holds {self.dtypes[wrong[0]]} '
        f'({len(wrong)} such tensors): quantised weights are not supported, '
        'only floating-point numbers of 16 to 64 bits'
      )

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """Returns an array in its own dtype (bfloat16 is that of ml_dtypes)."""

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    """Takes averages for the weights, all but `ignored`; whether there are."""
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
        slices = {name: file.get_slice(name) for name in file.keys()}
      except (OSError, safetensors.SafetensorError) as error:
        hint = ''
        if path.stat().st_size < 1000 and b'git-lfs' in path.read_bytes():
          hint = '. It is a pointer of Git LFS: run `git lfs pull` there'
        raise InputError(
          f'{path} is not a whole safetensors file: {reason(error)}{hint}'
        ) from error
      if twice := sorted(set(slices) & set(self.shapes)):
        raise InputError(f'{where} holds {twice} in more than one file')
      for name, part in slices.items():
        self.shapes[name] = tuple(part.get_shape())
        self.dtypes[name] = part.get_dtype()
        self._files[name] = file

  def read(self, name: str) -> np.ndarray:
    return self._files[name].get_tensor(name)


class TorchTensors(Tensors):
  """PyTorch's files, read as weights only, memory-mapped if possible."""

  def __init__(self, paths: list[pathlib.Path], where: str):
    super().__init__(where)
    # Lightning's and the projects' own files hold more than weights.
    self._tensors, self._average = {}, None
    for path in paths:
      loaded = _load_weights(path)
      nested = [loaded[k] for k in _NESTED if isinstance(loaded.get(k), dict)]
      found = nested[0] if nested else loaded
      self._tensors |= {k: x for k, x in found.items() if hasattr(x, 'detach')}
      self._average = self._average or (nested and loaded.get('ema'))
    self.shapes = {name: tuple(x.shape) for name, x in self._tensors.items()}
    self.dtypes = {name: str(x.dtype) for name, x in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name].detach().cpu()
    # PyTorch does not convert bfloat16 to NumPy.
    is_bfloat16 = str(tensor.dtype) == 'torch.bfloat16'
    return (tensor.float() if is_bfloat16 else tensor).numpy()

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    # torch_ema, which SEDD, MDLM, BD3-LM and Duo use, keeps a list in the order
    # of the parameters.
    average = self._average
    if not isinstance(average, dict) or 'shadow_params' not in average:
      return False
    names, shadows = self.weights(ignored), average['shadow_params']
    if [tuple(x.shape) for x in shadows] != [self.shapes[n] for n in names]:
      raise InputError(
        f'{self.where}: the averaged weights (ema) are not of the shapes of '
        'the weights, in their order'
      )
    self._tensors.update(zip(names, shadows))
    return True


def _load_weights(path: pathlib.Path) -> dict[str, Any]:
  """Loads a file of PyTorch's with inert objects in place of the settings.

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
    ignore = lambda self, *args: None
    inert = {'__init__': ignore, '__setstate__': ignore}
    stubs = [
      (type('Inert', (), inert), name)
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
    self._folder = folder.absolute()
    found: Any = self._use(lambda reader: reader.metadata(self._folder))
    tree = found.item_metadata.tree
    items = [name for name in ('ema_params', 'params') if tree.get(name)]
    if not items:
      raise InputError(f'{folder} holds {sorted(tree)}, but no params')
    self._tree = {items[0]: tree[items[0]]}
    leaves = checkpoint.flatten(tree[items[0]])
    self.shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    self.dtypes = {name: str(leaf.dtype) for name, leaf in leaves.items()}

  @functools.cached_property
  def _arrays(self):
    types = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), self._tree)
    args = ocp.args.PyTreeRestore(
      item=self._tree, restore_args=types, partial_restore=True
    )
    read = lambda reader: reader.restore(self._folder, args=args)
    (params,) = self._use(read).values()
    return checkpoint.flatten(params)

  def _use(self, call: Callable[[ocp.PyTreeCheckpointer], Any]) -> Any:
    with ocp.PyTreeCheckpointer() as reader:
      try:
        return call(reader)
      # Orbax raises nothing narrower for data that cannot be read.
      except Exception as error:
        raise InputError(
          f'{self.where} cannot be read: {reason(error)}'
        ) from error

  def read(self, name: str) -> np.ndarray:
    return self._arrays[name]

  def take_averages(self, ignored: tuple[str, ...]) -> bool:
    return 'ema_params' in self._tree


def _find_state(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of a training state of Orbax, or None.

  `path` may be that folder, the checkpoint that it is an item of, the folder of
  the checkpoints, of which the last is used, or a workdir.
  """
  folders = [path]
  for parent in (path, path / workdirs.CHECKPOINTS):
    last = [str(step) for step in checkpoint.complete_steps(parent)[-1:]]
    folders.append(parent.joinpath(*last, _ITEM))
  return next((f for f in folders if (f / '_METADATA').is_file()), None)


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]):
  """Writes arrays by name as a safetensors file."""
  from safetensors import numpy as safetensors

  path.touch()
  mode = path.stat().st_mode
  safetensors.save_file(arrays, path, metadata={'format': 'pt'})
  # safetensors makes files that only their owner can read.
  path.chmod(mode)


def require(package: str):
  """Raises InputError if an optional package is not installed."""
  if importlib.util.find_spec(package) is None:
    extra = 'judge' if package == 'torch' else 'hub'
    raise InputError(
      f"the package {package} is not installed: pip install -e '.[{extra}]'"
    )


def files_in(index: pathlib.Path) -> list[str]:
  """Returns the names of the files in an index of transformers."""
  names = workdirs.read_json(index).get('weight_map')
  if not isinstance(names, dict) or not all(
    isinstance(name, str) for name in names.values()
  ):
    raise InputError(f'{index}: weight_map={names!r} is not {{tensor: file}}')
  return sorted(set(names.values()))


def find_weights(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that transformers would read, or else the only ones.

  Raises:
    InputError: there are none, or several that may hold different weights.
  """
  for name in SINGLE:
    if (folder / name).is_file():
      return [folder / name]
    if (index := folder / f'{name}.index.json').is_file():
      paths = [folder / file for file in files_in(index)]
      if missing := [path.name for path in paths if not path.is_file()]:
        raise InputError(f'{index} names files that are missing: {missing}')
      return paths
  for ends in ((SAFETENSORS,), PICKLES):
    paths = [
      path
      for path in sorted(folder.iterdir())
      if path.suffix in ends and not path.name.startswith(_NOT_WEIGHTS)
    ]
    whole = re.compile(rf'(pytorch_)?model-\d+-of-0*{len(paths)}\{ends[0]}')
    if len(paths) == 1 or paths and all(whole.match(p.name) for p in paths):
      return paths
    if paths:
      raise InputError(
        f'--from={str(folder)!r} holds {[path.name for path in paths]}, and '
        f'neither {SINGLE[0]} nor its index: name one of the files in --from'
      )
  hint = ''
  if adapters := sorted(path.name for path in folder.glob('adapter*')):
    hint = f'. {adapters} belong to an adapter: merge it into its network first'
  raise InputError(
    f'--from={str(folder)!r} does not hold weights: neither *{SAFETENSORS} nor '
    f'{list(PICKLES)}{hint}'
  )


def open_tensors(path: pathlib.Path, allow_pickle: bool) -> Tensors:
  """Opens the weights in a folder, or in one file.

  If there are both, safetensors are used and not pickles.

  Raises:
    InputError: weights are missing, or are pickles without `allow_pickle`.
  """
  if state := _find_state(path):
    return OrbaxTensors(state)
  paths = [path]
  if path.is_dir():
    paths = find_weights(path)
    ends = (SAFETENSORS, *PICKLES)
    others = {file.name for file in path.iterdir() if file.suffix in ends}
    if others := sorted(others - {file.name for file in paths}):
      log.info('%s: these files are not read: %s', path, others)
  if paths[0].suffix == SAFETENSORS:
    return SafeTensors(paths, str(path))
  if not allow_pickle:
    raise InputError(
      f'--from={str(path)!r} has weights only in {paths[0].name}, a pickle: '
      'such a file can run any program when it is read. Give a safetensors '
      'file, or --allow_pickle if you trust its source (it is then read as '
      'weights only)'
    )
  return TorchTensors(paths, str(path))
