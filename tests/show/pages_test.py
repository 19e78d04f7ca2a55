"""Tests of nanodlm.show.pages."""

import os

import pytest

from nanodlm.show import pages
from nanodlm.types import InputError

MARK = '<meta name="generator" content="test">'


def test_printable():
  assert (
    pages.printable('a\0b\ud800\x1b\n\té😀') == 'a\ufffdb\ufffd\ufffd\n\té😀'
  )
  assert pages.escape('<a b="\0">') == '&lt;a b=&quot;\ufffd&quot;&gt;'


def test_a_failed_page_leaves_nothing(tmp_path):
  with pytest.raises(UnicodeEncodeError):
    pages.write('--html', tmp_path / 'page.html', '\ud800')
  assert not list(tmp_path.iterdir())
  with pytest.raises(InputError, match='--html=.*no'):
    pages.write('--html', tmp_path / 'no' / 'page.html', 'text')


def test_paths(tmp_path):
  path = tmp_path / 'page.html'
  pages.check_path('--html', path, MARK)
  pages.write('--html', path, f'<!doctype html>{MARK}')
  pages.check_path('--html', path, MARK)
  path.write_text(' ' * 1024 + MARK)
  for wrong in (path, tmp_path, tmp_path / 'no' / 'a.html'):
    with pytest.raises(InputError, match=f'--html={str(wrong)!r}'):
      pages.check_path('--html', wrong, MARK)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_folder(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(InputError, match='read-only'):
    pages.check_path('--html', tmp_path / 'a.html', MARK)
