"""English that ships with CPython: about 2 MB, without a download."""

import ast
from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import os
import pathlib
import sys
import sysconfig
from typing import Any
import warnings

from nanodlm.data.sources import base

# Folders of the standard library without prose of their own: tests, programs,
# third-party packages, and tables.
_SKIPPED_FOLDERS = frozenset(
  'site-packages dist-packages test tests idlelib lib2to3 turtledemo ensurepip '
  'pydoc_data encodings lib-dynload __pycache__'.split()
)
_MIN_DOCSTRING_CHARS = 40
_MIN_TEXT_CHARS = 200


@dataclasses.dataclass(frozen=True)
class EmbeddedSource(base.Source):
  """The texts of this Python; another version of Python has other texts.

  They are the language reference that pydoc prints (one document per topic),
  then the docstrings of the standard library (one document per module). The
  library's files are parsed, never imported.
  """

  forms = ('embedded',)

  @classmethod
  def make(cls, spec: str, name: str, data_dir: str) -> 'EmbeddedSource':
    del name, data_dir
    return cls(spec)

  def fingerprint(self) -> str:
    files = [(name, os.path.getsize(path)) for name, path in _stdlib_files()]
    return hashlib.sha256(repr((sys.version, files)).encode()).hexdigest()

  def parts(self, split: str) -> Iterator[base.Part]:
    del split
    yield ()

  def read(self, part: base.Part) -> Iterator[base.Document]:
    return map(base.document_of, embedded_texts())


@functools.cache  # Parsing takes about 4 seconds.
def embedded_texts() -> tuple[str, ...]:
  """Returns the embedded documents, in order."""
  from pydoc_data import topics

  texts = [text.strip() + '\n' for _, text in sorted(topics.topics.items())]
  texts.extend(_docstrings(path) for _, path in _stdlib_files())
  return tuple(text for text in texts if len(text) >= _MIN_TEXT_CHARS)


def _stdlib_files() -> Iterator[tuple[str, str]]:
  """Yields (relative name, path) of the standard library's modules, sorted."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
    for name in sorted(names):
      path = pathlib.Path(folder, name)
      if path.suffix == '.py':
        yield path.relative_to(root).as_posix(), str(path)


def _docstrings(path: str) -> str:
  """Returns all docstrings of a Python file, cleaned, in order."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Some modules contain invalid escapes.
    tree = ast.parse(pathlib.Path(path).read_bytes())
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
  owners: list[Any] = [
    node for node in ast.walk(tree) if isinstance(node, kinds)
  ]
  owners.sort(key=lambda node: getattr(node, 'lineno', 0))
  texts = [(ast.get_docstring(node) or '').strip() for node in owners]
  # dict.fromkeys keeps the same docstring of several methods once.
  long = [t for t in dict.fromkeys(texts) if len(t) >= _MIN_DOCSTRING_CHARS]
  return ''.join(text + '\n\n' for text in long)
