"""D3PM with absorbing noise: a chain of T steps and a free mask logit."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.objectives import diffusion, masking
from nanodlm.types import Noised, Terms

# Used if num_timesteps is 0, as in the text experiments of the paper.
DEFAULT_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True)
class D3PM(masking.MaskedNoise):
  """The discrete-time bound of T steps, T KL(q(xs | xt, x0) || p(xs | xt)).

  Source: Austin et al., arXiv 2107.03006, absorbing state and x0
  parametrisation. p(xs | xt) is the posterior averaged over the network's
  prediction x, which may assign a probability x_m to the mask, "still masked at
  s". With m_t = 1 - alpha_t, rho = (alpha_s - alpha_t) / m_t and D = m_t +
  alpha_t x_m, the divergence at a masked position is

      KL = rho (log(D / m_t) - log x(x0))
           + (1 - rho) (log(D / m_t) - log((m_s + alpha_s x_m) / m_s)).

  The step to s = 0 is the reconstruction term, whose second logarithm is
  multiplied by 0. The bound is at least the masked bound in T steps of x
  normalised without the mask, so masked samplers can use this network.

  Differs from the paper: the schedule is arbitrary; the auxiliary cross entropy
  is omitted; the last step of sampling reveals all masks.

  Attributes:
    num_timesteps: T; 0 selects DEFAULT_TIMESTEPS.
    min_time: training omits steps that start below it; evaluation does not.
  """

  noise: str = dataclasses.field(default='stratified', kw_only=True)

  is_normalised = False
  noises = diffusion.Diffusion.noises

  @property
  def num_steps(self) -> int:
    """The number of steps T: `num_timesteps` or its default."""
    return self.num_timesteps or DEFAULT_TIMESTEPS

  def evaluation(self):
    return dataclasses.replace(self, noise='stratified', min_time=0.0)

  def naive(self):
    return dataclasses.replace(self.evaluation(), noise='uniform')

  def corrupt(self, keys, levels, x0, eligible):
    s, t = self.step_times(levels, self.num_steps)
    noise_s, noise_t = self.schedule.noise(s), self.schedule.noise(t)
    xt = self.process.corrupt(keys, noise_t, x0, eligible)
    spread = lambda x: jnp.broadcast_to(x[:, None], x0.shape)
    return Noised(
      tokens=xt,
      t=self.input_time(t, noise_t, eligible),
      scored=eligible & (xt == self.mask_id),
      level=spread(noise_t),
      fields={
        'target': x0,
        'noise_s': spread(noise_s),
        'noise_t': spread(noise_t),
      },
    )

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    noise_s, noise_t = fields['noise_s'], fields['noise_t']
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    log_masked, log_clean = self._log_shares(logits, vocab)
    masked = jnp.exp(log_masked)
    # log(D / m) at t and s. The term at s vanishes if m_s is 0.
    log_d_t = jnp.log1p((1 - noise_t) / noise_t * masked)
    is_last = noise_s <= 0
    safe_s = jnp.where(is_last, 1.0, noise_s)
    log_d_s = jnp.log1p((1 - safe_s) / safe_s * masked)
    reveal = (noise_t - noise_s) / noise_t
    kl = (
      log_d_t
      + reveal * (ce - log_clean)
      - jnp.where(is_last, 0.0, noise_s / noise_t * log_d_s)
    )
    loss = self.num_steps * kl
    return Terms(loss=loss, nll=loss, cross_entropy=ce, correct=correct)

  def reveal_probability(self, logits, s, t):
    """Returns (alpha_s - alpha_t) (1 - x_m) / D, [B, L]."""
    noise_s, noise_t = self.schedule.noise(s), self.schedule.noise(t)
    log_masked, log_clean = self._log_shares(logits)
    return (
      (noise_t - noise_s)
      * jnp.exp(log_clean)
      / (noise_t + (1 - noise_t) * jnp.exp(log_masked))
    )

  def _log_shares(self, logits, vocab=categorical.WHOLE):
    """Returns log x_m and log(1 - x_m), [...] each, of logits [..., V]."""
    clean = categorical.log_sum_exp(
      categorical.exclude_mask(logits, self.mask_id, vocab), vocab
    )
    masked = vocab.pick(
      logits.astype(jnp.float32), jnp.full(logits.shape[:-1], self.mask_id)
    )
    odds = masked - clean
    return jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)
