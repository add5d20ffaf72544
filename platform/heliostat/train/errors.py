"""Errors that end a run."""


class Unrecoverable(RuntimeError):
    """Trying again would fail again, so the launcher does not."""


class DiskFull(Unrecoverable):
    pass


class BadStep(RuntimeError):
    """The run is to start again from its last checkpoint."""
