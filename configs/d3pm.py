"""D3PM with absorbing noise on Tiny Shakespeare, in 1000 discrete times.

    python launch.py --config=configs/d3pm.py --workdir=runs/d3pm \
        --config.data.source=text:tinyshakespeare.txt

Source: D3PM, arXiv 2107.03006: a Markov chain of 1000 steps, and a logit for
"still masked". The rest is configs/shakespeare.py.

Not yet run at this size. With 2 layers of width 128 the bound was 3.123 +-
0.022 bits/char, against 3.125 of masked diffusion; configs/shakespeare.py has
the whole table.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('shakespeare')
  config.objective.name = 'd3pm'
  config.objective.num_timesteps = 1000
  return config
