"""The engine gives every stream what it would get alone, lets streams come and go, and never leaves one waiting."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from mm_rec.inference import decode
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.generate import generate, read_prompt
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.serve.engine import ALONE_CHUNK, SHARED_CHUNK, Engine
from mm_rec.serve.jobs import (
    EngineError,
    Event,
    Job,
    JobHandle,
    Output,
    OverdueError,
    PromptRead,
    QueueFullError,
    StoppedError,
    TokenScore,
)
from mm_rec.state import flatten_state
from mm_rec.text.conversation import Message, encode_message
from mm_rec.text.tokenizer import Tokenizer

WaitUntil = Callable[[Callable[[], bool]], None]

GREEDY = Sampling(max_new_tokens=12, temperature=0)


class Reader:
    """Listens to one job."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self._left = 1

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._left -= isinstance(event, Output) and event.finish is not None
        if isinstance(event, EngineError) or not self._left:
            self.ended.set()

    def expect(self, n: int) -> None:
        self._left = n

    def wait(self) -> "Reader":
        assert self.ended.wait(60), "no end came"
        return self

    @property
    def outputs(self) -> list[Output]:
        return [event for event in self.events if isinstance(event, Output)]

    def text(self, choice: int = 0) -> str:
        return "".join(output.text for output in self.outputs if output.choice == choice)

    @property
    def scores(self) -> list[float]:
        return [score.logprob for output in self.outputs for score in output.scores if score.logprob is not None]


class Runner:
    """An engine, and short ways to ask it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer

    def job(self, prompt: str | list[int], sampling: Sampling = GREEDY, seconds: float = 60.0, **fields: object) -> Job:
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        defaults = {"ends": frozenset({self.tokenizer.eos_id})}
        return Job(ids, sampling, time.monotonic() + seconds, **{**defaults, **fields})  # type: ignore[arg-type]

    def submit(self, *jobs: Job) -> list[tuple[JobHandle, Reader]]:
        readers = [Reader() for _ in jobs]
        for job, reader in zip(jobs, readers, strict=True):
            reader.expect(job.n)
        return list(zip(self.engine.submit(jobs, readers), readers, strict=True))

    def run(self, *jobs: Job) -> list[Reader]:
        return [reader.wait() for _, reader in self.submit(*jobs)]


@pytest.fixture
def make(model: MMRecModel, tokenizer: Tokenizer) -> Iterator[Callable[..., Runner]]:
    engines = []

    def start(**limits: int) -> Runner:
        engine = Engine(model, tokenizer, None, **limits)
        engine.start()
        engines.append(engine)
        return Runner(engine)

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture
def runner(make: Callable[..., Runner]) -> Runner:
    return make()


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(max_new_tokens=40, temperature=1.3, seed=5),
        Sampling(max_new_tokens=40, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=6),
        Sampling(max_new_tokens=200, temperature=2.0, stop=("a", "th"), seed=1),
        Sampling(max_new_tokens=0),
    ],
)
def test_a_lone_stream_is_what_generate_gives(runner: Runner, model: MMRecModel, sampling: Sampling) -> None:
    prompt = "def shuffle(self, x):\n    return ışık" * 5
    ends = frozenset({runner.tokenizer.eos_id, runner.tokenizer.end_id})
    [reader] = runner.run(runner.job(prompt, sampling, penalise_prompt=True, ends=ends))
    assert reader.text() == "".join(generate(model, runner.tokenizer, prompt, sampling, None))
    assert sum(output.drawn for output in reader.outputs) <= sampling.max_new_tokens


def test_the_prompt_decides_which_expert_answers(model: MMRecModel, tokenizer: Tokenizer) -> None:
    def choose(ids: Sequence[int]) -> str:
        return "code" if len(ids) % 2 else "text"

    engine = Engine(model, tokenizer, "text", choose=choose, max_streams=6)
    engine.start()
    try:
        runner = Runner(engine)
        prompts = [
            f"{word} is ışık " * count for word, count in (("it", 1), ("that", 3), ("what", 30), ("x", 2), ("f", 5))
        ]
        sampling = Sampling(max_new_tokens=25, temperature=1.2, seed=3)
        jobs = [
            runner.job(prompt, sampling, penalise_prompt=True, n=1 + index % 2) for index, prompt in enumerate(prompts)
        ]
        assert {choose(job.prompt) for job in jobs} == {"text", "code"}
        for job, prompt, reader in zip(jobs, prompts, runner.run(*jobs), strict=True):
            ends = frozenset({tokenizer.eos_id, tokenizer.end_id})
            [alone] = runner.run(runner.job(prompt, sampling, penalise_prompt=True, ends=ends))
            assert alone.text() == "".join(generate(model, tokenizer, prompt, sampling, choose(job.prompt)))
            [again] = runner.run(job)
            assert [again.text(choice) for choice in range(job.n)] == [reader.text(choice) for choice in range(job.n)]
        # What is scored is read by one expert, whatever it is, and a state by the one that it is of.
        odd = next(job for job in jobs if choose(job.prompt) == "code")
        scored = [runner.job(list(odd.prompt), GREEDY, prompt_logprobs=True, top_logprobs=0)]
        [reader] = runner.run(*scored)
        assert reader.text() == "".join(generate(model, tokenizer, prompts[jobs.index(odd)], GREEDY, "text"))
        _, state = read_prompt(model, [tokenizer.bos_id], "code")
        [reader] = runner.run(runner.job(list(jobs[0].prompt[1:]), GREEDY, state=state))
        assert reader.text() == "".join(generate(model, tokenizer, prompts[0], GREEDY, "code"))
    finally:
        engine.stop()


def test_streams_do_not_depend_on_each_other(runner: Runner) -> None:
    prompts = [("random seed " * size)[: 3 * size + 1] for size in (0, 1, 7, 30, 31, 64, 100, 400)]
    jobs = [runner.job(prompt, top_logprobs=0) for prompt in prompts]
    alone = [runner.run(job)[0] for job in jobs]
    together = runner.run(*jobs)
    for one, other in zip(alone, together, strict=True):
        assert one.text() == other.text()
        torch.testing.assert_close(torch.tensor(one.scores), torch.tensor(other.scores), atol=1e-3, rtol=1e-4)


def test_many_texts_of_one_prompt_read_it_once(
    runner: Runner, model: MMRecModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, *rest, **more: read.append(tokens) or forward(tokens, *rest, **more)
    )
    sampling = Sampling(max_new_tokens=10, temperature=1.5, seed=40)
    [reader] = runner.run(runner.job("def f(x):\n    return", sampling, n=3))
    assert sum(tokens.shape[1] > 1 for tokens in read) == 1
    texts = {reader.text(choice) for choice in range(3)}
    assert len(texts) == 3
    for choice in range(3):
        single = Sampling(max_new_tokens=10, temperature=1.5, seed=40 + choice)
        assert runner.run(runner.job("def f(x):\n    return", single))[0].text() == reader.text(choice)


def test_prompt_scores_are_the_models(runner: Runner, model: MMRecModel) -> None:
    ids = [runner.tokenizer.bos_id, *runner.tokenizer.encode("import math\n" * 60)]
    [reader] = runner.run(runner.job(ids, Sampling(max_new_tokens=0), top_logprobs=3, prompt_logprobs=True))
    [prompt] = [event for event in reader.events if isinstance(event, PromptRead)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    assert [score.token for score in prompt.scores] == ids
    assert prompt.scores[0].logprob is None
    for position, score in enumerate(prompt.scores[1:]):
        assert score.logprob == pytest.approx(expected[position, score.token].item(), abs=1e-3)
        values = expected[position, : runner.tokenizer.vocab_size].topk(3).values
        assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_closing_gives_the_memory_of_a_chat_session(runner: Runner, model: MMRecModel) -> None:
    tokenizer = runner.tokenizer
    session = ChatSession.start(model, tokenizer, sampling=Sampling(max_new_tokens=9, temperature=0))
    state = None
    for text in ("hello", "what is ışık?", "bye"):
        answer = "".join(session.reply(text))
        ids = encode_message(tokenizer, Message("user", text))[0] + [tokenizer.control_ids["<|assistant|>"]]
        [reader] = runner.run(
            runner.job(
                ids if state else [tokenizer.bos_id, *ids],
                session.sampling,
                ends=frozenset({tokenizer.end_id, tokenizer.eos_id}),
                state=state,
                closing=(tokenizer.end_id,),
            )
        )
        state = reader.outputs[-1].state
        assert state is not None
        assert reader.text() == answer
        assert int(state.position) == session.n_tokens
        for name, tensor in flatten_state(session.state).items():
            torch.testing.assert_close(flatten_state(state)[name], tensor, atol=1e-4, rtol=1e-3)


def test_running_streams_do_not_wait_for_a_long_prompt(
    runner: Runner, model: MMRecModel, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    lengths: list[int] = []
    forward, step = model.forward, decode.step
    monkeypatch.setattr(
        model,
        "forward",
        lambda tokens, *rest, **more: lengths.append(tokens.shape[1]) or forward(tokens, *rest, **more),
    )
    monkeypatch.setattr(decode, "step", lambda *rest, **more: lengths.append(1) or step(*rest, **more))
    [(ticket, first)] = runner.submit(runner.job("a", Sampling(max_new_tokens=5000)))
    wait_until(lambda: len(first.outputs) > 3)
    del lengths[:]
    long_prompt = runner.tokenizer.encode("random " * 700)
    runner.run(runner.job(long_prompt, Sampling(max_new_tokens=1)))
    ticket.cancel()
    chunks = [index for index, length in enumerate(lengths) if length > 1]
    assert sum(lengths[index] for index in chunks) == len(long_prompt) - 1
    assert max(lengths) <= SHARED_CHUNK < ALONE_CHUNK
    assert all(lengths[index + 1] == 1 for index in chunks), "two chunks without a token for the others between"


def test_a_cancelled_stream_ends_within_a_token(make: Callable[..., Runner], wait_until: WaitUntil) -> None:
    runner = make(max_streams=2)
    endless = Sampling(max_new_tokens=100_000)
    (first, reader), (second, _) = runner.submit(runner.job("a", endless), runner.job("b", endless))
    (_, waiting) = runner.submit(runner.job("c"))[0]
    wait_until(lambda: len(reader.outputs) > 5)
    assert (runner.engine.running, runner.engine.waiting) == (2, 1)
    first.cancel()
    seen = len(reader.outputs)
    waiting.wait()
    assert len(reader.outputs) <= seen + 1
    assert not reader.ended.is_set()
    second.cancel()
    wait_until(lambda: runner.engine.running == 0)


def test_a_cancelled_job_never_starts(make: Callable[..., Runner]) -> None:
    runner = make(max_streams=1)
    (first, _) = runner.submit(runner.job("a", Sampling(max_new_tokens=100_000)))[0]
    (second, reader) = runner.submit(runner.job("b"))[0]
    second.cancel()
    (_, third) = runner.submit(runner.job("c"))[0]
    first.cancel()
    third.wait()
    assert reader.events == []


def test_the_queue_is_bounded_and_takes_all_or_none(make: Callable[..., Runner], wait_until: WaitUntil) -> None:
    runner = make(max_streams=1, max_queue=3)
    [(first, reader)] = runner.submit(runner.job("a", Sampling(max_new_tokens=100_000)))
    wait_until(lambda: len(reader.outputs) > 0)
    waiting = runner.submit(runner.job("b"), runner.job("c"))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        runner.submit(runner.job("d"), runner.job("e"))
    assert runner.engine.waiting == 2
    [(given_up, _)] = runner.submit(runner.job("d"))
    given_up.cancel()
    [(given_up, _)] = runner.submit(runner.job("e"))
    given_up.cancel()
    wait_until(lambda: runner.engine.waiting == 2)
    first.cancel()
    assert [one.wait().outputs[-1].finish for _, one in waiting] == ["length", "length"]
    assert len(runner.run(*[runner.job("many prompts")] * 5)) == 5, "a request may be longer than the queue"


def test_time_over(make: Callable[..., Runner]) -> None:
    runner = make(max_streams=1)
    [(_, running)] = runner.submit(runner.job("a", Sampling(max_new_tokens=10**6), seconds=0.5))
    [(_, waiting)] = runner.submit(runner.job("b", seconds=0.1))
    assert running.wait().outputs[-1].finish == "length"
    assert 0 < sum(output.drawn for output in running.outputs) < 10**6
    assert isinstance(waiting.wait().events[0], OverdueError)


def test_a_fault_ends_what_runs_and_nothing_else(
    runner: Runner, model: MMRecModel, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    [(_, reader)] = runner.submit(runner.job("a", Sampling(max_new_tokens=100_000)))
    wait_until(lambda: len(reader.outputs) > 0)
    step, broken = decode.step, threading.Event()

    def fail_once(*arguments: object, **named: object) -> object:
        if not broken.is_set():
            broken.set()
            raise RuntimeError("no memory")
        return step(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(decode, "step", fail_once)
    assert isinstance(reader.wait().events[-1], EngineError)
    assert runner.run(runner.job("b"))[0].outputs[-1].finish == "length"


def test_stopping_ends_all(make: Callable[..., Runner], wait_until: WaitUntil) -> None:
    runner = make(max_streams=1)
    (_, running), (_, waiting) = runner.submit(runner.job("a", Sampling(max_new_tokens=10**6)), runner.job("b"))
    wait_until(lambda: len(running.events) > 0)
    runner.engine.stop()
    assert isinstance(running.wait().events[-1], StoppedError)
    assert isinstance(waiting.wait().events[-1], StoppedError)
    with pytest.raises(StoppedError):
        runner.submit(runner.job("c"))


def test_pieces_of_a_text_join_into_one() -> None:
    score = TokenScore(5, -1.0, ())
    joined = Output(1, "a", 1, (score,)).joined(Output(1, "b", 2)).joined(Output(1, "", 1, (score,), "stop"))
    assert joined == Output(1, "ab", 4, (score, score), "stop")
