"""The merged model for llama.cpp, ollama and LM Studio: one GGUF file for each type of weights.

llama.cpp's converter reads the merged model from a disk, so the merged model is written first and removed at the end.
Matrices are in the type asked for, vectors in fp32; q8_0 and q4_0 have a scale for each 32 weights. In q4_0 codes of
the base follow what was learnt (trainer/export/gguf/q4_0.py). llama.cpp's own llama-quantize makes other small types
from the f16 file.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator
from rich.filesize import decimal

from trainer.base.base import Description
from trainer.base.find.locate import describe_base
from trainer.config import Config
from trainer.config.paths import local_path
from trainer.config.section import Section, setting
from trainer.errors import ConfigError
from trainer.export.card import CardContent, model_card
from trainer.export.destination import CARD, TRAINED, ExportProgress, Written, check_destination
from trainer.export.figures import KeptProof, Proof, Rounding
from trainer.export.gguf.converter import (
    PART,
    check_converter,
    check_known,
    check_room,
    convert,
    deliver,
    has_converter,
)
from trainer.export.trained import check_mergeable_run, refuse_towers, resolve_trained_base, trained_checkpoint
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store

if TYPE_CHECKING:
    from trainer.export.write.foreseen import Foreseen

_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes of a weight
_IN_CODES = "q4_0"
_USUAL: Rounding = "nearest"  # as merges into other codes of a base in 16 bits


class Gguf(Section):
    what: ClassVar[str] = "base and adapter, merged, in GGUF"
    what_if_tuned: ClassVar[str] = "the whole model in GGUF"
    whole_model: ClassVar[bool] = True

    types: list[Literal["f32", "f16", "bf16", "q8_0", "q4_0"]] = setting(
        ["f16"], about="Types of the weights, a file each.", example=["f16", "q8_0"], min_length=1
    )
    rounding: Literal["dither", "nearest"] | None = setting(
        None,
        about=f"How the codes of q4_0 follow the adapter: to the `nearest` ones, or by a `dither`. Default: {_USUAL}.",
        example="nearest",
    )
    scratch: str | None = setting(
        None, about="Folder for the merged model while it is converted. Default: the temporary one.", example="/scratch"
    )

    @model_validator(mode="after")
    def _codes_alone_are_rounded(self) -> "Gguf":
        if self.rounding and _IN_CODES not in self.types:
            raise ValueError(
                f"rounding: {self.rounding} says how the codes of q4_0 are rounded, which types does not name."
            )
        return self

    @property
    def _rounding(self) -> Rounding:
        return self.rounding or _USUAL

    def check(self, config: Config, base: Description) -> None:
        check_mergeable_run(config, base)
        refuse_towers(config, "gguf", "merged")
        if config.model.rope_scaling.rope_type == "longrope":
            raise ConfigError(
                "--format gguf: llama.cpp's converter writes the factors of rope_type: longrope for Phi-3 alone, so the"
                " file would have other positions. Take --format merged."
            )

    def check_files(self, run: "Foreseen") -> None:
        run.check_layout()
        if has_converter():
            check_known(run.base.directory, tokenizer=True)

    def check_here(self) -> None:
        check_converter()

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        """Write the export as `ExportFormat` says.

        llama.cpp's converter reads only folders, so the merged model is first written to a folder.
        """
        from trainer.export.write.decoded import as_plain
        from trainer.export.write.foreseen import Foreseen
        from trainer.export.write.merged import write_model

        manifest, config, _ = trained_checkpoint(folder, step)
        self.check_here()
        self.check(config, describe_base(config.model))
        names = {kind: f"{config.run.name}-{kind}.gguf" for kind in dict.fromkeys(self.types)}
        *others, _ = names.values()
        check_destination(destination, *others, *(f"{name}{PART}" for name in names.values()))
        temporary = local_path(self.scratch or tempfile.gettempdir(), "scratch")
        if not temporary.is_dir():
            raise ConfigError(f"scratch: {temporary} is no folder. Make it, or name another.")
        base = as_plain(resolve_trained_base(folder, config.model, manifest))
        self.check_files(Foreseen(config, base))  # before the merged model, which may be large, is written
        directory = destination.local_folder
        merged = sum(size for _, size, _ in base.versions)
        # The codes of q4_0 are made of two such models, and of what the converter makes of them.
        whole = merged * max(4 if kind == _IN_CODES else 1 for kind in names)
        weights = base.architecture.weights("linear", "experts", "embedding", "head", "small")
        results = sum(int(_BYTES[kind] * weights) for kind in names)
        check_room([(temporary, whole), (directory or temporary, results)])
        progress.say(
            f"The merged model takes {decimal(whole)} in {temporary} until it is converted; the result takes"
            f" {decimal(results)}."
        )
        what = f"The model of the run {config.run.name}, {TRAINED}, in GGUF ({', '.join(names)}) for llama.cpp."
        content = CardContent("gguf", what, "quantized", f"llama-server -m {names[self.types[0]]}", "sh")
        destination.put(CARD, model_card(folder, config, manifest, content))
        with scratch_folder("gguf", str(temporary)) as scratch:
            model = Path(scratch, "model")
            if {*names} != {_IN_CODES}:
                write_model(folder, manifest, config, open_store(str(model)), progress.written)
            written = Written(manifest, {"files": list(names.values())})
            for kind, name in sorted(names.items(), key=lambda item: item[0] == _IN_CODES):
                progress.say(f"Converting to {name}.")
                file = (directory or Path(scratch)) / f"{name}{PART}"
                if kind == _IN_CODES:
                    from trainer.export.gguf.q4_0 import export_q4_0

                    shutil.rmtree(model, ignore_errors=True)
                    moved = export_q4_0(folder, manifest, config, base, Path(scratch), file, self._rounding)
                    facts = written.facts | moved.facts(self._rounding)
                    written = replace(written, facts=facts, remarks=(moved.sentence(),))
                else:
                    convert(model, kind, file, config.run.name)
                deliver(file, destination, name)
        return written

    def prove(self, folder: Store, step: int, destination: Store) -> Proof | KeptProof:
        from trainer.export.gguf.proof import prove_gguf, prove_q4_0

        if {*self.types} != {_IN_CODES}:
            proof = prove_gguf(folder, step, destination)
            if _IN_CODES not in self.types or not proof.holds:
                return proof
        return prove_q4_0(folder, step, destination, self._rounding, _USUAL)


FORMATS = {"gguf": Gguf}
