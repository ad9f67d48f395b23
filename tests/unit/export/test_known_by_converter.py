"""Asking llama.cpp's converter whether it knows a base runs no code of the base."""

import json
from pathlib import Path

import pytest

from tests.material import Workshop
from trainer.errors import CapstanError, ConfigError

pytest.importorskip("conversion")


def test_code_that_a_base_names_is_never_run(tmp_path: Path) -> None:
    """The converter itself asks whether it may, and for this architecture it does not even ask."""
    from trainer.export.gguf.converter import check_known, convert

    base, told, code = Workshop(tmp_path / "w").base, tmp_path / "told", tmp_path / "code"
    code.mkdir()
    (code / "own.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(told)!r}).write_text('run')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    own = {"auto_map": {"AutoTokenizer": [None, f"{code}--own.Own"]}, "tokenizer_class": "Own"}
    for name, more in (("tokenizer_config.json", own), ("config.json", {"architectures": ["LLaDAModelLM"]})):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(settings | more))
    with pytest.raises(ConfigError):  # for another reason: it knows no tokenizer of a test
        check_known(base, tokenizer=True)
    assert not told.exists()
    with pytest.raises(CapstanError):
        convert(base, "f16", tmp_path / "made.gguf", "made")
    assert not told.exists()
