"""How well the memory recalls.

    python -m benchmarks.recall mqar --tokens 512 --pairs 32 --state mqar.state --result new.json    # from scratch
    python -m benchmarks.recall trained --model RUN --documents text=books.valid.jsonl.xz --result trained.json
    python -m benchmarks.recall draw old.json new.json transformer.json trained.json                 # the picture

`mqar` trains a small model, or a Transformer of the same width, on rows of multi-query associative recall
(benchmarks/mqar.py) until it meets the bar at every distance: all rates of all seeds side by side on one device, and a
seed is done when one of its rates has met the bar. After `--seconds` it stops; the same command with the same `--state`
goes on.

`trained` hides needles in the first set of documents, as `mm-rec eval` does. Of each set it makes rows of the kind that
trains recall and asks the expert of its name for their answers, by the distance at which they were said. And it reads
the long documents of each set twice: with the state carried, and with the long-term memory emptied every 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from benchmarks import mqar
from benchmarks.gpu_ops import commit_of
from benchmarks.recall_picture import draw
from mm_rec import ops
from mm_rec.data.files import BadRows, read_texts
from mm_rec.data.recall_rows import part_of_tokens, recall_row
from mm_rec.evaluation import bits_per_byte
from mm_rec.evaluation.recall import Haystack, cells, find_needles, state_bytes
from mm_rec.inference.loading import Loaded, load_model
from mm_rec.machine.device import select_device
from mm_rec.state import BlockState, ModelState
from mm_rec.storage.files import write_atomic

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "recall.png"
SHORTEST_ROW, LONGEST_ROW = 256, 16_384  # tokens of rows of the kind that trains recall
LONG, PAST = 4096, 2048  # tokens that a document has at least, and after which its loss is compared
CUDA_TOKENS = 2**17  # of a forward pass over documents


def machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What the numbers were measured on."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "library": str(ops.status()["cuda" if is_cuda else "cpu"].level),
        "commit": commit_of(commit),
    }


def load_state(path: Path, runs: list[mqar.Run], settings: dict[str, Any]) -> None:
    """Let the runs that an earlier command began go on."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    if json.loads(metadata["settings"]) != settings:
        raise SystemExit(f"{path} is of other settings; name another --state")
    progress, tensors = json.loads(metadata["progress"]), safetensors.torch.load_file(path)
    for run in runs:
        if run.name in progress:
            run.restore(tensors, progress[run.name])


def save_state(path: Path, runs: list[mqar.Run], settings: dict[str, Any]) -> None:
    progress = {run.name: run.progress() for run in runs}
    tensors = {name: tensor.contiguous() for run in runs for name, tensor in run.tensors().items()}
    metadata = {"settings": json.dumps(settings), "progress": json.dumps(progress)}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def run_mqar(options: argparse.Namespace) -> None:
    """Train, or go on; then write and print accuracies by distance."""
    device = select_device(options.device)
    task = mqar.Task(
        options.tokens,
        options.pairs,
        options.filler,
        options.width or (256 if options.pairs >= 128 else 128),
        options.rows,
        options.steps,
        options.bar or (0.95 if options.pairs >= 128 else 0.99),
        options.precision,
        options.vocabulary,
    )
    settings = mqar.settings(task, options.model)
    runs = [mqar.Run(task, options.model, seed, rate, device) for seed in options.seeds for rate in options.rates]
    if options.state and options.state.exists():
        load_state(options.state, runs, settings)
    mqar.learn(runs, options.seconds, lambda: save_state(options.state, runs, settings) if options.state else None)
    found = {"machine": machine(device, options.commit), "label": options.label or options.model, "settings": settings}
    found["runs"] = [run.result() for run in runs]
    options.result.write_text(json.dumps(found, indent=1) + "\n")
    for run in found["runs"]:
        parts = "  ".join(f"<{part['to']} {part['accuracy']:.1%}" for part in run["by_distance"])
        state = "met the bar" if run["met"] else "stopped" if run["steps"] < task.steps else "at its end"
        print(f"{found['label']} seed {run['seed']} rate {run['rate']:g}: {state} after {run['steps']} steps: {parts}")


def empty_long_term(state: ModelState) -> ModelState:
    """``state`` with the long-term memory of every block as it is before the first token; window and h stay."""

    def emptied(block: BlockState) -> BlockState:
        if block.memory is None:
            return block
        nothing = torch.full_like(block.memory.kept_score, -math.inf)
        return block._replace(memory=block.memory._replace(kept_score=nothing))

    return state._replace(experts={name: [emptied(one) for one in blocks] for name, blocks in state.experts.items()})


def read_documents(path: Path, loaded: Loaded) -> bits_per_byte.Documents:
    """The long documents at ``path``."""
    tokenizer = loaded.tokenizer
    texts = list(read_texts(path, BadRows()))
    found = zip(texts, tokenizer.encode_batch(texts), strict=True)
    kept = [(text, np.array([tokenizer.bos_id, *ids])) for text, ids in found if len(ids) >= LONG]
    if not kept:
        raise SystemExit(f"no document in {path} has {LONG:,} tokens; name longer ones")
    return bits_per_byte.Documents([ids for _, ids in kept], sum(len(text.encode()) for text, _ in kept))


def loss_by_position(loaded: Loaded, documents: bits_per_byte.Documents, domain: str) -> dict[str, Any]:
    """Bits per byte by position, with the memory carried and with its long-term part emptied after each piece."""
    sizes = bits_per_byte.bytes_by_position(documents, loaded.tokenizer.token_sizes)
    bounds = bits_per_byte.position_bounds(len(sizes))
    row: dict[str, Any] = {
        "domain": domain,
        "documents": len(documents.tokens),
        "bytes": documents.n_bytes,
        "bounds": bounds,
    }
    past = bounds.index(PAST)
    for name, carry in (("carried", lambda state: state), ("emptied", empty_long_term)):
        bits = bits_per_byte.evaluate(loaded.model, documents, domain, carry=carry).bits_by_position
        row[name] = [round(one / size, 5) for one, size in zip(bits, sizes, strict=True) if size]
        row[f"{name} past {PAST}"] = sum(bits[past:]) / sum(sizes[past:])
    return row


class Held(NamedTuple):
    """Documents as :func:`mm_rec.data.recall_rows.recall_row` takes them."""

    tokens: Sequence[np.ndarray]

    @property
    def n_documents(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        return self.tokens[index]


@torch.inference_mode()
def answers_inside_rows(loaded: Loaded, documents: bits_per_byte.Documents, domain: str, rows: int) -> list[Any]:
    """How many answers in rows of up to 16,384 tokens the model has right, every token the likeliest, by distance.

    The distance is that to the place where the answer stood last before.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    lengths, bytes_a_token = tokenizer.token_sizes, documents.n_bytes / sum(map(len, documents.tokens))
    edges = [0, *(2**power for power in range(6, 15))]
    counts = np.zeros((len(edges), 3))  # answers, right ones, nats
    for index in range(rows):
        rng = random.Random(f"{domain}/{index}")
        size = SHORTEST_ROW * (LONGEST_ROW / SHORTEST_ROW) ** rng.random()
        row = recall_row(rng, Held(documents.tokens), tokenizer, domain, round(size * bytes_a_token))
        text, distances = "", {}  # of the answers, by their part
        for place, part in enumerate(row):
            if part.answers:
                distances[place] = len(text[text.rindex(part.text) :].encode()) / bytes_a_token
            text += part.text
        ids = tokenizer.encode(text)
        tokens = torch.tensor([[tokenizer.bos_id, *ids]], device=model.embedding.weight.device)
        features, _ = model.features(tokens[:, :-1], None, domain)
        logits = torch.nn.functional.linear(features[0], model.embedding.weight).float()
        nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").cpu().numpy()
        right = (logits.argmax(-1) == tokens[0, 1:]).cpu().numpy()
        place_of = part_of_tokens(row, np.cumsum(lengths[ids]))
        for place, distance in distances.items():
            chosen = place_of == place
            if chosen.any():
                counts[np.searchsorted(edges, distance, side="right") - 1] += 1, right[chosen].all(), nats[chosen].sum()
    return [
        {"from": edge, "answers": int(n), "accuracy": round(hits / n, 3), "nats": round(total / n, 2)}
        for edge, (n, hits, total) in zip(edges, counts, strict=True)
        if n
    ]


def run_trained(options: argparse.Namespace) -> None:
    """Measure a trained model; the result is written after each part."""
    loaded = load_model(options.model, device=options.device, precision=options.precision)
    model, device = loaded.model, loaded.model.embedding.weight.device
    domain = loaded.choose_domain(options.domain)
    if device.type == "cuda":
        bits_per_byte.TOKENS_PER_BATCH = CUDA_TOKENS
    found: dict[str, Any] = {
        "machine": machine(device, options.commit),
        "label": options.label or str(options.model),
        "model": model.config.to_dict(),
        "state bytes": {"all experts": state_bytes(model), "one": state_bytes(model, model.config.experts[0])},
        "answers by": domain or "all experts, fused",
        "needles": [],
        "answers inside rows": {},
        "loss by position": {},
    }
    documents = {}
    for pair in options.documents:
        name, _, path = pair.partition("=")
        documents[name] = read_documents(Path(path), loaded)
    haystack = next((Haystack(one.tokens, loaded.tokenizer) for one in documents.values()), None)
    for kind, distance in cells(options.distances, haystack):
        start = time.perf_counter()
        cell = find_needles(
            model, loaded.tokenizer, domain, kind, distance, haystack, trials=options.trials, seed=options.seed
        )
        found["needles"].append(cell._asdict())
        options.result.write_text(json.dumps(found, indent=1) + "\n")
        print(
            f"{cell.kind:14s} {cell.distance:6,} {cell.accuracy:6.1%} ({cell.low:.0%} to {cell.high:.0%}), free "
            f"{cell.free / cell.trials:6.1%}  {time.perf_counter() - start:5.1f} s",
            flush=True,
        )
    for name, one in documents.items():
        table = found["answers inside rows"][name] = answers_inside_rows(loaded, one, name, options.rows)
        parts = "  ".join(f"{part['from']} {part['accuracy']:.1%}" for part in table)
        print(f"{name}: right answers inside rows, by distance from: {parts}", flush=True)
        row = found["loss by position"][name] = loss_by_position(loaded, one, name)
        options.result.write_text(json.dumps(found, indent=1) + "\n")
        carried, emptied = row[f"carried past {PAST}"], row[f"emptied past {PAST}"]
        print(f"{name}: past {PAST} {carried:.4f} bits per byte, {emptied:.4f} with the memory emptied", flush=True)


def run_draw(options: argparse.Namespace) -> None:
    """Draw the results of the files, in their order."""
    files = [json.loads(path.read_text()) for path in options.results]
    results = [one for file in files for one in file.get("trained", [file])]
    draw([one for one in results if not options.labels or one["label"] in options.labels], options.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("mqar", help="learn to recall from scratch")
    one.add_argument("--tokens", type=int, required=True, help="of a row")
    one.add_argument("--pairs", type=int, required=True)
    one.add_argument("--filler", choices=mqar.FILLERS, default="values")
    one.add_argument("--model", choices=mqar.MODELS, default="mm-rec")
    one.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--rows", type=int, default=64, help="of a step")
    one.add_argument("--steps", type=int, default=4000)
    one.add_argument("--width", type=int, help="of the model; if not given 128, or 256 from 128 pairs on")
    one.add_argument("--vocabulary", type=int, default=8192)
    one.add_argument("--bar", type=float, help="accuracy at every distance; if not given .99, or .95 from 128 pairs on")
    one.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    one.add_argument("--device", default="auto")
    one.add_argument("--seconds", type=float, default=float("inf"), help="after which to stop")
    one.add_argument("--state", type=Path, help="file to go on from, and to write")
    one.add_argument("--result", type=Path, required=True)
    one.add_argument("--label", help="of the model in tables and pictures")
    one.add_argument("--commit", help="of the code measured, where git does not know")
    one.set_defaults(run=run_mqar)
    one = commands.add_parser("trained", help="needles and loss by position of a trained model")
    one.add_argument("--model", type=Path, required=True, help="checkpoint, run folder or folder of runs")
    one.add_argument("--documents", action="append", default=[], metavar="DOMAIN=PATH", help="held out, a file each")
    one.add_argument("--distances", type=int, nargs="*", default=[1024, 4096, 16_384, 65_536])
    one.add_argument("--trials", type=int, default=200)
    one.add_argument("--rows", type=int, default=120, help="of the kind that trains recall, for each set")
    one.add_argument("--domain", help="that finds the needles, or `all`; if not given what training reached")
    one.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    one.add_argument("--device", default="auto")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--result", type=Path, required=True)
    one.add_argument("--label", help="of the model in tables and pictures")
    one.add_argument("--commit", help="of the code measured, where git does not know")
    one.set_defaults(run=run_trained)
    one = commands.add_parser("draw", help="the picture of earlier results")
    one.add_argument("results", type=Path, nargs="+", help="files of one result, or of several under `trained`")
    one.add_argument("--labels", nargs="+", help="of the models to draw; all if not given")
    one.add_argument("--picture", type=Path, default=PICTURE)
    one.set_defaults(run=run_draw)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
