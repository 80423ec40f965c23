"""Templates as Clerk documents them, every finding with its place, and hostile ones."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from worker.errors import TemplateError
from worker.shortcodes import ASSUMED_BYTES, RESERVED, USER_SHORTCODES, assumed_bytes, closest
from worker.template import (
    ASSUMED_TEMPLATE,
    DEPTH,
    FINDINGS,
    SHOWN,
    Constant,
    Expression,
    Finding,
    Part,
    Shortcode,
    Template,
    Text,
    lint,
    parse_template,
)

LARGE = 256 * 1024


def shortcode(written: str) -> Shortcode:
    return Shortcode(tuple(written.split(".")))


def alone(*operands: str | Constant) -> Expression:
    return Expression(tuple(op if isinstance(op, Constant) else shortcode(op) for op in operands))


def value(written: str) -> Part:
    """What the one claim of a template compiles to; its text is a JSON string's content."""
    template, _ = lint('{"a":"' + written + '"}')
    assert template is not None
    match template.parts:
        case [bytes() as static]:
            return static.removeprefix(b'{"a":').removesuffix(b"}")
        case [b'{"a":', part, b"}"]:
            return part
    raise AssertionError(template.parts)


def errors(source: str) -> list[str]:
    return [finding.message for finding in lint(source)[1] if finding.severity == "error"]


def warnings(source: str) -> list[str]:
    return [finding.message for finding in lint(source)[1] if finding.severity == "warning"]


def pointed_at(source: str, finding: Finding) -> str:
    """The rest of the line that a finding points at."""
    return source.split("\n")[finding.line - 1][finding.column - 1 :]


# --- Clerk's own examples: https://clerk.com/docs/guides/sessions/jwt-templates

WITHOUT_COMMENTS = re.compile("^ *// .*\n", re.MULTILINE)


def compiled(source: str) -> list[Part]:
    return list(parse_template(WITHOUT_COMMENTS.sub("", source)).parts)


def test_clerk_s_first_example_compiles() -> None:
    source = """{
      "aud": "https://example.com",
      "interests": ["hiking", "knitting"],
      "name": "{{user.first_name}}",
      "surname": "{{user.last_name}}",
      "email": "{{user.primary_email_address}}"
    }"""
    assert compiled(source) == [
        b'{"aud":"https://example.com","interests":["hiking","knitting"],"name":',
        alone("user.first_name"),
        b',"surname":',
        alone("user.last_name"),
        b',"email":',
        alone("user.primary_email_address"),
        b"}",
    ]


def test_clerk_s_example_of_metadata_compiles() -> None:
    source = """// The template
    {
      "likes_to_do": "{{user.public_metadata.interests}}",
      "shipping_address": "{{user.public_metadata.addresses.Home}}"
    }"""
    assert compiled(source) == [
        b'{"likes_to_do":',
        alone("user.public_metadata.interests"),
        b',"shipping_address":',
        alone("user.public_metadata.addresses.Home"),
        b"}",
    ]


def test_clerk_s_example_of_interpolation_compiles() -> None:
    source = '{\n  "full_name": "{{user.last_name}} {{user.first_name}}"\n}'
    text = Text((alone("user.last_name"), b" ", alone("user.first_name")))
    assert compiled(source) == [b'{"full_name":', text, b"}"]


def test_clerk_s_example_of_conditional_expressions_compiles() -> None:
    source = """{
      "has_verified_contact_info": "{{user.email_verified || user.phone_number_verified}}",

      // fallback to a string value
      "full_name": "{{user.full_name || 'Awesome User'}}",

      // fallback to a number value
      "age": "{{user.public_metadata.age || user.unsafe_metadata.age || 30 }}"
    }"""
    assert compiled(source) == [
        b'{"has_verified_contact_info":',
        alone("user.email_verified", "user.phone_number_verified"),
        b',"full_name":',
        alone("user.full_name", Constant(b'"Awesome User"')),
        b',"age":',
        alone("user.public_metadata.age", "user.unsafe_metadata.age", Constant(b"30")),
        b"}",
    ]


COMPLETE = """{
  // static values
  "aud": "https://my-site.com",
  "version": 1,
  "foo": { "bar": [1, 2, 3] },

  // dynamic values
  "user_id": "{{user.id}}",
  "avatar": "{{user.image_url}}",
  "full_name": "{{user.last_name}} {{user.first_name}} ",
  "email": "{{user.primary_email_address}}",
  "phone": "{{user.primary_phone_address}}",
  "registration_date": "{{user.created_at}}",
  "likes_to_do": "{{user.public_metadata.profile.interests}}",
  "unsafe_meta": "{{user.unsafe_metadata}}",
  "invalid_shortcode": "{{user.i_dont_exist}}"
}"""


def test_clerk_s_complete_example_compiles_though_two_of_its_shortcodes_do_not_exist() -> None:
    source = WITHOUT_COMMENTS.sub("", COMPLETE)
    template, findings = lint(source)
    assert template is not None
    assert template.parts == (
        b'{"aud":"https://my-site.com","version":1,"foo":{"bar":[1,2,3]},"user_id":',
        alone("user.id"),
        b',"avatar":',
        alone("user.image_url"),
        b',"full_name":',
        Text((alone("user.last_name"), b" ", alone("user.first_name"), b" ")),
        b',"email":',
        alone("user.primary_email_address"),
        b',"phone":',
        alone("user.primary_phone_address"),
        b',"registration_date":',
        alone("user.created_at"),
        b',"likes_to_do":',
        alone("user.public_metadata.profile.interests"),
        b',"unsafe_meta":',
        alone("user.unsafe_metadata"),
        b',"invalid_shortcode":',
        alone("user.i_dont_exist"),
        b"}",
    )
    assert [(finding.severity, pointed_at(source, finding)) for finding in findings] == [
        ("error", '{{user.primary_phone_address}}",'),
        ("warning", '{{user.unsafe_metadata}}",'),
        ("error", '{{user.i_dont_exist}}"'),
    ]
    assert "user.primary_phone_number" in findings[0].message
    assert template.warnings == findings[1:2]


def test_a_comment_is_an_error_at_its_place() -> None:
    [finding] = lint(COMPLETE)[1]
    assert (finding.line, finding.column) == (2, 3)
    assert "comment" in finding.message


# --- What a template compiles to.


def test_a_template_tells_its_source_and_every_shortcode_once_in_order() -> None:
    source = '{"a": "{{org.id || user.id}}", "b": ["x {{user.username}} {{user.id}}"], "c": "{{org.id || 1}}"}'
    template = parse_template(source)
    assert template.source == source
    assert template.shortcodes == (("org", "id"), ("user", "id"), ("user", "username"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{user.id}}", alone("user.id")),
        ("{{ user.id\\t}}", alone("user.id")),
        ("{{user.id||org.id}}", alone("user.id", "org.id")),
        ("{{user.id || 'a||b' || 'c|d'}}", alone("user.id", Constant(b'"a||b"'), Constant(b'"c|d"'))),
        ("{{user.id || ''}}", alone("user.id", Constant(b'""'))),
        ("{{user.id || ' x '}}", alone("user.id", Constant(b'" x "'))),
        ("{{user.id || '\\u00e9\\\"\\\\n\\u0001'}}", alone("user.id", Constant('"é\\"\\\\n\\u0001"'.encode()))),
        ("{{user.id || false}}", alone("user.id", Constant(b"false"))),
        ("{{user.id || -1.50e+3}}", alone("user.id", Constant(b"-1.50e+3"))),
        ("{{true}}", alone(Constant(b"true"))),
        ("{{0}}", alone(Constant(b"0"))),
        ("\\u007b{user.id}\\u007d", alone("user.id")),
        ("{{user.public_metadata.a-b$.é😀.0}}", alone("user.public_metadata.a-b$.é😀.0")),
        (" {{user.id}}", Text((b" ", alone("user.id")))),
        ("{{user.id}}\\n", Text((alone("user.id"), b"\\n"))),
        ("a\\u0022{{user.id}}\\/é\\\\", Text((b'a\\"', alone("user.id"), "/é\\\\".encode()))),
        ("{{user.id}}{{org.id}}", Text((alone("user.id"), alone("org.id")))),
        ("{{user.id}}}", Text((alone("user.id"), b"}"))),
        ("", b'""'),
        ("{ } { user.id }", b'"{ } { user.id }"'),
        ("\\u0041\\/\\u00e9\\u007f\\u2028\\ud83d\\ude00", '"A/é\x7f\u2028😀"'.encode()),
        ("\\u0000\\u000a\\u0022\\u005c", b'"\\u0000\\n\\"\\\\"'),
    ],
)
def test_a_string_compiles_to_what_clerk_documents(written: str, expected: Part) -> None:
    assert value(written) == expected
    assert not errors('{"a":"' + written + '"}')


def test_numbers_stay_as_they_are_written() -> None:
    big = "9" * 5000
    source = f'{{ "a" : [ 1.50 , 1e5,\r\n-0, 1E+400, {big}, true,\tfalse , null ] , "b": {{ }} }}\n'
    template = parse_template(source)
    assert template.parts == (f'{{"a":[1.50,1e5,-0,1E+400,{big},true,false,null],"b":{{}}}}'.encode(),)


def test_names_are_rewritten_to_their_shortest_form_too() -> None:
    assert parse_template('{"\\u0041\\/\\u00e9" : 1}').parts == ('{"A/é":1}'.encode(),)


@pytest.mark.parametrize(
    ("source", "public", "unsafe"),
    [
        ('{"a": "{{user.public_metadata}}"}', True, False),
        ('{"a": [{"b": "{{user.unsafe_metadata || 1}}"}]}', False, True),
        ('{"a": "{{user.id || user.public_metadata}}"}', False, False),
        ('{"a": "x {{user.public_metadata}}", "b": "{{user.unsafe_metadata.a}}"}', False, False),
        ('{"a": "{{user.unsafe_metadata}}", "b": "{{ user.public_metadata }}"}', True, True),
        ('{"a": "user.public_metadata"}', False, False),
        ("{}", False, False),
    ],
)
def test_a_kind_is_carried_where_it_stands_whole_as_a_value(source: str, public: bool, unsafe: bool) -> None:
    template = parse_template(source)
    assert (template.carries_public, template.carries_unsafe) == (public, unsafe)


def test_the_assumed_template_carries_both_kinds_and_warns_of_nothing() -> None:
    assert ASSUMED_TEMPLATE.parts == (
        b'{"public_metadata":',
        alone("user.public_metadata"),
        b',"unsafe_metadata":',
        alone("user.unsafe_metadata"),
        b"}",
    )
    assert ASSUMED_TEMPLATE.carries_public
    assert ASSUMED_TEMPLATE.carries_unsafe
    assert ASSUMED_TEMPLATE.warnings == ()


def test_parsing_tells_every_error_and_keeps_warnings() -> None:
    with pytest.raises(TemplateError) as caught:
        parse_template('{"a": "{{user.idd}}",\n "sub": "{{user.public_metadata}}}}"}')
    assert caught.value.problems == (
        "line 1, column 8: user.idd is no shortcode of Clerk's: did you mean user.id?",
        "line 2, column 2: sub is a claim that Clerk sets itself: give yours another name",
        "line 2, column 34: no {{ opens this }}: write it like {{user.id}}, or take it out",
    )
    template = parse_template('{"a": "{{user.public_metadata}}"}')
    assert [str(warning) for warning in template.warnings] == [
        "line 1, column 8: user.public_metadata can be of any size: name the single fields that are needed instead"
    ]


# --- What is not a JSON object.

NO_OBJECT = [
    # source, what the finding points at, a word of what it says
    ("", "", "expecting value"),
    (" \n ", "", "expecting value"),
    ("[{}]", "[{}]", "not a JSON object"),
    ('\n "x"', '"x"', "not a JSON object"),
    ("12", "12", "not a JSON object"),
    ("null", "null", "not a JSON object"),
    ('{"a": 1, // why\n}', "// why", "comment"),
    ('{"a": 1 /* why */}', "/* why */}", "comment"),
    ('{"é\\n": 1,\n}', ",", "comma"),
    ('{"a": [1, 2 , ]}', ", ]}", "comma"),
    ("{'a': 1}", "'a': 1}", "double quotes"),
    ('{"a": {{user.id}} }', "{{user.id}} }", "double quotes around"),
    ('{"a": "{{user.id || "x"}}"}', '"x"}}"}', "single quotes"),
    ("\ufeff{}", "\ufeff{}", "byte order mark"),
    ('{"a": 1 "b": 2}', '"b": 2}', "expecting ',' delimiter"),
    ('{"a": 1', "", "expecting ',' delimiter"),
    ('{"a": "x', '"x', "unterminated string"),
    ('{"a": "\t"}', '\t"}', "control character"),
    ('{"a": 1} {}', "{}", "extra data"),
    ('{"NaN": NaN}', "NaN}", "NaN"),
    ('{"a": [1, Infinity]}', "Infinity]}", "Infinity"),
    ('{"a": "-Infinity",\n"b": -Infinity}', "-Infinity}", "-Infinity"),
    ('{"a":' * DEPTH + "{}" + "}" * DEPTH, "{}" + "}" * DEPTH, "nested"),
    ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "[" * (200_001 - DEPTH) + "]" * 200_000 + "}", "nested"),
]


@pytest.mark.parametrize(("source", "rest", "said"), NO_OBJECT, ids=lambda text: repr(text[:24]))
def test_what_is_no_json_object_gives_no_template_and_one_error_at_its_place(source: str, rest: str, said: str) -> None:
    template, [finding] = lint(source)
    assert template is None
    assert finding.severity == "error"
    assert pointed_at(source, finding) == rest
    assert said in finding.message
    with pytest.raises(TemplateError):
        parse_template(source)


def test_brackets_in_strings_do_not_nest() -> None:
    assert not errors(json.dumps({"a": ["[" * 500, '\\"[[' * 100, {"b": []}]}))
    assert not errors('{"a":' * DEPTH + "1" + "}" * DEPTH)


# --- Errors in a JSON object: it compiles all the same.

BROKEN_VALUES = [
    # a string's content, what the finding points at, words of what it says
    ("{{user.id", "{{user.id", "no }} closes this {{"),
    ("a {{user.id {{org.id}}", "{{user.id {{", "no }} closes this {{"),
    ("a}} {{user.id}}", "}} {{", "no {{ opens this }}"),
    ("{{user.id}}}}", '}}"', "no {{ opens this }}"),
    ("{{}}", "{{}}", "missing"),
    ("{{ \\t }}", "{{ ", "missing"),
    ("{{user.id || }}", "{{user", "missing"),
    ("{{|| user.id}}", "{{||", "missing"),
    ("{{user.id || || 1}}", "{{user", "missing"),
    ('{{user.id || \\"x\\"}}', "{{user", '"x" is no text: put it in single quotes'),
    ("{{user.id || “x”}}", "{{user", "“x” is no text: put it in single quotes"),
    ("{{user.id || `x`}}", "{{user", "`x` is no text: put it in single quotes"),
    ("{{user.id || 'it's'}}", "{{user", "'it's' is no text: put it in single quotes, with no quote or }} inside"),
    ("{{user.id || 'x}}", "{{user", "'x is no text"),
    ("{{user.id || .5}}", "{{user", ".5 is no number"),
    ("{{user.id || 01}}", "{{user", "01 is no number"),
    ("{{user.id || +1}}", "{{user", "+1 is no number"),
    ("{{user.id || 30px}}", "{{user", "30px is no number"),
    ("{{user.id || ٣}}", "{{user", "٣ is no shortcode"),
    ("{{user.id || null}}", "{{user", "null can't be written here"),
    ("{{user.id || Guest}}", "{{user", "Guest is no shortcode of Clerk's: if it is a text, put it in single quotes"),
    ("{{user.id | org.id}}", "{{user", "user.id | org.id is no shortcode: join names"),
    ("{{user.first name}}", "{{user", "user.first name is no shortcode: join names"),
    ("{{user..id}}", "{{user", "user..id is no shortcode: join names"),
    ("{{user.public_metadata.}}", "{{user", "user.public_metadata. is no shortcode: join names"),
    ("{{.id}}", "{{.id", ".id is no shortcode: join names"),
    ("{{{user.id}}}", "{{{user", "{user.id is no shortcode: join names"),
    ("{{user.primary_phone_address}}", "{{user", "did you mean user.primary_phone_number?"),
    ("{{organization.name}}", "{{org", "did you mean org.name?"),
    ("{{user.publicMetadata.role}}", "{{user", "did you mean user.public_metadata.role?"),
    ("{{organization.publicMetadata.tier.name}}", "{{org", "did you mean org.public_metadata.tier.name?"),
    ("{{user.email}}", "{{user", "did you mean user.primary_email_address?"),
    ("{{user.firstName}}", "{{user", "did you mean user.first_name?"),
    ("{{usr.frst_name}}", "{{usr", "did you mean user.first_name?"),
    ("{{first_name}}", "{{first", "did you mean user.first_name?"),
    ("{{user.firstName.x}}", "{{user", "did you mean user.first_name?"),
    ("{{orgId}}", "{{org", "did you mean org.id?"),
    ("{{membership.role}}", "{{mem", "did you mean org_membership.role?"),
    ("{{source.platform}}", "{{source", "source.platform is no shortcode of Clerk's: it would be null"),
    ("{{user.first_name.x}}", "{{user", "user.first_name has no fields"),
    ("{{org.id.x}}", "{{org", "org.id has no fields"),
    ("{{user.private_metadata}}", "{{user", "read it from Postgres (clerk.user_metadata)"),
    ("{{user.private_metadata.a.b}}", "{{user", "read it from Postgres (clerk.user_metadata)"),
    ("{{user.privateMetadata.a}}", "{{user", "read it from Postgres (clerk.user_metadata)"),
    ("{{org.private_metadata}}", "{{org", "private metadata can't stand in it"),
    ("x\\ud800", '\\ud800"', "half a surrogate pair"),
    ("\\ude00\\ud83d", '\\ude00\\ud83d"', "half a surrogate pair"),
    ("\ud83d", '\ud83d"', "half a surrogate pair"),
]


@pytest.mark.parametrize(("written", "rest", "said"), BROKEN_VALUES, ids=lambda text: ascii(text)[:30])
def test_a_broken_value_is_one_error_at_its_place(written: str, rest: str, said: str) -> None:
    # Before it stand lines, escapes of all lengths, and characters of several bytes and UTF-16 units.
    source = '{\r\n "\\u00e9\\n": "é😀", "b": ["\\ud83d\\ude00 \\" \\\\ \\u007b €😀 ' + written + '"]}'
    template, [finding] = lint(source)
    assert template is not None
    assert finding.severity == "error"
    assert finding.line == 2
    assert pointed_at(source, finding).startswith(rest)
    assert said in finding.message


@pytest.mark.parametrize(
    ("source", "rest", "said"),
    [
        ('{"a": 1, "b": 2,\n  "a": 3}', '"a": 3}', "a stands in this object before"),
        ('{"x": {"a": 1, "\\u0061": 2}}', '"\\u0061": 2}}', "a stands in this object before"),
        ('{"x": [{"": 1}, {"": 1, "": 2}]}', '"": 2}]}', "stands in this object before"),
        ('{"é😀": 1, "su\\u0062": 2}', '"su\\u0062": 2}', "sub is a claim that Clerk sets itself"),
        ('{"\\ud83d\\ude00 {{user.id}}": 1}', '{{user.id}}": 1}', "Clerk substitutes values only"),
        ('{"a": {"b {{": 1}}', '{{": 1}}', "Clerk substitutes values only"),
        ('{"a": {"b\\udc00": 1}}', '\\udc00": 1}}', "half a surrogate pair"),
    ],
)
def test_a_broken_name_is_one_error_at_its_place(source: str, rest: str, said: str) -> None:
    template, [finding] = lint(source)
    assert template is not None
    assert finding.severity == "error"
    assert pointed_at(source, finding) == rest
    assert said in finding.message


def test_every_reserved_name_is_refused_at_the_top_and_nowhere_else() -> None:
    source = json.dumps(dict.fromkeys(sorted(RESERVED), 1))
    assert len(errors(source)) == len(RESERVED) == 15
    assert errors(json.dumps({"a": json.loads(source), "b": [json.loads(source)], "aud": 1, "SUB": 1})) == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{}}", alone(Constant(b"null"))),
        ("{{user.id || ‘x}}", alone("user.id", Constant(b"null"))),  # noqa: RUF001
        ("{{user..x || 1}}", alone(Constant(b"null"), Constant(b"1"))),
        ("{{user.nope}}", alone("user.nope")),
        ("{{user.private_metadata.a}}", alone("user.private_metadata.a")),
        ("{{user.id", b'"{{user.id"'),
        ("}} {{ {{user.id}} {{", Text((b"}} {{ ", alone("user.id"), b" {{"))),
        ("\\ud800 {{user.id}}", Text(("\N{REPLACEMENT CHARACTER} ".encode(), alone("user.id")))),
    ],
)
def test_what_is_broken_compiles_to_what_clerk_would_make_of_it(written: str, expected: Part) -> None:
    assert value(written) == expected


def test_an_expression_ends_at_the_first_closing_braces_even_in_a_literal() -> None:
    found = errors('{"a": "{{user.id || \'}}\'}}"}')
    assert found[0] == "' is no text: put it in single quotes, with no quote or }} inside"
    assert found[1].startswith("no {{ opens this }}")


def test_names_that_are_equal_or_hold_braces_stay() -> None:
    template, _ = lint('{"a": 1, "a": "{{user.id}}", "{{user.id}}": 2}')
    assert template is not None
    assert template.parts == (b'{"a":1,"a":', alone("user.id"), b',"{{user.id}}":2}')


# --- Warnings.


@pytest.mark.parametrize(
    "written",
    [
        "user.public_metadata",
        "user.unsafe_metadata",
        "org.public_metadata",
        "org_membership.public_metadata",
        "user.organizations",
    ],
)
def test_a_whole_object_is_a_warning_wherever_it_stands(written: str) -> None:
    source = f'{{"a": "{{{{{written}}}}}", "b": [" {{{{ user.id || {written} }}}}"]}}'
    template, findings = lint(source)
    assert template is not None
    assert template.warnings == findings
    assert [pointed_at(source, finding)[:6] for finding in findings] == ["{{" + written[:4], "{{ use"]
    assert all(f"{written} can be of any size" in finding.message for finding in findings)


@pytest.mark.parametrize(
    "written",
    [
        "user.public_metadata.role",
        "user.unsafe_metadata.a.b",
        "org.public_metadata.tier",
        "org_membership.permissions",
        "session.actor",
        "user.id || false || 'x'",
        "false || user.id",
    ],
)
def test_single_fields_and_reachable_operands_are_no_warning(written: str) -> None:
    assert lint(f'{{"a": "{{{{{written}}}}}"}}')[1] == ()


@pytest.mark.parametrize("literal", ["'x'", "''", "0", "1.5", "true"])
def test_operands_behind_a_literal_are_never_reached(literal: str) -> None:
    source = f'{{"a": "é {{{{user.id || {literal} || org.id || 1 || 2}}}}"}}'
    _, [finding] = lint(source)
    assert finding.severity == "warning"
    assert "never reached" in finding.message
    assert pointed_at(source, finding).startswith("{{user.id")


def test_findings_stand_in_order_of_position_whatever_their_severity() -> None:
    source = (
        '{"a": "{{user.public_metadata}}", "sub": "{{x}} {{1 || user.id}}",\n"b": "\\ud800{{user.organizations}}}}"}'
    )
    found = [(finding.severity, finding.line, finding.column) for finding in lint(source)[1]]
    assert found == sorted(found, key=lambda place: place[1:])
    assert [severity[0] for severity, _, _ in found] == ["w", "e", "e", "w", "e", "w", "e"]


# --- What messages show of a template.


def test_messages_show_control_characters_as_escapes() -> None:
    [message] = errors('{"a": "{{user.\\u0007\\u001b[31m\\u202e\\ud83d\\ude00}}"}')
    assert message.startswith("user.\\x07\\x1b[31m\\u202e😀 is no shortcode")
    [message] = errors('{"\\n": 1, "\\n": 2}')
    assert message.startswith("\\n stands")


@pytest.mark.parametrize(
    "source",
    [
        '{"a": "{{%s}}"}',
        '{"a": "{{user.%s}}"}',
        '{"a": "{{user.publicMetadata.%s}}"}',
        '{"a": "{{user.first_name.%s}}"}',
        '{"a": "{{\\"%s\\"}}"}',
        '{"a": "{{1%s}}"}',
        '{"a": "{{\'%s\' || user.id}}"}',
        '{"a": "{{user..%s}}"}',
        '{"%s": 1, "%s": 2}',
        '{"a": "%s"',
        '{"a": %s}',
    ],
)
@pytest.mark.parametrize("length", [10, 20, 25, 30, 36, 60, 100, 10_000])
def test_messages_show_little_of_a_template(source: str, length: int) -> None:
    [finding] = lint(source.replace("%s", "Ж" * length))[1]
    assert finding.message.count("Ж") <= SHOWN


def test_a_suggestion_names_what_is_below_where_there_is_room() -> None:
    [message] = errors('{"a": "{{user.publicMetadata.%s}}"}' % ("x" * 15))
    assert message.endswith(f"did you mean user.public_metadata.{'x' * 15}?")
    [message] = errors('{"a": "{{user.publicMetadata.%s}}"}' % ("x" * 50))
    assert message.endswith("did you mean user.public_metadata?")


def test_only_the_first_findings_are_told_of_each_severity() -> None:
    source = json.dumps({"a": ["{{x}} {{user.public_metadata}}"] * (3 * FINDINGS)})
    assert len(errors(source)) == len(warnings(source)) == FINDINGS + 1
    assert "there are more" in errors(source)[-1]
    assert "there are more" in warnings(source)[-1]


# --- Shortcodes.


@pytest.mark.parametrize("written", [*USER_SHORTCODES, *ASSUMED_BYTES, "user.public_metadata.x.y", "session.actor.sub"])
def test_every_documented_shortcode_is_no_error(written: str) -> None:
    assert not errors(f'{{"a": "{{{{{written}}}}}"}}')


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("org.id", 33),
        ("org.name", 12),
        ("org.public_metadata", 70),
        ("org.public_metadata.tier", 5),
        ("org.public_metadata.other", 50),
        ("org.public_metadata.tier.x", 50),
        ("org_membership.public_metadata.a.b", 50),
        ("user.organizations", 200),
        ("session.actor", 60),
        ("session.actor.sub", 50),
        ("user.id", None),
        ("user.public_metadata.tier", None),
        ("org.id.x", None),
        ("org.nope", 9),  # declared
        ("org.other", None),
        ("org", None),
        ("", None),
    ],
)
def test_what_no_user_tells_has_assumed_bytes(written: str, expected: int | None) -> None:
    overrides = {"org.name": 12, "org.public_metadata": 70, "org.public_metadata.tier": 5, "user.id": 9, "org.nope": 9}
    assert assumed_bytes(tuple(written.split(".")), overrides) == expected


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_a_suggestion_of_any_path_is_known_or_private(path: list[str]) -> None:
    meant = closest(tuple(path))
    assert not meant or meant[1] == "private_metadata" or not errors(f'{{"a": "{{{{{".".join(meant[:2])}}}}}"}}')


# --- Hostile templates.


def string(content: str) -> str:
    return '{"a":"' + content + '"}'


HOSTILE = {
    "open braces": "{" * LARGE,
    "open braces in a string": string("{" * LARGE),
    "closing braces in a string": string("}" * LARGE),
    "empty expressions": string("{{}}" * (LARGE // 4)),
    "braces the wrong way round": string("}}{{" * (LARGE // 4)),
    "escaped braces": string(r"\u007b\u007bx\u007d\u007d" * (LARGE // 25)),
    "backslashes": string("\\" * LARGE),
    "bare backslashes": "\\" * LARGE,
    "quotes": '"' * LARGE,
    "escaped quotes": string('\\"' * (LARGE // 2)),
    "single quotes": string("{{" + "'" * (LARGE + 1) + "}}"),
    "bars": string("{{" + "|" * LARGE + "}}"),
    "dots": string("{{" + "." * LARGE + "}}"),
    "white space": string("{{" + " " * LARGE),
    "a long name": string("{{user." + "a" * LARGE + "}}"),
    "a long number": string("{{" + "1" * LARGE + "x}}"),
    "a long path": string("{{user." + "a." * (LARGE // 2) + "}}"),
    "many operands": string("{{" + "a||" * (LARGE // 3) + "a}}"),
    "many shortcodes to guess": "{" + ",".join(f'"{i}":"{{{{user.i{i}d}}}}"' for i in range(LARGE // 24)) + "}",
    "surrogates": string("\\ud800{{x}}" * (LARGE // 11)),
    "brackets": '{"a":' + "[" * LARGE,
    "objects": '{"a":' * (LARGE // 5),
    "one name": "{" + '"a":1,' * (LARGE // 6) + '"a":1}',
    "empty strings": '{"a":[' + '"",' * (LARGE // 3) + "1]}",
    "spaces before an error": '{"a":1' + " " * LARGE + "x",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)  # two seconds at most; what is quadratic takes minutes
def test_a_hostile_template_of_256_kib_takes_linear_time(name: str) -> None:
    _, findings = lint(HOSTILE[name])
    assert len(findings) <= 2 * (FINDINGS + 1)


# --- Any text.

BRACES = ["{{", "}}", "||", '{"a":"', '"}', "\\u007b", *"{}[]:,'\"|. \n\\/-"]
WORDS = ["user", "user.id", "public_metadata", "null", "true", "NaN", "1e5", "//"]
ODD = ["\\ud83d", "\\ude00", "\ud800", "é", "😀", "\u2028", "\r\n", "\x00", "\ufeff"]
scraps = st.sampled_from(BRACES + WORDS + ODD)
texts = st.text() | st.lists(scraps, max_size=25).map("".join)


def check(source: str) -> None:
    template, findings = lint(source)
    assert (template is None) <= any(finding.severity == "error" for finding in findings)
    assert list(findings) == sorted(findings, key=lambda finding: (finding.line, finding.column))
    lines = source.split("\n")
    for finding in findings:
        assert finding.message.isprintable()
        assert 1 <= finding.column <= len(lines[finding.line - 1]) + 1


@given(texts)
@settings(deadline=None, max_examples=150)
def test_any_text_can_be_looked_at(source: str) -> None:
    check(source)


@given(st.lists(scraps, max_size=12).map("".join))
@settings(deadline=None, max_examples=150)
def test_any_string_can_be_looked_at(content: str) -> None:
    check('{"a": ' + json.dumps(content) + "}")
    check('{"a": ' + json.dumps(content, ensure_ascii=False) + "}")


strings = st.text(max_size=6) | st.lists(scraps, max_size=6).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings,
    lambda items: st.lists(items, max_size=4) | st.dictionaries(strings, items, max_size=4),
    max_leaves=15,
)


@given(st.dictionaries(strings, values, max_size=5), st.booleans(), st.sampled_from([None, 2]))
@settings(deadline=None, max_examples=100)
def test_any_object_can_be_looked_at(claims: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    check(json.dumps(claims, ensure_ascii=ascii_only, indent=indent))


# --- Templates without errors: what is static stays, each expression stands where it was written.

names = st.text(st.characters(codec="utf-8", exclude_characters="'\"`{}|."), min_size=1, max_size=5).filter(
    lambda name: not re.search(r"\s", name)
)
paths = st.one_of(
    st.sampled_from([*USER_SHORTCODES, *ASSUMED_BYTES]),
    st.builds(
        lambda kind, below: ".".join([kind, *below]),
        st.sampled_from(["user.public_metadata", "user.unsafe_metadata", "org.public_metadata"]),
        st.lists(names, min_size=1, max_size=3),
    ),
)
literals = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="'{}"), max_size=5).map(lambda text: f"'{text}'"),
    st.integers().map(str),
    st.sampled_from(["true", "false", "1.50", "-1e5"]),
)
spaces = st.sampled_from(["", " ", "\t", "\n  "])
expressions = st.builds(
    lambda operands, gap: "{{" + f"{gap}||{gap}".join(["", *operands, ""])[len(gap) + 2 : -len(gap) - 2] + "}}",
    st.lists(paths | literals, min_size=1, max_size=3),
    spaces,
)
plain = st.text(st.characters(codec="utf-8", exclude_characters="{}"), max_size=6)
contents = st.one_of(plain, expressions, st.lists(plain | expressions, max_size=4).map("".join))
claims = st.dictionaries(
    plain.filter(lambda name: name not in RESERVED),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | contents,
        lambda items: st.lists(items, max_size=4) | st.dictionaries(plain, items, max_size=4),
        max_leaves=12,
    ),
    max_size=5,
)
EXPRESSION = re.compile(r"\{\{.*?\}\}", re.DOTALL)


def with_placeholders(template: Template) -> str:
    """The template as JSON text, each expression as the string or the piece of a string "{{}}"."""

    def written(part: Part) -> bytes:
        match part:
            case bytes():
                return part
            case Expression():
                return b'"{{}}"'
            case Text():
                return b'"' + b"".join(inner if isinstance(inner, bytes) else b"{{}}" for inner in part.parts) + b'"'

    return b"".join(written(part) for part in template.parts).decode()


def without_expressions(value: Any) -> Any:
    match value:
        case str():
            return EXPRESSION.sub("{{}}", value)
        case list():
            return [without_expressions(item) for item in value]
        case dict():
            return {key: without_expressions(item) for key, item in value.items()}
    return value


@given(claims, st.booleans(), st.sampled_from([None, 0, 2, "\t"]))
@settings(deadline=None, max_examples=100)
def test_what_is_static_stays_and_is_compact(
    claims: dict[str, Any], ascii_only: bool, indent: int | str | None
) -> None:
    source = json.dumps(claims, ensure_ascii=ascii_only, indent=indent)
    template, findings = lint(source)
    assert template is not None
    assert [finding for finding in findings if finding.severity == "error"] == []
    expected = json.dumps(without_expressions(claims), ensure_ascii=False, separators=(",", ":"))
    assert with_placeholders(template) == expected
    assert parse_template(source) == template


@given(contents, plain, st.booleans())
@settings(deadline=None, max_examples=100)
def test_a_finding_points_at_what_it_is_about_whatever_stands_before(content: str, key: str, ascii_only: bool) -> None:
    assume(key not in RESERVED)
    encoded = json.dumps({key: [content + "{{nope}}"]}, ensure_ascii=ascii_only, indent=1)
    [finding] = [finding for finding in lint(encoded)[1] if finding.severity == "error"]
    assert pointed_at(encoded, finding) == '{{nope}}"'


def test_a_shortcode_that_is_declared_is_known() -> None:
    source = '{"a": "{{user.has_image}}", "b": "{{user.has_imag}}"}'
    _, findings = lint(source, {"user.has_image": 5})
    assert [(finding.line, finding.column) for finding in findings] == [(1, 35)]
    assert parse_template('{"a": "{{user.has_image}}"}', ["user.has_image"]).shortcodes == (("user", "has_image"),)
