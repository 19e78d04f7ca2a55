r"""A masked diffusion model of little stories, on a laptop, in 2.5 minutes.

python launch.py --config=configs/quickstart.py --workdir=runs/quickstart

0.7M parameters, 2000 steps of 16 stories. It needs no network and no files: the
stories come from a program that knows their probability, and the tokenizer,
trained on them, makes every word a token.

Measured on two cores of an AMD EPYC (Zen 5), float32, JAX 0.10.2, seeds 0, 1
and 2, without prepared text or compiled programs: 151, 146 and 147 s in all,
with evaluations every 500 steps; seed 0 took 142 s with the present ones. The
bound on held-out stories was 4.19, 4.33 and 4.37 +- 0.6 nats a story above the
truth (15.1). Of 256 samples 253, 239 and 220 are possible, and 81, 74 and 51%
are different. After 8000 steps, eight minutes at this speed, seed 0 was 1.91 +-
0.57 above it, and 255 of 256 were possible, 80% different. On an older
processor (two cores of a Zen 2, JAX 0.12) seed 0 took 259 s, 30 of them until
the first step; it was 4.21 above the truth, and 250 of 256 samples were
possible, 66% different.

Steps decide more than anything else. Three models of 2400 steps with
optim.momentum=0.95, which took 20 s more, were 3.91, 4.27 and 4.01 above the
truth; after 12,000 steps, one was 1.61 +- 0.57 above it. Samplers: the share of
possible stories, the share that are different, and the divergence of their
words and phrases from the law's (configs/objectives.py), of 128 samples of each
of the three models. Means; in brackets, the models one by one.

                                        possible          different  divergence
    confidence, score='max_prob',
      temperature 1, 100 calls          98% (100, 97, 96)    83%       0.040
      score='margin', temperature 0.3   96% (98, 96, 93)     96%       0.050
    remask, rescale, eta=0.5,
      temperature 0:
      400 calls (96 samples)            89% (90, 84, 92)    100%       0.012
      200 calls (96 samples)            82% (83, 80, 82)    100%       0.011
      temperature 1, top_p=0.8,
      400 calls (64 samples)            77% (77, 77, 77)    100%       0.005

Of 256 samples of the first, 255, 245 and 244 are possible. After 12,000 steps
(one seed): confidence 100% of 256, 75% different, 0.047; remask at temperature
0, 200 calls, 91%, 99% different, 0.009.

    python launch.py --mode=sample --workdir=runs/quickstart \
        --config.sampler.num_samples=128 \
        --samplers='remask:num_steps=400;remask=rescale;eta=0.5;temperature=0'

says how many are possible, and different. The divergence is 0 if each word and
phrase is as frequent as in the law; of 64, 96 and 128 stories of the law itself
it is 0.0020, 0.0014 and 0.0011. The default, which keeps the word drawn with
the highest probability, writes what is possible, but not all of it: some things
and events are rare in its stories. Remasking, whose order is random, is nearer
the law.

What decides how soon a masked model copies names, things and colours (nats a
story above the truth after 1200 steps, +- 0.6, one seed):

    no convolutions                                      10.4
    of 5 tokens, at the input of the attention            7.5
    of 13 tokens, there                                   7.0
                  on the residual stream                  6.4
                  on both: model.conv_size=13             6.2
    on both, of 7 and 21 tokens                           6.8 and 6.3
      rates of 6e-3 and 2e-2                              6.3 and 7.0
      8 heads; 4 layers of width 112                      6.6 and 6.4
      momentum 0.9, 0.85 and 0.8 (above: 0.95)     5.8, 5.9 and 5.5

Which facts are learned last, such as whose thing a child wants, is chance, and
decides the share of possible samples: with the momentum of 0.9, it was 88, 90
and 90% of 256 after 1800 steps (seeds 0, 1, 2), at 4.4 to 4.6 nats. 3600 steps
of 8 stories (rate 8e-3; margin at temperature 0.3) had 84, 92 and 99% of 128 at
4.6 to 4.3 nats, but took 165 s, since two cores share small steps badly.

Without convolutions, three models of 2400 steps were 6.1 to 7.2 above it, and
65 to 71% of their samples were possible. Steps take 11 to 19% longer with them.
Without them, in an earlier small world whose truth was 15.4 nats (+- 0.7 to
1.0):

    rotary positions                                     18.5
    learned positions                                    22.2
    both                                                 13.0
      without QK-norm                                    14.4
      output matrix not tied to the embedding            15.9
      Adam's b2=0.95, rate 2e-2                          14.1
      rope_theta=10_000 (above: 100), EMA off, 8 heads,
      batches of 8 and twice the steps,
      or 6 layers of width 96                    12.5 to 12.9
    rotary, half of the examples with a clean prefix     21.1
            half of them with all clean but a span       19.2

To a network that is not causal and has rotary positions alone, all places of a
canvas of masks are alike: the model of 18.5 needs 4.0 nats for a token of such
a canvas, that of 13.0 needs 2.1. With an embedding of the default standard
deviation, 0.02, names are not copied at all after 1200 steps: words that occur
in the same places start close together.

What must differ is learned last, since it costs little in the bound. Where both
children had one of the same four things, 3% of 64 samples were possible at 10.0
nats above the truth, 45 of them because both had the same; with things of their
own, 72% at 6.4.

After 2400 steps, a block model of the same size (S = 4) was 0.20 +- 0.09 nats a
story above the truth and an autoregressive one 0.04 +- 0.01; after 24,000,
-0.02 +- 0.08 (the noise of a bound) and 0.02 +- 0.01 (one seed each,
--config=configs/objectives.py:block4 and :ar).

What is wrong in samples of remask, such as the colour of a thing that was
painted, is not what a sampler can find afterwards. Without convolutions, of
samples of which 78% were possible, each with its least probable word, given all
others, replaced by the most probable one, three times over, 82% were (96
samples).
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
  config.model.num_positions = 100
  config.model.keep_rotary = True
  config.model.conv_size = 13
  config.model.embedding_std = 0.5
  config.model.unroll = True
  config.optim.name = 'muon'
  config.optim.learning_rate = 1e-2
  config.optim.momentum = 0.9
  config.optim.warmup_steps = 50
  config.optim.weight_decay = 0.0
  config.train.batch_size = 16
  config.train.num_steps = 2000
  config.train.log_every_steps = 200
  config.train.num_samples = 4
  config.train.eval_every_steps = 1000
  config.train.chunk_size = 1024
  config.eval.num_draws = 4
  config.eval.max_examples = 128
  config.sampler.name = 'confidence'
  config.sampler.num_steps = 100
  config.checkpoint.every_steps = 1000
  return config
