"""/v1/chat/completions, and conversations in /api."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm.data.tokenizers import chat
from tests import browsers, workdirs
from tests.serving.servers import ask, events, post, serving

PATH = '/v1/chat/completions'
SAID = [
  {'role': 'developer', 'content': 'Be brief.'},
  {'role': 'user', 'content': [{'type': 'text', 'text': 'Hi<|endoftext|>'}]},
]
PLAIN = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Hi<|endoftext|>'},
]


@pytest.fixture(scope='module')
def talking(tmp_path_factory):
  """A model with a chat template, and its server."""
  workdir = workdirs.make_workdir(
    tmp_path_factory.mktemp('chat'), data__length=96, sampler__num_steps=4
  )
  config = configs.read_run(str(workdir))
  config.tokenizer.chat_template = 'plain'
  settings = configs.make_settings(config, ['tokenizer.chat_template'])
  with serving(lms.load(str(workdir), settings=settings)) as running:
    yield running


def test_answers_as_openai_does(talking):
  model, server = talking
  body = {'model': 'tiny', 'messages': SAID, 'n': 2, 'seed': 4}
  status, answer = post(server, PATH, body)
  assert status == 200 and answer['object'] == 'chat.completion'
  own = {'messages': SAID, 'num_samples': 2, 'seed': 4}
  samples = post(server, '/api/generate', own)[1]['samples']
  assert len(answer['choices']) == 2
  num_tokens = []
  prompt = chat.make_format(model.tokenizer).encode(
    model.tokenizer, PLAIN, generation=True
  )
  ends = [*model.tokenizer.eos_ids]
  for i, (choice, sample) in enumerate(zip(answer['choices'], samples)):
    ids = np.array(sample['tokens'])
    np.testing.assert_array_equal(ids[: len(prompt.ids)], prompt.ids)
    rest = ids[len(prompt.ids) :]
    size = int(np.argmax([*np.isin(rest, ends), True]))
    num_tokens.append(size)
    text = model.tokenizer.decode(rest[:size])
    assert choice['index'] == i
    assert choice['message'] == {'role': 'assistant', 'content': text}
    assert choice['finish_reason'] == ('stop' if size < len(rest) else 'length')
    assert sample['shown'] == text
  usage = {
    'prompt_tokens': len(prompt.ids),
    'completion_tokens': sum(num_tokens),
    'total_tokens': len(prompt.ids) + sum(num_tokens),
  }
  assert answer['usage'] == usage
  body |= {'stream': True, 'stream_options': {'include_usage': True}}
  chunks = [data for _, data in events(ask(server, 'POST', PATH, body)[2])]
  assert chunks[-1] == '[DONE]' and chunks[-2]['usage'] == usage
  streamed = [''] * 2
  for chunk in chunks[:-2]:
    assert chunk['object'] == 'chat.completion.chunk'
    (choice,) = chunk['choices']
    assert choice['delta']['role'] == 'assistant'
    streamed[choice['index']] += choice['delta']['content']
  assert streamed == [x['message']['content'] for x in answer['choices']]


def test_limits_stops_and_logprobs(talking):
  model, server = talking
  body = {'messages': SAID, 'seed': 1, 'max_completion_tokens': 9}
  body |= {'tools': [], 'response_format': {'type': 'text'}}
  body |= {'logprobs': True, 'top_logprobs': 2}
  (choice,) = post(server, PATH, body)[1]['choices']
  whole, content = choice['message']['content'], choice['logprobs']['content']
  assert ''.join(one['token'] for one in content) == whole
  own = {'messages': SAID, 'seed': 1, 'logprobs': 2}
  # The same gap: its size is a part of the canvas.
  prompt = chat.make_format(model.tokenizer).encode(
    model.tokenizer, PLAIN, generation=True
  )
  canvas = [*prompt.ids.tolist(), *[None] * 9]
  own = {'tokens': canvas, 'seed': 1, 'logprobs': 2}
  (sample,) = post(server, '/api/generate', own)[1]['samples']
  values = sample['logprobs']['tokens'][len(prompt.ids) :]
  np.testing.assert_allclose(
    [one['logprob'] for one in content], values[: len(content)], rtol=1e-4
  )
  ids = sample['tokens'][len(prompt.ids) :][: len(content)]
  # A byte is named even if it is only a part of a character.
  assert [one['bytes'] for one in content] == [[i] for i in ids]
  assert max(ids) >= 128
  for one, top in zip(content, sample['logprobs']['top'][len(prompt.ids) :]):
    named = [alternative['bytes'] for alternative in one['top_logprobs']]
    assert named == [[x['token']] * (x['token'] < 256) for x in top]
  stop = whole[2:4]
  body = {**body, 'stop': stop, 'logprobs': False, 'top_logprobs': None}
  (choice,) = post(server, PATH, body)[1]['choices']
  assert choice['message']['content'] == whole[: whole.find(stop)]
  assert choice['finish_reason'] == 'stop'


@pytest.mark.parametrize(
  ('body', 'status', 'said'),
  [
    ({}, 422, 'messages'),
    ({'messages': []}, 400, 'empty'),
    ({'messages': [{'role': 'user'}]}, 422, 'content'),
    ({'messages': [{'role': 'tool', 'content': 'a'}]}, 400, "'tool'"),
    ({'messages': [{'role': 'user', 'content': 'a' * 99}]}, 400, 'leaves 0'),
    ({'messages': PLAIN, 'max_tokens': 90}, 400, 'of 90'),
    (
      {'messages': [*PLAIN, {'role': 'assistant', 'content': 'b'}]},
      400,
      'end with a message of the user',
    ),
    ({'messages': PLAIN, 'tools': [{}]}, 422, 'tools'),
    (
      {'messages': PLAIN, 'top_logprobs': 21, 'logprobs': True},
      422,
      'top_logprobs: Input should be less than or equal to 20, not 21',
    ),
    ({'messages': PLAIN, 'top_logprobs': 2}, 400, 'top_logprobs'),
    ({'messages': PLAIN, 'model': 'gpt'}, 404, 'gpt'),
  ],
)
def test_bad_requests(talking, body, status, said):
  found, answer = post(talking[1], PATH, body)
  assert found == status and said in answer['error']['message']
  assert answer['error']['type'] == 'invalid_request_error'


@pytest.mark.parametrize('content', [3, [{'type': 'image'}]])
def test_errors_name_fields(talking, content):
  body = {'messages': [{'role': 'user', 'content': content}]}
  status, answer = post(talking[1], PATH, body)
  message, param = answer['error']['message'], answer['error']['param']
  assert status == 422 and param == 'messages'
  assert message.startswith('messages.0.content') and '[' not in message


def test_without_template(running):
  status, answer = post(running[1], PATH, {'messages': PLAIN})
  assert status == 400 and 'chat template' in answer['error']['message']


def test_python_client(talking):
  openai = pytest.importorskip('openai', reason='the client is not installed')
  _, server = talking
  client = openai.OpenAI(
    base_url=f'http://127.0.0.1:{server.port}/v1', api_key='any'
  )
  ask_for = lambda **more: client.chat.completions.create(
    model='tiny', messages=PLAIN, seed=4, **more
  )
  whole = ask_for().choices[0].message.content
  parts = [x.choices[0].delta.content for x in ask_for(stream=True)]
  assert ''.join(parts) == whole
  with pytest.raises(openai.BadRequestError, match='of 90'):
    ask_for(max_tokens=90)


CLIENT = """
const OpenAI = require('openai');
const [url, messages] = [process.argv[1], JSON.parse(process.argv[2])];
const client = new OpenAI({baseURL: url, apiKey: 'any'});
(async () => {
  const asked = {model: 'tiny', messages, seed: 4};
  const whole = await client.chat.completions.create(asked);
  let text = '';
  const stream = await client.chat.completions.create({...asked, stream: true});
  for await (const part of stream) text += part.choices[0].delta.content;
  let error = '';
  await client.chat.completions.create({...asked, max_tokens: 90})
    .catch((e) => { error = `${e.status} ${e.message}`; });
  console.log(JSON.stringify([whole.choices[0].message.content, text, error]));
})();
"""


def test_npm_client(talking):
  node = shutil.which('node')
  find = [node or '', '-e', "require.resolve('openai')"]
  if not node or subprocess.run(find, capture_output=True).returncode:
    pytest.skip('the npm package openai is not installed')
  _, server = talking
  url = f'http://127.0.0.1:{server.port}/v1'
  done = subprocess.run(
    [node, '-e', CLIENT, url, json.dumps(PLAIN)],
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )
  whole, streamed, error = json.loads(done.stdout)
  body = {'messages': PLAIN, 'seed': 4}
  (choice,) = post(server, PATH, body)[1]['choices']
  assert whole == streamed == choice['message']['content']
  assert error.startswith('400') and 'of 90' in error


def test_in_a_browser(talking):
  _, server = talking
  with browsers.visiting(f'http://127.0.0.1:{server.port}/') as page:
    expect = browsers.expect()
    expect(page.locator('#facts')).to_contain_text('canvas of 96')
    page.fill('#seed', '4')
    said = page.locator('#said p')
    page.fill('#message', 'Hi')
    page.keyboard.press('Control+Enter')
    expect(page.locator('#state')).to_have_text('Done')
    expect(said).to_have_count(2)
    expect(said.nth(0)).to_have_text('user: Hi')
    own = {'messages': [{'role': 'user', 'content': 'Hi'}], 'seed': 4}
    answer = post(server, '/api/generate', own)[1]['samples'][0]['shown']
    assert said.nth(1).inner_text().startswith(f'assistant: {answer[:3]}')
    # An error leaves the conversation as it was.
    page.fill('#message', 'long ' * 20)
    page.click('#send')
    expect(page.locator('#error')).to_contain_text('leaves 0')
    expect(said).to_have_count(2)
    page.click('#forget')
    expect(said).to_have_count(0)


def test_scores_and_choices_of_answers(talking):
  model, server = talking
  user = {'role': 'user', 'content': 'Is 3 odd?'}
  answer = lambda text: {'role': 'assistant', 'content': text}
  talk = [user, answer('Yes.')]
  (score,) = post(server, '/api/score', {'messages': talk})[1]['scores']
  (bound,) = model.engine.lm.bound([talk])
  assert score['nats'] == pytest.approx(bound.nats, rel=1e-5)
  assert score['num_bytes'] == 4
  ask = [user, answer('{Yes|No}.')]
  choices = post(server, '/api/choose', {'messages': ask})[1]['choices']
  expected = model.engine.lm.choose(ask)
  for choice, own in zip(choices, expected, strict=True):
    assert choice['text'] == own.text
    assert choice['nats'] == pytest.approx(own.nats, rel=1e-5)
  for path in 'score', 'choose':
    status, error = post(server, f'/api/{path}', {'messages': [user]})
    assert status == 400 and 'assistant' in error['error']['message']
