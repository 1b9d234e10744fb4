"""What can go wrong, by the place a user has to look at to mend it."""


class MeshweaveError(Exception):
    """Base of every error that meshweave raises on purpose; its message names what, where, which value and how to fix it."""


class RankError(MeshweaveError):
    """An error of ours that one rank of a launched world met while the others may not have."""


class ConfigError(MeshweaveError):
    """The run file, an override, or the combination of run file and model is wrong."""


class LayoutError(MeshweaveError):
    """A layout, placement or ownership is inconsistent, or asks for something that is not built yet."""


class DataError(MeshweaveError):
    """A data file, a sample or a media item cannot be read."""


class CheckpointError(MeshweaveError):
    """A model folder or checkpoint is missing something, or does not fit the model."""


class ScheduleError(MeshweaveError):
    """A schedule cannot run: it would deadlock, or an action is missing, doubled, or before what it needs."""
