"""Every error a user can cause, one class per kind of cause.

The message is one line: what was wrong, where, and what to do. The command line prints it
and exits with code 2; the server answers it as a 4xx. Anything else that escapes is a bug.
"""


class NarrowsError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(NarrowsError):
    """An option, a spec string or a combination of them is not allowed."""


class InputError(NarrowsError):
    """A document, prompt, question or data file cannot be used."""


class ModelError(NarrowsError):
    """A model cannot be found, downloaded, read or run."""


class UnsupportedModel(ModelError):
    """The model's architecture is not one we run correctly."""


class BudgetError(NarrowsError):
    """A token or byte budget cannot be met."""


class RequestRejected(NarrowsError):
    """A generation request that this engine can never serve."""


class NumericalError(NarrowsError):
    """A model produced NaN or infinite numbers."""


def reason(error: BaseException) -> str:
    """The first line of another library's error, to quote in one of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
