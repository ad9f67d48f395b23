"""Methods are found by name, say what they are, and refuse settings that they do not read."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.material import KINDS, SIZES
from trainer import tuning
from trainer.base.families import read_architecture
from trainer.config import Tuning
from trainer.errors import ConfigError
from trainer.tuning.method import find_method, methods

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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr
