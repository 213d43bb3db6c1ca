"""ResNet-20 and MobileNetV2 shapes from Lightning to integers: w4a4 with folded normalization, ONNX, no float left.

onnxruntime runs the file without graph optimization; the integer run has int32 accumulators, M0 and shifts only.
"""

from __future__ import annotations

import math

import lightning as L  # noqa: N812
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import QuantCallback
from lightning_quant.attach import quant_layers
from lightning_quant.export import verify
from lightning_quant.export.integer_only import compare_with_runtime, run_integer_only
from lightning_quant.norms import FoldedBatchNorm
from tests.convnets import MobileNetV2, ResNet20, digits
from tests.integration.modules import QUIET, trainer

pytestmark = QUIET
TRAINED, BATCH, EPOCHS = 1500, 64, 5


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * math.ceil(TRAINED / BATCH))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


@pytest.fixture(scope="module", params=[ResNet20, MobileNetV2], ids=["resnet20", "mobilenetv2"])
def shipped(request, tmp_path_factory):
    """A network trained in float, then on the grid, and its export."""
    root = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    module = Classifier(request.param(width=8))
    x, y = digits()
    data = DataLoader(TensorDataset(x[:TRAINED], y[:TRAINED]), batch_size=BATCH)
    trainer(root, max_epochs=EPOCHS).fit(module, data)
    float_losses, module.losses = module.losses, []
    settings = {"batch_norm": "two_pass", "freeze_batch_norm": 0.8, "operators": 8, "first_last": "w8a8"}
    quant = QuantCallback("lsq", "w4a4", options=settings, calibration=8, strict=True)
    trainer(root, quant, max_epochs=EPOCHS).fit(module, data)
    assert sum(module.losses[-5:]) < 0.3 * sum(float_losses[:5])
    quant.export(module.net, root / "out", format="onnx", inputs=x[:4])
    return module.net.eval(), root / "out", x[TRAINED:], y[TRAINED:]


def test_trains_on_four_bits_with_every_normalization_folded(shipped):
    net, _, x, y = shipped
    assert {type(m).__name__ for m in net.modules() if "BatchNorm" in type(m).__name__} == {"FoldedBatchNorm2d"}
    widths = {layer.weight_quant.spec.bits for _, layer in quant_layers(net)}
    assert widths == {4, 8}
    assert not any(m.training for m in net.modules() if isinstance(m, FoldedBatchNorm))
    with torch.no_grad():
        assert (net(x).argmax(1) == y).float().mean() > 0.85


def test_onnxruntime_equals_the_model_in_training(shipped):
    import onnxruntime as ort

    net, path, x, _ = shipped
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, net(x).numpy(), rtol=0, atol=1e-5)
    report = verify(path, net, {"x": x})
    assert report.ok
    assert sum(check.codes_differ for check in report.layers) == 0


def test_integers_alone_compute_what_onnxruntime_does(shipped):
    """All but one activation in 5,000 are the same; a layer given the same input is off by one at most."""
    net, path, x, _ = shipped
    whole = compare_with_runtime(path, x)
    assert whole.share < 2e-4
    by_layer = compare_with_runtime(path, x, local=True)
    assert by_layer.share < 2e-5
    assert by_layer.largest <= 1
    (logits,) = run_integer_only(path, x).outputs.values()
    with torch.no_grad():
        assert (logits.argmax(1) == net(x).argmax(1)).float().mean() > 0.99
