"""What ranks on the pretended device do, for tests/device/test_device.py."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.device.pretended import install, told, waits
from tests.dist import runs
from trainer.model import activations
from trainer.processes import ranks
from trainer.state.zero import engine


def train(library: str, given: list[list[Any]]) -> list[dict[str, Any]]:
    """Runs one after the other, each as `runs.run` takes it, and what the device was asked for in each; without a
    `library` on the CPU.
    """
    if library:
        install(Path(library))
    return [_one(library, *arguments) for arguments in given]


def _one(library: str, *arguments: Any) -> dict[str, Any]:
    """How a run ended; with the inputs of layers that it `sent` to the host, in how many `places` there, where the host
    waited, and where in the last step."""
    before, sent, steps = _operations(library), list[int](), list[int]()
    waits.clear()
    with (
        _noted(activations.Offload, "_send", lambda one: sent.append(one.there.data_ptr())),
        _noted(engine.Engine, "step", lambda _: steps.append(len(waits))),
    ):
        try:
            ended = runs.run(*arguments)
            if library:
                torch.ops.pretended.finish()
        except Exception as error:
            ended = {"outcome": "raised", "message": next(iter(str(error).splitlines()), "") or type(error).__name__}
    of_step = waits[steps[-2] : steps[-1]] if len(steps) > 1 else []
    found = {"operations": _operations(library) - before, "sent": len(sent), "places": len(set(sent))}
    return {**ended, **found, "waits": list(waits), "of_step": of_step}


@contextmanager
def _noted(owner: Any, name: str, note: Callable[[Any], None]) -> Iterator[None]:
    """Inside, `note` is told what each call of the owner's method returns."""
    plain = getattr(owner, name)

    def noted(*arguments: Any, **given: Any) -> Any:
        result = plain(*arguments, **given)
        note(result)
        return result

    setattr(owner, name, noted)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def _operations(library: str) -> int:
    return torch.ops.pretended.operations() if library else 0


def train_without(library: str, config_text: str, fingerprint: str, change: list[str] | None) -> dict[str, Any]:
    """A run of the code where in a module another text is in the place of one, and what it raised."""
    install(Path(library))
    if change:
        module, text, put = change
        _change(import_module(module), text, put)
    return _one(library, config_text, fingerprint)


def train_untold(library: str, config_text: str, fingerprint: str) -> dict[str, Any]:
    """A run whose memory's uses on other streams the allocator is not told of, and what it raised."""
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    install(Path(library))
    return _one(library, config_text, fingerprint)


def joined(library: str) -> list[Any]:
    """The device that the process group was told of as this rank's; and a number of every rank, as the host reads it
    when it has waited for the exchange, and when it has not."""
    install(Path(library))
    here = ranks.join()
    waited = here.gather(7.0)
    ranks.mark = lambda device: SimpleNamespace(synchronize=lambda: None)
    return [*told, waited, here.gather(7.0)]


def logits(library: str, run: str, step: int, scratches: list[str | None]) -> list[list[float]]:
    """Logits of the trained model as a proof computes them, a layer at a time where there is a folder for that: their
    mean a row, for each.
    """
    if library:
        install(Path(library))
    from trainer.export.proof.models import Trained
    from trainer.store.store import open_store

    found = list[list[float]]()
    for scratch in scratches:
        trained = Trained.at(open_store(run), step, Path(scratch) if scratch else None)
        rows: list[Tensor] = trained.logits("bf16")
        found.append([float(row.double().logsumexp(-1).mean()) for row in rows])
    return found


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
