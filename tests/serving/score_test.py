"""/api/score and /api/choose: the values of lm.bound and lm.choose."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from nanodlm.serving import service
from tests.serving.servers import ask, held, NEVER, post, row, wait_for


def test_scores_are_the_bounds(running, opened):
  _, server = running
  texts = ['The quick brown fox.', 'ab{|} \u00e9']
  status, answer = post(server, '/api/score', {'texts': texts, 'seed': 2})
  assert status == 200 and answer['model'] == 'tiny'
  for actual, expected in zip(answer['scores'], opened.bound(texts, seed=2)):
    assert actual == pytest.approx(dataclasses.asdict(expected), rel=1e-5)
  assert not actual['is_exact'] and actual['nats_ci95'] > 0
  (alone,) = post(server, '/api/score', {'texts': texts[0]})[1]['scores']
  assert alone == pytest.approx(
    dataclasses.asdict(opened.bound(texts[:1])[0]), rel=1e-5
  )


def test_choices_are_those_of_the_model(running, opened):
  _, server = running
  for prompt in ('ab {x|y} {2}e', 'ab {xy|z}'):
    answer = post(server, '/api/choose', {'prompt': prompt})[1]
    expected = [dataclasses.asdict(choice) for choice in opened.choose(prompt)]
    for actual, choice in zip(answer['choices'], expected, strict=True):
      assert actual.pop('text') == choice.pop('text')
      assert actual == pytest.approx(choice, rel=1e-4)


@pytest.mark.parametrize(
  'path, body, status, named',
  [
    ('score', {'texts': ''}, 400, "''"),
    ('score', {'texts': []}, 400, '0 texts'),
    ('score', {'texts': ['a'] * 65}, 400, '65 texts'),
    ('score', {'texts': 'a' * 16 * 65}, 400, '65 rows'),
    ('score', {'texts': ['a', '\ud800']}, 400, 'surrogate'),
    ('score', {'texts': 3}, 422, 'texts'),
    ('score', {'texts': 'a', 'seed': 2**32}, 422, 'seed'),
    ('score', {}, 400, 'texts or messages'),
    ('score', {'texts': 'a', 'messages': []}, 400, 'texts or messages'),
    ('choose', {}, 400, 'prompt or messages'),
    ('choose', {'prompt': 'a'}, 400, '0 slots'),
    ('choose', {'prompt': '{a|b} {c|d}'}, 400, '2 slots'),
    ('choose', {'prompt': '{a|a}'}, 400, 'different'),
    ('choose', {'prompt': 'x {aa|b} {3}'}, 400, 'gap'),
    ('choose', {'prompt': 'x' * 16 + '{a|b}'}, 400, '17 tokens'),
    ('choose', {'prompt': f'{{{"|".join(map(str, range(65)))}}}'}, 400, '65'),
  ],
)
def test_errors(running, path, body, status, named):
  actual, answer = post(running[1], f'/api/{path}', body)
  assert actual == status and named in answer['error']['message']


def test_waits_for_its_turn_while_the_server_answers(running):
  model, server = running
  answers = []

  def score():
    answers.append(post(server, '/api/score', {'texts': 'ab', 'user': 'me'}))

  with held(model.engine):
    threads = [
      threading.Thread(target=score) for _ in range(service.MAX_CLIENT_JOBS)
    ]
    for thread in threads:
      thread.start()
    wait_for(lambda: model._jobs.total() == len(threads))
    assert ask(server, 'GET', '/health')[0] == 200
    body = {'texts': 'ab', 'user': 'me'}
    status, headers, text = ask(server, 'POST', '/api/score', body)
    assert status == 429 and headers['Retry-After']
    assert json.loads(text)['error']['code'] == 'queue_full'
    assert not answers
  for thread in threads:
    thread.join(NEVER)
  assert [status for status, _ in answers] == [200] * len(threads)
  assert not model._jobs


def test_batches_are_sampled_between_the_steps_of_a_score(running):
  engine, order = running[0].engine, []

  class Step:
    """Stands for a jitted function, which waits for a batch to wait for it."""

    def lower(self, _):
      return self

    compile = lambda self: self

    def __call__(self, i):
      if not i:
        wait_for(engine._device._next.locked)
      order.append(int(i))

  def work():
    step = Step()
    for i in range(3):
      engine.call(step, np.int32(i))

  def note():
    if waiting.is_over:
      order.append('batch')

  thread, waiting = threading.Thread(target=work), row(engine, 'b{}')
  with held(engine):
    thread.start()
    wait_for(engine._device._next.locked)
    engine.submit('other', [waiting], note)
  thread.join(NEVER)
  wait_for(lambda: waiting.is_over)
  assert order == [0, 'batch', 1, 2]
