"""Scaled dot-product attention on the kernels that JAX offers for a device."""

from collections.abc import Callable
import functools
import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanodlm.model import pallas_attention
from nanodlm.types import InputError

BACKENDS = ('auto', 'xla', 'cudnn', 'pallas')
_NEEDS = {'cudnn': ('gpu', 'an NVIDIA GPU'), 'pallas': ('tpu', 'a TPU')}
# Largest head of cuDNN's kernel on every GPU that has it; 256 from Hopper on.
CUDNN_MAX_HEAD = 128


class Scoring(NamedTuple):
  """How scores are made, besides products of queries and keys; by XLA only.

  Attributes:
    cap: c in scores c tanh(s / c); 0: s.
    sink: (key, value), [1, 1, K, Dh] each, of one more place that every query
      sees; None: there is none.
  """

  cap: float = 0.0
  sink: tuple[jax.Array, jax.Array] | None = None


PLAIN = Scoring()


def check_backend(backend: str, platform: str):
  """Raises InputError if the backend is unknown or needs another platform."""
  if backend not in BACKENDS:
    raise InputError(
      f'model.attention={backend!r} is not one of {list(BACKENDS)}'
    )
  needed, device = _NEEDS.get(backend, (platform, ''))
  if platform != needed:
    raise InputError(
      f'model.attention={backend!r} needs {device}; this device is '
      f"{platform!r}: use 'auto' or 'xla'"
    )


def _fits_cudnn(q: Any) -> bool:
  """Returns whether cuDNN's kernel supports heads of q's size and dtype."""
  head_dim = q.shape[-1]
  is_supported = head_dim % 8 == 0 and head_dim <= CUDNN_MAX_HEAD
  return is_supported and q.dtype.itemsize == 2


def check_sizes(backend: str, q: Any, num_keys: int):
  """Raises InputError if a kernel does not support the sizes.

  Args:
    backend: one of BACKENDS.
    q: [B, Lq, H, Dh], an array or its shape and dtype.
    num_keys: Lk.
  """
  _, length, num_heads, head_dim = q.shape
  if backend == 'cudnn' and not _fits_cudnn(q):
    raise InputError(
      f"model.attention='cudnn' cannot take heads of {head_dim} in "
      f"{q.dtype.name}: it needs model.dtype='bfloat16' and heads of a "
      f"multiple of 8, at most {CUDNN_MAX_HEAD}; use 'auto' or 'xla'"
    )
  if backend == 'pallas' and not pallas_attention.fits(q, num_keys):
    raise InputError(
      f"model.attention='pallas' cannot take {num_heads} heads of {head_dim} "
      f'on {length} queries and {num_keys} keys: heads must fill 128 lanes, '
      'lengths must be multiples of 128, with at most '
      f'{pallas_attention.MAX_KEYS} keys in bfloat16 and half of that in '
      "float32; use 'auto' or 'xla'"
    )


def has_kernels(backend: str, platform: str, x: jax.Array) -> bool:
  """Returns whether `pallas_attention` serves x [B, L, H, Dh] on L keys."""
  return (
    backend in ('auto', 'pallas')
    and (platform or jax.default_backend()) == 'tpu'
    and pallas_attention.fits(x, x.shape[1])
  )


def _choose(backend, platform, q, num_keys, scoring, is_plain) -> str:
  """Resolves 'auto'; other backends must support the sizes."""
  if backend == 'auto' and scoring != PLAIN:
    return 'xla'
  if backend != 'auto':
    check_sizes(backend, q, num_keys)
    return backend
  platform = platform or jax.default_backend()
  if platform == 'gpu' and is_plain and _fits_cudnn(q):
    return 'cudnn'
  if platform == 'tpu' and pallas_attention.fits(q, num_keys):
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
  scoring: Scoring = PLAIN,
  backend: str = 'auto',
  platform: str = '',
) -> jax.Array:
  """Scaled dot-product attention with a float32 softmax.

  Args:
    q: [B, Lq, H, Dh]; Lq = Lk if `causal` or with segment ids.
    k: [B, Lk, K, Dh]; K divides H, and each serves H / K neighbouring queries.
    v: [B, Lk, K, Dh].
    causal: whether position i sees positions 0..i only.
    seen: [B, Lq, Lk] bool, the keys that each query sees, by XLA only; None: as
      `causal` says.
    segment_ids: [B, L] int32; a position sees its own segment only. None: all.
    scoring: how scores are made.
    backend: 'xla', 'cudnn', 'pallas', or 'auto': cuDNN's fused kernel on a GPU
      in 16 bits without segment ids, `pallas_attention` on a TPU, XLA elsewhere
      and for sizes that these do not support.
    platform: 'cpu', 'gpu' or 'tpu', that the program is for; '': this
      machine's.

  Returns:
    [B, Lq, H, Dh] in q's dtype.
  """
  if seen is not None:
    if backend not in ('auto', 'xla'):
      raise InputError(
        f'model.attention={backend!r} does not support the pattern of '
        "train.anneal_steps; use 'auto' or 'xla'"
      )
    backend, seen = 'xla', seen[:, None]
  same = None if segment_ids is None else _same(segment_ids)
  is_plain = segment_ids is None
  backend = _choose(backend, platform, q, k.shape[1], scoring, is_plain)
  if backend == 'cudnn':  # It supports shared keys.
    return jax.nn.dot_product_attention(
      q, k, v, mask=same, is_causal=causal, implementation='cudnn'
    )
  k, v = _one_per_query(q, k, v)
  if backend == 'pallas':
    pattern = pallas_attention.Pattern('causal' if causal else 'all')
    return pallas_attention.attention(
      q, k, v, pattern, segment_ids, segment_ids
    )
  if causal:
    seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
  if same is not None:
    seen = same if seen is None else seen & same
  q, k, v = _heads_first(q, k, v)
  own = _scores(q, k, seen, scoring.cap)
  out = _mix((own, lambda p: p @ v), *_sink(q, scoring), dtype=v.dtype)
  return out.transpose(0, 2, 1, 3)


def block_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  block_size: int,
  causal: bool = False,
  segment_ids: jax.Array | None = None,
  scoring: Scoring = PLAIN,
  backend: str = 'auto',
  platform: str = '',
) -> jax.Array:
  """The attention of block diffusion over a noisy and a clean copy of a text.

  Rows 0..B-1 of k and v are noisy, rows B..2B-1 the same texts clean. A noisy
  position sees the noisy tokens of its own block and the clean ones of earlier
  blocks; a clean position the clean tokens of its own and earlier blocks, and
  never a noisy one. Scores are 2 L^2 + L S numbers per head instead of the
  (2L)^2 of one masked sequence. Source: BD3-LM, arXiv 2503.09573, section 3.

  With `causal`, the clean rows are the input of an autoregressive network, each
  token one place later: a clean position sees itself and those to its left, and
  a noisy one in the block that starts at b the clean positions 0 to b, which
  hold a start symbol and the tokens before the block.

  Args:
    q: [2B, L, H, Dh], or [B, L, H, Dh] for the noisy rows only.
    k: [2B, L, K, Dh], K as in `attention`.
    v: [2B, L, K, Dh].
    block_size: S, divides L.
    causal: whether the clean rows are causal.
    segment_ids: [2B, L] int32 or None.
    scoring, platform: as in `attention`.
    backend: 'xla', 'pallas' (noisy and clean keys concatenated) or 'auto'.

  Returns:
    In q's shape and dtype.
  """
  k, v = _one_per_query(q, k, v)
  batch, length = k.shape[0] // 2, k.shape[1]
  chosen = _choose(backend, platform, q, 2 * length, scoring, is_plain=False)
  if chosen == 'pallas':
    return _block_kernel(q, k, v, block_size, segment_ids, causal)
  num_blocks = length // block_size
  block = jnp.arange(length) // block_size
  q, k, v = _heads_first(q, k, v)
  (noisy_k, clean_k), (noisy_v, clean_v) = jnp.split(k, 2), jnp.split(v, 2)
  split = lambda x: x.reshape(*x.shape[:2], num_blocks, block_size, x.shape[-1])
  merge = lambda x: x.reshape(*x.shape[:2], length, x.shape[-1])

  if causal:
    where = jnp.arange(length)
    before = where[None] <= (block * block_size)[:, None]
    seen = where[None] <= where[:, None]
  else:
    before, seen = block[None] < block[:, None], block[None] <= block[:, None]
  before, seen = before[None, None], seen[None, None]
  same_block = None
  if segment_ids is not None:
    ids = segment_ids[:batch]
    before = before & _same(ids)
    shape = batch, 1, num_blocks, block_size, block_size
    same_block = _same(ids.reshape(-1, block_size)).reshape(shape)
  noisy_q = q[:batch]
  own = _scores(split(noisy_q), split(noisy_k), same_block, scoring.cap)
  context = _scores(noisy_q, clean_k, before, scoring.cap)
  out = _mix(
    (own, lambda p: merge(p @ split(noisy_v))),
    (split(context), lambda p: merge(p) @ clean_v),
    *((split(s), lambda p: f(merge(p))) for s, f in _sink(noisy_q, scoring)),
    dtype=v.dtype,
  )
  if q.shape[0] > batch:
    if segment_ids is not None:
      seen = seen & _same(segment_ids[batch:])
    clean_q = q[batch:]
    clean = _mix(
      (_scores(clean_q, clean_k, seen, scoring.cap), lambda p: p @ clean_v),
      *_sink(clean_q, scoring),
      dtype=v.dtype,
    )
    out = jnp.concatenate([out, clean])
  return out.transpose(0, 2, 1, 3)


def _block_kernel(
  q, k, v, block_size, segment_ids, causal=False, interpret=False
):
  """`block_attention` by the Pallas kernel."""
  batch = k.shape[0] // 2
  in_a_row = lambda x: jnp.concatenate([x[:batch], x[batch:]], axis=1)

  def kernel(kind, q, k, v, q_ids, k_ids):
    size = 1 if causal and kind == 'causal' else block_size
    pattern = pallas_attention.Pattern(kind, size, int(causal))
    return pallas_attention.attention(q, k, v, pattern, q_ids, k_ids, interpret)

  noisy_ids = clean_ids = row_ids = None
  if segment_ids is not None:
    noisy_ids, clean_ids = jnp.split(segment_ids, 2)
    row_ids = in_a_row(segment_ids)
  out = kernel('noisy', q[:batch], in_a_row(k), in_a_row(v), noisy_ids, row_ids)
  if q.shape[0] == batch:
    return out
  q, k, v = q[batch:], k[batch:], v[batch:]
  clean = kernel('causal', q, k, v, clean_ids, clean_ids)
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
  scoring: Scoring = PLAIN,
) -> jax.Array:
  """Attention of a few tokens to themselves and to a cache, by XLA.

  Args:
    q: [B, S, H, Dh].
    k: [B, S, K, Dh], the tokens' own keys, K as in `attention`.
    v: [B, S, K, Dh], the tokens' own values.
    cached_k: [B, C, K, Dh].
    cached_v: [B, C, K, Dh].
    visible: [C] bool, the cached positions that all of the tokens see; or
      [B, C], those that the tokens of a row see.
    causal: whether, among its own, a token sees its predecessors only.
    scoring: as in `attention`.

  Returns:
    [B, S, H, Dh] in q's dtype.
  """
  own_seen = None
  if causal:
    own_seen = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None, None]
  k, v, cached_k, cached_v = _one_per_query(q, k, v, cached_k, cached_v)
  q, k, v = _heads_first(q, k, v)
  cached_k, cached_v = (x.transpose(0, 2, 1, 3) for x in (cached_k, cached_v))
  visible = jnp.atleast_2d(visible)[:, None, None]
  out = _mix(
    (_scores(q, k, own_seen, scoring.cap), lambda p: p @ v),
    (_scores(q, cached_k, visible, scoring.cap), lambda p: p @ cached_v),
    *_sink(q, scoring),
    dtype=v.dtype,
  )
  return out.transpose(0, 2, 1, 3)


def _one_per_query(q, *shared):
  """Repeats keys or values [B, L, K, Dh] for their H / K queries."""
  copies = q.shape[2] // shared[0].shape[2]
  if copies == 1:
    return shared
  return tuple(jnp.repeat(x, copies, axis=2) for x in shared)


def _heads_first(q, k, v):
  # Transposed explicitly: on a CPU the same products with the heads in the
  # middle took 40% longer in training and 300% longer in sampling.
  return (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))


def _same(ids):
  """Returns which positions have equal ids [B, L], [B, 1, L, L] bool."""
  return (ids[:, :, None] == ids[:, None, :])[:, None]


def _scores(q, k, seen, cap):
  """Returns the scores [..., Lq, Lk] of q [..., Lq, Dh] and k [..., Lk, Dh]."""
  scores = jnp.einsum(
    '...qd,...kd->...qk', q, k, preferred_element_type=jnp.float32
  )
  if cap:
    scores = cap * jnp.tanh(scores / cap)
  if seen is None:
    return scores
  return jnp.where(seen, scores, jnp.finfo(jnp.float32).min)


def _sink(q, scoring):
  """Returns the part of `_mix` that a sink is for q [B, H, Lq, Dh], if any."""
  if scoring.sink is None:
    return []
  copies = q.shape[1] // scoring.sink[0].shape[2]
  k, v = (
    jnp.repeat(x, copies, axis=2).transpose(0, 2, 1, 3) for x in scoring.sink
  )
  return [(_scores(q, k, None, scoring.cap), lambda p: p @ v)]


def _mix(*parts: tuple[jax.Array, Callable[[jax.Array], jax.Array]], dtype):
  """Weighs values by one softmax over the scores of several parts.

  Args:
    parts: scores [..., Lq, n], and what maps their weights to an output.
    dtype: of the weights.
  """
  scores, outputs = zip(*parts)
  ends = itertools.accumulate(x.shape[-1] for x in scores)
  weights = softmax(jnp.concatenate(scores, axis=-1)).astype(dtype)
  weights = jnp.split(weights, list(ends)[:-1], axis=-1)
  return functools.reduce(
    operator.add, (output(p) for output, p in zip(outputs, weights))
  )


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
  """Softmax over the last axis, whose derivative stores the result only.

  With jax.nn.softmax a step of configs/chars_small.py takes 35% more memory.
  """
  exp = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
  return exp / jnp.sum(exp, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
  y = softmax(primals[0])
  dx = tangents[0]
  return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))
