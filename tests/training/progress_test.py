"""Tests of what nanodlm.training.progress logs."""

import logging
import time

import pytest

from nanodlm.training import progress


@pytest.mark.parametrize(
  'secs, text',
  [(0.2, '1 s'), (59.1, '0:01:00'), (41.5, '42 s'), (7200, '2:00:00')],
)
def test_describe_secs(secs, text):
  assert progress.describe_secs(secs) == text


def test_countdown(monkeypatch, caplog):
  now = 0.0
  monkeypatch.setattr(time, 'monotonic', lambda: now)
  countdown = progress.Countdown('evaluating', 10)
  monkeypatch.setattr(progress.log, 'propagate', True)
  with caplog.at_level(logging.INFO):
    for i in range(10):
      now += 6 if i else 30  # The first one compiles.
      countdown.count()
  # Every 10 s at most, and not after the last one.
  assert [record.message for record in caplog.records] == [
    'evaluating: 1 of 10 batches',
    *(
      f'evaluating: {i} of 10 batches, {left} left'
      for i, left in ((3, '42 s'), (5, '30 s'), (7, '18 s'), (9, '6 s'))
    ),
  ]
