"""The form of runs that fit no other family: a tensor for each parameter.

The tensors of a block are named 'layers.3.query.kernel'; kernels are [in, out].
Only the folder `nanodlm` of the export says what they mean.
"""

from nanodlm.interop.families.layout import Family, LAYER, Part
from nanodlm.types import InputError


class Native(Family):
  """The form of nanodlm's own."""

  model_types = ('nanodlm',)
  is_published = False

  def describe(self, config, shapes):
    raise InputError(
      "a checkpoint of model_type='nanodlm' needs the folder 'nanodlm' of its "
      'export, which is missing'
    )

  def parts(self, network, paths, names):
    name = lambda path: path.replace('layers/', f'layers/{LAYER}/')
    return {path: Part(name(path).replace('/', '.')) for path in paths}

  def misfit(self, network, objective):
    return ''
