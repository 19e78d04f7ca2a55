"""The loss of the scored positions only, never materialising [B, L, V].

The output projection and the objective's terms are computed for one chunk of
scored positions at a time, and their gradients in the same pass: once a chunk's
logits exist, everything that needs them is done, so that they are computed once
and at most [chunk, V] of them are alive. Works for any objective: the chunk's
gradient is taken by JAX, not written by hand.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from nanodlm.types import Terms


def gather_scored(scored: jax.Array, capacity: int
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
def projected_terms(project: Callable[[jax.Array, jax.Array], jax.Array],
                    terms_of: Callable[[jax.Array, Any], Terms],
                    chunk_size: int, kernel: jax.Array, hidden: jax.Array,
                    fields: Any, weight: jax.Array
                    ) -> tuple[jax.Array, Terms]:
  """sum(weight * loss) over N positions, and their terms.

  Differentiable in `kernel` and `hidden` through the sum; the terms carry no
  gradient.

  Args:
    project: (kernel, hidden [n, D]) -> logits [n, V].
    terms_of: (logits [n, V], fields of [n]) -> Terms of [n].
    chunk_size: positions projected at once; bounds the memory at
      chunk_size * V floats (a few times over in the backward pass).
    kernel: the output projection's parameters.
    hidden: [N, D].
    fields: pytree of [N, ...] arrays.
    weight: [N] float32; chunks that are all 0 are skipped.

  Returns:
    The sum [] float32, and Terms of [N].
  """
  total, terms, _ = _scan_chunks(project, terms_of, chunk_size, kernel, hidden,
                                 fields, weight, with_gradient=False)
  return total, terms


def _scan_chunks(project, terms_of, chunk_size, kernel, hidden, fields, weight,
                 with_gradient):
  num = hidden.shape[0]
  size = min(chunk_size, num)
  num_chunks = -(-num // size)
  # Even chunks: 2056 positions in chunks of at most 2048 become 2 x 1028.
  size = -(-num // num_chunks)
  pad = num_chunks * size - num

  def split(x, **padding):
    x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1), **padding)
    return x.reshape(num_chunks, size, *x.shape[1:])

  def total(kernel, h, f, w):
    terms = terms_of(project(kernel, h), f)
    return jnp.sum(terms.loss * w), terms

  def work(kernel, grad_kernel, h, f, w):
    if not with_gradient:
      loss, terms = total(kernel, h, f, w)
      return grad_kernel, loss, terms, jnp.zeros_like(h)
    (loss, terms), (d_kernel, d_h) = jax.value_and_grad(
        total, (0, 1), has_aux=True)(kernel, h, f, w)
    return jax.tree.map(jnp.add, grad_kernel, d_kernel), loss, terms, d_h

  def skip(kernel, grad_kernel, h, f, w):
    shapes = jax.eval_shape(work, kernel, grad_kernel, h, f, w)
    # From the weights, so that under shard_map they vary over devices as those do.
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype) + 0 * jnp.sum(w).astype(s.dtype),
        shapes[1:3])
    return (grad_kernel, *zeros, jnp.zeros_like(h))

  def body(grad_kernel, chunk):
    h, f, w = chunk
    out = jax.lax.cond(jnp.any(w != 0), work, skip, kernel, grad_kernel, h, f, w)
    return out[0], out[1:]

  zeros = jax.tree.map(jnp.zeros_like, kernel) if with_gradient else None
  # The last position again, with weight 0: of zeros, which are no position's
  # fields, the terms might be NaN.
  again = functools.partial(split, mode='edge')
  xs = (again(hidden), jax.tree.map(again, fields), split(weight))
  grad_kernel, (losses, terms, d_hidden) = jax.lax.scan(body, zeros, xs)
  join = lambda x: x.reshape(num_chunks * size, *x.shape[2:])[:num]
  return (jnp.sum(losses), jax.tree.map(join, terms),
          (grad_kernel, join(d_hidden)))


def _forward(project, terms_of, chunk_size, kernel, hidden, fields, weight):
  total, terms, grads = _scan_chunks(project, terms_of, chunk_size, kernel,
                                     hidden, fields, weight, with_gradient=True)
  return (total, terms), (grads, fields, weight)


def _backward(project, terms_of, chunk_size, residuals, cotangents):
  del project, terms_of, chunk_size
  (d_kernel, d_hidden), fields, weight = residuals
  scale = cotangents[0]
  scaled = lambda x: (x * scale).astype(x.dtype)
  def none(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.zeros_like(x)
    return jnp.zeros(x.shape, jax.dtypes.float0)
  return (jax.tree.map(scaled, d_kernel), scaled(d_hidden),
          jax.tree.map(none, fields), none(weight))


projected_terms.defvjp(_forward, _backward)
