"""Jinja templates of unknown origin, in Jinja's sandbox, with limits.

A template can neither reach Python's objects nor read files. All its loops and
calls of macros together take MAX_STEPS steps at most; neither what it writes,
nor what an operator, a method or a filter makes of a text, is longer than
MAX_SIZE; and it ends MAX_SECS after its start, or one operation later.
"""

from collections.abc import Callable, Iterator
import contextvars
import functools
import math
import re
import time
import types
from typing import Any

from jinja2 import nodes, sandbox, visitor

MAX_STEPS = 100_000
MAX_SIZE = 2_000_000
# A conversation of 20 messages takes less than a millisecond.
MAX_SECS = 5.0
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
    self._left = MAX_STEPS
    self._end = time.monotonic() + MAX_SECS

  def take(self, num: int = 0):
    """Takes steps; raises Excess if there are too few, or the time is over."""
    self._left -= num
    if self._left < 0:
      raise Excess(f'it loops more than {MAX_STEPS:,} times')
    if time.monotonic() > self._end:
      raise Excess(f'it takes more than {MAX_SECS:g} seconds')

  def range(self, *args: int) -> range:
    """The function range() of a template."""
    numbers = range(*args)
    self.take(len(numbers))
    return numbers


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar('budget')


def _size(value: Any) -> int:
  """Returns what a value can contribute to the length of a text."""
  if isinstance(value, int):
    return abs(value)
  if isinstance(value, list | tuple):
    return sum(len(x) if isinstance(x, str) else 1 for x in value)
  return len(value) if isinstance(value, str) else 1


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
    return _timed_items(made) if isinstance(made, types.GeneratorType) else made

  return call


def _timed_items(items: Iterator[Any]) -> Iterator[Any]:
  for item in items:
    _budget.get().take()
    yield item


def _narrow(to_json: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(to_json)
  def call(context, value, indent=None):
    if indent is not None and not 0 <= int(indent) <= 100:
      raise Excess(f'it indents JSON by {indent!r}; at most 100 is allowed')
    return to_json(context, value, indent)

  return call


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


class _Limits(visitor.NodeTransformer):
  """Adds the limits to a template."""

  def _count(self, num: int) -> nodes.Expr:
    function = nodes.EnvironmentAttribute('count')
    return nodes.Call(function, [nodes.Const(num)], [], None, None)

  def visit_For(self, node: Any) -> Any:
    node = self.generic_visit(node)
    node.body.insert(0, nodes.Output([self._count(1)]))
    return node

  visit_Macro = visit_CallBlock = visit_For

  def visit_Compare(self, node: Any) -> Any:
    return nodes.Or(self._count(0), self.generic_visit(node))

  def visit_Concat(self, node: Any) -> Any:
    node = self.generic_visit(node)
    parts = [nodes.Filter(x, 'string', [], [], None, None) for x in node.nodes]
    return functools.reduce(nodes.Add, parts)


class Template:
  """A compiled template; raises a jinja2.TemplateError if it is not one."""

  def __init__(self, text: str):
    environment = _Environment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
    )
    environment.globals['raise_exception'] = _refuse
    filters = environment.filters
    filters |= {name: _limited(filters[name]) for name in _GROWING}
    filters['tojson'] = _narrow(filters['tojson'])
    for name in _SLOW:
      del filters[name]
    filters |= {name: _timed(function) for name, function in filters.items()}
    del environment.globals['lipsum']
    tree = _Limits().visit(environment.parse(text))
    tree.set_environment(environment)
    for node in tree.find_all(nodes.Node):
      node.lineno = node.lineno or 1
    self._template = environment.from_string(tree)

  def render(self, **values: Any) -> str:
    """Returns the text; the template raises whatever Python can."""
    budget, size, parts = _Budget(), 0, []
    token = _budget.set(budget)
    try:
      for part in self._template.generate({**values, 'range': budget.range}):
        size += len(part)
        _check(size)
        parts.append(part)
    finally:
      _budget.reset(token)
    return ''.join(parts)


def _refuse(message: str) -> None:
  raise Refusal(message)
