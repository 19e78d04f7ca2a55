"""The law of the stories, against an enumeration of a small world."""

import collections
import math
import re

import numpy as np
import pytest

from configs import scarce
from nanodlm.data import sources
from nanodlm.data.sources import stories
from nanodlm.types import InputError

TINY = stories.World(
  girls=('Ada', 'Bella'),
  children=(('Ada', 'Bella', 'Adam'),) * 2,
  things=(('ball', 'cup'),) * 2,
  colors=('red', 'blue'),
  paints=('red', 'blue'),
  places={
    'in the park': ('on a bench', 'in the grass'),
    'at the farm': ('in the hay',),
  },
  meetings=('in the park', 'at the farm'),
  goals=('in the park', 'at the farm'),
  openings=('One day',),
  max_events=2,
)


def enumerate_stories(world):
  """Returns {story: probability}, by running every sequence of choices."""
  found = collections.defaultdict(list)
  waiting = [[]]
  while waiting:
    given = waiting.pop()
    taken, probability = [], 1.0

    def choose(options):
      nonlocal probability
      assert math.isclose(sum(options.values()), 1)
      words = [stories._words(phrase) for phrase in options]
      for a in words:
        # No phrase begins another.
        assert not any(a == b[: len(a)] for b in words if a is not b)
      phrases = list(options)
      if len(taken) >= len(given):
        waiting.extend([*taken, other] for other in phrases[1:])
        phrase = phrases[0]
      else:
        phrase = given[len(taken)]
      taken.append(phrase)
      probability *= options[phrase]
      return phrase

    stories._tell(world, choose)
    found[stories._join(taken)].append(probability)
  assert all(len(derivations) == 1 for derivations in found.values())
  return {text: p for text, (p,) in found.items()}


@pytest.fixture(scope='module')
def tiny():
  return enumerate_stories(TINY)


def test_probabilities(tiny):
  law = stories.StoriesLaw(TINY)
  assert sum(tiny.values()) == pytest.approx(1, abs=1e-9)
  for text, probability in list(tiny.items())[::37]:
    assert law.log_prob(text) == pytest.approx(math.log(probability))
  entropy = -sum(p * math.log(p) for p in tiny.values())
  mean, half_width = law.entropy(2000)
  assert abs(mean - entropy) < 2 * half_width


def test_frequencies(tiny):
  law = stories.StoriesLaw(TINY)
  # Whole stories are rare; the pairs of children and the endings are not.
  feature = lambda text: (text[9:24], text[-30:])
  expected = collections.Counter()
  for text, probability in tiny.items():
    expected[feature(text)] += probability
  num_samples = 4000
  counts = collections.Counter(
    feature(law.sample(0, i)) for i in range(num_samples)
  )
  assert set(counts) <= set(expected)
  chi2 = sum(
    (counts[key] - num_samples * p) ** 2 / (num_samples * p)
    for key, p in expected.items()
  )
  freedom = len(expected) - 1
  assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize('num_gaps', [1, 2, 5])
def test_posterior(tiny, num_gaps):
  law = stories.StoriesLaw(TINY)
  rng = np.random.default_rng(num_gaps)
  by_length = collections.defaultdict(list)
  for text, probability in tiny.items():
    by_length[len(stories._words(text))].append(
      (stories._words(text), probability)
    )
  for i in range(10):
    words = list(stories._words(law.sample(7, i)))
    gaps = sorted(rng.choice(len(words), num_gaps, replace=False))
    for gap in gaps:
      words[gap] = stories.GAP
    fills = {
      tuple(other[gap] for gap in gaps): probability
      for other, probability in by_length[len(words)]
      if all(w in (stories.GAP, o) for w, o in zip(words, other))
    }
    total = sum(fills.values())
    posterior = law.posterior(stories._join(words))
    assert posterior.log_prob == pytest.approx(math.log(total))
    assert posterior.fills == pytest.approx(
      {fill: p / total for fill, p in fills.items()}
    )
    for gap, marginal in enumerate(posterior.marginals()):
      for word, probability in marginal.items():
        assert probability == pytest.approx(
          sum(p for fill, p in fills.items() if fill[gap] == word) / total
        )


@pytest.mark.parametrize('world', stories.WORLDS.values())
def test_worlds(world):
  law = stories.StoriesLaw(world)
  texts = [law.sample(0, i) for i in range(200)]
  assert len(set(texts)) == 200
  assert texts == [law.sample(0, i) for i in range(200)]
  assert law.sample(1, 0) != law.sample(0, 0)
  assert all(4 <= text.count('.') <= 8 for text in texts)
  bits = np.array([-law.log_prob(text) / math.log(2) for text in texts])
  assert 20 < bits.mean() < 60
  names = {*world.children[0], *world.children[1]}
  for text in texts:
    assert sum(name in text.split() for name in names) == 2


@pytest.mark.parametrize(
  'change, word, expected',
  [
    (
      lambda s: s.replace('One day', 'Two days'),
      None,
      "with 'Two'; expected 'One'",
    ),
    (lambda s: s.replace('Ada had a', 'Ada has a', 1), 10, 'had'),
    (
      lambda s: s[: s.index(' in the park')],
      5,
      "ends after word 5; expected 'at' or",
    ),
    (lambda s: s[:-1], None, "; expected '.'"),
    (lambda s: s.replace('.', ',', 1), 8, "is ','; expected '.'"),
    (lambda s: '.' + s, None, "begins with '.'"),
    (lambda s: s + ' Ada', None, 'end'),
    (lambda s: s.replace(' ', '  ', 1), None, 'spaced'),
    (lambda s: '', None, "is empty; expected 'One'"),
  ],
)
def test_explains(change, word, expected):
  law = stories.StoriesLaw(TINY)
  text = next(
    text
    for text in (law.sample(0, i) for i in range(100))
    if text.startswith('One day, Ada met Adam in the park. Ada had a red')
  )
  assert law.explain(text) is None
  assert law.log_prob(change(text)) == -math.inf
  reason = law.explain(change(text))
  assert expected in reason
  assert word is None or re.search(rf'word {word}\b', reason)


def test_bad_gaps(monkeypatch):
  law = stories.StoriesLaw(stories.LARGE)
  with pytest.raises(InputError, match="'zoo'"):
    law.posterior('One fine day, {} met {} in the zoo.')
  words = stories._words(law.sample(0, 0))
  monkeypatch.setattr(stories, 'MAX_VISITED', 500)
  with pytest.raises(InputError, match='500'):
    law.posterior(stories._join('{}' if w.isalpha() else w for w in words))


def test_source(monkeypatch):
  monkeypatch.setattr(stories, 'NUM_STORIES', 5000)
  source = sources.make_source('stories:small')
  parts = list(source.parts('train'))
  texts = [
    ''.join(document.open()) for part in parts for document in source.read(part)
  ]
  assert len(parts) == 2
  assert texts == [source.law.sample(0, i) for i in range(5000)]
  assert all(source.law.explain(text) is None for text in texts[::100])
  assert source.fingerprint() != sources.make_source('stories').fingerprint()
  few = sources.make_source('stories:small:3990-4100')
  other = sources.make_source('stories:small:4000-4110')
  assert few.fingerprint() != other.fingerprint()
  (part,) = few.parts('train')
  assert [''.join(x.open()) for x in few.read(part)] == texts[3990:4100]
  assert next(sources.make_source('stories:7-9').parts('train')) == (7, 9)
  for spec in ('stories:huge', 'stories:small:9-9', 'stories:small:9'):
    with pytest.raises(InputError, match=repr(spec)):
      sources.make_source(spec)


def test_scarce_stories_are_not_those_held_out():
  data = scarce.get_config().data
  train, held_out = (
    {
      ''.join(document.open())
      for part in source.parts('train')
      for document in source.read(part)
    }
    for source in map(sources.make_source, (data.source, data.eval_source))
  )
  assert len(train) > 1900 and len(held_out) > 1400
  assert not train & held_out
