"""Workdirs of training runs, written by hand."""

import json


def write_run(workdir, *, name='masked', last=30, num_steps=30, samples=()):
  """Writes a workdir with a line of metrics every ten steps."""
  workdir.mkdir(parents=True, exist_ok=True)
  config = {
    'seed': 0,
    'objective': {'name': name, 'noise': 'auto'},
    'data': {'length': 8, 'source': 'embedded'},
    'tokenizer': {'name': 'bytes'},
    'train': {'batch_size': 4, 'num_steps': num_steps},
  }
  (workdir / 'config.json').write_text(json.dumps(config))
  evaluation = {
    'step': last,
    'eval/nll': 1.25,
    'eval/nll_ci95': 0.125,
    'eval/bits_per_byte': 0.5,
    'eval/bits_per_byte_ci95': 0.0625,
    'eval/num_examples': 7.0,
    'eval_by_level/cross_entropy_9': 2.0,
  }
  lines = [*map(line_of, range(10, last + 1, 10)), evaluation]
  write_lines(workdir / 'metrics.jsonl', lines)
  facts = {'step': last, 'num_calls': 4, 'sampler': {'name': 'fixed_count'}}
  lines = [{'prompt': t, 'shown': t, 'text': t, **facts} for t in samples]
  if lines:
    write_lines(workdir / 'samples.jsonl', lines)
  return workdir


def line_of(step, loss=None):
  """Returns a line of metrics.jsonl."""
  return {
    'step': step,
    'train/loss': 3 - step / 20 if loss is None else loss,
    'train/tokens_per_sec': 100.0 + step,
    'train/secs_per_step': 0.5,
    'train/skipped_steps': 1.0,
    'train_by_level/cross_entropy_0': 0.5,
    'train_by_level/cross_entropy_9': 2.5,
  }


def write_lines(path, lines):
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
