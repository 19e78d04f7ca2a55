"""GPT-2 small as a masked diffusion model of FineWeb-Edu, its sample of 10B tokens.

    python launch.py --config=configs/fineweb_edu.py --workdir=runs/fineweb_edu

Source: HuggingFaceFW/fineweb-edu, config sample-10BT (Penedo et al., arXiv
2406.17557), from Hugging Face (pip install -e '.[hf]'), in the GPT-2 BPE, a million
tokens held out. The paper trains autoregressive models and gives their scores on
tasks; we know of no bound of a diffusion model of this size on this text. Network
and optimiser are those of configs/gpt2_small.py. Not yet run.
"""

from configs import gpt2_small


def get_config():
  config = gpt2_small.get_config()
  config.data.source = 'hf:HuggingFaceFW/fineweb-edu:sample-10BT:text'
  # Four epochs of 10B tokens.
  config.train.num_steps = 76_000
  return config
