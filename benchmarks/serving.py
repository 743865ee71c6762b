"""Concurrent streams: `mm-rec serve` over HTTP against the generate loop of transformers, on one machine.

    python -m benchmarks.serving --streams 1 8 64

mm_rec    the `100m` preset behind the server: the whole way through HTTP, every stream a client of its own, each
          with sampling of its own
gpt2      GPT-2 110M of transformers in this process: `generate` with its cache, greedy, all streams as one batch
          of equal lengths that starts and ends together, no HTTP: the easiest case for it

Both in bfloat16 where the processor is fast with it, random weights (speed doesn't depend on them), and the same
number of prompt and new tokens. `first` is the time to a stream's first token, the median over streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from mm_rec import ops
from mm_rec.bench.peers import gpt2_110m
from mm_rec.config import PRESETS
from mm_rec.data.download.builtin import builtin_code, builtin_text
from mm_rec.inference.session_file import fingerprint
from mm_rec.machine.device import apply_precision, select_precision
from mm_rec.model import MMRecModel
from mm_rec.serve.app import create_app
from mm_rec.serve.engine import Engine
from mm_rec.serve.service import Service
from mm_rec.serve.sessions import SessionStore
from mm_rec.text.tokenizer import train_tokenizer

RESULT = Path(__file__).parent / "results" / "serving.json"
PROMPT_TOKENS, NEW_TOKENS = 64, 64


def build(precision: str, domain: str | None, folder: Path) -> Service:
    """The `100m` preset as it is served."""
    tokenizer = train_tokenizer(chain(islice(builtin_code(), 800), islice(builtin_text(), 800)), 32_000)
    model = MMRecModel(PRESETS["100m"]).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(10)  # as decided as a trained model, which is what the sampler's work depends on
    apply_precision(model, precision)
    identity = fingerprint(model)
    sessions = SessionStore(folder, model, tokenizer, domain, fingerprint=identity)
    return Service("bench", Engine(model, tokenizer, domain), sessions, identity)


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The server in a thread; yields its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def stream(url: str, number: int) -> tuple[float, float, int]:
    """One client; its time to the first token, to the last, and the number of tokens."""
    parts = urlsplit(url)
    prompt = [1000 + (7 * number + place) % 5000 for place in range(PROMPT_TOKENS)]
    fields = {"model": "bench", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0.8, "top_p": 0.95}
    body = json.dumps({**fields, "seed": number, "stream": True, "stream_options": {"include_usage": True}})
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    start, first, tokens = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"{head}\r\n\r\n{body}".encode())
    while (line := await reader.readline()) != b"data: [DONE]\n":
        if not line:
            raise RuntimeError("the server broke off")
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
    writer.close()
    return first, time.perf_counter() - start, tokens


async def clients(url: str, n: int) -> dict[str, float]:
    """``n`` clients at the same time."""
    results = await asyncio.gather(*(stream(url, number) for number in range(n)))
    seconds = max(one[1] for one in results)
    return {
        "tokens_per_second": sum(one[2] for one in results) / seconds,
        "first": statistics.median(one[0] for one in results),
    }


def ask(url: str, n: int) -> dict[str, float]:
    """Run the clients in a process of their own, as they would be."""
    command = [sys.executable, "-m", "benchmarks.serving", "--url", url, "--streams", str(n)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def generate_gpt2(model: Any, n: int) -> dict[str, float]:
    """All streams as one batch; the time of a single new token is that to the first."""
    prompt = torch.arange(n * PROMPT_TOKENS).view(n, PROMPT_TOKENS) % 5000 + 1000
    seconds = {}
    for tokens in (1, NEW_TOKENS):
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        seconds[tokens] = time.perf_counter() - start
        assert out.shape[1] == PROMPT_TOKENS + tokens
    return {"tokens_per_second": n * NEW_TOKENS / seconds[NEW_TOKENS], "first": seconds[1]}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--domain", default="text", help="expert to use, or all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--url", help=argparse.SUPPRESS)  # be the clients
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    if options.url:
        print(json.dumps(asyncio.run(clients(options.url, options.streams[0]))))
        return 0
    precision = select_precision(options.precision, torch.device("cpu"))
    peer = gpt2_110m().eval().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    domain = None if options.domain == "all" else options.domain
    rows = []
    with tempfile.TemporaryDirectory() as folder, served(build(precision, domain, Path(folder))) as url:
        for n in options.streams:
            runs: dict[str, list[dict[str, float]]] = {"mm_rec": [], "gpt2": []}
            for turn in range(options.rounds + 1):
                results = {"mm_rec": ask(url, n), "gpt2": generate_gpt2(peer, n)}
                if turn:  # the first one warms up
                    for name, result in results.items():
                        runs[name].append(result)
            medians = {
                name: {key: statistics.median(run[key] for run in many) for key in many[0]}
                for name, many in runs.items()
            }
            rows.append({"streams": n, **medians, "all": runs})
            ours, theirs = medians["mm_rec"], medians["gpt2"]
            print(
                f"{n:3} streams: mm_rec {ours['tokens_per_second']:7.1f} tokens/s, first {ours['first']:.3f} s;"
                f"  gpt2 {theirs['tokens_per_second']:7.1f} tokens/s, first {theirs['first']:.3f} s;"
                f"  {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}x",
                flush=True,
            )
    settings = {
        "precision": precision,
        "domain": options.domain,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "ops": str(ops.status()["cpu"]).split(", ")[0],
    }
    options.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
