"""A run that is killed, resumed, exported and verified on the card: whole, and a layer at a time."""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from card.figures import Figure

STEPS, COMMIT = 12, 4
_STREAMED = """
import runpy, sys
from trainer.export.proof.sides import ProofSide
ProofSide.place = lambda side, room: next((place for place in side.places if place.streamed), side.places[-1])
sys.argv[0] = "trainer.export"
runpy.run_module("trainer.export", run_name="__main__", alter_sys=True)
"""
"""The export's program, whose proof computes a layer at a time however much room there is."""


def life(given: argparse.Namespace) -> Iterator[Figure]:
    """Train, kill -9 behind a commit, resume; losses beside an undisturbed run's; `export --verify`."""
    from tests.material import Workshop
    from trainer.config import dump_config

    (given.scratch / "life").mkdir()
    workshop = Workshop(given.scratch / "life")
    settings = (f"train.steps={STEPS}", f"checkpoint.every_steps={COMMIT}", "sharding.deepspeed=auto", "optim.lr=1e-2")
    files = dict[str, Path]()
    for name in ("undisturbed", "killed"):
        files[name] = workshop.folder / f"{name}.yaml"
        files[name].write_text(dump_config(workshop.config(name, *settings, "train.deterministic=true")))
    subprocess.run(_capstan("train", str(files["undisturbed"])), check=True, stdout=sys.stderr)
    run = workshop.folder / "store" / "killed"
    killed_at = _killed(_capstan("train", str(files["killed"])), run)
    subprocess.run(_capstan("resume", str(run)), check=True, stdout=sys.stderr)
    expected, found = _losses(workshop.folder / "store" / "undisturbed"), _losses(run)
    gap = max(abs(expected[step] - found[step]) for step in range(1, STEPS + 1))
    yield Figure(f"killed at step {killed_at} and resumed", f"losses {gap:.1e} nats off", "below 1e-3", gap < 1e-3)
    for how, program in (("whole", ["-m", "trainer.export"]), ("a layer at a time", ["-c", _STREAMED])):
        destination = workshop.folder / how.replace(" ", "-")
        command = [sys.executable, *program, str(run), str(destination), "--format", "peft", "--verify"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        sys.stderr.write(done.stdout)
        if done.returncode:
            yield Figure(f"export --verify, {how}", f"exit code {done.returncode}", "0", False)
            continue
        proof = json.loads(done.stdout.splitlines()[-1])["proof"]
        said = f"KL {proof['kl']:.1e} of {proof['kl_allowed']:.1e} allowed"
        yield Figure(f"export --verify, {how}", said, "no more", proof["kl"] <= proof["kl_allowed"])


def _capstan(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launcher.cli", *arguments]


def _killed(command: list[str], run: Path) -> int:
    """Kill the command when its run has committed; the last step whose record it has written."""
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    while process.poll() is None and not list(run.glob("checkpoints/*/manifest.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return max(_losses(run), default=0)


def _losses(run: Path) -> dict[int, float]:
    """Losses by step, of the last start that trained it."""
    lines = [line for path in sorted(run.glob("metrics/*.jsonl")) for line in path.read_text().splitlines()]
    steps = (record for record in map(json.loads, lines) if record["kind"] == "step")
    return {record["step"]: record["loss"] for record in steps}
