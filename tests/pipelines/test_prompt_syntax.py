"""Which prompts are plain, and which hold Compel's syntax."""

import pytest
from compel.prompt_parser import Blend, PromptParser
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.failures import Refusal
from gpu_worker.prompt_syntax import needs_compel, parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red fox",
        "a red fox, (in the snow), [at night]",
        'a sign that says "open"',
        "((masterpiece)), (best quality:1.2)",
        "well-known state-of-the-art e-mail",
        "f/1.8, 85mm, 2.5 m - 3 m",
        "a fox (red) 1.2 m long",
        "foo@example.com; #1 & 2+2",
        "C:\\temp",
    ],
)
def test_a_prompt_without_operators_is_plain(text):
    assert not needs_compel(text)


@pytest.mark.parametrize(
    "text",
    [
        "a (red)1.2 fox",
        "a red++ fox",
        "a red- fox",
        "fox+",
        "(a fox+, a hen)",
        '"a red fox"+',
        "(a fox)-- in snow",
        "(a fox).5",
        "fox.attend(1.5)",
        '("a fox", "a hen").blend(0.3, 0.7)',
        '("a fox", "a hen").and()',
        "a fox.swap(hen)",
        "a fox withLora(style, 0.5)",
        r"a fox \(red\)",
    ],
)
def test_a_prompt_with_operators_or_escapes_is_compels(text):
    assert needs_compel(text)


@given(st.text('ab ()"+-.,=1\\', max_size=12))
@settings(max_examples=300, deadline=None)
def test_what_compel_would_weigh_is_never_plain(text):
    try:
        conjunction = PromptParser().parse_conjunction(text)
    except Exception:
        return  # not a prompt for Compel
    pieces = conjunction.prompts
    fragments = [
        part for piece in pieces if not isinstance(piece, Blend) for part in piece.children
    ]
    weighs = len(pieces) != 1 or any(part.weight != 1 for part in fragments)
    if weighs and pieces:
        assert needs_compel(text)


def test_a_plain_prompt_is_read_letter_for_letter():
    text = 'a (red) fox, "quick",(very)'
    (prompt,) = parsed(text).prompts
    assert [(part.text, part.weight) for part in prompt.children] == [(text, 1.0)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('("a", "b").blend(1, 2, 3)', "mismatched prompts/weights"),
        ('("a", "b").blend(x, y)', "lacks its numbers"),
        ("a fox.swap(hen)", "swap is not supported"),
        ("a fox withLora(style, 0.5)", "in the field loras"),
        ("(" * 100 + "x" + ")" * 100 + "1.2", "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_refused(text, reason):
    with pytest.raises(Refusal, match=reason) as refusal:
        parsed(text)
    assert refusal.value.code == "invalid_request"
    assert refusal.value.field == "prompt"


@pytest.mark.timeout(20)
def test_deep_parentheses_do_not_stop_the_worker():
    """Compel's parser alone would take hours for these."""
    (prompt,) = parsed("(" * 20 + "x" + ")" * 20 + "1.5").prompts
    assert [(part.text, part.weight) for part in prompt.children] == [("x", 1.5)]


def test_weights_around_nothing_are_an_empty_prompt():
    (prompt,) = parsed("( )1.2").prompts
    assert prompt.is_empty
