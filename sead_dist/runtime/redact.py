"""What may leave this machine: values without secrets and without local paths.

What stays here (a run's log, the record of its command) keeps paths, but no secrets.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

SECRET_KEY = re.compile(
    r"(^|[_.-])((api|access|private|secret)?_?key|token|secret|password|passwd|credential|auth)s?"
    r"($|[_.-])"
)
SECRET_VALUE = re.compile(r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abps]-|AKIA)[\w-]{8,}")
SECRET_IN_URL = re.compile(r"(?<=://)[^/@\s]+@|(?<=[?&])[\w-]*(?:token|key|secret)[\w-]*=[^&\s]+")
WHOLE_PATH = re.compile(r"file://|[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")
# The folders of a path inside a longer text; not the slashes of a URL or of owner/name.
FOLDERS = re.compile(r"(?<![\w:/.])(?:file://|~|[A-Za-z]:|\.{1,2})?[/\\](?:[^\s/\\,;]+[/\\])*")


def redact(value: Any) -> Any:
    """Return `value` without secrets and with every local path cut to its last part.

    A key that names a secret is dropped with its value, unless that is a number
    (`max_tokens: 64`). In texts, access tokens of known forms become "[removed]", and secrets in
    URLs are cut out. This also holds inside mappings and lists.
    """
    if isinstance(value, Mapping):
        return {str(k): redact(v) for k, v in value.items() if not _is_secret(str(k), v)}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    text = SECRET_VALUE.sub("[removed]", SECRET_IN_URL.sub("", value))
    if WHOLE_PATH.match(text):  # perhaps with spaces in it
        return PurePosixPath(text.replace("\\", "/")).name
    return FOLDERS.sub("", text)


def without_secrets(text: str) -> str:
    """`text` without access tokens and without passwords in URLs. Local paths stay. Of a KEY=VALUE
    word whose key names a secret, only the key stays."""
    key, is_word, _ = text.partition("=")
    if is_word and key.strip() == key and _is_secret(key, text):
        return f"{key}=[removed]"
    return SECRET_VALUE.sub("[removed]", SECRET_IN_URL.sub("[removed]", text))


def _is_secret(key: str, value: object) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    return SECRET_KEY.search(snake) is not None and not isinstance(value, (int, float))
