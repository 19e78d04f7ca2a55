"""Pallas kernels for TPUs: attention, and the norm and rotation of its heads.

No score leaves the chip. XLA keeps the float32 probabilities of every layer for
the backward pass: at length 1024 that is 4.4 GiB for 8 rows of GPT-2 small, and
about half of the step's cycles. Here the backward kernel works them out again
from q, k and v.

What was tried, on configs/gpt2_small.py with 8 rows a v5e chip, in millions of
cycles as the compiler estimates them, kernels added as in `compile`, and GiB of
temporaries (nothing was run): XLA's attention 292 and 13.6; this one 153 and 6.7;
with model.remat='dots' 160 and 3.3, as it runs the forward kernel twice; norm and
rotation as a kernel, and norms and gated activations that keep their inputs
only, 131 and 4.5; the layers unrolled instead of scanned, which spares the copies
in and out of stacked activations, 90 and 2.8.

Why not JAX's splash attention: it cannot tell shard_map over which devices its
results vary (its output shapes carry no such mark), and there is no inner
shard_map left to turn the check off for where all mesh axes are manual already.

How it is laid out. q, k and v stay [B, L, H x Dh], in 128 lanes a block, so that
nothing is transposed or padded in HBM; of two heads of 64 in a block one is
zeroed at a time, which costs the matrix unit what padding would. Scores are kept
as [keys, queries]: reductions then run over sublanes, and what must be turned
around is [L, 128], not [L, L]. All keys of a head fit into VMEM, so the softmax
is a plain one, without running maxima.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

LANES = 128
# Scores of one block, [keys, queries] float32, 2 MiB that are alive a few times
# over. With 4096 keys a kernel needs 16.5 MiB of VMEM, the default share is 16.
MAX_SCORES = 2**19
VMEM_BYTES = 24 * 2**20
# Of 16 bits; half of it of float32. (A v4, whose VMEM is 16 MiB in all, cannot take
# 4096 keys: model.attention='xla' there.)
MAX_KEYS = MAX_SCORES // LANES
MIN_SCORE = float(jnp.finfo(jnp.float32).min)


def _divide(x, divisor: int):
  """x // divisor of numbers >= 0, without the care that // takes of others."""
  return jax.lax.div(x, jnp.int32(divisor))


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Which keys a query sees, beside segments.

  Attributes:
    kind: 'all'; 'causal', keys of the query's own and earlier blocks; 'noisy',
      where keys 0..L-1 are noisy and L..2L-1 clean, the noisy ones of its own
      block and the clean ones of earlier blocks.
    block_size: S; 1 is a causal text model.
  """

  kind: str
  block_size: int = 1

  def seen(
    self, keys: jax.Array, queries: jax.Array, num_keys: int
  ) -> jax.Array | None:
    """Positions keys [K, 1] and queries [1, Q] -> [K, Q] bool; None is all."""
    if self.kind == 'all':
      return None
    query_block = _divide(queries, self.block_size)
    if self.kind == 'causal':
      return _divide(keys, self.block_size) <= query_block
    half = num_keys // 2
    is_noisy = keys < half
    block = _divide(jnp.where(is_noisy, keys, keys - half), self.block_size)
    # One comparison of twice the block: odd for noisy keys.
    code = 2 * block + is_noisy.astype(jnp.int32)
    limit = 2 * query_block
    return (code == limit + 1) | ((code < limit) & (code & 1 == 0))


def fits(
  num_heads: int, head_dim: int, num_queries: int, num_keys: int, itemsize: int
) -> bool:
  """Whether the kernel can take these sizes; `itemsize` is a number's bytes."""
  if head_dim % LANES and (LANES % head_dim or num_heads % (LANES // head_dim)):
    return False
  return (
    num_queries % LANES == 0
    and num_keys % LANES == 0
    and num_keys <= MAX_KEYS * 2 // max(itemsize, 2)
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
  """Scaled dot-product attention, softmax in float32; sizes as `fits` says.

  Args:
    q: [B, Lq, H, Dh].
    k: [B, Lk, H, Dh].
    v: [B, Lk, H, Dh].
    pattern: who sees whom.
    query_ids: [B, Lq] int32, segments: only keys with the same id are seen.
    key_ids: [B, Lk] int32.
    interpret: run without a TPU, slowly, for tests.

  Returns:
    [B, Lq, H, Dh] in q's dtype.
  """
  merge = lambda x: x.reshape(*x.shape[:2], -1)
  ids = None
  if query_ids is not None:
    ids = (query_ids[:, None, :], key_ids[:, :, None])
  setup = _Setup(pattern, q.shape[-1], interpret)
  return _attention(setup, merge(q), merge(k), merge(v), ids).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class _Setup:
  """What is static in a call."""

  pattern: Pattern
  head_dim: int
  interpret: bool

  @property
  def width(self) -> int:
    """Lanes of a block: one head, or several narrow ones."""
    return max(self.head_dim, LANES)

  @property
  def factor(self) -> float:
    """Of the scores."""
    return self.head_dim**-0.5

  def num_queries(self, q, k) -> int:
    """Queries of a block."""
    size = 512
    while q.shape[1] % size or size * k.shape[1] > MAX_SCORES:
      size //= 2
    return size

  def seen(self, num_keys, num_queries, start, id_refs):
    """[K, Q] bool of the block of queries that begins at `start`, or None."""
    keys = jax.lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)
    queries = start + jax.lax.broadcasted_iota(jnp.int32, (1, num_queries), 1)
    seen = self.pattern.seen(keys, queries, num_keys)
    if id_refs:
      same = id_refs[1][0] == id_refs[0][0]
      seen = same if seen is None else seen & same
    return seen

  def heads(self):
    """A float32 row [1, width] for each head of a block: 1 in its own lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
    return [
      (_divide(lane, self.head_dim) == head).astype(jnp.float32)
      for head in range(self.width // self.head_dim)
    ]


def _dot(a, b, a_dim, b_dim):
  """Contracts one dimension of each -> float32."""
  return jax.lax.dot_general(
    a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32
  )


def _own(x, head, factor=1.0):
  """A block [Q, width] with the other heads' lanes at 0."""
  return (x.astype(jnp.float32) * (head * factor)).astype(x.dtype)


def _exp_scores(q, k, seen):
  """exp(scores - their maximum) [K, Q] and its inverse sum [1, Q], float32."""
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
    # d_out . out of each query, as a row.
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


def _call(kernel, setup, name, num_products, q, k, rest, ids, outs, scratch=()):
  """Runs a kernel over rows, heads and blocks of queries.

  Args:
    kernel: takes `setup`, then references.
    setup: see there.
    name: in profiles.
    num_products: of [Lq, Lk] by a head, for the estimate of its cost.
    q: [B, Lq, W]; k too, of Lk.
    k: its shape is that of every key-sided array.
    rest: the arrays beside them, each in q's or k's shape.
    ids: (rows, columns) or None.
    outs: which side each result has: 'q' or 'k'.
    scratch: VMEM that lasts over a head's blocks of queries.

  Returns:
    The results, in q's or k's shapes and q's dtype.
  """
  batch, length, width = q.shape
  size, lanes = setup.num_queries(q, k), setup.width
  side = {
    'q': pl.BlockSpec((1, size, lanes), lambda b, h, i: (b, i, h)),
    'k': pl.BlockSpec((1, k.shape[1], lanes), lambda b, h, i: (b, 0, h)),
  }
  args, specs = (
    [q, k, *(x for _, x in rest)],
    [side['q'], side['k'], *(side[where] for where, _ in rest)],
  )
  if ids is not None:
    args += ids
    specs += [
      pl.BlockSpec((1, 1, size), lambda b, h, i: (b, 0, i)),
      pl.BlockSpec((1, k.shape[1], 1), lambda b, h, i: (b, 0, 0)),
    ]
  varies = jax.typeof(q).manual_axis_type
  shape = {
    where: jax.ShapeDtypeStruct(x.shape, q.dtype, manual_axis_type=varies)
    for where, x in (('q', q), ('k', k))
  }
  pairs = batch * length * k.shape[1]
  moved = sum(x.size * x.dtype.itemsize for x in args) + sum(
    math.prod(shape[where].shape) * q.dtype.itemsize for where in outs
  )
  return pl.pallas_call(
    functools.partial(kernel, setup),
    grid=(batch, width // lanes, length // size),
    in_specs=specs,
    out_specs=[side[where] for where in outs],
    out_shape=[shape[where] for where in outs],
    scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_products * pairs * width,
      transcendentals=pairs * width // setup.head_dim,
      bytes_accessed=moved,
    ),
    name=name,
    interpret=setup.interpret,
  )(*args)


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
  scratch = [(k.shape[1], setup.width)] * 2
  dq, dk, dv = _call(
    _backward_kernel,
    setup,
    'attention_backward',
    5,
    q,
    k,
    [('k', v), ('q', out), ('q', d_out)],
    ids,
    ['q', 'k', 'k'],
    scratch,
  )
  return dq, dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)


def rotate(
  x: jax.Array,
  scale: jax.Array | None,
  table: jax.Array,
  eps: float,
  interpret: bool = False,
) -> jax.Array:
  """RMSNorm of each head, where there is a scale, then rotary positions.

  In one pass: XLA lays heads of 64 out with the positions in the lanes, takes
  five passes over float32 copies and turns them around for the kernel above.

  Args:
    x: [B, L, H, Dh]; sizes as `fits` says.
    scale: [Dh] float32, or None for no norm.
    table: [2, L, 1, Dh / 2], cosines and sines (`model.rotary_table`).
    eps: of the norm.
    interpret: as in `attention`.

  Returns:
    [B, L, H, Dh] in x's dtype.
  """
  head_dim = x.shape[-1]
  setup = _Setup(Pattern('all'), head_dim, interpret)
  copies = setup.width // head_dim
  cos, sin = table[:, :, 0]
  tables = (
    jnp.tile(cos, (1, 2 * copies)),
    jnp.tile(jnp.concatenate([-sin, sin], -1), (1, copies)),
  )
  if scale is not None:
    # Here and not in the kernel's rule: so its gradients are summed over the
    # devices among which only the heads differ.
    varying = jax.typeof(x).manual_axis_type.varying
    missing = varying - jax.typeof(scale).manual_axis_type.varying
    if missing:
      scale = jax.lax.pcast(scale, tuple(missing), to='varying')
    scale = jnp.tile(scale, copies)[None]
  merged = x.reshape(*x.shape[:2], -1)
  return _rotate(setup, eps, merged, scale, tables).reshape(x.shape)


def _swap(setup, x):
  """Exchanges the halves of every head."""
  half = setup.head_dim // 2
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, setup.width), 1)
  return jnp.where(
    _divide(lane, half) & 1 == 0,
    pltpu.roll(x, setup.width - half, 1),
    pltpu.roll(x, half, 1),
  )


def _head_means(setup, x):
  """Each head's mean over its own lanes, in all of them."""
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


def _rotate_back_kernel(setup, eps, x_ref, d_out_ref, cos_ref, sin_ref, *refs):
  d_out = d_out_ref[0].astype(jnp.float32)
  dx = d_out * cos_ref[...] - _swap(setup, d_out) * sin_ref[...]
  if len(refs) == 1:
    refs[0][0] = dx.astype(refs[0].dtype)
    return
  scale_ref, dx_ref, d_scale_ref = refs
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


def _call_rotate(kernel, setup, eps, name, arrays, tables, scale, with_d_scale):
  """Runs a kernel over rows, heads and blocks of positions."""
  batch, length, width = arrays[0].shape
  size, lanes = min(length, MAX_SCORES // 4 // LANES), setup.width
  while length % size:
    size //= 2
  grid = (batch, width // lanes, length // size)
  block = pl.BlockSpec((1, size, lanes), lambda b, h, i: (b, i, h))
  table = pl.BlockSpec((size, lanes), lambda b, h, i: (i, 0))
  args, specs = [*arrays, *tables], [block] * len(arrays) + [table] * 2
  if scale is not None:
    args.append(scale)
    specs.append(pl.BlockSpec((1, lanes), lambda b, h, i: (0, 0)))
  varies = jax.typeof(arrays[0]).manual_axis_type
  shapes = [
    jax.ShapeDtypeStruct(
      arrays[0].shape, arrays[0].dtype, manual_axis_type=varies
    )
  ]
  out_specs = [block]
  if with_d_scale:
    shapes.append(
      jax.ShapeDtypeStruct(
        (*grid[:2], 1, lanes), jnp.float32, manual_axis_type=varies
      )
    )
    out_specs.append(
      pl.BlockSpec((1, 1, 1, lanes), lambda b, h, i: (b, h, 0, 0))
    )
  moved = sum(x.size * x.dtype.itemsize for x in [*args, arrays[0]])
  return pl.pallas_call(
    functools.partial(kernel, setup, eps),
    grid=grid,
    in_specs=specs,
    out_specs=out_specs,
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    # No products; FLOPs of the vector unit are not the peak rate's.
    cost_estimate=pl.CostEstimate(
      flops=0, transcendentals=0, bytes_accessed=moved
    ),
    name=name,
    interpret=setup.interpret,
  )(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(setup, eps, x, scale, tables):
  return _call_rotate(
    _rotate_kernel, setup, eps, 'rotate', [x], tables, scale, False
  )[0]


def _rotate_forward(setup, eps, x, scale, tables):
  return _rotate(setup, eps, x, scale, tables), (x, scale, tables)


def _rotate_backward(setup, eps, residuals, d_out):
  x, scale, tables = residuals
  arrays = [d_out] if scale is None else [x, d_out]
  kernel = (
    _rotate_back_kernel
    if scale is not None
    else (
      lambda setup, eps, *refs: _rotate_back_kernel(setup, eps, None, *refs)
    )
  )
  out = _call_rotate(
    kernel,
    setup,
    eps,
    'rotate_backward',
    arrays,
    tables,
    scale,
    scale is not None,
  )
  d_scale = None
  if scale is not None:
    d_scale = jnp.sum(out[1], axis=(0, 1))
  return out[0], d_scale, None


_rotate.defvjp(_rotate_forward, _rotate_backward)
