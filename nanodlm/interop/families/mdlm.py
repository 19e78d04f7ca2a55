"""MDLM, arXiv 2406.07524: Lightning's .ckpt, or Hugging Face's form.

The averaged weights ('ema') of a .ckpt are used if it has them. Its settings
are Python objects, which are not read: a config.json next to it must give
model_type 'mdlm' and n_heads, and model_length (1024) and time_conditioning
(false) if they differ.
"""

from nanodlm.interop.families.ddit import DDiT
from nanodlm.interop.families.layout import Key


class MDLM(DDiT):
  """MDLM."""

  model_types = ('mdlm',)
  keys = {
    **DDiT.keys,
    'time_conditioning': Key(
      'time_form', False, {False: 'constant', True: 'sigma'}
    ),
  }
  # 'd3pm' and 'sedd' are other parametrisations of the same network.
  allowed = {'parameterization': ('subs',), 'backbone': ('dit',)}
