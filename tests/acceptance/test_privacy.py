"""Nothing personal leaves by a side door: not in any output, not in the broker, not in metrics or what commands say."""

from __future__ import annotations

import socket
import urllib.parse

import redis

from tests.acceptance.system import CANARY, Client, System, new_user, now_ms, user_event
from tests.clerk import sign
from tests.waiting import until


def listen_to_broker(system: System) -> socket.socket:
    """A connection that gets to see every command that anybody sends to Redis."""
    url = urllib.parse.urlsplit(system.redis_url)
    listening = socket.create_connection((url.hostname, url.port or 0), timeout=10)
    listening.sendall(f"AUTH {url.password}\r\nMONITOR\r\n".encode())
    said = b""
    while said.count(b"+OK\r\n") < 2:
        said += listening.recv(4096)
    return listening


def test_broker_gets_a_wake_up_and_nothing_of_the_event(system: System, client: Client) -> None:
    user_id = new_user()
    system.settle()
    with listen_to_broker(system) as listening:
        sent = [client.deliver(user_event(user_id, now_ms(), {"n": number})) for number in range(20)]
        system.settle()
        with redis.Redis.from_url(system.redis_url) as broker:
            broker.echo("the end of it")
        said = b""
        while b"the end of it" not in said:
            said += listening.recv(65536)
    assert b"clerk.drain" in said, "the doorbell was rung"
    for secret in (CANARY, user_id, system.signing_secret, *(answer.svix_id for answer in sent)):
        assert secret.encode() not in said


def test_canary_comes_out_at_the_view_and_nowhere_else(system: System, client: Client) -> None:
    """The canary stands in all metadata, names, addresses and user agents of every event of these tests."""
    user_id = new_user()
    body = user_event(user_id, now_ms(), public={"large": CANARY * 200})
    answers = [client.deliver(body)]
    # Ways to go wrong: refused, unusable, of another type, too large.
    answers.append(client.post(body, {}))
    answers.append(client.post(body, sign("whsec_AAAA", body)))
    answers.append(client.deliver(body.replace(b'"private_metadata": {', b'"private_metadata": [', 1)))
    answers.append(client.deliver(body.replace(b'"updated_at": ', b'"updated_at": "%s", "x": ' % CANARY.encode(), 1)))
    answers.append(client.deliver(body.replace(b"user.updated", b"session.created")))
    answers.append(client.deliver(user_event(new_user(), now_ms(), {"large": CANARY * 200_000})))
    assert [answer.status for answer in answers] == [202, 400, 400, 202, 202, 200, 413]
    assert CANARY in str(until(lambda: system.rows(user_id)))
    dead = [answer.svix_id for answer in answers[3:5]]
    said = [answer.body.decode() for answer in answers]
    said += [str(system.event(svix_id)) for svix_id in dead]
    for command in (("status",), ("events", "list"), ("events", "show", dead[0]), ("events", "show", dead[1])):
        ran = system.command(*command, "--json")
        said += [ran.stdout, ran.stderr]
    said += [client.get(path).body.decode() for path in ("/metrics", "/readyz", "/healthz")]
    output = system.output
    assert answers[0].svix_id in output, "each delivery has its line"
    said.append(output)
    for text in said:
        assert CANARY not in text
        for secret in (system.signing_secret, system.database_url, system.redis_url):
            assert secret not in text
