"""Diffusion language models in JAX: train, evaluate, sample and tune them.

    import nanodlm
    lm = nanodlm.load('runs/quickstart')
    lm.sample('The {} is {5}.', num_samples=2)   # texts
    lm.bound(['Some text.'])                     # nats, bits/byte, intervals
    lm.logits(lm.tokenizer.encode('Some text.'))  # [L, V]

Notation, in all modules:

    x0 [B, L]       clean tokens, int32
    xt, xs [B, L]   noisy tokens at times s < t
    t, s [B]        time, 0 clean, 1 noise
    alpha_t         probability that a token is kept at time t
    logits [B, L, V], log_p   float32
    hidden [B, L, D]          before the output projection
    loss, nll       what is minimised; what is reported, nats per token
    fixed [B, L]    bool, positions that a sampler may not touch
    key [], keys [B]          random keys: of a batch, of each example
    mask_id         the mask's id, the largest one; vocab_size includes it
"""

from typing import Any

__version__ = '0.1.0'


def load(workdir: str, *, step: int = 0) -> Any:
  """Loads a trained run; see `nanodlm.lm.LanguageModel`.

  Args:
    workdir: the run's workdir, as given to --workdir.
    step: step of the checkpoint; 0 is the last one.

  Raises:
    InputError: there is no such run or checkpoint, or it is damaged.
  """
  from nanodlm import lm  # Here, so that importing the package stays cheap.

  return lm.load(workdir, step=step)
