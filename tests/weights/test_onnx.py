"""ONNX computes the same in onnxruntime, for any number of images (`make test-timm`)."""

import pytest
import torch

from fastbeit.jobs.export import export
from fastbeit.weights.models import read_model
from helpers.dialects import VARIANTS, finetuned, images, ours, plain_vit, pretrained, save

onnxruntime = pytest.importorskip("onnxruntime", reason="`make test-timm` has it")
pytestmark = pytest.mark.timm

MODELS = {
    "pre-trained": lambda: pretrained().state_dict(),
    "pre-trained, absolute": lambda: pretrained(**VARIANTS["absolute"]).state_dict(),
    "classifier, mean": lambda: finetuned("mean"),
    "classifier, cls": lambda: finetuned("cls", **VARIANTS["both"]),
    "encoder": lambda: plain_vit(num_classes=0),
}


@pytest.mark.parametrize("write", MODELS.values(), ids=list(MODELS))
def test_onnxruntime_gives_the_same(tmp_path, write):
    path = save({"model": write()}, tmp_path / "x.pth")
    export(path, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    model = ours(read_model(path))
    for batch in (1, 5):
        given = {"pixel_values": images(batch), "bool_masked_pos": torch.rand(batch, 16) < 0.4}
        given = {name: given[name] for name in model.inputs}
        assert [one.name for one in session.get_inputs()] == list(given)
        (found,) = session.run([model.output], {name: one.numpy() for name, one in given.items()})
        torch.testing.assert_close(torch.from_numpy(found), model(*given.values()), atol=1e-5, rtol=1e-5)
