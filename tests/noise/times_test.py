"""Tests of nanodlm.noise.times: uniform levels, stratified together."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from nanodlm.noise import times
from nanodlm.types import InputError


def batches(sample, num, size):
  keys = jax.random.split(jax.random.key(0), num)
  return np.asarray(jax.jit(jax.vmap(lambda key: sample(key, size)))(keys))


class TimesTest(parameterized.TestCase):
  @parameterized.named_parameters(times.SAMPLE_LEVELS.items())
  def test_each_is_uniform(self, sample):
    u = batches(sample, 2000, 6)
    self.assertEqual(u.dtype, np.float32)
    self.assertGreaterEqual(u.min(), 0)
    self.assertLess(u.max(), 1)
    for row in range(6):  # At any place in the batch.
      self.assertGreater(stats.kstest(u[:, row], 'uniform').pvalue, 1e-3)

  @parameterized.parameters(1, 2, 7, 64)
  def test_one_in_each_stratum(self, size):
    u = batches(times.sample_stratified, 50, size)
    strata = np.sort(np.floor(u.astype(np.float64) * size), axis=1)
    np.testing.assert_array_equal(strata, np.tile(np.arange(size), (50, 1)))

  def test_jitters_are_independent(self):
    u = batches(times.sample_stratified, 4000, 2)
    jitter = u * 2 % 1
    self.assertLess(abs(np.corrcoef(jitter.T)[0, 1]), 4 / 4000**0.5)

  def test_pairs_share_and_are_stratified(self):
    u = batches(times.SAMPLE_LEVELS['count'], 50, 12)
    np.testing.assert_array_equal(u[:, ::2], u[:, 1::2])
    strata = np.sort(np.floor(u[:, ::2] * 6), axis=1)
    np.testing.assert_array_equal(strata, np.tile(np.arange(6), (50, 1)))


class GridTest(parameterized.TestCase):
  @parameterized.product(grid=times.GRIDS, num_steps=(1, 2, 7, 1000))
  def test_runs_from_one_to_zero(self, grid, num_steps):
    t = np.asarray(times.reverse_grid(num_steps, grid))
    self.assertEqual((t.size, t[0], t[-1]), (num_steps + 1, 1.0, 0.0))
    self.assertLess(np.max(np.diff(t)), 0)

  @parameterized.parameters('1,0.7,0.4,0.1,0', '1.0, .7,4e-1, .1, 0.0')
  def test_listed_times_are_used(self, grid):
    times.check_grid(0, grid)  # The list fixes the number of steps.
    np.testing.assert_array_equal(
      times.reverse_grid(128, grid), np.float32([1, 0.7, 0.4, 0.1, 0])
    )

  @parameterized.parameters(
    '',
    '1',
    '0',
    '1;0',
    '1,x,0',
    '1,,0',
    '1,0,',
    '1,nan,0',
    '1,inf,0',
    '1,-inf,0',
    '0.9,0',
    '1,0.1',
    '1,0.5,0.5,0',
    '1,0.3,0.5,0',
    '1,1,0',
    '1,0,0',
    '1,-0.1,0',
    '2,1,0',
    '0,0.5,1',
    '1,0.50000001,0.5,0',
  )
  def test_invalid_lists_of_times(self, grid):
    with self.assertRaisesRegex(
      InputError, f'^sampler.grid={grid!r} is not one of .* falls from 1 to 0'
    ):
      times.check_grid(4, grid)

  @parameterized.parameters(
    (0, 'uniform', 'sampler.num_steps=0'), (4, 'log', "sampler.grid='log'")
  )
  def test_errors(self, num_steps, grid, message):
    with self.assertRaisesRegex(InputError, message):
      times.check_grid(num_steps, grid)

  def test_smoothstep_keeps_its_digits_at_both_ends(self):
    u = np.concatenate([np.logspace(-7, -1, 50), 1 - 2.0 ** -np.arange(4, 24)])
    u = u.astype(np.float32)
    t, rest = times.smoothstep(jnp.asarray(u))
    v = 1 - u.astype(np.float64)
    np.testing.assert_allclose(t, (1 - v) ** 2 * (1 + 2 * v), rtol=1e-6)
    np.testing.assert_allclose(rest, v**2 * (3 - 2 * v), rtol=1e-6)
    np.testing.assert_allclose(t + rest, 1, rtol=1e-6)
