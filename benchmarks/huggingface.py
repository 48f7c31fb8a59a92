"""Hugging Face's BEiT with our weights: an oracle of the model, and a peer of its speed."""

from transformers import BeitConfig, BeitForMaskedImageModeling

from fastbeit.config.sections import ModelConfig
from fastbeit.model.vit import NORM_EPS


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
