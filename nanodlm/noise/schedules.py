"""Noise schedules: the probability alpha(t) that a token is kept at time t.

A schedule is defined by its noise probability m(t) = 1 - alpha(t), because the
masked bound needs m near t = 0, where 1 - alpha loses every digit in float32.
Derivatives come from jax.jvp. The end points are exact: m(0) = 0 and m(1) = 1.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from nanodlm.types import InputError


class Schedule(Protocol):
  """alpha(t), a decreasing function from alpha(0) = 1 to alpha(1) = 0."""

  def noise(self, t: jax.Array) -> jax.Array:
    """Returns m(t) = 1 - alpha(t), any shape, float32 in [0, 1]."""
    ...

  def inverse(self, noise: jax.Array) -> jax.Array:
    """Returns the time t at which noise(t) is the given value in [0, 1]."""
    ...


@dataclasses.dataclass(frozen=True)
class Linear:
  """alpha(t) = 1 - t, the "log-linear" schedule of SEDD and MDLM."""

  def noise(self, t):
    return t

  def inverse(self, noise):
    return noise


@dataclasses.dataclass(frozen=True)
class Cosine:
  """alpha(t) = f(t) / f(0), f(t) = cos^2(((t + offset) / (1 + offset)) pi/2).

  Source: Nichol and Dhariwal, arXiv 2102.09672, equation 17. Without the
  division by f(0), 0.016% of the tokens would be masked at t = 0, and the bound
  would need a reconstruction term.

  Attributes:
    offset: the paper's s, >= 0.
  """

  offset: float = 0.008

  def _angle(self, t):
    return (t + self.offset) / (1 + self.offset) * (jnp.pi / 2)

  def noise(self, t):
    # cos^2(a) - cos^2(b) = sin(b + a) sin(b - a): no cancellation near t = 0.
    start = self._angle(0.0)
    step = t / (1 + self.offset) * (jnp.pi / 2)
    return jnp.sin(2 * start + step) * jnp.sin(step) / jnp.cos(start) ** 2

  def inverse(self, noise):
    start = self._angle(0.0)
    alpha = jnp.clip(1 - noise, 0, 1)
    angle = jnp.arccos(jnp.sqrt(alpha) * jnp.cos(start))
    return jnp.clip((angle - start) / (jnp.pi / 2) * (1 + self.offset), 0, 1)


@dataclasses.dataclass(frozen=True)
class MD4Cosine:
  """alpha(t) = 1 - cos((1 - t) pi/2). Source: MD4, arXiv 2406.04329."""

  def noise(self, t):
    return jnp.sin(t * (jnp.pi / 2))

  def inverse(self, noise):
    return jnp.arcsin(jnp.clip(noise, 0, 1)) * (2 / jnp.pi)


@dataclasses.dataclass(frozen=True)
class Polynomial:
  """alpha(t) = 1 - t^power, power >= 1/2; power 1 is Linear.

  With less, float32 lacks times at which few tokens are noisy.
  """

  power: float = 2.0

  def noise(self, t):
    return t**self.power

  def inverse(self, noise):
    return noise ** (1 / self.power)


@dataclasses.dataclass(frozen=True)
class Sqrt:
  """alpha(t) = 1 - sqrt(t)."""

  power = 0.5  # Not a field: nobody chooses it.
  noise = Polynomial.noise
  inverse = Polynomial.inverse


SCHEDULES = {
  'linear': lambda power: Linear(),
  'cosine': lambda power: Cosine(),
  'md4_cosine': lambda power: MD4Cosine(),
  'sqrt': lambda power: Sqrt(),
  'polynomial': Polynomial,
}


def make_schedule(
  name: str, power: float = 2.0, section: str = 'objective'
) -> Schedule:
  """Makes a schedule by name.

  Args:
    name: a key of SCHEDULES.
    power: exponent of 'polynomial', >= 1/2.
    section: section of the config, for error messages.

  Raises:
    InputError: the name is unknown or the power is too small.
  """
  if name not in SCHEDULES:
    raise InputError(
      f'{section}.schedule={name!r} is not one of {sorted(SCHEDULES)}'
    )
  if not power >= 0.5:
    raise InputError(f'{section}.power={power!r} must be >= 0.5')
  return SCHEDULES[name](power)


def dalpha(schedule: Schedule, t: jax.Array) -> jax.Array:
  """Returns the time derivative of alpha, <= 0, any shape."""
  t = jnp.asarray(t)
  return -jax.jvp(schedule.noise, (t,), (jnp.ones_like(t),))[1]


def noise_levels(schedule: Schedule, t: jax.Array) -> jax.Array:
  """Returns m at t_0 .. t_T, [T + 1], from exactly 1 to exactly 0."""
  return schedule.noise(t).at[0].set(1.0).at[-1].set(0.0)
