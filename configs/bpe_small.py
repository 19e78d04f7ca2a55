"""Shape S2 of the speed comparison: a small network under a 50k vocabulary.

    python -m nanodlm.perf.benchmark --config=configs/bpe_small.py --vocab_size=50258

4 layers, width 256, length 256, batch 8. The figures stand in the README.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.tokenizer.name = 'gpt2'
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  config.model.unroll = True
  config.model.mlp = 'relu2'  # the peers' MLPs are not gated either
  config.model.qk_norm = False
  config.data.length = 256
  config.train.batch_size = 8
  config.train.chunk_size = 130  # an eighth of what is scored, for less memory
  config.sampler.num_steps = 128
  return config
