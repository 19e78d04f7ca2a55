"""Conversations as rows: what is given, cuts, shared rows."""

import dataclasses
import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized
import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm.data import overlap, pack, pipeline, prepare
from nanodlm.data.tokenizers import chat
from nanodlm.steps import evaluate
from nanodlm.types import InputError


def write(path, conversations):
  path.write_text('\n'.join(json.dumps({'messages': x}) for x in conversations))


def say(*texts):
  roles = ('user', 'assistant')
  return [
    {'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)
  ]


def rows_of(packed):
  for split in packed.train, packed.validation:
    yield from (split[i] for i in range(len(split)))


class ConversationsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / 'chat.jsonl'

  def settings(self, **changes):
    config = configs.load()
    config.data.update(
      source=f'chat:{self.path}',
      length=64,
      eval_fraction=0.3,
      data_dir=str(self.folder / 'data'),
    )
    config.tokenizer.chat_template = 'plain'
    config.model.update(num_layers=1, embed_dim=16, num_heads=1)
    for key, value in changes.items():
      section, _, name = key.partition('__')
      config[section][name] = value
    return configs.make_settings(config)

  def prepare(self, **changes):
    settings = self.settings(**changes)
    packed = prepare.prepare(settings.data, settings.tokenizer)
    return settings, packed

  def test_a_row_for_each(self):
    write(
      self.path, [say('a', f'b{i}', 'c', 'd', 'unanswered') for i in range(9)]
    )
    settings, packed = self.prepare(data__crop='document')
    batch = next(
      iter(pipeline.make_eval_batches(packed, settings.data, batch_size=2))
    )
    decode = packed.tokenizer.decode
    for tokens, eligible in zip(batch.tokens, batch.eligible):
      scored = decode(tokens[eligible]).rstrip('\n')
      self.assertRegex(scored, '^b[0-9]\n\nd$')
      self.assertRegex(
        decode(tokens).rstrip('\n'),
        '^\n\nUser: a\n\nAssistant: b[0-9]\n\nUser: c\n\nAssistant: d$',
      )
      # With the separators that fill the row.
      self.assertTrue(eligible[-1])
    self.assertEqual(batch.num_tokens.tolist(), [5, 5])
    self.assertEqual(batch.num_bytes.tolist(), [3, 3])
    self.assertIsNone(batch.segment_ids)

  @parameterized.parameters('document', 'chunk')
  def test_one_was_trained_on_if_all_of_it_was(self, crop):
    # All messages are in the training text, which these are not.
    talks = [say(x, x + x, y, y + y) for x in 'abcdefgh' for y in 'abcdefgh']
    write(self.path, talks)
    _, packed = self.prepare(
      data__crop=crop, data__padding='masked', data__segment_ids=crop == 'chunk'
    )
    record = overlap.make_record(packed)
    self.assertEqual(record.share(packed), 0)
    self.assertLen(record.hashes, packed.metadata['train']['num_documents'])
    other = dataclasses.replace(packed, validation=packed.train)
    self.assertEqual(record.share(other), 1)
    # The record of an earlier text has shorter passages.
    earlier = dataclasses.replace(record, window=8, hashes=record.hashes[:1])
    record = overlap.make_record(packed, earlier)
    self.assertEqual(record.window, 8)
    self.assertEqual(record.share(packed), 0)
    self.assertEqual(record.share(other), 1)
    old = dataclasses.replace(record, version=1)
    self.assertIsNone(old.share(packed))

  @parameterized.parameters('drop', 'cut', 'refuse')
  def test_long_ones_end_after_a_turn(self, long_documents):
    long = [say('a', f'b{i}', 'c', 'd' * 50) for i in range(9)]
    write(
      self.path,
      [say('x' * 99, 'y'), *long, *[say(f'e{i}', 'f') for i in range(9)]],
    )
    changes = {'data__crop': 'document', 'data__long_documents': long_documents}
    if long_documents == 'refuse':
      with self.assertRaisesRegex(InputError, 'long_documents'):
        self.prepare(**changes)
      return
    _, packed = self.prepare(**changes)
    texts = [packed.tokenizer.decode(row['tokens']) for row in rows_of(packed)]
    num_long = sum('User: a' in text for text in texts)
    self.assertEqual(num_long, 9 * (long_documents == 'cut'))
    for text in texts:
      self.assertNotIn('x', text)
      self.assertRegex(text, 'Assistant: (b[0-9]|f)\n+$')

  def test_packed_ones_have_the_likelihood_of_single_ones(self):
    write(
      self.path, [say('ask' * (i % 4), f'{i}', 'b', 'c' * i) for i in range(20)]
    )
    changes = {'data__padding': 'masked', 'data__length': 128}
    block = {
      'objective__name': 'block',
      'objective__block_size': 4,
      'objective__ar_weight': 1.0,
    }
    rng = np.random.default_rng(0)
    for objective in {'objective__name': 'ar'}, block:
      totals = []
      for more in (
        {'data__crop': 'document'},
        {'data__crop': 'chunk', 'data__segment_ids': True},
      ):
        settings, packed = self.prepare(**changes, **objective, **more)
        run = runs.make_run(settings, devices=jax.devices()[:1])
        run = run.with_tokenizer(packed.tokenizer)
        if not totals:  # At first, a network ignores what is before a token.
          params = run.network.init_params(jax.random.key(0))
          params = jax.tree.map(
            lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), params
          )
        score = evaluate.make_score_step(
          run.scorer.autoregressive() or run.scorer, run.mesh, num_draws=1
        )
        total, num_rows, num_tokens = 0.0, 0, 0
        for batch in pipeline.make_eval_batches(
          packed, settings.data, batch_size=4
        ):
          values = score(params, jax.random.key(0), batch)
          total += float(values['nll'].sum())
          num_rows += int(batch.eligible.any(axis=1).sum())
          num_tokens += int(batch.num_tokens.sum())
        totals.append((total, num_tokens, num_rows))
      single, shared = totals
      self.assertEqual(single[1], shared[1])
      self.assertLess(shared[2], single[2])
      np.testing.assert_allclose(shared[0], single[0], rtol=1e-6)

  def test_a_template_that_has_changed(self):
    write(self.path, [say('a b c', f'{i} d e f') for i in range(200)])
    path, folders = self.folder / 'template.jinja', set()
    changes = {
      'data__crop': 'document',
      'tokenizer__name': 'sentencepiece',
      'tokenizer__vocab_size': 280,
      'tokenizer__chat_template': str(path),
    }
    for head in 'x', 'y':
      path.write_text(head + chat.TEMPLATES['plain'])
      _, packed = self.prepare(**changes)
      folders.add(packed.folders)
      text = packed.tokenizer.decode(packed.train[0]['tokens'])
      self.assertTrue(text.startswith(f'{head}\n\nUser: a'))
    self.assertLen(folders, 2)

  def test_share_rows(self):
    sizes = np.random.default_rng(0).integers(1, 65, 500).tolist()
    rows = np.array(pack.share_rows(sizes, 64))
    used = np.bincount(rows, weights=sizes)
    self.assertLessEqual(used.max(), 64)
    self.assertEqual(set(rows), set(range(rows.max() + 1)))
    # As few as a best fit needs: no two of them fit into one row.
    least = np.sort(used)
    self.assertGreater(least[0] + least[1], 64)

  @parameterized.parameters(
    ({'data__crop': 'chunk'}, 'segment_ids'),
    ({'data__crop': 'chunk', 'data__segment_ids': True}, 'padding'),
    ({'data__crop': 'random'}, 'crop'),
    ({'data__clean_prefix_rate': 0.5}, 'clean_prefix'),
    ({'tokenizer__chat_template': ''}, 'chat_template'),
    ({'data__eval_source': 'embedded'}, 'eval_source'),
  )
  def test_bad_settings(self, changes, key):
    write(self.path, [say('a', 'b')] * 3)
    with self.assertRaisesRegex(InputError, key):
      self.prepare(**{'data__crop': 'document', **changes})

  @parameterized.parameters(
    ('{"messages": [{"content": "a"}]}', 'role None'),
    ('{"text": "a"}', "'messages'"),
    ('{"conversations": [{"from": "gpt", "value": "a"}]}', 'gpt: "assistant"'),
    ('{"messages": [{"role": "user", "content": "a"}]}', "'assistant'"),
    ('[]', 'not a JSON object'),
  )
  def test_a_bad_line_is_named(self, line, said):
    self.path.write_text(
      json.dumps({'messages': say('a', 'b')}) + '\n' + line + '\n'
    )
    with self.assertRaisesRegex(InputError, f'chat.jsonl:2.*{said}'):
      self.prepare(data__crop='document')


if __name__ == '__main__':
  absltest.main()
