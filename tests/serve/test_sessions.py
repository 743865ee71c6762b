"""A conversation goes on from its file as if the server had never stopped, and nothing leads out of its folder."""

import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file

from mm_rec.errors import UserError
from mm_rec.inference import decode, session_file
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.sampling import Sampling
from mm_rec.inference.session_file import fingerprint
from mm_rec.model import MMRecModel
from mm_rec.serve.errors import ApiError
from mm_rec.serve.service import Service
from mm_rec.serve.sessions import SessionStore
from mm_rec.state import ModelState
from mm_rec.storage.files import DamageError, StorageError
from mm_rec.text.conversation import Message, encode_conversation
from mm_rec.text.tokenizer import Tokenizer

Connect = Callable[..., TestClient]
MakeService = Callable[..., Service]
WaitUntil = Callable[[Callable[[], bool]], None]


def say(client: TestClient, text: str, session: str | None = "talk", **fields: Any) -> Any:
    body = {"model": "tiny", "max_tokens": 6, "temperature": 1.5, "seed": 7, "logprobs": True, "session": session}
    return client.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": text}], **fields})


def content(reply: Any) -> list[Any]:
    """What was said, with its log-probabilities to the last bit."""
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"][0]["logprobs"]["content"])


def test_a_restarted_server_goes_on_bitwise(make_service: MakeService, connect: Connect, tmp_path: Path) -> None:
    texts = ["hello", "and then?", "ışık", "bye"]
    with connect(make_service(folder="one")) as client:
        expected = [content(say(client, text)) for text in texts]
    told = []
    for text in texts:
        with connect(make_service(folder="two")) as client:
            told.append(content(say(client, text)))
    assert told == expected
    one, two = (load_file(tmp_path / name / "talk.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_conversations_begin_from_what_was_read_before(make_service: MakeService, connect: Connect) -> None:
    first = make_service(folder="one")
    with connect(first) as client:
        say(client, "hello")
        memory = first.sessions.load("talk")
        assert memory is not None
        expected = content(say(client, "and then?"))
        assert content(say(client, "and then?", session=None)) != expected
    with connect(make_service(folder="two", beginning=memory.state)) as client:
        for session in (None, "new", None):  # it stays as it is
            assert content(say(client, "and then?", session=session)) == expected
        assert client.get("/v1/sessions/new").json()["tokens"] > memory.tokens


def test_a_session_goes_on_with_the_expert_that_began_it(
    make_service: MakeService, connect: Connect, model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    experts = iter(["code", "text"])
    service = make_service(choose=lambda ids: next(experts))
    with connect(service) as client:
        for name, expert in (("one", "code"), ("two", "text")):
            session = ChatSession.start(
                model, tokenizer, sampling=Sampling(max_new_tokens=6, temperature=0), domain=expert
            )
            for text in ("hello", "and then?"):
                reply = say(client, text, session=name, temperature=0, top_p=1.0)
                assert reply.json()["choices"][0]["message"]["content"] == session.answer(text)
            assert session_file.read(tmp_path / "sessions" / f"{name}.safetensors")[1]["domain"] == expert
    service.sessions.close()
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "sessions" / "one.safetensors", tmp_path / "alone")
    with connect(make_service(folder="alone")) as client:
        reply = say(client, "hello", session="one")
        assert (reply.status_code, "made with another domain" in reply.text) == (409, True)


def test_a_session_remembers_what_sending_all_would_say(client: TestClient, tokenizer: Tokenizer) -> None:
    history: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for text in ("hello", "why?", "again"):
        new = [{"role": "user", "content": text}]
        history += new
        fields = {"messages": history if len(history) == 2 else new, "temperature": 0}
        reply = say(client, text, **fields).json()
        again = say(client, text, None, messages=history, temperature=0).json()
        answer = reply["choices"][0]["message"]["content"]
        assert answer == again["choices"][0]["message"]["content"]
        history.append({"role": "assistant", "content": answer})
    assert reply["usage"]["prompt_tokens"] < again["usage"]["prompt_tokens"]
    said = encode_conversation(tokenizer, [Message(**message) for message in history])[0]
    info = client.get("/v1/sessions/talk").json()
    assert (info["turns"], info["tokens"]) == (3, len(said))


def test_the_file_does_not_grow(client: TestClient) -> None:
    sizes = set()
    for turn in range(12):
        content(say(client, "word " * turn, max_tokens=2))
        sizes.add(client.get("/v1/sessions/talk").json()["bytes"])
    assert len(sizes) == 1


def test_the_file_is_one_of_mm_rec_chat(
    client: TestClient, service: Service, model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    content(say(client, "hello"))
    session = ChatSession.load(tmp_path / "sessions" / "talk.safetensors", model, tokenizer)
    assert (session.turns, session.n_tokens) == (1, client.get("/v1/sessions/talk").json()["tokens"])
    with pytest.raises(UserError, match=f"sessions is in use by process {os.getpid()} on"):
        session.save(tmp_path / "sessions" / "other.safetensors")
    session.save(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").rename(tmp_path / "sessions" / "other.safetensors")
    assert content(say(client, "go on", "other")) == content(say(client, "go on"))


def test_a_deleted_session_is_forgotten(client: TestClient, tmp_path: Path) -> None:
    first = content(say(client, "hello"))
    content(say(client, "hello"))
    assert client.delete("/v1/sessions/talk").json() == {"id": "talk", "object": "session.deleted", "deleted": True}
    assert client.get("/v1/sessions/talk").status_code == 404
    assert client.delete("/v1/sessions/talk").json()["error"]["code"] == "session_not_found"
    assert not list((tmp_path / "sessions").glob("*talk*"))
    assert content(say(client, "hello")) == first


def test_one_request_at_a_time(
    client: TestClient, service: Service, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, go_on = decode.step, threading.Event()
    monkeypatch.setattr(decode, "step", lambda *rest, **more: go_on.wait(60) and step(*rest, **more))
    replies: list[Any] = []
    slow = threading.Thread(target=lambda: replies.append(say(client, "tell me all")))
    slow.start()
    wait_until(lambda: service.engine.running == 1)
    busy = say(client, "me too")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "session_busy")
    go_on.set()
    slow.join()
    assert content(replies[0])
    assert say(client, "now").status_code == 200
    assert client.get("/v1/sessions/talk").json()["turns"] == 2


def test_a_request_that_does_not_end_leaves_no_trace(
    make_service: MakeService, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = make_service()
    with connect(service) as client:
        content(say(client, "hello"))
        path = tmp_path / "sessions" / "talk.safetensors"
        before = path.read_bytes()
        step = decode.step
        monkeypatch.setattr(decode, "step", lambda *_, **__: 1 / 0)
        assert say(client, "lost").status_code == 500
        monkeypatch.setattr(decode, "step", step)
        assert path.read_bytes() == before
        monkeypatch.setattr("mm_rec.inference.session_file.write_atomic", _full_disk)
        reply = say(client, "lost, too")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
        lines = say(client, "lost, too", stream=True).text.split("\n\n")
        assert 'finish_reason":"length' not in "".join(lines)
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == "overloaded"
        assert lines[-2] == "data: [DONE]"
        assert path.read_bytes() == before
        monkeypatch.undo()
        assert say(client, "found").status_code == 200


def _full_disk(*_: object) -> None:
    raise StorageError("no space left")


def test_sessions_are_bounded(make_service: MakeService, connect: Connect) -> None:
    with connect(make_service(max_sessions=2)) as client:
        for name in ("a", "b", "a"):
            assert say(client, "hi", name).status_code == 200
        reply = say(client, "hi", "c")
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "session_limit_reached")
        client.delete("/v1/sessions/a")
        assert say(client, "hi", "c").status_code == 200


NAMES = [
    "", ".", "..", "../a", "a/b", "/etc/passwd", "a\\b", "..\\a", "a\x00", "\x00", "a\n", "a b", "A", "Talk", "~", "a:",
    "a.safetensors", "ışık", "ａ", "ſ", "a\u200b", "\u2024\u2024/a", "%2e%2e%2fa", "-a", "_a", ".lock", "a" * 65,
    "a\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_what_is_no_name_is_refused(client: TestClient, service: Service, tmp_path: Path, name: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "session": name}
    reply = client.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "session")
    with pytest.raises(ApiError, match="a session is named by"), service.sessions.turn(name):
        pass
    assert [entry.name for entry in tmp_path.rglob("*")] == ["sessions", ".lock"]


def test_random_names_stay_in_the_folder(service: Service, tmp_path: Path) -> None:
    rng = random.Random(5)
    for _ in range(5000):
        name = "".join(rng.choices("./\\\x00~aA-_0 %2eışſＡ\n:", k=rng.randrange(6)))
        try:
            with service.sessions.turn(name):
                assert service.sessions.load(name) is None
                assert name.isascii()
                assert name == name.lower()
                assert not set(name) & set("./\\\x00 %:~\n")
        except ApiError as error:
            assert error.status == 400  # noqa: PT017
    assert [entry.name for entry in tmp_path.rglob("*")] == ["sessions", ".lock"]


def test_links_are_refused(client: TestClient, tmp_path: Path) -> None:
    content(say(client, "hello", "real"))
    folder = tmp_path / "sessions"
    outside = tmp_path / "outside.safetensors"
    os.replace(folder / "real.safetensors", outside)
    (folder / "real.safetensors").symlink_to(outside)
    (folder / "dead.safetensors").symlink_to(tmp_path / "nothing")
    (folder / "folder.safetensors").mkdir()
    before = outside.read_bytes()
    for name in ("real", "dead", "folder"):
        for reply in (
            say(client, "hi", name),
            client.get(f"/v1/sessions/{name}"),
            client.delete(f"/v1/sessions/{name}"),
        ):
            assert (reply.status_code, reply.json()["error"]["code"]) == (409, "session_unusable")
    assert outside.read_bytes() == before
    assert not (tmp_path / "nothing").exists()


def test_damage_is_told_and_can_be_deleted(client: TestClient, tmp_path: Path) -> None:
    content(say(client, "hello"))
    path = tmp_path / "sessions" / "talk.safetensors"
    whole = path.read_bytes()
    rng = random.Random(3)
    for _ in range(40):
        broken = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        if len(broken) == len(whole):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        reply = say(client, "hi")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "session_unusable")
    assert client.delete("/v1/sessions/talk").status_code == 200
    assert say(client, "hi").status_code == 200


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "negative position": lambda tensors, _: tensors["position"].fill_(-1),
    "huge position": lambda tensors, _: tensors["position"].fill_(2**62),
    "no rows": lambda tensors, _: tensors.update({name: one[:0] for name, one in tensors.items() if one.ndim}),
    "two rows": lambda tensors, _: tensors.update(
        {name: torch.cat([one, one]) for name, one in tensors.items() if one.ndim}
    ),
    "position of no shape": lambda tensors, _: tensors.update(position=torch.tensor(3)),
    "many positions": lambda tensors, _: tensors.update(position=torch.zeros(100_000, dtype=torch.int64)),
    "NaN": lambda tensors, _: tensors["experts.text.blocks.0.h"].fill_(torch.nan),
    "infinity": lambda tensors, _: tensors["experts.text.blocks.2.memory.kept_score"][0, 0, 0].fill_(torch.inf),
    "other type": lambda tensors, _: tensors.update(
        {"experts.text.blocks.0.h": tensors["experts.text.blocks.0.h"].half()}
    ),
    "no position": lambda tensors, _: tensors.pop("position"),
    "no generator": lambda tensors, _: tensors.pop("generator"),
    "short generator": lambda tensors, _: tensors.update(generator=tensors["generator"][:8]),
    "float generator": lambda tensors, _: tensors.update(generator=tensors["generator"].float()),
    "turns that are many": lambda tensors, _: tensors.update(turns=torch.ones(3, dtype=torch.int64)),
    "turns below none": lambda tensors, _: tensors.update(turns=torch.tensor(-1)),
    "another name": lambda tensors, _: tensors.update(more=torch.zeros(2)),
    "one expert": lambda tensors, _: [tensors.pop(name) for name in list(tensors) if name.startswith("experts.code")],
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_file_ends_its_own_request(
    client: TestClient, model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    content(say(client, "hello"))
    path = tmp_path / "sessions" / "talk.safetensors"
    tensors, settings = session_file.read(path)
    FORGERIES[kind](tensors, settings)
    session_file.write(path, tensors, settings)
    for reply in (say(client, "hi"), client.get("/v1/sessions/talk")):
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "session_unusable")
        message = reply.json()["error"]["message"]
        assert str(tmp_path) not in message
        assert "delete" not in message.lower()
    with pytest.raises(DamageError, match="no chat session of this model"):
        ChatSession.load(path, model, tokenizer)
    assert say(client, "hi", "other").status_code == 200


def test_a_state_that_gives_no_numbers_ends_its_own_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    content(say(client, "hello"))
    alone = content(say(client, "tell me", None, max_tokens=40))
    step, marked = decode.step, session_file.restore

    def restored(*arguments: Any) -> session_file.Conversation:
        found = marked(*arguments)
        found.state.position.add_(10**9)
        return found

    def spoiled(model: MMRecModel, tokens: torch.Tensor, state: ModelState, *rest: Any, **more: Any) -> Any:
        logits, state = step(model, tokens, state, *rest, **more)
        logits[state.position > 10**9] = torch.nan
        return logits, state

    monkeypatch.setattr(session_file, "restore", restored)
    monkeypatch.setattr(decode, "step", spoiled)
    replies: dict[str | None, Any] = {}
    threads = [
        threading.Thread(target=lambda name=name: replies.update({name: say(client, "tell me", name, max_tokens=40)}))
        for name in (None, "talk")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (replies["talk"].status_code, replies["talk"].json()["error"]["code"]) == (409, "session_unusable")
    assert [one["token"] for one in content(replies[None])] == [one["token"] for one in alone]


def test_a_file_that_cannot_be_read_at_this_moment_is_no_damage(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content(say(client, "hello"))

    def no_descriptor(_: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(session_file, "read_regular", no_descriptor)
        reply = say(client, "hi")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert str(tmp_path) not in reply.text
    assert say(client, "hi").status_code == 200


def test_another_model_is_told(client: TestClient, model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    content(say(client, "hello"))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "talk.safetensors").write_bytes((tmp_path / "sessions" / "talk.safetensors").read_bytes())
    for identity, domain, what in (("0" * 64, None, "model"), (fingerprint(model), "text", "domain")):
        store = SessionStore(tmp_path / "copy", model, tokenizer, domain, fingerprint=identity)
        with pytest.raises(ApiError, match=f"made with another {what}"):
            store.load("talk")
        store.close()


def test_a_folder_has_one_server(make_service: MakeService) -> None:
    first = make_service()
    with pytest.raises(UserError, match="in use by process"):
        make_service()
    first.sessions.close()
    make_service()


def test_the_folder_is_the_owners(service: Service, tmp_path: Path) -> None:
    assert (tmp_path / "sessions").stat().st_mode & 0o777 == 0o700


def test_a_session_that_another_program_owns_is_busy(client: TestClient, tmp_path: Path) -> None:
    content(say(client, "hello"))
    before = (tmp_path / "sessions" / "talk.safetensors").read_bytes()
    with session_file.own(tmp_path / "sessions" / "talk.safetensors", in_own_folder=True):
        reply = say(client, "hello")
        assert reply.status_code == 409
        assert reply.json()["error"]["message"] == "another program is using session talk"
    assert (tmp_path / "sessions" / "talk.safetensors").read_bytes() == before
    content(say(client, "hello"))
    assert sorted(path.name for path in (tmp_path / "sessions").iterdir()) == [".lock", "talk.safetensors"]
