"""A trained model that samples texts, bounds their probability, gives logits.

    lm = nanodlm.load('runs/quickstart')
    lm.sample('The {} is {5}.', num_samples=2)

The command line, the server and the evaluations use the same object.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
import dataclasses
import functools
import logging
import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanodlm import config as configs
from nanodlm import prompts, rewards, searches, weights
from nanodlm import run as runs
from nanodlm.data.tokenizers import chat
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.data.tokenizers.saved import load_tokenizer
from nanodlm.devices import mesh as meshes
from nanodlm.run import Run
from nanodlm.show import watch
from nanodlm.steps import evaluate as evaluate_steps
from nanodlm.steps import sample as sample_steps
from nanodlm.training import progress
from nanodlm.types import Batch, Canvas, check_seed, InputError, Objective

log = logging.getLogger('nanodlm')

# Number of independent evaluations for the interval of a bound.
NUM_REPEATS = 8
# 97.5% quantile of Student's t with NUM_REPEATS - 1 degrees of freedom.
_T_QUANTILE = 2.365
# Probabilities are recorded for this many most probable tokens.
NUM_RECORDED = 64
# Rows are padded to a multiple of this length, to compile fewer programs.
LENGTH_STEP = 64


class Sample(NamedTuple):
  """A sampled text, with details of its sampling.

  Attributes:
    text: the text, up to its end if sampler.stop_at_eos is set; of messages,
      the answer.
    tokens: [n] int32, the whole canvas.
    fixed: [n] bool, positions of the prompt, and separators after the text of a
      sampler that fills gaps of any length.
    num_calls: number of network calls of the batch.
    logprobs: [n] float32, the network's log-probability of each token; NaN for
      the prompt, and with a sampler that fills gaps of any length. It is that
      of the call that revealed the token, given the canvas before the call;
      with a sampler that changes tokens, of the last call after which this one
      did not change. It is the network's own, before temperature, top-k, top-p
      and guidance. The sum is the text's exact log-probability for the samplers
      `ar` and `speculate`, on a blank canvas; otherwise it depends on the order
      in which tokens are revealed, and the tokens of one call are treated as
      independent; see `bound`.
    top_tokens: [n, watch.NUM_ALTERNATIVES] int32, the most probable tokens in
      this call, best first.
    top_logprobs: their log-probabilities, float32.
  """

  text: str
  tokens: np.ndarray
  fixed: np.ndarray
  num_calls: int
  logprobs: np.ndarray
  top_tokens: np.ndarray
  top_logprobs: np.ndarray

  @property
  def tokens_per_call(self) -> float:
    """The tokens of this text that a network call filled, on average."""
    return tokens_per_call(self.fixed, self.num_calls)


@dataclasses.dataclass(frozen=True)
class Bound:
  """An upper bound on -log p(text), or its exact value.

  Attributes:
    nats: the bound for the whole text.
    nats_ci95: half width of its 95% interval over the noise; 0 if exact.
    bits_per_byte: nats / log(2) / num_bytes.
    bits_per_byte_ci95: half width of its 95% interval.
    num_tokens: number of tokens in the text, without its end. Of a conversation
      it is the number that are scored.
    num_bytes: number of UTF-8 bytes.
    is_exact: whether the bound is the exact value.
  """

  nats: float
  nats_ci95: float
  bits_per_byte: float
  bits_per_byte_ci95: float
  num_tokens: int
  num_bytes: int
  is_exact: bool


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of the texts that can fill a slot, see `LanguageModel.choose`.

  Attributes:
    text: the text.
    probability: its probability among the choices.
    nats: -log p(text in the slot | the rest), or of the whole text with it.
    nats_ci95: half width of the 95% interval of `nats`; 0 if it is exact.
    is_exact: whether `nats` is the exact value. If not, it is an upper bound,
      and the probability is what it would be if all bounds were equally tight.
  """

  text: str
  probability: float
  nats: float
  nats_ci95: float
  is_exact: bool


def _call(step: Callable[..., Any], *args: Any) -> Any:
  return step(*args)


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A run with its averaged parameters, of a step's checkpoint in `workdir`.

  Attributes:
    run: the settings and what is made from them.
    params: the parameters.
    step: training step of the checkpoint.
    workdir: folder of the run.
    call: runs a jitted function of `bound`, `choose` or `logits` on its
      arguments; the server has it wait for its turn.
  """

  run: Run
  params: Any
  step: int
  workdir: str
  call: Callable[..., Any] = _call
  _idle: list[watch.Watchers] = dataclasses.field(default_factory=list)

  def __repr__(self) -> str:
    name = self.run.settings.objective['name']
    return f'<LanguageModel {self.workdir!r}, {name}, step {self.step}>'

  @property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer, with encode(text) and decode(ids)."""
    return self.run.tokenizer

  def with_sampler(
    self, changes: Mapping[str, Any], *, is_given: bool = False
  ) -> 'LanguageModel':
    """Returns the model with another sampler; see `Run.with_sampler`."""
    run = self.run.with_sampler(changes, is_given=is_given)
    return dataclasses.replace(self, run=run)

  def sample(
    self,
    prompt: str | Sequence[chat.Message] = '',
    *,
    num_samples: int = 1,
    sampler: str | None = None,
    num_steps: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    length: int | None = None,
    details: bool = False,
    reward: str = '',
    best_of: int = 1,
    num_refinements: int = 0,
    reward_temperature: float = 0.0,
    **settings: Any,
  ) -> list[Any]:
    """Samples texts.

    Args:
      prompt: a text with gaps, '{}' of automatic size, '{12}' of 12 tokens, or
        '{*}' of any length, which the samplers insert and expand fill. A prompt
        without a gap is continued; '' is a blank canvas. Messages, such as
        [{'role': 'user', 'content': 'Hello'}], are answered.
      num_samples: number of texts.
      sampler: a name in `samplers.SAMPLERS`; None is the run's sampler.
      num_steps: number of network calls, per block if there are blocks.
      temperature: divides the logits; 0 takes the most probable token.
      seed: seed of the samples.
      length: number of tokens of the canvas; None is the run's. Answers end
        there, too.
      details: whether to return `Sample` objects instead of texts, with the
        log-probabilities of the tokens, and the number of network calls.
      reward: what texts are worth, such as 'law:valid'; see `nanodlm.rewards`.
      best_of: number of samples for each text, the best of which is returned.
      num_refinements: see `searches.Search`.
      reward_temperature: see `searches.Search`.
      **settings: other keys of `config.sampler`, such as top_p=0.9.

    Raises:
      InputError: the prompt does not fit the canvas, or a setting is invalid.
    """
    check_seed(seed, 'seed')
    if num_samples < 1:
      raise InputError(f'num_samples={num_samples!r} must be >= 1')
    chosen = {'name': sampler, 'num_steps': num_steps}
    chosen |= {'temperature': temperature, **settings}
    changes = {key: x for key, x in chosen.items() if x is not None}
    run = self.run.with_sampler(changes, is_given=True) if changes else self.run
    if length is None:
      length = run.settings.sample_length
    elif length < 1:
      raise InputError(f'length={length!r} must be >= 1')
    run.check_canvas('length', length)
    row, fixed = lay_out(run, prompt, length)
    tokens, is_fixed = (np.tile(x, (num_samples, 1)) for x in (row, fixed))
    kept = [watch.Logprobs(len(row)) for _ in whole_batch(run, tokens)]
    keeps = details and not run.sampler.fills_room
    is_chat = not isinstance(prompt, str)
    search = make_search(
      run,
      reward,
      best_of,
      num_refinements,
      reward_temperature,
      is_chat=is_chat,
      length=length,
    )
    # As the first prompt of --mode=sample.
    key = jax.random.fold_in(jax.random.key(seed), 0)
    with self._view(kept) if keeps else contextlib.nullcontext() as view:
      fill = make_fill(run, view=view, make_step=_make_kept_step)
      if search:
        taken = copy.deepcopy(kept)

        def on_candidate(is_taken):
          for i, is_new in enumerate(is_taken):
            source, target = (kept, taken) if is_new else (taken, kept)
            target[i] = copy.deepcopy(source[i])

        fill = search.around(fill, on_candidate if keeps else None)
      filled, num_calls = fill(self.params, key, tokens, is_fixed)
    warn_of_full(run, filled, row, fixed)
    show = answer_tokens if is_chat else shown_tokens
    texts = [
      run.tokenizer.decode(show(run, row, fixed), is_start=not is_chat)
      for row in filled
    ]
    if not details:
      return texts
    filled, is_fixed = without_room(run, filled, is_fixed)
    return [
      Sample(
        text,
        row,
        fixed,
        int(num_calls),
        logprobs.chosen,
        logprobs.top_tokens,
        logprobs.top,
      )
      for text, row, fixed, logprobs in zip(texts, filled, is_fixed, kept)
    ]

  @contextlib.contextmanager
  def _view(self, kept: Sequence[watch.Logprobs]) -> Iterator[watch.View]:
    """Yields a view of the calls, whose compiled sampler later calls reuse."""
    try:
      watchers = self._idle.pop()
    except IndexError:
      watchers = watch.Watchers()
    watchers.those = [functools.partial(watch.Logprobs.keep, kept)]
    yield watch.View(watchers, self.tokenizer.mask_id, reveals=True)
    # After an error, calls that it is shown may still be running.
    watchers.those = []
    self._idle.append(watchers)

  def bound(
    self,
    texts: Sequence[str] | Sequence[Sequence[chat.Message]],
    *,
    num_draws: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
  ) -> list[Bound]:
    """Bounds -log p of each text, or of the answers in each conversation.

    A final separator is not included, unless the rows of training are documents
    or pairs: then the text is laid out as one of them, with its end. A text
    longer than data.length is split into rows that are scored independently.
    Of a conversation, what the assistant says is scored, given the rest, as in
    training.

    Args:
      texts: non-empty texts, or conversations: lists of messages such as
        {'role': 'user', 'content': 'Hello'}.
      num_draws: noise draws per row and repetition, of which there are
        NUM_REPEATS; None is eval.num_draws.
      seed: seed of the noise.
      batch_size: number of rows per network call.

    Raises:
      InputError: a text is empty or not a string, a conversation is too long or
        lacks an answer, or the seed is too large.
    """
    check_seed(seed, 'seed')
    if isinstance(texts, str):
      raise InputError(f'texts={texts!r} must be a list of texts')
    if not texts:
      return []
    if isinstance(texts[0], Mapping):
      raise InputError(
        'texts must be a list of conversations, not a single one: write '
        '[messages]'
      )
    is_text = isinstance(texts[0], str)
    lay_out: Any = self._lay_out_texts if is_text else self._lay_out_talks
    batch, owner, sizes = lay_out(texts)
    bounds = self._bound(batch, owner, num_draws, seed, batch_size)
    scores = []
    for value, width, (num_tokens, num_bytes) in zip(*bounds, sizes):
      per_byte = 1 / (np.log(2) * num_bytes)
      scores.append(
        Bound(
          nats=float(value),
          nats_ci95=float(width),
          bits_per_byte=float(value * per_byte),
          bits_per_byte_ci95=float(width * per_byte),
          num_tokens=num_tokens,
          num_bytes=num_bytes,
          is_exact=self.run.objective.exact,
        )
      )
    return scores

  def _lay_out_texts(
    self, texts: Sequence[str]
  ) -> tuple[Batch, np.ndarray, list[tuple[int, int]]]:
    """Returns rows of texts, the text of each, and their tokens and bytes."""
    for text in texts:
      if not isinstance(text, str) or not text:
        raise InputError(f'texts must be non-empty strings, not {text!r}')
    run = self.run
    rows = run.tokenizer.encode_to_score(texts)
    for text, row in zip(texts, rows):
      if not row.size:
        raise InputError(
          f'texts: the {run.tokenizer.name} tokenizer encodes {text!r} as zero '
          'ids, whose probability is not defined'
        )
    sizes = [(len(row), len(text.encode())) for text, row in zip(texts, rows)]
    return *self._windows(rows), sizes

  def _lay_out_talks(
    self, conversations: Sequence[Sequence[chat.Message]]
  ) -> tuple[Batch, np.ndarray, list[tuple[int, int]]]:
    """Returns what `_lay_out_texts` does, of what the assistant says."""
    settings, tokenizer = self.run.settings, self.tokenizer
    if self.run.objective.any_length:
      raise InputError(
        f'objective.name={settings.objective["name"]!r} does not score '
        'conversations'
      )
    chat_format = chat.make_format(tokenizer)
    rows, given, sizes = [], [], []
    for i, messages in enumerate(conversations):
      encoded = chat_format.encode(tokenizer, messages).to_score()
      num_bytes = int(encoded.num_bytes[encoded.scored].sum())
      if not num_bytes or len(encoded.ids) > settings.data.length:
        raise InputError(
          f'conversation {i} has {len(encoded.ids)} tokens, and {num_bytes} '
          f'bytes of answers; at most {settings.data.length} tokens are '
          'allowed (data.length), and at least a byte'
        )
      rows.append(encoded.ids)
      given.append(~encoded.scored)
      sizes.append((int(encoded.scored.sum()), num_bytes))
    batch, owner = self._lay_out_rows(rows)
    is_given, _ = pad(given, batch.tokens.shape[1])
    eligible = batch.eligible & (is_given == 0)
    return make_batch(batch.tokens, eligible, batch.segment_ids), owner, sizes

  def _bound(
    self,
    batch: Batch,
    owner: np.ndarray,
    num_draws: int | None,
    seed: int,
    batch_size: int = 32,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds of texts, in nats, and their half widths.

    `owner` [N] is the text of each row of the batch; see `bound`.
    """
    if num_draws is None:
      num_draws = self.run.settings.eval.num_draws
    if num_draws < 1:
      raise InputError(f'num_draws={num_draws!r} must be >= 1')
    # A power of two, to compile fewer programs.
    batch_size = min(batch_size, 1 << (len(batch.tokens) - 1).bit_length())
    score = make_score(
      self.run, num_draws=num_draws, batch_size=batch_size, call=self.call
    )
    num = 1 if self.run.objective.exact else NUM_REPEATS
    repeats = []
    for key in jax.random.split(jax.random.key(seed), num):
      nll = score(self.params, key, batch)['nll']
      repeats.append(np.bincount(owner, weights=nll))
    nats = np.mean(repeats, axis=0)
    spread = np.std(repeats, axis=0, ddof=1) if num > 1 else np.zeros(len(nats))
    return nats, _T_QUANTILE * spread / num**0.5

  def choose(
    self,
    prompt: str | Sequence[chat.Message],
    *,
    num_draws: int | None = None,
    seed: int = 0,
  ) -> list[Choice]:
    """Returns the probability of each text that can fill a slot.

    If each choice is one token and the model predicts masked tokens, this is
    the network's own law of the slot, given everything else in the prompt, in
    one call; the prompt may have gaps. Otherwise the prompt has none, and a
    model that sees the text after the slot gives a bound on -log p(choice |
    the rest). Other models compare whole texts: by their exact probability with
    objective.name='ar' and with objective.ar_weight > 0 (the law of
    `speculate`), else by their bounds. So are the answers of a conversation.

    Args:
      prompt: a text with one slot, such as 'The sky is {blue|green}.', or
        messages, the last of which is the assistant's and has the slot.
      num_draws: see `bound`.
      seed: see `bound`.

    Raises:
      InputError: there is not one slot, or there are gaps that are not allowed.
    """
    messages, text = None, prompt
    if not isinstance(text, str):
      messages = text
      text = prompts.choices_of(messages)
    before, choices, after = prompts.split_choices(text)
    tokenizer, run = self.tokenizer, self.run
    sees_right = run.objective.sees_right(run.settings.sample_length)
    # A space before the slot may be a part of the token in it.
    is_whole = run.settings.data.is_pairs and not after
    space = before.removeprefix(prompts.before_gap(before, tokenizer, is_whole))
    encode = tokenizer.encode_rest if before else tokenizer.encode
    rows = [encode(space + choice) for choice in choices]
    is_prompt = messages is None
    is_single = is_prompt and all(len(row) == 1 for row in rows)
    if run.objective.predicts_masked and is_single:
      canvas, slot = self._lay_out_slot(before, after, 1)
      logits = self.logits(canvas)[slot][: tokenizer.mask_id]
      log_p = np.asarray(jax.nn.log_softmax(logits))
      values = [(-float(log_p[row[0]]), 0.0, True) for row in rows]
    elif is_prompt and sees_right and run.sampler.fills_masks:
      for part in before, after:
        prompts.plain_text(part)
      texts, is_slot = [], []
      for row in rows:
        canvas, slot = self._lay_out_slot(before, after, len(row))
        texts.append(canvas.copy())
        texts[-1][slot : slot + len(row)] = row
        place = np.arange(len(canvas))
        is_slot.append((place >= slot) & (place < slot + len(row)))
      size = self._padded(max(map(len, texts)))
      tokens, is_text = pad(texts, size)
      eligible, _ = pad(is_slot, size)
      batch = make_batch(tokens, eligible > 0, (~is_text).astype(np.int32))
      bounds = self._bound(batch, np.arange(len(rows)), num_draws, seed)
      values = [(float(x), float(width), False) for x, width in zip(*bounds)]
    else:
      model, own = self, run.objective.autoregressive
      if own is not None and not run.objective.exact:
        run = dataclasses.replace(
          run, objective=own, network=run.network.autoregressive()
        )
        model = dataclasses.replace(self, run=run)
      before, after = (prompts.plain_text(x) for x in (before, after))
      texts: list[Any] = [before + choice + after for choice in choices]
      if messages is not None:
        *rest, last = messages
        texts = [[*rest, {**last, 'content': text}] for text in texts]
      bounds = model.bound(texts, num_draws=num_draws, seed=seed)
      values = [(x.nats, x.nats_ci95, x.is_exact) for x in bounds]
    scores = np.array([-nats for nats, _, _ in values])
    shares = np.exp(scores - np.logaddexp.reduce(scores))
    return [
      Choice(text, float(share), *value)
      for text, share, value in zip(choices, shares, values)
    ]

  def _padded(self, length: int) -> int:
    """Returns the length that rows of `length` tokens are padded to."""
    if length % (self.run.objective.block_size or 1):
      return length  # The last block would see the padding.
    size = -(-length // LENGTH_STEP) * LENGTH_STEP
    return max(min(size, self.run.settings.sample_length), length)

  def _lay_out_slot(
    self, before: str, after: str, size: int
  ) -> tuple[np.ndarray, int]:
    """Returns a canvas [n] with a gap of `size` tokens, and where it begins."""
    length = self.run.settings.sample_length
    prompt = f'{before}{{{size}}}{after}'
    canvas, _ = lay_out(self.run, prompt, length)
    # As `prompts.make_canvas` does; a separator may end the canvas.
    parts = prompts.encode_parts(
      prompt,
      self.tokenizer,
      length - int(self.run.objective.any_length),
      sees_right=True,
      is_pairs=self.run.settings.data.is_pairs,
    )
    num_before = len(prompts.parse_prompt(f'{before}{{1}}')) - 1
    return canvas, sum(map(len, parts[:num_before]))

  def _windows(self, rows: Sequence[np.ndarray]) -> tuple[Batch, np.ndarray]:
    """Splits texts into rows; returns them and the text of each, [N]."""
    data = self.run.settings.data
    longest, separator = data.length, self.tokenizer.separator_id
    for row in rows:
      if self.run.objective.any_length and len(row) >= longest:
        raise InputError(
          f'a text of {len(row)} tokens is too long: with objective.name='
          f'{self.run.settings.objective["name"]!r}, its end must be in the '
          f'row, of data.length={longest}'
        )
    if data.has_documents:
      # A text that fills its last row lacks an end, as if it were cut.
      rows = [
        np.append(row, separator) if len(row) % longest else row for row in rows
      ]
    return self._lay_out_rows(rows)

  def _lay_out_rows(
    self, rows: Sequence[np.ndarray]
  ) -> tuple[Batch, np.ndarray]:
    """Pads texts as in training; returns what `_windows` does."""
    data, separator = self.run.settings.data, self.tokenizer.separator_id
    step = np.lcm(LENGTH_STEP, self.run.objective.block_size or 1)
    size = -(-max(map(len, rows)) // step) * step
    fills = data.has_documents and data.padding == 'eos'
    # The time that a network is given depends on the length of the row.
    is_whole = fills or self.run.network.knows_time
    size = data.length if is_whole else int(min(size, data.length))
    tokens, is_text, owner = cut_windows(rows, size)
    tokens = np.where(is_text, tokens, np.int32(separator))
    is_text |= fills
    # The padding is a separate segment, so that texts do not attend to it.
    batch = make_batch(tokens, is_text, (~is_text).astype(np.int32))
    return batch, owner

  def logits(self, tokens: Any, level: float | None = None) -> np.ndarray:
    """Returns the logits of the clean tokens, [B, L, V] or [L, V] float32.

    The last logit is the mask's.

    Args:
      tokens: [B, L] or [L] ids, `tokenizer.mask_id` for masks.
      level: the noise level in [0, 1], ignored unless the network is
        time-conditioned: the expected share of masks for masked noise, the time
        for mixtures. None is the share of masks in each row.
    """
    vocab_size = self.run.network.vocab_size
    try:
      ids = np.asarray(tokens)
    except ValueError:  # Rows of different lengths.
      ids = np.zeros(0)
    is_ids = ids.dtype.kind in 'iu' and ids.ndim in (1, 2) and ids.size
    if not is_ids or ids.min() < 0 or ids.max() >= vocab_size:
      raise InputError(
        f'tokens={reprlib.repr(tokens)} must be ids below {vocab_size}, [L] or '
        '[B, L]'
      )
    rows = np.atleast_2d(ids).astype(np.int32)
    separator = self.tokenizer.separator_id
    if self.run.objective.any_length and np.any(rows[:, -1] != separator):
      raise InputError(
        f'each row of tokens must end with the separator, {separator}, with '
        f'objective.name={self.run.settings.objective["name"]!r}'
      )
    is_mask = np.asarray(rows == self.tokenizer.mask_id)
    levels = np.asarray(is_mask.mean(axis=1), np.float32)
    if level is not None:
      if not 0 <= level <= 1:
        raise InputError(f'level={level!r} must be in [0, 1]')
      levels = np.full(len(rows), level, np.float32)
    mesh, length = self.run.mesh, rows.shape[1]
    self.run.check_positions('number of tokens', length)
    step = sample_steps.make_logits_step(self.run.scorer, mesh)
    size = self._padded(length)
    lengths = np.full(len(rows), length, np.int32)
    # The last token of a row can mean its end.
    rows = np.pad(rows, ((0, 0), (0, size - length)), mode='edge')
    padded = (whole_batch(self.run, x) for x in (rows, levels, lengths))
    padded = meshes.shard_whole_batch(mesh, tuple(padded))
    logits = self.call(step, self.params, *padded)
    logits = jax.device_get(logits)[: len(lengths), :length]
    return logits if ids.ndim == 2 else logits[0]


def load(
  workdir: str, *, step: int = 0, settings: configs.Settings | None = None
) -> LanguageModel:
  """Loads the averaged parameters of a run.

  Args:
    workdir: folder of the run, as given to --workdir.
    step: training step of the checkpoint; 0 is the last one.
    settings: modified settings; None is those of the run.

  Raises:
    InputError: the run or the checkpoint does not exist or is damaged.
  """
  if settings is None:
    settings = configs.make_settings(configs.read_run(workdir))
  run = runs.make_run(settings, refit=True)
  tokenizer = load_tokenizer(workdir)
  if 'tokenizer.chat_template' in settings.given:
    tokenizer = chat.with_template(tokenizer, settings.tokenizer.chat_template)
  run = run.with_tokenizer(tokenizer)
  return LanguageModel(run, *weights.load_params(run, workdir, step), workdir)


def lay_out(
  run: Run, prompt: str | Sequence[chat.Message], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Makes the canvas of a prompt; see `prompts.make_canvas`.

  That of messages ends with a gap for the answer.

  If the rows of training are documents, a prompt with a gap that ends with text
  is a whole one: the separators that filled its row in training follow, if they
  did.
  """
  if not isinstance(prompt, str):
    return lay_out_chat(run, prompt, length)
  tokens, fixed = prompts.make_canvas(
    prompt,
    run.tokenizer,
    length,
    run.objective.sees_right(length),
    run.sampler.fills_masks,
    run.sampler.fills_room,
    run.settings.data.is_pairs,
    run.objective.any_length,
  )
  return end_as_trained(run, tokens, fixed, length)


def end_as_trained(
  run: Run, tokens: np.ndarray, fixed: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Adds the separators that filled the row of a whole document in training.

  A canvas [n] is a whole document if it ends with text and the rows of training
  are documents.
  """
  data = run.settings.data
  if data.has_documents and data.padding == 'eos' and fixed[-1]:
    padding = (0, max(min(data.length, length) - len(tokens), 0))
    separator_id = run.tokenizer.separator_id
    tokens = np.pad(tokens, padding, constant_values=separator_id)
    fixed = np.pad(fixed, padding, constant_values=True)
  return tokens, fixed


def lay_out_chat(
  run: Run,
  messages: Sequence[chat.Message],
  length: int,
  size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes the canvas of a conversation; see `prompts.make_chat_canvas`."""
  if length > run.settings.data.length:
    raise InputError(
      f'sampler.length={length!r} is more than data.length='
      f'{run.settings.data.length!r}: the model was not trained on longer '
      'conversations'
    )
  if not run.sampler.fills_masks:
    raise InputError(
      f'sampler.name={run.sampler_name!r} cannot answer messages: it does not '
      'fill gaps of a given number of tokens'
    )
  is_list = isinstance(messages, Sequence)
  if is_list and any(isinstance(one, str) for one in messages):
    raise InputError(
      f'prompt={messages!r} must be one text, or messages with roles; sample '
      'several texts one by one'
    )
  return prompts.make_chat_canvas(messages, run.tokenizer, length, size)


def shown_tokens(run: Run, tokens: np.ndarray, fixed: np.ndarray) -> np.ndarray:
  """Returns the part of a sample [n] to show: up to the end of the text.

  The text does not end before the last of the `fixed` tokens [n] of its prompt.
  """
  tokens, fixed = without_room(run, tokens, fixed)
  if fixed[-1]:  # Separators at the end only fill the canvas; see `lay_out`.
    is_other = tokens != run.tokenizer.separator_id
    fixed = fixed & (np.arange(len(tokens)) <= np.argmax(is_other.cumsum()))
  first = int(np.max(np.flatnonzero(fixed), initial=-1)) + 1
  size = prompts.find_end(tokens[first:], run.eos_ids, is_blank=not first)
  return tokens[: first + size]


def read_texts(
  run: Run, rows: np.ndarray, fixed: np.ndarray, is_chat: bool = False
) -> tuple[list[str], list[str]]:
  """Returns the texts of samples [N, n], and what is before their first gap.

  With `is_chat` they answer messages, and end where the answer does.
  """
  decode = run.tokenizer.decode
  firsts = np.where(fixed.all(axis=1), fixed.shape[1], fixed.argmin(axis=1))
  before = [row[:first] for row, first in zip(rows, firsts)]
  if is_chat:
    answers = [answer_tokens(run, *both) for both in zip(rows, fixed)]
    texts = [decode(np.concatenate(both)) for both in zip(before, answers)]
  else:
    texts = [decode(shown_tokens(run, *both)) for both in zip(rows, fixed)]
  return texts, [decode(row) for row in before]


def make_search(
  run: Run,
  reward: str,
  best_of: int = 1,
  num_refinements: int = 0,
  temperature: float = 0.0,
  *,
  is_chat: bool = False,
  length: int = 0,
) -> searches.Search | None:
  """Makes a search by a reward of `nanodlm.rewards`; None without a reward.

  `is_chat` says whether samples answer messages, and `length` how many tokens
  their canvas has; 0: that of the run.

  Raises:
    InputError: a value is not allowed, or ignored without a reward.
  """
  given = {
    'best_of': best_of,
    'num_refinements': num_refinements,
    'reward_temperature': temperature,
  }
  if not reward:
    for key, value in given.items():
      if value != (key == 'best_of'):
        raise InputError(f"{key}={value!r} is ignored with reward=''")
    return None
  if num_refinements and run.sampler.fills_room:
    raise InputError(
      f'num_refinements={num_refinements!r} must be 0 with sampler.name='
      f'{run.sampler_name!r}, which cannot draw parts of a text again'
    )
  settings = run.settings
  of_texts = rewards.make_reward(
    reward, settings.data, settings.train.reward_secs, 'reward'
  )
  return searches.Search(
    best_of,
    num_refinements,
    temperature,
    lambda rows, fixed: of_texts(*read_texts(run, rows, fixed, is_chat)),
    run.objective.sees_right(length or settings.sample_length),
  )


def without_room(
  run: Run, tokens: np.ndarray, fixed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Moves what is left of the room in gaps to the end of samples [..., n].

  Returns:
    The tokens, and `fixed`, True also where nothing was filled.
  """
  if not run.sampler.fills_room:
    return tokens, fixed
  is_room = ~fixed & (tokens == run.tokenizer.separator_id)
  order = np.argsort(is_room, axis=-1, kind='stable')
  take = lambda x: np.take_along_axis(x, order, axis=-1)
  return take(tokens), take(fixed | is_room)


def warn_of_full(
  run: Run, tokens: np.ndarray, canvas: np.ndarray, fixed: np.ndarray
):
  """Warns of gaps of any length that samples [N, n] fill to their last place.

  `canvas` and `fixed` are those of `lay_out`, [n].
  """
  if not run.sampler.fills_room:
    return
  is_room = ~fixed & (canvas == run.tokenizer.separator_id)
  borders = np.flatnonzero(np.diff(is_room)) + 1
  is_full = np.zeros(len(tokens), bool)
  for places in np.split(np.arange(len(fixed)), borders):
    if is_room[places[0]]:
      rows = tokens[:, places]
      is_full |= np.all(rows != run.tokenizer.separator_id, axis=1)
  if np.any(is_full):
    log.warning(
      f'{np.sum(is_full)} of {len(tokens)} samples fill a gap to the last of '
      f'its places: their texts may be cut; sampler.length={len(fixed)} should '
      'be larger'
    )


def answer_tokens(
  run: Run, tokens: np.ndarray, fixed: np.ndarray
) -> np.ndarray:
  """Returns the answer to messages in a sample [n], without its end."""
  answer = tokens[int(np.sum(fixed)) :]
  return answer[: prompts.find_end(answer, answer_ends(run))]


def answer_ends(run: Run) -> tuple[int, ...]:
  """Returns the tokens that end an answer to messages."""
  own = chat.make_format(run.tokenizer).end_id
  return own, *run.tokenizer.eos_ids, run.tokenizer.separator_id


def cut_windows(
  rows: Sequence[np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts rows of any length into windows of `size` tokens.

  Returns:
    tokens and is_text [M, size] of `pad`, and the row of each window, [M].
  """
  parts = [
    (i, row[first : first + size])
    for i, row in enumerate(rows)
    for first in range(0, len(row), size)
  ]
  owner = np.array([i for i, _ in parts], np.int64)
  return *pad([part for _, part in parts], size), owner


def pad(rows: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads ids with zeros, [N, size] int32; also returns which are ids, bool."""
  tokens = np.zeros((len(rows), size), np.int32)
  for padded, row in zip(tokens, rows):
    padded[: len(row)] = row
  ends = np.array([len(row) for row in rows], np.int32)
  return tokens, np.arange(size) < ends[:, None]


def make_batch(
  tokens: np.ndarray,
  eligible: np.ndarray,
  segment_ids: np.ndarray | None = None,
  index: np.ndarray | None = None,
) -> Batch:
  """Returns a batch of N texts to score, which lacks the number of bytes."""
  num = len(tokens)
  return Batch(
    tokens=np.asarray(tokens, np.int32),
    eligible=np.asarray(eligible, bool),
    weight=np.ones(num, np.float32),
    num_tokens=np.sum(eligible, axis=1, dtype=np.int32),
    num_bytes=np.zeros(num, np.int32),
    segment_ids=segment_ids,
    index=np.arange(num, dtype=np.int32) if index is None else index,
  )


def pad_rows(x: np.ndarray, num_rows: int) -> np.ndarray:
  """Pads x [n, ...] with zeros to `num_rows` rows."""
  return np.pad(x, ((0, num_rows - len(x)),) + ((0, 0),) * (x.ndim - 1))


def whole_batch(run: Run, x: np.ndarray) -> np.ndarray:
  """Pads x [n, ...] with zeros to a multiple of the mesh's batch shards."""
  shards = meshes.num_batch_shards(run.mesh)
  return pad_rows(x, -(-len(x) // shards) * shards)


def tokens_per_call(fixed: np.ndarray, num_calls: float) -> float:
  """Returns the tokens of a row that a call filled, on average; 0 without any.

  Args:
    fixed: [..., n] bool, the positions that were not filled.
    num_calls: `Samples.num_calls`; all calls of the batch count for each row.
  """
  num_free = fixed.shape[-1] - float(np.mean(np.sum(fixed, axis=-1)))
  return num_free / max(num_calls, 1)


# A sampler that Python asks for again has been compiled.
_make_kept_step = functools.lru_cache(16)(sample_steps.make_sample_step)


def make_fill(
  run: Run,
  batch_size: int = 0,
  view: watch.View | None = None,
  make_step: Callable[..., Any] = sample_steps.make_sample_step,
) -> Callable[..., tuple[np.ndarray, float]]:
  """Returns fill(params, key, tokens, fixed, segment_ids) -> (tokens, calls).

  Canvases tokens [N, n] int32, fixed [N, n] bool and segment_ids [N, n] int32,
  by default None, are NumPy arrays that are equal on all processes; see
  `Canvas`. `calls` is the mean number of network calls per batch.

  Args:
    run: the network and its sampler.
    batch_size: number of canvases per batch; 0 is all of them.
    view: observer of the network calls, which include padding rows, or None.
    make_step: `sample_steps.make_sample_step`, or what keeps its results.
  """
  mesh = run.mesh
  sample_step = make_step(run.scorer, run.sampler, mesh, view)
  gather = jax.jit(jnp.asarray, out_shardings=meshes.replicated(mesh))
  shards = meshes.num_batch_shards(mesh)

  def fill(
    params: Any,
    key: jax.Array,
    tokens: np.ndarray,
    fixed: np.ndarray,
    segment_ids: np.ndarray | None = None,
  ) -> tuple[np.ndarray, float]:
    is_masked = np.any(~fixed & (tokens == run.objective.mask_id))
    if is_masked and not run.sampler.fills_masks:
      raise InputError(
        f'sampler.name={run.sampler_name!r} fills gaps of any length, and not '
        'those of a given number of tokens'
      )
    guidance = run.settings.sampler['guidance']
    if segment_ids is not None and guidance and run.network.knows_time:
      raise InputError(
        f'sampler.guidance={guidance!r} must be 0 with '
        "data.padding='masked' and model.time_conditioning=True: the time of "
        'the call without a prompt would include the padding'
      )
    if segment_ids is not None and run.sampler.needs_cache:
      raise InputError(
        f'sampler.name={run.sampler_name!r} caches what it sees, and cannot '
        "hide padding as data.padding='masked' does; use another sampler"
      )
    size = -(-(batch_size or len(tokens)) // shards) * shards
    filled, calls = [], []
    countdown = progress.Countdown('sampling', -(-len(tokens) // size))
    for i, first in enumerate(range(0, len(tokens), size)):
      rows = pad_rows(tokens[first : first + size], size)
      # Padding rows have no free positions.
      free = pad_rows(~fixed[first : first + size], size)
      segments = segment_ids
      if segments is not None:
        segments = pad_rows(segments[first : first + size], size)
      canvas = meshes.shard_whole_batch(
        mesh, Canvas(rows, ~free, segment_ids=segments)
      )
      samples = sample_step(params, jax.random.fold_in(key, i), canvas)
      filled.append(jax.device_get(gather(samples.tokens)))
      calls.append(int(samples.num_calls))
      countdown.count()
    return np.concatenate(filled)[: len(tokens)], float(np.mean(calls))

  return fill


def make_score(
  run: Run,
  *,
  num_draws: int,
  batch_size: int,
  objective: Objective | None = None,
  call: Callable[..., Any] = _call,
) -> Callable[..., dict[str, np.ndarray]]:
  """Returns score(params, key, batch) -> values [N], for any N.

  The batch, with an index, has NumPy arrays that are equal on all processes.
  The values are those of `steps.evaluate.make_score_step`.

  Args:
    run: the network, objective and mesh.
    num_draws: noise draws per row.
    batch_size: rows per network call, rounded up to the mesh's batch shards.
    objective: the form of the objective; None is its evaluation form.
    call: runs the jitted function on its arguments.
  """
  if objective is None:
    objective = run.objective.evaluation()
  scorer = dataclasses.replace(run.scorer, objective=objective)
  score_step = evaluate_steps.make_score_step(
    scorer, run.mesh, num_draws=num_draws
  )

  def score(params: Any, key: jax.Array, batch: Batch) -> dict[str, np.ndarray]:
    step = lambda part: call(score_step, params, jax.random.clone(key), part)
    return map_batches(run, step, batch, batch_size)

  return score


def map_batches(
  run: Run, step: Callable[[Any], Any], rows: Any, batch_size: int
) -> Any:
  """Applies a step to N rows, `batch_size` at once; returns its values [N].

  `rows` is a pytree of NumPy arrays that are equal on all processes.
  `batch_size` is rounded up to the mesh's batch shards.
  """
  shards = meshes.num_batch_shards(run.mesh)
  batch_size = -(-batch_size // shards) * shards
  num, parts = len(jax.tree.leaves(rows)[0]), []
  countdown = progress.Countdown('scoring', -(-num // batch_size))
  for first in range(0, num, batch_size):
    cut = lambda x: pad_rows(x[first : first + batch_size], batch_size)
    part = meshes.shard_whole_batch(run.mesh, jax.tree.map(cut, rows))
    parts.append(jax.device_get(step(part)))
    countdown.count()
  return jax.tree.map(lambda *x: np.concatenate(x)[:num], *parts)
