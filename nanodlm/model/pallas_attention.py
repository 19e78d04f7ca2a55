"""Pallas kernels for TPUs: attention, and the norm and rotation of its heads.

Scores never leave the chip: the backward kernel recomputes them from q, k and
  v. XLA stores the float32 probabilities of every layer for the backward pass:
  at length 1024 these are 4.4 GiB for 8 rows of GPT-2 small, and half of the
  step's cycles. For configs/gpt2_small.py with 8 rows per v5e chip the compiler
  estimates, in millions of cycles and GiB of temporary memory (nothing was
  run): XLA's attention 292 and 13.6, this one 153 and 6.7, with
  model.remat='dots' 160 and 3.3; with norm and rotation as a kernel and with
  norms and gated activations that store their inputs only 131 and 4.5, without
  a scan over the layers 90 and 2.8.

JAX's splash attention is not an option: it cannot tell shard_map over which
devices its outputs vary.

Layout: q, k and v stay [B, L, H x Dh] in blocks of 128 lanes, so that nothing
  is transposed or padded in HBM. Of two heads of 64 in a block, one at a time
  is zeroed, which costs the matrix unit no more than padding. Scores are [keys,
  queries]: reductions run over sublanes, and only [L, 128] is transposed. All
  keys of a head fit into VMEM, so that the softmax needs no running maxima.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

LANES = 128
# Scores of one block, [keys, queries] float32: 2 MiB, a few of which are alive.
# A kernel with 4096 keys needs 16.5 MiB of VMEM; the default limit is 16.
MAX_SCORES = 2**19
VMEM_BYTES = 24 * 2**20
# In 16 bits; half of it in float32. A v4 with its 16 MiB of VMEM cannot take
# 4096 keys; use model.attention='xla' there.
MAX_KEYS = MAX_SCORES // LANES
MIN_SCORE = float(jnp.finfo(jnp.float32).min)


def _divide(x, divisor: int):
  """x // divisor for x >= 0; the operator // adds code for other signs."""
  return jax.lax.div(x, jnp.int32(divisor))


@dataclasses.dataclass(frozen=True)
class Pattern:
  """The keys that a query sees, apart from segments.

  Attributes:
    kind: 'all'; 'causal': keys of the query's own and earlier blocks; 'noisy':
      of the noisy keys 0..L-1 those of its own block, of the clean keys L..2L-1
      those of earlier blocks.
    block_size: S; 1 for a causal text model.
    shift: with 'noisy', the number of places by which clean tokens are delayed,
      0 or 1; with 1, the first clean place of the own block is seen too.
  """

  kind: str
  block_size: int = 1
  shift: int = 0

  def seen(
    self, keys: jax.Array, queries: jax.Array, num_keys: int
  ) -> jax.Array | None:
    """Maps positions [K, 1] and [1, Q] to [K, Q] bool; None: all seen."""
    if self.kind == 'all':
      return None
    query_block = _divide(queries, self.block_size)
    if self.kind == 'causal':
      return _divide(keys, self.block_size) <= query_block
    half = num_keys // 2
    is_noisy = keys < half
    # With a shift, clean places count from one block later, to be >= 0.
    later = self.block_size - self.shift if self.shift else 0
    clean = keys - half + later
    block = _divide(jnp.where(is_noisy, keys, clean), self.block_size)
    if self.shift:
      block = jnp.where(is_noisy, block, block - 1)
    # Twice the block, and odd for noisy keys.
    code = 2 * block + is_noisy.astype(jnp.int32)
    limit = 2 * query_block
    return (code == limit + 1) | ((code < limit) & (code & 1 == 0))


def fits(q: Any, num_keys: int) -> bool:
  """Returns whether the kernel supports q [B, Lq, H, Dh] on that many keys."""
  _, num_queries, num_heads, head_dim = q.shape
  if head_dim % LANES and (LANES % head_dim or num_heads % (LANES // head_dim)):
    return False
  return (
    num_queries % LANES == 0
    and num_keys % LANES == 0
    and num_keys <= MAX_KEYS * 2 // max(q.dtype.itemsize, 2)
  )


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  pattern: Pattern,
  query_ids: jax.Array | None = None,
  key_ids: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Scaled dot-product attention with a float32 softmax, of sizes that `fits`.

  Args:
    q: [B, Lq, H, Dh].
    k: [B, Lk, H, Dh].
    v: [B, Lk, H, Dh].
    pattern: the keys that each query sees.
    query_ids: [B, Lq] int32 segments; only keys with the same id are seen.
    key_ids: [B, Lk] int32, required with query_ids.
    interpret: runs without a TPU, slowly, for tests.

  Returns:
    [B, Lq, H, Dh] in q's dtype.
  """
  merge = lambda x: x.reshape(*x.shape[:2], -1)
  ids = None
  if query_ids is not None and key_ids is not None:
    ids = (query_ids[:, None, :], key_ids[:, :, None])
  setup = _Setup(pattern, q.shape[-1], interpret)
  out: Any = _attention(setup, merge(q), merge(k), merge(v), ids)
  return out.reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class _Setup:
  """The static parameters of a call."""

  pattern: Pattern
  head_dim: int
  interpret: bool

  @property
  def width(self) -> int:
    """Lanes of a block: of one head, or of several narrow ones."""
    return max(self.head_dim, LANES)

  @property
  def factor(self) -> float:
    """Scale of the scores."""
    return self.head_dim**-0.5

  def num_queries(self, q, k) -> int:
    """Number of queries in a block."""
    size = 512
    while q.shape[1] % size or size * k.shape[1] > MAX_SCORES:
      size //= 2
    return size

  def seen(self, num_keys, num_queries, start, id_refs):
    """[K, Q] bool for the block of queries from `start` on; None: all."""
    keys = jax.lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)
    queries = start + jax.lax.broadcasted_iota(jnp.int32, (1, num_queries), 1)
    seen = self.pattern.seen(keys, queries, num_keys)
    if id_refs:
      same = id_refs[1][0] == id_refs[0][0]
      seen = same if seen is None else seen & same
    return seen

  def heads(self):
    """One float32 row [1, width] per head of a block, 1 in the head's lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
    return [
      (_divide(lane, self.head_dim) == head).astype(jnp.float32)
      for head in range(self.width // self.head_dim)
    ]


def _dot(a, b, a_dim, b_dim):
  """Contracts a_dim of a with b_dim of b, in float32."""
  return jax.lax.dot_general(
    a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32
  )


def _own(x, head, factor=1.0):
  """Zeroes the lanes of the other heads in a block [Q, width]."""
  return (x.astype(jnp.float32) * (head * factor)).astype(x.dtype)


def _exp_scores(q, k, seen):
  """Returns exp(scores - maximum) [K, Q] and 1 / its sum [1, Q], float32."""
  scores = _dot(k, q, 1, 1)
  if seen is not None:
    scores = jnp.where(seen, scores, MIN_SCORE)
  exp = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
  return exp, 1 / jnp.sum(exp, axis=0, keepdims=True)


def _forward_kernel(setup, q_ref, k_ref, v_ref, *refs):
  *id_refs, out_ref = refs
  q, k, v = q_ref[0], k_ref[0], v_ref[0]
  seen = setup.seen(
    k.shape[0], q.shape[0], pl.program_id(2) * q.shape[0], id_refs
  )
  out = jnp.zeros((q.shape[0], setup.width), jnp.float32)
  for head in setup.heads():
    exp, inverse = _exp_scores(_own(q, head, setup.factor), k, seen)
    out += head * (_dot(v, exp.astype(v.dtype), 0, 0) * inverse).T
  out_ref[0] = out.astype(out_ref.dtype)


def _backward_kernel(setup, q_ref, k_ref, v_ref, out_ref, d_out_ref, *refs):
  *id_refs, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs
  q, k, v, d_out = q_ref[0], k_ref[0], v_ref[0], d_out_ref[0]
  block, num_blocks = pl.program_id(2), pl.num_programs(2)

  @pl.when(block == 0)
  def _():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  seen = setup.seen(k.shape[0], q.shape[0], block * q.shape[0], id_refs)
  inner = d_out.astype(jnp.float32) * out_ref[0].astype(jnp.float32)
  dq = jnp.zeros((q.shape[0], setup.width), jnp.float32)
  for head in setup.heads():
    own, d_own = _own(q, head, setup.factor), _own(d_out, head)
    exp, inverse = _exp_scores(own, k, seen)
    weights = exp * inverse
    # The product d_out . out of each query, as a row.
    delta = jnp.sum((inner * head).T, axis=0, keepdims=True)
    d_scores = (weights * (_dot(v, d_own, 1, 1) - delta)).astype(q.dtype)
    dv_sum[...] += _dot(weights.astype(d_own.dtype), d_own, 1, 0)
    dk_sum[...] += _dot(d_scores, own, 1, 0)
    dq += head * setup.factor * _dot(k, d_scores, 0, 0).T
  dq_ref[0] = dq.astype(dq_ref.dtype)

  @pl.when(block == num_blocks - 1)
  def _():
    dk_ref[0] = dk_sum[...].astype(dk_ref.dtype)
    dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def _run(kernel, setup, name, grid, inputs, outputs, scratch=(), cost=(0, 0)):
  """Runs a kernel over rows, heads and blocks of positions.

  Args:
    kernel: takes references to its inputs, outputs and scratch memory.
    setup: a _Setup.
    name: name in profiles.
    grid: numbers of rows, heads and blocks.
    inputs: pairs (array, BlockSpec).
    outputs: pairs (array of the output's shape and dtype, BlockSpec).
    scratch: shapes of float32 VMEM that lasts over the blocks of a head.
    cost: FLOPs of matrix products, and transcendentals.
  """
  args, in_specs = zip(*inputs)
  outs, out_specs = zip(*outputs)
  varies = jax.typeof(args[0]).manual_axis_type
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varies)
      for x in outs
    ],
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=cost[0],
      transcendentals=cost[1],
      bytes_accessed=sum(
        math.prod(x.shape) * x.dtype.itemsize for x in (*args, *outs)
      ),
    ),
    name=name,
    interpret=setup.interpret,
  )(*args)


def _call(kernel, setup, name, num_products, q, k, rest, ids, outs, scratch=()):
  """Runs an attention kernel.

  Args:
    kernel: takes `setup`, then references.
    setup: a _Setup.
    name: name in profiles.
    num_products: products of [Lq, Lk] per head, to estimate the cost.
    q: [B, Lq, W].
    k: [B, Lk, W].
    rest: the other arrays, as pairs of 'q' or 'k', whose shape it has, and
      array.
    ids: (rows, columns) or None.
    outs: 'q' or 'k' for each result, whose shape it has, in q's dtype.
    scratch: as in `_run`.
  """
  batch, length, width = q.shape
  num_keys, size, lanes = k.shape[1], setup.num_queries(q, k), setup.width
  side = {
    'q': pl.BlockSpec((1, size, lanes), lambda b, h, i: (b, i, h)),
    'k': pl.BlockSpec((1, num_keys, lanes), lambda b, h, i: (b, 0, h)),
  }
  inputs = [('q', q), ('k', k), *rest]
  inputs = [(x, side[where]) for where, x in inputs]
  if ids is not None:
    row = pl.BlockSpec((1, 1, size), lambda b, h, i: (b, 0, i))
    column = pl.BlockSpec((1, num_keys, 1), lambda b, h, i: (b, 0, 0))
    inputs += [(ids[0], row), (ids[1], column)]
  shapes = {'q': q, 'k': jax.ShapeDtypeStruct(k.shape, q.dtype)}
  pairs = batch * length * num_keys
  return _run(
    functools.partial(kernel, setup),
    setup,
    name,
    (batch, width // lanes, length // size),
    inputs,
    [(shapes[where], side[where]) for where in outs],
    scratch,
    (2 * num_products * pairs * width, pairs * width // setup.head_dim),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(setup, q, k, v, ids):
  return _call(
    _forward_kernel, setup, 'attention_forward', 2, q, k, [('k', v)], ids, ['q']
  )[0]


def _attention_forward(setup, q, k, v, ids):
  out = _attention(setup, q, k, v, ids)
  return out, (q, k, v, ids, out)


def _attention_backward(setup, residuals, d_out):
  q, k, v, ids, out = residuals
  rest = [('k', v), ('q', out), ('q', d_out)]
  scratch = [(k.shape[1], setup.width)] * 2
  kernel, name = _backward_kernel, 'attention_backward'
  outs = ['q', 'k', 'k']
  grads = _call(kernel, setup, name, 5, q, k, rest, ids, outs, scratch)
  return *grads, None


_attention.defvjp(_attention_forward, _attention_backward)


def rotate(
  x: jax.Array,
  scale: jax.Array | None,
  table: jax.Array,
  eps: float,
  interpret: bool = False,
) -> jax.Array:
  """Applies RMSNorm to each head, if there is a scale, then rotary positions.

  In one pass: XLA puts the positions of heads of 64 into the lanes, makes five
  passes over float32 copies and transposes them for the kernel above.

  Args:
    x: [B, L, H, Dh] that `fits`.
    scale: [Dh] float32, or None for no norm.
    table: [2, 1, L, 1, Dh / 2], from `layers.rotary_table`.
    eps: epsilon of the norm.
    interpret: as in `attention`.

  Returns:
    [B, L, H, Dh] in x's dtype.
  """
  head_dim = x.shape[-1]
  setup = _Setup(Pattern('all'), head_dim, interpret)
  copies = setup.width // head_dim
  cos, sin = table[:, 0, :, 0]
  tables = (
    jnp.tile(cos, (1, 2 * copies)),
    jnp.tile(jnp.concatenate([-sin, sin], -1), (1, copies)),
  )
  row: Any = scale
  if scale is not None:
    # Outside of the kernel's own rule, so that its gradients are summed over
    # the devices that differ in their heads only.
    varying = jax.typeof(x).manual_axis_type.varying
    missing = varying - jax.typeof(scale).manual_axis_type.varying
    if missing:
      row = jax.lax.pcast(scale, tuple(missing), to='varying')
    row = jnp.tile(row, copies)[None]
  merged = x.reshape(*x.shape[:2], -1)
  out: Any = _rotate(setup, eps, merged, row, tables)
  return out.reshape(x.shape)


def _swap(setup, x):
  """Swaps the halves of every head."""
  half = setup.head_dim // 2
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, setup.width), 1)
  return jnp.where(
    _divide(lane, half) & 1 == 0,
    pltpu.roll(x, setup.width - half, 1),
    pltpu.roll(x, half, 1),
  )


def _head_means(setup, x):
  """Writes each head's mean over its lanes to all of them."""
  return (
    sum(
      head * jnp.sum(x * head, axis=1, keepdims=True) for head in setup.heads()
    )
    / setup.head_dim
  )


def _rotate_kernel(setup, eps, x_ref, cos_ref, sin_ref, *refs):
  *scale_refs, out_ref = refs
  x = x_ref[0].astype(jnp.float32)
  for scale_ref in scale_refs:
    x *= jax.lax.rsqrt(_head_means(setup, x * x) + eps) * scale_ref[...]
  out = x * cos_ref[...] + _swap(setup, x) * sin_ref[...]
  out_ref[0] = out.astype(out_ref.dtype)


def _rotate_back_kernel(
  setup, eps, x_ref, d_out_ref, cos_ref, sin_ref, scale_ref, dx_ref, d_scale_ref
):
  d_out = d_out_ref[0].astype(jnp.float32)
  dx = d_out * cos_ref[...] - _swap(setup, d_out) * sin_ref[...]
  x = x_ref[0].astype(jnp.float32)
  inverse = jax.lax.rsqrt(_head_means(setup, x * x) + eps)
  x *= inverse

  @pl.when(pl.program_id(2) == 0)
  def _():
    d_scale_ref[...] = jnp.zeros_like(d_scale_ref)

  d_scale_ref[0, 0] += jnp.sum(dx * x, axis=0, keepdims=True)
  dx *= scale_ref[...]
  dx = inverse * (dx - x * _head_means(setup, dx * x))
  dx_ref[0] = dx.astype(dx_ref.dtype)


def _call_rotate(
  setup, eps, name, kernel, arrays, tables, scale=None, has_d_scale=False
):
  """Runs a rotation kernel."""
  x = arrays[0]
  batch, length, width = x.shape
  size, lanes = min(length, MAX_SCORES // 4 // LANES), setup.width
  while length % size:
    size //= 2
  grid = (batch, width // lanes, length // size)
  block = pl.BlockSpec((1, size, lanes), lambda b, h, i: (b, i, h))
  table = pl.BlockSpec((size, lanes), lambda b, h, i: (i, 0))
  inputs = [(y, block) for y in arrays] + [(y, table) for y in tables]
  if scale is not None:
    inputs.append((scale, pl.BlockSpec((1, lanes), lambda b, h, i: (0, 0))))
  outputs = [(x, block)]
  if has_d_scale:
    shape = jax.ShapeDtypeStruct((*grid[:2], 1, lanes), jnp.float32)
    row = pl.BlockSpec((1, 1, 1, lanes), lambda b, h, i: (b, h, 0, 0))
    outputs.append((shape, row))
  kernel = functools.partial(kernel, setup, eps)
  return _run(kernel, setup, name, grid, inputs, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(setup, eps, x, scale, tables):
  call = functools.partial(_call_rotate, setup, eps, 'rotate')
  return call(_rotate_kernel, [x], tables, scale)[0]


def _rotate_forward(setup, eps, x, scale, tables):
  return _rotate(setup, eps, x, scale, tables), (x, scale, tables)


def _rotate_backward(setup, eps, residuals, d_out):
  x, scale, tables = residuals
  call = functools.partial(_call_rotate, setup, eps, 'rotate_backward')
  if scale is None:  # The inverse rotation.
    cos, sin = tables
    (dx,) = call(_rotate_kernel, [d_out], (cos, -sin))
    return dx, None, None
  dx, d_scale = call(_rotate_back_kernel, [x, d_out], tables, scale, True)
  return dx, jnp.sum(d_scale, axis=(0, 1)), None


_rotate.defvjp(_rotate_forward, _rotate_backward)
