"""Adapters in the layout of Hugging Face's PEFT, to and from a workdir.

    python launch.py --mode=export --adapters --workdir=runs/tuned --output=out
    python launch.py --mode=import --from=out --workdir=runs/again \
        --config.checkpoint.init_from=runs/base

The folder has adapter_config.json and adapter_model.safetensors, with names of
the family that the base has the form of, as in --mode=export. An import needs
the workdir of the base, for example itself an import. What it makes can be
evaluated, sampled, exported, and trained further in another workdir, with
--config.checkpoint.init_from=runs/again. Without --adapters, an export holds
the whole model, with the adapters added to its weights.
"""

from collections.abc import Callable, Mapping
import json
import logging
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm import weights
from nanodlm import workdir as workdirs
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.interop import tensors as tensor_files
from nanodlm.interop.families.layout import Family, Layout, Part
from nanodlm.model import lora
from nanodlm.run import Run
from nanodlm.training import checkpoint
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_SIDES = {lora.A: 'lora_A', lora.B: 'lora_B'}
# Keys of adapter_config.json with the values that are supported, and those that
# change nothing about the adapters.
_ALLOWED = {
  'peft_type': ('LORA',),
  'bias': ('none',),
  'fan_in_fan_out': (False,),
  # Others start from changed weights of the base.
  'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal'),
  **dict.fromkeys(
    (
      *('use_dora', 'use_qalora', 'lora_bias', 'modules_to_save', 'layers'),
      *('layers_to_transform', 'layers_pattern', 'trainable_token_indices'),
      *('layer_replication', 'exclude_modules', 'target_parameters'),
      *('alora_invocation_tokens', 'megatron_config', 'corda_config'),
      *('rank_pattern', 'alpha_pattern', 'arrow_config', 'eva_config'),
    ),
    (None, False, {}, []),
  ),
}
_HARMLESS = """
  auto_mapping base_model_name_or_path ensure_weight_tying inference_mode
  loftq_config megatron_core peft_version qalora_group_size
  revision runtime_config target_modules task_type
""".split()


def layout_of(run: Run, form: Family) -> Layout:
  """Returns the tensors of a run without adapters in the form of a family."""
  plain = run.without_adapters()
  network: Any = plain.network
  shapes = jax.eval_shape(plain.scorer.init_params, jax.random.key(0))
  return form.layout(network.config, checkpoint.flatten(shapes), ())


def kernels_of(run: Run, form: Family) -> dict[str, Part]:
  """Returns {module: kernel} of the dense layers in a run's blocks.

  The names of modules, such as 'model.layers.0.mlp.up_proj', are a family's.
  """
  if not form.names:
    raise InputError(
      "adapters can be exchanged if the base has a published family's form, "
      'which this network lacks; --mode=export without --adapters names the '
      'nearest forms and the settings that they need'
    )
  kernels = {}
  for name, parts in layout_of(run, form).tensors.items():
    layer = parts[0].path.removeprefix('layers/').removesuffix('/kernel')
    if layer not in lora.LAYERS:
      continue
    if len(parts) > 1 or not form.is_transposed:
      raise InputError(
        f'adapters of the family {form.model_types[0]!r} cannot be exchanged: '
        f'{name} holds several of our layers, or is not transposed'
      )
    kernels[name.removesuffix('.weight')] = parts[0]
  return kernels


def _side(kernel: Part, name: str) -> Part:
  """Returns one of the two matrices of a kernel's adapter."""
  return kernel._replace(path=kernel.path.replace('kernel', name))


def write(folder: pathlib.Path, run: Run, params: Any, form: Family, base: str):
  """Writes the adapters of a run.

  Args:
    folder: where to write.
    run: a run with `config.lora`.
    params: its trained parameters.
    form: the family whose names to use.
    base: the name of the base, '' if it has none.
  """
  config, arrays = run.settings.lora, {}
  network: Any = run.network
  flat = checkpoint.flatten(jax.tree.map(np.asarray, params))
  kernels = kernels_of(run, form)
  modules = [
    module
    for module, kernel in kernels.items()
    if network.config.adapter(kernel.path.split('/')[1])
  ]
  for module in modules:
    for ours, theirs in _SIDES.items():
      value = _side(kernels[module], ours).of(flat)
      name = f'{_PREFIX}{module}.{theirs}.weight'
      arrays[name] = np.ascontiguousarray(value.T)
  tensor_files.write(folder / TENSORS, arrays)
  # PEFT takes every module whose name ends like one of these.
  own = {f'{module}.weight' for module in kernels}
  last = lambda name: name.removesuffix('.weight').rpartition('.')[2]
  ends = {last(module) for module in modules}
  if any(
    last(name) in ends for name in set(layout_of(run, form).tensors) - own
  ):
    ends = modules
  content = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM' if run.objective.causal else None,
    'base_model_name_or_path': base,
    'r': config['rank'],
    'lora_alpha': config['alpha'],
    'lora_dropout': config['dropout'],
    'use_rslora': config['rslora'],
    'target_modules': sorted(ends),
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
  }
  workdirs.write(folder / CONFIG, json.dumps(content, indent=2) + '\n')


def import_adapters(
  folder: pathlib.Path,
  work: pathlib.Path,
  changes: Mapping[str, Any],
  choose: Callable[[Run], Family],
  source: str,
):
  """Writes a workdir with PEFT's adapters, for a base in another workdir.

  Args:
    folder: of adapter_config.json.
    work: the workdir to write.
    changes: {'section.key': value}; checkpoint.init_from is the base.
    choose: returns the family that a run has the form of.
    source: value of --from, for the record.

  Raises:
    InputError: the base is missing, they do not fit it, or are of another
      kind.
  """
  for key, value in sorted(changes.items()):
    if key.startswith('lora.'):
      raise InputError(
        f'--config.{key}={value!r} is ignored here: {folder / CONFIG} says it'
      )
  base = changes.get('checkpoint.init_from', '')
  if not base:
    raise InputError(
      f'--from={source!r} holds adapters: give the workdir of their base with '
      '--config.checkpoint.init_from=WORKDIR'
    )
  foreign = workdirs.read_json(folder / CONFIG)
  _check(foreign, folder / CONFIG)
  config: Any = configs.start_from(base)
  if config.lora.rank:
    raise InputError(
      f'checkpoint.init_from={base!r} already has adapters (lora.rank='
      f'{config.lora.rank!r}), and others cannot be added: give the workdir of '
      'a whole model, which --mode=export of that run and then --mode=import '
      'make of it'
    )
  for key, value in changes.items():
    configs.set_value(config, key, value)
  settings = configs.make_settings(config, changes)
  plain = runs.make_run(settings, devices=jax.devices('cpu')[:1], refit=True)
  tokenizer = load_tokenizer(base)
  plain = plain.with_tokenizer(tokenizer)
  weights.check_start(plain, base)
  if not (folder / TENSORS).is_file():
    raise InputError(f'{folder} lacks {TENSORS}')
  tensors = tensor_files.open_tensors(folder / TENSORS, False)
  sides: dict[str, Part] = {}
  for module, kernel in kernels_of(plain, choose(plain)).items():
    for ours, theirs in _SIDES.items():
      for start in (module, module.removeprefix('model.')):
        sides[f'{_PREFIX}{start}.{theirs}.weight'] = _side(kernel, ours)
  left = sorted(set(tensors.shapes) - set(sides))
  found = {name: sides[name] for name in tensors.shapes if name in sides}
  layers = sorted({part.path.split('/')[1] for part in found.values()})
  if left or not layers:
    raise InputError(
      f'{folder / TENSORS} does not fit {base!r}: its network lacks dense '
      f'layers {left[:20]}'
    )
  config.lora.update(
    rank=foreign['r'],
    alpha=float(foreign['lora_alpha']),
    dropout=float(foreign.get('lora_dropout') or 0),
    rslora=bool(foreign.get('use_rslora')),
    targets='|'.join(layers),
  )
  settings = configs.make_settings(config, changes)
  run = runs.make_run(settings, devices=jax.devices('cpu')[:1], refit=True)
  run = run.with_tokenizer(tokenizer)
  shapes = checkpoint.flatten(run.shapes()[0])
  params = {
    path: np.full(x.shape, np.nan, np.float32) for path, x in shapes.items()
  }
  for name, part in found.items():
    value, ours = tensors.read(name).T, part.of(params)
    if value.shape != ours.shape:
      raise InputError(
        f'{folder / TENSORS} does not fit {base!r}: tensor {name} makes '
        f'{part.path} of shape {value.shape}, which must be {ours.shape}'
      )
    ours[...] = value
  lacking = [path for path, x in params.items() if np.isnan(x).any()]
  if lacking:
    raise InputError(
      f'{folder / TENSORS} does not fit {base!r}: numbers of {lacking} are '
      'missing, or NaN'
    )
  _, identity = weights.load_base(run)
  save_tokenizer(tokenizer, work)
  (work / workdirs.CONFIG).write_text(settings.to_json())
  origin_here = {'imported': 'peft', 'source': source, 'base': identity}
  whole = traverse_util.unflatten_dict(params, '/')
  checkpoint.save_params(str(work), whole, settings.to_dict(), origin_here)
  named = str(foreign.get('base_model_name_or_path') or '')
  origin = checkpoint.read_origin(base).get('source', '')
  known = {origin, pathlib.Path(os.path.abspath(base)).name}
  if named and not known & {named, pathlib.Path(named).name}:
    log.warning(
      '%s names %r as the base of the adapters; they were added to %r%s',
      folder / CONFIG,
      named,
      base,
      f', imported from {origin!r}' * bool(origin),
    )
  log.info(
    'imported %s: adapters of rank %d in %s', source, foreign['r'], layers
  )


def _check(foreign: Mapping[str, Any], path: pathlib.Path):
  """Raises InputError unless the adapter_config.json at `path` is supported."""
  for key, allowed in _ALLOWED.items():
    if key in foreign and foreign[key] not in allowed:
      raise InputError(
        f'{path}: {key}={foreign[key]!r} is not supported, only {list(allowed)}'
      )
  own = 'r', 'lora_alpha', 'lora_dropout', 'use_rslora'
  known = {*_ALLOWED, *_HARMLESS, *own}
  if unknown := sorted(
    key for key, x in foreign.items() if key not in known and x
  ):
    raise InputError(
      f'{path}: {unknown} may change what the adapters compute and is not '
      'supported; leave them out in a copy if they change nothing'
    )
  for key, kind, rule in (
    ('r', int, 'a whole number'),
    ('lora_alpha', (int, float), 'a number'),
    ('lora_dropout', (int, float, type(None)), 'a number'),
  ):
    value = foreign.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
      raise InputError(f'{path}: {key}={value!r} must be {rule}')
