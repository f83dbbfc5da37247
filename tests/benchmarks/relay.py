"""What the relay costs, beside the same engine without it, in one run.

The things under test share one core; the engine (a stub in C) and the load (in C, for gRPC in Python) have
the other. Targets are rotated within each repeat, so that a drift of the machine hits all alike. Read
ratios, not absolutes.

    python -m tests.benchmarks.relay [--quick] [--no-litellm] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.integration.engine_process import free_port

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATH = "/v1/chat/completions"
#: Chunks a second of each paced stream, as the stub engine paces them.
PACE = 200
CONCURRENCIES = (1, 16, 64)
STREAMS = 64
LITELLM = ROOT / ".cache" / "bench-litellm"
_TICKS = os.sysconf("SC_CLK_TCK")
#: A window in which the host took more than this share of a core is measured again after a pause, so often.
_MOST_STOLEN = 0.01
_MOST_TRIES = 8
_PAUSE_S = 3.0
_START_S = 60.0
Result = dict[str, float]


@dataclass
class Target:
    """Something that answers; `pids` are the processes whose time is counted."""

    name: str
    port: int
    pids: list[int] = field(default_factory=list)
    grpc_port: int = 0
    grpc_kind: str = ""


class Bench:
    """Starts everything, and measures."""

    def __init__(self, stack: ExitStack, folder: Path, *, seconds: float, repeats: int) -> None:
        self.seconds = seconds
        self.repeats = repeats
        self._stack = stack
        self._folder = folder
        for name in ("stub_engine", "load"):
            source = HERE / f"{name}.c"
            subprocess.run(["gcc", "-O2", "-o", str(folder / name), str(source)], check=True)

    def start(
        self, name: str, command: list[str], *, core: int, environment: dict[str, str] | None = None
    ) -> int:
        """Start a process on a core; it is ended with the bench."""
        log = (self._folder / f"{name}.log").open("wb")
        self._stack.callback(log.close)
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=os.environ | {"GRPC_VERBOSITY": "ERROR"} | (environment or {}),
            start_new_session=True,
        )
        os.sched_setaffinity(process.pid, {core % (os.cpu_count() or 1)})
        self._stack.callback(_end, process)
        return process.pid

    def engine(self, pace: int) -> int:
        """A stub engine; returns its port."""
        port = free_port()
        self.start(f"stub-{pace}", [str(self._folder / "stub_engine"), str(port), str(pace)], core=1)
        _wait(f"http://127.0.0.1:{port}/v1/models", "the stub engine")
        return port

    def load(self, target: Target, concurrency: int, *, stream: bool, grpc: bool = False) -> Result:
        """One window of load; what was measured, and the processor time of the target.

        A window in which the machine's host gave its cores to somebody else says nothing about the target,
        and is measured again, a few times.
        """
        for _ in range(_MOST_TRIES):
            stolen_s = _stolen_s()
            found = self._window(target, concurrency, stream=stream, grpc=grpc)
            found["stolen"] = (_stolen_s() - stolen_s) / found["seconds"]
            if found["stolen"] <= _MOST_STOLEN:
                break
            time.sleep(_PAUSE_S)
        return found

    def _window(self, target: Target, concurrency: int, *, stream: bool, grpc: bool) -> Result:
        seconds = str(self.seconds * (2 if stream else 1))
        if grpc:
            command = [sys.executable, "-m", "tests.benchmarks.grpc_load", str(target.grpc_port)]
            command += [target.grpc_kind, str(concurrency), seconds, "stub"]
        else:
            command = [str(self._folder / "load"), str(target.port), PATH, str(concurrency), seconds]
            command += [str(int(stream)), "stub"]
        before = _cpu_s(target.pids)
        done = subprocess.run(
            ["taskset", "-c", str(1 % (os.cpu_count() or 1)), *command],
            check=True,
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"GRPC_VERBOSITY": "ERROR"},
        )
        found: Result = json.loads(done.stdout)
        found["cpu_s"] = _cpu_s(target.pids) - before
        found["per_s"] = found["requests"] / found["seconds"]
        found["chunks_per_s"] = found["chunks"] / found["seconds"]
        found["cpu_ms_per_request"] = 1000 * found["cpu_s"] / max(1.0, found["requests"])
        found["cpu_ms_per_chunk"] = 1000 * found["cpu_s"] / max(1.0, found["chunks"])
        return found

    def rotated(self, targets: list[Target], measure: Callable[[Target], Result]) -> dict[str, Result]:
        """Medians over the repeats, each with another target first."""
        found: dict[str, list[Result]] = {target.name: [] for target in targets}
        for repeat in range(self.repeats):
            for target in targets[repeat % len(targets) :] + targets[: repeat % len(targets)]:
                found[target.name].append(measure(target))
        return {
            name: {key: statistics.median(result[key] for result in results) for key in results[0]}
            for name, results in found.items()
        }

    # What is measured ------------------------------------------------------------------------------

    def nginx(self, engine: int) -> Target | None:
        """The practical limit of a relay."""
        if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
            print("nginx is not installed: left out", file=sys.stderr)
            return None
        port = free_port()
        config = self._folder / f"nginx-{port}.conf"
        config.write_text(
            f"daemon off; worker_processes 1; pid {self._folder}/nginx-{port}.pid; error_log /dev/null;\n"
            "events { worker_connections 1024; }\n"
            f"http {{ access_log off; upstream engine {{ server 127.0.0.1:{engine}; keepalive 128; }}\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{\n"
            "proxy_pass http://engine; proxy_buffering off;\n"
            'proxy_http_version 1.1; proxy_set_header Connection ""; } } }\n'
        )
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"
        pid = self.start(f"nginx-{port}", [nginx, "-c", str(config), "-p", str(self._folder)], core=0)
        _wait(f"http://127.0.0.1:{port}/v1/models", "nginx")
        return Target("nginx", port, _with_children(pid))

    def bare(self, engine: int, *, through_agent: bool) -> Target:
        """A relay of forty lines, straight or through an agent of twenty."""
        port, agent_port = free_port(), free_port()
        environment = {"ENGINE": f"http://127.0.0.1:{engine}"}
        pids: list[int] = []
        if through_agent:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.bare_agent",
                str(agent_port),
                environment["ENGINE"],
            ]
            pids.append(self.start(f"bare-agent-{port}", command, core=0))
            environment["AGENT"] = f"127.0.0.1:{agent_port}"
        command = [sys.executable, "-m", "uvicorn", "tests.benchmarks.bare_relay:app", "--port", str(port)]
        command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "error"]
        pids.append(self.start(f"bare-{port}", command, core=0, environment=environment))
        _wait(f"http://127.0.0.1:{port}{PATH}", "the bare relay", post=True)
        name = "bare gRPC chain" if through_agent else "bare relay (uvicorn + aiohttp)"
        return Target(name, port, pids, agent_port, "run")

    def rung(self, engine: int, *, direct: bool) -> Target:
        """Rung itself: a control plane, and an agent that has adopted the engine."""
        name = "Rung, direct" if direct else "Rung, through the agent"
        folder = self._folder / f"rung-{engine}-{direct}"
        folder.mkdir()
        agent_port = free_port()
        agent = {"node_id": "box", "port": agent_port, "state_dir": str(folder / "agent")}
        deployment = {
            "id": "stub",
            "node": "box",
            "model": "stub",
            "slots": 256,
            "engine": {"kind": "openai_compatible"},
            "runtime": {"kind": "external", "base_url": f"http://127.0.0.1:{engine}"},
        }
        plane = {
            "server": {
                "grpc_port": 0,
                "http_port": 0,
                "state_dir": str(folder / "plane"),
                "direct_relay": direct,
            },
            "nodes": [{"id": "box", "address": f"127.0.0.1:{agent_port}"}],
            "deployments": [deployment],
        }
        pids = []
        for kind, config, command in (("agent", agent, ["agent", "run"]), ("plane", plane, ["serve"])):
            path = folder / f"{kind}.yaml"
            path.write_text(yaml.safe_dump(config))
            arguments = [sys.executable, "-m", "rung.cli", *command, "--config", str(path)]
            pids.append(self.start(f"rung-{engine}-{direct}-{kind}", arguments, core=0))
        ready = folder / "plane" / "controlplane.json"
        _until(ready.exists, name)
        ports = json.loads(ready.read_text())
        _wait(f"http://127.0.0.1:{ports['http_port']}{PATH}", name, post=True)
        return Target(name, ports["http_port"], pids, ports["grpc_port"], "generate")

    def litellm(self, engine: int) -> Target | None:
        """LiteLLM's proxy, one worker, in an environment of its own."""
        python = LITELLM / "bin" / "python"
        if not (LITELLM / "bin" / "litellm").exists():
            print("installing LiteLLM for the comparison", file=sys.stderr)
            made = subprocess.run([sys.executable, "-m", "venv", str(LITELLM)], check=False)
            install = [str(python), "-m", "pip", "install", "--quiet", "litellm[proxy]"]
            if made.returncode or subprocess.run(install, check=False).returncode:
                print("LiteLLM cannot be installed: left out", file=sys.stderr)
                return None
        port = free_port()
        config = self._folder / f"litellm-{port}.yaml"
        parameters = {"model": "openai/stub", "api_base": f"http://127.0.0.1:{engine}/v1", "api_key": "none"}
        config.write_text(
            yaml.safe_dump({"model_list": [{"model_name": "stub", "litellm_params": parameters}]})
        )
        command = [str(LITELLM / "bin" / "litellm"), "--config", str(config), "--port", str(port)]
        environment = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        pid = self.start(
            f"litellm-{port}", [*command, "--host", "127.0.0.1"], core=0, environment=environment
        )
        try:
            _wait(f"http://127.0.0.1:{port}{PATH}", "LiteLLM", post=True)
        except TimeoutError as error:
            print(f"{error}: left out", file=sys.stderr)
            return None
        return Target("LiteLLM", port, _with_children(pid))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short repeat")
    parser.add_argument("--no-litellm", action="store_true", help="leave LiteLLM out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with _folder() as folder, ExitStack() as stack:
        bench = Bench(stack, folder, seconds=0.8 if options.quick else 1.5, repeats=1 if options.quick else 3)
        report = measure(bench, litellm=not options.no_litellm)
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def measure(bench: Bench, *, litellm: bool) -> dict[str, Any]:
    """All windows: whole answers at three concurrencies, then 64 paced streams, over HTTP and over gRPC."""
    report: dict[str, Any] = {"whole": {}, "grpc": {}}
    for paced in (False, True):
        engine = bench.engine(PACE if paced else 0)
        with ExitStack() as stack:
            outer, bench._stack = bench._stack, stack
            straight = Target("straight to the engine", engine)
            found = [straight, bench.nginx(engine), bench.bare(engine, through_agent=False)]
            found += [bench.bare(engine, through_agent=True), bench.rung(engine, direct=True)]
            found += [bench.rung(engine, direct=False), bench.litellm(engine) if litellm else None]
            targets = [target for target in found if target is not None]
            if paced:
                _say("64 paced streams")
                report["streams"] = bench.rotated(
                    targets, lambda each: bench.load(each, STREAMS, stream=True)
                )
                with_grpc = [target for target in targets if target.grpc_port and "relay" not in target.name]
                for concurrency in CONCURRENCIES:
                    _say(f"gRPC clients, {concurrency} streams")
                    report["grpc"][concurrency] = bench.rotated(
                        with_grpc,
                        lambda each, c=concurrency: bench.load(each, c, stream=True, grpc=True),  # type: ignore[misc]
                    )
            else:
                for concurrency in CONCURRENCIES:
                    _say(f"whole answers, {concurrency} callers")
                    report["whole"][concurrency] = bench.rotated(
                        targets,
                        lambda each, c=concurrency: bench.load(each, c, stream=False),  # type: ignore[misc]
                    )
                report["rss_mb"] = {each.name: _rss_mb(each.pids) for each in targets}
            bench._stack = outer
    return report


def print_report(report: dict[str, Any]) -> None:
    """Tables in Markdown, and the budgets."""
    whole, streams = report["whole"], report["streams"]
    bare = {c: whole[c]["bare relay (uvicorn + aiohttp)"] for c in CONCURRENCIES}
    print("\n## Whole answers: requests/s ÷ the bare relay's\n")
    print(
        "| in front of the engine | c=1 | c=16 | c=64 | requests/s (c=64) | CPU s per 1,000 requests (c=64)"
        " | added p50 / p99 ms (c=1) | p50 / p99 ms (c=64) | RSS MB |"
    )
    print("| --- " * 9 + "|")
    engine = whole[1]["straight to the engine"]
    for name in whole[1]:
        ratios = " | ".join(f"{whole[c][name]['per_s'] / bare[c]['per_s']:.2f}" for c in CONCURRENCIES)
        one, many = whole[1][name], whole[64][name]
        added = [(one[key] - engine[key]) / 1000 for key in ("p50_us", "p99_us")]
        print(
            f"| {name} | {ratios} | {many['per_s']:.0f} | {many['cpu_ms_per_request']:.3f}"
            f" | {added[0]:.2f} / {added[1]:.2f} | {many['p50_us'] / 1000:.1f} / {many['p99_us'] / 1000:.1f}"
            f" | {report['rss_mb'][name]:.0f} |"
        )
    offered = STREAMS * PACE
    print(f"\n## {STREAMS} paced streams over HTTP, {offered:,} chunks/s offered\n")
    print("| | delivered ÷ offered | CPU s per 1,000 chunks | first chunk p50 / p99 ms |")
    print("| --- " * 4 + "|")
    for name, found in streams.items():
        print(
            f"| {name} | {_delivered(found, offered):.3f} | {found['cpu_ms_per_chunk']:.3f}"
            f" | {found['first_p50_us'] / 1000:.1f} / {found['first_p99_us'] / 1000:.1f} |"
        )
    print("\n## gRPC clients, paced streams\n")
    print("| | streams | delivered ÷ offered | CPU s per 1,000 chunks | first chunk p50 / p99 ms |")
    print("| --- " * 5 + "|")
    for concurrency, by_name in report["grpc"].items():
        for name, found in by_name.items():
            print(
                f"| {name} | {concurrency} | {found['chunks_per_s'] / (concurrency * PACE):.3f}"
                f" | {found['cpu_ms_per_chunk']:.3f}"
                f" | {found['first_p50_us'] / 1000:.1f} / {found['first_p99_us'] / 1000:.1f} |"
            )
    print("\n## Budgets\n")
    for what, value, least in _budgets(report, offered):
        print(f"- {'met' if value >= least else 'NOT met'}: {what}: {value:.2f} (at least {least:g})")


def _budgets(report: dict[str, Any], offered: int) -> Iterator[tuple[str, float, float]]:
    whole, streams = report["whole"], report["streams"]
    for c in CONCURRENCIES:
        rate = {name: found["per_s"] for name, found in whole[c].items()}
        yield (
            f"direct ÷ bare relay, c={c}",
            rate["Rung, direct"] / rate["bare relay (uvicorn + aiohttp)"],
            0.8,
        )
        yield (f"agent ÷ bare chain, c={c}", rate["Rung, through the agent"] / rate["bare gRPC chain"], 0.8)
        if "LiteLLM" in rate:
            yield f"direct ÷ LiteLLM, c={c}", rate["Rung, direct"] / rate["LiteLLM"], 20
    yield "64 streams, direct, delivered", _delivered(streams["Rung, direct"], offered), 0.98
    yield "64 streams, agent, delivered", _delivered(streams["Rung, through the agent"], offered), 0.95
    first_ms = streams["Rung, direct"]["first_p50_us"] / 1000
    yield f"64 streams, direct, 15 ms ÷ first chunk p50 ({first_ms:.1f} ms)", 15 / first_ms, 1


def _delivered(found: Result, offered: int) -> float:
    """Chunks that came, of those that the engine offered; its last ones come together, hence the bound."""
    return min(1.0, found["chunks_per_s"] / offered)


def _cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _stolen_s() -> float:
    """Time that a virtual machine's cores were wanted and not given, all of them together."""
    steal = Path("/proc/stat").read_text().split(maxsplit=9)[8]
    return int(steal) / _TICKS


def _rss_mb(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                total += int(line.split()[1])
    return total / 1024


def _with_children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(int(child) for child in children)]


def _wait(url: str, what: str, *, post: bool = False) -> None:
    body = json.dumps({"model": "stub", "messages": [{"role": "user", "content": "Hi"}]}).encode()

    def answers() -> bool:
        request = urllib.request.Request(url, data=body if post else None)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    _until(answers, what)


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not answer within {_START_S:g} s")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rung-bench-") as folder:
        yield Path(folder)


def _say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
