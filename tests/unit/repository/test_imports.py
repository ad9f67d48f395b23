"""The command line answers before anything heavy is imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.material import make_base
from trainer.processes import deferred

HEAVY = ("torch", "ray", "deepspeed", "transformers", "peft", "bitsandbytes", "pyarrow", "numpy")


@pytest.mark.parametrize(
    "module",
    [
        "launcher.cli.__main__",
        "launcher.doctor.doctor",
        "trainer.plan.plan",
        "trainer.state.zero.policy",
        "trainer.state.checkpoint.identity",
        "launcher.plan.summary",
        # The configuration reads the kinds of these while it is imported, and they may be imported before it.
        "trainer.model.held",
        "trainer.state.optimizer",
        "trainer.train.every",
        "trainer.tuning.objective",
    ],
)
def test_importing_leaves_heavy_libraries_out(module: str):
    code = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# The libraries that DeepSpeed, transformers and bitsandbytes import by themselves, and no run uses.
UNUSED = ("mlflow", "pandas", "fastapi", "scipy", "sklearn", "networkx", "torch._inductor.compile_fx")
# What a rank imports, and what DeepSpeed imports when its engine starts.
IMPORTED = "import trainer.rank, deepspeed.runtime.zero.muon.muon_optimizer"
WITHOUT_DEFERRING = (
    "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != 'trainer.processes.deferred']"
)


@pytest.mark.parametrize(
    "change",
    [pytest.param("", id="deferred"), pytest.param(WITHOUT_DEFERRING, id="control", marks=pytest.mark.long)],
)
def test_a_rank_starts_without_the_libraries_that_no_run_uses(change: str) -> None:
    code = f"import sys, trainer\n{change}\n{IMPORTED}\nprint(*(n for n in {UNUSED!r} if n in sys.modules))"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    found = set(result.stdout.splitlines()[-1].split())
    assert found == set() if not change else {"mlflow", "scipy", "networkx"} <= found


def test_what_is_deferred_works_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    plain: Any = torch.compile
    with deferred._stand_in("colorsys"):
        from colorsys import rgb_to_hls
    assert "colorsys" not in sys.modules
    assert rgb_to_hls(1.0, 1.0, 1.0) == (0.0, 1.0, 0.0)
    there = sys.modules["colorsys"]
    with deferred._stand_in("colorsys"):
        assert sys.modules["colorsys"] is there, "somebody has paid for it already"
    assert sys.modules["colorsys"] is there

    compiled: list[dict[str, Any]] = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    with deferred._compile_at_the_first_call():
        double = torch.compile(lambda number: 2 * number, dynamic=False)
        triple = torch.compile(backend="eager")(lambda number: 3 * number)
    assert compiled == []
    assert [double(2), double(3), triple(3)] == [4, 6, 9]
    assert compiled == [{"dynamic": False}, {"backend": "eager"}]
    assert torch.compile is compile_now is not plain


def test_transformers_keeps_torch_where_a_process_has_it_or_may_make_models(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    for alone, there in ((False, {}), (True, {"torch": 1}), (True, {"transformers": 1})):
        here = dict(there)
        monkeypatch.setattr(deferred, "_makes_tokens_alone", alone)
        monkeypatch.setattr(deferred, "sys", SimpleNamespace(modules=here))
        deferred.transformers_without_torch()
        assert here == there
    here = dict[str, int]()
    monkeypatch.setattr(deferred, "sys", SimpleNamespace(modules=here))
    for before in (None, "0"):
        monkeypatch.delenv(silent, raising=False)
        if before is not None:
            monkeypatch.setenv(silent, before)
        with pytest.raises(AssertionError):  # the control: this process has transformers with torch
            deferred.transformers_without_torch()
        assert (here, os.environ.get(silent)) == ({}, before)


@pytest.mark.parametrize("pictures", [False, True])
def test_a_process_that_makes_tokens_alone_leaves_torch_out_and_makes_the_same(tmp_path: Path, pictures: bool) -> None:
    base = make_base(tmp_path / "base")
    if pictures:  # their processors compute with torch
        (base / "preprocessor_config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a b ", "completion": "c"}\n' * 9)
    (tmp_path / "run.yaml").write_text(
        f"run: {{name: a, store: {tmp_path}/store}}\nmodel: {{base: {base}}}\n"
        f"data: {{train: [{{path: {tmp_path}/rows.jsonl}}], sequence_length: 64}}\ntrain: {{steps: 1}}\n"
    )
    code = (
        "import sys\nsys.argv[1:] = ['data', 'build', 'run.yaml', '--json']\n{first}\n"
        "from launcher.cli.__main__ import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    made = dict[str, str]()
    for first in [""] if pictures else ["", "import torch"]:
        command = [sys.executable, "-c", code.format(first=first)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "PyTorch" not in done.stderr
        *lines, torch_is_there = done.stdout.splitlines()
        assert torch_is_there == str(bool(first) or pictures)
        (tokens,) = (tmp_path / "store").rglob("tokens-*.bin")
        made[first] = "".join(lines) + tokens.read_bytes().hex()
        shutil.rmtree(tmp_path / "store")
    assert len(set(made.values())) == 1
