"""The cluster that these tests share, and runs on it."""

import os
from collections.abc import Iterator, Mapping
from typing import NoReturn

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.site import Site


def without(why: str, environment: Mapping[str, str]) -> NoReturn:
    """Skip what needs a cluster; in CI, where one has to run, fail."""
    if environment.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm with three nodes. Where none can run the tests are skipped, which in CI is a failure."""
    if why := missing():
        without(why, os.environ)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def undisturbed(site: Site) -> dict[int, float]:
    """The losses of a run that nothing happened to: without Ray, one process of srun's for each rank."""
    job = site.submit(site.config("undisturbed", "cluster.slurm.launch=direct"))
    site.assert_ends("undisturbed", job, "COMPLETED")
    site.assert_nothing_is_left()
    losses = site.losses("undisturbed")
    assert list(losses) == list(range(1, 31))
    return losses
