r"""--mode=compile: does a config fit its devices, and how fast can it be?

    python launch.py --mode=compile --config=configs/gpt2_small.py \
        --topology=v5e:4x4 --vocab_size=50258

The real training step, evaluation step and sampler are compiled for a TPU pod
that need not exist (pip install -e '.[tpu]' brings the compiler), or for the
devices of this machine. No program runs and no data is read. The exit status is
1 if one of them does not fit.

Memory is XLA's own allocation of arguments and temporaries. Times are not
measured but estimated by the TPU compiler: the cycles that it notes for each
fusion, with loops multiplied out (`hlo.cost`). Kernels, which it does not
estimate, count as the larger of FLOPs / peak rate and bytes / memory rate. That
is a lower bound: a head of 64 fills half of the matrix unit, which can double
the time. Copies that overlap with computation, waiting for collectives, and
the host are left out.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import re
import time
from typing import Any, cast

from absl import flags
import jax
from jax.experimental import topologies
import numpy as np

from nanodlm import lm as lms
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.config import Settings, Start
from nanodlm.data import tokenizers
from nanodlm.devices import mesh as meshes
from nanodlm.perf import hlo
from nanodlm.run import Run
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps import sample as sample_steps
from nanodlm.training import metrics
from nanodlm.types import Batch, Canvas, InputError

log = logging.getLogger('nanodlm')

REPORT_FILE = 'compile.json'
_FLAT = '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'.split()
_CUBES = (
  '2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16'.split()
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation of TPUs, from the data sheets.

  Attributes:
    kind: prefix of JAX's device_kind.
    shapes: topologies that are offered, in chips, such as '4x4'.
    memory_bytes: memory per chip that programs can use.
    memory_rate: bandwidth of that memory, bytes/s.
    hertz: clock rate, derived from the peak FLOP/s and the matrix units' size.
  """

  kind: str
  shapes: Sequence[str]
  memory_bytes: float
  memory_rate: float
  hertz: float


# memory_bytes are the limits in the compiler's own error messages.
CHIPS = {
  'v4': Chip('TPU v4', _CUBES, 31.25 * 2**30, 1228e9, 1.05e9),
  'v5e': Chip('TPU v5 lite', _FLAT, 15.75 * 2**30, 819e9, 1.5e9),
  'v5p': Chip('TPU v5', _CUBES, 95 * 2**30, 2765e9, 1.75e9),
  'v6e': Chip('TPU v6 lite', _FLAT, 31.25 * 2**30, 1640e9, 1.75e9),
}


def use_topology(topology: str):
  """Keeps JAX away from this machine's accelerators; to be called first.

  Raises:
    InputError: the topology is unknown, or the TPU compiler is not installed.
  """
  name, _, shape = topology.partition(':')
  if name not in CHIPS or shape not in CHIPS[name].shapes:
    known = '; '.join(
      f'{name}: {", ".join(chip.shapes)}' for name, chip in CHIPS.items()
    )
    raise InputError(
      f'--topology={topology!r} is unknown; allowed are, written as v5e:4x4, '
      + known
    )
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(
      f"--topology={topology!r} needs the TPU compiler: pip install -e '.[tpu]'"
    )
  jax.config.update('jax_platforms', 'cpu')
  # By default libtpu asks the cloud's metadata server for the kind of machine
  # and allows one process at a time, because it expects to use chips.
  defaults = {
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  }
  os.environ.update(defaults | os.environ)


def find_devices(topology: str) -> list[Any]:
  """Returns the devices of a topology, or this machine's for ''."""
  if not topology:
    return jax.devices()
  options = {}
  if topology.endswith(':1x1'):
    options['chips_per_host_bounds'] = (1, 1, 1)
  if topology.startswith('v4:'):
    # One device per chip, as at run time.
    options['chip_config_name'] = 'megacore'
  description = topologies.get_topology_desc(
    platform='tpu', topology_name=topology, **options
  )
  return list(description.devices)


def find_chip(device_kind: str) -> Chip | None:
  """Returns the chip with the longest `kind` that a device_kind starts with."""
  fitting = [c for c in CHIPS.values() if device_kind.startswith(c.kind)]
  return max(fitting, key=lambda chip: len(chip.kind), default=None)


def find_vocab_size(settings: Settings, given: int) -> int:
  """Returns `given`, or for 0 the tokenizer's size if that needs no data."""
  if given == 1:
    raise InputError(
      '--vocab_size=1 must be >= 2 to hold a token and the mask, or 0 to take '
      "the tokenizer's"
    )
  if given:
    return given
  tokenizer = settings.tokenizer
  if tokenizer.is_trained:
    return tokenizer.vocab_size + 2  # The separator and the mask.
  try:
    return tokenizers.make_tokenizer(tokenizer).vocab_size
  except InputError as error:
    raise InputError(
      f'{error}. To do without the tokenizer, give the number of its ids with '
      'the mask as --vocab_size'
    ) from error


def random_batch(run: Run, batch_size: int) -> Batch:
  """Returns a batch of random tokens that are all scored."""
  data, shape = run.settings.data, (batch_size, run.settings.data.length)
  generator = np.random.default_rng(0)
  tokens = generator.integers(0, run.objective.mask_id, shape, dtype=np.int32)
  has_segments = data.segment_ids or data.padding == 'masked'
  segment_ids = np.zeros(shape, np.int32) if has_segments else None
  return lms.make_batch(tokens, np.ones(shape, bool), segment_ids)


def train_batch(run: Run) -> Batch:
  """Returns a `random_batch` as the training step takes it."""
  batch = random_batch(run, run.settings.train.batch_size)
  return batch._replace(index=None)


def blank_canvas(run: Run, num_samples: int) -> Canvas:
  """Returns empty canvases, their number rounded up to whole devices."""
  shape = (num_samples, run.settings.sample_length)
  tokens = np.full(shape, run.objective.mask_id, np.int32)
  tokens = lms.whole_batch(run, tokens)
  return Canvas(tokens, np.zeros(tokens.shape, bool))


def make_eval_step(run: Run) -> Any:
  """Builds the evaluation step, (params, batch with index) -> values."""
  options = run.settings.eval
  return evaluate_steps.make_eval_step(
    run.scorer, run.mesh, num_draws=options.num_draws, seed=options.seed
  )


# As in 'Used 21.51G of 15.75G hbm' of the TPU compiler's error.
_USED = re.compile(r'[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def report_program(
  lowered: jax.stages.Lowered, capacity: float | None, chip: Chip | None
) -> dict[str, Any]:
  """Compiles a program and returns its memory, work and estimated time.

  Args:
    lowered: the program.
    capacity: bytes of memory per chip; None if unknown.
    chip: its kind, for estimates of time; None for no estimates.

  Returns:
    Figures for one run on one chip. peak_bytes is the sum of argument_bytes,
    output_bytes (without donated arguments) and temporary_bytes; fits is None
    if the capacity is unknown. Only the memory if the compiler runs out of it.
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
  secs = time.monotonic() - start
  memory = cast(Any, compiled.memory_analysis())
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
  cost = hlo.cost(hlo.parse(compiled.as_text()))
  report = {
    'compile_secs': secs,
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': outputs,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': peak,
    'capacity_bytes': capacity,
    'fits': None if capacity is None else peak <= capacity,
    'flops': cost.flops,
    'num_unknown_loops': cost.num_unknown_loops,
    'collectives': cost.collectives,
  }
  if chip is not None and cost.cycles:
    cycles = kernel_cycles(cost, chip)
    report |= {
      'estimated_cycles': cost.cycles,
      'kernel_cycles': cycles,
      'num_kernel_calls': sum(cost.kernels.values()),
      'estimated_secs': (cost.cycles + cycles) / chip.hertz,
    }
  return report


def kernel_cycles(cost: hlo.Cost, chip: Chip) -> float:
  """Returns a lower bound on the cycles of kernels.

  A call takes the larger of its FLOPs at the chip's peak rate and its bytes at
  its memory's rate; of a kernel that does not state its FLOPs, only the bytes.
  """
  peak = metrics.PEAK_FLOPS[chip.kind]
  return chip.hertz * sum(
    count * max(kernel.flops / peak, kernel.num_bytes / chip.memory_rate)
    for kernel, count in cost.kernels.items()
  )


def abstract_training(run: Run) -> tuple[Any, tuple[Any, Batch]]:
  """Returns the training step and its arguments as abstract arrays."""
  training = runs.make_training(run)
  state = meshes.shapes_sharded(run.mesh, training.init_state)
  batch = meshes.place(meshes.batch_sharding(run.mesh), train_batch(run))
  return training.step, (state, batch)


def compile_run(run: Run, topology: str = '') -> dict[str, Any]:
  """Compiles the programs of a run; returns the report, all figures per chip.

  `topology` is the pod, such as 'v5e:4x4', or '' for this machine's devices.
  """
  runs.check_training(run)
  settings, mesh = run.settings, run.mesh
  on_rows = lambda tree: meshes.place(meshes.batch_sharding(mesh), tree)
  train_step, (state, batch) = abstract_training(run)
  params = state.eval_params
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = meshes.place(meshes.replicated(mesh), key)
  canvas = on_rows(blank_canvas(run, settings.sample.num_samples))
  rows = on_rows(random_batch(run, settings.eval.batch_size))
  sample_step = sample_steps.make_sample_step(run.scorer, run.sampler, mesh)
  lowered = {
    'train': train_step.lower(state, batch),
    'eval': make_eval_step(run).lower(params, rows),
    'sample': cast(Any, sample_step).lower(params, key, canvas),
  }
  device, num_devices = mesh.devices.flat[0], mesh.devices.size
  chip, capacity = find_chip(device.device_kind), None
  if chip:
    capacity = chip.memory_bytes
  elif not topology:
    capacity = (device.memory_stats() or {}).get('bytes_limit')
    if device.platform == 'cpu' and 'SC_PHYS_PAGES' in os.sysconf_names:
      pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
      capacity = pages / num_devices
  tokens = settings.train.batch_size * settings.data.length
  parts = dict(
    parameters=(state.params, state.base),
    average=state.ema_params,
    frozen=state.frozen,
    optimiser=state.opt_state,
    batch=batch,
  )
  report = {
    'topology': topology,
    'device': device.device_kind,
    'num_devices': num_devices,
    'mesh': dict(mesh.shape),
    'num_params': run.num_params(),
    'tokens_per_step': tokens,
    'model_flops': tokens / num_devices * run.flops_per_token(),
    'part_bytes': {
      name: meshes.bytes_per_device(part) for name, part in parts.items()
    },
    'programs': {},
  }
  for name, program in lowered.items():
    log.info('compiling %s', name)
    row = report['programs'][name] = report_program(program, capacity, chip)
    secs, peak = row['compile_secs'], row['peak_bytes'] / 2**30
    log.info(f'  {secs:.0f} s, peak {peak:.2f} GiB')
  secs = report['programs']['train'].get('estimated_secs')
  if secs and chip:
    report['estimated_tokens_per_sec'] = tokens / secs
    if report['model_flops']:
      rate = report['model_flops'] / secs
      report['estimated_utilisation'] = rate / metrics.PEAK_FLOPS[chip.kind]
  return report


def format_mesh(mesh: dict[str, int]) -> str:
  """Formats the sizes of a mesh."""
  return ', '.join(f'{axis} {size}' for axis, size in mesh.items())


def format_collectives(row: dict[str, Any]) -> list[str]:
  """Formats the collectives of a program, one kind per line."""
  return [
    f'  {each["count"]:,} x {kind}, {each["bytes"] / 1e6:,.2f} MB'
    for kind, each in sorted(row.get('collectives', {}).items())
  ]


_COLUMNS = (
  ('per chip and run', 'name', ''),
  ('args GiB', 'argument_bytes', '.2f', 2**30),
  ('temp GiB', 'temporary_bytes', '.2f', 2**30),
  ('peak GiB', 'peak_bytes', '.2f', 2**30),
  ('of GiB', 'capacity_bytes', '.2f', 2**30),
  ('TFLOP', 'flops', '.3f', 1e12),
  ('unknown loops', 'num_unknown_loops', '.0f'),
  ('Mcycles', 'estimated_cycles', '.1f', 1e6),
  ('kernel Mcycles', 'kernel_cycles', '.1f', 1e6),
  ('ms', 'estimated_secs', '.1f', 1e-3),
  ('compiled s', 'compile_secs', '.1f'),
)
_VERDICTS = {True: 'fits', False: 'DOES NOT FIT', None: 'memory size unknown'}
_NOTES = """\
Loops of unknown length count once. Cycles and times are the compiler's
estimate, not a measurement; it does not estimate kernels, whose cycles are a
lower bound. Model FLOPs: for every token 6 x matrix parameters + attention."""


def format_report(report: dict[str, Any]) -> str:
  """Formats the report of `compile_run` as a table with remarks."""
  topology = f' ({report["topology"]})' if report['topology'] else ''
  parts = ', '.join(
    f'{name} {size / 2**30:.2f}' for name, size in report['part_bytes'].items()
  )
  rows = [{'name': name, **row} for name, row in report['programs'].items()]
  lines = [
    f'{report["num_devices"]} x {report["device"]}{topology}, mesh '
    + format_mesh(report['mesh']),
    f'{report["num_params"]:,} parameters, {report["tokens_per_step"]:,} '
    f'tokens per step; GiB per chip: {parts}',
    *metrics.format_table(_COLUMNS, rows),
  ]
  for name, row in report['programs'].items():
    lines += [f'{name}: {_VERDICTS[row["fits"]]}', *format_collectives(row)]
  found = []
  if model := report['model_flops']:
    found.append(f'{model / 1e12:.3f} TFLOP per chip of model FLOPs')
    if flops := report['programs']['train'].get('flops'):
      found[0] += f', {flops / model:.2f} of them compiled'
  if 'estimated_tokens_per_sec' in report:
    found.append(f'{report["estimated_tokens_per_sec"]:,.0f} tokens/s')
  if 'estimated_utilisation' in report:
    found[-1] += f', {report["estimated_utilisation"]:.1%} of the peak rate'
  lines += ['train: ' + '; '.join(found)] * bool(found)
  return '\n'.join([*lines, _NOTES])


def define_flags():
  """Defines the flags of --mode=compile."""
  flags.DEFINE_string(
    'topology',
    '',
    "The pod to compile for, e.g. v5e:4x4; by default this machine's devices.",
  )
  flags.DEFINE_integer(
    'vocab_size',
    0,
    'Number of ids with the mask; 0 for those of the tokenizer.',
    lower_bound=0,
  )


def main(start: Start) -> int:
  """Runs --mode=compile: prints the report, and writes it to --workdir."""
  options = flags.FLAGS
  topology = options.topology
  if start.workdir:
    workdirs.check_writable(start.workdir)
  if topology:
    use_topology(topology)
  settings, _ = start.resolve()
  vocab_size = find_vocab_size(settings, options.vocab_size)
  devices = find_devices(topology)
  run = runs.make_run(settings, devices=devices, platform=devices[0].platform)
  report = compile_run(run.with_vocabulary(vocab_size), topology)
  print(format_report(report), flush=True)
  if not topology:
    log.info(
      'for this machine; --topology=v5e:4x4 or another one asks for a pod '
      "(pip install -e '.[tpu]')"
    )
  if start.workdir:
    workdirs.make(start.workdir)
    path = pathlib.Path(start.workdir) / REPORT_FILE
    workdirs.write(path, json.dumps(report, indent=2) + '\n')
  fits = [row['fits'] for row in report['programs'].values()]
  return 1 if False in fits else 0
