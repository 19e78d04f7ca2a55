"""Shape S2 of the speed comparison: a small network, a vocabulary of 50k.

    python launch.py --mode=benchmark --config=configs/bpe_small.py \
        --vocab_size=50258

4 layers, width 256, length 256, batch 8. The other projects' own model, loss
and optimiser were timed as installed, alternating, in two rounds.

Measured on two shared cores of an AMD EPYC (Zen 5, AVX-512), float32, JAX
0.10.2, PyTorch 2.13; a figure may vary by 20%. Peaks are the larger of two.

    training                      tokens/s        peak MB
    nanodlm, masked               4,622; 4,693      963
    nanoGPT, PyTorch eager        1,202; 1,258    2,788
    NanoDO, JAX                   1,828; 1,924    2,719

Of the 963 MB, about 185 are imports, 256 the state and 279 the temporaries of
a step. Model FLOPs reach 92% or more of the rate of XLA's matrix products in
the same run (462 to 508 GFLOP/s). The step is 1.73 times as fast as that of a
plain model of the same size (dense logits, Optax's cross entropy, XLA's
attention). The loss of 16,384 positions over 50,258 ids takes 5% of the
temporary memory of a dense one. On two Intel cores, where MKL is faster,
nanoGPT did not lead either.

Sampling 4 x 256 tokens in 128 calls: 311 tokens/s (fixed_count) and 157
(ancestral). On another day, alternating with MD4's code: 328 and 173, against
9.9 of its ancestral sampler (from 32 calls).
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.tokenizer.name = 'gpt2'
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  config.model.unroll = True
  config.model.mlp = 'relu2'  # The other projects' MLPs are not gated.
  config.model.qk_norm = False
  config.data.length = 256
  config.train.batch_size = 8
  # An eighth of the scored positions, to save memory.
  config.train.chunk_size = 130
  config.sampler.num_steps = 128
  return config
