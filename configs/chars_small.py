"""Shape S1 of the speed comparison: nanoGPT's character-level model.

    python launch.py --mode=benchmark --config=configs/chars_small.py \
        --vocab_size=67

6 layers, width 384, length 256, batch 16. The other projects' own model, loss
and optimiser were timed as installed, alternating, in two rounds.

Measured on two shared cores of an AMD EPYC (Zen 5, AVX-512), float32, JAX
0.10.2, PyTorch 2.13; a figure may vary by 20%. Peaks are the larger of two.

    training                      tokens/s        peak MB
    nanodlm, masked               4,796; 4,643    1,516
    nanoGPT, PyTorch eager        2,713; 2,721    1,872
    NanoDO, JAX                   2,242; 2,517    3,026

Model FLOPs reach 66 and 68% of the rate of XLA's matrix products in the same
run (462 to 508 GFLOP/s), and the step is 1.34 times as fast as that of a plain
model of the same size (dense logits, Optax's cross entropy, XLA's attention).
A step waits 0.1 to 0.2% of its time for its batch (train/data_wait_share);
batches of 64 x 1024 tokens are read at 38.6 (rows) and 15.2 (random windows)
million tokens/s. MKL is slow on AMD: on two Intel cores nanoGPT led here, with
3,693 tokens/s against 2,870.

Sampling 4 x 256 tokens in 128 calls: 136 tokens/s (fixed_count) and 130
(ancestral). On another day, alternating with MD4's code: 141 (fixed_count),
against 125 of its top-p sampler. Block diffusion with 16 tokens and 8 calls per
block: 407 tokens/s with the cache and 39 without, for the same tokens. The
autoregressive sampler with its cache: 393.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.model.num_layers = 6
  config.model.embed_dim = 384
  config.model.num_heads = 6
  config.model.unroll = True
  config.model.mlp = 'relu2'  # The other projects' MLPs are not gated.
  config.model.qk_norm = False
  config.data.length = 256
  config.train.batch_size = 16
  config.train.chunk_size = 4096
  config.sampler.num_steps = 128
  return config
