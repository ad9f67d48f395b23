"""A base that stays as its files have it, beside the same base in 16 bits."""

from pathlib import Path
from typing import Any

from tests.dist.assembled import assemble_run
from tests.dist.loading import probe
from trainer.config import override, parse_config
from trainer.model.held.layers import HeldWeights


def kept_and_decoded(config_text: str, bases: list[str]) -> list[dict[str, Any]]:
    """Both in bf16: the largest difference of their logits and the largest logit, the modules that are kept, and the
    bytes that this rank holds and has read of the first."""
    found = []
    for base in bases:
        runs = []
        for where, quant in ((base, "stored"), (str(Path(base, "decoded")), "none")):
            given = override(
                parse_config(config_text), f"model.base={where}", f"quant.type={quant}", "model.dtype=bf16"
            )
            here = assemble_run(given)
            modules = sum(isinstance(module, HeldWeights) for module in here.engine.model.modules())
            runs.append((here.engine.logits(probe()), modules, here.report))
        (logits, modules, report), (expected, none, _) = runs
        assert none == 0
        found.append(
            {
                "difference": (logits - expected).abs().max().item(),
                "largest": expected.abs().max().item(),
                "modules": modules,
                "kept_bytes": report.kept_bytes,
                "read_bytes": report.read_bytes,
            }
        )
    return found
