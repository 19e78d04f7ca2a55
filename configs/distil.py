"""Distils the model of configs/quickstart.py to 8 network calls, in 3 rounds.

    python launch.py --config=configs/quickstart.py --workdir=runs/quickstart
    python launch.py --config=configs/distil.py --workdir=runs/distil
    python launch.py --mode=compare --workdirs=runs/quickstart,runs/distil \
        --output=runs/distil/compared --judge=law --samplers=ancestral \
        --num_steps=8,16,64 --num_samples=256 --temperature=0.3

The student of each round learns to take one step where its teacher takes two:
32, 16 and 8 steps instead of 64. For discrete consistency distillation instead
of SDTT write --config=configs/distil.py:dcd; for another teacher of the same
network, --config.checkpoint.init_from=WORKDIR.

Source: SDTT, arXiv 2410.21035; DCD, arXiv 2506.10892.

Measured before the quickstart had convolutions (both commands with
--config.model.conv_size=0, the first also with --config.train.num_steps=2400
--config.optim.momentum=0.95), on two cores of an AMD EPYC (Zen 5) that did
other work, float32, JAX 0.10.2, one seed: 1200 steps at 7,000 tokens/s, without
the evaluations before the last. Possible stories among 256 samples of ancestral
at temperature 0.3, all different, and the divergence from the law:

    calls   teacher                     student
        8    1.2% (0.4 to 3.4%), 0.0085  1.2% (0.4 to 3.4%), 0.0153
       16    2.3% (1.1 to 5.0%), 0.0060  5.1% (3.0 to 8.5%), 0.0143
       64   12.1% (8.7 to 17%),  0.0051 17.2% (13 to 22%),   0.0138

At 16 and 64 calls more of its stories may be possible (the intervals overlap),
but all are less like the law: the student is more certain. Its bound on
held-out stories rose from 7.1 to 13.3 nats above the truth. At 8 calls it is
far from its teacher at 64.

DCD was run for 300 steps only, with rounds of 100: 0.4%, 3.5% and 14.1%, with
divergences of 0.0161, 0.0129 and 0.0142 and a bound 12.9 nats above the truth.
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
  config.optim.momentum = 0.95
  config.optim.schedule = 'constant'
  config.optim.ema_decay = 0.99
  config.train.num_steps = 1200
  config.train.eval_every_steps = 400
  config.checkpoint.every_steps = 400
  config.sampler = configs.load('base').sampler
  config.sampler.name = 'ancestral'
  config.sampler.num_steps = 8
  config.sampler.temperature = 0.3
  return configs.vary(config, VARIANTS, name)
