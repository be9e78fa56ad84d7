"""Every error that Echelon raises on purpose, as one small tree.

    EchelonError
    ├── InvalidInput            what the caller passed is wrong (also a ValueError)
    │   ├── TooLarge            more documents or tokens than one request may have
    │   └── Malformed           a request's body that is no JSON object
    ├── ModelError              the model cannot be used
    │   ├── ModelNotFound       no such folder, hub repository or revision
    │   ├── BadCheckpoint       the files are there, but damaged or contradictory
    │   └── UnsupportedModel    a sound model that Echelon cannot score with
    ├── ProfileError            a profile file that cannot be read
    ├── TooNoisy                measurements that prove nothing
    ├── OutOfMemory             the ladder's end: this pair does not fit
    ├── NonFiniteScore          the model gave NaN or infinity for a pair
    ├── ScoringFailed           the model raised an error that is not about memory
    ├── Overloaded              the queue is full; it says when to come again
    │   └── RateLimited         a key has used up what it may have scored in a time
    ├── DeadlinePassed          the caller's deadline passed, or cannot be met
    ├── WorkerLost              the scoring process died twice over the same pairs
    ├── ShuttingDown            the service takes no more requests
    ├── Unauthorised            no key, or a wrong one
    ├── NoSuchRoute             no such path, or another method belongs to it
    ├── SlowClient              a request's body did not come in time
    ├── StorageError            a result could not be written
    ├── BadRows                 some rows of a file could not be scored; the others were
    ├── MissingDependency       an optional package is needed and not installed
    └── GoalMissed              a load test that did not hold what was promised

Each class carries the HTTP ``status`` and the command line's ``exit_code``, so that one handler
serves each. A message names what is wrong and then the remedy.
"""

from __future__ import annotations

from typing import ClassVar


class EchelonError(Exception):
    """Root of the tree; never raised itself.

    Attributes:
        status: HTTP status that a server answers with.
        exit_code: exit code of the command line.
    """

    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1


class InvalidInput(EchelonError, ValueError):
    """The caller's value is wrong.

    Args:
        field: name of the argument, option or key, with an index where one helps.
        problem: what is wrong with its value.
        remedy: what to do instead.
    """

    status = 422
    exit_code = 2

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        self.field = field
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {problem}. {remedy}")

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str, str]]:
        """Travel between processes: exceptions are rebuilt from their arguments."""
        return type(self), (self.field, self.problem, self.remedy)


class TooLarge(InvalidInput):
    """A request has more documents or tokens than one request may have."""

    status = 413


class Malformed(InvalidInput):
    """A request's body is no JSON object."""

    status = 400


class ModelError(EchelonError):
    """The model cannot be used."""

    status = 503
    exit_code = 3


class ModelNotFound(ModelError):
    """No such folder, hub repository or revision."""


class BadCheckpoint(ModelError):
    """The model's files are damaged, incomplete or contradict one another."""


class UnsupportedModel(ModelError):
    """The model is sound, but not one that Echelon can score pairs with."""


class ProfileError(EchelonError):
    """A profile file that cannot be read or understood."""

    exit_code = 4


class TooNoisy(EchelonError):
    """Measurements that differ too much to conclude anything from them."""


class OutOfMemory(EchelonError):
    """The last rung of the memory ladder: one pair alone does not fit."""

    status = 507
    exit_code = 5


class NonFiniteScore(EchelonError):
    """The model gave NaN or infinity; no score is invented in its place."""


class ScoringFailed(EchelonError):
    """The model raised an error that is not about memory; the log has its traceback."""


class Overloaded(EchelonError):
    """The queue is full, or would make the caller wait too long.

    Args:
        problem: what is full, with the limit.
        retry_after_s: predicted seconds until there is room.
    """

    status = 429

    def __init__(self, problem: str, retry_after_s: float) -> None:
        self.problem = problem
        self.retry_after_s = retry_after_s
        super().__init__(f"{problem}. Try again in {max(0.1, retry_after_s):.1f} s.")

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, float]]:
        """Travel between processes: exceptions are rebuilt from their arguments."""
        return type(self), (self.problem, self.retry_after_s)


class RateLimited(Overloaded):
    """A key has used up what it may have scored in a time; others are let in."""


class DeadlinePassed(EchelonError):
    """The caller's deadline passed while the request waited, or no machine here could meet it."""

    status = 504


class WorkerLost(EchelonError):
    """The scoring process died or hung over a pair, and again when it was retried."""

    status = 503


class ShuttingDown(EchelonError):
    """The service takes no more requests, or never began."""

    status = 503


class Unauthorised(EchelonError):
    """A request without a key, or with a wrong one."""

    status = 401


class NoSuchRoute(EchelonError):
    """There is no such path, or it is asked for with another method."""

    status = 404


class SlowClient(EchelonError):
    """A request's body did not come in time."""

    status = 408


class StorageError(EchelonError):
    """A result could not be written to disk."""

    status = 507
    exit_code = 6


class BadRows(EchelonError):
    """Some rows of a file could not be scored; the others were, and the file names the bad ones."""

    status = 422
    exit_code = 9


class MissingDependency(EchelonError):
    """An optional package is needed and not installed."""

    exit_code = 7


class GoalMissed(EchelonError):
    """A load test did not hold its goal."""

    exit_code = 8


class EchelonWarning(UserWarning):
    """Something to know that did not stop the work; the message names the remedy."""
