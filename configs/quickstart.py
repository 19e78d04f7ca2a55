"""A masked diffusion model of little stories, on a laptop, in two minutes.

python launch.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.data.source = 'stories:small'
  config.data.crop = 'document'
  config.data.length = 100
  config.data.eval_fraction = 0.03
  config.tokenizer.name = 'sentencepiece'
  config.tokenizer.vocab_size = 512  # Enough for every word to be one token.
  config.model.num_layers = 3
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.rope_theta = 100.0
  config.model.embedding_std = 0.5
  config.model.unroll = True
  config.optim.name = 'muon'
  config.optim.learning_rate = 1e-2
  config.optim.warmup_steps = 50
  config.optim.weight_decay = 0.0
  config.train.batch_size = 16
  config.train.num_steps = 2400
  config.train.log_every_steps = 200
  config.train.eval_every_steps = 800
  config.train.chunk_size = 1024
  config.eval.num_draws = 4
  config.eval.max_examples = 128
  config.sampler.name = 'remask'
  config.sampler.remask = 'rescale'
  config.sampler.eta = 0.5
  config.sampler.num_steps = 200
  config.sampler.temperature = 0.3
  config.checkpoint.every_steps = 800
  return config
