"""The errors a caller would treat differently. Messages speak to the person who can act and never quote a value."""


class SyncError(Exception):
    """Something that clerk-sync refuses or can't do."""


class ConfigError(SyncError):
    """The configuration is wrong or incomplete: refuse to start (exit code 2)."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class TemplateError(SyncError):
    """A claims template that Clerk would refuse or render wrongly; `problems` says where and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class SignatureError(SyncError):
    """A delivery whose sender could not be verified: answered 400, nothing kept."""


class EventError(SyncError):
    """An authentic event that can't be applied: recorded as `dead` with this reason."""


class Unavailable(SyncError):
    """Postgres could not take the event in time: answered 503, so that Svix delivers it again."""


class BrokerDown(SyncError):
    """The broker can't be talked to just now. Nothing depends on it: the worker's sweep finds the events."""


class ClerkUnavailable(SyncError):
    """Clerk's API gave no usable answer for as long as we were ready to wait: worth another try later."""


class ClerkRefused(SyncError):
    """Clerk's API refuses a request as it stands; `status` and `codes` are Clerk's, its messages aren't kept."""

    def __init__(self, status: int, codes: tuple[str, ...]) -> None:
        super().__init__(f"Clerk's API refuses the request: {status} ({', '.join(codes) or 'without a code'})")
        self.status = status
        self.codes = codes
