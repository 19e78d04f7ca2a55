"""Duo, arXiv 2506.10892, and UDLM, arXiv 2412.10193: uniform noise.

As MDLM, with model_type 'duo' or 'udlm'; the time is always an input of the
network. None of the ids is a mask: one is added that occurs in no text and no
noise. With GPT-2's ids Duo has one more than tokens: the padding token, which
occurs in the noise like any other.
"""

from nanodlm.interop.families.ddit import DDiT


class Duo(DDiT):
  """Duo and UDLM."""

  model_types = ('duo', 'udlm')
  is_exportable = False
  objective = 'uniform'
  has_mask = False
  allowed = {'causal': (False,), 'time_conditioning': (True,), 'cfg': (False,)}
  network = {**DDiT.network, 'time_form': 'sigma'}
