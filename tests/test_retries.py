"""How often a request is repeated, and after which pauses."""

from __future__ import annotations

import pytest

from qtool.retries import LONGEST_PAUSE, with_retries


def failing(times):
    """A request that fails so often before it answers."""
    left = iter(range(times))

    def request():
        for number in left:
            raise OSError(number)
        return "done"

    return request


def pauses_of(times, *, retries=10, least=0.0):
    pauses = []
    done = with_retries(failing(times), retries=retries, pause_after=lambda _: least, wait=pauses.append)
    assert done == "done"
    return pauses


def test_pauses_double_up_to_the_longest():
    assert pauses_of(8) == [0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_pause_is_at_least_what_the_server_asks_for():
    assert pauses_of(3, least=1.5) == [1.5, 1.5, 2]


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"retries": 2, "pause_after": lambda _: 0.0, "wait": lambda _: None}, 2),
        ({"retries": 9, "pause_after": lambda error: None if error.args == (1,) else 0.0, "wait": lambda _: None}, 1),
        ({"retries": 9, "pause_after": lambda _: 0.0, "wait": lambda _: True}, 0),
    ],
    ids=["no retry left", "an error that will not pass", "cancelled while waiting"],
)
def test_the_last_error_is_raised(options, last):
    with pytest.raises(OSError, match=f"^{last}$"):
        with_retries(failing(5), **options)
