"""Jinja templates of unknown origin, in Jinja's sandbox, with limits.

A template can neither reach Python's objects nor read files. All its loops and
calls of macros together take MAX_STEPS steps at most. No list, and nothing that
an operator, a method or a filter makes, is longer than MAX_SIZE; all that is
written, and the items of all lists that filters make, together not longer than
MAX_WRITTEN. It ends after MAX_SECS of processor time, or one operation later.
"""

from collections.abc import Callable, Iterator
import contextvars
import functools
import json
import math
import re
import time
import types
from typing import Any

from jinja2 import nodes, sandbox, visitor

MAX_STEPS = 100_000
MAX_SIZE = 2_000_000
MAX_WRITTEN = 5 * MAX_SIZE
# A conversation of 20 messages takes less than a millisecond.
MAX_SECS = 5.0
# Published templates have up to 20,000 characters.
MAX_LENGTH = 100_000
# Filters, and methods of texts, whose result may be longer than what they are
# given.
_GROWING = ('batch', 'center', 'indent', 'join', 'replace', 'slice', 'wordwrap')
_GROWING_METHODS = (
  *('center', 'expandtabs', 'join', 'ljust', 'replace', 'rjust', 'translate'),
  'zfill',
)
# Filters without a use here, whose time grows faster than their text.
_SLOW = ('format', 'pprint', 'striptags', 'urlize')


class Refusal(Exception):
  """What a template raises with raise_exception()."""


class Excess(Exception):
  """A template has exceeded a limit."""


class _Budget:
  """The steps and the time that one rendering has left."""

  def __init__(self):
    self._left, self._written = MAX_STEPS, MAX_WRITTEN
    self._end = time.thread_time() + MAX_SECS

  def take(self, num: int = 0):
    """Takes steps; raises Excess if there are too few, or the time is over."""
    self._left -= num
    if self._left < 0:
      raise Excess(f'it loops more than {MAX_STEPS:,} times')
    if time.thread_time() > self._end:
      raise Excess(f'it takes more than {MAX_SECS:g} seconds')

  def write(self, num: int):
    """Counts characters or items; raises Excess if there are too many."""
    self._written -= num
    if self._written < 0:
      raise Excess(f'it writes more than {MAX_WRITTEN:,} characters')
    self.take()

  def range(self, *args: int) -> range:
    """The function range() of a template."""
    numbers = range(*args)
    self.take(len(numbers))
    return numbers


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar('budget')


def _size(value: Any) -> int:
  """Returns what a value can contribute to the length of a text."""
  return abs(value) if isinstance(value, int) else _length(value, {})


def _length(value: Any, known: dict[int, int]) -> int:
  """Returns the length of a text, or of all in a container.

  `known` are the lengths of containers by id(), of which one may hold many
  times the same.
  """
  if isinstance(value, dict):
    value = [*value, *value.values()]
  elif not isinstance(value, list | tuple):
    return len(value) if isinstance(value, str) else 1
  elif id(value) in known:
    return known[id(value)]
  known[id(value)] = sum(_length(x, known) for x in value) + 1
  return known[id(value)]


def _check(size: int):
  if size > MAX_SIZE:
    raise Excess(f'it makes a value of more than {MAX_SIZE:,} characters')


def _check_product(*values: Any):
  """Raises Excess if what a function makes of values may be too long."""
  _check(math.prod(max(_size(x), 1) for x in values))


def _check_widths(form: Any):
  """Raises Excess if fields of a format string may be too long."""
  if isinstance(form, str) and (
    '*' in form or sum(map(int, re.findall(r'\d{1,8}', form))) > 1000
  ):
    raise Excess('it formats a text with the width of a field')


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(function)
  def call(*args, **kwargs):
    _check_product(*args, *kwargs.values())
    return function(*args, **kwargs)

  return call


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(function)
  def call(*args, **kwargs):
    _budget.get().take()
    made = function(*args, **kwargs)
    if isinstance(made, list):
      _budget.get().write(len(made))
    return _timed_items(made) if isinstance(made, types.GeneratorType) else made

  return call


def _timed_items(items: Iterator[Any]) -> Iterator[Any]:
  for item in items:
    _budget.get().take()
    yield item


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: Any = None,
  **options: Any,
) -> str:
  """Writes JSON as transformers does, without escapes for HTML."""
  if indent is not None and not 0 <= int(indent) <= 100:
    raise Excess(f'it indents JSON by {indent!r}; at most 100 is allowed')
  if unknown := options.keys() - {'sort_keys'}:
    raise TypeError(f'tojson does not take {sorted(unknown)}')
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    **options,
  )


class _Environment(sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset(['+', '*', '**', '%'])

  def call_binop(self, context, operator, left, right):
    _budget.get().take()
    if operator == '+':
      if not isinstance(left, int):
        _check(_size(left) + _size(right))
    elif operator == '%':
      _check_widths(left)
    elif operator == '**':
      raise Excess('it takes a power, which may be large')
    else:
      _check_product(left, right)
    return super().call_binop(context, operator, left, right)

  def call(self, context, function, *args, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
    _budget.get().take()
    if (
      isinstance(function, types.BuiltinMethodType)
      and function.__name__ in _GROWING_METHODS
    ):
      _check_product(function.__self__, *args, *kwargs.values())
    return super().call(context, function, *args, **kwargs)

  def wrap_str_format(self, value):
    wrapped = super().wrap_str_format(value)
    if wrapped is not None:
      _check_widths(value.__self__)
    return wrapped

  def count(self, num: int) -> str:
    """Takes steps from the budget, which ends what costs too much."""
    _budget.get().take(num)
    return ''

  def write(self, value: Any) -> str:
    """Returns the text of a value that is written, and counts it."""
    text = str(value)
    _budget.get().write(len(text))
    return text

  def count_text(self, num: int) -> str:
    """Counts characters of the template itself that are written."""
    _budget.get().write(num)
    return ''

  def measure(self, value: Any) -> Any:
    """Returns a container; raises Excess if it holds too much."""
    _check(_length(value, {}))
    return value


class _Limits(visitor.NodeTransformer):
  """Adds the limits to a template."""

  def _call(self, name: str, argument: Any) -> Any:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, [argument], [], None, None)

  def _count(self, num: int) -> Any:
    return self._call('count', nodes.Const(num))

  def visit_For(self, node: Any) -> Any:
    node = self.generic_visit(node)
    node.body.insert(0, nodes.Output([self._count(1)]))
    return node

  visit_Macro = visit_CallBlock = visit_For

  def visit_Compare(self, node: Any) -> Any:
    return nodes.Or(self._count(0), self.generic_visit(node))

  def visit_Getitem(self, node: Any) -> Any:
    is_slice = isinstance(node.arg, nodes.Slice)
    node = self.generic_visit(node)
    return nodes.Or(self._count(0), node) if is_slice else node

  def visit_List(self, node: Any) -> Any:
    return self._call('measure', self.generic_visit(node))

  visit_Dict = visit_List

  def visit_Tuple(self, node: Any) -> Any:
    node = self.generic_visit(node)
    return self._call('measure', node) if node.ctx == 'load' else node

  def visit_Output(self, node: Any) -> Any:
    node = self.generic_visit(node)
    is_text = [isinstance(x, nodes.TemplateData) for x in node.nodes]
    num = sum(len(x.data) for x, own in zip(node.nodes, is_text) if own)
    node.nodes = [
      x if own else self._call('write', x)
      for x, own in zip(node.nodes, is_text)
    ]
    if num:
      node.nodes.insert(0, self._call('count_text', nodes.Const(num)))
    return node

  def visit_Concat(self, node: Any) -> Any:
    node = self.generic_visit(node)
    parts = [nodes.Filter(x, 'string', [], [], None, None) for x in node.nodes]
    return functools.reduce(nodes.Add, parts)


class Template:
  """A compiled template; raises a jinja2.TemplateError if it is not one."""

  def __init__(self, text: str):
    if len(text) > MAX_LENGTH:
      raise Excess(f'{len(text):,} characters, of at most {MAX_LENGTH:,}')
    environment = _Environment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
    )
    environment.globals['raise_exception'] = _refuse
    filters = environment.filters
    filters |= {name: _limited(filters[name]) for name in _GROWING}
    filters['tojson'] = _to_json
    for name in _SLOW:
      del filters[name]
    for functions in filters, environment.tests:
      functions |= {name: _timed(x) for name, x in functions.items()}
    del environment.globals['lipsum']
    tree = _Limits().visit(environment.parse(text))
    tree.set_environment(environment)
    for node in tree.find_all(nodes.Node):
      node.lineno = node.lineno or 1
    self._template = environment.from_string(tree)

  def render(self, **values: Any) -> str:
    """Returns the text; the template raises whatever Python can."""
    token = _budget.set(budget := _Budget())
    try:
      parts = self._template.generate({**values, 'range': budget.range})
      return ''.join(parts)
    finally:
      _budget.reset(token)


def _refuse(message: str) -> None:
  raise Refusal(message)
