"""Tests of log-likelihoods and continuations, alone and under the harness."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm.data.tokenizers import chat
from nanodlm.evals import lm_eval as adapter
from nanodlm.types import InputError
from tests import workdirs

OPTIONS = {'batch_size': 8, 'num_draws': 2}


@pytest.fixture(scope='module')
def masked(tmp_path_factory):
  # 40 is not a multiple of LENGTH_STEP, so that rows have 32 or 40 tokens.
  return adapter.open_text_model(
    workdirs.make_workdir(tmp_path_factory.mktemp('masked'), data__length=40),
    **OPTIONS,
  )


@pytest.fixture(scope='module')
def causal(tmp_path_factory):
  return adapter.open_text_model(
    workdirs.make_workdir(
      tmp_path_factory.mktemp('ar'), data__length=40, objective__name='ar'
    ),
    **OPTIONS,
  )


def with_chat(text_model):
  lm = text_model.lm
  tokenizer = chat.with_template(lm.tokenizer, 'plain')
  run = lm.run.with_tokenizer(tokenizer)
  return adapter.TextModel(dataclasses.replace(lm, run=run))


def test_only_what_was_written_is_a_conversation(causal):
  talking = with_chat(causal)
  encode = talking.lm.tokenizer.encode
  context = talking.write_chat([{'role': 'user', 'content': 'a\ufdd0'}], True)
  end = talking.lm.tokenizer.separator_id
  expected = [end, *encode('User: a\ufdd0'), end, *encode('Assistant: ')]
  assert talking.encode(context).tolist() == expected
  rest = ' b\ufdd0c'
  assert talking.encode(context + rest).tolist() == [*expected, *encode(rest)]
  for text in '\ufdd0d', '\ufdd0[]\ufdd0', context.replace('"a', '"b'):
    assert talking.encode(text).tolist() == encode(text).tolist()


@pytest.fixture(scope='module')
def block(tmp_path_factory):
  return adapter.open_text_model(
    workdirs.make_workdir(
      tmp_path_factory.mktemp('block'),
      data__length=40,
      objective__name='block',
      objective__block_size=4,
    ),
    sampler={'num_steps': 4},
    **OPTIONS,
  )


def log_probs(text_model, tokens):
  return workdirs.log_probs(text_model.lm.run, text_model.lm.params, tokens)


def test_pairs(masked):
  decode = lambda pair: tuple(bytes(part.tolist()).decode() for part in pair)
  assert decode(masked.encode_pair('a b', ' c')) == ('a b', ' c')
  assert decode(masked.encode_pair('a b  ', 'c')) == ('a b', '  c')
  assert decode(masked.encode_pair('', 'c')) == ('', 'c')
  head, tail = masked.encode_pair('x' * 50, 'yz')
  assert (len(head), len(tail)) == (38, 2)
  with pytest.raises(InputError, match='continuation of 41 tokens'):
    masked.encode_pair('x', 'y' * 41)


def test_autoregressive_is_exact(causal):
  pairs = [('the quick', ' brown'), ('', 'fox'), ('x' * 36, 'abcd'), ('a', '')]
  values = causal.log_likelihoods(pairs)
  for (context, continuation), (value, greedy) in zip(pairs, values):
    tokens = list((context + continuation).encode())
    log_p = log_probs(causal, [causal.lm.tokenizer.mask_id, *tokens[:-1]])
    places = range(len(context), len(tokens))
    np.testing.assert_allclose(
      value, sum(log_p[i, tokens[i]] for i in places), rtol=1e-5, atol=1e-6
    )
    assert greedy == all(log_p[i].argmax() == tokens[i] for i in places)


def test_greedy_continuations_are_found(causal):
  mask, found = causal.lm.tokenizer.mask_id, []
  for letter in 'abcdefgh':
    best = int(log_probs(causal, [mask, ord(letter)])[-1].argmax())
    if 33 <= best < 126:
      found.append((letter, chr(best)))
  assert found
  others = [(letter, chr(ord(best) + 1)) for letter, best in found]
  greedy = [flag for _, flag in causal.log_likelihoods(found + others)]
  assert greedy == [True] * len(found) + [False] * len(found)


def test_one_masked_token_is_exact(masked):
  # With one masked token there is nothing to average, and the text does not
  # attend to the padding of the row.
  pairs = [('the quick', ' '), ('', 'f'), ('x' * 36, 'a')]
  for (context, token), (value, _) in zip(pairs, masked.log_likelihoods(pairs)):
    log_p = log_probs(masked, [*context.encode(), masked.lm.tokenizer.mask_id])
    np.testing.assert_allclose(value, log_p[-1, ord(token)], rtol=1e-4)


def test_two_masked_tokens_are_the_mean_over_both_orders(masked):
  mask = masked.lm.tokenizer.mask_id
  head, (a, b) = list(b'the'), b'fo'
  first = log_probs(masked, [*head, mask, mask])
  after_a = log_probs(masked, [*head, a, mask])
  after_b = log_probs(masked, [*head, mask, b])
  expected = 0.5 * (first[3, a] + after_a[4, b] + first[4, b] + after_b[3, a])
  values = [
    adapter.TextModel(
      masked.lm, num_draws=64, seed=seed, is_greedy=False
    ).log_likelihoods([('the', 'fo')])[0][0]
    for seed in range(3)
  ]
  # Half of the 3 x 64 draws mask one of the two tokens, either with probability
  # one half.
  spread = abs(after_a[4, b] - after_b[3, a])
  standard_error = 0.5 * spread / 96**0.5
  assert abs(np.mean(values) - expected) < 4 * standard_error + 1e-4


def test_choices_of_a_context_share_their_noise(masked):
  pairs = [('the', ' quick'), ('fox', ' quick'), ('the', ' quick')]
  values = [value for value, _ in masked.log_likelihoods(pairs)]
  assert values[0] == values[2] != values[1]


def test_greedy_is_what_the_sampler_writes(masked):
  tokens = np.full((1, 32), masked.lm.tokenizer.mask_id, np.int32)
  tokens[0, :3] = 65
  fixed = np.arange(32)[None] < 3
  key = masked.key
  filled, _ = masked.fill(adapter._GREEDY)(masked.lm.params, key, tokens, fixed)
  tokens[0, 3:6] = filled[0, 3:6]
  scored = ~fixed & (np.arange(32)[None] < 6)
  batch = masked._batch(tokens, scored, fixed | scored)
  assert masked._find_greedy(batch, None).tolist() == [True]
  tokens[0, 4] = (filled[0, 4] + 1) % 256
  assert masked._find_greedy(batch, None).tolist() == [False]


@pytest.mark.parametrize('name', ['masked', 'causal'])
def test_rolling(name, request):
  text_model = request.getfixturevalue(name)
  texts = ['the quick brown fox ' * 5, '', 'x']  # 40 + 40 + 20 tokens
  values = text_model.rolling_log_likelihoods(texts)
  assert values[1] == 0 and values[0] < values[2] < 0
  if name == 'causal':
    parts = [('', texts[0][first : first + 40]) for first in (0, 40, 80)]
    np.testing.assert_allclose(
      values[0], sum(v for v, _ in text_model.log_likelihoods(parts)), rtol=1e-5
    )
  else:
    log_p = log_probs(text_model, [text_model.lm.tokenizer.mask_id])
    np.testing.assert_allclose(values[2], log_p[0, ord('x')], rtol=1e-4)


def test_generate(masked, causal):
  for text_model in (masked, causal):
    prompts = ['the quick', 'a', 'x' * 60]
    texts = text_model.generate(prompts, [], 12)
    assert texts == text_model.generate(prompts, [], 12)
    assert all(len(text) <= 12 for text in texts)
    assert len(set(texts)) == 3
    stop = texts[0][2]
    assert (
      text_model.generate(prompts, [stop], 12)[0]
      == (texts[0][: texts[0].index(stop)])
    )


def test_cut_at():
  assert adapter.cut_at('abcabc', ['ca', 'b']) == 'a'
  assert adapter.cut_at('abc', ['x', '']) == 'abc'


def test_generation_options():
  assert adapter._generation_options(
    {'until': 'x', 'do_sample': False, 'temperature': 0.7}
  ) == (('x',), 256, (('temperature', 0.0),))
  assert adapter._generation_options(
    {'until': ['a', 'b'], 'max_gen_toks': 3, 'temperature': 0.7}
  ) == (('a', 'b'), 3, (('temperature', 0.7),))
  greedy = (), 256, (('temperature', 0.0),)
  assert adapter._generation_options({}) == greedy
  assert adapter._generation_options({'temperature': None}) == greedy
  cut = {'do_sample': True, 'top_p': 0.9, 'top_k': 5, 'max_new_tokens': 7}
  draw = {'temperature': 1.0, 'top_p': 0.9, 'top_k': 5}
  found = adapter._generation_options(cut)
  assert (found[1], dict(found[2])) == (7, draw)
  with pytest.warns(UserWarning, match="'num_beams': 4"):
    assert adapter._generation_options({'num_beams': 4}) == greedy


def test_options_of_samplers(causal, masked):
  workdir = causal.lm.workdir
  for changes in {'num_steps': 4}, {'name': 'ar', 'num_steps': 4}:
    with pytest.raises(InputError, match='num_steps=4 is ignored'):
      adapter.open_text_model(workdir, changes)
  workdir = masked.lm.workdir
  lm = adapter.open_text_model(workdir, {'num_steps': 4}).lm
  assert lm.run.sampler_name == 'confidence' and lm.run.sampler.num_steps == 4
  # A single token is left.
  texts = masked.generate(['a', 'b'], [], 6, (('top_k', 1),))
  assert texts == masked.generate(['a', 'b'], [], 6, (('temperature', 0.0),))


def test_without_the_harness(masked, monkeypatch):
  # None in sys.modules makes an import fail.
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.setitem(sys.modules, 'lm_eval.api.model', None)
  with pytest.raises(InputError, match=r'\[lm_eval\]'):
    adapter.make_lm(masked)


TASKS = {
  'choices': """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
  'rolling': """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
  'writing': """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


def test_under_the_harness(causal, masked, block, tmp_path, monkeypatch):
  lm_eval = pytest.importorskip(
    'lm_eval',
    reason="the harness is not installed: pip install -e '.[lm_eval]'",
  )
  from lm_eval import tasks

  monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
  documents = [
    {
      'question': f'the quick {word}',
      'choices': [' fox', ' dogs', ' e'],
      'answer': i % 3,
    }
    for i, word in enumerate(('red', 'dry', 'new'))
  ]
  (tmp_path / 'choices.jsonl').write_text('\n'.join(map(json.dumps, documents)))
  for name, text in TASKS.items():
    (tmp_path / f'{name}.yaml').write_text(
      text.replace('FOLDER', str(tmp_path))
    )
  for text_model, sampler in (
    (causal, 'ar'),
    (masked, 'confidence'),
    (block, 'block'),
  ):
    assert text_model.lm.run.sampler_name == sampler
    results = lm_eval.simple_evaluate(
      adapter.make_lm(text_model),
      tasks=list(TASKS),
      bootstrap_iters=0,
      task_manager=tasks.TaskManager(
        include_path=str(tmp_path), include_defaults=False
      ),
    )
    values = results['results']
    pairs = [
      (doc['question'], choice)
      for doc in documents
      for choice in doc['choices']
    ]
    scores = np.reshape(
      [v for v, _ in text_model.log_likelihoods(pairs)], (3, 3)
    )
    right = scores.argmax(1) == [doc['answer'] for doc in documents]
    assert values['choices']['acc,none'] == pytest.approx(np.mean(right))
    questions = [doc['question'] for doc in documents]
    total = sum(text_model.rolling_log_likelihoods(questions))
    num_bytes = sum(map(len, questions))
    assert values['rolling']['bits_per_byte,none'] == pytest.approx(
      -total / num_bytes / np.log(2), rel=1e-5
    )
    written = [
      sample['resps'][0][0] for sample in results['samples']['writing']
    ]
    assert written == text_model.generate(
      questions, ['e'], 8, (('temperature', 0.0),)
    )
  talking = with_chat(causal)
  lm = talking.lm
  results = lm_eval.simple_evaluate(
    adapter.make_lm(talking),
    tasks=['choices'],
    bootstrap_iters=0,
    task_manager=tasks.TaskManager(
      include_path=str(tmp_path), include_defaults=False
    ),
    apply_chat_template=True,
  )
  for sample, document in zip(results['samples']['choices'], documents):
    said = [{'role': 'user', 'content': document['question']}]
    prompt = lms.lay_out(lm.run, said, lm.run.settings.data.length)
    head = prompt[0][prompt[1]]
    for i, choice in enumerate(document['choices']):
      tail = lm.tokenizer.encode_rest(choice)
      tokens = np.concatenate([head, tail])[None]
      scored = np.arange(tokens.size)[None] >= len(head)
      values = talking.score(lms.make_batch(tokens, scored))
      np.testing.assert_allclose(
        sample['resps'][i][0][0], -values['nll'][0], rtol=1e-5
      )
