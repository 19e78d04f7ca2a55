"""configs/llada_8b.py for 256 chips of a v5e, which have 16 GB each.

    python launch.py --config=configs/llada_8b_v5e.py --workdir=runs/llada_8b
    python launch.py --mode=compile --config=configs/llada_8b_v5e.py \
        --topology=v5e:16x16

Four chips share the heads, the MLP and the vocabulary, whose two gathered matrices
and gradients (8 GB) would fill half of a chip; 64 split each copy and the batch.
Never run. Compiled ahead of time, by the compiler's estimate: 6.8 of 15.75 GiB a
chip, 9.3 s a step (5.2M tokens), 58% of the peak rate in model FLOPs, waiting for
390 GB of collectives a step and chip not counted. Fewer micro-batches, which gather
less often, were not tried.
"""

from configs import llada_8b


def get_config():
  config = llada_8b.get_config()
  config.train.num_microbatches = 10  # 2 rows a chip
  config.mesh.tensor = 4
  return config
