"""What is missed: a shard that is gone and whose index is still there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.config import ConfigError
from mm.data.index import ShardIndex
from mm.data.indexing import index, verify
from mm.data.loader import Loader
from mm.data.shards import expand
from tars import END, sample

pytestmark = pytest.mark.timeout(60)


def test_a_deleted_shard_is_missed_by_its_index(tmp_path: Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard}.tar").write_bytes(b"".join(sample(f"{shard}-{n}") for n in range(4)) + END)
    index(str(tmp_path))
    (tmp_path / "1.tar").unlink()
    reports = verify(str(tmp_path))
    assert [bool(report.problem) for report in reports] == [False, True, False] and reports[1].lost == 4
    for spec in (str(tmp_path), f"{tmp_path}/*.tar"):
        found = ShardIndex(expand(spec))
        assert (len(found), found.rejected, found.seen) == (8, 4, 12)
        assert "4 samples lost" in found.ledger[0].reason and found.ledger[0].shard.endswith("1.tar")
    with pytest.raises(ConfigError, match=r"4 of 12 samples cannot be used.*mm shards stats"):
        Loader(str(tmp_path), {}, batch_size=2, train=True)
