"""configs/llada_8b.py for 256 chips of a TPU v5e, of 16 GB each.

    python launch.py --config=configs/llada_8b_v5e.py --workdir=runs/llada_8b
    python launch.py --mode=compile --config=configs/llada_8b_v5e.py \
        --topology=v5e:16x16

Four chips share the heads, the MLP and the vocabulary, because the two gathered
vocabulary matrices and their gradients (8 GB) would fill half of a chip; 64
split each copy of the parameters and the batch.

Not yet run. Compiled ahead of time by the second command, as estimated by the
TPU's compiler: 5 rows per chip in 10 micro-batches, 6.3 GiB of temporaries, 6.8
of 15.75 GiB per chip in all, 13,891 Mcycles (9.3 s) per step of 5.2M tokens,
58% of the peak rate in model FLOPs, without the time spent waiting for
collectives (390 GB per step and chip). Fewer micro-batches, which would gather
less often, were not tried.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('llada_8b')
  config.train.num_microbatches = 10  # 2 rows per chip.
  config.mesh.tensor = 4
  return config
