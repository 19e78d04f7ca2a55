"""The HTML pages that come with the package, each whole in itself."""

import functools
import importlib.resources
import re

_SCRIPT = re.compile(r'/\*(\w+\.js)\*/\n')


@functools.cache
def read(name: str) -> str:
  """A page, with each line `/*FILE.js*/` replaced by that script."""
  files = importlib.resources.files('nanodlm.show')
  return _SCRIPT.sub(
    lambda line: (files / line[1]).read_text('utf-8'),
    (files / name).read_text('utf-8'),
  )
