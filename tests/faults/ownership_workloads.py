"""Rows 10, 21: many processes want one run folder, or two anything else that is written; one gets it."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import saving
import talking
from supervisor import Child, Supervisor
from workload import Trial, refusal, workload

from mm_rec import cli
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.sampling import Sampling
from mm_rec.inference.session_file import fingerprint, own
from mm_rec.model import MMRecModel
from mm_rec.serve.errors import ApiError
from mm_rec.serve.sessions import SessionStore
from mm_rec.storage.resume import open_run

PROCESSES = 20


def wait_for_log(child: Child, words: str = "") -> str:
    deadline = time.monotonic() + 60
    while not (child.log.endswith("\n") and words in child.log):
        assert time.monotonic() < deadline, f"process {child.pid} did not say {words!r}: {child.log}"
        time.sleep(0.002)
    return child.log


@workload(10, f"{PROCESSES} processes open one run folder at once; then the owner is killed", unit="folders",
          quick=3, soak=100)  # fmt: skip
def twenty_owners(folder: Path) -> Iterator[Trial]:
    supervisor = Supervisor(folder)

    def trial(seed: int) -> str:
        root = folder / f"runs{seed}"
        children = [supervisor.start("saving.own", root=str(root)) for _ in range(PROCESSES)]
        try:
            for child in children:
                child.go()
            logs = [wait_for_log(child) for child in children]
            owners = [child for child, log in zip(children, logs, strict=True) if log.startswith("owner of")]
            assert len(owners) == 1, logs
            refused = [log for log in logs if f"stage1 is in use by process {owners[0].pid} on " in log]
            assert len(refused) == PROCESSES - 1, logs
            assert [path.name for path in root.glob("stage1*")] == ["stage1"]

            owners[0].kill()
            assert owners[0].wait() == -9
            heir = supervisor.start("saving.own", root=str(root))
            children.append(heir)
            heir.go()
            assert wait_for_log(heir).startswith("owner of")
            took_over = f"took over from process {owners[0].pid} on "
            assert took_over in (root / "stage1" / "events.log").read_text()
        finally:
            for child in children:
                if child.status is None:
                    child.kill()
                    child.wait()
        return "one owner, 19 refused by name, taken over from the dead one"

    yield trial


# --- row 21: everything that is written -----------------------------------------------------------------------------


class Pairs:
    """Two that want the same: the first in a process of its own, the second here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.supervisor = Supervisor(folder)
        self.model = MMRecModel(talking.CONFIG, seed=0)
        self.session = ChatSession.start(self.model, talking.TOKENIZER, sampling=Sampling(max_new_tokens=4))
        list(self.session.reply("hello"))

    def owner(self, work: str, root: Path) -> Child:
        child = self.supervisor.start(f"owning.{work}", root=str(root), until=str(root / "go on"))
        child.go()
        assert wait_for_log(child).startswith("owner of"), child.log
        return child

    def end(self, owner: Child, root: Path, status: int = 0) -> None:
        (root / "go on").touch()
        assert owner.wait() == status, owner.log

    def command(self, *arguments: str) -> str:
        """Run ``mm-rec`` here, which has to end with exit code 2 and one line; returns it."""
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            assert cli.main([*arguments]) == 2
        assert errors.getvalue().count("\n") == 1, errors.getvalue()
        return errors.getvalue()

    def chat_again(self, root: Path) -> str:
        return self.command("chat", "--model", "nowhere", "--resume", "--session", str(root / "talk.safetensors"))

    def store(self, root: Path) -> SessionStore:
        return SessionStore(root, self.model, talking.TOKENIZER, None, fingerprint=fingerprint(self.model))

    def turns(self, root: Path) -> int:
        return ChatSession.load(root / "talk.safetensors", self.model, talking.TOKENIZER).turns


def run_and_run(pairs: Pairs, root: Path, removed: bool) -> None:
    owner = pairs.owner("run", root)
    if removed:
        (root / "stage1" / "run.lock").unlink()
    message = refusal(UserError, lambda: open_run(root, "stage1", saving.IDENTITY))
    assert f"stage1 is in use by process {owner.pid} on " in message
    pairs.end(owner, root)
    assert (root / "stage1" / "loss_log.txt").read_text() == "1,1.0\n"
    open_run(root, "stage1", saving.IDENTITY).release()


def chat_and_chat(pairs: Pairs, root: Path, removed: bool) -> None:
    owner, path = pairs.owner("chat", root), root / "talk.safetensors"
    if removed:  # the second one is the owner then, and the first is told so
        (root / ".talk.safetensors.lock").unlink()
        with own(path) as owned:
            session = ChatSession.load(path, pairs.model, talking.TOKENIZER)
            list(session.reply("and I?"))
            session.save(path, owned=owned)
            pairs.end(owner, root, status=2)
        assert f"is not owned by this process any more, because its lock file {root}" in owner.log
        assert f"is in use by process {os.getpid()} on" in owner.log
    else:
        assert f"talk.safetensors is in use by process {owner.pid} on " in pairs.chat_again(root)
        pairs.end(owner, root)
    assert pairs.turns(root) == 3, "a turn was lost"


def server_and_chat(pairs: Pairs, root: Path, removed: bool) -> None:
    owner = pairs.owner("folder", root)
    if removed:
        (root / ".lock").unlink()
        (root / ".lock").touch()
    assert f"{root} is in use by process {owner.pid} on " in pairs.chat_again(root)
    pairs.end(owner, root)


def server_and_server(pairs: Pairs, root: Path, removed: bool) -> None:
    owner = pairs.owner("folder", root)
    if removed:
        (root / ".lock").unlink()
    assert f"{root} is in use by process {owner.pid} on " in refusal(UserError, lambda: pairs.store(root))
    pairs.end(owner, root)


def chat_and_server(pairs: Pairs, root: Path, removed: bool) -> None:
    owner = pairs.owner("chat", root)
    with contextlib.closing(pairs.store(root)) as store:
        if removed:  # a request takes the session over, and the chat is told so
            (root / ".talk.safetensors.lock").unlink()
            with store.turn("talk"):
                pairs.end(owner, root, status=2)
            assert "is not owned by this process any more, because its lock file" in owner.log
        else:
            message = refusal(ApiError, lambda: store.turn("talk").__enter__())
            assert message == "another program is using session talk"
            pairs.end(owner, root)
    assert pairs.turns(root) == (2 if removed else 3), "a turn was lost"


def download_and_download(pairs: Pairs, root: Path, removed: bool) -> None:
    owner = pairs.owner("folder", root)
    if removed:
        (root / ".lock").unlink()
    message = pairs.command("data", "--output_dir", str(root), "--source", "builtin", "--text_samples", "1")
    assert f"{root} is in use by process {owner.pid} on " in message
    assert not (root / "text").exists()
    pairs.end(owner, root)


def preparation_and_preparation(pairs: Pairs, root: Path, removed: bool) -> None:
    write_synthetic(root, 12)
    owner = pairs.owner("preparation", root)
    if removed:
        (root / "prepared" / "lock").unlink()
    second = pairs.supervisor.start("owning.prepare_too", root=str(root))
    second.go()
    wait_for_log(second, f"waiting for process {owner.pid} on ")
    pairs.end(owner, root)
    assert second.wait() == 0, second.log
    assert "documents read" in second.log


PAIRS = (
    run_and_run, chat_and_chat, server_and_chat, server_and_server, chat_and_server, download_and_download,
    preparation_and_preparation,
)  # fmt: skip


@workload(21, "two that want to write one run, session, folder of sessions or data; in half of them the lock file of "
          "the first is removed", unit="pairs of owners", quick=14, soak=140)  # fmt: skip
def two_owners(folder: Path) -> Iterator[Trial]:
    pairs = Pairs(folder)

    def trial(seed: int) -> str:
        what, removed = PAIRS[seed % len(PAIRS)], seed // len(PAIRS) % 2 == 1
        root = folder / f"pair{seed}"
        root.mkdir()
        if "chat" in what.__name__:
            pairs.session.save(root / "talk.safetensors")
        what(pairs, root, removed)
        words = what.__name__.replace("_", " ")
        return f"{words}{', lock file removed' if removed else ''}: one owner, the other told who"

    yield trial
