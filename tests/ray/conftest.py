"""A base, documents and a store that the Ray tests share, and a cluster for those of one file."""

from collections.abc import Iterator

import pytest

from tests.material import Workshop
from tests.ray.cluster import ray_cluster


@pytest.fixture(scope="package")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The cluster of one machine that the tests of a file share, by its address."""
    with ray_cluster(1) as cluster:
        yield str(cluster.address)
