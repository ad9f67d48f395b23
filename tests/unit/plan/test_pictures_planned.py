"""What a plan says of pictures: the operations of the part that sees, the host's time, and when that is the limit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from launcher.plan import planning
from launcher.plan.planning import plan_run
from launcher.plan.summary import plan_lines
from tests.material import Workshop
from trainer.base.describe.empty_model import unfilled_whole
from trainer.base.describe.language_model import inner_of
from trainer.base.find.check import PictureCost
from trainer.base.find.processor import Processor, read_processor
from trainer.base.load.sight_cost import operations_of, sight_costs
from trainer.config import override
from trainer.model.front import Front
from trainer.model.micro_batch import Seen

pytest.importorskip("torchvision")
from tests.seeing import BASES, make_pictured, picture, seeing_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: seeing_base(tmp_path_factory.mktemp(kind), kind) for kind in BASES}


def _front(whole: Any) -> tuple[Front, int]:
    embedding = whole.get_input_embeddings()
    return Front(whole, inner_of(whole), embedding), embedding.weight.shape[1]


def _document(processor: Processor) -> tuple[list[int], dict[str, torch.Tensor]]:
    sizes = ((30, 44), (25, 17))
    ids = processor.encode("See " + " and ".join(processor.replacements(sizes)))
    return ids, processor.inputs([picture(width, height, 1) for height, width in sizes], ids)


@pytest.mark.parametrize("kind", BASES)
def test_the_operations_of_a_class_without_weights_are_those_of_the_real_one(kind: str, bases: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(bases[kind])
    ids, inputs = _document(read_processor(bases[kind], "it"))
    empty, hidden = _front(unfilled_whole(config, torch.float32, "eager"))
    real: Any = AutoModelForImageTextToText.from_pretrained(bases[kind], attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _front(real)[0].row(torch.tensor([ids]), torch.zeros(1, len(ids), hidden), [len(ids)], [Seen(0, inputs)])
    assert operations_of(empty, hidden, ids, inputs) == counter.get_total_flops() > 0


def test_the_operations_are_those_that_are_counted_by_hand(bases: dict[str, Path]) -> None:
    """Products of the tower's layers and of its attention, the patches, and the projectors with those of deepstack."""
    config: Any = AutoConfig.from_pretrained(bases["qwen3_vl"])
    processor, tower = read_processor(bases["qwen3_vl"], "it"), config.vision_config
    sizes = [(32, 32), (64, 16)]
    for cost in sight_costs(str(bases["qwen3_vl"]), "it", sizes):
        patches, width = 1024 // tower.patch_size**2, tower.hidden_size
        merged, inner = patches // 4, 4 * width
        layer = 2 * patches * (4 * width**2 + 2 * width * tower.intermediate_size) + 4 * patches**2 * width
        first = 2 * patches * 3 * tower.temporal_patch_size * tower.patch_size**2 * width
        projector = 2 * merged * (inner**2 + inner * tower.out_hidden_size)
        by_hand = tower.depth * layer + first + (1 + len(tower.deepstack_visual_indexes)) * projector
        assert cost["operations"] == pytest.approx(by_hand, rel=0.03)
        assert cost["tokens"] == merged == len(processor.encode(processor.replacements(((32, 32),))[0]))
        assert 0 < cost["seconds"] < 60


def test_a_plan_says_what_pictures_cost_and_whether_the_host_is_the_limit(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(tmp_path)
    rows = make_pictured(tmp_path / "rows")
    config = workshop.config(
        "pictured",
        *(f"model.base={bases['qwen3_vl']}", "quant.type=none", f"data.train=[{{path: {rows}}}]"),
        *("data.format=pictures", "data.sequence_length=128", "data.images.max_pixels=65536"),
        *("cluster.slurm.gpus_per_node=4", "cluster.slurm.cpus_per_node=32"),
    )
    seconds, asked = [1e-9], list[Any]()

    def costs(base: Any, sizes: Any) -> list[PictureCost]:
        asked.append(sizes)
        return [PictureCost(10, 3 * 10**12, seconds[0]) for _ in sizes]

    monkeypatch.setattr(planning, "picture_costs", costs)
    monkeypatch.setattr(planning, "check_sight_at_hand", lambda config, **_: None)  # its trial takes seconds
    before = plan_run(config, "H100", None)
    assert asked.pop() == ((256, 256),)
    assert before.pictures
    assert before.pictures.share is None
    lines = dict(plan_lines(before, config))
    assert str(lines["pictures"]).startswith("one of 256 x 256 pixels takes 10 tokens, 3 TFLOP of the part that sees")

    workshop.prepare(config)
    found = plan_run(config, "H100", None)
    assert found.pictures
    assert found.pictures.cores == 7
    assert found.pictures.operations == 3e11
    share, tokens = found.pictures.share, found.pictures.tokens
    assert share
    assert 0.1 < share < 0.5
    text = str(dict(plan_lines(found, config))["pictures"])
    assert text.startswith(f"{share:.1%} of the tokens, {128 * share / tokens:.3g} pictures a row")
    assert "7 cores of each rank read them" in text
    assert found.to_json()["pictures"]["share"] == share
    # 3e11 operations for each of these tokens, at the share of the peak that is assumed.
    assert before.forecast
    assert found.forecast
    of_tower = 128 * share * 3e11 / (0.3 * 989e12)
    rows_a_rank = found.plan.batch.accumulation * config.train.micro_batch
    assert found.forecast.step_seconds == pytest.approx(of_tower * rows_a_rank, rel=0.01)
    assert not any("host's cores" in note for note in found.plan.notes)

    seconds[0] = 40.0
    slow = plan_run(config, "H100", None)
    assert slow.forecast
    assert slow.forecast.step_seconds == pytest.approx(128 * share * 4.0 / 7 * rows_a_rank, rel=0.01)
    assert "The device waits for cores of the host that read pictures" in slow.forecast.basis
    (note,) = [note for note in slow.plan.notes if note.startswith("data.images: the host's cores are the limit")]
    assert "Give each rank more cores" in note

    assert not any("keeps activations" in note for note in slow.plan.notes)
    learns = plan_run(override(config, "tuning.towers=lora"), "H100", None)
    assert learns.pictures
    assert learns.pictures.operations == 6e11  # gradients go back through it
    assert any("keeps activations for its backward pass" in note for note in learns.plan.notes)


def test_a_plan_over_text_asks_for_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop(tmp_path)
    monkeypatch.setattr(planning, "picture_costs", lambda *given: pytest.fail("asked"))
    config = workshop.config("text")
    assert plan_run(config, "H100", None).pictures is None
    assert plan_run(override(config, "train.steps=2"), "H100", None).to_json()["pictures"] is None
