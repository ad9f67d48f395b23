"""Virtual tokens are PEFT's, though documents are packed and the base is sharded: in gradients, exported."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.dist import gradients, proofs, virtual_tokens
from tests.dist.launch import launch
from tests.dist.proofs import export_and_prove, one_start, proof_of
from tests.dist.test_gradients import distance
from tests.dist.test_linear_adapters import adapting, committed
from tests.families import rows
from tests.material import Workshop, byte_tokenizer, make_pairs
from tests.methods import methods_of
from trainer.config import Config, dump_config
from trainer.errors import ConfigError
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.store.store import Store, open_store
from trainer.tuning.virtual_tokens import BesideBase

METHODS = methods_of(BesideBase)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base whose heads are no share of its width; bitsandbytes' CPU kernels want rows of whole blocks."""
    here = Workshop(tmp_path_factory.mktemp("virtual"), "qwen3", intermediate_size=192, head_dim=32)
    here.policy.write_text(here.policy.read_text().replace(": 600", ": 0"))  # every parameter in parts
    return here


def tuned(workshop: Workshop, method: str, name: str, *overrides: str) -> Config:
    """A run with the `tuning` of the method's own example, but fewer virtual tokens."""
    example = adapting(workshop, method, f"{method}-{name}", *overrides)
    return example.model_copy(update={"tuning": example.tuning.model_copy(update={"virtual_tokens": 5})})


@pytest.mark.parametrize(("quant", "worlds"), rows([("nf4", (2,)), ("nf4", (1, 3)), ("none", (2,))], [("nf4", (2,))]))
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_pefts_on_documents_by_themselves(
    workshop: Workshop, tmp_path: Path, method: str, quant: str, worlds: tuple[int, ...]
) -> None:
    """The control: documents that see each other would be noticed."""
    config = tuned(workshop, method, "gradients", "model.dtype=fp32", f"quant.type={quant}")
    arguments = dump_config(config), workshop.prepare(config).train
    (plain,) = launch(1, virtual_tokens.plain_first_step, *arguments, str(tmp_path / "plain"), False)
    theirs = load_file(tmp_path / "plain")
    assert all(gradient.norm() > 0 for gradient in theirs.values())
    for ranks in worlds:
        file = tmp_path / f"{ranks}.safetensors"
        record = launch(ranks, gradients.first_step, *arguments, str(file))[0]
        assert record["targets"] == plain["targets"]
        assert record["loss"] == pytest.approx(plain["loss"], rel=3e-6)
        assert distance(load_file(file), theirs) < 1e-5, ranks
    (glued,) = launch(1, virtual_tokens.plain_first_step, *arguments, str(tmp_path / "glued"), True)
    assert abs(glued["loss"] / plain["loss"] - 1) > 1e-3
    assert distance(load_file(tmp_path / "glued"), theirs) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_same_at_any_world_size_and_is_that_of_tokens_of_the_vocabulary(
    workshop: Workshop, tmp_path: Path, method: str
) -> None:
    worlds = ((1, 1), (3, 3), (4, 2))
    assert one_start(partial(tuned, workshop, method, "start"), worlds, tmp_path, starts_as_base=False)


@pytest.mark.parametrize(
    ("text", "seen"), [("news", [*b"newsn"]), pytest.param("newspaper", [*b"newsp"], marks=pytest.mark.long)]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_start_from_a_text_is_that_text_before_each_document(
    workshop: Workshop, method: str, text: str, seen: list[int]
) -> None:
    """Repeated or cut to the number of virtual tokens."""
    config = tuned(workshop, method, "text", "model.dtype=fp32")
    config = config.model_copy(update={"tuning": config.tuning.model_copy(update={"init_text": text})})
    ids = byte_tokenizer()(bytes(seen).decode())["input_ids"]
    for found in launch(2, virtual_tokens.text_before, dump_config(config), ids):
        assert found["behind"] < 1e-4
        assert found["alone"] > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_switched_off_a_packed_row_is_the_bases(workshop: Workshop, method: str) -> None:
    """The reference of preferences. The pairs' answers have virtual tokens of their own."""
    pairs = make_pairs(workshop.folder / "pairs.jsonl")
    data = (f"data.train=[{{path: {pairs}}}]", "data.format=preference", "data.sequence_length=96")
    for name, settings in (("off", ()), ("pairs", data)):
        config = tuned(workshop, method, name, "model.dtype=fp32", *settings)
        arguments = dump_config(config), workshop.prepare(config).train
        (expected,) = launch(1, virtual_tokens.plain_nats, *arguments)
        for rank, found in enumerate(launch(2, virtual_tokens.switched_off, *arguments)):
            assert found["off"] == pytest.approx(expected[rank], rel=1e-5)
            assert found["learnt"] == found["again"]
            assert abs(found["learnt"] / found["off"] - 1) > 1e-3


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, workshop: Workshop) -> Store:
    """A run with a committed step of a method, over a base in 4 bits."""
    return committed(workshop, tuned(workshop, request.param, "done"))


def test_peft_has_the_logits_of_the_trained_model_and_a_broken_file_is_caught(run: Store, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    export_and_prove(run, folder)

    file = folder / "adapter_model.safetensors"
    # In another order the tokens of a prefix are the same prefix, as its keys have no positions.
    weights = {name: value.roll(1, 1) for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert not proof_of(run, folder).holds


@pytest.mark.parametrize("method", METHODS)
def test_an_export_of_a_training_in_fp32_is_proven_though_the_base_is_stored_in_bf16(
    workshop: Workshop, tmp_path: Path, method: str
) -> None:
    run = committed(workshop, tuned(workshop, method, "fp32", "model.dtype=fp32"))
    export_adapter(run, open_store(str(tmp_path / "adapter")))
    (proof,) = launch(1, proofs.export_proof, run.uri, 4, str(tmp_path / "adapter"))
    assert Proof(**proof).holds


def test_peft_reads_every_parameter_of_an_export_and_a_merge_is_refused(
    run: Store, workshop: Workshop, tmp_path: Path
) -> None:
    manifest = export_adapter(run, open_store(str(tmp_path / "adapter")))
    base: Any = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.bfloat16)
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    masters = master_weights(run, manifest)
    read = virtual_tokens.our_weights(
        model.prompt_encoder.default.embedding.weight.detach(),
        {name: tuple(value.shape) for name, value in masters.items()},
    )
    assert all(torch.equal(read[name].float(), value.bfloat16().float()) for name, value in masters.items())
    with pytest.raises(
        ConfigError,
        match="there is no merged model: virtual tokens stand before a document's own, .* Take --format peft",
    ):
        export_merged(run, open_store(str(tmp_path / "merged")))
