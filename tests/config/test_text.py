"""trainer/config/text.py: what is escaped, quoted and cut."""

from __future__ import annotations

import pytest

from trainer.config.text import has_control_characters, in_short, printable, quoted, whole_number


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 名前, é\nnext\tcolumn", "plain, 名前, é\nnext\tcolumn"),
        ("\x1b[31mred\x9b0m", r"\x1b[31mred\x9b0m"),
        ("a\rb\x08\x7f\x00", r"a\rb\x08\x7f\x00"),
        ("\u202eright to left\u2028", r"\u202eright to left\u2028"),
        ("\udcff\U000e0041", r"\udcff\U000e0041"),
        (r"C:\x1b", r"C:\x1b"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_on_one_line() -> None:
    assert printable("a\n\tb", keep="") == r"a\n\tb"


def test_control_characters() -> None:
    assert all(map(has_control_characters, ("a\nb", "\0", "\x85", "\u2028", "\ud800")))
    assert not any(map(has_control_characters, ("", "名前", "a\u00a0b", "\u200d", "~/x y")))


def test_quoted() -> None:
    assert [quoted(value) for value in (None, True, False, 1, "a\n")] == ["null", "true", "false", "1", r"'a\n'"]
    assert quoted("x" * 10_000).startswith("'xxx") and len(quoted("x" * 10_000)) == 200


def test_in_short() -> None:
    assert in_short("abc", 3) == "abc"
    assert in_short("0123456789" * 3, 20) == "0123456789 ... 56789"


@pytest.mark.parametrize(("text", "number"), [("12", 12), ("0", 0), ("-1", None), ("²", None), ("٣", None), ("", None)])
def test_whole_numbers(text: str, number: int | None) -> None:
    assert whole_number(text) == number


def test_numbers_too_long_to_compute_with() -> None:
    assert whole_number("9" * 18) == 10**18 - 1 and whole_number("9" * 19) is None and whole_number(None) is None
