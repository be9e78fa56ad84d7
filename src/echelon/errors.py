"""All errors of Echelon as one small tree, each with its HTTP status and exit code.

                                     HTTP   exit code
    EchelonError                      500       1
    ├── InvalidInput (a ValueError)   422       2
    │   ├── TooLarge                  413       2
    │   ├── Malformed                 400       2
    │   ├── UnsupportedMediaType      415       2
    │   └── Misdirected               421       2
    ├── ModelError                    503       3
    │   ├── ModelNotFound             503       3
    │   ├── BadCheckpoint             503       3
    │   └── UnsupportedModel          503       3
    ├── ProfileError                  500       4
    ├── TooNoisy                      500       1
    ├── OutOfMemory (a RuntimeError)  507       5
    ├── NonFiniteScore                500       1
    ├── ScoringFailed (as above)      500       1
    ├── Overloaded                    429       1
    │   └── RateLimited               429       1
    ├── DeadlinePassed                504       1
    ├── WorkerLost                    503       1
    ├── DeviceLost (a RuntimeError)   503       1
    ├── ShuttingDown                  503       1
    ├── Unauthorised                  401       1
    ├── NoSuchRoute                   404       1
    ├── MethodNotAllowed              405       1
    ├── SlowClient                    408       1
    ├── StorageError                  507       6
    ├── BadRows                       422       9
    ├── MissingDependency             500       7
    └── GoalMissed                    500       8

A message says what is wrong and then the remedy.
"""

from __future__ import annotations

from typing import ClassVar


class EchelonError(Exception):
    """Root of the tree; it is not raised itself."""

    status: ClassVar[int] = 500
    """HTTP status of the server's response."""

    exit_code: ClassVar[int] = 1
    """Exit code of the command line."""

    limit: str | None = None
    """The limit of the server that was exceeded, if it is one (:mod:`echelon.server.limits`)."""

    tokenised: bool = False
    """Whether texts of the request were tokenised before the error: a rate limit charges them."""


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
        super().__init__(field, problem, remedy)  # unpickled from these in another process

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}. {self.remedy}"


def check_positive(remedy: str = "Give 1 or more.", **values: float | None) -> None:
    """Raise InvalidInput, named by the keyword, for a value that is not above zero; None passes."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InvalidInput(name, f"{value} is not positive", remedy)


class TooLarge(InvalidInput):
    """A request has more documents or tokens than one request may have."""

    status = 413


class Malformed(InvalidInput):
    """A request's body is not a JSON object, or its headers contradict HTTP."""

    status = 400


class UnsupportedMediaType(InvalidInput):
    """A request's body is not announced as JSON."""

    status = 415


class Misdirected(InvalidInput):
    """A request is for a host name that is not this server's."""

    status = 421


class ModelError(EchelonError):
    """The model cannot be used."""

    status = 503
    exit_code = 3


class ModelNotFound(ModelError):
    """No such folder, hub repository or revision."""


class BadCheckpoint(ModelError):
    """The model's files are damaged, incomplete or contradict one another."""


class UnsupportedModel(ModelError):
    """Echelon cannot score pairs with a model of this kind."""


class ProfileError(EchelonError):
    """A profile file cannot be read or understood."""

    exit_code = 4


class TooNoisy(EchelonError):
    """Measurements differ too much to conclude anything from them."""


class OutOfMemory(EchelonError, RuntimeError):
    """One pair alone does not fit in memory: the end of the OOM ladder.

    A RuntimeError whose text holds "out of memory", as torch's is: code that was written for torch
    catches it.
    """

    status = 507
    exit_code = 5

    def __str__(self) -> str:
        return f"out of memory: {super().__str__()}"


class NonFiniteScore(EchelonError):
    """The model gave NaN or infinity for a pair."""


class ScoringFailed(EchelonError, RuntimeError):
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
        super().__init__(problem, retry_after_s)  # unpickled from these in another process

    def __str__(self) -> str:
        return f"{self.problem}. Try again in {max(0.1, self.retry_after_s):.1f} s."


class RateLimited(Overloaded):
    """An API key has used up its rate limit; requests with other keys are admitted."""


class DeadlinePassed(EchelonError):
    """The caller's deadline passed, or cannot be met by any worker."""

    status = 504


class WorkerLost(EchelonError):
    """The worker process died or hung twice while it scored the same pairs."""

    status = 503


class DeviceLost(EchelonError, RuntimeError):
    """The card failed, or its context in this process; a service replaces the worker instead.

    Args:
        problem: the message of torch or the driver, whose first line is shown.
    """

    status = 503

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(problem)  # unpickled from it in another process

    def __str__(self) -> str:
        line = (self.problem.splitlines() or ["no reason given"])[0].rstrip(". ")
        return (
            f"The device failed ({line}), and this process cannot use it any more. "
            "Restart the process; if it fails again, look for Xid errors in the kernel's log."
        )


class ShuttingDown(EchelonError):
    """The service accepts no more requests, or was not started."""

    status = 503


class Unauthorised(EchelonError):
    """A request has no API key, or a wrong one."""

    status = 401


class NoSuchRoute(EchelonError):
    """There is no such path."""

    status = 404


class MethodNotAllowed(EchelonError):
    """The path has other methods."""

    status = 405


class SlowClient(EchelonError):
    """A request's body did not come in time."""

    status = 408


class StorageError(EchelonError):
    """A result could not be written to disk."""

    status = 507
    exit_code = 6


class BadRows(EchelonError):
    """Some rows of a file could not be scored; the other rows were."""

    status = 422
    exit_code = 9


class MissingDependency(EchelonError):
    """An optional package is needed and not installed.

    Args:
        problem: what needs which package, as a sentence.
        extra: Echelon's extra that installs it.
        other: another remedy, in words.
    """

    exit_code = 7

    def __init__(self, problem: str, extra: str, other: str = "") -> None:
        self.problem = problem
        self.extra = extra
        self.other = other
        super().__init__(problem, extra, other)  # unpickled from these in another process

    def __str__(self) -> str:
        return f"{self.problem} Install with: {install_command(self.extra)}{self.other}"


def install_command(extra: str) -> str:
    """The command that adds an extra, for a clone (an editable installation) or a package."""
    import json
    import shlex
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        source = json.loads(distribution("echelon-rerank").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        source = {}
    if not source.get("dir_info", {}).get("editable"):
        return f"pip install 'echelon-rerank[{extra}]'"
    clone = url2pathname(urlsplit(source["url"]).path)
    where = "." if Path(clone) == Path.cwd() else clone
    return f"pip install -e {shlex.quote(f'{where}[{extra}]')}"


class GoalMissed(EchelonError):
    """A load test missed its goal."""

    exit_code = 8


class EchelonWarning(UserWarning):
    """A problem that did not stop the work; the message names the remedy."""
