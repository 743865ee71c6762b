"""lm-eval in two ways, and our own numbers: the same questions, the same answers.

    python -m benchmarks.harness_agreement --model checkpoints_cpu

own                 this project's model, one text at a time, scored with its own functions
hf                  lm-eval's `hf` model on the checkpoint's folder as the trainer wrote it
local-completions   lm-eval's `local-completions` against a running `mm-rec serve`, eight requests at a time

Three tasks are made of the documents that are at hand, so that no hub is needed: which of four endings a paragraph has
(multiple choice), bits per byte of whole paragraphs (rolling), and eight tokens drawn greedily (generation), where the
right answer is what this project's own `generate` draws. Needs `pip install "lm-eval[api]"`; ends with 1 if anything
disagrees.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from mm_rec.data.download.builtin import builtin_text
from mm_rec.data.files import BadRows, find_files, read_texts
from mm_rec.evaluation.bits_per_byte import Documents, evaluate
from mm_rec.inference.generate import generate
from mm_rec.inference.loading import Loaded, load_model
from mm_rec.inference.sampling import Sampling

RESULT = Path(__file__).parent / "results" / "harness_agreement.json"
TASKS = ("own_endings", "own_texts", "own_continuations")
N_ENDINGS, NEW_TOKENS = 4, 8
TOLERANCE = 2e-3
"""Nats a log-likelihood may differ by; products of other shapes round differently."""

Numbers = dict[str, float]
Answers = list[list[float]]
"""For each paragraph the log-likelihood of each ending."""


def paragraphs(documents: Path | None, count: int) -> list[str]:
    """Paragraphs of 200 to 800 characters, at most two of a document."""
    texts: Iterator[str] = (
        builtin_text()
        if documents is None
        else (text for file in find_files(documents) for text in read_texts(file, BadRows()))
    )
    found = (
        part
        for text in texts
        for part in [one.strip() for one in text.split("\n\n") if 200 <= len(one.strip()) <= 800][1:3]
    )
    return list(islice(found, count))


def split(text: str) -> tuple[str, str]:
    """A paragraph cut at the space nearest to its middle; the ending begins with it."""
    at = text.find(" ", len(text) // 2)
    at = at if at > 0 else len(text) // 2
    return text[:at], text[at:]


def make_rows(texts: Sequence[str], loaded: Loaded, domain: str | None) -> list[dict[str, Any]]:
    """One row a paragraph, for all three tasks."""
    halves = [split(text) for text in texts]
    rows = []
    for index, (context, ending) in enumerate(halves):
        place = index % N_ENDINGS
        others = [halves[(index + shift) % len(halves)][1] for shift in range(1, N_ENDINGS)]
        endings = [*others[:place], ending, *others[place:]]
        pieces = generate(
            loaded.model, loaded.tokenizer, context, Sampling(max_new_tokens=NEW_TOKENS, temperature=0), domain
        )
        row = {"text": context + ending, "context": context, "endings": endings, "answer": place}
        rows.append(row | {"continuation": "".join(pieces)})
    return rows


def write_tasks(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """The rows, and a file for each task."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "target_delimiter": "",
    }
    bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    tasks: tuple[dict[str, Any], ...] = (
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [bits],
        },
        {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{continuation}}",
            "generation_kwargs": {"max_gen_toks": NEW_TOKENS, "do_sample": False, "temperature": 0.0, "until": []},
            "metric_list": [match],
        },
    )
    for name, task in zip(TASKS, tasks, strict=True):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}, sort_keys=False))


@torch.inference_mode()
def own_numbers(rows: Sequence[dict[str, Any]], loaded: Loaded, domain: str | None) -> tuple[Numbers, Answers]:
    """Accuracy and log-likelihoods of the endings, and bits per byte."""
    model, tokenizer = loaded.model, loaded.tokenizer
    answers: Answers = []
    for row in rows:
        start = len(tokenizer.encode(row["context"]))
        scores = []
        for ending in row["endings"]:
            ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(row["context"] + ending)])
            logits, _ = model(ids[None, :-1], domain=domain)
            nll = F.cross_entropy(logits[0].float(), ids[1:], reduction="none")
            scores.append(-float(nll[start:].double().sum()))
        answers.append(scores)
    right = [int(np.argmax(scores)) == row["answer"] for scores, row in zip(answers, rows, strict=True)]
    tokens = [np.array([tokenizer.bos_id, *tokenizer.encode(row["text"])]) for row in rows]
    documents = Documents(tokens, sum(len(row["text"].encode()) for row in rows))
    bits = evaluate(model, documents, domain).bits_per_byte
    return {"acc": float(np.mean(right)), "bits_per_byte": bits, "exact_match": 1.0}, answers


def harness_numbers(model: str, arguments: dict[str, Any], folder: Path) -> tuple[Numbers, Answers]:
    """The same from lm-eval."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import mm_rec.hf  # noqa: F401 (registers the model)

    manager = TaskManager(include_path=str(folder))
    found: dict[str, dict[str, Any]] = {}
    answers: Answers = []
    for tasks, own_bos in ((TASKS[::2], True), (TASKS[1:2], False)):  # lm-eval itself puts BOS before a whole text
        results = lm_eval.simple_evaluate(
            model=model,
            model_args={**arguments, "add_bos_token": own_bos},
            tasks=list(tasks),
            task_manager=manager,
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
            log_samples=True,
        )
        found |= results["results"]
        if TASKS[0] in results["samples"]:
            samples = sorted(results["samples"][TASKS[0]], key=lambda one: one["doc_id"])
            answers = [[float(score) for score, _ in one["filtered_resps"]] for one in samples]
    numbers = {
        "acc": found[TASKS[0]]["acc,none"],
        "bits_per_byte": found[TASKS[1]]["bits_per_byte,none"],
        "exact_match": found[TASKS[2]]["exact_match,none"],
    }
    return {name: float(value) for name, value in numbers.items()}, answers


@contextlib.contextmanager
def server(checkpoint: Path, domain: str, folder: Path) -> Iterator[str]:
    """`mm-rec serve` in a process of its own; yields its address."""
    command = [sys.executable, "-m", "mm_rec.cli", "serve", "--model", str(checkpoint), "--domain", domain]
    command += ["--port", "0", "--precision", "fp32", "--device", "cpu", "--session_dir", str(folder / "sessions")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if place := re.search(r"http://\S+/", line):
                yield place[0]
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait()


def largest_difference(ours: Answers, theirs: Answers) -> float:
    """Between two sets of log-likelihoods, in nats."""
    return float(np.abs(np.array(ours) - np.array(theirs)).max())


def main(argv: list[str] | None = None) -> int:
    """Measure in the three ways, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, run folder or folder of runs")
    parser.add_argument("--domain", help="expert, or all (default: what training reached)")
    parser.add_argument("--documents", type=Path, help="file or folder (default: the text of the installation)")
    parser.add_argument("--paragraphs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    loaded = load_model(options.model, device="cpu", precision="fp32")
    domain = loaded.choose_domain(options.domain)
    expert = domain or "all"
    ways: dict[str, tuple[Numbers, Answers]] = {}
    arguments: dict[str, Any]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "home")
        rows = make_rows(paragraphs(options.documents, options.paragraphs), loaded, domain)
        write_tasks(rows, folder)
        ways["own"] = own_numbers(rows, loaded, domain)
        arguments = {"pretrained": str(loaded.path), "dtype": "float32", "domain": expert}
        ways["hf"] = harness_numbers("hf", arguments, folder)
        with server(loaded.path, expert, folder) as url:
            arguments = {"model": "mm-rec", "base_url": f"{url}v1/completions", "tokenizer": str(loaded.path)}
            arguments |= {"tokenizer_backend": "huggingface", "num_concurrent": 8, "max_length": 4096, "timeout": 3600}
            ways["local-completions"] = harness_numbers("local-completions", arguments, folder)
    ours, our_answers = ways["own"]
    measures = list(ours)
    print(f"{len(rows)} paragraphs, expert {expert}")
    print(f"{'':18}" + "".join(f"{measure:>15}" for measure in measures) + f"{'log-likelihood':>17}")
    agree = True
    results = {}
    for way, (numbers, answers) in ways.items():
        difference = largest_difference(our_answers, answers)
        print(f"{way:18}" + "".join(f"{numbers[measure]:15.6f}" for measure in measures) + f"{difference:17.1e}")
        close = abs(numbers["bits_per_byte"] - ours["bits_per_byte"]) < 1e-4 * ours["bits_per_byte"]
        same = all(numbers[measure] == ours[measure] for measure in ("acc", "exact_match"))
        agree &= close and same and difference < TOLERANCE
        results[way] = {**numbers, "largest_difference_of_a_log_likelihood": difference}
    print("log-likelihood: the largest difference to our own, in nats;", "all agree" if agree else "they DISAGREE")
    options.output.write_text(json.dumps({"paragraphs": len(rows), "domain": expert, "ways": results}, indent=2) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
