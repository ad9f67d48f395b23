"""What ranks on the pretended device do, for tests/device/test_device.py."""

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.device.pretended import install
from tests.dist import runs


def train(library: str, config_text: str, fingerprint: str, how: str = "start", *more: Any) -> dict[str, Any]:
    """A run, or the rest of one, as `runs.run` says, and what the device was asked for."""
    install(Path(library))
    ended = runs.run(config_text, fingerprint, how, *more)
    torch.ops.pretended.finish()
    return {**ended, "operations": torch.ops.pretended.operations()}


def train_without(
    library: str, config_text: str, fingerprint: str, how: str, module: str, line: str, put: str
) -> dict[str, Any]:
    """A run of the code with `put` in the place of `line` in `module`, and what it raised."""
    install(Path(library))
    _change(import_module(module), line, put)
    return _watched(config_text, fingerprint, how)


def train_untold(library: str, config_text: str, fingerprint: str) -> dict[str, Any]:
    """A run whose memory's uses on other streams the allocator is not told of, and what it raised."""
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    install(Path(library))
    return _watched(config_text, fingerprint, "start")


def _watched(config_text: str, fingerprint: str, how: str) -> dict[str, Any]:
    try:
        ended = runs.run(config_text, fingerprint, how)
        torch.ops.pretended.finish()
    except (RuntimeError, ValueError) as error:
        return {"outcome": "raised", "message": str(error).splitlines()[0]}
    return ended


def logits(library: str, run: str, step: int, scratch: str | None) -> list[float]:
    """Logits of the trained model as a proof computes them, a layer at a time where it has a folder for that: their mean a row."""
    if library:
        install(Path(library))
    from trainer.export.proof.sides import Trained
    from trainer.store.store import open_store

    trained = Trained.at(open_store(run), step, Path(scratch) if scratch else None)
    found: list[Tensor] = trained.logits("bf16")
    return [float(row.double().logsumexp(-1).mean()) for row in found]


def make_policy(path: Path, name: str, **more: Any) -> Path:
    """A policy for GPUs with a threshold that keeps a few parameters of a small base whole and partitions most."""
    policy = json.loads((Path(__file__).parents[2] / f"ds_configs/{name}.json").read_text(encoding="utf-8"))
    policy["zero_optimization"] |= {"stage3_param_persistence_threshold": 600, "reduce_bucket_size": 5000, **more}
    path.write_text(json.dumps(policy), encoding="utf-8")
    return path


def _change(module: Any, line: str, put: str) -> None:
    """Read `module` again with another line, and give its classes and functions to all that has imported them."""
    source = inspect.getsource(module)
    assert source.count(line) == 1, f"{module.__name__} has {source.count(line)} of {line!r}"
    before = dict(vars(module))
    exec(compile(source.replace(line, put), module.__file__, "exec"), vars(module))
    for other in [other for name, other in sys.modules.items() if name.startswith("trainer.")]:
        for name, value in list(vars(other).items()):
            if (inspect.isclass(value) or inspect.isfunction(value)) and value is before.get(name):
                setattr(other, name, getattr(module, name))
