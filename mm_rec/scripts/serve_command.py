"""Serve a model over HTTP: OpenAI's and Ollama's protocols, sessions with a memory of fixed size, and a chat page."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mm_rec.config import WEIGHTS
from mm_rec.errors import UserError
from mm_rec.options import Option, add_arguments, from_arguments
from mm_rec.program import Parser, run_program
from mm_rec.scripts.sampling_options import ADAPTER_HELP, MEMORY_HELP, MODEL_HELP, WEIGHTS_HELP, tell_on_stderr
from mm_rec.serve.connections import FEWEST, Connections, most_connections
from mm_rec.translation import Translatable, translate

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mm_rec.serve.engine import Engine

API_KEY_VARIABLE = "MM_REC_API_KEY"
EPILOG = """examples:
  mm-rec serve --model checkpoints_cpu
  {variable}=secret mm-rec serve --model checkpoints_cpu/chat --host 0.0.0.0

Then open http://127.0.0.1:8000/, or point any client of OpenAI's API to http://127.0.0.1:8000/v1 and one of Ollama's to
http://127.0.0.1:8000. A chat request with "session": "some-name" goes on from what the model remembers of that
conversation; only new messages are sent.
"""


@dataclass(frozen=True)
class ServeSettings:
    """What the server takes."""

    model: Annotated[Path | None, Option(Translatable("{help} (required)", help=Translatable(MODEL_HELP)))] = None
    name: Annotated[str, Option("of the model, as clients ask for it")] = "mm-rec"
    adapter: Annotated[Path | None, Option(ADAPTER_HELP)] = None
    memory: Annotated[
        Path | None,
        Option(Translatable("{help}; every new conversation begins from it", help=Translatable(MEMORY_HELP))),
    ] = None
    domain: Annotated[
        str | None,
        Option("the expert to use, or `all` to fuse them; all once fusion is trained, else the best for each prompt"),
    ] = None
    host: Annotated[str, Option("address to listen on; others than this machine's need an API key")] = "127.0.0.1"
    port: Annotated[int, Option("to listen on; 0 takes a free one", minimum=0)] = 8000
    api_key: Annotated[
        str | None,
        Option(Translatable("that clients have to send; {variable} keeps it out of `ps`", variable=API_KEY_VARIABLE)),
    ] = None
    cors_origins: Annotated[
        str | None, Option("web pages elsewhere that may use it, as https://example.org,https://other.org; * for all")
    ] = None
    session_dir: Annotated[Path, Option("folder of saved conversations")] = Path("sessions")
    max_sessions: Annotated[int, Option("conversations to keep at most", minimum=0)] = 1000
    max_streams: Annotated[int, Option("texts to draw at the same time", minimum=1)] = 64
    max_connections: Annotated[
        int, Option("to hold at most; fewer where the limit on open files is low", minimum=FEWEST)
    ] = 1000
    max_queue: Annotated[int, Option("prompts that may wait for a place", minimum=1)] = 256
    max_prompt_bytes: Annotated[int, Option("of text in a request", minimum=1)] = 262_144
    max_tokens: Annotated[int, Option("to draw for one text", minimum=1)] = 2048
    time_limit: Annotated[float, Option("seconds for one request", minimum=1)] = 600.0
    device: Annotated[str, Option("cpu, cuda, or auto: CUDA if it is there")] = "auto"
    precision: Annotated[str, Option("type of the matrices", choices=("auto", "bf16", "fp32"))] = "auto"
    weights: Annotated[str, Option(WEIGHTS_HELP, choices=WEIGHTS)] = WEIGHTS[0]
    threads: Annotated[int | None, Option("CPU threads; all if not given", minimum=1)] = None


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, load the model and serve until a signal comes."""
    parser = Parser(prog=prog, description=__doc__)
    parser.epilog = Translatable(EPILOG, variable=API_KEY_VARIABLE)
    add_arguments(parser, ServeSettings)
    settings = from_arguments(ServeSettings, parser.parse_args(arguments))
    path = settings.model
    if path is None:
        raise UserError("name the model to serve with --model")
    settings = dataclasses.replace(settings, api_key=settings.api_key or os.environ.get(API_KEY_VARIABLE) or None)
    origins = _origins(settings)
    from mm_rec.serve.gate import is_loopback
    from mm_rec.serve.server import Server

    if settings.api_key is None and not is_loopback(settings.host):
        raise UserError(
            "--host {host} opens the server to other machines; set {variable} first",
            host=settings.host,
            variable=API_KEY_VARIABLE,
        )
    connections = Connections(most_connections(settings.max_connections))
    with _listen(settings.host, settings.port) as listener:
        app, engine = _build(settings, path, origins, connections)
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        sys.stdout.write(translate("serving at {address} (Ctrl-C stops)", address=address) + "\n")
        sys.stdout.flush()
        Server(app, engine, connections).run(sockets=[listener])
    return 0


def _origins(settings: ServeSettings) -> list[str]:
    """The web pages that may use the server from elsewhere."""
    origins = [one.strip().rstrip("/") for one in (settings.cors_origins or "").split(",") if one.strip()]
    for origin in origins:
        if origin == "*" and settings.api_key is None:
            raise UserError(
                "--cors_origins * lets every web page in; name the pages, or set {variable} first",
                variable=API_KEY_VARIABLE,
            )
        if origin != "*" and not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise UserError(
                "--cors_origins takes addresses like https://example.org, without a path, not {origin!r}", origin=origin
            )
    return origins


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded: what can't work says so at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            "cannot listen on {host} port {port}: {reason}; use another --host or --port",
            host=host,
            port=port,
            reason=reason,
        ) from error


def _build(settings: ServeSettings, path: Path, origins: list[str], connections: Connections) -> tuple[FastAPI, Engine]:
    """The application around the model that the settings name, and the engine that runs the model."""
    from mm_rec.inference.loading import load_model
    from mm_rec.inference.session_file import fingerprint
    from mm_rec.machine.device import set_threads
    from mm_rec.serve.app import create_app
    from mm_rec.serve.engine import Engine
    from mm_rec.serve.gate import Limits
    from mm_rec.serve.service import Service
    from mm_rec.serve.sessions import SessionStore

    set_threads(settings.threads)
    loaded = load_model(
        path,
        device=settings.device,
        precision=settings.precision,
        weights=settings.weights,
        adapter=settings.adapter,
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    beginning = None
    if settings.memory is None:
        domain = loaded.choose_domain(settings.domain)
    else:
        from mm_rec.inference.folder_memory import read_folder

        beginning, domain, _ = read_folder(settings.memory, loaded, settings.domain, tell_on_stderr)
    identity = fingerprint(model)
    is_routed = settings.domain is None and settings.memory is None and loaded.is_routed
    sessions = SessionStore(
        settings.session_dir,
        model,
        tokenizer,
        domain,
        fingerprint=identity,
        max_sessions=settings.max_sessions,
        any_domain=is_routed,
    )
    service = Service(
        name=settings.name,
        engine=Engine(
            model,
            tokenizer,
            domain,
            choose=loaded.best_expert if is_routed else None,
            max_streams=settings.max_streams,
            max_queue=settings.max_queue,
        ),
        sessions=sessions,
        fingerprint=identity,
        max_prompt_bytes=settings.max_prompt_bytes,
        max_tokens=settings.max_tokens,
        seconds=settings.time_limit,
        learned_to_chat=loaded.learned_to_chat,
        beginning=beginning,
    )
    limits = Limits(
        # JSON writes some characters with six bytes; the rest is for what stands around the text.
        max_body_bytes=6 * settings.max_prompt_bytes + 65_536,
        max_requests=settings.max_streams + settings.max_queue,
    )
    expert = Translatable("chosen by the prompt") if is_routed else domain or "all"
    line = translate("model {path}, {dtype}, expert {expert}", path=loaded.path, dtype=model.dtype, expert=expert)
    sys.stdout.write(f"{line}\n")
    if loaded.untaught_notice is not None:
        line = translate("note: {notice}", notice=loaded.untaught_notice)
        sys.stdout.write(f"{line}\n")
    app = create_app(service, api_key=settings.api_key, limits=limits, connections=connections, cors_origins=origins)
    return app, service.engine


if __name__ == "__main__":
    raise SystemExit(run_program(main))
