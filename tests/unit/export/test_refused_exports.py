"""The exports that a run cannot have are known before its first step: what is said then is what the export says."""

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load

from launcher.plan.planning import plan_run
from launcher.start.check import check
from tests.material import Workshop, commit, make_base
from tests.stored import store_as
from trainer.base.find.locate import resolve_base
from trainer.base.rows.parameters import FoundWeights, find_all_weights
from trainer.errors import AlreadyExists, ConfigError, StorageError
from trainer.export import refusals
from trainer.export.destination import ExportProgress
from trainer.export.format import find_format
from trainer.export.formats import merged as merged_format
from trainer.export.refusals import export_notes, refused_exports
from trainer.export.write import adapter, foreseen, merged, recoded
from trainer.store.store import open_store
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS

SILENT = ExportProgress(lambda done, total: None, lambda sentence: None)
NO_TOKENIZER = "llama.cpp's converter does not know this base's tokenizer"
NO_EXPERTS = "transformers cannot load the experts of this base in this form. Take --format merged"


@pytest.fixture(scope="module", params=["llama", "qwen3-moe"])
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    sizes = {"hidden_size": 128} if request.param == "llama" else {}  # FP8 takes multiples of 128
    return Workshop(tmp_path_factory.mktemp(request.param), request.param, **sizes)


# What is tested is no matter of the family.
of_one_family = pytest.mark.parametrize("workshop", ["llama"], indirect=True)

CASES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "lora": ((), {"gguf": NO_TOKENIZER}),
    "dora": (("tuning.method=dora",), {"gguf": NO_TOKENIZER, "gguf-adapter": "llama.cpp loads LoRA .* this is DoRA"}),
    "experts": (
        ("tuning.experts=true",),
        {"gguf": NO_TOKENIZER, "gguf-adapter": "adapters are of single matrices, and this has experts.down_proj"},
    ),
    "norms": (
        ("tuning.modules_to_save=[norm]",),
        {"gguf": NO_TOKENIZER, "gguf-adapter": "adapters are of single matrices, and this has model.norm.weight"},
    ),
    "bottleneck": (
        ("tuning={method: bottleneck}",),
        {
            **dict.fromkeys(("gguf", "merged", "nf4", "fp8"), "there is no merged model: a bottleneck adapter is not"),
            "gguf-adapter": r"llama.cpp loads LoRA adapters, and bottleneck \(tuning.method\) makes others. Take --format peft",
        },
    ),
    "prefix": (
        ("tuning={method: prefix}",),
        {
            **dict.fromkeys(("gguf", "merged", "nf4", "fp8"), "there is no merged model: virtual tokens stand before"),
            "gguf-adapter": r"llama.cpp loads LoRA adapters, and prefix \(tuning.method\) makes others. Take --format peft",
        },
    ),
    "full": (
        ("tuning={method: full}", "quant.type=none"),
        {"gguf": NO_TOKENIZER, "gguf-adapter": "the base itself was tuned, so there is no adapter"},
    ),
    "first layers": (
        ("model.layers=1",),
        dict.fromkeys(("gguf", "merged", "nf4", "fp8"), r"the first 1 layers of its base only \(model.layers\)"),
    ),
    "labels": (
        ("objective.name=reward",),
        {
            **dict.fromkeys(("gguf", "merged", "nf4", "fp8"), "head is no part of a language model"),
            "gguf-adapter": "llama.cpp has no place for the head of objective.name: reward",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_before_the_first_step_is_what_the_export_says(
    workshop: Workshop, tmp_path: Path, case: str
) -> None:
    mixture = (workshop.folder / "base" / "config.json").read_text().count("num_experts")
    if case == "experts" and not mixture:
        pytest.skip("this base has no experts")
    overrides, expected = CASES[case]
    config, run = workshop.config("run", *overrides), open_store(str(tmp_path / "run"))
    commit(run, config)
    if mixture:
        expected = {"nf4": NO_EXPERTS, "fp8": NO_EXPERTS} | expected
    refused = refused_exports(config)
    assert refused.keys() == expected.keys()
    for form, sentence in expected.items():
        with pytest.raises(ConfigError, match=sentence) as caught:
            find_format(form).write(run, open_store(str(tmp_path / form)), None, SILENT)
        assert str(caught.value) == refused[form]
    for form in {"peft", "merged", "nf4", "fp8", "gguf-adapter"} - refused.keys():
        find_format(form).write(run, open_store(str(tmp_path / form)), None, SILENT)


@of_one_family
def test_formats_that_are_refused_for_one_reason_are_one_note_of_a_plan(workshop: Workshop) -> None:
    config = workshop.config("run", "tuning={method: bottleneck}", "cluster.gpus_per_worker=0")
    (note,) = [note for note in plan_run(config, None, None).no_exports if "no merged model" in note]
    assert note.startswith("gguf, merged, nf4, fp8: there is no merged model: a bottleneck adapter")
    assert note in export_notes(refused_exports(config))


@of_one_family
def test_a_format_is_asked_with_its_options(workshop: Workshop) -> None:
    (refused,) = refused_exports(workshop.config("run"), {"merged": ("as=stored",)}).items()
    assert refused[0] == "merged"
    assert "as: stored keeps the codes of a base in 4 or 8 bits" in refused[1]
    assert refused_exports(workshop.config("run"), {"merged": ()}) == {}


@of_one_family
@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("int4-32", (), None),
        ("gptq-4", (), None),
        ("gptq-4", ("tuning.method=dora",), "this method cannot change a single row"),
        ("llm-int8", (), "there is no merged model: .* in 8 bits by bitsandbytes"),
    ],
)
def test_a_base_whose_own_codes_cannot_be_written_is_said_so_in_a_plan_and_at_the_start(
    workshop: Workshop, tmp_path: Path, name: str, overrides: Sequence[str], sentence: str | None
) -> None:
    base = store_as(make_base(tmp_path / "plain", hidden_size=128, intermediate_size=128), tmp_path / name, name)
    settings = (f"model.base={base}", "quant.type=none", "cluster.gpus_per_worker=0", *overrides)
    config = workshop.config(f"in-{name}", *settings)
    planned = [note for note in plan_run(config, None, None).no_exports if "merged as=stored" in note]
    started = [line for line in refusals.told_exports(config) if "merged as=stored" in line]
    assert len(planned) == len(started) == (sentence is not None)
    if sentence is None:
        return
    assert re.search(sentence, planned[0])
    run = open_store(str(tmp_path / "run"))
    commit(run, config)
    with pytest.raises(ConfigError, match=sentence):
        find_format("merged", ["as=stored"]).write(run, open_store(str(tmp_path / "merged")), None, SILENT)


@of_one_family
def test_what_cannot_be_found_out_is_a_line_of_the_log_and_ends_no_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(*_given: Any) -> Any:
        raise StorageError("s3://bases does\nnot answer")

    monkeypatch.setattr(refusals, "_base_at_hand", out_of_reach)
    (line,) = refusals.told_exports(workshop.config("run", "run.seed=5"))
    assert "(StorageError: s3://bases does not answer)" in line


def test_a_layout_that_no_merge_can_change_is_known_before(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = workshop.config("run", "run.seed=4")
    name = "model.layers.0.self_attn.q_proj.weight"

    def otherwise(base: Any, layers: int | None = None) -> FoundWeights:
        found = find_all_weights(base, layers)
        return FoundWeights({**found.sources, name: object()}, found.copies, found.left_out)  # type: ignore[dict-item]

    monkeypatch.setattr(foreseen, "find_all_weights", otherwise)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no answer to the same question counts
    refused = refused_exports(config)
    assert "peft" not in refused
    for form in ("merged", "gguf"):
        assert f"stores {name} in another layout than the model has it in. Take --format peft" in refused[form]


@of_one_family
def test_the_weights_of_a_base_are_found_once_for_all_formats(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = list[str]()

    def counted(base: Any, layers: int | None = None) -> FoundWeights:
        found.append(base.name)
        return find_all_weights(base, layers)

    monkeypatch.setattr(foreseen, "find_all_weights", counted)
    monkeypatch.setattr(recoded, "find_all_weights", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no answer to the same question counts
    refused = refused_exports(workshop.config("run", "run.seed=6"))
    assert "merged" not in refused
    assert len(found) == 1


@of_one_family
def test_files_are_asked_once_for_a_base_and_again_only_for_other_names(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no answer to the same question counts
    asked, ask = list[set[str]](), refusals.refusals_of

    def observed(settings: str, formats: dict[str, list[str]]) -> dict[str, str]:
        asked.append(set(formats))
        return ask(settings, formats)

    monkeypatch.setattr(refusals, "refusals_of", observed)
    found = refused_exports(workshop.config("run"))
    assert len(asked) == 1
    alike = ("tuning.rank=4", "tuning.dropout=0.1", "objective.neftune_alpha=5", "optim.lr=0.1", "train.steps=9")
    assert all(refused_exports(workshop.config("run", one)) == found for one in alike)
    assert refused_exports(workshop.config("run", "model.layers=1")).keys() > found.keys()
    assert len(asked) == 1, "the first layers have no name that the whole base has not"
    assert refused_exports(workshop.config("run", "tuning={method: bottleneck}"))
    assert asked[1:] == [{"peft"}], "what the settings refuse, no file is asked"
    refused_exports(workshop.config("run", "tuning.targets=[q_proj]"))
    assert len(asked) == 3


@of_one_family
def test_an_answer_is_kept_for_what_decides_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, versions = list[str](), {"gguf": "1"}

    def kept(question: Any, facts: Any, _read: Any) -> dict[str, str]:
        asked.append(json.dumps(facts))
        return {}

    monkeypatch.setattr(refusals, "kept_answer", kept)
    monkeypatch.setattr(refusals, "_version", versions.get)

    def facts(*overrides: str, fingerprint: str = "f", formats: Any = None, labels: Any = None) -> str:
        base: Any = SimpleNamespace(fingerprint=fingerprint)
        config = workshop.config("run", *overrides)
        config = config.model_copy(update={"data": config.data.model_copy(update={"labels": labels})})
        refusals._kept_refusals(config, base, formats or {"merged": ()})
        return asked[-1]

    usual = facts()
    assert facts("tuning.rank=4", "optim.lr=0.1", "run.seed=9") == usual
    others = [
        facts(fingerprint="g"),
        facts(formats={"merged": ("as=stored",)}),
        facts("tuning.targets=[q_proj]"),
        facts("objective.name=dpo"),
        facts(labels=["a", "b"]),
        facts(labels=["a", "b", "c"]),
        facts("quant.block_size=128"),
    ]
    versions["gguf"] = "2"
    assert len({usual, *others, facts()}) == 9


@of_one_family
def test_a_run_that_asks_for_adapters_that_it_cannot_have_does_not_begin(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*given: Any) -> None:
        raise ConfigError("--format peft: PEFT would load a part of it. Take --format merged.")

    monkeypatch.setattr(adapter, "as_peft_reads", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = workshop.config("asks", "cluster.gpus_per_worker=0")
    check(config, resume=False)
    asks = workshop.config("asks", "checkpoint.adapters=true", "cluster.gpus_per_worker=0")
    sentence = "checkpoint.adapters: this run has no adapter to write beside a commit. --format peft: PEFT would load"
    with pytest.raises(ConfigError, match=sentence):
        check(asks, resume=False)
    assert any(sentence in shortfall for shortfall in plan_run(asks, None, None).plan.shortfalls)


@of_one_family
def test_a_base_without_its_weights_is_asked_by_its_configuration_alone(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copy(workshop.folder / "base/config.json", tmp_path)
    alone = workshop.config("run", "tuning={method: bottleneck}", f"model.base={tmp_path}")
    usual = refused_exports(workshop.config("run", "tuning={method: bottleneck}"))
    assert refused_exports(alone) == {name: said for name, said in usual.items() if name != "peft"}
    assert refusals._base_at_hand(alone.model) is None
    assert refusals._base_at_hand(alone.model.model_copy(update={"base": "some/body"})) is None


@pytest.mark.parametrize(("form", "last"), [("peft", PEFT_SETTINGS), ("merged", "config.json")])
def test_of_two_exports_that_write_at_once_the_second_is_refused_at_its_last_file(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, last: str
) -> None:
    run, out = open_store(str(tmp_path / "run")), open_store(str(tmp_path / "out"))
    commit(run, workshop.config("run"))

    def card(*_: object) -> bytes:
        out.put(last, b"of another run")
        return b"a card"

    for module in (adapter, merged):
        monkeypatch.setattr(module, "model_card", card)
    with pytest.raises(AlreadyExists):
        find_format(form).write(run, out, None, SILENT)
    assert out.get(last) == b"of another run"


def test_an_adapter_of_zeros_is_made_of_rank_2_up_to_so_many_elements(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workshop.config("run", "tuning.rank=64")
    run = foreseen.Foreseen(config, resolve_base(config.model))
    made = run.sample_adapter()
    assert made is not None
    weights = load(made[PEFT_WEIGHTS])
    assert {min(weight.shape) for weight in weights.values()} == {2}
    assert not any(weight.any() for weight in weights.values())
    most = sum(weight.numel() for weight in weights.values())
    for beyond in (0, 1):
        monkeypatch.setattr(foreseen, "_MOST", most - beyond)
        assert (run.sample_adapter() is None) is bool(beyond)


@pytest.mark.parametrize(
    ("setting", "asked", "sentence"),
    [
        ("checkpoint.adapters=true", {"peft": ()}, "checkpoint.adapters: this run has no adapter .* Not this. Set"),
        ("tuning.through=stored", {"merged": ("as=stored",)}, "tuning.through: stored .* Not this. Remove"),
        ("checkpoint.adapters=false", None, None),
    ],
)
def test_a_run_that_asks_for_an_export_that_it_cannot_have_is_refused(
    setting: str, asked: dict[str, Any] | None, sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, said = list[Any](), dict[str, str]()

    def refused(config: Any, formats: Any) -> dict[str, str]:
        every.append(formats)
        return {name: said[name] for name in formats if name in said}

    monkeypatch.setattr(refusals, "refused_exports", refused)
    config = Workshop(tmp_path).config("a", setting)
    refusals.check_asked_exports(config)
    assert every == ([asked] if asked else [])
    said |= dict.fromkeys(("peft", "merged"), "Not this.")
    with pytest.raises(ConfigError, match=sentence) if sentence else nullcontext():
        refusals.check_asked_exports(config)


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert refusals._version("pytest") == pytest.__version__
    assert refusals._version("no-such-package-at-all") is None


def test_only_what_the_asked_merge_holds_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base for its codes, by the settings and by the files."""
    done = list[str]()
    for name in ("check_mergeable_run", "check_recodable", "check_written_as_stored"):
        monkeypatch.setattr(merged_format, name, lambda *given, name=name: done.append(name))
    run: Any = SimpleNamespace(
        check_layout=lambda: done.append("layout"),
        check_code=lambda code: done.append("code"),
        check_codes=lambda changes: done.append("codes"),
    )
    nothing: Any = None
    expected = {
        "": ["check_mergeable_run", "layout"],
        "as=int4": ["check_mergeable_run", "check_recodable", "layout", "code"],
        "as=stored": ["check_written_as_stored", "check_mergeable_run", "codes"],
    }
    for option, checks in expected.items():
        done.clear()
        form = find_format("merged", [option] if option else [])
        form.check(nothing, nothing)
        form.check_files(run)
        assert done == checks, option


def test_a_run_without_an_adapter_to_look_at_is_not_refused_one_in_gguf() -> None:
    run: Any = SimpleNamespace(sample_adapter=lambda: None)
    find_format("gguf-adapter").check_files(run)
