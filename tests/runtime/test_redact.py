"""What may leave the machine."""

import pytest

from sead_dist.runtime.redact import redact


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/jo smith/teachers/t0/", "t0"),
        ("~/teachers/t0", "t0"),
        ("../../jo/t0", "t0"),
        (r"C:\Users\jo\t0", "t0"),
        ("file:///home/jo/t0", "t0"),
        ("from /home/jo/t0, then", "from t0, then"),
        ("path=/home/jo/t0", "path=t0"),
        ("owner/name@main", "owner/name@main"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("https://jo:pw@example.org/a?token=abc", "https://example.org/a?"),
        ("use ghp_abcdefghijkl now", "use [removed] now"),
        ({"HF_TOKEN": "x", "password": "x", "auth": "x", "secretKey": "x", "tokens": ["x"]}, {}),
        (
            {"max_tokens": 64, "tokenizer": "t", "author": "a", "monkey": "b"},
            {"max_tokens": 64, "tokenizer": "t", "author": "a", "monkey": "b"},
        ),
        ([1, None, True, 0.5], [1, None, True, 0.5]),
    ],
)
def test_what_is_made_public(value, shown):
    assert redact(value) == shown
