"""The environment, read once at the start of a process into one frozen object. The only reader of `os.environ`.

Each secret can also be given as `NAME_FILE`, a path to a file that holds it. Values of secrets are never shown.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeVar

from worker.errors import ConfigError, TemplateError
from worker.policy import Copy, Policy
from worker.shortcodes import can_be_assumed
from worker.signing import signing_secret_problem
from worker.template import ASSUMED_TEMPLATE, Template, parse_template

T = TypeVar("T")
D = TypeVar("D")

LOG_FORMATS: Final = ("logfmt", "json")
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")

Need = Literal["signing_secrets", "database_url", "redis_url", "secret_key"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process of clerk-sync was told. Fields that the process didn't ask for may be empty."""

    signing_secrets: tuple[str, ...] = field(default=(), repr=False)
    database_url: str = field(default="", repr=False)
    redis_url: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    api_url: str = "https://api.clerk.com"
    api_share: float = 0.5
    reconcile_seconds: int = 300
    event_retention_days: int = 7
    instance_id: str | None = None
    policy: Policy = field(default_factory=Policy)
    port: int = 8000
    log_format: str = "logfmt"
    log_level: str = "INFO"
    sentry_dsn: str = field(default="", repr=False)
    traces: bool = False
    status_token: str = field(default="", repr=False)

    @classmethod
    def from_env(
        cls, env: Mapping[str, str] | None = None, *, need: tuple[Need, ...] = (), claims: bool = True
    ) -> Settings:
        """Read the settings, of which those named by `need` must be there; without `claims`, but for the template, for
        what must work while that is broken.

        Raises ConfigError that names every missing or bad variable at once.
        """
        reader = _Reader(os.environ if env is None else env)
        secrets = reader.read("CLERK_WEBHOOK_SIGNING_SECRET", _signing_secrets, (), secret=True)
        if not secrets:
            secrets = reader.read("CLERK_WEBHOOK_SECRET", _signing_secrets, (), secret=True)
        assumed = reader.read("SESSION_CLAIMS_ASSUMED_BYTES", _assumed_bytes, {}) if claims else {}
        template = ASSUMED_TEMPLATE
        if claims:
            template = reader.read("SESSION_CLAIMS", lambda text: _template(text, assumed), ASSUMED_TEMPLATE)
        settings = cls(
            signing_secrets=secrets,
            database_url=reader.read("DATABASE_URL", _database_url, "", secret=True),
            redis_url=reader.read("REDIS_URL", _broker_url, "", secret=True),
            secret_key=reader.read("CLERK_SECRET_KEY", _secret_key, "", secret=True),
            api_url=reader.read("CLERK_API_URL", _api_url, "https://api.clerk.com"),
            api_share=reader.read("CLERK_API_SHARE", _share, 0.5),
            reconcile_seconds=reader.read("RECONCILE_SECONDS", _integer(0, 86_400), 300),
            # Svix retries for 27 h 35 min: whoever asks about a delivery in that time still finds it.
            event_retention_days=reader.read("EVENT_RETENTION_DAYS", _integer(2, 3650), 7),
            instance_id=reader.read("CLERK_INSTANCE_ID", str, None),
            policy=Policy(
                private=reader.read("COPY_PRIVATE", _one_of(Copy), Copy.ALWAYS),
                public=reader.read("COPY_PUBLIC", _one_of(Copy), Copy.OVERSIZE),
                unsafe=reader.read("COPY_UNSAFE", _one_of(Copy), Copy.OVERSIZE),
                budget=reader.read("SESSION_CLAIMS_BUDGET", _integer(0, 1_000_000), 1200),
                template=template,
                assumed=assumed,
            ),
            port=reader.read("PORT", _integer(1, 65535), 8000),
            log_format=reader.read("LOG_FORMAT", _choice(LOG_FORMATS), "logfmt"),
            log_level=reader.read("LOG_LEVEL", lambda text: _choice(LOG_LEVELS)(text.upper()), "INFO"),
            sentry_dsn=reader.read("SENTRY_DSN", _dsn, "", secret=True),
            traces=_traces(reader),
            status_token=reader.read("STATUS_TOKEN", _status_token, "", secret=True),
        )
        reader.refuse_empty("SENTRY_DSN")
        for name in need:
            reader.require(name, getattr(settings, name))
        if reader.problems:
            raise ConfigError(*reader.problems)
        return settings


_NEEDED: Final[dict[str, tuple[str, str]]] = {
    "signing_secrets": (
        "CLERK_WEBHOOK_SIGNING_SECRET",
        "copy the endpoint's Signing Secret from Clerk's Dashboard, Webhooks",
    ),
    "database_url": ("DATABASE_URL", "for example postgresql://user:password@host:5432/database"),
    "redis_url": ("REDIS_URL", "for example redis://host:6379/0"),
    "secret_key": ("CLERK_SECRET_KEY", "copy the Secret key from Clerk's Dashboard, API keys"),
}


class _Reader:
    """Reads variables and collects what is wrong with them."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.problems: list[str] = []
        self._bad: set[str] = set()

    def read(self, name: str, parse: Callable[[str], T], default: D, *, secret: bool = False) -> T | D:
        text = self._env.get(name, "").strip()
        path = self._env.get(f"{name}_FILE", "").strip() if secret else ""
        if text and path:
            return self._bad_value(name, f"{name} and {name}_FILE are both set: keep one", default)
        if path:
            try:
                text = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                return self._bad_value(name, f"{name}_FILE can't be read ({type(error).__name__})", default)
        if not text:
            return default
        try:
            return parse(text)
        except TemplateError as error:
            for problem in error.problems[:-1]:
                self._bad_value(name, f"{name}: {problem}", default)
            return self._bad_value(name, f"{name}: {error.problems[-1]}", default)
        except ValueError as error:
            return self._bad_value(name, f"{name}: {error}", default)

    def refuse_empty(self, name: str) -> None:
        """Note a variable that is there and empty, where that is more likely a mistake than meant."""
        if name in self._env and not self._env[name].strip():
            self._bad_value(name, f"{name} is empty: give it a value, or unset it", None)

    def _bad_value(self, name: str, problem: str, default: D) -> D:
        self._bad.add(name)
        self.problems.append(problem)
        return default

    def require(self, need: str, value: object) -> None:
        name, hint = _NEEDED[need]
        if not value and name not in self._bad:
            self.problems.append(f"{name} is missing: {hint}")


def _signing_secrets(text: str) -> tuple[str, ...]:
    secrets = tuple(text.replace(",", " ").split())
    for number, secret in enumerate(secrets, 1):
        problem = signing_secret_problem(secret)
        if problem:
            raise ValueError(problem if len(secrets) == 1 else f"secret {number} of {len(secrets)}: {problem}")
    return secrets


def _database_url(text: str) -> str:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("must begin with postgresql://")
    # Whatever reads it otherwise would quote a part of the password in its error.
    authority = text.partition("://")[2].partition("/")[0]
    if authority.count("@") > 1 or re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise ValueError("has a character that must be encoded: in a password write % as %25, @ as %40 and / as %2F")
    return text


def _broker_url(text: str) -> str:
    if "://" not in text:
        raise ValueError("must be a URL such as redis://host:6379/0")
    return text


_SECRET_KEY: Final = re.compile(r"sk_[!-~]+")


def _secret_key(text: str) -> str:
    if not _SECRET_KEY.fullmatch(text):
        raise ValueError("must begin with sk_ (sk_live_ or sk_test_), and be all of one line")
    return text


_API_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?/?"
)
_THIS_MACHINE: Final = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|\[::1\]")


def _api_url(text: str) -> str:
    found = _API_URL.fullmatch(text)
    if not found or not 0 < int(found["port"] or 443) < 65536:
        raise ValueError("must be http:// or https:// and a host, without a path, such as https://api.clerk.com")
    if found["scheme"] == "http" and not _THIS_MACHINE.fullmatch(found["host"]):
        raise ValueError("must be https:// but for this machine, since the secret key is sent there")
    return text.rstrip("/")


def _share(text: str) -> float:
    """A share of what Clerk allows."""
    if not re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", text) or not 0.01 <= float(text) <= 1:
        raise ValueError("must be a number from 0.01 to 1.0")
    return float(text)


_STATUS_TOKEN: Final = re.compile(r"[!-~]{16,}")


def _status_token(text: str) -> str:
    if not _STATUS_TOKEN.fullmatch(text):
        raise ValueError("must be at least 16 visible ASCII characters; `openssl rand -hex 24` prints a good one")
    return text


# What Sentry calls a DSN: https://PUBLIC_KEY@HOST/PROJECT.
_DSN: Final = re.compile(r"https?://[^\s/@:]+(:[^\s/@]+)?@[^\s/@]+/(\S+/)?[0-9]+")


def _dsn(text: str) -> str:
    if not _DSN.fullmatch(text):
        raise ValueError("must be the DSN of a project in Sentry, such as https://key@host.example/123")
    return text


def _traces(reader: _Reader) -> bool:
    """Whether OpenTelemetry's own variables say where to send traces."""
    endpoints = [
        reader.read(name, str, "") for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    ]
    exporter = reader.read("OTEL_TRACES_EXPORTER", _choice(("otlp", "none")), "otlp" if any(endpoints) else "none")
    if exporter == "none" or reader.read("OTEL_SDK_DISABLED", str.lower, "") == "true":
        return False
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        reader.read(name, _choice(("http/protobuf",)), "")
    return True


def _template(text: str, declared: Collection[str]) -> Template:
    """A claims template, or with `@path` the one in that file."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the file {text[1:]} can't be read ({type(error).__name__})") from None
    return parse_template(text, declared)


def _assumed_bytes(text: str) -> dict[str, int]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError('must be a JSON object of shortcodes and bytes, such as {"org.name": 60}')  # noqa: TRY004
    for name, size in given.items():
        if not can_be_assumed(name):
            raise ValueError(f"{name[:60]!a} is no shortcode that can be weighed by assumption, such as org.name")
        if not isinstance(size, int) or isinstance(size, bool) or not 2 <= size <= 1_000_000:
            raise ValueError(f"{name} must be a whole number of bytes from 2 to 1000000")
    return given


def _integer(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not lowest <= int(text) <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(text)

    return parse


def _choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def _one_of(kind: type[Copy]) -> Callable[[str], Copy]:
    def parse(text: str) -> Copy:
        return kind(_choice(tuple(kind))(text.lower()))

    return parse
