"""Tests of judges: whole texts, windows, own tokens and other tokenizers."""

import math
import sys
from unittest import mock

import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.evals import judge as judges
from nanodlm.model import transformer
from nanodlm.types import InputError
from tests import foreign_tokenizers, workdirs

BYTES = BytesTokenizer()


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  workdir = workdirs.make_workdir(
    tmp_path_factory.mktemp('ar'), objective__name='ar'
  )
  return judges.make_judge(workdir, batch_size=3)


def rows(num, length):
  return np.random.default_rng(0).integers(97, 122, size=(num, length))


def test_own_ids(judge):
  tokens = rows(5, 16)
  judged = judge.score(tokens, BYTES)
  np.testing.assert_array_equal(judged.num_tokens, 16)
  np.testing.assert_array_equal(judged.num_bytes, 16)
  for row, nll in zip(tokens, judged.nll):
    # The first token is predicted from the start symbol.
    log_p = workdirs.log_probs(
      judge.lm.run, judge.lm.params, [BYTES.mask_id, *row[:-1]]
    )
    np.testing.assert_allclose(nll, -log_p[np.arange(16), row].sum(), rtol=1e-5)


def test_windows(judge):
  tokens = rows(2, 40)  # 16 + 16 + 8
  whole = judge.score(tokens, BYTES)
  parts = [
    judge.score(tokens[:, first : first + 16], BYTES) for first in (0, 16, 32)
  ]
  np.testing.assert_allclose(
    whole.nll, sum(part.nll for part in parts), rtol=1e-5
  )
  np.testing.assert_array_equal(whole.num_tokens, 40)


def test_documents_are_separated_as_in_training(judge, tmp_path):
  marked = judges.make_judge(
    workdirs.make_workdir(
      tmp_path, objective__name='ar', data__segment_ids=True
    )
  )
  tokens = rows(1, 16)
  separator = BYTES.separator_id
  tokens[0, [5, 11]] = separator
  # Scored alone, each document follows the separator of the previous one.
  nll, given = 0.0, [BYTES.mask_id, *tokens[0, :-1]]
  for document in (slice(0, 6), slice(6, 12), slice(12, 16)):
    log_p = workdirs.log_probs(marked.lm.run, marked.lm.params, given[document])
    own = tokens[0, document]
    nll -= log_p[np.arange(len(own)), own].sum()
  np.testing.assert_allclose(marked.score(tokens, BYTES).nll[0], nll, rtol=1e-5)
  assert abs(judge.score(tokens, BYTES).nll[0] - nll) > 0.01


def test_other_tokenizer_is_judged_by_its_text(judge, tmp_path):
  workdir = workdirs.make_workdir(
    tmp_path, tokenizer__name='sentencepiece', tokenizer__vocab_size=300
  )
  tokenizer = lms.load(workdir).tokenizer
  assert not judge.reads_ids_of(tokenizer) and judge.reads_ids_of(BYTES)
  texts = ['the lazy dog, and', 'The quick brown f']
  tokens = [tokenizer.encode(text) for text in texts]
  length = min(map(len, tokens))
  tokens = np.stack([row[:length] for row in tokens])
  judged = judge.score(tokens, tokenizer)
  for row, nll, num_tokens, num_bytes in zip(tokens, *judged):
    ids = BYTES.encode(tokenizer.decode(row))
    alone = judge.score(ids[None], BYTES)
    np.testing.assert_allclose(nll, alone.nll[0], rtol=1e-5)
    assert num_tokens == num_bytes == len(ids)
  quality = judges.measure_quality(judge, tokens, tokenizer)
  assert quality['judge_tokens'] == 'text'


def as_text(judge, tokenizer):
  """The judge's scores, as those of a judge that reads text."""
  with mock.patch.object(type(judge), 'reads_ids_of', return_value=False):
    return judge.score(tokenizer, BYTES), judges.measure_quality(
      judge, tokenizer, BYTES
    )


def test_nats_and_bytes_are_of_the_same_text(judge):
  start = BYTES.encode('Return the list of names.' * 2)
  for last, text in ((BYTES.separator_id, '\n\n'), (0xFF, '\ufffd')):
    tokens = np.concatenate([start, np.full([14], last)])[None]
    read = BYTES.encode('Return the list of names.' * 2 + text * 14)
    expected = judge.score(read[None], BYTES)
    judged, quality = as_text(judge, tokens)
    np.testing.assert_allclose(judged.nll, expected.nll, rtol=1e-6)
    assert judged.num_bytes[0] == judged.num_tokens[0] == len(read)
    np.testing.assert_allclose(
      quality['gen_bits_per_byte'],
      expected.nll[0] / len(read) / math.log(2),
      rtol=1e-6,
    )
    # A judge of the ids themselves reads 14 bytes, or ends of documents.
    own = judge.score(tokens, BYTES)
    assert own.num_tokens[0] == 64
    assert own.num_bytes[0] == 50 + 14 * (last == 0xFF)


def test_samples_without_text(judge, tmp_path):
  tokenizer = foreign_tokenizers.make_default(tmp_path)
  (unknown,) = np.unique(tokenizer.encode('\u20ac')[-1:])
  words = tokenizer.encode('the quick brown')
  empty = np.full_like(words, unknown)
  quality = judges.measure_quality(judge, np.stack([empty, empty]), tokenizer)
  assert quality['num_empty'] == 2
  assert not any(key.startswith('gen_') for key in quality)
  alone = judges.measure_quality(judge, words[None], tokenizer)
  both = judges.measure_quality(judge, np.stack([words, empty]), tokenizer)
  assert (alone['num_empty'], both['num_empty']) == (0, 1)
  assert alone['gen_bits_per_byte'] == both['gen_bits_per_byte'] > 0
  assert all(np.isfinite(x) for k, x in both.items() if k != 'judge_tokens')


def test_quality(tmp_path):
  flat = judges.make_judge(
    workdirs.make_workdir(tmp_path, scale=0.0, objective__name='ar')
  )
  tokens = rows(4, 16)
  quality = judges.measure_quality(flat, tokens, BYTES)
  np.testing.assert_allclose(quality['gen_ppl'], 257, rtol=1e-4)
  np.testing.assert_allclose(
    quality['gen_bits_per_byte'], math.log2(257), rtol=1e-5
  )
  assert quality['judge_tokens'] == 'own'
  assert quality['gen_bits_per_byte_ci95'] < 1e-3
  # The numbers that show repetition are always present.
  assert (
    set(judges.measure_quality(judges.Judge(), tokens, BYTES))
    == {
      'unigram_entropy',
      'sample_entropy',
      'distinct_1',
      'distinct_2',
      'distinct_3',
    }
    <= set(quality)
  )


def test_a_run_with_a_bound_is_refused(tmp_path):
  workdir = workdirs.make_workdir(tmp_path)
  with pytest.raises(InputError, match='must be autoregressive'):
    judges.make_judge(workdir)
  with pytest.raises(InputError, match=str(tmp_path)):
    judges.make_judge(str(tmp_path))


def test_hugging_face_is_optional(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)  # Fails to be imported.
  with pytest.raises(InputError, match=r"'hf:gpt2' needs torch: .*\[judge\]"):
    judges.make_judge('hf:gpt2')


def test_hugging_face(tmp_path, caplog):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  import tokenizers as hf_tokenizers

  alphabet = sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {piece: i for i, piece in enumerate([*alphabet, '<|endoftext|>'])}
  inner = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(vocab, []))
  inner.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token='<|endoftext|>'
  ).save_pretrained(tmp_path)
  torch.manual_seed(0)
  transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=257,
      n_positions=12,
      n_embd=8,
      n_layer=1,
      n_head=2,
      initializer_range=0.5,
    )
  ).save_pretrained(tmp_path)
  judge = judges.make_judge(f'hf:{tmp_path}', batch_size=2)
  assert judge.window == 11
  text = 'the quick brown fox'  # 11 + 8
  judged = judge.score(BYTES.encode(text)[None], BYTES)
  assert judged.num_tokens[0] == judged.num_bytes[0] == len(text)
  expected = 0.0
  for part in (text[:11], text[11:]):
    ids = [256, *judge.tokenizer(part)['input_ids']]
    with torch.no_grad():
      log_p = judge.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected -= sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1))
  np.testing.assert_allclose(judged.nll[0], expected, rtol=1e-5)
  assert 'loses' not in caplog.text
  judge.tokenizer.backend_tokenizer.normalizer = (
    hf_tokenizers.normalizers.Lowercase()
  )
  judge.encode(['ABc', 'd'])
  assert '2 of 4 bytes' in caplog.text
  with pytest.raises(InputError, match='cannot be loaded'):
    judges.make_judge(f'hf:{tmp_path}/gone')


def test_features_are_the_states_that_have_read_the_last_token(judge, tmp_path):
  tokens = [row[:n] for row, n in zip(rows(5, 16), (16, 15, 7, 1, 0))]
  found = judge.features(tokens, BYTES)

  def state_after(judge, given):
    network = transformer.Transformer(judge.lm.run.network.config)
    tokens = np.array([given], np.int32)
    params = {'params': judge.lm.params}
    return network.apply(params, tokens, np.zeros(1))[0, -1]

  for row, state in zip(tokens, found):
    # The start symbol takes one of the 16 positions.
    expected = state_after(judge, [BYTES.mask_id, *row[:15]])
    np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-5)
  # With segments, a final separator is read with the document that it ends.
  marked = judges.make_judge(
    workdirs.make_workdir(
      tmp_path, objective__name='ar', data__segment_ids=True
    )
  )
  first, second = rows(2, 7)
  first[-1] = second[-1] = separator = BYTES.separator_id
  states = marked.features([first, np.append(second, first)], BYTES)
  for state, start in zip(states, (BYTES.mask_id, separator)):
    expected = state_after(marked, [start, *first])
    np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-5)


def area(p, q, c=5.0):
  """The area below MAUVE's curve, by a fine grid, of histograms."""
  share = np.linspace(1e-9, 1 - 1e-9, 20001)[:, None]
  mix = share * p + (1 - share) * q
  kl = lambda x: np.sum(np.where(x > 0, x * np.log((x + 1e-300) / mix), 0), 1)
  x, y = np.exp(-c * kl(q)), np.exp(-c * kl(p))
  order = np.argsort(x)
  x, y = np.append(x[order], 1), np.append(y[order], 0)
  return np.trapezoid(y, x) + x[0]


def test_mauve(judge, monkeypatch):
  pytest.importorskip('mauve')
  measured = judges.make_judge(judge.name, mauve_seed=3)
  p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.2, 0.2, 0.4, 0.2])
  points = 10 * np.eye(4, 8, dtype=np.float32)
  draw = lambda law: np.repeat(points, np.rint(500 * law).astype(int), axis=0)
  monkeypatch.setattr(measured, 'features', lambda *_: draw(q))
  tokens = rows(2, 16)
  value = measured.measure(tokens, BYTES, '', draw(p))
  np.testing.assert_allclose(value['mauve'], area(p, q), atol=0.01)
  assert (value['mauve_clusters'], value['mauve_seed']) == (50, 3)
  same = measured.measure(tokens, BYTES, '', draw(q))['mauve']
  np.testing.assert_allclose(same, 1, rtol=1e-6)
  assert 'mauve' not in measured.measure(tokens, BYTES, '')


def test_mauve_is_optional(judge, monkeypatch):
  monkeypatch.setitem(sys.modules, 'mauve', None)  # Fails to be imported.
  with pytest.raises(InputError, match=r"--mauve needs mauve: .*'.\[mauve\]'"):
    judges.make_judge(judge.name, mauve_seed=0)
  for spec in ('', 'law'):
    with pytest.raises(InputError, match=f'--judge={spec!r}'):
      judges.make_judge(spec, mauve_seed=0)
