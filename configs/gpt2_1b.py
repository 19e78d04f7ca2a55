"""A GPT of 1.3B parameters: 24 layers, width 2048, 16 heads, length 1024.

    python launch.py --config=configs/gpt2_1b.py --workdir=runs/gpt2_1b
    python launch.py --mode=compile --config=configs/gpt2_1b.py \
        --topology=v5e:4x8 --vocab_size=50258

For 32 chips of a TPU v5e; the parameters, their average and the optimiser's
state are split over all of them. Data and batch (0.5M tokens) are those of
configs/gpt2_small.py; depth, width and learning rate are GPT-3 XL's (Brown et
al., arXiv 2005.14165, table 2.1), with heads that divide the width.

Not yet run. Compiled ahead of time by the second command, as estimated by the
TPU's compiler: 16 rows per chip in 2 micro-batches, 11.9 GiB of temporaries,
12.5 of 15.75 GiB per chip in all, 1,601 Mcycles (1.07 s) per step, 66% of the
peak rate in model FLOPs, without the time spent waiting for collectives (42 GB
per step and chip).
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('gpt2_small')
  config.model.num_layers = 24
  config.model.embed_dim = 2048
  config.model.num_heads = 16
  config.model.remat = 'dots'
  config.model.unroll = False
  config.optim.learning_rate = 2e-4
  config.train.num_microbatches = 2  # 8 rows per chip.
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
