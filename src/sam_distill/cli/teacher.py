"""The teacher of a training run or an evaluation: a live one, or the one of a cache."""

from sam_distill.data.base import DataSource
from sam_distill.data.cache import Cache
from sam_distill.errors import UserError
from sam_distill.teachers import CachedTeacher, LiveTeacher, Teacher


def teacher_for(teacher: LiveTeacher, data: DataSource) -> Teacher:
    """Return `teacher`, or its cached form if `data` is a cache. Raise UserError if the cache has another teacher."""
    if not isinstance(data, Cache):
        return teacher
    made_by = data.manifest["teacher"]
    if teacher.sha256 != data.manifest["teacher_sha256"]:
        raise UserError(
            f"data.path={data.path} holds the answers of {made_by}, not of {teacher.checkpoint}: say teacher={made_by}"
            f" or teacher.checkpoint={made_by}"
        )
    return CachedTeacher(data.path)
