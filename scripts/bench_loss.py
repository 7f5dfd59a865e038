"""The GKL loss on similarity logits, forward and backward: time, memory, useful FLOP/s and gradient error of its forms.

    python scripts/bench_loss.py --output eval/results/loss.jsonl

The objective is the default recipe's: student queries, in the teacher's space, against teacher keys of the batch and of a
queue, N = B + Q in all; gamma 0.3, ce_weight 1, mse_weight 0.1, mean of both directions. All forms get
the same features: unit-norm, in clusters, of width --teacher-dim, given in --dtype; student and teacher at logit scale 100,
the student's with a gradient. The forms take turns step by step, so that a busy machine slows all alike
(OMP_WAIT_POLICY=PASSIVE helps there).

    published            B × N × N differences, as in the published code
    expanded             O(B·N) on whole matrices as in the paper's appendix (NeurIPS 2024, Algorithm 2; arXiv 2305.13948 and
                         2503.08038), with the square expanded
    plain                clipkd.losses.gkl on whole logit matrices, float32 at least
    fused                clipkd.losses.query_statistics; fused_compiled: its panels through torch.compile
    open_clip_soft_ce    another objective, on student keys without a queue: open_clip's DistillClipLoss, contrastive + soft
                         CE; fused_soft_ce: the same as the recipe openclip has it, query_statistics and info_nce in panels

Peak memory is what a step takes beyond its inputs, its gradients included: on a GPU torch.cuda.max_memory_allocated, on a CPU
the resident set of a fresh process (Linux; else null), both reset after a first step, less what was there. The first step
compiles, from an empty cache when a run begins. What fails has a row with its `error`. Errors of gradients are
‖found − exact‖ / ‖exact‖; exact: the loss of the same rounded features in float64, by the form that the row names. of_gemm:
useful FLOP/s over those of a square product in the features' type (and in float32, torch's default: no TF32), the best of 7.
"""

import argparse
import gc
import multiprocessing.forkserver
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clipkd import files, losses, progress
from clipkd.inference import bench
from clipkd.inference.measure import peak_rss_mb

T = TypeVar("T")
Row = dict[str, Any]
Inputs = dict[str, Any]
"""image and text of the student; image_keys and text_keys of the teacher, the batch's first; logit_scale, whose type, float32
at least, is also that of whole logit matrices; tile_size."""
CE_WEIGHT, MSE_WEIGHT, GAMMA, SCALE = 1.0, 0.1, 0.3, 100.0
LEAVES = ("image", "text", "logit_scale")
SHOWN = ("variant", "batch", "queue", "dtype", "ms", "ms_min", "peak_bytes", "useful_tflops", "of_gemm")
SHOWN += ("first_step_seconds", "error_image", "error_text", "error_logit_scale", "error")
TRAFFIC = ("batch", "ranks", "teacher_keys", "student_keys", "open_clip_sharded", "whole_logits")
PRELOAD = ["open_clip.loss", "clipkd.losses", "clipkd.inference.measure", "clipkd.progress", "rich.table"]
CPU = {"batch": [512, 2048, 4096], "queue": [0, 512], "dtype": ["float32"]}
GPU = {"batch": [1024, 8192, 16384, 32768, 65536], "queue": [0, 65536], "dtype": ["float32", "float16", "bfloat16"]}


class Setting(NamedTuple):
    batch: int
    queue: int
    dtype: str
    dim: int
    teacher_dim: int
    tile_size: int | None
    device: str


def make_inputs(setting: Setting) -> Inputs:
    """Expected cosines: 0.3 in a pair, 0.2 in a cluster of about 8, 0.1 else. They scatter by about 0.9/√width around these."""
    device, dtype, count = setting.device, getattr(torch, setting.dtype), setting.batch + setting.queue
    torch.manual_seed(0)
    normal = partial(torch.randn, count, setting.teacher_dim, device=device, dtype=torch.float64)
    cluster, made = torch.arange(count, device=device) % -(-count // 8), []
    for _ in ("student", "teacher"):
        shared = normal()[:1] + normal()[cluster] + normal()
        made += [F.normalize(shared + 7**0.5 * normal(), dim=1).to(dtype) for _ in range(2)]
    inputs: Inputs = {name: each[: setting.batch].clone() for name, each in zip(LEAVES[:2], made[:2], strict=True)}
    inputs["logit_scale"] = torch.tensor(SCALE, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return inputs | {"image_keys": made[2], "text_keys": made[3], "tile_size": setting.tile_size}


def gradients(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    return torch.autograd.grad(loss(inputs), leaves)


def directions(inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, teacher's queries and keys."""
    (image, text), (image_keys, text_keys) = ([inputs[f"{n}{s}"] for n in ("image", "text")] for s in ("", "_keys"))
    return [(image, image_keys[: len(image)], text_keys), (text, text_keys[: len(text)], image_keys)]


def whole(loss: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    """Of whole logit matrices, the mean of both directions."""
    scale, values = inputs["logit_scale"], []
    for way in directions(inputs):
        queries, teacher_queries, keys = (each.to(scale.dtype) for each in way)
        values.append(loss(scale * queries @ keys.T, SCALE * teacher_queries @ keys.T))
    return torch.stack(values).mean()


def published_gkl(student: Tensor, teacher: Tensor) -> Tensor:
    """With ¼ Σ w_ij w_ik ((t_ij − t_ik) − (s_ij − s_ik))² / Σ w_ij w_ik, w = softmax(teacher)^γ, as it is written."""
    w = (GAMMA * teacher.log_softmax(dim=-1)).exp()
    pair_weight = w[:, :, None] * w[:, None, :]
    student_pairs, teacher_pairs = (each[:, :, None] - each[:, None, :] for each in (student, teacher))
    squares = pair_weight * (teacher_pairs - student_pairs).square()
    ce = -(teacher.softmax(dim=-1) * student.log_softmax(dim=-1)).sum(dim=-1).mean()
    return CE_WEIGHT * ce + MSE_WEIGHT * squares.sum() / pair_weight.sum() / 4


def expanded_gkl(student: Tensor, teacher: Tensor) -> Tensor:
    """The same with Σ_jk w_j w_k (d_j − d_k)² = 2 (Σ w · Σ w d² − (Σ w d)²), d = teacher − student."""
    w, difference = (GAMMA * teacher.log_softmax(dim=-1)).exp(), teacher - student
    mass, weighted = w.sum(dim=-1), w * difference
    squares = 2 * (mass * (weighted * difference).sum(dim=-1) - weighted.sum(dim=-1).square())
    ce = -(teacher.softmax(dim=-1) * student.log_softmax(dim=-1)).sum(dim=-1).mean()
    return CE_WEIGHT * ce + MSE_WEIGHT * squares.sum() / mass.square().sum() / 4


def weigh(rows: losses.SoftTargetStatistics) -> Tensor:
    assert isinstance(rows, losses.RowStatistics)
    wmse = 0.5 * (losses.row_weights(rows.log_weight_mass) * rows.variance).sum()
    return CE_WEIGHT * rows.ce.mean() + MSE_WEIGHT * wmse


def fused(inputs: Inputs, **options: Any) -> Tensor:
    options |= {"logit_scale": inputs["logit_scale"], "teacher_logit_scale": SCALE, "gamma": GAMMA}
    options["tile_size"] = inputs["tile_size"]
    found = [losses.query_statistics(own, keys, teacher, keys, **options) for own, teacher, keys in directions(inputs)]
    return torch.stack([weigh(rows) for rows in found]).mean()


def fused_soft_ce(inputs: Inputs) -> Tensor:
    scale, tile_size, values = inputs["logit_scale"], inputs["tile_size"], []
    image, text, t_image, t_text = (
        inputs[name].to(scale.dtype) for name in ("image", "text", "image_keys", "text_keys")
    )
    pairs, height = (
        torch.arange(len(image), device=image.device),
        losses.panel_height(len(image), image.device, tile_size),
    )
    scales = {"logit_scale": scale, "teacher_logit_scale": SCALE, "tile_size": tile_size}
    for queries, keys, *teacher in ((image, text, t_image, t_text), (text, image, t_text, t_image)):

        def contrast(queries: Tensor, own: Tensor, keys: Tensor = keys) -> dict[str, Tensor]:
            return {"value": losses.info_nce(scale * queries @ keys.T, own)}

        values.append(losses.query_statistics(queries, keys, *teacher, **scales).ce)
        values[-1] = values[-1] + losses.in_panels(contrast, (queries, pairs), height=height)["value"]
    return torch.stack(values).mean()


def open_clip_soft_ce(inputs: Inputs) -> Tensor:
    from open_clip.loss import DistillClipLoss  # seconds, needed by this form alone

    names = (*LEAVES, "image_keys", "text_keys")
    return torch.stack(DistillClipLoss()(*(inputs[name] for name in names), SCALE)).sum()


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {
    "published": partial(whole, published_gkl),
    "expanded": partial(whole, expanded_gkl),
    "plain": partial(whole, partial(losses.gkl, ce_weight=CE_WEIGHT, mse_weight=MSE_WEIGHT, gamma=GAMMA)),
    "fused": fused,
    "fused_compiled": partial(fused, compiled=True),
    "open_clip_soft_ce": open_clip_soft_ce,
    "fused_soft_ce": fused_soft_ce,
}


def least_bytes(variant: str, setting: Setting) -> int:
    """Of a step: so many logit matrices, or tensors of all pairs of keys, exist at once (measured, rounded down)."""
    keys = setting.batch + setting.queue
    matrices = {"published": 7 * keys, "expanded": 13, "plain": 15, "open_clip_soft_ce": 5}.get(variant, 0)
    return matrices * setting.batch * keys * max(4, getattr(torch, setting.dtype).itemsize)


def useful_flop(variant: str, setting: Setting) -> int:
    """2·t per logit and gradient: on teacher keys 2·B·N logits of both models, and the queries' gradients; on student keys
    B² logits of both models, which serve both directions, and the gradients of images and texts. Logits computed again are
    not useful.
    """
    products = 4 * setting.batch if "soft_ce" in variant else 6 * (setting.batch + setting.queue)
    return 2 * setting.teacher_dim * setting.batch * products


def bytes_sent(batch: int, ranks: int, dim: int, teacher_dim: int) -> Row:
    """Bytes that each of W ranks sends per step of `batch` pairs in all: float32, ring collectives, without numbers per row.

    All-gather and reduce-scatter of S bytes in all: (W−1)/W·S. teacher_keys: all-gather of the teacher's image and text.
    student_keys, open_clip_sharded (--local-loss --gather-with-grad, NCCL): that, all-gather of the student's, reduce-scatter
    of their gradients. whole_logits: all-gather of both B × B logits, reduce-scatter of one.
    """
    student, teacher, logits = (4 * batch * columns for columns in (2 * dim, 2 * teacher_dim, batch))
    total = teacher, 2 * student + teacher, 2 * student + teacher, 3 * logits
    sent = {name: size * (ranks - 1) // ranks for name, size in zip(TRAFFIC[2:], total, strict=True)}
    return {"kind": "bytes", "batch": batch, "ranks": ranks, "dim": dim, "teacher_dim": teacher_dim, **sent}


def exact_gradients(setting: Setting, inputs: Inputs, limit: float, soft_ce: bool) -> tuple[str, tuple[Tensor, ...]]:
    """In float64, on whole matrices or fused where memory is short; and which of the two."""
    inputs = {name: each.detach().double() if isinstance(each, Tensor) else each for name, each in inputs.items()}
    short = 2 * least_bytes("plain", setting._replace(dtype="float64")) > limit
    form = (("plain", "fused"), ("open_clip_soft_ce", "fused_soft_ce"))[soft_ce][short]
    return f"{form} float64", gradients(VARIANTS[form], inputs)


def attempt(work: Callable[[], T]) -> T | str:
    """What work returns, or why there is nothing: no memory (a killed process, too), or a device or compiler that cannot."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        kind = "out of memory: " * isinstance(error, MemoryError | BrokenExecutor) + type(error).__name__
        reason = f"{kind}: {error}".splitlines()[0]
    gc.collect()  # not before the error is gone, whose traceback held the tensors
    torch.cuda.empty_cache()
    return reason


def seconds(work: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def first_steps(variant: str, setting: Setting, inputs: Inputs | None = None) -> Row:
    """Seconds of the first step, which compiles, and the peak bytes of another one."""
    step = partial(gradients, VARIANTS[variant], inputs or make_inputs(setting))
    first, reset = seconds(step, setting.device), Path("/proc/self/clear_refs")
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif reset.exists():
        reset.write_text("5")  # the peak is now what is resident
    peak = torch.cuda.max_memory_allocated if setting.device == "cuda" else lambda: round(1e6 * peak_rss_mb())
    before, _, after = peak(), step(), peak()
    return {"first_step_seconds": first, "peak_bytes": after - before or None}


def measure(setting: Setting, variants: list[str], repeats: int, limit: float, rates: dict[str, float]) -> list[Row]:
    """A row per variant."""
    torch.compiler.reset()  # or torch stops compiling after eight sizes
    inputs = cache(partial(make_inputs, setting))  # when first wanted: they may be too large, too
    exact = cache(lambda soft_ce: exact_gradients(setting, inputs(), limit, soft_ce))
    device, server = setting.device, multiprocessing.get_context("forkserver")

    def try_out(variant: str) -> Row | str:  # all but the times, or why there is nothing
        if (least := least_bytes(variant, setting)) > limit:
            return f"out of memory (estimated {least / 1e9:.3g} GB, limit {limit / 1e9:.3g} GB)"
        if device == "cpu":
            with ProcessPoolExecutor(1, server, torch.set_num_threads, (torch.get_num_threads(),)) as fresh:
                row = fresh.submit(attempt, partial(first_steps, variant, setting)).result()
        else:
            row = first_steps(variant, setting, inputs())
        if isinstance(row, str):
            return row
        form, expected = exact("soft_ce" in variant)
        for name, a, b in zip(LEAVES, gradients(VARIANTS[variant], inputs()), expected, strict=True):
            row[f"error_{name}"] = ((a.double() - b).norm() / b.norm()).item()
        return row | {"exact": form, "times": []}

    rows: list[Row] = [{"kind": "loss", "variant": variant, **setting._asdict()} for variant in variants]
    for row in rows:
        found = attempt(partial(try_out, row["variant"]))
        row |= {"error": found} if isinstance(found, str) else found
    for row in [row for _ in range(repeats) for row in rows if "times" in row]:
        taken = attempt(partial(seconds, partial(gradients, VARIANTS[row["variant"]], inputs()), device))
        row |= {"error": taken} if isinstance(taken, str) else {"times": [*row["times"], taken]}
    for row in rows:
        if times := row.pop("times", None):
            median, flop = statistics.median(times), useful_flop(row["variant"], setting)
            row |= {"ms": 1000 * median, "ms_min": 1000 * min(times), "useful_tflops": flop / median / 1e12}
            gemms = {"of_gemm": rates[setting.dtype], "of_gemm_float32": rates["float32"]}
            row |= {name: flop / median / rate for name, rate in gemms.items()}
    return rows


def table(results: Path) -> str:
    """Markdown for eval/results/README.md: the smallest and the largest batch; errors are the largest of the three gradients'."""
    headings = ["batch", "queue", "form", "ms", "× plain", "peak MB", "gradient error"]
    lines = ["| " + " | ".join(headings) + " |", "|---:|---:|---|" + "---:|" * 4]
    found = [row for row in files.read_rows(results) if row["kind"] == "loss"]
    largest = max(row["batch"] for row in found)
    plain = {(r["batch"], r["queue"]): r["ms"] for r in found if r["variant"] == "plain" and "ms" in r}
    for row in (r for r in found if r["batch"] == largest or (r["batch"], r["queue"]) == (found[0]["batch"], 0)):
        cells = [f"{row['batch']:,}", f"{row['queue']:,}", f"`{row['variant']}`"]
        if "error" in row:
            cells += [row["error"].split(" (")[0], "", "", ""]
        else:
            error = max(row[f"error_{name}"] for name in LEAVES)
            base = None if "soft_ce" in row["variant"] else plain.get((row["batch"], row["queue"]))
            ratio = f"{row['ms'] / base:.2f}" if base else ""
            cells += [f"{row['ms']:,.0f}", ratio, f"{row['peak_bytes'] / 1e6:,.0f}", f"{error:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grid_of(rows: list[Row], *columns: str) -> Table:
    grid = Table(*columns)
    for row in rows:
        grid.add_row(*(f"{row[c]:,.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("eval/results/loss.jsonl"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for name, kind, choices in (("batch", int, None), ("queue", int, None), ("dtype", str, [*GPU["dtype"], "float64"])):
        parser.add_argument(f"--{name}", type=kind, nargs="+", choices=choices, help=f"{CPU[name]}; GPU: {GPU[name]}")
    for name, default in (("dim", 512), ("teacher-dim", 768), ("tile-size", None), ("repeats", 5), ("threads", None)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default or 'as the library has it'}")
    parser.add_argument("--memory-limit", type=float, help="GB; half of the memory, on a GPU all that is free")
    options = parser.parse_args()
    device, widths = options.device, (options.dim, options.teacher_dim)
    batches, queues, dtypes = (getattr(options, k) or v for k, v in (GPU if device == "cuda" else CPU).items())
    cache_folder = tempfile.TemporaryDirectory()
    # MALLOC…: a process that measures its peak must give a large tensor back when it goes.
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache_folder.name, "MALLOC_MMAP_THRESHOLD_": "65536"}
    if device == "cpu":
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()
    import open_clip  # seconds, as for the server of fresh processes, which has begun by now

    torch.set_num_threads(options.threads or torch.get_num_threads())
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit = 1e9 * (options.memory_limit or 0) or (torch.cuda.mem_get_info()[0] if device == "cuda" else half)
    rates, size = {}, 8192 if device == "cuda" else 1024
    for dtype in ("float32", *dtypes):
        a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
        rates[dtype] = 2 * size**3 / min(seconds(partial(torch.mm, a, b), device) for _ in range(7))
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True).stdout.strip()
    header: Row = {"kind": "machine", "commit": commit, "load": os.getloadavg()[0], "repeats": options.repeats}
    header |= {"device": torch.cuda.get_device_name() if device == "cuda" else bench.cpu_name(), "memory_limit": limit}
    header |= {"cores": bench.count_cores(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    header |= {"gemm_tflops": {d: rate / 1e12 for d, rate in rates.items()}, "open_clip_torch": open_clip.__version__}
    sent = [bytes_sent(b, 2**k, *widths) for b in batches for k in range(3, 11) if b % 2**k == 0]
    options.output.unlink(missing_ok=True)
    for row in (header, *sent):
        files.append_row(options.output, row)
    settings = [Setting(b, q, d, *widths, options.tile_size, device) for b in batches for q in queues for d in dtypes]
    for setting in progress.track(settings, "settings", len(settings)):
        variants = [name for name in options.variants if not (setting.queue and "soft_ce" in name)]
        for row in measure(setting, variants, options.repeats, limit, rates):
            files.append_row(options.output, row)
    rows = files.read_rows(options.output)[1 + len(sent) :]
    Console(width=None if Console().is_terminal else 1000).print(grid_of(rows, *SHOWN), grid_of(sent, *TRAFFIC))
    cache_folder.cleanup()
    print(f"→ {options.output}")


if __name__ == "__main__":
    main()
