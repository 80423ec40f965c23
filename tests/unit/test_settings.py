"""The environment, read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clerk import SECRET
from worker.errors import ConfigError
from worker.policy import Copy, Policy
from worker.settings import Settings

OTHER = SECRET[:-4] + "AAAA"
COMPLETE = {
    "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
    "DATABASE_URL": "postgresql://u:p4ss@h/d",
    "REDIS_URL": "redis://:p4ss@h/0",
}


def problems(env: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(env, need=("signing_secrets", "database_url", "redis_url"))
    return caught.value.problems


def test_the_defaults_are_the_contract_s() -> None:
    settings = Settings.from_env(COMPLETE)
    assert settings.signing_secrets == (SECRET,)
    assert settings.policy == Policy(Copy.ALWAYS, Copy.OVERSIZE, Copy.OVERSIZE, 1200)
    assert (settings.port, settings.instance_id) == (8000, None)


def test_every_missing_variable_is_named_in_one_error() -> None:
    found = " ".join(problems({}))
    assert "CLERK_WEBHOOK_SIGNING_SECRET" in found
    assert "DATABASE_URL" in found
    assert "REDIS_URL" in found


def test_missing_and_bad_ones_are_named_together() -> None:
    found = problems({"DATABASE_URL": "mysql://x", "PORT": "70000", "COPY_PUBLIC": "maybe", "LOG_FORMAT": "xml"})
    assert len(found) == 6
    assert any("COPY_PUBLIC" in problem and "always, oversize, never" in problem for problem in found)


def test_values_of_secrets_are_never_shown() -> None:
    bad = {"CLERK_WEBHOOK_SIGNING_SECRET": "whsec_s3cr3t!", "DATABASE_URL": "s3cr3t", "REDIS_URL": "s3cr3t"}
    assert "s3cr3t" not in " ".join(problems(bad))
    assert "p4ss" not in repr(Settings.from_env(COMPLETE))
    assert SECRET not in repr(Settings.from_env(COMPLETE))


@pytest.mark.parametrize("separator", [",", " ", ", ", "\n"])
def test_several_secrets_are_taken_while_one_is_rotated(separator: str) -> None:
    env = COMPLETE | {"CLERK_WEBHOOK_SIGNING_SECRET": SECRET + separator + OTHER}
    assert Settings.from_env(env).signing_secrets == (SECRET, OTHER)


def test_one_bad_secret_of_several_is_refused_by_its_number() -> None:
    (found,) = problems(COMPLETE | {"CLERK_WEBHOOK_SIGNING_SECRET": f"{SECRET} sk_test_abc"})
    assert "secret 2 of 2" in found


def test_the_older_name_of_the_secret_is_read_where_the_newer_is_unset() -> None:
    env = {"CLERK_WEBHOOK_SECRET": OTHER}
    assert Settings.from_env(env).signing_secrets == (OTHER,)
    assert Settings.from_env(env | {"CLERK_WEBHOOK_SIGNING_SECRET": SECRET}).signing_secrets == (SECRET,)


def test_a_secret_can_be_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    assert Settings.from_env({"CLERK_WEBHOOK_SIGNING_SECRET_FILE": str(path)}).signing_secrets == (SECRET,)


def test_a_file_that_cannot_be_read_is_one_problem_not_two(tmp_path: Path) -> None:
    env = {k: v for k, v in COMPLETE.items() if k != "DATABASE_URL"} | {"DATABASE_URL_FILE": str(tmp_path / "none")}
    (found,) = problems(env)
    assert "DATABASE_URL_FILE can't be read" in found


def test_a_variable_and_its_file_together_are_refused(tmp_path: Path) -> None:
    (found,) = problems(COMPLETE | {"REDIS_URL_FILE": str(tmp_path / "x")})
    assert "both set" in found


TEMPLATE = '{"role": "{{user.public_metadata.role}}", "org": "{{org.name}}"}'


def test_the_claims_template_is_given_as_json_or_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    path.write_text(f"\n{TEMPLATE}\n")
    for given in (TEMPLATE, f"@{path}"):
        template = Settings.from_env(COMPLETE | {"SESSION_CLAIMS": given}).policy.template
        assert template.shortcodes == (("user", "public_metadata", "role"), ("org", "name"))
    (found,) = problems(COMPLETE | {"SESSION_CLAIMS": f"@{tmp_path}/nowhere"})
    assert found.startswith("SESSION_CLAIMS: the file")


def test_every_error_of_a_template_is_named_with_its_position() -> None:
    template = '{"role": "{{user.pubic_metadata.role}}",\n "plan": "{{user.private_metadata.plan}}", "sub": 1}'
    found = problems(COMPLETE | {"SESSION_CLAIMS": template})
    assert [problem.split(": ")[:2] for problem in found] == [
        ["SESSION_CLAIMS", "line 1, column 11"],
        ["SESSION_CLAIMS", "line 2, column 11"],
        ["SESSION_CLAIMS", "line 2, column 44"],
    ]


def test_a_template_that_has_no_upper_bound_is_taken() -> None:
    template = Settings.from_env(COMPLETE | {"SESSION_CLAIMS": '{"m": "{{user.public_metadata}}"}'}).policy.template
    assert template.carries_public
    assert template.warnings


def test_what_no_user_tells_is_weighed_by_an_assumption_that_can_be_set() -> None:
    given = COMPLETE | {"SESSION_CLAIMS_ASSUMED_BYTES": '{"org.name": 60, "org.public_metadata.tier": 9}'}
    assert Settings.from_env(given).policy.assumed == {"org.name": 60, "org.public_metadata.tier": 9}


def test_a_shortcode_that_is_not_known_here_can_be_declared_with_its_bytes() -> None:
    claims = COMPLETE | {"SESSION_CLAIMS": '{"image": "{{user.has_image}}"}'}
    assert "user.has_image" in problems(claims)[0]
    policy = Settings.from_env(claims | {"SESSION_CLAIMS_ASSUMED_BYTES": '{"user.has_image": 5}'}).policy
    assert policy.template.shortcodes == (("user", "has_image"),)


@pytest.mark.parametrize(
    "given",
    [
        *("60", "[]", "{", '{"org name": 9}', '{"user.private_metadata.x": 9}', '{"name": 9}'),
        *('{"user.first_name": 9}', '{"org.name": 1}', '{"org.name": "60"}'),
    ],
)
def test_an_assumption_that_makes_no_sense_is_refused(given: str) -> None:
    (found,) = problems(COMPLETE | {"SESSION_CLAIMS_ASSUMED_BYTES": given})
    assert found.startswith("SESSION_CLAIMS_ASSUMED_BYTES: ")


KEY = "sk_test_s3cr3t"


def test_the_backend_api_is_clerk_s_own_and_half_of_its_rate_is_ours() -> None:
    settings = Settings.from_env({})
    assert (settings.secret_key, settings.api_url, settings.api_share) == ("", "https://api.clerk.com", 0.5)


def test_the_secret_key_is_needed_by_who_pulls_only() -> None:
    Settings.from_env(COMPLETE)
    with pytest.raises(ConfigError, match=r"^CLERK_SECRET_KEY is missing: "):
        Settings.from_env(COMPLETE, need=("secret_key",))


def test_the_secret_key_is_read_from_a_file_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    settings = Settings.from_env({"CLERK_SECRET_KEY_FILE": str(path)}, need=("secret_key",))
    assert settings.secret_key == KEY
    assert "s3cr3t" not in repr(settings)


@pytest.mark.parametrize(
    "key", ["pk_test_s3cr3t", "s3cr3t", "sk_", "sk_test_s3 cr3t", "sk_test_s3cr3t\nX: y", "sk_s3cr3tø"]
)
def test_what_is_no_secret_key_is_refused_without_showing_it(key: str) -> None:
    (found,) = problems(COMPLETE | {"CLERK_SECRET_KEY": key})
    assert found.startswith("CLERK_SECRET_KEY: ")
    assert "cr3t" not in found


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("https://api.clerk.com/", "https://api.clerk.com"),
        ("http://127.0.0.1:8123", "http://127.0.0.1:8123"),
        ("http://[::1]:8123/", "http://[::1]:8123"),
        ("http://localhost", "http://localhost"),
        ("https://stand-in_1", "https://stand-in_1"),
    ],
)
def test_the_api_s_address_is_a_host_with_or_without_a_port(given: str, url: str) -> None:
    assert Settings.from_env({"CLERK_API_URL": given}).api_url == url


@pytest.mark.parametrize(
    "given",
    [
        "api.clerk.com",
        "ftp://api.clerk.com",
        "http://api.clerk.com",
        "http://127.0.0.1.example.com",
        "https://",
        "https://api.clerk.com/v1",
        "https://api.clerk.com//",
        "https://api.clerk.com?x",
        "https://api.clerk.com#x",
        "https://user:s3cr3t@api.clerk.com",
        "https://api.clerk.com:0",
        "https://api.clerk.com:65536",
        "https://api.clerk.com:https",
        "https://api clerk.com",
    ],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    (found,) = problems(COMPLETE | {"CLERK_API_URL": given})
    assert found.startswith("CLERK_API_URL: ")
    assert "s3cr3t" not in found


@pytest.mark.parametrize(("given", "share"), [("0.01", 0.01), ("1", 1.0), ("1.0", 1.0), (".25", 0.25)])
def test_our_share_of_the_api_s_rate_can_be_set(given: str, share: float) -> None:
    assert Settings.from_env({"CLERK_API_SHARE": given}).api_share == share


@pytest.mark.parametrize(("given", "seconds"), [("", 300), ("0", 0), ("1", 1), ("86400", 86_400)])
def test_the_time_between_reconciles_can_be_set_and_0_is_off(given: str, seconds: int) -> None:
    assert Settings.from_env({"RECONCILE_SECONDS": given}).reconcile_seconds == seconds


@pytest.mark.parametrize("given", ["-1", "86401", "1.5", "5m", "off"])
def test_a_time_between_reconciles_that_is_none_is_refused(given: str) -> None:
    assert problems(COMPLETE | {"RECONCILE_SECONDS": given}) == (
        "RECONCILE_SECONDS: must be a whole number from 0 to 86400",
    )


@pytest.mark.parametrize("given", ["0", "0.009", "1.01", "-0.5", "nan", "inf", "50%", "1e-1", "0,5", "."])
def test_a_share_that_is_none_is_refused(given: str) -> None:
    (found,) = problems(COMPLETE | {"CLERK_API_SHARE": given})
    assert found.startswith("CLERK_API_SHARE: ")


@pytest.mark.parametrize("password", ["top%zzs3cr3t", "top@s3cr3t"])
def test_a_password_that_is_not_encoded_is_refused_without_a_part_of_it(password: str) -> None:
    (found,) = problems(COMPLETE | {"DATABASE_URL": f"postgresql://user:{password}@host/database"})
    assert found.startswith("DATABASE_URL: has a character that must be encoded: ")
    assert "cr3t" not in found


@pytest.mark.parametrize(("text", "days"), [("", 7), ("2", 2), ("3650", 3650)])
def test_applied_events_are_kept_for_a_week_or_as_long_as_it_says(text: str, days: int) -> None:
    assert Settings.from_env({"EVENT_RETENTION_DAYS": text}).event_retention_days == days


@pytest.mark.parametrize("text", ["1", "0", "-3", "3651", "7.5", "week"])
def test_applied_events_are_kept_for_longer_than_svix_retries(text: str) -> None:
    with pytest.raises(ConfigError, match="EVENT_RETENTION_DAYS: must be a whole number from 2 to 3650"):
        Settings.from_env({"EVENT_RETENTION_DAYS": text})


def test_the_status_page_s_token_is_off_by_default_and_a_secret(tmp_path: Path) -> None:
    assert Settings.from_env(COMPLETE).status_token == ""
    token = "s3cr3t-of-16-chr"
    settings = Settings.from_env(COMPLETE | {"STATUS_TOKEN": f" {token}\n"})
    assert settings.status_token == token
    assert token not in repr(settings)
    path = tmp_path / "token"
    path.write_text(token + "\n")
    assert Settings.from_env(COMPLETE | {"STATUS_TOKEN_FILE": str(path)}).status_token == token


@pytest.mark.parametrize(
    "token", ["s3cr3t-of-15-ch", "s3cr3t of 17 char", "s3cr3t-of-ümlauts-", "s3cr3t-of-\x07-chars"]
)
def test_a_token_that_is_short_or_odd_is_refused_without_a_part_of_it(token: str) -> None:
    (found,) = problems(COMPLETE | {"STATUS_TOKEN": token})
    assert found.startswith("STATUS_TOKEN: must be at least 16 visible ASCII characters")
    assert "s3cr3t" not in found
