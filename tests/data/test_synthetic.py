import ast
import re

from mm_rec.data.files import BadRows, read_texts
from mm_rec.data.synthetic import synthetic_code, synthetic_text, write_synthetic


def test_documents_are_many_distinct_and_follow_from_the_seed():
    for make in (synthetic_text, synthetic_code):
        documents = make(50)
        assert len(set(documents)) == 50
        assert make(50) == documents
        assert make(50, seed=1) != documents


def test_code_is_python_and_sums_are_right():
    for module in synthetic_code(50):
        ast.parse(module)
    sums = re.findall(r"had (\d+) \w+ and got (\d+) more .*? there are (\d+)\.", " ".join(synthetic_text(50)))
    assert len(sums) > 10
    assert all(int(a) + int(b) == int(c) for a, b, c in sums)


def test_files_are_in_the_common_format(tmp_path):
    write_synthetic(tmp_path, 5)
    assert list(read_texts(tmp_path / "text" / "synthetic.jsonl", BadRows())) == synthetic_text(5)
    assert list(read_texts(tmp_path / "code" / "synthetic.jsonl", BadRows())) == synthetic_code(5)
