"""Workdirs of runs that were never trained, made in a second."""

import dataclasses
import functools

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm.data import config as data_config
from nanodlm.data import overlap, prepare
from nanodlm.data.tokenizers.saved import save_tokenizer
from nanodlm.model import transformer
from nanodlm.training import checkpoint, optim
from nanodlm.training import state as states

LENGTH = 16
TEXT = 'The quick brown fox jumps over the lazy dog, and so on. \u00e9\n' * 60


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """config.data without the checks of its type."""

  source: str = ''
  eval_source: str = ''
  data_dir: str = ''
  length: int = 16
  eval_fraction: float = 0.1
  eval_tokens: int = 0
  test_tokens: int = 0
  crop: str = 'chunk'
  long_documents: str = 'drop'
  segment_ids: bool = False
  padding: str = 'eos'
  clean_prefix_rate: float = 0.0
  clean_infill_rate: float = 0.0
  num_threads: int = 0
  prefetch_batches: int = 2

  is_pairs = data_config.DataConfig.is_pairs
  is_chat = data_config.DataConfig.is_chat
  num_alternatives = data_config.DataConfig.num_alternatives
  fills_rows = data_config.DataConfig.fills_rows
  has_documents = data_config.DataConfig.has_documents


def make_workdir(folder, *, scale=3.0, text=TEXT, **changes):
  """Writes a run of step 0 into `folder` and returns its path.

  Args:
    folder: a pathlib.Path; the text and the prepared data lie there too.
    scale: of the initial parameters; 0 makes all tokens equally probable.
    text: of the training file.
    **changes: of its config, as objective__name='ar'.
  """
  folder.mkdir(parents=True, exist_ok=True)
  source = folder / 'text.txt'
  source.write_text(text)
  config = configs.load()
  config.data.update(
    source=f'text:{source}',
    length=LENGTH,
    eval_fraction=0.3,
    data_dir=str(folder / 'data'),
  )
  config.model.update(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, unroll=True
  )
  config.eval.update(num_draws=2, batch_size=16)
  for key, value in changes.items():
    section, _, leaf = key.partition('__')
    config[section][leaf] = value
  if config.objective.name != 'ar':
    config.sampler.num_steps = 4
  settings = configs.make_settings(config)
  packed = prepare.prepare(settings.data, settings.tokenizer)
  run = runs.make_run(settings, devices=jax.devices()[:1], refit=True)
  run = run.with_tokenizer(packed.tokenizer)
  optimizer = optim.make_optimizer(settings.optim, 1)
  state = states.init_state(
    run.network, run.objective, optimizer, 0, use_ema=False
  )
  state = state.replace(params=jax.tree.map(lambda x: scale * x, state.params))
  workdir = folder / 'run'
  workdir.mkdir()
  (workdir / 'config.json').write_text(settings.to_json())
  save_tokenizer(packed.tokenizer, workdir)
  overlap.remember(str(workdir), packed)
  with checkpoint.open_manager(str(workdir)) as manager:
    checkpoint.save(
      manager,
      state,
      settings.to_dict(),
      {'step': 0, 'example': 0, 'fingerprint': packed.fingerprint},
    )
    checkpoint.wait(manager)
  return str(workdir)


def log_probs(run, params, tokens):
  """The network's log-probabilities of a whole row, [L, V], float64."""
  logits = _logits(
    run.network.config, params, np.asarray(tokens, np.int32)[None]
  )
  logits = np.asarray(logits, np.float64)[0, :, : run.tokenizer.mask_id]
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  hidden = transformer.Transformer(config).apply(
    {'params': params}, tokens, np.zeros(1)
  )
  return transformer.output_logits(transformer.output_kernel(params), hidden)
