"""What is copied, at the edges of the session token's budget and by what a claims template carries."""

from __future__ import annotations

import pytest

from worker.policy import Copy, Decision, Policy, decide
from worker.template import ASSUMED_TEMPLATE, parse_template

ONLY_PUBLIC = parse_template('{"public_metadata": "{{user.public_metadata}}"}')
ONE_FIELD = parse_template('{"role": "{{user.public_metadata.role}}", "unsafe": "{{user.unsafe_metadata || false}}"}')


@pytest.mark.parametrize(("claims_bytes", "copied"), [(1199, False), (1200, False), (1201, True)])
def test_public_and_unsafe_are_copied_over_the_budget_by_one_byte(claims_bytes: int, copied: bool) -> None:
    assert decide(Policy(), claims_bytes) == Decision(private=True, public=copied, unsafe=copied)


def test_private_metadata_is_always_copied_as_no_token_carries_it() -> None:
    for copy in (Copy.ALWAYS, Copy.OVERSIZE):
        assert decide(Policy(private=copy), 10).private
    assert not decide(Policy(private=Copy.NEVER), 10).private


def test_always_and_never_need_no_weight() -> None:
    for claims_bytes in (10, 2000, None):
        assert decide(Policy(public=Copy.ALWAYS, unsafe=Copy.NEVER), claims_bytes) == Decision(
            private=True, public=True, unsafe=False
        )


def test_the_budget_is_a_setting() -> None:
    assert decide(Policy(budget=0), 43).public
    assert not decide(Policy(budget=5000), 2043).public


def test_where_the_weight_is_not_known_what_there_is_is_copied() -> None:
    assert decide(Policy(), None) == Decision(private=True, public=True, unsafe=True)


def test_a_kind_that_the_template_does_not_carry_whole_is_copied_whatever_it_weighs() -> None:
    assert decide(Policy(template=ONLY_PUBLIC), 10) == Decision(private=True, public=False, unsafe=True)
    assert decide(Policy(template=ONE_FIELD), 10) == Decision(private=True, public=True, unsafe=False)
    assert decide(Policy(template=parse_template("{}")), 2) == Decision(private=True, public=True, unsafe=True)
    assert decide(Policy(template=ONLY_PUBLIC, unsafe=Copy.NEVER), 2000) == Decision(
        private=True, public=True, unsafe=False
    )


def test_the_fingerprint_tells_policies_apart_that_decide_or_weigh_differently() -> None:
    policies = [
        Policy(),
        Policy(private=Copy.NEVER),
        Policy(public=Copy.ALWAYS),
        Policy(unsafe=Copy.ALWAYS),
        Policy(budget=1199),
        Policy(template=ONLY_PUBLIC),
        Policy(template=ONE_FIELD),
        Policy(assumed={"org.name": 60}),
    ]
    assert len({policy.fingerprint for policy in policies}) == len(policies)
    assert Policy().fingerprint == Policy(template=ASSUMED_TEMPLATE, assumed={}).fingerprint
    assert all(0 <= policy.fingerprint < 2**63 for policy in policies)
