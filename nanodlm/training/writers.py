"""Metric writers: TensorBoard, absl's log, metrics.jsonl, Weights & Biases."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any

import jax
import numpy as np

from nanodlm import workdir as workdirs
from nanodlm.training import checkpoint, metrics

# Values of each parameter in its histogram, evenly spaced.
HISTOGRAM_VALUES = 20_000


@contextlib.contextmanager
def open_writers(
  workdir: str, config: Mapping[str, Any], wandb_project: str
) -> Iterator[Any]:
  """Opens CLU's metric writer; only process 0 writes.

  Args:
    workdir: gets metrics.jsonl and TensorBoard's events.
    config: for Weights & Biases.
    wandb_project: there; '' is off.

  Raises:
    SaveError: the workdir could not be written, most likely a full disk.
  """
  # Imported here because they import TensorFlow, which takes seconds.
  from clu import metric_writers

  class JsonLines(metric_writers.MetricWriter):
    """Scalars as one JSON object per line; everything else is ignored."""

    def __init__(self):
      self._file = open(pathlib.Path(workdir) / workdirs.METRICS, 'a')

    def write_scalars(self, step, scalars):
      line = {'step': step} | metrics.finite_or_none(dict(scalars))
      self._file.write(json.dumps(line) + '\n')

    def flush(self):
      self._file.flush()

    def close(self):
      self._file.close()

    def _ignore(self, *args, **kwargs):
      pass

    write_summaries = write_images = write_videos = write_audios = _ignore
    write_texts = write_histograms = write_hparams = write_pointcloud = _ignore

  if jax.process_index():
    yield metric_writers.MultiWriter([])
    return
  if wandb_project:
    import wandb  # pyright: ignore[reportMissingImports]

    wandb.init(
      project=wandb_project,
      dir=workdir,
      config=dict(config),
      sync_tensorboard=True,
    )
  writer = metric_writers.MultiWriter(
    [
      metric_writers.SummaryWriter(workdir),
      metric_writers.LoggingWriter(),
      JsonLines(),
    ]
  )
  try:
    try:
      yield writer
    finally:
      writer.flush()
      writer.close()
  except OSError as error:
    raise checkpoint.SaveError(
      f'{workdir} could not be written: {error}'
    ) from error


def some_values(params: Any) -> dict[str, np.ndarray]:
  """Returns at most about HISTOGRAM_VALUES of each parameter, by its name.

  They come from what this process's devices hold: nothing is gathered, so that
  no other process takes part.
  """
  values = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    shards = {str(shard.index): shard.data for shard in leaf.addressable_shards}
    stride = -(-sum(x.size for x in shards.values()) // HISTOGRAM_VALUES)
    values[f'params/{name}'] = np.concatenate(
      [np.asarray(x.reshape(-1)[::stride]) for x in shards.values()]
    )
  return values
