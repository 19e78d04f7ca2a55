r"""--mode=zeroshot: perplexities on the texts of MDLM's zero-shot table.

    python launch.py --mode=zeroshot --workdir=runs/gpt2_small
    python launch.py --mode=zeroshot --workdir=runs/gpt2_small --sets=ptb \
        --texts=ptb=jsonl:ptb.jsonl:sentence

The validation split of each set, or else its test split, is read from the
Hugging Face hub (pip install -e '.[hf]'), or from the source in --texts, in the
forms of data.source, all of it unless that has such a split. For lambada, that
is OpenAI's file, jsonl:lambada_test.jsonl. (The names of the sets on the hub
have not been tried.) Texts are
detokenised as in MDLM (arXiv 2406.07524, and GPT-2 before it), encoded, and
joined without anything between them; each row is a part of data.length - 2
tokens between two separators, and what is left at the end is dropped. All
tokens are scored, the separators too, but for the first if the model reads from
left to right. Perplexities are per token of the run's tokenizer (the papers':
GPT-2's, with data.length=1024), bits are per byte of the detokenised text.
Results are printed, and appended to zeroshot.jsonl in the workdir.
"""

import re
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from nanodlm import evaluate
from nanodlm import lm as lms
from nanodlm import workdir as workdirs
from nanodlm.config import Start
from nanodlm.data import folder as folders
from nanodlm.data import sources
from nanodlm.data.sources import base
from nanodlm.lm import LanguageModel
from nanodlm.training import metrics
from nanodlm.types import InputError

READS = ('eval.', 'mesh.', 'model.', 'objective.')
UNREAD = ('eval.max_examples',)
RESULTS = 'zeroshot.jsonl'
# Replacements, in order: (regular expression, text).
_WIKITEXT = (
  (r"s '", "s'"),
  (' @-@ ', '-'),
  (' @,@ ', ','),
  (r' @\.@ ', '.'),
  # One sign after another: neighbours share a space.
  *[(rf' \{sign} ', f'{sign} ') for sign in ':;.!?,'],
  (r'\(\s*([^)]*?)\s*\)', r'(\1)'),
  (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
  (r'{\s*([^}]*?)\s*}', r'{\1}'),
  (r'"\s*([^"]*?)\s*"', r'"\1"'),
  (r"'\s*([^']*?)\s*'", r"'\1'"),
  ('= = = =', '===='),
  ('= = =', '==='),
  ('= =', '=='),
  (' \N{DEGREE SIGN} ', '\N{DEGREE SIGN}'),
  (' \n', '\n'),
  ('\n ', '\n'),
  (' N ', ' 1 '),
  (" 's", "'s"),
)
_LM1B = (
  ('(https?) : / / ', r'\1://'),
  (r" '(\w+)", r"'\1"),
  (r' (\w+) \. ', r' \1. '),
  (r' (\w+) \.$', r' \1.'),
  *[(rf' \{s}{end}', f'{s}{end}'.rstrip('$')) for s in '?!' for end in ' $'],
  *[(f' {sign} ', f'{sign} ') for sign in ',:;'],
  (' / ', '/'),
  (r'" ([^"]+) "', r'"\1"'),
  (r"' ([^']+) '", r"'\1'"),
  (r'\( ([^()]+) \)', r'(\1)'),
  (r'\[ ([^\[\]]+) \]', r'[\1]'),
  (r'([$£]) ', r'\1'),
)
_PTB = (
  (" 's", "'s"),
  ("s ' ", "s' "),
  (" n't", "n't"),
  (' \n ', '\n'),
  (r'\\/', '/'),
  *[(' N ', ' 1 ')] * 2,  # Neighbours share a space.
  (r'([$#]) 1', r'\g<1>1'),
  ('<unk>', '?'),
)
_LAMBADA = (('[“”]', '"'), (r'^\s*', '\n'), (r'\s+$', ''))


class TextSet(NamedTuple):
  """A set of texts: its source, and how its texts are detokenised."""

  source: str
  replacements: tuple[tuple[str, str], ...] = ()

  def detokenize(self, text: str) -> str:
    """Returns a text as people write it."""
    for pattern, new in self.replacements:
      text = re.sub(pattern, new, text)
    return text


SETS = {
  'ptb': TextSet('hf:ptb-text-only/ptb_text_only:sentence', _PTB),
  'wikitext2': TextSet(
    'hf:Salesforce/wikitext:wikitext-2-raw-v1:text', _WIKITEXT
  ),
  'wikitext103': TextSet(
    'hf:Salesforce/wikitext:wikitext-103-raw-v1:text', _WIKITEXT
  ),
  'lm1b': TextSet('hf:billion-word-benchmark/lm1b:text', _LM1B),
  'lambada': TextSet('', _LAMBADA),
  'ag_news': TextSet('hf:fancyzhx/ag_news:text'),
  'pubmed': TextSet(
    'hf:armanc/scientific_papers:pubmed:article', _WIKITEXT + _LM1B
  ),
  'arxiv': TextSet(
    'hf:armanc/scientific_papers:arxiv:article', _WIKITEXT + _LM1B
  ),
}
_COLUMNS = (
  ('set', 'set', ''),
  ('rows', 'num_rows', ',.0f'),
  ('', 'relation', ''),
  ('perplexity', 'ppl', '.2f'),
  ('nats/token', 'nll', '.4f'),
  ('bits/byte', 'bits_per_byte', '.4f'),
)


def define_flags():
  """Defines the flags of --mode=zeroshot."""
  flags.DEFINE_list(
    'sets',
    [],
    f'Sets of {list(SETS)}; by default those of --texts, else all but lambada.',
  )
  flags.DEFINE_list('texts', [], 'Sources of sets, NAME=SOURCE.')
  flags.DEFINE_integer(
    'max_rows', 0, 'The first rows of each set; 0: all.', lower_bound=0
  )


def main(start: Start) -> int:
  """Runs --mode=zeroshot: scores each set, prints a table."""
  options = flags.FLAGS
  chosen = parse_sets(options.sets, options.texts)
  settings = start.resolve_reading(READS, UNREAD)
  workdirs.check_writable(start.workdir)
  root = str(folders.find_root(settings.data.data_dir))
  opened = {
    name: sources.make_source(one.source, root) for name, one in chosen.items()
  }
  for source in opened.values():
    if source.is_tokens or source.is_pairs or source.is_chat:
      raise source.error('--mode=zeroshot needs a source of texts')
  lm = lms.load(start.workdir, settings=settings)
  if lm.run.objective.any_length:
    raise InputError(
      f'objective.name={settings.objective["name"]!r} scores whole documents, '
      'not the rows of --mode=zeroshot, which are cut anywhere'
    )
  lines = []
  for name, one in chosen.items():
    rows, num_bytes = make_rows(lm, one, opened[name], options.max_rows)
    line = {'set': name, **measure(lm, rows, num_bytes)}
    lines.append(line)
    if not jax.process_index():
      kept = {'step': lm.step, 'source': one.source, **line}
      kept |= {'changed': evaluate.changes(lm)}
      workdirs.append(start.workdir, RESULTS, kept)
  print('\n'.join(metrics.format_table(_COLUMNS, lines)))
  return 0


def parse_sets(names: list[str], texts: list[str]) -> dict[str, TextSet]:
  """Returns the sets of --sets, with the sources of --texts.

  Raises:
    InputError: a name is unknown, or lacks a source.
  """
  if wrong := [text for text in texts if '=' not in text]:
    raise InputError(f'--texts: {wrong} must have the form NAME=SOURCE')
  pairs = [text.partition('=') for text in texts]
  given = {name: source for name, _, source in pairs}
  for key, found in (('sets', names), ('texts', list(given))):
    if unknown := sorted(set(found) - set(SETS)):
      raise InputError(f'--{key}: {unknown} are not among {list(SETS)}')
  names = names or list(given) or [x for x in SETS if SETS[x].source]
  if unused := sorted(set(given) - set(names)):
    raise InputError(f'--texts: {unused} are not among --sets={names}')
  chosen = {
    name: SETS[name]._replace(source=given.get(name, SETS[name].source))
    for name in names
  }
  for name, one in chosen.items():
    if not one.source:
      raise InputError(
        f'--sets: {name} is not on the hub in the form that papers use; give '
        f'its file, --texts={name}=jsonl:lambada_test.jsonl, or leave it out'
      )
  return chosen


def make_rows(
  lm: LanguageModel, texts: TextSet, source: base.Source, max_rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows [N, data.length] and the bytes of text of each, [N].

  Raises:
    InputError: the text is shorter than a row.
  """
  tokenizer, length = lm.tokenizer, lm.run.settings.data.length
  split = 'validation' if source.has_validation else 'train'
  size, ids, sizes, total = length - 2, [], [], 0
  for document in base.documents(source, split):
    text = texts.detokenize(''.join(document.open()))
    row = tokenizer.encode(text)
    ids.append(row)
    sizes.append(tokenizer.count_bytes(text, row))
    total += len(row)
    if max_rows and total >= max_rows * size:
      break
  num = total // size
  num = min(num, max_rows) if max_rows else num
  if not num:
    raise source.error(
      f'its {total} tokens are less than a row of data.length={length}'
    )
  cut = lambda parts: np.concatenate(parts)[: num * size].reshape(num, size)
  ends = np.full([num, 1], tokenizer.separator_id, np.int32)
  tokens = np.concatenate([ends, cut(ids), ends], axis=1)
  return tokens, cut(sizes).sum(axis=1)


def measure(
  lm: LanguageModel, rows: np.ndarray, num_bytes: np.ndarray
) -> dict[str, Any]:
  """Scores rows [N, L] of `num_bytes` [N] bytes each."""
  run, settings = lm.run, lm.run.settings.eval
  score = lms.make_score(
    run, num_draws=settings.num_draws, batch_size=settings.batch_size
  )
  eligible = np.ones(rows.shape, bool)
  eligible[:, 0] = not run.objective.causal
  batch = lms.make_batch(rows, eligible)
  nats = score(lm.params, jax.random.key(settings.seed), batch)['nll']
  nll, width = metrics.ratio_interval(nats, eligible.sum(axis=1), False)
  bits, bits_width = metrics.ratio_interval(nats / np.log(2), num_bytes, False)
  return {
    'num_rows': len(rows),
    'relation': '=' if run.objective.exact else '<=',
    'ppl': float(np.exp(nll)),
    'nll': nll,
    'nll_ci95': width,
    'bits_per_byte': bits,
    'bits_per_byte_ci95': bits_width,
  }
