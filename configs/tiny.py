"""The smallest run that does everything, for tests: 2 layers, 40 steps.

    python launch.py --config=configs/tiny.py --workdir=runs/tiny

Learns next to nothing in about half a minute on two CPU cores.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.data.length = 64
  config.model.num_layers = 2
  config.model.embed_dim = 64
  config.model.num_heads = 2
  config.model.unroll = True
  config.optim.warmup_steps = 10
  config.train.batch_size = 8
  config.train.num_steps = 40
  config.train.log_every_steps = 10
  config.train.eval_every_steps = 20
  config.eval.num_draws = 2
  config.eval.max_examples = 64
  config.sampler.num_steps = 16
  config.checkpoint.every_steps = 20
  return config
