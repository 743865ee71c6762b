"""The table of stages."""

from mm_rec.stages import FINETUNING, PRETRAINING, STAGES


def test_every_stage_but_the_first_follows_one_before_it() -> None:
    assert tuple(STAGES) == (*PRETRAINING, *FINETUNING)
    assert [stage.follows for stage in STAGES.values()] == [None, *list(STAGES)[:-1]]
    assert [name for name, stage in STAGES.items() if stage.conversations] == list(FINETUNING)


def test_sizes_are_those_of_the_device() -> None:
    for stage in STAGES.values():
        assert stage.sizes("cpu") is stage.cpu
        assert stage.sizes("cuda") is stage.sizes("mps") is stage.gpu
