r"""Prepares text: from a source to rows of exactly L tokens on disk, once.

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
keeps the parts that are finished: 16 MB of JSONL or of a single text, cut at a
line break; a row group of Parquet; 4096 rows of a dataset. Compressed files and
each of several texts are not cut, and small texts share a part. manifest.json
in the prepared folder has the number of documents, tokens and bytes, the
fingerprint of the tokenizer, the source and the versions of packages.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from nanodlm.data.packed import PackedData
from nanodlm.data.sources import base
from nanodlm.data.tokenizers import chat
from nanodlm.data.tokenizers.base import Tokenizer, warn_of_loss
from nanodlm.types import InputError

# Part of the folder's name: increase it when the content of the rows changes.
_FORMAT_VERSION = 1

# The hashes of documents that are held out of another source of a mixture.
_NOWHERE = np.zeros([0], np.uint64)

_log = logging.getLogger('nanodlm')


def prepare(
  data_config: DataConfig,
  tokenizer_config: TokenizerConfig | Tokenizer,
  engine: encoder.Engine | None = None,
) -> PackedData:
  """Opens the dataset that the config describes, building it if it is missing.

  The build can be interrupted, and several processes may prepare at once; see
  `folder`.

  Args:
    data_config: `config.data`. eval_fraction is a share of the text's bytes, or
      of the characters of a single document.
    tokenizer_config: `config.tokenizer`. A model that is trained, on the
      training text, is kept with the dataset.
    engine: what does the work, by default this process.

  Raises:
    InputError: the source or tokenizer is missing or damaged, the text is
      shorter than a row, or data_dir cannot be written.
  """
  engine = engine or encoder.ThisProcess()
  if not data_config.eval_source:
    return _prepare(data_config, tokenizer_config, engine)
  train = _prepare(data_config, tokenizer_config, engine, 'train')
  held_out = prepare_whole(data_config, train.tokenizer, engine)
  metadata = {
    **train.metadata,
    'validation': held_out.metadata['validation'],
    'source_fingerprint': train.fingerprint + held_out.fingerprint,
  }
  return dataclasses.replace(
    train,
    folders=train.folders + held_out.folders,
    validation=held_out.validation,
    held_out=held_out.held_out,
    metadata=metadata,
  )


class Prepared(encoder.Engine):
  """Only opens prepared data; InputError if a part must be encoded."""

  def map(self, function: Callable[[Any], None], tasks: Sequence) -> Iterator:
    raise InputError('the text is not prepared')


def prepare_whole(
  data_config: DataConfig,
  tokenizer: Tokenizer,
  engine: encoder.Engine | None = None,
  key: str = 'data.eval_source',
) -> PackedData:
  """Prepares data.eval_source to be evaluated, all of it.

  Of a dataset with a validation split of its own, it is that split. The last
  row of packed text may begin with given tokens; see `pack`. Errors name the
  `key` that the source was given with.
  """
  config = dataclasses.replace(data_config, source=data_config.eval_source)
  engine = engine or encoder.ThisProcess()
  try:
    return _prepare(config, tokenizer, engine, 'validation')
  except InputError as error:
    text = str(error).replace('data.source=', f'{key}=')
    raise InputError(text) from error


def prepare_parts(
  data_config: DataConfig,
  tokenizer_config: TokenizerConfig | Tokenizer,
  engine: encoder.Engine | None = None,
  whole: str = '',
) -> dict[str, PackedData]:
  """Prepares the sources of a mixture, {source: its dataset}.

  A document that is held out of one of them is trained on in none.
  """
  configs = [
    dataclasses.replace(data_config, source=source)
    for _, source in sources.parse_mixture(data_config.source)
  ]
  if len(configs) > 1 and getattr(tokenizer_config, 'is_trained', False):
    raise InputError(
      f"tokenizer.path='' trains a model on the source, but data.source="
      f'{data_config.source!r} has several; name a model'
    )
  make = lambda config, *elsewhere: _prepare_one(
    config, tokenizer_config, engine or encoder.ThisProcess(), whole, *elsewhere
  )
  all_packed = [make(config) for config in configs]
  if len(configs) > 1 and not whole:
    elsewhere = packed_data.held_out_elsewhere(all_packed)
    all_packed = [
      make(config, hashes) if hashes.size else packed
      for config, packed, hashes in zip(configs, all_packed, elsewhere)
    ]
  return {config.source: x for config, x in zip(configs, all_packed)}


def _prepare(
  data_config: DataConfig,
  tokenizer_config: TokenizerConfig | Tokenizer,
  engine: encoder.Engine,
  whole: str = '',
) -> PackedData:
  """Prepares a source or a mixture."""
  parts = prepare_parts(data_config, tokenizer_config, engine, whole)
  return packed_data.mix(data_config.source, [*parts.values()])


def _prepare_one(
  data_config: DataConfig,
  tokenizer_config: Any,
  engine: encoder.Engine,
  whole: str,
  elsewhere: np.ndarray = _NOWHERE,
) -> PackedData:
  """Prepares a single source; see `split.plan` and `split.assign`."""
  root = folders.find_root(data_config.data_dir)
  source = sources.make_source(data_config.source, str(root))
  name, tokenizer = tokenizer_config.name, tokenizer_config
  if not isinstance(tokenizer, Tokenizer):
    is_trained = tokenizer.is_trained
    tokenizer = None if is_trained else tokenizers.make_tokenizer(tokenizer)
  if tokenizer is None:
    _check_trainable(source, data_config)
  trained = f'{name}-trained-{tokenizer_config.vocab_size}'
  identity: dict[str, Any] = {
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
  if data_config.fills_rows:
    if not source.is_pairs:
      identity['crop'] = data_config.crop
    if data_config.long_documents != 'drop':
      identity['long_documents'] = data_config.long_documents
  if source.is_chat:
    text = (
      tokenizer.chat_template + json.dumps(tokenizer.controls)
      if tokenizer
      else chat.find_template(tokenizer_config.chat_template)
    )
    identity['chat_template'] = hashlib.sha256(text.encode()).hexdigest()
    if tokenizer and tokenizer.start_id >= 0:
      identity['start_id'] = tokenizer.start_id
  if tokenizer and tokenizer.revision:
    identity['tokenizer_revision'] = tokenizer.revision
  if source.is_tokens and tokenizer:
    mask = np.array(tokenizer.mask_id)
    if tokenizer.swap_mask(mask) != mask:
      identity['mask'] = 'exchanged'  # Earlier versions left it in place.
  if source.num_alternatives > 1:
    identity['split'] = 'by shared texts'  # Earlier versions divided them.
  if source.is_pairs and tokenizer and not tokenizer.is_lossless:
    identity['prompt_bytes'] = 'apart'  # The response counted some of them.
  if (
    whole and data_config.fills_rows and not (source.is_pairs or source.is_chat)
  ):
    identity['long_texts'] = 'whole'  # They were several documents.
  if whole:
    identity |= {'eval_fraction': 0, 'whole': whole}
  if whole == 'validation':
    identity['end'] = 'a row'  # Earlier versions left it out.
  if elsewhere.size:
    digest = hashlib.sha256(elsewhere.tobytes()).hexdigest()
    identity['held_out_elsewhere'] = digest
  digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
  kind = source.spec.partition(':')[0]
  key = f'{kind}-{name}-{data_config.length}-{digest.hexdigest()[:16]}'
  path, model = root / key, f'{name}.model'
  if not path.exists():
    with folders.build(path) as work:
      if work is not None:
        tasks = split.plan(source, data_config, whole)
        texts = split.training_texts(source, tasks, data_config.eval_fraction)
        own = tokenizer or _train_tokenizer(
          tokenizer_config, texts, work / model, path / model
        )
        job = encoder.Job(source, own, work, engine.num_threads)
        metadata = {**identity, 'tokenizer': own.to_json()}
        if own.revision:
          metadata['tokenizer_revision'] = own.revision
        _build(job, tasks, data_config, elsewhere, metadata, engine)
        if source.fingerprint() != identity['source_fingerprint']:
          raise source.error(
            'it changed while it was being prepared; run again when it is '
            'complete'
          )
  if tokenizer is None:
    tokenizer = tokenizers.find_class(name).make(name, str(path / model))
    tokenizer = chat.with_template(tokenizer, tokenizer_config.chat_template)
  packed = packed_data.open_packed(path, tokenizer)
  if packed.metadata.get('tokenizer_revision', 0) != tokenizer.revision:
    raise InputError(
      f'prepared data {path} was written by an older version, which spelled a '
      'space as three bytes. Delete it, and the next start prepares it again'
    )
  return packed


def _check_trainable(source: base.Source, data_config: DataConfig) -> None:
  """Raises InputError if no tokenizer can be trained on a source."""
  if data_config.eval_tokens:
    raise InputError(
      f'data.eval_tokens={data_config.eval_tokens!r} cannot be counted before '
      'the tokenizer is trained, on the text that they leave; use '
      'data.eval_fraction, or name a model in tokenizer.path'
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
  tokenizer = chat.with_template(tokenizer, config.chat_template)
  return dataclasses.replace(tokenizer, path=str(final))


def _build(
  job: encoder.Job,
  tasks: Sequence[encoder.Task],
  data_config: DataConfig,
  elsewhere: np.ndarray,
  metadata: Mapping[str, Any],
  engine: encoder.Engine,
) -> None:
  """Writes the dataset into job.folder."""
  work = job.folder
  tables = encoder.encode(job, tasks, engine)
  totals = _totals(tables)
  name = f'tokenizer.name={job.tokenizer.name!r}'
  warn_of_loss(name, totals['num_lost_bytes'], totals['num_bytes'])
  sides = split.assign(job.source, tasks, tables, data_config, elsewhere)
  whole = metadata.get('whole')
  if whole:
    sides = {whole: sides[whole]}
  streams = pack.make_streams(job, tasks, tables, data_config, sides)
  if whole == 'validation':
    streams = {name: x.with_last_row() for name, x in streams.items()}
  counts = {name: stream.count() for name, stream in streams.items()}
  metadata = {**metadata, **counts}
  num_tokens = sum(stream.num_tokens for stream in streams.values())
  needed = num_tokens * job.record.itemsize
  # ArrayRecord's index and framing add a few percent for short rows.
  if shutil.disk_usage(work).free < 1.2 * needed:
    raise folders.disk_full(work.parent, needed)
  _log.info(f'writing {num_tokens:,} tokens')
  pack.write(work, streams, metadata, engine, data_config.has_documents)
  for file in work.glob('part-*'):
    file.unlink()
  hashes = split.hashes_of(job.source, tables, sides)
  packed_data.write_hashes(work, hashes)
  _write_manifest(work, tables, metadata)
  for name, count in counts.items():
    num_left = count['num_dropped_tokens']
    _log.info(
      f'{name}: {count["num_tokens"]:,} tokens, {count["num_bytes"]:,} bytes, '
      f'{count["num_documents"]:,} documents'
      + f'; {num_left} tokens at the end, less than a row, are left out'
      * bool(num_left)
    )


def _totals(tables: Sequence[np.ndarray]) -> dict[str, int]:
  """Counts all that was read, including separators and what is dropped."""
  total = lambda column: sum(int(table[column].sum()) for table in tables)
  return {
    # A document that is cut between the splits is one document.
    'num_documents': max(total('num_ends'), 1),
    'num_tokens': total('num_tokens'),
    'num_bytes': total('num_bytes'),
    'num_lost_bytes': total('num_lost_bytes'),
  }


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
  manifest = {**metadata, **_totals(tables), 'versions': versions}
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
    'Prepare on this machine or with Apache Beam.',
  )
  flags.DEFINE_list(
    'beam_options',
    [],
    'With --prepare_engine=beam: options of the pipeline, such as '
    "runner=FlinkRunner,flink_master=HOST:8081; by default Beam's local "
    'runner.',
  )


def main(start: Any) -> int:
  """Runs --mode=prepare, which packs the text of a config before training."""
  settings, _ = start.resolve()
  workers, options = flags.FLAGS.prepare_workers, flags.FLAGS.beam_options
  if flags.FLAGS.prepare_engine == 'beam':
    if workers:
      raise InputError(
        f'--prepare_workers={workers} is ignored with --prepare_engine=beam, '
        'whose runner has options of its own'
      )
    engine = encoder.Beam(tuple(options))
  elif options:
    raise InputError(f'--beam_options={options} needs --prepare_engine=beam')
  else:
    engine = encoder.Workers(workers) if workers else encoder.ThisProcess()
  packed = prepare(settings.data, settings.tokenizer, engine)
  _log.info(f'prepared: {", ".join(packed.folders)}')
  return 0
