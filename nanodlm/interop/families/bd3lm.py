"""BD3-LM, arXiv 2503.09573: Lightning's .ckpt, or Hugging Face's form.

As MDLM; config.json must give block_size as well.
"""

from nanodlm.interop.families.ddit import DDiT


class BD3LM(DDiT):
  """BD3-LM."""

  model_types = ('bd3lm',)
  objective = 'block'
  required = ('block_size',)
  allowed = {
    'cross_attn': (True,),
    'causal': (False,),
    'adaln': (True,),
    # Blocks have times of their own, and this network is given their mean.
    'time_conditioning': (False,),
    'parameterization': ('subs',),
  }
  network = {**DDiT.network, 'time_form': 'constant'}
  written = {
    'cross_attn': True,
    'adaln': True,
    'causal': False,
    'attn_backend': 'sdpa',
    'var_min': False,
  }

  def settings(self, config, shapes):
    return {
      **super().settings(config, shapes),
      'objective.block_size': config['block_size'],
    }

  def to_config(self, network, described):
    config = super().to_config(network, described)
    return {**config, 'block_size': network.block_size}
