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

Measured on one core of an AMD EPYC (Zen 5) that did other work, float32, JAX
0.10.2, one seed, with the model of configs/quickstart.py as it is. Possible
stories among 256 samples of ancestral at temperature 0.3, all different, and
the divergence from the law:

    calls   teacher                     student
        8    1.2% (0.4 to 3.4%), 0.0068   3.1% (1.6 to 6.0%), 0.0129
       16    8.2% (5.4 to 12%),  0.0057  12.1% (8.7 to 17%),  0.0127
       64   26.2% (21 to 32%),   0.0035  32.8% (27 to 39%),   0.0104

At each number of calls more of the student's stories may be possible (the
intervals overlap), but they are less like the law: the student is more certain.
The entropy of its samples is 3.56 nats per token with 8 calls, the teacher's
3.68 with 64 and that of held-out text 3.73. Its bound on held-out stories rose
from 4.2 to 11.9 nats above the truth. At 8 calls it is far from its teacher at
64. With the sampler confidence neither has a possible story with 8 calls; with
16, 0% and 8% are possible, with 64, 96% and 100%, of which 25% and 18% are
different.

Before the quickstart had convolutions, dcd was run for 300 steps, with rounds
of 100: 0.4%, 3.5% and 14.1% were possible, its teacher's 1.2%, 2.3% and 12.1%,
and its bound was 12.9 nats above the truth.
"""

from nanodlm import config as configs

VARIANTS = {'sdtt': {'distill.name': 'sdtt'}, 'dcd': {'distill.name': 'dcd'}}


def get_config(name='sdtt'):
  config = configs.load('quickstart')
  configs.set_start(config, 'runs/quickstart')
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
