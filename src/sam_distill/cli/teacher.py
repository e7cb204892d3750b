"""Whose answers a student learns, or is judged by."""

from sam_distill.data.base import DataSource
from sam_distill.data.cache import Cache
from sam_distill.teachers import CachedTeacher, LiveTeacher, Teacher
from sam_distill.types import UserError


def teacher_for(teacher: LiveTeacher, data: DataSource) -> Teacher:
    """`teacher` itself, or what a cache has kept of it, if the data are one. The answers of another are refused."""
    if not isinstance(data, Cache):
        return teacher
    made_by = data.manifest["teacher"]
    if teacher.sha256 != data.manifest["teacher_sha256"]:
        raise UserError(
            f"data.path={data.path} holds the answers of {made_by}, not of {teacher.checkpoint}: say teacher={made_by}"
            f" or teacher.checkpoint={made_by}"
        )
    return CachedTeacher(data.path)
