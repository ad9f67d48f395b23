"""A store on a disk of this machine is none for a cluster of other machines."""

from pathlib import Path

import pytest

from launcher.start import check
from launcher.start.check import check_shared
from trainer.config import Config, parse_config
from trainer.config.paths import file_system
from trainer.errors import ConfigError

MOUNTS = """overlay / overlay rw 0 0
server:/x /shared nfs4 rw 0 0
none /shared/fast\\040one tmpfs rw 0 0
/dev/sda /mnt ext4 rw 0 0
server:/y /mnt nfs4 rw 0 0
"""
OTHER = "http://192.0.2.7:8265"  # of a network that is for documentation alone


def config(store: str) -> Config:
    return parse_config(
        f"{{run: {{name: a, store: '{store}'}}, model: {{base: c}}, data: {{train: [{{path: d}}]}}, train: {{steps:"
        " 1}}"
    )


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", "overlay"),
        ("/shared/me", "nfs4"),
        ("/shared/fast one/x", "tmpfs"),
        ("/sharedby", "overlay"),
        ("/mnt/x", "nfs4"),
    ],
)
def test_a_folder_has_the_type_of_the_nearest_mount(folder: str, kind: str) -> None:
    assert file_system(Path(folder), MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "store", "address", "refused"),
    [
        ("ext4", "/runs", OTHER, True),
        ("overlay", "/runs", "192.0.2.7:6379", True),
        ("nfs4", "/runs", OTHER, False),
        (None, "/runs", OTHER, False),
        ("ext4", "/runs", "http://127.0.0.1:8265", False),
        ("ext4", "/runs", "[::1]:6379", False),
        ("ext4", "/runs", "auto", False),
        ("ext4", "/runs", "http://no-such-name.invalid:8265", False),
        ("ext4", "file:///runs", OTHER, False),
        ("ext4", "s3://bucket/runs", OTHER, False),
    ],
)
def test_a_disk_of_this_machine_is_refused_where_the_cluster_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, store: str, address: str, refused: bool
) -> None:
    monkeypatch.setattr(check, "file_system", lambda folder: kind)
    if not refused:
        check_shared(config(store), address)
        return
    with pytest.raises(
        ConfigError, match=r"run.store: /runs is on a disk of this machine \(.*set run.store=file:///runs"
    ):
        check_shared(config(store), address)


@pytest.mark.parametrize(
    ("addresses", "elsewhere"), [(["127.0.0.1", "10.0.0.9"], False), (["10.0.0.9"], True), ([], False)]
)
def test_a_name_is_elsewhere_if_none_of_its_addresses_is_this_machines(
    addresses: list[str], elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_is_own", lambda address: address == "127.0.0.1")
    found = [("", "", "", "", (address, 0)) for address in addresses]
    monkeypatch.setattr(check.socket, "getaddrinfo", lambda host, port: found if host == "head" else [])
    for address in ("head:6379", "http://head:8265", "http://head:8265/path"):
        assert check._is_elsewhere(address) is elsewhere
