"""Any command line over any run's folder: an answer, or one sentence and its exit code; never a traceback."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.main import get_command

from launcher.cli.__main__ import app, main
from tests.material import Workshop
from trainer.run import layout
from trainer.store.store import open_store

FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
RUN_VERBS = ("status", "logs", "checkpoints ls", "checkpoints verify", "stop --dry-run", "checkpoints prune --dry-run")
OPTIONS = (
    "--json|--rank=-1|--rank=99999999999999999999|--generation=0|--generation=-5|--step=-1|--step=99999999999999999999|--driver|"
    "--orphan-hours=inf|--orphan-hours=nan|--orphan-hours=-1|--orphan-hours=1e6|--keep-last=0|--keep-last=99999999999|--keep-every=-1|"
    "--gpu=nan|--gpu=inf|--gpu=0|--gpu=80|--ranks-per-node=0|--ranks-per-node=3|--dry-run|--x|-|--|--debug="
).split("|")
NAMES = (
    "mine",
    "..",
    ".",
    "",
    "/",
    "a\nb",
    "../mine",
    "data",
    "no/such",
    "s4://x/y",
    "://",
    "~no-such-user/x",
    "x" * 5000,
    "%2e%2e",
    "-mine",
)
OVERRIDES = (
    "train.steps=5|train.steps=.inf|model.base=/none|model.base=~no-such-user/x|run.store=~no-such-user/x|run.store=s4://x|cluster.workers=0|cluster.workers=[2,"
    " 4294967296]|cluster.workers=100000|tuning.targets=[]|data.train=[{path: /none/*}]|data.train=[{path:"
    " ~no-such-user/x}]|sharding.deepspeed=/|sharding.deepspeed=~no-such-user/x|data.template=/|data.sequence_length=4294967296|train.global_batch=4294967296|tuning.rank=4096|optim.lr=.nan|a=b|=|x|data.train=[{path:"
    " '['}]|quant.double=true|model.layers=1|cluster.gpus_per_worker=0"
).split("|") + [f"{key}={'x' * 5000}" for key in ("model.base", "run.store", "sharding.deepspeed", "data.template")]
LINES = ("", "{", "null", "[1]", '{"kind": 5}', '{"kind": "step"}', '{"kind": "start", "step": 0, "machines": [[1]]}')
VALUES: Any = st.sampled_from([None, 0, -1, 1.5, 10**30, "x", [], {}, float("nan")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """run.yaml and a store in which `mine` is a run. Meanwhile the verbs and their options are read once, which a
    command does when it starts.
    """
    folder = tmp_path_factory.mktemp("lines")
    workshop = Workshop(folder)
    tree = workshop.config("mine").model_dump(mode="json", exclude_unset=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    workshop.store.put("mine/config.yaml", yaml.safe_dump(tree).encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("launcher.cli.__main__.app", get_command(app))
        yield folder


def answered(*arguments: str) -> None:
    """In this process, as a start of Python takes a second; what it raises beside SystemExit would be a traceback."""
    before, sys.argv = sys.argv, ["capstan", *arguments]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    assert code in (0, 2, 3, 4, 6, 7), (code, arguments)


records = st.builds(
    lambda kind, values: json.dumps({"kind": kind, **values}),
    st.sampled_from(["start", "step", "eval", "end", "restart", "first_step", "new"]),
    st.dictionaries(
        st.sampled_from("step loss tokens seconds outcome reason machines time world_size".split()), VALUES
    ),
)


@FUZZ
@given(st.sampled_from(RUN_VERBS), st.sampled_from(NAMES), st.lists(st.sampled_from(OPTIONS), max_size=2))
def test_any_name_and_option_of_a_run(folder: Path, verb: str, name: str, options: list[str]) -> None:
    answered(*verb.split(), name, "--store", str(folder / "store"), *options)


@FUZZ
@given(st.lists(st.sampled_from(LINES) | records, max_size=4), st.sampled_from([b"", b"{", b"[]", b'{"by": 5}']))
def test_any_records_of_a_run(folder: Path, lines: list[str], stop: bytes) -> None:
    run = open_store(str(folder / "store")).sub("mine")
    run.put(layout.metrics(1), "\n".join(lines).encode() + b"\n")
    run.put(layout.STOP, stop)
    answered("status", "mine", "--store", str(folder / "store"))


@FUZZ
@given(
    st.sampled_from(["plan", "train --dry-run", "data build --dry-run", "submit slurm --dry-run"]),
    st.lists(st.sampled_from(OVERRIDES), max_size=2),
    st.lists(st.sampled_from(OPTIONS), max_size=1),
)
def test_any_override_and_option_of_a_configuration(
    folder: Path, verb: str, overrides: list[str], options: list[str]
) -> None:
    answered(*verb.split(), str(folder / "run.yaml"), *overrides, *options)
