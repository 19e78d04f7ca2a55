"""Few stories and many epochs: does masked diffusion overtake autoregression?

    python launch.py --mode=study --config=configs/scarce.py \
        --output=runs/scarce --seeds=0 --checkpoint=best

2,000 stories, 200 epochs of 125 steps, and an evaluation and a checkpoint every
10 epochs, all of which are kept (0.3 GB). Samples come from the checkpoint with
the lowest bound on 256 held-out stories. All else is as in
configs/objectives.py.

Source of the question: Prabhudesai et al., Diffusion beats autoregressive in
data-constrained settings, arXiv 2507.15857.

Not yet run.
"""

from nanodlm import config as configs

VARIANTS = {
  'masked': {'objective.name': 'masked'},
  'ar': {'objective.name': 'ar'},
}


def get_config(name='masked'):
  config = configs.load('objectives')
  config.data.source = 'stories:small:0-2000'
  # None of these is among the first 2,000.
  config.data.eval_source = 'stories:small:2000-3500'
  config.train.num_steps = 25_000
  config.train.eval_every_steps = 1250
  config.train.log_every_steps = 250
  config.checkpoint.every_steps = 1250
  config.checkpoint.max_to_keep = 20
  return configs.vary(config, VARIANTS, name)
