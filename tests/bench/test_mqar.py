"""The rows of MQAR, and runs that are cut and go on."""

import json

import pytest
import torch

from benchmarks import mqar, recall

CPU = torch.device("cpu")


@pytest.mark.parametrize("filler", mqar.FILLERS)
def test_rows_ask_each_key_once_and_fill_as_they_say(filler):
    task = mqar.Task(80, 6, filler, 64, 5, 100, 0.9, vocabulary=64)
    rows = mqar.make_rows(task, 5, 3, CPU)
    for tokens, where, values, distance in zip(rows.tokens, rows.where, rows.values, rows.distance, strict=True):
        pairs = dict(tokens[:12].view(6, 2).tolist())
        assert len(pairs) == 6
        assert max(pairs) < 32 <= min(pairs.values())
        assert [pairs[key] for key in tokens[where].tolist()] == values.tolist()
        assert tokens[where - distance].tolist() == tokens[where].tolist()
        is_filler = torch.ones(80, dtype=torch.bool)
        is_filler[:12] = is_filler[where] = False
        fill = set(tokens[is_filler].tolist())
        if filler == "values":
            assert min(fill) >= 32
        else:
            assert min(fill) < 32
            assert not fill & {*pairs, *pairs.values()}
    assert torch.equal(mqar.make_rows(task, 5, 3, CPU).tokens, rows.tokens)
    assert not torch.equal(mqar.make_rows(task, 5, 4, CPU).tokens, rows.tokens)


def test_weight_lies_at_the_questions_alone():
    task = mqar.Task(80, 6, "values", 64, 4, 100, 0.9, vocabulary=64)
    rows = mqar.make_rows(task, 8, 3, CPU)
    first, second = rows.batches(4)
    assert torch.equal(torch.cat([first.tokens, second.tokens]), rows.tokens)
    assert float(first.weight.sum()) == pytest.approx(1)
    where = rows.where[:4]
    assert torch.equal(first.weight.nonzero()[:, 1], where.sort(1).values.flatten())
    assert torch.equal(first.targets.gather(1, where), rows.values[:4])


def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mqar, "TEST_ROWS", 8)

    def command(name, *more):
        sizes = ["--tokens", "24", "--pairs", "2", "--rows", "2", "--vocabulary", "64", "--width", "64"]
        options = [*sizes, "--rates", "1e-3", "2e-3", "--bar", "2", "--device", "cpu"]
        argv = ["recall", "mqar", *options, "--result", str(tmp_path / name), *more]
        monkeypatch.setattr("sys.argv", argv)
        recall.main()
        runs = json.loads((tmp_path / name).read_text())["runs"]
        return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]

    whole = command("whole.json", "--steps", "100")
    state = ("--steps", "100", "--state", str(tmp_path / "state"))
    cut = command("cut.json", *state, "--seconds", "0.001")
    assert [run["steps"] for run in cut] == [50, 50]
    assert command("on.json", *state) == whole
    assert [run["steps"] for run in whole] == [100, 100]
    with pytest.raises(SystemExit, match="other settings"):
        command("other.json", *state, "--filler", "others")
