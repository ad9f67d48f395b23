"""The real `capstan` command, as a process with a time-out and an end."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.forked import run_command
from tests.material import Workshop

ROOT = Path(__file__).parents[2]
Capstan = Callable[..., subprocess.CompletedProcess[str]]

ENVIRONMENT = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "200",
}


# A process that was forked has imported what reads these already.
_READ_AT_IMPORT = ("HF_", "PYTHON", "CUDA_")
_AT_FIRST = dict(ENVIRONMENT)


@pytest.fixture
def capstan(tmp_path: Path) -> Capstan:
    """`capstan(*arguments, timeout=..., before=code)` in an empty folder; both streams as text."""

    def run(*arguments: object, timeout: float = 200, before: str = "") -> subprocess.CompletedProcess[str]:
        changed = {name for name, value in ENVIRONMENT.items() if _AT_FIRST.get(name) != value}
        if not any(name.startswith(_READ_AT_IMPORT) for name in changed):
            return run_command([*map(str, arguments)], tmp_path, ENVIRONMENT, timeout, before)
        assert not before, "a new interpreter runs nothing first"
        command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=tmp_path, env=ENVIRONMENT)

    return run


@dataclass(frozen=True)
class Installed:
    """An environment that has Capstan from its `wheel` only; the dependencies are those of this process."""

    wheel: Path
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def capstan(self) -> Path:
        return self.folder / "bin/capstan"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of the checkout, built of a copy and installed into an environment of its own. Needs no network."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("trainer", "launcher", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    offline = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=200)
    (wheel,) = (source / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=300)
    into = ["--python", str(folder / "bin/python"), "install", *offline, str(wheel)]
    subprocess.run([*pip, *into], check=True, timeout=200)
    (own,) = folder.glob("lib/python*/site-packages")
    # Folders that a .pth file names are searched last, and .pth files in them, such as the checkout's, are not read.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (own / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    return Installed(wheel, folder)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def config(workshop: Workshop, tmp_path: Path) -> Path:
    """A small valid run whose store is this test's own."""
    tree = workshop.config("mine", f"run.store={tmp_path / 'store'}").model_dump(mode="json", exclude_unset=True)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def editable_environment(prefix: Path) -> dict[str, str]:
    """A small virtual environment at `prefix` that has this checkout editable, as pip installs it.

    Returns the variables with which its Python also finds this process's libraries, which are too many to pack.
    """
    venv.create(prefix, symlinks=True)
    site = prefix / f"lib/python3.{sys.version_info.minor}/site-packages"
    (site / "capstan.pth").write_text(f"{ROOT}\n")
    (site / "capstan_llm-0.dist-info").mkdir()
    told = {"dir_info": {"editable": True}, "url": ROOT.as_uri()}
    (site / "capstan_llm-0.dist-info/direct_url.json").write_text(json.dumps(told))
    return {**ENVIRONMENT, "PYTHONPATH": sysconfig.get_path("purelib")}
