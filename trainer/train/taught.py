"""The stored teacher of a run's data, for an objective that has one."""

from trainer.data.dataset.dataset import Reads
from trainer.data.dataset.taught import StoredTeacher, read_teacher, read_whole, teacher_folder
from trainer.errors import ConfigError, shown
from trainer.run import layout
from trainer.train.start import Start
from trainer.tuning.objective.teacher import teacher_of


def stored_teacher(start: Start, fingerprint: str, reads: Reads) -> StoredTeacher | None:
    """The teacher's word on the data set; None where the objective has no teacher.

    Raises:
        ConfigError: it is not there, or not all of it.
        Damaged: it is not what was written.
    """
    teacher = teacher_of(start.objective)
    if teacher is None:
        return None
    folder = teacher_folder(start.store.sub(layout.dataset(fingerprint)), teacher.to_json())
    record, whole = read_teacher(folder), read_whole(folder)
    if record is None or whole is None:
        raise ConfigError(
            f"{teacher.setting}: {shown(teacher.name)} has not yet written {'all of ' if record else ''}its log-probabilities of this run's "
            f"data into {folder.uri}. Run capstan teach CONFIG first, with this configuration."
        )
    start.log(f"the teacher's {record.k} likeliest tokens of {whole.targets:,} targets are in {folder.uri}")
    return StoredTeacher(folder, record, whole, reads)
