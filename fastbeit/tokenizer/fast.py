"""The DALL-E encoder for inference: what `dvae.Encoder` computes, `argmax(Encoder(x), 1)`, from weights prepared once.

- Weights are cast and laid out once; activations keep their channels last in memory, where no kernel reorders them.
- post_gain goes into the last convolution of each block: g (w * x + b) = (g w) * x + g b. OpenAI's 1/64 only shifts
  exponents: this rounds nothing but, in float16, weights that become subnormal.
- ReLU and the residual sum happen inside the convolution where the device has one that does so, else in place.
- Images go through in sub-batches of one fixed size, the last filled up: memory is bounded, and since the kernel of a
  layer, and with it the order of its sums, depends on the shape alone, an image's tokens do not depend on its batch.
- Logits are sums in float32, compared before any rounding, and there for a few rows at a time.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.errors import TokenizerError
from fastbeit.tokenizer.dvae import Decoder, Encoder, to_images, to_mapped
from fastbeit.tokenizer.frozen import Strided, likeliest_words

if TYPE_CHECKING:
    from fastbeit.tokenizer.dvae import Encoder

# images that go through together. A core is busy with one, whose widest activation (12 MB) stays in its cache; an H100
# is 3 % faster by 64 (0.9 GB of memory) than by 32, and 2 % more by 128
TOGETHER = {"cpu": 1}
TOGETHER_ON_GPU = 64
# cuDNN wants so many, of 16 bits: with the three of an image it took 6 ms for 256 images on an H100, of 58 in all
CUDNN_CHANNELS = 8
UNIT = (1, 1)  # stride and dilation of all convolutions


class Conv:
    """A convolution with frozen weights, from anything that PyTorch runs on."""

    adds_in_product = False  # a 1 x 1 convolution without bias adds to a total at no cost

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), bias
        side = weight.shape[-1] // 2
        self.padding = (side, side)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def relu(self, x: Tensor) -> Tensor:
        return self(x).relu_()

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Adds the result to `total`, in place."""
        return total.add_(self(x))

    def likeliest(self, x: Tensor) -> Tensor:
        """Argmax of the result of a 1 x 1 convolution: int64 [B, h, w], of equals the first."""
        assert self.bias is not None
        words = likeliest_words(x.permute(0, 2, 3, 1).flatten(0, 2), self.weight.flatten(1), self.bias.float())
        return words.view(len(x), *x.shape[2:])


class CudnnConv(Conv):
    """ReLU inside the convolution; one of 1 x 1 is a matrix product, whose library adds the bias, and to a total.

    PyTorch's own convolution adds its bias in a pass over the result: a quarter of the encoder's time on an H100.
    """

    adds_in_product = True

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.matrix = weight.flatten(1) if weight.shape[2:] == (1, 1) else None  # [out, in]
        super().__init__(weight if self.matrix is not None else _with_channels(weight, CUDNN_CHANNELS), bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.matrix is None:
            return super().__call__(_with_channels(x, CUDNN_CHANNELS))
        return F.linear(x.permute(0, 2, 3, 1), self.matrix, self.bias).permute(0, 3, 1, 2)

    def relu(self, x: Tensor) -> Tensor:
        x = _with_channels(x, CUDNN_CHANNELS)
        return torch.cudnn_convolution_relu(x, self.weight, self.bias, UNIT, self.padding, UNIT, 1)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        if self.matrix is None or self.bias is not None:
            return super().add_to(total, x)
        rows, products = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (total, x))  # views
        rows.addmm_(products, self.matrix.T)
        return total


class OneDnnConv(Conv):
    """Weights lie in memory as oneDNN's kernel wants them: `F.conv2d` on a CPU lays them out in each call.

    The operators are private to PyTorch, which lowers compiled convolutions to them.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__(weight, bias)
        self.weight, self.laid_out_for = weight.contiguous().to_mkldnn(), torch.Size()

    def __call__(self, x: Tensor) -> Tensor:
        return self._pointwise(x, "none")

    def relu(self, x: Tensor) -> Tensor:
        return self._pointwise(x, "relu")

    def _pointwise(self, x: Tensor, then: str) -> Tensor:
        self._lay_out_for(x.shape)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, UNIT, UNIT, 1, then, [], ""
        )

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        self._lay_out_for(x.shape)
        return torch.ops.mkldnn._convolution_pointwise_(
            total, x, self.weight, self.bias, self.padding, UNIT, UNIT, 1, "add", 1.0, None, [], None
        )

    def likeliest(self, x: Tensor) -> Tensor:
        # one image's logits, and a faster product than that of `likeliest_words` on a CPU
        return self(x.float()).argmax(1)

    def _lay_out_for(self, shape: torch.Size) -> None:
        """Right for any shape, fast for this one: all batches of a run have the same."""
        if shape != self.laid_out_for:
            plain = self.weight.to_dense().to_mkldnn()
            self.weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(plain, self.padding, UNIT, UNIT, 1, shape)
            self.laid_out_for = shape


def _with_channels(x: Tensor, multiple: int) -> Tensor:
    """x [n, C, h, w], zeros added up to a multiple of channels, channels last."""
    spare = -x.shape[1] % multiple
    return F.pad(x, (0, 0, 0, 0, 0, spare)).contiguous(memory_format=torch.channels_last) if spare else x


def conv_on(device: torch.device, dtype: torch.dtype) -> type[Conv]:
    """The fastest one there is."""
    if device.type == "cuda" and torch.backends.cudnn.is_available() and not torch.version.hip:
        return CudnnConv
    onednn = torch.ops.mkldnn
    has_onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if has_onednn and (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and onednn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and onednn._is_mkldnn_fp16_supported())
    ):
        return OneDnnConv
    return Conv


class Block:
    """`dvae.Block`: id_path(x) + post_gain res_path(x); overwrites x."""

    def __init__(self, convs: list[Conv], id_path: Conv | None):
        self.convs, self.id_path = convs, id_path

    def __call__(self, x: Tensor) -> Tensor:
        # a block that changes the width needs x no more after its id path, so it may be written over
        total, hidden = (x, x.relu()) if self.id_path is None else (self.id_path(x), x.relu_())
        *first, last = self.convs
        for conv in first:
            hidden = conv.relu(hidden)
        return last.add_to(total, hidden)


class FastEncoder:
    """Mapped pixels float32 [B, 3, h, w] to tokens int64 [B, N], row by row; keeps nothing of `encoder`.

    Args:
        encoder: on the device where tokens are wanted; it is left as it is.
        dtype: of weights and activations.
    """

    def __init__(self, encoder: "Encoder", dtype: torch.dtype):
        arch, weights = encoder.arch, {name: value.detach() for name, value in encoder.state_dict().items()}
        self.dtype, self.device = dtype, weights["blocks.input.w"].device
        self.together = TOGETHER.get(self.device.type, TOGETHER_ON_GPU)
        self._seen_finite = False
        kind = conv_on(self.device, dtype)

        def conv(name: str, gain: float = 1.0, bias: Tensor | None = None) -> Conv:
            given = gain * weights[f"{name}.b"] if bias is None else bias
            return kind((gain * weights[f"{name}.w"]).to(dtype), given.to(dtype) if len(given) else None)

        def block(name: str) -> Block:
            id_path, last = f"{name}.id_path", f"{name}.res_path.conv_4"
            convs = [conv(f"{name}.res_path.conv_{i}") for i in (1, 2, 3)]
            if f"{id_path}.w" not in weights:
                return Block([*convs, conv(last, arch.post_gain)], None)
            if not kind.adds_in_product:
                return Block([*convs, conv(last, arch.post_gain)], conv(id_path))
            both = weights[f"{id_path}.b"] + arch.post_gain * weights[f"{last}.b"]
            return Block([*convs, conv(last, arch.post_gain, both[:0])], conv(id_path, 1.0, both))

        self.input = conv("blocks.input")
        self.groups = [
            [block(f"blocks.group_{group}.block_{i}") for i in range(1, arch.n_blk_per_group + 1)]
            for group in range(1, arch.group_count + 1)
        ]
        head, bias = weights["blocks.output.conv.w"].to(dtype, copy=True), weights["blocks.output.conv.b"].clone()
        # a CPU has no product of half precision that gives float32; the values are rounded all the same
        self.head = kind(head.float(), bias) if self.device.type == "cpu" else kind(head, bias)

    def __call__(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """
        Args:
            places: int64 [B, M] of 0 to N - 1: tokens are wanted there alone, [B, M]; None: everywhere.

        Raises:
            TokenizerError: activations overflow. On a GPU the first batch alone is looked at: a look waits for it.
        """
        # no autotuning, which may choose anew in each process, and no TF32: it rounds fp32 to the 11 bits of fp16
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee")
        with exact:
            if places is None:
                return torch.cat([self._tokens(part, None) for part in x.split(self.together)])
            parts = zip(x.split(self.together), places.split(self.together), strict=True)
            return torch.cat([self._tokens(part, of_part) for part, of_part in parts])

    def _tokens(self, x: Tensor, places: Tensor | None) -> Tensor:
        missing = self.together - len(x)
        features = self.features(F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x)
        self._check_finite(features)
        if places is not None:
            features = _taken(features, F.pad(places, (0, 0, 0, missing)))
        return self.head.likeliest(features).flatten(1)[: len(x)]

    def features(self, x: Tensor) -> Tensor:
        """What the head chooses words by: [B, C, h / stride, w / stride], of `dtype`."""
        x = self.input(x.to(self.dtype, memory_format=torch.channels_last))
        for i, blocks in enumerate(self.groups):
            x = F.max_pool2d(x, 2) if i else x
            for block in blocks:
                x = block(x)
        return x.relu_()

    def _check_finite(self, features: Tensor) -> None:
        if self.device.type == "meta" or (self._seen_finite and self.device.type != "cpu"):
            return
        self._seen_finite = bool(features.isfinite().all())
        if not self._seen_finite:
            raise TokenizerError(
                f"the tokenizer's activations are not finite in {self.dtype}, which ends at "
                f"{torch.finfo(self.dtype).max:.3g}; set tokenizer.precision to bf16 or fp32"
                + ("; its weights are damaged or not trained" if self.dtype == torch.float32 else "")
            )


def _taken(features: Tensor, places: Tensor) -> Tensor:
    """Of [B, C, h, w] the columns at places [B, M]: [B, C, 1, M], channels last."""
    rows = features.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C], a view
    rows = rows.gather(1, places[:, :, None].expand(-1, -1, rows.shape[2]))
    return rows[:, None].permute(0, 3, 1, 2)


class DiscreteVAE(Strided):
    """A frozen `Tokenizer`; `disk.load_tokenizer` makes one.

    Not an `nn.Module`, so that it never ends up among the weights of the model that uses it.

    Args:
        encoder: on the device where tokens are wanted; its weights are prepared once (`fast.py`) and not kept.
        read_decoder: called once, when the first tokens are decoded: pre-training never needs the decoder.
        fingerprint: identifies the weights.
        dtype: in which the encoder computes.
    """

    def __init__(
        self,
        encoder: Encoder,
        read_decoder: Callable[[], Decoder],
        fingerprint: str,
        dtype: torch.dtype = torch.float32,
    ):
        self.arch, self.fingerprint, self.dtype = encoder.arch, fingerprint, dtype
        self.vocab_size, self.stride = encoder.arch.vocab_size, encoder.arch.stride
        self.device = next(encoder.parameters()).device
        self._encode, self._read_decoder = FastEncoder(encoder, dtype), read_decoder

    @cached_property
    def _decoder(self) -> Decoder:
        return self._read_decoder().requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self._encode(to_mapped(self.checked_images(images)))

    @torch.no_grad()
    def encode_at(self, images: Tensor, places: Tensor) -> Tensor:
        return self._encode(to_mapped(self.checked_images(images)), places.to(self.device))

    @torch.no_grad()
    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return to_images(self._decoder.decode_words(self.checked_ids(ids, grid)))
