"""Score entropy on masked noise (SEDD) on Tiny Shakespeare.

    python launch.py --config=configs/sedd.py --workdir=runs/sedd \
        --config.data.source=text:tinyshakespeare.txt

Source: SEDD, arXiv 2310.16834; noise by count, or the paper's times with
--config.objective.noise=stratified. The rest is configs/shakespeare.py.

Not yet run at this size. With 2 layers of width 128 the bound was 3.151 +-
0.017 bits/char, against 3.125 of masked diffusion; configs/shakespeare.py has
the whole table.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('shakespeare')
  config.objective.name = 'sedd'
  return config
