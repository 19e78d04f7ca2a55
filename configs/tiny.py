"""The smallest run that does everything, for tests: 2 layers, 40 steps.

    python launch.py --config=configs/tiny.py --workdir=runs/tiny

It learns next to nothing, in about half a minute on two cores of an AMD EPYC.
With 400 steps the bound was 4.657 +- 0.022 bits/byte, and the exact value of
the autoregressive model 3.651 +- 0.022; the perplexity of samples under the
latter was 53, 50 and 54 in 4, 16 and 64 calls, and 19 in 64 (held-out text has
14). Both runs, their comparison and the report took 1 min 18 s of processor
time.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
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
