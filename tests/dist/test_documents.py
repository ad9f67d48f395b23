"""Documents of packed rows learn as they do alone, in every kind of layer, sharded over ranks whose rows hold different
documents.
"""

from pathlib import Path

from safetensors.torch import load_file

from tests.dist import documents, gradients
from tests.dist.launch import launch
from tests.dist.test_gradients import distance
from tests.material import Workshop
from trainer.config import dump_config

# Attention with sinks, attention with chunks and scaled queries, a gated delta rule, and Mamba, beside mixtures of
# experts.
KINDS = ["gpt-oss", "llama4", "qwen3-next", "nemotron-h"]


def test_packed_rows_have_the_gradients_of_their_documents_alone(workshop: Workshop) -> None:
    config = dump_config(workshop.config("documents", "model.dtype=fp32"))
    found = launch(2, documents.packed_and_alone, config, KINDS, True)[0]
    assert [(kind, distance) for kind, distance in zip(KINDS, found, strict=True) if not distance < 1e-4] == []


def test_the_control_documents_that_see_each_other_have_other_gradients(workshop: Workshop) -> None:
    config = dump_config(workshop.config("control", "model.dtype=fp32"))
    assert min(launch(1, documents.packed_and_alone, config, ["gpt-oss", "qwen3-next"], False)[0]) > 1e-1


def test_adapters_of_linear_attention_learn_from_packed_rows_as_from_documents_by_themselves(tmp_path: Path) -> None:
    here, file = Workshop(tmp_path, "qwen3_5"), str(tmp_path / "gradients.safetensors")
    config = here.config("linear-attention", "model.dtype=fp32", "quant.type=none")
    arguments = dump_config(config), here.prepare(config).train
    record = launch(2, gradients.first_step, *arguments, file)[0]
    plain = launch(1, gradients.plain_first_step, *arguments, f"{file}-plain")[0]
    assert abs(record["loss"] - plain["loss"]) < 1e-5
    assert distance(load_file(file), load_file(f"{file}-plain")) < 1e-5
