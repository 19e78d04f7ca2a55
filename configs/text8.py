"""GPT-2 small on text8, character by character, in rows of 256.

    python launch.py --config=configs/text8.py --workdir=runs/text8
    python launch.py --mode=eval --workdir=runs/text8 \
        --config.data.test_tokens=0

Source: the first 100 million characters of a cleaned Wikipedia, a to z and the
space, from mattmahoney.net/dc/text8.zip, unpacked as ./text8. The split is the
usual one: 90M characters for training, 5M for validation, and the last 5M for
the test, on which the second command evaluates (it prepares the text again,
with those held out). Bits/char of absorbing noise on the test split, with 12
layers and rows of 256: D3PM 1.45 (Austin et al., arXiv 2107.03006), SEDD 1.39
(Lou et al., arXiv 2310.16834), MD4 1.37 (Shi et al., arXiv 2406.04329).

Not yet run.

A character is a byte here, so that the reported bits/byte are bits/char; the
network has to learn that 229 of the 256 bytes never occur.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('gpt2_small')
  config.data.source = 'text:text8'
  config.data.length = 256
  config.data.crop = 'random'
  config.data.eval_tokens = 5_000_000
  config.data.test_tokens = 5_000_000
  config.tokenizer.name = 'bytes'
  # For one GPU; divide by the number of devices.
  config.train.num_microbatches = 8
  return config
