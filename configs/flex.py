"""Stories with gaps of any length, by FlexMDM, on one core of a laptop.

    python launch.py --config=configs/flex.py --workdir=runs/flex
    python launch.py --mode=sample --workdir=runs/flex \
        --prompt='One warm evening, Ada met Ben in {*}. Ada had {*}'
    python launch.py --mode=eval --workdir=runs/flex --infill=0.2,0.4 \
        --infill_examples=300

Source: FlexMDM, arXiv 2509.01025, with the targets of nanodlm/objectives/flex.
Data, optimizer, batch and steps are those of configs/quickstart.py. The network
is, too, except that it reads the time, and without convolutions; half of the
examples keep all but a span, as the prompts of gaps do.

Measured on one core of an AMD EPYC (Zen 5) that did other work (taskset -c 0
nice -n 5), float32, JAX 0.10.2, seed 0: 25 minutes, most of them waiting. The
bound on held-out stories, length included, was 37.4 +- 0.9 nats a story above
the truth (15.1); 52 and 40 +- 4 after 800 and 1600 steps (of 128 stories). A
masked model of that size, without convolutions, is 6 to 7 above it after 2400
steps. None of 64 samples was possible.

One gap in each story, of a share of its words, which could have several numbers
of words; at temperature 1, the share in which all words are right, and that in
which their number is. At most: that of the likeliest ones under the exact law;
drawn: of words drawn from it.

    share  gaps   right               at most  drawn    number    at most  drawn
    20%    33     0% (below 10%)      28%      14%      3 +- 6%   46%      38%
    40%    48     0% (below 8%)       23%      12%      6 +- 7%   46%      37%

The model inserts too much, and is far from trained. With the output matrix not
tied to the embedding, the loss was the same after 400 steps.

DreamOn, the quickstart's model tuned by 2400 steps more, which take 1 min 40 s
on two cores (--config=configs/quickstart.py --config.objective.expand=True
--config.checkpoint.init_from=runs/quickstart --config.tokenizer.name=run
--config.tokenizer.path=runs/quickstart --config.tokenizer.vocab_size=0
--config.optim.learning_rate=5e-3 --config.data.clean_infill_rate=0.5
--config.sampler.name=expand --config.sampler.temperature=1.0), one seed:

    20%    28     4 +- 14%            25%      13%      7 +- 16%  47%      39%
    40%    52     0% (below 7%)       24%      14%      0% (7%)   46%      39%

Gaps begin with four masks and grow one by one, while others become words.
"""

from ml_collections import config_dict

from nanodlm import config as configs

VARIANTS = {
  'flex': {
    'objective.name': 'flex',
    'model.time_conditioning': True,
    'sampler.num_steps': 200,
  },
  'expand': {
    'objective.expand': True,
    'optim.learning_rate': 5e-3,
    'sampler.name': 'expand',
  },
}


def get_config(name='flex'):
  config = configs.load('quickstart')
  config.data.clean_infill_rate = 0.5
  config.sampler = configs.load('base').sampler
  if name == 'expand':
    # A reference, so that --config.checkpoint.init_from=OTHER also changes the
    # tokenizer.
    start = config_dict.FieldReference('runs/quickstart')
    config.tokenizer.name = 'run'
    config.tokenizer.path = start
    config.tokenizer.vocab_size = 0
    config.checkpoint.init_from = start
  return configs.vary(config, VARIANTS, name)
