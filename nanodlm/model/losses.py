"""The loss of the scored positions only, never materialising [B, L, V].

The output projection and the objective's terms are computed for one chunk of
scored positions at a time, and their gradients in the same pass: once a chunk's
logits exist, everything that needs them is done, so that they are computed once
and at most [chunk, V] of them are alive. Works for any objective: the chunk's
gradient is taken by JAX, not written by hand. On a CPU it is written over the
logits, a few rows at a time: one array of that size, and what comes between
stays in the processor's cache.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from nanodlm.types import Terms

# Logits that a CPU scores at a time, 2 MB: of the order of its second-level caches.
BLOCK_SIZE = 1 << 19
# Numbers of the kernel's gradient that it adds up at a time, 8 MB.
PART_SIZE = 1 << 21


def gather_scored(
  scored: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
  """The flat indices of the scored positions, padded to a static number.

  Args:
    scored: [B, L] bool with at most `capacity` True.
    capacity: N.

  Returns:
    positions [N] int32 into B * L, and is_real [N] bool, False where padded.
  """
  positions = jnp.flatnonzero(scored, size=capacity, fill_value=0)
  is_real = jnp.arange(capacity) < jnp.sum(scored)
  return positions.astype(jnp.int32), is_real


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def projected_terms(
  project: Callable[[Any, jax.Array], jax.Array],
  terms_of: Callable[[jax.Array, Any, Any], Terms],
  chunk_size: int,
  kernel: Any,
  learned: Any,
  hidden: jax.Array,
  fields: Any,
  weight: jax.Array,
) -> tuple[jax.Array, Terms]:
  """sum(weight * loss) over N positions, and their terms.

  Differentiable in `kernel`, `learned` and `hidden` through the sum; the terms
  carry no gradient.

  Args:
    project: (kernel, hidden [n, D]) -> logits [n, V].
    terms_of: (logits [n, V], learned, fields of [n]) -> Terms of [n].
    chunk_size: positions projected at once; bounds the memory at
      chunk_size * V floats (elsewhere than on a CPU a few times over in the
      backward pass).
    kernel: the output projection's parameters, a pytree of [V, ...] arrays, of
      whose rows `project` makes the logits one by one.
    learned: other parameters of the terms, a pytree.
    hidden: [N, D].
    fields: pytree of [N, ...] arrays.
    weight: [N] float32; chunks that are all 0 are skipped.

  Returns:
    The sum [] float32, and Terms of [N].
  """
  total, terms, _ = _scan_chunks(
    project,
    terms_of,
    chunk_size,
    kernel,
    learned,
    hidden,
    fields,
    weight,
    with_gradient=False,
  )
  return total, terms


def _scan_chunks(
  project,
  terms_of,
  chunk_size,
  kernel,
  learned,
  hidden,
  fields,
  weight,
  with_gradient,
):
  num = hidden.shape[0]
  size = min(chunk_size, num)
  num_chunks = -(-num // size)
  # Even chunks: 2056 positions in chunks of at most 2048 become 2 x 1028. And
  # even blocks in them.
  size = -(-num // num_chunks)
  vocab_size = jax.eval_shape(project, kernel, hidden).shape[-1]
  num_blocks = -(-size // max(BLOCK_SIZE // vocab_size, 1))
  size = -(-size // num_blocks) * num_blocks
  pad = num_chunks * size - num

  def split(x, **padding):
    x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1), **padding)
    return x.reshape(num_chunks, size, *x.shape[1:])

  def work(gradient, h, f, w):
    if not with_gradient:
      terms = terms_of(project(kernel, h), learned, f)
      return gradient, terms, jnp.zeros_like(h)
    logits, pull_back = jax.vjp(functools.partial(project, kernel), h)
    d_logits, d_learned, terms = _score(
      terms_of, num_blocks, logits, learned, f, w
    )
    (d_h,) = pull_back(d_logits)
    d_kernel = _add_kernel_gradient(project, kernel, h, d_logits, gradient[0])
    return (d_kernel, jax.tree.map(jnp.add, gradient[1], d_learned)), terms, d_h

  def skip(gradient, h, f, w):
    shapes = jax.eval_shape(work, gradient, h, f, w)
    # From the weights, so that under shard_map they vary over devices as those do.
    zeros = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype) + 0 * jnp.sum(w).astype(s.dtype),
      shapes[1],
    )
    return gradient, zeros, jnp.zeros_like(h)

  def body(gradient, chunk):
    h, f, w = chunk
    gradient, terms, d_h = jax.lax.cond(
      jnp.any(w != 0), work, skip, gradient, h, f, w
    )
    return gradient, (terms, d_h)

  zeros = (
    jax.tree.map(jnp.zeros_like, (kernel, learned)) if with_gradient else None
  )
  # The last position again, with weight 0: of zeros, which are no position's
  # fields, the terms might be NaN.
  again = functools.partial(split, mode='edge')
  xs = (again(hidden), jax.tree.map(again, fields), split(weight))
  gradient, (terms, d_hidden) = jax.lax.scan(body, zeros, xs)
  join = lambda x: x.reshape(num_chunks * size, *x.shape[2:])[:num]
  terms = jax.tree.map(join, terms)
  return jnp.sum(terms.loss * weight), terms, (gradient, join(d_hidden))


def _score(terms_of, num_blocks, logits, learned, fields, weight):
  """Gradients of sum(weight * loss) in logits [n, V] and `learned`, and Terms."""

  def whole(logits, learned, fields, weight):
    def total(logits, learned):
      terms = terms_of(logits, learned, fields)
      return jnp.sum(terms.loss * weight), terms

    (d_logits, d_learned), terms = jax.grad(total, (0, 1), has_aux=True)(
      logits, learned
    )
    return d_logits, d_learned, terms

  if num_blocks == 1:
    return whole(logits, learned, fields, weight)

  def by_block(logits, learned, fields, weight):
    rows = weight.shape[0] // num_blocks

    def body(carry, block):
      logits, d_learned = carry
      start, fields, weight = block
      d_block, d_learned_here, terms = whole(
        jax.lax.dynamic_slice_in_dim(logits, start, rows),
        learned,
        fields,
        weight,
      )
      logits = jax.lax.dynamic_update_slice_in_dim(logits, d_block, start, 0)
      return (logits, jax.tree.map(jnp.add, d_learned, d_learned_here)), terms

    blocks = jax.tree.map(
      lambda x: x.reshape(num_blocks, rows, *x.shape[1:]), (fields, weight)
    )
    (d_logits, d_learned), terms = jax.lax.scan(
      body,
      (logits, jax.tree.map(jnp.zeros_like, learned)),
      (rows * jnp.arange(num_blocks), *blocks),
    )
    return (
      d_logits,
      d_learned,
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), terms),
    )

  return jax.lax.platform_dependent(
    logits, learned, fields, weight, cpu=by_block, default=whole
  )


def _add_kernel_gradient(project, kernel, hidden, d_logits, total):
  """`total`, as the kernel, + the gradient in the kernel, of d_logits [n, V]."""

  def of_rows(kernel, d_logits):
    return jax.vjp(lambda kernel: project(kernel, hidden), kernel)[1](d_logits)[
      0
    ]

  vocab_size = d_logits.shape[-1]
  num_parts = -(-sum(x.size for x in jax.tree.leaves(kernel)) // PART_SIZE)
  size = -(-vocab_size // num_parts)
  whole = lambda kernel, d_logits, total: jax.tree.map(
    jnp.add, total, of_rows(kernel, d_logits)
  )
  if num_parts == 1:
    return whole(kernel, d_logits, total)

  def by_part(kernel, d_logits, total):
    def add(i, total):
      # The last part begins in the one before, whose rows it adds nothing to.
      start = jnp.minimum(i * size, vocab_size - size)
      cut = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
      )
      is_new = start + jnp.arange(size) >= i * size
      part = of_rows(
        jax.tree.map(cut, kernel),
        jnp.where(is_new[None], cut(d_logits, axis=1), 0.0),
      )
      return jax.tree.map(
        lambda total, part: jax.lax.dynamic_update_slice_in_dim(
          total, cut(total) + part, start, 0
        ),
        total,
        part,
      )

    return jax.lax.fori_loop(0, num_parts, add, total)

  # On a CPU with no second array of the kernel's size.
  return jax.lax.platform_dependent(
    kernel, d_logits, total, cpu=by_part, default=whole
  )


def _forward(
  project, terms_of, chunk_size, kernel, learned, hidden, fields, weight
):
  total, terms, gradients = _scan_chunks(
    project,
    terms_of,
    chunk_size,
    kernel,
    learned,
    hidden,
    fields,
    weight,
    with_gradient=True,
  )
  return (total, terms), (gradients, fields, weight)


def _backward(project, terms_of, chunk_size, residuals, cotangents):
  del project, terms_of, chunk_size
  ((d_kernel, d_learned), d_hidden), fields, weight = residuals
  scale = cotangents[0]
  scaled = lambda x: (x * scale).astype(x.dtype)

  def none(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.zeros_like(x)
    return jnp.zeros(x.shape, jax.dtypes.float0)

  return (
    jax.tree.map(scaled, d_kernel),
    jax.tree.map(scaled, d_learned),
    scaled(d_hidden),
    jax.tree.map(none, fields),
    none(weight),
  )


projected_terms.defvjp(_forward, _backward)
