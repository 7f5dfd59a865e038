"""Shapes in annotations are checked while the tests run, and what several files share."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

# Before clipkd is imported: a wrong shape or dtype then fails where it arises, not three functions later.
jaxtyping.install_import_hook(
    [
        *("clipkd.losses", "clipkd.objective.distiller", "clipkd.objective.terms", "clipkd.objective.comparison"),
        *("clipkd.objective.memory", "clipkd.evaluation.zeroshot"),
        *("clipkd.evaluation.metrics", "clipkd.evaluation.measure"),
    ],
    "beartype.beartype",
)

# The tensors are small: on a busy machine two threads wait for each other sixty times longer than they compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def vocabulary() -> Iterator[None]:
    """Unpack open_clip's vocabulary once for each context, since that takes longer than most tests."""
    kept: dict[str, dict[str, Any]] = {}
    tokenizers: Any = sys.modules.get("open_clip.tokenizer")  # an import would take longer where no test needs it
    with pytest.MonkeyPatch.context() as patch:
        if tokenizers is not None:
            make = tokenizers.SimpleTokenizer.__init__

            def make_once(tokenizer: Any, *arguments: Any, **options: Any) -> None:
                key = repr((arguments, options))
                if key not in kept:
                    make(tokenizer, *arguments, **options)
                    kept[key] = dict(vars(tokenizer))
                vars(tokenizer).update(kept[key])

            patch.setattr(tokenizers.SimpleTokenizer, "__init__", make_once)
        yield


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Without the checks above, so that a test sees the error that a user gets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIPModel with tokenizer and image processor, as transformers saves them; the tokenizer from open_clip's BPE."""
    import open_clip
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("transformers") / "clip"
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"max_position_embeddings": 16, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, **text, "vocab_size": 49408},
        vision_config={**tower, "image_size": 48, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    bpe = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in bpe.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks), model_max_length=16).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, image_mean=[0.1, 0.2, 0.3], resample=2
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SiglipModel with a tokenizer of words trained here and a resolution of its own."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("transformers") / "siglip"
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "</s>"], vocab_size=100)
    words.train_from_iterator(["a drawing of a cat", "an emoji of two dogs", "one grinning face , smile"], trainer)
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 100, "max_position_embeddings": 10, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    config = SiglipConfig(text_config={**tower, **text}, vision_config={**tower, "image_size": 40, "patch_size": 8})
    torch.manual_seed(1)
    model = SiglipModel(config)
    model.logit_scale.data.fill_(2.3)
    model.logit_bias.data.fill_(-9.0)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 40, "width": 40}).save_pretrained(folder)
    return folder
