"""Speed of the CUDA kernels on one GPU: medians of graph replays between device events.

    python -m benchmarks.gpu_ops [--only scan mdi] [--result benchmarks/results/gpu_ops.json] [--commit ID]

The recurrence is reported in microseconds a time step. Everything else is set against a device copy of as many
bytes as the op has to read and write, each input once and each result once; `share` is the fraction of the copy's
rate that the op reaches. The loss is set against its three matrix products alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.config import PRESETS
from mm_rec.model import MMRecModel

RESULT = Path(__file__).parent / "results" / "gpu_ops.json"
WIDTH, HEAD, WINDOW, SLOTS, TAPS = 512, 64, 128, 120, 4
SHAPES = ((128, 512), (32, 2048), (8, 8192))  # B, T: 65,536 tokens each
Action = Callable[[], object]


def milliseconds(action: Action, repeats: int = 12) -> float:
    """Median time of ``action``, captured in a graph so that launches cost nothing."""
    action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = action()  # its memory stays the graph's
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    del kept
    return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)))


def copy_rate() -> float:
    """Bytes a second of a device copy, read and written ones counted."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source)) * 1e3


def matrix_rate() -> float:
    """Operations a second of a large bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return float(2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3)


def wide(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def half(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def call(name: str) -> Any:
    return getattr(torch.ops.mm_rec, name).default


def recurrence_rows() -> Iterator[dict[str, Any]]:
    for batch, time in SHAPES:
        for head in (64, 128, 256):
            shape = (batch, time, WIDTH)
            z, u, gamma, dh = wide(*shape), half(*shape), torch.rand(shape, device="cuda"), wide(*shape)
            w_g = wide(WIDTH // head, head, head) * 0.5 * head**-0.5
            h0 = wide(batch, WIDTH)
            reset = torch.rand(batch, time, device="cuda") < 0.01
            h, _ = call("recurrence")(z, u, gamma, w_g, h0, reset)
            forward = milliseconds(lambda: call("recurrence")(z, u, gamma, w_g, h0, reset))  # noqa: B023
            backward = milliseconds(
                lambda: call("recurrence_backward")(dh, None, h, z, u, gamma, w_g, h0, reset)  # noqa: B023
            )
            yield {
                "op": "recurrence",
                "shape": [batch, time, WIDTH],
                "head": head,
                "forward us/step": forward * 1e3 / time,
                "backward us/step": backward * 1e3 / time,
                "forward ms": forward,
                "backward ms": backward,
            }


def bandwidth_cases(batch: int, time: int) -> Iterator[tuple[str, Action, int]]:
    """Name, action and bytes to move of the ops that should be limited by memory; activations in bfloat16."""
    shape = (batch, time, WIDTH)
    a, x, ds = torch.rand(shape, device="cuda"), wide(*shape), wide(*shape)
    reset = torch.rand(batch, time, device="cuda") < 0.01
    s0 = wide(batch, WIDTH)
    s = call("scan")(a, x, s0, reset)
    yield "scan", lambda: call("scan")(a, x, s0, reset), size(a, x, s)
    yield "scan backward", lambda: call("scan_backward")(ds, s, a, s0, reset), size(ds, s, a, a, x)

    projected = half(batch, time, 3 * WIDTH + WIDTH // 4)  # as in a block: slices of one wide product
    candidate, r, gate, _ = projected.split([WIDTH, WIDTH, WIDTH, WIDTH // 4], dim=-1)
    decay, bias = half(*shape), wide(WIDTH)
    n = a.numel()
    yield "mdi", lambda: call("mdi")(decay, bias, candidate, gate, bias), n * (3 * 2 + 8)
    yield "mdi backward", lambda: call("mdi_backward")(a, x, decay, bias, candidate, gate, bias), n * (8 + 6 + 6)
    yield "mdi, no gate", lambda: call("mdi")(decay, bias, candidate, None, None), n * (2 * 2 + 8)

    y = half(*shape)
    yield "rms_norm", lambda: call("rms_norm")(y, torch.bfloat16), n * 4
    heads = projected[..., : 3 * WIDTH].view(batch, time, 3, WIDTH // HEAD, HEAD).unbind(2)[1]
    yield "rms_norm of heads", lambda: call("rms_norm")(heads, torch.bfloat16), n * 4
    yield "rms_norm of heads backward", lambda: call("rms_norm_backward")(y.view(heads.shape), heads), n * 6
    yield "add_rms_norm", lambda: call("add_rms_norm")(x, y), n * (4 + 2 + 4 + 2)
    yield "add_rms_norm backward", lambda: call("add_rms_norm_backward")(ds, y, x), n * (4 + 2 + 4 + 4 + 2)
    yield "readout", lambda: call("readout")(x, r, WIDTH // HEAD), n * (4 + 2 + 2)
    yield "readout backward", lambda: call("readout_backward")(y, x, r, WIDTH // HEAD), n * (2 + 4 + 2 + 4 + 2)
    up = half(batch, time, 4 * WIDTH)
    yield "relu_squared", lambda: call("relu_squared")(up), size(up, up)
    yield "relu_squared backward", lambda: call("relu_squared_backward")(up, up), size(up, up, up)


def memory_cases(batch: int, time: int) -> Iterator[tuple[str, Action, int]]:
    """The same for the memories; documents of about 500 tokens start anywhere."""
    heads = WIDTH // HEAD
    reset = torch.rand(batch, time, device="cuda") < 1 / 500
    reset[:, 0] = True
    index = torch.arange(time, device="cuda")
    position = index - torch.where(reset, index, -1).cummax(dim=1).values
    q, dout = half(batch, time, heads, HEAD), half(batch, time, heads, HEAD)
    own, k, v = (half(batch, before + time, heads, HEAD) for before in (TAPS - 1, WINDOW, WINDOW))
    k = k / HEAD**0.5
    score = torch.nn.functional.logsigmoid(wide(batch, WINDOW + time, heads))
    kept_k, kept_v = (half(batch, heads, SLOTS, HEAD) for _ in range(2))
    kept_score = torch.nn.functional.logsigmoid(wide(batch, heads, SLOTS))
    slot, held = call("retain")(score, position, kept_score)
    yield "retain", lambda: call("retain")(score, position, kept_score), size(score, position, slot, held)
    read = (q, k, v, score, slot, held, position, kept_k / HEAD**0.5, kept_v, kept_score, 1000.0)
    out, lse = call("memory_attention")(*read)
    yield "memory_attention", lambda: call("memory_attention")(*read), size(q, k, v, score, slot, held, out)
    yield (
        "memory_attention backward",
        lambda: call("memory_attention_backward")(dout, out, lse, *read),
        size(dout, out, q, k, v, score, slot, held, q, k, v, score),
    )
    taps = wide(heads, HEAD, TAPS)
    key = call("mixed_keys")(own, taps, position)
    yield "mixed_keys", lambda: call("mixed_keys")(own, taps, position), size(own, key)
    yield (
        "mixed_keys backward",
        lambda: call("mixed_keys_backward")(dout, own, taps, position),
        size(dout, own, own),
    )


def optimizer_cases() -> Iterator[tuple[str, Action, int]]:
    """AdamW and the norm of gradients over the parameters of one domain of `100m`, all in bfloat16 with masters."""
    with torch.device("meta"):
        parameters = list(MMRecModel(PRESETS["100m"]).named_parameters())
    shapes = [p.shape for name, p in parameters if not name.startswith(("experts.code.", "fusion."))]
    updates = [
        ops.Update(wide(*s), wide(*s), wide(*s).square(), half(*s), half(*s), torch.ones((), device="cuda"), 0.1)
        for s in shapes
    ]
    gradients, norm = [one.grad for one in updates], torch.ones((), device="cuda")
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "max_norm": 1.0}
    n = size(*gradients) // 2
    yield "adamw", lambda: ops.adamw_(updates, norm, **settings), n * (6 * 4 + 2 + 2)
    yield "sum_of_squares", lambda: ops.sum_of_squares(gradients), n * 2


def loss_row() -> dict[str, Any]:
    rows, vocabulary = 65536, 32000
    y, embedding = half(rows, WIDTH), half(vocabulary, WIDTH)
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    weight = torch.full((rows,), 1 / rows, device="cuda")
    logits = half(8192, vocabulary)

    def products() -> None:
        for part in y.split(8192):
            torch.mm(part, embedding.t())
            torch.mm(logits, embedding)
            torch.mm(logits.t(), part)

    both = milliseconds(lambda: call("linear_cross_entropy")(y, embedding, targets, weight, True, True), 5)
    alone = milliseconds(products, 5)
    return {"op": "linear_cross_entropy", "shape": [rows, WIDTH, vocabulary], "ms": both, "products ms": alone}


def measure(only: list[str]) -> dict[str, Any]:
    def wanted(name: str) -> bool:
        return not only or any(word in name for word in only)

    copy = copy_rate()
    table: list[dict[str, Any]] = []

    def add(cases: Iterator[tuple[str, Action, int]], shape: list[int]) -> None:
        for name, action, moved in cases:
            if wanted(name):
                ms = milliseconds(action)
                table.append({"op": name, "shape": shape, "ms": ms, "share": moved / copy * 1e3 / ms})
        torch.cuda.empty_cache()

    if wanted("recurrence"):
        table += recurrence_rows()
    for batch, time in SHAPES:
        add(bandwidth_cases(batch, time), [batch, time, WIDTH])
        add(memory_cases(batch, time), [batch, time, WIDTH])
    add(optimizer_cases(), [])
    if wanted("linear_cross_entropy"):
        table.append(loss_row())
    return {"copy GB/s": copy / 1e9, "matrix TFLOP/s": matrix_rate() / 1e12, "rows": table}


def commit_of(given: str | None) -> str | None:
    """The commit of the code measured: as given, else as git knows it."""
    if given is not None:
        return given
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def machine(commit: str | None) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "library": str(ops.status()["cuda"].level),
        "commit": commit_of(commit),
    }


def print_row(row: dict[str, Any]) -> None:
    name = f"{row['op']:28s} {'x'.join(map(str, row['shape'])):18s}"
    numbers = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
    print(name, f"head {row['head']:3d} " if "head" in row else "", numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="ops whose names contain one of these words")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--commit", help="of the code measured, where git does not know")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with ops.use_backend("native"), torch.no_grad():
        found = {"machine": machine(arguments.commit), **measure(arguments.only)}
    print(f"copy {found['copy GB/s']:.0f} GB/s, matrix product {found['matrix TFLOP/s']:.0f} TFLOP/s")
    for row in found["rows"]:
        print_row(row)
    arguments.result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
