"""The Python environment that a run carries: real virtual environments, packed, and unpacked at another place."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cluster.ray import jobs
from launcher.cluster.slurm import submit
from launcher.start import carried, environment
from launcher.start.carried import READY
from launcher.view.status import read_status
from trainer.config import Config, override, parse_config
from trainer.errors import ConfigError, Damaged
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.owner import read_owner, take
from trainer.run.records import generations, read_records, record_end, record_line, record_never_begun
from trainer.store.store import open_run_store

ROOT = Path(__file__).parents[3]
SITE = f"lib/python3.{sys.version_info.minor}/site-packages"


@pytest.fixture(autouse=True)
def _node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine's own disk at a short path: Linux reads so much of a script's first line and no more.

    pytest has made its own folders before (`tmp_path`).
    """
    with tempfile.TemporaryDirectory(prefix="n-") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield


def disk() -> Path:
    return Path(tempfile.gettempdir())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = {
        "run": {"name": "carried", "store": str(tmp_path / "store")},
        "model": {"base": "/models/base"},
        "data": {"train": [{"path": "d.jsonl"}]},
        "train": {"steps": 5},
        "cluster": {"environment": "archive", "workers": 2},
    }
    return parse_config(json.dumps(settings))


def make(prefix: Path) -> Path:
    """A virtual environment with Capstan's launcher, a package with a script, and one that is installed editable."""
    venv.create(prefix, symlinks=True)
    site = prefix / SITE
    shutil.copytree(ROOT / "launcher/start", site / "launcher/start", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launcher/__init__.py", site / "launcher")
    (site / "shared.py").write_text("value = 1\n")
    script(prefix, "ours", "import shared, sys; print(shared.__file__, sys.prefix)")
    return prefix


def script(prefix: Path, name: str, text: str) -> None:
    path = prefix / "bin" / name
    path.write_text(f"#!{prefix}/bin/python\n{text}\n")
    path.chmod(0o755)


def checkout(folder: Path, prefix: Path, install: str) -> Path:
    """A git checkout of the project `edited`, installed editable as pip does it with such a build backend."""
    (folder / "edited").mkdir(parents=True)
    (folder / "edited/__init__.py").write_text(
        "from pathlib import Path\ntext = Path(__file__).with_name('t.txt').read_text()\n"
    )
    (folder / "edited/t.txt").write_text("beside it\n")
    (folder / "edited/fast.so").write_bytes(b"compiled")
    (folder / ".gitignore").write_text("*.so\ndata/\n")
    (folder / "data").mkdir()
    (folder / "data/large").write_text("not code\n")
    (folder / "hub_token").write_text("secret\n")
    subprocess.run(["git", "init", "-q", folder], check=True, timeout=30)
    told = prefix / SITE / "edited-1.dist-info"
    told.mkdir()
    (told / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}, "url": folder.as_uri()}))
    if install == "path":
        (prefix / SITE / "edited.pth").write_text(f"{folder}\n")
    else:
        (prefix / SITE / "__editable__.edited.pth").write_text(f"import {install}; {install}.install()\n")
        (prefix / SITE / f"{install}.py").write_text(
            "import sys\nfrom importlib.util import spec_from_file_location\n"
            f"MAPPING = {{'edited': '{folder}/edited'}}\nclass Finder:\n    @classmethod\n"
            "    def find_spec(cls, name, path=None, target=None):\n        if name in MAPPING:\n"
            "            return spec_from_file_location(name, MAPPING[name] + '/__init__.py')\n"
            "def install():\n    sys.meta_path.append(Finder)\n"
        )
    return folder


def carry(config: Config, prefix: Path) -> environment.Environment:
    found = environment.look(prefix)
    environment.carry(config, found, print)
    return found


def run(
    config: Config, found: environment.Environment, node: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The environment's Python on a machine whose own disk is `node`."""
    command = [sys.executable, "-Pm", *found.command(config, str(node)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def home(found: environment.Environment, node: Path) -> Path:
    return node / f"capstan-environments-{os.getuid()}" / found.name


@pytest.mark.parametrize("install", ["path", "__editable___edited_1_finder"])
def test_an_environment_runs_elsewhere_when_the_one_that_was_packed_is_gone(
    config: Config, tmp_path: Path, install: str
) -> None:
    prefix, node = make(tmp_path / "checkout/.venv"), disk()
    project = checkout(tmp_path / "checkout", prefix, install)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/linked.py").write_text("value = 2\n")
    (prefix / SITE / "linked.py").symlink_to(tmp_path / "cache/linked.py")  # as uv does when it is asked to
    (prefix / "bin/alias").symlink_to(prefix / "bin/ours")
    (tmp_path / "cache/.env").write_text("KEY=1\n")
    (prefix / SITE / "shared").symlink_to(tmp_path / "cache")
    for name in ("secrets.txt", "__pycache__/_credentials.pyc", "roots.pem"):
        (prefix / SITE / name).parent.mkdir(exist_ok=True)
        (prefix / SITE / name).touch()
    (prefix / SITE / "edited-1.dist-info/RECORD").write_text("roots.pem,,\n../../../bin/ours,,\n")
    found = carry(config, prefix)
    assert found.left_out == [f"{SITE}/secrets.txt", f"{SITE}/shared/.env", "hub_token"]
    assert {f"{SITE}/__pycache__/_credentials.pyc", f"{SITE}/roots.pem", f"{SITE}/shared/linked.py"} <= {*found.files}
    assert "data/large" not in " ".join(found.files)
    for gone in (project, tmp_path / "cache"):
        shutil.rmtree(gone)

    ask = "import edited, linked, sys, sysconfig; print(edited.__file__, edited.text, linked.value, sys.prefix)"
    done = run(config, found, node, "-c", ask)
    place = home(found, node)
    assert done.stdout.split() == [f"{place}/editable/0/edited/__init__.py", "beside", "it", "2", str(place)], (
        done.stderr
    )
    assert (place / "editable/0/edited/fast.so").read_bytes() == b"compiled"
    for command in ("ours", "alias"):
        told = subprocess.run([place / "bin" / command], capture_output=True, text=True, timeout=60).stdout.split()
        assert told == [f"{place}/{SITE}/shared.py", str(place)]
    activated = subprocess.run(["bash", "-c", f". {place}/bin/activate; which ours"], capture_output=True, text=True)
    assert activated.stdout.strip() == str(place / "bin/ours")
    inherited = run(config, found, node, "-c", "import os; print(os.environ['VIRTUAL_ENV'], os.environ['PATH'])")
    assert inherited.stdout.startswith(f"{place} {place}/bin:")
    assert inherited.stderr == ""  # the second process unpacks nothing


def test_the_processes_of_a_machine_unpack_it_once(config: Config, tmp_path: Path) -> None:
    found, node = carry(config, make(tmp_path / "env")), disk()
    command = [sys.executable, "-Pm", *found.command(config, str(node)), "-c", "import shared; print(shared.__file__)"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, **pipes) for _ in range(4)]
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert {output.strip() for output, _ in told} == {str(home(found, node) / SITE / "shared.py")}
    assert sum(error.count("unpacked") for _, error in told) == 1


def test_one_that_was_not_unpacked_to_its_end_or_before_a_crash_is_unpacked_anew(
    config: Config, tmp_path: Path
) -> None:
    found, node = carry(config, make(tmp_path / "env")), disk()
    place, store = home(found, node), open_run_store(config).uri
    place.parent.mkdir(mode=0o700)
    for left in (None, "the boot before"):
        place.mkdir(exist_ok=True)
        (place / "half").touch()
        if left:
            (place / READY).write_text(left)
        carried.unpack(store, found.name, str(node))
        assert carried.is_whole(place)
        assert not (place / "half").exists()


def test_an_archive_that_is_damaged_is_never_used(config: Config, tmp_path: Path) -> None:
    found, store = carry(config, make(tmp_path / "env")), open_run_store(config)
    about = json.loads(store.get(layout.environment(found.name)))
    content = bytearray(store.get(about["archive"]))

    def unpack(what: str) -> None:
        for _ in range(2):
            with pytest.raises(Damaged, match=what):
                carried.unpack(store.uri, found.name, str(disk()))
            assert not carried.is_whole(home(found, disk()))

    store.put(layout.environment(found.name), json.dumps(about | {"sha256": "0" * 64}).encode())
    unpack("its hash is not that of what was packed")
    store.put(layout.environment(found.name), json.dumps(about).encode())
    content[len(content) // 2] ^= 1
    store.put(about["archive"], bytes(content))
    unpack("is damaged")
    store.put(about["archive"], bytes(content[: len(content) // 2]))
    unpack("It is truncated")


def test_it_is_packed_once_until_somebody_changes_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, store = make(tmp_path / "env"), open_run_store(config)
    first = carry(config, prefix)
    (prefix / SITE / "__pycache__").mkdir()
    (prefix / SITE / "__pycache__/shared.cpython-311.pyc").write_bytes(b"an import made it")
    assert carry(config, prefix).name == first.name
    assert len(store.list("environments/")) == 2
    for number, text in enumerate(("value = 2\n", "value = 22\n"), 2):  # the first is as long as what was there
        (prefix / SITE / "shared.py").write_text(text)
        assert carry(config, prefix).name != first.name
        assert len(store.list("environments/")) == 2 * number
    found = environment.look(prefix)
    with monkeypatch.context() as patch:

        def broken(found: environment.Environment) -> Iterator[bytes]:
            yield b"a part"
            raise ConfigError("became shorter")

        patch.setattr(environment, "_pack", broken)
        (prefix / SITE / "shared.py").write_text("value = 3\n")
        with pytest.raises(ConfigError, match="became shorter"):
            carry(config, prefix)
        patch.setattr(type(store), "exists", lambda self, key: False)  # somebody else is packing the same
        patch.setattr(environment, "_pack", lambda found: iter([b"the same"]))
        environment.carry(config, found, print)
    assert len(store.list("environments/")) == 6, "no archive stays that nothing names"
    names, link = [environment.look(prefix).name], prefix / SITE / "linked.py"
    for change in (
        lambda: (prefix / SITE / "shared.py").chmod(0o755),
        lambda: link.symlink_to("shared.py"),
        lambda: (link.unlink(), link.symlink_to("../site-packages")),
    ):
        change()
        names.append(environment.look(prefix).name)
    assert len({*names}) == 4, "modes and links are changes too"


def test_room_is_made_by_removing_what_no_process_has(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, node, store = make(tmp_path / "env"), disk(), open_run_store(config).uri
    names = list[str]()
    for value in range(3):
        (prefix / SITE / "shared.py").write_text(f"value = {10**value}\n")
        names.append(carry(config, prefix).name)
    used = carried.held(store, names[0], str(node))  # this process has it from now on
    mine = [
        int(number)
        for number in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{number}") == str(used)
    ]
    assert [os.get_inheritable(number) for number in mine] == [True], "the Python that it becomes has it, too"
    other_rank = os.open(used, os.O_RDONLY)
    fcntl.flock(other_rank, fcntl.LOCK_SH | fcntl.LOCK_NB)  # several have it at once
    os.close(other_rank)
    carried.unpack(store, names[1], str(node))
    old = used.with_name(names[1])
    free = list[int]()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free.pop(0)))

    def unpack(number: int, *rooms: int) -> None:
        free[:] = rooms
        carried.unpack(store, names[number], str(node))

    unpack(2, 0, 10**9)
    assert (used.exists(), old.exists()) == (True, False), "room was short"
    unpack(1, 10**9)
    assert (used.with_name(names[2]).exists(), old.exists()) == (True, True), "there was room"
    moment = time.time() - 8 * 24 * 3600
    os.utime(old / READY, times=(moment, moment))
    (used.with_name(names[2]) / READY).unlink()
    unpack(2, 10**9)
    assert not old.exists(), "nobody used it for a week"
    half = used.with_name("half")
    half.mkdir()
    (used.with_name(names[2]) / READY).unlink()
    unpack(2, 10**9)
    assert not half.exists(), "it was not unpacked to its end"
    (used.with_name(names[2]) / READY).unlink()
    with pytest.raises(ConfigError, match=r"has room for 0.0 GB, and the environment has 0.0 GB. Make room"):
        unpack(2, 0, 0)


def test_a_folder_that_somebody_else_may_write_to_is_not_used(tmp_path: Path) -> None:
    place = disk() / f"capstan-environments-{os.getuid()}"
    place.mkdir()
    for mode, verb in ((0o777, carried.unpack), (0o770, carried.held), (0o707, carried.held)):
        place.chmod(mode)
        with pytest.raises(ConfigError, match=rf"{place} is not a folder that you alone may write to"):
            verb("memory://", "none", str(disk()))


def test_a_machine_with_another_python_is_told(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found, store = carry(config, make(tmp_path / "env")), open_run_store(config)
    about = json.loads(store.get(layout.environment(found.name))) | {"python": "cpython-39"}
    store.put(layout.environment(found.name), json.dumps(about).encode())
    with pytest.raises(SystemExit) as ended:
        carried.main("unpack", store.uri, found.name, str(disk()))
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert "was made for cpython-39, and this machine's" in said
    assert "Traceback" not in said


def test_what_cannot_be_carried_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "conda/bin").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"conda is no virtual environment"):
        environment.look(tmp_path / "conda")

    prefix = make(tmp_path / "env")
    settings = (prefix / "pyvenv.cfg").read_text()
    (prefix / "pyvenv.cfg").write_text(settings.replace("packages = false", "packages = true"))
    with pytest.raises(ConfigError, match=r"also uses the packages of the system"):
        environment.look(prefix)
    (prefix / "pyvenv.cfg").write_text(settings)

    (prefix / SITE / "more.pth").write_text(f"# a comment\n{tmp_path / 'conda'}\n/nowhere\n")
    with pytest.raises(ConfigError, match=r"more.pth leads to .*conda, which is outside of .* Install it as a package"):
        environment.look(prefix)
    (prefix / SITE / "more.pth").unlink()

    checkout(tmp_path / "built", prefix, "_built_editable_loader")
    with pytest.raises(
        ConfigError, match=r"imports _built_editable_loader, which builds or finds a project at .*built"
    ):
        environment.look(prefix)


def test_a_project_without_git_is_taken_whole_but_for_what_is_made_or_hidden_and_one_with_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = make(tmp_path / "env")
    project = checkout(tmp_path / "project", prefix, "path")
    shutil.rmtree(project / ".git")
    for name in (".ssh/config", "__pycache__/a.pyc", "node_modules/a.js", "other/pyvenv.cfg", "data/.env", "docs/a.md"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    (prefix / SITE / "linked").symlink_to(project / "docs")
    (project / "docs/up").symlink_to(project / "edited")
    (project / "edited/round").symlink_to(project / "docs")
    found = environment.look(prefix)
    taken = sorted(name.removeprefix("editable/0/") for name in found.files if name.startswith("editable/0/"))
    assert taken == [
        ".gitignore",
        "data/large",
        "docs/a.md",
        *(f"edited/{it}" for it in ("__init__.py", "fast.so", "t.txt")),
    ]
    assert sorted(found.left_out) == ["data/.env", "hub_token"]
    assert [name for name in found.files if name.startswith(f"{SITE}/linked")] == [
        f"{SITE}/linked/{it}" for it in ("a.md", "up/__init__.py", "up/fast.so", "up/t.txt")
    ]
    monkeypatch.setattr(environment, "_MOST_SOURCES", 10)
    with pytest.raises(ConfigError, match=r"which is installed editable, has 0 MB, .* The largest are .*__init__.py"):
        environment.look(prefix)


def test_a_job_has_the_words_and_a_container_is_a_contradiction(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = environment.look(make(tmp_path / "env"))
    slurm = override(config, "cluster.slurm.local_dir=/local disk")
    text = submit.render_batch_file(slurm, "file:///run", "0a1b", {}, found)
    folder = run_folder(config).uri
    assert f"CARRIED=(launcher.start.carried run {folder} {found.name} '/local disk' -Pm)\n" in text
    assert "CARRIED=" not in submit.render_batch_file(slurm, "file:///run", "0a1b", {})

    python = ["python", "-m", *found.command(config)]
    assert jobs._runtime_env(config, python)["py_executable"].endswith(f"carried run {folder} {found.name} -")
    of_ray = (
        f"cluster.ray.runtime_env={{{key}: x}}"
        for key in ("py_executable", "pip", "uv", "conda", "container", "image_uri")
    )
    for other in ("cluster.slurm.container=[apptainer]", *of_ray):
        with pytest.raises(
            ConfigError, match=r"archive and cluster\.[\w.: ]+ both give the run its Python environment"
        ):
            override(config, other)


def test_the_run_says_why_a_machine_could_not_use_the_environment(config: Config, tmp_path: Path) -> None:
    found, run = carry(config, make(tmp_path / "env")), run_folder(config)
    node, store = disk(), open_run_store(config)
    about = json.loads(store.get(layout.environment(found.name))) | {"python": "cpython-39"}
    store.put(layout.environment(found.name), json.dumps(about).encode())
    take(run, "capstan submit slurm", 0, group="job", waits=True)
    command = [sys.executable, "-Pm", *found.command(config, str(node)), "-c", "print('never')"]
    for _ in range(2):  # each of the batch file's commands fails alike
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
    status = read_status(run)
    assert (status.state, status.generation) == ("failed", 1)
    assert "cluster.environment: archive: the environment was made for cpython-39, and this" in status.reason
    assert status.reason.endswith(f"({socket.gethostname()})")
    assert read_owner(run) is None, "nobody waits for the job any more"


def test_why_a_machine_could_not_begin_is_kept_apart_from_ends_before(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(config)
    record_end(run, "stopped by a person", stopped=True)
    for name in ("first", "second"):  # a thousand machines may fail at once
        record_never_begun(run, f"no room on {name}")
    ends = [[record["reason"] for record in read_records(run, number)] for number in generations(run)]
    assert ends == [["stopped by a person"], ["no room on first"]]
    run.put(layout.metrics(3), record_line("start", {"step": 0}))
    record_never_begun(run, "no room on third")
    assert read_status(run).reason == "no room on third", "the start that lacks this machine ends for it"
    now = time.time()
    for later, told in ((590, "third"), (610, "fourth")):  # one that tries again after ten minutes did not fail with it
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        record_never_begun(run, "no room on fourth")
        assert read_status(run).reason == f"no room on {told}"
    assert len(generations(run)) == 4


@pytest.mark.parametrize(
    ("code", "output", "errors", "said"),
    [
        (0, "{home}\n{home}/lib/carried.py\n", "", None),
        (1, "", "Traceback\nImportError: no zstandard\n", "ImportError: no zstandard"),
        (1, "{home}\n{home}/lib/carried.py\n", "", "{home} and {home}/lib/carried.py"),
        (0, "{home}\n/opt/capstan/carried.py\n", "", "{home} and /opt/capstan/carried.py"),
        (0, "/usr\n{home}/lib/carried.py\n", "", "/usr and {home}/lib/carried.py"),
        (0, "{home}\n", "", "{home}"),
    ],
    ids=["its own", "an error", "an exit code", "another Capstan", "another prefix", "half an answer"],
)
def test_an_environment_that_runs_another_capstan_than_its_own_is_refused(
    code: int, output: str, errors: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def run(command: list[str], *, env: dict[str, str], cwd: Path, **_: Any) -> Any:
        asked.extend([command[:2], cwd, [name for name in env if name.startswith("PYTHON")]])
        return SimpleNamespace(returncode=code, stdout=output.format(home=tmp_path), stderr=errors)

    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr("trainer.processes.children.run", run)
    if said is None:
        carried._check_runs(tmp_path)
    else:
        with pytest.raises(ConfigError) as refused:
            carried._check_runs(tmp_path)
        assert f"the environment does not run from {tmp_path}: {said.format(home=tmp_path)}. " in str(refused.value)
    assert asked == [[str(tmp_path / "bin/python"), "-Pc"], tmp_path, []]


def test_why_a_folder_cannot_hold_an_environment_is_said(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"the folder {tmp_path}/file cannot be used on this machine \(.*Not a dir"):
        carried._place(str(tmp_path / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(carried.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
        with pytest.raises(ConfigError, match=rf"{tmp_path} lies on a file system that runs no programs \(noexec\)"):
            carried._make_room(tmp_path / "e", 0)

    found, store = carry(config, make(tmp_path / "env")), open_run_store(config).uri

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(carried, "_relocate", full)
    place = home(found, disk())
    with pytest.raises(ConfigError, match=rf"it cannot be unpacked into {place} \(.*No space left on device\)"):
        carried.unpack(store, found.name, str(disk()))
    assert not carried.is_whole(place)


def test_an_archive_is_read_in_parts_in_their_order_and_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.store.store.PART_BYTES", 3)
    content, asked = bytes(range(20)), list[tuple[str, int, int]]()

    def get_range(key: str, start: int, end: int) -> bytearray:
        asked.append((key, start, end))
        return bytearray(content[start:end])

    parts = carried._read(SimpleNamespace(get_range=get_range), {"archive": "a.tar.zst", "archive_bytes": 20})
    first = next(parts)
    assert first == content[:3]
    assert len(asked) <= 4, "no more parts than are read soon are in memory"
    assert first + b"".join(parts) == content
    assert sorted(asked) == [("a.tar.zst", start, min(start + 3, 20)) for start in range(0, 20, 3)]


def test_a_mistake_of_ours_is_no_sentence_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: str) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(carried, "unpack", broken)
    with pytest.raises(KeyError, match="ours"):
        carried.main("unpack", "memory://", "none", "/here")


def test_only_an_existing_path_outside_of_an_environment_that_is_not_the_root_leads_out_of_it(tmp_path: Path) -> None:
    def outside(path: str) -> list[str]:
        return list(environment._if_outside(path, tmp_path / "env"))

    for name in ("env/a", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "module.py").touch()
    (tmp_path / "env/out").symlink_to(tmp_path / "other")
    (tmp_path / "into").symlink_to(tmp_path / "env/a")
    inside = ("env", "env/a", "env/a/../a", "env/out", "into", "missing", "other\0more")
    assert [outside(str(tmp_path / name)) for name in inside] == [[]] * len(inside)
    assert outside("/") == outside("//") == outside("/usr/..") == []
    for name in ("other", "module", "env/../other"):
        assert outside(str(tmp_path / name)) == [os.path.normpath(tmp_path / name)]


def test_a_file_that_became_shorter_while_it_was_packed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("value = 1\n")
    found = environment.Environment("/opt/env", files={"lib/a.py": tmp_path / "a.py"})
    assert len(b"".join(environment._tar(found))) == 4 * 512, "a head, the content, and two empty blocks at the end"
    facts = SimpleNamespace(st_size=11, st_mtime=1.5, st_mode=0o100644)
    monkeypatch.setattr(environment, "os", SimpleNamespace(fstat=lambda _: facts))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/a.py became shorter while it was packed. Submit again"):
        list(environment._tar(found))


def test_a_path_is_as_long_as_the_first_line_of_a_script_may_be() -> None:
    with tempfile.TemporaryDirectory() as place:
        room = 127 - len(f"#!{place}//bin/python")
        carried._make_room(Path(place, "n" * room), 0)
        with pytest.raises(ConfigError, match="is too long a path for the first line of a script"):
            carried._make_room(Path(place, "n" * (room + 1)), 0)


def test_a_path_moves_where_it_stands_for_itself_or_a_folder_above_and_nowhere_else() -> None:
    move = carried.mover({"/opt/env": "/new", "/opt/env/src/ours": "/new/editable/0"})
    told = b"/opt/env /opt/env/bin:/opt/env/src/ours/a.py '/opt/env' /opt/env2 /opt/env-old /opt/env.bak /opt/envs"
    assert move(told) == (b"/new /new/bin:/new/editable/0/a.py '/new' /opt/env2 /opt/env-old /opt/env.bak /opt/envs")


def test_only_texts_that_python_or_a_shell_reads_at_the_start_are_rewritten(tmp_path: Path) -> None:
    holding = b"#!/opt/env/bin/python\n"
    contents = {
        "bin/tool": holding,
        "bin/program": b"\x7fELF\0/opt/env/lib",  # a string of another length would break it
        "bin/other": b"#!/bin/sh\n",
        "lib/a.pth": holding,
        "lib/__editable___a_1_finder.py": holding,
        "lib/a.py": holding,
        "bin/large": holding * 2**16,
    }
    found = environment.Environment("/opt/env", places={"/opt/env": ""})
    for number, (name, content) in enumerate(contents.items()):
        found.files[name] = tmp_path / str(number)
        found.files[name].write_bytes(content)
    rewritten = [name for name in found.files if environment._holds_paths(found, name)]
    assert rewritten == ["bin/tool", "lib/a.pth", "lib/__editable___a_1_finder.py"]
