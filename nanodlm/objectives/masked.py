"""Masked (absorbing) diffusion, with MDLM, MD4 and LLaDA as special cases."""

import dataclasses

from nanodlm.noise import categorical
from nanodlm.objectives import masking


@dataclasses.dataclass(frozen=True)
class Masked(masking.MaskedNoise):
  """The negative evidence lower bound of masked diffusion, x0 prediction.

  Every form is a weighted cross entropy of the masked positions,

      loss_i = scale * 1[xt_i = mask] * -log p(x0_i | xt),

  with the noise and the scale of `masking.MaskedNoise`:

  - continuous time: MDLM, arXiv 2406.07524, equation 10; MD4, arXiv 2406.04329,
    equation 5.
  - discrete time: MD4, section 2. It is an upper bound of the continuous-time
    value if the predictions are consistent, like those of an exact posterior.
  - fixed count: the any-order autoregressive form (Ou et al., arXiv 2406.03736;
    LLaDA, arXiv 2502.09992, equation 6). It equals continuous time on any
    schedule, with less variance and no truncation.
  """

  default_sampler = 'fixed_count'

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    return self.weighted_cross_entropy(logits, fields, vocab)
