"""What `capstan plan` says of six large mixtures: memory of a GPU and of a host, and seconds of a step.

    python benchmarks/mixtures.py [--beside CHECKOUT]

Prints a table. With --beside, each cell has the value of that checkout first, such as a `git worktree` of an earlier
commit. Sizes are those that Capstan has of well-known bases, so nothing is downloaded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Mixture(NamedTuple):
    name: str
    base: str
    gpu: str
    ranks: int
    settings: tuple[str, ...] = ()


MIXTURES = (
    Mixture("GLM-4.6", "zai-org/GLM-4.6", "H100", 8),
    Mixture("MiniMax-M2", "MiniMaxAI/MiniMax-M2", "H200", 8),
    Mixture("Qwen3-Coder-480B", "Qwen/Qwen3-Coder-480B-A35B-Instruct", "H100", 8),
    Mixture("ERNIE-4.5-300B", "baidu/ERNIE-4.5-300B-A47B-PT", "H100", 8),
    Mixture("DeepSeek-V3", "deepseek-ai/DeepSeek-V3", "H100", 16),
    Mixture("Kimi K2.5, as stored", "moonshotai/Kimi-K2.5", "H100", 16, ("quant.type=stored",)),
)
_RUN = """
run: {name: planned}
model: {base: BASE}
data: {train: [{path: data.jsonl}], sequence_length: 4096}
train: {steps: 100, global_batch: RANKS}
cluster: {workers: RANKS}
"""


def planned(mixture: Mixture, checkout: Path, folder: Path) -> dict[str, Any]:
    """What `capstan plan --json` of this checkout prints."""
    row = {"messages": [{"role": "user", "content": "word " * 250}, {"role": "assistant", "content": "word " * 250}]}
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * 200)
    (folder / "run.yaml").write_text(_RUN.replace("BASE", mixture.base).replace("RANKS", str(mixture.ranks)))
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_CACHE": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "launcher.cli", "plan", "run.yaml", *mixture.settings]
    command += ["--gpu", mixture.gpu, "--ranks-per-node", "8", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 4):  # 4: it does not fit
        raise SystemExit(f"{mixture.name} cannot be planned by {checkout}.")
    return json.loads(done.stdout)


def cells(plan: dict[str, Any]) -> list[str]:
    memory, gib = plan["memory_per_gpu"], 2**30
    return [
        f"{memory['total'] / gib:.1f}{'' if plan['fits'] else ' (does not fit)'}",
        f"{memory['dequantized_weight'] / gib:.2f}",
        f"{plan['layers'] - plan['recomputed_layers']} of {plan['layers']}",
        f"{plan['memory_per_host']['total'] / gib:.1f}",
        f"{plan['estimate']['step_seconds']:.2f}",
    ]


def rows(checkouts: list[Path]) -> Iterator[str]:
    yield "| base | GPUs | GiB of a GPU | GiB of decoded weights | layers that keep | GiB of a host | seconds of a step |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for mixture in MIXTURES:
        found = list[list[str]]()
        for checkout in checkouts:
            with tempfile.TemporaryDirectory() as folder:
                found.append(cells(planned(mixture, checkout, Path(folder))))
        beside = (" → ".join(dict.fromkeys(values)) for values in zip(*found, strict=True))
        yield f"| {' | '.join([mixture.name, f'{mixture.ranks} {mixture.gpu}', *beside])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--beside", type=Path, metavar="CHECKOUT", help="another checkout, which comes first in each cell"
    )
    given = parser.parse_args()
    for row in rows([*([given.beside.absolute()] if given.beside else []), ROOT]):
        print(row, flush=True)


if __name__ == "__main__":
    main()
