"""Distils the model of configs/quickstart.py to 8 network calls, in 3 rounds.

    python launch.py --config=configs/quickstart.py --workdir=runs/quickstart
    python launch.py --config=configs/distil.py --workdir=runs/distil
    python launch.py --mode=compare --workdirs=runs/quickstart,runs/distil \
        --output=runs/distil/compared --judge=law --samplers=ancestral \
        --num_steps=8,16,32,64 --num_samples=256

The student of each round learns to take one step where its teacher takes two:
32, 16 and 8 steps instead of 64. For discrete consistency distillation instead
of SDTT write --config=configs/distil.py:dcd; for another teacher of the same
network, --config.checkpoint.init_from=WORKDIR.

Source: SDTT, arXiv 2410.21035; DCD, arXiv 2506.10892.

Not yet run as a whole.
"""

from ml_collections import config_dict

from nanodlm import config as configs

VARIANTS = {'sdtt': {'distill.name': 'sdtt'}, 'dcd': {'distill.name': 'dcd'}}


def get_config(name='sdtt'):
  config = configs.load('quickstart')
  # A reference, so that --config.checkpoint.init_from=OTHER also changes the
  # tokenizer.
  teacher = config_dict.FieldReference('runs/quickstart')
  config.tokenizer.name = 'run'
  config.tokenizer.path = teacher
  config.tokenizer.vocab_size = 0
  config.checkpoint.init_from = teacher
  config.distill.num_steps = 32
  config.distill.round_steps = 400
  config.optim.learning_rate = 2e-3
  config.optim.schedule = 'constant'
  config.optim.ema_decay = 0.99
  config.train.num_steps = 1200
  config.train.eval_every_steps = 400
  config.checkpoint.every_steps = 400
  config.sampler = configs.load('base').sampler
  config.sampler.name = 'ancestral'
  config.sampler.num_steps = 8
  return configs.vary(config, VARIANTS, name)
