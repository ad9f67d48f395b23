"""The proofs of exports, each in a process of its own, and what tests of several methods ask of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.dist import linear_adapters
from tests.dist.launch import launch
from trainer.config import Config, dump_config
from trainer.errors import ConfigError
from trainer.export.figures import Proof
from trainer.export.proof import models, verify
from trainer.export.proof.verify import prove_adapter, prove_merged, prove_recoded
from trainer.export.write import adapter as adapters
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.store.store import Store, open_store


def together(_device: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """In the place of `aside`: starting a process for each side would take longer than all that these tests do.
    tests/cli has them apart.
    """
    return work(*arguments)


def in_this_process() -> None:
    torch.set_num_threads(1)
    models.aside = together


def export_proof(run_uri: str, step: int, adapter: str) -> dict[str, float]:
    """The measurements of `capstan export --verify`."""
    in_this_process()
    return asdict(prove_adapter(open_store(run_uri), step, open_store(adapter)))


def proof_of(run: Store, adapter: Path, step: int = 4) -> Proof:
    """The proof of an adapter, by a process of its own."""
    (proof,) = launch(1, export_proof, run.uri, step, str(adapter))
    return Proof(**proof)


def export_and_prove(run: Store, adapter: Path) -> None:
    """Export step 4, and assert that its proof holds by far."""
    export_adapter(run, open_store(str(adapter)))
    proof = proof_of(run, adapter)
    assert proof.holds
    assert proof.computed_in == "fp32"
    assert proof.kl_allowed < 1e-4 * proof.kl_effect


def one_start(
    config_in: Callable[[str], Config], worlds: Sequence[tuple[int, int]], folder: Path, starts_as_base: bool = True
) -> dict[str, Tensor]:
    """The parameters that learn as they start, asserted to be the same in every world: so many ranks, so many of them a
    node.

    `config_in` makes the configuration of a scope. Where a world has several nodes, it is theirs.
    """
    starts: list[dict[str, Tensor]] = []
    for ranks, per_node in worlds:
        config = config_in(f"sharding.scope={'node' if per_node < ranks else 'world'}")
        file = folder / f"{ranks}.safetensors"
        found = launch(ranks, linear_adapters.start, dump_config(config), str(file), ranks_per_node=per_node)
        facts = {"whole": 0, "starts_as_base": starts_as_base, "is_base_switched_off": True, "learns": True}
        assert found == [facts] * ranks
        starts.append(load_file(file))
    for start in starts:
        assert start.keys() == starts[0].keys()
        assert all(torch.equal(values, starts[0][name]) for name, values in start.items())
    return starts[0]


def exports_and_proofs(run_uris: list[str]) -> list[list[dict[str, float]]]:
    """Step 4 of each run, exported into its folder as an adapter and merged, and the proofs of both."""
    return [
        [
            look(uri, 4, f"{uri}/{folder}")
            for look, folder in ((_adapter_and_proof, "adapter"), (_merge_and_proof, "merged"))
        ]
        for uri in run_uris
    ]


def _adapter_and_proof(run_uri: str, step: int, adapter: str) -> dict[str, float]:
    export_adapter(open_store(run_uri), open_store(adapter), step)
    return export_proof(run_uri, step, adapter)


def _merge_and_proof(run_uri: str, step: int, merged: str) -> dict[str, float]:
    export_merged(open_store(run_uri), open_store(merged), step)
    return merge_proof(run_uri, step, merged)


def proofs_by_old_names(run_uris: list[str]) -> list[float | str]:
    """For each run the proof of an adapter by the names in the language model alone: its effect, where it does not
    hold, or the refusal.
    """
    adapters.for_whole_class = lambda files, model: files
    adapters.as_peft_reads = lambda files, *_: files
    return [_proof_by_old_names(uri) for uri in run_uris]


def _proof_by_old_names(uri: str) -> float | str:
    try:
        found: dict[str, Any] = _adapter_and_proof(uri, 4, f"{uri}/old-names")
    except ConfigError as refused:
        return str(refused)
    proof = Proof(**found)
    assert not proof.holds
    return proof.kl_effect


def proof_in_bf16(run_uri: str, step: int, adapter: str) -> dict[str, Any]:
    """The same where fp32 does not fit; and the largest logit of the trained model, and the largest difference of
    one.
    """
    compared: list[Tensor] = []
    distance = verify.distance

    def observed(one: Any, other: Any, rows: Any) -> Any:
        compared[:] = torch.cat(list(one)), torch.cat(list(other))
        return distance(one, other, rows)

    verify.distance, models._fits_in_fp32 = observed, lambda *_: False
    proof = export_proof(run_uri, step, adapter)
    trained, exported = compared  # the last of the comparisons
    return {
        "proof": proof,
        "largest_logit": float(trained.abs().max()),
        "largest_difference": float((trained - exported).abs().max()),
    }


def merge_proof(run_uri: str, step: int, merged: str) -> dict[str, float]:
    """The measurements of `capstan export --format merged --verify`."""
    in_this_process()
    return asdict(prove_merged(open_store(run_uri), step, open_store(merged)))


def recoded_proofs(run_uri: str, step: int, folders: list[str]) -> list[dict[str, float]]:
    """The measurements of `capstan export --format nf4 | fp8 --verify`."""
    in_this_process()
    return [asdict(prove_recoded(open_store(run_uri), step, open_store(folder))) for folder in folders]
