"""Hybrid noise (GIDD), masks and random tokens, on Tiny Shakespeare.

    python launch.py --config=configs/hybrid.py --workdir=runs/hybrid \
        --config.data.source=text:tinyshakespeare.txt

Source: GIDD, arXiv 2503.04482, with 10% uniform tokens at t = 1/2. Samples can
be corrected after the last step: --mode=sample
--config.sampler.num_corrections=64. The rest is configs/shakespeare.py.

Not yet run at this size. With 2 layers of width 128 the bound was 3.294 +-
0.028 bits/char, against 3.125 of masked diffusion; configs/shakespeare.py has
the whole table.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('shakespeare')
  config.objective.name = 'hybrid'
  config.objective.p_uniform = 0.1
  config.model.time_conditioning = True
  return config
