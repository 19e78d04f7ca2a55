"""Compiles a config ahead of time: does it fit, and how fast may it be?

    python launch.py --mode=compile --config=configs/gpt2_small.py \
        --topology=v5e:4x4 --vocab_size=50258

The real training step, evaluation step and sampler are compiled for a pod that
is not there (libtpu brings the compiler: pip install -e '.[tpu]'), or for the
devices at hand. Nothing is run and no data is read.

Memory is XLA's own allocation, arguments and temporaries. Times are the TPU
compiler's estimate, not measurements: the cycles that it notes beside each fusion,
with loops multiplied out (`hlo.cost`). Kernels, which it does not estimate, are
added at the larger of FLOPs / peak rate and bytes / memory rate: a lower bound (a
head of 64 fills half of the matrix unit, which may double its kernels' time).
Left out: copies that run beside the computation, waiting for collectives, and
the host.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from ml_collections import config_dict

from nanodlm import config as configs
from nanodlm.data import tokenizers
from nanodlm.devices import mesh as meshes
from nanodlm.model.config import train_flops_per_token
from nanodlm.perf import hlo
from nanodlm.steps import train as steps
from nanodlm.training import metrics
from nanodlm.types import Canvas, InputError

log = logging.getLogger('nanodlm')

REPORT_FILE = 'compile.json'
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x8x8',
  '8x8x8',
  '8x8x16',
  '8x16x16',
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of TPU, from the makers' data sheets.

  Attributes:
    kind: the start of JAX's device_kind.
    shapes: of the pods that one can rent, in chips.
    memory_bytes: per chip, less what the compiler keeps to itself.
    memory_rate: bytes/s to it.
    hertz: cycles per second, the peak rate over the matrix units' size.
  """

  kind: str
  shapes: tuple[str, ...]
  memory_bytes: float
  memory_rate: float
  hertz: float


# The compiler's own limits, named in its errors: 15.75 GiB of a v5e, and so on.
CHIPS = {
  'v4': Chip('TPU v4', _CUBES, 31.25 * 2**30, 1228e9, 1.05e9),
  'v5e': Chip('TPU v5 lite', _FLAT, 15.75 * 2**30, 819e9, 1.5e9),
  'v5p': Chip('TPU v5', _CUBES, 95 * 2**30, 2765e9, 1.75e9),
  'v6e': Chip('TPU v6 lite', _FLAT, 31.25 * 2**30, 1640e9, 1.75e9),
}


def use_topology(topology: str):
  """Keeps JAX off this machine's devices, before it looks for them.

  Raises:
    InputError: an unknown topology, or no TPU compiler here.
  """
  name, _, shape = topology.partition(':')
  if name not in CHIPS or shape not in CHIPS[name].shapes:
    known = '; '.join(
      f'{name}: {", ".join(chip.shapes)}' for name, chip in CHIPS.items()
    )
    raise InputError(
      f'--topology={topology!r} is not known, as v5e:4x4 would be. {known}'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(
      f"--topology={topology!r} needs the TPU compiler: pip install -e '.[tpu]'"
    )
  jax.config.update('jax_platforms', 'cpu')
  # libtpu would ask the cloud's metadata server what machine this is, and let only
  # one process at a time have it, for the sake of chips that are not used here.
  for key, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('TPU_ACCELERATOR_TYPE', 'v5litepod-16'),
  ):
    os.environ.setdefault(key, value)


def find_devices(topology: str) -> list[Any]:
  """The devices of a topology that was given to `use_topology`, or those here."""
  if not topology:
    return jax.devices()
  options = {}
  if topology.endswith(':1x1'):
    options['chips_per_host_bounds'] = (1, 1, 1)
  if topology.startswith('v4:'):
    options['chip_config_name'] = 'megacore'  # one device a chip, as when run
  return list(
    topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options
    ).devices
  )


def platform_of(topology: str) -> str:
  """The `platform` of `model.ModelConfig`."""
  return 'tpu' if topology else ''


def find_chip(device_kind: str) -> Chip | None:
  """Of a device; the longest kind that it starts with."""
  fitting = [
    chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)
  ]
  return max(fitting, key=lambda chip: len(chip.kind), default=None)


def find_vocab_size(settings: configs.Settings, given: int) -> int:
  """`given`, or what the tokenizer has where no data is needed to make it."""
  if given == 1:
    raise InputError(
      '--vocab_size=1 must be >= 2, an id and the mask; 0 asks the tokenizer'
    )
  if given:
    return given
  tokenizer = settings.tokenizer
  if tokenizer.name == 'sentencepiece' and not tokenizer.path:
    return tokenizer.vocab_size + 2  # a separator and the mask
  try:
    return tokenizers.make_tokenizer(tokenizer).vocab_size
  except InputError as error:
    raise InputError(
      f'{error}. Without the tokenizer --vocab_size tells how many '
      'ids it has, the mask included'
    ) from error


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is compiled.

  Attributes:
    settings: the config's checked sections.
    mesh: of the devices that the programs are for.
    network: the transformer.
    lowered: programs by name: 'train', 'eval', 'sample'.
    parts: bytes per chip of the parameters, their average, the optimiser's state
      and the training batch.
    num_params: parameters of the network.
  """

  settings: configs.Settings
  mesh: jax.sharding.Mesh
  network: steps.Network
  lowered: dict[str, jax.stages.Lowered]
  parts: dict[str, int]
  num_params: int


def make_plan(
  config: config_dict.ConfigDict,
  settings: configs.Settings,
  devices: list[Any],
  vocab_size: int,
) -> Plan:
  """Lowers the three programs as training would build them.

  Raises:
    InputError: mesh or batch do not suit the devices.
  """
  mesh = meshes.make_mesh(settings.mesh, devices)
  platform = devices[0].platform
  network = steps.Network(
    configs.make_model(config, vocab_size, platform),
    settings.train.chunk_size,
    meshes.shards(mesh),
  )
  objective = configs.make_objective(config, vocab_size - 1)
  training = steps.make_training(settings, network, objective, mesh)
  steps.check_batch_size(
    settings.eval.batch_size, mesh, 1, 1, 'eval.batch_size'
  )
  eval_step = steps.make_eval_step(
    network,
    objective,
    mesh,
    num_draws=settings.eval.num_draws,
    seed=settings.eval.seed,
  )
  sample_step = steps.make_sample_step(
    network, objective, configs.make_sampler(config, vocab_size - 1), mesh
  )

  state = meshes.shapes_sharded(mesh, training.init_state)
  rows, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)
  batch = meshes.place(rows, _batch(settings, settings.train.batch_size))
  eval_batch = meshes.place(
    rows,
    _batch(settings, settings.eval.batch_size)
    | {'index': jax.ShapeDtypeStruct((settings.eval.batch_size,), jnp.int32)},
  )
  shards = meshes.num_batch_shards(mesh)
  shape = (
    -(-settings.sample.num_samples // shards) * shards,
    settings.sample.length or settings.data.length,
  )
  canvas = meshes.place(
    rows,
    Canvas(
      jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
    ),
  )
  key = meshes.place(everywhere, jax.eval_shape(lambda: jax.random.key(0)))
  lowered = {
    'train': training.step.lower(state, batch),
    'eval': eval_step.lower(state.eval_params, eval_batch),
    'sample': sample_step.lower(state.eval_params, key, canvas),
  }
  parts = {
    'parameters': state.params,
    'average': state.ema_params,
    'optimiser': state.opt_state,
    'batch': batch,
  }
  return Plan(
    settings,
    mesh,
    network,
    lowered,
    {name: meshes.bytes_per_device(part) for name, part in parts.items()},
    network.num_params(objective),
  )


def _batch(settings: configs.Settings, batch_size: int) -> dict[str, Any]:
  """A batch of `data.pipeline`, abstract."""
  data = settings.data
  shape = (batch_size, data.length)
  array = jax.ShapeDtypeStruct
  batch = {
    'tokens': array(shape, jnp.int32),
    'weight': array(shape, jnp.float32),
    'num_bytes': array(shape[:1], jnp.int32),
  }
  if data.segment_ids or data.padding == 'masked':
    batch['segment_ids'] = array(shape, jnp.int32)
  if data.is_pairs:
    batch['num_tokens'] = array(shape[:1], jnp.int32)
  return batch


# 'Used 21.51G of 15.75G hbm' of the TPU compiler's error.
_USED = re.compile(r'[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def report_program(
  lowered: jax.stages.Lowered, capacity: float | None, chip: Chip | None
) -> dict[str, Any]:
  """Compiles one program; see the keys, all per chip and run of the program.

  Args:
    lowered: the program.
    capacity: bytes of memory a chip has, None where it is not known.
    chip: its kind, for times; None where there are no estimates.
  """
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used = _USED.search(str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or not used:
      raise
    return {
      'fits': False,
      'compile_secs': time.monotonic() - start,
      'peak_bytes': float(used[1]) * _UNITS[used[2]],
      'capacity_bytes': float(used[3]) * _UNITS[used[4]],
    }
  report = {'compile_secs': time.monotonic() - start}
  memory = compiled.memory_analysis()
  arguments, outputs = (
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
  )
  peak = arguments + outputs + memory.temp_size_in_bytes
  report |= {
    'argument_bytes': arguments,
    'output_bytes': outputs,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': peak,
    'capacity_bytes': capacity,
    'fits': None if capacity is None else peak <= capacity,
  }
  cost = hlo.cost(hlo.parse(compiled.as_text()))
  report |= {
    'flops': cost.flops,
    'num_unknown_loops': cost.num_unknown_loops,
    'collectives': {
      kind: {'count': count, 'bytes': size}
      for kind, (count, size) in cost.collectives.items()
    },
  }
  if chip is not None and cost.cycles:
    report |= {
      'estimated_cycles': cost.cycles,
      'kernel_cycles': kernel_cycles(cost, chip),
      'num_kernel_calls': sum(cost.kernels.values()),
    }
    report['estimated_secs'] = (
      report['estimated_cycles'] + report['kernel_cycles']
    ) / chip.hertz
  return report


def kernel_cycles(cost: hlo.Cost, chip: Chip) -> float:
  """Cycles of the kernels that the compiler does not estimate, at the least.

  Each call takes the larger of its FLOPs at the chip's peak rate and its bytes
  at its memory's; of a kernel that does not say its FLOPs, the bytes.
  """
  peak = metrics.peak_flops(chip.kind)
  return chip.hertz * sum(
    count * max(kernel.flops / peak, kernel.num_bytes / chip.memory_rate)
    for kernel, count in cost.kernels.items()
  )


def compile_config(
  config: config_dict.ConfigDict,
  settings: configs.Settings,
  topology: str,
  vocab_size: int,
  workdir: str | None,
) -> dict[str, Any]:
  """--mode=compile: prints what the module's docstring says.

  Args:
    config: the full config.
    settings: its checked sections.
    topology: of the pod, as 'v5e:4x4'; '' is the devices at hand.
    vocab_size: ids with the mask; 0 asks the tokenizer.
    workdir: gets the report as compile.json; None: printed only.

  Returns:
    The report; every figure is per chip.
  """
  devices = find_devices(topology)
  plan = make_plan(
    config, settings, devices, find_vocab_size(settings, vocab_size)
  )
  chip = find_chip(devices[0].device_kind)
  capacity = chip.memory_bytes if chip else _memory_limit(devices[0], topology)
  tokens = settings.train.batch_size * settings.data.length
  report = {
    'topology': topology,
    'device': devices[0].device_kind,
    'num_devices': len(devices),
    'mesh': dict(plan.mesh.shape),
    'num_params': plan.num_params,
    'tokens_per_step': tokens,
    'model_flops': tokens
    / len(devices)
    * train_flops_per_token(plan.network.config, settings.data.length),
    'part_bytes': plan.parts,
  }
  programs = report['programs'] = {}
  for name, lowered in plan.lowered.items():
    log.info('compiling %s', name)
    programs[name] = report_program(lowered, capacity, chip)
    log.info(
      '  %.0f s, peak %.2f GiB',
      programs[name]['compile_secs'],
      programs[name]['peak_bytes'] / 2**30,
    )
  if 'estimated_secs' in programs['train']:
    secs = programs['train']['estimated_secs']
    report['estimated_utilisation'] = (
      report['model_flops'] / secs / (metrics.peak_flops(chip.kind))
    )
    report['estimated_tokens_per_sec'] = tokens / secs
  print(format_report(report), flush=True)
  if workdir is not None:
    path = pathlib.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    (path / REPORT_FILE).write_text(json.dumps(report, indent=2) + '\n')
  return report


def _memory_limit(device, topology: str) -> float | None:
  """What the device at hand says that it has."""
  if topology:
    return None
  return (device.memory_stats() or {}).get('bytes_limit')


def _verdict(row: dict[str, Any]) -> str:
  if row['fits'] is None:
    return 'the size of its memory is not known'
  capacity = row['capacity_bytes']
  share = (capacity - row['peak_bytes']) / capacity
  of = f'of {capacity / 2**30:.2f} GiB'
  return (
    f'{of}: fits, {share:.0%} to spare'
    if row['fits']
    else f'{of}: DOES NOT FIT'
  )


def format_report(report: dict[str, Any]) -> str:
  """The report as a table for people."""
  gib = lambda size: f'{size / 2**30:.2f}'
  mesh = ', '.join(f'{axis} {size}' for axis, size in report['mesh'].items())
  parts = ', '.join(
    f'{name} {gib(size)}' for name, size in report['part_bytes'].items()
  )
  lines = [
    f'{report["num_devices"]} x {report["device"]}'
    + (f' ({report["topology"]})' if report['topology'] else '')
    + f', mesh {mesh}',
    f'{report["num_params"]:,} parameters, {report["tokens_per_step"]:,} tokens a '
    f'step; GiB per chip: {parts}',
    f'{"per chip and run":18}{"args GiB":>10}{"temp GiB":>10}{"peak GiB":>10}'
    f'{"TFLOP":>9}{"Mcycles":>9}{"ms":>9}{"compiled s":>12}',
  ]
  for name, row in report['programs'].items():
    cell = lambda key, unit, digits: (
      f'{row[key] / unit:.{digits}f}' if key in row else '-'
    )
    lines.append(
      f'{name:18}{cell("argument_bytes", 2**30, 2):>10}'
      f'{cell("temporary_bytes", 2**30, 2):>10}{gib(row["peak_bytes"]):>10}'
      f'{cell("flops", 1e12, 3):>9}{cell("estimated_cycles", 1e6, 1):>9}'
      f'{cell("estimated_secs", 1e-3, 1):>9}{row["compile_secs"]:12.1f}'
    )
  for name, row in report['programs'].items():
    lines.append(f'{name}: peak {gib(row["peak_bytes"])} GiB, {_verdict(row)}')
    for kind, each in row.get('collectives', {}).items():
      lines.append(
        f'  {each["count"]:,} x {kind}, {each["bytes"] / 1e6:,.1f} MB'
      )
    if row.get('num_unknown_loops'):
      lines.append(
        f'  {row["num_unknown_loops"]} loop(s) of unknown length counted once'
      )
    if row.get('num_kernel_calls'):
      lines.append(
        f'  {row["num_kernel_calls"]:,} kernel calls, which the compiler does not '
        f'estimate, at least {row["kernel_cycles"] / 1e6:.1f} Mcycles more'
      )
  model_flops = report['model_flops']
  flops = report['programs']['train'].get('flops')
  lines.append(
    f'train: {model_flops / 1e12:.3f} TFLOP of the model per chip (6 x '
    'matrix parameters + attention for every token)'
    + (f', {flops / model_flops:.2f} of it compiled' if flops else '')
  )
  if 'estimated_utilisation' in report:
    lines.append(
      "train, the compiler's estimate, not a measurement: "
      f'{report["estimated_tokens_per_sec"]:,.0f} tokens/s, '
      f'{report["estimated_utilisation"]:.1%} of the peak rate in model FLOPs'
    )
  return '\n'.join(lines)
