"""Tiny Shakespeare, byte by byte: 3.2M parameters, 1000 steps, CPU.

    python launch.py --config=configs/shakespeare.py --workdir=runs/shakespeare \
        --config.data.source=text:tinyshakespeare.txt

Source: char-rnn's corpus, 1.1M characters, by default from TFDS, which has a split
of its own. A file of it is cut as nanoGPT cuts it (first 90% to train on). There is
no paper's number; nanoGPT's own autoregressive model of 10.6M parameters has 2.12
bits/char (1.47 nats) on that split. Run on that split on a CPU: the bound was 2.81
bits/char, 2.11 with --config.objective.name=ar (more in the README).
"""

from configs import base


def get_config():
  config = base.get_config()
  config.data.source = 'tfds:tiny_shakespeare'
  config.data.length = 128
  config.data.crop = 'random'
  config.data.eval_fraction = 0.1
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  # Characters are predicted from near neighbours, which high frequencies tell
  # apart: 10,000 was behind by 0.05 bits/char after 250 steps.
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
