"""`capstan export`: the adapter, and on request the proof that it is the trained model.

Both run in a process of their own, which may import torch.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import CapstanError, NothingToResume
from trainer.manifest import committed_steps
from trainer.store import Store


@dataclass(frozen=True)
class Exported:
    """What was written; with --verify also what trainer.verify.Proof measured."""

    destination: str
    step: int
    adapter_logits_max_diff: float | None = None
    tolerance: float | None = None
    adapter_logits_effect: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        proof = ""
        if self.adapter_logits_max_diff is not None:
            proof = (
                f"; its logits in transformers + PEFT differ by at most {self.adapter_logits_max_diff:.3g} "
                f"(allowed {self.tolerance:.3g}, the adapter changes them by up to {self.adapter_logits_effect:.3g})"
            )
        return f"adapter of step {self.step} in {self.destination}{proof}"


def proven(difference: float | None, tolerance: float | None, effect: float | None) -> bool:
    """Whether logits differ tolerably, and the adapter's own effect is so large that this means something."""
    if difference is None or tolerance is None or effect is None:
        return False
    return difference <= tolerance < effect


def export_run(run: Store, destination: str, *, step: int | None, verify: bool, dry_run: bool) -> Exported:
    """`destination` is a folder or an s3://, gs:// or az:// URI; `step` None is the newest whole checkpoint.

    Raises `CapstanError` when there is none, the destination is taken, or the adapter does not verify.
    """
    if "://" not in destination:
        destination = str(Path(destination).expanduser().absolute())
    if dry_run:
        steps = committed_steps(run)
        if not steps or step not in (None, *steps):
            which = "" if step is None else f" of step {step}"
            raise NothingToResume(f"{run.uri} has no committed checkpoint{which}.")
        return Exported(f"{destination} (dry run: nothing written)", steps[0] if step is None else step)
    options = [*(["--step", str(step)] if step is not None else []), *(["--verify"] if verify else [])]
    made = _module("trainer.export", run.uri, destination, *options)
    result = Exported(destination, **made)
    if verify and not proven(result.adapter_logits_max_diff, result.tolerance, result.adapter_logits_effect):
        raise CapstanError(f"{result.sentence()}. It does not prove to be what was trained; do not use it.")
    return result


def _module(name: str, *arguments: str) -> dict[str, Any]:
    """Run one of the trainer's modules that print a JSON object; its error and exit code become ours."""
    done = subprocess.run([sys.executable, "-m", name, *arguments], capture_output=True, text=True)
    if done.returncode:
        _, expected, sentence = done.stderr.rpartition("capstan: ")
        if not expected:
            print(done.stderr, file=sys.stderr)
            raise CapstanError(f"{name} ended with exit code {done.returncode}; its output is above.")
        error = CapstanError(sentence.strip())
        error.exit_code = done.returncode
        raise error
    return json.loads(done.stdout.splitlines()[-1])
