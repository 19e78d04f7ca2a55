"""The Python API: samples, bounds and logits of a trained run."""

import dataclasses
import json
import math
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

import nanodlm
from nanodlm import evaluate
from nanodlm import lm as lms
from nanodlm.steps import sample as sample_steps
from nanodlm.types import InputError
from tests import foreign_tokenizers, launches, workdirs

TEXT = 'The quick brown fox jumps over the lazy dog.'


@pytest.fixture(scope='module')
def masked(tmp_path_factory):
  return nanodlm.load(workdirs.make_workdir(tmp_path_factory.mktemp('masked')))


@pytest.fixture(scope='module')
def ar(tmp_path_factory):
  folder = tmp_path_factory.mktemp('ar')
  return nanodlm.load(workdirs.make_workdir(folder, objective__name='ar'))


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  changes = {'name': 'block', 'block_size': 4, 'ar_weight': 1.0}
  changes = {f'objective__{key}': value for key, value in changes.items()}
  folder = tmp_path_factory.mktemp('both')
  return nanodlm.load(workdirs.make_workdir(folder, **changes))


def test_texts(masked):
  texts = masked.sample('The {} {3}.', num_samples=3, seed=1)
  assert len(texts) == 3 and all(text.startswith('The ') for text in texts)
  assert texts == masked.sample('The {} {3}.', num_samples=3, seed=1)
  assert texts != masked.sample('The {} {3}.', num_samples=3, seed=2)
  for seed in (-1, 2**32, 2**63, 0.5):
    for ask in (masked.sample, lambda seed: masked.bound([TEXT], seed=seed)):
      with pytest.raises(InputError, match=f'seed={seed} .*2\\^32'):
        ask(seed=seed)
  last = masked.sample(num_samples=3, seed=np.int64(2**32 - 1))
  assert last != masked.sample(num_samples=3, seed=2**31 - 1)
  (greedy,) = masked.sample(temperature=0.0, num_steps=2, length=8)
  assert greedy == masked.sample(temperature=0.0, num_steps=2, length=8)[0]


def test_details(masked):
  for sampler, num_calls in (('fixed_count', 4), ('first_hitting', 14)):
    samples = masked.sample('ab', num_samples=2, sampler=sampler, details=True)
    for sample in samples:
      assert sample.tokens.shape == sample.fixed.shape == (16,)
      assert sample.fixed.tolist() == [True] * 2 + [False] * 14
      assert sample.num_calls == num_calls
      assert sample.tokens_per_call == 14 / num_calls
      assert sample.text == masked.tokenizer.decode(sample.tokens)
      assert np.isnan(sample.logprobs).tolist() == sample.fixed.tolist()
      assert np.all(sample.logprobs[2:] <= sample.top_logprobs[2:, 0])
      best = sample.top_tokens[2:, 0] == sample.tokens[2:]
      own = sample.logprobs[2:] == sample.top_logprobs[2:, 0]
      assert best.tolist() == own.tolist()


def test_what_was_compiled_is_used_again(masked):
  known = [masked.sample('ab', seed=seed, details=True)[0] for seed in (0, 1)]
  masked.sample('ab')
  with mock.patch.object(sample_steps, '_sample', side_effect=AssertionError):
    (new,) = masked.sample('cd', details=True)
    assert masked.sample('cd') == [new.text]
    for seed, before in enumerate(known):
      (again,) = masked.sample('ab', seed=seed, details=True)
      np.testing.assert_array_equal(again.logprobs, before.logprobs)
  assert not np.array_equal(known[0].logprobs, known[1].logprobs)


@pytest.mark.parametrize('temperature', [1.0, 0.0])
def test_log_probs_are_those_of_the_canvas_before_the_reveal(
  masked, temperature
):
  # One token per call, in an order that can be seen from the left.
  options = {'num_steps': 16, 'block_size': 1, 'temperature': temperature}
  (sample,) = masked.sample(
    'ab', sampler='confidence', top_p=0.9, details=True, **options
  )
  for i in range(2, 16):
    canvas = sample.tokens.copy()
    canvas[i:] = masked.tokenizer.mask_id
    log_p = workdirs.log_probs(masked.run, masked.params, canvas)[i]
    np.testing.assert_allclose(
      sample.logprobs[i], log_p[sample.tokens[i]], rtol=1e-4
    )
    best = np.argsort(-log_p)[:20]
    assert sample.top_tokens[i].tolist() == best.tolist()
    np.testing.assert_allclose(sample.top_logprobs[i], log_p[best], rtol=1e-4)


def test_log_probs_of_a_part_of_a_block(both):
  part, whole = (
    both.sample(f'ab{{{size}}}', sampler='block', details=True)[0]
    for size in (13, 14)
  )
  np.testing.assert_array_equal(part.tokens[:12], whole.tokens[:12])
  np.testing.assert_allclose(part.logprobs[:12], whole.logprobs[:12], rtol=1e-4)
  assert np.isfinite(part.logprobs[2:]).all() and len(part.logprobs) == 15


def test_bound_of_a_tokenizer_that_changes_the_text(tmp_path):
  lm = nanodlm.load(
    workdirs.make_workdir(
      tmp_path,
      scale=0.0,  # All ids but the mask are equally probable.
      objective__name='ar',
      tokenizer__name='sentencepiece',
      tokenizer__path=foreign_tokenizers.path_of_sentencepiece(
        tmp_path, vocab_size=80
      ),
    )
  )
  text = 'the\n\n\uff21\uff21 fox'
  num_tokens = len(lm.tokenizer.encode(text))
  (bound,) = lm.bound([text])
  assert (bound.num_bytes, bound.num_tokens) == (15, num_tokens)
  bits = num_tokens * math.log2(lm.tokenizer.vocab_size - 1)
  np.testing.assert_allclose(bound.bits_per_byte, bits / 15, rtol=1e-5)
  with pytest.raises(InputError, match="'  '"):
    lm.bound(['the fox', '  '])
  with pytest.raises(InputError, match="'the fox'"):
    lm.bound('the fox')
  assert len(repr(lm)) < 200 and 'ar' in repr(lm)


@pytest.mark.parametrize('kind', ['masked', 'remask', 'ar'])
def test_a_text_ends_at_its_first_eos(masked, ar, kind):
  lm = ar if kind == 'ar' else masked
  eos_ids = tuple(range(1, 256, 4))
  tokenizer = dataclasses.replace(lm.tokenizer, eos_ids=eos_ids)
  run = lm.run.with_tokenizer(tokenizer).with_sampler({'stop_at_eos': True})
  lm = dataclasses.replace(lm, run=run)
  # That it stops is a fact about the model: another sampler does too.
  options = {'sampler': 'remask'} if kind == 'remask' else {}
  prompt = 'qa{}' if kind == 'ar' else 'q{4}a{}'
  samples = lm.sample(prompt, num_samples=4, details=True, **options)
  sizes = set()
  for sample in samples:
    row, first = sample.tokens.tolist(), prompt.replace('{4}', '1234').find('{')
    ends = [i for i in range(first, len(row)) if row[i] in eos_ids]
    size = min(ends, default=len(row))
    assert sample.text == lm.tokenizer.decode(row[:size])
    sizes.add(size)
    if kind == 'ar':
      assert set(row[size + 1 :]) <= {eos_ids[0]}
  assert len(sizes) > 1


def test_log_probs_add_up_to_the_exact_value(ar, both):
  model = both.with_sampler({'name': 'speculate'})
  own = dataclasses.replace(
    both.run,
    objective=both.run.objective.autoregressive,
    network=both.run.network.autoregressive(),
  )
  for lm, exact in ((ar, ar), (model, dataclasses.replace(both, run=own))):
    for sample in lm.sample(num_samples=3, seed=1, details=True):
      batch = lms.make_batch(sample.tokens[None], np.ones((1, 16), bool))
      nats, _ = exact._bound(batch, np.zeros(1, int), None, 0)
      assert math.isclose(-sample.logprobs.sum(), nats[0], rel_tol=1e-4)
  (bound,) = ar.bound([ar.sample(temperature=0.0)[0]])
  (sample,) = ar.sample(temperature=0.0, details=True)
  assert math.isclose(-sample.logprobs.sum(), bound.nats, rel_tol=1e-4)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'sampler': 'ar'}, "sampler.name='ar' does not fit"),
    ({'num_steps': 0}, 'sampler.num_steps=0'),
    ({'sampler': 'first_hitting', 'num_steps': 3}, 'num_steps=3 is ignored'),
    ({'temperature': -1.0}, 'sampler.temperature=-1.0'),
    ({'top_q': 1.0}, 'sampler.top_q'),
    ({'prompt': 'x' * 17}, 'at least 18 tokens'),
    ({'num_samples': 0}, 'num_samples=0'),
  ],
)
def test_wrong_settings(masked, options, message):
  with pytest.raises(InputError, match=message):
    masked.sample(**options)


def test_learned_positions_limit_the_length(tmp_path):
  lm = nanodlm.load(workdirs.make_workdir(tmp_path, model__num_positions=16))
  with pytest.raises(InputError, match='length=17 must be .*num_positions=16'):
    lm.sample('ab', length=17)
  with pytest.raises(InputError, match='tokens=17 must be .*num_positions=16'):
    lm.logits(np.zeros(17, int))
  assert lm.logits(np.zeros(16, int)).shape[0] == 16
  # Blocks are filled as a whole.
  blocks = dict(objective__name='block', objective__block_size=4)
  with pytest.raises(InputError, match='sampler.length=17 .*num_positions=18'):
    workdirs.make_workdir(
      tmp_path / 'b', **blocks, model__num_positions=18, sampler__length=17
    )


def test_exact_values(ar):
  texts = ['abc', TEXT[:16], TEXT]
  bounds = ar.bound(texts)
  for text, bound in zip(texts, bounds):
    ids, expected = ar.tokenizer.encode(text), 0.0
    for first in range(0, len(ids), 16):  # Rows of the training's length.
      row = np.asarray(ids[first : first + 16], np.int32)
      inputs = ar.run.objective.network_input(row[None])[0]
      log_p = workdirs.log_probs(ar.run, ar.params, inputs)
      expected -= log_p[np.arange(len(row)), row].sum()
    assert bound.is_exact and bound.nats_ci95 == 0
    assert bound.num_tokens == len(ids)
    assert bound.num_bytes == len(text.encode())
    np.testing.assert_allclose(bound.nats, expected, rtol=1e-4)
    bits = expected / math.log(2) / len(text)
    np.testing.assert_allclose(bound.bits_per_byte, bits, rtol=1e-4)


@pytest.mark.parametrize('objective', ['masked', 'block'])
def test_bounds_of_a_network_that_knows_nothing(tmp_path, objective):
  # Equal logits: log V for each token, whatever the noise and the padding.
  changes = {'objective__name': objective}
  if objective == 'block':
    changes |= {'objective__block_size': 4}
  lm = nanodlm.load(workdirs.make_workdir(tmp_path, scale=0.0, **changes))
  for text, bound in zip(['abcde', TEXT], lm.bound(['abcde', TEXT])):
    expected = math.log(lm.tokenizer.mask_id) * len(text)
    assert not bound.is_exact
    np.testing.assert_allclose(bound.nats, expected, rtol=1e-4)
    assert bound.nats_ci95 < 1e-3


def test_bounds_have_an_interval(masked):
  one, again = masked.bound([TEXT, TEXT[:5]]), masked.bound([TEXT, TEXT[:5]])
  assert one == again
  other = masked.bound([TEXT], seed=1)[0]
  assert one[0].nats_ci95 > 0 and other.nats != one[0].nats
  assert abs(other.nats - one[0].nats) < 3 * (
    one[0].nats_ci95 + other.nats_ci95
  )
  # A text alone and with others: its noise is tied to its place, not to them.
  np.testing.assert_allclose(
    masked.bound([TEXT])[0].nats, one[0].nats, rtol=1e-5
  )
  with pytest.raises(InputError, match="''"):
    masked.bound(['a', ''])
  with pytest.raises(InputError, match='num_draws=0'):
    masked.bound(['a'], num_draws=0)
  with pytest.raises(InputError, match='length=0'):
    masked.sample(length=0)
  assert masked.bound([]) == []


def test_bounds_of_a_network_that_knows_the_time(tmp_path):
  workdir = workdirs.make_workdir(
    tmp_path, scale=1, model__time_conditioning=True, data__length=192
  )
  lm = nanodlm.load(workdir)
  # The time is that of the share of masks in a row, whatever else is scored.
  alone, together = lm.bound([TEXT[:9]]), lm.bound([TEXT[:9], 3 * TEXT])
  np.testing.assert_allclose(alone[0].nats, together[0].nats, rtol=1e-5)
  # Nor is there a time for a call without a prompt, next to padding.
  guided = lm.with_sampler({'guidance': 1.0})
  tokens, fixed = (x[None] for x in lms.lay_out(lm.run, 'ab{4}', 64))
  fill = lms.make_fill(guided.run)
  with pytest.raises(InputError, match='sampler.guidance=1.0 must be 0'):
    fill(lm.params, jax.random.key(0), tokens, fixed, 0 * tokens)


@pytest.mark.parametrize(
  'prompt, canvas, slot',
  [
    ('ab {x|y|z} {2}f', [*b'ab ', 257, 32, 257, 257, *b'f'], 3),
    ('{} {x|y|z}{}f', [*[257] * 6, 32, *[257] * 8, *b'f'], 7),
  ],
)
def test_choices_of_one_token(masked, prompt, canvas, slot):
  choices = masked.choose(prompt)
  texts = [choice.text for choice in choices]
  assert texts == ['x', 'y', 'z']
  log_p = jax.nn.log_softmax(masked.logits(canvas)[slot, :257])
  expected = np.asarray(log_p[np.array([120, 121, 122])])
  nats = [choice.nats for choice in choices]
  np.testing.assert_allclose(nats, -expected, rtol=1e-5)
  shares = [choice.probability for choice in choices]
  np.testing.assert_allclose(
    shares, np.exp(expected) / np.exp(expected).sum(), rtol=1e-5
  )
  assert all(x.is_exact and x.nats_ci95 == 0 for x in choices)


def test_choices_that_are_bounds(masked):
  # The mean over both orders of two masked bytes.
  choices = masked.choose('a {xy|zw} b', num_draws=64)
  canvas = np.array([*b'a ', 257, 257, *b' b'], np.int32)

  def log_p(i, token, given):
    row = canvas.copy()
    row[list(given)] = list(given.values())
    logits = masked.logits(row)[i, :257]
    return jax.nn.log_softmax(logits)[token]

  for choice, (first, second) in zip(choices, (b'xy', b'zw')):
    orders = [
      log_p(2, first, {}) + log_p(3, second, {2: first}),
      log_p(3, second, {}) + log_p(2, first, {3: second}),
    ]
    assert not choice.is_exact
    assert abs(choice.nats + np.mean(orders)) <= 2 * choice.nats_ci95 + 1e-4
    assert choice.nats_ci95 < 1
  assert math.isclose(sum(x.probability for x in choices), 1, rel_tol=1e-6)
  shapes = set()

  def call(step, params, key, batch):
    shapes.add(batch.tokens.shape)
    return step(params, key, batch)

  # Prompts of different lengths share a program.
  for prompt in ('a {xy|zw} b', 'ab {xy|zw} b'):
    dataclasses.replace(masked, call=call).choose(prompt, num_draws=2)
  assert len(shapes) == 1


def test_choices_of_several_tokens(ar, both):
  choices = ar.choose('{{a}} {red|blue} b')
  bounds = ar.bound(['{a} red b', '{a} blue b'])
  for choice, bound in zip(choices, bounds):
    assert choice.is_exact and math.isclose(choice.nats, bound.nats)
  odds = math.exp(bounds[1].nats - bounds[0].nats)
  assert math.isclose(choices[0].probability, odds / (1 + odds), rel_tol=1e-4)
  first, second = both.choose('a {red|blue} b')
  assert first.is_exact and second.is_exact
  # By the chain rule, with the logits of the clean copy.
  text = np.frombuffer(b'a red b', np.uint8).astype(np.int32)
  own = both.run.objective.autoregressive
  run = dataclasses.replace(
    both.run, objective=own, network=both.run.network.autoregressive()
  )
  logits = dataclasses.replace(both, run=run).logits(text)[:, :257]
  log_p = np.asarray(jax.nn.log_softmax(logits))[np.arange(7), text]
  assert math.isclose(first.nats, -log_p.sum(), rel_tol=1e-4)


@pytest.mark.parametrize(
  'prompt, named',
  [
    ('a b', '0 slots'),
    ('{a|b} {c|d}', '2 slots'),
    ('{{a|b}}', '0 slots'),
    ('{a|}', 'none of them empty'),
    ('{a|b|a}', 'must be different'),
    ('x {aa|b} {3}', r"the gap '\{3\}'"),
  ],
)
def test_wrong_choices(masked, prompt, named):
  with pytest.raises(InputError, match=named):
    masked.choose(prompt)


def test_logits(masked, ar):
  mask_id = masked.tokenizer.mask_id
  tokens = np.array([[1, mask_id, 3, 4], [mask_id, 2, 2, 2]])
  logits = masked.logits(tokens)
  assert logits.shape == (2, 4, mask_id + 1) and logits.dtype == np.float32
  np.testing.assert_allclose(masked.logits(tokens[0]), logits[0], rtol=1e-4)
  p = np.exp(workdirs.log_probs(masked.run, masked.params, tokens[0]))
  own = np.asarray(jax.nn.softmax(logits[0, :, :mask_id]))
  np.testing.assert_allclose(own, p, rtol=1e-3, atol=1e-6)
  # The autoregressive network predicts a token from those before it.
  changed = np.array([1, 2, 3, 9])
  same = ar.logits(np.array([1, 2, 3, 4])), ar.logits(changed)
  np.testing.assert_allclose(same[0], same[1], rtol=1e-5)
  several = [[1], [2, 3]], [[-1]], [mask_id + 1], [2**31], [1.7], [None], []
  for wrong in (*several, 'text', None):
    with pytest.raises(InputError, match='ids below'):
      masked.logits(wrong)
  with pytest.raises(InputError, match='level=2'):
    masked.logits([1], level=2)


def test_no_run(tmp_path):
  with pytest.raises(InputError, match='lacks config.json'):
    nanodlm.load(str(tmp_path))


def test_importing_is_cheap(masked):
  heavy = {'jax', 'tensorflow', 'fastapi', 'matplotlib', 'torch'}
  code = (
    'import sys, nanodlm; print(*sys.modules); '
    f'nanodlm.load({masked.workdir!r}); print(*sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=launches.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  imported, loaded = (
    set(line.split()) for line in done.stdout.splitlines()[-2:]
  )
  assert not imported & heavy
  assert loaded & heavy == {'jax'}


@pytest.fixture(
  scope='module',
  params=[('eos', False), ('masked', False), ('eos', True), ('masked', True)],
)
def talking(request, tmp_path_factory):
  """An autoregressive model of conversations, and these."""
  folder = tmp_path_factory.mktemp('talking')
  padding, has_rest = request.param
  talks = [
    [
      {'role': 'user', 'content': f'Is {i} odd?'},
      {'role': 'assistant', 'content': 'Yes.' if i % 2 else 'No.'},
      # Not scored, and not seen.
      *[{'role': 'user', 'content': 'And?'}] * has_rest,
    ]
    for i in range(40)
  ]
  lines = (json.dumps({'messages': talk}) for talk in talks)
  (folder / 'chat.jsonl').write_text('\n'.join(lines))
  workdir = workdirs.make_workdir(
    folder / 'run',
    objective__name='ar',
    data__source=f'chat:{folder}/chat.jsonl',
    data__length=48,
    data__crop='document',
    data__padding=padding,
    tokenizer__chat_template='plain',
  )
  return lms.load(workdir), talks


def test_bounds_of_conversations_are_those_of_evaluation(talking):
  lm, talks = talking
  packed = evaluate.open_text(lm).packed
  rows = evaluate.validation_rows(lm.run, packed, 0)
  score = lms.make_score(lm.run, num_draws=1, batch_size=8, call=lm.call)
  expected = score(lm.params, jax.random.key(0), rows)['nll']
  assert len(expected) > 5
  bounds = lm.bound(talks)
  questions = [talk[0]['content'] for talk in talks]
  for nll, row in zip(expected, rows.tokens):
    text = lm.tokenizer.decode(row)
    (i,) = (i for i, question in enumerate(questions) if question in text)
    assert bounds[i].nats == pytest.approx(nll, rel=1e-5)
  assert all(bound.is_exact for bound in bounds)
  assert {bound.num_bytes for bound in bounds} == {3, 4}


def test_choices_of_answers(talking):
  lm, talks = talking
  user = talks[3][0]  # And no last question.
  choices = lm.choose([user, {'role': 'assistant', 'content': '{Yes|No}.'}])
  texts = [
    [user, {'role': 'assistant', 'content': f'{text}.'}]
    for text in ('Yes', 'No')
  ]
  for choice, bound in zip(choices, lm.bound(texts)):
    assert choice.is_exact and choice.nats == pytest.approx(bound.nats)


@pytest.mark.parametrize(
  'ask, named',
  [
    (lambda lm, talk: lm.bound([talk[:1]]), "role 'assistant'"),
    (lambda lm, talk: lm.bound([talk * 9]), 'at most 48 tokens'),
    (lambda lm, talk: lm.bound([[]]), 'messages is empty'),
    (lambda lm, talk: lm.bound([talk, 'a']), "messages='a'"),
    (lambda lm, talk: lm.bound(['a', talk]), 'non-empty strings'),
    (lambda lm, talk: lm.bound([3]), "messages='3'"),
    (lambda lm, talk: lm.bound(talk), 'write .messages.'),
    (lambda lm, talk: lm.choose(talk[:1]), "role 'user'"),
    (lambda lm, talk: lm.choose(talk[:2]), '0 slots'),
    (lambda lm, talk: lm.choose(['a {b|c}']), r'messages\[0\]'),
    (lambda lm, talk: lm.choose(None), "messages='None'"),
    (lambda lm, talk: lm.sample(3), "messages='3'"),
    (lambda lm, talk: lm.sample('a {b|c}'), 'lm.choose'),
  ],
)
def test_wrong_conversations(talking, ask, named):
  lm, talks = talking
  with pytest.raises(InputError, match=named):
    ask(lm, talks[0])


def test_another_sampler_samples_as_much(masked):
  own = {'length': 9, 'num_samples': 3, 'seed': 5, 'temperature': 0.5}
  lm = masked.with_sampler(own)
  for name, kept in (('fixed_count', 0.5), ('auto', 0.5), ('confidence', 1.0)):
    section = lm.with_sampler({'name': name}).run.settings.sampler
    values = [section[key] for key in own]
    assert values == [9, 3, 5, kept], name
  for sampler in ('confidence', 'ancestral'):
    (one,) = lm.sample(sampler=sampler, details=True)
    assert len(one.tokens) == 9


@pytest.mark.parametrize('kind', ['pairs', 'expand'])
def test_a_slot_is_where_the_canvas_has_it(kind, tmp_path):
  text = 'the sky is blue and the grass is green'
  rows = [{'text': f'{text} {i}', 'prompt': text} for i in range(40)]
  if kind == 'pairs':
    rows = [{'prompt': x['text'], 'response': 'blue'} for x in rows]
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  own = {
    'pairs': {
      'data__source': f'pairs:{path}',
      'tokenizer__name': 'sentencepiece',
      'tokenizer__vocab_size': 300,
    },
    'expand': {
      'data__source': f'jsonl:{path}',
      'data__crop': 'document',
      'objective__expand': True,
    },
  }[kind]
  workdir = workdirs.make_workdir(tmp_path / 'run', data__length=64, **own)
  lm = nanodlm.load(workdir)
  # The space before a slot at the end belongs to the prompt of a pair.
  before = {'pairs': 'the sky is ', 'expand': '{} sky is '}[kind]
  for after in '', ' and green':
    canvas, slot = lm._lay_out_slot(before, after, 1)
    (places,) = np.nonzero(canvas == lm.tokenizer.mask_id)
    assert slot == places[-1] and (slot == len(canvas) - 1) == (
      not after and kind == 'pairs'
    )
