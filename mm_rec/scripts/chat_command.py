"""Talk with a trained model. What was said is in its memory, which has a fixed size and fits into one file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_rec.errors import UserError
from mm_rec.program import Parser, run_program
from mm_rec.scripts.sampling_options import (
    MODEL_HELP,
    MOST_CHARACTERS,
    add_adapter_argument,
    add_domain_argument,
    add_json_argument,
    add_memory_argument,
    add_sampling_arguments,
    add_weights_argument,
    given_sampling,
    read_json_schema,
    tell_on_stderr,
)
from mm_rec.translation import Translatable, translate

if TYPE_CHECKING:
    from mm_rec.inference.chat_session import ChatSession
    from mm_rec.storage.lock import Lock

COMMANDS = """\
  /save [FILE]   write the memory to FILE, or to the file of --session
  /fork FILE     go on in FILE; the file of before keeps what it has
  /reset         forget everything but the system prompt
  /help          show this
  /quit          end, as Ctrl-D does; Ctrl-C breaks off an answer
A line that starts with a blank is a message, even if a / follows."""

EPILOG = """commands in a conversation:
{commands}

examples:
  mm-rec chat --model checkpoints_cpu --session talk.safetensors
  mm-rec chat --model checkpoints_cpu --session talk.safetensors --resume
  mm-rec chat --model checkpoints_cpu --memory ./notes        begins from what it remembers of a folder
  printf 'Hello\\nWhat is your name?\\n' | mm-rec chat --model checkpoints_cpu --temperature 0
"""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, load the model, talk until the input ends."""
    parser = Parser(prog=prog, description=__doc__)
    parser.epilog = Translatable(EPILOG, commands=Translatable(COMMANDS))
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--session", type=Path, metavar="FILE", help="keep the memory here, saved after every answer")
    parser.add_argument("--resume", action="store_true", help="go on with the conversation in --session")
    parser.add_argument("--system", metavar="TEXT", help="system prompt of a new conversation")
    add_memory_argument(parser)
    add_adapter_argument(parser)
    add_domain_argument(
        parser, Translatable("all once fusion is trained, else the one that reads the first message in the fewest bits")
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA if it is there")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="type of the matrices")
    add_weights_argument(parser)
    add_sampling_arguments(parser)
    add_json_argument(parser)
    options = parser.parse_args(arguments)
    if options.resume and options.session is None:
        parser.error("--resume needs --session FILE")
    if options.resume and any(one is not None for one in (options.system, options.domain, options.memory)):
        parser.error("--system, --domain and --memory are those that the conversation was started with; leave them out")
    from mm_rec.inference.session_file import own

    with contextlib.ExitStack() as locks:
        owned = None if options.session is None else locks.enter_context(own(options.session))
        if not options.resume and options.session is not None and options.session.exists():
            raise UserError(
                "{session} holds a conversation; go on with --resume or name another file", session=options.session
            )
        schema = read_json_schema(options.json_schema)
        session, start = _open_session(options)
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        conversation = Conversation(session, start, options.session, owned, locks, interactive=sys.stdin.isatty())
        conversation.json_schema = schema
        conversation.run()
    return 0


Start = Callable[[str], "ChatSession"]
"""Starts a conversation anew; its argument is the first message, if that is known."""


def _open_session(options: argparse.Namespace) -> tuple[ChatSession, Start]:
    """The conversation to go on with or to begin, and how it begins anew."""
    from mm_rec.inference.chat_session import ChatSession
    from mm_rec.inference.loading import load_model
    from mm_rec.inference.sampling import Sampling

    given = given_sampling(options)
    loaded = load_model(
        options.model,
        device=options.device,
        precision=options.precision,
        weights=options.weights,
        adapter=options.adapter,
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    if loaded.untaught_notice is not None:
        print(translate("note: {notice}", notice=loaded.untaught_notice), file=sys.stderr)
    if options.resume:
        session = ChatSession.load(options.session, model, tokenizer)
        session.sampling = dataclasses.replace(session.sampling, **given)
        sampling, domain, system = session.sampling, session.domain, session.system

        def again(message: str) -> ChatSession:
            return ChatSession.start(model, tokenizer, sampling=sampling, domain=domain, system=system)

        return session, again
    memory = None
    if options.memory is not None:
        from mm_rec.inference.folder_memory import read_folder

        memory = read_folder(options.memory, loaded, options.domain, tell_on_stderr)

    def start(message: str) -> ChatSession:
        return ChatSession.start(
            model,
            tokenizer,
            sampling=Sampling(**given),
            domain=loaded.choose_domain(options.domain, message) if memory is None else memory.domain,
            system=options.system or "",
            memory=memory and memory.state,
        )

    return start(""), start


class Conversation:
    """The loop of ``mm-rec chat``: a line of input is a message or a command.

    Args:
        session: to talk in.
        start: begins it anew; where nothing was said yet, with the first message, which may decide who answers.
        path: where it is kept; None for nowhere.
        owned: the lock of this file.
        locks: releases at the end what is owned.
        interactive: show prompts, and go on after errors.

    Attributes:
        json_schema: let every answer be JSON that follows it; None for any text.
    """

    def __init__(
        self,
        session: ChatSession,
        start: Start,
        path: Path | None,
        owned: Lock | None,
        locks: contextlib.ExitStack,
        *,
        interactive: bool,
    ) -> None:
        self.session = session
        self.start = start
        self.path = path
        self.owned = owned
        self.locks = locks
        self.interactive = interactive
        self.json_schema: dict[str, Any] | None = None
        self._copies: set[Path] = set()  # files that this conversation has made and may replace

    def run(self) -> None:
        """Talk until the input ends or /quit."""
        if self.interactive:
            with contextlib.suppress(ModuleNotFoundError):  # the console of Windows has an editor of its own
                import readline  # noqa: F401 (gives input() its line editing)

            if self.session.turns:
                told = translate(
                    "{turns} answers so far; /help shows the commands, Ctrl-D ends", turns=self.session.turns
                )
            else:
                told = translate("/help shows the commands, Ctrl-D ends")
            print(told)
        with _ctrl_c_as_exception():
            for line in self._lines():
                try:
                    if line.startswith("/"):
                        self._command(*line[1:].split(maxsplit=1))
                    else:
                        self._answer(line)
                except UserError as error:
                    if not self.interactive:
                        raise
                    print(f"{translate('error')}: {translate(error)}", file=sys.stderr)

    def _lines(self) -> Iterator[str]:
        """Messages and commands; blank lines and what follows /quit are left out."""
        while True:
            try:
                line = input(translate("you: ")) if self.interactive else sys.stdin.readline(MOST_CHARACTERS + 1)
            except EOFError:
                return
            if not line and not self.interactive:
                return
            if len(line) > MOST_CHARACTERS:
                raise UserError(
                    "a message has more than {most:,} characters; give less of it",
                    most=MOST_CHARACTERS,
                )
            line = line.rstrip()
            if line == "/quit":
                return
            if line:
                yield line

    def _answer(self, message: str) -> None:
        if not self.session.turns:
            self.session = self.start(message)
        if self.interactive:
            print(translate("model: "), end="", flush=True)
        try:
            for piece in self.session.reply(message, json_schema=self.json_schema):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        print(flush=True)
        if self.path is not None:
            self.session.save(self.path, owned=self.owned)

    def _command(self, name: str = "", argument: str = "") -> None:
        from mm_rec.inference.session_file import own

        path = Path(argument.strip()) if argument else None
        match name:
            case "save":
                target = path or self.path
                if target is None:
                    raise UserError("there is no --session; use /save FILE")
                same = self.path is not None and target.resolve() == self.path.resolve()
                if not same and target.exists() and target.resolve() not in self._copies:
                    raise UserError("{target} is there already; name another file", target=target)
                self._save(target, self.owned if same else None)
            case "fork":
                if path is None:
                    raise UserError("name the file to go on in: /fork FILE")
                if path.exists():
                    raise UserError("{path} is there already; name another file", path=path)
                owned = self.locks.enter_context(own(path))
                self._save(path, owned)
                if self.owned is not None:
                    self.owned.release()
                self.path, self.owned = path, owned
            case "reset":
                self.session = self.start("")
                if self.path is not None:
                    self.session.save(self.path, owned=self.owned)
                print(translate("forgotten"))
            case "help":
                print(translate(COMMANDS))
            case _:
                raise UserError("there is no command /{name}; /help shows them", name=name)

    def _save(self, path: Path, owned: Lock | None) -> None:
        self.session.save(path, owned=owned)
        self._copies.add(path.resolve())
        print(translate("saved in {path}, {size:,} bytes", path=path, size=path.stat().st_size))


@contextlib.contextmanager
def _ctrl_c_as_exception() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt, which can break off an answer without ending the program."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
