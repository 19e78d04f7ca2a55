"""Costs of a compiled program, read from the text of its optimised HLO.

The bodies of loops are multiplied by their trip counts, whereas XLA's own cost
analysis counts a scan's body once. A conditional has the cost of its most
expensive branch.
"""

import collections
from collections.abc import Iterator
import dataclasses
import functools
import json
import math
import re
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-broadcast',
  'collective-permute',
)
# The target of calls of Pallas kernels and of the compiler's own kernels.
KERNEL = '"tpu_custom_call"'

# Groups: dtype, its bits, sizes. A pred takes a byte.
_ARRAY = re.compile(r'\b(pred|(?:bf|f|s|u|c)(\d+)\w*)\[([\d,]*)\]')
_HEAD = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = ')
_NAMES = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}'
)
# Forms of replica_groups: {{0,1},{2,3}}; [groups,size]<=[...]; {} for one group
# of all devices; and the axes of a mesh that a group spans, such as
# mesh['a'=2,'b'=8] {'a','b':(1)4}, which spans half of b. The mesh may be
# followed by the order of its devices.
_GROUPS = re.compile(
  r'replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|'
  r'mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\})'
)
_AXIS_SIZE = re.compile(r"'([^']*)'=(\d+)")
_AXIS_PART = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name: without the %.
    shape: its type, possibly a tuple, as text.
    opcode: 'fusion', 'dot', 'while', ...
    operands: names of its arguments, or the text in the parentheses if that
      contains none, such as the '0' of a constant.
    rest: the text after the operands: attributes, metadata, backend_config.
    is_root: whether its computation returns it.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  def find(self, pattern: str) -> str:
    """Returns the group of a pattern in `rest`; '' without a match."""
    match = re.search(pattern, self.rest)
    return match[1] if match else ''

  @functools.cached_property
  def backend_config(self) -> dict[str, Any]:
    """The backend's annotations; {} if it has none, or none in JSON."""
    start = self.rest.find('backend_config={')
    if start < 0:
      return {}
    try:
      return json.JSONDecoder().raw_decode(self.rest, start + 15)[0]
    except json.JSONDecodeError:
      return {}


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program.

  Attributes:
    computations: instructions by the name of their computation.
    entry: name of the computation that the program runs.
    by_name: all instructions, whose names are unique.
  """

  computations: dict[str, list[Instruction]]
  entry: str
  by_name: dict[str, Instruction]

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """Returns the instructions that an instruction takes its inputs from."""
    return [self.by_name[name] for name in instruction.operands]


def _closing(text: str, start: int) -> int:
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise ValueError(f'unbalanced: {text[start : start + 80]!r}')


def _parse_instruction(line: str) -> Instruction | None:
  head = _HEAD.match(line)
  if not head:
    return None
  at = head.end()
  end = _closing(line, at) + 1 if line[at] == '(' else line.index(' ', at)
  paren = line.index('(', end)
  close = _closing(line, paren)
  inside = line[paren + 1 : close]
  return Instruction(
    name=head[2],
    shape=line[at:end],
    opcode=line[end:paren].strip(),
    operands=tuple(_NAMES.findall(inside)) or (inside,),
    rest=line[close + 1 :],
    is_root=bool(head[1]),
  )


def parse(text: str | None) -> Module:
  """Parses the text that `jax.stages.Compiled.as_text()` returns."""
  if text is None:
    raise ValueError('the backend does not show the text of its programs')
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      name = line.removeprefix('ENTRY').strip().removeprefix('%')
      name = re.split(r'[ (]', name)[0]
      current = computations[name] = []
      entry = name if line.startswith('ENTRY') else entry
    elif current is not None and (parsed := _parse_instruction(line)):
      current.append(parsed)
  by_name = {x.name: x for body in computations.values() for x in body}
  return Module(computations, entry, by_name)


def _arrays(shape: str) -> Iterator[tuple[int, list[int]]]:
  """Yields (bits of an element, sizes) of each array of a type."""
  without_layouts = re.sub(r'\{[^}]*\}', '', shape)
  for _, bits, sizes in _ARRAY.findall(without_layouts):
    yield int(bits or 8), [int(n) for n in sizes.split(',') if n]


def num_bytes(shape: str) -> int:
  """Returns the bytes of an array or a tuple, without padding to tiles."""
  return sum(math.prod(sizes) * bits // 8 for bits, sizes in _arrays(shape))


def called(instruction: Instruction) -> list[str]:
  """Returns the names of the computations that an instruction runs."""
  names = []
  # Metadata and the backend's annotations follow the attributes.
  for one, many in _CALLED.findall(instruction.rest.split('metadata=')[0]):
    names += [one] if one else _NAMES.findall(many)
  return names


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns how often a `while` runs its body; None if that depends on data.

  Without XLA's own annotation, the condition must be 'counter < constant', and
  the counter must start at a constant (assumed to be 0 if it cannot be traced)
  and grow by one, as in every scan of JAX.
  """
  known = loop.backend_config.get('known_trip_count')
  if known:
    return int(known['n'])
  condition = module.computations[loop.find(r'condition=%?([\w.\-]+)')]
  root = next(x for x in condition if x.is_root)
  if root.opcode != 'compare' or 'direction=LT' not in root.rest:
    return None
  counter, limit = module.operands(root)
  if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
    return None
  start = module.operands(loop)[0]
  if start.opcode == 'tuple':
    start = module.operands(start)[int(counter.find(r'index=(\d+)'))]
  while start.opcode in ('copy', 'bitcast', 'reshape'):
    start = module.operands(start)[0]
  first = int(start.operands[0]) if start.opcode == 'constant' else 0
  return int(limit.operands[0]) - first


def dot_flops(module: Module, instruction: Instruction) -> float:
  """Returns the FLOPs of a dot or convolution, 2 per multiply-add; else 0.

  The TPU compiler turns matrix products into convolutions, and batched ones
  into convolutions with a window over the batch that meets padding everywhere
  but in one place. Therefore only products of two real numbers count.
  """
  if instruction.opcode not in ('dot', 'convolution'):
    return 0.0
  (_, left), (_, right), (_, out) = (
    next(_arrays(x.shape)) for x in (*module.operands(instruction), instruction)
  )
  if instruction.opcode == 'dot':
    dims = instruction.find(r'lhs_contracting_dims=\{([\d,]*)\}')
    contracted = [left[int(d)] for d in dims.split(',') if d]
    return 2.0 * math.prod(out) * math.prod(contracted)
  labels = instruction.find(r'dim_labels=(\w+_\w+->\w+)')
  lhs, rhs, result = re.split('_|->', labels)
  flops = 2.0 * out[result.index('b')] * out[result.index('f')]
  flops *= right[rhs.index('i')]
  window = dict(
    part.split('=') for part in instruction.find(r'window=\{([^}]*)\}').split()
  )
  for d in range(len(lhs) - 2):
    sizes = [
      dims[labels.index(str(d))]
      for dims, labels in ((left, lhs), (right, rhs), (out, result))
    ]
    steps = [
      int(window[key].split('x')[d]) if key in window else 1
      for key in ('stride', 'lhs_dilate', 'rhs_dilate')
    ]
    pad = window['pad'].split('x')[d] if 'pad' in window else '0_0'
    flops *= _real_places(*sizes, *steps, int(pad.split('_')[0]))
  return flops


@functools.cache
def _real_places(size, window, out, stride, lhs_dilate, rhs_dilate, pad) -> int:
  """Counts the (output, window) places of a dimension that are not padding."""
  at = np.arange(out)[:, None] * stride - pad
  at = at + np.arange(window)[None] * rhs_dilate
  inside = (at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)
  return int(inside.sum())


class Kernel(NamedTuple):
  """The cost of a call of a custom kernel, by its author's cost estimate.

  Attributes:
    flops: FLOPs; 0 without an estimate.
    num_bytes: bytes read and written; without an estimate, the size of all
      inputs and outputs.
  """

  flops: float
  num_bytes: float


def _kernel(module: Module, instruction: Instruction) -> Kernel:
  config = instruction.backend_config.get('custom_call_config', {})
  stated = config.get('cost_estimate', {})
  moved = sum(
    num_bytes(x.shape) for x in (instruction, *module.operands(instruction))
  )
  return Kernel(
    float(stated.get('flops', 0)), float(stated.get('bytes_accessed', moved))
  )


@dataclasses.dataclass
class Cost:
  """The cost of running a computation once, on one device.

  Attributes:
    flops: FLOPs of dots, convolutions, and kernels with a cost estimate.
    cycles: the sum of the compiler's estimates.
    kernels: number of calls of each `Kernel`; the compiler does not estimate
      kernels.
    collectives: {kind: {'count': calls, 'bytes': traffic}}. The traffic of a
      call is the larger of its inputs and outputs on one device. Collectives of
      a device with itself are left out.
    num_unknown_loops: loops whose trip count depends on data; their bodies
      count once.
  """

  flops: float = 0.0
  cycles: float = 0.0
  kernels: dict[Kernel, int] = dataclasses.field(
    default_factory=collections.Counter
  )
  collectives: dict[str, dict[str, float]] = dataclasses.field(
    default_factory=dict
  )
  num_unknown_loops: int = 0

  def add(self, other: 'Cost', times: int = 1):
    """Adds the cost of running another computation `times` times."""
    self.flops += times * other.flops
    self.cycles += times * other.cycles
    self.num_unknown_loops += other.num_unknown_loops
    for kernel, count in other.kernels.items():
      self.kernels[kernel] += times * count
    for kind, each in other.collectives.items():
      self.add_collective(kind, times * each['count'], times * each['bytes'])

  def add_collective(self, kind: str, count: float, size: float):
    """Adds `count` collectives with a traffic of `size` bytes in total."""
    total = self.collectives.setdefault(kind, {'count': 0, 'bytes': 0})
    total['count'] += count
    total['bytes'] += size


def cost(module: Module) -> Cost:
  """Returns the cost of running a program once, on one device."""

  @functools.cache
  def cost_of(name: str, is_fused: bool) -> Cost:
    total = Cost()
    for instruction in module.computations[name]:
      opcode = instruction.opcode
      kind = opcode.removesuffix('-start')
      total.flops += dot_flops(module, instruction)
      if kind in COLLECTIVES:
        if group_size(instruction) != 1:
          total.add_collective(kind, 1, _traffic(module, instruction))
        continue
      if not is_fused:  # The estimate of a fusion includes its parts.
        total.cycles += estimated_cycles(instruction)
      if opcode == 'custom-call' and KERNEL in instruction.rest:
        kernel = _kernel(module, instruction)
        total.kernels[kernel] += 1
        total.flops += kernel.flops
      elif opcode == 'while':
        times = trip_count(module, instruction)
        total.num_unknown_loops += times is None
        for body in called(instruction):
          total.add(cost_of(body, False), 1 if times is None else times)
      elif opcode == 'conditional':
        branches = [cost_of(branch, False) for branch in called(instruction)]
        total.add(max(branches, key=lambda cost: (cost.cycles, cost.flops)))
      elif opcode in ('fusion', 'call', 'async-start'):
        for body in called(instruction):
          total.add(cost_of(body, is_fused or opcode == 'fusion'))
    return total

  return cost_of(module.entry, False)


def _traffic(module: Module, instruction: Instruction) -> int:
  """Returns the larger of a collective's inputs and outputs, in bytes."""
  inputs = sum(num_bytes(x.shape) for x in module.operands(instruction))
  outputs = num_bytes(instruction.shape)
  # The result of an asynchronous start repeats the inputs, except all-reduce's.
  if (
    instruction.opcode.endswith('-start')
    and instruction.opcode != 'all-reduce-start'
    and instruction.shape.startswith('(')
  ):
    outputs -= inputs
  return max(inputs, outputs)


def group_size(instruction: Instruction) -> int | None:
  """Returns the number of devices in a collective's group; None for all."""
  match = _GROUPS.search(instruction.rest)
  if not match:
    return None
  ids, size, mesh, axes = match.groups()
  if mesh is not None:
    sizes = dict(_AXIS_SIZE.findall(mesh))
    parts = _AXIS_PART.findall(axes)
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  return int(size) if size else len(ids.split(','))


def estimated_cycles(instruction: Instruction) -> float:
  """Returns the TPU compiler's estimate for one run; 0 without an estimate."""
  if '"estimated_cycles"' not in instruction.rest:
    return 0.0
  window = instruction.backend_config.get('window_config', {})
  return max(float(window.get('estimated_cycles', 0)), 0.0)
