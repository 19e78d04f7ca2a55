"""One attention over the kernels that JAX offers for the device at hand."""

import jax
import jax.numpy as jnp

from nanodlm.model import pallas_attention
from nanodlm.types import InputError

BACKENDS = ('auto', 'xla', 'cudnn', 'pallas')
# Of a head in cuDNN's kernel on every GPU that has it (twice as much from Hopper on).
CUDNN_MAX_HEAD = 128


def check_backend(backend: str, platform: str):
  """Raises InputError where the backend is unknown or needs another platform."""
  if backend not in BACKENDS:
    raise InputError(
      f'model.attention={backend!r} is not one of {list(BACKENDS)}'
    )
  if backend == 'cudnn' and platform != 'gpu':
    raise InputError(
      "model.attention='cudnn' needs an NVIDIA GPU; this device is "
      f"{platform!r}: 'auto' or 'xla' are allowed"
    )
  if backend == 'pallas' and platform != 'tpu':
    raise InputError(
      "model.attention='pallas' needs a TPU; this device is "
      f"{platform!r}: 'auto' or 'xla' are allowed"
    )


def _fits_cudnn(head_dim: int, itemsize: int) -> bool:
  """Whether cuDNN's kernel takes heads of this size and these bytes a number."""
  return itemsize == 2 and head_dim % 8 == 0 and head_dim <= CUDNN_MAX_HEAD


def check_sizes(
  backend: str,
  num_heads: int,
  head_dim: int,
  num_queries: int,
  num_keys: int,
  itemsize: int,
):
  """Raises InputError where a kernel is asked for that cannot do it."""
  if backend == 'cudnn' and not _fits_cudnn(head_dim, itemsize):
    raise InputError(
      f"model.attention='cudnn' cannot take heads of {head_dim} in {8 * itemsize} "
      "bits: it needs model.dtype='bfloat16' and heads of a multiple of 8, at "
      f"most {CUDNN_MAX_HEAD}; 'auto' or 'xla' are allowed"
    )
  if backend == 'pallas' and not pallas_attention.fits(
    num_heads, head_dim, num_queries, num_keys, itemsize
  ):
    raise InputError(
      f"model.attention='pallas' cannot take {num_heads} heads of {head_dim} on "
      f'{num_queries} queries and {num_keys} keys: heads must fill up 128 lanes, '
      'lengths must be multiples of 128, with at most '
      f'{pallas_attention.MAX_KEYS} keys in bfloat16 and half of that in float32; '
      "'auto' or 'xla' are allowed"
    )


def has_kernels(backend: str, platform: str, x: jax.Array) -> bool:
  """Whether `pallas_attention` serves heads [B, L, H, Dh] that attend to L keys."""
  return (
    backend in ('auto', 'pallas')
    and (platform or jax.default_backend()) == 'tpu'
    and pallas_attention.fits(
      *x.shape[2:], x.shape[1], x.shape[1], x.dtype.itemsize
    )
  )


def _choose(backend, platform, q, k, segment_ids) -> str:
  """'auto' by the platform: see `attention`."""
  if backend != 'auto':
    check_sizes(backend, *q.shape[2:], q.shape[1], k.shape[1], q.dtype.itemsize)
    return backend
  if (
    platform == 'gpu'
    and segment_ids is None
    and _fits_cudnn(q.shape[-1], q.dtype.itemsize)
  ):
    return 'cudnn'
  if platform == 'tpu' and pallas_attention.fits(
    *q.shape[2:], q.shape[1], k.shape[1], q.dtype.itemsize
  ):
    return 'pallas'
  return 'xla'


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool,
  seen: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  backend: str = 'auto',
  platform: str = '',
) -> jax.Array:
  """Scaled dot-product attention, softmax in float32.

  Args:
    q: [B, Lq, H, Dh]; Lq = Lk where `causal` or with segment ids.
    k: [B, Lk, K, Dh]; K divides H, and each serves H / K neighbouring queries.
    v: [B, Lk, K, Dh].
    causal: position i sees positions 0..i only.
    seen: [B, Lq, Lk] bool, keys that each query sees, in XLA's attention only;
      None: all, or as `causal` says.
    segment_ids: [B, L] int32; a position sees its own segment only. None: all.
    backend: 'xla', 'cudnn', 'pallas', or 'auto': cuDNN's fused kernel on a GPU in
      16 bits without segment ids, the kernel of `pallas_attention` on a TPU, each
      where it takes the sizes, else XLA.
    platform: that the program is for, 'cpu', 'gpu' or 'tpu'; '' is this one.

  Returns:
    [B, Lq, H, Dh] in q's dtype.
  """
  if seen is not None:
    if backend not in ('auto', 'xla'):
      raise InputError(
        f'model.attention={backend!r} does not know the pattern of '
        "train.anneal_steps; 'auto' or 'xla' are allowed"
      )
    backend, seen = 'xla', seen[:, None]
  backend = _choose(
    backend, platform or jax.default_backend(), q, k, segment_ids
  )
  if backend != 'cudnn':  # which knows of shared keys itself
    k, v = _one_per_query(q, k, v)
  if backend == 'pallas':
    return pallas_attention.attention(
      q,
      k,
      v,
      pallas_attention.Pattern('causal' if causal else 'all'),
      segment_ids,
      segment_ids,
    )
  if backend == 'cudnn':
    mask = None
    if segment_ids is not None:
      mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask, is_causal=causal, implementation='cudnn'
    )
  if causal:
    seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
  if segment_ids is not None:
    same = _same(segment_ids, segment_ids)
    seen = same if seen is None else seen & same
  q, k, v = _heads_first(q, k, v)
  return _weigh(_scores(q, k, seen), v).transpose(0, 2, 1, 3)


def block_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  block_size: int,
  segment_ids: jax.Array | None = None,
  backend: str = 'auto',
  platform: str = '',
) -> jax.Array:
  """The attention of block diffusion over a noisy and a clean copy of a text.

  Rows 0..B-1 of k and v are noisy, rows B..2B-1 the same texts clean. A noisy
  position sees the noisy tokens of its own block and the clean ones of earlier
  blocks; a clean position the clean tokens of its own and earlier blocks, and
  never a noisy one (BD3-LM, arXiv 2503.09573, section 3). Scores are 2 L^2 + L S
  numbers a head and not the (2L)^2 of one masked sequence.

  Args:
    q: [2B, L, H, Dh], or [B, L, H, Dh] for the noisy rows only.
    k: [2B, L, K, Dh], K as in `attention`.
    v: [2B, L, K, Dh].
    block_size: S, divides L.
    segment_ids: [2B, L] int32 or None, as in `attention`.
    backend: 'xla', 'pallas' (on noisy and clean keys in a row) or 'auto'.
    platform: as in `attention`.

  Returns:
    In q's shape and dtype.
  """
  k, v = _one_per_query(q, k, v)
  batch, length = k.shape[0] // 2, k.shape[1]
  platform = platform or jax.default_backend()
  if (
    backend == 'pallas'
    or backend == 'auto'
    and platform == 'tpu'
    and (
      pallas_attention.fits(*q.shape[2:], length, 2 * length, q.dtype.itemsize)
    )
  ):
    check_sizes('pallas', *q.shape[2:], length, 2 * length, q.dtype.itemsize)
    return _block_kernel(q, k, v, block_size, segment_ids)
  num_blocks = length // block_size
  block = jnp.arange(length) // block_size
  q, k, v = _heads_first(q, k, v)
  (noisy_k, clean_k), (noisy_v, clean_v) = jnp.split(k, 2), jnp.split(v, 2)
  split = lambda x: x.reshape(*x.shape[:2], num_blocks, block_size, x.shape[-1])
  merge = lambda x: x.reshape(*x.shape[:2], length, x.shape[-1])

  before = (block[None] < block[:, None])[None, None]
  same_block = None
  if segment_ids is not None:
    ids = segment_ids[:batch]
    before = before & _same(ids, ids)
    blocks = ids.reshape(-1, block_size)
    same_block = _same(blocks, blocks).reshape(
      batch, 1, num_blocks, block_size, block_size
    )
  noisy_q = q[:batch]
  scores = jnp.concatenate(
    [
      _scores(split(noisy_q), split(noisy_k), same_block),
      split(_scores(noisy_q, clean_k, before)),
    ],
    axis=-1,
  )
  weights = softmax(scores).astype(v.dtype)
  own, context = jnp.split(weights, [block_size], axis=-1)
  out = merge(own @ split(noisy_v)) + merge(context) @ clean_v
  if q.shape[0] > batch:
    seen = (block[None] <= block[:, None])[None, None]
    if segment_ids is not None:
      seen = seen & _same(segment_ids[batch:], segment_ids[batch:])
    clean = _weigh(_scores(q[batch:], clean_k, seen), clean_v)
    out = jnp.concatenate([out, clean])
  return out.transpose(0, 2, 1, 3)


def _block_kernel(q, k, v, block_size, segment_ids, interpret=False):
  """`block_attention` by the Pallas kernel."""
  batch = k.shape[0] // 2
  in_a_row = lambda x: jnp.concatenate([x[:batch], x[batch:]], axis=1)
  ids = segment_ids
  noisy_ids = () if ids is None else (ids[:batch], in_a_row(ids))
  out = pallas_attention.attention(
    q[:batch],
    in_a_row(k),
    in_a_row(v),
    pallas_attention.Pattern('noisy', block_size),
    *noisy_ids,
    interpret=interpret,
  )
  if q.shape[0] == batch:
    return out
  clean_ids = () if ids is None else (ids[batch:],) * 2
  clean = pallas_attention.attention(
    q[batch:],
    k[batch:],
    v[batch:],
    pallas_attention.Pattern('causal', block_size),
    *clean_ids,
    interpret=interpret,
  )
  return jnp.concatenate([out, clean])


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cached_k: jax.Array,
  cached_v: jax.Array,
  visible: jax.Array,
  *,
  causal: bool,
) -> jax.Array:
  """Attention of a few tokens to themselves and to what is in a cache; XLA's.

  Args:
    q: [B, S, H, Dh].
    k: [B, S, K, Dh], the tokens' own keys, K as in `attention`; v too.
    v: the tokens' own values.
    cached_k: [B, C, K, Dh]; cached_v too.
    cached_v: values of the cached positions.
    visible: [C] bool, cached positions that all of the tokens see.
    causal: whether a token sees its predecessors only among its own.

  Returns:
    [B, S, H, Dh] in q's dtype.
  """
  seen = jnp.tril(jnp.ones((q.shape[1],) * 2, bool)) if causal else None
  k, v, cached_k, cached_v = _one_per_query(q, k, v, cached_k, cached_v)
  q, k, v = _heads_first(q, k, v)
  cached_k, cached_v = (x.transpose(0, 2, 1, 3) for x in (cached_k, cached_v))
  scores = jnp.concatenate(
    [
      _scores(q, k, None if seen is None else seen[None, None]),
      _scores(q, cached_k, visible[None, None, None]),
    ],
    axis=-1,
  )
  weights = softmax(scores).astype(v.dtype)
  own, context = jnp.split(weights, [q.shape[2]], axis=-1)
  return (own @ v + context @ cached_v).transpose(0, 2, 1, 3)


def _one_per_query(q, *shared):
  """Keys or values [B, L, K, Dh], each repeated for its H / K queries."""
  copies = q.shape[2] // shared[0].shape[2]
  return tuple(
    x if copies == 1 else jnp.repeat(x, copies, axis=2) for x in shared
  )


def _heads_first(q, k, v):
  # By hand: on a CPU the same two products with the heads left in the middle
  # took 1.4 times as long in training and 4 times in sampling.
  return (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))


def _same(rows, columns):
  """[B, 1, Lq, Lk] bool, where the ids of [B, L] are the same."""
  return (rows[:, :, None] == columns[:, None, :])[:, None]


def _scores(q, k, seen):
  """q [..., Lq, Dh] on k [..., Lk, Dh] -> [..., Lq, Lk] float32."""
  scores = jnp.einsum(
    '...qd,...kd->...qk', q, k, preferred_element_type=jnp.float32
  )
  if seen is None:
    return scores
  return jnp.where(seen, scores, jnp.finfo(jnp.float32).min)


def _weigh(scores, v):
  return softmax(scores).astype(v.dtype) @ v


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
  """Softmax over the last axis."""
  exp = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
  return exp / jnp.sum(exp, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
  y = softmax(primals[0])
  dx = tangents[0]
  return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))
