"""The two sides of a proof: each in a process of its own, on the GPU or the CPU by numbers that are said before
anything is loaded.
"""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.base.test_published_models import MODELS
from trainer.base.architecture import Architecture
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import Quant
from trainer.errors import ConfigError, DoesNotFit
from trainer.export.proof import sides
from trainer.export.proof.sides import FreeMemory, ProofSide, aside, exported_side, trained_side

LEARNT = 10**9  # of LoRA on all linear layers, more than either has
A_MACHINE = FreeMemory(gpu=78 * 2**30, host=2**39)  # one of two GPUs of 80 GB, and half a terabyte
HELD = 2**28
_kept: list[bytes] = []


def _process(*names: str) -> tuple[int, list[str | None]]:
    return os.getpid(), [os.environ.get(name) for name in names]


def _precision() -> tuple[list[str | None], str | bool]:
    import torch

    return _process("CUDA_VISIBLE_DEVICES", "RANK", "NVIDIA_TF32_OVERRIDE")[1], torch.backends.cuda.matmul.allow_tf32


def _fail() -> None:
    raise ConfigError("it cannot be read")


def _run_out() -> None:
    bytearray(2**62)


def _hold() -> int:
    """Bytes that nobody frees, as libraries keep a model."""
    before = _resident()
    _kept.append(b"1" * HELD)
    return _resident() - before


def _resident() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_side_is_a_process_that_ends_and_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in of_a_rank:
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pid, found = aside("cpu", _process, *of_a_rank, "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    assert pid != os.getpid()
    assert not Path(f"/proc/{pid}").exists()  # nothing of it is left, whatever its libraries hold
    assert found == [*[None] * 6, "", "cpu"]
    assert [os.environ[name] for name in of_a_rank] == ["3"] * 6


def test_a_side_on_the_gpu_multiplies_in_full_fp32_whatever_the_image_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")  # as NVIDIA's images of PyTorch have it
    assert aside("gpu", _precision) == (["0", None, "0"], False)


def _hold_aside_and_here() -> tuple[int, int, int]:
    """What a side comes to hold, what is left of that in this process, and what this process comes to hold itself."""
    before = _resident()
    held_aside = aside("cpu", _hold)
    return held_aside, _resident() - before, _hold()


def test_nothing_that_a_side_holds_is_left_of_it() -> None:
    # The process of the tests may free or cache memory of earlier tests at any time, so a new one is measured.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        held_aside, left, held_here = pool.submit(_hold_aside_and_here).result()
    assert held_aside >= HELD
    assert left < HELD // 8
    assert held_here >= HELD  # in the process that asked, it would have stayed


@pytest.mark.usefixtures("forked_modules")
def test_an_error_of_a_side_is_the_proofs_and_one_that_is_killed_says_so() -> None:
    with pytest.raises(ConfigError, match="it cannot be read"):
        aside("cpu", _fail)
    with pytest.raises(DoesNotFit, match="one side was killed, as Linux does when memory runs out"):
        aside("cpu", _die)
    with pytest.raises(DoesNotFit, match="one side ran out of memory"):
        aside("cpu", _run_out)


def _linger(note: str) -> None:
    Path(note).write_text(str(os.getpid()))
    threading.Event().wait()


def test_a_side_ends_with_the_command_that_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = get_context("spawn").Process(target=aside, args=("cpu", _linger, str(note)))
    command.start()
    _wait_until(lambda: note.exists() and note.read_text() != "")
    side = Path(f"/proc/{note.read_text()}")
    assert side.exists()
    command.kill()
    command.join()
    _wait_until(lambda: not side.exists() or "\nState:\tZ" in (side / "status").read_text())


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (2, "gpu")])
def test_a_process_that_was_made_ready_is_the_next_one_of_its_device_and_later_ones_are_made_as_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: Any
) -> None:
    made = list[str]()

    class Process:
        def __init__(self, device: str) -> None:
            self.name = f"{device} {len(made)}"
            made.append(self.name)

        def submit(self, work: Callable[..., Any], *given: Any) -> Any:
            return SimpleNamespace(result=lambda: pickle.dumps(self.name))

        def __enter__(self) -> "Process":
            return self

        def __exit__(self, *_: object) -> None:
            made.append(f"{self.name} ends")

        def shutdown(self, cancel_futures: bool) -> None:
            made.append(f"{self.name} is not needed")

    monkeypatch.setattr(sides, "_process", Process)
    monkeypatch.setattr(sides, "local_gpus", lambda: gpus)
    with sides.getting_ready():
        sides.get_ready("trainer")
        sides.get_ready("trainer")
        assert aside(device, print) == f"{device} 0"
    assert made == [f"{device} 0", f"{device} 1", f"{device} 0 ends", f"{device} 1 is not needed"]
    made.clear()
    sides.get_ready("trainer")
    assert made == [], "nothing waits for anything any more"
    assert aside(device, print) == f"{device} 0"


@pytest.fixture(scope="module")
def llama_405b() -> Architecture:
    return read_architecture(MODELS["Llama-3.1-405B"].config)


def _sides(model: Architecture, refused: str = "") -> list[ProofSide]:
    """That of the trained model, of the exported adapter over the base in 4 bits, and of a merged model."""
    exported = (exported_side(model, Quant(), 2, packed=packed, refused=refused) for packed in (True, False))
    return [trained_side(model, Quant(), LEARNT, 4), *exported]


WHOLE, STREAMED = "on the GPU; it takes ", "on the GPU, a layer at a time, as all of it at once would take "


@pytest.mark.parametrize(("layers", "how"), [(22, [WHOLE, WHOLE, STREAMED]), (126, [STREAMED, STREAMED, STREAMED])])
def test_a_405b_verifies_on_one_machine_of_two_gpus_with_80_gb_and_so_do_its_first_layers(
    llama_405b: Architecture, layers: int, how: list[str]
) -> None:
    """The first 22 layers are some 70 billion weights."""
    kept = tuple(part for part in llama_405b.parameters if part.layer is None or part.layer < layers)
    for side, beginning in zip(_sides(replace(llama_405b, parameters=kept)), how, strict=True):
        assert side.fits(A_MACHINE)
        sentence = side.sentence(A_MACHINE)
        assert sentence.startswith(f"the {side.name} side computes {beginning}")
        assert " of 78.0 GiB there and " in sentence
        assert sentence.endswith(" of 512.0 GiB of host memory")


def test_of_a_405b_the_layers_in_4_bits_are_on_the_host_and_a_few_in_full_on_the_gpu(llama_405b: Architecture) -> None:
    trained, adapter, merged = (side.place(A_MACHINE) for side in _sides(llama_405b))
    layer = sum(part.numel for part in llama_405b.in_layer(0))
    in_4_bits = 126 * layer * (1 / 2 + 4 / 64)
    assert all(in_4_bits < side.host < 1.5 * in_4_bits for side in (trained, adapter))
    assert 2 * layer < merged.host < 3 * layer  # from the files again at each turn
    assert all(6 * layer < side.gpu < 15 * layer for side in (adapter, merged))
    assert 8 * LEARNT < trained.gpu < 15 * layer


def test_what_is_stored_in_fewer_bits_is_read_whole_and_that_is_said(llama_405b: Architecture) -> None:
    _, adapter, _ = _sides(llama_405b, "it is so")
    sentence = adapter.sentence(A_MACHINE)
    assert sentence.startswith(
        "the exported side computes on the CPU, as all of it at once would take 272.8 GiB of the GPU and it is so;"
    )
    assert sentence.endswith(" of 512.0 GiB of host memory, which is more than this machine has free: Linux may end it")
    assert not adapter.fits(A_MACHINE)
    assert adapter.fits(replace(A_MACHINE, host=2**40))


def test_without_a_gpu_nothing_is_said_of_one(llama_405b: Architecture) -> None:
    for side, needed in zip(_sides(llama_405b), (2**39, 2**40, 2**40), strict=True):
        enough = side.sentence(FreeMemory(0, needed))
        assert enough.startswith(f"the {side.name} side computes on the CPU; it takes ")
        assert "GPU" not in enough + side.sentence(FreeMemory(0, 2**38))
    assert [side.place(FreeMemory(0, 2**39)).streamed for side in _sides(llama_405b)] == [False, True, True]


def test_a_side_needs_at_least_its_weights(llama_405b: Architecture) -> None:
    trained, packed, merged = (max(place.host for place in side.places) for side in _sides(llama_405b))
    assert 405 * 10**9 / 2 < trained < 405 * 10**9
    assert packed == merged > 2 * 405 * 10**9
    assert trained_side(llama_405b, Quant(type="none"), 0, 4).places[-1].host > 4 * 405 * 10**9
