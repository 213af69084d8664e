"""The bounds of this machine are plausible; what they are is the machine's business."""

import pytest

from mxcompile import roofline, target


def test_bounds_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "BUFFER", 1 << 22)
    monkeypatch.setattr(roofline, "STEPS", 1 << 12)
    one, two = roofline.measure(1), roofline.measure(2)
    for found in (one, two):
        assert 1e8 < found.read_bandwidth < 1e13
        # No CPU does fewer than 2 operations a cycle at 100 MHz, or 64 times 64 at 8 GHz a core.
        assert found.peak is None or 1e8 < found.peak / found.threads < 4e13
    assert (one.peak is not None) == ("avx2" in target.host_features())
    assert one.instruction == two.instruction
