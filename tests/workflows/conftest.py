"""A live server of each ComfyUI version for the workflow tests."""

from __future__ import annotations

import pytest

from tests.live_hosts import VERSIONS, object_info, server


@pytest.fixture(scope="session", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="session")
def schema(version):
    return object_info(version)


@pytest.fixture(scope="session")
def client(version):
    return server(version).client
