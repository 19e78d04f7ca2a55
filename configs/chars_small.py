"""Shape S1 of the speed comparison: 6 layers, width 384, length 256, batch 16.

    python -m nanodlm.perf.benchmark --config=configs/chars_small.py --vocab_size=67

nanoGPT's character-level Shakespeare model. The figures stand in the README.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.num_layers = 6
  config.model.embed_dim = 384
  config.model.num_heads = 6
  config.model.unroll = True
  config.model.mlp = 'relu2'  # the peers' MLPs are not gated either
  config.model.qk_norm = False
  config.data.length = 256
  config.train.batch_size = 16
  config.train.chunk_size = 4096
  config.sampler.num_steps = 128
  return config
