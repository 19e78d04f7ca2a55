"""Where text comes from: the kinds of config.data.source.

    embedded                    English that ships with Python, 2 MB
    stories                     little stories whose exact probability is known;
                                stories:small has fewer words, and
                                stories:small:0-2000 is the first 2000 of them
    text:GLOB                   text files in UTF-8, one document each
    jsonl:GLOB[:FIELD]          JSON objects, one document per line
    parquet:GLOB[:FIELD]        rows of Parquet files
    tfds:NAME[:FEATURE]         a dataset of TensorFlow Datasets
    hf:NAME[[:CONFIG]:FEATURE]  a dataset of the Hugging Face Hub, or a folder
    tokens:GLOB[:FIELD]         rows of token ids in Parquet files
    hf_tokens:NAME[[:CONFIG]:FEATURE]
    pairs:GLOB[:PROMPT_FIELD:RESPONSE_FIELD]
                                prompts with responses in JSONL files
    preferences:GLOB[:PROMPT_FIELD:CHOSEN_FIELD:REJECTED_FIELD]
                                the same with two responses, for policy.name=dpo
    chat:GLOB[:FIELD]           conversations in JSONL files: a list of messages
                                with role and content on each line
    mix:0.7*SOURCE+0.3*SOURCE   a mixture; the weights are shares of the
                                training examples

A GLOB may contain '**', which enters each folder once, whatever links lead to
it; a file that links lead to is read once, too. A FIELD may have any name; the
longest GLOB that matches a file is taken. Text and JSONL files may be
compressed (.gz, .bz2, .xz, .zst), and one that ends early is an error. A new
kind is a subclass of `Source` and one entry in `SOURCES`. A TFDS dataset is
known by its version: write other text as another version.

    embedded                  text:books/**/*.txt.gz
    jsonl:corpus/*.jsonl:body parquet:part-*.parquet:text
    tfds:lm1b                 tfds:wikipedia/20230601.en
    hf:HuggingFaceFW/fineweb-edu:sample-10BT:text
    hf_tokens:NeelNanda/openwebtext-tokenized-9b

Several documents are split into training and validation text by document, a
single one at its end: join a handful of files into one. data.eval_fraction says
how much is held out, or data.eval_tokens with data.eval_fraction=0: whole
documents until that number is reached, or, for a single document or rows of
ids, exactly the last tokens. data.test_tokens leaves out that number of tokens
after those (the usual split of text8).

Rows of ids must be made by tokenizer.name: an id outside its vocabulary is an
error that names the row.

The weights of a mixture are shares of the training examples, the same in every
batch. Each source is prepared separately and holds out its own part; a document
that is held out of one of them is trained on in none. The evaluation takes rows
of these parts in the shares of the weights, so that the bound is the mixture's.
--mode=eval --config.data.source=SOURCE evaluates on one of them. Pairs and
conversations cannot be mixed.

data.eval_source, in the same forms, is evaluated instead of a part of
data.source, which is then trained on as a whole. --mode=eval with another
data.source scores all of it, and says how much of it was trained on.
"""

import math
import pathlib
import re

from nanodlm.data.sources import arrow, base, embedded, files, stories, tfds
from nanodlm.types import InputError, Law

# The class of each kind; a kind is followed by a colon.
SOURCES: dict[str, type[base.Source]] = {
  'embedded': embedded.EmbeddedSource,
  'stories': stories.StoriesSource,
  'text': files.TextSource,
  'jsonl': files.JsonlSource,
  'pairs': files.PairsSource,
  'preferences': files.PreferencesSource,
  'chat': files.ChatSource,
  'tfds': tfds.TfdsSource,
  'hf': arrow.HfSource,
  'hf_tokens': arrow.HfTokensSource,
  'parquet': arrow.ParquetSource,
  'tokens': arrow.ParquetTokensSource,
}
_MIX = 'mix'


def find_class(spec: str) -> type[base.Source]:
  """Returns the class of config.data.source; `Source` for a mixture."""
  return SOURCES.get(spec.partition(':')[0], base.Source)


def make_source(spec: str, data_dir: str = '') -> base.Source:
  """Makes the source that config.data.source names.

  Args:
    spec: one of the forms above, except a mixture.
    data_dir: a folder that may hold datasets or downloads, searched before
      TFDS's own folder ($TFDS_DATA_DIR or ~/tensorflow_datasets).

  Raises:
    InputError: the form is unknown, or it names nothing that exists.
  """
  cls, name = find_class(spec), spec.partition(':')[2]
  if bool(name) not in {':' in form for form in cls.forms}:
    forms = [form for known in SOURCES.values() for form in known.forms]
    raise InputError(
      f'data.source={spec!r} is not one of {forms}, nor a mixture, '
      f"'mix:0.7*SOURCE+0.3*SOURCE'{_hint(spec)}"
    )
  return cls.make(spec, name, data_dir)


def law_of(spec: str) -> Law | None:
  """Returns the law of the documents of a source; None if it is not known."""
  return make_source(spec).law if find_class(spec).has_law else None


def _hint(spec: str) -> str:
  """Returns how to write a source that is the path of a file, or ''."""
  path = pathlib.Path(spec)
  if not path.is_file():
    return ''
  kind = path.suffix[1:]
  return f'; did you mean {kind if kind in SOURCES else "text"}:{spec}?'


def parse_mixture(
  spec: str, key: str = 'data.source'
) -> tuple[tuple[float, str], ...]:
  """Returns the (weight, source) pairs of 'mix:WEIGHT*SOURCE+...'.

  The weights are divided by their sum. Any other source is the only one, of
  weight 1.

  Raises:
    InputError: the form is wrong, or a weight is not positive.
  """
  kind, _, rest = spec.partition(':')
  if kind != _MIX:
    return ((1.0, spec),)

  def error(text: str) -> InputError:
    return InputError(f'{key}={spec!r}: {text}')

  form = "write it as 'mix:0.7*text:a/*.txt+0.3*jsonl:b/*.jsonl'"
  # A glob may contain '+' and '*', too, but no kind after them.
  kinds = '|'.join(map(re.escape, (*SOURCES, _MIX)))
  parts: dict[str, float] = {}
  for item in re.split(rf'\+(?=[^+*:/]*\*(?:{kinds})(?:[:+]|$))', rest):
    number, _, source = item.partition('*')
    try:
      weight = float(number)
    except ValueError:
      weight = math.nan
    if not source or not 0 < weight < math.inf:
      raise error(
        f"{item!r} is not a positive weight, '*' and a source; {form}"
      )
    cls = find_class(source)
    if cls is base.Source or cls.is_pairs or cls.is_chat:
      raise error(
        f'{source!r} cannot be part of a mixture; only sources of text or '
        'token ids can'
      )
    if source in parts:
      raise error(f'it names {source!r} twice; name it once')
    parts[source] = weight
  if len(parts) < 2:
    raise error(f'a mixture needs at least two sources; {form}')
  total = sum(parts.values())
  return tuple((weight / total, source) for source, weight in parts.items())
