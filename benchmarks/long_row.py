"""Rows of 100,000 tokens trained end to end on CPUs, two ranks sharing each: undisturbed, and killed after the first
step and resumed.

    python benchmarks/long_row.py [--tokens 100000] [--documents 1] [--ranks 2] [--kind llama]

So many documents fill a row of a tiny random base of one layer, whose attention is all that such a length costs; linear
attention costs next to none. Prints the losses of both runs, which must be equal to the last bit, the seconds that they
took, and what is planned for a rank's activations and logits.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the ranks that the tests share

from tests.dist import runs
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop
from trainer.base.find.locate import describe_base
from trainer.config import dump_config
from trainer.plan.plan import make_plan
from trainer.run import layout

STEPS, COMMITTED = 3, 1
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "head_dim": 16},
    "qwen3_5": {"layer_types": ["linear_attention"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows of 100,000 tokens, killed and resumed.")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=1, help="in a row")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS, default="llama", help="qwen3_5 is one layer of the gated delta rule")
    asked = parser.parse_args()
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), asked.ranks)
    sizes = {**KINDS[asked.kind], **heads, "num_hidden_layers": 1, "max_position_embeddings": 2**20}
    with tempfile.TemporaryDirectory() as folder:
        workshop, texts = Workshop(Path(folder), asked.kind, **sizes), Path(folder) / "texts.jsonl"
        words = ["the ant and the bee ", "a cat, a dog, an emu ", "fox gnu hen ibis "]
        length = asked.tokens // asked.documents
        text = (words[n % len(words)] * (length // 10) for n in range((STEPS + 1) * asked.documents))
        texts.write_text("".join(json.dumps({"text": one[: length - 2]}) + "\n" for one in text))
        settings = (
            f"data={{train: [{{path: {texts}}}], format: text, sequence_length: {asked.tokens}}}",
            f"train={{steps: {STEPS}, global_batch: 1, activation_checkpointing: none}}",
            f"checkpoint.every_steps={COMMITTED}",
            f"sharding.sequence_parallel={asked.ranks}",
            "model.dtype=fp32",
        )
        for name in ("undisturbed", "killed"):
            config = workshop.config(name, *settings)
            given, run, begun = (
                (dump_config(config), workshop.prepare(config).train),
                workshop.store.sub(name),
                time.monotonic(),
            )
            if name == "killed":
                with running(asked.ranks, runs.run, *given, "hold", timeout=3600) as group:
                    group.wait_until(lambda: run.exists(layout.manifest(COMMITTED)))  # noqa: B023
                    group.kill()
            ends = launch(asked.ranks, runs.run, *given, "resume" if name == "killed" else "start", timeout=3600)
            assert {end["outcome"] for end in ends} == {"finished"}, ends
            print(f"{name}: losses {losses(run)}, {time.monotonic() - begun:.0f} s with starts", flush=True)
        assert losses(workshop.store.sub("undisturbed")) == losses(workshop.store.sub("killed"))
        memory = make_plan(config, describe_base(config.model), asked.ranks, asked.ranks, None).memory_per_gpu
        print(f"planned for activations and logits of a rank: {(memory.activations + memory.logits) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
