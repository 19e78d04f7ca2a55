"""Checkpoints out: safetensors, config.json, tokenizer and a model card.

Where a stock architecture fits, an autoregressive run loads in Hugging Face's
transformers as it is. Every export holds the folder `nanodlm` beside that, with
which --mode=import reads it back exactly.
"""

import json
import logging
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
from ml_collections import config_dict
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate
from nanodlm.data import tokenizers
from nanodlm.devices import sharding
from nanodlm.interop import convert
from nanodlm.interop import tensors as tensor_files
from nanodlm.interop.families import FAMILIES
from nanodlm.interop.families import layout as layouts
from nanodlm.training import checkpoint
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

# Of one file; as many bytes of tensors are copied at a time.
SHARD_BYTES = 2**30
MASK_TEXT, SEPARATOR_TEXT = '<|mask|>', '<|separator|>'
# What transformers knows without our help.
STOCK = ('gpt2', 'llama', 'qwen2', 'qwen3')


def export_checkpoint(workdir: str, output: str, family: str = ''):
  """--mode=export: writes the averaged weights of a run's last checkpoint.

  Args:
    workdir: of the run.
    output: the folder to write; must be new or empty.
    family: one of FAMILIES; '' is the first that fits the run.

  Raises:
    InputError: the folder is not empty, there is no such run, or the run is of no
      form that the family has.
  """
  target = pathlib.Path(output)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise InputError(
      f'--output={output!r} is not empty; what is there is never '
      'overwritten. Give a new folder'
    )
  tensor_files.require('safetensors')
  run, params, step = evaluate.open_run(workdir)
  family = choose_family(run, family)
  layout = FAMILIES[family].layout(run.network.config, own_names(params))
  place = convert.mask_place(run.tokenizer)
  vocab_size = run.tokenizer.vocab_size
  export = layouts.Export(
    vocab_size=vocab_size,
    mask_id=place,
    length=run.settings.data.length,
    separator_id=convert.moved(run.tokenizer.separator_id, place, vocab_size),
  )
  target.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(
    tempfile.mkdtemp(prefix=f'{target.name}.incomplete-', dir=target.parent)
  )
  try:
    write_tensors(work, run, params, layout, place)
    foreign = FAMILIES[family].to_config(run.network.config, export)
    write_json(work / convert.HF_CONFIG, foreign)
    has_tokenizer = write_tokenizer(work, run, export)
    if run.objective.causal:
      # The mask begins a text and is never a part of it.
      write_json(
        work / 'generation_config.json',
        {
          'bos_token_id': place,
          'eos_token_id': export.separator_id,
          'pad_token_id': export.separator_id,
          'suppress_tokens': [place],
        },
      )
    own = work / convert.OWN
    own.mkdir()
    tokenizers.save(run.tokenizer, own)
    (own / evaluate.CONFIG_FILE).write_text(
      configs.to_json(published(run.config))
    )
    write_json(own / convert.ORIGIN, {'family': family, 'step': step})
    (work / 'README.md').write_text(
      card(run, workdir, step, family, foreign, has_tokenizer)
    )
    work.chmod(0o777 & ~convert.umask())
    work.replace(target)
  finally:
    shutil.rmtree(work, ignore_errors=True)
  log.info('exported %s, step %d, as %s into %s', workdir, step, family, output)


def published(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """A run's settings without the places of this machine, which nobody else has."""
  config = config.copy_and_resolve_references()
  config.data.data_dir = config.checkpoint.init_from = config.tokenizer.path = (
    ''
  )
  config.data.source = _public_source(config.data.source)
  return config


def choose_family(run: evaluate.Run, family: str = '') -> str:
  """`family`, or the first that fits; InputError where it does not."""
  objective, network = run.config.objective.name, run.network.config
  can = {
    name: module
    for name, module in FAMILIES.items()
    if hasattr(module, 'misfit')
  }
  if family and family not in can:
    raise InputError(f'--family={family!r} is not one of {sorted(can)}')
  if family:
    misfit = can[family].misfit(network, objective)
    if misfit:
      raise InputError(f'--family={family!r} has no {misfit}')
    return family
  return next(
    name
    for name, module in can.items()
    if not module.misfit(network, objective)
  )


def own_names(params: Any) -> list[str]:
  """Our parameters as one tensor each: 'layers.0.query.kernel', 'embedding'.

  The first layer stands for all of them.
  """
  names = set()
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    parts = [part.key for part in path]
    if parts[0] in ('layers', 'last_layer'):
      parts[:1] = ['layers', '0']
    names.add('.'.join(parts))
  return sorted(names)


def write_tensors(
  folder: pathlib.Path,
  run: evaluate.Run,
  params: Any,
  layout: layouts.Layout,
  place: int,
):
  """Writes the safetensors files, SHARD_BYTES at a time, and their index."""
  from safetensors import numpy as safetensors  # pylint: disable=g-import-not-at-top

  params = jax.tree.map(np.asarray, params)  # on a CPU the same memory
  pieces = {}
  for path, piece in layout.ends.items():
    pieces.setdefault(piece.name, []).append((path, None, piece))
  for layer in range(run.network.config.num_layers):
    for path, piece in layout.block.items():
      name = convert.name_of(piece, layer)
      pieces.setdefault(name, []).append((path, layer, piece))

  shards, size = [[]], 0
  for name, parts in sorted(pieces.items()):
    size += sum(_leaf(run, params, *part[:2]).nbytes for part in parts)
    if size > SHARD_BYTES and shards[-1]:
      shards.append([])
      size = 0
    shards[-1].append(name)
  names, total = {}, 0
  for i, shard in enumerate(shards):
    file = (
      'model.safetensors'
      if len(shards) == 1
      else (f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors')
    )
    arrays = {name: _tensor(run, params, pieces[name], place) for name in shard}
    total += sum(x.nbytes for x in arrays.values())
    safetensors.save_file(arrays, folder / file, metadata={'format': 'pt'})
    (folder / file).chmod(0o666 & ~convert.umask())
    names.update(dict.fromkeys(shard, file))
  if len(shards) > 1:
    write_json(
      folder / 'model.safetensors.index.json',
      {'metadata': {'total_size': total}, 'weight_map': names},
    )


def _leaf(run: evaluate.Run, params: Any, path: str, layer: int | None) -> Any:
  """One of our parameters; of a block's, one layer of it."""
  last = run.network.config.num_layers - 1
  if layer is None:
    tree = params
  else:
    tree = params['last_layer' if layer == last else 'layers']
  for part in path.split('/'):
    tree = tree[part]
  return tree[layer] if layer is not None and layer < last else tree


def _tensor(
  run: evaluate.Run, params: Any, parts: list[Any], place: int
) -> np.ndarray:
  """Their tensor, of the parameters that it is made up of."""
  arrays = []
  for path, layer, piece in sorted(
    parts, key=lambda part: part[2].cut[1] if part[2].cut else 0
  ):
    array = np.asarray(_leaf(run, params, path, layer))
    if path in sharding.BY_VOCABULARY:  # a split vocabulary may be padded
      array = array[: run.tokenizer.vocab_size]
    if piece.vocab and place != len(array) - 1:
      array = array.copy()
      array[[place, -1]] = array[[-1, place]]
    arrays.append(piece.how.write(array))
  axis = parts[0][2].cut[0] if parts[0][2].cut else 0
  whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
  return np.ascontiguousarray(whole)


def write_json(path: pathlib.Path, value: Any):
  """Writes a value as JSON that people can read."""
  path.write_text(json.dumps(value, indent=2) + '\n')


def write_tokenizer(
  folder: pathlib.Path, run: evaluate.Run, export: layouts.Export
) -> bool:
  """Writes tokenizer.json and its config; False where it would make other ids."""
  tokenizer = run.tokenizer
  if isinstance(tokenizer, tokenizers.HuggingFaceTokenizer):
    content = json.loads(pathlib.Path(tokenizer.path).read_bytes())
  elif isinstance(tokenizer, tokenizers.BytesTokenizer):
    content = bytes_tokenizer()
  else:
    content = (
      tiktoken_tokenizer(tokenizer.encoding)
      if isinstance(tokenizer, tokenizers.TiktokenTokenizer)
      else sentencepiece_tokenizer(tokenizer.processor)
    )
    if not _makes_the_same_ids(content, tokenizer):
      return False
  texts = {token['id']: token['content'] for token in content['added_tokens']}
  for i, text in (
    (export.separator_id, SEPARATOR_TEXT),
    (export.mask_id, MASK_TEXT),
  ):
    known = texts | {i: text for text, i in _vocabulary(content).items()}
    if i not in known:
      content['added_tokens'].append(
        {
          'id': i,
          'content': text,
          'single_word': False,
          'lstrip': False,
          'rstrip': False,
          'normalized': False,
          'special': True,
        }
      )
      known[i] = text
    texts[i] = known[i]
  write_json(folder / convert.HF_TOKENIZER, content)
  special = {
    'mask_token': texts[export.mask_id],
    'eos_token': texts[export.separator_id],
    'pad_token': texts[export.separator_id],
  }
  if run.objective.causal:
    special['bos_token'] = texts[export.mask_id]
  write_json(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      **special,
      'model_max_length': export.length,
      'clean_up_tokenization_spaces': False,
    },
  )
  return True


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
  """{piece: id} of a tokenizer.json, whose Unigram models keep a list."""
  vocab = content['model'].get('vocab', {})
  if isinstance(vocab, list):
    return {piece[0]: i for i, piece in enumerate(vocab)}
  return vocab


def _makes_the_same_ids(
  content: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> bool:
  """Whether a tokenizer.json agrees on English text and on some odd ones."""
  tensor_files.require('tokenizers')
  from pydoc_data import topics  # pylint: disable=g-import-not-at-top

  import tokenizers as library  # pylint: disable=g-import-not-at-top

  theirs = library.Tokenizer.from_str(json.dumps(content))
  texts = (
    *list(topics.topics.values())[:40],
    '',
    '  two  spaces ',
    '\ttab\r\n\n',
    'na\u00efve \u6f22\u5b57 \U0001f600',
    "e\u0301 12345 I'll",
  )
  return all(
    theirs.encode(text, add_special_tokens=False).ids
    == tokenizer.encode(text).tolist()
    for text in texts
  )


def tiktoken_tokenizer(encoding: Any) -> dict[str, Any]:
  """The tokenizer.json of a tiktoken.Encoding, but for its control tokens.

  tiktoken keeps the rank of each piece and not which two it was merged from: those
  are what the merges of lower ranks make of its bytes.
  """
  ranks = encoding._mergeable_ranks  # pylint: disable=protected-access
  chars = {byte: char for char, byte in tokenizers.byte_alphabet().items()}
  spell = lambda piece: ''.join(chars[byte] for byte in piece)
  merges = []
  for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
    if len(piece) > 1:
      merges.append([spell(part) for part in _halves(ranks, piece, rank)])
  pattern = encoding._pat_str  # pylint: disable=protected-access
  byte_level = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': False,
  }
  split = {
    'type': 'Split',
    'pattern': {'Regex': pattern},
    'behavior': 'Isolated',
    'invert': False,
  }
  content = bytes_tokenizer()
  content['pre_tokenizer'] = {
    'type': 'Sequence',
    'pretokenizers': [split, byte_level],
  }
  content['model'] |= {
    'vocab': {spell(piece): i for piece, i in ranks.items()},
    'merges': merges,
  }
  return content


def _halves(ranks: dict[bytes, int], piece: bytes, rank: int) -> list[bytes]:
  """The two pieces that `piece` was merged from."""
  parts = [bytes([byte]) for byte in piece]
  while len(parts) > 2:
    pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
    best = min(range(len(pairs)), key=pairs.__getitem__)
    if pairs[best] >= rank:
      break
    parts[best : best + 2] = [parts[best] + parts[best + 1]]
  return parts


def sentencepiece_tokenizer(processor: Any) -> dict[str, Any]:
  """The tokenizer.json of a SentencePiece BPE model as `train_sentencepiece` makes.

  It takes U+2581 for a space, which the run's does not. Of a model that normalises
  its text or is no BPE, other ids come out.
  """
  pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  known = {
    piece
    for i, piece in enumerate(pieces)
    if not (
      processor.is_byte(i) or processor.is_unknown(i) or processor.is_control(i)
    )
  }
  # In the order of the pieces that they make.
  merges = [
    [piece[:cut], piece[cut:]]
    for piece in pieces
    if piece in known
    for cut in range(1, len(piece))
    if piece[:cut] in known and piece[cut:] in known
  ]
  space, mark = {'String': ' '}, '\u2581'
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [],
    'normalizer': {'type': 'Replace', 'pattern': space, 'content': mark},
    'pre_tokenizer': None,
    'post_processor': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [
        {'type': 'Replace', 'pattern': {'String': mark}, 'content': ' '},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
      ],
    },
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': pieces[processor.unk_id()],
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': True,
      'byte_fallback': True,
      'vocab': vocab,
      'merges': merges,
    },
  }


def bytes_tokenizer() -> dict[str, Any]:
  """The tokenizer.json of bytes: a byte-level BPE without merges."""
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [],
    'normalizer': None,
    'post_processor': None,
    'pre_tokenizer': {
      'type': 'ByteLevel',
      'add_prefix_space': False,
      'trim_offsets': True,
      'use_regex': False,
    },
    'decoder': {
      'type': 'ByteLevel',
      'add_prefix_space': False,
      'trim_offsets': True,
      'use_regex': False,
    },
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': None,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': False,
      'byte_fallback': False,
      'vocab': {
        char: byte for char, byte in tokenizers.byte_alphabet().items()
      },
      'merges': [],
    },
  }


def card(
  run: evaluate.Run,
  workdir: str,
  step: int,
  family: str,
  foreign: dict[str, Any],
  has_tokenizer: bool,
) -> str:
  """The model card: what config.json and the logs of the run say, no more."""
  network, config = run.network.config, run.config
  name = pathlib.Path(workdir).resolve().name
  lines = [
    '---',
    'tags:',
    '- nanodlm',
    '---',
    '',
    f'# {name}',
    '',
    f'A language model of objective `{config.objective.name}` with '
    f'{run.network.num_params(run.objective):,} parameters, written by '
    f'nanodlm after {step} training steps.',
    '',
    '## Loading it',
    '',
  ]
  if family in STOCK and not network.dropout:
    lines += _stock_lines(run, foreign)
  elif family in STOCK:
    lines += _stock_lines(run, foreign) + ['', 'Dropout is left out.']
  else:
    lines += [
      f'No architecture of transformers fits this network; the tensors have '
      f'the names and shapes of the family `{family}`.'
    ]
  lines += [
    '',
    'In nanodlm, exactly:',
    '',
    '```',
    'python launch.py --mode=import --from=THIS_FOLDER --workdir=runs/imported',
    '```',
    '',
  ]
  if not has_tokenizer:
    lines += [
      f'There is no tokenizer.json: the tokenizer `{run.tokenizer.name}` is '
      f'in the folder `{convert.OWN}`.',
      '',
    ]
  lines += ['## The network', '', '| setting | value |', '|---|---|']
  lines += [
    f'| `model.{key}` | {value} |'
    for key, value in sorted(config.model.to_dict().items())
  ]
  lines += [
    f'| ids | {run.tokenizer.vocab_size}, tokenizer `{run.tokenizer.name}` |',
    '',
  ]
  lines += ['## Training', '']
  origin = _origin(workdir)
  if origin:
    lines += [
      f'Weights imported from `{_public(origin["source"])}` (family '
      f'`{origin["imported"]}`); not trained since.',
      '',
    ]
  else:
    lines += [
      f'{step} steps of {config.train.batch_size} x {config.data.length} '
      f'tokens of `{_public_source(config.data.source)}`, optimiser '
      f'`{config.optim.name}`, seed {config.seed}.',
      '',
    ]
    if config.checkpoint.init_from:
      lines += [
        'Started from the weights of '
        f'`{_public(config.checkpoint.init_from)}`.',
        '',
      ]
  lines += ['## Measured', '', *_measured(run, pathlib.Path(workdir), step), '']
  return '\n'.join(lines)


def _stock_lines(run, foreign):
  return [
    f'transformers loads it as `{foreign["architectures"][0]}`, with '
    'trust_remote_code off:',
    '',
    '```python',
    'from transformers import AutoModelForCausalLM',
    "model = AutoModelForCausalLM.from_pretrained('THIS_FOLDER')",
    '```',
    '',
    f'A text begins with the token {foreign["bos_token_id"]} (the mask), whose '
    'own logit means nothing.',
  ]


def _public(place: str) -> str:
  """A name on the hub as it is; of a folder of this machine its last part."""
  path = pathlib.Path(place)
  return path.name if path.is_absolute() else place


def _public_source(source: str) -> str:
  """A data.source without the folders of this machine that its files lie in."""
  return re.sub(r'(?<=:)[/~][^:+]*/', '', source)


def _origin(workdir: str) -> dict[str, Any]:
  """Where imported weights come from; {} for a run."""
  if not checkpoint.holds_weights_alone(workdir):
    return {}
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    return checkpoint.restore_meta(manager, checkpoint.find_step(manager))[
      'data'
    ]


def _measured(run: evaluate.Run, workdir: pathlib.Path, step: int) -> list[str]:
  """Lines on the last evaluation of this step that each log holds."""
  kind = 'exact value' if run.objective.exact else 'upper bound'
  rows = []
  for file in (evaluate.EVAL_FILE, 'metrics.jsonl'):
    path, found = workdir / file, {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
      try:
        entry = json.loads(line)
      except (ValueError, RecursionError):  # cut off by a kill, or damaged
        continue
      if (
        isinstance(entry, dict)
        and entry.get('step') == step
        and isinstance(entry.get('eval/nll'), (int, float))
      ):
        found[entry.get('source', run.config.data.source)] = entry
    for source, entry in found.items():
      if source not in {row[0] for row in rows}:
        rows.append((source, entry))
  if not rows:
    return ['Nothing was measured at this step.']
  lines = [
    f'On held-out text, an {kind}, 95% intervals:',
    '',
    '| text | nats/token | perplexity | bits/byte | examples |',
    '|---|---|---|---|---|',
  ]
  for source, entry in rows:
    source = _public_source(source)

    def shown(key, digits=4):
      value, width = entry.get(f'eval/{key}'), entry.get(f'eval/{key}_ci95')
      if value is None:
        return ''
      return f'{value:.{digits}f}' + (f' ± {width:.{digits}f}' if width else '')

    lines.append(
      f'| `{source}` | {shown("nll")} | {shown("ppl", 2)} | '
      f'{shown("bits_per_byte")} | {entry.get("eval/num_examples", 0):.0f} |'
    )
  return lines
