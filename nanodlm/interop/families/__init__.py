"""Families of published checkpoints by name: one file each, one line here.

A family is a module of three functions, and two more where runs can be exported
in its form:

  detect(config, names) -> bool: whether a checkpoint is of it; `config` is its
    config.json ({} where there is none), `names` the names of its tensors (in
    `describe` the keys of a dict of their shapes).
  describe(config, names) -> layout.Description: our settings for it. Raises
    InputError naming what it has and our network has not.
  layout(network, names) -> layout.Layout: the mapping, for the `ModelConfig`
    that those settings make.

  tokenizer_json(folder) -> dict: the content of a tokenizer.json for a folder that
    has none, or None. Only where a family publishes another form.

  misfit(network, objective) -> str: what of one of OUR networks, with that
    objective.name, it cannot express; '' where it fits.
  to_config(network, export) -> dict: the config.json of an export; `export` is a
    `layout.Export`.

Modules here import `layout`, `types` and each other, nothing of the network.
"""

from nanodlm.interop.families import (
  bd3lm,
  dream,
  duo,
  gidd,
  gpt2,
  llada,
  llama,
  md4,
  mdlm,
  native,
  qwen2,
  qwen3,
  sedd,
)

# An export takes the first that fits, in this order.
FAMILIES = {
  'gpt2': gpt2,
  'llama': llama,
  'qwen2': qwen2,
  'qwen3': qwen3,
  'llada': llada,
  'dream': dream,
  'mdlm': mdlm,
  'bd3lm': bd3lm,
  'sedd': sedd,
  'duo': duo,
  'gidd': gidd,
  'md4': md4,
  'nanodlm': native,
}
