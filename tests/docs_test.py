"""The reference of the API: every public name is documented, and it renders."""

import importlib
import inspect
import pkgutil
import re

import pytest

import nanodlm
from nanodlm import types

MODULES = [
  'nanodlm',
  *sorted(
    module.name
    for module in pkgutil.walk_packages(nanodlm.__path__, 'nanodlm.')
    if not module.name.endswith('__main__')
  ),
]


def is_function(value):
  return inspect.isroutine(value) or isinstance(value, property)


def is_documented(cls, key):
  """Whether a class itself documents a member, if only as an attribute."""
  attributes = re.findall(r'^ +(\w+):', cls.__doc__ or '', re.M)
  value = vars(cls).get(key)
  return key in attributes or is_function(value) and bool(inspect.getdoc(value))


def undocumented(module):
  """Names of a module's own public functions, classes and their members.

  A member may have the docstring of a base class or of a protocol.
  """
  protocols = [
    value
    for name, value in {**vars(types), **vars(module)}.items()
    if getattr(value, '_is_protocol', False)
  ]
  for name, value in vars(module).items():
    is_own = getattr(value, '__module__', '') == module.__name__
    if name.startswith('_') or not is_own:
      continue
    if not (inspect.isclass(value) or inspect.isroutine(value)):
      continue
    if not inspect.getdoc(value):
      yield name
    for key, member in vars(value).items() if inspect.isclass(value) else ():
      if not key.startswith('_') and is_function(member):
        bases = (*value.__mro__, *protocols)
        if not any(is_documented(base, key) for base in bases):
          yield f'{name}.{key}'


@pytest.mark.parametrize('name', MODULES)
def test_public_names_have_docstrings(name):
  module = importlib.import_module(name)
  assert module.__doc__, name
  assert not list(undocumented(module))


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  """The README's command: `pdoc nanodlm -d google -o docs/api`."""
  pdoc = pytest.importorskip('pdoc')
  pdoc.render.configure(docformat='google')
  folder = tmp_path_factory.mktemp('api')
  pdoc.pdoc('nanodlm', output_directory=folder)
  return folder


@pytest.mark.slow
def test_reference_renders(pages):
  for name in MODULES:
    page = pages / f'{name.replace(".", "/")}.html'
    docs = re.findall(
      r'<div class="docstring">(.*?)</div>', page.read_text(), re.DOTALL
    )
    assert docs, name
    for text in docs:
      # A section that was not recognised stays text; underscores and stars that
      # were taken for emphasis.
      assert not re.search(
        r'(Args|Returns|Raises|Attributes|Yields):\s', text
      ), f'{name}: {text}'
      assert '<em>' not in text, f'{name}: {text}'
