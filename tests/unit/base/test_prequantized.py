"""A base that bitsandbytes quantized is loaded as it is, or refused with what does not fit."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.material import Workshop, quantize_base
from trainer.base.find.check import check_base
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import empty_model
from trainer.base.rows.parameters import find_weights
from trainer.errors import ConfigError
from trainer.model.attention import Attention
from trainer.store.safetensors_index import PackedTensor

DOUBLE = "quant.double=true"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("prequantized"))


@pytest.fixture(scope="module")
def quantized(workshop: Workshop) -> Path:
    return quantize_base(
        workshop.base, workshop.folder / "4bit", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def check(workshop: Workshop, base: Path, *overrides: str) -> int:
    """-> the number of packed matrices of the model."""
    config = workshop.config("check", f"model.base={base}", *overrides)
    found = resolve_base(config.model)
    check_base(found, config)
    weights = find_weights(found, empty_model(found, config, Attention("sdpa", "")), config.model.layers)
    return sum(isinstance(source, PackedTensor) for source in weights.sources.values())


def refusal(workshop: Workshop, base: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(workshop, base, *overrides)
    return str(error.value)


def test_every_matrix_is_found_packed(workshop: Workshop, quantized: Path) -> None:
    assert check(workshop, quantized, DOUBLE) == 2 * 7
    assert check(workshop, quantized, DOUBLE, "model.layers=1") == 7


def test_settings_that_do_not_fit_are_refused_with_those_that_do(workshop: Workshop, quantized: Path) -> None:
    expected = "quant: the base is quantized already, and loaded as it is. Set quant.type: nf4 and quant.double: true."
    assert refusal(workshop, quantized) == expected
    assert refusal(workshop, quantized, DOUBLE, "quant.type=fp4") == expected
    assert re.match(
        r"quant\.block_size: 128, but model\.\S+\.weight is stored with 64 in .* Set quant\.block_size: 64\.$",
        refusal(workshop, quantized, DOUBLE, "quant.block_size=128"),
    )
    assert "_proj.weight was bfloat16 before it was quantized" in refusal(
        workshop, quantized, DOUBLE, "model.dtype=fp32"
    )
    config = workshop.config("check", f"model.base={quantized}", DOUBLE, "quant.cache=true")
    (mistake,) = resolve_base(config.model).description.mismatches(config)
    assert mistake.startswith("quant.cache: true has no effect")


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (".quant_state.bitsandbytes__nf4", f"its {Q_PROJ} is not in 4 bits, as all linear layers must be"),
        (".absmax", f"{Q_PROJ}.absmax has 0 bytes in .*, 64 by its quant_state. Copy the model again."),
        (".nested_quant_map", f"the scales of {Q_PROJ} in .* are not stored as bitsandbytes stores them today"),
    ],
)
def test_a_part_that_is_missing_is_named(
    workshop: Workshop, quantized: Path, tmp_path: Path, tensor: str, expected: str
) -> None:
    base = Path(shutil.copytree(quantized, tmp_path / "base"))
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(Q_PROJ + tensor, None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=expected):
        check(workshop, base, DOUBLE)
