"""The copy of the user's code that a run keeps."""

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from launcher.start import snapshot
from trainer.errors import ConfigError, Damaged


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    (root / "package" / "code.py").write_text("committed = 1\n")
    (root / ".gitignore").write_text("*.bin\n")
    git(root, "init", "-q")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True, timeout=30)


def commit(root: Path) -> None:
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "what is there")


def kept(checkout: Path, out: Path) -> dict[str, str]:
    """The code in a snapshot of `checkout`, laid out in `out`: the text of each file, `-> TARGET` of each link."""
    code = snapshot.unpack(snapshot.take(checkout).archive("a: 1\n"), out)
    return {
        path.relative_to(code).as_posix(): f"-> {os.readlink(path)}" if path.is_symlink() else path.read_text()
        for path in code.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_the_tracked_files_are_kept_as_they_are_with_their_git_state(checkout: Path, tmp_path: Path):
    (checkout / "package" / "code.py").write_text("changed = 2\n")
    (checkout / "untracked.py").write_text("")
    (checkout / "weights.bin").write_bytes(b"0" * 1000)
    code = snapshot.unpack(snapshot.take(checkout / "package").archive("run: {}\n"), tmp_path / "out")
    assert sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()) == [
        ".gitignore",
        "package/code.py",
    ]
    assert (code / "package" / "code.py").read_text() == "changed = 2\n"
    state = json.loads((tmp_path / "out" / "git.json").read_text())
    assert state["dirty"] is True
    assert len(state["commit"]) == 40
    assert "+changed = 2" in (tmp_path / "out" / "git.diff").read_text()
    assert (tmp_path / "out" / "config.yaml").read_text() == "run: {}\n"
    assert "\nray==" in (tmp_path / "out" / "requirements.txt").read_text()


def test_the_same_content_gives_the_same_bytes(checkout: Path):
    first = snapshot.take(checkout).archive("a: 1\n")
    os.utime(checkout / "package" / "code.py", (1, 1))
    assert snapshot.take(checkout).archive("a: 1\n") == first


def test_the_versions_are_sorted_by_name_whatever_its_case(monkeypatch: pytest.MonkeyPatch):
    class Dist:
        def __init__(self, metadata: str | None, info: str | None = None) -> None:
            self._texts = {"METADATA": metadata, "PKG-INFO": info}

        def read_text(self, name: str) -> str | None:
            return self._texts[name]

    texts = (("Name: beta\nVersion: 2.0\n\nName: in the text\n",), ("Name: Zeta\nVersion: 1\n",), ("Version: 3\n",))
    given = [Dist(*one) for one in (*texts, (None, "Name: Alpha\nVersion: 0.1\n"), (None, None), texts[0])]
    monkeypatch.setattr(snapshot, "distributions", lambda: given)
    assert snapshot._installed() == "Alpha==0.1\nbeta==2.0\nZeta==1\n"


def test_a_module_is_a_file_or_a_folder_at_the_top_of_the_code(checkout: Path):
    (checkout / "reward.py").write_text("")
    commit(checkout)
    taken = snapshot.take(checkout)
    found = {name: taken.has_module(name) for name in ("reward", "package", "pack", "rew", "code")}
    assert found == {"reward": True, "package": True, "pack": False, "rew": False, "code": False}


def test_outside_a_checkout_the_configuration_and_the_versions_are_kept(tmp_path: Path):
    taken = snapshot.take(tmp_path)
    assert (taken.git, taken.files) == (None, [])
    assert not snapshot.unpack(taken.archive("a: 1\n"), tmp_path / "out").exists()
    assert (tmp_path / "out" / "config.yaml").read_text() == "a: 1\n"


def test_tracked_data_that_is_too_large_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "MOST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"package/code.py .* Leave data out of git"):
        snapshot.take(checkout)
    for size in (1, 4, 2, 3):
        (checkout / f"{size}.csv").write_bytes(bytes(size * 10**6))
    commit(checkout)
    largest = (
        r"are 10 MB, a snapshot takes at most 5 MB. The largest are 4.csv \(4 MB\), 3.csv \(3 MB\), 2.csv \(2 MB\)\."
    )
    monkeypatch.setattr(snapshot, "MOST_BYTES", 5 * 10**6)
    with pytest.raises(ConfigError, match=largest):
        snapshot.take(checkout)


def test_links_are_kept_as_links_and_a_folder_that_became_one_is_not_followed(checkout: Path, tmp_path: Path):
    (checkout / "alias.py").symlink_to("package/code.py")
    (checkout / "etc").mkdir()
    (checkout / "etc" / "passwd").write_text("tracked")
    commit(checkout)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "passwd").write_text("not of the checkout")
    shutil.rmtree(checkout / "etc")
    (checkout / "etc").symlink_to(elsewhere)
    files = kept(checkout, tmp_path / "out")
    assert files == {".gitignore": "*.bin\n", "package/code.py": "committed = 1\n", "alias.py": "-> package/code.py"}


def test_a_link_that_leads_out_of_the_checkout_is_kept_as_a_link_and_not_laid_out(checkout: Path, tmp_path: Path):
    (checkout / "users").symlink_to("/etc/passwd")
    (checkout / "above").symlink_to("../../../outside")
    commit(checkout)
    (checkout / "package" / "code.py").unlink()
    (checkout / "package" / "code.py").symlink_to("/etc/passwd")
    assert kept(checkout, tmp_path / "out") == {".gitignore": "*.bin\n"}
    (tmp_path / "plain.tar").write_bytes(
        zstandard.ZstdDecompressor().decompressobj().decompress(snapshot.take(checkout).archive("a: 1\n"))
    )
    with tarfile.open(tmp_path / "plain.tar") as tar:
        links = {member.name: member.linkname for member in tar if member.issym()}
    assert links == {
        "code/users": "/etc/passwd",
        "code/above": "../../../outside",
        "code/package/code.py": "/etc/passwd",
    }


SECRET_FILES = [
    ".env",
    "prod.env",
    "certs/server.PEM",
    "id_rsa",
    "aws_credentials",
    "config/secrets/db.yaml",
    ".aws/config",
    ".docker/config.json",
    "infrastructure/terraform.tfvars",
    *(".envrc", ".pgpass", ".s3cfg", ".boto", ".my.cnf", ".vault-token", "rclone.conf"),
    *("token.txt", "hf_token.txt", "api_key.txt"),
]
ORDINARY_FILES = [
    *("data/tokens.txt", "tokenizer.json", "added_tokens.json", "special_tokens_map.json", "token_counts.csv"),
    *("config.json", ".docker/Dockerfile", "my.cnf", "keyboard.txt", "variables.tf", "hosts.yml"),
]


def test_files_that_look_like_secrets_are_left_out_of_the_code_and_of_the_difference(checkout: Path, tmp_path: Path):
    ordinary = {*ORDINARY_FILES, "package/credentials.py"}
    for name in (*SECRET_FILES, *ordinary, "removed.key"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("hidden = 1\n")
    commit(checkout)
    for name in SECRET_FILES:
        (checkout / name).write_text("hidden = 2\n")
    git(checkout, "rm", "-q", "removed.key")
    taken = snapshot.take(checkout)
    assert taken.git is not None
    assert taken.git.dirty
    assert taken.git.left_out == sorted([*SECRET_FILES, "removed.key"])
    assert set(kept(checkout, tmp_path / "out")) == {".gitignore", "package/code.py", *ordinary}
    assert "hidden" not in taken.diff
    assert "left out, as they look like secrets: .aws/config, .boto, " in taken.sentence()
    assert taken.sentence().endswith(f"and {len(SECRET_FILES) + 1 - 8} more")
    assert json.loads((tmp_path / "out" / "git.json").read_text())["left_out"] == taken.git.left_out


def test_the_remote_is_kept_without_its_password_or_token(checkout: Path):
    git(checkout, "remote", "add", "origin", "https://me:hidden@host/group/project.git")
    taken = snapshot.take(checkout)
    assert taken.git is not None
    assert taken.git.remote == "https://host/group/project.git"


def test_a_secret_of_a_submodule_is_not_in_the_difference(checkout: Path, tmp_path: Path):
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / ".env").write_text("KEY=hidden 1\n")
    commit(inner)
    git(checkout, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "sub")
    commit(checkout)
    git(checkout, "config", "diff.submodule", "diff")
    (checkout / "sub" / ".env").write_text("KEY=hidden 2\n")
    commit(checkout / "sub")
    taken = snapshot.take(checkout)
    assert "+Subproject commit" in taken.diff
    assert "hidden" not in taken.diff


def test_names_that_are_not_utf_8_are_names_like_others(checkout: Path, tmp_path: Path):
    secret, code = (os.fsdecode(name) for name in (b"prod\xff.env", b"code\xff.txt"))
    for name in (secret, code):
        (checkout / name).write_text("hidden 1\n" if name == secret else "shown 1\n")
    commit(checkout)
    for name in (secret, code):
        (checkout / name).write_text("hidden 2\n" if name == secret else "shown \udcff\n", errors="surrogateescape")
    taken = snapshot.take(checkout)
    assert taken.git is not None
    assert taken.git.left_out == [secret]
    taken.sentence().encode()
    archive = taken.archive("a: 1\n")
    assert snapshot.unpack(archive, tmp_path / "out").joinpath(code).read_bytes() == b"shown \xff\n"
    difference = (tmp_path / "out" / "git.diff").read_bytes()
    assert b"+shown \xff" in difference
    assert b"hidden" not in difference
    assert json.loads((tmp_path / "out" / "git.json").read_text())["left_out"] == [secret]


def test_a_file_that_vanishes_or_cannot_be_read_is_left_out_and_named(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (checkout / "gone.py").write_text("")
    (checkout / "closed.py").write_text("hidden\n")
    commit(checkout)
    (checkout / "package" / "code.py").write_text("changed = 2\n")
    check_size, read = snapshot._check_size, Path.read_bytes

    def look_and_lose(root: Path, files: list[Path]) -> None:
        check_size(root, files)
        (root / "gone.py").unlink()

    def refuse(path: Path) -> bytes:
        if path.name == "closed.py":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(snapshot, "_check_size", look_and_lose)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    taken = snapshot.take(checkout)
    assert taken.sentence().endswith("; left out, as they cannot be read: closed.py, gone.py")
    (checkout / "package" / "code.py").unlink()  # the copy was made already
    files = snapshot.unpack(taken.archive("a: 1\n"), tmp_path / "out")
    monkeypatch.undo()
    assert (files / "package" / "code.py").read_text() == "changed = 2\n"
    assert not (files / "gone.py").exists()
    assert json.loads((tmp_path / "out" / "git.json").read_text())["unreadable"] == ["closed.py", "gone.py"]
    assert "+changed = 2" in (tmp_path / "out" / "git.diff").read_text()


def test_a_snapshot_that_stands_for_more_than_any_has_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes may stand for gigabytes, and the run may be somebody else's."""
    monkeypatch.setattr(snapshot, "_MOST_UNPACKED", 10**7)
    bomb = zstandard.ZstdCompressor().compress(bytes(10**7 + 1))
    assert len(bomb) < 10**4
    with pytest.raises(Damaged, match="stands for more than 10 MB, and none has so much"):
        snapshot.unpack(bomb, tmp_path / "out")
    with pytest.raises(Damaged, match="the snapshot of the run's code is damaged"):
        snapshot.unpack(b"no snapshot at all", tmp_path / "out")
    assert not (tmp_path / "out").exists()
