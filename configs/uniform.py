"""Uniform noise (UDLM) on Tiny Shakespeare: any token may become any other.

    python launch.py --config=configs/uniform.py --workdir=runs/uniform \
        --config.data.source=text:tinyshakespeare.txt

Source: UDLM, arXiv 2412.10193. Only the noise, and the time that the network
then needs, differ from configs/shakespeare.py.

Not yet run at this size. With 2 layers of width 128 the bound was 3.397 +-
0.026 bits/char, against 3.125 of masked diffusion; configs/shakespeare.py has
the whole table.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('shakespeare')
  config.objective.name = 'uniform'
  config.model.time_conditioning = True
  return config
