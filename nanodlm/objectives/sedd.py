"""SEDD: score entropy on masked noise."""

import dataclasses

import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.objectives import masking
from nanodlm.types import Terms


@dataclasses.dataclass(frozen=True)
class ScoreEntropy(masking.MaskedNoise):
  """The denoising score entropy of masked noise.

  Source: Lou et al., SEDD, arXiv 2310.16834. The network's raw output gives the
  log-ratios s_y = raw_y - log expm1(sigma) - log N of its N tokens, with sigma
  = -log alpha. In the score entropy of a masked position,

      sigma' (sum_y e^{s_y} - r s_{x0} + r (log r - 1)),  r = 1 / expm1(sigma),

  sigma then only appears in the factor sigma' r = -alpha' / (1 - alpha), the
  scale of the masked loss:

      loss_i = scale (S - raw_{x0} + log N - 1),  S = mean_y e^{raw_y}
             = scale (-log p(x0) + S - 1 - log S),  p = softmax(raw).

  This is the masked loss of the normalised network plus a penalty on S != 1, so
  every noise of `masking.MaskedNoise` applies. Masked samplers, which
  normalise, can use this network; their bound is the first term.

  Differs from the paper: noise by count is supported and the default.
  """

  is_normalised = False

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    log_sum = self._log_mean_ratio(logits, vocab)
    loss = fields['scale'] * (ce + jnp.expm1(log_sum) - log_sum)
    return Terms(loss=loss, nll=loss, cross_entropy=ce, correct=correct)

  def reveal_probability(self, logits, s, t):
    """Returns S times the posterior's: the analytic step, SEDD section 4."""
    posterior = super().reveal_probability(logits, s, t)
    return posterior * jnp.exp(self._log_mean_ratio(logits))

  def _log_mean_ratio(self, logits, vocab=categorical.WHOLE):
    """Returns log S, [...], of logits [..., V]."""
    logits = categorical.exclude_mask(logits, self.mask_id, vocab)
    return categorical.log_sum_exp(logits, vocab) - jnp.log(self.mask_id)
