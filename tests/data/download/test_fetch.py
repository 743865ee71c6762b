"""Downloading through the real client from a hub on this machine, undisturbed and with every kind of fault."""

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_samples import CARD, PYTHON, code_rows
from hub_stub import Fault, Repository

from mm_rec.data.download import fetch as fetch_module
from mm_rec.data.download.fetch import fetch
from mm_rec.data.download.hub import UnreachableError
from mm_rec.data.download.sources import SOURCES
from mm_rec.data.manifest import read_manifest
from mm_rec.errors import UserError
from mm_rec.system import REMOVES_OPEN_FILES

SOURCE = SOURCES["python"]
GOOD = [row["content"] for row in code_rows(3000) if row["content"] != "x = 1\n"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fetch_module, "_CHUNK", 100)


def download(folder, samples=2000, source=SOURCE):
    told = []
    path = fetch(source, samples, folder, told.append)
    return [json.loads(line) for line in path.read_text().splitlines()], told


def leftovers(folder):
    return [path.name for path in folder.rglob(".*")]


def test_samples_in_the_guides_format_with_a_manifest(tmp_path, python_hub):
    texts, told = download(tmp_path)
    assert texts == GOOD[:2000]
    assert told == [f"python: 2,000 samples in {tmp_path}/code/code.jsonl; left out: 222 too short"]
    entry = read_manifest(tmp_path)["code/code.jsonl"]
    content = (tmp_path / "code" / "code.jsonl").read_bytes()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert entry["revision"] == python_hub.repositories[PYTHON].revision
    assert (entry["bytes"], entry["samples"], entry["rows"]) == (len(content), 2000, 2222)
    assert entry["origin"]["hub_id"] == PYTHON
    assert not leftovers(tmp_path)


def test_few_samples_cost_little(tmp_path, python_hub):
    download(tmp_path, 500)
    assert python_hub.bytes_sent("file-1") > 0
    assert python_hub.bytes_sent("file-2") == 0


def test_what_is_there_is_not_downloaded_again(tmp_path, python_hub):
    download(tmp_path, 500)
    python_hub.requests.clear()
    texts, told = download(tmp_path, 500)
    assert (texts, python_hub.requests) == (GOOD[:500], [])
    assert "is there already" in told[0]
    assert download(tmp_path, 700)[0] == GOOD[:700]
    assert download(tmp_path, 300)[0] == GOOD[:300]


def test_what_a_killed_write_left_over_is_removed(tmp_path, python_hub):
    names = (".tmp-manifest.json-0123456789abcdef", "code/.tmp-.code.jsonl.journal-0123456789abcdef")
    left = [tmp_path / name for name in names]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert download(tmp_path, 100)[0] == GOOD[:100]
    assert not any(path.exists() for path in left)


def test_a_source_with_fewer_rows_than_asked_for(tmp_path, python_hub):
    assert download(tmp_path, 5000)[0] == GOOD
    python_hub.requests.clear()
    assert download(tmp_path, 5000)[0] == GOOD
    assert not python_hub.requests


def test_wikitext_gives_paragraphs(tmp_path, connect):
    paragraph = "The river rose in the night and took the lower bridge with it , they say ."
    rows = ["", " = Rivers and the long history of the bridges over them = \n", f" {paragraph} \n", " Short . \n"]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), table)
    card = CARD.format("raw/train-*").replace("default", "wikitext-103-raw-v1")
    files = {"README.md": card.encode(), "raw/train-0.parquet": table.getvalue()}
    connect({"Salesforce/wikitext": Repository(files)})
    texts, told = download(tmp_path, 10, SOURCES["wikitext"])
    assert texts == [paragraph]
    assert "2 too short, 1 heading" in told[-1]


def test_conversations_are_kept_whole(tmp_path, connect):
    turns = {"from": ["human", "gpt"], "value": ["Hello", "Good day"], "weight": None}
    table = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"], "conversations": [turns]}), table)
    files = {"README.md": CARD.format("data/train-*").encode(), "data/train-0.parquet": table.getvalue()}
    connect({"liyucheng/ShareGPT90K": Repository(files)})
    expected = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
    assert download(tmp_path, 10, SOURCES["sharegpt"])[0] == [{"id": "a", "conversations": expected}]


def test_articles_of_a_language_by_its_configuration(tmp_path, connect):
    article = "Türkiye'nin başkenti Ankara'dır; çoğu kişi İstanbul sanır. Şehir, İç Anadolu'da yer alır."
    files = {"README.md": b"---\nconfigs:\n"}
    for code, text in (("de", "Berlin ist die Hauptstadt der Bundesrepublik Deutschland."), ("tr", article)):
        table = io.BytesIO()
        pq.write_table(pa.table({"id": ["1"], "url": ["u"], "title": ["t"], "text": [text]}), table)
        card = f"- config_name: 20231101.{code}\n  data_files:\n  - split: train\n    path: 20231101.{code}/train-*\n"
        files["README.md"] += card.encode()
        files[f"20231101.{code}/train-0.parquet"] = table.getvalue()
    files["README.md"] += b"---\n"
    connect({"wikimedia/wikipedia": Repository(files)})
    assert download(tmp_path, 10, SOURCES["wikipedia"].in_language("tr"))[0] == [article]
    assert (tmp_path / "text" / "wikipedia-tr.jsonl").is_file()


def tree_rows(n):
    """Messages of ``n`` trees, every third in Turkish: two questions, the first with a worse and a better answer."""
    for i in range(n):
        lang = "tr" if i % 3 == 0 else "en"
        turns = [("q", None, "prompter", None), ("bad", "q", "assistant", 1), ("good", "q", "assistant", 0)]
        turns += [
            ("gone", "good", "prompter", None),
            ("next", "good", "prompter", None),
            ("end", "next", "assistant", 0),
        ]
        for name, parent, role, rank in turns:
            yield {
                "message_id": f"{i}-{name}", "parent_id": parent and f"{i}-{parent}", "message_tree_id": f"{i}-q",
                "role": role, "text": f"{name} {i}", "lang": lang, "rank": rank, "deleted": name == "gone", "more": 1,
            }  # fmt: skip


@pytest.mark.parametrize("stop_after", [None, 4, 13])
def test_conversations_are_made_of_trees_of_messages(tmp_path, connect, monkeypatch, stop_after):
    monkeypatch.setattr(fetch_module, "_CHUNK", 4)  # a stop comes inside of a tree
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(tree_rows(9))), table, row_group_size=5)
    files = {"README.md": CARD.format("data/train-*").encode(), "data/train-0.parquet": table.getvalue()}
    connect({"OpenAssistant/oasst2": Repository(files)})
    source = SOURCES["oasst2"].in_language("tr")
    if stop_after is not None:
        gather, rows = fetch_module._Download._gather, itertools.count()

        def gather_some(self, row, journal):
            if next(rows) == stop_after:
                raise Killed
            return gather(self, row, journal)

        with monkeypatch.context() as patch:
            patch.setattr(fetch_module._Download, "_gather", gather_some)
            with pytest.raises(Killed):
                download(tmp_path, 10, source)
    roles = ["user", "assistant"] * 2
    expected = [
        [
            {"role": role, "content": f"{name} {i}"}
            for role, name in zip(roles, ("q", "good", "next", "end"), strict=True)
        ]
        for i in (0, 3, 6)
    ]
    found, told = download(tmp_path, 10, source)
    assert found == [{"messages": messages} for messages in expected]
    assert told[-1] == f"oasst2: 3 samples in {tmp_path}/chat/oasst2-tr.jsonl; left out: 36 of another language"


class Killed(BaseException):
    """Stands for the end of the process at an instant."""


def test_a_kill_at_any_step_to_the_disk_loses_nothing(tmp_path, python_hub, monkeypatch):
    monkeypatch.setattr(fetch_module, "_CHUNK", 300)
    step = 0
    came = True
    while came:
        step += 1
        folder = tmp_path / str(step)
        with monkeypatch.context() as patch:
            steps = itertools.count(1)
            for name in ("fsync", "replace"):
                patch.setattr(os, name, functools.partial(die_at, step, steps, getattr(os, name)))
            with contextlib.suppress(Killed):
                download(folder, 400)
            came = next(steps) > step
        samples = 400 - 50 * (step % 2)  # the next command may ask for something else
        assert download(folder, samples)[0] == GOOD[:samples]
        assert not leftovers(folder)
        assert list(read_manifest(folder)) == ["code/code.jsonl"]
    assert step > (12 if REMOVES_OPEN_FILES else 8)  # Windows has no steps that flush a folder


def test_a_kill_before_the_end_is_recorded(tmp_path, python_hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "record_file", functools.partial(die_at, 1, itertools.count(1), None))
        with pytest.raises(Killed):
            download(tmp_path, 5000)
    python_hub.requests.clear()
    assert download(tmp_path, 5000)[0] == GOOD
    assert not python_hub.requests
    assert not leftovers(tmp_path)


def die_at(step, steps, function, *arguments):
    """Call ``function``, unless it is its turn to be the last thing that the process comes to."""
    if next(steps) == step:
        raise Killed
    return function(*arguments)


def test_a_killed_process_is_continued(tmp_path, python_hub):
    python_hub.faults.append(Fault("file-2", stall=True, times=10**9))
    program = (
        "import sys; from pathlib import Path; from mm_rec.data.download import fetch, sources;"
        "fetch._CHUNK = 100; fetch.fetch(sources.SOURCES['python'], 2000, Path(sys.argv[1]), print)"
    )
    environment = {**os.environ, "HF_ENDPOINT": python_hub.url, "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "data")], env=environment)
    journal = tmp_path / "data" / "code" / ".code.jsonl.journal"
    while not (journal.exists() and json.loads(journal.read_bytes())["read"] == 1500):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    python_hub.faults.clear()
    python_hub.requests.clear()
    assert download(tmp_path / "data")[0] == GOOD[:2000]
    assert python_hub.bytes_sent("file-2") > 0


def test_reading_on_transfers_two_row_groups_again_at_most(tmp_path, connect, monkeypatch):
    chance = random.Random(0)
    rows = [
        "".join(f"v{chance.getrandbits(64):x} = {chance.getrandbits(64)}\n" for _ in range(150)) for _ in range(2000)
    ]
    table = io.BytesIO()
    pq.write_table(pa.table({"content": rows}), table, row_group_size=100, use_dictionary=False, compression="none")
    content = table.getvalue()
    hub = connect({PYTHON: Repository({"README.md": CARD.format("data/*").encode(), "data/train-0.parquet": content})})

    def stop_at_1800(line):
        if "1,8" in line:
            raise Killed

    monkeypatch.setattr(fetch_module, "_TELL_SECONDS", 0.0)
    with pytest.raises(Killed):
        fetch(SOURCE, 2000, tmp_path, stop_at_1800)
    hub.requests.clear()
    assert download(tmp_path, 2000)[0] == rows
    left, group, ahead, footer = 2, len(content) / 20, 1 << 20, 1 << 16
    assert hub.bytes_sent("train-0") < (left + 2) * (group + ahead + footer) + 3 * footer


@pytest.mark.parametrize(
    "fault",
    [
        Fault("revision/main", status=429, headers={"Retry-After": "7"}),
        Fault("revision/main", status=503, times=3),
        Fault("file-1", status=429, headers={"Retry-After": "7"}),
        Fault("file-1", status=503, times=4),
        Fault("file-2", status=500, times=9),
        Fault("file-2", status=504, times=9),
        Fault("tree", status=502),
        Fault("README", status=503, times=2),
        Fault("file-1", cut_after=0),
        Fault("file-1", cut_after=1),
        Fault("file-1", cut_after=5000, times=3),
        Fault("file-2", cut_after=9999, times=9),
        Fault("file-1", flip=4000),
        Fault("file-1", flip=9000, times=2),
        Fault("file-2", flip=0),
    ],
    ids=str,
)
def test_faults_that_pass_leave_no_trace(tmp_path, python_hub, slept, fault):
    python_hub.faults.append(fault)
    texts, _ = download(tmp_path)
    assert texts == GOOD[:2000]
    assert not leftovers(tmp_path)
    assert fault.times == 0
    if "Retry-After" in fault.headers:
        assert slept[0] in (7.0, 8.0)  # the client adds a second
    elif fault.status is not None:
        assert 0 < slept[0] < 60


def random_fault(chance):
    match = chance.choice(["file-1", "file-2", "file", "codeparrot"])
    kind = chance.choice(["status", "cut_after", "flip"])
    value = chance.choice([429, 500, 502, 503, 504]) if kind == "status" else chance.randrange(12_000)
    return Fault(match, skip=chance.randrange(3), **{kind: value})


def test_many_random_faults(tmp_path, python_hub, slept):
    for seed in range(12):
        chance = random.Random(seed)
        python_hub.faults[:] = [random_fault(chance) for _ in range(chance.randrange(1, 6))]
        samples = chance.choice([100, 1000, 1400, 2000, 9999])
        assert download(tmp_path / str(seed), samples)[0] == GOOD[:samples], f"seed {seed}"


def test_damage_that_stays_is_an_error_and_no_data(tmp_path, python_hub, slept):
    python_hub.faults.append(Fault("file-2", flip=4000, times=10**9))
    with pytest.raises(UserError, match=r"cannot be read .*try the same command again") as error:
        download(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "code" / "code.jsonl").exists()
    assert read_manifest(tmp_path) == {}
    python_hub.faults.clear()
    python_hub.requests.clear()
    assert download(tmp_path)[0] == GOOD[:2000]


def test_a_hub_that_stays_down_is_an_error_and_progress_is_kept(tmp_path, python_hub, slept):
    python_hub.faults.append(Fault("file-2", status=503, times=10**9))
    with pytest.raises(UnreachableError, match=r"status 503.*HF_ENDPOINT.*--source builtin"):
        download(tmp_path)
    python_hub.faults.clear()
    python_hub.requests.clear()
    texts, _ = download(tmp_path)
    assert texts == GOOD[:2000]


def test_a_hub_out_of_reach_is_said_at_once(tmp_path, connect, slept):
    connect.point_to("http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9 cannot be reached .*--use_synthetic"):
        download(tmp_path)
    assert slept == []
    assert not leftovers(tmp_path)


def test_offline_mode_is_obeyed(tmp_path, python_hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        download(tmp_path)
    assert not python_hub.requests


def test_gated_sources(tmp_path, connect, monkeypatch):
    table = io.BytesIO()
    pq.write_table(pa.table({"content": GOOD[:50]}), table)
    files = {"README.md": b"# The Stack\n", "data/python/train-0.parquet": table.getvalue()}
    connect({"bigcode/the-stack-dedup": Repository(files, gated=True)})
    for token in (None, "denied"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            UserError, match=r"gated: accept its terms at https://huggingface.co/datasets/bigcode/.*HF_TOKEN"
        ):
            download(tmp_path, 20, SOURCES["the-stack"])
    monkeypatch.setenv("HF_TOKEN", "granted")
    assert download(tmp_path, 20, SOURCES["the-stack"])[0] == GOOD[:20]


def test_a_set_that_is_not_there_or_refused(tmp_path, python_hub, slept):
    with pytest.raises(UserError, match="has no allenai/c4"):
        download(tmp_path, 10, SOURCES["c4"])
    python_hub.faults.append(Fault("revision/main", status=403))
    with pytest.raises(UserError, match=r"refuses .*\(status 403\); check HF_TOKEN"):
        download(tmp_path)
    assert slept == []


def test_a_full_disk_is_reported_and_nothing_is_lost(tmp_path, python_hub, monkeypatch):
    download(tmp_path, 300)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(UserError, match=r"no space left on device .* free some space"):
            download(tmp_path, 2000)
    assert download(tmp_path, 300)[0] == GOOD[:300]
    assert download(tmp_path, 2000)[0] == GOOD[:2000]


@pytest.mark.parametrize("damage", ["journal", "origin", "part", "other count"])
def test_a_stopped_download_that_cannot_be_continued_starts_again(tmp_path, python_hub, slept, damage):
    python_hub.faults.append(Fault("file-2", status=503, times=10**9))
    with pytest.raises(UnreachableError):
        download(tmp_path)
    python_hub.faults.clear()
    journal, part = tmp_path / "code" / ".code.jsonl.journal", tmp_path / "code" / ".code.jsonl.part"
    state = json.loads(journal.read_bytes())
    assert 1000 < state["kept"] < 1500
    assert state["asked"] == 2000
    if damage == "journal":
        journal.write_bytes(b"\x00" + journal.read_bytes()[:100])
    elif damage == "origin":
        journal.write_text(json.dumps({**state, "origin": {**state["origin"], "hub_id": "somebody/else"}}))
    elif damage == "part":
        part.write_bytes(part.read_bytes()[:1000])
    samples = 500 if damage == "other count" else 2000
    assert download(tmp_path, samples)[0] == GOOD[:samples]
    assert not leftovers(tmp_path)


def test_files_of_the_user_are_not_touched(tmp_path, python_hub):
    own = tmp_path / "code" / "code.jsonl"
    own.parent.mkdir()
    own.write_text('"my own code"\n')
    with pytest.raises(UserError, match="in the way"):
        download(tmp_path)
    assert own.read_text() == '"my own code"\n'


def test_a_changed_download_is_not_taken_for_what_it_was(tmp_path, python_hub):
    download(tmp_path, 100)
    with (tmp_path / "code" / "code.jsonl").open("a") as file:
        file.write('"more"\n')
    with pytest.raises(UserError, match="is not what was downloaded"):
        download(tmp_path, 100)
