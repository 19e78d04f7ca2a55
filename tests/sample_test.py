"""Several samplers for one model, from the command line's text."""

import dataclasses
import functools
import json
import pathlib

import pytest

from nanodlm import lm as lms
from nanodlm import sample
from nanodlm.types import InputError
from tests import workdirs


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  return lms.load(workdirs.make_workdir(tmp_path_factory.mktemp('sample')))


@pytest.mark.parametrize(
  'text, parts',
  [
    ('', []),
    ('ar', ['ar']),
    ('fixed_count,block', ['fixed_count', 'block']),
    (
      'remask:grid=1,0.5,0;eta=1,ancestral:num_steps=8',
      ['remask:grid=1,0.5,0;eta=1', 'ancestral:num_steps=8'],
    ),
  ],
)
def test_split_samplers(text, parts):
  assert sample.split_samplers(text) == parts


def test_parse_sampler():
  with pytest.raises(InputError, match='NAME:KEY=VALUE'):
    sample.parse_sampler('confidence;temperature=0.3')
  assert sample.parse_sampler('confidence:threshold=0.9; num_steps=0') == {
    'name': 'confidence',
    'threshold': 0.9,
    'num_steps': 0,
  }
  assert sample.parse_sampler('block:cache=False')['cache'] is False


@pytest.mark.parametrize(
  'text, message',
  [
    ('confidence:treshold=1', 'threshold'),
    ('remask:eta', 'KEY=VALUE'),
    ('remask:name=ar', 'KEY=VALUE'),
    ('remask:eta=high', "eta='high'.*float"),
    ('block:cache=maybe', 'cache'),
    ('warp', "'warp' is not one of"),
    ('ar', 'does not fit'),
    ('fixed_count:eta=1', 'is ignored'),
    ('remask:eta=2', 'eta'),
    ('confidence:length=8', 'use --config.sampler.length=8'),
  ],
)
def test_wrong_samplers(lm, text, message):
  with pytest.raises(InputError, match=f'(?s)--samplers=.*{message}'):
    sample.with_samplers(lm, [text])


def test_choices_are_printed_and_written(lm, capsys):
  prompts = ['ab {x|y}', 'ab {xy|z}']
  sample.choose_texts(lm, prompts)
  printed = capsys.readouterr().out
  text = (pathlib.Path(lm.workdir) / 'samples.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [line['prompt'] for line in lines] == prompts
  for line, exact in zip(lines, (True, False)):
    expected = [dataclasses.asdict(one) for one in lm.choose(line['prompt'])]
    assert line['choices'] == expected and line['step'] == 0
    assert line['shown'] in printed
    for one in expected:
      assert one['is_exact'] == exact
      assert f'{one["probability"]:.4f} {one["text"]!r}' in printed
  assert 'nats' not in lines[0]['shown']
  assert f'{expected[0]["nats"]:.2f} ±' in lines[1]['shown']
  with pytest.raises(InputError, match='2 slots'):
    sample.choose_texts(lm, ['ab {x|y}', '{a|b} {c|d}'])
  # Nothing is written if one of the prompts is wrong.
  assert (pathlib.Path(lm.workdir) / 'samples.jsonl').read_text() == text


def brevity(texts, prompts):
  del prompts
  return [-float(len(text)) for text in texts]


def test_rewards_are_printed_and_written(lm, capsys):
  make_search = functools.partial(
    lms.make_search, reward=f'{__name__}:brevity', best_of=3
  )
  sample.sample_prompts(lm, ['ab'], make_search=make_search)
  printed = capsys.readouterr().out
  text = (pathlib.Path(lm.workdir) / 'samples.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  lines = [line for line in lines if 'reward' in line]
  assert len(lines) == 4
  for line in lines:
    assert line['reward'] == -len(line['shown']) and line['num_calls'] == 12
    assert f'reward {line["reward"]:.4g}' in printed
  tokens = [
    one.tokens.tolist()
    for one in lm.sample(
      'ab',
      num_samples=4,
      seed=lm.run.settings.sample.seed,
      details=True,
      reward=f'{__name__}:brevity',
      best_of=3,
    )
  ]
  assert [line['tokens'] for line in lines] == tokens


def shown(texts, prompts):
  del prompts
  TEXTS.extend(texts)
  return [0.0] * len(texts)


TEXTS = []


def test_rewards_read_texts_as_each_sampler_leaves_them(tmp_path):
  path = tmp_path / 'texts.jsonl'
  lines = [json.dumps({'text': f'abcdef{i}'}) for i in range(50)]
  path.write_text('\n'.join(lines))
  workdir = workdirs.make_workdir(
    tmp_path / 'run',
    data__source=f'jsonl:{path}',
    data__crop='document',
    objective__expand=True,
  )
  lm = lms.load(workdir).with_sampler({'length': 24})
  make_search = functools.partial(lms.make_search, reward=f'{__name__}:shown')
  TEXTS.clear()
  sample.sample_prompts(lm, ['A{*}b'], ['expand'], make_search=make_search)
  lines = (pathlib.Path(workdir) / 'samples.jsonl').read_text().splitlines()
  printed = [json.loads(line)['shown'] for line in lines]
  # The texts lack what is left of the room in the gap.
  assert TEXTS and set(TEXTS) == set(printed)
  refuse = functools.partial(make_search, num_refinements=2)
  with pytest.raises(InputError, match='num_refinements=2 must be 0'):
    sample.sample_prompts(lm, ['A{*}b'], ['expand'], make_search=refuse)
  assert refuse(lm.run).num_refinements == 2
