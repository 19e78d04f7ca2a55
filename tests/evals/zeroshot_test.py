"""--mode=zeroshot, on local texts."""

import json

import jax
import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm.data import sources
from nanodlm.evals import zeroshot
from nanodlm.types import InputError
from tests import workdirs


@pytest.mark.parametrize(
  ('name', 'raw', 'text'),
  [
    (
      'wikitext2',
      ' = = Cast = = \n It had 1 @,@ 000 @.@ 5 ( or so ) " a " men \'s hats . ',
      ' == Cast ==\nIt had 1,000.5 (or so) "a" men\'s hats. ',
    ),
    (
      'wikitext2',
      'D . C . , is on Bros . , and ; What ? ! ',
      'D. C., is on Bros., and; What ?! ',
    ),
    ('lm1b', 'Oh ! , he said : ; What ? !', 'Oh!, he said:; What?!'),
    ('ptb', "it is n't N N N % of $ N <unk> 's", "it isn't 1 1 1 % of $1 ?'s"),
    (
      'lm1b',
      'He paid $ 5 , " a lot " at http : / / a , did n\'t he ?',
      'He paid $5, "a lot" at http://a, did n\'t he?',
    ),
    ('lambada', ' “ Yes , ” she said . ', '\n" Yes , " she said .'),
    ('ag_news', ' As it is . ', ' As it is . '),
  ],
)
def test_detokenizes(name, raw, text):
  assert zeroshot.SETS[name].detokenize(raw) == text


@pytest.mark.parametrize('objective', ['ar', 'masked'])
def test_rows_and_their_values(objective, tmp_path):
  workdir = workdirs.make_workdir(
    tmp_path / 'run', data__length=16, objective__name=objective
  )
  texts = ['the quick <unk>', ' fox jumps over', 'N dogs and a b c']
  path = tmp_path / 'ptb.jsonl'
  path.write_text('\n'.join(json.dumps({'sentence': x}) for x in texts))
  lm = lms.load(str(workdir))
  (one,) = zeroshot.parse_sets(['ptb'], [f'ptb=jsonl:{path}:sentence']).values()
  rows, num_bytes = zeroshot.make_rows(
    lm, one, sources.make_source(one.source), 0
  )
  whole = b'the quick ? fox jumps overN dogs and a b c'
  assert len(rows) == len(whole) // 14
  end = lm.tokenizer.separator_id
  for i, row in enumerate(rows):
    assert row.tolist() == [end, *whole[14 * i : 14 * i + 14], end]
  assert num_bytes.tolist() == [14] * len(rows)
  line = zeroshot.measure(lm, rows, num_bytes)
  assert line['ppl'] == pytest.approx(np.exp(line['nll']))
  num_scored = 15 if objective == 'ar' else 16
  assert line['bits_per_byte'] == pytest.approx(
    line['nll'] * num_scored / 14 / np.log(2)
  )
  if objective == 'ar':
    log_p = jax.nn.log_softmax(lm.logits(rows)[..., :-1])
    nats = -np.take_along_axis(np.asarray(log_p), rows[..., None], -1)[:, 1:]
    assert line['nll'] == pytest.approx(nats.mean(), rel=1e-4)


@pytest.mark.parametrize(
  ('names', 'texts', 'said'),
  [
    (['ptbb'], [], 'ptbb'),
    (['ptb'], ['lm1b=text:a'], 'lm1b'),
    ([], ['x=text:a'], "'x'"),
    (['lambada'], [], 'lambada_test.jsonl'),
    (['ptb'], ['ptb'], 'NAME=SOURCE'),
  ],
)
def test_bad_sets(names, texts, said):
  with pytest.raises(InputError, match=said):
    zeroshot.parse_sets(names, texts)
