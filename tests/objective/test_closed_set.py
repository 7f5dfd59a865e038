"""Closed-set distillation: which classes and prompts there are, who reads them, and the teacher's class vectors."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipkd import distributed
from clipkd.config.terms import ClosedSetTerm
from clipkd.models.encoder import Encoder
from clipkd.objective.closed_set import ClosedSet, class_vectors, open_closed_set, read_classes

CPU = torch.device("cpu")


def class_file(folder: Path, text: str) -> str:
    path = folder / "classes.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_classes_and_templates_come_from_imagenet_a_file_or_the_options(tmp_path: Path) -> None:
    names, templates = read_classes(ClosedSetTerm(classes="imagenet"))
    assert (len(names), len(templates), len(set(templates))) == (1000, 80, 80)
    assert (names[0], names[1], names[-1]) == ("tench", "goldfish", "toilet paper")
    assert templates[0] == "a bad photo of a {c}."
    assert all(template.count("{c}") == 1 for template in templates)
    path, own = class_file(tmp_path, "\n red panda \n\ncat\n  \nøre\n"), ("{c}!", "my {c}")
    assert read_classes(ClosedSetTerm(classes=path)) == (["red panda", "cat", "øre"], ["a photo of a {c}."])
    for classes in (path, "imagenet"):
        assert read_classes(ClosedSetTerm(classes=classes, templates=own))[1] == list(own)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\ndog\n cat\n", "names 'cat' twice"),
        ("cat\n", "names only \\['cat'\\]"),
        ("\n", "names only \\[\\]"),
    ],
)
def test_a_file_without_two_different_classes_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = class_file(tmp_path, text)
    with pytest.raises(ValueError, match=rf"^objective\.closed_set\.classes: {path} {words}"):
        read_classes(ClosedSetTerm(classes=path))
    with pytest.raises(FileNotFoundError, match=rf"^objective\.closed_set\.classes: no file {tmp_path}; "):
        read_classes(ClosedSetTerm(classes=str(tmp_path)))


@pytest.mark.parametrize(
    ("ranks", "shares"), [(1, [[0, 1, 2, 3, 4]]), (2, [[0, 1, 2], [3, 4, 4]]), (4, [[0, 1], [2, 3], [4, 4], [4, 4]])]
)
def test_processes_share_the_prompts(ranks: int, shares: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    closed_set = ClosedSet([torch.arange(5)[:, None]], torch.eye(5), class_prior=False)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank, share in enumerate(shares):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert closed_set.prompts_at(0)[:, 0].tolist() == share


def encoder(texts: Sequence[str], vectors: Tensor, *, first_token: int = 0) -> Encoder:
    """Knows these texts alone: the token of each is its number, its feature, before it is normalised, its vector."""
    return Encoder(
        nn.Embedding.from_pretrained(vectors, freeze=False),
        name="list",
        image_tower=lambda embedding, images: images,
        text_tower=lambda embedding, tokens: embedding(tokens[:, 0] - first_token),
        preprocess_config={"size": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"},
        tokenize=lambda queries: torch.tensor([[first_token + texts.index(text)] for text in queries]),
        tokenizer_name="list",
        dim=vectors.shape[1],
    )


def open_set(folder: Path, names: list[str], templates: list[str], vectors: Tensor, **options: bool) -> ClosedSet:
    """vectors: the teacher's, class by class and within each template by template. Student's tokens begin at 100."""
    texts = [template.replace("{c}", name) for name in names for template in templates]
    term = ClosedSetTerm(classes=class_file(folder, "\n".join(names)), templates=tuple(templates), **options)
    student = encoder(texts, torch.zeros(len(texts), 5), first_token=100)
    classes = class_vectors(term, encoder(texts, vectors), CPU)
    return open_closed_set(term, student=student, teacher_classes=classes, device=CPU)


def test_the_students_prompts_take_turns_by_template(tmp_path: Path) -> None:
    bank = open_set(tmp_path, ["cat", "dog"], ["a {c}", "{c}!", "the {c}"], torch.ones(6, 4))
    turns = [[[100], [103]], [[101], [104]], [[102], [105]]]
    assert [bank.prompts_at(step).tolist() for step in range(7)] == [*turns, *turns, turns[0]]


def test_the_teachers_class_vectors_by_hand(tmp_path: Path) -> None:
    vectors = torch.tensor([[3.0, 0.0], [0.0, 2.0], [3.0, 4.0], [6.0, -8.0]])
    bank = open_set(tmp_path, ["cat", "dog"], ["a {c}", "{c}!"], vectors)
    # cat: (1, 0) and (0, 1); dog: (0.6, 0.8) and (0.6, -0.8).
    torch.testing.assert_close(bank.teacher_classes, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))
    assert not bank.teacher_classes.requires_grad
