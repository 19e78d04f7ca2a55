"""Psi sampling: a predictor and a corrector in one step, for any noise."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.noise.categorical import Draw
from nanodlm.samplers import posterior, remask, reveal

KINDS = ('cap', 'rescale', 'loop', 'constant')

# Number of times between which `time_of` interpolates.
NUM_TIMES = 4096


@dataclasses.dataclass(frozen=True)
class Psi(posterior.Posterior):
  """Posterior sampling that draws some positions from scratch in each step.

  The step from t to s draws every free position independently from

      kappa q(xs | xt) + (1 - kappa) q_s(xs | x0 ~ q(x0 | xt)),

  which goes straight to a clean token and adds the noise of s to it again. Both
  parts keep the marginals: xs ~ q_s(. | x0) if xt ~ q_t(. | x0), for any kappa
  in [0, 1] and any noise. Source: psi-samplers, arXiv 2602.21185.

  For masked noise this is `remask` (ReMDM) with sigma = (1 - kappa)(1 -
  alpha_s), of which kappa >= 0 gives all up to 1 - alpha_s. Hence 1 - kappa =
  min(1, sigma / (1 - alpha_s)), with the sigma of `remask` for the same kind
  and eta, except for 'conf'; a kind of `remask` with a larger sigma, as of a
  large eta near t = 0, differs. 'constant' is kappa = 1 - eta. kappa = 1 is
  `posterior`. `remask` projects fewer positions to the vocabulary.

  A smaller kappa corrects more errors of the network. With an exact one it only
  costs accuracy: the law is exact as T grows, more slowly for smaller kappa,
  and the tokens of one step are drawn independently.

  Differs from the paper: 'rescale' does not square eta, and the last step ends
  at t = 0.

  Attributes:
    remask: the rule for kappa, one of KINDS; see `remask.Remask`.
    eta: strength of the corrections, in [0, 1].
    greedy_tail: whether the last step takes the most probable clean tokens.
      This lowers the entropy of the samples. For noise that replaces tokens,
      every token becomes the most probable one given the OTHERS, all at once.
  """

  remask: str = 'cap'
  eta: float = 0.04
  greedy_tail: bool = False

  def __post_init__(self):
    super().__post_init__()
    remask.check(self.remask, self.eta, KINDS)

  def times(self) -> jax.Array:
    t = super().times()
    hold = time_of(self.rule, jnp.float32(1 - remask.LOOP_ALPHA))
    return remask.loop_times(t, hold) if self.remask == 'loop' else t

  def fresh_probs(self) -> jax.Array:
    """Returns 1 - kappa of each step, [T]; 0 in the last one."""
    t = self.times()
    noise = self.rule.noise_at(t)
    sigmas = remask.sigmas(self.remask, self.eta, t, noise)
    return jnp.minimum(sigmas / jnp.maximum(noise[1:], remask.TINY), 1.0)

  def draw_step(self, keys, logits, xt, step):
    t, s = self.times()[step], self.times()[step + 1]
    draw_keys, fresh_keys, noise_keys = reveal.split_each(keys, 3)
    u = reveal.uniform_each(fresh_keys, xt.shape[1])
    is_fresh = u < self.fresh_probs()[step]
    log_p = jnp.where(
      is_fresh[..., None],
      self.rule.reverse(logits, xt, jnp.zeros_like(s), t, self.draw),
      self.rule.reverse(logits, xt, s, t, self.draw),
    )
    if self.greedy_tail:
      greedy = Draw(self.draw.mask_id, temperature=0.0)
      log_p = jax.lax.cond(
        s > 0,
        lambda: log_p,
        lambda: self.rule.reverse(logits, xt, s, t, greedy),
      )
    drawn = jax.vmap(categorical.sample_categorical)(draw_keys, log_p)
    return self.rule.renoise(noise_keys, drawn, s, is_fresh)


def time_of(rule, noise: jax.Array) -> jax.Array:
  """Returns the time at which 1 - alpha is `noise`, any shape."""
  # Denser near 0, where the noise of some schedules is steep.
  t = jnp.linspace(0.0, 1.0, NUM_TIMES + 1) ** 4
  return jnp.interp(noise, rule.noise_at(t), t)
