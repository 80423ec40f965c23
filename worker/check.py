"""What `clerk-sync check` asks of the receiver: is it alive and ready, and does an event get through? The event is of
a user that is made up: sent to the real endpoint, seen here, deleted again, and every trace removed."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import httpx

from worker import inbox, users
from worker.db import Connection
from worker.errors import ConfigError, SyncError
from worker.events import RESERVED, UserDeleted
from worker.jsontext import visible

ENDPOINT: Final = "/webhooks/clerk"

ANSWER_SECONDS: Final = 15.0
"""How long Svix waits for an answer; whoever takes longer never acknowledges anything."""

LARGEST_ANSWER: Final = 64 * 1024
SHOWN: Final = 300
"""How many characters of what somebody else's server says are shown."""

LOOK_SECONDS: Final = 0.02
"""How often the database is looked at."""

LONGEST_WAIT: Final = 300.0
"""With it a check ends long before what it left counts as that of an earlier one."""

State = Literal["pass", "warning", "fail", "skipped"]


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at; the notes say what was seen, or what is wrong and what to do. A warning is no
    failure: everything works, but not as it should."""

    name: str
    state: State
    notes: tuple[str, ...] = ()


def noted(name: str, state: State, *notes: str) -> Line:
    """The same, with the notes one by one."""
    return Line(name, state, notes)


# --- Asking the receiver


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer over HTTP: its JSON object (empty where it has none), where a redirect leads, and how many seconds it
    took."""

    status: int
    said: Mapping[str, Any]
    location: str
    seconds: float

    @property
    def problem(self) -> str:
        """What a receiver says in `error`, safe to be shown."""
        return _shown(self.said.get("error", ""))


def new_client() -> httpx.Client:
    """A client that checks certificates. Proxies are the environment's, but none leads to this machine. Raises
    ConfigError."""
    try:
        return httpx.Client(mounts={"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None})
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE: one of them can't be used "
            f"({type(error).__name__})"
        ) from None


def base_of(url: str) -> str:
    """Where the receiver is, without a slash at the end, from its address or its endpoint's. Raises ConfigError."""
    try:
        parts = urlsplit(url.strip())
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        wrong = True
    if wrong:
        raise ConfigError("--url: must be an address such as https://your.host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("--url: must be without a login, a query or a fragment, such as https://your.host")
    path = parts.path.rstrip("/").removesuffix(ENDPOINT)
    return f"{parts.scheme}://{parts.netloc}{path}"


def ask(
    client: httpx.Client, method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One request; redirects aren't followed, as Svix follows none. Raises SyncError that says why no answer came."""
    started = time.monotonic()
    text = b""
    try:
        with client.stream(
            method, url, content=body, headers=dict(headers or {}), timeout=ANSWER_SECONDS, follow_redirects=False
        ) as response:
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > LARGEST_ANSWER:
                    break
                if time.monotonic() - started > ANSWER_SECONDS:
                    raise SyncError(SLOW)
    except httpx.TimeoutException:
        raise SyncError(SLOW) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise SyncError(_unreachable(url, error)) from None
    return Answer(response.status_code, _object(text), response.headers.get("Location", ""), time.monotonic() - started)


SLOW: Final = (
    f"no answer within {ANSWER_SECONDS:g} s, after which Svix gives up: is the address right, is `web` running, and "
    "does a firewall let requests through?"
)


def _unreachable(url: str, error: Exception) -> str:
    host = urlsplit(url).netloc
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {host} isn't trusted, so Svix won't deliver there: install one that is valid for this "
            "host, with its intermediate certificates"
        )
    if isinstance(cause, ssl.SSLError):
        return f"{host} doesn't speak TLS as it should: is it https at this port?"
    return (
        f"nothing answers at {host} ({type(cause or error).__name__}): is `web` running, and is this its address? For "
        "a receiver elsewhere: --url https://your.host"
    )


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _shown(text: object) -> str:
    return visible(str(text))[:SHOWN]


def ready(client: httpx.Client, base: str) -> Iterator[Line]:
    """Whether the receiver is alive and ready, by /healthz and /readyz."""
    yield _asked(client, base, "/healthz", "alive")
    yield _asked(client, base, "/readyz", "ready")


def _asked(client: httpx.Client, base: str, path: str, wanted: str) -> Line:
    name = path.removeprefix("/")
    try:
        answer = ask(client, "GET", base + path)
    except SyncError as error:
        return noted(name, "fail", str(error))
    problems = answer.said.get("problems")
    if answer.status == 200 and answer.said.get("status") == wanted:
        return noted(name, "pass", f"{wanted}, answered within {_ms(answer.seconds)}")
    if answer.status == 503 and isinstance(problems, list) and problems:
        return Line(name, "fail", tuple(_shown(problem) for problem in problems[:10]))
    if 300 <= answer.status < 400:
        return noted(name, "fail", _redirected(answer))
    if answer.status >= 500:
        return noted(name, "fail", f"{answer.status}: {_no_web(base)}")
    # Whoever lets nobody ask has nothing to mend: whether an event gets through shows with the event.
    return noted(
        name,
        "warning",
        f"{base}{path} answers {answer.status}, but not as clerk-sync does. If only {ENDPOINT} is let through, "
        "that is well; otherwise the address is wrong, or leads to something else",
    )


def _redirected(answer: Answer) -> str:
    target = urlsplit(answer.location)
    where = f" to {_shown(f'{target.scheme}://{target.netloc}{target.path}')}" if target.netloc else ""
    return (
        f"a redirect ({answer.status}){where}, which Svix doesn't follow: name the address that answers itself, here "
        "and in Clerk's Dashboard"
    )


def _no_web(base: str) -> str:
    return f"something answers at {base}, but reaches no receiver: is `web` running, and does the proxy know its port?"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def refusal(answer: Answer, endpoint: str) -> str | None:  # noqa: PLR0911 - a list of answers
    """What is wrong with the answer to a signed delivery, and what to do; None where it was taken."""
    status, said = answer.status, answer.said.get("status")
    if status in (200, 202) and said in ("accepted", "duplicate"):
        return None
    if status == 200 and said == "ignored":
        return "the receiver takes it for another instance's: give it and this command the same CLERK_INSTANCE_ID"
    if status == 202 and said == "dead":
        return "the receiver couldn't use the event: does it run another version of clerk-sync than this one?"
    if 300 <= status < 400:
        return _redirected(answer)
    if status == 400 and "no signature matches" in answer.problem:
        return (
            "the signature doesn't match (400). Either the receiver has another CLERK_WEBHOOK_SIGNING_SECRET than this "
            "command: compare them. Or a proxy on the way changes the body (JSON that is parsed and written anew, a "
            "firewall, compression): let it pass untouched"
        )
    if status == 400 and "minutes off" in answer.problem:
        return "the clocks of this machine and the receiver's are over 5 minutes apart (400): set both by NTP"
    if status == 400 and "missing" in answer.problem:
        return (
            "the signature didn't arrive (400): let the proxy pass the headers svix-id, svix-timestamp, svix-signature"
        )
    if status == 503 and answer.problem:
        return "the receiver can't commit it to Postgres (503): see /readyz, and the log of `web`"
    if status >= 500:
        return f"{status}: {_no_web(endpoint.removesuffix(ENDPOINT))}"
    if status in (401, 403, 429):
        return (
            f"something before the receiver refuses it ({status}), such as a login, a firewall or a limit: let "
            f"{ENDPOINT} through"
        )
    if status == 404 or status < 300:
        return f"it isn't clerk-sync that answers at {endpoint} ({status}): the address must end in {ENDPOINT}, exactly"
    return f"refused ({status}){': ' if answer.problem else ''}{answer.problem}"


# --- A user made up


@dataclass(frozen=True, slots=True)
class Probe:
    """A user made up, and what leads to the receiver and to the row.

    `sign` makes the headers of a delivery, by secret, svix-id and body. `wait_seconds` is how long a worker may take;
    `observe` is told meanwhile what is waited for, the seconds passed, and the limit.
    """

    connection: Connection
    client: httpx.Client
    base: str
    secrets: Sequence[str] = field(repr=False)
    token: str
    sign: Callable[[str, str, bytes], Mapping[str, str]]
    instance_id: str | None = None
    wait_seconds: float = 30.0
    observe: Callable[[str, float, float], object] = lambda _what, _passed, _limit: None
    pause: Callable[[float], object] = time.sleep

    @property
    def user_id(self) -> str:
        """The user, whose id Clerk never gives."""
        return RESERVED + self.token

    @property
    def endpoint(self) -> str:
        """Where Svix would post."""
        return self.base + ENDPOINT

    def svix_id(self, number: int) -> str:
        """The id of one of its deliveries."""
        return f"msg_clerk_sync_check_{self.token}_{number}"


def created(user_id: str, at_ms: int, instance_id: str | None) -> bytes:
    """A `user.created` as Clerk sends it. Whoever reads and writes it anew changes it: the numbers, if nothing else."""
    metadata = {"clerk_sync_check": True, "text": "Grüße, 世界 </>&", "number": 9007199254740993, "decimal": 1.0}
    user = {
        "backup_code_enabled": False,
        "banned": False,
        "created_at": at_ms,
        "email_addresses": [],
        "external_accounts": [],
        "external_id": None,
        "first_name": None,
        "has_image": False,
        "id": user_id,
        "image_url": "https://img.clerk.com/blank",
        "last_name": None,
        "last_sign_in_at": None,
        "locked": False,
        "object": "user",
        "password_enabled": False,
        "phone_numbers": [],
        "primary_email_address_id": None,
        "primary_phone_number_id": None,
        "private_metadata": metadata,
        "public_metadata": {"clerk_sync_check": True},
        "two_factor_enabled": False,
        "unsafe_metadata": {},
        "updated_at": at_ms,
        "username": None,
        "web3_wallets": [],
    }
    return _envelope("user.created", user, at_ms, instance_id)


def deleted(user_id: str, at_ms: int, instance_id: str | None) -> bytes:
    """A `user.deleted` as Clerk sends it."""
    return _envelope("user.deleted", {"deleted": True, "id": user_id, "object": "user"}, at_ms, instance_id)


def _envelope(event_type: str, data: object, at_ms: int, instance_id: str | None) -> bytes:
    body: dict[str, Any] = {"data": data, "object": "event", "timestamp": at_ms, "type": event_type}
    if instance_id:
        body["instance_id"] = instance_id
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


STEPS: Final = ("delivery", "row", "repeat", "deletion")
"""What happens to the user, in this order: after a failure the others are skipped."""


def send_through(probe: Probe) -> Iterator[Line]:
    """Send the user through, step by step; `remove` is to follow, whatever comes of it. Raises psycopg.Error."""
    at_ms = int(time.time() * 1000)
    body = created(probe.user_id, at_ms, probe.instance_id)
    probe.sign(probe.secrets[0], probe.svix_id(1), body)  # the first one may load a library, which takes a second
    started = time.monotonic()
    steps: dict[str, Callable[[], Line]] = {
        "delivery": lambda: _delivery(probe, body),
        "row": lambda: _row(probe, started),
        "repeat": lambda: _repeat(probe, body),
        "deletion": lambda: _deletion(probe, at_ms + 1),
    }
    failed = ""
    for name in STEPS:
        line = noted(name, "skipped", f"{failed} failed") if failed else steps[name]()
        failed = failed or (name if line.state == "fail" else "")
        yield line


def _post(probe: Probe, number: int, body: bytes, secret: str) -> tuple[Answer | None, str | None]:
    """The answer to a delivery, and what is wrong with it."""
    svix_id = probe.svix_id(number)
    try:
        answer = ask(probe.client, "POST", probe.endpoint, body, probe.sign(secret, svix_id, body))
    except SyncError as error:
        return None, str(error)
    return answer, refusal(answer, probe.endpoint)


def _delivery(probe: Probe, body: bytes) -> Line:
    answer, problem = _post(probe, 1, body, probe.secrets[0])
    if answer is None or problem:
        return noted("delivery", "fail", problem or "")
    return noted("delivery", "pass", f"user.created accepted ({answer.status}) within {_ms(answer.seconds)}")


SEEN = """
select exists (select from clerk.user_metadata where user_id = %(user_id)s)
"""
MAY_SEE = """
select has_table_privilege('clerk.user_metadata', 'select')
"""


def _visible(probe: Probe, *, by_view: bool) -> bool:
    """Whether the user has a row: in the view, or, for a login that may not read that, in what it shows."""
    if not by_view:
        return bool(users.live(probe.connection, [probe.user_id]))
    return probe.connection.execute(SEEN, {"user_id": probe.user_id}).fetchone() == (True,)


def _row(probe: Probe, started: float) -> Line:
    by_view = probe.connection.execute(MAY_SEE).fetchone() == (True,)
    # Looked for at once: what was accepted is committed.
    if inbox.show(probe.connection, probe.svix_id(1)) is None and not _visible(probe, by_view=by_view):
        return noted(
            "row",
            "fail",
            "the event was accepted, but isn't in this database: the receiver writes to another one. Give it and "
            f"this command the same DATABASE_URL; a check with the other one removes {probe.user_id} there",
        )
    if problem := _await(probe, 1, "the row", lambda: _visible(probe, by_view=by_view)):
        return noted("row", "fail", problem)
    what = "in clerk.user_metadata" if by_view else "(this login may not read the view: looked for in clerk.users)"
    return noted("row", "pass", f"visible {what} {_ms(time.monotonic() - started)} after it was sent")


BEHIND = """
select count(*) from clerk.webhook_events where state = 'pending' and received_at < %(received_at)s
"""


def _await(probe: Probe, number: int, what: str, arrived: Callable[[], bool]) -> str | None:
    """Wait until a delivery has had its effect; else why it hasn't."""
    started = time.monotonic()
    while not arrived():
        event = inbox.show(probe.connection, probe.svix_id(number))
        if event and event.state == "dead":
            return f"the worker set the event aside: {event.error}"
        # Only what was looked for after the event was done is missing.
        if event and event.state == "done" and not arrived():
            return (
                f"the event was applied, but {what} isn't as it should be: did something else change it at this moment?"
            )
        passed = time.monotonic() - started
        if passed >= probe.wait_seconds:
            return _not_applied(probe, event)
        probe.observe(what, passed, probe.wait_seconds)
        probe.pause(LOOK_SECONDS)
    return None


def _not_applied(probe: Probe, event: inbox.Listed | None) -> str:
    if event is None:
        return "the event has left the inbox without an effect: is another clerk-sync check running?"
    ((before,),) = probe.connection.execute(BEHIND, {"received_at": event.received_at}).fetchall()
    waited = f"the event stands in the inbox, but no worker applied it within {probe.wait_seconds:g} s"
    if before:
        return (
            f"{waited} (waiting before it: {before:,}). Is `worker` running, with this DATABASE_URL? Its log "
            "says why it can't work. If it is only behind: --wait"
        )
    return f"{waited}: is `worker` running, with this DATABASE_URL? Its log says why it can't work"


def _repeat(probe: Probe, body: bytes) -> Line:
    """The same delivery once more. While a secret is rotated, signed with the others: the receiver has to know each."""
    others = list(enumerate(probe.secrets[1:], 2)) or [(1, probe.secrets[0])]
    said = []
    for number, secret in others:
        answer, problem = _post(probe, 1, body, secret)
        by = f"signed with secret {number} of {len(probe.secrets)}: " if number > 1 else ""
        if answer is None or problem:
            return noted("repeat", "fail", f"{by}{problem}")
        said.append(f"{by}{answer.said['status']} ({answer.status})")
    return noted("repeat", "pass", "the same delivery again, " + ", ".join(said))


def _deletion(probe: Probe, at_ms: int) -> Line:
    started = time.monotonic()
    answer, problem = _post(probe, 2, deleted(probe.user_id, at_ms, probe.instance_id), probe.secrets[0])
    if answer is None or problem:
        return noted("deletion", "fail", problem or "")
    if problem := _await(probe, 2, "the row's end", lambda: not users.live(probe.connection, [probe.user_id])):
        return noted("deletion", "fail", problem)
    return Line(
        "deletion", "pass", (f"the row was gone {_ms(time.monotonic() - started)} after user.deleted was sent",)
    )


# --- Removing what is left

# Of others only what is older than any check lasts: one may be running. Whoever applies one of these events holds its
# row, so this waits for them, and nothing brings the user back afterwards.
REMOVE_EVENTS = """
delete from clerk.webhook_events
where starts_with(svix_id, 'msg_clerk_sync_check_') and starts_with(user_id, 'user_clerk_sync_check_')
  and (user_id = %(user_id)s or received_at < now() - interval '15 minutes')
returning user_id
"""
LEFT = """
select user_id, deleted_at is null
from clerk.users
where starts_with(user_id, 'user_clerk_sync_check_')
  and (user_id = any(%(user_ids)s) or synced_at < now() - interval '15 minutes')
order by user_id collate "C"
for update
"""
MAY_REMOVE = """
select has_table_privilege('clerk.users', 'delete')
"""
REMOVE_TOMBSTONES = """
delete from clerk.users
where user_id = any(%(user_ids)s) and starts_with(user_id, 'user_clerk_sync_check_') and deleted_at is not null
"""


def remove(connection: Connection, user_id: str) -> Line:
    """Remove every trace of a user that was made up, and of those whom earlier checks left behind. Raises
    psycopg.Error."""
    with connection.transaction():
        removed = {name for (name,) in connection.execute(REMOVE_EVENTS, {"user_id": user_id})}
        left = dict(connection.execute(LEFT, {"user_ids": [user_id, *removed]}).fetchall())
        now = int(time.time() * 1000)
        users.gate_deletions(connection, [UserDeleted(name, now) for name, live in left.items() if live])
        may = connection.execute(MAY_REMOVE).fetchone() == (True,)
        if may:
            connection.execute(REMOVE_TOMBSTONES, {"user_ids": list(left)})
    earlier = len((removed | {name for name, live in left.items() if live or may}) - {user_id})
    notes = ["no trace is left" if may or not left else "its events and its metadata are gone"]
    if left and not may:
        notes.append(
            f"tombstones of such users that stay: {len(left)}. This login may not take them out of clerk.users. They "
            "are harmless; a check with the login that migrates removes them"
        )
    if earlier:
        notes.append(f"removed what {earlier} earlier check{'s' if earlier > 1 else ''} had left")
    return Line("removal", "pass", tuple(notes))
