"""Rewards: what texts are worth, by Python functions or by their source's law.

    config.train.reward = 'law:valid'
    config.train.reward = '0.5*my_rewards:brevity+my_rewards:is_solved'

is a sum of functions, each perhaps with a weight. A function takes the texts
and the prompts, two lists of strings, and returns a number for each text:

    def brevity(texts, prompts):
      return [-len(text) / 100 for text in texts]

A text contains its prompt, which is what is before the first gap; for what
follows it, write text.removeprefix(prompt). The module is found as by `import`,
also in the current folder. The same texts must get the same numbers, or a run
cannot be resumed bit for bit. If the law of data.source is known,

    law:valid       is 1 for a possible text, else 0;
    law:log_prob    is log p(text) in nats, at least MIN_LOG_PROB.
"""

from collections.abc import Callable, Sequence
import dataclasses
import importlib
import os
import re
import sys
import threading
import traceback
from typing import Any

import numpy as np

from nanodlm import laws
from nanodlm.data.config import DataConfig
from nanodlm.devices import multihost
from nanodlm.types import InputError, Law

# The log-probability of a text that is impossible, or less probable. A reward
# must be finite: the mean of a group has to be.
MIN_LOG_PROB = -100.0
_LAW = 'law'

Function = Callable[[list[str], list[str]], Any]


@dataclasses.dataclass(frozen=True)
class Reward:
  """A weighted sum of reward functions.

  Attributes:
    parts: the weight, name and function of each.
    max_secs: the longest that a call of one may take.
    key: the setting that names them, for errors.
  """

  parts: tuple[tuple[float, str, Function], ...]
  max_secs: float
  key: str

  def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
    """Returns the rewards of texts, [N] float32, computed by process 0.

    Raises:
      InputError: a function raised an error, took too long, or did not return
        a finite number for each text.
    """

    def total():
      values = [
        weight * self._call(name, function, texts, prompts)
        for weight, name, function in self.parts
      ]
      with np.errstate(over='ignore'):
        total = np.sum(values, axis=0).astype(np.float32)
      if not np.isfinite(total).all():
        raise InputError(
          f'{self.key}: {[name for _, name, _ in self.parts]} add up to '
          f'numbers beyond float32, such as {np.sum(values, axis=0).max():g}'
        )
      return total

    return multihost.on_process_0(total, np.zeros(len(texts), np.float32))

  def _call(
    self,
    name: str,
    function: Function,
    texts: Sequence[str],
    prompts: Sequence[str],
  ) -> np.ndarray:
    outcome = {}

    def work():
      try:
        outcome['values'] = function(list(texts), list(prompts))
      # It is the user's code, which may also call sys.exit.
      except BaseException as error:
        outcome['error'] = error

    # Python cannot end a thread; a daemon does not keep the program alive.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(self.max_secs)
    where = f'{self.key}: {name!r}'
    if not outcome:
      raise InputError(
        f'{where} took more than {self.max_secs:g} s for {len(texts)} texts; '
        'raise train.reward_secs, or make it faster'
      )
    if error := outcome.get('error'):
      frame = traceback.extract_tb(error.__traceback__)[-1]
      raise InputError(
        f'{where} raised {type(error).__name__}: {error} ({frame.filename}, '
        f'line {frame.lineno})'
      ) from error
    try:
      values = np.asarray(outcome['values'], np.float64)
    except (TypeError, ValueError) as error:
      raise InputError(
        f'{where} must return a list of numbers: {error}'
      ) from error
    if values.shape != (len(texts),):
      raise InputError(
        f'{where} must return {len(texts)} numbers, one for each text; what it '
        f'returned has the shape {values.shape}'
      )
    if not np.isfinite(values).all():
      i = int(np.argmin(np.isfinite(values)))
      raise InputError(
        f'{where} must return finite numbers; it returned {values[i]} for '
        f'{texts[i]!r}'
      )
    return values


def make_reward(
  spec: str, data: DataConfig, max_secs: float, key: str = 'train.reward'
) -> Reward:
  """Finds the functions of a reward.

  Args:
    spec: see above.
    data: `config.data`, whose law the reward may use.
    max_secs: the longest that a call of a function may take.
    key: the setting whose value `spec` is.

  Raises:
    InputError: it is not in the form above, or there is no such function.
  """
  parts = []
  for item in re.split(r'(?<!\d[eE])\+', spec):
    number, star, name = item.rpartition('*')
    try:
      weight = float(number) if star else 1.0
    except ValueError:
      weight = np.nan
    module, colon, attribute = name.strip().partition(':')
    if not np.isfinite(weight) or not (module and colon and attribute):
      raise InputError(
        f"{key}={spec!r}: {item!r} is not 'MODULE:FUNCTION' or "
        "'WEIGHT*MODULE:FUNCTION', such as '0.5*my_rewards:brevity+law:valid'"
      )
    where = f'{key}={spec!r}'
    if module == _LAW:
      function = _of_law(laws.require_law(data), attribute, where)
    else:
      function = _find(module, attribute, where)
    parts.append((weight, name.strip(), function))
  return Reward(tuple(parts), max_secs, key)


def _find(name: str, attribute: str, where: str) -> Function:
  """Returns a function of a module that can be imported."""
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    module = importlib.import_module(name)
  # It is the user's code.
  except Exception as error:
    raise InputError(
      f'{where}: the module {name!r} cannot be imported: '
      f'{type(error).__name__}: {error}'
    ) from error
  function = getattr(module, attribute, None)
  if not callable(function):
    known = sorted(
      key for key, x in vars(module).items() if callable(x) and key[0] != '_'
    )
    raise InputError(
      f'{where}: the module {name!r} lacks a function {attribute!r}; it has '
      f'{known}'
    )
  return function


def _of_law(law: Law, attribute: str, where: str) -> Function:
  """Returns a reward function of the law of the text."""

  def valid(texts, prompts):
    del prompts
    return [float(law.explain(text) is None) for text in texts]

  def log_prob(texts, prompts):
    del prompts
    return [max(law.log_prob(text), MIN_LOG_PROB) for text in texts]

  functions = {'valid': valid, 'log_prob': log_prob}
  if attribute not in functions:
    raise InputError(
      f'{where}: {_LAW}:{attribute} is not one of '
      f'{[f"{_LAW}:{x}" for x in functions]}'
    )
  return functions[attribute]
