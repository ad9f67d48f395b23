"""An adapter of a model that sees fits the class that people load, by the lines of its own card."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from torch import Tensor

from tests.composites import COMPOSITES, make_composite
from tests.material import Workshop, commit
from trainer.base.describe.language_model import composite_class
from trainer.base.find.locate import describe_base, resolve_base
from trainer.config import Model, Tuning, parse_config
from trainer.export.card import PLACE, model_usage, peft_usage
from trainer.export.write.adapter import export_adapter, for_whole_class
from trainer.plan.beginning import PeftAdapter
from trainer.store.store import open_store
from trainer.tuning.linear_adapters import PEFT_WEIGHTS, PREFIX
from trainer.tuning.method import find_method

TOKENS = torch.arange(5, 40)[None]


def exported(base: Path, folder: Path) -> Mapping[str, bytes]:
    """The files of a LoRA adapter with random matrices on every linear layer, by the names in the language model
    alone.
    """
    model = Model(base=str(base))
    method = find_method(Tuning(method="lora", rank=4, alpha=64))
    torch.manual_seed(0)
    shapes = method.shapes(describe_base(model).architecture)
    files = method.export({name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}, model).files
    base.joinpath("tokenizer.json").rename(folder / "tokenizer.json")
    return files


def check_that_a_run_begins_from(folder: Path, given: Mapping[str, bytes], model: Model) -> None:
    """The weights of the folder are read as those of the language model's own layers."""
    settings = {"rank": 4, "alpha": 64, "start": str(folder)}
    data, train = {"train": [{"path": "data.jsonl"}]}, {"steps": 1, "global_batch": 1}
    tree = {"run": {"name": "next"}, "model": {"base": model.base}, "tuning": settings, "data": data, "train": train}
    config = parse_config(json.dumps(tree))
    method, base = find_method(config.tuning), resolve_base(model)
    beginning = PeftAdapter(str(folder), open_store(str(folder)), method, model)
    assert beginning.differences(config, method, base) == []
    shapes = method.shapes(base.architecture)
    weights = {name.removeprefix(PREFIX): weight for name, weight in load(given[PEFT_WEIGHTS]).items()}
    found = beginning.read({name: (0, math.prod(shape)) for name, shape in shapes.items()})
    values = {part.name.replace(".default.", "."): torch.frombuffer(part.data, dtype=torch.float32) for part in found}
    assert values.keys() == weights.keys()
    assert all(torch.equal(value, weights[name].flatten()) for name, value in values.items())
    # One that has learnt on a tower too, as PEFT's own targets do.
    end = next(iter(weights)).partition(".lora_")[0].rpartition(".")[2]
    tower = {f"{PREFIX}model.tower.0.{end}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    (folder / PEFT_WEIGHTS).write_bytes(save({**load((folder / PEFT_WEIGHTS).read_bytes()), **tower}))
    (refused,) = PeftAdapter(str(folder), open_store(str(folder)), method, model).differences(config, method, base)
    assert f"has weights of model.tower.0.{end}, which this run does not train" in refused


def loaded(usage: str, folder: Path, files: Mapping[str, bytes]) -> Any:
    """What the lines of the card make of the files."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    made: dict[str, Any] = {}
    lines = usage.replace(f'"{PLACE}"', repr(str(folder))).replace(
        'dtype="auto"', 'dtype="auto", experts_implementation="eager"'
    )
    exec(lines, made)
    return made["model"].eval()


def effect(model: PeftModel) -> float:
    """How far the adapter moves the largest logit."""
    with torch.no_grad():
        adapted: Tensor = model(input_ids=TOKENS, use_cache=False).logits
        with model.disable_adapter():
            return (adapted - model(input_ids=TOKENS, use_cache=False).logits).abs().max().item()


# Of the first, PEFT's class for language models loads the whole one; of the second it loads nothing. The third has
# experts, which PEFT names by parameters. Of llama4 the whole class of transformers 5.24 computes nothing of text
# alone: its output asks for that of pictures.
QUICK = ("gemma3", "mistral3", "kimi_k25")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.long) for kind in COMPOSITES if kind != "llama4"],
)
def test_the_lines_of_the_card_load_an_adapter_that_does_what_was_trained(kind: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    folder.mkdir()
    make_composite(base, kind)
    files = exported(base, folder)
    whole = for_whole_class(files, Model(base=str(base)))
    usage = peft_usage(composite_class(base))
    model = loaded(usage, folder, whole)
    assert effect(model) > 0.1
    adapted = [path for path, _ in model.named_modules() if path.endswith(".lora_A")]
    assert adapted
    assert all("language_model" in path for path in adapted)  # and no tower
    check_that_a_run_begins_from(folder, files, Model(base=str(base)))
    # The control: by the names in the language model alone, nothing is adapted.
    old = list[float]()
    with suppress(ValueError):  # PEFT finds no such layer
        old.append(effect(loaded(usage, folder, files)))
    assert old in ([], [0.0])
    assert kind != "gemma3" or old == [0.0]


def test_a_language_model_alone_has_its_own_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert composite_class(tmp_path) is None
    files = {"adapter_config.json": b"{}"}
    assert for_whole_class(files, Model(base=str(tmp_path))) is files
    assert "AutoPeftModelForCausalLM" in peft_usage(None)


def test_the_lines_of_the_card_have_a_base_that_takes_no_pictures_hear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    from tests.hearing import hearing_base, noise, samples_of, wave_file

    heard = samples_of(wave_file(noise(0.4, 1)))
    monkeypatch.setattr("transformers.audio_utils.load_audio", lambda path, rate: heard)
    usage = model_usage("Qwen2AudioForConditionalGeneration", sees="image")  # as a run's whose data is gone
    exec(usage.replace(PLACE, str(hearing_base(tmp_path / "base"))), {})
    said = capsys.readouterr().out
    assert said.startswith("<s>user: <begin><audio><audio>")
    assert "<end>What can be heard?</s>" in said


@pytest.mark.parametrize(
    ("noun", "asked"), [("video", "What happens in the video?"), ("picture", "What is in the pic")]
)
def test_the_lines_of_the_card_ask_about_what_the_run_was_trained_with(
    noun: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    pytest.importorskip("torchvision")
    from tests.seeing import make_pictured, make_watched, picture, seeing_base, trained_over, video

    make = make_watched if noun == "video" else make_pictured
    base, rows = seeing_base(tmp_path / "sees", "qwen3_vl"), make(tmp_path / "rows", 3)
    here, of_rows = Workshop(tmp_path), ("data.format=pictures", "data.sequence_length=256")
    config = here.config("run", *trained_over(base, rows), *of_rows)
    commit(run := here.store.sub("run"), config, dataset=here.prepare(config).train)
    export_adapter(run, open_store(str(tmp_path / "adapter")))
    card = (tmp_path / "adapter/README.md").read_text()
    assert f"pipeline_tag: {'video' if noun == 'video' else 'image'}-text-to-text" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("video.mp4").write_bytes(video(8, 32, 32, 1))
    picture(32, 32, 1).save("picture.jpg")
    exec(code.replace(PLACE, str(tmp_path / "adapter")), {})
    said = capsys.readouterr().out
    assert asked in said
    assert said.count("<video>" if noun == "video" else "<image>") > 1
