"""The cluster that these tests share, and runs on it."""

from collections.abc import Callable, Iterator

import pytest

from tests.needs import need
from tests.slurm.cluster import Cluster, missing
from tests.slurm.site import STEPS, Site


@pytest.fixture(scope="session")
def make_cluster() -> Callable[..., Cluster]:
    """`Cluster` itself. Tests get it from here alone, so that none starts one on a machine that cannot."""
    need(missing())
    return Cluster


@pytest.fixture(scope="session")
def cluster(make_cluster: Callable[..., Cluster], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm with three nodes that the tests share."""
    with make_cluster(tmp_path_factory.mktemp("slurm")) as running:
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
    assert list(losses) == list(range(1, STEPS + 1))
    return losses
