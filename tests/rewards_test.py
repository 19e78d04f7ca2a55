"""Rewards: their values, and functions that are wrong."""

import math
import sys
import time

import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import rewards
from nanodlm.data import sources
from nanodlm.types import InputError


def make(spec, secs=5.0, crop='document', source='stories:small'):
  config = configs.load()
  config.data.update(source=source, crop=crop)
  data = configs.make_settings(config).data
  return rewards.make_reward(spec, data, secs)


def count_es(texts, prompts):
  del prompts
  return [text.count('e') for text in texts]


def answers(texts, prompts):
  return np.array([len(t) - len(p) for t, p in zip(texts, prompts)])


def wrong_number(texts, prompts):
  del prompts
  return [1.0] * (len(texts) + 1)


def no_number(texts, prompts):
  del texts, prompts
  return ['many', 'few']


def nan(texts, prompts):
  del prompts
  return [math.nan if text == 'b' else 1.0 for text in texts]


def raises(texts, prompts):
  raise KeyError('lost')


def leaves(texts, prompts):
  sys.exit(3)


def slow(texts, prompts):
  time.sleep(30)


def large(texts, prompts):
  del prompts
  return [1e300 for _ in texts]


def clears(texts, prompts):
  del prompts
  num = len(texts)
  texts.clear()
  return [1.0] * (num + 1)


NOT_A_FUNCTION = 3
TEXTS, PROMPTS = ['see', 'be'], ['', 'b']


def test_a_weighted_sum():
  reward = make(f'-2*{__name__}:count_es+{__name__}:answers')
  np.testing.assert_array_equal(reward(TEXTS, PROMPTS), [3 - 4, 1 - 2])
  assert reward(TEXTS, PROMPTS).dtype == np.float32
  large = make(f'1e+3*{__name__}:count_es')
  np.testing.assert_array_equal(large(TEXTS, PROMPTS), [2000, 1000])


def test_the_law_of_the_text():
  law = sources.law_of('stories:small')
  assert law is not None
  story = law.sample(0, 0)
  texts = [story, story.replace('.', ',')]
  np.testing.assert_array_equal(make('law:valid')(texts, ['', '']), [1, 0])
  values = make('law:log_prob')(texts, ['', ''])
  np.testing.assert_allclose(
    values, [law.log_prob(story), rewards.MIN_LOG_PROB], rtol=1e-6
  )


@pytest.mark.parametrize(
  'name, message',
  [
    ('wrong_number', r"wrong_number' must return 2 numbers.*\(3,\)"),
    ('no_number', "no_number' must return a list of numbers.*many"),
    ('nan', "nan' must return finite.*nan for 'b'"),
    ('raises', "raises' raised KeyError: 'lost'.*rewards_test.py, line"),
    ('leaves', "leaves' raised SystemExit: 3"),
    ('slow', "slow' took more than 0.1 s for 2 texts"),
    ('large', "large'] add up to numbers beyond float32, such as 1e\\+300"),
    ('clears', "clears' must return 2 numbers"),
  ],
)
def test_functions_that_are_wrong(name, message):
  reward = make(f'{__name__}:{name}', secs=0.1 if name == 'slow' else 5.0)
  with pytest.raises(InputError, match=f'train.reward: .*{message}'):
    reward(['a', 'b'], ['', ''])


@pytest.mark.parametrize(
  'spec, message',
  [
    ('valid', "'valid' is not 'MODULE:FUNCTION'"),
    ('law:valid+', "'' is not"),
    ('much*law:valid', "'much.law:valid' is not"),
    ('law:vald', 'law:vald is not one of'),
    ('no_such:f', "'no_such' cannot be imported: ModuleNotFoundError"),
    (f'{__name__}:count_ez', "lacks a function 'count_ez'; it has.*'count_es'"),
    (f'{__name__}:NOT_A_FUNCTION', 'lacks a function'),
  ],
)
def test_settings_that_are_wrong(spec, message):
  with pytest.raises(InputError, match=f'(?s)train.reward=.*{message}'):
    make(spec)


@pytest.mark.parametrize(
  'changes, named',
  [({'crop': 'chunk'}, 'data.crop'), ({'source': 'embedded'}, 'data.source')],
)
def test_a_law_that_is_not_known(changes, named):
  with pytest.raises(InputError, match=f'{named}='):
    make('law:valid', **changes)
