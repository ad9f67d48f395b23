"""How a teacher begins to write beside a data set, and ends, whichever teacher it is."""

from typing import Any

from trainer.data.dataset.dataset import Dataset
from trainer.data.dataset.taught import TeacherRecord, begin_teacher, finish_teacher, read_teacher
from trainer.errors import ConfigError, shown
from trainer.store.store import Store
from trainer.tuning.objective.teacher import Teacher


def begun(folder: Store, wanted: TeacherRecord, teacher: Teacher) -> TeacherRecord:
    """The record of the folder, made now unless it is there. Raises `ConfigError` where another teacher has it."""
    found = read_teacher(folder) or begin_teacher(folder, wanted)
    for name in sorted(found.facts.keys() | wanted.facts.keys()):
        before, now = found.facts.get(name), wanted.facts.get(name)
        if before != now:
            raise ConfigError(
                f"{teacher.setting}: {shown(teacher.name)} is not the teacher that has written {folder.uri}: its {name} is another. "
                "Put that one back, or delete the folder and have this one write it anew."
            )
    return found


def finished(folder: Store, record: TeacherRecord, teacher: Teacher, dataset: Dataset, written: int) -> dict[str, Any]:
    """Say that all is there, of which so many blocks were `written` now; returns what `capstan teach` prints."""
    whole = finish_teacher(folder, record, dataset.blocks.tolist(), dataset.manifest.targets)
    return {
        "teacher": teacher.name,
        "folder": folder.uri,
        "data": dataset.manifest.fingerprint,
        "documents": dataset.manifest.documents,
        "targets": whole.targets,
        "top_k": record.k,
        "bytes": whole.bytes,
        "written": written,
    }
