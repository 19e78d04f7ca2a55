"""Prepares text: from a source to rows of exactly L tokens on disk, once.

The result is a TFDS dataset of ArrayRecord files, in a folder whose name is a
hash of everything that determines its content, so it is prepared once.

There are two stages, each run by one process, several, or Beam (see
`encoder.Engine`): parts of the source to files of token ids, which is nearly
all of the work and is kept if it is interrupted, then rows from those files.
Between them the documents to hold out are chosen. Nothing needs TensorFlow.

    python launch.py --mode=prepare --config=configs/gpt2_small.py \
        --prepare_workers=16

encodes with 16 processes and logs documents, tokens, tokens/s and progress. Any
number of them leaves the same files. If it is interrupted and run again it
keeps the parts that are finished (16 MB of a file, a row group of Parquet, 4096
rows of a dataset; a compressed file is one part). manifest.json in the prepared
folder has the number of documents, tokens and bytes, the fingerprint of the
tokenizer, the source and the versions of packages.

On a cluster that Apache Beam supports (pip install -e '.[beam]') add
--prepare_engine=beam, --config.data.data_dir=/shared/data and --beam_options:

    this machine        direct_num_workers=8,
                        direct_running_mode=multi_processing
    Flink               runner=FlinkRunner,flink_master=HOST:8081,
                        environment_type=EXTERNAL,
                        environment_config=HOST:50000
    Spark               runner=SparkRunner,spark_master_url=spark://HOST:7077,
                        environment_type=EXTERNAL,
                        environment_config=HOST:50000
    Spark, job server   runner=PortableRunner,job_endpoint=HOST:8099,
                        environment_type=LOOPBACK
    Dataflow            runner=DataflowRunner,project=P,region=R,
                        temp_location=gs://B/tmp,sdk_container_image=IMAGE
                        (pip install 'apache-beam[gcp]')

Workers need nanodlm installed, and must see data.data_dir and the files of the
source under the same paths (NFS, Filestore). Only Beam's local runner has been
tested.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
from importlib import metadata as packages
import json
import logging
import os
import pathlib
import platform
import shutil
from typing import Any

from absl import flags
import numpy as np

from nanodlm.data import encoder, pack, sources, split, tokenizers
from nanodlm.data import folder as folders
from nanodlm.data import packed as packed_data
from nanodlm.data.config import DataConfig, TokenizerConfig
from nanodlm.data.packed import PackedData, SPLITS
from nanodlm.data.sources import base
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.types import InputError

# Part of the folder's name: increase it when the content of the rows changes.
_FORMAT_VERSION = 1

_log = logging.getLogger('nanodlm')


def prepare(
  data_config: DataConfig,
  tokenizer_config: TokenizerConfig,
  engine: encoder.Engine | None = None,
) -> PackedData:
  """Opens the dataset that the config describes, building it if it is missing.

  The build can be interrupted, and several processes may prepare at once; see
  `folder`.

  Args:
    data_config: `config.data`. eval_fraction is a share of the text's bytes.
    tokenizer_config: `config.tokenizer`. A model that is trained, on the
      training text, is kept with the dataset.
    engine: what does the work, by default this process.

  Raises:
    InputError: the source or tokenizer is missing or damaged, the text is
      shorter than a row, or data_dir cannot be written.
  """
  engine = engine or encoder.ThisProcess()
  mixture = sources.parse_mixture(data_config.source)
  if len(mixture) == 1:
    return _prepare(data_config, tokenizer_config, engine)
  if tokenizer_config.is_trained:
    raise InputError(
      f"tokenizer.path='' trains a model on the source, but data.source="
      f'{data_config.source!r} has several; name a model'
    )
  all_packed = []
  for _, source in mixture:
    config = dataclasses.replace(data_config, source=source)
    all_packed.append(_prepare(config, tokenizer_config, engine))
  return packed_data.mix(data_config.source, all_packed)


def _prepare(
  data_config: DataConfig,
  tokenizer_config: TokenizerConfig,
  engine: encoder.Engine,
) -> PackedData:
  """Prepares a single source."""
  root = folders.find_root(data_config.data_dir)
  source = sources.make_source(data_config.source, str(root))
  name = tokenizer_config.name
  tokenizer = None
  if tokenizer_config.is_trained:
    _check_trainable(source, data_config)
  else:
    tokenizer = tokenizers.make_tokenizer(tokenizer_config)
  trained = f'{name}-trained-{tokenizer_config.vocab_size}'
  identity = {
    'format': _FORMAT_VERSION,
    'source': source.spec,
    'source_fingerprint': source.fingerprint(),
    'tokenizer': tokenizer.fingerprint if tokenizer else trained,
    'length': data_config.length,
    'eval_fraction': data_config.eval_fraction,
  }
  # Omitted if 0, so that older datasets keep their names.
  for key in ('eval_tokens', 'test_tokens'):
    if getattr(data_config, key):
      identity[key] = getattr(data_config, key)
  digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
  kind = source.spec.partition(':')[0]
  key = f'{kind}-{name}-{data_config.length}-{digest.hexdigest()[:16]}'
  path, model = root / key, f'{name}.model'
  if not path.exists():
    with folders.build(path) as work:
      if work is not None:
        tasks = split.plan(source, data_config)
        texts = split.training_texts(source, tasks, data_config.eval_fraction)
        own = tokenizer or _train_tokenizer(
          tokenizer_config, texts, work / model, path / model
        )
        job = encoder.Job(source, own, work, engine.num_threads)
        metadata = {**identity, 'tokenizer': own.to_json()}
        _build(job, tasks, data_config, metadata, engine)
        if source.fingerprint() != identity['source_fingerprint']:
          raise source.error(
            'it changed while it was being prepared; run again when it is '
            'complete'
          )
  if tokenizer is None:
    tokenizer = tokenizers.find_class(name).make(name, str(path / model))
  return packed_data.open_packed(path, tokenizer)


def _check_trainable(source: base.Source, data_config: DataConfig) -> None:
  """Raises InputError if no tokenizer can be trained on a source."""
  if data_config.eval_tokens:
    raise InputError(
      f'data.eval_tokens={data_config.eval_tokens!r} cannot be counted before '
      'the tokenizer is trained on the rest; use data.eval_fraction, or name a '
      'model in tokenizer.path'
    )
  if source.is_tokens:
    raise source.error(
      'a tokenizer cannot be trained on token ids; name the one that made them '
      'in tokenizer.name or tokenizer.path'
    )


def _train_tokenizer(
  config: TokenizerConfig,
  texts: Iterator[str],
  model: pathlib.Path,
  final: pathlib.Path,
) -> Tokenizer:
  """Trains a model, unless an interrupted preparation has.

  `model` is the file to write, and `final` its path in the published dataset.
  """
  cls, partial = tokenizers.find_class(config.name), f'{model}.partial'
  if not model.exists():
    _log.info(f'training a {config.name} model of {config.vocab_size} pieces')
    cls.train(texts, config.vocab_size, partial)
    os.replace(partial, model)
  tokenizer = cls.make(config.name, str(model))
  return dataclasses.replace(tokenizer, path=str(final))


def _build(
  job: encoder.Job,
  tasks: Sequence[encoder.Task],
  data_config: DataConfig,
  metadata: Mapping[str, Any],
  engine: encoder.Engine,
) -> None:
  """Writes the dataset into job.folder."""
  work = job.folder
  tables = encoder.encode(job, tasks, engine)
  streams = pack.make_streams(job, tasks, tables, data_config)
  counts = {name: stream.count() for name, stream in streams.items()}
  metadata = {**metadata, **counts}
  num_tokens = sum(stream.num_tokens for stream in streams.values())
  needed = num_tokens * job.dtype.itemsize
  # ArrayRecord's index and framing add a few percent for short rows.
  if shutil.disk_usage(work).free < 1.2 * needed:
    raise folders.disk_full(work.parent, needed)
  _log.info(f'writing {num_tokens:,} tokens')
  pack.write(work, streams, metadata, engine)
  for file in work.glob('part-*'):
    file.unlink()
  _write_manifest(work, tables, metadata)
  for name, count in counts.items():
    _log.info(
      f'{name}: {count["num_tokens"]:,} tokens, {count["num_bytes"]:,} bytes, '
      f'{count["num_documents"]:,} documents'
    )


def _write_manifest(
  work: pathlib.Path, tables: Sequence[np.ndarray], metadata: Mapping[str, Any]
) -> None:
  """Describes for people what was prepared; nothing reads it."""
  versions = {'python': platform.python_version()}
  libraries = (
    'nanodlm tensorflow-datasets array_record tiktoken sentencepiece datasets'
  )
  for name in libraries.split():
    with contextlib.suppress(packages.PackageNotFoundError):
      versions[name] = packages.version(name)
  # Everything that was read, including separators and dropped tokens.
  totals = {
    key: sum(int(table[key].sum()) for table in tables)
    for key in ('num_tokens', 'num_bytes')
  }
  manifest = {
    **metadata,
    'num_documents': sum(metadata[name]['num_documents'] for name in SPLITS),
    **totals,
    'versions': versions,
  }
  (work / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')


def define_flags():
  """Defines the flags of --mode=prepare."""
  flags.DEFINE_integer(
    'prepare_workers',
    0,
    'Processes that encode the text; 0: the threads of this one.',
    lower_bound=0,
  )
  flags.DEFINE_enum(
    'prepare_engine',
    'local',
    ['local', 'beam'],
    'Prepare with this machine or with Apache Beam.',
  )
  flags.DEFINE_list(
    'beam_options',
    [],
    'With --prepare_engine=beam: options of the pipeline, as '
    "runner=FlinkRunner,flink_master=HOST:8081; by default Beam's local "
    'runner.',
  )


def main(start: Any) -> int:
  """--mode=prepare: packs the text of a `config.Start` before training."""
  settings, _ = start.resolve()
  packed = prepare(settings.data, settings.tokenizer, engine=_make_engine())
  _log.info(f'prepared: {", ".join(packed.folders)}')
  return 0


def _make_engine() -> encoder.Engine:
  """Returns what encodes the text, as the flags say."""
  workers, options = flags.FLAGS.prepare_workers, flags.FLAGS.beam_options
  if flags.FLAGS.prepare_engine == 'beam':
    if workers:
      raise InputError(
        f'--prepare_workers={workers} is ignored with --prepare_engine=beam, '
        'whose runner has options of its own'
      )
    return encoder.Beam(tuple(options))
  if options:
    raise InputError(f'--beam_options={options} needs --prepare_engine=beam')
  return encoder.Workers(workers) if workers else encoder.ThisProcess()
