"""What a plan says of pictures: the operations of the tower, the host's time, and when that is the limit."""

import gc
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from launcher.plan import planning
from launcher.plan.planning import needs_of, plan_run
from launcher.plan.summary import plan_lines
from tests.material import Workshop
from trainer.base.describe.language_model import inner_of
from trainer.base.find.check import PictureCost
from trainer.base.find.locate import resolve_base
from trainer.base.find.media.still import Size
from trainer.base.find.processor import TYPES, Processor, read_processor
from trainer.base.load.sight_cost import Empty, sight_costs
from trainer.config import override, parse_config
from trainer.model.front import Front
from trainer.model.kept import KeptBytes, kept_of
from trainer.model.micro_batch import Seen
from trainer.model.towers import AdaptedLayers, ChangedWeights, Lender
from trainer.plan import seeing
from trainer.tuning.method import method_of

pytest.importorskip("torchvision")
from tests.seeing import BASES, make_pictured, picture, seeing_base, shown


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: seeing_base(tmp_path_factory.mktemp(kind), kind) for kind in BASES}


def _front(whole: Any) -> tuple[Front, int]:
    embedding = whole.get_input_embeddings()
    return Front(whole, inner_of(whole), embedding), embedding.weight.shape[1]


_REST = "data: {train: [{path: x}], format: pictures}, train: {steps: 1}, run: {name: x, store: x}"


def _borrowing(given: dict[str, Any]) -> Callable[[Any], Any]:
    if given["changes"]:
        return partial(ChangedWeights, given["changes"])
    return partial(AdaptedLayers, given["adapters"], 2.0, given["dropout"])


def _given(states: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: states


def _document(processor: Processor) -> tuple[list[int], dict[str, torch.Tensor]]:
    sizes = (Size(30, 44), Size(25, 17))
    ids = processor.encode("See " + " and ".join(processor.replacements(sizes)))
    return ids, processor.inputs([shown(picture(width, height, 1)) for height, width in sizes], ids)


@pytest.mark.parametrize("kind", BASES)
def test_the_operations_of_a_class_without_weights_are_those_of_the_real_one(kind: str, bases: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(bases[kind])
    ids, inputs = _document(read_processor(bases[kind], "it"))
    real: Any = AutoModelForImageTextToText.from_pretrained(bases[kind], attn_implementation="eager")
    front, hidden = _front(real)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        front.row(torch.tensor([ids]), _given(torch.zeros(1, len(ids), hidden)), [len(ids)], [Seen(0, inputs)])
    expected = counter.get_total_flops()
    assert Empty(config, None).over(ids, inputs).operations == front.operations.all == expected > 0


@pytest.mark.parametrize("kind", BASES)
def test_kept_features_cost_no_operation(kind: str, bases: dict[str, Path]) -> None:
    ids, inputs = _document(read_processor(bases[kind], "it"))
    front, hidden = _front(AutoModelForImageTextToText.from_pretrained(bases[kind]))
    tokens, states = torch.tensor([ids]), torch.zeros(1, len(ids), hidden)
    types = {name: inputs.pop(name) for name in list(inputs) if name in TYPES}
    kept = front.taken_out(tokens, inputs, types, states).kept
    before = front.operations.all
    assert before > 0
    front.row(tokens, _given(states), [len(ids)], [Seen(0, {**kept, **types})])
    assert front.operations.all == before


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("learns", ["lora", "projector"])
@pytest.mark.parametrize("kind", BASES)
def test_what_a_class_without_weights_keeps_is_what_autograd_saves_of_the_real_one(
    kind: str, learns: str, again: bool, bases: dict[str, Path]
) -> None:
    """And the operations are those that PyTorch counts of its forward and its backward pass."""
    config = parse_config(f"{{model: {{base: {bases[kind]}}}, tuning: {{towers: {learns}}}, {_REST}}}")
    ids, inputs = _document(read_processor(bases[kind], "it"))
    given = method_of(config).sees(resolve_base(config.model).architecture)
    assert given
    for attention in ("sdpa", "eager"):
        real: Any = AutoModelForImageTextToText.from_pretrained(bases[kind], attn_implementation=attention)
        front, hidden = _front(real)
        lender = Lender({name: torch.randn(shape) for name, shape in given["shapes"].items()}, _borrowing(given))
        front.learn(lender, again=again)
        lent = lender.lent()
        assert lent
        with FlopCounterMode(display=False) as counter:
            with kept_of(front) as kept:
                states = lent.joined(torch.zeros(1, len(ids), hidden))
                handed = front.row(torch.tensor([ids]), _given(states), [len(ids)], [Seen(0, inputs)], lent)
            made = [one for one in tree_leaves(handed) if isinstance(one, torch.Tensor) and one.requires_grad]
            torch.stack([one.sum() for one in made]).sum().backward()
        settings = {**given, "dtype": "fp32", "attention": attention, "again": again}
        empty = Empty(AutoConfig.from_pretrained(bases[kind]), settings).over(ids, inputs)
        assert empty.kept.bytes == pytest.approx(kept.bytes, rel=0.01)
        assert empty.kept.layer == pytest.approx(kept.layer, rel=0.01)
        assert empty.operations == front.operations.all
        if attention == "eager":  # PyTorch does not count a CPU's fused kernel
            # SigLIP in the small models of Google pools its pictures for nobody, which has no backward pass.
            bound = 0.1 if kind in ("gemma3", "paligemma") else 0.02
            assert front.operations.all == pytest.approx(counter.get_total_flops(), rel=bound)


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
        assert cost["tokens"] == merged == len(processor.encode(processor.replacements((Size(32, 32),))[0]))
        assert 0 < cost["seconds"] < 60
    config = parse_config(f"{{model: {{base: {bases['qwen3_vl']}}}, tuning: {{towers: lora, rank: 1}}, {_REST}}}")
    learning = method_of(config).sees(resolve_base(config.model).architecture)
    assert learning
    learning |= {"dtype": "fp32", "attention": "sdpa", "again": False}
    for cost in sight_costs(str(bases["qwen3_vl"]), "it", sizes, learning):
        assert cost["repeated"] == pytest.approx(tower.depth * layer, rel=0.06), "the layers' forward pass"


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

    def costs(base: Any, sizes: Any, learning: Any = None, modality: int = 0) -> list[PictureCost]:
        asked.append(sizes)
        return [PictureCost(10, 3 * 10**12, seconds[0], repeated=10**12) for _ in sizes]  # no layer is computed again

    monkeypatch.setattr(seeing, "picture_costs", costs)
    monkeypatch.setattr(planning, "check_sight_at_hand", lambda config, **_: None)  # its trial takes seconds
    before = plan_run(config, "H100", None)
    assert asked.pop() == ((256, 256),)
    assert before.pictures
    assert before.pictures.share is None
    lines = dict(plan_lines(before, config))
    assert str(lines["pictures"]).startswith("a picture takes 10 tokens, 3 TFLOP of the tower")

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
    (note,) = [note for note in slow.plan.notes if note.startswith("pictures: the host's cores are the limit")]
    assert note.endswith("Give each rank more cores (cluster.slurm.cpus_per_node), or lower data.images.max_pixels.")

    assert not any("keeps activations" in note for note in slow.plan.notes)
    assert slow.plan.memory_per_gpu.tower_activations == 0
    assert slow.plan.memory_per_host.pictures_read_ahead == 4 * config.data.images.read_ahead == 2**30
    monkeypatch.setattr(seeing, "picture_costs", costs)
    learns = plan_run(override(config, "tuning.towers=lora"), "H100", None)
    assert any("keeps activations for its backward pass" in note for note in learns.plan.notes)  # not counted
    assert learns.plan.recomputed_layers == learns.plan.layers


@pytest.mark.parametrize("kind", BASES)
def test_a_plan_counts_what_a_row_full_of_pictures_keeps(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Autograd saves as much of the real class, for its backward pass and in the layer that is computed again."""
    settings = "cluster.workers=1", "train.micro_batch=1", "train.global_batch=1", "tuning.towers=lora"
    sees = f"model.base={bases[kind]}", "data.format=pictures", "quant.type=none", "data.images.max_pixels=1024"
    processor = read_processor(bases[kind], "it")
    pictures = (Size(32, 32),) * 20
    texts = processor.replacements(pictures)
    ids = processor.encode(" ".join(texts))
    inputs = processor.inputs([shown(picture(32, 32, number)) for number in range(20)], ids)
    length = f"data.sequence_length={sum(len(processor.encode(text)) for text in texts)}"
    config = Workshop(tmp_path).config("learns", *settings, *sees, length, "model.dtype=fp32")
    given = method_of(config).sees(resolve_base(config.model).architecture)
    assert given
    found = dict[bool, KeptBytes]()
    for again in (False, True):
        real: Any = AutoModelForImageTextToText.from_pretrained(bases[kind])
        front, hidden = _front(real)
        lender = Lender({name: torch.randn(shape) for name, shape in given["shapes"].items()}, _borrowing(given))
        front.learn(lender, again=again)
        lent = lender.lent()
        assert lent
        with kept_of(front) as kept:
            states = lent.joined(torch.zeros(1, len(ids), hidden))
            front.row(torch.tensor([ids]), _given(states), [len(ids)], [Seen(0, inputs)], lent)
        found[again] = kept
    for again in (False, True):
        how = "all" if again else "none"
        memory = needs_of(override(config, f"train.activation_checkpointing={how}"), "H100", None).plan.memory_per_gpu
        saved, in_backward = found[again].bytes, again * found[False].layer + 2 * found[False].largest
        # The decoder has left room for a part of the backward pass.
        expected = saved + max(0, in_backward - memory.activations)
        assert memory.tower_activations == pytest.approx(expected, rel=0.1 if again else 0.03)
    assert found[True].bytes < found[False].bytes / 2


def test_a_plan_without_the_packages_that_read_pictures_has_no_activations_of_them(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(f"{{model: {{base: {bases['llava']}}}, tuning: {{towers: lora}}, {_REST}}}")
    base = resolve_base(config.model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(bases["llava"]))
    monkeypatch.setattr("trainer.base.find.processor.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.split(".")[0] == "PIL" or name.endswith("pictures.sources")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert seeing.with_pictures_kept(config, base) == base.description


@pytest.mark.parametrize(("asked", "of_the_tower"), [("auto", "sdpa"), ("eager", "eager")])
def test_a_tower_is_measured_with_the_runs_attention(
    asked: str, of_the_tower: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = f"{{model: {{base: {bases['llava']}, attention: {asked}}}, tuning: {{towers: lora}}, {_REST}}}"
    config = parse_config(settings)
    monkeypatch.setattr(seeing, "picture_costs", lambda base, sizes, learning, modality: [learning])
    costs: Any = seeing.costs_of(config, resolve_base(config.model), ((9, 9),))
    (learning,) = costs
    assert (learning["attention"], learning["dtype"]) == (of_the_tower, "bf16")
    small = config.data.images.model_copy(update={"max_pixels": 2500})
    assert (seeing.usual_size(config.data.images), seeing.usual_size(small)) == ((1024, 1024), (50, 50))


@pytest.mark.parametrize("again", [False, True])
def test_what_was_lent_for_a_row_is_freed_with_it(again: bool, bases: dict[str, Path]) -> None:
    config = parse_config(f"{{model: {{base: {bases['llava']}}}, tuning: {{towers: lora}}, {_REST}}}")
    ids, inputs = _document(read_processor(bases["llava"], "it"))
    given = method_of(config).sees(resolve_base(config.model).architecture)
    assert given
    front, hidden = _front(AutoModelForImageTextToText.from_pretrained(bases["llava"]))
    lender = Lender({name: torch.randn(shape) for name, shape in given["shapes"].items()}, _borrowing(given))
    front.learn(lender, again=again)
    lent = lender.lent()
    assert lent
    freed = [weakref.ref(value) for value in lent.values.values()]
    front.row(
        torch.tensor([ids]),
        _given(lent.joined(torch.zeros(1, len(ids), hidden))),
        [len(ids)],
        [Seen(0, inputs)],
        lent,
    )
    del lent
    gc.collect()
    assert not any(value() is not None for value in freed)


def test_a_plan_over_text_asks_for_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop(tmp_path)
    monkeypatch.setattr(seeing, "picture_costs", lambda *given: pytest.fail("asked"))
    config = workshop.config("text")
    assert plan_run(config, "H100", None).pictures is None
    assert plan_run(override(config, "train.steps=2"), "H100", None).to_json()["pictures"] is None
