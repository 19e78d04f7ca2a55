"""Checkpoints in: a published checkpoint becomes a workdir like any other.

What differs between families stands in `families`; here is what is the same.
Tensors are read one after the other into parameters that lie in files, mapped into
memory: of a large checkpoint a tensor and what is being compressed are held at a
time, and pages that the system can take back.
"""

import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
from ml_collections import config_dict
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate
from nanodlm.data import tokenizers
from nanodlm.interop import tensors as tensor_files
from nanodlm.interop.families import FAMILIES
from nanodlm.interop.families import layout as layouts
from nanodlm.model.config import ModelConfig, num_params
from nanodlm.training import checkpoint
from nanodlm.training import state as states
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

HF_CONFIG = 'config.json'
HF_TOKENIZER = 'tokenizer.json'
# The folder of an export that says all of a run, and its file with the family.
OWN, ORIGIN = 'nanodlm', 'origin.json'
# What a snapshot of the hub is asked for.
_WANTED = ('*.json', '*.safetensors', '*.model')
# The canvas of an imported network, where its texts may be longer: `data.length`.
_LENGTH = 1024


def import_checkpoint(
  source: str,
  workdir: str,
  *,
  family: str = '',
  allow_pickle: bool = False,
  changes: dict[str, Any] | None = None,
):
  """--mode=import: writes a workdir with the weights of a published checkpoint.

  It can be evaluated, sampled from and named in checkpoint.init_from.

  Args:
    source: a folder, a file of weights, or 'ORGANISATION/NAME' on the hub.
    workdir: to write; must be new or empty.
    family: one of FAMILIES; '' is detected.
    allow_pickle: see `tensors.open_tensors`.
    changes: {'section.key': value}, of the config on top of the family's.

  Raises:
    InputError: the checkpoint will not do, and why. Nothing is left then.
  """
  with tempfile.TemporaryDirectory() as scratch:
    _import_checkpoint(
      source,
      workdir,
      family,
      allow_pickle,
      changes or {},
      pathlib.Path(scratch),
    )


def _import_checkpoint(
  source: str,
  workdir: str,
  family: str,
  allow_pickle: bool,
  changes: dict[str, Any],
  scratch: pathlib.Path,
):
  """`import_checkpoint`, with an empty folder for what is needed meanwhile."""
  target = pathlib.Path(workdir)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise InputError(
      f'--workdir={workdir!r} is not empty; what is there is never '
      'overwritten. Give a new one'
    )
  if family and family not in FAMILIES:
    raise InputError(f'--family={family!r} is not one of {sorted(FAMILIES)}')
  folder = find_source(source, allow_pickle)
  foreign = read_config(folder)
  tensors = tensor_files.open_tensors(folder, allow_pickle)
  own = folder / OWN
  if (own / ORIGIN).is_file():
    asked, (family, config, tokenizer, described) = family, read_own(own)
    if asked not in ('', family):
      raise InputError(
        f'--family={asked!r}: {source!r} is an export of this project, '
        f'as {family!r}; leave --family out'
      )
    _update(config, changes or {})
  else:
    family = family or detect(foreign, tensors)
    described = describe(family, foreign, tensors)
    config = configs.load_base()
    config.data.length = min(described.max_length, _LENGTH)
    _update(config, described.settings)
    _update(config, changes or {})
    tokenizer = make_tokenizer(
      config,
      described,
      folder,
      is_given=any(key.startswith('tokenizer.') for key in changes or ()),
      path=find_tokenizer(FAMILIES[family], folder, scratch),
    )
  config.tokenizer.update(
    name=tokenizers.RUN, path=os.path.abspath(workdir), vocab_size=0
  )
  configs.validate(config, changes or ())
  network = configs.make_model(config, tokenizer.vocab_size)
  layout = FAMILIES[family].layout(network, tensors.shapes)
  check_names(network, tensors, layout)
  if tensors.take_averages(layout.ignored):
    log.info('%s holds averaged weights (EMA): those are taken', tensors.where)
  target.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(
    tempfile.mkdtemp(prefix=f'{target.name}.incomplete-', dir=target.parent)
  )
  try:
    mapped = work / 'mapped'
    mapped.mkdir()
    params = read_params(
      network,
      configs.make_objective(config, tokenizer.mask_id),
      tensors,
      layout,
      described,
      mapped,
    )
    tokenizers.save(tokenizer, work)
    (work / evaluate.CONFIG_FILE).write_text(configs.to_json(config))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    with checkpoint.open_manager(
      str(work), concurrent_gb=largest // 10**9 + 1
    ) as manager:
      checkpoint.save_params(
        manager, params, config, {'imported': family, 'source': source}
      )
      checkpoint.wait(manager)
    shutil.rmtree(mapped)
    work.chmod(0o777 & ~umask())
    work.replace(target)
  finally:
    shutil.rmtree(work, ignore_errors=True)
  log.info(
    'imported %s as %s: %s parameters, %d ids, into %s',
    source,
    family,
    f'{num_params(params):,}',
    tokenizer.vocab_size,
    workdir,
  )


def read_own(
  own: pathlib.Path,
) -> tuple[
  str, config_dict.ConfigDict, tokenizers.Tokenizer, layouts.Description
]:
  """What the folder `nanodlm` of an export says: nothing is guessed.

  Returns:
    The family, the run's config, its tokenizer, and its vocabulary as a family
    describes it.
  """
  try:
    family = json.loads((own / ORIGIN).read_text())['family']
    text = (own / evaluate.CONFIG_FILE).read_text()
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{own} cannot be read: {error!r}') from error
  if family not in list(FAMILIES):  # which may be no text
    raise InputError(
      f'{own / ORIGIN}: family={family!r} is not one of {sorted(FAMILIES)}'
    )
  config = configs.from_json(text, configs.load_base(), str(own))
  tokenizer = tokenizers.load(own)
  separator = tokenizer.separator_id
  return (
    family,
    config,
    tokenizer,
    layouts.Description(
      settings={},
      vocab_size=tokenizer.vocab_size,
      mask_id=mask_place(tokenizer),
      separator_id=separator,
      start_id=separator,
      max_length=config.data.length,
    ),
  )


def mask_place(tokenizer: tokenizers.Tokenizer) -> int:
  """The mask's id in the file that the tokenizer came from."""
  if isinstance(tokenizer, tokenizers.HuggingFaceTokenizer):
    return tokenizer.mask_place
  return tokenizer.mask_id


def umask() -> int:
  """The permissions that new files of this process do not get."""
  mask = os.umask(0)
  os.umask(mask)
  return mask


def _update(config: config_dict.ConfigDict, settings: dict[str, Any]):
  for key, value in settings.items():
    section, _, leaf = key.rpartition('.')
    configs.set_value(config[section] if section else config, leaf, value, key)


def find_source(source: str, allow_pickle: bool) -> pathlib.Path:
  """The folder or file of `source`, downloaded where it is a name on the hub.

  Raises:
    InputError: there is no such folder, and no such name or no network.
  """
  path = pathlib.Path(source)
  if path.exists():
    return path
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', source):
    raise InputError(
      f'--from={source!r} is no folder or file, and no name on the '
      "Hugging Face hub, 'ORGANISATION/NAME'"
    )
  tensor_files.require('huggingface_hub')
  import huggingface_hub  # pylint: disable=g-import-not-at-top
  from huggingface_hub import constants  # pylint: disable=g-import-not-at-top

  endpoint = constants.ENDPOINT
  is_online = tokenizers.is_reachable(endpoint)
  wanted = [
    *_WANTED,
    *(f'*{end}' for end in tensor_files.PICKLES if allow_pickle),
  ]
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        source, allow_patterns=wanted, local_files_only=not is_online
      )
    )
  # What it raises has several bases, OSError and ValueError among them.
  except Exception as error:  # pylint: disable=broad-exception-caught
    why = (
      str(error).strip().split('\n', maxsplit=1)[0]
      if is_online
      else (f'it was not downloaded before and {endpoint} does not answer')
    )
    raise InputError(
      f'--from={source!r} is no folder here, and cannot be had from '
      f'the Hugging Face hub: {why}'
    ) from error


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The config.json beside the weights, {} where there is none."""
  path = (folder if folder.is_dir() else folder.parent) / HF_CONFIG
  if not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path} cannot be read: {error}') from error
  if not isinstance(config, dict):
    raise InputError(f'{path} is not a config but {type(config).__name__}')
  return config


def detect(foreign: dict[str, Any], tensors: tensor_files.Tensors) -> str:
  """The family of a checkpoint; InputError with the known ones where none is."""
  for name, family in FAMILIES.items():
    if family.detect(foreign, tensors.shapes):
      return name
  raise InputError(
    f'--from={tensors.where!r} is of no known family (model_type='
    f'{foreign.get("model_type")!r} in its config.json); known: '
    f'{sorted(FAMILIES)}. --family=NAME reads it as one of them'
  )


def describe(
  family: str, foreign: dict[str, Any], tensors: tensor_files.Tensors
) -> layouts.Description:
  """What a family reads from config.json.

  Raises:
    InputError: a value is of another type, an id is none of the vocabulary, or the
      family has what our network has not.
  """
  try:
    described = FAMILIES[family].describe(foreign, tensors.shapes)
  except InputError:
    raise
  # Lists may be empty and numbers too large.
  except (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
  ) as error:
    raise InputError(
      f'{tensors.where}: config.json cannot be read as one of family '
      f'{family!r}: {error!r}'
    ) from error
  for key in ('vocab_size', 'max_length'):
    value = getattr(described, key)
    if not isinstance(value, int) or value < 1:
      raise InputError(
        f'{tensors.where}: config.json gives {key}={value!r}, which '
        'must be an integer >= 1'
      )
  has_mask = described.mask_id is not None
  for key in ('separator_id', 'mask_id' if has_mask else 'start_id'):
    value = getattr(described, key)
    if not isinstance(value, int) or not 0 <= value < described.vocab_size:
      raise InputError(
        f'{tensors.where}: config.json gives {key}={value!r}, which '
        f'is not in [0, {described.vocab_size}), its ids'
      )
  if described.mask_id == described.separator_id:
    raise InputError(
      f'{tensors.where}: config.json gives {described.mask_id} as the '
      'mask and as the end of a document; the mask is an id of its own'
    )
  return described


def find_tokenizer(
  family: Any, folder: pathlib.Path, scratch: pathlib.Path
) -> pathlib.Path | None:
  """The tokenizer.json beside the weights, or one made in `scratch`, if any."""
  folder = folder if folder.is_dir() else folder.parent
  if (folder / HF_TOKENIZER).is_file():
    return folder / HF_TOKENIZER
  try:
    content = (
      family.tokenizer_json(folder)
      if hasattr(family, 'tokenizer_json')
      else None
    )
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f'the tokenizer in {folder} cannot be read: {error!r}'
    ) from error
  if content is None:
    return None
  (scratch / HF_TOKENIZER).write_text(json.dumps(content))
  return scratch / HF_TOKENIZER


def make_tokenizer(
  config: config_dict.ConfigDict,
  described: layouts.Description,
  folder: pathlib.Path,
  is_given: bool,
  path: pathlib.Path | None,
) -> tokenizers.Tokenizer:
  """The tokenizer of an imported checkpoint, of just its vocabulary.

  Its tokenizer.json at `path`; or, where `is_given`, that of config.tokenizer; or, where
  there is no such file, the family's.
  """
  has_mask = described.mask_id is not None
  vocab_size = described.vocab_size + (not has_mask)
  place = described.mask_id if has_mask else vocab_size - 1
  if path and not is_given:
    return tokenizers.load_hugging_face(
      str(path),
      vocab_size,
      place,
      moved(described.separator_id, place, vocab_size),
    )
  if not is_given and not described.tokenizer:
    raise InputError(
      f'there is no {HF_TOKENIZER} in {folder}; name a tokenizer of '
      f'{vocab_size} ids by --config.tokenizer.name'
    )
  if not is_given:
    config.tokenizer.name = described.tokenizer
  tokenizer = tokenizers.make_tokenizer(config.tokenizer)
  if described.spare_ids and not is_given:
    tokenizer = tokenizers.with_spare_ids(tokenizer, described.spare_ids)
  if tokenizer.vocab_size != vocab_size:
    raise InputError(
      f'tokenizer.name={config.tokenizer.name!r} has {tokenizer.vocab_size} ids '
      f'with the mask; the checkpoint is of another vocabulary, {vocab_size}'
    )
  return tokenizer


def moved(i: int, mask_place: int, vocab_size: int) -> int:
  """Our id for their id i: the mask and the last id change places."""
  return {mask_place: vocab_size - 1, vocab_size - 1: mask_place}.get(i, i)


def read_params(
  network: ModelConfig,
  objective: Any,
  tensors: tensor_files.Tensors,
  layout: layouts.Layout,
  described: layouts.Description,
  mapped: pathlib.Path,
) -> Any:
  """The parameters, float32, on the CPU, one leaf after the other.

  Args:
    network: the network.
    objective: what it is trained with, which may have parameters too.
    tensors: the checkpoint's, of the names that `check_names` asks for.
    layout: where each parameter stands.
    described: the vocabulary.
    mapped: an empty folder for the files that the arrays lie in.

  Raises:
    InputError: a tensor has another shape.
  """
  shapes = jax.eval_shape(
    lambda: states.init_params(network, objective, jax.random.key(0))
  )
  cpu = jax.devices('cpu')[0]

  def leaf(path, shape):
    names = [part.key for part in path]
    array = np.lib.format.open_memmap(
      mapped / f'{".".join(names)}.npy', 'w+', np.float32, shape=shape.shape
    )
    block, path = _split_path(names)
    if block is None:
      array[...] = _read(
        tensors, layout.ends[path], None, shape.shape, described
      )
    elif block == 'last_layer':
      array[...] = _read(
        tensors,
        layout.block[path],
        network.num_layers - 1,
        shape.shape,
        described,
      )
    else:
      for i in range(network.num_layers - 1):
        array[i] = _read(
          tensors, layout.block[path], i, shape.shape[1:], described
        )
    return jax.device_put(array, cpu)

  paths = {
    _split_path([part.key for part in path])
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
  }
  unknown = sorted(
    path
    for block, path in paths
    if path not in (layout.ends if block is None else layout.block)
  )
  if unknown:
    raise InputError(
      f"the network has parameters that the checkpoint's family has "
      f'not: {unknown}'
    )
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def _split_path(names: list[str]) -> tuple[str | None, str]:
  """('layers' | 'last_layer' | None, the path inside it)."""
  if names[0] in ('layers', 'last_layer'):
    return names[0], '/'.join(names[1:])
  return None, '/'.join(names)


def name_of(piece: layouts.Piece, layer: int | None) -> str:
  """The tensor that a piece is of, in this layer."""
  return piece.name.replace(layouts.LAYER, str(layer))


def _read(
  tensors: tensor_files.Tensors,
  piece: layouts.Piece,
  layer: int | None,
  shape: tuple[int, ...],
  described: layouts.Description,
) -> np.ndarray:
  """One parameter, or one layer of it, float32."""
  name = name_of(piece, layer)
  array = tensors.read(name)
  if array.dtype.kind in 'biu':
    raise InputError(
      f'{tensors.where}: tensor {name} holds {array.dtype}; quantised '
      'weights are not read, only floating-point ones'
    )
  try:
    if piece.cut is not None:
      axis, start, stop = piece.cut
      array = array[(slice(None),) * axis + (slice(start, stop),)]
    array = piece.how.read(array).astype(np.float32)
  except (ValueError, IndexError):  # a cut or a reshape that does not fit
    array = np.empty(0)
  if piece.vocab:
    array = _rows_to_ours(array, shape[0], described)
  if array.shape != shape:
    raise InputError(
      f'{tensors.where}: tensor {name} of shape {tensors.shapes[name]} does not '
      f'fit: config.json asks for what makes {shape} here'
    )
  return array


def _rows_to_ours(
  array: np.ndarray, vocab_size: int, described: layouts.Description
) -> np.ndarray:
  """Rows of their vocabulary [V, ...] in our order, the mask's last."""
  if described.mask_id is None and len(array) == vocab_size - 1:
    return np.concatenate([array, array[described.start_id][None]])
  if (
    described.mask_id not in (None, vocab_size - 1) and len(array) == vocab_size
  ):
    array[[described.mask_id, -1]] = array[[-1, described.mask_id]]
  return array


def check_names(
  network: ModelConfig, tensors: tensor_files.Tensors, layout: layouts.Layout
):
  """Raises InputError with the names of missing and of surplus tensors.

  And where tensors that must be the same are not.
  """
  expected = {piece.name for piece in layout.ends.values()}
  for piece in layout.block.values():
    expected |= {name_of(piece, i) for i in range(network.num_layers)}
  surplus = {
    name
    for name in set(tensors.shapes) - expected - set(layout.same)
    if not any(re.fullmatch(p, name) for p in layout.ignored)
  }
  lines = []
  for kind, names in (
    ('missing', expected - set(tensors.shapes)),
    ('surplus', surplus),
  ):
    if names:
      shown = sorted(names)
      more = f' and {len(shown) - 20} more' if len(shown) > 20 else ''
      lines.append(f'{kind}: {shown[:20]}{more}')
  if lines:
    raise InputError(
      f'{tensors.where} does not hold the tensors that its config '
      'asks for; ' + '; '.join(lines)
    )
  for name in set(layout.same) & set(tensors.shapes):
    other = layout.same[name]
    if not np.array_equal(tensors.read(name), tensors.read(other)):
      raise InputError(
        f'{tensors.where}: {name} must be the same as {other}, as '
        'config.json says, and is not'
      )
