"""Sampling, also in training: unconditional, continuations and infilling."""

from collections.abc import Callable, Sequence
import dataclasses
import json
import logging
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import laws, searches
from nanodlm import lm as lms
from nanodlm import prompts as prompting
from nanodlm import workdir as workdirs
from nanodlm.data import encoder
from nanodlm.data.packed import PackedData
from nanodlm.data.tokenizers import base
from nanodlm.lm import LanguageModel
from nanodlm.run import Run
from nanodlm.show import watch
from nanodlm.training import checkpoint
from nanodlm.types import InputError, Law

log = logging.getLogger('nanodlm')

# Samples that are shown at an evaluation; all of them are counted.
MAX_SHOWN = 4


def parse_sampler(text: str) -> dict[str, Any]:
  """Parses 'NAME' or 'NAME:KEY=VALUE;KEY=VALUE' to changes of config.sampler.

  Numbers and truth values are converted, and checked by `Run.with_sampler`.
  How much to sample is set for all samplers at once.
  """
  name, _, rest = text.partition(':')
  if '=' in name or ';' in name:
    raise InputError('settings are written NAME:KEY=VALUE;KEY=VALUE')
  changes: dict[str, Any] = {'name': name}
  for pair in rest.split(';') if rest else ():
    key, equals, value = map(str.strip, pair.partition('='))
    if not equals or key == 'name':
      raise InputError(
        f'{pair!r} is not KEY=VALUE with a key of config.sampler'
      )
    if key in configs.SAMPLE_KEYS:
      raise InputError(
        f'{pair!r} cannot be set for one sampler; use --config.sampler.{pair}'
      )
    try:
      changes[key] = json.loads(value.lower())
    except ValueError:
      changes[key] = value
  return changes


def split_samplers(text: str) -> list[str]:
  """Splits --samplers=NAME,NAME:KEY=VALUE at commas outside listed grids."""
  return re.split(r',(?=[a-z_]+(?:[:,]|$))', text) if text else []


def with_samplers(
  lm: LanguageModel, texts: Sequence[str]
) -> list[tuple[str, LanguageModel]]:
  """Returns a label and the model with the sampler for each of --samplers.

  Args:
    lm: the model.
    texts: see `parse_sampler`; if empty, the run's sampler is returned. Omitted
      keys have the run's value if its sampler has the same name, else the
      default.

  Raises:
    InputError: a sampler does not fit the model, or a setting is not allowed or
      is ignored.
  """
  models = []
  for text in texts:
    try:
      changed = lm.with_sampler(parse_sampler(text), is_given=True)
    except InputError as error:
      raise InputError(f'--samplers={text!r}: {error}') from error
    models.append((text, changed))
  return models or [(lm.run.sampler_name, lm)]


def sample_prompts(
  lm: LanguageModel,
  prompts: Sequence[str],
  samplers: Sequence[str] = (),
  display: Any = None,
  page: Any = None,
  make_search: Callable[[Run], searches.Search | None] | None = None,
):
  """Prints samples and appends them to samples.jsonl in the workdir.

  With sampler.stop_at_eos, or for a model of pairs, a text ends at its first
  EOS; the tokens after it are counted but not printed. The file contains the
  whole canvas ('text', 'tokens') and the printed part ('shown'), whose control
  characters are escaped in print.

  Args:
    lm: the model, with its sampler.
    prompts: see `prompts.parse_prompt`; if empty, one blank canvas is used.
    samplers: see `with_samplers`; number, length and seed are the run's.
    display: a `show.live.Display` of the canvases during sampling, or None.
    page: a `show.replay.Page` that records the trajectories, or None.
    make_search: run -> how its sampler finds texts of high reward, without
      display and page; None: every sample is one.
  """
  run, sample = lm.run, lm.run.settings.sample
  models = with_samplers(lm, samplers)
  length = run.settings.sample_length
  watchers, view = watch.Watchers(), None
  if display or page:
    num_top = lms.NUM_RECORDED if page else 0
    view = watch.View(watchers, run.tokenizer.mask_id, num_top)
  law = laws.law_of_rows(run.settings.data)
  found = [make_search and make_search(model.run) for _, model in models]
  fills = [lms.make_fill(model.run, view=view) for _, model in models]
  fills = [own.around(fill) if own else fill for own, fill in zip(found, fills)]
  if not display:
    log.info('compiling the sampler, then sampling')
  for i, prompt in enumerate(prompts or ['']):
    for (label, model), fill, search in zip(models, fills, found):
      tokens, fixed = (
        np.tile(x, (sample.num_samples, 1))
        for x in lms.lay_out(model.run, prompt, length)
      )
      key = jax.random.fold_in(jax.random.key(sample.seed), i)
      work = lambda: fill(lm.params, key, tokens, fixed)
      recorder = watch.Recorder(lms.whole_batch(run, tokens))
      watchers.those = [recorder] if page else []
      start = time.monotonic()
      if display:
        watchers.those.append(display.watch)
        title = f'{label}, step {lm.step}'
        title += f', prompt {prompt!r}' if prompt else ''
        samples, num_calls = display.run(
          work, run.tokenizer, title, tokens, fixed
        )
      else:
        samples, num_calls = work()
      secs = time.monotonic() - start
      if page:
        page.add(
          model.run.sampler_name,
          label,
          prompt,
          fixed[0],
          recorder.trajectories(samples),
          [len(lms.shown_tokens(model.run, row, fixed[0])) for row in samples],
          ~fixed[0] & (tokens[0] != run.tokenizer.mask_id),
        )
      lms.warn_of_full(model.run, samples, tokens[0], fixed[0])
      values = search.reward(samples, fixed) if search else None
      samples, fixed = lms.without_room(model.run, samples, fixed)
      if not jax.process_index():
        title = f', {label}' if len(models) > 1 else ''
        _report(
          model, law, prompt, samples, fixed, num_calls, title, secs, values
        )
  if page:
    settings = run.settings
    size = page.write(
      run.tokenizer,
      pathlib.Path(lm.workdir).resolve().name,
      f'{lm.workdir}: objective {settings.objective["name"]}, step {lm.step}, '
      f'tokenizer {run.tokenizer.name}',
    )
    print(f'--- {page.path}: {size / 2**20:.2f} MiB', flush=True)


def choose_texts(lm: LanguageModel, prompts: Sequence[str]):
  """Prints the choices of prompts with a slot; see `LanguageModel.choose`.

  Each prompt is a line of samples.jsonl, with 'choices' in place of a text.
  """
  chosen = [lm.choose(prompt) for prompt in prompts]
  if jax.process_index():
    return
  for prompt, choices in zip(prompts, chosen):
    kind = 'exact'
    if not choices[0].is_exact:
      kind = 'not exact: as if all bounds of -log p were equally tight'
    shown = []
    for choice in choices:
      text = f'{choice.probability:.4f} {base.escape_controls(choice.text)!r}'
      if not choice.is_exact:
        text += f'  -log p <= {choice.nats:.2f} ± {choice.nats_ci95:.2f} nats'
      shown.append(text)
    print(f"--- the model's probabilities, {kind}, prompt {prompt!r}")
    print('\n'.join(shown), flush=True)
    line = {
      'prompt': prompt,
      'shown': '\n'.join(shown),
      'choices': [dataclasses.asdict(choice) for choice in choices],
      'step': lm.step,
    }
    workdirs.append(lm.workdir, workdirs.SAMPLES, line)


def make_draw(
  run: Run, packed: PackedData, writer: Any, workdir: str
) -> Callable[[int, Any], None]:
  """Returns draw(step, params), which samples, logs and writes the samples.

  It raises SaveError if samples.jsonl cannot be written.
  """
  settings, tokenizer = run.settings, run.tokenizer
  watchers = watch.Watchers()
  fill = lms.make_fill(run, view=watch.View(watchers, tokenizer.mask_id))
  law = laws.law_of_rows(settings.data)
  prompt, (row, fixed) = _first_prompt(run, packed)
  tokens, is_fixed = (
    np.tile(x, (settings.train.num_samples, 1)) for x in (row, fixed)
  )

  def draw(step: int, params: Any):
    recorder = watch.Recorder(lms.whole_batch(run, tokens))
    watchers.those = [recorder]
    key = jax.random.fold_in(jax.random.key(settings.sample.seed), step)
    filled, num_calls = fill(params, key, tokens, is_fixed)
    trajectories = recorder.trajectories(filled)
    # Rows that other processes compute have empty trajectories.
    if trajectories := [one for one in trajectories if one.answers]:
      image = watch.order_image(trajectories[:MAX_SHOWN], fixed)[None]
      writer.write_images(step, {'samples/reveal_order': image})
    filled, given = lms.without_room(run, filled, is_fixed)
    lines = [
      _line(run, law, step, prompt, *row, num_calls)
      for row in zip(filled, given)
    ]
    texts = [line['shown'] for line in lines[:MAX_SHOWN]]
    blocks = {f'samples/{i}': f'```\n{x}\n```' for i, x in enumerate(texts)}
    writer.write_texts(step, blocks)
    for line in lines[:MAX_SHOWN]:
      shown = base.escape_controls(line['shown']).splitlines()
      if problem := line.get('problem'):
        shown.append(f'  this text is impossible: {problem}')
      log.info('sample:\n%s', ''.join(f'    {x}\n' for x in shown))
    if law:
      means = laws.sample_means(law, [line['shown'] for line in lines])
      scalars = {f'samples/{key}': value for key, value in means.items()}
      writer.write_scalars(step, scalars)
      log.info('step %d, %s', step, laws.describe_samples(means, len(filled)))
    if not jax.process_index():
      try:
        workdirs.append(workdir, workdirs.SAMPLES, *lines)
      except InputError as error:
        raise checkpoint.SaveError(str(error)) from error

  return draw


def _first_prompt(run: Run, packed: PackedData):
  """Returns what samples in training start from, for pairs the first prompt.

  Its text, and tokens and fixed [n].

  A blank canvas if that cannot be laid out: it holds characters that the
  tokenizer does not know, or sampler.length is too short.
  """
  length, prompt = run.settings.sample_length, ''
  if packed.is_documents:
    pair = packed.validation[0]
    if run.settings.data.is_chat:
      marks = pair['marks']
      size = min(int(np.argmin(marks & encoder.GIVEN)), length - 1)
      ids = np.full([length], run.tokenizer.mask_id, np.int32)
      ids[:size] = pair['tokens'][:size]
      prompt = run.tokenizer.decode(ids[:size])
      return prompt, (ids, np.arange(length) < size)
    text = run.tokenizer.decode(pair['tokens'][: pair['prompt_length']])
    prompt = text.replace('{', '{{').replace('}', '}}')
  try:
    return prompt, lms.lay_out(run, prompt, length)
  except InputError:
    return '', lms.lay_out(run, '', length)


def _line(
  run: Run,
  law: Law | None,
  step: int,
  prompt: str,
  tokens: np.ndarray,
  fixed: np.ndarray,
  num_calls: float,
) -> dict[str, Any]:
  """Describes a sample [n], as a line of samples.jsonl."""
  decode, verdict = run.tokenizer.decode, {}
  shown = decode(lms.shown_tokens(run, tokens, fixed))
  if law:
    problem = law.explain(shown)
    nats = None if problem else -law.log_prob(shown)
    verdict = {'law_nats': nats, 'problem': problem}
  return {
    'prompt': prompt,
    'text': decode(tokens),
    'shown': shown,
    'tokens': tokens.tolist(),
    'step': step,
    'num_calls': int(num_calls),
    'tokens_per_call': lms.tokens_per_call(fixed, num_calls),
    'sampler': run.describe_sampler(),
    **verdict,
  }


def _report(lm, law, prompt, tokens, fixed, num_calls, label, secs, rewards):
  """Prints samples and fixed [N, n] and appends them to samples.jsonl.

  With a law, it also says which of them are possible, and why others are not.
  """
  tokenizer, lines = lm.tokenizer, []
  for j, (row, given) in enumerate(zip(tokens, fixed)):
    ids = lms.shown_tokens(lm.run, row, given)
    line = _line(lm.run, law, lm.step, prompt, row, given, num_calls)
    num_more = np.sum(~np.isin(row[len(ids) :], tokenizer.eos_ids))
    title = f'--- sample {j + 1} of {len(tokens)}{label}'
    title += f', prompt {prompt!r}' if prompt else ''
    if rewards is not None:
      line['reward'] = float(rewards[j])
      title += f', reward {rewards[j]:.4g}'
    if len(ids) < len(row):
      title += f', ends after {len(ids)} of {len(row)} tokens'
    if num_more:
      title += f', {num_more} tokens of text after the end'
    print(f'{title}\n{base.escape_controls(line["shown"])}')
    if problem := line.get('problem'):
      print(f'--- the text is impossible: {problem}')
    lines.append(line)
  num_filled = int(np.sum(~fixed))
  print(
    f'--- tokens filled: {num_filled} of {tokens.size}, network calls: '
    f'{int(num_calls)}, tokens of a text per call: '
    f'{lms.tokens_per_call(fixed, num_calls):.2f}, {secs:.1f} s with '
    'compilation',
    flush=True,
  )
  if rewards is not None:
    print(f'--- mean reward {np.mean(rewards):.4g}', flush=True)
  if law:
    if described := laws.describe_gaps(law, tokenizer, prompt):
      print(f'--- {described}')
    means = laws.sample_means(law, [line['shown'] for line in lines])
    print(f'--- {laws.describe_samples(means, len(tokens))}', flush=True)
  workdirs.append(lm.workdir, workdirs.SAMPLES, *lines)


def check_prompts(lm: LanguageModel, prompts: Sequence[str]):
  """Checks that prompts fit the canvas; logs what its gaps are.

  Raises:
    InputError: a prompt does not fit.
  """
  told = set()
  for prompt in prompts:
    _, fixed = lms.lay_out(lm.run, prompt, lm.run.settings.sample_length)
    if literal := prompting.literal_braces(prompt):
      log.warning(
        f'prompt={prompt!r}: {", ".join(map(repr, literal))} is text; a gap '
        'is written {}, {12} or {*}, a literal brace is doubled'
      )
    size = prompting.automatic_size(prompt, int(np.sum(~fixed)))
    if size and size not in told and lm.run.sampler.fills_masks:
      told.add(size)
      log.info(f'each {{}} is {size} tokens here; {{5}} would be 5')
