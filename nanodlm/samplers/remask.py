"""Remasking (ReMDM) sampling of a masked model: tokens may be taken back."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import schedules, times
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import reveal
from nanodlm.types import Canvas, Denoise, InputError, Sampler, Samples

KINDS = ('cap', 'rescale', 'conf', 'loop')

# Of 'loop': where time stands still, and alpha meanwhile. The paper's released
# settings.
LOOP_ON, LOOP_OFF, LOOP_ALPHA = 0.55, 0.05, 0.9

# Instead of 0 in a denominator whose quotient is then not used.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Remask(Sampler):
  """Ancestral sampling that returns revealed tokens to the mask now and then.

  In the step from t to s each revealed position is masked again with
  probability sigma, and each masked one is revealed with probability
  (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that it is still masked
  with probability 1 - alpha_s after the step: the network meets the noise that
  it was trained on. sigma is at most sigma_max = min(1, (1 - alpha_s) /
  alpha_t), which is 0 in the last step: no mask is left. Source: ReMDM, arXiv
  2503.00307.

  - 'cap': sigma = min(eta, sigma_max); eta is .008 in the paper's code.
  - 'rescale': sigma = eta sigma_max; .015.
  - 'conf': sigma_i = eta sigma_max w_i, with w the softmax over the row's
    revealed free positions of minus the probability that the network gave the
    token when it was revealed. w sums to 1, so that about eta sigma_max tokens
    of a row are taken back in a step; eta is 1 there. Masked positions
    are revealed as if sigma were 0, so that here slightly more are masked than
    the schedule says.
  - 'loop': sigma = min(eta, sigma_max) for t in [.05, .55], where alpha stands
    at .9; sigma = 0 before and after, where alpha covers 0 to .9 and .9 to 1;
    .02.

  eta = 0 is ancestral sampling, for 'loop' on a grid of its own. Tokens of one
  step are drawn independently of each other, as there, and more of them the
  larger eta is; 'cap' and 'rescale' are exact as T grows, the more slowly the
  larger eta. What remasking repairs is a network's errors; with an exact
  network it has nothing to repair and costs accuracy.

  Differs from the paper: a step of 'loop' across a boundary ends on it, where
  the released code jumps.

  Attributes:
    draw: how tokens are drawn.
    num_steps: T; see `grid`.
    schedule: alpha(t) of the reverse process; need not be the training's.
    grid: 'uniform', 'cosine' or the times; see `times.reverse_grid`.
    remask: one of the kinds above.
    eta: how much is taken back, in [0, 1].
  """

  draw: Draw
  num_steps: int
  schedule: schedules.Schedule = schedules.Linear()
  grid: str = 'uniform'
  remask: str = 'cap'
  eta: float = 0.04

  def __post_init__(self):
    times.check_grid(self.num_steps, self.grid)
    if self.remask not in KINDS:
      raise InputError(
        f'sampler.remask={self.remask!r} is not one of {list(KINDS)}'
      )
    if not 0 <= self.eta <= 1:
      raise InputError(f'sampler.eta={self.eta!r} must be in [0, 1]')

  def _times(self) -> jax.Array:
    """The schedule's time at each point of the grid, [T + 1]."""
    t = times.reverse_grid(self.num_steps, self.grid)
    if self.remask != 'loop':
      return t
    hold = self.schedule.inverse(jnp.float32(1 - LOOP_ALPHA))
    before = hold + (t - LOOP_ON) / (1 - LOOP_ON) * (1 - hold)
    return jnp.where(t > LOOP_ON, before, jnp.minimum(t / LOOP_OFF, 1) * hold)

  def noise_levels(self) -> jax.Array:
    """1 - alpha at the points of the grid, [T + 1], from exactly 1 to 0."""
    return schedules.noise_levels(self.schedule, self._times())

  def remask_probs(self) -> jax.Array:
    """sigma of each step, [T]; of 'conf', summed over the row."""
    noise_t, noise_s = self.noise_levels()[:-1], self.noise_levels()[1:]
    # Finite at alpha_t = 0, where nothing is revealed and sigma is of no one.
    sigma_max = jnp.minimum(1, noise_s / jnp.maximum(1 - noise_t, TINY))
    if self.remask in ('rescale', 'conf'):
      return self.eta * sigma_max
    sigma = jnp.minimum(self.eta, sigma_max)
    if self.remask == 'loop':
      t = self._times()
      sigma = jnp.where(t[:-1] == t[1:], sigma, 0.0)
    return sigma

  def reveal_probs(self) -> jax.Array:
    """The probability that a step reveals a masked position, [T]."""
    noise_t, noise_s = self.noise_levels()[:-1], self.noise_levels()[1:]
    sigma = 0.0 if self.remask == 'conf' else self.remask_probs()
    return (noise_t - noise_s + sigma * (1 - noise_t)) / noise_t

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    batch, length = canvas.tokens.shape
    noise, sigmas = self.noise_levels(), self.remask_probs()
    reveal_probs = self.reveal_probs()
    plan_keys, draw_keys = jax.vmap(lambda key: tuple(jax.random.split(key)))(
      keys
    )
    free = ~canvas.fixed
    # The expected masked share of the whole row, prompt included, as in
    # training.
    free_share = jnp.mean(free, axis=1)

    def step(j, state):
      tokens, prob, num_calls = state
      masked = free & (tokens == self.draw.mask_id)
      revealed = free & ~masked
      sigma = jnp.full((batch, length), sigmas[j])
      if self.remask == 'conf':
        sigma *= _softmax(-prob, revealed)
      u = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(
        reveal.fold_in_each(plan_keys, j)
      )
      tokens, prob, calls = reveal.draw_pending(
        reveal.fold_in_each(draw_keys, j),
        tokens,
        masked & (u < reveal_probs[j]),
        free_share * noise[j],
        denoise,
        self.draw,
        self._num_slots(length),
        prob,
      )
      tokens = jnp.where(revealed & (u < sigma), self.draw.mask_id, tokens)
      return tokens, prob, num_calls + calls

    tokens = jnp.where(free, self.draw.mask_id, canvas.tokens)
    prob = None
    if self.remask == 'conf':
      prob = jnp.zeros_like(free, jnp.float32)
    # From the data, so that under shard_map it varies over devices as they do.
    zero = jnp.sum(free, dtype=jnp.int32) * 0
    tokens, _, num_calls = jax.lax.fori_loop(
      0, sigmas.size, step, (tokens, prob, zero)
    )
    return Samples(tokens=tokens, num_calls=num_calls)

  def _num_slots(self, length: int) -> int:
    with jax.ensure_compile_time_eval():
      share = float(jnp.max(self.noise_levels()[:-1] * self.reveal_probs()))
    return reveal.enough_slots(length * share)


def _softmax(x: jax.Array, where: jax.Array) -> jax.Array:
  """Softmax over the positions `where` of each row [B, L], 0 elsewhere."""
  exp = jnp.where(where, jnp.exp(x), 0.0)  # x in [-1, 0]
  return exp / jnp.maximum(jnp.sum(exp, axis=1, keepdims=True), TINY)
