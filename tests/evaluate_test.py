"""Evaluation of a workdir: other texts, and the noise of the estimator."""

import dataclasses
import json
import logging
import math

import jax
import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import evaluate
from nanodlm.objectives import masking
from nanodlm.types import InputError
from tests import workdirs

# Zero parameters: each token costs log of this many, whatever the noise.
NUM_IDS = 257


@pytest.fixture(scope='module')
def flat(tmp_path_factory):
  return workdirs.make_workdir(tmp_path_factory.mktemp('flat'), scale=0.0)


def evaluate_on(workdir, source, **options):
  defaults = configs.load_base()
  config = evaluate.load_config(workdir, defaults)
  trained_on = config.data.source
  config.data.source = source or trained_on
  settings = configs.validate(config)
  subject = evaluate.open_subject(config, settings, workdir, trained_on)
  return evaluate.evaluate_subject(subject, **options)


def test_a_workdir_has_its_own_tokenizer(tmp_path):
  # The run or the file that it came from may be gone.
  for name, path, expected in (
    ('run', '/gone/run', str(tmp_path)),
    ('sentencepiece', '/gone/a.model', str(tmp_path / 'tokenizer.model')),
    ('sentencepiece', '', ''),
    ('bytes', '', ''),
  ):
    config = configs.load_base()
    config.tokenizer.name, config.tokenizer.path = name, path
    config.tokenizer.vocab_size = 300 * (name == 'sentencepiece' and not path)
    own = evaluate.own_tokenizer(configs.validate(config), str(tmp_path))
    assert (own.name, own.path) == (name, expected)
    assert own.vocab_size == config.tokenizer.vocab_size


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
  run, params, step = evaluate.open_run(workdir)
  assert step == 0 and run.tokenizer.name == tokenizer
  for source in (f'text:{tmp_path}/a.txt', f'jsonl:{tmp_path}/b.jsonl'):
    means = evaluate_on(workdir, source)
    np.testing.assert_allclose(
      means['eval/nll'], math.log(run.tokenizer.mask_id), rtol=1e-5
    )
    data = dataclasses.replace(run.settings.data, source=source)
    packed = evaluate.open_data(
      dataclasses.replace(run.settings, data=data),
      workdir,
      run.tokenizer,
      run.settings.data.source,
    )
    tokens = evaluate.validation_rows(run, packed, 0)['tokens'].reshape(-1)
    # The bytes of the text itself; a separator is printed as two and counts none.
    num_bytes = len(run.tokenizer.decode(tokens).encode()) - 2 * np.sum(
      tokens == run.tokenizer.separator_id
    )
    expected = math.log2(run.tokenizer.mask_id) * tokens.size / num_bytes
    np.testing.assert_allclose(means['eval/bits_per_byte'], expected, rtol=0.01)
  with open(f'{workdir}/eval.jsonl') as file:
    lines = [json.loads(line) for line in file]
  assert [line['source'].split(':')[0] for line in lines] == ['text', 'jsonl']
  assert lines[1]['eval/bits_per_byte'] == means['eval/bits_per_byte']


def test_noise_of_both_estimators(flat, caplog):
  run, params, _ = evaluate.open_run(flat)
  packed = evaluate.open_data(
    run.settings, flat, run.tokenizer, run.settings.data.source
  )
  noise = evaluate.measure_noise(run, packed, params, 0)
  # All tokens cost the same: noise by count has no variance, and sum / t of a
  # Bernoulli(t) mask has (1 - t) / t for each token.
  assert noise['noise_ci95'] < 1e-5
  spread = (
    math.log(1 / masking.NAIVE_MIN_TIME) / (1 - masking.NAIVE_MIN_TIME) - 1
  )
  variance = math.log(NUM_IDS) ** 2 * spread / workdirs.LENGTH / 2
  expected = 1.96 * math.sqrt(variance / len(packed.validation))
  assert 0.6 < noise['naive_noise_ci95'] / expected < 1.5
  assert noise['calls_ratio'] > 1e3
  with caplog.at_level(logging.INFO, 'nanodlm'):
    means = evaluate_on(flat, '', noise_examples=16)
  assert means['eval/naive_noise_ci95'] > 0
  assert 'times as many network calls' in caplog.text
  assert 'measured on 16 rows only' in caplog.text


def test_score_takes_any_number_of_rows(tmp_path):
  workdir = workdirs.make_workdir(tmp_path)
  run, params, _ = evaluate.open_run(workdir)
  tokens = (
    np.random.default_rng(0).integers(256, size=(11, 16)).astype(np.int32)
  )
  weight = np.ones((11, 16), np.float32)
  batch = {'tokens': tokens, 'weight': weight}
  values = [
    evaluate.make_score(run, num_draws=2, batch_size=size)(
      params, jax.random.key(1), batch
    )['nll']
    for size in (8, 16)
  ]
  assert values[0].shape == (11,)
  np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
  some = {
    'tokens': tokens[3:5],
    'weight': weight[3:5],
    'index': np.arange(3, 5, dtype=np.int32),
  }
  score = evaluate.make_score(run, num_draws=2, batch_size=8)
  np.testing.assert_allclose(
    score(params, jax.random.key(1), some)['nll'], values[0][3:5], rtol=1e-5
  )


def test_exact_values_have_no_noise(tmp_path):
  workdir = workdirs.make_workdir(tmp_path, objective__name='ar')
  run, params, _ = evaluate.open_run(workdir)
  with pytest.raises(InputError, match='exact'):
    evaluate.measure_noise(run, None, params, 4)


def test_with_sampler(flat):
  run, _, _ = evaluate.open_run(flat)
  other = evaluate.with_sampler(run, {'name': 'ancestral', 'temperature': 0.5})
  assert other.config.sampler.num_steps == configs.load_base().sampler.num_steps
  same = evaluate.with_sampler(run, {'temperature': 0.5})
  assert same.config.sampler.num_steps == run.config.sampler.num_steps == 4
  assert run.config.sampler.temperature == 1.0
  # A number of steps takes the place of listed times, and the other way round.
  listed = evaluate.with_sampler(other, {'grid': '1,0.3,0'})
  assert listed.config.sampler.grid == '1,0.3,0'
  stepped = evaluate.with_sampler(listed, {'name': 'ancestral', 'num_steps': 8})
  assert (stepped.config.sampler.grid, stepped.config.sampler.num_steps) == (
    'uniform',
    8,
  )
  cosine = evaluate.with_sampler(other, {'grid': 'cosine', 'num_steps': 8})
  again = evaluate.with_sampler(cosine, {'num_steps': 9})
  assert again.config.sampler.grid == 'cosine'
  with pytest.raises(InputError, match='does not fit'):
    evaluate.with_sampler(run, {'name': 'ar'})


def test_no_run(tmp_path):
  with pytest.raises(InputError, match='holds no run'):
    evaluate.open_run(str(tmp_path))


@pytest.mark.parametrize(
  'mesh, expected',
  [
    ((-1, 2, 2), (-1, 2, 2)),
    ((1, 16, 1), (-1, 1, 1)),
    ((-1, 3, 1), (-1, 1, 1)),
  ],
)
def test_a_run_can_be_looked_at_on_other_devices(mesh, expected):
  config = configs.load_base()
  config.mesh.update(dict(zip(('data', 'fsdp', 'tensor'), mesh)))
  evaluate.fit_mesh(config)
  assert tuple(config.mesh.values()) == expected
