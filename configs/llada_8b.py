"""The shape of LLaDA-8B: 32 layers, width 4096, length 4096, 8.0B parameters.

    python launch.py --config=configs/llada_8b.py --workdir=runs/llada_8b
    python launch.py --mode=compile --config=configs/llada_8b.py \
        --topology=v5p:4x4x4

For 64 chips of a TPU v5p (v5p-128); the parameters, their average and the
optimiser's state are split over all of them. The settings follow the paper (Nie
et al., arXiv 2502.09992, section 2.2 and its published config): batch 1280,
peak learning rate 4e-4, 2000 warm-up steps, 126,464 ids.

Not yet run. Compiled ahead of time by the second command, as estimated by the
TPU's compiler: 20 rows per chip in 5 micro-batches, 23.7 GiB of temporaries,
25.6 of 95 GiB per chip in all, 26,264 Mcycles (15.0 s) per step of 5.2M tokens,
61% of the peak rate in model FLOPs, without the time spent waiting for
collectives (301 GB per step and chip).
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.data.source = 'tfds:c4/en'
  config.data.length = 4096
  config.data.eval_fraction = 0.005
  config.tokenizer.name = 'sentencepiece'
  # A separator and the mask are added.
  config.tokenizer.vocab_size = 126_462
  config.model.num_layers = 32
  config.model.embed_dim = 4096
  config.model.num_heads = 32
  config.model.mlp_dim = 12_288
  config.model.qk_norm = False
  config.model.tie_embeddings = False
  config.model.rope_theta = 500_000.0
  config.model.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.optim.learning_rate = 4e-4
  config.optim.warmup_steps = 2000
  config.optim.schedule = 'wsd'
  config.optim.weight_decay = 0.1
  config.optim.b2 = 0.95
  config.optim.ema_decay = 0.9999
  config.train.batch_size = 1280
  config.train.num_steps = 440_000  # 2.3T tokens.
  config.train.num_microbatches = 5
  config.train.chunk_size = 2048
  config.train.log_every_steps = 20
  config.train.eval_every_steps = 10_000
  config.eval.batch_size = 64
  config.eval.max_examples = 512
  config.checkpoint.every_steps = 1_000
  config.checkpoint.keep_period = 50_000
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
