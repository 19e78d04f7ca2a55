"""Tests of nanodlm.objectives.distill by enumeration of trajectories."""

import collections
import dataclasses
import functools
import itertools
from typing import Any

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import integrate, stats

from nanodlm import objectives
from nanodlm.devices import mesh as meshes
from nanodlm.devices.sharding import UNSPLIT
from nanodlm.noise import schedules, times
from nanodlm.objectives.block import Block
from nanodlm.objectives.genmd4 import GenMD4
from nanodlm.objectives.masked import Masked
from nanodlm.objectives.mixture import Hybrid
from nanodlm.objectives.uniform import Uniform
from nanodlm.steps import train as train_steps
from nanodlm.steps.network import Scorer
from nanodlm.training import state as states
from nanodlm.types import Batch, Hidden, Network
from tests import toys
from tests.toys import LENGTH, MASK, TEXTS, VOCAB

DCD, SDTT = (objectives.DISTILLATIONS[name] for name in ('dcd', 'sdtt'))
BASES = {
  'masked': Masked(MASK),
  'cosine': Masked(MASK, schedules.Cosine(), noise='stratified'),
  'block': Block(MASK, block_size=3),
  'block_ar': Block(MASK, block_size=3, ar_weight=0.5),
  'genmd4': GenMD4(MASK, rates=(0.6, 1.0, 2.5)),
  'uniform': Uniform(MASK),
  'hybrid': Hybrid(MASK, p_uniform=0.3),
}


def hybrid_law(t):
  c = 2 * 0.3 / 0.7 * (t * (1 - t)) ** 0.5
  return toys.mixture_law((1 - t) / (1 + c), t / (1 + c), c / (1 + c))


def cosine_noise(t):
  f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  return 1 - f(t) / f(0)


# q_t(z | x0), [x0, z].
LAWS = {
  'masked': lambda t: toys.token_law([t] * VOCAB),
  'cosine': lambda t: toys.token_law([cosine_noise(t)] * VOCAB),
  'block': lambda t: toys.token_law([t] * VOCAB),
  'block_ar': lambda t: toys.token_law([t] * VOCAB),
  'genmd4': lambda t: toys.token_law(t ** np.array([0.6, 1.0, 2.5])),
  'uniform': lambda t: toys.mixture_law(1 - t, 0.0, t),
  'hybrid': hybrid_law,
}


@dataclasses.dataclass(frozen=True)
class Table(Network):
  """Looks up the logits of a canvas: params['table'] [64, L, V + 1]."""

  vocab_size: int = VOCAB + 1
  shards: object = UNSPLIT

  @classmethod
  def make(cls, section, **_):
    raise NotImplementedError

  def init_params(self, key):
    return {'table': jnp.zeros((64, LENGTH, VOCAB + 1))}

  def hidden(self, params, tokens, t, *, clean=None, positions=None, **_):
    states = params['table'][toys.canvas_index(tokens)]
    if clean is not None and positions is not None:
      of_clean = params['table'][toys.canvas_index(clean)]
      states = jnp.concatenate([states, of_clean])
    if positions is not None:
      states = states.reshape(-1, VOCAB + 1)[positions]
    return Hidden(states)

  def kernel(self, params):
    # It varies over devices as parameters do.
    return jnp.eye(VOCAB + 1) + 0 * params['table'][0, :1]

  def logits(self, kernel, states):
    return states @ kernel

  def flops_per_token(self, length):
    return 0.0


def batch_of(x0):
  num = np.full(len(x0), LENGTH, np.int32)
  ones = np.ones(len(x0), np.float32)
  return Batch(x0, np.ones(x0.shape, bool), ones, num, num)


@functools.partial(jax.jit, static_argnums=0)
def row_losses(objective, student, teacher, batch, levels):
  """The loss of each row, [B], by the tables of student and teacher."""
  scorer = Scorer(Table(), objective, chunk_size=1000)
  params = {'table': student, 'objective': objective.init_params()}
  score = scorer.scoring(params, {'table': teacher})
  keys = jax.random.split(jax.random.key(0), len(levels))
  return objective.loss(batch, levels, keys, score).rows.loss


def kl(objective, student, teacher):
  """The divergence of log-probabilities [..., V], by its definition."""
  p, q = student, toys.log_softmax(teacher / objective.teacher_temperature)
  if objective.divergence == 'fwd':
    p, q = q, p
  return np.sum(np.exp(p) * (p - q), axis=-1)


def masks(shares):
  """All sequences of nested masks, [L] each, and their probabilities.

  Args:
    shares: of masked tokens, falling.
  """
  num = len(shares)
  # How many of the times each token is masked at.
  p_last = -np.diff([1.0, *shares, 0.0])
  for last in itertools.product(range(num + 1), repeat=LENGTH):
    yield [np.array(last) > i for i in range(num)], np.prod(p_last[list(last)])


def dcd_loss(objective, student, teacher, x0, shares):
  """The expected loss of masked noise at these shares of masks."""
  total = 0.0
  for (zt, zs), p in masks(shares):
    rows = [toys.canvas_index(np.where(z, MASK, x0)) for z in (zt, zs)]
    ours = toys.log_softmax(student[rows[0]])
    total += p * np.sum(kl(objective, ours, teacher[rows[1]]) * zs)
  return total


def uniform_pairs(noise_t, noise_s):
  """P(zt, zs | x0) in DCD's trajectories, [x0, zt, zs]."""
  q_t, q_s = (n * (VOCAB - 1) / VOCAB for n in (noise_t, noise_s))
  law = np.zeros((VOCAB, VOCAB, VOCAB))
  for x0, v in itertools.product(range(VOCAB), repeat=2):
    if v == x0:
      law[x0, x0, x0] = 1 - q_t
    else:
      law[x0, v, v] = q_s / (VOCAB - 1)
      law[x0, v, x0] = (q_t - q_s) / (VOCAB - 1)
  return law


def uniform_loss(objective, student, teacher, x0, noise):
  total, pairs = 0.0, uniform_pairs(*noise)
  for zt, zs in itertools.product(TEXTS, TEXTS):
    p = np.prod(pairs[x0, zt, zs])
    ours = toys.log_softmax(student[toys.canvas_index(zt)])
    theirs = teacher[toys.canvas_index(zs)]
    total += p * np.sum(kl(objective, ours, theirs))
  return total


def teacher_steps(objective, teacher, x0, shares):
  """Yields zt's row and masks, the targets [L, V + 1] and the probability."""
  temper = lambda row: toys.log_softmax(
    teacher[row] / objective.teacher_temperature
  )
  for (first, second), p in masks(shares):
    row = toys.canvas_index(np.where(first, MASK, x0))
    shown = np.flatnonzero(first & ~second)
    for tokens in itertools.product(range(VOCAB), repeat=len(shown)):
      z = np.where(first, MASK, x0)
      z[shown] = tokens
      p_drawn = np.exp(np.sum(temper(row)[shown, list(tokens)]))
      after = teacher[toys.canvas_index(z)]
      targets = np.where(second[:, None], after, teacher[row])
      yield row, first, targets, p * p_drawn


def sdtt_loss(objective, student, teacher, x0, shares):
  return sum(
    p * np.sum(kl(objective, toys.log_softmax(student[row]), targets) * masked)
    for row, masked, targets, p in teacher_steps(objective, teacher, x0, shares)
  )


class LossTest(parameterized.TestCase):
  @parameterized.product(
    name=('dcd', 'sdtt', 'uniform'),
    settings=({'divergence': 'fwd'}, {'teacher_temperature': 0.2}),
  )
  def test_expected_value(self, name, settings):
    base = Uniform(MASK) if name == 'uniform' else Masked(MASK)
    cls = SDTT if name == 'sdtt' else DCD
    objective = cls(base, num_steps=4, round=1, **settings)
    x0, num = np.array([2, 0, 1], np.int32), 40_000
    student, teacher = toys.random_table(0), toys.random_table(1)
    t = 0.9  # h = 1/2 in the second round, so that u = 0.4.
    shares = (t, t - 0.25) if name == 'sdtt' else (t, t - 0.5)
    of = {'dcd': dcd_loss, 'sdtt': sdtt_loss, 'uniform': uniform_loss}[name]
    expected = of(objective, student, teacher, x0, shares)
    losses = row_losses(
      objective,
      student,
      teacher,
      batch_of(np.tile(x0, (num, 1))),
      jnp.full(num, 1 - 0.4),
    )
    error = np.std(losses) / num**0.5
    self.assertLess(abs(np.mean(losses) - expected), 4 * error)
    self.assertLess(error, 0.02 * expected)

  @parameterized.product(name=(*BASES,), method=('dcd', 'sdtt'))
  def test_a_student_that_equals_its_teacher(self, name, method):
    cls, base, table = (
      objectives.DISTILLATIONS[method],
      BASES[name],
      toys.random_table(2),
    )
    if not cls.fits(base):
      self.assertEqual(method, 'sdtt')
      self.assertIn(name, ('uniform', 'hybrid', 'genmd4'))
      return
    x0 = batch_of(TEXTS)
    levels = times.sample_stratified(jax.random.key(3), len(TEXTS))
    losses = functools.partial(
      row_losses, student=table, batch=x0, levels=levels
    )
    # Steps of length 0, and another teacher.
    at_once: Any = np.inf
    same = losses(cls(base, num_steps=at_once), teacher=table)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    other = losses(cls(base, num_steps=at_once), teacher=toys.random_table(3))
    self.assertGreater(np.mean(other), 0.1)
    # Without noisy tokens there is nothing to learn.
    clean = x0._replace(eligible=np.zeros_like(x0.eligible))
    nothing = losses(cls(base), teacher=toys.random_table(3), batch=clean)
    np.testing.assert_array_equal(nothing, 0)

  @parameterized.product(
    method=('dcd', 'sdtt'),
    settings=({'divergence': 'fwd'}, {'teacher_temperature': 0.2}),
  )
  def test_a_clean_copy_that_is_autoregressive(self, method, settings):
    student, teacher = toys.random_table(2), toys.random_table(3)
    levels = times.sample_stratified(jax.random.key(3), len(TEXTS))
    without, both = (
      objectives.DISTILLATIONS[method](BASES[base], num_steps=4, **settings)
      for base in ('block', 'block_ar')
    )
    batch = batch_of(TEXTS)
    losses = lambda objective: row_losses(
      objective, student, teacher, batch, levels
    )
    before = toys.canvas_index(
      np.pad(TEXTS[:, :-1], ((0, 0), (1, 0)), constant_values=MASK)
    )
    ours = toys.log_softmax(student[before])
    expected = np.sum(kl(both, ours, teacher[before]), axis=1)
    self.assertGreater(np.min(expected), 0.1)
    added = losses(both) - losses(without)
    np.testing.assert_allclose(added, 0.5 * expected, rtol=1e-4, atol=1e-5)

  def test_an_exact_teacher_is_the_optimum_of_forward_sdtt(self):
    # Its predictions are a martingale, up to what drawing tokens in parallel
    # changes, which is of second order in the step.
    joint = toys.random_joint(0)
    teacher = toys.posterior_table(joint)
    objective, errors = SDTT(Masked(MASK), divergence='fwd'), []
    for step in (0.2, 0.1, 0.05):
      mean, mass = np.zeros((64, LENGTH, VOCAB)), np.zeros((64, 1, 1))
      for x0, p_x0 in zip(TEXTS, joint):
        for row, _, targets, p in teacher_steps(
          objective, teacher, x0, (0.7, 0.7 - step)
        ):
          mean[row] += p_x0 * p * np.exp(toys.log_softmax(targets))
          mass[row] += p_x0 * p
      is_masked = (toys.CANVASES == MASK)[..., None]
      error = mean / mass - np.exp(toys.log_softmax(teacher))
      errors.append(np.max(np.abs(error * is_masked)))
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(ratios, 4, rtol=0.2)


class TrajectoryTest(parameterized.TestCase):
  @parameterized.parameters(*BASES)
  def test_both_times_have_the_law_of_the_noise(self, name):
    base, num = BASES[name], 20_000
    objective = DCD(base, num_steps=4)
    x0 = np.tile(np.array([[2, 0, 1]], np.int32), (num, 1))
    eligible = np.ones(x0.shape, bool)
    eligible[:, 2] = False
    t, s = times = np.array(objective.trajectory(jnp.full(num, 0.4), 1))
    np.testing.assert_allclose([t[0], s[0]], [0.85, 0.6], rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), num)
    zt, zs = np.array(jax.jit(objective.noise)(keys, times, x0, eligible))
    for z, u in ((zt, t[0]), (zs, s[0])):
      law = LAWS[name](float(u))
      for i in range(2):
        counts = np.bincount(z[:, i], minlength=VOCAB + 1)
        self.assertGreater(toys.chi_square(counts, law[x0[0, i]]), 1e-3)
    # What is noisy earlier is noisy later, in the same way for one kind of
    # noise; the prompt stays.
    is_noisy = zs != x0
    self.assertTrue(np.all((zt != x0)[is_noisy]))
    if name != 'hybrid':
      np.testing.assert_array_equal(zt[is_noisy], zs[is_noisy])
    np.testing.assert_array_equal(zt[:, 2], x0[:, 2])

  def test_uniform_noise_has_the_joint_law_of_gaussian_trajectories(self):
    # DCD's tokens are the argmax of mu [v = x0] + eps_v, mu = a / s at t.
    num, x0, (mu_t, mu_s) = 100_000, 1, (0.8, 1.9)

    def noise(mu):
      kept = lambda v: stats.norm.pdf(v - mu) * stats.norm.cdf(v) ** (VOCAB - 1)
      p = integrate.quad(kept, -10, 10)[0]
      return 1 - (VOCAB * p - 1) / (VOCAB - 1)

    law = uniform_pairs(noise(mu_t), noise(mu_s))[x0]
    eps = np.random.default_rng(0).normal(size=(num, VOCAB))
    gaussian = [
      np.argmax(mu * np.eye(VOCAB)[x0] + eps, 1) for mu in (mu_t, mu_s)
    ]
    times = np.tile([[noise(mu_t)], [noise(mu_s)]], (1, num))
    keys = jax.random.split(jax.random.key(1), num)
    clean = np.full((num, 1), x0, np.int32)
    ours = jax.jit(DCD(Uniform(MASK)).noise)(
      keys, times, clean, np.ones((num, 1), bool)
    )
    for zt, zs in (gaussian, np.array(ours)[..., 0]):
      counts = np.bincount(zt * VOCAB + zs, minlength=VOCAB**2)
      self.assertGreater(toys.chi_square(counts, law), 1e-3)

  def test_steps_grow_with_the_rounds_and_end_at_zero(self):
    objective = SDTT(Masked(MASK), num_steps=8, round_steps=5)
    for step, size in ((0, 1 / 8), (4, 1 / 8), (5, 1 / 4), (14, 1 / 2)):
      now = objective.at_step(jnp.array(step))
      levels = jnp.array([0.0, 0.3, 1 - 2**-24])
      t = now.trajectory(levels, 2)
      np.testing.assert_allclose(t[0] - t[2], size, rtol=1e-6)
      np.testing.assert_allclose(t[0] - t[1], size / 2, rtol=1e-6)
      np.testing.assert_allclose(
        t[0], np.minimum(1 - levels + size, 1), rtol=1e-6
      )
      self.assertGreaterEqual(np.min(t), 0)


def sampled_law(table, num_steps):
  """The law of texts sampled in equal steps with a masked model, [27]."""
  x, p = np.exp(toys.log_softmax(table)), {(MASK,) * LENGTH: 1.0}
  for left in range(num_steps, 0, -1):
    after: Any = collections.Counter()
    for canvas, p_canvas in p.items():
      rows = x[toys.canvas_index(np.array(canvas))]
      laws = [
        [*enumerate(row / left), (MASK, 1 - 1 / left)]
        if z == MASK
        else [(z, 1)]
        for z, row in zip(canvas, rows)
      ]
      for draws in itertools.product(*laws):
        z, shares = zip(*draws)
        after[z] += p_canvas * np.prod(shares)
    p = after
  return np.array([p[tuple(x0)] for x0 in TEXTS])


class TrainTest(parameterized.TestCase):
  @parameterized.parameters(DCD, SDTT)
  def test_a_round_lowers_the_error_of_few_steps(self, cls):
    batch_size, num_steps, joint = 256, 150, toys.random_joint(2)
    teacher = {'table': toys.posterior_table(joint)}
    mesh = meshes.make_mesh(meshes.MeshConfig(1, 1, 1), jax.devices()[:1])
    objective = cls(Masked(MASK), num_steps=2, round_steps=num_steps)
    optimizer = optax.adam(0.05)
    train_step = train_steps.make_train_step(
      Scorer(Table(), objective, chunk_size=1000),
      optimizer,
      optax.constant_schedule(0.05),
      mesh,
      batch_size=batch_size,
      num_microbatches=1,
      ema_decay=0.0,
    )
    state = states.TrainState(
      jnp.int32(0),
      teacher,
      None,
      optimizer.init(teacher),
      jax.random.key(0),
      teacher,
    )
    state = jax.device_put(state, meshes.replicated(mesh))
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
      np.testing.assert_array_equal(state.frozen['table'], teacher['table'])
      x0 = TEXTS[rng.choice(len(TEXTS), p=joint, size=batch_size)]
      state, _ = train_step(state, meshes.shard_batch(mesh, batch_of(x0)))
    student = np.array(state.params['table'])
    # After the last step of a round the student is the teacher.
    np.testing.assert_array_equal(state.frozen['table'], student)

    def error(table, num_steps):
      law = sampled_law(table, num_steps)
      self.assertAlmostEqual(law.sum(), 1)
      return np.sum(law * np.log(law / joint))

    before, after = (error(x, 2) for x in (teacher['table'], student))
    self.assertLess(error(teacher['table'], 4), before)
    self.assertLess(after, 0.95 * before)
