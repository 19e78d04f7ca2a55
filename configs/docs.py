"""A masked diffusion model of CPython's own documentation, on a laptop.

    python launch.py --config=configs/docs.py --workdir=runs/docs

3.7M parameters, 300 steps of 32 x 128 tokens. It needs no network and no files:
the text ships with Python, and the tokenizer is trained on it.

Measured on two cores of an AMD EPYC (Zen 5), float32, JAX 0.10.2: 2 min 25 s in
all; the first step comes 13.9 s after the start, 9.2 s in a resumed run. The
bound on held-out documents was 4.9519 +- 0.0747 nats/token, 2.4947 +- 0.0572
bits/byte.

Objectives on the same text and tokenizer: 2 layers, width 128, 0.69M parameters
(0.94M with time conditioning, for hybrid, uniform and genmd4), 600 steps of 16
x 256 tokens, one seed, --mode=compare with the autoregressive run of this table
as the judge. Perplexity of 32 samples of 256 tokens; held-out text has 38.

    objective      bits/byte       gen. ppl at    entropy in nats    training
                                   16, 64, 256                       tokens/s
    ar             1.843 +- 0.072  31 (256)       5.98                 37,400
    genmd4         2.179 +- 0.072  354, 279, -    5.98, 6.00           17,300
    block, 16      2.269 +- 0.072  6431, 599,     5.99, 5.93, 5.87     28,100
                                   313 (at 31, 79 and 271 calls)
    masked         2.424 +- 0.074  817, 706, 484  5.97, 5.95, 5.73     38,400
    sedd           2.443 +- 0.074  994, 742, 640  5.98, 5.86, 5.85     39,100
    d3pm, T=1000   2.461 +- 0.076  923, 767, 803  6.00, 5.95, 6.00     39,800
    hybrid, p=0.1  2.510 +- 0.077  741, 487, 530  5.74, 5.55, 5.68     31,200
    uniform        2.545 +- 0.077  943, 727, 704  5.93, 5.82, 5.84     31,500

The intervals come from the choice of texts, which all runs share: differences
between runs are more certain. masked with the sampler prefix_cache: 963 at 40
and 623 at 264 calls, against 706 at 41 and 484 at 256 without; 1.8 to 3.8 times
as fast.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.data.length = 128
  config.data.crop = 'random'
  config.data.eval_fraction = 0.03
  config.tokenizer.name = 'sentencepiece'
  config.tokenizer.vocab_size = 2048
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  config.model.rope_theta = 100.0
  config.model.unroll = True
  config.optim.name = 'muon'
  config.optim.learning_rate = 5e-3
  config.optim.warmup_steps = 50
  config.train.batch_size = 32
  config.train.num_steps = 300
  config.train.log_every_steps = 20
  config.train.eval_every_steps = 100
  config.train.chunk_size = 2064
  config.eval.num_draws = 8
  config.eval.max_examples = 64
  config.sampler.num_steps = 64
  config.checkpoint.every_steps = 100
  return config
