"""text8, character by character, in rows of 256: GPT-2 small's network.

    python launch.py --config=configs/text8.py --workdir=runs/text8
    python launch.py --mode=eval --workdir=runs/text8 --config.data.test_tokens=0

Source: the first 100 million characters of a cleaned Wikipedia, a to z and the
space, mattmahoney.net/dc/text8.zip, unpacked as ./text8. The split is the usual
one: 90M to train on, 5M for validation, the last 5M for the test, which the second
command evaluates on (it prepares the text again, with those held out). In
bits/char, of the test: D3PM 1.45 (Austin et al., arXiv 2107.03006), SEDD 1.39 (Lou
et al., 2310.16834), MD4 1.37 (Shi et al., 2406.04329), absorbing noise all, 12 layers
and rows of 256. Not yet run.

A character is a byte here, so that the reported bits/byte are bits/char; the
network has to learn that 229 of the 256 bytes never come.
"""

from configs import gpt2_small


def get_config():
  config = gpt2_small.get_config()
  config.data.source = 'text:text8'
  config.data.length = 256
  config.data.crop = 'random'
  config.data.eval_tokens = 5_000_000
  config.data.test_tokens = 5_000_000
  config.tokenizer.name = 'bytes'
  config.train.num_microbatches = 8  # on one GPU; divide by the devices
  return config
