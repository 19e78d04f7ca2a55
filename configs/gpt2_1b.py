"""A GPT of 1.3B parameters: 24 layers, width 2048, 16 heads of 128, length 1024.

    python launch.py --config=configs/gpt2_1b.py --workdir=runs/gpt2_1b
    python launch.py --mode=compile --config=configs/gpt2_1b.py --topology=v5e:4x8 \
        --vocab_size=50258

For 32 chips of a v5e; parameters, their average and the optimiser's state lie over
all of them. Data and batch (0.5M tokens) are those of configs/gpt2_small.py; depth,
width and learning rate are GPT-3 XL's (Brown et al., arXiv 2005.14165, table 2.1),
with heads that divide the width.
Never run. Compiled ahead of time, by the compiler's estimate: 12.5 of 15.75 GiB a
chip, 1.07 s a step, 66% of the peak rate in model FLOPs, waiting for 42 GB of
collectives a step and chip not counted.
"""

from configs import gpt2_small


def get_config():
  config = gpt2_small.get_config()
  config.model.num_layers = 24
  config.model.embed_dim = 2048
  config.model.num_heads = 16
  config.model.remat = 'dots'
  config.model.unroll = False
  config.optim.learning_rate = 2e-4
  config.train.num_microbatches = 2  # 8 rows a chip
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
