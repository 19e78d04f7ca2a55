"""Masked diffusion with a learned schedule for each token on Tiny Shakespeare.

    python launch.py --config=configs/genmd4.py --workdir=runs/genmd4 \
        --config.data.source=text:tinyshakespeare.txt

Source: GenMD4, arXiv 2406.04329. Each example is noised twice a step, so a step
costs twice that of `masked`. Not yet run at this size; 2 layers of width 64
(configs/tiny.py with time conditioning, 2000 steps of 8 x 64 bytes of this text, one
seed): 2.644 ± 0.018 nats/byte held out, against 2.736 ± 0.012 of `masked`, which
took half the network calls.
"""

from configs import shakespeare


def get_config():
  config = shakespeare.get_config()
  config.objective.name = 'genmd4'
  config.model.time_conditioning = True
  return config
