"""Jinja templates of unknown origin, in Jinja's sandbox, with limits.

A template can neither reach Python's objects nor read files. All its loops and
calls of macros together take MAX_STEPS steps at most; and neither what it
writes, nor what an operator, a method or a filter makes of a text, is longer
than MAX_SIZE.
"""

from collections.abc import Callable
import functools
import math
import re
import types
from typing import Any

from jinja2 import nodes, sandbox, visitor

MAX_STEPS = 100_000
MAX_SIZE = 10_000_000
# Filters, and methods of texts, whose result may be longer than what they are
# given.
_GROWING = ('batch', 'center', 'indent', 'join', 'replace', 'slice', 'wordwrap')
_GROWING_METHODS = (
  *('center', 'expandtabs', 'join', 'ljust', 'replace', 'rjust', 'translate'),
  'zfill',
)
# Where the values of a template have its `_Budget`; not a name in a template.
_BUDGET = ' budget'


class Refusal(Exception):
  """What a template raises with raise_exception()."""


class Excess(Exception):
  """A template has exceeded a limit."""


class _Budget:
  """The steps that one rendering has left."""

  def __init__(self):
    self._left = MAX_STEPS

  def take(self, num: int = 1):
    """Takes steps; raises Excess if there are too few."""
    self._left -= num
    if self._left < 0:
      raise Excess(f'it loops more than {MAX_STEPS:,} times')

  def range(self, *args: int) -> range:
    """The function range() of a template."""
    numbers = range(*args)
    self.take(len(numbers))
    return numbers


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

  def count(self, context: Any) -> str:
    """Counts a step of a loop, or a call of a macro."""
    context.parent[_BUDGET].take()
    return ''


class _Limits(visitor.NodeTransformer):
  """Adds the limits to a template."""

  def visit_For(self, node: Any) -> Any:
    function = nodes.EnvironmentAttribute('count')
    count = nodes.Call(function, [nodes.ContextReference()], [], None, None)
    node.body.insert(0, nodes.Output([count]))
    return self.generic_visit(node)

  visit_Macro = visit_CallBlock = visit_For

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
    del filters['format'], environment.globals['lipsum']
    filters['tojson'] = _narrow(filters['tojson'])
    tree = _Limits().visit(environment.parse(text))
    tree.set_environment(environment)
    for node in tree.find_all(nodes.Node):
      node.lineno = node.lineno or 1
    self._template = environment.from_string(tree)

  def render(self, **values: Any) -> str:
    """Returns the text; the template raises whatever Python can."""
    budget, size, parts = _Budget(), 0, []
    values |= {_BUDGET: budget, 'range': budget.range}
    for part in self._template.generate(values):
      size += len(part)
      _check(size)
      parts.append(part)
    return ''.join(parts)


def _refuse(message: str) -> None:
  raise Refusal(message)
