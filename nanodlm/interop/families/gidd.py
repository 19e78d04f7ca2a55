"""GIDD, arXiv 2503.04482, in Hugging Face's form (model_type 'dit').

Its share of uniform tokens is config.json's p_uniform. The mask is its last id,
which its code adds to GPT-2's tokenizer. A checkpoint of its trainer, whose
vocabulary is padded, must be converted by its own convert_checkpoint.py first.
"""

from nanodlm.interop.families.ddit import DDiT
from nanodlm.interop.families.layout import Key


class GIDD(DDiT):
  """GIDD."""

  model_types = ('dit',)
  is_exportable = False
  objective = 'hybrid'
  keys = {'num_attention_heads': Key('num_heads')}
  required = ('p_uniform',)
  network = {**DDiT.network, 'time_form': 'unit'}
  length = ('max_seq_len', 512)

  def detect(self, config, names):
    return 'p_uniform' in config and super().detect(config, names)

  def settings(self, config, shapes):
    return {
      **super().settings(config, shapes),
      'objective.p_uniform': float(config['p_uniform']),
      'objective.gamma': 1.0,
    }
