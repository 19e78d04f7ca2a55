"""HTML pages: those that come with the package, and files written by users."""

import functools
import html
import importlib.resources
import os
import pathlib
import re

from nanodlm import workdir as workdirs
from nanodlm.types import InputError, reason

_SHARED = re.compile(r'/\*(\w+\.(?:css|js))\*/\n')
# Characters that XML and HTML do not allow, and unpaired surrogates.
_UNPRINTABLE = re.compile(
  r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]'
)


@functools.cache
def read(name: str, package: str = 'nanodlm.show') -> str:
  """Returns a page; `/*FILE*/` lines are styles and scripts of this folder."""
  shared = importlib.resources.files('nanodlm.show')
  page = importlib.resources.files(package) / name
  return _SHARED.sub(
    lambda line: (shared / line[1]).read_text('utf-8'), page.read_text('utf-8')
  )


def printable(text: str) -> str:
  """Replaces characters that a page cannot hold by U+FFFD."""
  return _UNPRINTABLE.sub('\ufffd', text)


def escape(text: str) -> str:
  """Escapes text for an element or an attribute of HTML or XML."""
  return html.escape(printable(text))


def has_mark(path: pathlib.Path, mark: str) -> bool:
  """Whether a file has the mark of generated pages in its first 1,024 bytes."""
  try:
    with open(path, 'rb') as file:
      return mark.encode() in file.read(1024)
  except OSError:
    return False


def check_path(flag: str, path: pathlib.Path, mark: str):
  """Checks that a page can be written to the path that a flag names.

  A file with the `mark` may be replaced, see `has_mark`, any other may not.

  Raises:
    InputError: the page cannot be written there.
  """
  named = f'{flag}={str(path)!r}'
  if path.is_dir() or not path.resolve().parent.is_dir():
    raise InputError(f'{named} must be a file in a folder that exists')
  if not os.access(path.resolve().parent, os.W_OK):
    raise InputError(f'{named} cannot be written: its folder is read-only')
  if path.exists() and not has_mark(path, mark):
    raise InputError(
      f'{named} exists and is not an earlier page of this command; give '
      'another file name'
    )


def write(flag: str, path: pathlib.Path, text: str):
  """Writes a page, whole or not at all.

  Raises:
    InputError: the file cannot be written.
  """
  try:
    workdirs.write(path, text)
  except OSError as error:
    raise InputError(
      f'{flag}={str(path)!r} cannot be written: {reason(error)}'
    ) from error
