"""Every family of models that the tests have is loaded, trained, exported and merged as transformers, bitsandbytes and
PEFT would.
"""

import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.dist import families
from tests.dist.launch import launch
from tests.families import FAMILIES
from tests.material import Workshop, make_base
from trainer.config import dump_config, override
from trainer.export.figures import Proof

_SECONDS = 1800  # many families in one go of the ranks
pytestmark = pytest.mark.timeout(_SECONDS + 60)
# Ranks and kind of base -> the facts that each of the ranks found.
Facts = Callable[[int, str], list[dict[str, Any]]]
# PEFT adapts linear layers of these by their weights, to which it adds the adapter's product: in bf16 that is rounded,
# and tokens go to other experts. They are trained in fp32.
BY_WEIGHT = ("qwen3-next", "deepseek-v2", "deepseek-v3", "glm4-moe", "glm4-moe-lite", "ernie4_5-moe")
# Those that compute or are stored otherwise than most: a proof takes seconds each.
PROVEN = ("gpt-oss", "gemma4", "qwen3-next", "deepseek-v3", "nemotron-h", "llama4", "granitemoe-hybrid", "kimi-linear")
# One of each kind of storage: the ranges that a third rank reads depend on nothing else of a family.
STORED = ("llama", "phi3", "gemma2", "mixtral", *PROVEN)
# The families whose tests are not long: all others are loaded in goes of their own.
QUICK = ("llama", "gpt-oss", "deepseek-v3")


def kinds_of(kinds: Iterable[str]) -> list[Any]:
    """Parameters of a test, with those of long families marked so."""
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in kinds]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def made(kind: str) -> str:
        return str(make_base(folder / kind, kind))

    return made


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def facts(workshop: Workshop, base_of: Callable[[str], str], exports: Path) -> Facts:
    """One rank reads the bases once more from the cache that it has written, two train, export and merge as well."""
    config = workshop.config(
        "families", "tuning.rank=4", "optim.lr=0.01", "checkpoint.every_steps=0", "train.global_batch=2"
    )

    @cache
    def found(ranks: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
        text = dump_config(override(config, f"quant.cache={str(ranks == 1).lower()}"))
        arguments = text, {kind: base_of(kind) for kind in kinds}
        if ranks == 2:
            trained = (*arguments, workshop.prepare(config).train, str(exports), BY_WEIGHT)
            return launch(ranks, families.trained, *trained, timeout=_SECONDS)
        return launch(ranks, families.compared, *arguments, timeout=_SECONDS)

    def get(ranks: int, kind: str) -> list[dict[str, Any]]:
        together = [other for other in (STORED if ranks == 3 else FAMILIES) if (other in QUICK) == (kind in QUICK)]
        return [whole(rank[kind]) for rank in found(ranks, tuple(together))]

    return get


def whole(found: dict[str, Any]) -> dict[str, Any]:
    assert "failed" not in found, found["failed"]
    return found


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        pytest.param(kind, ranks, marks=() if kind in QUICK and ranks < 3 else pytest.mark.long)
        for ranks, kinds in ((1, FAMILIES), (2, FAMILIES), (3, STORED))
        for kind in kinds
    ],
)
def test_packed_bytes_are_bitsandbytes_and_all_else_and_the_logits_are_transformers(
    facts: Facts, kind: str, ranks: int
) -> None:
    for found in facts(ranks, kind):
        assert found["packed"]
        assert found["differing"] == []
        assert found["logits"] <= (1e-6 if ranks == 2 and kind in BY_WEIGHT else 0)
        assert found["spread"] > 0.01


@pytest.mark.parametrize("kind", kinds_of(FAMILIES))
def test_ten_steps_learn(facts: Facts, kind: str) -> None:
    for found in facts(2, kind):
        losses, norms = found["loss"], found["grad_norm"]
        assert len(losses) == 10
        assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
        assert min(norms) > 0.01
        assert found["effect"] > 0.1 * found["spread"]


@pytest.mark.parametrize("kind", kinds_of(FAMILIES))
def test_peft_adapts_the_very_layers_that_were_trained_and_has_the_logits(facts: Facts, kind: str) -> None:
    found = facts(2, kind)[0]
    assert found["adapted_elsewhere"] == []
    assert found["by_weight"] == (kind in BY_WEIGHT)
    assert found["peft"] <= (1e-4 * found["effect"] if kind in BY_WEIGHT else 0)


@pytest.mark.parametrize("kind", kinds_of(FAMILIES))
def test_the_merged_model_is_pefts_merge_and_differs_from_the_base_where_adapters_were(facts: Facts, kind: str) -> None:
    found = facts(2, kind)[0]
    assert found["merged"] == []
    assert sorted(found["changed"]) == [f"{path}.weight" for path in found["adapted"]]


@pytest.mark.parametrize("kind", kinds_of(FAMILIES))
def test_the_cache_of_the_quantized_base_gives_the_same_logits(facts: Facts, kind: str) -> None:
    (found,) = facts(1, kind)
    assert found["cached"] == 0
    assert found["read_again"] < 0.8


@pytest.mark.long
def test_verify_proves_exports_and_merges(facts: Facts, workshop: Workshop, exports: Path) -> None:
    runs = {kind: workshop.store.sub(kind).uri for kind in PROVEN if facts(2, kind)}
    (found,) = launch(1, families.proven, runs, str(exports), timeout=_SECONDS)
    for kind in PROVEN:
        for what, proof in whole(found[kind]).items():
            assert Proof(**proof).holds, (kind, what)
            assert proof["kl_allowed"] < 1e-4 * proof["kl_effect"], (kind, what)


def test_one_weight_one_row_of_an_expert_and_one_norm_that_differ_are_found(
    workshop: Workshop, base_of: Callable[[str], str], tmp_path: Path
) -> None:
    """The control of all that is compared."""
    changed = {
        "model.layers.0.self_attn.q_proj.weight": (7, 3),
        "model.layers.1.mlp.experts.2.up_proj.weight": (5,),
        "model.layers.1.post_attention_layernorm.weight": (9,),
    }
    other = Path(shutil.copytree(base_of("qwen3-moe"), tmp_path / "other"))
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & changed:
            tensors[name][changed[name]] += 1.0
        save_file(tensors, file, metadata={"format": "pt"})
    base, config = {"qwen3-moe": base_of("qwen3-moe")}, dump_config(workshop.config("control"))
    (found,) = launch(1, families.compared, config, base, {"qwen3-moe": str(other)})
    assert found["qwen3-moe"]["logits"] > 0
    assert found["qwen3-moe"]["differing"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.post_attention_layernorm.weight: torch.bfloat16, torch.bfloat16",
    ]
