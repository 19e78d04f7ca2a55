"""All objectives on the same little stories, against the truth.

    python launch.py --mode=study --config=configs/objectives.py \
        --output=runs/objectives --seeds=0,1,2

Data, network, optimizer and batch are those of configs/quickstart.py; a variant
changes the objective, and reads the time where it must. Nothing is tuned for
one of them, but that uniform noise has untied embeddings (66k parameters more).
genmd4 noises each example twice, so that its steps make twice the network
calls. One of them alone:

    python launch.py --config=configs/objectives.py:block4 --workdir=runs/block4

Not yet run as a whole. Measured with seed 0, 1200 steps, on two cores of an AMD
EPYC (Zen 5), float32, JAX 0.10.2: nats a story above the truth (15.1), and the
share of 64 samples at temperature 1 that are possible stories.

    masked    10.39 +- 0.69   confidence, 64 calls: 20%, but far from the law
                              (divergence 0.042; the law itself 0.002);
                              psi, 64 calls: 6% (0.003); all others 0 to 3%
    block4     0.69 +- 0.11   49 calls, one a block and its cache: 6%; 74: 27%

Evaluated alone, without samples:

    uniform                 20.9 and 29.2, each +- 0.9 (seeds 0 and 1)
      tied embeddings       42.1; with model.embedding_std=0.02 34.3
    curriculum              17.9 and 17.9, each +- 0.8 (seeds 0 and 1)
      of 200 steps          18.3
      tau=1e-3, as in Duo   28.3; its mixtures are nearly tokens here
      tied embeddings       214.8; with tau=1e-3 193.3
"""

from nanodlm import config as configs

VARIANTS = {
  'masked': {'objective.name': 'masked'},
  'block4': {'objective.name': 'block', 'objective.block_size': 4},
  'block20': {'objective.name': 'block', 'objective.block_size': 20},
  'block4_ar': {
    'objective.name': 'block',
    'objective.block_size': 4,
    'objective.ar_weight': 1.0,
  },
  # Tied embeddings begin as a network that copies its input, and without the
  # low noise levels that the curriculum leaves out, it stays one.
  'uniform': {
    'objective.name': 'uniform',
    'model.time_conditioning': True,
    'model.tie_embeddings': False,
  },
  'curriculum': {
    'objective.name': 'uniform',
    'objective.curriculum_steps': 600,
    'objective.tau': 0.1,
    'model.time_conditioning': True,
    'model.tie_embeddings': False,
  },
  'hybrid': {'objective.name': 'hybrid'},
  'd3pm': {'objective.name': 'd3pm'},
  'sedd': {'objective.name': 'sedd'},
  'genmd4': {'objective.name': 'genmd4', 'model.time_conditioning': True},
  'ar': {'objective.name': 'ar'},
}


def _student(teacher, method, num_steps):
  """Returns the settings of three rounds that halve the teacher's steps."""
  return {
    **VARIANTS[teacher],
    'objective.curriculum_steps': 0,
    'checkpoint.init_from': teacher,
    'distill.name': method,
    'distill.num_steps': num_steps,
    'distill.round_steps': 200,
    'train.num_steps': 600,
    'optim.learning_rate': 2e-3,
    'optim.schedule': 'constant',
    'optim.ema_decay': 0.99,
  }


VARIANTS |= {
  'masked_sdtt': _student('masked', 'sdtt', 32),
  'block20_sdtt': _student('block20', 'sdtt', 16),
  'uniform_dcd': _student('uniform', 'dcd', 32),
  'curriculum_dcd': _student('curriculum', 'dcd', 32),
  'hybrid_dcd': _student('hybrid', 'dcd', 32),
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
