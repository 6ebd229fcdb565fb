"""Lines and files that are no JSON object anyone wrote on purpose."""

from __future__ import annotations

DEEP = 100_000

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "nested lists": b"[" * DEEP + b"]" * DEEP,
    "nested objects": b'{"step":' * DEEP + b"1" + b"}" * DEEP,
    "nested value": b'{"state":"failed","step":1,"site":"layers.0.mlp.up/x","a":' + b"[" * DEEP,
    "not UTF-8": b'{"step": 1, "site": "\xff\xfe"}',
    "NUL bytes": bytes(4096),
    "a list": b'[{"step": 1}]',
    "a number": b"1",
    "null": b"null",
    "a number of 5000 digits": b'{"state": "failed", "step": ' + b"9" * 5000 + b"}",
    "a number of 400 digits": b'{"state": "failed", "site": "layers.0.mlp.up/x", "step": '
    + b"9" * 400
    + b"}",
    "an infinite step": b'{"state": "failed", "step": Infinity, "site": "layers.0.mlp.up/x"}',
    "a step that is no number": b'{"state": "failed", "step": NaN, "site": "layers.0.mlp.up/x"}',
    "a step of another type": b'{"state": "failed", "step": [], "site": "layers.0.mlp.up/x"}',
    "a torn line": b'{"state": "failed", "st',
    "a control character": b'{"state": "fai\x00led", "step": 1}',
}
