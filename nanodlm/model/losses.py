"""The loss of the scored positions only, without an array of all logits.

The output projection and the objective's terms are computed for one chunk of
scored positions at a time, and their gradients in the same pass: the logits of
a chunk are computed once, and those of one chunk are in memory at a time. JAX
takes the gradient of a chunk, so this works for any objective.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.types import Terms


def gather_scored(
  scored: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
  """Finds the flat indices of the scored positions, padded to a static number.

  Args:
    scored: [B, L] bool with at most `capacity` True.
    capacity: N.

  Returns:
    positions [N] int32 into B * L, and is_real [N] bool, False for padding.
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
  reference: Any = None,
) -> tuple[jax.Array, Terms]:
  """Computes sum(weight * loss) over N positions, and their terms.

  Differentiable in `kernel`, `learned` and `hidden` through the sum; the terms
  carry no gradient.

  Args:
    project: (kernel, hidden [n, D]) -> logits [n, V].
    terms_of: (logits [n, V], learned, fields of [n]) -> Terms of [n].
    chunk_size: positions projected at once; bounds the memory at a few times
      chunk_size * V floats.
    kernel: the output projection's parameters, a pytree.
    learned: other parameters of the terms, a pytree.
    hidden: [N, D].
    fields: pytree of [N, ...] arrays.
    weight: [N] float32; chunks that are all 0 are skipped.
    reference: (kernel, hidden [N, D]) of another network, or None. Its logits
      [n, V] are added to a dict of fields as 'reference'.

  Returns:
    The sum [] float32, and Terms of [N].
  """
  args = kernel, learned, hidden, fields, weight, reference
  return _scan_chunks(project, terms_of, chunk_size, False, *args)[0]


def _scan_chunks(project, terms_of, chunk_size, with_gradient, *args):
  """Returns the results of `projected_terms` and, if wanted, the gradients."""
  kernel, learned, hidden, fields, weight, reference = args
  num = hidden.shape[0]
  # Chunks of even size: 2056 positions in chunks of at most 2048 are 2 x 1028.
  num_chunks = -(-num // min(chunk_size, num))
  size = -(-num // num_chunks)
  pad = num_chunks * size - num

  def split(x, **padding):
    x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1), **padding)
    return x.reshape(num_chunks, size, *x.shape[1:])

  other, states = reference or (None, None)

  def work(gradient, h, f, r, w):
    if r is not None:
      f = {**f, 'reference': project(other, r)}

    def total(kernel, learned, h):
      terms = terms_of(project(kernel, h), learned, f)
      return jnp.sum(terms.loss * w), terms

    if not with_gradient:
      return gradient, total(kernel, learned, h)[1], jnp.zeros_like(h)
    (*own, d_h), terms = jax.grad(total, (0, 1, 2), has_aux=True)(
      kernel, learned, h
    )
    return jax.tree.map(jnp.add, gradient, tuple(own)), terms, d_h

  def skip(gradient, *chunk):
    zeros = sharding.zeros_like(lambda: work(gradient, *chunk)[1:])
    return gradient, *zeros

  def body(gradient, chunk):
    is_needed = jnp.any(chunk[-1] != 0)
    gradient, *outs = jax.lax.cond(is_needed, work, skip, gradient, *chunk)
    return gradient, outs

  gradient = None
  if with_gradient:
    gradient = jax.tree.map(jnp.zeros_like, (kernel, learned))
  # Padding repeats the last position, with weight 0: the fields of no position
  # are all 0, and with such the terms might be NaN.
  again = functools.partial(split, mode='edge')
  chunks = (*jax.tree.map(again, (hidden, fields, states)), split(weight))
  gradient, (terms, d_hidden) = jax.lax.scan(body, gradient, chunks)
  join = lambda x: x.reshape(num_chunks * size, *x.shape[2:])[:num]
  terms = jax.tree.map(join, terms)
  return (jnp.sum(terms.loss * weight), terms), (gradient, join(d_hidden))


def _forward(project, terms_of, chunk_size, *args):
  return _scan_chunks(project, terms_of, chunk_size, True, *args)


def _backward(project, terms_of, chunk_size, gradients, cotangents):
  del project, terms_of, chunk_size
  scaled = lambda x: (x * cotangents[0]).astype(x.dtype)
  (d_kernel, d_learned), d_hidden = jax.tree.map(scaled, gradients)
  return d_kernel, d_learned, d_hidden, None, None, None


projected_terms.defvjp(_forward, _backward)
