"""The report: what it reads off runs in progress, what it shows, what it spares."""

import fcntl
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from nanodlm.devices import lock
from nanodlm.show import plots, report

ROOT = pathlib.Path(__file__).parents[2]
EVIL = 'a </script><script>alert(1)</script> & <img src=x> ``` \x00 \ud800 "\''


def run_main(paths, *args, output):
  return report.main([*map(str, paths), f'--output={output}', *map(str, args)])


def write_run(workdir, *, name='masked', last=30, num_steps=30, samples=()):
  """A workdir of a run with a metrics line every ten steps."""
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'config.json').write_text(
    json.dumps(
      {
        'seed': 0,
        'objective': {'name': name, 'noise': 'auto'},
        'data': {'length': 8, 'source': 'embedded'},
        'tokenizer': {'name': 'bytes'},
        'train': {'batch_size': 4, 'num_steps': num_steps},
      }
    )
  )
  lines = [line_of(step) for step in range(10, last + 1, 10)]
  lines.append(
    {
      'step': last,
      'eval/nll': 1.25,
      'eval/nll_ci95': 0.125,
      'eval/bits_per_byte': 0.5,
      'eval/bits_per_byte_ci95': 0.0625,
      'eval/num_examples': 7.0,
      'eval_by_level/cross_entropy_9': 2.0,
    }
  )
  (workdir / 'metrics.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )
  if samples:
    (workdir / 'samples.jsonl').write_text(
      ''.join(
        json.dumps(
          {
            'prompt': text,
            'shown': text,
            'text': text,
            'step': last,
            'num_calls': 4,
            'sampler': {'name': 'fixed_count'},
          }
        )
        + '\n'
        for text in samples
      )
    )
  return workdir


def line_of(step, loss=None):
  return {
    'step': step,
    'train/loss': 3 - step / 20 if loss is None else loss,
    'train/tokens_per_sec': 100.0 + step,
    'train/secs_per_step': 0.5,
    'train/skipped_steps': 1.0,
    'train_by_level/cross_entropy_0': 0.5,
    'train_by_level/cross_entropy_9': 2.5,
  }


class Page(html.parser.HTMLParser):
  """The tags of a page, and its text by element."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.texts.append(data)


def test_half_a_line_and_steps_written_twice(tmp_path):
  workdir = write_run(tmp_path / 'run', last=30, num_steps=100)
  with open(workdir / 'metrics.jsonl', 'ab') as file:
    # Killed after 30, started again from a checkpoint at 10.
    file.write(
      b'no json\n'
      + json.dumps(line_of(20, loss=7.5)).encode()
      + b'\n'
      + json.dumps(line_of(30, loss=None) | {'train/loss': None}).encode()
      + b'\n{"step": 40, "train/lo'
    )
  run = report.read_run(str(workdir), 'run')
  assert run.curve('train/loss') == [(10, 2.5), (20, 7.5)]
  # What was written at 30 before it went back is not shown as the run's.
  assert list(run.metrics) == [10, 20, 30]
  assert run.held_out() is None
  assert run.problems == (
    'metrics.jsonl: line 5 left out, no JSON object',
    '1 value not finite',
  )


@pytest.mark.parametrize('is_html', [True, False])
def test_page_of_two_runs(tmp_path, is_html, capsys):
  if not is_html:
    pytest.importorskip('matplotlib')
  a = write_run(tmp_path / 'a', samples=['first', EVIL, 'third', 'last'])
  b = write_run(tmp_path / 'b', name='ar', last=20)
  (b / 'eval.jsonl').write_text(
    json.dumps(
      {
        'step': 20,
        'infill': [
          {
            'pattern': 'span',
            'ratio': 0.5,
            'accuracy': 0.25,
            'accuracy_ci95': None,
            'num_calls': 16,
          }
        ],
      }
    )
    + '\n'
  )
  output = tmp_path / ('page.html' if is_html else 'page.md')
  assert run_main([a, b], output=output) == 0
  text = output.read_text()
  if not is_html:
    text = text.replace('\\_', '_')
  for words in (
    'finished',
    'stopped',
    '1.2500 ± 0.1250',
    '0.5000 ± 0.0625',
    'objective.name',
    'fixed_count',
    'third',
    '50% masked, span',
  ):
    assert words in text, words
  assert 'objective.noise' not in text  # the same in both
  assert 'first' not in text  # only the last three
  assert '20 / 30' in text and '30 / 30' in text
  names = [
    'train-by-steps',
    'train-by-tokens',
    'held-out-by-steps',
    'held-out-by-tokens',
    'levels-held-out',
    'levels-train',
    'infill',
    'throughput',
  ]
  if is_html:
    assert re.findall(r'<title id="(.*?)-title">', text) == [
      names[i] for i in (0, 2, 1, 3, 4, 5, 6, 7)
    ]
  else:
    shown = {path.name for path in tmp_path.glob('*.png')}
    assert shown == {f'page-{name}.png' for name in names}
    assert all(f'({name})' in text for name in shown)
    assert (tmp_path / 'page-infill.png').read_bytes()[:4] == b'\x89PNG'
    assert '````\na </script>' in text  # a fence that the sample cannot close
  # Again: it is its own.
  assert run_main([a, b], output=output) == 0
  assert capsys.readouterr().err == ''


def test_nothing_in_a_page_runs_or_loads(tmp_path):
  workdir = write_run(tmp_path / 'a<b>&"c', samples=[EVIL])
  config = json.loads((workdir / 'config.json').read_text())
  config['data']['source'] = EVIL
  (workdir / 'config.json').write_text(json.dumps(config))
  other = write_run(tmp_path / 'other')
  output = tmp_path / 'page.html'
  assert run_main([workdir, other], output=output) == 0
  text = output.read_text()
  page = Page(text)
  assert {'script', 'img', 'link', 'iframe', 'image', 'use'}.isdisjoint(
    tag for tag, _ in page.tags
  )
  for tag, attributes in page.tags:
    assert not {'src', 'href', 'onload', 'xlink:href'} & set(attributes), tag
  assert 'url(' not in text and '@import' not in text
  (policy,) = [
    a['content']
    for tag, a in page.tags
    if a.get('http-equiv') == 'Content-Security-Policy'
  ]
  assert policy.startswith("default-src 'none'")
  shown = EVIL.replace('\x00', '\ufffd').replace('\ud800', '\ufffd')
  assert shown in ''.join(page.texts)
  assert 'a<b>&"c' in ''.join(page.texts)


@pytest.mark.parametrize('suffix', ['.html', '.md'])
def test_names_that_are_no_text(tmp_path, capsys, suffix):
  if suffix == '.md':
    pytest.importorskip('matplotlib')
  runs = [
    write_run(tmp_path / os.fsdecode(name)) for name in (b'r\xe9', b'r\x1b')
  ]
  output = tmp_path / f'rep{suffix}'
  assert run_main(runs, output=output) == 0
  assert capsys.readouterr().err == ''
  text = output.read_text(encoding='utf-8')
  assert 'r\ufffd' in text and '\x1b' not in text
  if suffix == '.html':
    for svg in re.findall(r'<svg [^>]*class="plot".*?</svg>', text, re.DOTALL):
      assert 'r\ufffd' in ET.fromstring(svg)[1].text
  assert not list(tmp_path.glob('.rep*'))
  odd = tmp_path / os.fsdecode(b'p\xe9' + suffix.encode())
  status = run_main(runs, output=odd)
  assert (status, odd.exists()) == (
    (0, True) if suffix == '.html' else (2, False)
  )
  capsys.readouterr().out.encode()


def test_nothing_is_left_of_a_page_that_failed(tmp_path):
  with pytest.raises(UnicodeEncodeError):
    report._replace(tmp_path / 'page.html', '\ud800')
  assert not list(tmp_path.iterdir())


def test_pictures_are_whole_and_described(tmp_path):
  runs = [write_run(tmp_path / f'run{i}') for i in range(7)]
  output = tmp_path / 'page.html'
  assert run_main(runs, output=output) == 0
  text = output.read_text()
  svgs = re.findall(r'<svg [^>]*class="plot".*?</svg>', text, re.DOTALL)
  assert len(svgs) == 7
  for svg in svgs:
    tree = ET.fromstring(svg)
    ids = tree.get('aria-labelledby').split()
    assert [child.get('id') for child in tree][:2] == ids
    assert tree.get('role') == 'img' and all(tree[i].text for i in (0, 1))
    # No two lines look alike in colour, dashes and marker together.
    looks = [
      (
        g.get('class'),
        *(p.get('stroke-dasharray') for p in g.iter('polyline')),
        marker_of(g),
      )
      for g in tree.iter('g')
    ]
    assert len(set(looks)) == len(looks) == 7
    assert len({look[-1] for look in looks}) == len(plots.MARKERS)
    for line in tree.iter('polyline'):
      for point in line.get('points').split():
        x, y = map(float, point.split(','))
        assert 0 <= x <= 420 and 0 <= y <= 280
  assert text.count('<details>') == text.count('<figure>') == len(svgs)
  assert (
    '@media(prefers-color-scheme:dark)' in text and 'name="viewport"' in text
  )


def marker_of(group):
  """A marker's form: how far its corners are from the first."""
  shape = [each for each in group if each.tag in ('circle', 'polygon')][0]
  corners = [
    tuple(map(float, corner.split(',')))
    for corner in shape.get('points', '').split()
  ]
  return tuple(
    (round(x - corners[0][0], 0), round(y - corners[0][1], 0))
    for x, y in corners
  )


def _luminance(colour):
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
  ]
  return sum(c * w for c, w in zip(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize(
  'colours, page',
  [(plots.LIGHT, plots.LIGHT_PAGE), (plots.DARK, plots.DARK_PAGE)],
)
def test_lines_stand_out_from_the_page(colours, page):
  for colour in colours:
    low, high = sorted((_luminance(colour), _luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_thinned_lines_keep_their_peaks():
  points = [(i, 0.0) for i in range(10_000)]
  points[4321] = (4321, 9.0)
  points[7000] = (7000, -9.0)
  kept = plots.thin(points)
  assert len(kept) <= plots.MAX_POINTS
  assert {points[0], points[4321], points[7000], points[-1]} <= set(kept)
  assert kept == sorted(kept)


@pytest.mark.parametrize(
  'low, high, ticks',
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (1.5, 4.6, [2, 3, 4]),
    (7, 7, [7]),
    (-20, 110, [0, 50, 100]),
  ],
)
def test_ticks(low, high, ticks):
  assert plots.round_ticks(low, high) == pytest.approx(ticks)


def test_state_by_the_lock(tmp_path):
  workdir = write_run(tmp_path / 'run', last=20, num_steps=30)
  state = lambda: report.read_run(str(workdir), '').state
  assert state() == 'stopped'
  with lock.hold(str(workdir)):
    assert state() == 'in progress'
    done = write_run(workdir, last=30, num_steps=30)
    assert state() == 'in progress'  # the last evaluation may still go on
  assert report.read_run(str(done), '').state == 'finished'


def test_looking_at_a_lock_keeps_no_run_out(tmp_path, monkeypatch):
  with lock.hold(str(tmp_path)):
    pass
  with open(tmp_path / lock.LOCK_FILE) as file:  # as `is_held` has it
    fcntl.flock(file, fcntl.LOCK_SH)
    monkeypatch.setattr(
      lock.time, 'sleep', lambda secs: fcntl.flock(file, fcntl.LOCK_UN)
    )
    with lock.hold(str(tmp_path)):
      assert lock.is_held(str(tmp_path))


def test_comparison_is_found_beside_its_runs(tmp_path):
  a = write_run(tmp_path / 'a')
  point = lambda calls: {
    'sampler': {'name': 'fixed_count'},
    'num_calls': calls,
    'sample_entropy': 3.0,
    'gen_bits_per_byte': 2.0 + 1 / (calls or 9),
    'gen_bits_per_byte_ci95': None,
  }
  comparison = {
    'judge': 'runs/ar',
    'runs': [
      {
        'workdir': 'runs/a',
        'nll': 1.5,
        'nll_ci95': 0.1,
        'is_exact': False,
        'num_params': 4321,
        'points': [point(0), point(4), point(16)],
      }
    ],
  }
  folder = tmp_path / 'cmp'
  folder.mkdir()
  (folder / 'comparison.json').write_text(json.dumps(comparison))
  output = tmp_path / 'page.html'
  # Beside the run, given, and as one of runs/*: along with the page before.
  for paths, given in (
    ([a], []),
    ([a], [f'--compare={folder}']),
    ([a, folder], []),
    ([a, folder, output], []),
  ):
    assert run_main(paths, *given, output=output) == 0
    text = output.read_text()
    assert text.count('Judged by runs/ar</h3>') == 1, paths
    assert 'a, held-out text' in text and '≤ 1.5000 ± 0.1000' in text
  # Of other runs: not shown unless it is given.
  comparison['runs'][0]['workdir'] = 'runs/other'
  (folder / 'comparison.json').write_text(json.dumps(comparison))
  assert run_main([a], output=output) == 0
  assert 'Judged by' not in output.read_text()
  assert run_main([a], f'--compare={folder}', output=output) == 0
  assert 'Judged by' in output.read_text()


def test_missing_files_are_told(tmp_path, capsys):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'config.json').write_text('{"train": {"num_steps": 5}}')
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'metrics.jsonl').write_text('{"step": 1, "train/loss": 2.0}\n')
  output = tmp_path / 'page.html'
  assert run_main([workdir, other], output=output) == 0
  text = output.read_text()
  assert 'run: no metrics.jsonl.' in text and 'other: no config.json.' in text
  assert '0 / 5' in text and '1 / ?' in text
  assert 'no metrics.jsonl' in capsys.readouterr().err


def test_a_folder_among_the_runs_that_is_none_is_left_out(tmp_path, capsys):
  a, empty = write_run(tmp_path / 'a'), tmp_path / 'begins'
  (empty / 'compilation_cache').mkdir(parents=True)
  assert run_main([empty], output=tmp_path / 'page.html') == 2
  assert "begins' holds no run" in capsys.readouterr().err
  assert run_main([a, empty], output=tmp_path / 'page.html') == 0
  assert 'begins holds no run' in capsys.readouterr().err


def test_values_of_other_kinds_are_left_out(tmp_path, capsys):
  a = write_run(tmp_path / 'a', num_steps='many')
  (a / 'metrics.jsonl').write_text(
    '{"step": 20, "eval/nll": 3, "eval/num_examples": null, "train/loss": "a"}\n'
    '{"step": "x", "train/loss": 1}\n'
  )
  (tmp_path / 'comparison.json').write_text(
    json.dumps({'judge': 'a', 'runs': [{'workdir': 5, 'nll': 1, 'points': []}]})
  )
  row = {'ratio': 0.5, 'pattern': 'span', 'num_calls': 4, 'accuracy': 0.25}
  (a / 'eval.jsonl').write_text(
    ''.join(
      json.dumps({'infill': each}) + '\n'
      for each in (5, [5], [{'accuracy': 1, 'num_calls': 4}], [row])
    )
  )
  output = tmp_path / 'page.html'
  assert run_main([a], output=output) == 0
  text = output.read_text()
  assert '20 / ?' in text and '3.0000 (step 20, ? rows)' in text
  assert 'a, 50% masked, span' in text
  assert (
    'train.num_steps=&#x27;many&#x27;' in text or "num_steps='many'" in text
  )


def test_parameters_of_the_last_checkpoint(tmp_path):
  folder = tmp_path / 'checkpoints' / '100' / 'params'
  folder.mkdir(parents=True)
  leaf = lambda *shape: {'value_metadata': {'write_shape': list(shape)}}
  (folder / '_METADATA').write_text(
    json.dumps({'tree_metadata': {'a': leaf(3, 4), 'b': leaf(5)}})
  )
  assert report.count_params(tmp_path) == 17
  (folder / '_METADATA').write_text('{"tree_meta')
  assert report.count_params(tmp_path) is None


def test_what_others_wrote_is_spared(tmp_path, capsys):
  a = write_run(tmp_path / 'a')
  output = tmp_path / 'mine.html'
  output.write_text('<html>mine</html>')
  assert run_main([a], output=output) == 2
  assert 'mine.html' in capsys.readouterr().err
  assert output.read_text() == '<html>mine</html>'
  assert run_main([a], '--overwrite', output=output) == 0
  assert 'train/loss' in output.read_text()
  pytest.importorskip('matplotlib')
  (tmp_path / 'mine-throughput.png').write_bytes(b'mine')
  assert run_main([a], output=tmp_path / 'mine.md') == 2
  assert 'mine-throughput.png' in capsys.readouterr().err
  assert (tmp_path / 'mine-throughput.png').read_bytes() == b'mine'
  assert not (tmp_path / 'mine.md').exists()


@pytest.mark.parametrize(
  'paths, output, words',
  [
    (['nothing'], 'page.html', "nothing' holds no run"),
    ([], 'page.html', 'at least one'),
    (['a'], 'page.txt', 'must end in .html or .md'),
    (['a'], 'no/such/page.html', 'in a folder that exists'),
  ],
)
def test_refused(tmp_path, capsys, paths, output, words):
  write_run(tmp_path / 'a')
  assert (
    run_main([tmp_path / path for path in paths], output=tmp_path / output) == 2
  )
  assert words in capsys.readouterr().err
  assert not (tmp_path / output).exists()


def test_markdown_without_matplotlib(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report.importlib.util, 'find_spec', lambda name: None)
  assert run_main([write_run(tmp_path / 'a')], output=tmp_path / 'b.md') == 2
  assert "'.[plots]'" in capsys.readouterr().err


def test_command_starts_without_jax(tmp_path):
  write_run(tmp_path / 'a')
  code = (
    'import sys; sys.modules["jax"] = sys.modules["numpy"] = None\n'
    'from nanodlm import report; sys.exit(report.main(sys.argv[1:]))'
  )
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      code,
      str(tmp_path / 'a'),
      f'--output={tmp_path / "page.html"}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'page.html: 1 run' in done.stdout
