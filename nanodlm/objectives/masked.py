"""Masked (absorbing) diffusion: MDLM, MD4 and LLaDA are configs of this file."""

import dataclasses

import jax

from nanodlm.noise import categorical
from nanodlm.objectives import masking
from nanodlm.types import Terms


@dataclasses.dataclass(frozen=True)
class Masked(masking.MaskedNoise):
  """The negative evidence lower bound of masked diffusion, x0 prediction.

  Every form is a weighted cross entropy of the masked positions,

      loss_i = scale * 1[xt_i = mask] * -log p(x0_i | xt),

  with the noise and the scale of `masking.MaskedNoise`:

  - continuous time: MDLM, arXiv 2406.07524, equation 10; MD4, arXiv 2406.04329,
    equation 5.
  - discrete time: MD4, section 2. An upper bound of the continuous-time value
    for a denoiser whose predictions agree with each other, as a posterior's do.
  - fixed count: the same value as continuous time under any schedule, with less
    variance and no truncation: the any-order autoregressive form (Ou et al.,
    arXiv 2406.03736; LLaDA, arXiv 2502.09992, equation 6).
  """

  def terms(self, logits: jax.Array, fields, vocab=categorical.WHOLE) -> Terms:
    return self.weighted_cross_entropy(logits, fields, vocab)
