"""The stand-in for Clerk's Backend API answers as Clerk does: what the pulling commands are tested against."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.waiting import until
from worker.standin import Call, StandIn

KEY = "sk_test_of_these_tests"
T0 = 1_700_000_000_000
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; to load the certificates takes 0.1 s for each client

Clients = Callable[[StandIn], httpx.Client]


@pytest.fixture
def clerk() -> Iterator[StandIn]:
    with StandIn(KEY, limit=10_000) as standin:
        yield standin


@pytest.fixture
def client_of() -> Iterator[Clients]:
    """Makes clients that have the key, and close after the test."""
    made: list[httpx.Client] = []

    def make(standin: StandIn) -> httpx.Client:
        headers = {"Authorization": f"Bearer {standin.secret_key}"}
        made.append(httpx.Client(base_url=standin.url, headers=headers, verify=NO_TLS))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(clerk: StandIn, client_of: Clients) -> httpx.Client:
    return client_of(clerk)


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [user["id"] for user in answer.json()]


def code(answer: httpx.Response) -> tuple[int, str]:
    """The status and Clerk's code, in Clerk's shape."""
    (error,) = answer.json()["errors"]
    assert error["message"]
    assert error["long_message"]
    return answer.status_code, error["code"]


def sweep(client: httpx.Client, limit: int = 3, **parameters: Any) -> Iterator[list[str]]:
    """The pages that the cursor gives, until one is short."""
    cursor: dict[str, str] = {}
    while True:
        answer = client.get("/v1/users", params={"order_by": "+created_at", "limit": limit, **cursor, **parameters})
        page = ids(answer)
        yield page
        if len(page) < limit:
            return
        cursor = {"starting_after": page[-1]}


def three(clerk: StandIn) -> None:
    """Users whose names, creations and updates are in three different orders."""
    clerk.put({"id": "user_a", "created_at": T0 + 1, "updated_at": T0 + 30, "first_name": "Grace"})
    clerk.put({"id": "user_b", "created_at": T0 + 2, "updated_at": T0 + 10, "first_name": None})
    clerk.put({"id": "user_c", "created_at": T0 + 3, "updated_at": T0 + 20, "first_name": "Ada"})


# --- One user


def test_a_user_is_answered_whole_with_what_clerk_gives_every_user(
    clerk: StandIn, client: httpx.Client, data: Any
) -> None:
    clerk.put({"id": "user_a", "private_metadata": {"plan": "größer", "big": 2**60}})
    recorded = json.loads((data / "backend_api__get_user.json").read_text("utf-8"))
    user = client.get("/v1/users/user_a").json()
    assert user["private_metadata"] == {"plan": "größer", "big": 2**60}
    assert set(recorded) <= set(user)
    assert user["created_at"] == user["updated_at"] > T0


def test_a_user_that_is_recorded_comes_back_as_it_was(clerk: StandIn, client: httpx.Client, data: Any) -> None:
    recorded = json.loads((data / "backend_api__get_user.json").read_text("utf-8"))
    clerk.put(recorded)
    user = client.get(f"/v1/users/{recorded['id']}").json()
    assert recorded.items() <= user.items()


def test_a_user_who_never_was_or_is_deleted_is_404(clerk: StandIn, client: httpx.Client) -> None:
    assert code(client.get("/v1/users/user_a")) == (404, "resource_not_found")
    clerk.put({"id": "user_a"})
    clerk.delete("user_a")
    assert code(client.get("/v1/users/user_a")) == (404, "resource_not_found")
    assert code(client.get("/v1/organizations")) == (404, "resource_not_found")


def test_an_update_moves_the_version_and_merges_metadata(clerk: StandIn, client: httpx.Client) -> None:
    clerk.put({"id": "user_a", "updated_at": T0, "public_metadata": {"a": {"b": 1, "c": 2}, "d": 3}, "last_name": "L"})
    clerk.update("user_a", at=T0 + 5, public_metadata={"a": {"b": None, "e": 4}, "d": None}, last_name=None)
    user = client.get("/v1/users/user_a").json()
    assert (user["public_metadata"], user["last_name"]) == ({"a": {"c": 2, "e": 4}}, None)
    assert user["updated_at"] == T0 + 5
    clerk.update("user_a")
    assert client.get("/v1/users/user_a").json()["updated_at"] > T0 + 5


def test_metadata_is_merged_and_the_whole_user_answered(clerk: StandIn, client: httpx.Client) -> None:
    clerk.put({"id": "user_a", "updated_at": T0, "private_metadata": {"plan": "free", "n": {"a": 1}}})
    changes = {"private_metadata": {"plan": None, "n": {"b": 2}}, "public_metadata": {"role": "admin"}}
    answer = client.patch("/v1/users/user_a/metadata", json=changes)
    assert answer.status_code == 200
    user = answer.json()
    assert user == client.get("/v1/users/user_a").json()
    assert user["private_metadata"] == {"n": {"a": 1, "b": 2}}
    assert user["public_metadata"] == {"role": "admin"}
    assert user["updated_at"] > T0


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        ("/v1/users/user_b/metadata", b"{}", 404),
        ("/v1/users/user_a", b"{}", 404),
        ("/v1/users/user_a/metadata", b"nonsense", 422),
        ("/v1/users/user_a/metadata", b'{"private_metadata": 1}', 422),
        ("/v1/users/user_a/metadata", b'{"first_name": {}}', 422),
    ],
)
def test_what_cannot_be_merged_changes_nothing(
    clerk: StandIn, client: httpx.Client, path: str, content: bytes, expected: int
) -> None:
    clerk.put({"id": "user_a", "updated_at": T0})
    before = clerk.users
    assert client.patch(path, content=content).status_code == expected
    assert clerk.users == before


def test_an_odd_user_is_answered_as_it_is_and_keeps_his_place(clerk: StandIn, client: httpx.Client) -> None:
    three(clerk)
    clerk.odd("user_b", b'{"id":"user_b","private_metadata":"text"}')
    assert ids(client.get("/v1/users")) == ["user_c", "user_b", "user_a"]
    assert ids(client.get("/v1/users", params={"order_by": "email_address"})) == ["user_a", "user_b", "user_c"]
    clerk.odd("user_b", b"{")
    assert client.get("/v1/users/user_b").text == "{"
    assert client.get("/v1/users", params={"order_by": "username"}).status_code == 200


# --- The list


def test_the_list_is_a_bare_array_newest_first_ten_at_a_time(clerk: StandIn, client: httpx.Client) -> None:
    made = clerk.fill(25)
    assert ids(client.get("/v1/users")) == made[::-1][:10]
    assert ids(client.get("/v1/users", params={"limit": 500})) == made[::-1]
    assert ids(client.get("/v1/users", params={"limit": 10, "offset": 20})) == made[::-1][20:]
    assert ids(client.get("/v1/users", params={"offset": 25})) == []
    assert [json.loads(user)["id"] for user in clerk.users.values()] == list(clerk.users)


def test_a_limit_over_500_silently_gives_10(clerk: StandIn, client: httpx.Client) -> None:
    clerk.fill(20)
    assert len(ids(client.get("/v1/users", params={"limit": 501}))) == 10


@pytest.mark.parametrize(
    ("order_by", "expected"),
    [
        ("created_at", "abc"),
        ("+created_at", "abc"),
        ("-created_at", "cba"),
        ("+updated_at", "bca"),
        ("-updated_at", "acb"),
        ("first_name", "cab"),
        ("-first_name", "bac"),
        ("last_sign_in_at", "abc"),
    ],
)
def test_every_order_has_its_direction(clerk: StandIn, client: httpx.Client, order_by: str, expected: str) -> None:
    three(clerk)
    wanted = [f"user_{name}" for name in expected]
    for size in (1, 2, 3):
        pages = [
            ids(client.get("/v1/users", params={"order_by": order_by, "limit": size, "offset": offset}))
            for offset in range(0, 3, size)
        ]
        assert [user_id for page in pages for user_id in page] == wanted


def test_only_the_first_order_counts(clerk: StandIn, client: httpx.Client) -> None:
    three(clerk)
    assert ids(client.get("/v1/users?order_by=updated_at&order_by=-nonsense")) == ["user_b", "user_c", "user_a"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("order_by=nonsense", "form_param_value_invalid"),
        ("order_by=+created_at", "form_param_value_invalid"),  # not encoded: a space
        ("limit=0", "form_param_value_invalid"),
        ("limit=many", "form_param_type_invalid"),
        ("offset=-1", "form_param_type_invalid"),
        ("created_at_after=today", "form_param_type_invalid"),
        ("starting_after=user_a&offset=0", "form_conditional_param_disallowed"),
        ("starting_after=user_a&order_by=-updated_at", "form_conditional_param_disallowed"),
        ("starting_after=user_gone", "form_resource_not_found"),
        ("&".join(f"user_id=user_{number}" for number in range(101)), "form_param_duplicate"),
    ],
)
def test_what_cannot_be_asked_is_422(clerk: StandIn, client: httpx.Client, query: str, expected: str) -> None:
    three(clerk)
    assert code(client.get(f"/v1/users?{query}")) == (422, expected)


def test_a_filter_the_stand_in_lacks_is_refused_and_what_clerk_does_not_know_is_ignored(
    clerk: StandIn, client: httpx.Client
) -> None:
    three(clerk)
    assert client.get("/v1/users?banned=true").status_code == 501
    assert client.get("/v1/users/count?query=ada").status_code == 501
    assert len(ids(client.get("/v1/users?user_id[0]=user_a"))) == 3


# --- Filters and the count


def test_users_are_asked_for_by_id_and_unknown_ones_are_ignored(clerk: StandIn, client: httpx.Client) -> None:
    made = clerk.fill(120)
    asked = [*made[:99], "user_gone"]
    assert ids(client.get("/v1/users", params={"user_id": asked, "limit": 100})) == made[:99][::-1]
    assert len(ids(client.get("/v1/users", params={"user_id": asked}))) == 10
    assert ids(client.get("/v1/users", params={"user_id": "user_gone"})) == []


def test_a_sign_before_an_id_includes_or_excludes_him(clerk: StandIn, client: httpx.Client) -> None:
    three(clerk)
    assert ids(client.get("/v1/users", params={"user_id": ["-user_b"]})) == ["user_c", "user_a"]
    assert ids(client.get("/v1/users", params={"user_id": ["+user_b", "user_a"]})) == ["user_b", "user_a"]
    assert ids(client.get("/v1/users", params={"user_id": ["user_b", "user_a", "-user_a"]})) == ["user_b"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", 3),
        ("user_id=user_a&user_id=user_gone", 1),
        ("user_id=-user_a", 2),
        (f"created_at_after={T0 + 1}", 2),
        (f"created_at_before={T0 + 3}&created_at_after={T0 + 1}", 1),
    ],
)
def test_the_count_takes_the_filters_of_the_list(
    clerk: StandIn, client: httpx.Client, query: str, expected: int
) -> None:
    three(clerk)
    assert client.get(f"/v1/users/count?{query}").json() == {"object": "total_count", "total_count": expected}
    assert len(ids(client.get(f"/v1/users?{query}"))) == expected


def test_the_count_follows_what_comes_and_goes(clerk: StandIn, client: httpx.Client) -> None:
    made = clerk.fill(5)
    clerk.delete(made[2])
    clerk.put({"id": made[3]})
    assert client.get("/v1/users/count").json()["total_count"] == len(clerk.users) == 4


# --- The cursor


@pytest.mark.parametrize("order_by", ["+created_at", "-created_at"])
@pytest.mark.parametrize("limit", [1, 3, 4, 500])
def test_the_cursor_gives_the_whole_list(clerk: StandIn, client: httpx.Client, order_by: str, limit: int) -> None:
    made = clerk.fill(20)  # always two of the same millisecond
    pages = list(sweep(client, limit, order_by=order_by))
    wanted = made if order_by == "+created_at" else made[::-1]
    assert [user_id for page in pages for user_id in page] == wanted


def test_the_cursor_works_with_a_filter_that_its_user_does_not_match(clerk: StandIn, client: httpx.Client) -> None:
    made = clerk.fill(6)
    asked = {"user_id": [made[0], made[4]], "order_by": "created_at", "starting_after": made[2]}
    assert ids(client.get("/v1/users", params=asked)) == [made[4]]


def test_whoever_stays_is_swept_exactly_once_whatever_happens_between_the_pages(
    clerk: StandIn, client: httpx.Client
) -> None:
    made = clerk.fill(30)
    gone, late = set(), []
    swept: list[str] = []
    for number, page in enumerate(sweep(client)):
        swept += page
        if number < 6:
            clerk.delete(made[3 * number])  # behind the cursor
            clerk.delete(made[29 - number])  # ahead of it
            gone |= {made[3 * number], made[29 - number]}
            clerk.update(made[3 * number + 1], first_name="Ada")
            clerk.put({"id": f"user_late{number}", "created_at": 2 * T0 + number})
            late.append(f"user_late{number}")
    assert len(swept) == len(set(swept))
    assert set(swept) >= (set(made) - gone) | set(late)
    assert [user_id for user_id in swept if user_id in made] == [user_id for user_id in made if user_id in swept]


def test_an_offset_skips_a_user_when_one_before_it_goes(clerk: StandIn, client: httpx.Client) -> None:
    made = clerk.fill(6)
    first = ids(client.get("/v1/users?order_by=created_at&limit=3"))
    clerk.delete(made[0])
    second = ids(client.get("/v1/users?order_by=created_at&limit=3&offset=3"))
    assert set(made) - {*first, *second} == {made[3]}


@pytest.mark.parametrize("status", [422, 404, 200])
def test_a_cursor_whose_user_went_is_answered_as_the_test_wants(status: int, client_of: Clients) -> None:
    with StandIn(KEY, lost_cursor=status) as clerk:
        made = clerk.fill(5)
        clerk.delete(made[1])
        answer = client_of(clerk).get("/v1/users", params={"order_by": "created_at", "starting_after": made[1]})
        assert answer.status_code == status
        if status == 200:
            assert answer.json() == []


def test_something_changes_in_the_middle_of_a_sweep(clerk: StandIn, client: httpx.Client) -> None:
    made = clerk.fill(9)

    def before(call: Call) -> None:
        if call.query.get("starting_after") == [made[2]]:
            clerk.delete(made[3])

    clerk.before = before
    assert [user_id for page in sweep(client) for user_id in page] == [*made[:3], *made[4:]]


def test_what_a_tests_own_hook_raises_reaches_the_test(client_of: Clients) -> None:
    def before(call: Call) -> None:
        raise AssertionError(call.path)

    def ask() -> None:
        with StandIn(KEY) as clerk:
            clerk.before = before
            with pytest.raises(httpx.RemoteProtocolError):
                client_of(clerk).get("/v1/users")

    with pytest.raises(AssertionError, match="/v1/users"):
        ask()


# --- The key, the headers, the limit, failures


def test_without_the_key_it_is_401(clerk: StandIn) -> None:
    url = f"{clerk.url}/v1/users"
    assert code(httpx.get(url)) == (401, "authorization_header_format_invalid")
    assert code(httpx.get(url, headers={"Authorization": KEY})) == (401, "authorization_header_format_invalid")
    assert code(httpx.get(url, headers={"Authorization": "Bearer sk_test_other"})) == (401, "clerk_key_invalid")


def test_an_answer_has_a_date_and_the_connection_stays(clerk: StandIn, client: httpx.Client) -> None:
    answer = client.get("/v1/users", headers={"Clerk-API-Version": "2026-05-12"})
    assert answer.http_version == "HTTP/1.1"
    assert answer.headers["Date"].endswith("GMT")
    assert answer.headers["Content-Type"] == "application/json"
    assert "Connection" not in answer.headers
    assert clerk.calls[-1].version == "2026-05-12"


def test_the_limit_is_clerks_own_for_the_kind_of_key() -> None:
    with StandIn("sk_test_a") as development, StandIn("sk_live_a") as production:
        assert (development.limit, development.window) == (100, 10.0)
        assert (production.limit, production.window) == (1000, 10.0)


def test_over_the_limit_it_is_429_until_the_window_has_passed(client_of: Clients) -> None:
    with StandIn(KEY, limit=3, window=0.3) as clerk:
        client = client_of(clerk)
        assert [client.get("/v1/users/count").status_code for _ in range(3)] == [200] * 3
        answer = client.get("/v1/users/count")
        assert code(answer) == (429, "too_many_requests")
        assert answer.headers["Retry-After"] == "1"  # whole seconds, rounded up
        until(lambda: client.get("/v1/users/count").status_code == 200)
        assert clerk.calls[-1].at - clerk.calls[0].at >= 0.3
        assert len(clerk.calls) == 4 + len(clerk.refused)


def test_retry_after_says_when_a_request_is_taken_again(client_of: Clients) -> None:
    with StandIn(KEY, limit=2, window=10.0) as clerk:
        client = client_of(clerk)
        assert [client.get("/v1/users").status_code for _ in range(3)] == [200, 200, 429]
        assert client.get("/v1/users/user_a").headers["Retry-After"] == "10"
        assert len(clerk.refused) == 2


def test_a_request_without_the_key_takes_nothing_of_the_limit(client_of: Clients) -> None:
    with StandIn(KEY, limit=1) as clerk:
        assert [httpx.get(f"{clerk.url}/v1/users").status_code for _ in range(3)] == [401] * 3
        assert client_of(clerk).get("/v1/users").status_code == 200


def test_calls_are_counted_by_path_and_by_time(clerk: StandIn, client: httpx.Client) -> None:
    for path in ("/v1/users", "/v1/users", "/v1/users/count", "/v1/users/user_a"):
        client.get(path, params={"limit": "7"})
    assert clerk.count_by_path() == {"/v1/users": 2, "/v1/users/count": 1, "/v1/users/user_a": 1}
    assert clerk.calls[0].query == {"limit": ["7"]}
    assert clerk.most_within(60) == 4
    assert clerk.most_within(1e-9) == 1
    clerk.forget_calls()
    assert (clerk.calls, clerk.most_within(60)) == ([], 0)


@pytest.mark.parametrize(("status", "retry_after"), [(503, None), (429, 7), (500, None)])
def test_as_many_requests_fail_as_the_test_wants(
    clerk: StandIn, client: httpx.Client, status: int, retry_after: int | None
) -> None:
    clerk.fail(next=2, status=status, retry_after=retry_after)
    answers = [client.get("/v1/users") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [status, status, 200]
    assert answers[0].headers.get("Retry-After") == (None if retry_after is None else str(retry_after))
    assert code(answers[0])[0] == status


def test_slow_answers_outlast_a_clients_patience(clerk: StandIn, client: httpx.Client) -> None:
    clerk.slow(30)
    with pytest.raises(httpx.ReadTimeout):
        client.get("/v1/users", timeout=0.05)
    clerk.slow(0)
    assert client.get("/v1/users").status_code == 200


def test_a_stand_in_that_is_closed_answers_nobody(client_of: Clients) -> None:
    with StandIn(KEY) as clerk:
        client = client_of(clerk)
        client.get("/v1/users")
    with pytest.raises(httpx.TransportError):
        client.get("/v1/users")


# --- Size and speed


def test_filled_users_are_whole_and_carry_their_metadata(clerk: StandIn, client: httpx.Client) -> None:
    made = clerk.fill(3, private=lambda at: b'{"number":%d}' % at, public=b'{"plan":"pro"}')
    made += clerk.fill(2)
    clerk.put({"id": "user_a"})
    users = client.get("/v1/users?order_by=created_at").json()
    assert [user["id"] for user in users] == [*made, "user_a"]
    assert all(list(user) == list(users[-1]) for user in users)
    assert sorted(user["private_metadata"].get("number", -1) for user in users) == [-1, -1, -1, 0, 1, 2]
    assert users[0]["public_metadata"] == {"plan": "pro"}
    assert users[0]["created_at"] == users[1]["created_at"] < users[2]["created_at"]
    assert all(user["updated_at"] >= user["created_at"] for user in users)


def test_many_users_are_made_and_paged_through_fast(clerk: StandIn, client: httpx.Client) -> None:
    started = time.monotonic()
    made = clerk.fill(100_000, private=b'{"plan":"pro"}')
    filled = time.monotonic()
    cursor: dict[str, str] = {}
    for number in range(200):
        answer = client.get("/v1/users", params={"order_by": "+created_at", "limit": 500, **cursor})
        cursor = {"starting_after": made[500 * number + 499]}
        assert answer.content.startswith(b'[{"id":"%s"' % made[500 * number].encode())
        assert answer.content.count(b'"object":"user"') == 500
    paged = time.monotonic()
    assert filled - started < 10
    assert paged - filled < 10, "20 pages a second are the least"


def test_many_clients_and_changes_at_once_do_no_harm(clerk: StandIn, client_of: Clients) -> None:
    made = clerk.fill(400)
    stays = set(made[::2])
    wrong: list[set[str]] = []

    def read() -> None:
        client = client_of(clerk)
        wrong.extend(stays - {user_id for page in sweep(client, 500) for user_id in page} for _ in range(10))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for gone, kept in zip(made[1::2], made[::2], strict=True):
        clerk.delete(gone)
        clerk.update(kept, first_name="Ada")
    for reader in readers:
        reader.join()
    assert wrong == [set()] * 40


# --- By hand


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_started_by_hand_and_stops_when_told(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "worker.standin", "--users", "30", "--seconds", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))
        headers = {"Authorization": f"Bearer {said['CLERK_SECRET_KEY']}"}
        assert httpx.get(f"{said['CLERK_API_URL']}/v1/users/count", headers=headers).json()["total_count"] == 30
        process.send_signal(number)
        assert process.wait(10) == 0


def test_it_stops_by_itself_in_the_end() -> None:
    command = [sys.executable, "-m", "worker.standin", "--users", "0", "--seconds", "0"]
    assert subprocess.run(command, capture_output=True, check=True, timeout=30).stderr == b""
