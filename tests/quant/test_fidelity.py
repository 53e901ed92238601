"""Whole quantized bundles against their float32 original, on the inputs that components get while painting."""

from __future__ import annotations

from pathlib import Path

import pytest

from pochade.quant.bundle import quantize_bundle
from pochade.quant.scheme import SCHEMES
from pochade.runtime.locate import BUILT_IN

SNR_LIMITS = {
    # Eight bits for weights and activations leave 40 dB and more where errors do not add up over many layers.
    "int8": {"text_encoder": 40.0, "condition": 45.0, "transformer": 35.0, "vq_decoder": 40.0},
    # Four bits in blocks of 128 leave about 20 dB of random weights; what is sensitive keeps eight bits.
    "int4": {"text_encoder": 40.0, "condition": 45.0, "transformer": 15.0, "vq_decoder": 40.0},
}


@pytest.mark.parametrize("scheme", SNR_LIMITS)
def test_components_stay_close_to_float32(scheme: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = quantize_bundle(bundles["monetico-tiny"], tmp_path / scheme, SCHEMES[scheme])
    scorecard = bundle.manifest.scorecard
    assert scorecard is not None
    for name, limit in SNR_LIMITS[scheme].items():
        assert scorecard["components"][name]["snr_db"] >= limit, name
    # Below 200 dB, which stands for no difference: something was really quantized.
    assert scorecard["components"]["transformer"]["snr_db"] < 60
    assert scorecard["components"]["sampler"]["agreement"] >= 0.99
    assert scorecard["pipeline"]["token_agreement"] > 0.7


def test_the_starter_ships_with_a_good_scorecard() -> None:
    from pochade.bundle import Bundle

    bundle = Bundle.open(BUILT_IN / "starter")
    assert bundle.size <= 15_000_000
    scorecard = bundle.manifest.scorecard
    assert scorecard is not None
    assert scorecard["components"]["transformer"]["snr_db"] > 38
    assert scorecard["pipeline"]["token_agreement"] > 0.95
