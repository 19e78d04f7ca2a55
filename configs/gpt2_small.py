"""GPT-2 small as a masked diffusion model of OpenWebText, length 1024.

    pip install -e '.[cuda,hf]'
    python launch.py --config=configs/gpt2_small.py --workdir=runs/gpt2_small

12 layers, width 768. The settings follow MDLM on OpenWebText (Sahoo et al.,
arXiv 2406.07524): batch 512, learning rate 3e-4, 2500 warm-up steps, EMA
0.9999. The paper's perplexity is at most 23.2, and 17.5 for its autoregressive
model, on another held-out part.

OpenWebText comes from the Hugging Face Hub, in GPT-2's BPE, with a million
tokens held out. Prepare it once, with N processes:

    python launch.py --mode=prepare --config=configs/gpt2_small.py \
        --prepare_workers=N

Other sources, with --config.data.source=SOURCE:

    hf_tokens:NeelNanda/openwebtext-tokenized-9b   9B ids in rows of 1024
    tokens:openwebtext-tokenized-9b/**/*.parquet   the same, downloaded
    tfds:wikipedia/20230601.en                     TFDS lacks OpenWebText
    text:my/*.txt.gz

Not yet run. Measured and estimated so far:

Preparing 1 GB of text (CPython's documentation in random order with some words
replaced, JSONL to ArrayRecord, 273,112,724 tokens, two processes on two cores
of an AMD EPYC): 10.4M tokens/s, or 4.92M per second of processor time, 81% of
tiktoken alone (6.04M). Memory of all processes: 712 MB at 100 MB of text, 770
MB at 1 GB. Command: NANODLM_BIG_CORPUS=1 pytest -s tests/data/encoder_test.py
-k gigabyte.

A training step on a TPU v5e:2x2, as estimated by its compiler, not measured:

    attention       layers     rows per chip  temporaries  Mcycles  utilisation
                                              in GiB
    XLA             scanned    8              13.6         292      18%
    Pallas kernels  scanned    4; 8           2.6; 4.5     74; 131  36; 41%
                               16; 32         7.0; 13.0    240; 466 44; 46%
    Pallas kernels  unrolled   8; 16; 32      2.9; 5.4;    88; 169; 60; 63;
                    (default)                 9.7          331      64%

    python launch.py --mode=compile --config=configs/gpt2_small.py \
        --topology=v5e:2x2 --vocab_size=50258 --config.train.batch_size=32 \
        --config.train.num_microbatches=1

and --config.model.unroll=False for scanned layers, which compile in a quarter
of the time. Utilisation is that of model FLOPs. Kernels count as the larger of
FLOPs / peak rate and bytes / bandwidth, which is a lower bound of their time.
The Pallas kernels serve lengths that are multiples of 128, up to 4096 keys in
bfloat16 and 2048 in float32.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.data.source = 'hf:Skylion007/openwebtext'
  config.data.length = 1024
  config.data.eval_fraction = 0.0
  config.data.eval_tokens = 1_000_000
  config.tokenizer.name = 'gpt2'
  config.model.num_layers = 12
  config.model.embed_dim = 768
  config.model.num_heads = 12
  config.model.dtype = 'bfloat16'
  config.model.unroll = True
  config.optim.learning_rate = 3e-4
  config.optim.warmup_steps = 2500
  config.optim.schedule = 'constant'
  config.optim.b2 = 0.999
  config.optim.weight_decay = 0.03
  config.optim.ema_decay = 0.9999
  config.train.batch_size = 512
  config.train.num_steps = 1_000_000
  # For one GPU; divide by the number of devices.
  config.train.num_microbatches = 32
  config.train.chunk_size = 4096
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 10_000
  config.eval.batch_size = 64
  config.eval.max_examples = 512
  config.checkpoint.every_steps = 2_000
  config.checkpoint.keep_period = 100_000
  return config
