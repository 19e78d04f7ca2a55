"""Models, samples and filled gaps against the known law of their text."""

import dataclasses
import json
import logging
import math
import re

import jax
import numpy as np
import pytest
from scipy import stats

from nanodlm import config as configs
from nanodlm import evaluate, laws, sample, train
from nanodlm import lm as lms
from nanodlm.data.sources import stories
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.evals import compare, infill
from nanodlm.evals import judge as judges
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.training import metrics
from nanodlm.types import InputError
from tests import launches, workdirs
from tests.data.stories_test import enumerate_stories, TINY
from tests.seams_test import start_of

LAW = stories.StoriesLaw(TINY)
LENGTH = 420
NUM_STORIES = 200
BYTES = BytesTokenizer()
DOCUMENTS = {
  'data__source': 'stories:small',
  'data__crop': 'document',
  'data__length': LENGTH,
}


@pytest.fixture(scope='module', autouse=True)
def tiny_world():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stories, 'NUM_STORIES', NUM_STORIES)
    patch.setattr(stories, 'WORLDS', {'small': TINY, '': stories.SMALL})
    yield


@pytest.fixture(scope='module')
def flat(tmp_path_factory):
  """A run in which all bytes are equally probable, and at temperature 0: 0."""
  folder = tmp_path_factory.mktemp('flat')
  changes = {**DOCUMENTS, 'sampler__temperature': 0.0}
  return workdirs.make_workdir(folder, scale=0.0, **changes)


@pytest.fixture(scope='module')
def everything():
  return enumerate_stories(TINY)


@pytest.fixture(scope='module')
def autoregressive(tmp_path_factory):
  folder = tmp_path_factory.mktemp('ar')
  return workdirs.make_workdir(folder, objective__name='ar', **DOCUMENTS)


def row_of(text):
  row = np.full(LENGTH, BYTES.separator_id, np.int32)
  ids = BYTES.encode(text)[:LENGTH]
  row[: len(ids)] = ids
  return row


def test_nats_of_held_out_documents(flat, caplog):
  lm = lms.load(flat)
  text = evaluate.open_text(lm)
  means = evaluate.evaluate_text(lm, text)
  assert 'not compared' not in caplog.text
  # Independently: the stories of the source that are held out.
  source = {LAW.sample(0, i) for i in range(NUM_STORIES)}
  rows = evaluate.validation_rows(lm.run, text.packed, 0).tokens
  texts = [bytes(row[row < 256].tolist()).decode() for row in rows]
  assert set(texts) <= source and 30 < len(texts) < 100
  nats = -np.array([LAW.log_prob(text) for text in texts])
  assert means['eval/law_nats'] == pytest.approx(nats.mean(), rel=1e-5)
  # All positions, with those after the end, cost the same.
  excess = LENGTH * math.log(lm.tokenizer.mask_id) - nats
  assert means['eval/excess_nats'] == pytest.approx(excess.mean(), rel=1e-5)
  quantile = stats.t.ppf(0.975, len(texts) - 1)
  half_width = quantile * excess.std(ddof=1) / len(texts) ** 0.5
  assert means['eval/excess_nats_ci95'] == pytest.approx(half_width, rel=1e-3)
  assert means['eval/nats_per_document'] == pytest.approx(
    means['eval/law_nats'] + means['eval/excess_nats'], rel=1e-6
  )
  assert f'truth ({nats.mean():.1f})' in evaluate.describe(means, False, text)


def test_a_model_that_is_the_law_has_no_excess(autoregressive):
  lm = lms.load(autoregressive)
  packed = evaluate.open_text(lm).packed
  batch = evaluate.validation_rows(lm.run, packed, 32)
  score = lms.make_score(lm.run, num_draws=1, batch_size=32)
  nats = score(lm.params, jax.random.key(0), batch)['nll']
  step = evaluate_steps.make_eval_step(
    lm.run.scorer, lm.run.mesh, num_draws=1, seed=0
  )

  def excess(law_nats):
    rows, sums = step(lm.params, batch._replace(law_nats=law_nats))
    return metrics.eval_means(metrics.join([rows]), sums, 'eval', True)

  means = excess(nats)
  assert means['eval/excess_nats'] == pytest.approx(0, abs=1e-3)
  assert means['eval/excess_nats_ci95'] == pytest.approx(0, abs=1e-3)
  assert means['eval/law_nats'] == pytest.approx(
    means['eval/nats_per_document'], rel=1e-5
  )
  # A document without a value is left out of both.
  some = np.where(np.arange(32) < 20, nats - 2, np.nan).astype(np.float32)
  means = excess(some)
  assert means['eval/excess_nats'] == pytest.approx(2, abs=1e-3)
  assert means['eval/law_nats'] == pytest.approx(nats[:20].mean() - 2, rel=1e-5)
  assert 'eval/law_nats' not in excess(np.full(32, np.nan, np.float32))


def test_when_nothing_is_compared(flat, caplog):
  lm = lms.load(flat)
  packed = evaluate.open_text(lm).packed

  def make(**changes):
    laws._log_once.cache_clear()
    caplog.clear()
    config = configs.read_run(flat)
    for key, value in changes.items():
      section, _, leaf = key.partition('__')
      config[section][leaf] = value
    run = lms.load(flat, settings=configs.make_settings(config)).run
    with caplog.at_level(logging.INFO, 'nanodlm'):
      found = evaluate._make_held_out(run, packed, run.settings.data.source)
    return found, ''.join(
      record.message for record in caplog.records if record.name == 'nanodlm'
    )

  held_out, messages = make()
  assert held_out is not None and not messages
  found, messages = make(data__crop='chunk')
  assert found is None and "data.crop='chunk'" in messages
  # The network would be given what the law has to predict.
  found, messages = make(data__padding='masked')
  assert found is None and "data.padding='masked'" in messages
  assert make(data__source='embedded') == (None, '')
  # A document that was cut, and one that the tokenizer changes.
  text = LAW.sample(0, 0)
  rows = [row_of(text), row_of(text * 3), row_of(text.upper())]
  # The last row only fills the batch.
  rows = np.stack([*rows, np.zeros_like(rows[0])])
  caplog.clear()
  nats = held_out.nats(
    lms.make_batch(rows, (rows * 0 + np.arange(4)[:, None]) < 3)
  )
  assert '\\x00' not in caplog.text
  assert nats[0] == pytest.approx(-LAW.log_prob(text))
  assert np.isnan(nats[1:]).all()


def test_documents_that_are_left_out_are_counted(flat, caplog):
  lm = lms.load(flat)
  text = evaluate.open_text(lm)
  counts = {'num_dropped_documents': 20, 'num_documents': 60}
  packed = dataclasses.replace(text.packed, metadata={'validation': counts})
  evaluate.make_evaluate(lm.run, packed, text.source)
  assert '25.0% of the documents' in caplog.text
  assert f'{-math.log(0.75):.2f} nats' in caplog.text


def test_another_world_than_that_of_training(flat, caplog):
  config = configs.read_run(flat)
  config.data.source = 'stories'
  settings = configs.make_settings(config, ['data.source'])
  evaluate.open_text(lms.load(flat, settings=settings))
  assert "'stories:small', in which 100 of 100" in caplog.text


def test_samples():
  possible = [LAW.sample(5, i) for i in range(3)]
  impossible = possible[0].replace('had', 'has', 1)
  means = laws.sample_means(LAW, [*possible, impossible, possible[2]])
  nats = [-LAW.log_prob(text) for text in (*possible, possible[2])]
  assert means['valid_share'] == 0.8 and means['distinct_share'] == 0.8
  assert means['law_nats'] == pytest.approx(np.mean(nats))
  half_width = stats.t.ppf(0.975, 3) * np.std(nats, ddof=1) / 2
  assert means['law_nats_ci95'] == pytest.approx(half_width)
  # Wilson's interval of 4 out of 5.
  assert metrics.share_interval(4, 5) == pytest.approx(
    (0.37553, 0.96377), abs=1e-4
  )
  assert means['valid_share_low'] == pytest.approx(0.37553, abs=1e-4)
  assert means['valid_share_high'] == pytest.approx(0.96377, abs=1e-4)
  assert '37.6% to 96.4%' in laws.describe_samples(means, 5)
  assert 'law_nats' not in laws.sample_means(LAW, [impossible])
  assert metrics.share_interval(0, 16) == pytest.approx((0, 0.19361), abs=1e-4)


def test_divergence():
  p = np.array([0.25, 0.5, 0.0, 1.0])
  assert laws.divergence(p, p) == 0
  assert laws.divergence(p[2:], 1 - p[2:]) == pytest.approx(math.log(2))
  # H(1/2) - (H(1/4) + H(3/4)) / 2.
  h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
  found = laws.divergence(np.array([0.25]), np.array([0.75]))
  assert found == pytest.approx(math.log(2) - h)


def test_features(everything):
  features = laws.Features(LAW)
  exact = dict.fromkeys(features.frequencies, 0.0)
  for text, probability in everything.items():
    for name in LAW.features(text) & exact.keys():
      exact[name] += probability
  p, q = np.array([*exact.values()]), np.array([*features.frequencies.values()])
  error = np.sqrt(np.clip(p * (1 - p), 0, 1) / laws.NUM_REFERENCES)
  assert np.all(np.abs(p - q) < 5 * error + 1e-9) and len(p) > 40
  texts = [LAW.sample(9, i) for i in range(400)]
  own = features.own_divergence(400)
  assert 0 < features.divergence(texts) < 1.5 * own
  same = [text for text in texts if text.split()[2] == 'Ada']
  assert features.divergence(same) > 3 * own
  assert features.divergence(['']) > 0.05  # Any text has features.


def test_bounds_are_those_of_documents(flat, autoregressive):
  lm = lms.load(autoregressive)
  packed = evaluate.open_text(lm).packed
  means = evaluate.make_evaluate(lm.run, packed)(lm.params)
  texts = laws.read_texts(
    BYTES,
    [packed.validation[i]['tokens'] for i in range(len(packed.validation))],
  )
  nats = [bound.nats for bound in lm.bound(texts)]
  assert np.mean(nats) == pytest.approx(
    means['eval/nats_per_document'], rel=1e-5
  )
  # A flat network pays for each position that is scored: the whole row, or the
  # text and its end.
  lm = lms.load(flat)
  data = dataclasses.replace(lm.run.settings.data, padding='masked')
  settings = dataclasses.replace(lm.run.settings, data=data)
  masked = dataclasses.replace(
    lm, run=dataclasses.replace(lm.run, settings=settings)
  )
  for model, num in (lm, LENGTH), (masked, len(texts[0]) + 1):
    (bound,) = model.bound(texts[:1])
    assert bound.nats == pytest.approx(num * math.log(BYTES.mask_id), rel=1e-5)
    assert bound.num_tokens == bound.num_bytes == len(texts[0])
  # A text that fills a row is scored without an end.
  (bound,) = lm.bound(['x' * LENGTH])
  assert bound.nats == pytest.approx(LENGTH * math.log(BYTES.mask_id), rel=1e-5)


@pytest.mark.parametrize('num_gaps', [1, 3, 8])
def test_gaps_of_words(everything, num_gaps):
  others = [(row_of(text), p) for text, p in everything.items()]
  rng = np.random.default_rng(num_gaps)
  for i in range(4):
    text = LAW.sample(11, i)
    row = row_of(text)
    words = infill.find_words(LAW, BYTES, row)
    assert [word.text for word in words] == stories._words(
      text.replace('.', '').replace(',', '')
    ) or len(words) > 20
    chosen = sorted(rng.choice(len(words), num_gaps, replace=False))
    gaps = [words[k] for k in chosen]
    posterior = infill.find_posterior(LAW, BYTES, row, gaps)
    is_gap = np.zeros(LENGTH, bool)
    is_gap[np.concatenate([word.places for word in gaps])] = True
    # By enumeration of all that agrees with what the network is given.
    total, marginals = 0.0, [{} for _ in chosen]
    for other, p in others:
      if np.all((other == row) | is_gap):
        total += p
        for marginal, gap in zip(marginals, gaps):
          word = bytes(other[gap.places].tolist()).decode()
          marginal[word] = marginal.get(word, 0.0) + p
    assert posterior.log_prob == pytest.approx(math.log(total))
    for found, expected in zip(posterior.marginals(), marginals):
      expected = {word: p / total for word, p in expected.items()}
      assert found == pytest.approx(expected)


def test_a_prompt_that_ends_with_text_is_a_document(flat):
  run = lms.load(flat).run
  tokens, fixed = lms.lay_out(run, 'One {3}.', LENGTH)
  expected = row_of('One ___.')
  expected[4:7] = BYTES.mask_id
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_array_equal(np.flatnonzero(~fixed), [4, 5, 6])
  # An end in the gap does not end the text; what fills the row is not shown.
  tokens[4:7] = [ord('x'), BYTES.separator_id, ord('y')]
  assert len(lms.shown_tokens(run, tokens, fixed)) == 8
  # A text without an end is not filled up, nor is a shorter canvas.
  assert len(lms.lay_out(run, 'One {3}', LENGTH)[0]) == 7
  assert len(lms.lay_out(run, 'One {3} day.', 20)[0]) == 20


def test_the_law_of_the_gaps_of_a_prompt(everything):
  class Words:
    encode = staticmethod(stories._words)

  text, most, hidden = LAW.sample(3, 0), {}, ''
  words = stories._words(text)
  others = {other: stories._words(other) for other in everything}
  others = {x: y for x, y in others.items() if len(y) == len(words)}
  names, agrees = [*others], np.array([*others.values()]) == words
  for word in sorted(set(filter(str.isalpha, words))):
    # Its first occurrence, if all are gaps.
    is_gap, shares = np.array(words) == word, {}
    found = np.flatnonzero((agrees | is_gap).all(axis=1))
    for other in (names[i] for i in found):
      first = others[other][np.argmax(is_gap)]
      shares[first] = shares.get(first, 0.0) + everything[other]
    if len(shares) > len(most):
      most, hidden = shares, word
  assert len(most) > 1
  prompt = re.sub(rf'\b{hidden}\b', '{1}', text)
  shown = laws.describe_gaps(LAW, Words, prompt).partition(' | ')[0]
  for word, p in sorted(most.items(), key=lambda item: -item[1])[:3]:
    assert f'{word} {p / sum(most.values()):.0%}' in shown
  # Gaps without a size, and tokens that are not words.
  assert laws.describe_gaps(LAW, Words, text) == ''
  assert laws.describe_gaps(LAW, BYTES, prompt) == ''


def test_infilling(flat, monkeypatch):
  lm = lms.load(flat)
  text = evaluate.open_text(lm)
  rows = evaluate.validation_rows(lm.run, text.packed, 8)
  cut = row_of(LAW.sample(0, 0) * 3)
  tokens = np.concatenate([rows.tokens, [cut]])
  rows = lms.make_batch(tokens, np.ones(tokens.shape, bool))
  (wrong, _) = infill.measure_words(lm, LAW, rows, [0.5])
  # It writes bytes that do not form words.
  assert wrong['accuracy'] == wrong['exact_match'] == 0
  assert (wrong['num_examples'], wrong['num_left_out']) == (8, 1)
  assert 0.5 < wrong['exact_accuracy'] <= wrong['bayes_accuracy'] < 1
  # The truth.
  given = rows.tokens[:8]
  monkeypatch.setattr(
    lms, 'make_fill', lambda *args: lambda *canvas: (given, 4.0)
  )
  (right, span) = infill.measure_words(lm, LAW, rows, [0.5])
  assert right['accuracy'] == right['exact_match'] == 1
  for key in ('bayes_accuracy', 'num_words'):
    assert right[key] == wrong[key]
  assert span['pattern'] == 'span' and 'at most' in infill.describe(span)
  monkeypatch.setattr(stories, 'MAX_VISITED', 3)
  with pytest.raises(InputError, match='--infill=0.9.*over 3 beginnings'):
    next(infill.measure_words(lm, LAW, rows, [0.9]))
  monkeypatch.setattr(infill, 'find_words', lambda *args: [])
  with pytest.raises(InputError, match="'bytes' spell several words"):
    next(infill.measure_words(lm, LAW, rows, [0.5]))


def test_samples_of_a_run(flat, capsys):
  lm = lms.load(flat).with_sampler({'num_samples': 1})
  sample.sample_prompts(lm, [])
  output = capsys.readouterr().out
  assert 'is impossible: ' in output and '0 of 1 samples possible' in output
  with open(f'{flat}/samples.jsonl') as file:
    line = json.loads(file.readline())
  assert line['law_nats'] is None and "expected 'One'" in line['problem']


def test_given_text_after_a_sampled_end_belongs_to_the_document(flat):
  run, text = lms.load(flat).run, LAW.sample(0, 0)
  row = row_of(text)

  def verdict(given):
    line = sample._line(run, LAW, 0, '', row, given, 1.0)
    return line['shown'], line['problem'], line['law_nats']

  given, nats = np.arange(LENGTH) < 4, pytest.approx(-LAW.log_prob(text))
  assert verdict(given) == (text, None, nats)
  assert verdict(np.zeros(LENGTH, bool)) == (text, None, nats)
  # What fills the row after a prompt is given, too, but it is not text.
  assert verdict(np.ones(LENGTH, bool)) == (text, None, nats)
  row[-2], given[-2] = ord('.'), True
  whole, problem, nats = verdict(given)
  assert whole.startswith(text) and whole.endswith('.')
  assert len(whole) > len(text) and LAW.explain(whole) is not None
  assert problem == LAW.explain(whole) and nats is None
  # An end that comes first is not the end of a possible text either.
  row = row_of('\0' + text)
  row[0] = BYTES.separator_id
  assert verdict(np.zeros(LENGTH, bool))[1] is not None


def test_texts_are_compared_to_their_ends(flat):
  run, text = lms.load(flat).run, LAW.sample(0, 0)
  rows = np.stack([row_of(text), row_of('x' * LENGTH)])
  short, long = compare._cut_ends(run, rows)
  np.testing.assert_array_equal(short, row_of(text)[: len(text) + 1])
  assert len(long) == LENGTH
  quality = judges.measure_quality(judges.Judge(), [short, long], BYTES)
  assert quality['sample_entropy'] == pytest.approx(
    stats.entropy(np.bincount(short)) / 2
  )


def test_compare(flat, tmp_path, capsys):
  output = tmp_path / 'compared'
  args = ['--judge=law', '--num_steps=2', '--num_samples=16', '--noplot']
  run_main = lambda workdir, output, *args: launches.run_mode(
    compare, f'--workdirs={workdir}', f'--output={output}', *args
  )
  assert run_main(flat, output, *args) == 0
  results = json.loads((output / 'comparison.json').read_text())
  real, drawn = results['runs'][0]['points']
  assert real['valid_share'] == 1 and drawn['valid_share'] == 0
  assert real['divergence'] < 2 * real['own_divergence']
  assert drawn['divergence'] > 5 * drawn['own_divergence']
  assert real['law_nats'] > 0 and 'law_nats' not in drawn
  assert results['runs'][0]['excess_nats'] > 0
  assert {'valid_share', 'divergence'} <= set(results['panels'])
  table = capsys.readouterr().out
  assert 'possible' in table and 'above the law' in table
  # Another text is laid out as in training: each document is a row.
  (tmp_path / 'a.jsonl').write_text('{"text": "One day."}\n' * 8)
  other = f'--source=jsonl:{tmp_path}/a.jsonl'
  assert run_main(flat, tmp_path / 'other', other) == 0
  results = json.loads((tmp_path / 'other/comparison.json').read_text())
  (result,) = results['runs']
  assert result['num_examples'] == 8 and 'law_nats' not in result
  assert result['nats_per_document'] == pytest.approx(
    LENGTH * math.log(BYTES.mask_id), rel=1e-5
  )
  # A source without a law, and rows that are not documents.
  assert run_main(flat, tmp_path / 'new', '--source=embedded', *args) == 2
  error = capsys.readouterr().err
  assert '--judge=law' in error and "data.source='embedded'" in error
  assert not (tmp_path / 'new').exists()
  data = dataclasses.replace(lms.load(flat).run.settings.data, crop='chunk')
  with pytest.raises(InputError, match="--judge=law: data.crop='chunk'"):
    judges.make_judge('law').check(data)
  # Held-out text without a law, and documents that would be cut.
  data = dataclasses.replace(data, crop='document', eval_source='embedded')
  with pytest.raises(InputError, match="law: .*eval_source='embedded'"):
    judges.make_judge('law').check(data)
  with pytest.raises(InputError, match='--length=64.*data.length=420'):
    judges.make_judge('law').check(
      dataclasses.replace(data, eval_source=''), 64
    )


def test_training(tmp_path, caplog):
  start = start_of(
    tmp_path,
    **DOCUMENTS,
    train__num_steps=2,
    train__num_samples=6,
    checkpoint__every_steps=2,
  )
  with caplog.at_level(logging.INFO, 'nanodlm'):
    assert train.main(start) == 0
  with open(f'{start.workdir}/metrics.jsonl') as file:
    lines = [json.loads(line) for line in file]
  line = {key: value for line in lines for key, value in line.items()}
  assert line['samples/valid_share'] == 0
  assert line['samples/distinct_share'] == 1
  assert 8 < line['eval/law_nats'] < 12 < line['eval/excess_nats']
  assert caplog.text.count('is impossible: ') == sample.MAX_SHOWN
  assert '0 of 6 samples' in caplog.text
