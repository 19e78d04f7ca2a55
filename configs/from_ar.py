r"""Turns an autoregressive model into one of blocks, which keeps both laws.

    python launch.py --mode=import --from=Qwen/Qwen3-0.6B --workdir=runs/qwen3
    python launch.py --config=configs/from_ar.py:runs/qwen3 \
        --workdir=runs/blocks --config.data.source='jsonl:corpus/*.jsonl'

"""

from nanodlm import config as configs


def get_config(workdir='runs/ar'):
  config = configs.start_from(workdir)
  config.objective = configs.load('base').objective
  config.objective.name = 'block'
  config.objective.block_size = 4
  # The clean copy stays the autoregressive model that it was.
  config.objective.ar_weight = 1.0
  config.model.shift_outputs = True
  config.sampler = configs.load('base').sampler
  return config
