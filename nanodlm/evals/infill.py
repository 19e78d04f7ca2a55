"""Infilling accuracy: the run's sampler fills gaps in held-out text.

If the law of the text is known, whole words are masked, and the accuracy is
compared to the best one that is possible: that of the law's exact posterior,
given all that the network is given.
"""

from collections.abc import Iterator, Mapping, Sequence
import logging
import math
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from nanodlm import evaluate, laws
from nanodlm import lm as lms
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.lm import LanguageModel
from nanodlm.run import Run
from nanodlm.training import metrics
from nanodlm.types import Batch, InputError, Law, NoDocumentError, Posterior

log = logging.getLogger('nanodlm')

# 'uniform' masks single tokens anywhere in the row, 'span' one run of tokens.
PATTERNS = ('uniform', 'span')
# The law of a gap of any length is that of at most this number of words more
# than it has in the text, and of beginnings of documents that are visited.
MAX_MORE_WORDS = 12
MAX_VISITED = 1000


def define_flags(ratios: Sequence[str]):
  """Defines the flags that several modes share, with the default ratios."""
  flags.DEFINE_list(
    'infill',
    list(ratios),
    'Shares of the tokens of held-out rows to mask and fill in with '
    'config.sampler, such as 0.1,0.3,0.5.',
  )
  flags.DEFINE_integer(
    'infill_examples', 256, 'Held-out rows for --infill; 0: all.', lower_bound=0
  )


def parse_ratios(texts: Sequence[str]) -> list[float]:
  """Parses --infill=0.1,0.3; InputError unless all are in (0, 1]."""
  try:
    ratios = [float(text) for text in texts]
  except ValueError:
    ratios = [0.0]
  if not all(0 < ratio <= 1 for ratio in ratios):
    raise InputError(
      f'--infill={",".join(texts)!r} must be numbers in (0, 1], such as '
      '0.1,0.3,0.5'
    )
  return ratios


def choose(
  generator: np.random.Generator, num: int, ratio: float, pattern: str
) -> np.ndarray:
  """Draws which of `num` >= 1 tokens or words are to be filled in, ascending.

  Their share is `ratio`, rounded, but there is at least one.
  """
  num_chosen = max(1, round(ratio * num))
  if pattern == 'span':
    return generator.integers(num - num_chosen + 1) + np.arange(num_chosen)
  return np.sort(generator.permutation(num)[:num_chosen])


def sample_gaps(
  generator: np.random.Generator,
  eligible: np.ndarray,
  ratio: float,
  pattern: str,
) -> np.ndarray:
  """Returns which of the `eligible` tokens to fill in; both are [N, L] bool.

  A 'span' skips tokens that are not eligible.
  """
  gaps = np.zeros(eligible.shape, bool)
  for row in np.flatnonzero(eligible.any(axis=1)):
    places = np.flatnonzero(eligible[row])
    gaps[row, places[choose(generator, places.size, ratio, pattern)]] = True
  return gaps


def check_run(run: Run):
  """Raises InputError if the run cannot fill gaps from both sides.

  A sampler that fills gaps of any length also needs a text whose law is known.
  """
  data = run.settings.data
  if not run.objective.sees_right(run.settings.data.length):
    raise InputError(
      '--infill needs a network that sees both sides of a gap; that of '
      f'objective.name={run.settings.objective["name"]!r} reads from left to '
      'right'
    )
  if run.settings.data.segment_ids:
    raise InputError(
      '--infill does not support data.segment_ids=True, because it does not '
      'know where documents end'
    )
  law = laws.law_of_rows(data, data.eval_source)
  if not run.sampler.fills_masks and not law:
    raise InputError(
      f'--infill does not support sampler.name={run.sampler_name!r}, which '
      'fills gaps of any length, on a text whose law is not known'
    )


def _accuracy(
  correct: np.ndarray, count: np.ndarray, independent: bool = True
) -> tuple[float, float]:
  """Returns `metrics.ratio_interval` of numbers of correct answers.

  If all answers are right, or all wrong, their spread is zero; the width is
  then that of Wilson's interval, which has one side, for an answer per block.
  """
  accuracy, half_width = metrics.ratio_interval(correct, count, independent)
  if accuracy in (0, 1) and math.isfinite(half_width):
    num = metrics.num_blocks(int(np.sum(count > 0)), independent)
    low, high = metrics.share_interval(int(accuracy) * num, num)
    half_width = high - low
  return accuracy, half_width


def _trials(
  seed: int, ratios: Sequence[float], patterns: Sequence[str] = PATTERNS
) -> Iterator[tuple[str, float, np.random.Generator, jax.Array]]:
  """Yields each pattern and ratio with the randomness of gaps and sampler."""
  for p, pattern in enumerate(patterns):
    for i, ratio in enumerate(ratios):
      generator = np.random.default_rng((seed, p, i))
      number = p * len(ratios) + i
      key = jax.random.fold_in(jax.random.key(seed), number)
      log.info(
        'infilling, part %d of %d: %.0f%% masked, %s',
        number + 1,
        len(patterns) * len(ratios),
        100 * ratio,
        pattern,
      )
      yield pattern, ratio, generator, key


def measure_infilling(
  lm: LanguageModel, rows: Batch, ratios: Sequence[float]
) -> Iterator[dict[str, Any]]:
  """Measures the share of masked tokens that the sampler restores exactly.

  Only eligible tokens of `rows` are masked, the given `ratios` of each row's.

  Yields:
    For each pattern and ratio a dict: pattern; ratio; unit='token'; accuracy,
    of the masked tokens, and accuracy_ci95, half of its 95% interval;
    exact_match, the share of rows without an error; num_examples; num_tokens;
    num_calls; tokens_per_call.
  """
  check_run(lm.run)
  settings = lm.run.settings.eval
  fill = lms.make_fill(lm.run, settings.batch_size)
  tokens, eligible = rows.tokens, rows.eligible
  # The padding of a pair stays as it is.
  eligible = eligible & (np.cumsum(eligible, 1) <= rows.num_tokens[:, None])
  for pattern, ratio, generator, key in _trials(settings.seed, ratios):
    gaps = sample_gaps(generator, eligible, ratio, pattern)
    canvas = np.where(gaps, lm.tokenizer.mask_id, tokens).astype(np.int32)
    # Padding that training hid is hidden.
    filled, num_calls = fill(lm.params, key, canvas, ~gaps, rows.segment_ids)
    correct, masked = np.sum(gaps & (filled == tokens), 1), gaps.sum(1)
    num = lm.run.settings.data.num_alternatives
    accuracy, half_width = _accuracy(
      metrics.sum_groups(correct, num),
      metrics.sum_groups(masked, num),
      lm.run.settings.data.has_documents,
    )
    yield {
      'pattern': pattern,
      'ratio': ratio,
      'unit': 'token',
      'accuracy': accuracy,
      'accuracy_ci95': half_width,
      'exact_match': float(np.mean((correct == masked)[masked > 0])),
      'num_examples': int(np.sum(masked > 0)),
      'num_tokens': int(masked.sum()),
      'num_calls': num_calls,
      'tokens_per_call': lms.tokens_per_call(~gaps, num_calls),
    }


class Word(NamedTuple):
  """A word of a row, with its place in characters and in tokens."""

  text: str
  start: int
  stop: int
  places: np.ndarray


def find_words(law: Law, tokenizer: Tokenizer, row: np.ndarray) -> list[Word]:
  """Returns the words of a row [L] whose tokens spell only them and spaces."""
  text, _ = laws.read_text(tokenizer, row)
  pieces = tokenizer.spell(row)
  stops = np.cumsum([len(piece) for piece in pieces])
  starts = np.append(0, stops[:-1])
  words = []
  for start, stop in law.words(text):
    places = np.flatnonzero((starts < stop) & (stops > start))
    spelled = ''.join(pieces[i] for i in places)
    if spelled.strip() == text[start:stop]:
      words.append(Word(text[start:stop], start, stop, places))
  return words


def find_posterior(
  law: Law, tokenizer: Tokenizer, row: np.ndarray, words: Sequence[Word]
) -> Posterior:
  """Returns the law of some `words` of a row [L], given all its other tokens.

  The network also sees how many tokens are masked, and where. The posterior is
  therefore that of fillings whose tokens agree with all others of the row.

  Raises:
    InputError: too many fillings are possible, or the row is not the encoding
      of its text.
  """
  text, _ = laws.read_text(tokenizer, row)
  stops = [0, *(word.stop for word in words)]
  parts = [text[stop : word.start] for stop, word in zip(stops, words)]
  rest = text[stops[-1] :]
  join = lambda fill: ''.join(map(''.join, zip(parts, fill))) + rest
  posterior = law.posterior(join([law.gap] * len(words)))
  is_gap = np.zeros(len(row), bool)
  is_gap[np.concatenate([word.places for word in words])] = True
  size = int(np.argmax(np.isin(row, tokenizer.eos_ids)))

  def agrees(fill) -> bool:
    ids = tokenizer.encode(join(fill))
    return len(ids) == size and bool(
      np.all((ids == row[:size]) | is_gap[:size])
    )

  fills = {fill: p for fill, p in posterior.fills.items() if agrees(fill)}
  total = sum(fills.values())
  if not total:
    raise InputError(
      f'tokenizer.name={tokenizer.name!r} encodes {text!r} differently from '
      'its row'
    )
  return Posterior(
    posterior.log_prob + math.log(total),
    {fill: p / total for fill, p in fills.items()},
  )


def measure_words(
  lm: LanguageModel, law: Law, rows: Batch, ratios: Sequence[float]
) -> Iterator[dict[str, Any]]:
  """Measures the share of masked words that the sampler restores.

  Documents that were cut, with more completions than the law can enumerate, or
  without a token that spells a word, are left out.

  Yields:
    For each pattern and ratio (of a document's words) a dict with unit='word'
    and the keys of `measure_infilling`, except that num_words is the number of
    gaps. Besides, of the same gaps: bayes_accuracy and bayes_accuracy_ci95, the
    expected accuracy of the likeliest words, which is the best possible one;
    exact_accuracy, that of words drawn from the posterior, as by a perfect
    sampler at temperature 1; num_left_out, documents.

  Raises:
    InputError: no document can be enumerated.
  """
  check_run(lm.run)
  settings, tokenizer = lm.run.settings.eval, lm.tokenizer
  fill = lms.make_fill(lm.run, settings.batch_size)
  is_whole = [laws.read_text(tokenizer, row)[1] for row in rows.tokens]
  whole = jax.tree.map(lambda x: x[np.array(is_whole, bool)], rows)
  words = [find_words(law, tokenizer, row) for row in whole.tokens]
  for pattern, ratio, generator, key in _trials(settings.seed, ratios):
    found, kept, problem = [], [], 'every document was cut'
    for j, row in enumerate(whole.tokens):
      if not words[j]:
        problem = f'tokens of {tokenizer.name!r} spell several words each'
        continue
      chosen = choose(generator, len(words[j]), ratio, pattern)
      gaps = [words[j][k] for k in chosen]
      try:
        found.append((gaps, find_posterior(law, tokenizer, row, gaps)))
        kept.append(j)
      except InputError as error:
        problem = str(error)
    if not kept:
      raise InputError(
        f'--infill={ratio:g}: the exact posterior is not known for any of '
        f'{len(rows.tokens)} documents: {problem}'
      )
    used = jax.tree.map(lambda x: x[kept], whole)
    fixed = np.ones(used.tokens.shape, bool)
    for row, (gaps, _) in zip(fixed, found):
      row[np.concatenate([word.places for word in gaps])] = False
    canvas = np.where(fixed, used.tokens, tokenizer.mask_id).astype(np.int32)
    filled, num_calls = fill(lm.params, key, canvas, fixed, used.segment_ids)
    correct, best, exact = np.zeros((3, len(kept)))
    for n, (row, (gaps, posterior)) in enumerate(zip(filled, found)):
      pieces = tokenizer.spell(row)
      for word, law_of_word in zip(gaps, posterior.marginals()):
        spelled = ''.join(pieces[p] for p in word.places)
        correct[n] += spelled.strip() == word.text
        best[n] += max(law_of_word.values())
        exact[n] += sum(p * p for p in law_of_word.values())
    num = np.array([len(gaps) for gaps, _ in found])
    accuracy, half_width = _accuracy(correct, num)
    bayes, bayes_half_width = metrics.ratio_interval(best, num)
    yield {
      'pattern': pattern,
      'ratio': ratio,
      'unit': 'word',
      'accuracy': accuracy,
      'accuracy_ci95': half_width,
      'bayes_accuracy': bayes,
      'bayes_accuracy_ci95': bayes_half_width,
      'exact_accuracy': float(exact.sum() / num.sum()),
      'exact_match': float(np.mean(correct == num)),
      'num_examples': len(kept),
      'num_left_out': len(rows.tokens) - len(kept),
      'num_words': int(num.sum()),
      'num_calls': num_calls,
      'tokens_per_call': lms.tokens_per_call(fixed, num_calls),
    }


class WordsOfAnyNumber(NamedTuple):
  """The law of a gap whose number of words is not known.

  Attributes:
    fills: probability of each filling, a tuple of words.
    lengths: probability of each number of words.
  """

  fills: Mapping[tuple[str, ...], float]
  lengths: Mapping[int, float]


def any_number(
  law: Law, before: str, after: str, most: int
) -> WordsOfAnyNumber:
  """Returns the law of what is between two texts, if it has up to `most` words.

  Raises:
    InputError: too many fillings are possible.
  """
  found: dict[int, Posterior] = {}
  for num in range(most + 1):
    try:
      gap = ' '.join([law.gap] * num)
      found[num] = law.posterior(f'{before}{gap}{after}', MAX_VISITED)
    except NoDocumentError:
      continue
  logs = {num: one.log_prob for num, one in found.items()}
  total = np.logaddexp.reduce([*logs.values()])
  lengths = {num: math.exp(log - total) for num, log in logs.items()}
  fills = {
    fill: lengths[num] * p
    for num, one in found.items()
    for fill, p in one.fills.items()
  }
  return WordsOfAnyNumber(fills, lengths)


def measure_lengths(
  lm: LanguageModel, law: Law, rows: Batch, ratios: Sequence[float]
) -> Iterator[dict[str, Any]]:
  """Measures how well a sampler fills a gap whose length it is not given.

  Each document has one gap, of the given share of its words. Documents that
  were cut, whose gap can only have one length, or with more completions than
  the law can enumerate, are left out.

  Yields:
    For each ratio a dict with pattern='span', unit='gap' and the keys of
    `measure_words`, where the accuracy is that of whole gaps; num_gaps; and
    length_accuracy, length_accuracy_ci95, bayes_length_accuracy and
    exact_length_accuracy, the same of the numbers of words.

  Raises:
    InputError: no document can be enumerated.
  """
  run, settings = lm.run, lm.run.settings.eval
  fill = lms.make_fill(run, settings.batch_size)
  texts = [laws.read_text(lm.tokenizer, row) for row in rows.tokens]
  trials = _trials(settings.seed, ratios, ('span',))
  for pattern, ratio, generator, key in trials:
    kept, problem = [], 'every document was cut, or all gaps have one length'
    for text, is_whole in texts:
      words = law.words(text) if is_whole else []
      if not words:
        continue
      chosen = choose(generator, len(words), ratio, pattern)
      start, stop = words[chosen[0]][0], words[chosen[-1]][1]
      before, after = text[:start], text[stop:]
      escape = lambda x: x.replace('{', '{{').replace('}', '}}')
      prompt = f'{escape(before)}{{*}}{escape(after)}'
      canvas = lms.lay_out(run, prompt, run.settings.data.length)
      try:
        most = law.num_words(text[start:stop]) + MAX_MORE_WORDS
        found = any_number(law, before, after, most)
      except InputError as error:
        problem = str(error)
        continue
      if len(found.lengths) > 1:
        kept.append((text, found, *canvas))
    if not kept:
      raise InputError(
        f'--infill={ratio:g}: the exact posterior of a gap is not known for '
        f'any of {len(texts)} documents: {problem}'
      )
    tokens, fixed = (np.stack([one[i] for one in kept]) for i in (2, 3))
    filled, num_calls = fill(lm.params, key, tokens, fixed)
    scores = []
    for (text, found, _, given), row in zip(kept, filled):
      shown = lm.tokenizer.decode(lms.shown_tokens(run, row, given))
      is_long = law.num_words(shown) == law.num_words(text)
      scores.append((shown == text, is_long))
      for law_of in found.fills, found.lengths:
        p = np.array([*law_of.values()])
        scores[-1] += p.max(), np.sum(p * p)
    columns = np.array(scores, np.float64).T
    correct, long, best, exact, best_length, exact_length = columns
    values: dict[str, float] = {}
    for name, x in (('accuracy', correct), ('length_accuracy', long)):
      low, high = metrics.share_interval(int(x.sum()), len(kept))
      values[name] = share = float(x.mean())
      values[f'{name}_ci95'] = max(high - share, share - low)
    values['bayes_accuracy'], values['bayes_accuracy_ci95'] = (
      metrics.ratio_interval(best, np.ones(len(kept)))
    )
    _, own = lms.without_room(run, filled, fixed)
    yield {
      'pattern': pattern,
      'ratio': ratio,
      'unit': 'gap',
      **values,
      'exact_accuracy': float(exact.mean()),
      'exact_match': values['accuracy'],
      'bayes_length_accuracy': float(best_length.mean()),
      'exact_length_accuracy': float(exact_length.mean()),
      'num_examples': len(kept),
      'num_left_out': len(texts) - len(kept),
      'num_gaps': len(kept),
      'num_calls': num_calls,
      'tokens_per_call': lms.tokens_per_call(own, num_calls),
    }


def measure(
  lm: LanguageModel, text: evaluate.Text, rows: Batch, ratios: Sequence[float]
) -> Iterator[dict[str, Any]]:
  """Measures the infilling of rows of a text: of words if its law is known."""
  law = laws.law_of_rows(lm.run.settings.data, text.source)
  if not law:
    return measure_infilling(lm, rows, ratios)
  of_law = measure_lengths if lm.run.sampler.fills_room else measure_words
  return of_law(lm, law, rows, ratios)


def describe(result: Mapping[str, Any]) -> str:
  """Describes a result of `measure_infilling` or `measure_words` in a line."""
  unit = result['unit']
  reason = 'cut, or too many completions'
  text = (
    f'{result["ratio"]:.0%} of the {unit}s masked, {result["pattern"]:7}  '
    f'accuracy {result["accuracy"]:.4f} ± {result["accuracy_ci95"]:.4f}'
  )
  if 'bayes_accuracy' in result:
    text += (
      f' of at most {result["bayes_accuracy"]:.4f} (by draws from the exact '
      f'posterior {result["exact_accuracy"]:.4f})'
    )
  if 'length_accuracy' in result:
    text += (
      f', of the length {result["length_accuracy"]:.4f} ± '
      f'{result["length_accuracy_ci95"]:.4f} of at most '
      f'{result["bayes_length_accuracy"]:.4f} (by draws '
      f'{result["exact_length_accuracy"]:.4f})'
    )
    reason = 'cut, one length, or too many completions'
  left_out = result.get('num_left_out')
  return (
    f'{text}, rows without error {result["exact_match"]:.4f} '
    f'({result[f"num_{unit}s"]} {unit}s of {result["num_examples"]} examples, '
    + f'{left_out} left out: {reason}; '
    * bool(left_out)
    + f'{result["num_calls"]:.0f} network calls, '
    f'{result["tokens_per_call"]:.2f} tokens per call)'
  )


def infill_text(
  lm: LanguageModel,
  text: evaluate.Text,
  ratios: Sequence[float],
  num_examples: int,
):
  """Runs --mode=eval --infill: logs a table, appends it to workdir/eval.jsonl.

  `num_examples` is the number of rows to use, 0 for all.
  """
  rows = evaluate.validation_rows(lm.run, text.packed, num_examples)
  log.info(
    'infilling %d of %d %srows (--infill_examples)%s',
    len(rows.tokens),
    len(text.packed.validation),
    'held-out ' * text.is_held_out,
    text.describe(),
  )
  sampler = lm.run.describe_sampler()
  log.info('infilling with %(name)s, temperature %(temperature)g:', sampler)
  results = []
  for result in measure(lm, text, rows, ratios):
    log.info('  %s', describe(result))
    results.append(result)
  evaluate.append_result(lm, text, {'sampler': sampler, 'infill': results})
