"""Evaluation of a workdir: other texts, and the noise of the estimator."""

import dataclasses
import json
import logging
import math
import os
import shutil

import jax
import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import evaluate
from nanodlm import lm as lms
from nanodlm import run as runs
from nanodlm.data import tokenizers
from nanodlm.data.config import TokenizerConfig
from nanodlm.data.tokenizers import chat, saved
from nanodlm.objectives import masking
from nanodlm.types import InputError
from tests import foreign_tokenizers, workdirs

# Zero parameters: each token costs log of this many, whatever the noise.
NUM_IDS = 257


@pytest.fixture(scope='module')
def flat(tmp_path_factory):
  return workdirs.make_workdir(tmp_path_factory.mktemp('flat'), scale=0.0)


def settings_of(workdir, source=''):
  config = configs.read_run(workdir)
  config.data.source = source or config.data.source
  config.eval.num_draws = 4
  given = {'data.source', 'data.crop', 'eval.num_draws', 'eval.batch_size'}
  return configs.make_settings(config, given)


def evaluate_on(workdir, source, **options):
  lm = lms.load(workdir, settings=settings_of(workdir, source))
  return evaluate.evaluate_text(lm, evaluate.open_text(lm), **options)


def test_a_workdir_has_its_own_tokenizer(tmp_path):
  # The run and the files that it came from may be gone.
  config = configs.load()
  find = lambda: evaluate.own_tokenizer(
    configs.make_settings(config), str(tmp_path)
  )
  config.tokenizer.update(name='run', path='/gone/run')
  own = find()
  assert (own.name, own.path, own.vocab_size) == ('run', str(tmp_path), 0)
  model = foreign_tokenizers.path_of_sentencepiece(tmp_path, vocab_size=60)
  for name, path, gone in (
    ('sentencepiece', model, '/gone/a.model'),
    ('bytes', '', ''),
  ):
    made = TokenizerConfig(name, path, 0, 'plain')
    saved.save_tokenizer(tokenizers.make_tokenizer(made), tmp_path)
    config.tokenizer.update(
      name=name, path=gone, chat_template='/gone/template.jinja'
    )
    own = find()
    assert own.name == name and own.chat_template == chat.TEMPLATES['plain']
  config.tokenizer.update(name='sentencepiece', path='', vocab_size=300)
  assert find() == configs.make_settings(config).tokenizer


@pytest.mark.parametrize('tokenizer', ['bytes', 'sentencepiece'])
def test_other_texts_in_bytes(tokenizer, tmp_path):
  changes = {'tokenizer__name': tokenizer}
  if tokenizer == 'sentencepiece':
    changes['tokenizer__vocab_size'] = 300
  workdir = workdirs.make_workdir(tmp_path / 'made', scale=0.0, **changes)
  text = 'Grüße aus der Ferne, Füße im Gras.\n' * 50
  (tmp_path / 'a.txt').write_text(text)
  lines = [json.dumps({'text': f'{i} {text[:200]}'}) for i in range(20)]
  (tmp_path / 'b.jsonl').write_text('\n'.join(lines))
  lm = lms.load(workdir)
  run = lm.run
  assert lm.step == 0 and run.tokenizer.name == tokenizer
  for source in (f'text:{tmp_path}/a.txt', f'jsonl:{tmp_path}/b.jsonl'):
    means = evaluate_on(workdir, source)
    np.testing.assert_allclose(
      means['eval/nll'], math.log(run.tokenizer.mask_id), rtol=1e-5
    )
    changed = lms.load(workdir, settings=settings_of(workdir, source))
    packed = evaluate.open_text(changed).packed
    tokens = evaluate.validation_rows(run, packed, 0).tokens.reshape(-1)
    # Bytes of the text; a decoded separator has two bytes, which do not count.
    num_bytes = len(run.tokenizer.decode(tokens).encode()) - 2 * np.sum(
      tokens == run.tokenizer.separator_id
    )
    expected = math.log2(run.tokenizer.mask_id) * tokens.size / num_bytes
    np.testing.assert_allclose(means['eval/bits_per_byte'], expected, rtol=0.01)
  with open(f'{workdir}/eval.jsonl') as file:
    lines = [json.loads(line) for line in file]
  assert [line['source'].split(':')[0] for line in lines] == ['text', 'jsonl']
  assert lines[0]['changed'] == {'eval.num_draws': 4}
  assert lines[1]['eval/bits_per_byte'] == means['eval/bits_per_byte']


def test_noise_of_both_estimators(flat, caplog):
  lm = lms.load(flat)
  packed = evaluate.open_text(lm).packed
  noise = evaluate.measure_noise(lm.run, packed, lm.params, 0)
  # All tokens cost the same. Noise by count then has zero variance, and a
  # Bernoulli(t) mask divided by t has the variance (1 - t) / t.
  assert noise['noise_ci95'] < 1e-5
  spread = (
    math.log(1 / masking.NAIVE_MIN_NOISE) / (1 - masking.NAIVE_MIN_NOISE) - 1
  )
  variance = math.log(NUM_IDS) ** 2 * spread / workdirs.LENGTH / 2
  expected = 1.96 * math.sqrt(variance / len(packed.validation))
  assert 0.6 < noise['naive_noise_ci95'] / expected < 1.5
  assert noise['calls_ratio'] > 1e3
  with caplog.at_level(logging.INFO, 'nanodlm'):
    means = evaluate_on(flat, '', noise_examples=16)
  assert means['eval/naive_noise_ci95'] > 0
  assert 'independent times would give' in caplog.text
  assert 'on only 16 row' in caplog.text


def test_score_takes_any_number_of_rows(tmp_path):
  lm = lms.load(workdirs.make_workdir(tmp_path))
  tokens = np.random.default_rng(0).integers(256, size=(11, 16))
  eligible = np.ones((11, 16), bool)
  values = [
    lms.make_score(lm.run, num_draws=2, batch_size=size)(
      lm.params, jax.random.key(1), lms.make_batch(tokens, eligible)
    )['nll']
    for size in (8, 16)
  ]
  assert values[0].shape == (11,)
  np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
  index = np.arange(3, 5, dtype=np.int32)
  some = lms.make_batch(tokens[3:5], eligible[3:5], index=index)
  score = lms.make_score(lm.run, num_draws=2, batch_size=8)
  np.testing.assert_allclose(
    score(lm.params, jax.random.key(1), some)['nll'], values[0][3:5], rtol=1e-5
  )


def test_exact_values_have_no_noise(tmp_path):
  lm = lms.load(workdirs.make_workdir(tmp_path, objective__name='ar'))
  with pytest.raises(InputError, match='exact'):
    evaluate.measure_noise(lm.run, None, lm.params, 4)


def test_with_sampler(flat):
  run = lms.load(flat).run
  section = lambda run: run.settings.sampler
  other = run.with_sampler({'name': 'ancestral', 'temperature': 0.5})
  assert section(other)['num_steps'] == configs.load().sampler.num_steps
  same = run.with_sampler({'temperature': 0.5})
  assert section(same)['num_steps'] == section(run)['num_steps'] == 4
  assert section(run)['temperature'] == 1.0
  # A number of steps replaces listed times, and the other way round.
  listed = other.with_sampler({'grid': '1,0.3,0'})
  assert section(listed)['grid'] == '1,0.3,0'
  stepped = listed.with_sampler({'name': 'ancestral', 'num_steps': 8})
  assert section(stepped)['grid'] == 'uniform'
  assert section(stepped)['num_steps'] == 8
  cosine = other.with_sampler({'grid': 'cosine', 'num_steps': 8})
  again = cosine.with_sampler({'num_steps': 9})
  assert section(again)['grid'] == 'cosine'
  with pytest.raises(InputError, match='does not fit'):
    run.with_sampler({'name': 'ar'})
  with pytest.raises(InputError, match="sampler.num_steps='8'"):
    run.with_sampler({'num_steps': '8'})
  with pytest.raises(InputError, match='sampler.num_step: .*num_steps'):
    run.with_sampler({'num_step': 8})


def letters(seed, size=3000):
  rng = np.random.default_rng(seed)
  return ''.join(rng.choice([*'abcdefghijklmnopqrstuvwxyz'], size))


def open_text(workdir, **changes):
  config = configs.read_run(workdir)
  config.data.update(changes)
  given = [f'data.{key}' for key in changes]
  settings = configs.make_settings(config, given)
  return evaluate.open_text(lms.load(workdir, settings=settings))


def test_text_that_was_trained_on(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = letters(0)
  folder = tmp_path / 'made'
  (tmp_path / 'text.txt').write_text(text)
  workdir = workdirs.make_workdir(
    folder, text=text, data__source='text:text.txt'
  )
  record = tmp_path / 'made/run/trained_on.npz'

  def share_of(**changes):
    found = open_text(workdir, **changes)
    assert found.is_held_out == (found.is_own_split or found.trained_share == 0)
    assert ('trained on' in found.describe()) != found.is_own_split
    return found.trained_share

  # The run trains on the first 2100 letters.
  for has_record in (True, False):
    if not has_record:
      record.unlink()  # As in a workdir of an older version.
    own = open_text(workdir)
    assert own.is_held_out and not own.describe()
    assert share_of(eval_fraction=0.9) == pytest.approx(18 / 27, abs=0.02)
    assert share_of(eval_fraction=0.2) == 0
    # All of another file is evaluated, or the part that is asked for.
    (tmp_path / 'other.txt').write_text(text[600:1600])
    other = open_text(workdir, source='text:other.txt')
    assert len(other.packed.validation) == -(-1001 // workdirs.LENGTH)
    assert other.trained_share == 1
    some = open_text(workdir, source='text:other.txt', eval_fraction=0.5)
    assert len(some.packed.validation) == 501 // workdirs.LENGTH
    assert some.trained_share == 1
    assert share_of(source='text:other.txt') == 1
    half = tmp_path / 'half.txt'
    half.write_text(text[:800] + letters(1, 800))
    assert share_of(source=f'text:{half}') == pytest.approx(0.5, abs=0.02)
    lines = [json.dumps({'text': text[i : i + 500]}) for i in (1500, 0, 700)]
    (tmp_path / 'c.jsonl').write_text('\n'.join(lines))
    assert share_of(source='jsonl:c.jsonl') == 1
    assert share_of(eval_source='text:other.txt') == 1
    if has_record:
      saved = record.read_bytes()
  # The same name is another text now; the prepared data may be gone.
  record.write_bytes(saved)
  shutil.rmtree(folder / 'data')
  (tmp_path / 'text.txt').write_text(text[:1500])
  assert share_of() == 1
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'elsewhere/text.txt').write_text(text[100:1100])
  monkeypatch.chdir(tmp_path / 'elsewhere')
  assert share_of() == 1
  (tmp_path / 'elsewhere/text.txt').write_text(letters(2))
  assert share_of() == 0
  # Nothing is claimed if nothing is known.
  record.unlink()
  unknown = open_text(workdir)
  assert unknown.trained_share is None and not unknown.is_held_out
  assert 'unknown' in unknown.describe()
  lm = lms.load(workdir)
  means = evaluate.evaluate_text(lm, unknown)
  exact = lm.run.objective.exact
  assert 'held-out' not in evaluate.describe(means, exact, unknown)
  assert 'held-out' in evaluate.describe(means, exact, own)
  with open(f'{workdir}/eval.jsonl') as file:
    line = json.loads(file.read())
  assert line['trained_share'] is None and line['is_held_out'] is False


def test_one_source_of_a_mixture_keeps_its_split(tmp_path):
  for i in range(2):
    (tmp_path / f'{i}.txt').write_text(letters(i))
  names = [f'text:{tmp_path}/{i}.txt' for i in range(2)]
  spec = f'mix:0.5*{names[0]}+0.5*{names[1]}'
  workdir = workdirs.make_workdir(tmp_path / 'made', data__source=spec)
  for source in (spec, *names):
    text = open_text(workdir, source=source)
    assert text.is_own_split and text.trained_share == 0
    share = 0.3 * 3001 * (1 + (source == spec))
    assert abs(len(text.packed.validation) - share / workdirs.LENGTH) < 2
  # Imported weights and text that an earlier run was trained on.
  config = configs.read_run(workdir)
  config.checkpoint.init_from = '/gone'
  settings = configs.make_settings(config)
  with open(f'{workdir}/config.json', 'w') as file:
    file.write(settings.to_json())
  os.remove(f'{workdir}/trained_on.npz')
  text = open_text(workdir)
  assert text.is_own_split and not text.is_held_out
  assert 'trained on before' in text.describe()


def test_no_run(tmp_path):
  with pytest.raises(InputError, match='is not the folder of a run'):
    lms.load(str(tmp_path))


@pytest.mark.parametrize(
  'mesh, expected',
  [((-1, 2, 2), (2, 2, 2)), ((1, 16, 1), (8, 1, 1)), ((-1, 3, 1), (8, 1, 1))],
)
def test_a_run_can_be_evaluated_on_other_devices(mesh, expected):
  config = configs.load()
  config.mesh.update(dict(zip(('data', 'fsdp', 'tensor'), mesh)))
  config.model.num_heads = 8
  run = runs.make_run(configs.make_settings(config), refit=True)
  assert tuple(run.mesh.shape.values()) == expected
  if expected == (8, 1, 1):
    given = configs.make_settings(config, ['mesh.data'])
    with pytest.raises(InputError, match='mesh='):
      runs.make_run(given, refit=True)


def test_the_training_text_named_by_hand_is_not_the_eval_source(tmp_path):
  (tmp_path / 'other.txt').write_text(letters(1))
  workdir = workdirs.make_workdir(
    tmp_path / 'made',
    text=letters(0),
    data__eval_source=f'text:{tmp_path}/other.txt',
  )
  assert open_text(workdir).trained_share == 0
  source = configs.read_run(workdir).data.source
  share = open_text(workdir, source=source).trained_share
  assert share == pytest.approx(1, abs=0.005)  # It left out the last tokens.


def test_rows_of_ids_at_another_length(tmp_path):
  parquet = pytest.importorskip('pyarrow.parquet')
  arrow = pytest.importorskip('pyarrow')
  ids = np.random.default_rng(0).integers(256, size=(20, 16)).tolist()
  parquet.write_table(arrow.table({'tokens': ids}), tmp_path / 'a.parquet')
  source = f'tokens:{tmp_path}/a.parquet'
  workdir = workdirs.make_workdir(tmp_path / 'made', data__source=source)
  assert open_text(workdir).is_own_split
  # The last 96 of 320 ids are held out. In rows of 48, 96 of 288 are: of their
  # 81 passages of 16 ids, 17 are among the first 224.
  text = open_text(workdir, length=48)
  assert len(text.packed.validation) == 2
  assert not text.is_own_split and not text.is_held_out
  assert text.trained_share == pytest.approx(17 / 81)


def test_other_sources_of_a_run_with_an_eval_source(tmp_path):
  other, pairs = tmp_path / 'other.txt', tmp_path / 'pairs.jsonl'
  other.write_text(letters(1))
  line = json.dumps({'prompt': 'abc', 'response': 'defg'})
  pairs.write_text(f'{line}\n' * 4)
  workdir = workdirs.make_workdir(
    tmp_path / 'made',
    text=letters(0),
    data__eval_source=f'text:{other}',
    data__eval_fraction=0.0,
    data__crop='random',
    data__clean_prefix_rate=0.5,
  )

  def open_as(**changes):
    changes = {f'data.{key}': value for key, value in changes.items()}
    start = configs.Start('eval', workdir, configs.load(), False, changes)
    settings = start.resolve_reading(('data.',))
    return evaluate.open_text(lms.load(workdir, settings=settings))

  num_rows = lambda **changes: len(open_as(**changes).packed.validation)
  assert num_rows() == num_rows(source=f'text:{other}') == -(-3001 // 16)
  assert num_rows(source=f'text:{other}', eval_fraction=0.5) == 1501 // 16
  assert num_rows(source=f'text:{other}', eval_tokens=160) == 10
  assert open_as(source=f'pairs:{pairs}').packed.is_documents
  for key, source in (('source', 'text:/a/b'), ('eval_source', 'text:/a/b')):
    with pytest.raises(InputError, match=f"^data.{key}='{source}'"):
      open_as(**{key: source})
  with pytest.raises(InputError, match='^data.eval_fraction=0.5'):
    open_as(eval_fraction=0.5)


def test_how_much_of_a_held_out_text_is_also_in_training():
  show = lambda **line: evaluate.shown_share(line)
  assert show(is_held_out=True, trained_share=0.0004) == 'held out'
  assert '41.2%' in show(is_held_out=True, trained_share=0.412)
  assert show(is_held_out=False, trained_share=0.412) == '41.2%'
  assert show(is_held_out=False) == 'unknown'


def test_a_whole_split_has_the_same_interval_in_any_batches(tmp_path):
  workdir = workdirs.make_workdir(tmp_path)
  lm = lms.load(workdir)
  packed = evaluate.open_text(lm).packed
  found = []
  for batch_size in (8, 24):
    options = dataclasses.replace(lm.run.settings.eval, batch_size=batch_size)
    settings = dataclasses.replace(lm.run.settings, eval=options)
    run = dataclasses.replace(lm.run, settings=settings)
    found.append(evaluate.make_evaluate(run, packed)(lm.params))
  assert found[0] == pytest.approx(found[1], rel=1e-5)
  # The same from the values of single rows.
  rows = evaluate.validation_rows(lm.run, packed, 0)
  score = lms.make_score(lm.run, num_draws=2, batch_size=8)
  key = jax.random.key(lm.run.settings.eval.seed)
  nll = np.asarray(score(lm.params, key, rows)['nll'], np.float64)
  num = len(nll)
  assert found[0]['eval/num_examples'] == num > 30
  mean = nll.sum() / rows.num_tokens.sum()
  parts = [nll[i * num // 30 : (i + 1) * num // 30] for i in range(30)]
  errors = [np.sum(part - mean * workdirs.LENGTH) for part in parts]
  expected = 2.04523 * math.sqrt(np.square(errors).sum() * 30 / 29)
  expected /= rows.num_tokens.sum()
  assert found[0]['eval/nll'] == pytest.approx(mean, rel=1e-5)
  assert found[0]['eval/nll_ci95'] == pytest.approx(expected, rel=1e-4)


def test_a_chat_template_that_has_changed(tmp_path):
  chats, template = tmp_path / 'chat.jsonl', tmp_path / 'template.jinja'
  say = lambda role, content: {'role': role, 'content': content}
  lines = [
    {'messages': [say('user', f'Is {i} odd?'), say('assistant', f'{i % 2}')]}
    for i in range(40)
  ]
  chats.write_text('\n'.join(map(json.dumps, lines)))
  template.write_text(chat.TEMPLATES['plain'])
  # The tokenizer is trained on the text; its ids do not depend on the template.
  workdir = workdirs.make_workdir(
    tmp_path / 'folder',
    data__source=f'chat:{chats}',
    data__length=64,
    data__crop='document',
    tokenizer__name='sentencepiece',
    tokenizer__vocab_size=300,
    tokenizer__chat_template=str(template),
  )
  assert len(evaluate.open_text(lms.load(workdir)).packed.validation)
  template.write_text(chat.TEMPLATES['plain'].replace('| trim', ''))
  with pytest.raises(InputError, match='tokenizer.chat_template=.* changed'):
    evaluate.open_text(lms.load(workdir))
