"""Little stories in English whose exact probability is known.

    config.data.source = 'stories' | 'stories:small' | 'stories:small:0-2000'

The numbers are those of the first story, from 0, and of the one after the last;
without them there are `NUM_STORIES`.

A short program, `_tell`, writes a story by making one choice after
another: who the two children are, what they have, what happens to it. Every
choice is between phrases with known probabilities, and no phrase begins
another, so a text has at most one derivation. The same program draws stories,
computes the probability of a text, and enumerates all that fits a text with
gaps.

What makes the stories hard to model is what holds over a distance: names and
colours come back, a lost thing is found in its place, and only while the
children are there, a thing belongs to whoever was last given it, pronouns
follow their names, and the ending lists who has what.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import re

import numpy as np

from nanodlm.data.sources import base
from nanodlm.types import InputError, Law, NoDocumentError, Posterior

# Stories of a source that does not say which; the law itself has any number.
NUM_STORIES = 50_000
# A posterior visits at most this number of partial stories.
MAX_VISITED = 20_000
GAP = Law.gap
# Words that are named instead of one that is impossible.
MAX_EXPECTED = 6
_RANGE = re.compile(r'(?:(.*):)?(\d+)-(\d+)')
_WORD = re.compile(r'\{\}|\w+|[^\w\s]')


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """What stories are about.

  Attributes:
    girls: the names that are those of girls.
    children: the names of the first and of the second child, who are different.
    things: nouns for what the first and the second have, which is different.
    colors, paints: adjectives for what a thing is, and becomes if painted.
    places: for each place, with its preposition, where in it a thing may lie.
    meetings, goals: the places where the children meet, and to which they go.
    openings: how a story may begin.
    max_events: sentences between the beginning and the ending.
  """

  girls: tuple[str, ...]
  children: tuple[tuple[str, ...], tuple[str, ...]]
  things: tuple[tuple[str, ...], tuple[str, ...]]
  colors: tuple[str, ...]
  paints: tuple[str, ...]
  places: Mapping[str, tuple[str, ...]]
  meetings: tuple[str, ...]
  goals: tuple[str, ...]
  openings: tuple[str, ...]
  max_events: int = 4


_GIRLS = tuple(
  'Ada Bella Clara Dora Emma Flora Greta Hanna Ida Julia Lena Mia Nora Olga '
  'Rosa Tilda'.split()
)
_BOYS = tuple(
  'Adam Ben Carl David Emil Felix Hugo Ivan Jack Karl Leo Max Noah Otto Paul '
  'Tom'.split()
)
_THINGS = tuple(
  'ball basket boat book bucket cap coat cup drum hat kite lamp ribbon scarf '
  'spoon train'.split()
)
_COLORS = tuple('black blue brown green grey pink red white yellow'.split())
_PLACES = {
  'at the beach': ('in the sand', 'under a rock', 'near a tent'),
  'at the farm': ('in the hay', 'under a cart', 'near the well'),
  'in the forest': ('under a fern', 'under a log', 'in a hollow tree'),
  'in the garden': ('among the roses', 'under a hedge', 'near the shed'),
  'at the harbour': ('under a net', 'in a barrel', 'near the crane'),
  'at the library': ('under a desk', 'on a shelf', 'under a chair'),
  'at the market': ('under a stall', 'in a crate', 'near the fountain'),
  'in the meadow': ('in the grass', 'near the brook', 'among the daisies'),
  'at the museum': ('near a statue', 'under the stairs', 'near a window'),
  'at the park': ('under a bench', 'near the pond', 'near a swing'),
  'at the school': ('in a cupboard', 'under a table', 'under the piano'),
  'at the station': ('on a platform', 'under a trolley', 'near the clock'),
}
LARGE = World(
  girls=_GIRLS,
  children=((*_GIRLS, *_BOYS), (*_GIRLS, *_BOYS)),
  things=(_THINGS, _THINGS),
  colors=_COLORS,
  paints=_COLORS,
  places=_PLACES,
  meetings=tuple(_PLACES),
  goals=tuple(_PLACES),
  openings=(
    'One cold morning',
    'One fine day',
    'One rainy afternoon',
    'One warm evening',
    'On Monday',
    'On Sunday',
    'On a windy day',
    'After lunch',
  ),
)
# What is drawn later is another kind of word, so that it cannot be the same by
# chance: a network learns last what must differ, since it costs little if not.
SMALL = dataclasses.replace(
  LARGE,
  children=(_GIRLS[:3], _BOYS[:3]),
  things=(_THINGS[:3], _THINGS[3:6]),
  colors=_COLORS[:3],
  paints=_COLORS[3:6],
  places=dict(list(_PLACES.items())[:6]),
  meetings=tuple(_PLACES)[:3],
  goals=tuple(_PLACES)[3:6],
  openings=LARGE.openings[:4],
  max_events=2,
)
WORLDS = {'': LARGE, 'small': SMALL}

# Chooses one of several phrases, given their probabilities, and appends it.
Choose = Callable[[Mapping[str, float]], str]


def _tell(world: World, choose: Choose):
  """Tells one story of `world`, phrase by phrase."""

  def say(text: str):
    choose({text: 1.0})

  def pick(phrases) -> str:
    return choose(dict.fromkeys(phrases, 1 / len(phrases)))

  def weigh(**weights: float) -> str:
    total = sum(weights.values())
    return choose({key: w / total for key, w in weights.items() if w})

  # The state: thing i has a color, and a holder or the place in which it lies.
  colors: list[str] = []
  things: list[str] = []
  holders: list[int | None] = [0, 1]
  lost: dict[int, tuple[str, str]] = {}

  def name(i: int) -> str:
    return f'the {colors[i]} {things[i]}'

  def pick_thing(among) -> int:
    names = {name(i): i for i in among}
    return names[pick(list(names))]

  pick(world.openings)
  say(',')
  children = [pick(world.children[0])]
  say('met')
  children.append(pick([c for c in world.children[1] if c != children[0]]))
  place = pick(world.meetings)
  say('.')
  for i, child in enumerate(children):
    say(f'{child} had a' if i == 0 else f'and {child} had a')
    colors.append(pick(world.colors))
    things.append(pick([t for t in world.things[i] if t not in things]))
  say('.')

  is_girl = [child in world.girls for child in children]
  subject = None
  for num_events in range(world.max_events + 1):
    # Who acts; 'In the end' ends the story.
    shares = dict.fromkeys(children, 0.3)
    if subject is not None and is_girl[0] != is_girl[1]:
      shares[children[subject]] = 0.1
      shares['She' if is_girl[subject] else 'He'] = 0.2
    shares['They'] = 0.2
    shares['In the end'] = 0.2 if num_events else 0.0
    if num_events == world.max_events:
      shares = {'In the end': 1.0}
    actor = weigh(**shares)
    if actor == 'In the end':
      break
    held = [i for i in (0, 1) if holders[i] is not None]
    if actor == 'They':
      verb = weigh(went=3.0, talked=1.0, played=1.0 if held else 0.0)
      if verb == 'went':
        say('to')
        nouns = {p.partition(' ')[2]: p for p in world.goals if p != place}
        place = nouns[pick(list(nouns))]
      elif verb == 'talked':
        say('about')
        pick_thing((0, 1))
      else:
        say('with')
        pick_thing(held)
      subject = None
    else:
      if actor in children:
        subject = children.index(actor)
      assert subject is not None
      other = 1 - subject
      own = [i for i in held if holders[i] == subject]
      theirs = [i for i in held if holders[i] == other]
      here = [i for i in lost if lost[i][0] == place]
      verb = weigh(
        lost=3.0 if own else 0.0,
        gave=2.0 if own else 0.0,
        painted=1.0 if own else 0.0,
        found=4.0 if here else 0.0,
        looked=1.0 if lost else 0.0,
        wanted=1.0 if theirs else 0.0,
      )
      if verb == 'lost':
        i = pick_thing(own)
        lost[i] = (place, pick(world.places[place]))
        holders[i] = None
      elif verb == 'gave':
        i = pick_thing(own)
        say('to')
        if is_girl[0] == is_girl[1]:
          say(children[other])
        else:
          pick([children[other], 'her' if is_girl[other] else 'him'])
        holders[i] = other
      elif verb == 'painted':
        i = pick_thing(own)
        colors[i] = pick([c for c in world.paints if c != colors[i]])
      elif verb == 'found':
        i = pick_thing(here)
        say(lost.pop(i)[1])
        holders[i] = subject
      elif verb == 'looked':
        say('for')
        pick_thing(list(lost))
      else:
        pick_thing(theirs)
    say('.')

  # What follows is determined by the story.
  clauses = []
  for c, child in enumerate(children):
    has = ' and '.join(name(i) for i in (0, 1) if holders[i] == c)
    clauses.append(f'{child} had {has or "nothing"}')
  for i, (where, spot) in sorted(lost.items()):
    clauses.append(f'{name(i)} was still {spot} {where}')
  say(f', {", ".join(clauses[:-1])}, and {clauses[-1]}.')
  wishes = [
    f'{children[i]} wanted {name(i)} back' for i in (0, 1) if holders[i] != i
  ]
  say(' and '.join(wishes) if wishes else 'Everybody was happy')
  say('.')


@functools.lru_cache(1 << 14)
def _words(text: str) -> tuple[str, ...]:
  return tuple(_WORD.findall(text))


def _join(words: Iterable[str]) -> str:
  return re.sub(r' (?=[.,])', '', ' '.join(words))


class _Impossible(Exception):
  """No phrase of a choice agrees with the text."""


class StoriesLaw(Law):
  """The distribution of the stories of a world."""

  def __init__(self, world: World):
    self.world = world

  def sample(self, seed: int, i: int) -> str:
    return _join(phrase for phrase, _ in self._draw(seed, i))

  def _draw(self, seed: int, i: int) -> list[tuple[str, Mapping[str, float]]]:
    """Draws a story: its phrases, each with the choice it was drawn from."""
    uniforms = np.random.Generator(np.random.Philox(key=[seed, i]))
    drawn = []

    def choose(options: Mapping[str, float]) -> str:
      phrase = next(iter(options))
      if len(options) > 1:
        rest = uniforms.random()
        for phrase in options:
          rest -= options[phrase]
          if rest < 0:
            break
      drawn.append((phrase, options))
      return phrase

    _tell(self.world, choose)
    return drawn

  def entropy(self, num_samples: int, seed: int = 0) -> tuple[float, float]:
    # Along a drawn story, the mean entropy of the choices has less variance
    # than the mean of -log_prob.
    entropies = [
      sum(
        -p * math.log(p)
        for _, options in self._draw(seed, i)
        for p in options.values()
      )
      for i in range(num_samples)
    ]
    error = np.std(entropies, ddof=1) / math.sqrt(num_samples)
    return float(np.mean(entropies)), 1.96 * float(error)

  def log_prob(self, text: str) -> float:
    return self._read(text)[0]

  def explain(self, text: str) -> str | None:
    return self._read(text)[1]

  def _read(self, text: str) -> tuple[float, str | None]:
    """Returns the log-probability of a text, and why it is not a story."""
    words = _words(text)
    position, log_prob = 0, 0.0

    def choose(options: Mapping[str, float]) -> str:
      nonlocal position, log_prob
      for phrase, probability in options.items():
        end = position + len(_words(phrase))
        if words[position:end] == _words(phrase):
          position, log_prob = end, log_prob + math.log(probability)
          return phrase
      raise _Impossible(_mismatch(options, words, position))

    try:
      _tell(self.world, choose)
    except _Impossible as error:
      return -math.inf, str(error)
    if position < len(words):
      return -math.inf, f'{_place(words, position)}; expected the end'
    if _join(words) != text:
      return -math.inf, f'it is not spaced as in {_join(words)!r}'
    return log_prob, None

  def num_words(self, text: str) -> int:
    return len(_words(text))

  def words(self, text: str) -> list[tuple[int, int]]:
    return [
      match.span() for match in _WORD.finditer(text) if match.group().isalnum()
    ]

  def features(self, text: str) -> frozenset[str]:
    words = _words(text)
    opening, _, rest = text.partition(', ')
    sentences = [sentence.split() for sentence in text.split('. ')]
    # The words after the actors: the verbs of the events.
    verbs = [sentence[1] for sentence in sentences[2:-2] if len(sentence) > 1]
    return frozenset(
      [
        *words,
        f'begins: {opening}',
        f'first: {rest.partition(" ")[0]}',
        f'sentences: {len(sentences)}',
        f'nothing: {words.count("nothing")}',
        f'still: {words.count("still")}',
        f'back: {words.count("back")}',
        f'ends: {" ".join(words[-3:-1])}',
        *(f'event {i}: {verb}' for i, verb in enumerate(verbs)),
        *map(' then '.join, itertools.pairwise(verbs)),
      ]
    )

  def posterior(self, text: str, max_visited: int = 0) -> Posterior:
    max_visited = max_visited or MAX_VISITED
    pattern = _words(text)
    gaps = [i for i, word in enumerate(pattern) if word == GAP]
    found: list[tuple[tuple[str, ...], float]] = []
    furthest = (0, 'no story is that short')
    # Each entry holds the first phrases of stories that agree with the text.
    waiting: list[tuple[str, ...]] = [()]
    for _ in range(max_visited):
      if not waiting:
        break
      given = waiting.pop()
      phrases: list[str] = []
      words: list[str] = []
      log_prob = 0.0

      def choose(options: Mapping[str, float]) -> str:
        nonlocal log_prob, furthest
        if len(phrases) < len(given):
          phrase = given[len(phrases)]
        else:
          fitting = [p for p in options if _agrees(p, pattern[len(words) :])]
          if not fitting:
            reason = _mismatch(options, pattern, len(words))
            furthest = max(furthest, (len(words), reason))
            raise _Impossible
          phrase = fitting[0]
          waiting.extend((*phrases, other) for other in fitting[1:])
        log_prob += math.log(options[phrase])
        phrases.append(phrase)
        words.extend(_words(phrase))
        return phrase

      with contextlib.suppress(_Impossible):
        _tell(self.world, choose)
        if len(words) == len(pattern):
          found.append((tuple(words[i] for i in gaps), log_prob))
    else:
      raise InputError(
        f'the text has too many completions: over {max_visited:,} beginnings '
        f'agree with it; leave fewer words out than {len(gaps)}'
      )
    if not found:
      raise NoDocumentError(f'no story agrees with the text: {furthest[1]}')
    logs = np.array([log_prob for _, log_prob in found])
    total = float(np.logaddexp.reduce(logs))
    fills: dict[tuple[str, ...], float] = {
      words: math.exp(log_prob - total) for words, log_prob in found
    }
    return Posterior(total, fills)


def _agrees(phrase: str, pattern: Sequence[str]) -> bool:
  words = _words(phrase)
  return len(words) <= len(pattern) and all(
    known in (GAP, word) for word, known in zip(words, pattern)
  )


def _mismatch(
  options: Mapping[str, float], words: Sequence[str], position: int
) -> str:
  """Says which word is impossible, and which words are possible instead."""
  # The phrases that agree longest say which word is wrong.
  rest = words[position:]
  agreeing = {
    phrase: next(
      (
        k
        for k, word in enumerate(_words(phrase))
        if k == len(rest) or rest[k] not in (word, GAP)
      )
    )
    for phrase in options
  }
  k = max(agreeing.values())
  expected = sorted({_words(p)[k] for p in options if agreeing[p] == k})
  shown = [repr(word) for word in expected[:MAX_EXPECTED]]
  if num_more := len(expected) - len(shown):
    shown.append(f'one of {num_more} others')
  place = _place(words, position + k)
  return f'{place}; expected {" or ".join(shown)}'


def _place(words: Sequence[str], i: int) -> str:
  """Says what words[i] is, which may be a sign or the end of the text."""
  if not words:
    return 'the text is empty'
  is_word = [bool(re.match(r'\w|{}', word)) for word in words]
  num = sum(is_word[:i])
  if not i:
    return f'the text begins with {words[0]!r}'
  if i == len(words):
    return f'the text ends after word {num}'
  place = f'word {num + 1}' if is_word[i] else f'the sign after word {num}'
  return f'{place} is {words[i]!r}'


@dataclasses.dataclass(frozen=True)
class StoriesSource(base.Source):
  """Stories `first` to `stop` - 1 of a world, one document each."""

  forms = ('stories', 'stories:small', 'stories:small:FIRST-STOP')
  has_law = True

  world: str
  first: int
  stop: int

  @classmethod
  def make(cls, spec: str, name: str, data_dir: str) -> 'StoriesSource':
    del data_dir
    world, first, stop = name, 0, NUM_STORIES
    if found := _RANGE.fullmatch(name):
      world, first, stop = found[1] or '', int(found[2]), int(found[3])
    if world not in WORLDS or not first < stop:
      raise InputError(
        f'data.source={spec!r} is not one of {list(cls.forms)}, such as '
        "'stories:small:0-2000'"
      )
    return cls(spec, world, first, stop)

  @property
  def law(self) -> StoriesLaw:
    return StoriesLaw(WORLDS[self.world])

  def fingerprint(self) -> str:
    texts = [self.law.sample(0, i) for i in range(100)]
    numbers = self.stop - self.first, *[self.first] * (self.first > 0)
    return hashlib.sha256(repr((*numbers, texts)).encode()).hexdigest()

  def parts(self, split: str) -> Iterator[base.Part]:
    del split
    for start in range(self.first, self.stop, base.PART_ROWS):
      yield start, min(start + base.PART_ROWS, self.stop)

  def read(self, part: base.Part) -> Iterator[base.Document]:
    world = WORLDS[self.world]
    return (base.document_of(_story(world, i)) for i in range(*part))


# To prepare text and train a tokenizer reads it three times.
@functools.lru_cache(NUM_STORIES)
def _story(world: World, i: int) -> str:
  return StoriesLaw(world).sample(0, i)
