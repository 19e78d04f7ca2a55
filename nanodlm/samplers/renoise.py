"""Renoising: accepts the surest tokens of a draft, replaces others by noise."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.noise import categorical, processes
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import confidence, posterior, psi, reveal
from nanodlm.types import InputError, Objective, ReverseRule, Sampler, Samples

DEFAULT_BUDGET = 0.1  # As in DiffusionGemma.


@dataclasses.dataclass(frozen=True)
class Renoise(Sampler):
  """Drafts the whole text in each call and accepts what it is sure of.

  APPROXIMATE. Each call draws a token for every free position from the
  posterior of the clean token,

      p(v | xt) ~ x_v q_t(xt_i | v),

  where x is the network's prediction, given the other positions. It accepts the
  positions of least entropy, while the sum of their entropies minus the largest
  is within a budget (EB-Sampler, arXiv 2505.24857), and at least j of T parts
  in call j. The others become the noise of t = 1 again, random tokens or masks.
  Accepted tokens are not final: they are drawn again in the next call, whose
  time t is that at which the share of noise is expected. A row ends when
  everything is accepted; at its time, 0, the posterior would change nothing.
  Source: the sampler of DiffusionGemma (google-deepmind/gemma, `diffusion`).

  If positions were accepted by a coin of probability alpha_s instead, this
  would be `psi` with kappa = 0.

  Differs from DiffusionGemma: the network knows the time; what it remembers, if
  it self-conditions, is its prediction before `heat`; entropies are those after
  `heat` and before `temperature`, top-k and top-p; the accepted share has a
  lower bound, so that the last call accepts everything.

  Attributes:
    num_steps: T, maximum number of network calls.
    rule: the objective.
    entropy_budget: budget of a call, in nats; 0 selects DEFAULT_BUDGET.
    heat: factor h of the temperature in the first call. In call j, from 0, it
      is 1 + (h - 1) (1 - j / T), which is 1 + (h - 1) / T in the last one.
      DiffusionGemma: h = 2, at temperature 0.4.
  """

  draw: Draw
  num_steps: int
  rule: ReverseRule
  entropy_budget: float = 0.0
  heat: float = 1.0

  fills_blocks = True
  remembers = True

  def __post_init__(self):
    if self.num_steps < 1:
      raise InputError(f'sampler.num_steps={self.num_steps!r} must be >= 1')
    if not self.entropy_budget >= 0:
      raise InputError(
        f'sampler.entropy_budget={self.entropy_budget!r} must be >= 0; 0 '
        f'selects {DEFAULT_BUDGET}'
      )
    if not 0 < self.heat <= categorical.MAX_TEMPERATURE:
      raise InputError(
        f'sampler.heat={self.heat!r} must be in '
        f'(0, {categorical.MAX_TEMPERATURE:g}]'
      )

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return posterior.Posterior.fits(objective) and objective.can_correct

  def with_rule(self, rule: ReverseRule) -> 'Renoise':
    return dataclasses.replace(self, rule=rule)

  def __call__(self, keys, canvas, denoise):
    free, length = ~canvas.fixed, canvas.tokens.shape[1]
    num_free = jnp.sum(free, axis=1, keepdims=True)
    positions = posterior.all_positions(canvas.tokens)

    def body(state):
      tokens, memory, is_noise, step = state
      noise = jnp.sum(is_noise, axis=1) / jnp.maximum(num_free[:, 0], 1)
      t = psi.time_of(self.rule, noise)
      level = self.rule.level_at(t, jnp.mean(free, axis=1))
      heat = 1 + (self.heat - 1) * (1 - step / self.num_steps)
      logits, memory = reveal.ask(denoise, tokens, level, positions, memory)
      logits = logits / heat
      draw_keys, noise_keys = reveal.split_each(reveal.fold_in_each(keys, step))
      log_p = self._posterior(self.draw.log_prob(logits), tokens, t)
      drawn = jax.vmap(categorical.sample_categorical)(draw_keys, log_p)
      own = categorical.log_prob(logits, self.draw.mask_id)
      own = self._posterior(own, tokens, t)
      entropy = -jnp.sum(jnp.exp(own) * own, axis=-1)
      order = jnp.argsort(jnp.where(free, entropy, jnp.inf), axis=1)
      budget = self.entropy_budget or DEFAULT_BUDGET
      count = confidence.num_within(entropy, order, budget)
      num_left = reveal.scale_rank(
        self.num_steps - step - 1,
        num_free,
        self.num_steps,
        length,
        self.num_steps,
      )
      count = jnp.maximum(count, num_free - num_left)
      accepted = free & (processes.inverse_permutation(order) < count)
      fresh = self.rule.sample_prior(noise_keys, length)
      # A row that has ended keeps its tokens.
      is_open = free & (noise > 0)[:, None]
      new = jnp.where(accepted, drawn, fresh)
      tokens = jnp.where(is_open, new, tokens)
      return tokens, memory, is_open & ~accepted, step + 1

    prior_keys, keys = reveal.split_each(keys)
    prior = self.rule.sample_prior(prior_keys, length)
    tokens = jnp.where(free, prior, canvas.tokens)
    tokens, _, _, num_calls = jax.lax.while_loop(
      lambda state: sharding.on_any_device(jnp.any(state[2])),
      body,
      (tokens, canvas.memory, free, jnp.zeros_like(tokens[0, 0])),
    )
    return Samples(tokens=tokens, num_calls=num_calls)

  def _posterior(self, log_x, tokens, t):
    """Returns log p(x0 | xt), [B, L, V]; tokens xt [B, L], times t [B]."""
    plain = Draw(self.draw.mask_id)
    of_row = lambda log_x, xt, t: self.rule.reverse(
      log_x[None], xt[None], jnp.zeros_like(t), t, plain
    )[0]
    return jax.vmap(of_row)(log_x, tokens, t)
