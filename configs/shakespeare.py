r"""Tiny Shakespeare, byte by byte: 3.2M parameters, 1000 steps on a CPU.

    python launch.py --config=configs/shakespeare.py \
        --workdir=runs/shakespeare \
        --config.data.source=text:tinyshakespeare.txt

Source: char-rnn's corpus of 1.1M characters, by default from TFDS, which has
its own split. A file of it is split as nanoGPT does, with the first 90% to
train on. No paper reports a diffusion model of it; nanoGPT's autoregressive
model of 10.6M parameters reaches 2.12 bits/char (1.47 nats) on that split.

All that follows was measured on nanoGPT's split, on two cores of an AMD EPYC
(Zen 5), float32, JAX 0.10.2, with averaged weights and 8 noise draws.

This config: 2.814, 2.814 and 2.798 +- 0.018 bits/char (three seeds);
autoregressive (--config.objective.name=ar) 2.107 +- 0.027. For the same noise
interval independent times need 7.8 +- 1.4 times the network calls of the
default draws (--mode=eval --noise_examples).

The defaults were chosen with 2 layers, width 128 and 500 steps (two seeds each,
bits/char). Noise by count, squared ReLU and Muon at 5e-3 gave 3.191, 3.186;
a change of one of these gave

    stratified times  3.203, 3.191    SwiGLU, now the default   3.167, 3.145
    uniform times     3.213, 3.174    GELU                      3.193, 3.196
    Muon at 2e-3      3.233, 3.214    AdamW at its best, 1e-3   3.480, 3.385
    Muon at 1e-2      3.193, 3.199    without QK-norm           3.387, 3.363
                                      untied embeddings         3.211, 3.249

Objectives: 2 layers, width 128, 0.46M parameters (0.71M with time conditioning,
for hybrid, uniform and genmd4), 600 steps of 16 x 256 bytes, one seed,
--mode=compare with this config's autoregressive run as the judge. Perplexity of
16 samples of 256 bytes; held-out text has 3.5. Sampling speed at 256 calls.

    objective      bits/char       gen. ppl at  entropy in nats   tokens/s of
                                   16, 64, 256                    train, sample
    ar             2.281 +- 0.030  6.0 (256)    3.14              40,400 20,708
    genmd4         2.954 +- 0.025  -            -                 22,800 -
    block, 16      2.995 +- 0.017  521, 60, 33  3.13, 3.10, 3.16  28,700  5,967
                                   (at 31, 79 and 271 calls)
    d3pm, T=1000   3.123 +- 0.022  52, 43, 39   3.18, 3.19, 3.14  35,300    413
    masked         3.125 +- 0.018  51, 48, 41   3.18, 3.18, 3.15  56,000  1,240
    sedd           3.151 +- 0.017  54, 48, 47   3.15, 3.22, 3.16  42,600    416
    hybrid, p=0.1  3.294 +- 0.028  60, 57, 54   3.16, 3.21, 3.17  41,600    437
    uniform        3.397 +- 0.026  66, 62, 61   3.13, 3.10, 3.14  33,100    446

The intervals come from the choice of texts, which all runs share: differences
between runs are more certain. The order is that of the papers, with SEDD and
D3PM next to masked diffusion, as their bounds predict. Not as in its paper,
genmd4 leads masked diffusion by far: it noises each example twice per step, and
with twice the batch and time conditioning masked diffusion reaches 2.988 +-
0.018, with samples as good (judged by the table's autoregressive run: 26, 21
and 20 both; the table's masked run 33, 31 and 27). The claim that uniform noise
needs fewer calls does not show. Blocks with one or two calls per 16 bytes fall
apart. masked with fixed_count scores 45.1 with 25 calls and 41.7 with 256 (32
samples, +- 7%) at equal entropy; confidence scores 14 and 9.7 because it
collapses to few words (entropy 2.4 and 2.2 against 3.2). prefix_cache: 54 at 72
and 40 at 264 calls, against 48 at 64 and 41 at 256 without.

Few calls: the study of configs/objectives.py on this text (0.7M parameters,
1200 steps of 16 x 100 bytes, seed 0), judged by this config's autoregressive
run:

    python launch.py --mode=study --config=configs/objectives.py \
        --output=runs/study --judge=runs/ar --infill= --num_samples=64 \
        --samplers=auto,psi,speculate --num_steps=4,8,16,32,64 \
        --config.data.source=text:tinyshakespeare.txt \
        --config.data.crop=random --config.data.eval_fraction=0.1 \
        --config.tokenizer.name=bytes --config.tokenizer.vocab_size=0

Perplexity of 64 samples of 100 bytes (+- 8%; held-out text has 4.3) with psi at
these calls, and the entropy of a sample at 16 calls in nats (text: 3.04). Each
student follows its teacher. Blocks of 20 are sampled with 9, 19, 34 and 64.

                 bits/char          4    8   16   32   64   entropy
    masked       3.216 +- 0.024    98   70   54   46   45   3.02
      SDTT       3.251 +- 0.024    90   67   54   46   41   2.99
    curriculum   3.324 +- 0.043    79   56   46   37   35   2.96
      DCD        3.452 +- 0.047    80   57   50   42   36   2.98
    uniform      3.418 +- 0.044    94   69   55   45   40   2.98
      DCD        3.488 +- 0.047    84   62   56   46   47   2.95
    hybrid       3.400 +- 0.043   100   73   59   55   48   2.99
      DCD        3.453 +- 0.044    94   77   66   59   52   2.91
    block20      3.124 +- 0.025         556   94   55   41   3.00
      SDTT       3.197 +- 0.025         437   90   55   43   2.95
    block4       2.826 +- 0.037   192 with 49 calls, 48 with 74
    block4_ar    2.775 +- 0.047   187 with 49 calls, 48 with 74
      its own autoregressive law, 2.427: speculate 7.4 with 92 calls
    ar           2.370 +- 0.087   6.1 with 100 calls

With fixed_count, masked has 95, 64, 52, 48 and 44; with posterior, curriculum
has 83, 59, 50, 49 and 47. So uniform noise with Duo's curriculum and psi has
the lowest perplexity at every number of calls, although its bound is worse than
that of masked noise; its samples have an entropy lower by 0.03 to 0.07 nats.
Distillation gains at most a tenth at 4 and 8 calls, of blocks a fifth at 9, and
nothing at 32 and 64; entropy falls. The autoregressive loss does not hurt the
bound of blocks.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.data.source = 'tfds:tiny_shakespeare'
  config.data.length = 128
  config.data.crop = 'random'
  config.data.eval_fraction = 0.1
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  # Characters are predicted from their nearest neighbours, which need high
  # frequencies: 10,000 was worse by 0.05 bits/char after 250 steps.
  config.model.rope_theta = 100.0
  config.model.unroll = True
  config.optim.name = 'muon'
  config.optim.learning_rate = 5e-3
  config.train.batch_size = 32
  config.train.num_steps = 1000
  config.train.log_every_steps = 50
  config.train.eval_every_steps = 500
  config.train.chunk_size = 4096
  config.eval.max_examples = 128
  return config
