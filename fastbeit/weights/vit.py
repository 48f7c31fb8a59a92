"""Plain ViTs that BEiT is compared with, as starts of the same fine-tuning; in only.

    DeiT, and ViT trained with labels       timm's names, alone or under `model`
    DINO                                    `teacher` or `student`, `backbone.`; the released backbone has no prefix
    MoCo v3                                 `state_dict`, `module.base_encoder.`
    MAE                                     `model`; the decoder is left out

Their queries, keys and values have one packed bias. Our keys have none, and need none: see `KEY_BIAS`.
"""

from collections.abc import Iterable

from fastbeit.weights.dialect import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Dialect,
    Hints,
    Names,
    channels,
    pair,
    positive,
    reason_for,
    sorted_out,
    under_prefix,
)
from fastbeit.weights.pickles import Malformed
from fastbeit.weights.source import Source

PREFIXES = r"((module|backbone|base_encoder|momentum_encoder)\.)*"
MOCO_HEADS = {384: 12}  # its ViT-S has heads of 32; elsewhere a head has 64
OUTSIDE = {
    r"(module\.)?momentum_encoder\.": "the slow copy that the base encoder learns from",
    r"(module\.)?predictor\.": "MoCo v3's predictor",
    r"(module\.)?head\.": "DINO's projection head",
}
INSIDE = {
    r"head\.\d": "MoCo v3's projection head",
    r"(decoder_|mask_token)": "MAE's decoder",
}
DISTILLED = (
    "has a token and a head for distillation (DeiT's distilled models), which BEiT has not; take the model without them"
)
PRE_LOGITS = "follows a layer (pre_logits) that BEiT has not"


def fits(names: Iterable[str]) -> bool:
    return any(name.endswith("blocks.0.attn.qkv.bias") for name in names)


def recognise(source: Source) -> Dialect:
    """Which of them; files of encoders alone look the same, and are called vit."""
    names = source.shapes.keys()
    if source.wrapper in ("teacher", "student"):
        return Dialect("dino", translate, _theirs, _imagenet)
    if any("base_encoder." in name or "momentum_encoder." in name for name in names):
        return Dialect("mocov3", translate, _theirs, _mocov3)
    if any("decoder_embed." in name for name in names):
        return Dialect("mae", translate, _theirs, _imagenet)
    return Dialect("vit", translate, _theirs, _from_timm)


def translate(names: Iterable[str]) -> Names:
    names = list(names)
    prefix = under_prefix(names, "patch_embed.proj.weight", PREFIXES, preferred="base_encoder.")
    has_pre_logits = any(prefix + "pre_logits." in name for name in names)

    def reason(name: str) -> str | None:
        own = name.removeprefix(prefix)
        if own.startswith(("dist_token", "head_dist.")):
            raise Malformed(DISTILLED)
        if own.startswith("pre_logits."):
            return "a layer before the classifier, which BEiT has not"
        if own.startswith("head.") and has_pre_logits:
            return PRE_LOGITS
        return reason_for(own, INSIDE if name.startswith(prefix) else OUTSIDE)

    return sorted_out(names, reason, lambda name: name.removeprefix(prefix))


def _theirs(name: str) -> str:
    return name.replace("attn.q_bias", "attn.qkv.bias").replace("attn.v_bias", "attn.qkv.bias")


def _imagenet(source: Source) -> Hints:
    return Hints(mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _mocov3(source: Source) -> Hints:
    shape = next(shape for name, shape in source.shapes.items() if name.endswith("patch_embed.proj.weight"))
    return _imagenet(source)._replace(num_heads=MOCO_HEADS.get(shape[0] if shape else 0))


def _from_timm(source: Source) -> Hints:
    return timm_hints(source)


def timm_hints(source: Source) -> Hints:
    """Of the config.json that timm writes beside weights; nothing where there is none."""
    args, trained = source.config.get("model_args"), source.config.get("pretrained_cfg")
    args, trained = (value if isinstance(value, dict) else {} for value in (args, trained))
    size = trained.get("input_size")
    return Hints(
        num_heads=positive(args.get("num_heads")),
        image_size=pair(args.get("img_size")) or (pair(size[1:]) if isinstance(size, list) else None),
        mean=channels(trained.get("mean")),
        std=channels(trained.get("std")),
    )
