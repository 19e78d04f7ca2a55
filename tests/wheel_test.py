"""The wheel has every module, page and config, and works on its own."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'
FOLDERS = 'nanodlm', 'configs'


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder with the content of the wheel."""
  pytest.importorskip('setuptools')
  folder = tmp_path_factory.mktemp('wheel')
  # A copy, since setuptools writes into the folder that it builds.
  for name in SOURCES:
    shutil.copy(ROOT / name, folder / name)
  for name in FOLDERS:
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)
  command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps']
  command += ['--no-build-isolation', '--no-index', '--wheel-dir=dist', '.']
  subprocess.run(command, cwd=folder, check=True)
  (wheel,) = (folder / 'dist').glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / 'installed')
  return folder / 'installed'


def test_every_file_is_installed(installed):
  files = {
    path.relative_to(ROOT)
    for path in (ROOT / 'nanodlm').rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  }
  files |= {
    pathlib.Path('nanodlm', 'configs', path.name)
    for path in (ROOT / 'configs').glob('*.py')
  }
  assert not [str(name) for name in files if not (installed / name).is_file()]


def test_it_finds_its_configs(installed, tmp_path):
  code = (
    'import nanodlm; from nanodlm import config\n'
    'print(nanodlm.__file__)\n'
    'print(config.find_file("base"))\n'
    'print(config.load("tiny").model.num_layers)'
  )
  output = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(installed)},
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  assert output.splitlines() == [
    str(installed / 'nanodlm' / '__init__.py'),
    str(installed / 'nanodlm' / 'configs' / 'base.py'),
    '2',
  ]
