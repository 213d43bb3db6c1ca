"""Parts of a model: found by path, apart from each other, and quantized as this config would."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_quant.attach import attach, detach
from lightning_quant.errors import AttachError
from lightning_quant.estimators import build_estimator
from lightning_quant.parts import find_part, has_layers, refuse_changes, refuse_other_config, refuse_shared
from lightning_quant.spec import LayerRule, QuantConfig


def pair():
    shared = nn.Linear(8, 8)
    encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), shared)
    decoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder, "act": nn.ReLU()}), shared


def refuse(model, *args, **kwargs):
    config = QuantConfig.parse(*args, **kwargs)
    refuse_other_config(model, config, build_estimator(config.method, dict(config.options)))


def test_parts_are_found():
    model, shared = pair()
    assert find_part(model, None) is model
    assert find_part(model, "encoder.2") is shared
    with pytest.raises(AttachError, match=r"QuantCallback\.module: .* of ModuleDict, got 'encodr'\. Nearest: encoder"):
        find_part(model, "encodr")
    with pytest.raises(AttachError, match="Paths look like 'encoder'"):
        find_part(model, "zzz.zzz")
    assert has_layers(model, None)
    assert has_layers(model, "decoder")
    assert not has_layers(model, "act")
    assert not has_layers(model, "nowhere")
    model["gone"] = None
    assert not has_layers(model, "gone")
    attach(model["decoder"], QuantConfig.parse("ste", "w8a16"))
    assert has_layers(model, "decoder")


def test_parts_that_overlap_are_refused():
    model, shared = pair()
    refuse_shared({"encoder": model["encoder"], "decoder": model["decoder"]})
    with pytest.raises(AttachError, match=r"every layer in one part, got '0' of module='encoder' in module=None"):
        refuse_shared({None: model, "encoder": model["encoder"]})
    with pytest.raises(AttachError, match=r"got 'encoder\.0' of module=None in module='encoder' as well\. Name parts"):
        refuse_shared({"encoder": model["encoder"], None: model})
    model["decoder"].append(shared)
    with pytest.raises(AttachError, match=r"'2' of module='decoder' in module='encoder'"):
        refuse_shared({"encoder": model["encoder"], "decoder": model["decoder"]})
    with pytest.raises(AttachError, match=r"'the part itself' of module='encoder\.2'"):
        refuse_shared({"encoder": model["encoder"], "encoder.2": shared})


def test_layers_that_come_or_go_are_noticed():
    model, _ = pair()
    report = attach(model, QuantConfig.parse("ste", "w8a16", rules=[LayerRule("decoder.0", weight=None)]))
    refuse_changes(model, report, 2)
    kept = model["encoder"][0]
    model["encoder"][0] = nn.Linear(8, 8)
    with pytest.raises(AttachError, match=r"encoder\.0: expected every layer to exist .*, got 1 made later"):
        refuse_changes(model, report, 2)
    model["encoder"][0] = nn.Identity()  # as a class that is not known would do
    with pytest.raises(AttachError, match=r"all 2 quantized layers to stay, got 1 replaced by others\. Leave out"):
        refuse_changes(model, report, 2)
    model["encoder"][0] = kept
    refuse_changes(model, None, 2)


def test_quantizers_of_another_config_are_refused():
    model, _ = pair()
    attach(model, QuantConfig.parse("lsq", "w4a8-channel"))
    refuse(model, "lsq", "w4a8-channel", calibration=3)
    for scheme, words in (("w3a8", r"\(lsq at w3a8\), got lsq at w4a8"), ("w4a16", r"w4a16\), got lsq at w4a8")):
        with pytest.raises(AttachError, match=rf"encoder\.0: expected quantizers of this config .*{words}, in place"):
            refuse(model, "lsq", scheme)
    with pytest.raises(AttachError, match=r"\(ste at w4a8\), got lsq at w4a8.*detach\(model\) first"):
        refuse(model, "ste", "w4a8")
    # What rules decide is compared by method alone.
    refuse(model, "lsq", "w8a8", rules=[LayerRule("*", weight="w4-channel")])
    refuse(model, "lsq", "w8a8", first_last="w4a8", rules=[LayerRule("encoder.0", weight="w4-channel")])
    with pytest.raises(AttachError, match=r"\(ste\), got lsq, in place"):
        refuse(model, "ste", "w8a8", rules=[LayerRule("*", weight="w4-channel")])
    refuse(detach(model), "ste", "w8a8")
