from __future__ import annotations

import pytest

from qtool.errors import UsageError
from qtool.inputs.builtin import find_panel
from qtool.inputs.panels import PanelShard, load_panel

PANEL = load_panel(find_panel("demo-text"))


@pytest.mark.parametrize("count", [1, 2, 7, len(PANEL.queries)])
def test_the_shards_of_a_panel_hold_each_query_once(count: int) -> None:
    shards = [PANEL.shard(PanelShard(index, count)) for index in range(1, count + 1)]
    assert {(shard.name, shard.sha256) for shard in shards} == {(PANEL.name, PANEL.sha256)}
    assert sorted(query.id for shard in shards for query in shard.queries) == sorted(q.id for q in PANEL.queries)
    sizes = [len(shard.queries) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_is_written_as_it_is_read() -> None:
    assert PanelShard.parse("2/8") == PanelShard(2, 8)
    assert str(PanelShard(2, 8)) == "2/8"
    assert PANEL.shard(None) is PANEL


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "a/b", "1/-2", " 1/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="Invalid shard"):
        PanelShard.parse(text)


def test_a_shard_without_a_query_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has too few queries \(3\) for shard 4/4"):
        PANEL.first(3).shard(PanelShard(4, 4))
