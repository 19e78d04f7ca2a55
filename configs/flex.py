"""Stories with gaps of any length, by FlexMDM, on a laptop.

python launch.py --config=configs/flex.py --workdir=runs/flex

Source: FlexMDM, arXiv 2509.01025, with the targets of nanodlm/objectives/flex.
The network, data and steps are those of configs/quickstart.py, except that the
network reads the time and half of the examples keep everything but a span, as
in the gaps it is asked to fill.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('quickstart')
  config.objective.name = 'flex'
  config.model.time_conditioning = True
  config.data.clean_infill_rate = 0.5
  config.sampler.name = 'insert'
  config.sampler.temperature = 1.0
  config.sampler.num_steps = 200
  config.sampler.remask = 'cap'
  config.sampler.eta = 0.04
  return config
