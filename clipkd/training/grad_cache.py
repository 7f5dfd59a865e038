"""GradCache (arXiv 2101.06983): micro-batches with the negatives and the gradient of the complete batch.

Features are computed without activations, one micro-batch at a time; the loss of the batch gives their gradients; and each
micro-batch passes the towers again, through which these gradients flow back.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipkd.models.encoder import Encoder
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller, Metrics
from clipkd.views import Features, View, join

Encoded = tuple[Features, Float[Tensor, "k d"] | None]
"""Features of a view, and of class prompts."""


def backward(
    distiller: Distiller,
    view: View,
    targets: Targets,
    *,
    step: int,
    micro_batches: int,
    reseed: Callable[[int], Any],
    model: Callable[..., Encoded] | None = None,
    start_backward: Callable[[Tensor], Any] = Tensor.backward,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Loss and metrics of a batch; adds its gradients to the parameters' as one backward pass would.

    reseed: called with a micro-batch's number before each of its two passes, for equal dropout. model: the distiller as
    DDP wraps it, used for the last micro-batch. start_backward: of a scalar, such as Accelerator.backward. A BatchNorm sees
    micro-batches, and counts each once in its averages.
    """
    views, prompts = view.split(micro_batches), split(distiller.prompts_at(step), micro_batches)

    def encode(encoder: Callable[..., Encoded], number: int) -> Encoded:
        reseed(number)
        return encoder(views[number], prompts[number])

    encoded = encode_all(distiller.student, lambda number: encode(distiller, number), micro_batches)
    features, classes = as_leaves(encoded, distiller.student)
    loss, metrics = distiller.loss(features, targets, step=step, class_features=classes)
    # What the loss reads besides the towers: projections and scales of single terms.
    beside = [p for name, p in distiller.named_parameters() if p.requires_grad and not name.startswith("student.")]
    image, text, class_gradient, *rest = gradients(
        loss, [features.image, features.text, classes, features.logit_scale, features.logit_bias, *beside]
    )
    # DDP's exchange waits for every parameter, so the last part reaches both towers even if the loss reads one alone.
    image = torch.zeros_like(features.image) if image is None else image
    text = torch.zeros_like(features.text) if text is None else text
    upstream = [split(gradient, micro_batches) for gradient in (image, text, class_gradient)]
    for number in range(micro_batches):
        last = number == micro_batches - 1
        features, classes = encode(model if last and model is not None else distiller, number)
        outputs, their_gradients = [features.image, features.text, classes], [parts[number] for parts in upstream]
        if last:
            outputs += [features.logit_scale, features.logit_bias, *beside]
            their_gradients += rest
        pairs = zip(outputs, their_gradients, strict=True)
        # The gradient of this sum with respect to each output is the upstream gradient.
        products = [(o * g).sum() for o, g in pairs if o is not None and g is not None and o.requires_grad]
        if products:
            start_backward(torch.stack(products).sum())
    return loss.detach(), metrics


@torch.no_grad()
def encode_all(student: nn.Module, encode: Callable[[int], Encoded], micro_batches: int) -> list[Encoded]:
    """Features of every micro-batch, without activations; restores buffers (BatchNorm's averages)."""
    buffers = [buffer.clone() for buffer in student.buffers()]
    encoded = [encode(number) for number in range(micro_batches)]
    for buffer, before in zip(student.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return encoded


def as_leaves(encoded: list[Encoded], student: Encoder) -> Encoded:
    """Detached features of the whole batch; leaves where the student trains, constants where it is frozen."""
    features = join([part for part, _ in encoded])
    classes = [part for _, part in encoded if part is not None]
    scale, bias = student.logit_scale, student.logit_bias
    trains_image, trains_text = (student.frozen.get(tower) != "frozen" for tower in ("image", "text"))
    leaves = Features(
        features.image.detach().requires_grad_(trains_image),
        features.text.detach().requires_grad_(trains_text),
        scale.detach().requires_grad_(scale.requires_grad),
        None if bias is None else bias.detach().requires_grad_(bias.requires_grad),
    )
    return leaves, torch.cat(classes).requires_grad_(trains_text) if classes else None


def split(rows: Tensor | None, parts: int) -> list[Tensor | None]:
    """Split as `View.split` does; None for a part without rows."""
    return [None] * parts if rows is None else [part if len(part) else None for part in rows.tensor_split(parts)]


def gradients(loss: Float[Tensor, ""], leaves: list[Tensor | None]) -> list[Tensor | None]:
    """Gradient of each leaf; None for a constant, a missing leaf, or one that the loss does not depend on."""
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
