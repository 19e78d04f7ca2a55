"""Block diffusion (BD3-LM) of Tiny Shakespeare, in blocks of 16 bytes.

    python launch.py --config=configs/block.py --workdir=runs/block \
        --config.data.source=text:tinyshakespeare.txt

Source: BD3-LM, arXiv 2503.09573, which trains on LM1B with blocks of 4 to 16
tokens. The rest is configs/shakespeare.py.

Not yet run at this size. With 2 layers of width 128 the bound was 2.995 +-
0.017 bits/char, against 3.125 of masked diffusion and 2.281 of the
autoregressive model; configs/shakespeare.py has the whole table.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('shakespeare')
  config.objective.name = 'block'
  config.objective.block_size = 16
  return config
