r"""Imports a published checkpoint as a workdir.

The differences between families are in `families`; this is what they share. The
tensors are read one after the other into parameters that are memory-mapped
files: a large checkpoint needs memory for one tensor and for what is being
compressed, and for pages that the system can reclaim.

    pip install -e '.[hub]'
    python launch.py --mode=import --from=FOLDER_OR_HUB_NAME \
        --workdir=runs/llada

A folder needs no network. The workdir is like any other: for --mode=sample,
--mode=eval --config.data.source=SOURCE, --mode=serve, and training with
--config.checkpoint.init_from=runs/llada, which without --config takes over the
settings of the model too.

The config.json says what the network is, and the tokenizer's own files which id
is the mask, if the config.json does not. data.length is at most 1024, and no
longer than a sliding window of the checkpoint, which has no effect then.

Pickles (.ckpt, .pth, .bin) are refused without --allow_pickle, and then read as
weights only. A .ckpt keeps its settings as Python objects and MD4 keeps none,
so a config.json must lie next to them, such as {"model_type": "mdlm",
"n_heads": 12}.

Random numbers in the shape of LLaDA-8B (bfloat16, 15 GiB; 30 in float32) took 3
min on a machine of 24 GiB, with 5.5 GiB of memory of its own; 3.75B parameters
took 1.7 GiB, 1.14B took 0.9.

From autoregressive weights to a masked model, as DiffuLLaMA and Dream do, with
attention that opens to the right step by step:

    python launch.py --workdir=runs/masked \
        --config.checkpoint.init_from=runs/gpt2 \
        --config.objective.name=masked --config.model.shift_outputs=True \
        --config.train.anneal_steps=2000 --config.sampler.name=auto

For blocks, which keep the autoregressive law, see configs/from_ar.py; for
adapters, `peft`.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import sys
import tempfile
import types
from typing import Any

from absl import flags
import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.data import network, tokenizers
from nanodlm.data.config import TokenizerConfig
from nanodlm.data.tokenizers import chat, huggingface
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.data.tokenizers.tiktoken import TiktokenTokenizer
from nanodlm.devices import sharding
from nanodlm.devices.mesh import MeshConfig
from nanodlm.interop import peft
from nanodlm.interop import tensors as tensor_files
from nanodlm.interop.families import FAMILIES
from nanodlm.interop.families import layout as layouts
from nanodlm.model.config import ModelConfig
from nanodlm.model.network import TransformerNetwork
from nanodlm.training import checkpoint
from nanodlm.types import InputError, reason

log = logging.getLogger('nanodlm')

HF_CONFIG = 'config.json'
HF_TOKENIZER = 'tokenizer.json'
# Names of files with a vocabulary that tokenizer.json would hold.
_VOCABULARIES = (
  *('vocab.json', 'merges.txt', 'vocab.bpe', 'encoder.json', 'vocab.txt'),
  *('*.model', '*.tiktoken', 'tekken.json'),
)
# The folder of an export that describes the run, and its file with the family.
OWN, ORIGIN = 'nanodlm', 'origin.json'
# The files of a repository of the hub that are downloaded, besides weights.
_WANTED = ('*.json', '*.txt', '*.model', '*.jinja')
# The largest `data.length` of an imported network whose texts may be longer.
_LENGTH = 1024
# How many names of missing or surplus tensors an error lists.
_NUM_SHOWN = 20


def define_flags():
  """Defines the flags of --mode=import."""
  flags.DEFINE_string(
    'from',
    '',
    'A folder or file of weights, or the name of a repository on the Hugging '
    'Face hub.',
  )
  flags.DEFINE_string(
    'family',
    '',
    'The form of a checkpoint whose config.json does not give model_type.',
  )
  flags.DEFINE_bool(
    'allow_pickle', False, "Read PyTorch's own files, as weights only."
  )


def main(start: configs.Start) -> int:
  """Runs --mode=import; see `import_checkpoint`."""
  if start.is_given:
    raise InputError('--mode=import makes its config; leave --config out')
  source = flags.FLAGS['from'].value
  if not source:
    raise InputError('--mode=import needs --from')
  try:
    import_checkpoint(
      source,
      start.workdir,
      family=flags.FLAGS.family,
      allow_pickle=flags.FLAGS.allow_pickle,
      changes=start.changes,
    )
  except checkpoint.SaveError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


def import_checkpoint(
  source: str,
  workdir: str,
  *,
  family: str = '',
  allow_pickle: bool = False,
  changes: Mapping[str, Any] = types.MappingProxyType({}),
):
  """Writes a workdir with the weights of a published checkpoint.

  Args:
    source: a folder, a file of weights, or a name on the hub, such as 'gpt2' or
      'ORGANISATION/NAME'.
    workdir: a folder that is new or empty.
    family: one of FAMILIES; '' detects it.
    allow_pickle: see `tensors.open_tensors`.
    changes: {'section.key': value}, for the config on top of the family's.

  Raises:
    InputError: the checkpoint cannot be imported. Nothing is written then.
  """
  if family not in ('', *FAMILIES):
    raise InputError(f'--family={family!r} is not one of {sorted(FAMILIES)}')
  with new_folder(workdir, '--workdir') as work:
    scratch = work.parent
    path = find_source(source, allow_pickle)
    folder = path if path.is_dir() else path.parent
    has_config = (folder / HF_CONFIG).is_file()
    if not has_config and (folder / peft.CONFIG).is_file():
      choose = lambda run: FAMILIES[
        choose_family(run, family, of_adapters=True)
      ]
      peft.import_adapters(folder, work, changes, choose, source)
      return
    foreign = workdirs.read_json(folder / HF_CONFIG) if has_config else {}
    ends, mask = find_tokens(folder, foreign)
    if ends:
      foreign['eos_token_id'] = ends
    if mask is not None and foreign.get('mask_token_id') is None:
      foreign['mask_token_id'] = mask
    tensors = tensor_files.open_tensors(path, allow_pickle)
    if (folder / OWN / ORIGIN).is_file():
      own, config, tokenizer = read_own(folder / OWN)
      if family not in ('', own):
        raise InputError(
          f'--family={family!r}: {source!r} was exported as {own!r}; leave '
          '--family out'
        )
      family, described = own, describe_own(tokenizer, config.data.length)
      _update(config, changes)
    else:
      family = detect(foreign, tensors, family)
      described = describe(family, foreign, tensors)
      config: Any = configs.load()
      config.data.length = min(described.max_length, _LENGTH)
      config.sampler.stop_at_eos = True
      _update(config, {**described.settings, **changes})
      if described.window:
        _check_window(described.window, config, str(tensors.where))
      own_keys = {f'tokenizer.{key}' for key in ('name', 'path', 'vocab_size')}
      if own_keys & set(changes):
        tokenizer = tokenizers.make_tokenizer(config.tokenizer)
      else:
        tokenizer = find_tokenizer(family, described, folder, scratch)
        ends = [int(described.rows[i]) for i in described.eos_ids]
        tokenizer = dataclasses.replace(tokenizer, eos_ids=tuple(ends))
        tokenizer = _with_chat_template(tokenizer, folder)
      tokenizer = chat.with_template(tokenizer, config.tokenizer.chat_template)
      if tokenizer.vocab_size != len(described.rows):
        raise InputError(
          f'tokenizer.name={tokenizer.name!r} has {tokenizer.vocab_size} ids '
          'with the mask, but the checkpoint has '
          f'{len(described.rows)}'
        )
    config.tokenizer.update(
      name=tokenizers.RUN,
      path=os.path.abspath(workdir),
      vocab_size=0,
      chat_template='',
    )
    settings = configs.make_settings(config, changes)
    # The mesh is for other modes: one device is enough here.
    local = dataclasses.replace(
      settings, mesh=MeshConfig(data=1, fsdp=1, tensor=1)
    )
    run = runs.make_run(local, devices=jax.devices('cpu')[:1])
    start_id = _find_start(run, described, tokenizer)
    has_bos = foreign.get('bos_token_id') is not None
    if described.mask_id is None and start_id >= 0 and not has_bos:
      log.info(
        'config.json lacks bos_token_id: texts begin with the token %d',
        start_id,
      )
    tokenizer = dataclasses.replace(tokenizer, start_id=start_id)
    run = run.with_tokenizer(tokenizer)
    params = read_params(run, family, tensors, described, scratch)
    save_tokenizer(tokenizer, work)
    (work / workdirs.CONFIG).write_text(settings.to_json())
    origin = {
      'imported': family,
      'source': source,
      'max_length': described.max_length,
    }
    checkpoint.save_params(str(work), params, settings.to_dict(), origin)
  log.info(
    'imported %s as %s: %s parameters, %d ids, into %s',
    source,
    family,
    f'{run.num_params():,}',
    tokenizer.vocab_size,
    workdir,
  )


def _find_start(
  run: runs.Run, described: layouts.Description, tokenizer: Tokenizer
) -> int:
  """Returns the id that the network reads before a text, -1 for none."""
  start_id = network_of(run).start_token
  begins = run.objective.causal or run.objective.autoregressive
  if start_id >= 0 or not begins:
    return start_id
  # The tokenizer of an export says it.
  is_copied = described.mask_id is None
  return described.start_id if is_copied else tokenizer.start_id


def network_of(run: runs.Run) -> ModelConfig:
  """Returns the shape of a transformer; InputError for other networks."""
  if not isinstance(run.network, TransformerNetwork):
    raise InputError(
      f'model.name={run.settings.model["name"]!r} cannot be imported or '
      "exported; only 'transformer' can"
    )
  return run.network.config


def choose_family(
  run: runs.Run, family: str = '', of_adapters: bool = False
) -> str:
  """Returns `family`, or the first that fits; InputError if it does not.

  Adapters only need the names of its tensors.
  """
  misfits = _misfits(run, of_adapters)
  if family not in ('', *misfits):
    raise InputError(f'--family={family!r} is not one of {sorted(misfits)}')
  if family and misfits[family]:
    raise InputError(f'--family={family!r} does not support {misfits[family]}')
  return family or next(name for name, misfit in misfits.items() if not misfit)


def find_nearest(run: runs.Run) -> str:
  """Returns which published forms nearly fit, and why not; '' if one does."""
  misfits = {
    name: misfit
    for name, misfit in _misfits(run).items()
    if FAMILIES[name].is_published
  }
  if not all(misfits.values()):
    return ''
  size = lambda misfit: ('objective.name' in misfit, misfit.count(', '))
  least, nearest = min(map(size, misfits.values())), {}
  for name, misfit in misfits.items():
    if size(misfit) == least:
      nearest.setdefault(misfit, []).append(name)
  found = [
    f'{", ".join(x)} except for {misfit}' for misfit, x in nearest.items()
  ]
  return f'The published forms that nearly fit: {"; ".join(found)}'


def _misfits(run: runs.Run, of_adapters: bool = False) -> dict[str, str]:
  """Returns {family: what it does not support of a run}."""
  network, objective = network_of(run), run.settings.objective
  found = {}
  for name, form in FAMILIES.items():
    if form.is_exportable:
      misfits = [form.misfit(network, objective['name'])]
      if not of_adapters:
        misfits.append(form.misread(network, objective))
      found[name] = ', '.join(filter(None, misfits))
  return found


@contextlib.contextmanager
def new_folder(target: str, flag: str) -> Iterator[pathlib.Path]:
  """Yields a folder that becomes `target`, or is deleted after an error.

  Its parent is for temporary files. `flag` is the flag that names `target`.
  """
  workdirs.check_writable(target, flag)
  path = pathlib.Path(target).absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise InputError(
      f'{flag}={target!r} is not empty, and is not overwritten: give a new one'
    )
  # After an error, no empty parents remain either.
  parent = next(p for p in path.parents if p.exists())
  prefix = f'{path.name}.incomplete-'
  with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as scratch:
    work = pathlib.Path(scratch) / 'new'
    work.mkdir()
    yield work
    path.parent.mkdir(parents=True, exist_ok=True)
    work.replace(path)


def read_own(own: pathlib.Path) -> tuple[str, Any, Tokenizer]:
  """Returns the family, config and tokenizer in the folder `nanodlm`."""
  family = workdirs.read_json(own / ORIGIN).get('family')
  if family not in list(FAMILIES):  # A list is not hashable.
    raise InputError(
      f'{own / ORIGIN}: family={family!r} is not one of {sorted(FAMILIES)}'
    )
  config = configs.read(str(own))
  if config is None:
    raise InputError(f'{own / workdirs.CONFIG} is missing')
  return family, config, load_tokenizer(own)


def find_tokens(
  folder: pathlib.Path, foreign: dict[str, Any]
) -> tuple[list[Any], int | None]:
  """Returns the ids of all tokens that end a text, and that of the mask.

  The ends in `foreign` come first. The mask is the tokenizer's, or None.
  """
  names = 'generation_config.json', HF_TOKENIZER
  generation, content = (
    workdirs.read_json(folder / name) if (folder / name).is_file() else {}
    for name in names
  )
  settings = chat.read_described(folder)
  found = []
  for config in (foreign, generation):
    ids = config.get('eos_token_id')
    found += ids if isinstance(ids, list) else [ids]
  try:
    tokens = {t['content']: t['id'] for t in content.get('added_tokens') or ()}
    for i, token in (settings.get('added_tokens_decoder') or {}).items():
      tokens[token['content']] = int(i)
    end, mask = (
      tokens.get(chat.token_text(settings, key))
      for key in ('eos_token', 'mask_token')
    )
    found.append(end)
    return [i for i in dict.fromkeys(found) if i is not None], mask
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    raise InputError(
      f'the ids of the mask and of the ends of a text cannot be read from '
      f'tokenizer_config.json and {names} in {folder}: {error!r}'
    ) from error


def describe_own(tokenizer: Tokenizer, length: int) -> layouts.Description:
  """Returns the vocabulary of a run's export, with the ids of its files."""
  mask, size = tokenizer.mask_id, tokenizer.vocab_size
  if isinstance(tokenizer, huggingface.HuggingFaceTokenizer):
    mask = tokenizer.mask_place
  ends = (tokenizer.separator_id, *tokenizer.eos_ids)
  ends = [size - 1 if end == mask else end for end in ends]
  eos_ids = tuple(dict.fromkeys(ends))
  return layouts.Description(
    size, mask, ends[0], ends[0], length, eos_ids=eos_ids
  )


def _update(config: Any, settings: Mapping[str, Any]):
  for key, value in settings.items():
    configs.set_value(config, key, value)


def is_hub_name(source: str) -> bool:
  """Returns whether a value of --from looks like a name on the hub."""
  is_name = re.fullmatch(r'([\w.-]+/)?[\w.-]+', source) is not None
  return is_name and not pathlib.Path(source).exists()


def find_source(source: str, allow_pickle: bool) -> pathlib.Path:
  """Returns the path of --from, after downloading a name on the hub."""
  path = pathlib.Path(source)
  if path.exists():
    return path
  if not is_hub_name(source):
    raise InputError(
      f'--from={source!r} is neither a folder or file here nor a name on the '
      "Hugging Face hub, 'NAME' or 'ORGANISATION/NAME'"
    )
  tensor_files.require('huggingface_hub')
  from huggingface_hub import constants, snapshot_download

  is_online = network.is_reachable(constants.ENDPOINT)

  def download(*patterns: str) -> pathlib.Path:
    return pathlib.Path(
      snapshot_download(
        source, allow_patterns=[*patterns], local_files_only=not is_online
      )
    )

  single = tensor_files.SINGLE[0]
  try:
    folder = download(*_WANTED, single)
    index = folder / f'{single}.index.json'
    if index.is_file() and not (folder / single).is_file():
      download(*tensor_files.files_in(index))
    elif not (folder / single).is_file():
      pickles = tensor_files.PICKLES if allow_pickle else ()
      download(*(f'*{end}' for end in (tensor_files.SAFETENSORS, *pickles)))
  # The errors have several bases, OSError and ValueError among them.
  except Exception as error:
    why = f'it is not in the cache, and {constants.ENDPOINT} does not answer'
    raise InputError(
      f'--from={source!r} is not a folder here, and cannot be downloaded from '
      f'the Hugging Face hub: {error if is_online else why}'
    ) from error
  return folder


def detect(
  foreign: dict[str, Any], tensors: tensor_files.Tensors, wanted: str = ''
) -> str:
  """Returns the family of a checkpoint, which is `wanted` if nothing says it.

  Raises:
    InputError: none fits, or another one than `wanted`.
  """
  found = [
    name
    for name, family in FAMILIES.items()
    if family.detect(foreign, tensors.shapes)
  ]
  kind, hint = foreign.get('model_type'), ''
  if wanted and found and wanted not in found:
    raise InputError(
      f'--family={wanted!r} contradicts config.json of {tensors.where!r}: '
      f'model_type={kind!r} means family {found[0]!r}; leave --family out'
    )
  if wanted or found:
    return wanted or found[0]
  experts = {k: v for k, v in foreign.items() if 'expert' in k and v}
  if experts:
    hint = (
      f'. Mixtures of experts are not supported, only dense MLPs: {experts}'
    )
  if not kind:
    hint = '. Name one with --family, and write a config.json if it is missing'
  raise InputError(
    f'--from={tensors.where!r} belongs to no known family: model_type='
    f'{kind!r} in its config.json; known are {sorted(FAMILIES)}{hint}'
  )


def describe(
  family: str, foreign: dict[str, Any], tensors: tensor_files.Tensors
) -> layouts.Description:
  """Returns what a family reads from config.json; InputError if it cannot."""
  try:
    return FAMILIES[family].describe(foreign, tensors.shapes)
  except InputError as error:
    raise InputError(f'{tensors.where}: {error}') from error
  except Exception as error:  # There may be values of any type.
    raise InputError(
      f'{tensors.where}: config.json cannot be read as one of family '
      f'{family!r}: {error!r}'
    ) from error


def find_tokenizer(
  family: str,
  described: layouts.Description,
  folder: pathlib.Path,
  scratch: pathlib.Path,
) -> Tokenizer:
  """Returns the tokenizer of an imported checkpoint.

  It is the tokenizer.json in `folder`, or what the family makes of other files,
  which is written to `scratch`, or the tokenizer that the family names.
  """
  path, size = folder / HF_TOKENIZER, len(described.rows)
  if not path.is_file():
    try:
      content = FAMILIES[family].tokenizer_json(folder)
      if content is None and described.tokenizer == 'gpt2':
        content = FAMILIES['gpt2'].tokenizer_json(folder)
    except Exception as error:  # The library raises nothing narrower.
      raise InputError(
        f'the tokenizer in {folder} cannot be read: {reason(error)}'
      ) from error
    if content is not None:
      path = scratch / HF_TOKENIZER
      path.write_text(json.dumps(content))
  if path.is_file():
    mask = size - 1 if described.mask_id is None else described.mask_id
    separator = int(described.rows[described.separator_id])
    return huggingface.load_hugging_face(str(path), size, mask, separator)
  others = [
    file.name for glob in _VOCABULARIES for file in sorted(folder.glob(glob))
  ]
  if others or not described.tokenizer:
    hint = f' ({", ".join(others)} must be turned into it)' if others else ''
    raise InputError(
      f'there is no {HF_TOKENIZER} in {folder}{hint}: write one with '
      "transformers' AutoTokenizer.from_pretrained(FOLDER)"
      f'.save_pretrained(FOLDER), or name a tokenizer of {size} ids with '
      '--config.tokenizer.name'
    )
  config = TokenizerConfig(described.tokenizer, '', 0)
  tokenizer = tokenizers.make_tokenizer(config)
  if isinstance(tokenizer, TiktokenTokenizer):
    tokenizer = tokenizer.with_spare_ids(described.spare_ids)
  return tokenizer


def _check_window(window: int, config: Any, where: str):
  """Raises InputError if texts of a config exceed the window of attention."""
  for key in ('data', 'sampler'):
    if (length := config[key].length) > window:
      raise InputError(
        f'{where}: sliding_window={window!r} (or scaled queries from there on) '
        f'is not supported for longer texts: {key}.length={length!r} must not '
        'exceed it'
      )
  log.warning(
    '%s: texts of more than %d tokens need a sliding window (or scaled '
    'queries), which is not supported: use no greater data.length or '
    'sampler.length with these weights',
    where,
    window,
  )


def _with_chat_template(
  tokenizer: Tokenizer, folder: pathlib.Path
) -> Tokenizer:
  """Returns the tokenizer with the template of a checkpoint, if it fits."""
  try:
    template = chat.read_template(folder)
    changed = dataclasses.replace(tokenizer, chat_template=template)
    if template:
      chat.make_format(changed)
  except InputError as error:
    log.warning('%s; --mode=chat needs tokenizer.chat_template', error)
    return tokenizer
  return changed


def check_names(
  layout: layouts.Layout,
  ignored: tuple[str, ...],
  tensors: tensor_files.Tensors,
):
  """Checks that a checkpoint has the tensors of a layout and no others.

  Raises:
    InputError: names are missing or surplus, or tied tensors differ.
  """
  wanted = set(layout.tensors)
  found = set(tensors.weights(ignored))
  tensors.check_dtypes(sorted(found))
  surplus = found - wanted - set(layout.same)
  wrong = {'missing': wanted - found, 'surplus': surplus}
  if any(wrong.values()):
    lines = [
      f'{len(names)} {kind}: {sorted(names)[:_NUM_SHOWN]}'
      for kind, names in wrong.items()
    ]
    raise InputError(
      f'{tensors.where} does not hold the tensors of its config; '
      + '; '.join(lines)
    )
  for name in set(layout.same) & found:
    other = layout.same[name]
    if not np.array_equal(tensors.read(name), tensors.read(other)):
      raise InputError(
        f'{tensors.where}: by config.json {name} must be the same as {other}, '
        'but is not'
      )


def read_params(
  run: runs.Run,
  family: str,
  tensors: tensor_files.Tensors,
  described: layouts.Description,
  folder: pathlib.Path,
) -> Any:
  """Reads a run's parameters, float32, on the CPU, a tensor after the other.

  They are memory-mapped files in `folder`.

  Raises:
    InputError: there are other tensors, or a tensor has another shape or type.
  """
  tree = jax.eval_shape(run.scorer.init_params, jax.random.key(0))
  shapes, form = checkpoint.flatten(tree), FAMILIES[family]
  layout = form.layout(network_of(run), shapes, tensors.shapes)
  check_names(layout, form.ignored, tensors)
  if tensors.take_averages(form.ignored):
    log.info('%s: the averaged weights (EMA) are used', tensors.where)
  params = {
    path: np.lib.format.open_memmap(
      folder / path.replace('/', '.'), 'w+', np.float32, shape=leaf.shape
    )
    for path, leaf in shapes.items()
  }
  for name, parts in layout.tensors.items():
    tensor = tensors.read(name)
    for part in parts:
      ours = part.of(params)
      array = _theirs(tensor, part)
      if part.path in described.factors:
        array = array * np.float32(described.factors[part.path])
      has_ids = part.path in sharding.BY_VOCABULARY
      if has_ids and len(array) == described.vocab_size:
        array = array[described.rows]
      if array.shape != ours.shape:
        raise InputError(
          f'{tensors.where}: tensor {name} of shape {tensor.shape} does not '
          f'fit: by config.json the parameter {part.path} has {ours.shape}'
        )
      with np.errstate(over='ignore', invalid='ignore'):
        ours[...] = array
        ends = ours.min(), ours.max()
      if not np.isfinite(ends).all():
        raise InputError(
          f'{tensors.where}: tensor {name} holds NaN, infinity or numbers '
          'beyond float32: the checkpoint is damaged or was saved after its '
          'training diverged'
        )
  cpu = jax.devices('cpu')[0]
  leaves = [jax.device_put(array, cpu) for array in params.values()]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _theirs(tensor: np.ndarray, part: layouts.Part) -> np.ndarray:
  """Returns a parameter in a tensor; an empty array if it does not fit."""
  try:
    if part.share is not None:
      axis, i, count = part.share
      tensor = np.split(tensor, count, axis)[i]
    return part.how(tensor)
  except (ValueError, IndexError):  # It cannot be split or reshaped.
    return np.empty(0)
