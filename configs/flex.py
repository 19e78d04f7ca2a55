"""Stories with gaps of any length, by FlexMDM or DreamOn, on a laptop.

    python launch.py --config=configs/flex.py --workdir=runs/flex
    python launch.py --mode=sample --workdir=runs/flex \
        --prompt='One warm evening, Ada met Ben in {*}. Ada had {*}'
    python launch.py --mode=eval --workdir=runs/flex --infill=0.2,0.4 \
        --infill_examples=200

DreamOn tunes the model of configs/quickstart.py:

    python launch.py --config=configs/quickstart.py --workdir=runs/quickstart
    python launch.py --config=configs/flex.py:expand --workdir=runs/expand

Sources: FlexMDM, arXiv 2509.01025, with the targets of nanodlm/objectives/flex;
DreamOn, nanodlm/samplers/expand. Data and network are those of
configs/quickstart.py, except that FlexMDM's reads the time; half of the
examples keep all but a span, as the prompts of gaps do.

Measured on one core of an AMD EPYC (Zen 5) next to other work, float32, JAX
0.10.2, seed 0. FlexMDM took 407 s, and DreamOn 229 s more than the quickstart.
FlexMDM's bound on held-out stories, length included, was 29.7 +- 0.8 nats a
story above the truth (15.1); 35 and 30 +- 3 after 1000 and 1500 steps (of 128
stories). Without convolutions it was 37.4 after 2400 steps. DreamOn's bound for
texts of a given length rose from 4.2 to 9.8.

One gap in each story, of a share of its words, which could have several numbers
of words (18 and 38 of 200 stories); at temperature 1, the share in which all
words are right, and that in which their number is. At most: that of the
likeliest ones under the exact law; drawn: of words drawn from it.

             gaps  right           at most  drawn   number    at most  drawn
    FlexMDM  20%    0% (under 18%)   24%     12%     0% (18%)   46%     37%
             40%    0% (under 9%)    21%     10%     3 +- 11%   40%     33%
    DreamOn  20%   11 +- 22%         24%     12%    22 +- 23%   46%     37%
             40%   11 +- 14%         21%     10%    18 +- 15%   40%     33%

FlexMDM inserts too much, and is far from trained. With the output matrix not
tied to the embedding, the loss was the same after 400 steps. DreamOn's gaps
begin with four masks. If each call fills a random mask (sampler.score=random)
instead of the most confident one, 11% and 0% are right, and 17% and 0% of the
numbers.
"""

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
    configs.set_start(config, 'runs/quickstart')
  return configs.vary(config, VARIANTS, name)
