"""The Pallas kernels, run by the interpreter, against XLA's attention."""

import functools
import warnings

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.devices import mesh as meshes
from nanodlm.model import attention, layers, pallas_attention
from nanodlm.model.network import TransformerNetwork
from nanodlm.objectives import masked
from nanodlm.steps import train as steps
from nanodlm.steps.network import Scorer
from nanodlm.training import optim
from nanodlm.training import state as states
from nanodlm.types import Batch, InputError
from tests import toys

BATCH, LENGTH, HEADS = 2, 384, 4  # Three blocks of queries.
EPS = 1e-6
IDS = (np.arange(LENGTH)[None] >= np.array([[100], [250]])).astype(np.int32)


def draw(*shape):
  return jax.random.normal(jax.random.key(len(shape) + shape[-1]), shape)


def assert_same(ours, theirs, arrays, atol=3e-6):
  """Values and gradients of random sums agree."""
  weight = draw(*arrays[0].shape)
  results = []
  for f in (ours, theirs):
    out, pull = jax.jit(functools.partial(jax.vjp, f))(*arrays)
    results.append((out, jax.jit(pull)(weight.astype(out.dtype))))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=atol * float(jnp.abs(b).max())
    ),
    *results,
  )


class KernelTest(parameterized.TestCase):
  @parameterized.parameters(
    (False, False, 64), (True, False, 64), (False, True, 32), (True, True, 128)
  )
  def test_attention(self, causal, segments, head_dim):
    q, k, v = draw(3, BATCH, LENGTH, HEADS, head_dim)
    ids = jnp.asarray(IDS) if segments else None
    pattern = pallas_attention.Pattern('causal' if causal else 'all')
    assert_same(
      lambda q, k, v: pallas_attention.attention(
        q, k, v, pattern, ids, ids, interpret=True
      ),
      lambda q, k, v: attention.attention(
        q, k, v, causal=causal, segment_ids=ids, backend='xla'
      ),
      (q, k, v),
    )

  @parameterized.parameters(
    (16, False, True, False),
    (96, True, False, False),
    (1, False, False, True),
    (96, True, False, True),
  )
  def test_block_diffusion(self, block_size, segments, only_noisy, causal):
    q, k, v = draw(3, 2 * BATCH, LENGTH, 2, 64)
    if only_noisy:
      q = q[:BATCH]
    ids = jnp.concatenate([IDS, IDS]) if segments else None
    assert_same(
      lambda q, k, v: attention._block_kernel(
        q, k, v, block_size, ids, causal, interpret=True
      ),
      lambda q, k, v: attention.block_attention(
        q,
        k,
        v,
        block_size=block_size,
        causal=causal,
        segment_ids=ids,
        backend='xla',
      ),
      (q, k, v),
    )

  @parameterized.parameters((64, True), (128, True), (64, False))
  def test_rotate(self, head_dim, has_norm):
    length = 1536  # Three blocks.
    x = draw(BATCH, length, 2, head_dim)
    table = layers.rotary_table(jnp.arange(length), head_dim, 1e4)
    arrays = (x, 1 + 0.1 * draw(head_dim)) if has_norm else (x,)

    def theirs(x, scale=None):
      if scale is not None:
        x = layers.normalize(x, scale, x.dtype, EPS)
      return layers.rotate(x, table)

    assert_same(
      lambda x, scale=None: pallas_attention.rotate(x, scale, table, EPS, True),
      theirs,
      arrays,
      atol=1e-5,
    )

  @parameterized.parameters(
    (12, 64, 1024, 'bfloat16', True),
    (32, 128, 4096, 'bfloat16', True),
    (32, 128, 4096, 'float32', False),
    (3, 64, 1024, 'bfloat16', False),  # Half a block of heads.
    (8, 96, 1024, 'bfloat16', False),
    (12, 64, 1000, 'bfloat16', False),
    (12, 64, 8192, 'bfloat16', False),  # Too long for VMEM.
  )
  def test_sizes(self, num_heads, head_dim, length, dtype, fits):
    q = jax.ShapeDtypeStruct((1, length, num_heads, head_dim), jnp.dtype(dtype))
    self.assertEqual(pallas_attention.fits(q, length), fits)

  def test_unsupported_sizes_are_refused(self):
    with self.assertRaisesRegex(InputError, 'needs a TPU'):
      toys.model_config(attention='pallas')
    q = jax.ShapeDtypeStruct((1, 6, 2, 8), jnp.bfloat16)
    with self.assertRaisesRegex(InputError, '2 heads of 8 on 6 queries'):
      attention.check_sizes('pallas', q, 6)


class ForTpuTest(parameterized.TestCase):
  """Programs lowered for a TPU, on a machine without one."""

  def lowered(self, platform, sizes=(-1, 1, 1), **changes):
    config = toys.model_config(
      embed_dim=256,
      num_heads=4,
      qk_norm=True,
      dtype='bfloat16',
      platform=platform,
      **changes,
    )
    optimizer = optim.make_optimizer(
      optim.OptimConfig(
        'adamw', 1e-3, 'constant', 0, 0, 0, 0, 0.9, 0.99, 0.95, 0, 0
      ),
      1,
    )
    mesh = meshes.make_mesh(meshes.MeshConfig(*sizes))
    network = TransformerNetwork(config, meshes.shards(mesh))
    step = steps.make_train_step(
      Scorer(network, masked.Masked(11), 64),
      optimizer,
      lambda step: 1e-3,
      mesh,
      batch_size=16,
      num_microbatches=1,
      ema_decay=0,
    )
    state = jax.eval_shape(
      lambda: states.init_state(network, masked.Masked(11), optimizer, 0, False)
    )
    array = jax.ShapeDtypeStruct
    batch = Batch(
      tokens=array((16, 128), jnp.int32),
      eligible=array((16, 128), bool),
      weight=array((16,), jnp.float32),
      num_tokens=array((16,), jnp.int32),
      num_bytes=array((16,), jnp.int32),
    )
    with warnings.catch_warnings():
      # The donation of abstract arrays is not usable.
      warnings.simplefilter('ignore')
      traced = step.trace(state, batch)
      return traced.lower(lowering_platforms=('tpu',)).as_text()

  @parameterized.parameters((-1, 1, 1), (2, 2, 2))
  def test_kernels(self, *sizes):
    # Under shard_map's check of varying axes, as the gradients of the norms'
    # scales, the same for all heads, are summed over `tensor`. (The interpreter
    # cannot run under that check.)
    on_tpu = self.lowered('tpu', sizes)
    for kernel in (
      'attention_forward',
      'attention_backward',
      'rotate',
      'rotate_backward',
    ):
      self.assertIn(f'kernel_name = "{kernel}"', on_tpu)

  def test_no_kernels(self):
    self.assertNotIn('tpu_custom_call', self.lowered('cpu'))
    capped = self.lowered('tpu', attention_cap=1.0)
    self.assertNotIn('attention_forward', capped)
    self.assertIn('kernel_name = "rotate"', capped)
