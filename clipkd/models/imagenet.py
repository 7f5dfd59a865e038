"""ImageNet-1k: class names, prompt templates and synset ids, in order of synset id."""

import open_clip


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """OpenAI's curated names of the 1,000 classes, in order of synset id, and the 80 templates with placeholder {c}."""
    return list(open_clip.IMAGENET_CLASSNAMES), [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def imagenet_synsets() -> list[str]:
    """Synset ids of the 1,000 classes, in order."""
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()
