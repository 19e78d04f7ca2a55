"""SEDD, arXiv 2310.16834, with absorbing (masked) noise.

The form on the Hugging Face hub has a config.json with the project's settings,
in the sections 'model', 'graph' and 'noise'. A checkpoint.pth of its trainer
has both 'model' and 'ema': the averaged weights are used, and its
.hydra/config.yaml must be converted to a config.json next to it.

The outputs are those before -log expm1(sigma) - log N, which objective 'sedd'
adds. Uniform noise and unscaled outputs are refused: that objective has masked
noise, and scales.
"""

from nanodlm.interop.families import ddit
from nanodlm.interop.families.layout import Key, refuse, require
from nanodlm.types import InputError

SECTIONS = {
  'graph': {'type': ('absorb',)},
  # At its ends another schedule has other times than 'sigma'.
  'noise': {'type': ('loglinear',)},
  'model': {'scale_by_sigma': (True,)},
}


class SEDD(ddit.DDiT):
  """SEDD."""

  objective = 'sedd'
  keys = {
    'hidden_size': Key('embed_dim', 0),
    'cond_dim': Key('time_dim', 0),
    'n_blocks': Key('num_layers', 0),
    'n_heads': Key('num_heads'),
  }
  network = {**ddit.DDiT.network, 'time_form': 'sigma'}
  length = ('length', 1024)
  prefixes = ('', 'backbone.')

  def detect(self, config, names):
    return 'graph' in config and 'tokens' in config and ddit.is_like(names)

  def describe(self, config, shapes):
    require(config, *SECTIONS)
    for name, allowed in SECTIONS.items():
      if not isinstance(config[name], dict):
        raise InputError(
          f'config.json: {name}={config[name]!r} is not a section'
        )
      refuse(config[name], allowed)
    return super().describe(config['model'], shapes)

  def to_config(self, network, described):
    model = {
      'name': 'nanodlm',
      'type': 'ddit',
      'length': described.max_length,
      'scale_by_sigma': True,
      'dropout': network.dropout,
      'mask_token_id': described.mask_id,
      'eos_token_id': described.separator_id,
    }
    return {
      'model': {**self.fields(network), **model},
      'graph': {'type': 'absorb'},
      'noise': {'type': 'loglinear'},
      'tokens': described.vocab_size - 1,
    }
