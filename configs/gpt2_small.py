"""GPT-2 small as a masked diffusion model: 12 layers, width 768, length 1024.

    python launch.py --config=configs/gpt2_small.py --workdir=runs/gpt2_small

The settings follow MDLM on OpenWebText (Sahoo et al., arXiv 2406.07524): batch
512, learning rate 3e-4, 2500 warm-up steps, EMA 0.9999; the paper's perplexity is
at most 23.2, and 17.5 of its autoregressive model, on another held-out part.
Not yet run at full length.

OpenWebText comes from Hugging Face (pip install -e '.[hf]'), in the GPT-2 BPE; a
million tokens are held out. Prepare it once, with N processes:

    python launch.py --mode=prepare --config=configs/gpt2_small.py \
        --prepare_workers=N

Other sources, with --config.data.source=
    hf_tokens:NeelNanda/openwebtext-tokenized-9b   9B ids in rows of 1024
    tokens:'openwebtext-tokenized-9b/**/*.parquet'   the same, downloaded
    tfds:wikipedia/20230601.en                     TFDS has no OpenWebText
    text:'my/*.txt.gz'

On TPUs, by the compiler's estimate only (--mode=compile, v5e, 8 rows a chip): a step
takes 88 Mcycles, 60% of the peak rate in model FLOPs, and 4.7 GiB; 131 Mcycles
in a scan over the layers (unroll=False), which compiles in a quarter of the time.
"""

from configs import base


def get_config():
  config = base.get_config()
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
  config.train.num_microbatches = 32  # on one GPU; divide by the devices
  config.train.chunk_size = 4096
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 10_000
  config.eval.batch_size = 64
  config.eval.max_examples = 512
  config.checkpoint.every_steps = 2_000
  config.checkpoint.keep_period = 100_000
  return config
