"""Several samplers for one model, from the command line's text."""

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
  ],
)
def test_wrong_samplers(lm, text, message):
  with pytest.raises(InputError, match=f'(?s)--samplers=.*{message}'):
    sample.with_samplers(lm, [text])
