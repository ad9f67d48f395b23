"""A base, documents and a store that the Ray tests share."""

import pytest

from tests.material import Workshop


@pytest.fixture(scope="package")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))
