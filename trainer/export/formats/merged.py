"""Base and adapter as one model, in the types of the stored base, or with the linear layers in fewer bits.

FP8 has half the bytes of 16 bits, nf4 a fourth.

A run over a base in nf4 learnt an adapter for those 4 bits. Here the sum of the stored base and the adapter is rounded
to 4 bits, which is a different rounding. The export reports the error of the weights, and --verify measures how far the
predictions are.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import create_model, model_validator

from trainer.base.base import Description
from trainer.config import Config
from trainer.config.section import Section, setting
from trainer.export.destination import WHOLE_MODEL, ExportProgress, Written
from trainer.export.figures import KeptProof, Proof, Rounding
from trainer.export.format import ExportFormat, find_format
from trainer.export.trained import check_mergeable_run, check_recodable, check_written_as_stored
from trainer.model.held import Encodes, encoders
from trainer.store.store import Store

if TYPE_CHECKING:
    from trainer.export.write.foreseen import Foreseen
    from trainer.model.held import Encoder


_STORED = "stored"


class _MergedFolder(Section):
    rounding: Rounding | None = setting(
        None,
        about=(
            "How codes follow the adapter with `as`: to the `nearest` ones, or by a `dither`. Default: what keeps most"
            " of what was learnt: a dither with as=stored, the nearest ones where the base's 16 bits are known. `gptq`"
            " looks at rows of the run's data, which takes longer and keeps more with as=stored."
        ),
        example="nearest",
    )

    what: ClassVar[str] = "base and adapter, merged,"
    what_if_tuned: ClassVar[str] = WHOLE_MODEL
    whole_model: ClassVar[bool] = True

    @model_validator(mode="after")
    def _codes_alone_are_rounded(self) -> "_MergedFolder":
        if self.rounding and self._code is None:
            raise ValueError(
                f"rounding: {self.rounding} says how codes are rounded, and a merge in 16 bits has none. Give as=stored"
                " too, or leave it out."
            )
        if self.rounding == "gptq" and not self._as_stored:
            raise ValueError(
                f"rounding: gptq is for as=stored. With as={self._code} the base's 16 bits are known, and the nearest"
                " codes keep nearly everything. Leave rounding out."
            )
        return self

    @property
    def _code(self) -> str | None:
        return getattr(self, "as")

    @property
    def _as_stored(self) -> bool:
        return self._code == _STORED

    @property
    def _made(self) -> str | None:
        """The code that the base itself is not stored in."""
        return None if self._as_stored else self._code

    @property
    def _gguf(self) -> ExportFormat | None:
        """The format that writes the model instead, for codes that only llama.cpp reads."""
        if self._code != "q4_0":
            return None
        return find_format("gguf", ["types=[q4_0]", *([f"rounding={self.rounding}"] if self.rounding else [])])

    @property
    def _usual(self) -> Rounding:
        """Return the rounding that keeps most (benchmarks/README.md, stored.py).

        What a weight in 16 bits has beyond its code is as good as a dither, and the nearest code adds no error to it.
        """
        return "dither" if self._as_stored else "nearest"

    @property
    def _rounding(self) -> Rounding:
        return self.rounding or self._usual

    def check(self, config: Config, base: Description) -> None:
        if self._gguf:
            self._gguf.check(config, base)
            return
        if self._as_stored:
            check_written_as_stored(config, base, self._rounding)
        check_mergeable_run(config, base)
        if self._code and not self._as_stored:
            check_recodable(base, self._code)

    def check_files(self, run: "Foreseen") -> None:
        if self._gguf:
            self._gguf.check_files(run)
            return
        if self._as_stored:
            from trainer.export.write.as_stored import changes_in_codes

            run.check_codes(changes_in_codes(self._rounding))
            return
        run.check_layout()
        if self._code:
            from trainer.model.held.grids import GRIDS

            run.check_code(GRIDS[self._code])

    def check_here(self) -> None:
        if self._gguf:
            self._gguf.check_here()

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        if self._gguf:
            return self._gguf.write(folder, destination, step, progress)
        from trainer.export.write.as_stored import export_as_stored
        from trainer.export.write.merged import export_merged

        if self._as_stored:
            from trainer.export.proof.rows import training_rows

            return export_as_stored(
                folder, destination, step, rounding=self._rounding, read_rows=training_rows, progress=progress
            )
        if self._code:
            from trainer.export.write.in_codes import export_in_codes

            return export_in_codes(folder, destination, step, self._code, rounding=self._rounding, progress=progress)
        return Written(export_merged(folder, destination, step, progress.written))

    def prove(self, folder: Store, step: int, destination: Store) -> Proof | KeptProof:
        if self._gguf:
            return self._gguf.prove(folder, step, destination)
        from trainer.export.proof.kept import prove_in_codes
        from trainer.export.proof.verify import prove_merged

        if self._code:
            return prove_in_codes(folder, step, destination, self._made, self._rounding, self._usual)
        return prove_merged(folder, step, destination)


MergedFolder: Any = create_model(
    "MergedFolder",
    __base__=_MergedFolder,
    **{  # `as` is a word of Python, so no class can declare it
        "as": (
            Literal["stored", "int4", "nvfp4", "mxfp4", "fp8", "q4_0"] | None,
            setting(
                None,
                about=(
                    "`stored` keeps the codes and the scales of a base in 4 or 8 bits. Others make them of a base in 16"
                    " bits first. Default: the types of the base, or 16 bits if it has fewer."
                ),
                example="stored",
            ),
        )
    },  # type: ignore[call-overload]
)


class _EncodedFolder(Section):
    """The options are the settings of `quant` that the encoder reads."""

    code: ClassVar[str]
    whole_model: ClassVar[bool] = True

    def check(self, config: Config, base: Description) -> None:
        check_mergeable_run(config, base)
        check_recodable(base, self.code)

    def check_files(self, run: "Foreseen") -> None:
        run.check_layout()
        run.check_code(self._encoder(run.config))

    def check_here(self) -> None:
        pass

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        from trainer.export.write.recoded import export_recoded

        return export_recoded(folder, destination, step, self._encoder, progress)

    def _encoder(self, config: Config) -> "Encoder":
        from trainer.base.load.load import DTYPES

        given, settings = self.model_dump(exclude_none=True), config.quant
        form = encoders()[self.code].with_settings(
            given.get("block_size", settings.block_size), given.get("double", settings.double)
        )
        return form.encoder(DTYPES[config.model.dtype])

    def prove(self, folder: Store, step: int, destination: Store) -> Proof:
        from trainer.export.proof.verify import prove_recoded

        return prove_recoded(folder, step, destination)


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "block_size": (
        Literal[64, 128, 256, 512, 1024, 2048, 4096] | None,
        setting(None, about="Weights that share a scale. Default: the run's quant.block_size.", example=64),
    ),
    "double": (
        bool | None,
        setting(None, about="Whether scales are quantized too. Default: the run's quant.double.", example=True),
    ),
}


def _folder_of(code: str, form: Encodes) -> type[_EncodedFolder]:
    """Return the export format that has its linear layers in `form`."""
    options = {name: _OPTIONS[name] for name in form.settings if name in _OPTIONS}
    folder: Any = create_model(f"{code.capitalize()}Folder", __base__=_EncodedFolder, **options)  # type: ignore[call-overload]
    name = code.upper() if code in _CAPITALS else code
    folder.code, folder.what, folder.what_if_tuned = (
        code,
        f"base and adapter, merged, in {name}",
        f"the whole model in {name}",
    )
    return folder


_CAPITALS = ("fp8",)
FORMATS = {"merged": MergedFolder, **{code: _folder_of(code, form) for code, form in encoders().items()}}
