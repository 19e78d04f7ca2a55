"""Tests of nanodlm.model.losses against the loss from all logits."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.model import losses, transformer
from nanodlm.objectives.masked import Masked
from nanodlm.types import Terms

NUM, WIDTH, VOCAB = 22, 6, 9


def inputs(num_real=NUM):
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
  hidden = rng.normal(size=(NUM, WIDTH)).astype(np.float32)
  fields = {
    'target': rng.integers(VOCAB - 1, size=NUM),
    'scale': rng.random(NUM).astype(np.float32),
  }
  # Prompts and padding have weight 0 anywhere, also at the start of a chunk.
  is_real = (np.arange(NUM) < num_real) & (np.arange(NUM) % 3 != 0)
  return kernel, hidden, fields, (rng.random(NUM) * is_real).astype(np.float32)


def dense(kernel, hidden, fields, weight):
  terms = Masked(VOCAB - 1).terms(hidden @ kernel.T, fields)
  return jnp.sum(terms.loss * weight), terms


@functools.partial(jax.jit, static_argnums=0)
def chunked(chunk_size, kernel, *args):
  return losses.projected_terms(
    transformer.output_logits,
    lambda logits, learned, fields: Masked(VOCAB - 1).terms(logits, fields),
    chunk_size,
    (kernel,),
    (),
    *args,
  )


class ProjectedTermsTest(parameterized.TestCase):
  @parameterized.product(chunk_size=(1, 3, 11, NUM, 100), num_real=(NUM, 7, 0))
  def test_agrees_with_the_dense_loss(self, chunk_size, num_real):
    # With few real positions, whole chunks have weight 0 and are skipped.
    kernel, hidden, fields, weight = inputs(num_real)

    def scaled(loss):  # A cotangent other than 1.
      def total(kernel, hidden):
        value, terms = loss(kernel, hidden, fields, weight)
        return -2.5 * value, terms

      return jax.value_and_grad(total, (0, 1), has_aux=True)(kernel, hidden)

    (value, terms), gradients = scaled(functools.partial(chunked, chunk_size))
    (expected, dense_terms), dense_gradients = scaled(dense)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, dense_gradients):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    real = weight != 0
    for ours, theirs in zip(terms, dense_terms):
      self.assertEqual(ours.shape, (NUM,))
      np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-5, atol=1e-6)

    # The pass without a gradient gives the same.
    only_value, only_terms = chunked(chunk_size, kernel, hidden, fields, weight)
    np.testing.assert_allclose(
      only_value, expected / -2.5, rtol=1e-5, atol=1e-6
    )
    for ours, theirs in zip(only_terms, terms):
      np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-5, atol=1e-6)

  @parameterized.parameters(3, NUM)
  def test_logits_of_another_network(self, chunk_size):
    kernel, hidden, _, weight = inputs()
    other_kernel, states = 2 * kernel[::-1], hidden[::-1] - 0.5
    sizes = []

    def distance(logits, fields):
      sizes.append(fields['reference'].shape)
      loss = jnp.sum((logits - fields['reference']) ** 2, axis=-1)
      return Terms(loss, loss, loss, loss)

    def in_chunks(kernel, hidden):
      return losses.projected_terms(
        transformer.output_logits,
        lambda logits, _, fields: distance(logits, fields),
        chunk_size,
        (kernel,),
        (),
        hidden,
        {},
        weight,
        ((other_kernel,), states),
      )

    def plain(kernel, hidden):
      fields = {'reference': states @ other_kernel.T}
      terms = distance(hidden @ kernel.T, fields)
      return jnp.sum(terms.loss * weight), terms

    (ours, our_gradient), (theirs, gradient) = (
      jax.value_and_grad(total, (0, 1), has_aux=True)(kernel, hidden)
      for total in (in_chunks, plain)
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for a, b in zip(our_gradient, gradient):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    # The logits of all positions at once are not in memory.
    self.assertEqual(sizes[0], (-(-NUM // -(-NUM // chunk_size)), VOCAB))

  @parameterized.product(chunk_size=(3, 7, NUM), has_bias=(False, True))
  def test_gradients_of_a_bias_and_of_learned_parameters(
    self, chunk_size, has_bias
  ):
    kernel, hidden, fields, weight = inputs()
    bias = np.linspace(-1, 2, VOCAB, dtype=np.float32)
    kernel = (kernel, bias) if has_bias else (kernel,)
    learned = np.float32(1.5)

    def terms(logits, learned, fields):
      ours = Masked(VOCAB - 1).terms(logits, fields)
      return ours._replace(loss=learned**2 * ours.loss)

    def in_chunks(*args):
      return losses.projected_terms(
        transformer.output_logits, terms, chunk_size, *args, fields, weight
      )

    def plain(kernel, learned, hidden):
      logits = hidden @ kernel[0].T
      if has_bias:
        logits += kernel[1][None]
      ours = terms(logits, learned, fields)
      return jnp.sum(ours.loss * weight), ours

    ours, theirs = (
      jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(
        kernel, learned, hidden
      )
      for total in (in_chunks, plain)
    )
    for leaf, expected in zip(
      jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
    ):
      real = (weight != 0) if leaf.shape == (NUM,) else ...
      np.testing.assert_allclose(
        leaf[real], expected[real], rtol=1e-5, atol=1e-5
      )

  def test_terms_carry_no_gradient(self):
    kernel, hidden, fields, weight = inputs()
    gradient = jax.grad(
      lambda kernel: jnp.sum(chunked(5, kernel, hidden, fields, weight)[1].nll)
    )(kernel)
    np.testing.assert_array_equal(gradient, 0)

  def test_low_precision_hidden(self):
    kernel, hidden, fields, weight = inputs()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    value, gradients = jax.value_and_grad(
      lambda *args: chunked(5, *args)[0], (0, 1)
    )(kernel, hidden, fields, weight)
    self.assertEqual([g.dtype for g in gradients], [jnp.float32, jnp.bfloat16])
    expected = dense(kernel, hidden.astype(jnp.float32), fields, weight)[0]
    np.testing.assert_allclose(value, expected, rtol=0.02)

  def test_no_array_of_all_logits(self):
    kernel, hidden, fields, weight = inputs()
    gradient = jax.grad(lambda *args: chunked(3, *args)[0], (0, 1))
    jaxpr = jax.make_jaxpr(gradient)(kernel, hidden, fields, weight)
    self.assertNotIn(f'[{NUM},{VOCAB}]', str(jaxpr))

  def test_memory_at_a_large_vocabulary(self):
    # Compiled, not run: the logits of 16k positions and 50k ids take 3.3 GB.
    num, width, vocab = 16_384, 768, 50_258
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = (array(vocab, width), array(num, width), array(num))
    terms = Masked(vocab - 1).terms
    target = lambda weight: {
      'target': jnp.zeros(num, jnp.int32),
      'scale': weight,
    }

    def fused(kernel, hidden, weight):
      return losses.projected_terms(
        transformer.output_logits,
        lambda logits, _, fields: terms(logits, fields),
        1024,
        (kernel,),
        (),
        hidden,
        target(weight),
        weight,
      )[0]

    def plain(kernel, hidden, weight):
      return jnp.sum(terms(hidden @ kernel.T, target(weight)).loss * weight)

    fused_bytes, plain_bytes = (
      jax.jit(jax.grad(loss, (0, 1)))
      .lower(*args)
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
      for loss in (fused, plain)
    )
    self.assertLess(fused_bytes, 0.15 * plain_bytes)

  def test_padding_of_the_last_chunk_causes_no_division_by_zero(self):
    # D3PM's terms divide by a noise level, positive for real positions.
    kernel, hidden, fields, weight = inputs()
    fields['scale'] += 0.1

    def terms(logits, learned, fields):
      del learned
      ours = Masked(VOCAB - 1).terms(logits, fields)
      return ours._replace(loss=ours.loss / fields['scale'])

    gradient = jax.grad(
      lambda kernel, hidden: losses.projected_terms(
        transformer.output_logits,
        terms,
        5,
        (kernel,),
        (),
        hidden,
        fields,
        weight,
      )[0],
      (0, 1),
    )
    for leaf in gradient(kernel, hidden):
      self.assertTrue(np.isfinite(leaf).all())


class GatherScoredTest(parameterized.TestCase):
  @parameterized.parameters((0, 4), (4, 4), (3, 4), (12, 12))
  def test_gathers_each_once(self, num, capacity):
    scored = np.zeros(12, bool)
    scored[np.random.default_rng(num).permutation(12)[:num]] = True
    positions, is_real = losses.gather_scored(
      jnp.asarray(scored).reshape(3, 4), capacity
    )
    self.assertEqual(positions.shape, (capacity,))
    np.testing.assert_array_equal(positions[is_real], np.flatnonzero(scored))
    self.assertEqual(is_real.sum(), num)
