"""Documents of packed rows learn as they do alone, in every kind of layer, sharded over ranks whose rows hold different documents."""

from tests.dist import documents
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.config import dump_config

# Attention with sinks, chunks and scaled queries, gated delta rules of two kinds, and Mamba, beside mixtures of experts.
KINDS = ["gpt-oss", "llama4", "qwen3-next", "kimi-linear", "nemotron-h", "granitemoe-hybrid"]


def test_packed_rows_have_the_gradients_of_their_documents_alone(workshop: Workshop) -> None:
    config = dump_config(workshop.config("documents", "model.dtype=fp32"))
    found = launch(2, documents.packed_and_alone, config, KINDS, True)[0]
    assert [(kind, distance) for kind, distance in zip(KINDS, found, strict=True) if not distance < 1e-4] == []
    control = launch(2, documents.packed_and_alone, config, ["gpt-oss", "qwen3-next"], False)[0]
    assert min(control) > 1e-1, "the control: documents that see each other have other gradients"
