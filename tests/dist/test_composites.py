"""The language model inside a model that sees is trained and exported, and what else is in the files stays as it is."""

import re
from pathlib import Path

import pytest

from tests.composites import make_composite
from tests.dist import loading, proofs
from tests.dist.launch import launch
from tests.material import Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.base.rows.parameters import find_all_weights
from trainer.config import Model, dump_config
from trainer.export.figures import Proof
from trainer.store.safetensors_index import Joined, TensorSource, numel

pytestmark = pytest.mark.long

# Its language model is under another name than by itself, it has a head of its own, and experts that are stored singly.
KINDS = ("gemma3", "llama4", "kimi_k25")


def test_an_adapter_and_a_merge_predict_what_was_trained_and_the_rest_of_the_files_is_untouched(
    workshop: Workshop, tmp_path: Path
) -> None:
    runs = []
    for kind in KINDS:
        make_composite(tmp_path / kind, kind)
        run = workshop.store.sub(kind)
        commit(run, workshop.config(kind, f"model.base={tmp_path / kind}", "tuning.alpha=64"))
        runs.append(run)
    (found,) = launch(1, proofs.exports_and_proofs, [run.uri for run in runs], timeout=360)
    (old,) = launch(1, proofs.proofs_by_old_names, [run.uri for run in runs], timeout=360)
    assert [effect for effect in old if effect != 0 and "--verify: PEFT cannot read" not in str(effect)] == []
    config = dump_config(workshop.config("log"))
    (logged,) = launch(1, loading.loaded_logits, config, [str(tmp_path / "gemma3")], [], str(tmp_path))
    (said,) = [line for line in logged[0]["log"] if "left out" in line]
    assert re.search(r"model\.multi_modal_projector \(2 tensors, .* model\.vision_tower \(32 tensors, ", said)
    for kind, run, both in zip(KINDS, runs, found, strict=True):
        for proof in both:
            assert Proof(**proof).holds, kind
            assert proof["kl_allowed"] < 1e-4 * proof["kl_effect"], kind
        folder = Path(run.uri.removeprefix("file://"), "merged")
        before, after = (resolve_base(Model(base=str(base))) for base in (tmp_path / kind, folder))
        language = set[str]()
        for source in find_all_weights(before).sources.values():
            for part in source.parts if isinstance(source, Joined) else (source,):
                assert isinstance(part, TensorSource)
                language.add(f"{part.key} {part.offset}")
        others = [name for name, part in before.tensors.items() if f"{part.key} {part.offset}" not in language]
        changed = [
            name
            for name, part in before.tensors.items()
            if part.read(0, numel(part)) != after.tensors[name].read(0, numel(part))
        ]
        assert len(others) > 10
        assert changed
        assert not set(others) & set(changed)
