"""Tables that cannot be read for want of memory are not called damaged."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcli.cache.parquet import open_parquet, read_parquet


@pytest.mark.parametrize("error", [MemoryError, pa.ArrowMemoryError])
def test_want_of_memory_is_no_damage(tmp_path, monkeypatch, error):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "t.parquet")

    def refuse(*_: object, **__: object) -> None:
        raise error("no room")

    with monkeypatch.context() as memory:
        memory.setattr(pq.ParquetFile, "read", refuse)
        with pytest.raises(MemoryError):
            read_parquet(tmp_path / "t.parquet")
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(MemoryError):
        open_parquet(tmp_path / "t.parquet")
