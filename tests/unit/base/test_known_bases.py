"""Well-known bases are planned without the Hub, by the sizes that the package has of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError

from launcher.init.initial import InitAnswers, initial_config
from launcher.plan.planning import plan_run
from launcher.start.check import checked
from tests.known_bases import of_sizes
from trainer.base.architecture import Architecture
from trainer.base.describe.description import parse_base_config, quantization_of, stored_format
from trainer.base.describe.meta import architecture_of
from trainer.base.find import locate
from trainer.base.find.locate import FILE, describe_base, known_config
from trainer.config import Config, Model, load_config
from trainer.errors import BaseOutOfReach, ConfigError
from trainer.store import hub

ENTRIES: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text().splitlines()]
QUICK = ("openai/gpt-oss-20b", "google/gemma-3-4b-it")
ROOT = Path(__file__).parents[3]
LLAMA, SMALLER = "meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def example(tmp_path: Path, *overrides: str) -> Config:
    return load_config(ROOT / "examples/405b-2x8.yaml", (f"run.store={tmp_path}", *overrides))


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry["ids"][0], marks=[] if set(QUICK) & set(entry["ids"]) else pytest.mark.long)
        for entry in ENTRIES
    ],
)
def test_the_sizes_of_a_known_base_are_those_that_its_makers_state(entry: dict[str, Any]) -> None:
    name, config = entry["ids"][0], entry["config"]
    assert parse_base_config(name, json.dumps(config).encode()) == of_sizes(config) == config
    assert stored_format(quantization_of(config), name)
    found = Architecture.from_json(architecture_of(config, None, name))
    numel = sum(part.numel for part in found.parameters)
    assert numel / 1e9 == pytest.approx(entry["billions"], rel=0.025)
    # `whole` are all parameters of the files, with the tower.
    assert numel + found.weights_beside == entry.get("whole", numel + found.weights_beside)
    computing = (part for part in found.parameters if part.kind != "embedding" or found.head in found.tied)
    active = sum(part.visits * part.numel for part in computing) / 1e9
    assert active == pytest.approx(entry.get("active", active), rel=0.11)


def test_known_bases_are_many_and_small_and_each_is_named_once() -> None:
    names = [name.lower() for entry in ENTRIES for name in entry["ids"]]
    assert len(names) == len(set(names)) >= 60
    assert FILE.stat().st_size < 300_000
    assert known_config(LLAMA.upper()) == known_config(LLAMA)
    assert known_config("nobody/nothing") is None


def test_a_known_base_is_planned_where_the_hub_is_out_of_reach_and_the_plan_says_so(tmp_path: Path) -> None:
    planned = plan_run(example(tmp_path), "H100", 8)
    assert planned.plan.parameters.frozen == 405_853_388_800
    assert planned.fits
    assert planned.plan.notes[0].startswith(
        f"model.base: {LLAMA} was not seen (HF_HUB_OFFLINE is set, and the cache lacks it); its sizes are those that"
    )
    assert not planned.plan.mismatches
    # Whatever needs the base itself still asks for it.
    with pytest.raises(BaseOutOfReach, match="HF_HUB_OFFLINE is set, and the cache lacks it"):
        describe_base(example(tmp_path).model)
    with pytest.raises(BaseOutOfReach, match="nobody/nothing"):
        plan_run(example(tmp_path, "model.base=nobody/nothing"), "H100", 8)


def test_a_plan_says_where_it_assumes_the_sizes_of_the_part_that_sees(tmp_path: Path) -> None:
    rows = "data.train=[{path: x}]", "data.format=pictures", "model.attention=sdpa"

    def notes(base: str) -> str:
        config = load_config(ROOT / "examples/70b-2x8.yaml", (f"run.store={tmp_path}", f"model.base={base}", *rows))
        return " ".join(plan_run(config, "H100", 8).plan.notes)

    assert "was not seen" in notes("Qwen/Qwen2.5-VL-7B-Instruct")
    assert "its vision encoder" not in notes("Qwen/Qwen2.5-VL-7B-Instruct")
    assert "the sizes of its vision encoder are transformers' defaults" in notes("moonshotai/Kimi-K2.5")


def test_a_first_configuration_for_a_known_base_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    answers = InitAnswers(SMALLER, str(tmp_path / "data.jsonl"), "sft", "slurm", "H100", None)
    made = initial_config(answers, tmp_path / "run.yaml")
    assert "was not seen" in made.missing[0]
    assert made.settings["model.base"] == SMALLER
    assert "data.template" not in made.settings


def test_a_dry_run_checks_a_known_base_by_its_sizes(tmp_path: Path) -> None:
    said = list[str]()
    how: dict[str, Any] = {"resume": False, "take_over": False, "dry_run": True, "log": said.append}
    config = example(tmp_path)
    assert checked(config, **how) == (config, False)
    assert "its sizes are those that Capstan has with it" in said[-1]
    with pytest.raises(ConfigError, match="data.sequence_length: 200000 exceeds the base's 131072 positions"):
        checked(example(tmp_path, "data.sequence_length=200000"), **how)
    with pytest.raises(BaseOutOfReach):
        checked(config, **{**how, "dry_run": False})


def test_a_known_base_whose_licence_is_not_accepted_is_planned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(GatedRepoError):
        def __init__(self) -> None:
            OSError.__init__(self, "401 Client Error")

    def refused(*_: object, **__: object) -> None:
        raise Refused

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    monkeypatch.setattr(locate, "hub_answers", lambda: True)
    found = locate.base_at_hand(Model(base=SMALLER))
    assert "its licence has to be accepted there first, and HF_TOKEN set" in (found.said or "")
    assert found.description.architecture.layers == 32


def test_a_known_base_is_planned_with_the_scaling_of_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(_model: Model) -> Any:
        raise BaseOutOfReach("it was not seen", "the Hub is far")

    monkeypatch.setattr(locate, "base_files", out_of_reach)
    plain = locate.base_at_hand(Model(base=SMALLER)).description.architecture.positions
    assert plain is not None
    scaling: Any = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": plain}
    found = locate.base_at_hand(Model(base=SMALLER, rope_scaling=scaling))
    assert found.description.architecture.positions == 4 * plain
    assert "(the Hub is far)" in (found.said or "")
    with pytest.raises(BaseOutOfReach, match="it was not seen"):
        locate.base_at_hand(Model(base="some/unknown-model"))


@pytest.mark.parametrize(
    ("proxies", "expected"),
    [
        ({}, None),
        ({"http": "http://a:1"}, None),
        ({"https": "http://proxy:3128"}, "proxy:3128"),
        ({"all": "socks5://p:1080"}, "p:1080"),
        ({"https": "proxy:8"}, "proxy:8"),
        ({"https": "http://proxy"}, "proxy:80"),
    ],
)
def test_behind_a_proxy_it_is_that_which_has_to_answer(
    proxies: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub, "proxy_bypass", lambda _: False)
    assert hub.proxy_host() == expected


def test_of_a_config_json_only_that_is_kept_which_says_of_what_sizes_a_base_is() -> None:
    given = {
        "model_type": "gemma3",
        "transformers_version": "4.50",
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 8, "torch_dtype": "bfloat16"},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8},
        "audio_config": {"model_type": "gemma3n_audio", "hidden_size": 8},
    }
    kept = {"model_type": "gemma3_text", "hidden_size": 8}
    assert of_sizes(given) == {
        "model_type": "gemma3",
        "text_config": kept,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8},
        "audio_config": {"model_type": "gemma3n_audio"},
    }
