"""What orders the streams of the product's own code, taken out one line at a time: python -m tests.device.controls
[WORD ...]

Each line is taken out in the processes of a run on the pretended device (pretended.cpp), which has to be caught: the
run ends with a race, the host reads what has not come, or it waits at other places than the run of the same case does
with every line in its place. A WORD picks the lines whose place contains it. Ends with exit code 1 where a line is
missed by nothing. The table is benchmarks/README.md's.
"""

import math
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from tests.device import life
from tests.device.cases import ALONE, NODES, OFFLOADED_ALONE, STREAMS, Case, made, run_of
from tests.device.pretended import build
from tests.dist.launch import RankFailed, launch
from tests.material import Workshop
from trainer.config import dump_config
from trainer.export.write.adapter import export_adapter
from trainer.store.store import open_store


class Line(NamedTuple):
    """A line of ours that has `text` in it once, in the module of this name, and what is put there; `keeps` says what
    it is for.
    """

    keeps: str
    module: str
    text: str
    put: str
    case: Case


_GATHER, _OFFLOAD, _ENGINE = "trainer.state.zero.gather", "trainer.model.activations", "trainer.state.zero.engine"
_RANKS, _ACCELERATOR = "trainer.processes.ranks", "trainer.processes.accelerator"
_SECONDS = 600
_CHECKPOINTS = "trainer.state.checkpoint.checkpoints"
_NOW = "self._device.current_stream()"

GATHERED = Line("compute waits for a gather", _GATHER, f"{_NOW}.wait_stream(self._stream)", "pass", STREAMS)
LINES = (
    Line("a gather waits for what was written before the pass", _GATHER, f"self._stream.wait_stream({_NOW})", "pass", NODES),
    GATHERED,
    Line("a gather is over before its handle is dropped", _GATHER, "                        handle.wait()", "                        pass", STREAMS),
    Line("the host marks where a layer is computed", _GATHER, "            event.record()", "            pass", STREAMS),
    Line("the host gathers no more than two layers ahead", _GATHER, "popleft()[0].synchronize()", "popleft()", STREAMS),
    Line("an offloaded input is copied behind its layer", _OFFLOAD, "self._stream.wait_stream(torch.accelerator.current_stream(self._device))", "pass", OFFLOADED_ALONE),
    Line("the copy of an input is marked", _OFFLOAD, "what.copied.record()", "pass", OFFLOADED_ALONE),
    Line("an input is freed behind its copy", _OFFLOAD, "            self._wait_for(gone)", "            pass", OFFLOADED_ALONE),
    Line("a layer's backward pass waits for its input", _OFFLOAD, "        self._wait_for(wanted)", "        pass", OFFLOADED_ALONE),
    Line("a copy of an input does not stop the host", _OFFLOAD, ", pin_memory=True", "", OFFLOADED_ALONE),
    Line("a phase and an exchange are marked", _ACCELERATOR, "event.record()", "pass", ALONE),
    Line("a row does not stop the host", _ACCELERATOR, "tensor.pin_memory().to(", "tensor.to(", ALONE),
    Line("a row goes to the device", _ENGINE, "row.to(self.ranks.device))", "row)", ALONE),
    Line("the host waits for an exchange", _RANKS, "there.synchronize()", "pass", STREAMS),
    Line("groups begin before the first step", _RANKS, "here.item()  #", "pass  #", STREAMS),
    Line("the norm of the gradient is read once", _ENGINE, "    _read_norms_once(zero)", "    pass", STREAMS),
    Line("a save waits for its copies", _CHECKPOINTS, "torch.accelerator.synchronize()", "pass", ALONE),
    Line("a save's copies do not wait for each other", _CHECKPOINTS, "pin_memory=on_gpu", "pin_memory=False", ALONE),
)  # fmt: skip


class _Run(NamedTuple):
    """How a run ended: the first rank's message or what is wrong with its adapter, and where the host waited how often,
    on each rank.
    """

    message: str
    waits: list[Counter[str]]

    def caught(self, control: "_Run") -> str | None:
        """In words, what tells it from the `control`."""
        if self.message != control.message:
            return self.message
        for mine, its in zip(self.waits, control.waits, strict=True):
            for place in sorted(mine | its):
                if mine[place] != its[place]:
                    return f"the host waits {mine[place]} times instead of {its[place]} in {place}"
        return None


def _run(library: str, device: Workshop, name: str, case: Case, change: list[str] | None) -> _Run:
    given = made(device, name, case)
    arguments = (library, dump_config(given), device.prepare(given).train, change)
    try:
        ends: list[dict[str, Any]] = launch(
            case.ranks, life.train_without, *arguments, ranks_per_node=case.ranks_per_node, timeout=_SECONDS
        )
    except RankFailed as error:
        return _Run(str(error).splitlines()[0], [])
    (message, *_) = [end["message"] for end in ends if end["outcome"] != "finished"] or ["finished"]
    if message == "finished":
        export_adapter(run_of(given), open_store(str(device.folder / f"{name}-adapter")))
        weights = load_file(device.folder / f"{name}-adapter/adapter_model.safetensors").values()
        message = "finished" if all(math.isfinite(float(weight.sum())) for weight in weights) else "NaN in the adapter"
    return _Run(message, [Counter(end["waits"]) for end in ends])


def main(words: list[str]) -> int:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would have all that it does on such a device compiled
    library = str(build(Path(__file__).parents[2] / ".pytest_cache" / "device"))
    chosen = [line for line in LINES if not words or any(word in f"{line.module}: {line.keeps}" for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="capstan-controls-") as folder:
        device, controls = Workshop(Path(folder), "llama", num_hidden_layers=4), dict[Case, _Run]()
        for number, line in enumerate(chosen):
            if line.case not in controls:
                controls[line.case] = _run(library, device, f"control-{len(controls)}", line.case, None)
                assert controls[line.case].message == "finished", controls[line.case].message
            caught = _run(library, device, f"line-{number}", line.case, [line.module, line.text, line.put]).caught(
                controls[line.case]
            )
            missed += caught is None
            print(f"| {line.module.removeprefix('trainer.')} | {line.keeps} | {caught or '**nothing**'} |", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
