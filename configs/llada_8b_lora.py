"""Tunes LLaDA-8B on prompts with responses, on one card, by adapters.

    python launch.py --mode=import --from=GSAI-ML/LLaDA-8B-Base \
        --workdir=runs/llada
    python launch.py --config=configs/llada_8b_lora.py --workdir=runs/tuned
    python launch.py --mode=compile --config=configs/llada_8b_lora.py \
        --topology=v5p:2x2x1 --vocab_size=126464 \
        --config.train.batch_size=64

The pairs are those of --config.data.source, see configs/sft.py. The base is
frozen in bfloat16; checkpoints hold the adapters alone and their optimizer's
state (0.5 GB).

Not yet run. Compiled ahead of time by the last command, for chips of 95 GiB
that each have a whole copy, with JAX 0.10.2's TPU compiler: per chip, 15.4 GiB
of arguments; 4 rows of 2048 tokens at a time, 4 times a step: a peak of 21.0
GiB; 16 rows of 4096 tokens at once: 56.0. Both fit a card of 80 GB.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('llada_8b')
  config.data.source = 'pairs:pairs.jsonl'
  config.data.length = 2048
  configs.set_start(config, 'runs/llada')
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.optim.learning_rate = 2e-4
  config.optim.warmup_steps = 50
  config.optim.schedule = 'cosine'
  config.optim.weight_decay = 0.0
  config.optim.ema_decay = 0.0
  config.train.batch_size = 16
  config.train.num_microbatches = 4
  config.train.num_steps = 2000
  config.train.eval_every_steps = 200
  config.eval.batch_size = 4
  config.checkpoint.every_steps = 200
  config.mesh.data = -1
  config.mesh.fsdp = 1
  return config
