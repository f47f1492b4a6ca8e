"""Every error that CliffScope raises on purpose.

One tree, so that `except CliffScopeError` catches all of them and nothing else. A message states what was given, what
was expected and what to do. `exit_code` is the exit status of the command line for that kind of error.
"""


class CliffScopeError(Exception):
    """Base of all errors that CliffScope raises on purpose."""

    exit_code = 1


class DataError(CliffScopeError):
    """A file, a transcript or an argument does not hold what is needed."""

    exit_code = 3


class TemplateError(CliffScopeError):
    """The chat template is missing, unknown, or renders something that cannot be measured."""

    exit_code = 3


class UnclearTemplateError(TemplateError):
    """The chat template does not show how the model thinks, or shows contradictory things, so that it has to be asked.

    `question` is the one thing that is not known; `answer` has the fields of a template as far as they are known, to be
    completed and passed as a `.json` file.
    """

    def __init__(self, message: str, *, question: str, answer: dict[str, object]) -> None:
        """Takes the message with its parts."""
        super().__init__(message)
        self.question, self.answer = question, answer


class SpanError(CliffScopeError):
    """A span of a transcript is empty or cannot be found."""

    exit_code = 3


class ShapeError(CliffScopeError):
    """An array has a different shape than the model, the probe or the array paired with it."""

    exit_code = 3


class ProbeError(CliffScopeError):
    """A probe cannot be fitted, or belongs to another model."""

    exit_code = 3


class OtherModelError(CliffScopeError):
    """A probe, readout, edit, ranking or selection was made with other weights or another template than the model's."""

    exit_code = 3


class EditError(CliffScopeError):
    """A head edit names heads that the model does not have, or cannot be applied as requested."""

    exit_code = 3


class GenerationError(CliffScopeError):
    """Generation cannot run with these prompts and budgets."""

    exit_code = 3


class JudgeError(CliffScopeError):
    """A judge returned something other than a verdict."""

    exit_code = 3


class ReplyError(CliffScopeError):
    """A server's reply to one request never arrived or cannot be read; other requests may still succeed."""

    exit_code = 7


class ServerError(CliffScopeError):
    """A server cannot be reached, or rejects the key or the model, so that no request can succeed."""

    exit_code = 7


class UnsupportedModelError(CliffScopeError):
    """The model fails one of the checks that make its numbers trustworthy."""

    exit_code = 4


class StoreError(CliffScopeError):
    """A run directory is locked, belongs to another configuration, or cannot be written."""

    exit_code = 5


class MissingExtraError(CliffScopeError):
    """The request needs an optional dependency that is not installed."""

    exit_code = 6


class ResourceError(CliffScopeError):
    """Memory or disk space ran out, and continuing with less was not possible."""

    exit_code = 7
