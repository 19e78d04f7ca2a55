# ruff: noqa: E501
"""Tests that the costs of compiled programs agree with what they do."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from nanodlm.devices import mesh as meshes
from nanodlm.perf import hlo

# In the form of the TPU compiler: no annotation of trip counts, a batched product
# as a convolution, cycles of fusions, a kernel, collectives, a conditional.
TPU = """HloModule jit_f, is_scheduled=true

%fused (p: bf16[8,12,64], q: bf16[8,12,64]) -> f32[8,12,12] {
  %p = bf16[8,12,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[8,12,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = f32[8,12,12]{2,1,0:T(8,128)} convolution(%p, %q), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
}

%cheap (c: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} parameter(0)
}

%dear (d: f32[8]) -> f32[8] {
  %d = f32[8]{0} parameter(0)
  ROOT %f.9 = f32[8]{0} fusion(%d), kind=kLoop, calls=%cheap, backend_config={"window_config":{"estimated_cycles":"1000"}}
}

%body (b: (s32[], f32[8,12,12])) -> (s32[], f32[8,12,12]) {
  %b = (s32[]{:T(128)}, f32[8,12,12]{2,1,0:T(8,128)S(1)}) parameter(0)
  %x = bf16[8,12,64]{2,1,0} constant(0)
  %f.1 = f32[8,12,12]{2,1,0} fusion(%x, %x), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/dot"}, backend_config={"window_config":{"kernel_window_bounds":[],"estimated_cycles":"70"}}
  %k = f32[8,12,12]{2,1,0} custom-call(%f.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/mine"}, backend_config={"custom_call_config":{"body":"AA==","cost_estimate":{"flops":"500","transcendentals":"0","bytes_accessed":"40"}}}
  %s = (f32[8,12,12]{2,1,0}, f32[16,12,12]{2,1,0}) all-gather-start(%k), replica_groups={{0,1}}, dimensions={0}
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  ROOT %t = (s32[]{:T(128)}, f32[8,12,12]{2,1,0}) tuple(%i, %k)
}

%cond (c.1: (s32[], f32[8,12,12])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11), metadata={op_name="jit(f)"}
  %c.1 = (s32[]{:T(128)}, /*index=1*/f32[8,12,12]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %start = s32[]{:T(128)} constant(1)
  %start.1 = s32[]{:T(128)} copy(%start)
  %y = f32[8,12,12]{2,1,0} constant(0)
  %t.1 = (s32[]{:T(128)}, f32[8,12,12]{2,1,0}) tuple(%start.1, %y)
  %w = (s32[]{:T(128)}, f32[8,12,12]{2,1,0}) while(%t.1), condition=%cond, body=%body
  %n = s32[] constant(0)
  ROOT %r = f32[8]{0} conditional(%n, %a, %a), branch_computations={%dear, %cheap}
}
"""


def cost_of(f, *args):
  return hlo.cost(hlo.parse(jax.jit(f).lower(*args).compile().as_text()))


class TpuTextTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.module = hlo.parse(TPU)
    self.cost = hlo.cost(self.module)

  def test_loop_runs_from_one_to_eleven(self):
    self.assertEqual(hlo.trip_count(self.module, self.module.by_name['w']), 10)

  def test_cycles(self):
    self.assertEqual(self.cost.cycles, 10 * 70 + 1000)

  def test_flops_of_a_batched_product_and_a_kernel(self):
    self.assertEqual(self.cost.flops, 10 * (2 * 8 * 12 * 12 * 64 + 500))

  def test_kernels(self):
    self.assertEqual(self.cost.kernels, {hlo.Kernel(500, 40): 10})

  def test_collectives(self):
    size = 16 * 12 * 12 * 4
    expected = {'all-gather': {'count': 10, 'bytes': 10 * size}}
    self.assertEqual(self.cost.collectives, expected)

  def test_loop_without_a_known_end(self):
    text = TPU.replace('constant(11)', 'copy(%limit.1)').replace(
      '  %limit = ', '  %limit.1 = s32[] constant(11)\n  %limit = '
    )
    cost = hlo.cost(hlo.parse(text))
    self.assertEqual((cost.num_unknown_loops, cost.cycles), (1, 1070))


class CompiledHereTest(parameterized.TestCase):
  def test_scan_of_products(self):
    def f(x, kernels):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    cost = cost_of(
      f, np.ones((32, 48), np.float32), np.ones((5, 48, 48), np.float32)
    )
    self.assertEqual(cost.flops, 5 * 2 * 32 * 48 * 48)
    self.assertEqual(cost.cycles, 0)  # The CPU compiler gives no estimates.

  def test_batched_product_and_convolution(self):
    x = np.ones((3, 32, 48), np.float32)
    flops = cost_of(lambda x: jnp.einsum('bij,bkj->bik', x, x), x).flops
    self.assertEqual(flops, 2 * 3 * 32 * 32 * 48)
    # With 'SAME', one of three taps meets padding at each of the two ends.
    conv = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(1,),
      padding='SAME',
      dimension_numbers=('NHC', 'HIO', 'NHC'),
    )
    flops = cost_of(conv, x, np.ones((3, 48, 64), np.float32)).flops
    self.assertEqual(flops, 2 * 3 * 48 * 64 * (32 * 3 - 2))

  def test_collectives_in_a_loop(self):
    mesh = meshes.make_mesh(meshes.MeshConfig(-1, 1, 1))

    def f(x):
      def body(x, _):
        total = jax.lax.psum(x, 'data')
        return x + jax.lax.pcast(total, 'data', to='varying'), None

      x = jax.lax.scan(body, x, None, 7)[0]
      return jax.lax.all_gather(x, 'data')

    f = jax.shard_map(f, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
    cost = cost_of(f, np.ones((16, 100), np.float32))
    size = 2 * 100 * 4
    expected = {
      'all-reduce': {'count': 7, 'bytes': 7 * size},
      'all-gather': {'count': 1, 'bytes': 8 * size},
    }
    self.assertEqual(cost.collectives, expected)

  def test_collectives_of_one_device_do_not_count(self):
    for sizes in ((1, 8, 1), (8, 1, 1)):
      mesh = meshes.make_mesh(meshes.MeshConfig(*sizes))
      f = jax.shard_map(
        lambda x: jax.lax.psum(x, 'data'),
        mesh=mesh,
        in_specs=P('data'),
        out_specs=P(),
      )
      collectives = cost_of(f, np.ones((16, 100), np.float32)).collectives
      self.assertEqual(
        list(collectives), ['all-reduce'] if sizes[0] > 1 else []
      )

  @parameterized.parameters(
    ('{{0}}', 1),
    ('{{0},{1}}', 1),
    ('{{0,1},{2,3}}', 2),
    ('[4,1]<=[4]', 1),
    ('[2,4]<=[8]', 4),
    ('{}', None),
    ("mesh['a'=1,'b'=8] {'a'}", 1),
    ("mesh['a'=2,'b'=3,'c'=4] {'a','c'}", 8),
    ("mesh['a'=2,'b'=8] {'a','b':(1)4}", 8),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4),
  )
  def test_size_of_a_group(self, groups, size):
    (line,) = hlo.parse(
      'ENTRY %main {\n  ROOT %r = f32[] all-reduce(%x), channel_id=1, '
      f'replica_groups={groups}, to_apply=%add\n}}'
    ).computations['main']
    self.assertEqual(hlo.group_size(line), size)
