"""The One Billion Word benchmark in rows of 128 tokens: GPT-2 small's network.

    python launch.py --config=configs/lm1b.py --workdir=runs/lm1b

Source: TFDS's lm1b (Chelba et al., arXiv 1312.3005), whose test split is what is
evaluated on. MDLM (Sahoo et al., arXiv 2406.07524, table 1; batch 512, a million
steps) has a perplexity of at most 27.0, and BD3-LM (arXiv 2503.09573) in its own
code 31.8 masked, 28.2 in blocks of 4 and 22.8 autoregressive. Not yet run.

Differs from the papers: their tokenizer is bert-base-uncased, here it is the
GPT-2 BPE. Perplexities per token of the two are of other tokens and another text
(theirs is lower case), so nothing here compares with 27.0; bits/byte is what can
be compared between runs. Sentences are packed, with a separator between them, as
in the second paper, and not padded, as in the first's table 1.
"""

from configs import gpt2_small


def get_config():
  config = gpt2_small.get_config()
  config.data.source = 'tfds:lm1b'
  config.data.length = 128
  config.train.num_microbatches = 4  # on one GPU; divide by the devices
  return config
