"""`clerk-sync send`."""

from __future__ import annotations

import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import click
import httpx

from worker.cli.options import read_info, settings
from worker.errors import ConfigError, SyncError
from worker.signing import signing_secret_problem


def sign(secret: str, svix_id: str, body: bytes) -> dict[str, str]:
    """The headers with which Svix would deliver this body now."""
    # Loaded here: it takes a second, and only a command that signs needs it.
    from svix.webhooks import Webhook  # noqa: PLC0415

    now = datetime.now(tz=UTC)
    return {
        "content-type": "application/json",
        "svix-id": svix_id,
        "svix-timestamp": str(int(now.timestamp())),
        "svix-signature": Webhook(secret).sign(svix_id, now, body.decode()),
    }


def post(url: str, secret: str, svix_id: str, body: bytes) -> httpx.Response:
    """Sign and post one event, with the patience that Svix has. Raises SyncError where nobody answers."""
    try:
        return httpx.post(url, content=body, headers=sign(secret, svix_id, body), timeout=15)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SyncError(f"no answer from {url}: {type(error).__name__}") from None


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--url", help="The webhook endpoint. Default: /webhooks/clerk on this machine, at PORT (8000).")
@click.option("--secret", help="The signing secret, whsec_... Default: CLERK_WEBHOOK_SIGNING_SECRET.")
@click.option("--id", "svix_id", help="The svix-id; the same one again is the same delivery again. Default: new.")
@click.option(
    "--info",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Take URL and secret from what `clerk-sync up --info FILE` wrote.",
)
def send(file: IO[bytes], url: str | None, secret: str | None, svix_id: str | None, info: Path | None) -> None:
    """Sign the body in FILE (- for standard input) as Svix does and post it.

    \b
    clerk-sync send event.json
    clerk-sync send event.json --url https://app.example.com/webhooks/clerk --secret whsec_...

    Exits 0 where the answer is 2xx, 1 where it isn't.
    """
    body = file.read()
    try:
        body.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{file.name} is not UTF-8 text: Svix sends no other") from None
    if secret is None:
        secret = settings(info, "signing_secrets", claims=False).signing_secrets[0]
    problem = signing_secret_problem(secret)
    if problem:
        raise ConfigError(f"--secret: {problem}")
    if url is None:
        url = str(read_info(info).get("url") or f"http://127.0.0.1:{settings(info, claims=False).port}/webhooks/clerk")
    svix_id = svix_id or f"msg_{secrets.token_hex(14)}"
    response = post(url, secret, svix_id, body)
    click.echo(f"{response.status_code} {response.text.strip()} svix-id={svix_id}")
    sys.exit(0 if response.is_success else 1)
