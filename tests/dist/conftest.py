"""Bases, data and stores that the multi-process tests of one file share: runs of two files may have one name."""

import pytest

from tests.material import Workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))
