"""Tests of nanodlm.show.replay: its data, its page, and the page in a browser.

The tests in a browser need Chromium and pip install -e '.[browser]'.
"""

import dataclasses
import html.parser
import json
import re
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm import sample
from nanodlm.data.tokenizers import base
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.show import replay, runs, watch
from nanodlm.training import checkpoint
from nanodlm.types import InputError
from tests import browsers, workdirs

BYTES = BytesTokenizer()
MASK = BYTES.mask_id
# Text that could end an element, a string or a line, hide, or reverse text.
NASTY = '</script><script>hacked=1</script><!--'
NASTY += '"\'\\\0\u2028\u05d0\u05d1\u202e😀\té&lt;'
PROMPT = 'a'
TITLE, FACTS = '</script>', 'objective <b>'


def one_by_one(text, order):
  """Returns a trajectory that writes `text` after PROMPT in an order of bytes.

  The third call masks again what the second wrote; the fourth writes it again,
  and the fifth changes the first written byte from 'z'.
  """
  final = BYTES.encode(PROMPT + text)
  frames = [np.full(final.shape, MASK, np.int32)]
  frames[0][: len(PROMPT)] = final[: len(PROMPT)]
  first, second = order[0], order[1]
  steps = [
    (first, ord('z')),
    (second, final[second]),
    (second, MASK),
    (second, final[second]),
    (first, final[first]),
  ]
  steps += [(i, final[i]) for i in order[2:]]
  answers = []
  for position, token in steps:
    frame = frames[-1].copy()
    frame[position] = token
    frames.append(frame)
    top = [token if token != MASK else final[position], 65, 66]
    answers.append(
      watch.Answer(
        np.array([position]),
        np.array([top]),
        np.array([[0.5, 0.25, 0.0001]], np.float32),
      )
    )
  return watch.Trajectory(np.stack(frames), answers)


def make_takes():
  length = len(BYTES.encode(PROMPT + NASTY))
  fixed = np.arange(length) < len(PROMPT)
  forward = list(range(1, length))
  return [
    replay.Take(
      name, settings, NASTY, number, fixed, one_by_one(NASTY, order), length
    )
    for name, settings, order in (
      ('block', '', forward),
      ('remask', 'eta=0.5', forward[::-1]),
    )
    for number in (1, 2)
  ]


class Scripts(html.parser.HTMLParser):
  """The texts of a page's script elements, and all attributes."""

  def __init__(self, page):
    super().__init__()
    self.scripts, self.attributes, self.open = [], [], []
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.attributes.extend(attrs)
    if tag not in ('meta', 'link', 'input'):
      self.open.append(tag)
    if tag == 'script':
      self.scripts.append('')

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == 'script':
      self.scripts[-1] += data


def test_page_is_valid_and_loads_nothing():
  data = replay.make_data(make_takes(), BYTES, 5, NASTY, NASTY)
  page = replay.make_page(data)
  parsed = Scripts(page)
  assert not parsed.open  # Every element is closed, in order.
  first, program = parsed.scripts
  assert json.loads(first) == data
  assert first.isascii() and '<' not in first
  assert 'hacked' not in program
  # Nothing is loaded: only the recorded text contains addresses.
  assert not re.search(
    r'https?:|//[a-z]|url\(|@import', page.replace(first, '')
  )
  assert {
    value for name, value in parsed.attributes if name in ('src', 'href')
  } == {'data:,'}
  assert page.startswith('<!doctype html>') and replay.MARK in page[:1024]


def test_data_is_the_trajectory():
  takes = make_takes()
  data = replay.make_data(takes, BYTES, 2, 'title', 'facts')
  assert [(take['sampler'], take['sample']) for take in data['takes']] == [
    ('block', 1),
    ('remask', 1),
    ('block', 2),
    ('remask', 2),
  ]
  assert data['takes_back'] and data['changes'] and data['prompts'] == [NASTY]
  # Bytes that are not UTF-8 alone are numbers.
  spelled = [
    piece if isinstance(piece, str) else bytes(piece).decode('latin1')
    for piece in data['vocab']
  ]
  assert data['vocab'][0] == '' and 'h' in spelled and [0xF0] in data['vocab']
  ids = {0: MASK, **{i: ord(text) for i, text in enumerate(spelled) if text}}
  for take, shown in zip(
    sorted(takes, key=lambda take: take.sample), data['takes']
  ):
    frames = take.trajectory.frames
    canvas = np.array([ids[i] for i in shown['start']])
    np.testing.assert_array_equal(canvas, frames[0])
    assert shown['text'] == PROMPT + NASTY
    for call, after in zip(shown['calls'], frames[1:]):
      ((position, token, probability),) = np.reshape(call['c'], (-1, 3))
      canvas[position] = ids[token]
      np.testing.assert_array_equal(canvas, after)
      assert probability == (-1 if ids[token] == MASK else 500)
      # Only alternatives of at least 0.05% are listed, at most num_top.
      ((where, (first, half, other, quarter)),) = call['a'].items()
      assert (where, half, quarter) == (str(position), 500, 250)
      assert ids[other] == 65
      assert ids[first] == take.trajectory.frames[-1][position] or (
        ids[first] == ord('z')
      )


def test_order_image():
  takes = make_takes()[::2]  # From the left, and from the right.
  trajectories = [take.trajectory for take in takes]
  image = watch.order_image(trajectories, takes[0].fixed)
  length = len(takes[0].fixed)
  size = 512 // length
  assert image.dtype == np.uint8
  # Two rows, apart, and a line with the legend.
  assert image.shape == (2 * (32 + 8) + 16, 512, 3)
  np.testing.assert_array_equal(image[:, size * length - 1][32:40], 255)
  assert image[0, 0].tolist() == image[40, 0].tolist() == [150] * 3  # PROMPT
  for row, first, last in ((0, 3, length - 1), (40, length - 3, 1)):
    early, late = image[row, size * first], image[row, size * last]
    assert late[1] < early[1] <= 242  # Later calls are darker.
  assert image[0, size * (length - 1)].tolist() == [0, 77, 33]
  # FIRST CALL, LAST CALL and PROMPT are written next to what they explain.
  for first, end in (0, 90), (200, 280), (352, 420):
    assert (image[80:, first:end] == 0).any() and image[80, end - 1, 0] == 255
  assert image[80, 320].tolist() == [150] * 3
  bar = image[80, 96 : 96 + 96]
  assert bar[0].tolist() == [217, 242, 224] and bar[-1].tolist() == [0, 77, 33]


def test_path(tmp_path):
  mine = tmp_path / 'notes.html'
  mine.write_text('<!doctype html><p>mine</p>')
  for path in (mine, tmp_path, tmp_path / 'no' / 'a.html'):
    with pytest.raises(InputError, match='--html='):
      replay.Page(str(path), 5)
  assert 'mine' in mine.read_text()
  takes = make_takes()
  page = replay.Page(str(tmp_path / 'a.html'), 5)
  page.takes.extend(takes)
  assert page.write(BYTES, 't', 'f') == (tmp_path / 'a.html').stat().st_size
  # An earlier page may be replaced.
  again = replay.Page(str(tmp_path / 'a.html'), 5)
  again.takes.extend(takes[:1])
  again.write(BYTES, 't', 'f')
  assert {path.name for path in tmp_path.iterdir()} == {'a.html', 'notes.html'}


def test_picture(tmp_path):
  page = replay.Page(str(tmp_path / 'a.svg'), 5)
  page.takes.extend(make_takes()[2:])
  page.write(BYTES, '<title>', 'facts')
  text = (tmp_path / 'a.svg').read_text('utf-8')
  replay.Page(str(tmp_path / 'a.svg'), 5)  # It may be replaced.
  assert not re.search(r'url\(|@import|<script|href', text)
  root = ElementTree.fromstring(text)
  num = len(page.takes[0].trajectory.answers)
  prompt, *written, facts = [
    (each.get('class'), each.text) for each in root if each.tag.endswith('text')
  ]
  assert prompt == ('given', PROMPT)
  assert facts[1] == f'<title>: {num - 3} tokens in {num} network calls, remask'
  # Written from the end; what was changed last counts.
  shown = ''.join(NASTY.split())
  for bad in '\0\u2028\u202e':
    shown = shown.replace(bad, '\ufffd' if bad == '\0' else bad)
  assert ''.join(text for _, text in written) == shown
  assert [kind for kind, _ in written[-3:]] == ['c5', 'c3', 'c4']
  holes = [each for each in root if each.get('class', '').startswith('hole')]
  assert len(holes) == len(written)
  assert f'@keyframes c{num - 1} {{ 0%, 74.00%, 100%' in text


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A workdir and the run in it."""
  workdir = workdirs.make_workdir(tmp_path_factory.mktemp('replay'))
  return workdir, lms.load(workdir)


def test_recording_does_not_change_samples(run, tmp_path, capsys):
  workdir, lm = run
  lm = lm.with_sampler({'num_samples': 3})
  prompts = ['The {} fox', '']
  sample.sample_prompts(lm, prompts)
  plain = capsys.readouterr().out
  page = replay.Page(str(tmp_path / 'a.html'), 3)
  samplers = ['fixed_count', 'remask:num_steps=6']
  sample.sample_prompts(lm, prompts, samplers, page=page)
  recorded = capsys.readouterr().out
  assert 'MiB' in recorded and ', remask:num_steps=6' in recorded
  with open(f'{workdir}/samples.jsonl') as file:
    lines = [json.loads(line) for line in file]
  own, kept = (
    lines[:6],
    [line for line in lines[6:] if line['sampler']['name'] == 'fixed_count'],
  )
  assert [a['tokens'] for a in own] == [a['tokens'] for a in kept]
  printed = [base.escape_controls(line['text']) for line in own]
  assert all(text in plain for text in printed)
  # Nothing that is drawn moves the cursor.
  assert not set(plain) & set(map(chr, (*range(9), *range(11, 32), 127)))
  parsed = Scripts((tmp_path / 'a.html').read_text('utf-8'))
  takes = json.loads(parsed.scripts[0])['takes']
  assert len(takes) == 12
  texts = {take['text'] for take in takes}
  assert texts == {line['text'] for line in lines[6:]}
  assert {
    len(take['calls']) for take in takes if take['sampler'] == 'fixed_count'
  } == {4}


def test_samples_in_training_are_written(run, tmp_path):
  lm = run[1]
  writer, packed = mock.Mock(), mock.Mock(is_documents=False)
  num, num_samples = sample.MAX_SHOWN, sample.MAX_SHOWN + 1
  settings = lm.run.settings
  train = dataclasses.replace(settings.train, num_samples=num_samples)
  settings = dataclasses.replace(settings, train=train)
  drawing = dataclasses.replace(lm.run, settings=settings)
  draw = sample.make_draw(drawing, packed, writer, str(tmp_path))
  draw(3, lm.params)
  (step, images), _ = writer.write_images.call_args
  (image,) = images['samples/reveal_order']
  assert step == 3 and image.shape == (40 * num + 16, 512, 3)
  texts = writer.write_texts.call_args.args[1]
  assert list(texts) == [f'samples/{i}' for i in range(num)]
  # They are kept for --mode=report, in the form of --mode=sample.
  written, *others = runs.read_run(tmp_path, '').samples
  assert len(others) == num_samples - 1
  assert texts['samples/0'] == f'```\n{written["shown"]}\n```'
  assert BYTES.decode(written['tokens']) == written['text']
  assert (written['step'], written['prompt']) == (3, '')
  assert written['num_calls'] == written['sampler']['num_steps'] == 4
  with pytest.raises(checkpoint.SaveError, match='samples.jsonl'):
    sample.make_draw(lm.run, packed, writer, str(tmp_path / 'no'))(3, lm.params)


# Tests in a browser.


@pytest.fixture(scope='module')
def browser():
  with browsers.opened() as browser:
    yield browser


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  file = tmp_path_factory.mktemp('page') / 'a.html'
  file.write_text(
    replay.make_page(replay.make_data(make_takes(), BYTES, 5, TITLE, FACTS))
  )
  return file


@pytest.fixture
def visit(browser, path):
  """Opens the page; fails on messages in its console and on requests."""
  contexts, heard = [], []

  def open_page(clock=False, **settings):
    contexts.append(browser.new_context(**settings))
    page = contexts[-1].new_page()
    if clock:
      page.clock.install(time=0)
      page.clock.pause_at(1)
    page.on('console', lambda message: heard.append(message.text))
    page.on('pageerror', lambda error: heard.append(str(error)))
    page.on(
      'request',
      lambda request: (
        request.url.startswith('file:')
        or request.url.startswith('data:')
        or heard.append(request.url)
      ),
    )
    page.goto(path.as_uri())
    return page

  yield open_page
  assert not contexts[-1].pages[0].evaluate('window.hacked')
  for context in contexts:
    context.close()
  assert not heard


def calls(page):
  return page.locator('#where').inner_text()


def until(page, condition):
  # The page's security policy forbids wait_for_function.
  for _ in range(200):
    if page.evaluate(condition):
      return
    page.wait_for_timeout(25)
  raise AssertionError(f'never: {condition}')


def test_browser_slider_and_keys(visit):
  page = visit(reduced_motion='reduce')
  num = len(make_takes()[0].trajectory.answers)
  # The page opens with the finished text, at rest.
  assert calls(page) == f'call {num} of {num}'
  assert page.locator('#play').inner_text() == 'Play'
  assert page.locator('#title').inner_text() == f'Replay of {TITLE}'
  assert page.locator('#facts').inner_text() == FACTS
  # The prompt is shown whole.
  prompt = page.locator('#asked').inner_text()
  assert prompt.startswith(NASTY[:40]) and prompt.endswith('&lt;')
  pane = page.locator('.pane').first
  text = pane.locator('.canvas').inner_text()
  for shown in (
    '</script>',
    '‹U+0000›',
    '‹U+2028›',
    '‹U+202E›',
    '😀',
    'é',
    '→',
    '&lt;',
  ):
    assert shown in text
  press = page.keyboard.press
  press('Home')
  assert calls(page) == f'call 0 of {num}'
  assert pane.locator('.masked').count() == len(BYTES.encode(NASTY))
  assert pane.locator('.given').inner_text() == PROMPT
  press('ArrowRight')
  assert pane.locator('.new').all_inner_texts() == ['z']
  press('ArrowRight'), press('ArrowRight')
  assert pane.locator('.back').all_inner_texts() == ['×']
  assert '1 of' in pane.locator('.count').inner_text()
  press('ArrowRight'), press('ArrowRight')
  assert pane.locator('.changed').all_inner_texts() == ['<']
  press('ArrowLeft'), press('.'), press(',')
  assert calls(page) == f'call 4 of {num}'
  until(
    page,
    "document.getElementById('status').textContent"
    f".startsWith('call 4 of {num}')",
  )
  page.locator('#slider').fill('7')
  assert calls(page) == f'call 7 of {num}'
  page.locator('#slider').focus()
  press('ArrowRight')
  assert calls(page) == f'call 8 of {num}'
  press('End')
  assert calls(page) == f'call {num} of {num}'
  # A character of four bytes is in one cell, and three cells are empty.
  assert pane.locator('.tok', has_text='😀').count() == 1
  assert pane.locator('.tok:empty').count() == len(BYTES.encode(NASTY)) - len(
    NASTY
  )


def test_browser_plays(visit):
  page = visit(clock=True)
  num = len(make_takes()[0].trajectory.answers)
  # It starts without a click, from the first call.
  assert calls(page) == f'call 0 of {num}'
  assert page.locator('#play').inner_text() == 'Pause'
  page.clock.run_for(1000)
  assert page.evaluate('at === Math.floor(1000 / pace())')
  page.clock.resume()
  page.select_option('#speed', '4')
  until(page, 'at > 2 && at < steps')
  page.locator('#play').click()
  stopped = calls(page)
  page.wait_for_timeout(150)
  assert calls(page) == stopped != f'call {num} of {num}'
  assert page.locator('#play').inner_text() == 'Play'
  page.locator('#play').click()
  until(page, 'at === steps')
  assert page.locator('#play').inner_text() == 'Play'


def test_browser_alternatives(visit):
  size = {'width': 900, 'height': 800}
  page = visit(reduced_motion='reduce', viewport=size)
  tip, tokens = (
    page.locator('#tip'),
    page.locator('.pane').first.locator('.tok'),
  )
  assert tip.is_hidden()
  tokens.nth(2).hover()
  assert 'Position 3: revealed at call 4 of' in tip.inner_text()
  assert 'probability 50%' in tip.inner_text()
  assert [row.split() for row in tip.locator('tr').all_inner_texts()] == [
    ['✓', '/', '50%'],
    ['A', '25%'],
  ]
  page.mouse.move(2, 2)
  tip.wait_for(state='hidden')
  # Each text is one tab stop; arrow keys move within it.
  assert page.locator('.canvas .tok[tabindex="0"]').count() == 4
  tokens.nth(0).focus()
  assert 'given' in tip.inner_text()
  page.keyboard.press('ArrowRight')
  assert 'changed from z at call 5' in tip.inner_text()
  assert tokens.nth(1).get_attribute('aria-describedby') == 'tip'
  assert page.locator('.canvas .tok[tabindex="0"]').count() == 4
  page.keyboard.press('ArrowDown')
  below = page.evaluate('document.activeElement.position')
  assert below > 10
  page.keyboard.press('ArrowUp')
  assert page.evaluate('document.activeElement.position') == 1
  page.keyboard.press('End')
  assert page.evaluate('document.activeElement.position') == tokens.count() - 1
  page.keyboard.press('Escape')
  assert tip.is_hidden()
  page.keyboard.press('Home')
  assert 'given' in tip.inner_text()
  # Characters without a shape have names.
  spoken = {
    page.locator('.tok', has_text=text).first.get_attribute('aria-label')
    for text in ('→', '😀', '<', '‹U+0000›')
  }
  assert spoken == {'space', '‹F0›', '<', '‹U+0000›'}
  page.locator('#first').click()
  assert tokens.nth(5).get_attribute('aria-label') == 'masked'
  tokens.nth(5).hover()
  assert 'Position 6: masked, not yet asked for' in tip.inner_text()


# Returns the least contrast of text with its background, over all elements that
# match the selectors.
CONTRAST = """selectors => {
  const canvas = Object.assign(document.createElement('canvas'),
                               {width: 1, height: 1});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  const rgb = colour => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => {
    const [r, g, b] = colour.map(
        c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let least = 99;
  for (const element of document.querySelectorAll(selectors)) {
    if (!element.textContent.trim() || !element.checkVisibility()) continue;
    const text = light(rgb(getComputedStyle(element).color));
    let parent = element;
    while (!rgb(getComputedStyle(parent).backgroundColor)[3])
      parent = parent.parentElement;
    const ground = light(rgb(getComputedStyle(parent).backgroundColor));
    least = Math.min(least, (Math.max(text, ground) + 0.05) /
                            (Math.min(text, ground) + 0.05));
  }
  return least;
}"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_browser_colours(visit, scheme):
  page = visit(color_scheme=scheme, reduced_motion='reduce')
  theme = 'getComputedStyle(document.documentElement).colorScheme'
  assert page.evaluate(theme) == scheme
  # Covers all probabilities and calls.
  stretch = """document.querySelectorAll('.said').forEach((token, i, all) => {
    for (const name of ['--c', '--o'])
      token.style.setProperty(name, i / (all.length - 1));
  })"""
  for step in (3, 20, 99):
    page.evaluate(f'go({step})')
    page.evaluate(stretch)
    for mode in ('confidence', 'order', 'none'):
      page.select_option('#colour', mode)
      assert (
        page.evaluate(
          CONTRAST,
          '.tok, p, .soft, button, select, h1, h2, '
          'summary, kbd, label, #legend span',
        )
        >= 4.5
      ), mode
  assert (
    page.locator('.bar span').first.evaluate(
      'element => getComputedStyle(element).transitionDuration'
    )
    == '0s'
  )
  colours = (
    "[...document.querySelectorAll('.said')].map(e => getComputedStyle(e)"
    '.backgroundColor)'
  )
  page.select_option('#colour', 'order')
  assert len(set(page.evaluate(colours))) > 10
  page.locator('#theme').click()
  assert page.evaluate(theme) != scheme


def test_browser_phone(visit):
  page = visit(
    viewport={'width': 360, 'height': 560},
    has_touch=True,
    reduced_motion='reduce',
  )
  assert page.evaluate('document.documentElement.scrollWidth') == 360
  token = page.locator('.pane .tok').nth(3)
  for top in (150, 450):  # The position of the token in the window.
    token.evaluate(
      '(e, top) => scrollBy(0, e.getBoundingClientRect().top - top)', top
    )
    token.tap()
    box, own = page.locator('#tip').bounding_box(), token.bounding_box()
    assert abs(own['y'] - top) < 30
    assert 0 <= box['x'] and box['x'] + box['width'] <= 360
    assert 0 <= box['y'] and box['y'] + box['height'] <= 560
    assert (
      box['y'] > own['y'] + own['height'] or box['y'] + box['height'] < own['y']
    )
    assert 'Position 4' in page.locator('#tip').inner_text()
    page.keyboard.press('Escape')
  assert page.evaluate('document.documentElement.scrollWidth') == 360
  for label in page.locator('button:visible, select:visible').all():
    assert label.bounding_box()['height'] >= 32


def test_browser_samples_and_samplers(visit):
  page = visit(viewport={'width': 1200, 'height': 800})
  boxes = [pane.bounding_box() for pane in page.locator('.pane').all()]
  # A column for each of two samplers, and a row for each of two samples.
  assert [box['y'] == boxes[0]['y'] for box in boxes] == [True] * 2 + [
    False
  ] * 2
  assert [box['x'] == boxes[0]['x'] for box in boxes] == [True, False] * 2
  page.select_option('#sample', '2')
  assert page.locator('.pane:visible h2').all_inner_texts() == [
    'block',
    'remask: eta=0.5',
  ]
  names = [
    pane.get_attribute('aria-label') for pane in page.locator('.pane').all()
  ]
  assert names == [
    'block, sample 1',
    'remask, eta=0.5, sample 1',
    'block, sample 2',
    'remask, eta=0.5, sample 2',
  ]
