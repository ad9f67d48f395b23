"""Rows of new tokens that learn beside an adapter are PEFT's trainable tokens: in gradients, exported and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dist import gradients, linear_adapters, proofs
from tests.dist.launch import launch
from tests.dist.test_gradients import distance
from tests.dist.test_linear_adapters import run_ranks
from tests.families import rows
from tests.material import Workshop, commit, make_base
from trainer.base.find.tokenizer import find_rows
from trainer.config import Config, dump_config
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.store.store import Store, open_store

# Texts of the training rows, of which one stands inside words too; and a token that the tokenizer has.
TOKENS = ["he", "ant", "</s>"]
# Families and sizes: rows for the new tokens are there, or are not; a tied head; an embedding that multiplies.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grown": ("llama", {}),
    "grown-tied": ("llama-tied", {}),
    "padded": ("qwen2", {"vocab_size": 272}),
    "one-row-short": ("llama", {"vocab_size": 260}),
    "scaled": ("gemma3", {}),
    "capped": ("gemma2", {}),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    here = Workshop(tmp_path_factory.mktemp("tokens"))
    policy = here.policy.read_text()
    here.policy.write_text(policy.replace(": 600", ": 0"))  # every parameter in parts
    return here


def adding(workshop: Workshop, name: str, base: str = "grown", *overrides: str, **sizes: Any) -> Config:
    """A run that adds `TOKENS` to one of the bases."""
    kind, more = BASES[base]
    folder = workshop.folder / f"{base}-{len(sizes)}"
    if not folder.exists():
        make_base(folder, kind, **{"intermediate_size": 192, **more, **sizes})
    return workshop.config(name, f"model.base={folder}", f"model.add_tokens={json.dumps(TOKENS)}", *overrides)


@pytest.mark.parametrize(
    ("base", "method", "quant"),
    [
        ("grown", "lora", "nf4"),
        ("grown-tied", "dora", "none"),
        *(
            pytest.param(base, method, "none", marks=pytest.mark.long)
            for base, method in (
                ("padded", "rslora"),
                ("one-row-short", "lora"),
                ("scaled", "lora"),
                ("capped", "lora"),
            )
        ),
    ],
)
def test_gradients_are_those_of_pefts_trainable_tokens(
    workshop: Workshop, tmp_path: Path, base: str, method: str, quant: str
) -> None:
    settings = ("model.dtype=fp32", f"quant.type={quant}", f"tuning.method={method}")
    config = adding(workshop, "gradients", base, *settings)
    arguments = dump_config(config), workshop.prepare(config).train
    expected = tmp_path / "plain.safetensors"
    (plain,) = launch(1, gradients.plain_first_step, *arguments, str(expected))
    theirs = load_file(expected)
    rows = {name: gradient for name, gradient in theirs.items() if "trainable_tokens" in name}
    assert len(rows) == (1 if base in ("grown-tied", "scaled", "capped") else 2)
    assert all(gradient[0].any() for gradient in rows.values())
    turned = {name: gradient.roll(1, 0) for name, gradient in theirs.items()}
    assert distance(turned, theirs) > 0.5
    for ranks in (1, 2, 3) if base.startswith("grown") else (2,):
        file = tmp_path / f"{ranks}.safetensors"
        record = launch(ranks, gradients.first_step, *arguments, str(file))[0]
        assert record["loss"] == pytest.approx(plain["loss"], rel=3e-6)
        assert distance(load_file(file), theirs) < 1e-5, ranks


def rows_of(folder: Path, name: str) -> Tensor:
    """A matrix of a base's files, fp32."""
    return next(t[name].float() for t in map(load_file, folder.glob("*.safetensors")) if name in t)


@pytest.mark.parametrize("base", rows(["grown", "padded", "grown-tied"], ["grown-tied"]))
def test_a_token_starts_as_the_mean_of_its_pieces_and_one_that_was_there_as_itself(
    workshop: Workshop, tmp_path: Path, base: str
) -> None:
    """On any number of ranks, in any scope; switched off the model is as it started, with text of new tokens too."""
    tokenizer = AutoTokenizer.from_pretrained(adding(workshop, "start", base).model.base)
    pieces = [tokenizer(token, add_special_tokens=False).input_ids for token in TOKENS]
    assert [len(ids) for ids in pieces] == [2, 3, 1]
    for ranks, per_node in ((1, 1), (3, 3), (4, 2)):
        scope = "node" if per_node < ranks else "world"
        config = adding(workshop, "start", base, f"sharding.scope={scope}")
        file, first = tmp_path / f"{ranks}.safetensors", 259 - 20
        found = launch(ranks, linear_adapters.start, dump_config(config), str(file), first, ranks_per_node=per_node)
        assert found == [{"whole": 0, "starts_as_base": True, "is_base_switched_off": True, "learns": True}] * ranks
        learning, folder = load_file(file), Path(config.model.base)
        layers = ["model.embed_tokens"] + ([] if base == "grown-tied" else ["lm_head"])
        for layer in layers:
            matrix = rows_of(folder, f"{layer}.weight")
            expected = torch.stack([matrix[ids].mean(0).bfloat16().float() for ids in pieces])
            assert torch.equal(learning[f"{layer}.trainable_tokens_delta"], expected)
        assert sum("trainable_tokens" in name for name in learning) == len(layers)


def test_a_checkpoint_with_other_tokens_is_not_continued(workshop: Workshop) -> None:
    config = adding(workshop, "other")
    commit(workshop.store.sub("other"), config, dataset=workshop.prepare(config).train)
    more = config.model_copy(update={"model": config.model.model_copy(update={"add_tokens": [*TOKENS, "x"]})})
    for other in (more, config.model_copy(update={"model": config.model.model_copy(update={"add_tokens": []})})):
        with pytest.raises(
            AssertionError, match="has base add_tokens: \\['he', 'ant', '</s>'\\], the configuration gives"
        ):
            run_ranks(workshop, other, 1, how="resume")


@pytest.fixture(scope="module", params=rows(["grown", "grown-tied", "padded", "scaled"], ["grown-tied"]))
def run(request: pytest.FixtureRequest, workshop: Workshop) -> tuple[Store, Config]:
    """A run with a committed step, over a base in 4 bits."""
    method = "dora" if request.param == "padded" else "lora"
    config = adding(workshop, f"done-{request.param}", request.param, f"tuning.method={method}")
    run = workshop.store.sub(config.run.name)
    commit(run, config, dataset=workshop.prepare(config).train)
    return run, config


def by_peft(config: Config, adapter: Path) -> Any:
    """As a user loads it: by the lines of docs/methods.md."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def test_peft_reads_the_rows_and_has_the_logits_of_the_trained_model(run: tuple[Store, Config], tmp_path: Path) -> None:
    store, config = run
    folder = tmp_path / "adapter"
    manifest = export_adapter(store, open_store(str(folder)))
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), [row for row, _ in find_rows(config.model)]
    assert tokenizer("the hen</s>", add_special_tokens=False).input_ids.count(ids[0]) == 2
    masters = master_weights(store, manifest)
    model = by_peft(config, folder)
    read = {
        name.removeprefix("base_model.model.").replace(".token_adapter", "").removesuffix(".default"): values
        for name, values in model.named_parameters()
        if "trainable_tokens_delta" in name
    }
    assert read.keys() == {name for name in masters if name.endswith("trainable_tokens_delta")}
    assert all(torch.equal(read[name].float(), masters[name].bfloat16().float()) for name in read)
    tokens = torch.tensor([[3, *ids, 7]])
    merged = model.get_base_model().get_input_embeddings()(tokens)[0, 1:4]
    scale = 8 if "scaled" in config.run.name else 1  # of a width of 64
    torch.testing.assert_close(merged, read["model.embed_tokens.trainable_tokens_delta"] * scale)

    (proof,) = launch(1, proofs.export_proof, store.uri, 4, str(folder))
    assert Proof(**proof).holds
    assert proof["rows"] == "8 rows of the training data"
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "trainable_tokens_delta" in name)
    weights[name] = weights[name].roll(1, 0)
    save_file(weights, file, metadata={"format": "pt"})
    (proof,) = launch(1, proofs.export_proof, store.uri, 4, str(folder))
    assert not Proof(**proof).holds


@pytest.mark.parametrize(
    ("base", "size"),
    rows(
        [("grown", "40KB"), ("grown-tied", "1GB"), ("padded", "40KB"), ("one-row-short", "1GB")],
        [("grown", "40KB"), ("grown-tied", "1GB")],
    ),
)
def test_a_merged_model_has_the_rows_and_is_what_peft_merges(
    workshop: Workshop, tmp_path: Path, base: str, size: str
) -> None:
    config = adding(workshop, f"merged-{base}", base)
    folder, store = tmp_path / "base", workshop.store.sub(config.run.name)
    kind, sizes = BASES[base]
    make_base(folder, kind, shard_size=size, **{"intermediate_size": 192, **sizes})
    config = config.model_copy(update={"model": config.model.model_copy(update={"base": str(folder)})})
    commit(store, config)
    progress: list[tuple[int, int]] = []
    merged = tmp_path / "merged"
    export_merged(store, open_store(str(merged)), report=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (sum(path.stat().st_size for path in merged.glob("*.safetensors")),) * 2
    export_adapter(store, open_store(str(tmp_path / "adapter")))

    plain = by_peft(config, tmp_path / "adapter").merge_and_unload()
    expected = {name: values.bfloat16() for name, values in plain.state_dict().items()}
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    rows = max(row for row, _ in find_rows(config.model)) + 1
    assert model.config.vocab_size == max(rows, BASES[base][1].get("vocab_size", 259))
    assert model.state_dict().keys() == expected.keys()
    for name, values in model.state_dict().items():
        assert torch.equal(values, expected[name]), name
    assert len(AutoTokenizer.from_pretrained(merged)) == rows


def test_a_merge_is_proven_and_a_broken_row_is_caught(run: tuple[Store, Config], tmp_path: Path) -> None:
    store, _ = run
    folder = tmp_path / "merged"
    export_merged(store, open_store(str(folder)))
    (proof,) = launch(1, proofs.merge_proof, store.uri, 4, str(folder))
    assert Proof(**proof).holds
    name = "model.embed_tokens.weight"
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    weights = load_file(file)
    weights[name] = weights[name].roll(1, 0)
    save_file(weights, file, metadata={"format": "pt"})
    (proof,) = launch(1, proofs.merge_proof, store.uri, 4, str(folder))
    assert not Proof(**proof).holds
