"""Bytes and JSON that were a valid file before a seed changed them."""

from __future__ import annotations

import copy
import json
import os
import random
from typing import Any

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("QTOOL_FUZZ_EXAMPLES", "25"))
"""For each parser and each way of changing: few by default, thousands by `make fuzz`."""

fuzz = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None)


def rarely(every: int) -> settings:
    """The same for what takes `every` times as long."""
    return settings(fuzz, max_examples=max(EXAMPLES // every, 2))


DEEP = "[" * 150 + "]" * 150
HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 10**12, -(10**12), 10**30, 10**300, 0.5, -0.0, 1e308, 5e-324),
    *("", "0", "28", "-1", "1/1000000000000", "true", "null", "nan", "x" * 10_000, "\ud800", "\x1b[2J\u202e", "a\0b"),
    *("../../../etc/passwd", "http://127.0.0.1/", "data:,", "data:;base64,!", "%s%n", "{0.__class__}", "\u2028"),
    *([], {}, [[]], [None], {"": {}}, [1, "a"], {"a": [0]}, [1e308] * 3, "2024-99-99", "[redacted]"),
)
"""What a file may say where another value was meant."""
RAW = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"\xff\xfe",
    b"\0",
    b"",
)
"""What JSON's writer does not write."""


def changed_bytes(content: bytes, seed: int) -> bytes:
    """`content` with bytes exchanged, lost, doubled or inserted."""
    chance = random.Random(seed)
    data = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        start = chance.randrange(len(data) + 1)
        end = min(start + chance.choice([0, 1, 1, 2, 8, 64, 1000]), len(data))
        other = chance.choice([b"", bytes(data[start:end]) * 2, chance.randbytes(end - start), chance.choice(RAW)])
        data[start:end] = other
    return bytes(data)


def changed_json(value: Any, seed: int) -> Any:
    """`value` with some of its values exchanged, lost, doubled or moved."""
    chance = random.Random(seed)
    changed = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return chance.choice(HOSTILE)
        holder, key = chance.choice(places)
        action = chance.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == 1:
            holder[chance.choice(["", "extra", "\u202e"])] = copy.deepcopy(holder[key])
        elif action == 2:
            other, at = chance.choice(places)
            holder[key] = copy.deepcopy(other[at]) if _has(other, at) else None
        else:
            holder[key] = copy.deepcopy(chance.choice(HOSTILE))
    return changed


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(child)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def changed_text(value: Any, seed: int) -> bytes:
    """`changed_json` as a file, now and then with what only a broken writer writes."""
    chance = random.Random(seed + 1)
    text = json.dumps(changed_json(value, seed), ensure_ascii=chance.random() < 0.5)
    content = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.2:
        place = content.find(b":") + 1
        content = content[:place] + chance.choice(RAW) + content[place:]
    return content
