"""A run that was never trained, and its server, shared by all these tests."""

import pytest

from tests import workdirs


@pytest.fixture(scope='session')
def opened(tmp_path_factory):
  """The model."""
  pytest.importorskip('fastapi')
  pytest.importorskip('uvicorn')
  from nanodlm import lm as lms

  workdir = workdirs.make_workdir(tmp_path_factory.mktemp('masked'))
  return lms.load(workdir)


@pytest.fixture(scope='session')
def running(opened):
  """A model and its server."""
  from tests.serving import servers

  with servers.serving(opened) as (model, server):
    yield model, server
