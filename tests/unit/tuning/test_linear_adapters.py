"""DoRA's and (IA)^3's layers compute what the papers' formulas and PEFT's own modules compute, and start as their
base.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tests.families import FAMILIES, KINDS, SIZES
from tests.material import tuning_misfits
from trainer.base.architecture import Parameter
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import Model, Optim, Tuning, parse_config
from trainer.tuning.ia3 import Scaling
from trainer.tuning.ia3.layer import ScaledLinear
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, LowRankUpdate, peft_files
from trainer.tuning.lora import DoraUpdate, Lora
from trainer.tuning.lora.layer import DoraLinear
from trainer.tuning.method import ExportedFiles, exact_product, find_method, method_of
from trainer.tuning.oft import Rotation
from trainer.tuning.oft.layer import RotatedLinear, rotations
from trainer.tuning.tokens import RowsUpdate, WithTokens
from trainer.tuning.tokens.layer import TokenEmbedding
from trainer.tuning.towers import LearntChange, WithProjector, WithTowers

LLAMA = read_architecture({**SIZES, **KINDS["llama"]})
PHI3 = read_architecture({**SIZES, **KINDS["phi3"]})


def frozen_linear(bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(40, 24, bias=bias, dtype=dtype).requires_grad_(False)


def learnt(layer: DoraLinear) -> DoraLinear:
    """With a B that is not zero and magnitudes that are not the norms."""
    torch.manual_seed(2)
    layer.lora_B.data = 0.1 * torch.randn_like(layer.lora_B)
    layer.lora_magnitude_vector.data *= 1 + 0.2 * torch.randn_like(layer.lora_magnitude_vector)
    return layer


def gradients(layer: Any, y: Tensor) -> list[Tensor]:
    layer.zero_grad()
    (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    return [layer.lora_A.grad.clone(), layer.lora_B.grad.clone(), layer.lora_magnitude_vector.grad.clone()]


@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_the_papers_formula_with_a_norm_that_is_constant_to_the_backward_pass(bias: bool) -> None:
    base = frozen_linear(bias)
    layer, x = learnt(DoraLinear(base, 3, 1.7, 0.0, torch.float32)), torch.randn(2, 5, 40)

    def formula(constant: bool) -> Tensor:
        turned = base.weight + layer.scaling * layer.lora_B @ layer.lora_A
        norm = turned.norm(dim=1, keepdim=True)
        weight = layer.lora_magnitude_vector[:, None] * turned / (norm.detach() if constant else norm)
        return nn.functional.linear(x, weight, base.bias)

    torch.testing.assert_close(layer(x), formula(constant=True))
    found, expected, other = (gradients(layer, y) for y in (layer(x), formula(True), formula(False)))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (found[0] - other[0]).norm() > 1e-2 * other[0].norm(), "a norm that learns would have passed, too"


@pytest.mark.parametrize("bias", [False, True])
def test_doras_dropout_is_pefts(bias: bool) -> None:
    base, x = frozen_linear(bias), torch.randn(7, 40)
    layer = learnt(DoraLinear(base, 3, 2.0, 0.4, torch.float32))
    settings = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.4, use_dora=True, target_modules=["0"])
    theirs: Any = get_peft_model(nn.Sequential(base), settings)  # type: ignore[arg-type]  # any module does
    adapted = theirs.base_model.model[0]
    adapted.lora_A.default.weight.data = layer.lora_A.data
    adapted.lora_B.default.weight.data = layer.lora_B.data
    adapted.lora_magnitude_vector.default.weight.data = layer.lora_magnitude_vector.data
    outputs = []
    for training in (True, False):
        for model in (layer, theirs):
            torch.manual_seed(9)
            outputs.append(model.train(training)(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[3])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_start_exactly_as_their_base_and_are_it_when_switched_off(dtype: torch.dtype) -> None:
    base, x = frozen_linear(False, dtype), torch.randn(7, 40, dtype=dtype)
    base.weight.data[3] = 0  # a row without a direction
    dora = DoraLinear(base, 3, 2.0, 0.0, dtype)
    assert torch.equal(dora(x), base(x))
    for layer in (learnt(dora), ScaledLinear(base, True, dtype), ScaledLinear(base, False, dtype)):
        if isinstance(layer, ScaledLinear):
            assert torch.equal(layer(x), base(x))
            layer.ia3_l.data *= 2
        assert layer(x).isfinite().all()
        assert not torch.equal(layer(x), base(x))
        layer.active = False
        assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_scales_inputs_or_outputs_with_the_bias(feedforward: bool) -> None:
    base, x = frozen_linear(True), torch.randn(7, 40)
    layer = ScaledLinear(base, feedforward, torch.float32)
    factors = torch.randn(40 if feedforward else 24)
    layer.ia3_l.data = factors.view_as(layer.ia3_l)
    expected = base(x * factors) if feedforward else factors * base(x)
    assert torch.equal(layer(x), expected)


def test_oft_is_pefts_rotation_of_the_inputs_in_value_gradients_and_merge() -> None:
    base, x = frozen_linear(True), torch.randn(2, 7, 40, requires_grad=True)
    ours = RotatedLinear(base, 8, torch.float32)
    assert torch.equal(ours(x), base(x))
    settings = OFTConfig(oft_block_size=8, target_modules=["0"])
    theirs: Any = get_peft_model(nn.Sequential(base), settings)  # type: ignore[arg-type]  # any module does
    skew = 0.1 * torch.randn(5, 28)
    weights = ours.oft_R.weight, theirs.base_model.model[0].oft_R.default.weight
    for weight in weights:
        weight.data = skew.clone()
    outputs = ours(x), theirs(x)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], base(x))
    found, expected = (
        torch.autograd.grad(y.square().sum(), (weight, x)) for y, weight in zip(outputs, weights, strict=True)
    )
    torch.testing.assert_close(found, expected)
    merged = base.weight.clone()
    rotation = Rotation((24, 40), rotations(skew, 8))
    for first in (0, 10):
        rotation.apply_to(merged[first : first + (10 if first == 0 else 14)], first)
    torch.testing.assert_close(nn.functional.linear(x, merged, base.bias), outputs[0])
    ours.active = False
    assert torch.equal(ours(x), base(x))


def test_rotations_of_another_type_give_their_layer_inputs_of_its_own() -> None:
    base, x = frozen_linear(True, torch.bfloat16), torch.randn(7, 40, dtype=torch.bfloat16)
    layer = RotatedLinear(base, 8, torch.float32)
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), base(x))


def test_peft_is_told_the_blocks_of_oft_and_the_layers_that_have_them() -> None:
    method: Any = find_method(Tuning.model_validate({"method": "oft", "block": 4, "targets": ["q_proj", "up_proj"]}))
    described = method.peft_config(LLAMA)
    assert (described.oft_block_size, sorted(described.target_modules)) == (4, ["q_proj", "up_proj"])
    weights = {name: torch.full(shape, 0.1).bfloat16() for name, shape in method.shapes(LLAMA).items()}
    for update in method.updates(weights, LLAMA).values():
        of_block = rotations(torch.full((1, 6), 0.1).bfloat16().float(), 4)
        torch.testing.assert_close(update.blocks, of_block.expand(len(update.blocks), 4, 4))


def test_a_block_that_does_not_divide_the_inputs_is_refused() -> None:
    def said(block: int, targets: object) -> list[str]:
        given = {"method": "oft", "block": block, "targets": targets}
        return find_method(Tuning.model_validate(given)).mismatches(LLAMA)

    for block, inputs, path in ((48, 64, "self_attn.q_proj"), (32, 172, "mlp.down_proj")):
        assert said(block, "all-linear") == [
            f"tuning.block: {block} does not divide the {inputs} inputs of model.layers.0.{path}. Set a block that does,"
            " or name other tuning.targets."
        ]
    assert said(4, "all-linear") == said(64, ["q_proj", "k_proj"]) == [], "no matter how many outputs there are"


def test_rows_that_are_merged_by_parts_are_the_rows_of_the_whole() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 40).bfloat16(), torch.randn(24).bfloat16()
    up, down, magnitude = torch.randn(24, 3), torch.randn(3, 40), torch.randn(24)
    turned = weight.float() + 0.5 * up @ down
    expected = magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True)
    cases: list[tuple[Any, Tensor, Tensor]] = [
        (DoraUpdate(LowRankUpdate(up, down, 0.5), magnitude), weight, expected),
        (Scaling((24, 40), magnitude[:, None]), weight, weight.float() * magnitude[:, None]),
        (Scaling((24, 40), down[:1]), weight, weight.float() * down[:1]),
        (Scaling((24,), magnitude[None]), bias, bias.float() * magnitude),
    ]
    for update, stored, wanted in cases:
        rows = stored.clone()
        for first in (0, 10) if stored is weight else (0,):
            part = rows[first : 10 if stored is weight and first == 0 else None]
            update.apply_to(part.view(-1), first)
        torch.testing.assert_close(rows, wanted.bfloat16())
        assert not torch.equal(rows, stored)


def test_dora_is_saved_under_pefts_names_and_merged_by_its_own() -> None:
    method: Any = find_method(Tuning(method="dora", targets=["q_proj"], rank=3, alpha=6))
    path, shapes = "model.layers.0.self_attn.q_proj", method.shapes(LLAMA)
    torch.manual_seed(3)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    updates = method.updates(weights, LLAMA)
    assert updates.keys() == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(LLAMA.layers)}
    base: Any = nn.Sequential(nn.Linear(64, len(weights[f"{path}.lora_magnitude_vector"]), bias=False))
    theirs: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"]))
    ours = {"0." + name.removeprefix(f"{path}."): values for name, values in weights.items() if path in name}
    merged = base[0].base_layer.weight.detach().clone()
    named = {f"base_model.model.{method.saved_name(name)}": values.float() for name, values in ours.items()}
    assert named.keys() == get_peft_model_state_dict(theirs).keys()
    set_peft_model_state_dict(theirs, named)
    updates[f"{path}.weight"].apply_to(merged, 0)
    torch.testing.assert_close(merged, theirs.merge_and_unload()[0].weight)


@pytest.mark.parametrize("scaling", [0.5, 0.3])
def test_a_product_that_moves_codes_is_rounded_once(scaling: float) -> None:
    torch.manual_seed(5)
    up, down = torch.randn(7, 3).bfloat16(), torch.randn(3, 9).bfloat16()
    exact = scaling * up.double() @ down.double()
    assert torch.equal(exact_product(up, down, scaling), exact.float())
    assert torch.equal(LowRankUpdate(up, down, scaling).change(2, 4, slice(1, 5)), exact[2:6, 1:5].float())


def test_what_a_weight_beside_the_language_model_has_learnt_is_added_to_its_rows() -> None:
    learnt = torch.randn(6, 4)
    weights: Any = SimpleNamespace(part=lambda name, begin, end: learnt.flatten()[begin:end])
    rows = torch.ones(3, 4)
    LearntChange(weights, "a", (6, 4)).apply_to(rows, 2)
    assert torch.equal(rows, 1 + learnt[2:5])


def seeing(towers: str, *overrides: str) -> Any:
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: a}], format: pictures}\ntrain: {steps: 1}\n"
    return method_of(parse_config(text, [f"tuning.towers={towers}", *overrides]))


def test_each_layer_beside_the_language_model_has_a_start_of_its_own_by_the_seed() -> None:
    method = seeing("lora", "tuning.rank=4")
    starts = {(path, seed): method.start(path, 8, 6, seed)[0] for path in "ab" for seed in (1, 2)}
    assert torch.equal(method.start("a", 8, 6, 1)[0], starts["a", 1])
    assert len({tuple(start.flatten().tolist()) for start in starts.values()}) == 4


def test_a_check_of_the_tower_sees_it_learn_as_the_run_will() -> None:
    beside, projector = {"tower.a": (8, 6)}, {"model.proj": {"weight": (2, 3), "bias": (2,)}}
    architecture = replace(LLAMA, linears_beside=beside, projector=projector)
    found = seeing("lora", "tuning.rank=4", "tuning.dropout=0.1").sees(architecture)
    shapes = {"seeing.tower/a/lora_A": (4, 6), "seeing.tower/a/lora_B": (8, 4)}
    assert found == {"shapes": shapes, "adapters": ["tower.a"], "dropout": 0.1, "changes": {}}
    found = seeing("projector").sees(architecture)
    shapes = {"seeing.model/proj/weight": (2, 3), "seeing.model/proj/bias": (2,)}
    changes = {"model.proj": ["weight", "bias"]}
    assert found == {"shapes": shapes, "adapters": [], "dropout": 0.0, "changes": changes}


def test_adapters_of_the_tower_are_saved_and_merged_by_the_paths_of_its_layers() -> None:
    architecture = replace(LLAMA, linears_beside={"tower.a": (8, 6)})
    method = seeing("lora", "tuning.rank=4", "tuning.alpha=2", "tuning.modules_to_save=[norm]")
    assert isinstance(method, WithTowers), "also around other things that learn"
    down, up = torch.randn(4, 6), torch.randn(8, 4)
    learnt = {"seeing.tower/a/lora_A": down, "seeing.tower/a/lora_B": up}
    files = {PEFT_WEIGHTS: save({"a": torch.zeros(1)}), PEFT_SETTINGS: b"{}"}
    found = method.added_to(ExportedFiles("peft", "An adapter", files), learnt, architecture)
    saved = load(found.files[PEFT_WEIGHTS])
    kinds = {name.split(".tower.a.")[1]: values for name, values in saved.items() if name != "a"}
    assert kinds.keys() == {"lora_A.weight", "lora_B.weight"}
    assert torch.equal(kinds["lora_A.weight"], down)
    (update,) = method.own_updates(learnt, architecture).values()  # type: ignore[arg-type]
    assert torch.equal(update.product(0, 8), 0.5 * up @ down)  # type: ignore[attr-defined]


def test_what_learns_beside_the_language_model_has_the_rates_of_its_kind() -> None:
    model: Any = nn.Module()
    model.add_module("seeing", nn.Module())
    for name in ("a/lora_A", "a/lora_B"):
        model.seeing.register_parameter(name, nn.Parameter(torch.zeros(2)))
    optim = Optim(lora_plus_ratio=4, modules_ratio=0.1, weight_decay=0.3)
    groups = seeing("lora").groups(model, optim)
    assert [(group["name"], group["lr_ratio"], len(group["params"])) for group in groups] == [
        ("lora_A", 1.0, 0), ("lora_B", 4.0, 0), ("seeing.lora_A", 1.0, 1), ("seeing.lora_B", 4.0, 1),
    ]  # fmt: skip
    assert groups[3]["params"][0] is model.seeing.get_parameter("a/lora_B")
    *_, whole = seeing("projector").groups(model, optim)
    assert (whole["name"], whole["lr_ratio"], whole["weight_decay"], len(whole["params"])) == ("seeing", 0.1, 0.0, 2)


def test_an_exported_projector_has_the_bases_weights_with_what_they_have_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    architecture = replace(LLAMA, projector={"model.proj": {"weight": (2, 3)}})
    monkeypatch.setattr(
        "trainer.base.find.locate.describe_base", lambda model: SimpleNamespace(architecture=architecture)
    )
    monkeypatch.setattr("trainer.base.find.locate.resolve_base", lambda model: "base")
    base = torch.arange(6.0).view(2, 3)
    monkeypatch.setattr("trainer.base.load.front.values_beside", lambda *of: {"model.proj.weight": base})
    files = {PEFT_WEIGHTS: save({"a": torch.zeros(1)}), PEFT_SETTINGS: b'{"modules_to_save": null}'}
    inner: Any = SimpleNamespace(export=lambda weights, model: ExportedFiles("peft", f"{[*weights]}", files))
    learnt = {"seeing.model/proj/weight": torch.full((2, 3), 0.5), "language": torch.ones(1)}
    found = WithProjector(inner).export(learnt, Model(base="/here"))
    tensors = load(found.files[PEFT_WEIGHTS])
    (name,) = tensors.keys() - {"a"}
    assert torch.equal(tensors[name], base + 0.5)
    assert found.what == "['language'] of the language model, with the projector's weights,"


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_adapters_beside_the_language_model_begin_as_those_in_it(init: str) -> None:
    method: Any = find_method(Tuning.model_validate({"init": init, "rank": 4}))
    down, up = method.begun(8000, 300, torch.Generator().manual_seed(1))
    assert (down.shape, up.shape) == ((4, 8000), (300, 4))
    assert not (up @ down).abs().max() > 1e-6
    assert bool(up.any()) is (init == "orthogonal")
    torch.manual_seed(2)
    of_peft: Any = {"kaiming": True}.get(init, init)
    theirs: Any = get_peft_model(
        nn.Sequential(nn.Linear(8000, 300)),  # type: ignore[arg-type]  # any module does
        LoraConfig(r=4, target_modules=["0"], init_lora_weights=of_peft),
    )
    assert down.std() == pytest.approx(theirs.base_model.model[0].lora_A.default.weight.std().item(), rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "qwen3"])
@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"method": "dora", "rank": 3}, LoraConfig(r=3, use_dora=True, target_modules="all-linear")),
        (
            {"method": "ia3"},
            IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ),
        (
            {"method": "ia3", "targets": ["o_proj", "up_proj"], "feedforward": ["o_proj"]},
            IA3Config(target_modules=["o_proj", "up_proj"], feedforward_modules=["o_proj"]),
        ),
        (
            {"method": "ia3", "targets": ["layers.1.mlp.down_proj"]},
            IA3Config(target_modules=["layers.1.mlp.down_proj"], feedforward_modules=["layers.1.mlp.down_proj"]),
        ),
        ({"method": "oft", "block": 4}, OFTConfig(oft_block_size=4, target_modules="all-linear")),
    ],
    ids=["dora", "ia3", "ia3-feedforward", "ia3-path", "oft"],
)
def test_shapes_are_those_that_peft_adds(kind: str, settings: dict[str, Any], theirs: Any) -> None:

    sizes = {"tie_word_embeddings": False, **SIZES, **KINDS[kind]}
    theirs.task_type = "CAUSAL_LM"
    model = get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)), theirs)
    added = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): tuple(value.shape)
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    shapes = find_method(Tuning.model_validate(settings)).shapes(read_architecture(sizes))
    assert {name.removesuffix(".weight"): shape for name, shape in shapes.items()} == added


def test_a_merge_of_ia3_scales_the_bias_of_a_layer_whose_outputs_it_scales() -> None:
    """The first layer is as wide as it is high, so its factors would fit either way."""
    architecture = read_architecture({**SIZES, **KINDS["qwen2"]})
    for path, feedforward, factors, scaled in (
        ("layers.0.self_attn.q_proj", ["q_proj"], (1, 64), ["weight"]),
        ("layers.0.self_attn.q_proj", [], (64, 1), ["weight", "bias"]),
        ("layers.0.mlp.down_proj", [], (64, 1), ["weight"]),
    ):
        settings = {"method": "ia3", "targets": [path], "feedforward": feedforward}
        method: Any = find_method(Tuning.model_validate(settings))
        shapes = method.shapes(architecture)
        assert shapes == {f"model.{path}.ia3_l": factors}
        updates = method.updates({name: torch.ones(shape) for name, shape in shapes.items()}, architecture)
        assert list(updates) == [f"model.{path}.{part}" for part in scaled]


def test_an_identity_names_what_was_chosen_alone() -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        return find_method(Tuning.model_validate(settings)).identity

    assert identity(method="dora") == {"method": "dora", "rank": 16, "alpha": 32.0}
    assert identity(method="dora", targets="all-linear") == identity(method="dora")
    assert (
        identity(method="ia3") == identity(method="ia3", targets=["k_proj", "v_proj", "down_proj"]) == {"method": "ia3"}
    )
    assert identity(method="ia3", targets=["o_proj"], feedforward=["o_proj"]) == {
        "method": "ia3",
        "targets": ["o_proj"],
        "feedforward": ["o_proj"],
    }
    assert identity(method="ia3", targets="all-linear")["targets"] == "all-linear"


@pytest.mark.parametrize(
    ("targets", "adapted", "ends"),
    [
        ("all-linear", ".*", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (["self_attn.q_proj"], r".*\.q_proj", ["q_proj"]),
        (["*.mlp.*_proj"], r".*\.mlp\..*", ["down_proj", "gate_proj", "up_proj"]),
        (["*.0.self_attn.?_proj"], r".*\.0\.self_attn\..*", [f"0.self_attn.{name}_proj" for name in "koqv"]),
        (["re:.*0.*(q|v)_proj"], r".*\.0\..*(q|v)_proj", ["0.self_attn.q_proj", "0.self_attn.v_proj"]),
        (["layers.1.mlp.up_proj", "v_proj"], r".*(\.1\.mlp\.up_proj|v_proj)", ["1.mlp.up_proj", "v_proj"]),
    ],
)
def test_targets_are_ends_or_patterns_of_paths_and_peft_finds_the_same_layers(
    targets: Any, adapted: str, ends: list[str]
) -> None:

    method: Any = find_method(Tuning(targets=targets))
    assert method.mismatches(LLAMA) == []
    assert method.ends(LLAMA) == ends
    ours = {name.partition(".lora_")[0] for name in method.shapes(LLAMA)}
    assert ours == {path for path in LLAMA.linear_layers() if re.fullmatch(adapted, path)}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **KINDS["llama"]))
    model = inject_adapter_in_model(method.adapting(ends), model)
    assert ours == {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def test_layers_of_a_range_alone_are_adapted_and_peft_finds_the_same() -> None:
    method: Any = find_method(Tuning(targets=["q_proj", "up_proj"], layers=(1, 2)))
    assert method.ends(LLAMA) == ["1.mlp.up_proj", "1.self_attn.q_proj"]
    assert {name.partition(".lora_")[0] for name in method.shapes(LLAMA)} == {
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    }
    assert method.identity["layers"] == [1, 2]
    assert "layers" not in find_method(Tuning()).identity
    (sentence,) = find_method(Tuning(layers=(1, 99))).mismatches(LLAMA)
    assert sentence.startswith("tuning.layers: [1, 99] ends behind the base's last layer. It has ")
    assert find_method(Tuning(layers=(1, LLAMA.layers))).mismatches(LLAMA) == []
    (none,) = find_method(Tuning(targets=["layers.1.mlp.up_proj"], layers=(0, 1))).mismatches(LLAMA)
    assert none.startswith("tuning.layers: [0, 1] have none of the layers of tuning.targets.")


def test_a_last_name_that_a_stack_of_experts_has_too_is_not_enough_for_peft() -> None:
    stack = Parameter("model.layers.1.mlp.experts.down_proj", (3, 64, 172), "experts", 1)
    mixture = replace(LLAMA, parameters=(*LLAMA.parameters, stack))
    method: Any = find_method(Tuning(targets=["down_proj", "up_proj"]))
    assert method.ends(mixture) == ["mlp.down_proj", "up_proj"]


@pytest.mark.parametrize(
    ("kind", "by_weight"),
    [
        ("llama", []),
        ("qwen3-moe", []),
        (
            "deepseek-v3",
            ["gate_proj", *(f"{mlp}.{name}_proj" for mlp in ("mlp", "shared_experts") for name in ("down", "up"))],
        ),
        (
            "qwen3-next",
            ["gate_proj", *(f"{mlp}.{name}_proj" for mlp in ("mlp", "shared_expert") for name in ("down", "up"))],
        ),
    ],
)
def test_layers_that_peft_would_take_for_experts_are_named_by_their_weights(kind: str, by_weight: list[str]) -> None:
    from peft import get_peft_model

    settings = {"tie_word_embeddings": False, **SIZES, **FAMILIES[kind]}
    architecture, method = read_architecture(settings), Lora(Tuning(dropout=0.25), rank_stabilized=False)
    described = method.peft_config(architecture)
    assert described.lora_dropout == (0 if by_weight else 0.25), "PEFT loads no parameters' adapters with any"
    assert sorted(described.target_parameters or ()) == [f"{name}.weight" for name in by_weight]
    model: Any = get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)), described)
    found = {path for path, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert found == {name.partition(".lora_")[0] for name in method.shapes(architecture)}


def test_pefts_folder_has_the_bases_name_and_revision_and_the_same_bytes_in_each_process() -> None:
    model = Model.model_validate({"base": "owner/name", "revision": "v1"})
    described = Lora(Tuning(), rank_stabilized=False).peft_config(LLAMA)
    files = peft_files(described, {"a": torch.ones(2)}, model)
    found = json.loads(files[PEFT_SETTINGS])
    assert (found["base_model_name_or_path"], found["revision"]) == ("owner/name", "v1")
    assert (found["inference_mode"], found["r"], found["lora_alpha"], found["use_rslora"]) == (True, 16, 32.0, False)
    assert found["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert load(files[PEFT_WEIGHTS]).keys() == {"base_model.model.a"}
    assert json.loads(peft_files(described, {}, Model(base="/here"))[PEFT_SETTINGS])["revision"] is None


@pytest.mark.parametrize(("method", "options"), [("rslora", (True, False)), ("dora", (False, True))])
def test_peft_is_told_which_adapter_it_is(method: str, options: tuple[bool, bool]) -> None:
    made: Any = find_method(Tuning(method=method))
    described = made.peft_config(LLAMA)
    assert (described.use_rslora, described.use_dora) == options


def test_adapters_begin_as_the_seed_says_whatever_was_drawn_before() -> None:
    def begun(seed: int, drawn: int) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **KINDS["llama"]}))
        torch.manual_seed(drawn)
        find_method(Tuning()).attach(model, LLAMA, torch.float32, seed)
        return {name: value for name, value in model.named_parameters() if value.requires_grad}

    first, again, other = begun(3, 0), begun(3, 1), begun(4, 0)
    assert first.keys() == find_method(Tuning()).shapes(LLAMA).keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) is ("lora_B" in name) for name in first)


def test_modules_that_learn_do_not_decay_and_a_tied_one_is_exported_under_both_of_its_names() -> None:
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: a}]}\ntrain: {steps: 1}\n"
    method: Any = method_of(parse_config(text, ["tuning.modules_to_save=[embed_tokens]", "optim.modules_ratio=0.1"]))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **KINDS["llama"]})).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    *_, ours = method.groups(model, Optim(weight_decay=0.1, modules_ratio=0.1))
    assert [part is model.get_input_embeddings().weight for part in ours.pop("params")] == [True]
    assert ours == {"name": "modules", "lr_ratio": 0.1, "weight_decay": 0.0}
    tied = read_architecture({**SIZES, **KINDS["llama"], "tie_word_embeddings": True})
    described = {"modules_to_save": None}
    files = {PEFT_WEIGHTS: save({"a": torch.zeros(1)}), PEFT_SETTINGS: json.dumps(described).encode()}
    learnt = {tied.embedding: torch.ones(2, 4)}
    for architecture, names in ((tied, ["lm_head", "model.embed_tokens"]), (LLAMA, ["model.embed_tokens"])):
        found = method.added_to(ExportedFiles("peft", "it", files), dict(learnt), architecture).files
        assert json.loads(found[PEFT_SETTINGS])["modules_to_save"] == names
        assert load(found[PEFT_WEIGHTS]).keys() == {"a", *(f"base_model.model.{name}.weight" for name in names)}


def test_rows_of_tokens_replace_those_of_the_weight_and_no_others() -> None:
    rows = torch.arange(6.0).view(3, 2) + 10
    update = RowsUpdate((6, 2), torch.tensor([4, 1, 2]), rows)
    whole = torch.zeros(6, 2)
    for first, last in ((0, 2), (2, 4), (4, 6)):
        update.apply_to(whole[first:last].view(-1), first)
    assert whole[[4, 1, 2]].tolist() == rows.tolist()
    assert not whole[[0, 3, 5]].any()


def test_a_merge_makes_room_for_tokens_behind_the_last_row() -> None:
    method: Any = WithTokens(find_method(Tuning()), Model(base="b", add_tokens=["<a>"]))
    for row in (3, LLAMA.vocabulary + 4):
        vars(method)["_rows"] = [SimpleNamespace(row=row)]
        learnt = {name: torch.ones(1, LLAMA.hidden) for name in method.own(LLAMA)}
        updates = method.own_updates(learnt, LLAMA)
        assert updates.keys() == {LLAMA.embedding, LLAMA.head}
        for update in updates.values():
            assert update.shape == (max(LLAMA.vocabulary, row + 1), LLAMA.hidden)
            assert update.ids.tolist() == [row]


def test_new_rows_begin_as_means_of_their_pieces_in_the_embedding_and_in_a_head_of_its_own() -> None:
    torch.manual_seed(0)
    method: Any = WithTokens(cast(Any, SimpleNamespace(attach=lambda *_: None)), Model(base="b", add_tokens=["<a>"]))
    vars(method)["_rows"] = [SimpleNamespace(row=9, pieces=[1, 2])]
    embedding, head, begun = nn.Embedding(8, LLAMA.hidden), nn.Linear(LLAMA.hidden, 8, bias=False), list[Tensor]()
    model: Any = nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": embedding})})
    head.learn = lambda _ids, tokens, start: begun.extend((tokens, start))  # type: ignore[assignment]
    model.get_input_embeddings, model.get_output_embeddings = lambda: embedding, lambda: head
    method.attach(model, LLAMA, torch.float32, 0)
    rows = model["model"]["embed_tokens"].trainable_tokens_delta
    torch.testing.assert_close(rows[0], embedding.weight[1:3].mean(0))
    for rows in begun:
        torch.testing.assert_close(rows[0], head.weight[1:3].mean(0))
    assert len(begun) == 2


@pytest.mark.parametrize("scaled", [False, True])
def test_an_embedding_has_the_rows_that_learn_in_place_and_behind_the_last_as_its_class_has_them(scaled: bool) -> None:
    def made(tokens: int) -> nn.Embedding:
        torch.manual_seed(0)
        return Gemma3TextScaledWordEmbedding(tokens, 4, 0, embed_scale=2.5) if scaled else nn.Embedding(tokens, 4)

    base, whole, ids = made(5), made(7), torch.tensor([6, 2, 5])
    start, rows = torch.randn(3, 4), torch.randn(3, 4)
    layer = TokenEmbedding(base, ids, start)
    layer.trainable_tokens_delta.data.copy_(rows)
    whole.weight.data[:5] = base.weight.data
    text = torch.tensor([[0, 6, 2, 1], [5, 4, 3, 2]])
    for active, expected in ((True, rows), (False, start)):
        whole.weight.data[ids] = expected
        layer.active = active
        torch.testing.assert_close(layer(text), whole(text))


def test_dora_is_refused_where_peft_would_take_its_layers_for_experts() -> None:
    architecture = read_architecture({**SIZES, **FAMILIES["deepseek-v3"]})
    (sentence,) = find_method(Tuning(method="dora", targets=["down_proj", "o_proj"])).mismatches(architecture)
    assert "dora cannot be exported for mlp.down_proj, shared_experts.down_proj of this base" in sentence
    assert find_method(Tuning(method="dora", targets=["o_proj"])).mismatches(architecture) == [], "the control"


def test_a_layer_whose_weight_is_handed_to_a_kernel_gets_no_adapter() -> None:
    mamba = read_architecture({"tie_word_embeddings": False, **SIZES, **FAMILIES["nemotron-h"]})
    assert "model.layers.0.mixer.in_proj" in mamba.linear_layers()
    assert "model.layers.0.mixer.out_proj" not in mamba.linear_layers()
    assert "model.layers.0.mixer.out_proj.weight" in mamba.quantizable()
    (sentence,) = find_method(Tuning(targets=["out_proj"])).mismatches(mamba)
    assert sentence.startswith("tuning.targets: 'out_proj' is no linear layer that can be adapted.")


@pytest.mark.parametrize("target", ["*.mlp.query", "mlp.*"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_paths_there_are(target: str) -> None:
    (sentence,) = find_method(Tuning(targets=[target, "q_proj"])).mismatches(LLAMA)
    assert sentence.startswith(
        f"tuning.targets: {target!r} matches the path of no linear layer that can be adapted. The base has "
        "model.layers.*.self_attn.q_proj, "
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"targets": ["query"]},
            "tuning.targets: 'query' is no linear layer that can be adapted. The base has o_proj, qkv_proj,",
        ),
        (
            {},
            (
                "tuning.targets: auto is k_proj, v_proj, down_proj with tuning.method: ia3, but the base has no k_proj,"
                " v_proj."
            ),
        ),
        (
            {"targets": ["qkv_proj"], "feedforward": ["down_proj"]},
            "tuning.feedforward: 'down_proj' is none of tuning.targets (qkv_proj). Name it there too, or remove it.",
        ),
    ],
)
def test_what_ia3_cannot_do_is_said_in_one_sentence(settings: dict[str, Any], words: str) -> None:
    (sentence,) = find_method(Tuning.model_validate({"method": "ia3", **settings})).mismatches(PHI3)
    assert sentence.startswith(words)


def test_ia3_on_every_linear_layer_scales_the_inputs_of_those_that_are_named() -> None:
    method = find_method(Tuning.model_validate({"method": "ia3", "targets": "all-linear", "feedforward": ["o_proj"]}))
    assert method.mismatches(LLAMA) == []
    shapes = {name.split(".")[-2]: shape for name, shape in method.shapes(LLAMA).items()}
    linears = {path.rpartition(".")[2]: linear for path, linear in LLAMA.linear_layers().items()}
    assert shapes == {
        name: (1, linear.inputs) if name == "o_proj" else (linear.outputs, 1) for name, linear in linears.items()
    }
    stranger = {"method": "ia3", "targets": "all-linear", "feedforward": ["query"]}
    (sentence,) = find_method(Tuning.model_validate(stranger)).mismatches(LLAMA)
    assert sentence.startswith("tuning.feedforward: 'query' is none of tuning.targets (")
    none = find_method(Tuning.model_validate({"method": "ia3", "feedforward": []}))
    assert all(shape[1] == 1 for shape in none.shapes(LLAMA).values()), "not even those that end in down_proj"


def test_ia3_merges_into_the_bias_of_a_layer_whose_outputs_it_scales() -> None:
    architecture = read_architecture({**SIZES, **KINDS["qwen2"]})
    path = "model.layers.0.self_attn.k_proj"
    for feedforward, merged in (([], {f"{path}.weight", f"{path}.bias"}), (["k_proj"], {f"{path}.weight"})):
        given = {"method": "ia3", "targets": ["k_proj"], "layers": [0, 1], "feedforward": feedforward}
        method: Any = find_method(Tuning.model_validate(given))
        weights = {name: torch.rand(shape) for name, shape in method.shapes(architecture).items()}
        updates = method.updates(weights, architecture)
        assert updates.keys() == merged
        linear = architecture.linear_layers()[path]
        assert updates[f"{path}.weight"].shape == (linear.outputs, linear.inputs)


def test_settings_without_effect_are_refused() -> None:
    run = "run: {name: demo}\nmodel: {base: /models/tiny}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
    given = parse_config(run, ("tuning.method=ia3", "optim.lora_plus_ratio=4"))
    assert tuning_misfits(given, LLAMA) == ["optim.lora_plus_ratio: has no effect with tuning.method: ia3. Remove it."]
    assert tuning_misfits(parse_config(run, ("tuning.method=dora", "optim.lora_plus_ratio=4")), LLAMA) == []


def test_the_magnitudes_of_dora_are_a_group_of_their_own() -> None:
    method, model = (
        find_method(Tuning(method="dora")),
        nn.Sequential(DoraLinear(frozen_linear(True), 3, 2.0, 0.0, torch.float32)),
    )
    groups: Any = method.groups(model, Optim(lora_plus_ratio=4))  # type: ignore[arg-type]
    found = {group["name"]: (group["lr_ratio"], [tuple(part.shape) for part in group["params"]]) for group in groups}
    assert found == {
        "lora_A": (1.0, [(3, 40)]),
        "lora_B": (4.0, [(24, 3)]),
        "lora_magnitude_vector": (1.0, [(24,)]),
    }
