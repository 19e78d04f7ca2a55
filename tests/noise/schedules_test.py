"""Tests of nanodlm.noise.schedules: their laws, and accuracy near t = 0."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.noise import schedules
from nanodlm.types import InputError

T = np.linspace(0, 1, 401).astype(np.float32)

# noise(t) by its textbook formula, in float64, where 1 - alpha is accurate.
REFERENCES = {
  'linear': lambda t: t,
  'cosine': lambda t: (
    1
    - (
      np.cos((t + 0.008) / 1.008 * np.pi / 2)
      / np.cos(0.008 / 1.008 * np.pi / 2)
    )
    ** 2
  ),
  'md4_cosine': lambda t: np.cos(np.pi / 2 * (1 - t)),
  'sqrt': np.sqrt,
  'polynomial': lambda t: t**3,
}
ROWS = [
  (name, schedules.make_schedule(name, power=3.0), reference)
  for name, reference in REFERENCES.items()
]


class SchedulesTest(parameterized.TestCase):
  def test_every_schedule_has_a_row(self):
    self.assertEqual(set(REFERENCES), set(schedules.SCHEDULES))

  @parameterized.named_parameters(ROWS)
  def test_end_points(self, schedule, reference):
    del reference
    np.testing.assert_allclose(
      schedule.noise(jnp.array([0.0, 1.0])), [0, 1], atol=1e-7
    )
    self.assertEqual(schedule.noise(jnp.array(0.0)), 0)
    np.testing.assert_allclose(
      schedule.inverse(jnp.array([0.0, 1.0])), [0, 1], atol=1e-6
    )

  @parameterized.named_parameters(ROWS)
  def test_noise_grows(self, schedule, reference):
    del reference
    noise = np.asarray(schedule.noise(T))
    self.assertEqual(noise.dtype, np.float32)
    self.assertGreater(np.diff(noise).min(), 0)
    self.assertLessEqual(np.max(schedules.dalpha(schedule, T[1:])), 1e-6)

  @parameterized.named_parameters(ROWS)
  def test_formula(self, schedule, reference):
    np.testing.assert_allclose(
      schedule.noise(T), reference(T.astype(np.float64)), atol=2e-7
    )

  @parameterized.named_parameters(ROWS)
  def test_is_accurate_near_zero(self, schedule, reference):
    # Relative to float64, since the bound divides by it.
    t = np.float32([1e-6, 1e-5, 1e-4, 1e-3])
    with jax.enable_x64():
      exact = np.asarray(schedule.noise(t.astype(np.float64)))
    np.testing.assert_allclose(schedule.noise(t), exact, rtol=2e-6)
    np.testing.assert_allclose(
      exact, reference(t.astype(np.float64)), rtol=1e-6
    )

  @parameterized.named_parameters(ROWS)
  def test_inverse(self, schedule, reference):
    del reference
    # Away from the end where md4_cosine and cosine are flat: in float32 many t
    # have the same noise there.
    t = T[T < 0.97]
    np.testing.assert_allclose(
      schedule.inverse(schedule.noise(t)), t, atol=2e-5
    )
    noise = T
    np.testing.assert_allclose(
      schedule.noise(schedule.inverse(noise)), noise, atol=2e-5
    )

  @parameterized.named_parameters(ROWS)
  def test_derivative(self, schedule, reference):
    t, step = T[2:-2].astype(np.float64), 1e-5
    slope = (reference(t + step) - reference(t - step)) / (2 * step)
    np.testing.assert_allclose(
      schedules.dalpha(schedule, t.astype(np.float32)),
      -slope,
      rtol=1e-3,
      atol=1e-6,
    )

  @parameterized.named_parameters(ROWS)
  def test_weight_is_finite_at_both_ends(self, schedule, reference):
    del reference
    t = jnp.array([2.0**-24, 2.0**-23, 1e-5, 1 - 2.0**-24, 1.0])
    weight = -schedules.dalpha(schedule, t) / schedule.noise(t)
    self.assertTrue(np.isfinite(weight).all())
    # Near 0 every noise is a power of t, and the weight its exponent over t.
    exponent = np.asarray(weight * t)[:2]
    np.testing.assert_allclose(exponent, exponent[0], rtol=1e-3)

  @parameterized.parameters(
    ('linaer', 2.0, 'objective.schedule=.linaer. is not one of'),
    ('polynomial', 0.4, 'objective.power=0.4 must be >= 0.5'),
    ('polynomial', float('nan'), 'objective.power=nan'),
  )
  def test_errors(self, name, power, message):
    with self.assertRaisesRegex(InputError, message):
      schedules.make_schedule(name, power)
