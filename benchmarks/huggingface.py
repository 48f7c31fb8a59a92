"""Hugging Face's BEiT with our weights: an oracle of the model, and a peer of its speed."""

from torch import Tensor
from transformers import BeitConfig, BeitForMaskedImageModeling

from fastbeit.config.sections import ModelConfig
from fastbeit.model.vit import NORM_EPS

# beginnings and parts of names, ours to theirs; the first that fits is replaced
TOP = {
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "pos_embed": "beit.embeddings.position_embeddings",
    "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
    "rel_pos_bias": "beit.shared_position_bias",
    "norm": "layernorm",
    "lm_head": "lm_head",
}
BLOCK = {
    "attn.relative": "relative_position_bias.relative",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "gamma_": "lambda_",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp": "mlp",
}


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict, or gradients by its names, under the names of transformers 5; indices are left out."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("relative_position_index"):
            continue
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            prefix = f"beit.layers.{block}."
            if rest == "attn.qkv.weight":
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{prefix}attention.{part}_proj.weight"] = rows
                continue
            renamed[prefix + _replace_start(rest, BLOCK)] = tensor
        else:
            renamed[_replace_start(name, TOP)] = tensor
    return renamed


def _replace_start(name: str, starts: dict[str, str]) -> str:
    start = next(start for start in starts if name.startswith(start))
    return starts[start] + name.removeprefix(start)


def build_huggingface(model: ModelConfig, image_size: int, vocab_size: int) -> BeitForMaskedImageModeling:
    """Their model of our shape; square images and patches, as their relative position wants."""
    config = BeitConfig(
        vocab_size=vocab_size,
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=model.mlp_width,
        layer_norm_eps=NORM_EPS,  # theirs is 1e-12
        image_size=image_size,
        patch_size=model.patch_size[0],
        use_mask_token=True,
        use_absolute_position_embeddings=model.absolute_position,
        use_relative_position_bias=model.relative_position == "per_block",
        use_shared_relative_position_bias=model.relative_position == "shared",
        layer_scale_init_value=model.layer_scale,
        drop_path_rate=0.0,
    )
    oracle = BeitForMaskedImageModeling(config)
    oracle.set_attn_implementation("eager")
    return oracle
