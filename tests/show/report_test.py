"""Tests of nanodlm.show.report: what a page shows, which files it replaces."""

import html.parser
import json
import os
import pathlib
import re
import sys
import urllib.parse

import pytest

from nanodlm.show import report
from nanodlm.show.runs import read_run
from tests import launches
from tests.show.fake_runs import write_lines, write_run

pytest.importorskip('matplotlib')
ROOT = pathlib.Path(__file__).parents[2]
EVIL = 'a </script><script>alert(1)</script> & <img src=x> ``` \x00 \ud800 "\''


def run_main(paths, *args, output):
  """Returns the exit status of --mode=report."""
  workdirs = ','.join(map(str, paths))
  return launches.run_mode(
    report, f'--workdirs={workdirs}', f'--output={output}', *args
  )


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

  def named(self, tag, attribute):
    return [a.get(attribute) for t, a in self.tags if t == tag]


def test_levels_of_a_line_with_two_texts(tmp_path):
  workdir = write_run(tmp_path / 'a')
  keys = [f'{x}_by_level/cross_entropy_9' for x in ('eval_subset', 'eval')]
  write_lines(
    workdir / 'metrics.jsonl', [{'step': 30, **dict(zip(keys, (3, 2)))}]
  )
  _, plot, _ = report.draw_levels([read_run(workdir, 'a')])
  assert list(plot.curves.values()) == [[(0.95, 2, 0.0)]]


def test_page_of_two_runs(tmp_path, capsys):
  a = write_run(
    tmp_path / 'a', samples=['first', EVIL, 'third', 'last', 'last']
  )
  b = write_run(tmp_path / 'b', name='ar', last=20)
  gap = {'pattern': 'span', 'ratio': 0.5, 'accuracy': 0.25, 'num_calls': 16}
  line = {'step': 20, 'infill': [gap | {'accuracy_ci95': None}]}
  write_lines(b / 'eval.jsonl', [line])
  output = tmp_path / 'page 1.html'
  assert run_main([a, b], output=output) == 0
  text = output.read_text()
  page = Page(text)
  for words in (
    'finished',
    'stopped',
    '1.2500 ± 0.1250',
    '0.5000 ± 0.0625',
    'objective.name',
    'fixed_count',
    'third',
    '20 / 30',
    '30 / 30',
  ):
    assert words in text, words
  assert 'objective.noise' not in text  # The same in both.
  assert 'first' not in text  # Only the last three that differ.
  assert text.count('<h3>a, step 30, fixed_count') == 3
  assert text.count('<figure>') == text.count('<details>') == 8
  assert text.count('b, 50% masked, span') >= 2
  pictures = [*page.named('svg', 'aria-label'), *page.named('img', 'alt')]
  assert len(pictures) == 8
  assert all(' points, from ' in picture for picture in pictures)
  # A page that was written before is replaced.
  assert run_main([a, b], output=output) == 0
  assert capsys.readouterr().err == ''


def test_a_page_runs_and_loads_nothing(tmp_path):
  workdir = write_run(tmp_path / 'a<b>&"c', samples=[EVIL])
  config = json.loads((workdir / 'config.json').read_text())
  config['data']['source'] = EVIL
  (workdir / 'config.json').write_text(json.dumps(config))
  other = write_run(tmp_path / 'other')
  output = tmp_path / 'page.html'
  assert run_main([workdir, other], output=output) == 0
  text = output.read_text()
  page = Page(text)
  tags = {tag for tag, _ in page.tags}
  assert tags.isdisjoint({'script', 'link', 'iframe', 'image', 'object'})
  for tag, attributes in page.tags:
    assert not {'href', 'onload', 'onerror'} & set(attributes), tag
    assert attributes.get('xlink:href', '#').startswith('#'), tag
    assert 'src' not in attributes
  assert not re.search(r'url\((?!#)|@import', text)
  shown = EVIL.replace('\x00', '\ufffd').replace('\ud800', '\ufffd')
  assert shown in ''.join(page.texts)
  assert 'a<b>&"c' in ''.join(page.texts)
  assert 'img' not in tags
  policies = dict(
    zip(page.named('meta', 'http-equiv'), page.named('meta', 'content'))
  )
  policy = policies['Content-Security-Policy']
  assert policy.startswith("default-src 'none'")
  assert '@media (prefers-color-scheme: dark)' in text
  assert 'viewport' in page.named('meta', 'name')
  ids = re.findall(r' id="(.*?)"', text)
  assert len(set(ids)) == len(ids)


def test_names_that_are_not_text(tmp_path, capsys):
  names = (b'r\xe9', b'r\x1b', b'_$x$')
  runs = [write_run(tmp_path / os.fsdecode(name)) for name in names]
  for name in (b'rep', b'p\xe9 '):
    output = tmp_path / os.fsdecode(name + b'.html')
    assert run_main(runs, output=output) == 0
    assert capsys.readouterr().err == ''
    text = output.read_text(encoding='utf-8')
    assert 'r\ufffd' in text and '\x1b' not in text and '_$x$: 3 points' in text
    for source in Page(text).named('img', 'src'):
      file = (
        os.fsencode(tmp_path) + b'/' + urllib.parse.unquote_to_bytes(source)
      )
      assert os.path.exists(file)
  assert not list(tmp_path.glob('.rep*'))


def comparison_of(workdir):
  point = lambda calls: {
    'sampler': {'name': 'fixed_count'},
    'num_calls': calls,
    'sample_entropy': 3.0,
    'gen_bits_per_byte': 2.0 + 1 / (calls or 9),
    'gen_bits_per_byte_ci95': None,
  }
  result = {
    'workdir': workdir,
    'nll': 1.5,
    'nll_ci95': 0.1,
    'is_exact': False,
    'num_params': 4321,
    'points': [point(0), point(4), point(16)],
  }
  return {'judge': 'runs/ar', 'runs': [result]}


def test_comparison_is_found_next_to_its_runs(tmp_path):
  a = write_run(tmp_path / 'a')
  folder = tmp_path / 'cmp'
  folder.mkdir()
  file = folder / 'comparison.json'
  file.write_text(json.dumps(comparison_of('runs/a')))
  output = tmp_path / 'page.html'
  # Found, given, and as one of runs/*, which includes the earlier page.
  for paths, given in (
    ([a], []),
    ([a], [f'--compare={folder}']),
    ([a, folder], []),
    ([a, folder, output], []),
  ):
    assert run_main(paths, *given, output=output) == 0
    text = output.read_text()
    assert text.count('Bits/byte under runs/ar</h3>') == 1, paths
    for words in ('a, held-out text', '≤ 1.5000 ± 0.1000', '4,321'):
      assert words in text, words
  # A comparison of other runs is shown only if it is given.
  file.write_text(json.dumps(comparison_of('runs/other')))
  assert run_main([a], output=output) == 0
  assert 'under runs/ar' not in output.read_text()
  assert run_main([a], f'--compare={folder}', output=output) == 0
  assert 'under runs/ar' in output.read_text()


def test_missing_files_are_reported(tmp_path, capsys):
  workdir, other = tmp_path / 'run', tmp_path / 'other'
  workdir.mkdir()
  (workdir / 'config.json').write_text('{"train": {"num_steps": 5}}')
  other.mkdir()
  write_lines(other / 'metrics.jsonl', [{'step': 1, 'train/loss': 2.0}])
  output = tmp_path / 'page.html'
  assert run_main([workdir, other], output=output) == 0
  text = output.read_text()
  assert 'run: no metrics.jsonl.' in text and 'other: no config.json.' in text
  assert '0 / 5' in text and '1 / ?' in text
  assert 'Nothing measured yet' in text and 'No samples' in text
  error = capsys.readouterr().err
  assert 'no metrics.jsonl' in error and 'no config.json' in error


def test_other_folders_are_skipped(tmp_path, capsys):
  a, empty = write_run(tmp_path / 'a'), tmp_path / 'begins'
  (empty / 'compilation_cache').mkdir(parents=True)
  assert run_main([empty], output=tmp_path / 'page.html') == 2
  assert "begins' is not the workdir" in capsys.readouterr().err
  assert run_main([a, empty], output=tmp_path / 'page.html') == 0
  assert "begins' is not the workdir" in capsys.readouterr().err


def test_values_of_other_types_are_skipped(tmp_path, capsys):
  a = write_run(tmp_path / 'a', num_steps='many')
  line = {'step': 20, 'eval/nll': 3, 'eval/num_examples': None}
  lines = [line | {'train/loss': 'a'}, {'step': 'x', 'train/loss': 1}]
  write_lines(a / 'metrics.jsonl', lines)
  (tmp_path / 'comparison.json').write_text('{"judge": "a", "runs": [5]}')
  row = {'ratio': 0.5, 'pattern': 'span', 'num_calls': 4, 'accuracy': 0.25}
  gaps = 5, [5], [{'accuracy': 1, 'num_calls': 4}], [row]
  write_lines(a / 'eval.jsonl', [{'infill': each} for each in gaps])
  samples = [{'text': 5}, {'text': 'good', 'sampler': 5, 'step': 'x'}]
  write_lines(a / 'samples.jsonl', samples)
  output = tmp_path / 'page.html'
  assert run_main([a], output=output) == 0
  text = output.read_text()
  assert '20 / ?' in text and '3.0000 (step 20, ? rows)' in text
  assert 'a, 50% masked, span' in text and 'good</pre>' in text
  assert "train.num_steps='many'" in capsys.readouterr().err


def test_other_samplers_and_texts_have_curves_of_their_own(tmp_path):
  a = write_run(tmp_path / 'a')
  gap = {'pattern': 'span', 'ratio': 0.5, 'accuracy': 0.25, 'num_calls': 4}
  lines = [
    {'step': 10, 'source': source}
    | {'sampler': {'name': name, 'num_steps': n, 'threshold': 1 / n}}
    | {'infill': [gap | {'num_calls': n}]}
    for name, n, source in (
      ('remask', 4, 'text:x'),
      ('remask', 8, 'text:x'),
      ('psi', 4, 'text:x'),
      ('psi', 4, 'text:y'),
    )
  ]
  lines.append(lines[-1] | {'changed': {'data.length': 64}, 'eval/nll': 1.5})
  write_lines(a / 'eval.jsonl', lines)
  parts = list(report.draw_evals([read_run(a, 'a')]))
  (plot,) = (part for part in parts if isinstance(part, report.Plot))
  (table,) = (part for part in parts if isinstance(part, report.Table))
  assert table.rows[0]['text'] == 'text:y (data.length=64)'
  assert {name: len(points) for name, points in plot.curves.items()} == {
    f'a, 50% masked, span, sampler {name}, source text:{source}': num
    for name, source, num in (
      ('remask', 'x', 2),
      ('psi', 'x', 1),
      ('psi', 'y', 1),
      ('psi', 'y (data.length=64)', 1),
    )
  }


def test_files_of_others_are_spared(tmp_path, capsys):
  a = write_run(tmp_path / 'a')
  output = tmp_path / 'mine.html'
  output.write_text('<html>mine</html>')
  assert run_main([a], output=output) == 2
  assert 'mine.html' in capsys.readouterr().err
  assert output.read_text() == '<html>mine</html>'
  assert run_main([a], '--overwrite', output=output) == 0
  assert 'Training loss' not in output.read_text()[:200]


@pytest.mark.parametrize(
  'paths, output, words',
  [
    (['nothing'], 'page.html', "nothing' is not the workdir"),
    ([], 'page.html', 'at least one'),
    (['a'], 'page.md', 'must end in .html'),
    (['a'], 'no/such/page.html', 'in a folder that exists'),
  ],
)
def test_wrong_arguments(tmp_path, capsys, paths, output, words):
  write_run(tmp_path / 'a')
  paths = [tmp_path / path for path in paths]
  assert run_main(paths, output=tmp_path / output) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / output).exists()
  assert run_main([tmp_path / 'a'], '--num_samples=-1', output=output) == 2
  assert '--num_samples=-1' in capsys.readouterr().err


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  assert run_main([write_run(tmp_path / 'a')], output=tmp_path / 'b.html') == 2
  assert 'pip install' in capsys.readouterr().err


def test_command(tmp_path):
  write_run(tmp_path / 'a')
  output = f'--output={tmp_path / "page.html"}'
  status, text = launches.launch(
    '--mode=report', f'--workdirs={tmp_path / "a"}', output
  )
  assert status == 0 and 'page.html: 1 run' in text, text


def test_law_of_the_text(tmp_path):
  a = write_run(tmp_path / 'a')
  line = {'step': 10, 'eval_subset/excess_nats': 1.5}
  line |= {'eval_subset/excess_nats_ci95': 0.25, 'samples/valid_share': 0.75}
  with open(a / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps({**line, 'step': 30}) + '\n')
  gap = {'pattern': 'span', 'ratio': 0.5, 'unit': 'word', 'num_calls': 16}
  gap |= {'accuracy': 0.25, 'bayes_accuracy': 0.875}
  law = {'eval/nll': 2.0, 'eval/law_nats': 31.25, 'eval/excess_nats': 0.8}
  write_lines(a / 'eval.jsonl', [{'step': 30, **law, 'infill': [gap]}])
  compared = comparison_of('runs/a')
  for point in compared['runs'][0]['points']:
    point['valid_share'] = 0.9
  compared |= {
    'judge': 'law',
    'panels': {'valid_share': 'share of possible samples'},
    'remarks': ['As the law says.'],
  }
  (tmp_path / 'comparison.json').write_text(json.dumps(compared))
  output = tmp_path / 'page.html'
  assert run_main([a], output=output) == 0
  text = output.read_text()
  for words in (
    'The law of the text',
    'Excess over the law by steps',
    'a, subset: 1 point',
    'Possible samples by steps',
    '31.25',
    '0.8000',
    'a, 50% masked, span words, at most',
    'Share of possible samples',
    'As the law says.',
  ):
    assert words in text, words


@pytest.mark.parametrize('other, is_said', [('a', False), ('b', True)])
def test_the_same_tokenizer_by_another_name(tmp_path, other, is_said):
  runs = []
  for name, content in ('bytes', 'a'), ('run', other):
    folder = write_run(tmp_path / name)
    config = json.loads((folder / 'config.json').read_text())
    config['tokenizer']['name'] = name
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'tokenizer.json').write_text(content)
    runs.append(read_run(folder, name))
  parts = map(str, report.describe_runs(runs))
  assert any('differ in tokenizer' in part for part in parts) == is_said
