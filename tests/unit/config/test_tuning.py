"""Methods are found by name, say what they are, and refuse settings that they do not read."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from tests.material import KINDS, SIZES, tuning_misfits
from trainer import tuning
from trainer.base.architecture import Architecture
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import Config, Optim, Tuning, parse_config
from trainer.errors import ConfigError
from trainer.model.experts import prepare_experts
from trainer.state.zero import engine
from trainer.tuning.experts.layer import ExpertLora
from trainer.tuning.method import Around, Method, find_method, innermost, method_of, methods

LLAMA = read_architecture({**SIZES, **KINDS["llama"]})


def refusal(**settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        find_method(Tuning.model_validate(settings))
    return str(caught.value)


def test_an_unknown_method_is_refused_with_the_nearest_name():
    assert refusal(method="rs-lora") == (
        f"tuning.method: 'rs-lora' is not allowed. Allowed are {', '.join(sorted(methods()))}. Did you mean rslora?"
    )


def test_a_setting_that_the_method_does_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "nothing.py").write_text(
        "class Nothing:\n    settings = ()\n\n\nMETHODS = {'nothing': lambda settings: Nothing()}\n"
    )
    monkeypatch.setattr(tuning, "__path__", [*tuning.__path__, str(tmp_path)])
    assert "nothing" in methods()
    find_method(Tuning(method="nothing"))
    assert refusal(method="nothing", rank=4) == "tuning.rank: has no effect with tuning.method: nothing. Remove it."


def test_another_start_of_the_matrices_is_refused_where_learning_begins_from_an_adapter_or_halves_are_none():
    def sentence(**settings: object) -> str:
        with pytest.raises(ValidationError) as caught:
            Tuning.model_validate(settings)
        (error,) = caught.value.errors()
        return error["msg"]

    assert Tuning.model_validate({"start": "run"}).rank == 16
    assert "tuning.init: gaussian has no effect with tuning.start" in sentence(start="run", init="gaussian")
    for even in (2, 6):
        assert Tuning.model_validate({"init": "orthogonal", "rank": even}).rank == even
    assert "tuning.init: orthogonal needs an even rank, and tuning.rank is 7" in sentence(init="orthogonal", rank=7)
    assert Tuning.model_validate({"init": "gaussian", "rank": 7}).rank == 7


def test_an_identity_says_what_matters_and_leaves_defaults_out():
    assert find_method(Tuning()).identity == {"method": "lora", "rank": 16, "alpha": 32.0}
    given = Tuning(method="rslora", rank=4, dropout=0.1, targets=["q_proj"])
    assert find_method(given).identity == {
        "method": "rslora",
        "rank": 4,
        "alpha": 32.0,
        "dropout": 0.1,
        "targets": ["q_proj"],
    }


def test_every_default_of_an_identity_is_a_setting_that_the_method_reads():
    for name, make in methods().items():
        method = make(Tuning(method=name))
        assert method.defaults.keys() <= set(method.settings), name


@pytest.mark.parametrize(
    ("targets", "count"), [("all-linear", 14), (["o_proj"], 2), (["layers.1.self_attn.o_proj"], 1)]
)
def test_lora_has_two_matrices_for_each_target(targets: object, count: int):
    shapes = find_method(Tuning.model_validate({"rank": 3, "targets": targets})).shapes(LLAMA)
    assert len(shapes) == 2 * count
    assert shapes["model.layers.1.self_attn.o_proj.lora_A.default.weight"] == (3, 64)


def test_a_target_that_the_base_has_not_is_named():
    (sentence,) = find_method(Tuning(targets=["query"])).mismatches(LLAMA)
    assert sentence.startswith("tuning.targets: 'query' is no linear layer that can be adapted. The base has q_proj,")


def test_finding_a_method_loads_no_torch():
    code = (
        "import sys; from trainer.config import Tuning; from trainer.tuning.method import find_method; "
        "find_method(Tuning()); print(*({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr


def adding(*overrides: str) -> Method:
    text = (
        "run: {name: demo}\nmodel: {base: /m, add_tokens: [<a>, <b>]}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps:"
        " 10}\n"
    )
    return method_of(parse_config(text, overrides))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_added_tokens_are_rows_beside_an_adapter(method: str):
    alone = find_method(Tuning(method=method))
    for kind, more in (("llama", ("model.embed_tokens", "lm_head")), ("llama-tied", ("model.embed_tokens",))):
        base = read_architecture({**SIZES, **KINDS[kind]})
        rows = {f"{path}.trainable_tokens_delta": (2, 64) for path in more}
        assert adding(f"tuning.method={method}").shapes(base) == {**alone.shapes(base), **rows}
    assert adding(f"tuning.method={method}").identity == alone.identity


@pytest.mark.parametrize("method", ["ia3", "full"])
def test_a_method_that_learns_no_rows_of_tokens_refuses_them(method: str):
    with pytest.raises(ConfigError) as caught:
        adding(f"tuning.method={method}")
    assert (
        str(caught.value)
        == f"model.add_tokens: tuning.method: {method} learns no rows of tokens. Choose one of dora, lora,"
        " rslora, or remove it."
    )


@pytest.mark.parametrize(("tokens", "said"), [("[<a>, <b>, <a>]", "'<a>' is there twice"), ('[" "]', "' ' is no text")])
def test_added_tokens_are_texts_that_differ(tokens: str, said: str):
    with pytest.raises(ConfigError, match=f"model.add_tokens: {said}"):
        adding(f"model.add_tokens={tokens}")


def saving(modules: list[str], kind: str = "llama", method: str = "lora", *overrides: str) -> list[str]:
    """The sentences about a run that has these modules learn."""
    text = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
    settings = f"tuning.method={method}", f"tuning.modules_to_save=[{', '.join(modules)}]"
    return tuning_misfits(parse_config(text, (*settings, *overrides)), read_architecture({**SIZES, **KINDS[kind]}))


def test_modules_learn_whole_beside_an_adapter_by_the_ends_of_their_paths():
    names = Tuning(modules_to_save=["model.norm", "input_layernorm"])
    text = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
    config = parse_config(text).model_copy(update={"tuning": names})
    method, alone = method_of(config), find_method(Tuning())
    added = method.shapes(LLAMA).keys() - alone.shapes(LLAMA).keys()
    assert added == {"model.norm.weight", *(f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))}
    assert method.identity == {**alone.identity, "modules_to_save": ["model.norm", "input_layernorm"]}
    assert method.trains_base
    tied = read_architecture({**SIZES, **KINDS["llama-tied"]})
    head = config.model_copy(update={"tuning": Tuning(modules_to_save=["lm_head"])})
    assert method_of(head).shapes(tied).keys() - alone.shapes(tied).keys() == {"model.embed_tokens.weight"}


def test_modules_that_learn_leave_no_base_to_switch_to():
    text = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
    method = method_of(parse_config(text, ("tuning.modules_to_save=[norm]",)))
    nothing: Any = None
    with (
        pytest.raises(ConfigError, match="modules of the base learn, and no rank keeps them as they were"),
        method.switched_off(nothing),
    ):
        pass


def test_modules_learn_at_their_own_rate_and_none_is_named_without_modules():
    text = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
    config = parse_config(
        text,
        (
            "tuning.modules_to_save=[norm]",
            "optim.modules_ratio=0.1",
            "optim.lora_plus_ratio=4",
            "optim.weight_decay=0.1",
        ),
    )
    model: Any = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4)})
    groups = {group["name"]: group for group in method_of(config).groups(model, config.optim)}
    assert {name: one["lr_ratio"] for name, one in groups.items()} == {"lora_A": 1.0, "lora_B": 4.0, "modules": 0.1}
    assert groups["modules"]["weight_decay"] == 0.0
    with pytest.raises(ConfigError, match=r"optim\.modules_ratio: has no effect without tuning\.modules_to_save\."):
        method_of(parse_config(text, ("optim.modules_ratio=0.1",)))
    method_of(parse_config(text, ("data.format=pictures", "tuning.towers=projector", "optim.modules_ratio=0.1")))


def test_modules_that_cannot_learn_are_refused_with_those_that_can():
    assert saving(["norm", "lm_head"]) == []
    assert saving(["router"], "gpt-oss") == []
    (stranger,) = saving(["final_norm"])
    assert stranger == (
        "tuning.modules_to_save: 'final_norm' is no module of the base. Name some of embed_tokens, input_layernorm, "
        "post_attention_layernorm, norm, lm_head."
    )
    for name in ("q_proj", "mlp", "model"):
        (sentence,) = saving([name])
        assert sentence.startswith(
            f"tuning.modules_to_save: {name!r} has linear layers or experts in it, which stay frozen."
        )
    (experts,) = saving(["experts"], "gpt-oss")
    assert experts.startswith("tuning.modules_to_save: 'experts' has linear layers or experts in it")
    for name in ("embed_tokens", "lm_head"):
        (both,) = saving([name], "llama", "lora", "model.add_tokens=[<a>]")
        assert both.startswith(
            f"tuning.modules_to_save: {name!r} learns whole, and model.add_tokens has some of its rows learn."
        )
    (node,) = saving(["norm"], "llama", "lora", "sharding.scope=node")
    assert "which tuning.modules_to_save: ['norm'] would train apart. Set sharding.scope: world." in node
    assert saving(["norm"], "llama", "dora", "model.add_tokens=[<a>]") == []
    with pytest.raises(ConfigError, match="tuning.modules_to_save: has no effect with tuning.method: full. Remove it."):
        saving(["norm"], "llama", "full")


def with_experts(kind: str, *overrides: str) -> tuple[Config, Architecture]:
    text = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
    sizes = {**SIZES, "num_experts_per_tok": 2, **KINDS[kind]}
    return parse_config(text, ("tuning.experts=true", *overrides)), read_architecture(sizes)


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [
        ("mixtral", (3, 4, 35), (3, 86, 4)),
        ("gpt-oss", (4, 4, 35), (4, 86, 4)),  # its stacks are (experts, inputs, outputs)
    ],
)
def test_experts_have_adapters_of_a_rank_of_their_own_beside_those_of_linear_layers(
    kind: str, a: tuple[int, ...], b: tuple[int, ...]
):
    config, architecture = with_experts(kind, "tuning.experts_rank=4")
    shapes, alone = method_of(config).shapes(architecture), find_method(Tuning()).shapes(architecture)
    assert alone.items() <= shapes.items()
    added = {name: shape for name, shape in shapes.items() if name not in alone}
    assert len(added) == 2 * 2 * 2  # layers, stacks, A and B
    path = "model.layers.1.mlp.experts.adapters"
    assert (added[f"{path}.gate_up_proj.lora_A"], added[f"{path}.gate_up_proj.lora_B"]) == (a, b)
    assert method_of(config).identity == {**find_method(Tuning()).identity, "experts": True, "experts_rank": 4}


def test_experts_begin_as_pefts_do_and_are_scaled_by_their_own_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "divide_now", lambda module, beside: None)
    config, architecture = with_experts("mixtral", "tuning.rank=8", "tuning.experts_rank=2", "tuning.alpha=12")
    sizes = {**SIZES, "num_experts_per_tok": 2, **KINDS["mixtral"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    prepare_experts(model)
    method_of(config).attach(model, architecture, torch.float32, seed=3)
    adapters = [module for module in model.modules() if isinstance(module, ExpertLora)]
    assert len(adapters) == 2 * architecture.layers
    for adapter in adapters:
        start = adapter.lora_A.detach()
        theirs = torch.nn.init.kaiming_uniform_(torch.empty(500, start.shape[2]), a=5**0.5).abs().max()
        assert 0.9 * theirs < start.abs().max() <= start.shape[2] ** -0.5
        assert not adapter.lora_B.any()
        assert adapter.scaling == 12 / 2
    optim = config.optim.model_copy(update={"lora_plus_ratio": 4.0})
    found = {
        group["name"]: (group["lr_ratio"], len(group["params"])) for group in method_of(config).groups(model, optim)
    }
    assert (found["experts_A"], found["experts_B"]) == ((1.0, len(adapters)), (4.0, len(adapters)))


def test_the_experts_rank_is_that_of_the_linear_layers_unless_it_is_given():
    (same, architecture), (given, _) = with_experts("mixtral"), with_experts("mixtral", "tuning.experts_rank=16")
    assert method_of(same).identity == method_of(given).identity
    assert method_of(same).identity == {**find_method(Tuning()).identity, "experts": True}
    assert method_of(same).shapes(architecture) == method_of(given).shapes(architecture)


def test_experts_that_cannot_be_adapted_are_refused_with_the_reason():
    assert tuning_misfits(*with_experts("mixtral")) == []
    assert tuning_misfits(*with_experts("llama")) == ["tuning.experts: the base is no mixture of experts. Remove it."]
    (dropout,) = tuning_misfits(*with_experts("mixtral", "tuning.dropout=0.1"))
    assert dropout == (
        "tuning.dropout: 0.1 cannot be had with tuning.experts, as PEFT's adapters of experts have none. Set it to 0."
    )
    for method in ("dora", "ia3"):  # PEFT has neither for experts
        with pytest.raises(
            ConfigError, match=f"tuning.experts: has no effect with tuning.method: {method}. Remove it."
        ):
            method_of(with_experts("mixtral", f"tuning.method={method}")[0])
    with pytest.raises(
        ConfigError, match="tuning.experts_rank: 4 has no effect without tuning.experts: true. Remove it"
    ):
        with_experts("mixtral", "tuning.experts=false", "tuning.experts_rank=4")


def full(train: object = "all") -> Method:
    return find_method(Tuning.model_validate({"method": "full", "train": train}))


def test_full_trains_every_parameter_of_the_base_or_those_that_patterns_name():
    every = {parameter.name: parameter.shape for parameter in LLAMA.parameters}
    assert full().shapes(LLAMA) == every
    assert full(["*"]).shapes(LLAMA) == every
    assert set(full(["model.layers.1.*"]).shapes(LLAMA)) == {name for name in every if ".1." in name}
    norms = full(["*norm.weight"]).shapes(LLAMA)
    assert len(norms) == 2 * 2 + 1
    assert "model.norm.weight" in norms


def test_full_decays_matrices_and_neither_biases_nor_norms():
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2, bias=False))
    model[2].weight.requires_grad_(False)
    optim = Optim(weight_decay=0.1)
    groups = [
        (group["name"], group["lr_ratio"], group["weight_decay"], [tuple(one.shape) for one in group["params"]])
        for group in full().groups(model, optim)
    ]
    assert groups == [("matrices", 1.0, 0.1, [(2, 3)]), ("vectors", 1.0, 0.0, [(2,), (2,), (2,)])]
    model[0].weight.ds_shape, model[0].weight.data = (2, 3), torch.zeros(0)  # as one that is divided over ranks
    assert [len(group["params"]) for group in full().groups(model, optim)] == [1, 3]
    assert [group["name"] for group in full().groups(model[1], optim)] == ["vectors"]


def test_a_negative_number_counts_the_layers_from_the_end():
    last = full(["*.-1.*"]).shapes(LLAMA)
    assert last == full(["model.layers.1.*"]).shapes(LLAMA)
    assert full([r"re:.*\.-(1|2)\.mlp.*"]).shapes(LLAMA) == full(["*.mlp.*"]).shapes(LLAMA)
    assert full(["*1.mlp*"]).shapes(LLAMA) == full(["*.1.mlp*"]).shapes(LLAMA), "a star is no sign of a number"
    assert full(["*2.mlp*"]).shapes(LLAMA) == {}
    (sentence,) = full(["*.-3.*"]).mismatches(LLAMA)
    assert sentence.startswith("tuning.train: '*.-3.*' matches no parameter of the base.")


def test_a_pattern_that_names_nothing_is_refused_with_the_names_there_are():
    (sentence,) = full(["*.bias", "lm_head.weight"]).mismatches(LLAMA)
    assert sentence.startswith("tuning.train: '*.bias' matches no parameter of the base.")
    assert "The base has model.embed_tokens.weight, model.layers.*.self_attn.q_proj.weight," in sentence
    assert sentence.count("q_proj") == 1
    assert full([]).mismatches(LLAMA) == [
        "tuning.train: [] trains nothing. Name parameters by patterns, or set tuning.train: all."
    ]


def test_fulls_identity_names_its_patterns_where_there_are_some():
    assert full().identity == {"method": "full"}
    assert full(["*norm.weight"]).identity == {"method": "full", "train": ["*norm.weight"]}


def test_full_refuses_what_lora_reads_and_lora_what_full_reads():
    assert refusal(method="full", rank=4) == "tuning.rank: has no effect with tuning.method: full. Remove it."
    assert refusal(train=["*"]) == "tuning.train: has no effect with tuning.method: lora. Remove it."
    begun = refusal(method="full", start="run")
    assert begun.startswith("tuning.start: tuning.method: full has no adapter to begin from.")


def test_full_needs_a_base_in_16_or_32_bits_of_which_there_is_one_copy():
    def wrong(*overrides: str) -> list[str]:
        text = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
        return tuning_misfits(parse_config(text, ("tuning.method=full", *overrides)), LLAMA)

    assert wrong("quant.type=none") == []
    assert wrong() == [
        "quant.type: nf4 keeps the base in fewer bits, and tuning.method: full trains its weights themselves. Set"
        " quant.type: none, over a base that is stored in 16 or 32 bits."
    ]
    (sentence,) = wrong("quant.type=none", "sharding.scope=node")
    assert "which tuning.method: full would train apart. Set sharding.scope: world." in sentence


def test_full_cannot_be_switched_off():
    with (
        pytest.raises(ConfigError, match="full cannot be switched off, as the base itself learns"),
        full().switched_off(
            None  # type: ignore[arg-type]
        ),
    ):
        pass


def test_what_a_method_says_of_itself_a_wrapper_says_too():
    """Each is the method's, or said by the wrapper: a default of the protocol would be a lie."""
    asked = {name for name in vars(Method) if not name.startswith("_")}
    assert asked - vars(Around).keys() == set()
    text = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
    method = method_of(parse_config(text, ("tuning.modules_to_save=[norm]", "tuning.method=oft")))
    assert isinstance(method, Around)
    assert (method.counts_activations, method.adapts_4_bits, method.trains_base) == (True, True, True)
    assert innermost(method).trains_base is False


def test_a_method_that_says_nothing_is_planned_with_all_layers_computed_again_and_proven_over_values():
    assert (Method.counts_activations, Method.adapts_4_bits) == (False, False)
    uncounted = {name for name, make in methods().items() if not make(Tuning(method=name)).counts_activations}
    assert uncounted >= {"dora", "prefix"}
