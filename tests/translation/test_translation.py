"""Everything that people read can be translated, is translated into Turkish, and is shown in the user's language."""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import json
import re
from pathlib import Path

import pytest
from extract_messages import FOREIGN, FUZZY, MODULES, literals, messages, name_of, read_catalogues, texts

from mm_rec.cli import main
from mm_rec.data.documents.account import table
from mm_rec.data.documents.folder import LeftOut
from mm_rec.errors import UserError
from mm_rec.translation import Translatable, catalogue, choose_language, join_texts, translate, translate_record

TURKISH = catalogue.FOLDER / "tr.po"
TRAIN = ["train", "--use_synthetic", "--max_samples", "10", "--preset", "tiny", "--seq_len", "32", "--max_steps", "2"]
OF_PROGRAMMERS = re.compile(  # what argparse says to who writes a parser
    r"conflicting|must start with|dest=|subparser|cannot merge|not defined|invalid argument for|must be optional|"
    r"is not callable|with mode|conflict_resolution|unknown parser|error: |unexpected option string"
)


@pytest.fixture
def turkish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_REC_LANG", "tr")


def fields_of(text: str) -> set[str]:
    return set(re.findall(r"\{[^{}]*\}|%(?:\(\w+\))?[sdr]", text))


@pytest.mark.parametrize(("path", "entries"), read_catalogues().items(), ids=lambda one: getattr(one, "stem", ""))
def test_a_catalogue_has_every_message_once_and_no_other(path: Path, entries: dict[str, str]) -> None:
    found = messages()
    hint = "run `python tests/translation/extract_messages.py` and fill in the empty translations"
    content = path.read_text(encoding="utf-8")
    foreign = set(catalogue.read_entries(content[content.index(FOREIGN) :]))
    assert not [text for text in found if not entries.get(text)], hint
    assert not entries.keys() - found.keys() - foreign, hint
    assert content.count("\nmsgid ") == len(entries) + 1, "an entry stands twice, or cannot be read"
    assert FUZZY not in content, "look at these translations, and take the mark off"


@pytest.mark.parametrize(("path", "entries"), read_catalogues().items(), ids=lambda one: getattr(one, "stem", ""))
def test_a_translation_has_the_fields_of_its_text(path: Path, entries: dict[str, str]) -> None:
    for text, translation in entries.items():
        assert fields_of(text) == fields_of(translation), text
        edges = [re.match(r"\s*", one)[0] + re.search(r"[ \n]*$", one)[0] for one in (text, translation)]  # type: ignore[index]
        assert edges[0] == edges[1], text
        if "--" in text:
            flags = [set(re.findall(r"--\w+", one)) for one in (text, translation)]
            assert flags[0] == flags[1], text


def test_what_argparse_says_to_users_is_in_the_catalogue() -> None:
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(argparse))) if isinstance(node, ast.Call)]
    found = {
        text for node in calls if name_of(node.func) in ("_", "ngettext") for one in node.args for text in literals(one)
    }
    entries = read_catalogues()[TURKISH]
    assert not {text for text in found if not OF_PROGRAMMERS.search(text)} - entries.keys()


def is_wrapped(node: ast.expr) -> bool:
    """Whether a text for people is one that :func:`translate` can find: not put together before it is translated."""
    if isinstance(node, ast.IfExp):
        return is_wrapped(node.body) and is_wrapped(node.orelse)
    if isinstance(node, ast.BoolOp):
        return all(map(is_wrapped, node.values))
    if isinstance(node, ast.Call):
        return name_of(node.func) not in ("str", "repr", "format", "join")
    return isinstance(node, ast.Constant | ast.Name | ast.Attribute | ast.Subscript)


def test_help_errors_and_progress_are_texts_with_fields() -> None:
    wrong = [f"{one.module}:{one.line}: {ast.unparse(one.node)[:80]}" for one in texts() if not is_wrapped(one.node)]
    passing_on = ("program.py", "translation/", "storage/files.py")
    wrong = [line for line in wrong if not line.startswith(passing_on)]
    assert not wrong, 'write UserError("{path} is damaged", path=path), or Translatable(...) for a line'


def test_commands_print_texts_that_can_be_translated() -> None:
    wrong = []
    for module, tree in MODULES.items():
        if not module.startswith("scripts/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and name_of(node.func) in ("print", "write") and node.args:
                parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
                text = "".join(
                    one.value for one in parts if isinstance(one, ast.Constant) and isinstance(one.value, str)
                )
                if re.search(r"[^\W\d_]", text):
                    wrong.append(f"{module}:{node.lineno}: {text}")
    assert not wrong, "print translate(...)"


def test_a_text_is_english_wherever_it_is_kept(turkish: None) -> None:
    text = Translatable("{count:,} documents: {reason}", count=1200, reason=Translatable("encrypted"))
    assert text == "1,200 documents: encrypted"
    assert json.dumps([text]) == '["1,200 documents: encrypted"]'
    assert translate(text) == "1,200 belge: şifreli"
    assert translate(copy.deepcopy(text)) == "1,200 belge: şifreli"
    assert translate(join_texts("; ", [text, "as it is"])) == "1,200 belge: şifreli; as it is"
    assert Translatable("stages: {stage2: {}}") == "stages: {stage2: {}}"
    assert translate("no catalogue has this {name}", name="x") == "no catalogue has this x"


def test_an_error_keeps_its_english_text_and_shows_the_other(turkish: None) -> None:
    inner = UserError("{path} is damaged", path="{a}")
    error = UserError("{problem}", problem=inner)
    assert str(error) == "{a} is damaged"
    assert translate(error) == "{a} hasarlı"
    assert translate(UserError(str(inner))) == "{a} is damaged"
    assert translate(ValueError("plain")) == "plain"


def test_a_text_that_a_file_has_is_found_by_its_template(turkish: None) -> None:
    assert translate_record("takes longer than 60 s") == "60 saniyeden uzun sürüyor"
    assert translate_record("encrypted") == "şifreli"
    assert translate_record("of no template at all") == "of no template at all"
    [head, columns, row] = table(
        "mine", {"CSV": {"read": 1, "documents": 9}}, [LeftOut(Path("a"), "PDF", "empty")], []
    )[:3]
    assert head == "mine: 2 dosya, 1 okundu ve 1 dışarıda bırakıldı"
    assert columns.split() == ["tür", "dosya", "okunan", "belge", "dışarıda", "bırakılan"]
    assert row.split() == ["CSV", "1", "1", "9"]


def test_the_language_is_that_of_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in catalogue.LOCALE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert choose_language() == "en"
    for name, value in (("LANG", "tr_TR.UTF-8"), ("LC_MESSAGES", "de"), ("LC_ALL", "C.UTF-8"), ("MM_REC_LANG", "tr")):
        monkeypatch.setenv(name, value)
        assert choose_language() == {"C.UTF-8": "en"}.get(value, value[:2])
    monkeypatch.setenv("MM_REC_LANG", "../tr")
    assert translate("encrypted") == "encrypted"


def test_help_is_turkish(turkish: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "Elinizdeki makinede eğitilen" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "kullanım: mm-rec train",
        "seçenekler:",
        "modelin genişliği; verilmezse ön ayarınki",
        "örnekler: mm-rec",
    ):
        assert part in text
    assert not re.search(r"\b(the|and|with)\b", re.sub(r"--\S+", "", text))


def test_errors_are_turkish(turkish: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trane"]) == 2
    assert capsys.readouterr().err.startswith("hata: 'trane' diye bir komut yok; olanlar: ")
    with pytest.raises(SystemExit):
        main(["generate", "--prompt"])
    assert capsys.readouterr().err.startswith("hata: --prompt bağımsız değişkeni: bir değer bekleniyor; bkz. ")
    with pytest.raises(SystemExit):
        main(["tokenizer", "--vocab_size", "x"])
    assert "geçersiz int değeri: 'x'" in capsys.readouterr().err
    assert main(["train", "--max_steps", "no"]) == 2
    assert capsys.readouterr().err == "hata: --max_steps için gereken: bir tam sayı; verilen: 'no'\n"
    assert argparse._("expected one argument") == "expected one argument"  # type: ignore[attr-defined]


def test_a_training_is_turkish_and_its_records_are_not(
    turkish: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--checkpoint_dir", "runs", "--threads", "1", "--valid_bytes", "200"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "belirteçleyici eğitiliyor",
        "adım      2/2  kayıp ",
        "2. adımda doğrulama",
        "2 adım tamam",
        "kayıp resmi",
    ):
        assert part in shown
    words = set(re.findall(r"\b(?:the|and|of|is|tokens|steps|loss|left|saved)\b", shown.split("2. adımda örnek")[0]))
    assert not words
    assert "starts at step 0" in (tmp_path / "runs" / "stage1" / "events.log").read_text()
    assert main(["doctor", "runs"]) == 0
    assert "kontrol noktasından" in capsys.readouterr().out
