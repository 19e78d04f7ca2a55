"""GPT-2 small as a masked diffusion model of 10B tokens of FineWeb-Edu.

    pip install -e '.[cuda,hf]'
    python launch.py --config=configs/fineweb_edu.py --workdir=runs/fineweb_edu

Source: HuggingFaceFW/fineweb-edu, config sample-10BT (Penedo et al., arXiv
2406.17557), from the Hugging Face Hub, in GPT-2's BPE, with a million tokens
held out. The paper trains autoregressive models and reports their scores on
tasks; we know of no published bound of a diffusion model of this size on this
text. Network and optimiser are those of configs/gpt2_small.py.

Not yet run.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('gpt2_small')
  config.data.source = 'hf:HuggingFaceFW/fineweb-edu:sample-10BT:text'
  # Four epochs of 10B tokens.
  config.train.num_steps = 76_000
  return config
