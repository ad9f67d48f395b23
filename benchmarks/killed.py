"""Draws docs/killed.svg: the loss of a run that is killed and resumed on other numbers of ranks, over that of a run
that nothing disturbs.

    python benchmarks/killed.py [--work DIR] [--picture docs/killed.svg]

Both train the sample of `capstan smoke`, on this machine's CPU. The killed run starts on 2 ranks; all its processes are
killed (kill -9) in the middle of a step, twice, and `capstan resume` goes on with 1 rank and then with 3. The script
fails unless every step's loss is that of the undisturbed run within the rounding of another number of ranks.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from launcher.smoke.sample import make_sample
from launcher.view.status import read_generation
from trainer.store.store import Store, open_store

STEPS, COMMIT_EVERY, KILLS = 60, 10, {17: 1, 38: 3}
"""The steps after which the run is killed, each with the ranks that it is resumed on."""
RANKS = 2
ROUNDING = 2e-3
"""How far losses may be apart, in nats: another number of ranks adds in another order."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 330, 56, 844, 64, 278
COLORS, RADII = ("#2563eb", "#f59e0b", "#16a34a"), (5.5, 4.0, 2.6)
"""Of each start. Steps that are done twice have the points of both."""
PALE, GRID, INK = "#c3cad9", "#e5e7eb", "#374151"


def settings(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """The configuration file of a run over the sample in `folder`, with these values in its sections."""
    sample = folder / "sample"
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "store": str(folder / "runs")},
        "model": {"base": str(sample / "base"), "dtype": "fp32"},
        "data": {"train": [{"path": str(sample / "data" / "train-*.jsonl")}], "sequence_length": 256},
        "optim": {"lr": 2.0e-3, "warmup_steps": 3},
        "train": {"steps": STEPS, "global_batch": 6},
        "checkpoint": {"every_steps": COMMIT_EVERY},
        "cluster": {"workers": RANKS},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def capstan(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "launcher.cli", *arguments], start_new_session=True)


def train(*arguments: str) -> None:
    process = capstan(*arguments)
    if process.wait() != 0:
        raise SystemExit(f"capstan {' '.join(arguments)} ended with exit code {process.returncode}")


def killed_after(step: int, run: Store, generation: int, *arguments: str) -> None:
    """Run a command until its run has done `step`, and kill its driver and every rank."""
    process = capstan(*arguments)
    while process.poll() is None:
        records = read_generation(run, generation)
        if records.get("step") and records["step"][-1]["step"] >= step:
            for pid in (process.pid, *records["start"][0]["pids"]):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.05)
    raise SystemExit(f"the run ended before its step {step}")


def losses(run: Store, generation: int) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_generation(run, generation)["step"]}


def draw(undisturbed: dict[int, float], starts: list[tuple[int, dict[int, float]]], picture: Path) -> None:
    """`starts`: the ranks and the losses of each start of the killed run."""
    low, high = min(undisturbed.values()), max(undisturbed.values())

    def at(step: float, loss: float) -> tuple[float, float]:
        down = (high - loss) / (high - low)
        return LEFT + step / STEPS * (RIGHT - LEFT), TOP + 14 + down * (BOTTOM - TOP - 28)

    def text(x: float, y: float, words: str, anchor: str = "start", color: str = INK, size: int = 13) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}">{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(
            LEFT, 24, "A run that is killed (kill -9) twice and resumed on 1 and 3 ranks has the same losses", size=16
        ),
    ]
    for tenth in range(int(low * 5) + 1, int(high * 5) + 1):
        _, y = at(0, tenth / 5)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tenth / 5:.1f}", "end", size=12))
    for step in range(COMMIT_EVERY, STEPS + 1, COMMIT_EVERY):
        parts.append(text(at(step, low)[0], BOTTOM + 16, str(step), "middle", size=12))
    parts.append(text(LEFT - 44, TOP - 6, "loss, nats a token", size=12))
    parts.append(text(LEFT, BOTTOM + 16, "step", "end", size=12))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in sorted(undisturbed.items())))
    parts.append(f'<polyline points="{path}" fill="none" stroke="{PALE}" stroke-width="9" stroke-linejoin="round"/>')
    place = LEFT + 24
    parts.append(
        f'<line x1="{LEFT}" x2="{place - 6}" y1="{HEIGHT - 18}" y2="{HEIGHT - 18}" stroke="{PALE}" stroke-width="9"/>'
    )
    parts.append(text(place, HEIGHT - 14, "undisturbed, 2 ranks"))
    for number, ((ranks, measured), color, radius) in enumerate(zip(starts, COLORS, RADII, strict=True)):
        dots = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in (at(*point) for point in measured.items())
        )
        parts.append(f'<g fill="{color}">{"".join(dots)}</g>')
        if number + 1 < len(starts):
            x, _ = at(max(measured) + 0.5, low)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}" stroke="#dc2626" stroke-dasharray="4 4"/>'
            )
            parts.append(text(x, TOP - 6, "kill -9", "middle", "#dc2626"))
        place += 190
        parts.append(f'<circle cx="{place - 10}" cy="{HEIGHT - 18}" r="{radius}" fill="{color}"/>')
        name = f"{'started' if number == 0 else 'resumed'} on {ranks} {'rank' if ranks == 1 else 'ranks'}"
        parts.append(text(place, HEIGHT - 14, name))
    picture.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/killed.svg.")
    parser.add_argument("--work", type=Path, help="a folder to work in, which is kept")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parents[1] / "docs" / "killed.svg")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        make_sample(folder / "sample")
        train("train", str(settings(folder, "undisturbed")))
        runs = open_store(str(folder / "runs"))
        run, ranks = runs.sub("killed"), [RANKS, *KILLS.values()]
        command = ("train", str(settings(folder, "killed")))
        for generation, (step, after) in enumerate(KILLS.items(), start=1):
            killed_after(step, run, generation, *command)
            command = ("resume", run.uri, f"cluster.workers={after}")
        train(*command)
        undisturbed = losses(runs.sub("undisturbed"), 1)
        starts = [(count, losses(run, at)) for at, count in enumerate(ranks, start=1)]
        gap = max(abs(loss - undisturbed[step]) for _, measured in starts for step, loss in measured.items())
        print(json.dumps({"steps": len(undisturbed), "starts": [len(measured) for _, measured in starts], "gap": gap}))
        if gap > ROUNDING:
            raise SystemExit(f"a loss differs by {gap:.5f} nats")
        draw(undisturbed, starts, given.picture)


if __name__ == "__main__":
    main()
