"""GPT-2 small on the One Billion Word benchmark, in rows of 128 tokens.

    python launch.py --config=configs/lm1b.py --workdir=runs/lm1b

Source: TFDS's lm1b (Chelba et al., arXiv 1312.3005), evaluated on its test
split. MDLM (Sahoo et al., arXiv 2406.07524, table 1; batch 512, a million
steps) reports a perplexity of at most 27.0. BD3-LM (arXiv 2503.09573) reports,
with its own code, 31.8 for masked diffusion, 28.2 in blocks of 4, and 22.8 for
the autoregressive model.

Not yet run.

Differs from the papers: they use the tokenizer bert-base-uncased, this config
uses GPT-2's BPE. A perplexity per token then refers to other tokens and another
text (theirs is lower case) and cannot be compared with 27.0; use bits/byte to
compare runs. Sentences are packed with a separator between them, as in the
second paper, and not padded, as in table 1 of the first.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('gpt2_small')
  config.data.source = 'tfds:lm1b'
  config.data.length = 128
  # For one GPU; divide by the number of devices.
  config.train.num_microbatches = 4
  return config
