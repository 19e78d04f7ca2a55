"""The reference of the API: every public name is documented, and it renders."""

import functools
import importlib
import inspect
import pkgutil
import re

import pytest

import nanodlm
from nanodlm.interop import families

MODULES = [
  'nanodlm',
  *sorted(
    module.name
    for module in pkgutil.walk_packages(nanodlm.__path__, 'nanodlm.')
  ),
]


def members_of(module):
  """(name, object) of a module's own public functions, classes and their members."""
  for name, value in vars(module).items():
    if (
      name.startswith('_')
      or getattr(value, '__module__', '') != module.__name__
    ):
      continue
    if not (inspect.isclass(value) or inspect.isroutine(value)):
      continue
    yield name, value
    for key in vars(value) if inspect.isclass(value) else ():
      member = inspect.getattr_static(value, key)
      if not key.startswith('_') and (
        inspect.isroutine(member) or isinstance(member, property)
      ):
        yield f'{name}.{key}', getattr(value, key)


@functools.cache
def names_of_protocols():
  """What any protocol documents: its implementations need not say it again."""
  return {
    name.partition('.')[2]
    for module in map(importlib.import_module, MODULES)
    for name, value in members_of(module)
    if '.' in name
    and getattr(vars(module)[name.partition('.')[0]], '_is_protocol', False)
    and inspect.getdoc(value)
  }


def functions_of_a_family(module):
  """What `families` documents once, of a module in its table."""
  if module not in families.FAMILIES.values():
    return set()
  return set(re.findall(r'^  (\w+)\(', families.__doc__, re.M))


@pytest.mark.parametrize('name', MODULES)
def test_public_names_have_docstrings(name):
  module = importlib.import_module(name)
  assert module.__doc__, name
  # A method may have its base's, or its protocol's.
  assert not [
    member
    for member, value in members_of(module)
    if not inspect.getdoc(value)
    and member.partition('.')[2] not in names_of_protocols()
    and member not in functions_of_a_family(module)
  ]


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  """The README's command: `pdoc nanodlm -d google -o docs/api`."""
  pdoc = pytest.importorskip('pdoc')
  pdoc.render.configure(docformat='google')
  folder = tmp_path_factory.mktemp('api')
  pdoc.pdoc('nanodlm', output_directory=folder)
  return folder


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
