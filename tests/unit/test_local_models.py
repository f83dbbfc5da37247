"""Models that take turns in one process: LRU under a budget, locks, batches, leases."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
    VramInfeasibleError,
)
from rung.local import (
    CudaMemory,
    LocalModel,
    ModelManager,
    ModelState,
    bytes_missing,
    grouped,
    leases_of,
    victims,
)

TIMEOUT_S = 20.0


class Device:
    """Memory that models take and give back, as a driver would tell it."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.taken: dict[str, int] = {}
        self.others_bytes = 0
        self.given_back = 0

    def free_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - sum(self.taken.values())

    def give_back(self) -> None:
        self.given_back += 1

    def loader(self, name: str, size_bytes: int) -> Callable[[], str]:
        def load() -> str:
            assert self.free_bytes() >= size_bytes, f"{name} ran out of memory"
            self.taken[name] = size_bytes
            return name

        return load

    def unloader(self, name: str) -> Callable[[Any], None]:
        def unload(_: object) -> None:
            del self.taken[name]

        return unload


def a_manager(budget: int | str, **sizes: int) -> tuple[ModelManager, list[str]]:
    """A manager, and the log of what it loads (`+name`) and unloads (`-name`)."""
    log: list[str] = []
    manager = ModelManager(budget)
    for name, size_bytes in sizes.items():

        def load(name: str = name) -> str:
            log.append(f"+{name}")
            return name

        manager.register(name, load, size_bytes, unload=lambda model: log.append(f"-{model}"))
    return manager, log


def use_all(manager: ModelManager, *names: str) -> None:
    for name in names:
        with manager.use(name) as model:
            assert model == name


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield pool


def test_whoever_was_used_longest_ago_gives_way() -> None:
    manager, log = a_manager(10, a=4, b=4, c=4)
    use_all(manager, "a", "b", "a", "c")
    assert log == ["+a", "+b", "-b", "+c"]
    use_all(manager, "b")
    assert log[4:] == ["-a", "+b"]


def test_a_loaded_model_is_not_loaded_again_and_what_is_unloaded_at_the_end_is_all() -> None:
    manager, log = a_manager("10kB", a=4, b=4)
    with manager:
        use_all(manager, "a", "a", "b", "a")
    assert log == ["+a", "+b", "-a", "-b"]
    assert {each.state for each in manager.models} == {ModelState.UNLOADED}


def test_no_more_gives_way_than_has_to() -> None:
    manager, log = a_manager(12, small=1, large=8, next=7)
    use_all(manager, "small", "large", "next")
    assert log == ["+small", "+large", "-large", "+next"]


def test_what_cannot_fit_is_refused_when_it_is_registered() -> None:
    with pytest.raises(VramInfeasibleError, match="big takes 11 bytes, and all models together may take 10"):
        a_manager(10, big=11)


def test_bad_wishes_say_what_is_wrong() -> None:
    manager, _ = a_manager(10, a=1)
    with pytest.raises(UnknownModelError, match="there is no model 'b'; there are: a"), manager.use("b"):
        pass
    with pytest.raises(InvalidRequestError, match="there is a model a already"):
        manager.register("a", str, 1)
    with pytest.raises(InvalidRequestError, match="'12 apples' is not a size"):
        manager.register("c", str, "12 apples")
    with pytest.raises(InvalidRequestError, match="size of c is 0"):
        manager.register("c", str, 0)
    with pytest.raises(InvalidRequestError, match="give a budget"):
        ModelManager()


def test_a_thread_that_is_in_its_own_way_is_told_so() -> None:
    manager, log = a_manager(10, a=6, b=6)
    with manager.use("a"):
        with pytest.raises(VramInfeasibleError, match="no room for b: this thread uses a itself"):
            use_all(manager, "b")
        use_all(manager, "a")
    use_all(manager, "b")
    assert log == ["+a", "-a", "+b"]


def test_a_loader_that_fails_leaves_room_for_the_next() -> None:
    manager, log = a_manager(10, a=6)
    attempts = iter([RuntimeError("no such file"), None])

    def load() -> str:
        error = next(attempts)
        if error is not None:
            raise error
        return "b"

    manager.register("b", load, 6)
    with pytest.raises(RuntimeError, match="no such file"):
        use_all(manager, "b")
    assert manager.models[1].state is ModelState.UNLOADED
    use_all(manager, "b", "a")
    assert log == ["+a"]


def test_an_unloader_that_fails_still_lets_go(caplog: pytest.LogCaptureFixture) -> None:
    manager, log = a_manager(10, a=6)
    manager.register("b", lambda: "b", 6, unload=lambda _: 1 / 0)
    use_all(manager, "b", "a")
    assert log == ["+a"]
    assert "b was not unloaded well" in caplog.text


def test_many_threads_load_a_model_once(threads: ThreadPoolExecutor) -> None:
    manager, log = a_manager(10, a=4)
    together = threading.Barrier(8)

    def work() -> None:
        together.wait(TIMEOUT_S)
        use_all(manager, "a")

    for each in [threads.submit(work) for _ in range(8)]:
        each.result(TIMEOUT_S)
    assert log == ["+a"]


def test_who_needs_the_room_of_others_waits_for_them(threads: ThreadPoolExecutor) -> None:
    manager, log = a_manager(10, a=6, b=6)
    with manager.use("a"):
        waiting = threads.submit(use_all, manager, "b")
        assert log == ["+a"]
    waiting.result(TIMEOUT_S)
    assert log == ["+a", "-a", "+b"]


def test_who_waits_too_long_is_told_who_is_in_the_way(threads: ThreadPoolExecutor) -> None:
    manager, _ = a_manager(10, a=6, b=6)

    def ask() -> None:
        with manager.use("b", timeout_s=0.01):
            pass

    with (
        manager.use("a"),
        pytest.raises(DeadlineExceededError, match="no room for b in time; in use are a"),
    ):
        threads.submit(ask).result(TIMEOUT_S)
    use_all(manager, "b")


def test_one_that_loads_keeps_nobody_from_one_that_is_loaded(threads: ThreadPoolExecutor) -> None:
    manager, _ = a_manager(10, a=4)
    loading, go_on = threading.Event(), threading.Event()

    def load() -> str:
        loading.set()
        assert go_on.wait(TIMEOUT_S)
        return "slow"

    manager.register("slow", load, 4)
    use_all(manager, "a")
    slow = threads.submit(use_all, manager, "slow")
    assert loading.wait(TIMEOUT_S)
    use_all(manager, "a")
    go_on.set()
    slow.result(TIMEOUT_S)


def test_a_model_that_is_used_all_the_time_becomes_idle_for_who_waits(threads: ThreadPoolExecutor) -> None:
    manager = ModelManager(10, patience_s=0.0)
    manager.register("busy", lambda: "busy", 6)
    manager.register("next", lambda: "next", 6)
    relay: list[Future[None]] = []
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with manager.use("busy"):
            entered.set()
            assert leave.wait(TIMEOUT_S)

    relay.append(threads.submit(hold))
    assert entered.wait(TIMEOUT_S)
    waiting = threads.submit(use_all, manager, "next")
    while not manager._waiting:
        threading.Event().wait(0.001)
    late = threads.submit(use_all, manager, "busy")
    leave.set()
    waiting.result(TIMEOUT_S)
    late.result(TIMEOUT_S)
    assert manager.models[1].last_used < manager.models[0].last_used


def test_a_batch_is_carried_out_by_model_and_answered_in_order() -> None:
    manager, log = a_manager(5, a=4, b=4, c=4)
    use_all(manager, "b")
    wanted = [("a", 1), ("b", 2), ("a", 3), ("c", 4), ("b", 5)]
    assert manager.map(wanted, lambda model, payload: f"{model}{payload}") == ["a1", "b2", "a3", "c4", "b5"]
    assert log == ["+b", "-b", "+a", "-a", "+c"]


def test_a_batch_with_an_unknown_model_carries_out_nothing() -> None:
    manager, log = a_manager(5, a=4)
    with pytest.raises(UnknownModelError):
        manager.map([("a", 1), ("nope", 2)], lambda *_: None)
    assert log == []


def test_room_is_what_the_device_says_and_sizes_are_what_was_measured() -> None:
    device = Device(total_bytes=10)
    manager = ModelManager(memory=device)
    manager.register("a", device.loader("a", 5), 3, unload=device.unloader("a"))
    manager.register("b", device.loader("b", 6), 6, unload=device.unloader("b"))
    use_all(manager, "a")
    assert manager.models[0].size_bytes == 5
    use_all(manager, "b")
    assert device.taken == {"b": 6}
    assert device.given_back == 1


def test_what_other_programs_hold_is_counted_and_named_when_nothing_can_give_way() -> None:
    device = Device(total_bytes=10)
    manager = ModelManager(memory=device)
    manager.register("a", device.loader("a", 5), 5, unload=device.unloader("a"))
    device.others_bytes = 6
    with pytest.raises(VramInfeasibleError, match="it takes 5 bytes, 4 are free, and nothing of this"):
        use_all(manager, "a")
    device.others_bytes = 0
    use_all(manager, "a")


def test_an_unloader_that_frees_less_than_expected_leads_to_another_round() -> None:
    device = Device(total_bytes=10)
    manager = ModelManager(memory=device)

    def keep_half(_: object) -> None:
        device.taken["a"] -= 2

    manager.register("a", device.loader("a", 4), 4, unload=keep_half)
    manager.register("b", device.loader("b", 4), 4, unload=device.unloader("b"))
    manager.register("c", device.loader("c", 6), 6, unload=device.unloader("c"))
    use_all(manager, "a", "b", "c")
    assert device.taken == {"a": 2, "c": 6}


class Leases:
    """Leases that are had at once, and can be lost."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lost: set[str] = set()

    @contextmanager
    def __call__(self, vram_bytes: int, holder: str) -> Iterator[Callable[[], bool]]:
        self.log.append(f"lease {holder} {vram_bytes}")
        self.lost.discard(holder)
        yield lambda: holder in self.lost
        self.log.append(f"release {holder}")


def test_a_loaded_model_holds_a_lease_until_it_is_unloaded() -> None:
    leases = Leases()
    manager = ModelManager(10, leases=leases)

    def load() -> str:
        leases.log.append("+a")
        return "a"

    manager.register("a", load, 6, unload=lambda _: leases.log.append("-a"))
    manager.register("b", lambda: "b", 6)
    use_all(manager, "a", "b")
    assert leases.log == ["lease a 6", "+a", "-a", "release a", "lease b 6"]
    manager.close()
    assert leases.log[-1] == "release b"


def test_a_loader_that_fails_gives_its_lease_back() -> None:
    leases = Leases()
    manager = ModelManager(10, leases=leases)
    manager.register("a", lambda: 1 / 0, 6)
    with pytest.raises(ZeroDivisionError):
        use_all(manager, "a")
    assert leases.log == ["lease a 6", "release a"]


def test_a_model_whose_lease_was_lost_takes_its_memory_anew() -> None:
    leases = Leases()
    manager = ModelManager(10, leases=leases)
    manager.register("a", lambda: "a", 6)
    use_all(manager, "a", "a")
    leases.lost.add("a")
    use_all(manager, "a")
    assert leases.log == ["lease a 6", "release a", "lease a 6"]


class AwayClient:
    def lease(self, gpu: str, vram_bytes: int, **_: object) -> AbstractContextManager[None]:
        @contextmanager
        def away() -> Iterator[None]:
            if vram_bytes:
                raise UnavailableError("nobody listens")
            yield

        return away()


def test_without_a_control_plane_a_script_goes_on_unless_it_must_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client: Any = AwayClient()
    with leases_of(client, "workstation/0")(5, "vision") as lost:
        assert not lost()
    assert "no lease for vision: nobody listens" in caplog.text
    with (
        pytest.raises(UnavailableError, match="nobody listens"),
        leases_of(client, "workstation/0", required=True)(5, "vision"),
    ):
        pass


def test_leases_need_a_budget() -> None:
    with pytest.raises(InvalidRequestError, match="how much to hold leases for"):
        ModelManager(memory=Device(10), leases=Leases())


class FakeCuda:
    """What PyTorch has of a device."""

    def __init__(self) -> None:
        self.cuda = self
        self.emptied = 0

    def mem_get_info(self, _device: int) -> tuple[int, int]:
        return 100, 1000

    def memory_reserved(self, _device: int) -> int:
        return 50

    def memory_allocated(self, _device: int) -> int:
        return 20

    def empty_cache(self) -> None:
        self.emptied += 1


def test_cuda_counts_what_pytorch_keeps_without_using_it() -> None:
    torch = FakeCuda()
    memory = CudaMemory(torch)
    assert memory.free_bytes() == 130
    memory.give_back()
    assert torch.emptied == 1


SIZES = st.integers(1, 20)


def some_models() -> st.SearchStrategy[list[LocalModel]]:
    one = st.tuples(SIZES, st.sampled_from(ModelState), st.integers(0, 1), st.integers(0, 9))
    return st.lists(one, max_size=7).map(
        lambda rows: [
            LocalModel(name=str(place), size_bytes=size, state=state, users=users, last_used=used)
            for place, (size, state, users, used) in enumerate(rows)
        ]
    )


@given(models=some_models(), missing=st.integers(1, 60))
def test_victims_are_idle_enough_and_none_too_many(models: list[LocalModel], missing: int) -> None:
    by_name = {each.name: each for each in models}
    idle = [each for each in models if each.state is ModelState.LOADED and not each.users]
    chosen = victims(models, missing)
    if sum(each.size_bytes for each in idle) < missing:
        assert chosen is None
        return
    assert chosen is not None
    given_bytes = sum(by_name[name].size_bytes for name in chosen)
    assert {*chosen} <= {each.name for each in idle}
    assert given_bytes >= missing
    assert all(given_bytes - by_name[name].size_bytes < missing for name in chosen)


@given(names=st.lists(st.sampled_from("abc")), loaded=st.sets(st.sampled_from("abc")))
def test_groups_have_each_place_once_and_loaded_models_first(names: list[str], loaded: set[str]) -> None:
    groups = grouped(names, sorted(loaded))
    assert sorted(place for _, places in groups for place in places) == list(range(len(names)))
    assert all(names[place] == name for name, places in groups for place in places)
    needed = [name in loaded for name, _ in groups]
    assert needed == sorted(needed, reverse=True)


def test_what_is_on_its_way_is_not_free() -> None:
    loading = LocalModel(name="a", state=ModelState.LOADING, size_bytes=6)
    wanted = LocalModel(name="b", state=ModelState.UNLOADED, size_bytes=5)
    assert bytes_missing([loading, wanted], wanted, budget_bytes=None, free_bytes=10) == 1
    assert bytes_missing([loading, wanted], wanted, budget_bytes=10, free_bytes=None) == 1
    assert bytes_missing([wanted], wanted, budget_bytes=10, free_bytes=10) == 0


@pytest.mark.parametrize("seed", range(8))
def test_no_schedule_of_threads_exceeds_the_memory(seed: int, threads: ThreadPoolExecutor) -> None:
    device = Device(total_bytes=12)
    lock = threading.Lock()
    manager = ModelManager(12, memory=device, patience_s=0.0)
    sizes = {"a": 3, "b": 5, "c": 7, "d": 4}

    def loader(name: str) -> Callable[[], str]:
        load = device.loader(name, sizes[name])

        def locked() -> str:
            with lock:
                return load()

        return locked

    def unloader(name: str) -> Callable[[Any], None]:
        def locked(_: object) -> None:
            with lock:
                device.taken.pop(name)

        return locked

    for name, size_bytes in sizes.items():
        manager.register(name, loader(name), size_bytes, unload=unloader(name))

    def work(rng: random.Random) -> None:
        for _ in range(60):
            use_all(manager, rng.choice("abcd"))

    for each in [threads.submit(work, random.Random(seed * 100 + number)) for number in range(8)]:
        each.result(TIMEOUT_S)
    assert all(not each.users for each in manager.models)
    manager.close()
    assert device.taken == {}
