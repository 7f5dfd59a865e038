"""A small image tower of SigLIP's kind, with a pool of attention, as timm makes the large ones."""

from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer


@register_model
def vit_clipkd_test_siglip(
    pretrained: bool = False, num_classes: int = 0, global_pool: str = "map", **_: Any
) -> VisionTransformer:
    return VisionTransformer(
        img_size=40,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=3,
        num_classes=num_classes,
        class_token=False,
        global_pool=global_pool,
    )
