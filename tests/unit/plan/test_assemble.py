"""What is decided for a run's ranks before they join each other."""

import os

import pytest

from trainer.config import parse_config
from trainer.plan import assemble

RUN = "run: {name: demo}\nmodel: {base: b}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"


class _Joined(Exception):
    pass


@pytest.mark.parametrize(
    ("environment", "overrides", "expected"),
    [(None, (), "1"), ("0", (), "0"), (None, (f"cluster.nccl.{ORDER}=0",), "0")],
)
def test_collectives_of_several_communicators_keep_one_order_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, overrides: tuple[str, ...], expected: str
) -> None:
    def joined(*_: object) -> None:
        raise _Joined

    monkeypatch.setattr(assemble, "join", joined)
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop(ORDER, None)
    if environment is not None:
        os.environ[ORDER] = environment
    with pytest.raises(_Joined):
        assemble.join_run(parse_config(RUN, ("cluster.gpus_per_worker=0", *overrides)))
    assert os.environ[ORDER] == expected
