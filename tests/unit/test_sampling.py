"""Beside a run that learns from what servers sample its driver keeps the process alive that asks them."""

import subprocess
import sys
import threading
from typing import Any

import pytest

from launcher.cluster.slurm import script
from launcher.start import sampling
from launcher.start.sampling import asks_servers, sampling_beside
from tests.material import Workshop
from trainer.config import override
from trainer.errors import NotFound
from trainer.processes import children
from trainer.run import layout
from trainer.run.segments import read_stream

SERVERS = ("objective.name=grpo", "rollout.reward=exact", "rollout.engine=[http://gpu-1:8000]")
FAILS = "import sys, time; print('no server answers', file=sys.stderr)"
STAYS = "import sys, time; print('sampled', file=sys.stderr, flush=True); time.sleep(600)"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("sampling"))


def test_it_is_started_again_and_ends_with_the_run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, commands = iter((f"{FAILS}; sys.exit(1)", f"{FAILS}; sys.exit(1)", STAYS)), list[list[str]]()
    started, told, stays = list[subprocess.Popen[bytes]](), list[str](), threading.Event()
    run, real = workshop.store.sub("first"), children.start

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        assert not options["env"].keys() & {"RANK", "SLURM_PROCID"}
        started.append(real([sys.executable, "-c", next(programs)], **options))
        if len(started) == 3:
            stays.set()
        return started[-1]

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(sampling.children, "start", start)
    monkeypatch.setattr(sampling, "AGAIN_SECONDS", 0.01)
    with sampling_beside(workshop.config("first", *SERVERS), run, told.append):
        assert stays.wait(60)
        while started[-1].poll() is None and b"sampled" not in _said(run):
            pass
        assert started[-1].poll() is None
    assert started[-1].poll() == -9
    assert {tuple(command[1:]) for command in commands} == {("-m", "launcher.cli", "rollout", run.uri)}
    assert _said(run) == b"no server answers\nno server answers\nsampled\n"
    assert told == ["capstan rollout ended with exit code 1: no server answers; it is started again every 0.01 s"]


def _said(run: Any) -> bytes:
    try:
        return read_stream(run, layout.LOGS, layout.sampling_log(1))
    except NotFound:
        return b""


def test_a_run_that_asks_no_server_has_none(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.children, "start", lambda *_, **__: pytest.fail("it was started"))
    own = workshop.config("first", *SERVERS, "rollout.engine=own")
    with sampling_beside(own, workshop.store.sub("first"), print):
        assert asks_servers(own) is None


def test_a_submission_says_that_there_will_be_one(workshop: Workshop) -> None:
    job = workshop.config("first", *SERVERS, "cluster.workers=2", "cluster.slurm.nodes=2")
    text = script.render(job, "s3://bucket/first", "abc", {})
    assert "\n# beside the ranks, where the run is driven: capstan rollout, which has http://gpu-1:8000 sample" in text
    assert "capstan rollout" not in script.render(override(job, "rollout.engine=own"), "s3://bucket/first", "abc", {})
