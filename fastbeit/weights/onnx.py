"""ONNX, out only: a graph that takes normalised pixels, in float32, of any number of images.

pixel_values     [B, 3, height, width], (pixels / 255 - mean) / std
bool_masked_pos  [B, N], patches that are hidden; of a pre-trained model alone

logits             [B, N, words] of a pre-trained model, [B, classes] of a classifier
last_hidden_state  [B, N + 1, D] of an encoder without a head, after its last norm if it has one
"""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig, Size
from fastbeit.errors import USAGE, RunError
from fastbeit.model.vit import NORM_EPS, VisionTransformer

FILE = "model.onnx"
WANTED = ("onnx", "onnxscript")  # by torch.onnx.export


class Exported(VisionTransformer):
    """The model of a state dict, whatever head it has, by operators that ONNX knows."""

    def __init__(self, tensors: dict[str, Tensor], model: ModelConfig, image_size: Size) -> None:
        kernels = Kernels(attention="eager", masked_embed="reference", loss="reference")
        super().__init__(model, image_size=image_size, mean=(0.5,) * 3, std=(0.5,) * 3, kernels=kernels)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.width)) if "mask_token" in tensors else None
        self.predicts_patches = "lm_head.weight" in tensors
        pooled = "fc_norm.weight" in tensors
        self.norm, self.fc_norm = (
            nn.LayerNorm(model.width, eps=NORM_EPS) if f"{name}.weight" in tensors and wanted else None
            for name, wanted in (("norm", not pooled), ("fc_norm", pooled))
        )
        for name in ("lm_head", "head"):
            weight = tensors.get(f"{name}.weight")
            self.add_module(name, None if weight is None else nn.Linear(model.width, len(weight)))
        own = self.state_dict()
        self.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own})

    @property
    def inputs(self) -> tuple[str, ...]:
        hides = self.predicts_patches and self.mask_token is not None
        return ("pixel_values", "bool_masked_pos") if hides else ("pixel_values",)

    @property
    def output(self) -> str:
        has_head = self.predicts_patches or self._modules["head"] is not None
        return "logits" if has_head else "last_hidden_state"

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        proj = self.patch_embed.proj
        patches = F.conv2d(pixel_values, proj.weight, proj.bias, stride=self.patch_embed.patch_size)
        x = patches.flatten(2).transpose(1, 2)
        if bool_masked_pos is not None and self.mask_token is not None:
            x = torch.where(bool_masked_pos[:, :, None], self.mask_token, x)
        # x.shape[0], not len(x), which the exporter takes for a constant
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.encode(x if self.pos_embed is None else x + self.pos_embed)
        return self._head(x if self.norm is None else self.norm(x))

    def _head(self, x: Tensor) -> Tensor:
        if self.predicts_patches:
            return self.get_submodule("lm_head")(x[:, 1:])
        head = self._modules["head"]
        if head is None:
            return x
        return head(x[:, 0] if self.fc_norm is None else self.fc_norm(x[:, 1:].mean(1)))


def check_installed() -> None:
    """
    Raises:
        RunError: a package that writes ONNX is missing (exit code 2).
    """
    # a folder of that name is found too, but has no origin
    found = {name: find_spec(name) for name in WANTED}
    missing = [name for name, spec in found.items() if spec is None or spec.origin is None]
    if missing:
        raise RunError(f"--to onnx wants {' and '.join(missing)}; pip install 'fastbeit[export]'", USAGE)


def write(tensors: dict[str, Tensor], model: ModelConfig, image_size: Size, folder: Path) -> Exported:
    """`model.onnx`, for onnxruntime and others, with weights inside: it may have 2 GB, and BEiT-L has 1.2."""
    exported = Exported(tensors, model, image_size).eval().requires_grad_(False)
    num_patches = (image_size[0] // model.patch_size[0]) * (image_size[1] // model.patch_size[1])
    # two images: of one alone the exporter takes the number for a constant
    example = (torch.zeros(2, 3, *image_size), torch.zeros(2, num_patches, dtype=torch.bool))[: len(exported.inputs)]
    program = torch.onnx.export(
        exported,
        example,
        dynamo=True,
        verbose=False,
        input_names=list(exported.inputs),
        output_names=[exported.output],
        # of inputs that have the same number of images the exporter wants one to name it
        dynamic_shapes=({0: torch.export.Dim("batch")}, {0: torch.export.Dim.DYNAMIC})[: len(example)],
    )
    assert program is not None
    program.save(folder / FILE, external_data=False)
    return exported
