"""GenMD4 on Tiny Shakespeare: a learned masking schedule for each token.

    python launch.py --config=configs/genmd4.py --workdir=runs/genmd4 \
        --config.data.source=text:tinyshakespeare.txt

Source: GenMD4, arXiv 2406.04329. Each example is noised twice per step, so a
step makes twice the network calls of masked diffusion. The rest is
configs/shakespeare.py.

Not yet run at this size. With 2 layers of width 128 the bound was 2.954 +-
0.025 bits/char, against 3.125 of masked diffusion with the same batch, and
2.988 with twice the batch and time conditioning; configs/shakespeare.py has the
whole table. With 2 layers of width 64 (configs/tiny.py with time conditioning,
2000 steps of 8 x 64 bytes of this text, one seed) it was 2.644 +- 0.018
nats/byte, against 2.736 +- 0.012 of masked diffusion, which made half the
network calls.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('shakespeare')
  config.objective.name = 'genmd4'
  config.model.time_conditioning = True
  return config
