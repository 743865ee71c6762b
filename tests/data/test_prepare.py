import json
import random
import shutil

import pytest

from mm_rec.data import first_pass as survey_module
from mm_rec.data import prepared as prepared_module
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions
from mm_rec.data.first_pass import survey_domain
from mm_rec.data.prepare import describe, prepare
from mm_rec.data.synthetic import synthetic_code, synthetic_text, write_synthetic
from mm_rec.errors import UserError
from mm_rec.formats import VERSIONS


@pytest.fixture
def data_dir(tmp_path):
    write_synthetic(tmp_path, 60)
    return tmp_path


def write(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def documents_of(path):
    return Documents([path], Parser(), ReadOptions())


def decoded(prepared, split, name):
    store = getattr(prepared, split)[name]
    return [prepared.tokenizer.decode(store.document(i)) for i in range(store.n_documents)]


def test_every_document_ends_up_in_one_split_as_it_was(data_dir):
    prepared = prepare(data_dir, 512, filters=False)
    for name, documents in (("text", synthetic_text(60)), ("code", synthetic_code(60))):
        train, valid = decoded(prepared, "train", name), decoded(prepared, "valid", name)
        assert valid
        assert len(valid) < 10
        assert sorted(train + valid) == sorted(documents)
        assert [document for document in documents if document in train] == train
        for split in ("train", "valid"):
            store = getattr(prepared, split)[name]
            assert store.n_bytes.tolist() == [len(text.encode()) for text in decoded(prepared, split, name)]
            assert all(store.document(i)[0] == prepared.tokenizer.bos_id for i in range(store.n_documents))
            assert (store.tokens[:] == prepared.tokenizer.bos_id).sum() == store.n_documents


def test_the_same_data_and_settings_are_prepared_once(data_dir):
    told = []
    first = prepare(data_dir, 512, progress=told.append)
    assert "training the tokenizer" in told
    told.clear()
    second = prepare(data_dir, 512, progress=told.append)
    assert told == describe(first.report)
    assert (second.path, second.data_sha256) == (first.path, first.data_sha256)
    assert second.tokenizer.sha256 == first.tokenizer.sha256


def test_the_result_depends_on_content_and_settings_only(data_dir, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_synthetic(elsewhere, 60)
    first = prepare(data_dir, 512)
    assert prepare(elsewhere, 512).data_sha256 == first.data_sha256
    assert prepare(elsewhere, 512).path.name == first.path.name
    others = [
        prepare(data_dir, 320),
        prepare(data_dir, 512, max_samples=20),
        prepare(data_dir, 512, filters=False),
        prepare(data_dir, 512, tokenizer=prepare(data_dir, 320).tokenizer, max_samples=30),
    ]
    assert len({other.path for other in [first, *others]}) == 5
    write(
        data_dir / "text" / "more.jsonl", ["One more document, which changes what there is to be learned from it all."]
    )
    assert prepare(data_dir, 512).data_sha256 != first.data_sha256


def test_a_given_tokenizer_is_used(data_dir):
    given = prepare(data_dir, 320).tokenizer
    assert prepare(data_dir, 512, tokenizer=given).tokenizer.sha256 == given.sha256


def test_max_samples_counts_documents_that_pass_the_filters(data_dir):
    documents = synthetic_text(8)
    write(data_dir / "text" / "synthetic.jsonl", ["short", documents[0], documents[0], *documents[1:]])
    report = prepare(data_dir, 512, max_samples=5).report["domains"]["text"]
    assert (report["read"], report["kept"]) == (7, 5)
    assert report["dropped"] == {"too short": 1, "near-duplicate": 1}
    assert (
        "7 documents read, 5 kept (left out: 1 too short, 1 near-duplicate)"
        in describe({"domains": {"text": report}})[0]
    )


def test_one_domain_is_enough(tmp_path):
    write(tmp_path / "text" / "a.jsonl", synthetic_text(20))
    assert list(prepare(tmp_path, 320).train) == ["text"]


def test_files_without_a_domain_folder_are_text(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(synthetic_text(20)))
    prepared = prepare(tmp_path, 320)
    assert list(prepared.train) == ["text"]
    assert prepared.valid["text"].n_documents == 1


def test_files_beside_the_domain_folders_are_named(tmp_path):
    write(tmp_path / "text" / "a.jsonl", synthetic_text(20))
    (tmp_path / "book.txt").write_text("not among the texts")
    said = []
    prepare(tmp_path, 320, progress=said.append)
    assert "not used, because they lie beside text: book.txt; move them into one of these folders" in said


def test_of_a_single_document_the_end_is_held_out(tmp_path):
    book = "\n".join(synthetic_text(50))
    write(tmp_path / "text" / "a.jsonl", [book])
    prepared = prepare(tmp_path, 320)
    (train,), (valid,) = decoded(prepared, "train", "text"), decoded(prepared, "valid", "text")
    assert train + valid == book
    assert train.endswith("\n")
    assert 0.05 * len(book) < len(valid) <= 0.1 * len(book)
    assert "no document is small enough to be held out whole" in describe(prepared.report)[1]


@pytest.mark.parametrize("seed", range(6))
def test_whole_documents_are_held_out_where_some_are_small_enough(tmp_path, seed):
    texts = ["\n".join(synthetic_text(2 + number, seed=100 * seed + number)) for number in range(12)]
    write(tmp_path / "text" / "a.jsonl", texts)
    prepared = prepare(tmp_path, 320, filters=False)
    assert set(decoded(prepared, "valid", "text")) < set(texts)
    assert sorted(decoded(prepared, "valid", "text") + decoded(prepared, "train", "text")) == sorted(texts)
    assert len(describe(prepared.report)) == 1


def test_what_the_version_before_prepared_is_used_again(data_dir, monkeypatch):
    monkeypatch.setitem(VERSIONS, "documents", 4)
    before = prepare(data_dir, 320).path
    monkeypatch.setitem(VERSIONS, "documents", 5)
    assert prepare(data_dir, 320).path == before
    shutil.rmtree(before)
    assert prepare(data_dir, 320).path != before


def test_what_is_held_out_is_capped_and_chosen_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(survey_module, "VALID_BYTES", 2000)
    documents = synthetic_text(400)
    shuffled = random.Random(1).sample(documents, len(documents))
    held_out = []
    for i, order in enumerate((documents, shuffled)):
        survey = survey_domain("text", documents_of(write(tmp_path / f"{i}.jsonl", order)))
        held_out.append(sorted(survey.valid_texts()))
        assert 1000 < sum(len(text) for text in held_out[-1]) <= 2000
    assert held_out[0] == held_out[1]


def test_the_tokenizer_sample_is_capped_and_takes_from_everywhere(tmp_path):
    documents = synthetic_text(300)
    survey = survey_domain("text", documents_of(write(tmp_path / "a.jsonl", documents)), filters=False)
    sample = list(survey.train_texts(20_000))
    assert 20_000 <= sum(len(text) for text in sample) < 22_000
    places = [documents.index(text) for text in sample]
    assert places == sorted(places)
    assert places[0] < 50
    assert places[-1] > 250


def test_bad_rows_are_an_error_or_counted(data_dir):
    with (data_dir / "text" / "synthetic.jsonl").open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"synthetic\.jsonl:61: not valid JSON"):
        prepare(data_dir, 512)
    assert prepare(data_dir, 512, options=ReadOptions(skip_bad=1)).report["domains"]["text"]["bad_rows"] == 1
    assert not list((data_dir / "prepared").glob(".tmp-*"))


@pytest.mark.parametrize("documents", [[], [""], ["a"], ["short"] * 5])
def test_too_little_data_is_an_error(tmp_path, documents):
    write(tmp_path / "text" / "a.jsonl", documents)
    with pytest.raises(UserError, match="too little text data"):
        prepare(tmp_path, 320)


def test_no_data_is_an_error_that_names_the_ways_to_get_some(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"mm_rec\.data\.download_data --output_dir .*--use_synthetic"):
            prepare(folder, 320)


@pytest.mark.parametrize(
    "name", ["report.json", "tokenizer/tokenizer.json", "text-train/tokens.bin", "code-valid/index.json"]
)
def test_a_damaged_preparation_is_not_used(data_dir, name):
    folder = prepare(data_dir, 512).path
    path = folder / name
    content = path.read_bytes()
    for damaged in (content[:-5], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}.*; delete {folder}, the next run makes it anew$"):
            prepare(data_dir, 512)
    shutil.rmtree(folder)  # what the message says
    prepare(data_dir, 512)
    assert path.read_bytes() == content


def test_a_file_that_differs_from_the_manifest_is_not_used(data_dir):
    entry = {"sha256": "0" * 64}
    (data_dir / "manifest.json").write_text(json.dumps({"format": 1, "files": {"text/synthetic.jsonl": entry}}))
    with pytest.raises(UserError, match=r"synthetic\.jsonl is not what was downloaded .* delete it"):
        prepare(data_dir, 512)
    (data_dir / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json cannot be used"):
        prepare(data_dir, 512)


def test_a_file_that_changes_while_it_is_read_is_not_kept(data_dir, monkeypatch):
    write_report, path = prepared_module.write_report, data_dir / "text" / "synthetic.jsonl"

    def change_and_write(*arguments):
        path.write_text('"another text"\n' + path.read_text())
        write_report(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("mm_rec.data.prepare.write_report", change_and_write)
        with pytest.raises(UserError, match=r"text/synthetic\.jsonl was changed while it was read; run"):
            prepare(data_dir, 512)
    assert [one.name for one in (data_dir / "prepared").iterdir()] == ["lock"]
    prepare(data_dir, 512)
