"""Exports what a committed checkpoint has learnt, without a GPU and without the base in memory.

If the base itself has learnt, the export is the whole model (trainer/export/write/merged.py). Otherwise the folder, on
a disk or in a bucket, holds the files of the run's method (for LoRA what PEFT's `save_pretrained` writes), the
tokenizer's files and a model card with the run's facts. The file without which nothing loads is written last, so a
killed export is not mistaken for a whole one.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch

from trainer.base.describe.composite import composite_class
from trainer.base.find.locate import base_files
from trainer.base.find.small_files import TOKENIZER_PATTERNS
from trainer.base.find.tokenizer import beside_no_config, tokenizer_files
from trainer.base.load.load import DTYPES
from trainer.config import Model, Tuning
from trainer.data.render.chat_template import template_text
from trainer.export.card import CardContent, head_usage, model_card, peft_usage
from trainer.export.folder import CARD, TRAINED, BytesWritten, check_destination
from trainer.export.trained import check_base_at_hand, trained_checkpoint, trained_directory
from trainer.export.write.merged import write_model
from trainer.export.write.read_by_peft import as_peft_reads
from trainer.export.write.whole_class import for_whole_class
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.store import Store
from trainer.tuning.head import head_of
from trainer.tuning.method import methods


def export_adapter(
    folder: Store,
    destination: Store,
    step: int | None = None,
    report: BytesWritten = lambda done, total: None,
    arranged: Callable[[Mapping[str, bytes], Model], Mapping[str, bytes]] = lambda files, model: files,
) -> CheckpointManifest:
    """Write what `step`, or the newest whole checkpoint, has learnt to `destination`.

    Returns the checkpoint's manifest.

    `report` is told of the progress if a whole model is written. `arranged` gives the adapter's files another layout,
    in the same order.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something other than a half export, or the base's folder is not here, or PEFT
            would load only a part of the adapter; if a whole model is written, also what `write_model` raises.
    """
    # This check comes before the shards are read, so it uses the files of every method.
    ours = [name for make in methods().values() for name in make(Tuning()).file_names]
    check_destination(destination, *ours, *TOKENIZER_PATTERNS)
    manifest, config, method = trained_checkpoint(folder, step)
    check_destination(destination, *method.file_names, *TOKENIZER_PATTERNS)
    if method.exports_model:
        write_model(folder, manifest, config, destination, report)
        return manifest
    check_base_at_hand(config.model, manifest)
    directory = trained_directory(folder, base_files(config.model), manifest)
    tokenizer = tokenizer_files(directory, config.model, template_text(config.data))
    tokenizer = beside_no_config(tokenizer, directory, config.model.base)
    weights = LearntWeights(folder, manifest, DTYPES[config.model.dtype])
    exported = method.export(weights.whole, config.model)
    in_layout = arranged(exported.files, config.model)
    files = for_whole_class(in_layout, config.model)
    if in_layout is exported.files:  # in PEFT's own layout
        files = as_peft_reads(files, config.model, head_of(method))
    *names, last = files
    assert not any(fnmatch(last, pattern) for pattern in method.file_names), "a whole export would count as a half one"
    whole = composite_class(directory)
    usage = peft_usage(whole, grows=bool(config.model.add_tokens)) if exported.library == "peft" else ""
    if (head := head_of(method)) is not None:
        usage = head_usage(head)
    content = CardContent(exported.library, f"{exported.what} {TRAINED}.", "adapter", usage)
    destination.put(CARD, model_card(folder, config, manifest, content))
    for name, content in {**{name: files[name] for name in names}, **tokenizer}.items():
        destination.put(name, content)
    destination.create(last, files[last])
    return manifest
