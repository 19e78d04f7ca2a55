"""Tests of nanodlm.model: visibility, equivalences, and the errors."""

import dataclasses
import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
from scipy import special

from nanodlm.devices import mesh as meshes
from nanodlm.model import attention, layers, transformer
from nanodlm.model.config import GATED, MLPS
from nanodlm.model.network import TransformerNetwork
from nanodlm.types import InputError, SoftTokens
from tests import toys

BATCH, LENGTH = 3, 6
TOKENS = np.stack(
  [np.arange(LENGTH), np.arange(LENGTH)[::-1], np.arange(LENGTH) + 6]
).astype(np.int32)
T = np.float32([0.1, 0.5, 0.9])
SEGMENTS = np.tile(np.int32([0, 0, 1, 1, 1, 2]), (BATCH, 1))
EVERYTHING = dict(
  qk_norm=True,
  time_conditioning=True,
  dropout=0.3,
  mlp='swiglu',
  tie_embeddings=False,
  conv_size=3,
)
# What attention has in some networks, by XLA only.
SCORING = dict(
  qk_norm=True, joint_qk_norm=True, attention_cap=0.5, attention_sink=True
)


def params_of(config):
  """Random parameters, larger than initial ones, so that each has an effect."""
  rng = np.random.default_rng(0)

  def draw(path, shape):
    is_norm = path[-1].key == 'scale'
    return (is_norm + 0.1 * rng.normal(size=shape.shape)).astype(np.float32)

  shapes = jax.eval_shape(
    TransformerNetwork(config).init_params, jax.random.key(0)
  )
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def initial_params(config):
  return TransformerNetwork(config).init_params(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(config, params, tokens=TOKENS, t=T, **kwargs):
  return transformer.Transformer(config).apply(
    {'params': params}, tokens, t, **kwargs
  )


def dropout_keys(num=BATCH):
  return jax.random.split(jax.random.key(1), num)


class WhoSeesWhomTest(parameterized.TestCase):
  def influence(self, config, **kwargs):
    """[L, L] bool: output i has a gradient with respect to input token j."""
    params = params_of(config)

    def outputs(embedding):
      hidden = transformer.Transformer(config).apply(
        {'params': {**params, 'embedding': embedding}},
        TOKENS[:1],
        T[:1],
        **kwargs,
      )
      return hidden[0].sum(-1)

    # The tokens are 0 .. L-1: row j of the embedding is position j.
    jacobian = jax.jit(jax.jacrev(outputs))(params['embedding'])
    return np.any(np.asarray(jacobian) != 0, axis=-1)[:, :LENGTH]

  @parameterized.product(num_layers=(1, 3), qk_norm=(False, True))
  def test_causal(self, num_layers, qk_norm):
    config = toys.model_config(
      causal=True, num_layers=num_layers, qk_norm=qk_norm
    )
    np.testing.assert_array_equal(
      self.influence(config), np.tri(LENGTH, dtype=bool)
    )

  @parameterized.parameters(1, 3)
  def test_bidirectional(self, num_layers):
    config = toys.model_config(num_layers=num_layers)
    self.assertTrue(self.influence(config).all())

  @parameterized.parameters(False, True)
  def test_segments(self, causal):
    config = toys.model_config(causal=causal, conv_size=0 if causal else 5)
    same = SEGMENTS[0][:, None] == SEGMENTS[0]
    expected = same & np.tri(LENGTH, dtype=bool) if causal else same
    np.testing.assert_array_equal(
      self.influence(config, segment_ids=SEGMENTS[:1]), expected
    )


class ConvolutionTest(absltest.TestCase):
  def test_is_the_sum_over_neighbours_of_a_segment(self):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, weights = draw(2, LENGTH, 4), draw(5, 4)
    segments = np.stack([SEGMENTS[0], np.zeros(LENGTH, np.int32)])
    expected = np.zeros_like(x)
    for row in range(2):
      for i in range(LENGTH):
        for j in range(max(i - 2, 0), min(i + 3, LENGTH)):
          if segments[row, i] == segments[row, j]:
            expected[row, i] += weights[j - i + 2] * x[row, j]
    found = layers.convolve(x, weights, segments)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
      layers.convolve(x[1:], weights), expected[1:], atol=1e-5
    )

  def test_reads_the_input_of_attention(self):
    # At its centre alone, it scales that input.
    config = toys.model_config(conv_size=3)
    plain = dataclasses.replace(config, conv_size=0)
    params = params_of(config)
    of_plain = {
      key: dict(x) if 'layer' in key else x for key, x in params.items()
    }
    for name in 'layers', 'last_layer':
      layer, other = params[name], of_plain[name]
      layer['residual_conv'] = np.zeros_like(layer['residual_conv'])
      layer['attention_conv'][..., [0, 2], :] = 0
      centre = layer['attention_conv'][..., 1, :]
      scale = layer['attention_norm']['scale'] * (1 + centre)
      other['attention_norm'] = {'scale': scale}
      del other['attention_conv'], other['residual_conv']
    np.testing.assert_allclose(
      hidden_of(config, params), hidden_of(plain, of_plain), atol=1e-5
    )

  def test_sums_gradients_in_float32(self):
    x = jnp.ones((4, 4096, 1), jnp.bfloat16)
    total = lambda weights: jnp.sum(
      layers.convolve(x, weights).astype(jnp.float32)
    )
    gradient = jax.grad(total)(jnp.zeros((3, 1)))[:, 0]
    num = 4 * 4096
    np.testing.assert_allclose(gradient, [num - 4, num, num - 4], rtol=1e-6)

  def test_residual_convolution_of_the_rows_wanted(self):
    # With weights of 0 in attention and MLP, nothing else changes the states.
    config = toys.model_config(conv_size=3, num_layers=1)
    params = params_of(config)
    for name in 'attention_out', 'mlp_out':
      params['last_layer'][name] = jax.tree.map(
        np.zeros_like, params['last_layer'][name]
      )
    x = params['embedding'][TOKENS]
    weights = params['last_layer']['residual_conv']
    x = x + np.asarray(layers.convolve(x, weights))
    x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    x = (x * params['final_norm']['scale']).reshape(-1, config.embed_dim)
    positions = np.array([7, 0, 16])
    found = hidden_of(config, params, t=None, positions=positions)
    np.testing.assert_allclose(found, x[positions], atol=1e-5)

  def test_starts_as_the_network_without_it(self):
    config = toys.model_config(conv_size=3)
    plain = dataclasses.replace(config, conv_size=0)
    np.testing.assert_array_equal(
      hidden_of(config, initial_params(config)),
      hidden_of(plain, initial_params(plain)),
    )

  def test_has_no_cache(self):
    config = toys.model_config(conv_size=3)
    cache = TransformerNetwork(config).init_cache(BATCH, LENGTH)
    with self.assertRaisesRegex(InputError, r'model\.conv_size=3'):
      transformer.Transformer(config).apply(
        {'params': params_of(config)},
        *(TOKENS, None, 0, cache, np.zeros(LENGTH, bool)),
        method='advance',
      )


class BlockDiffusionTest(parameterized.TestCase):
  """Noisy and clean copies, and the cache: arXiv 2503.09573, section 3."""

  @parameterized.product(size=(1, 2, 3, 6), num_layers=(1, 3))
  def test_visibility(self, size, num_layers):
    config = toys.model_config(block_size=size, num_layers=num_layers)
    params = params_of(config)

    def outputs(embedding):
      hidden = transformer.Transformer(config).apply(
        {'params': {**params, 'embedding': embedding}},
        TOKENS[:1],
        clean=TOKENS[2:],
      )
      return hidden[0].sum(-1)

    # Noisy tokens are rows 0 .. L-1 of the embedding, clean ones L .. 2L-1.
    jacobian = jax.jit(jax.jacrev(outputs))(params['embedding'])
    seen = np.any(np.asarray(jacobian) != 0, axis=-1)
    block = np.arange(LENGTH) // size
    np.testing.assert_array_equal(
      seen[:, :LENGTH], block[:, None] == block[None]
    )
    np.testing.assert_array_equal(
      seen[:, LENGTH : 2 * LENGTH], block[:, None] > block[None]
    )

  @parameterized.product(size=(1, 2, 3, 6), num_layers=(1, 3))
  def test_visibility_with_a_causal_clean_copy(self, size, num_layers):
    # Its input is the text after a start symbol, token 2 L.
    config = toys.model_config(
      block_size=size, num_layers=num_layers, causal=True, vocab_size=13
    )
    params, clean = params_of(config), TOKENS[2:]
    clean = np.concatenate([[[12]], clean[:, :-1]], axis=1).astype(np.int32)

    def outputs(embedding):
      hidden = transformer.Transformer(config).apply(
        {'params': {**params, 'embedding': embedding}},
        TOKENS[:1],
        clean=clean,
        positions=jnp.arange(2 * LENGTH),
      )
      return hidden.sum(-1)

    jacobian = jax.jit(jax.jacrev(outputs))(params['embedding'])
    seen = np.any(np.asarray(jacobian) != 0, axis=-1)
    block = np.arange(LENGTH) // size
    noisy, copy = seen[:LENGTH], seen[LENGTH:]
    np.testing.assert_array_equal(
      noisy[:, :LENGTH], block[:, None] == block[None]
    )
    self.assertFalse(copy[:, :LENGTH].any())
    # A noisy position sees the tokens before its block, and a clean one those
    # before its place, whose token it predicts.
    text = slice(LENGTH, 2 * LENGTH - 1)
    last = np.arange(LENGTH - 1)[None]
    np.testing.assert_array_equal(
      noisy[:, text], last < (block * size)[:, None]
    )
    np.testing.assert_array_equal(
      copy[:, text], last < np.arange(LENGTH)[:, None]
    )
    self.assertTrue(seen[:, 2 * LENGTH].all())

  def test_rows_of_a_cache_at_their_own_places(self):
    for changes in ({}, {'num_positions': LENGTH}):
      config = toys.model_config(causal=True, **changes)
      params = params_of(config)
      starts, size = np.array([2, 0, 3]), 2
      advance = functools.partial(
        transformer.Transformer(config).apply,
        {'params': params},
        method='advance',
      )
      nothing = jnp.zeros((LENGTH,), bool)
      _, cache = advance(
        TOKENS,
        None,
        0,
        TransformerNetwork(config).init_cache(BATCH, LENGTH),
        nothing,
      )
      part = np.stack([row[s : s + size] for row, s in zip(TOKENS, starts)])
      visible = np.arange(LENGTH)[None] < starts[:, None]
      hidden, cache = advance((part + 1) % 12, None, starts, cache, visible)
      visible = np.arange(LENGTH)[None] <= starts[:, None]
      after, _ = advance(part, None, starts + 1, cache, visible)
      for i, start in enumerate(starts):
        row = TOKENS[i : i + 1].copy()
        row[0, start : start + size] = (part[i] + 1) % 12
        full = hidden_of(config, params, row, None)
        np.testing.assert_allclose(
          hidden[i], full[0, start : start + size], atol=1e-5
        )
        row[0, start + 1 : start + 1 + size] = part[i]
        full = hidden_of(config, params, row, None)
        np.testing.assert_allclose(
          after[i], full[0, start + 1 : start + 1 + size], atol=1e-5
        )

  @parameterized.product(
    size=(2, 3, 6), options=(dict(qk_norm=True), dict(SCORING, unroll=True))
  )
  def test_is_the_plain_network_on_each_block_after_its_past(
    self, size, options
  ):
    # One block of noisy tokens after its clean past, as one sequence with a
    # mask by which clean tokens see clean ones only: by the cache, and with S =
    # L by the plain bidirectional network.
    config = toys.model_config(block_size=size, **options)
    params, clean = params_of(config), TOKENS[::-1]
    both = hidden_of(config, params, TOKENS, None, clean=clean)

    @jax.jit
    def by_cache(params):
      cache, hidden = TransformerNetwork(config).init_cache(BATCH, LENGTH), []
      advance = functools.partial(
        transformer.Transformer(config).apply,
        {'params': params},
        method='advance',
      )
      for start in range(0, LENGTH, size):
        visible = jnp.arange(LENGTH) < start
        part = slice(start, start + size)
        hidden.append(advance(TOKENS[:, part], None, start, cache, visible)[0])
        cache = advance(clean[:, part], None, start, cache, visible)[1]
      return jnp.concatenate(hidden, axis=1)

    np.testing.assert_allclose(both, by_cache(params), atol=1e-5)
    if size == LENGTH:
      plain = toys.model_config(**options)
      np.testing.assert_allclose(
        both, hidden_of(plain, params, TOKENS, None), atol=1e-5
      )

  @parameterized.product(size=(1, 3), causal=(False, True))
  def test_shifted_outputs(self, size, causal):
    # The first token of a block is predicted by the clean copy, others by the
    # noisy position before them.
    config = toys.model_config(
      num_layers=2, block_size=size, causal=causal, time_conditioning=True
    )
    shifted = dataclasses.replace(config, shift_outputs=True)
    own = dataclasses.replace(config, block_size=0 if causal else size)
    params, clean = jax.tree.map(jnp.asarray, params_of(config)), TOKENS[::-1]
    t = np.float32([[0.1], [0.5], [0.9]]) + np.zeros(LENGTH // size) / 9
    nothing = jnp.zeros((LENGTH,), bool)
    advance = lambda config: functools.partial(
      transformer.Transformer(config).apply,
      {'params': params},
      method='advance',
    )

    @jax.jit
    def copy_of(tokens):  # The states of the clean copy.
      cache, states = TransformerNetwork(config).init_cache(BATCH, LENGTH), []
      for start in range(0, LENGTH, size):
        part = tokens[:, start : start + size]
        now = jnp.arange(LENGTH) < start
        hidden, cache = advance(own)(part, 0 * T, start, cache, now)
        states.append(hidden)
      return jnp.concatenate(states, axis=1)

    start_symbol = np.full_like(clean[:, :1], 11)
    if causal:
      clean = np.concatenate([start_symbol, clean[:, :-1]], axis=1)
    noisy = np.asarray(hidden_of(config, params, t=t, clean=clean))
    states = np.asarray(copy_of(clean))
    expected = np.concatenate([noisy[:, :1], noisy[:, :-1]], axis=1)
    is_first = np.arange(LENGTH) % size == 0
    before = states if causal else np.roll(states, 1, axis=1)
    expected[:, is_first] = before[:, is_first]
    if not causal:
      expected[:, 0] = noisy[:, 0]
    full = hidden_of(shifted, params, t=t, clean=clean)
    np.testing.assert_allclose(full, expected, atol=1e-5)
    positions = np.array([0, 3, 17, 8, 6, 12])
    np.testing.assert_allclose(
      hidden_of(shifted, params, t=t, clean=clean, positions=positions),
      expected.reshape(-1, 16)[positions],
      atol=1e-5,
    )
    if causal:  # The clean copy itself is shifted by its input.
      np.testing.assert_allclose(
        hidden_of(shifted, params, t=t, clean=clean, positions=positions + 18),
        states.reshape(-1, 16)[positions],
        atol=1e-5,
      )

    @jax.jit
    def by_cache():
      cache, hidden = TransformerNetwork(shifted).init_cache(BATCH, LENGTH), []
      copy = dataclasses.replace(own, shift_outputs=not causal)
      if causal:
        _, cache = advance(copy)(clean[:, :1], 0 * T, 0, cache, nothing)
      for start in range(0, LENGTH, size):
        part = slice(start, start + size)
        visible = jnp.arange(LENGTH) < start + causal
        time = t[:, start // size]
        rows = advance(shifted)(TOKENS[:, part], time, start, cache, visible)
        hidden.append(rows[0])
        part = clean[:, start + causal : start + causal + size]
        if not part.size:
          break
        _, cache = advance(copy)(part, 0 * T, start + causal, cache, visible)
      return jnp.concatenate(hidden, axis=1)

    np.testing.assert_allclose(by_cache(), expected, atol=1e-5)

  @parameterized.parameters(False, True)
  def test_shifted_outputs_of_segments(self, causal):
    # The first token of a segment does not depend on the segment before it.
    config = toys.model_config(block_size=3, causal=causal, shift_outputs=True)
    params, segments = params_of(config), np.tile(SEGMENTS[:1], (BATCH, 1))
    hidden = lambda tokens: np.asarray(
      hidden_of(
        config, params, tokens, None, clean=tokens, segment_ids=segments
      )
    )
    changed = TOKENS.copy()
    changed[:, :2] = 9
    first, second = hidden(TOKENS), hidden(changed)
    np.testing.assert_array_equal(first[:, 2:], second[:, 2:])
    self.assertGreater(np.abs(first[:, :2] - second[:, :2]).max(), 1e-3)

  @parameterized.parameters('none', 'full')
  def test_positions_segments_dropout(self, remat):
    config = toys.model_config(block_size=2, dropout=0.3, remat=remat)
    params, positions = params_of(config), np.array([0, 3, 17, 8, 8, 0])
    full, picked = (
      hidden_of(
        config,
        params,
        TOKENS,
        None,
        clean=TOKENS[::-1],
        segment_ids=SEGMENTS,
        dropout_keys=dropout_keys(),
        positions=wanted,
      )
      for wanted in (None, positions)
    )
    np.testing.assert_allclose(
      picked, np.asarray(full).reshape(-1, 16)[positions], atol=1e-5
    )

  def test_segments_are_separate_texts(self):
    # Segments that end with blocks give the same as separate, shifted texts.
    config = toys.model_config(block_size=2)
    params, segments = params_of(config), np.repeat(np.int32([[0, 1]]), 3, 0)
    segments = np.repeat(segments, [2, 4], axis=1)
    both = hidden_of(
      config, params, TOKENS, None, clean=TOKENS[::-1], segment_ids=segments
    )
    # Rotary attention depends on distances only.
    alone = hidden_of(
      config, params, TOKENS[:, 2:], None, clean=TOKENS[::-1, 2:]
    )
    np.testing.assert_allclose(both[:, 2:], alone, atol=1e-5)

  def test_causal_cache(self):
    config = toys.model_config(causal=True)
    params = params_of(config)
    full = hidden_of(config, params, TOKENS, None)

    @jax.jit
    def by_cache(params):
      cache = TransformerNetwork(config).init_cache(BATCH, LENGTH)
      advance = functools.partial(
        transformer.Transformer(config).apply,
        {'params': params},
        method='advance',
      )
      hidden, cache = advance(
        TOKENS[:, :4], None, 0, cache, jnp.zeros((LENGTH,), bool)
      )
      hidden = [hidden]
      for i in (4, 5):
        one, cache = advance(
          TOKENS[:, i : i + 1], None, i, cache, jnp.arange(LENGTH) < i
        )
        hidden.append(one)
      return jnp.concatenate(hidden, axis=1)

    np.testing.assert_allclose(full, by_cache(params), atol=1e-5)

  def test_attention_without_blocks(self):
    with self.assertRaisesRegex(InputError, "'cudnn' does not support block"):
      toys.model_config(block_size=2, attention='cudnn', platform='gpu')

  @parameterized.parameters('dit', 'sigma', 'md4')
  def test_blocks_have_times_and_the_clean_copy_has_none(self, form):
    config = toys.model_config(
      block_size=2, time_conditioning=True, time_form=form
    )
    params, clean = params_of(config), TOKENS[::-1]
    t = np.linspace(0.2, 0.8, 9, dtype=np.float32).reshape(3, 3)
    both = hidden_of(config, params, TOKENS, t, clean=clean)
    chosen = jnp.array([3, 0, 14])  # Indices into B * L.
    some = transformer.Transformer(config).apply(
      {'params': params}, TOKENS, t, clean=clean, positions=chosen
    )
    np.testing.assert_allclose(some, both.reshape(18, -1)[chosen], atol=1e-5)
    # A block depends on its own time and no other.
    other = hidden_of(config, params, TOKENS, t + [[0, 0.1, 0]], clean=clean)
    change = np.abs(both - other).max((0, 2))
    self.assertGreater(np.min(change[2:4]), 1e-3)
    np.testing.assert_array_equal(np.delete(change, [2, 3]), 0)
    # Cached blocks are at time 0.
    cache = TransformerNetwork(config).init_cache(BATCH, LENGTH)
    apply = functools.partial(
      transformer.Transformer(config).apply,
      {'params': params},
      method='advance',
    )
    zero = np.zeros(BATCH, np.float32)
    _, cache = apply(clean[:, :2], zero, 0, cache, jnp.zeros((LENGTH,), bool))
    second, _ = apply(TOKENS[:, 2:4], t[:, 1], 2, cache, jnp.arange(LENGTH) < 2)
    np.testing.assert_allclose(both[:, 2:4], second, atol=1e-5)

  def test_a_constant_time_goes_with_blocks_and_caches(self):
    config = toys.model_config(
      block_size=2, time_conditioning=True, time_form='constant', time_dim=8
    )
    params, clean = params_of(config), TOKENS[::-1]
    both = hidden_of(config, params, TOKENS, T, clean=clean)
    np.testing.assert_array_equal(
      both, hidden_of(config, params, TOKENS, 1 - T, clean=clean)
    )
    cache = TransformerNetwork(config).init_cache(BATCH, LENGTH)
    apply = functools.partial(
      transformer.Transformer(config).apply,
      {'params': params},
      method='advance',
    )
    _, cache = apply(clean[:, :2], T, 0, cache, jnp.zeros((LENGTH,), bool))
    second, _ = apply(TOKENS[:, 2:4], None, 2, cache, jnp.arange(LENGTH) < 2)
    np.testing.assert_allclose(both[:, 2:4], second, atol=1e-5)

  @parameterized.parameters(
    (dict(time_form='sigma'), r"time_form='sigma' is ignored"),
    (dict(time_dim=8), r'time_dim=8 is ignored'),
    (
      dict(time_conditioning=True, time_form='t'),
      "time_form='t' is not one of",
    ),
    (dict(time_conditioning=True, time_dim=7), 'time_dim=7 must be even'),
    (dict(time_dim=-2), 'time_dim=-2 must be >= 0'),
    (dict(embedding_dim=8), 'embedding_dim=8.*tie_embeddings=True'),
  )
  def test_forms_of_time_and_embedding(self, changes, message):
    with self.assertRaisesRegex(InputError, message):
      toys.model_config(**changes)


class NothingChangesTest(parameterized.TestCase):
  def loss_and_gradient(self, config):
    """With dropout, time and segments, which are all inputs of the layers."""

    def loss(params, keys):
      hidden = transformer.Transformer(config).apply(
        {'params': params}, TOKENS, T, segment_ids=SEGMENTS, dropout_keys=keys
      )
      weight = jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)
      return jnp.sum(weight * hidden)

    params = params_of(toys.model_config(**EVERYTHING))
    has_remat = 'remat' in str(jax.make_jaxpr(loss)(params, dropout_keys()))
    self.assertEqual(has_remat, config.remat != 'none')
    return jax.jit(jax.value_and_grad(loss))(params, dropout_keys())

  @parameterized.parameters(
    ('dots', False), ('full', False), ('none', True), ('full', True)
  )
  def test_remat_and_unroll(self, remat, unroll):
    if not hasattr(type(self), 'plain'):
      type(self).plain = self.loss_and_gradient(toys.model_config(**EVERYTHING))
    other = self.loss_and_gradient(
      toys.model_config(**EVERYTHING, remat=remat, unroll=unroll)
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5),
      self.plain,
      other,
    )

  def test_remat_and_unroll_start_from_the_same_parameters(self):
    plain = initial_params(toys.model_config(num_layers=2))
    other = initial_params(
      toys.model_config(num_layers=2, remat='full', unroll=True)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, other)

  @parameterized.parameters(1, 3)
  def test_positions_are_rows_of_the_full_output(self, num_layers):
    config = toys.model_config(**EVERYTHING, num_layers=num_layers)
    params = params_of(config)
    positions = np.array([0, 3, 17, 8, 8, 0])
    full = hidden_of(
      config, params, segment_ids=SEGMENTS, dropout_keys=dropout_keys()
    )
    picked = hidden_of(
      config,
      params,
      segment_ids=SEGMENTS,
      dropout_keys=dropout_keys(),
      positions=positions,
    )
    np.testing.assert_allclose(
      picked, np.asarray(full).reshape(-1, 16)[positions], atol=1e-5
    )


SHARED = dict(num_heads=4, num_kv_heads=2, head_size=6)
# All options of published architectures that are not defaults.
FOREIGN = dict(
  **SHARED,
  norm='layer',
  norm_bias=True,
  attention_bias='all',
  mlp_bias=True,
  num_positions=8,
  norm_eps=1e-5,
)


class OptionsTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(qk_norm=True),
    dict(qk_norm=True, causal=True),
    dict(qk_norm=True, block_size=2),
    dict(attention_sink=True, attention_cap=0.5, block_size=2),
  )
  def test_shared_keys_are_repeated_keys(self, **kind):
    # The same as plain attention on keys and values repeated for their queries.
    shared = toys.model_config(**SHARED, **kind)
    plain = toys.model_config(**{**SHARED, 'num_kv_heads': 0}, **kind)
    params, clean = (
      params_of(shared),
      TOKENS[::-1] if shared.block_size else None,
    )

    def widen(path, x):
      if path[-1].key in ('sink_key', 'sink_value'):
        return np.repeat(x, 2, axis=-2)
      if path[-2:] not in (
        [jax.tree_util.DictKey(name), jax.tree_util.DictKey('kernel')]
        for name in ('key', 'value')
      ):
        return x
      x = x.reshape(*x.shape[:-1], 2, 6)
      return np.repeat(x, 2, axis=-2).reshape(*x.shape[:-2], -1)

    wide = jax.tree_util.tree_map_with_path(
      lambda path, x: widen(list(path), x), params
    )
    self.assertEqual(params['last_layer']['key']['kernel'].shape, (16, 12))
    self.assertEqual(wide['last_layer']['key']['kernel'].shape, (16, 24))
    np.testing.assert_allclose(
      hidden_of(shared, params, TOKENS, None, clean=clean),
      hidden_of(plain, wide, TOKENS, None, clean=clean),
      atol=1e-5,
    )

  @parameterized.parameters({}, {'embedding_dim': 8, 'tie_embeddings': False})
  def test_soft_tokens(self, **options):
    config = toys.model_config(**options)
    params = params_of(config)
    rng = np.random.default_rng(0)
    ids = np.concatenate(
      [TOKENS[..., None], rng.integers(12, size=(*TOKENS.shape, 2))], axis=-1
    )
    # All the weight on the token: the token, bit for bit.
    weights = np.zeros(ids.shape, np.float32)
    weights[..., 0] = 1
    plain = hidden_of(config, params)
    soft = hidden_of(config, params, soft=SoftTokens(ids, weights))
    np.testing.assert_array_equal(soft, plain)
    # Mixtures, as tokens of a larger vocabulary whose rows are the mixtures.
    weights = rng.dirichlet(np.ones(3), TOKENS.shape).astype(np.float32)
    rows = np.einsum('blk,blkd->bld', weights, params['embedding'][ids])
    table = {**params, 'embedding': rows.reshape(-1, rows.shape[-1])}
    if 'output' in params:  # Not used here, but of the vocabulary's size.
      table['output'] = np.zeros((TOKENS.size, 16), np.float32)
    np.testing.assert_allclose(
      hidden_of(config, params, soft=SoftTokens(ids, weights)),
      hidden_of(
        dataclasses.replace(config, vocab_size=TOKENS.size),
        table,
        np.arange(TOKENS.size).reshape(TOKENS.shape),
      ),
      atol=1e-5,
    )

  def test_learned_positions_that_add_to_rotary_ones(self):
    rotary = toys.model_config()
    both = toys.model_config(num_positions=LENGTH, keep_rotary=True)
    params = params_of(both)
    table = params['position_embedding']
    others = {k: x for k, x in params.items() if k != 'position_embedding'}
    zero = {**others, 'position_embedding': jnp.zeros_like(table)}
    np.testing.assert_array_equal(
      hidden_of(both, zero, TOKENS, None),
      hidden_of(rotary, others, TOKENS, None),
    )
    # Rotary positions alone: equal tokens make equal places.
    masks = jnp.full_like(TOKENS, 3)
    spread = lambda hidden: float(jnp.ptp(hidden, axis=1).max())
    self.assertLess(spread(hidden_of(rotary, others, masks, None)), 1e-5)
    self.assertGreater(spread(hidden_of(both, params, masks, None)), 1e-3)

  def test_positions_that_are_learned(self):
    config = toys.model_config(num_positions=8)
    params = params_of(config)
    table = params['position_embedding']
    self.assertEqual(table.shape, (8, 16))
    # Adding a vector to all rows of the table equals adding it to the tokens.
    moved = {
      **params,
      'position_embedding': table + table[:1],
      'embedding': params['embedding'] - table[:1],
    }
    hidden = hidden_of(config, params)
    np.testing.assert_allclose(hidden_of(config, moved), hidden, atol=1e-5)
    # Nothing is rotated: with equal positions everywhere, order is ignored.
    same = {**params, 'position_embedding': np.tile(table[:1], (8, 1))}
    turned = hidden_of(config, same, tokens=TOKENS[:, ::-1].copy())
    np.testing.assert_allclose(
      turned[:, ::-1], hidden_of(config, same), atol=1e-5
    )
    self.assertGreater(np.abs(hidden - hidden_of(config, same)).max(), 0.01)

  def test_layer_norm_and_biases(self):
    x = np.random.default_rng(0).normal(2, 3, size=(5, 16)).astype(np.float32)
    scale, bias = np.linspace(1, 2, 16), np.linspace(-1, 1, 16)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(
      layers.normalize(x, scale, jnp.float32, 1e-2, True, bias),
      expected * scale + bias,
      atol=1e-5,
    )
    params = params_of(toys.model_config(**FOREIGN, mlp='swiglu'))
    shapes = {
      '/'.join(part.key for part in path): x.shape
      for path, x in jax.tree_util.tree_leaves_with_path(params['last_layer'])
      if path[-1].key == 'bias'
    }
    self.assertEqual(
      shapes,
      {
        'attention_norm/bias': (16,),
        'mlp_norm/bias': (16,),
        'query/bias': (24,),
        'key/bias': (12,),
        'value/bias': (12,),
        'attention_out/bias': (16,),
        'mlp_in/bias': (32,),
        'mlp_gate/bias': (32,),
        'mlp_out/bias': (16,),
      },
    )

  @parameterized.parameters(dict(), FOREIGN, SCORING)
  def test_a_cache_of_them(self, **options):
    config = toys.model_config(causal=True, **{**SHARED, **options})
    params = params_of(config)
    full = hidden_of(config, params, TOKENS, None)

    @jax.jit
    def by_cache(params):
      cache, hidden = TransformerNetwork(config).init_cache(BATCH, LENGTH), []
      self.assertEqual(cache.last[0].shape, (BATCH, LENGTH, 2, 6))
      for start, stop in ((0, 4), (4, 5), (5, 6)):
        part, cache = transformer.Transformer(config).apply(
          {'params': params},
          TOKENS[:, start:stop],
          None,
          start,
          cache,
          jnp.arange(LENGTH) < start,
          method='advance',
        )
        hidden.append(part)
      return jnp.concatenate(hidden, axis=1)

    np.testing.assert_allclose(full, by_cache(params), atol=1e-5)

  def test_shifted_outputs(self):
    plain, shifted = (
      toys.model_config(shift_outputs=shift) for shift in (False, True)
    )
    params = params_of(plain)
    hidden = np.asarray(hidden_of(plain, params))
    expected = np.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    np.testing.assert_allclose(hidden_of(shifted, params), expected, atol=1e-5)
    positions = np.array([0, 3, 17, 8, 6, 12])
    np.testing.assert_allclose(
      hidden_of(shifted, params, positions=positions),
      expected.reshape(-1, 16)[positions],
      atol=1e-5,
    )
    with self.assertRaisesRegex(InputError, '^model.shift_outputs=True'):
      transformer.Transformer(shifted).apply(
        {'params': params},
        TOKENS[:, :2],
        None,
        0,
        TransformerNetwork(shifted).init_cache(BATCH, LENGTH),
        np.zeros(LENGTH, bool),
        method='advance',
      )

  def test_opening_attention(self):
    keys, length = dropout_keys(4), 40
    seen = np.asarray(transformer.opening_mask(keys, 0.25, length))
    left = np.tri(length, dtype=bool)
    self.assertTrue(seen[:, left].all())
    right = seen[:, ~left]
    deviation = (0.25 * 0.75 / right[0].size) ** 0.5
    np.testing.assert_allclose(right.mean(1), 0.25, atol=4 * deviation)
    self.assertFalse(np.array_equal(seen[0], seen[1]))
    for share, expected in ((0.0, left), (1.0, np.ones_like(left))):
      seen = transformer.opening_mask(dropout_keys(4), share, length)
      np.testing.assert_array_equal(seen, np.tile(expected, (4, 1, 1)))
    # From the causal network to the bidirectional one, by intermediate ones.
    full, causal = toys.model_config(), toys.model_config(causal=True)
    params = params_of(full)
    opening = lambda share: hidden_of(
      full, params, seen=transformer.opening_mask(dropout_keys(), share, LENGTH)
    )
    np.testing.assert_allclose(
      opening(0.0), hidden_of(causal, params), atol=1e-5
    )
    np.testing.assert_allclose(opening(1.0), hidden_of(full, params), atol=1e-5)
    self.assertGreater(np.abs(opening(0.5) - opening(1.0)).max(), 1e-3)
    self.assertGreater(np.abs(opening(0.5) - opening(0.0)).max(), 1e-3)

  @parameterized.parameters(
    ('num_kv_heads', 3, 'must divide model.num_heads=2'),
    ('num_kv_heads', -1, 'must be >= 0'),
    ('head_size', -2, 'must be >= 0'),
    ('num_positions', -1, 'must be >= 0'),
    ('keep_rotary', True, 'num_positions=0'),
    ('conv_size', 4, 'must be odd'),
    ('conv_size', -3, 'must be odd'),
    ('norm', 'batch', 'is not one of'),
    ('norm_eps', 0.0, 'must be > 0'),
    ('norm_bias', True, "model.norm='rms'"),
    ('attention_bias', 'some', 'is not one of'),
    ('attention_cap', -1.0, 'must be >= 0'),
    ('joint_qk_norm', True, 'qk_norm=False'),
    ('start_token', 3, 'must be -1'),
    ('start_token', -2, 'must be -1'),
  )
  def test_errors(self, key, value, message):
    with self.assertRaisesRegex(
      InputError, f'^model.{key}={value!r}.*{message}'
    ):
      toys.model_config(**{key: value})

  def test_conflicting_settings(self):
    with self.assertRaisesRegex(InputError, '^model.shift_outputs=True'):
      toys.model_config(shift_outputs=True, causal=True)
    for changes in {'causal': True}, {'block_size': 2}:
      with self.assertRaisesRegex(InputError, '^model.conv_size=3 must be 0'):
        toys.model_config(conv_size=3, **changes)
    with self.assertRaisesRegex(InputError, 'model.head_size=5'):
      toys.model_config(head_size=5)
    toys.model_config(head_size=5, num_positions=8)  # Without rotation.
    for key, value in ('attention_cap', 1.0), ('attention_sink', True):
      with self.assertRaisesRegex(InputError, f"^model.{key}=.*'pallas'"):
        toys.model_config(**{key: value}, attention='pallas', platform='tpu')


class PartsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('gelu', lambda x: x * special.ndtr(x)),
    (
      'gelu_tanh',
      lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
      ),
    ),
    ('relu2', lambda x: np.maximum(x, 0) ** 2),
    ('geglu', lambda x: x * special.ndtr(x)),
    (
      'geglu_tanh',
      lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
      ),
    ),
    ('swiglu', lambda x: x * special.expit(x)),
    ('glu', special.expit),
  )
  def test_activations(self, mlp, reference):
    x = np.linspace(-4, 4, 101)
    np.testing.assert_allclose(
      MLPS[mlp](jnp.asarray(x, jnp.float32)), reference(x), atol=1e-5
    )
    slope = (reference(x + 1e-6) - reference(x - 1e-6)) / 2e-6
    gradient = jax.vmap(jax.grad(MLPS[mlp]))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(gradient, slope, atol=1e-4)

  def test_every_mlp_is_tested(self):
    self.assertEqual(
      set(MLPS),
      {'gelu', 'gelu_tanh', 'relu2', 'geglu', 'geglu_tanh', 'swiglu', 'glu'},
    )

  @parameterized.product(mlp=sorted(MLPS), tie_embeddings=(True, False))
  def test_every_mlp_and_its_size(self, mlp, tie_embeddings):
    config = toys.model_config(
      mlp=mlp, tie_embeddings=tie_embeddings, num_layers=2, mlp_dim=24
    )
    params = params_of(config)
    matrices = 3 if mlp in GATED else 2
    block = 4 * 16 * 16 + matrices * 16 * 24 + 2 * 16
    self.assertEqual(
      sum(leaf.size for leaf in jax.tree.leaves(params)),
      2 * block + 16 + (1 if tie_embeddings else 2) * 12 * 16,
    )
    hidden = hidden_of(config, params)
    self.assertEqual(hidden.shape, (BATCH, LENGTH, 16))
    self.assertTrue(np.isfinite(hidden).all())
    kernel = params['embedding' if tie_embeddings else 'output'].T
    logits = transformer.output_logits(
      transformer.output_kernel(params), hidden
    )
    np.testing.assert_allclose(logits, hidden @ kernel, atol=1e-4)
    # Training: 2 forward and 4 backward for each element of a matrix.
    self.assertEqual(
      TransformerNetwork(config).flops_per_token(0),
      6 * (2 * (block - 2 * 16) + 12 * 16),
    )

  def test_the_size_of_a_sink_and_of_norms_over_all_heads(self):
    plain, other = (
      toys.model_config(**SHARED),
      toys.model_config(**SHARED, **SCORING),
    )
    count = lambda config: sum(
      leaf.size for leaf in jax.tree.leaves(params_of(config))
    )
    # A key and a value for each of 2 heads of 6, and scales of 24 and 12.
    self.assertEqual(count(other) - count(plain), 3 * (2 * 2 * 6 + 24 + 12))
    # One more key for each query of 4 heads of 6.
    flops = lambda config: TransformerNetwork(config).flops_per_token(LENGTH)
    self.assertEqual(flops(other) - flops(plain), 12 * 3 * 24)

  @parameterized.product(mlp=sorted(MLPS), dtype=('float32', 'bfloat16'))
  def test_gradients_on_a_mesh(self, mlp, dtype):
    mesh = meshes.make_mesh(meshes.MeshConfig(2, 1, 1), jax.devices()[:2])
    slope = jax.vmap(jax.grad(MLPS[mlp]))
    x = jnp.linspace(-4, 4, 16)
    split = jax.shard_map(
      slope, mesh=mesh, in_specs=P('data'), out_specs=P('data')
    )
    found = np.float32(jax.jit(split)(x.astype(dtype)))
    step = 1e-3
    expected = (MLPS[mlp](x + step) - MLPS[mlp](x - step)) / (2 * step)
    atol = 2e-3 if dtype == 'float32' else 0.05
    np.testing.assert_allclose(found, expected, atol=atol)

  def test_an_autoregressive_clean_copy_is_projected_too(self):
    config = toys.model_config(block_size=2)
    both = dataclasses.replace(config, causal=True)
    flops = lambda config: TransformerNetwork(config).flops_per_token(0)
    self.assertEqual(flops(both) - flops(config), 6 * 12 * 16)

  @parameterized.parameters(
    ('relu2', 0, 64), ('swiglu', 0, 64), ('swiglu', 40, 40), ('gelu', 40, 40)
  )
  def test_mlp_width(self, mlp, mlp_dim, width):
    config = toys.model_config(mlp=mlp, mlp_dim=mlp_dim)
    self.assertEqual(config.mlp_width, width)

  @parameterized.parameters(True, False)
  def test_qk_norm_forgets_the_size_of_queries(self, qk_norm):
    config = toys.model_config(qk_norm=qk_norm, num_layers=1)
    params = params_of(config)
    block = params['last_layer']
    louder = {
      **params,
      'last_layer': {
        **block,
        'query': {'kernel': 8 * block['query']['kernel']},
      },
    }
    change = np.abs(hidden_of(config, params) - hidden_of(config, louder)).max()
    if qk_norm:
      self.assertLess(change, 1e-3)
    else:
      self.assertGreater(change, 1e-2)

  def test_time(self):
    config = toys.model_config(time_conditioning=True)
    start = initial_params(config)
    # adaLN-zero: initially each block adds nothing at any time.
    x = start['embedding'][TOKENS]
    x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.norm_eps)
    for t in (T, T[::-1]):
      np.testing.assert_allclose(
        hidden_of(config, start, t=t.copy()), x, atol=1e-5
      )
    # Later an example depends on its own time only.
    params = params_of(config)
    hidden = hidden_of(config, params)
    other = hidden_of(config, params, t=T + np.float32([0, 0.01, 0]))
    change = np.abs(hidden - other).max((1, 2))
    self.assertGreater(change[1], 1e-3)
    np.testing.assert_array_equal(change[[0, 2]], 0)

  def test_without_time_conditioning_time_is_not_read(self):
    config = toys.model_config()
    params = params_of(config)
    np.testing.assert_array_equal(
      hidden_of(config, params, t=T), hidden_of(config, params, t=T * np.nan)
    )

  def test_dropout(self):
    config = toys.model_config(dropout=0.3)
    params = params_of(config)
    off = hidden_of(config, params)
    on = hidden_of(config, params, dropout_keys=dropout_keys())
    again = hidden_of(config, params, dropout_keys=dropout_keys())
    np.testing.assert_array_equal(on, again)
    self.assertGreater(np.abs(on - off).max((1, 2)).min(), 1e-2)
    # A rate of 0 ignores keys, and a lack of keys is a rate of 0.
    none = toys.model_config(dropout=0.0)
    np.testing.assert_allclose(
      hidden_of(none, params, dropout_keys=dropout_keys()), off, atol=1e-6
    )
    # An example's mask depends on its key, not its row.
    same = np.repeat(TOKENS[:1], BATCH, axis=0)
    rows = hidden_of(config, params, tokens=same, dropout_keys=dropout_keys())
    turned = hidden_of(
      config, params, tokens=same, dropout_keys=dropout_keys()[::-1]
    )
    np.testing.assert_allclose(turned[::-1], rows, atol=1e-6)
    self.assertGreater(np.abs(rows[0] - rows[1]).max(), 1e-2)

  def test_dropout_mask(self):
    mask = np.asarray(layers.dropout_mask(dropout_keys(), 0.25, (50, 40)))
    self.assertEqual(mask.shape, (BATCH, 50, 40))
    np.testing.assert_allclose(np.unique(mask), [0, 4 / 3], rtol=1e-6)
    deviation = (1 / 3 / 2000) ** 0.5
    np.testing.assert_allclose(mask.mean((1, 2)), 1, atol=4 * deviation)

  def test_bfloat16(self):
    config = toys.model_config(dtype='bfloat16', **EVERYTHING)
    params = params_of(config)
    shapes = jax.eval_shape(lambda: initial_params(config))
    self.assertEqual(
      {x.dtype for x in jax.tree.leaves(shapes)}, {jnp.dtype('float32')}
    )
    hidden = hidden_of(config, params)
    self.assertEqual(hidden.dtype, jnp.bfloat16)
    logits = transformer.output_logits(
      transformer.output_kernel(params), hidden
    )
    self.assertEqual(logits.dtype, jnp.float32)
    exact = hidden_of(toys.model_config(**EVERYTHING), params)
    difference = np.asarray(hidden, np.float32) - exact
    self.assertLess(np.sqrt(np.mean(difference**2)), 0.1)

  def test_rotary_positions_are_relative(self):
    table = layers.rotary_table(jnp.arange(8), 4, 100.0)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 4))
    q, k = (
      layers.rotate(jnp.tile(jnp.asarray(x, jnp.float32), (1, 8, 1, 1)), table)
      for x in (q, k)
    )
    scores = np.einsum('bqhd,bkhd->qk', q, k)
    for offset in range(-7, 8):
      diagonal = np.diagonal(scores, offset)
      np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    self.assertGreater(np.ptp(scores[0]), 0.1)

  def test_linear_has_the_gradient_of_a_product(self):
    rng = np.random.default_rng(0)
    x, kernel, weight = (
      jnp.asarray(rng.normal(size=s), jnp.float32)
      for s in ((7, 4), (4, 5), (7, 5))
    )
    total = lambda x, kernel: jnp.sum(layers.linear(x, kernel) * weight)
    for ours, theirs in zip(
      jax.grad(total, (0, 1))(x, kernel), (weight @ kernel.T, x.T @ weight)
    ):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

  def test_initial_scale(self):
    params = initial_params(toys.model_config(embed_dim=64, vocab_size=256))
    np.testing.assert_allclose(np.std(params['embedding']), 0.02, rtol=0.05)
    out = params['layers']['attention_out']['kernel']
    np.testing.assert_allclose(np.std(out), 0.02 / 6**0.5, rtol=0.05)
    self.assertEqual(out.shape, (2, 64, 64))
    self.assertGreater(np.abs(out[0] - out[1]).max(), 0.01)

  @parameterized.parameters(
    ('num_layers', 0),
    ('embed_dim', 0),
    ('num_heads', 3),
    ('num_heads', 16),
    ('mlp_dim', -1),
    ('mlp', 'relu'),
    ('remat', 'all'),
    ('dtype', 'float8'),
    ('dropout', 1.0),
    ('rope_theta', 0.0),
    ('rope_factor', 0.0),
    ('rope_scaling', 'ntk'),
    ('rope_scaling', 'yarn'),
    ('rope_length', 100),
    ('attention', 'flash'),
    ('attention', 'cudnn'),
  )
  def test_errors(self, key, value):
    with self.assertRaisesRegex(InputError, f'^model.{key}={value!r}'):
      toys.model_config(**{key: value})


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters(
    (64, 'bfloat16', True),
    (64, 'bfloat16', False, attention.Scoring(cap=1.0)),
    (12, 'bfloat16', False),
    (136, 'bfloat16', False),
    (64, 'float32', False),
  )
  def test_a_gpu_takes_cudnn_where_it_can(
    self, head_dim, dtype, is_cudnn, scoring=attention.PLAIN
  ):
    q = jnp.zeros((1, 8, 2, head_dim), dtype)
    seen = []
    with mock.patch.object(
      jax.nn,
      'dot_product_attention',
      lambda q, *_, implementation, **__: seen.append(implementation) or q,
    ):
      attention.attention(
        q, q, q, causal=False, scoring=scoring, platform='gpu'
      )
    self.assertEqual(seen, ['cudnn'] * is_cudnn)

  @parameterized.product(causal=(False, True), segments=(False, True))
  def test_agrees_with_jax(self, causal, segments):
    q, k, v, weight = (
      jax.random.normal(key, (BATCH, LENGTH, 2, 4))
      for key in jax.random.split(jax.random.key(0), 4)
    )
    ids = SEGMENTS if segments else None
    mask = None
    if segments:
      mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None])[:, None]

    def ours(*args):
      out = attention.attention(*args, causal=causal, segment_ids=ids)
      return jnp.sum(out * weight)

    def theirs(*args):
      out = jax.nn.dot_product_attention(*args, mask=mask, is_causal=causal)
      return jnp.sum(out * weight)

    evaluate = lambda f: jax.value_and_grad(f, (0, 1, 2))(q, k, v)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      evaluate(ours),
      evaluate(theirs),
    )
