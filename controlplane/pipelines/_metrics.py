"""What Prometheus is told about generations."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from controlplane.jobs import Jobs, LiveJob


class PipelineMetrics:
    """Counters of ended jobs and of tokens; observed once a job, never once a token."""

    def __init__(self, registry: CollectorRegistry, jobs: Jobs) -> None:
        self._jobs = Counter(
            "rung_jobs",
            "Ended jobs by kind, state and target",
            ["kind", "state", "target"],
            registry=registry,
        )
        self._seconds = Histogram(
            "rung_job_seconds",
            "Time from acceptance to the terminal event",
            ["kind"],
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
            registry=registry,
        )
        self._tokens = Counter(
            "rung_tokens", "Tokens by direction and target", ["direction", "target"], registry=registry
        )
        self._children: dict[tuple[str, str, str], tuple[Counter, Histogram, Counter, Counter]] = {}
        running = Gauge("rung_jobs_running", "Jobs that have not ended", registry=registry)
        running.set_function(lambda: jobs.running)

    def ended(self, job: LiveJob) -> None:
        """Count a job that has its terminal event."""
        target = job.served.target if job.served else ""
        key = (job.kind.value, job.state.value, target)
        children = self._children.get(key)
        if children is None:
            # Finding a labelled child costs more than counting it.
            children = self._children[key] = (
                self._jobs.labels(*key),
                self._seconds.labels(job.kind.value),
                self._tokens.labels("prompt", target),
                self._tokens.labels("completion", target),
            )
        jobs, seconds, prompt, completion = children
        jobs.inc()
        seconds.observe(job.elapsed_s)
        if job.usage is not None:
            prompt.inc(job.usage.prompt_tokens)
            completion.inc(job.usage.completion_tokens)
