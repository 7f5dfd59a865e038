"""The frozen teachers of a run, whether they are loaded or read from a cache."""

from clipkd.config.train import TrainConfig
from clipkd.data import Pairs
from clipkd.models.encoder import Encoder
from clipkd.objective.distiller import require_fitting_teachers
from clipkd.teachers.cached import CachedTeachers, open_cache
from clipkd.teachers.loaded import LoadedTeachers, load_teachers

Teachers = LoadedTeachers | CachedTeachers
"""Both have the same attributes and methods, which `LoadedTeachers` describes."""


def open_teachers(config: TrainConfig, student: Encoder | None, pairs: Pairs | None) -> Teachers:
    """Load the teachers or open their cache; copy the first teacher's text tower into a student that shares it.

    student, pairs: needed to open a cache; without a student loaded teachers are only checked. Call on every process.

    Raises: ValueError or FileNotFoundError naming the option or file that does not fit.
    """
    if config.teacher.cache is None:
        teachers: Teachers = load_teachers(config, student)
    else:
        assert student is not None
        assert pairs is not None
        teachers = open_cache(config, student, pairs)
    require_fitting_teachers(config.objective, teachers.models)
    return teachers
