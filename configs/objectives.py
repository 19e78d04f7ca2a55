"""All objectives on the same little stories, against the truth.

    python launch.py --mode=study --config=configs/objectives.py \
        --output=runs/objectives --seeds=0,1,2

Data, network, optimizer and batch are those of configs/quickstart.py; a variant
changes the objective, and reads the time where it must. Nothing is tuned for
one of them. genmd4 noises each example twice, so that its steps make twice the
network calls. One of them alone:

    python launch.py --config=configs/objectives.py:block4 --workdir=runs/block4

Not yet run.
"""

from nanodlm import config as configs

VARIANTS = {
  'masked': {'objective.name': 'masked'},
  'block4': {'objective.name': 'block', 'objective.block_size': 4},
  'uniform': {'objective.name': 'uniform', 'model.time_conditioning': True},
  'hybrid': {'objective.name': 'hybrid'},
  'd3pm': {'objective.name': 'd3pm'},
  'sedd': {'objective.name': 'sedd'},
  'genmd4': {'objective.name': 'genmd4', 'model.time_conditioning': True},
  'ar': {'objective.name': 'ar'},
}


def get_config(name='masked'):
  config = configs.load('quickstart')
  # The quickstart's sampler does not fit all objectives.
  config.sampler = configs.load('base').sampler
  # For infilling, whose best possible accuracy is that of the likeliest words.
  config.sampler.temperature = 0.0
  config.train.num_steps = 1200
  config.train.num_samples = 0
  config.train.eval_every_steps = 200
  config.eval.max_examples = 256
  config.checkpoint.every_steps = 200
  return configs.vary(config, VARIANTS, name)
