"""What a compiled program costs, read off the text of its optimised HLO.

Loops are multiplied out: XLA's own cost analysis counts the body of a scan once.
Of a conditional the dearest branch counts.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from typing import Iterator, NamedTuple

import numpy as np

BITS = {
  'pred': 8,
  's2': 2,
  'u2': 2,
  's4': 4,
  'u4': 4,
  's8': 8,
  'u8': 8,
  's16': 16,
  'u16': 16,
  'bf16': 16,
  'f16': 16,
  's32': 32,
  'u32': 32,
  'f32': 32,
  's64': 64,
  'u64': 64,
  'f64': 64,
  'c64': 64,
  'c128': 128,
}
COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-broadcast',
  'collective-permute',
)
# Kernels written by hand (Pallas), or by the compiler in the same form.
KERNEL = 'tpu_custom_call'

_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_HEAD = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = ')
_NAMES = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}'
)
# {{0,1},{2,3}}, or [groups,size]<=[...], or the axes of a mesh that a group
# spans, mesh['a'=2,'b'=8] {'a','b':(1)4}, here half of b; behind the mesh there
# may be the order of its devices. {} is one group of all.
_GROUPS = re.compile(
  r'replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|'
  r'mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\})'
)
_AXIS_SIZE = re.compile(r"'([^']*)'=(\d+)")
_AXIS_PART = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")
_WINDOW = re.compile(r'window=\{([^}]*)\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name: without the %.
    shape: its type, as text; a tuple's too.
    opcode: 'fusion', 'dot', 'while', ...
    operands: names of its arguments; the text in the parentheses where there are
      none ('0' of a constant or a parameter).
    rest: everything behind them: attributes, metadata, backend_config.
    is_root: whether it is what its computation returns.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from; '' where nothing says so."""
    match = _OP_NAME.search(self.rest)
    return match.group(1) if match else ''

  @functools.cached_property
  def backend_config(self) -> dict:
    """The backend's notes on it; {} where there are none."""
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
    computations: instructions by the computation's name.
    entry: name of the computation that is run.
    by_name: every instruction; names are unique.
  """

  computations: dict[str, list[Instruction]]
  entry: str
  by_name: dict[str, Instruction]


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
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
  operands = tuple(_NAMES.findall(inside)) or (inside,)
  return Instruction(
    head.group(2),
    line[at:end],
    line[end:paren].strip(),
    operands,
    line[close + 1 :],
    bool(head.group(1)),
  )


def parse(text: str) -> Module:
  """Reads the text of `jax.stages.Compiled.as_text()`."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      is_entry = line.startswith('ENTRY')
      name = line.removeprefix('ENTRY').strip().removeprefix('%')
      name = re.split(r'[ (]', name)[0]
      current = computations[name] = []
      entry = name if is_entry else entry
    elif current is not None and (parsed := _parse_instruction(line)):
      current.append(parsed)
  return Module(
    computations,
    entry,
    {x.name: x for body in computations.values() for x in body},
  )


def shapes(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
  """(dtype, sizes) of every array of a type, a tuple's too."""
  text = re.sub(r'\{[^}]*\}', '', text)  # layouts
  for dtype, sizes in _ARRAY.findall(text):
    if dtype in BITS or dtype.startswith('f8'):
      yield dtype, tuple(int(n) for n in sizes.split(',') if n)


def num_bytes(shape: str) -> int:
  """Bytes of an array or a tuple, without padding to tiles."""
  return sum(
    math.prod(sizes) * BITS.get(dtype, 8) // 8 for dtype, sizes in shapes(shape)
  )


def called(instruction: Instruction) -> list[str]:
  """Names of the computations that an instruction runs."""
  names = []
  # Attributes end where metadata and notes begin.
  for one, many in _CALLED.findall(instruction.rest.split('metadata=')[0]):
    names += [one] if one else _NAMES.findall(many)
  return names


def trip_count(module: Module, loop: Instruction) -> int | None:
  """How often a `while` runs its body; None where it depends on data.

  XLA's note where there is one; else the condition must be 'counter < constant',
  the counter starting at a constant (0 where that cannot be seen) and going up by
  one, as in every scan of JAX.
  """
  known = loop.backend_config.get('known_trip_count')
  if known:
    return int(known['n'])
  condition = re.search(r'condition=%?([\w.\-]+)', loop.rest).group(1)
  root = next(x for x in module.computations[condition] if x.is_root)
  if root.opcode != 'compare' or 'direction=LT' not in root.rest:
    return None
  counter, limit = (module.by_name[name] for name in root.operands)
  index = re.search(r'index=(\d+)', counter.rest)
  if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
    return None
  return int(limit.operands[0]) - _initial(module, loop, int(index.group(1)))


def _initial(module: Module, loop: Instruction, index: int) -> int:
  value = module.by_name[loop.operands[0]]
  if value.opcode == 'tuple':
    value = module.by_name[value.operands[index]]
  while value.opcode in ('copy', 'bitcast', 'reshape'):
    value = module.by_name[value.operands[0]]
  return int(value.operands[0]) if value.opcode == 'constant' else 0


def dot_flops(module: Module, instruction: Instruction) -> float:
  """FLOPs of a dot or convolution, a multiply-add is 2; 0 for anything else.

  A TPU's compiler turns products into convolutions, batched ones with a window
  over the batch of which one place is not padding: only products of two real
  numbers count.
  """
  if instruction.opcode not in ('dot', 'convolution'):
    return 0.0
  ((_, out),) = shapes(instruction.shape)
  ((_, left),) = shapes(module.by_name[instruction.operands[0]].shape)
  if instruction.opcode == 'dot':
    dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)
    over = [int(d) for d in dims.group(1).split(',') if d] if dims else []
    return 2.0 * math.prod(out) * math.prod(left[d] for d in over)
  ((_, right),) = shapes(module.by_name[instruction.operands[1]].shape)
  lhs, rhs, result = re.search(
    r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest
  ).groups()
  flops = (
    2.0
    * out[result.index('b')]
    * out[result.index('f')]
    * right[rhs.index('i')]
  )
  window = dict(
    part.split('=')
    for part in (_WINDOW.search(instruction.rest) or re.match('()', ''))
    .group(1)
    .split()
  )
  for d in range(len(lhs) - 2):
    field = lambda key, default: (
      window[key].split('x')[d] if key in window else default
    )
    flops *= _real_places(
      left[lhs.index(str(d))],
      right[rhs.index(str(d))],
      out[result.index(str(d))],
      int(field('stride', 1)),
      int(field('pad', '0_0').split('_')[0]),
      int(field('lhs_dilate', 1)),
      int(field('rhs_dilate', 1)),
    )
  return flops


@functools.lru_cache(maxsize=None)
def _real_places(size, window, out, stride, pad, lhs_dilate, rhs_dilate) -> int:
  """(output, window) places of one dimension that fall on an input's number."""
  at = (
    np.arange(out)[:, None] * stride
    + np.arange(window)[None] * rhs_dilate
    - pad
  )
  inside = (at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)
  return int(inside.sum())


class Kernel(NamedTuple):
  """One call of a kernel.

  Attributes:
    name: where it comes from in the traced program.
    flops: that its author says it does; 0 where nothing is said.
    num_bytes: that it moves: the author's word, else all that goes in and out.
  """

  name: str
  flops: float
  num_bytes: float


def _kernel(module: Module, instruction: Instruction) -> Kernel:
  said = instruction.backend_config.get('custom_call_config', {}).get(
    'cost_estimate', {}
  )
  moved = num_bytes(instruction.shape) + sum(
    num_bytes(module.by_name[x].shape) for x in instruction.operands
  )
  return Kernel(
    instruction.op_name or instruction.name,
    float(said.get('flops', 0)),
    float(said.get('bytes_accessed', moved)),
  )


@dataclasses.dataclass
class Cost:
  """What one run of a computation costs one device.

  Attributes:
    flops: of dots and convolutions, and of kernels that say theirs.
    cycles: the compiler's estimates, added up.
    kernels: calls of kernels, which the compiler does not estimate: {`Kernel`:
      calls}.
    collectives: {kind: [number, bytes]}; bytes are the larger of what goes in
      and what comes out on one device. Those of a device with itself are none.
    cycles_by_op: cycles by where they come from in the traced program.
    num_unknown_loops: loops whose trips depend on data; their bodies count once.
  """

  flops: float = 0.0
  cycles: float = 0.0
  kernels: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  cycles_by_op: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  num_unknown_loops: int = 0

  def add(self, other: 'Cost', times: int = 1):
    """Adds `times` runs of another."""
    self.flops += times * other.flops
    self.cycles += times * other.cycles
    self.num_unknown_loops += other.num_unknown_loops
    for key, n in other.kernels.items():
      self.kernels[key] += times * n
    for key, n in other.cycles_by_op.items():
      self.cycles_by_op[key] += times * n
    for kind, (n, size) in other.collectives.items():
      mine = self.collectives.setdefault(kind, [0, 0])
      mine[0] += times * n
      mine[1] += times * size


def cost(module: Module) -> Cost:
  """What one run of the program costs one device."""
  return _Walk(module).of(module.entry, False)


class _Walk:
  """Costs of a module's computations, each worked out once."""

  def __init__(self, module: Module):
    self._module = module
    self._known = {}

  def of(self, name: str, is_fused: bool) -> Cost:
    key = name, is_fused
    if key not in self._known:
      total = Cost()
      for instruction in self._module.computations[name]:
        self._count(total, instruction, is_fused)
      self._known[key] = total
    return self._known[key]

  def _count(self, total: Cost, instruction: Instruction, is_fused: bool):
    opcode = instruction.opcode
    total.flops += dot_flops(self._module, instruction)
    kind = opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      if group_size(instruction) == 1:
        return
      self._count_collective(total, kind, instruction)
      return
    if not is_fused:  # the parts of a fusion are in its own estimate
      cycles = estimated_cycles(instruction)
      total.cycles += cycles
      total.cycles_by_op[instruction.op_name or opcode] += cycles
    if opcode == 'custom-call' and f'"{KERNEL}"' in instruction.rest:
      kernel = _kernel(self._module, instruction)
      total.kernels[kernel] += 1
      total.flops += kernel.flops
    elif opcode == 'while':
      times = trip_count(self._module, instruction)
      if times is None:
        total.num_unknown_loops += 1
      for name in called(instruction):
        total.add(self.of(name, False), 1 if times is None else times)
    elif opcode == 'conditional':
      branches = [self.of(name, False) for name in called(instruction)]
      total.add(max(branches, key=lambda cost: (cost.cycles, cost.flops)))
    elif opcode in ('fusion', 'call', 'async-start'):
      for name in called(instruction):
        total.add(self.of(name, is_fused or opcode == 'fusion'))

  def _count_collective(self, total, kind, instruction):
    into = sum(
      num_bytes(self._module.by_name[x].shape) for x in instruction.operands
    )
    size = num_bytes(instruction.shape)
    if (
      instruction.opcode.endswith('-start')
      and instruction.shape[0] == '('
      and (kind != 'all-reduce')
    ):
      size -= into  # its result repeats what goes in
    counted = total.collectives.setdefault(kind, [0, 0])
    counted[0] += 1
    counted[1] += max(into, size)


def group_size(instruction: Instruction) -> int | None:
  """Devices that take part in a collective together; None where all do."""
  match = _GROUPS.search(instruction.rest)
  if not match:
    return None
  if match[3] is not None:
    sizes = dict(_AXIS_SIZE.findall(match[3]))
    return math.prod(
      int(part or sizes[axis]) for axis, part in _AXIS_PART.findall(match[4])
    )
  return int(match[2]) if match[2] else len(match[1].split(','))


def estimated_cycles(instruction: Instruction) -> float:
  """The TPU compiler's estimate of one run; 0 where it gives none."""
  if '"estimated_cycles"' not in instruction.rest:
    return 0.0
  window = instruction.backend_config.get('window_config', {})
  return max(float(window.get('estimated_cycles', 0)), 0.0)
