"""A side of a proof that computes a decoder layer at a time: the same bits, and one layer's weights in memory."""

from pathlib import Path

import pytest

from tests.composites import make_composite
from tests.dist import streamed
from tests.dist.launch import launch
from tests.material import Workshop, commit, make_base

pytestmark = pytest.mark.long

# A family of random bases, or a model that sees as well, and the run's settings.
KINDS = {
    "llama": ("llama", "quant.double=true"),
    "unquantized": ("llama", "quant.type=none"),
    "tied": ("llama-tied", "quant.block_size=128"),
    "dora": ("qwen2", "tuning.method=dora"),
    "mixtral": ("mixtral", "quant.type=nf4"),
    "experts": ("qwen3-moe", "tuning.experts=true", "tuning.experts_rank=3"),
    "composite": ("gemma3", "quant.type=none"),
}
CONVERTED = ("mixtral", "experts")


def test_a_layer_at_a_time_every_side_has_the_bits_of_the_whole_model(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, intermediate_size=192)
    runs: dict[str, str] = {}
    for kind, (family, *settings) in KINDS.items():
        base = tmp_path / kind
        if kind == "composite":
            make_composite(base, family)
        else:
            make_base(base, family, intermediate_size=192)
        run = workshop.store.sub(kind)
        commit(run, workshop.config(kind, f"model.base={base}", *settings))
        runs[kind] = run.uri
    (found,) = launch(1, streamed.compared, runs, str(tmp_path / "exports"), timeout=300)
    for kind, facts in found.items():
        assert facts["effect"], kind
        assert facts["differing"] == [], kind
        assert facts["whole"].pop("trained") == facts["streamed"].pop("trained") == 0, "it is no model in transformers"
        assert min(facts["whole"].values()) >= 2, kind
        assert set(facts["streamed"].values()) == {1}, kind
        assert (facts["converted"] > 0) == (kind in CONVERTED), kind
