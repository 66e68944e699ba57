"""Errors that say what is wrong and what to do about it."""


class Explained(Exception):
    """An error whose message is enough: a notebook shows it without the traceback above it."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of its traceback."""
        return [f"{type(self).__name__}: {self}"]
