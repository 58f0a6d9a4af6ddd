"""The backward-weight measurement in seconds: two epochs, one seed, 8 bits."""

from __future__ import annotations

import json
from pathlib import Path

import backward_weights
import pytest


def test_variants_agree_in_the_last_layer_and_part_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = backward_weights.main(["--fast", "--json", str(tmp_path / "found.json")])
    for norms in ("frozen", "live"):
        found = results[norms][8]
        for variant in ("quantized", "folded"):
            assert found[variant]["fc"] == pytest.approx(
                (0, 1), abs=1e-6
            )  # its gradient depends on no weight of its own
            for layer in ("pointwise", "depthwise", "conv"):
                distance, cosine = found[variant][layer]
                assert distance > 0.01, (norms, variant, layer)
                assert cosine < 0.9999
        assert found["float"]["conv"] == pytest.approx((0, 1), abs=1e-12)
    for layer in (
        "pointwise",
        "depthwise",
        "conv",
    ):  # leaving out the norm's mean terms matters more than rounding does
        assert results["live"][8]["folded"][layer][0] > 5 * results["live"][8]["quantized"][layer][0]
        assert results["frozen"][8]["folded"][layer][0] == pytest.approx(
            results["frozen"][8]["quantized"][layer][0], rel=0.1
        )
    printed = capsys.readouterr().out
    assert "| bits | calibrated | float | quantized | folded |" in printed
    assert "| layer | 8 bits, quantized | 8 bits, folded |" in printed
    assert printed.count("| fc | 0.000 / 1.0000 | 0.000 / 1.0000 |") == 2
    assert json.loads((tmp_path / "found.json").read_text())["float"] == results["float"]


def test_distance_is_relative_and_cosine_forgets_length() -> None:
    one = backward_weights.torch.tensor([3.0, 4.0], dtype=backward_weights.torch.float64)
    assert backward_weights.distance(2 * one, one) == pytest.approx((1.0, 1.0))
