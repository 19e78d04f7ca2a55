r"""Turns an autoregressive model into a block model that keeps its own law.

    python launch.py --mode=import --from=Qwen/Qwen3-0.6B --workdir=runs/qwen3
    python launch.py --config=configs/from_ar.py:runs/qwen3 \
        --workdir=runs/blocks --config.data.source='jsonl:corpus/*.jsonl'

The name after the colon is the workdir of the model to start from: an import
(GPT-2, Llama, Mistral, Qwen2, Qwen3), or a run with objective.name='ar'. Its
network, tokenizer and length are taken over; so are its batch and optimizer,
which an import has from configs/base.py. The clean copy stays the
autoregressive model, so that sampler.name='speculate' draws from its law, and
'block' from the new one.

Source: Fast-dLLM v2, arXiv 2509.26328 (shifted outputs); SDAR, arXiv 2510.06303
(same position: --config.model.shift_outputs=False).

Measured with seed 0 on one of the two cores of an AMD EPYC (Zen 5) that did
other work, float32, JAX 0.10.2. The base: the variant `ar` of
configs/objectives.py with rotary positions alone, exported as Qwen3 and
imported again; 0.2339 nats/token. Then 600 steps with --config.data.* and
train.* of that file, optim.name=muon and a rate of 5e-3. Nats a story above the
truth, of 256 held-out stories (of all 1507 after 600 steps), and the exact
autoregressive likelihood in nats/token after 600 steps:

    steps                       100    200    400    600
    shifted                    22.3    9.3    5.6    4.73 +- 0.14   0.2391
    same position              38.3   11.6    5.3    4.16 +- 0.15   0.2412
    shifted, ar_weight=0       20.5    8.5    5.2    4.38 +- 0.13
    from random weights,
      shifted                  25.1    8.7    5.3    4.36 +- 0.13   0.2441

What is kept is the autoregressive law. The block law of these little stories is
learnt as soon from random weights; shifted outputs help in the first 200 steps
only. None of this says how it is with a model that has read the Web.
"""

from nanodlm import config as configs


def get_config(workdir='runs/ar'):
  config = configs.start_from(workdir)
  config.objective = configs.load('base').objective
  config.objective.name = 'block'
  config.objective.block_size = 4
  config.objective.ar_weight = 1.0
  config.model.shift_outputs = True
  # Only this stays of the sampler of an autoregressive model.
  stops = config.sampler.stop_at_eos
  config.sampler = configs.load('base').sampler
  config.sampler.stop_at_eos = stops
  return config
