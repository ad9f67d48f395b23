"""Settings that do not suit the base or each other are each one sentence that says what to do."""

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.plan.test_plan import TINY, config
from trainer.base.describe.description import describe
from trainer.base.stored.plain import PlainFiles
from trainer.plan.resolve import mismatches
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

LLAMA: dict[str, Any] = {**TINY, "model_type": "llama"}
MIXTURE: dict[str, Any] = {**TINY, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


class _Whole(PlainFiles):
    """Files into which nothing can be written."""

    unmergeable = "in INT2"


SEES: dict[str, Any] = {
    "weights_beside": 9, "linears_beside": {"tower.proj": (8, 8)}, "projector": {"projector": {}}, "reads_prompts": False,
}  # fmt: skip


def said(base: dict[str, Any], *settings: str, stored: Any = None, **architecture: Any) -> list[str]:
    given = config("data.sequence_length=64", *settings)
    described = describe(base, None)
    described = replace(described, architecture=replace(described.architecture, **architecture))
    if stored is not None:
        described = replace(described, stored=stored)
    method = method_of(given)
    return mismatches(given, described, method, find_objective(given, method))


@pytest.mark.parametrize(
    ("base", "settings", "facts", "sentence"),
    [
        (LLAMA, ["objective.router_loss=0.1"], {}, "objective.router_loss: 0.1 is for a mixture"),
        (MIXTURE, ["objective.router_loss=0.1"], {}, None),
        (
            MIXTURE,
            ["objective.router_loss=0.1"],
            {"fails_balance": "its routers say nothing"},
            "objective.router_loss: its routers say nothing. Remove it.",
        ),
        (MIXTURE, [], {"fails_balance": "its routers say nothing"}, None),
        (MIXTURE, ["objective.router_loss_of=layers"], {}, "objective.router_loss_of: layers has no effect without"),
        (LLAMA, ["quant.type=nf4", "tuning.through=stored"], {}, "tuning.through: stored needs layers that are held in"),
        (LLAMA, ["sharding.scope=node", "tuning.method=full", "quant.type=none"], {}, "sharding.scope: node keeps a copy"),
        (
            LLAMA,
            ["data.sequence_length=128", "tuning.method=prompt", "tuning.virtual_tokens=4"],
            {},
            "tuning.virtual_tokens: 4 before 128 tokens (data.sequence_length) exceed the base's 128 positions",
        ),
        (
            LLAMA,
            ["objective.name=dpo", "objective.reference=adapter_off", "tuning.start=sft"],
            {},
            "objective.reference: adapter_off would compare with the base without the adapter of tuning.start",
        ),
        (LLAMA, ["objective.name=dpo", "objective.reference=stored", "tuning.start=sft"], {}, None),
        (
            LLAMA,
            ["objective.name=dpo", "data.packing=false"],
            {"isolates_documents": False},
            "objective.name: dpo has two texts in one row",
        ),
        (LLAMA, ["data.packing=false"], {"isolates_documents": False}, None),
        (LLAMA, ["objective.name=dpo"], {"isolates_documents": False}, "data.packing: documents of one row would see"),
        (
            LLAMA,
            ["sharding.scope=node", "tuning.modules_to_save=[lm_head]"],
            {},
            "sharding.scope: node keeps a copy of the base on every node, which tuning.modules_to_save: ['lm_head'] would",
        ),
        (
            LLAMA,
            ["tuning.method=full", "quant.type=none"],
            {"stored": _Whole({})},
            "tuning.method: full exports the base's own files with the trained weights in them, and this base is in INT2",
        ),
        (
            LLAMA,
            ["data.eval=[]", "eval.sets={seen: {path: a.jsonl, format: pictures}}"],
            {},
            "eval.sets.seen: its rows have pictures, and those of data.train have none",
        ),
        (LLAMA, ["tuning.towers=lora"], {}, "tuning.towers: the rows have no pictures"),
        (LLAMA, ["data.format=pictures", "tuning.towers=lora"], SEES, None),
        (
            LLAMA,
            ["data.format=pictures", "tuning.towers=projector"],
            SEES | {"projector": {}},
            "tuning.towers: Capstan cannot tell which weights of this base are its projector",
        ),
        (
            LLAMA,
            ["data.format=pictures", "tuning.towers=lora"],
            SEES | {"linears_beside": {}},
            "tuning.towers: the tower of this base has no linear layer",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_suit_is_one_sentence(
    base: dict[str, Any], settings: list[str], facts: dict[str, Any], sentence: str | None
) -> None:
    found = said(base, *settings, **facts)
    if sentence is None:
        assert found == []
    else:
        assert [one.startswith(sentence) for one in found] == [True], found


def test_dropout_of_an_adapter_without_a_product_is_refused() -> None:
    through = ["quant.type=nf4", "tuning.through=stored"]
    assert not any("tuning.dropout" in one for one in said(LLAMA, *through))
    assert any(
        one.startswith("tuning.dropout: 0.1 drops inputs") for one in said(LLAMA, *through, "tuning.dropout=0.1")
    )
