"""Metric writers: TensorBoard, absl's log, metrics.jsonl, Weights & Biases."""

from collections.abc import Iterator, Mapping
import contextlib
import io
import json
import pathlib
import sys
import time
from types import ModuleType
from typing import Any

import jax
import numpy as np

from nanodlm import workdir as workdirs
from nanodlm.training import checkpoint, metrics

# Values of each parameter in its histogram, evenly spaced.
HISTOGRAM_VALUES = 20_000


def _import_metric_writers() -> ModuleType:
  """Imports CLU's metric writers but the one that needs TensorFlow, 1.3 GB."""
  absent = ModuleType('clu.metric_writers.summary_writer')
  absent.SummaryWriter = None  # pyright: ignore[reportAttributeAccessIssue]
  sys.modules.setdefault(absent.__name__, absent)
  from clu import metric_writers

  return metric_writers


@contextlib.contextmanager
def open_writers(
  workdir: str, config: Mapping[str, Any], wandb_project: str
) -> Iterator[Any]:
  """Opens CLU's metric writer; only process 0 writes.

  Args:
    workdir: gets metrics.jsonl and TensorBoard's events.
    config: the config to log to Weights & Biases.
    wandb_project: project on Weights & Biases; '' is off.

  Raises:
    SaveError: the workdir could not be written, most likely a full disk.
  """
  metric_writers = _import_metric_writers()
  # Imported here since they take a second.
  import PIL.Image
  from tensorboard.compat.proto import event_pb2, summary_pb2
  from tensorboard.plugins.histogram import summary_v2 as histograms
  from tensorboard.plugins.hparams import summary_v2 as hparams_api
  from tensorboard.plugins.image import metadata as image_metadata
  from tensorboard.plugins.scalar import summary_v2 as scalars_api
  from tensorboard.plugins.text import summary_v2 as texts_api
  from tensorboard.summary.writer import event_file_writer
  from tensorboard.util import tensor_util

  protos: Any = event_pb2, summary_pb2  # Their classes are made at import.
  Event, Summary = protos[0].Event, protos[1].Summary

  # A MultiWriter without writers ignores what the class does not override.

  class JsonLines(metric_writers.MultiWriter):
    """Scalars as one JSON object per line."""

    def __init__(self):
      super().__init__([])
      path = pathlib.Path(workdir) / workdirs.METRICS
      is_cut = path.exists() and path.read_bytes()[-1:] not in (b'', b'\n')
      self._file = open(path, 'a')
      self._file.write('\n' * is_cut)

    def write_scalars(self, step, scalars):
      line = {'step': step} | metrics.finite_or_none(dict(scalars))
      self._file.write(json.dumps(line) + '\n')

    def flush(self):
      self._file.flush()

    def close(self):
      self._file.close()

  class TensorBoard(metric_writers.MultiWriter):
    """The events that CLU's SummaryWriter writes, without TensorFlow."""

    def __init__(self):
      super().__init__([])
      # Weights & Biases replaces this attribute of the module.
      self._events = event_file_writer.EventFileWriter(workdir)

    def _add(self, step, summary):
      self._events.add_event(
        Event(wall_time=time.time(), step=step, summary=summary)
      )

    def write_scalars(self, step, scalars):
      for tag, value in scalars.items():
        self._add(step, scalars_api.scalar_pb(tag, np.asarray(value)))

    def write_texts(self, step, texts):
      for tag, value in texts.items():
        self._add(step, texts_api.text_pb(tag, value))

    def write_histograms(self, step, arrays, num_buckets=None):
      for tag, value in arrays.items():
        buckets = (num_buckets or {}).get(tag)
        self._add(step, histograms.histogram_pb(tag, value, buckets))

    def write_hparams(self, hparams):
      self._add(0, hparams_api.hparams_pb(dict(hparams)))

    def write_images(self, step, images):
      # TensorBoard has a function for this, but it needs TensorFlow.
      metadata = image_metadata.create_summary_metadata(None, None)
      for tag, batch in images.items():
        height, width = batch.shape[1:3]
        parts = [str(width).encode(), str(height).encode()]
        for image in batch:
          PIL.Image.fromarray(image).save(png := io.BytesIO(), 'PNG')
          parts.append(png.getvalue())
        summary = Summary()
        summary.value.add(
          tag=tag,
          metadata=metadata,
          tensor=tensor_util.make_tensor_proto(parts),
        )
        self._add(step, summary)

    def flush(self):
      self._events.flush()

    def close(self):
      self._events.close()

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
    [TensorBoard(), metric_writers.LoggingWriter(), JsonLines()]
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
  for name, leaf in checkpoint.flatten(params).items():
    shards = {str(shard.index): shard.data for shard in leaf.addressable_shards}
    stride = -(-sum(x.size for x in shards.values()) // HISTOGRAM_VALUES)
    values[f'params/{name}'] = np.concatenate(
      [np.asarray(x.reshape(-1)[::stride]) for x in shards.values()]
    )
  return values
