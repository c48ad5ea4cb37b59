"""Calls of `generate` that meet, and calls that end half way: each gives stock's tokens, and so does the next.

Without a GPU a step runs eagerly where a graph would be replayed; what is shared by calls is the same.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, WhisperForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from whisper_models import Interrupt, mel, tiny_whisper

from whisper_triton import accelerate, accelerated, decoder, is_accelerated, restore
from whisper_triton.attention import STATE
from whisper_triton.encoded import ENCODED

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")

# Which differ in what they leave in a model's caches and settings; the last two are decoded by stock's loop.
CALLS: list[dict[str, Any]] = [
    {"max_new_tokens": 20},
    {"max_new_tokens": 7, "suppress_tokens": [3, 5]},
    {"max_new_tokens": 12, "return_timestamps": True},
    {"max_new_tokens": 6, "num_beams": 2},
    {"max_new_tokens": 6, "return_token_timestamps": True},
]


@pytest.fixture(autouse=True)
def _modules(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, the steps run in the model's modules: the chain of references would only be slower."""
    if device.type == "cpu":
        monkeypatch.setattr(decoder, "is_fusable", lambda model, batch_size: False)


def tokens(model: WhisperForConditionalGeneration, seed: int, **kwargs: Any) -> list[list[int]]:
    """What `generate` returns for the features of `seed`, 1 to 3 rows."""
    output = model.generate(mel(seed % 3 + 1, model.device, seed=seed), **kwargs)
    return (output if isinstance(output, torch.Tensor) else output["sequences"]).tolist()


def stocks_tokens(model: WhisperForConditionalGeneration, jobs: list[tuple[int, dict[str, Any]]]) -> list[list[list[int]]]:
    stock = copy.deepcopy(model)
    found = []
    for seed, kwargs in jobs:
        attn_implementation = stock.config._attn_implementation
        found.append(tokens(stock, seed, **kwargs))
        stock.config._attn_implementation = attn_implementation  # which `return_token_timestamps` leaves at eager
    return found


class Call(StoppingCriteria):
    """Never stops; calls `function` after the token of number `at`."""

    def __init__(self, function: Callable[[], Any], at: int = 2) -> None:
        self.function, self.at, self.seen = function, at, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen += 1
        if self.seen == self.at:
            self.function()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TestThreads:
    def test_two_models(self, device: torch.device) -> None:
        models = [tiny_whisper(device, seed=seed) for seed in (3, 5)]
        jobs = [(seed, CALLS[seed % 3]) for seed in range(4)]
        stock = [stocks_tokens(model, jobs) for model in models]
        assert stock[0] != stock[1]

        def run(model: WhisperForConditionalGeneration) -> list[Any]:
            return [tokens(model, seed, **kwargs) for seed, kwargs in jobs]

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(run, map(accelerate, models))) == stock

    def test_one_model(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        jobs = [(seed, kwargs) for seed in range(2) for kwargs in CALLS]
        stock = stocks_tokens(model, jobs)
        assert len({str(found) for found in stock}) > len(CALLS)
        accelerate(model)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda job: tokens(model, job[0], **job[1]), jobs)) == stock
        assert model.config._attn_implementation == "whisper_triton"

    @pytest.mark.parametrize("shares", ["the model", "its config"])
    def test_the_second_call_waits_for_the_first(self, shares: str, device: torch.device, fallbacks: Callable) -> None:
        """Of one config too: it says which attention all its models have, and `generate` changes that for token timestamps."""
        first = second = accelerate(tiny_whisper(device, seed=3))
        if shares == "its config":
            second = accelerate(WhisperForConditionalGeneration(first.config).to(device).eval())
        order: list[str] = []
        started, release = threading.Event(), threading.Event()

        def hold() -> None:
            started.set()
            assert release.wait(60)
            order.append("first")

        def run_first() -> None:
            tokens(first, 1, max_new_tokens=4, stopping_criteria=[Call(hold)])

        def run_second() -> None:
            tokens(second, 1, max_new_tokens=2, stopping_criteria=[Call(lambda: order.append("second"), at=1)])

        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(run_first)]
            assert started.wait(60)
            done.append(pool.submit(run_second))
            while not any("another thread" in line for line in fallbacks()):
                assert not done[1].done()
            release.set()
            for one in done:
                one.result(60)
        assert order == ["first", "second"]

    def test_restore_waits_and_what_waited_before_it_is_stocks(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        stock = stocks_tokens(model, [(1, CALLS[0]), (2, CALLS[0])])
        accelerate(model)
        started, release = threading.Event(), threading.Event()

        def hold() -> None:
            started.set()
            assert release.wait(60)

        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(tokens, model, 1, **CALLS[0], stopping_criteria=[Call(hold)])
            assert started.wait(60)
            others = [pool.submit(restore, model), pool.submit(tokens, model, 2, **CALLS[0])]
            assert is_accelerated(model)
            release.set()
            assert first.result(60) == stock[0]
            others[0].result(60)
            assert others[1].result(60) == stock[1]
        assert not is_accelerated(model)

    def test_a_call_that_waited_for_its_models_restoration_is_stocks(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        stock = stocks_tokens(model, [(2, CALLS[0])])
        lock = getattr(accelerate(model), STATE).lock
        with ThreadPoolExecutor(1) as pool:
            with lock:
                waiting = pool.submit(tokens, model, 2, **CALLS[0])
                restore(model)
            assert [waiting.result(60)] == stock

    def test_accelerate_in_several_threads_is_undone_by_one_restore(self, device: torch.device) -> None:
        model = tiny_whisper(device)
        before = sorted(vars(model))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(accelerate, [model] * 8))
        restore(model)
        assert sorted(vars(model)) == before
        assert model.config._attn_implementation == "sdpa"


class TestWithinACall:
    def test_restore_is_refused(self, device: torch.device) -> None:
        """Stock's attention would take the empty slots of our cache for tokens."""
        model = tiny_whisper(device, seed=3)
        stock = stocks_tokens(model, [(1, CALLS[0])])

        def refused() -> None:
            with pytest.raises(RuntimeError, match="within a call of its generate"):
                restore(model)

        accelerate(model)
        assert [tokens(model, 1, **CALLS[0], stopping_criteria=[Call(refused)])] == stock
        assert is_accelerated(model)
        assert not is_accelerated(restore(model))

    @pytest.mark.parametrize("inner", CALLS, ids=lambda kwargs: ",".join(kwargs))
    def test_another_call_changes_nothing(self, inner: dict[str, Any], device: torch.device) -> None:
        model, found = tiny_whisper(device, seed=3), []
        stock = stocks_tokens(model, [(1, CALLS[0]), (2, inner)])
        accelerate(model)
        outer = tokens(model, 1, **CALLS[0], stopping_criteria=[Call(lambda: found.append(tokens(model, 2, **inner)))])
        assert [outer, *found] == stock


class TestHalfWay:
    @pytest.mark.parametrize("kwargs", CALLS, ids=lambda kwargs: ",".join(kwargs))
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interruption_anywhere(self, error: type[BaseException], kwargs: dict[str, Any], device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        stock = stocks_tokens(model, [(1, kwargs)])
        tokens(accelerate(model), 1, **kwargs)
        with Interrupt(error) as all_of_it:  # no longer the first, which makes what is kept from call to call
            assert [tokens(model, 1, **kwargs)] == stock
        for at in range(1, all_of_it.seen, all_of_it.seen // 4):
            with pytest.raises(error), Interrupt(error, at):
                tokens(model, 1, **kwargs)
            state = getattr(model, STATE)
            assert (state.owner, state.in_use, ENCODED.get()) == (None, None, None)
            assert model.config._attn_implementation == "whisper_triton"
            with ThreadPoolExecutor(1) as pool:  # another thread does not wait for a lock that was left behind
                assert [pool.submit(tokens, model, 1, **kwargs).result(60)] == stock

    def test_a_streamer_that_fails(self, device: torch.device) -> None:
        class Full(BaseStreamer):
            def put(self, value: torch.Tensor) -> None:
                raise BufferError("nobody reads")

            def end(self) -> None:
                pass

        model = tiny_whisper(device, seed=3)
        stock = stocks_tokens(model, [(0, CALLS[0])])
        with accelerated(model):
            with pytest.raises(BufferError):
                tokens(model, 0, **CALLS[0], streamer=Full())
            assert [tokens(model, 0, **CALLS[0])] == stock

    def test_a_generator_whose_reader_leaves(self, device: torch.device) -> None:
        """The call goes on in its thread; the reader's next call waits for its end."""

        class Queue(BaseStreamer):
            def __init__(self) -> None:
                self.values: list[torch.Tensor] = []
                self.first = threading.Event()

            def put(self, value: torch.Tensor) -> None:
                self.values.append(value)
                self.first.set()

            def end(self) -> None:
                pass

        def read() -> Iterator[torch.Tensor]:
            assert streamer.first.wait(60)
            yield from streamer.values

        model, streamer = tiny_whisper(device, seed=3), Queue()
        stock = stocks_tokens(model, [(0, CALLS[0]), (1, CALLS[0])])
        with accelerated(model), ThreadPoolExecutor(1) as pool:
            writing = pool.submit(tokens, model, 0, **CALLS[0], streamer=streamer)
            reader = read()
            next(reader)
            reader.close()
            assert tokens(model, 1, **CALLS[0]) == stock[1]
            assert writing.result(60) == stock[0]


@pytest.mark.gpu
class TestStreams:
    def test_one_model_in_turn_in_several_streams(self, device: torch.device) -> None:
        """Nobody waits in between: a call's last replays are still queued in its stream when the next begins in another."""
        model = accelerate(tiny_whisper(device, seed=3))
        jobs = [(mel(seed + 1, device, seed=seed), kwargs) for seed in range(3) for kwargs in CALLS[:4]]
        wanted = [model.generate(features, **kwargs) for features, kwargs in jobs]
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        for turn in range(10):
            found = []
            for i, (features, kwargs) in enumerate(jobs):
                with torch.cuda.stream(streams[(turn + i) % 3]):
                    found.append(model.generate(features, **kwargs))
            torch.cuda.synchronize()
            assert all(map(torch.equal, found, wanted))

    def test_threads_with_streams_of_their_own(self, device: torch.device) -> None:
        models = [accelerate(tiny_whisper(device, seed=seed)) for seed in (3, 5)]
        jobs = [(i, seed, kwargs) for i in range(2) for seed in range(3) for kwargs in CALLS[:4]]
        wanted = [tokens(models[i], seed, **kwargs) for i, seed, kwargs in jobs]
        fresh = [accelerate(restore(copy.deepcopy(model))) for model in models]  # which capture while the others replay

        def run(thread: int) -> bool:
            with torch.cuda.stream(torch.cuda.Stream()):
                mine = models if thread % 2 else fresh
                return all(tokens(mine[i], seed, **kwargs) == wanted[n] for n, (i, seed, kwargs) in enumerate(jobs))

        torch.cuda.synchronize()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(run, range(4))) == [True] * 4
