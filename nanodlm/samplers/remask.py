"""Remasking (ReMDM) sampling of a masked model: masks revealed tokens again."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import schedules, times
from nanodlm.samplers import ancestral, reveal
from nanodlm.types import InputError, Samples

KINDS = ('cap', 'rescale', 'conf', 'loop', 'constant')

# 'loop' holds alpha at LOOP_ALPHA between these times, as in the paper's code.
LOOP_ON, LOOP_OFF, LOOP_ALPHA = 0.55, 0.05, 0.9

# Replaces 0 in a denominator whose quotient is not used.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Remask(ancestral.Ancestral):
  """Ancestral sampling that occasionally masks revealed tokens again.

  The step from t to s masks each revealed position with probability sigma and
  reveals each masked one with probability (alpha_s - (1 - sigma) alpha_t) /
  (1 - alpha_t). A position is then masked with probability 1 - alpha_s, the
  noise that the network was trained on. sigma is at most sigma_max = min(1, (1
  - alpha_s) / alpha_t), which is 0 in the last step, so that no masks remain.
  Source: ReMDM, arXiv 2503.00307. The kinds, with eta of the paper's code:

  - 'cap': sigma = min(eta, sigma_max); eta = 0.008.
  - 'rescale': sigma = eta sigma_max; eta = 0.015.
  - 'conf': sigma_i = eta sigma_max w_i; eta = 1. w is a softmax over the
    revealed free positions of a row, of the negative probability of each token
    at its reveal, so that a step masks about eta sigma_max tokens of the row.
    Masked positions are revealed as with sigma = 0, so slightly more are masked
    than the schedule prescribes.
  - 'loop': sigma = min(eta, sigma_max) for t in [0.05, 0.55], while alpha is
    held at 0.9; sigma = 0 before and after, while alpha runs from 0 to 0.9 and
    from 0.9 to 1; eta = 0.02.
  - 'constant': sigma = eta (1 - alpha_s), the psi-samplers' kappa = 1 - eta.

  eta = 0 is ancestral sampling, for 'loop' on another grid. The tokens of one
  step are drawn independently, and a larger eta draws more of them; 'cap' and
  'rescale' are exact as T grows, more slowly for larger eta, and 'constant',
  still more slowly. Remasking corrects errors of the network. With an exact
  network it only costs accuracy.

  Differs from the paper: a step of 'loop' across a boundary ends on it, where
  the released code jumps.

  Attributes:
    remask: one of the kinds above.
    eta: strength of remasking, in [0, 1].
  """

  remask: str = 'cap'
  eta: float = 0.04

  is_final = False

  def __post_init__(self):
    super().__post_init__()
    check(self.remask, self.eta)

  def _times(self) -> jax.Array:
    """Returns the time of the schedule at each point of the grid, [T + 1]."""
    t = times.reverse_grid(self.num_steps, self.grid)
    hold = self.schedule.inverse(jnp.float32(1 - LOOP_ALPHA))
    return loop_times(t, hold) if self.remask == 'loop' else t

  def noise_levels(self) -> jax.Array:
    """Returns 1 - alpha on the grid, [T + 1], from exactly 1 to exactly 0."""
    return schedules.noise_levels(self.schedule, self._times())

  def remask_probs(self) -> jax.Array:
    """Returns sigma of each step, [T]; for 'conf', its sum over the row."""
    return sigmas(self.remask, self.eta, self._times(), self.noise_levels())

  def reveal_probs(self) -> jax.Array:
    """Returns the probability that a step reveals a masked position, [T]."""
    noise_t, noise_s = self.noise_levels()[:-1], self.noise_levels()[1:]
    sigma = 0.0 if self.remask == 'conf' else self.remask_probs()
    return (noise_t - noise_s + sigma * (1 - noise_t)) / noise_t

  def __call__(self, keys, canvas, denoise):
    batch, length = canvas.tokens.shape
    with jax.ensure_compile_time_eval():
      shares = self.noise_levels()[:-1] * self.reveal_probs()
      num_slots = reveal.enough_slots(length, shares)
    noise, remask_probs = self.noise_levels(), self.remask_probs()
    reveal_probs = self.reveal_probs()
    plan_keys, draw_keys = reveal.split_each(keys)
    free, is_conf = ~canvas.fixed, self.remask == 'conf'
    # As in training, the share of masks is of the whole row, prompt included.
    free_share = jnp.mean(free, axis=1)

    def step(j, state):
      tokens, memory, prob, num_calls = state
      masked = free & (tokens == self.draw.mask_id)
      revealed = free & ~masked
      sigma = jnp.full((batch, length), remask_probs[j])
      if is_conf:
        sigma *= _softmax(-prob, revealed)
      u = reveal.uniform_each(reveal.fold_in_each(plan_keys, j), length)
      tokens, memory, prob, calls = reveal.draw_pending(
        reveal.fold_in_each(draw_keys, j),
        tokens,
        masked & (u < reveal_probs[j]),
        free_share * noise[j],
        denoise,
        self.draw,
        num_slots,
        memory,
        prob,
      )
      tokens = jnp.where(revealed & (u < sigma), self.draw.mask_id, tokens)
      return tokens, memory, prob, num_calls + calls

    tokens = jnp.where(free, self.draw.mask_id, canvas.tokens)
    prob = jnp.zeros_like(free, jnp.float32) if is_conf else None
    state = (tokens, canvas.memory, prob, jnp.zeros_like(tokens[0, 0]))
    tokens, _, _, num_calls = jax.lax.fori_loop(0, noise.size - 1, step, state)
    return Samples(tokens=tokens, num_calls=num_calls)


def check(kind: str, eta: float, kinds: tuple[str, ...] = KINDS):
  """Raises InputError if a sampler with these `kinds` does not support it."""
  if kind not in kinds:
    raise InputError(f'sampler.remask={kind!r} is not one of {list(kinds)}')
  if not 0 <= eta <= 1:
    raise InputError(f'sampler.eta={eta!r} must be in [0, 1]')


def loop_times(t: jax.Array, hold: jax.Array) -> jax.Array:
  """Returns the times of 'loop' for those of a grid, [T + 1]."""
  before = hold + (t - LOOP_ON) / (1 - LOOP_ON) * (1 - hold)
  return jnp.where(t > LOOP_ON, before, jnp.minimum(t / LOOP_OFF, 1) * hold)


def sigmas(kind: str, eta: float, t: jax.Array, noise: jax.Array) -> jax.Array:
  """Returns sigma of each step, [T], for times t and 1 - alpha, [T + 1]."""
  noise_t, noise_s = noise[:-1], noise[1:]
  # At alpha_t = 0 nothing is revealed, and sigma only has to be finite.
  sigma_max = jnp.minimum(1, noise_s / jnp.maximum(1 - noise_t, TINY))
  if kind == 'constant':
    return eta * noise_s
  if kind in ('rescale', 'conf'):
    return eta * sigma_max
  sigma = jnp.minimum(eta, sigma_max)
  return jnp.where(t[:-1] == t[1:], sigma, 0.0) if kind == 'loop' else sigma


def _softmax(x: jax.Array, where: jax.Array) -> jax.Array:
  """Computes a softmax over the positions `where` of rows [B, L]."""
  exp = jnp.where(where, jnp.exp(x), 0.0)  # x is in [-1, 0].
  return exp / jnp.maximum(jnp.sum(exp, axis=1, keepdims=True), TINY)
