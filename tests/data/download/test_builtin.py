from itertools import islice

from mm_rec.data.download import builtin
from mm_rec.data.download.builtin import builtin_code, builtin_entries, builtin_text

PROSE = (
    "This is a paragraph of English that you can read, and it is long enough to be taken for what it is. " * 4 + "So"
)


def make(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_code_is_the_modules_in_order_with_tests_last(tmp_path):
    root = make(
        tmp_path,
        {"b.py": "b", "a/z.py": "z", "a/test/t.py": "t", "c.py": b"\xff", "d.txt": "d", "empty.py": "",
         "site-packages/p.py": "p", "__pycache__/q.py": "q"},
    )  # fmt: skip
    assert list(builtin_code(root)) == ["b", "z", "t"]


def test_text_is_the_prose_of_strings_and_documents(tmp_path):
    root = make(
        tmp_path,
        {
            "a.py": f'"""{PROSE}\n\n    >>> {PROSE}\n"""\nx = "{PROSE} in code"\n',
            "README.md": f"# Title\n\n{PROSE} indeed\n\n```\nimport os\n```\n",
            "LICENSE.txt": f"{PROSE} by law",
            "short.py": '"""This is one of the things that are too short to be a document of their own here."""',
        },
    )
    assert list(builtin_text([root])) == [f"{PROSE} indeed", PROSE]


def test_a_paragraph_in_many_places_is_kept_once(tmp_path):
    root = make(tmp_path, {"a.py": f"'''{PROSE}'''", "b.py": f"'''{PROSE}\n\n{PROSE} And more of the same.'''"})
    assert list(builtin_text([root])) == [PROSE, f"{PROSE} And more of the same."]


def test_one_package_and_all_together_are_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_MAX_PACKAGE", 1000)
    monkeypatch.setattr(builtin, "_MAX_TEXT", 2000)
    files = {f"{i}.py": f"'''{PROSE} Number {i}.'''" for i in range(10)}
    roots = [make(tmp_path / str(i), {k: v.replace("Number", f"Of {i}") for k, v in files.items()}) for i in range(5)]
    sizes = [len(text) for text in builtin_text(roots)]
    assert len(sizes) == 5  # three of the first package, two of the next


def test_this_installation_has_real_text_and_code():
    code = list(islice(builtin_code(), 40))
    text = list(islice(builtin_text(), 40))
    assert code == list(islice(builtin_code(), 40))
    assert text == list(islice(builtin_text(), 40))
    assert sum("import " in module for module in code) > 30
    assert sum(" the " in document for document in text) > 30


def test_questions_are_made_of_modules_and_documents_but_not_of_tests(tmp_path, monkeypatch):
    program = '"""A module."""\ndef add(a, b=1):\n    """Return the sum of both."""\n    return a + b\n'
    root = make(
        tmp_path / "pack",
        {"m.py": program, "sub/__init__.py": program, "tests/test_m.py": program,
         "guide.md": "# What is a pack?\n\nA pack is a folder with modules in it.\n"},
    )  # fmt: skip
    entries = list(builtin_entries([root]))
    assert {entry.full_name for entry in entries} == {"What is a pack?", "pack", "pack.m.add", "pack.sub.add"}
    monkeypatch.setattr(builtin, "_MAX_PACKAGE_ENTRIES", 2)
    assert list(builtin_entries([root, root])) == 2 * entries[:2]
    monkeypatch.setattr(builtin, "_MAX_ENTRIES", 3)
    assert list(builtin_entries([root, root])) == (2 * entries[:2])[:3]
