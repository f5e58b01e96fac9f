"""The benchmark of the degradation runs every way and compares within a round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import bench_data


def test_every_way_is_measured_at_every_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    settings = bench_data.BenchDataSettings(tmp_path, (16, 32), batch=2, batches=2, rounds=2)
    threads = torch.get_num_threads()
    rows = bench_data.run(settings)
    assert torch.get_num_threads() == threads
    assert [row.crop for row in rows] == [16] * 3 + [32] * 3
    assert [row.way for row in rows[:3]] == [row.way for row in rows[3:]]
    assert len({row.way for row in rows}) == 3
    for row in rows:
        assert row.rate > 0
        assert row.lowest <= row.ratio <= row.highest
    assert (rows[0].lowest, rows[0].highest) == (1.0, 1.0)
    assert len(bench_data.table(rows).splitlines()) == 2 + len(rows)

    with caplog.at_level("ERROR"):
        assert bench_data.main([f"--data={tmp_path}", "--rounds=0"]) == 1
    assert "take 1 or more" in caplog.text
