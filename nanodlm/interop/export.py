"""Exports a run: safetensors, config.json, tokenizer and a model card.

    python launch.py --mode=export --workdir=runs/docs --output=out

What else loads it, which the model card repeats, depends on the network, of
which the first is the default one, and on the objective:

    network                    objective  family      loads it
    qk_norm                    ar         qwen3       transformers
    qk_norm                    masked     a2d-qwen3   dLLM
    qk_norm                    block      sdar        SGLang, LMDeploy
    qk_norm=False              ar         llama       transformers
    qk_norm=False              masked     llada       dLLM, llama.cpp
    qk_norm=False              block      a2d-llama   dLLM
    that, attention_bias=qkv   ar         qwen2       transformers
    that and shift_outputs     masked     dream       dLLM, llama.cpp
    that and shift_outputs     block      fast-dllm   its own code
    qk_norm=False, start_token block      nemotron    its own code

GPT-2's network is written as gpt2, that of MDLM as mdlm, bd3lm or sedd, and
others, such as that of configs/quickstart.py with its learned positions and
convolutions, under our own names. --family chooses another form that fits.
Every export also has the folder `nanodlm`, from which --mode=import reads the
run back exactly.

Autoregressive texts begin with the mask's id, which tokenizer.json puts there.
It is written if it makes the same ids as the run's tokenizer (bytes,
SentencePiece as it is trained here, tiktoken's). An imported one is kept as it
is, with a warning if it does not. llama.cpp's converter refuses tokenizers that
it does not know, such as bytes and those that put a mask in front; it takes
GPT-2's. SGLang and LMDeploy need the mask of SDAR: they serve tuned imports.
"""

from collections.abc import Mapping
import dataclasses
import json
import logging
import pathlib
import re
from typing import Any

from absl import flags
import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, weights
from nanodlm import lm as lms
from nanodlm import run as runs
from nanodlm import workdir as workdirs
from nanodlm.config import Settings, Start
from nanodlm.data.tokenizers import chat
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.data.tokenizers.huggingface import HuggingFaceTokenizer
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from nanodlm.data.tokenizers.tiktoken import TiktokenTokenizer
from nanodlm.devices import sharding
from nanodlm.interop import convert, peft, tokenizer_json
from nanodlm.interop import tensors as tensor_files
from nanodlm.interop.families import FAMILIES
from nanodlm.interop.families import layout as layouts
from nanodlm.run import Run
from nanodlm.training import checkpoint
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

# A file of tensors has fewer bytes, or ends with the one that exceeds them.
SHARD_BYTES = 2**30
# The keys of config.json that generation_config.json repeats.
_SPECIAL = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'mask_token_id')
MASK_TEXT, SEPARATOR_TEXT = '<|mask|>', '<|separator|>'


def define_flags():
  """Defines the flags of --mode=export."""
  flags.DEFINE_string('output', '', 'The folder to write.')
  flags.DEFINE_string(
    'family', '', 'The form of the export; by default the first that fits.'
  )
  flags.DEFINE_bool(
    'adapters', False, 'Write the adapters of config.lora alone, for PEFT.'
  )


def main(start: Start) -> int:
  """Runs --mode=export; see `export_checkpoint`."""
  start.check_ignored(('config',))
  if not flags.FLAGS.output:
    raise InputError('--mode=export needs --output')
  export = export_adapters if flags.FLAGS.adapters else export_checkpoint
  export(start.workdir, flags.FLAGS.output, flags.FLAGS.family)
  return 0


def export_adapters(workdir: str, output: str, family: str = ''):
  """Writes the averaged adapters of a run's last checkpoint, see `peft`.

  Args:
    workdir: folder of a run with `config.lora`.
    output: a folder that is new or empty.
    family: one of FAMILIES, whose names to use; '' is the first that fits.

  Raises:
    InputError: the folder is not empty, or there is no such run.
  """
  tensor_files.require('safetensors')
  with convert.new_folder(output, '--output') as work:
    settings = configs.make_settings(configs.read_run(workdir))
    if not (rank := settings.lora['rank']):
      raise InputError(
        f'--adapters: the run in {workdir!r} has none (lora.rank={rank!r})'
      )
    run = runs.make_run(settings, refit=True)
    run = run.with_tokenizer(load_tokenizer(workdir))
    params, step = weights.load_trained(run, workdir)
    form = FAMILIES[convert.choose_family(run, family, of_adapters=True)]
    base = weights.find_base(settings.checkpoint.init_from)
    source = checkpoint.read_origin(base).get('source', '')
    kind = 'its name on the hub'
    if not convert.is_hub_name(source):
      source = _public(base)
      kind = 'the name of its workdir: export the base to such a folder too'
    peft.write(work, run, params, form, source)
  log.info(
    'exported %s, step %d, into %s. PEFT looks for the base at %r, %s',
    workdir,
    step,
    output,
    source,
    kind,
  )


def export_checkpoint(workdir: str, output: str, family: str = ''):
  """Writes the averaged weights of a run's last checkpoint.

  Args:
    workdir: folder of the run.
    output: a folder that is new or empty.
    family: one of FAMILIES; '' is the first that fits the run.

  Raises:
    InputError: the folder is not empty, there is no such run, or the family
      cannot express it.
  """
  for package in ('safetensors', 'tokenizers'):
    tensor_files.require(package)
  with convert.new_folder(output, '--output') as work:
    lm, num_adapted = lms.load(workdir), 0
    if lm.run.settings.lora['rank']:
      num_adapted = lm.run.num_trained()
      whole, params, _ = weights.load_merged(lm.run, workdir)
      lm = dataclasses.replace(lm, run=whole, params=params)
    run, params, step = lm.run, lm.params, lm.step
    family = convert.choose_family(run, family)
    form, network = FAMILIES[family], convert.network_of(run)
    described = convert.describe_own(run.tokenizer, run.settings.data.length)
    foreign = form.to_config(network, described)
    write_json(work / convert.HF_CONFIG, foreign)
    for name, content in form.files.items():
      (work / name).write_text(content)
    layout = form.layout(network, checkpoint.flatten(params), ())
    write_tensors(work, params, layout, described)
    has_tokenizer = write_tokenizer(work, run, described)
    special = {key: foreign[key] for key in _SPECIAL if key in foreign}
    if form.is_stock:  # The mask begins a text and is never a part of it.
      special['suppress_tokens'] = [described.mask_id]
    write_json(work / 'generation_config.json', special)
    own = work / convert.OWN
    own.mkdir()
    save_tokenizer(run.tokenizer, own)
    write_json(own / workdirs.CONFIG, published(run.settings))
    write_json(own / convert.ORIGIN, {'family': family, 'step': step})
    nearest = convert.find_nearest(run)
    shorter = describe_length(lm, family, foreign)
    text = card(
      lm, family, foreign, has_tokenizer, num_adapted, nearest, shorter
    )
    (work / 'README.md').write_text(text)
  log.info(
    'exported %s, step %d, as %s into %s%s',
    workdir,
    step,
    family,
    output,
    nearest and f'. {nearest}',
  )
  if shorter:
    log.info(shorter)


def published(settings: Settings) -> dict[str, Any]:
  """Returns the config of a run without paths of this machine."""
  config = settings.to_dict()
  config['data']['data_dir'] = ''
  for key in 'source', 'eval_source':
    config['data'][key] = _public_source(config['data'][key])
  config['checkpoint'] |= {'init_from': '', 'init_step': 0}
  config['tokenizer']['path'] = ''
  return config


def write_tensors(
  folder: pathlib.Path,
  params: Any,
  layout: layouts.Layout,
  described: layouts.Description,
):
  """Writes the safetensors files, SHARD_BYTES at a time, and their index."""
  # On a CPU they share the memory.
  flat = checkpoint.flatten(jax.tree.map(np.asarray, params))
  for path in sharding.BY_VOCABULARY & set(flat):
    # Leaves out the rows that pad a vocabulary which is split over devices.
    flat[path] = flat[path][described.rows]
  shards, size, names = {}, 0, {}
  for name, parts in sorted(layout.tensors.items()):
    shards.setdefault(size // SHARD_BYTES, {})[name] = parts
    size += sum(part.of(flat).nbytes for part in parts)
  for i, shard in enumerate(shards.values()):
    file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    if len(shards) == 1:
      file = 'model.safetensors'
    arrays = {name: _tensor(flat, parts) for name, parts in shard.items()}
    tensor_files.write(folder / file, arrays)
    names.update(dict.fromkeys(shard, file))
  if len(shards) > 1:
    index = {'metadata': {'total_size': size}, 'weight_map': names}
    write_json(folder / 'model.safetensors.index.json', index)


def _tensor(
  params: Mapping[str, np.ndarray], parts: list[layouts.Part]
) -> np.ndarray:
  """Returns the exported tensor made of these parameters, {path: array}."""
  arrays = [part.how(part.of(params)) for part in parts]
  share = parts[0].share
  whole = arrays[0] if share is None else np.concatenate(arrays, share[0])
  return np.ascontiguousarray(whole)


def write_json(path: pathlib.Path, value: Any):
  """Writes a value as indented JSON."""
  path.write_text(json.dumps(value, indent=2) + '\n')


def write_tokenizer(
  folder: pathlib.Path, run: Run, described: layouts.Description
) -> bool:
  """Writes tokenizer.json and its config; False if its ids would differ."""
  tokenizer = run.tokenizer
  if isinstance(tokenizer, HuggingFaceTokenizer):
    content = json.loads(pathlib.Path(tokenizer.path).read_bytes())
    if (text := tokenizer_json.find_difference(content, tokenizer)) is not None:
      log.warning(
        'tokenizer.json is the imported one, which encodes %.40r to ids '
        'that differ from those of nanodlm',
        text,
      )
  elif isinstance(tokenizer, BytesTokenizer):
    content = tokenizer_json.bytes_tokenizer()
  else:
    content = None
    if isinstance(tokenizer, TiktokenTokenizer):
      content = tokenizer_json.tiktoken_tokenizer(tokenizer.encoding)
    elif isinstance(tokenizer, SentencePieceTokenizer):
      content = tokenizer_json.sentencepiece_tokenizer(tokenizer.processor)
    if (
      not content
      or tokenizer_json.find_difference(content, tokenizer) is not None
    ):
      return False
  # Unigram models have a list of pieces instead of {piece: id}.
  vocab = content['model'].get('vocab', {})
  if isinstance(vocab, list):
    vocab = {piece[0]: i for i, piece in enumerate(vocab)}
  texts = {i: text for text, i in vocab.items()}
  texts |= {token['id']: token['content'] for token in content['added_tokens']}
  control: dict[Any, str] = {
    described.separator_id: SEPARATOR_TEXT,
    described.mask_id: MASK_TEXT,
  }
  for i, text in control.items():
    if i not in texts:
      while text in texts.values():  # An imported export has them already.
        text = text.replace('|>', '_|>')
      content['added_tokens'].append(tokenizer_json.added_token(i, text))
      texts[i] = text
  if run.objective.causal:
    tokenizer_json.begin_with(
      content, described.mask_id, texts[described.mask_id]
    )
  write_json(folder / convert.HF_TOKENIZER, content)
  mask, separator = texts[described.mask_id], texts[described.separator_id]
  special = {'mask_token': mask, 'eos_token': separator, 'pad_token': separator}
  if run.objective.causal:
    special['bos_token'] = mask
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    **special,
    'model_max_length': described.max_length,
    'clean_up_tokenization_spaces': False,
  }
  if template := tokenizer.chat_template:
    ids = {i: text for text, i in tokenizer.controls.items()}
    start = ids.get(tokenizer.start_id, '')
    begins = run.objective.causal
    if begins or start and convert.network_of(run).start_token < 0:
      template = chat.to_publish(template, start, begins)
    settings['chat_template'] = template
  write_json(folder / 'tokenizer_config.json', settings)
  return True


# What a model card says of `config.sampler`, besides what is not the default.
_SHOWN = ('name', 'num_steps', 'temperature')
_CARD = """---
tags:
- nanodlm
---

# {name}

A language model of objective `{objective}` with {num_params:,} parameters,
written by nanodlm after {step} training steps.

## Loading it

{loading}

In nanodlm, exactly:

```
python launch.py --mode=import --from=THIS_FOLDER --workdir=runs/imported
```
{missing}
## The network

| setting | value |
|---|---|
{settings}
| ids | {num_ids}, tokenizer `{tokenizer}` |

## Training

{training}

## Sampling

By default samples are drawn with {sampler}.

## Measured

{measured}
"""
_STOCK = """transformers loads it as `{}`, with trust_remote_code off:

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
model = AutoModelForCausalLM.from_pretrained('THIS_FOLDER')
tokenizer = PreTrainedTokenizerFast.from_pretrained('THIS_FOLDER')
```

AutoTokenizer of transformers 5 has a tokenizer of its own for Qwen2.

A text begins with the token {} (the mask), whose own logit means nothing. The
tokenizer and its chat template, if any, write it."""


def card(
  lm: lms.LanguageModel,
  family: str,
  foreign: dict[str, Any],
  has_tokenizer: bool,
  num_adapted: int = 0,
  nearest: str = '',
  shorter: str = '',
) -> str:
  """Returns the model card: what config.json and the logs of the run say.

  `num_adapted` is the number of parameters of adapters, which are merged,
  `nearest` what `convert.find_nearest` says, `shorter` what `describe_length`
  does.
  """
  run, step, workdir = lm.run, lm.step, lm.workdir
  settings, tokenizer = run.settings, run.tokenizer
  loading = FAMILIES[family].loaded_by(convert.network_of(run)) + (
    f'\n\nThe tensors have the names and shapes of the family `{family}`.'
  )
  if nearest:
    loading += f'\n\n{nearest}.'
  if FAMILIES[family].is_stock:
    architecture, start = foreign['architectures'][0], foreign['bos_token_id']
    loading = _STOCK.format(architecture, start)
    if convert.network_of(run).dropout:
      loading += '\n\nDropout is left out.'
  missing = (
    f'\nA tokenizer.json is missing: the tokenizer `{tokenizer.name}` is in '
    f'the folder `{convert.OWN}`.\n'
  )
  if checkpoint.holds_weights_alone(workdir):
    origin = checkpoint.read_origin(workdir)
    training = (
      f'Weights imported from `{_public(origin["source"])}` (family '
      f'`{origin["imported"]}`); not trained since.'
    )
  else:
    training = (
      f'{step} steps of {settings.train.batch_size} x {settings.data.length} '
      f'tokens of `{_public_source(settings.data.source)}`, optimiser '
      f'`{settings.optim.name}`, seed {settings.seed}.'
    )
    if source := settings.checkpoint.init_from:
      training += f'\n\nStarted from the weights of `{_public(source)}`.'
  if num_adapted:
    training += (
      f' Adapters of {num_adapted:,} parameters were trained, and are added to '
      'the weights.'
    )
  if shorter:
    training += f'\n\n{shorter}.'
  model = sorted(settings.model.items())
  default: Any = configs.load()
  sampler = {
    key: value
    for key, value in run.describe_sampler().items()
    if key in _SHOWN or value != default.sampler[key]
  }
  return _CARD.format(
    name=pathlib.Path(workdir).resolve().name,
    objective=settings.objective['name'],
    num_params=run.num_params(),
    step=step,
    loading=loading,
    missing='' if has_tokenizer else missing,
    settings='\n'.join(f'| `model.{key}` | {value} |' for key, value in model),
    num_ids=tokenizer.vocab_size,
    tokenizer=tokenizer.name,
    training=training,
    sampler=', '.join(f'`sampler.{k}={v}`' for k, v in sampler.items()),
    measured=_measured(lm.run, pathlib.Path(lm.workdir), lm.step),
  )


def _longest(workdir: str) -> int:
  """Returns the tokens of the texts that a run or its bases were made for.

  0 if the folder does not exist any more.
  """
  config: Any = configs.read(workdir)
  if config is None:
    return 0
  base = config.checkpoint.init_from
  before = (
    _longest(base)
    if base
    else checkpoint.read_origin(workdir).get('max_length', 0)
  )
  return max(config.data.length, before)


def describe_length(
  lm: lms.LanguageModel, family: str, foreign: dict[str, Any]
) -> str:
  """Returns how an export's longest text differs from that of its bases."""
  key, longest = FAMILIES[family].length[0], _longest(lm.workdir)
  length = foreign.get(key, longest)
  if convert.network_of(lm.run).num_positions or length >= longest:
    return ''
  return (
    f'{key}={length} is the data.length of this run; it started from weights '
    f'for texts of up to {longest} tokens'
  )


def _public(place: str) -> str:
  """Returns a name on the hub, or the last part of a path of this machine."""
  path = pathlib.Path(place)
  return path.name if path.is_absolute() else place


def _public_source(source: str) -> str:
  """Returns a data.source without the folders of this machine."""
  return re.sub(r'(?<=:)[/~][^:+]*/', '', source)


def _measured(run: Run, workdir: pathlib.Path, step: int) -> str:
  """Returns a table of the last evaluation of each text at this step."""
  eval_source, found = run.settings.data.eval_source, {}
  own_source = eval_source or run.settings.data.source
  # A separate evaluation replaces one during training.
  for file in (workdirs.METRICS, workdirs.EVAL):
    path = workdir / file
    entries, _ = workdirs.parse_lines(
      path.read_bytes() if path.exists() else b''
    )
    for entry in entries:
      nll = entry.get('eval/nll')
      if entry.get('step') == step and isinstance(nll, int | float):
        if file == workdirs.METRICS:  # Of the text that training held out.
          entry = {**entry, 'is_held_out': not eval_source}
        share = evaluate.shown_share(entry)
        source = entry.get('source', own_source)
        changed = evaluate.shown_changes(entry)
        if source == own_source:  # Training does not say what was trained on.
          found.pop((source, changed, 'unknown'), None)
        found[source, changed, share] = entry
  if not found:
    return 'Nothing was measured at this step.'

  def shown(entry, key, digits=4):
    value, width = entry.get(f'eval/{key}'), entry.get(f'eval/{key}_ci95')
    if value is None:
      return ''
    return f'{value:.{digits}f}' + (f' ± {width:.{digits}f}' if width else '')

  kind = 'exact value' if run.objective.exact else 'upper bound'
  lines = [
    f'An {kind}, 95% intervals; how much of the text was trained on:',
    '',
    '| text | nats/token | perplexity | bits/byte | examples | trained on |',
    '|---|---|---|---|---|---|',
  ]
  for (source, changed, share), entry in found.items():
    lines.append(
      f'| `{_public_source(source)}`{changed} | {shown(entry, "nll")} | '
      f'{shown(entry, "ppl", 2)} | {shown(entry, "bits_per_byte")} | '
      f'{entry.get("eval/num_examples", 0):.0f} | {share} |'
    )
  return '\n'.join(lines)
