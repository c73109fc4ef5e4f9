"""Metrics of a service, for Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from tarq_jax.serving.scorer import Ranking

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms in a registry of their own, so that a process can hold several services."""

    def __init__(self) -> None:
        """All start at zero; memory and CPU time of the process are included if the system reports them."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = Counter("tarq_requests", "Requests answered.", ["path", "status"],
                                 registry=self.registry)
        self._seconds = Histogram(
            "tarq_request_seconds", "Seconds from arrival to answer of /score, if that is 200.",
            buckets=SECONDS, registry=self.registry)
        self._refused = Counter("tarq_refused", "Requests refused with 503, by reason.", ["reason"],
                                registry=self.registry)
        self._batch_size = Histogram("tarq_batch_size", "Requests computed together.", buckets=SIZES,
                                     registry=self.registry)
        self._batch_seconds = Histogram("tarq_batch_seconds", "Seconds to compute a batch.", buckets=SECONDS,
                                        registry=self.registry)
        self._wait_seconds = Histogram(
            "tarq_wait_seconds", "Seconds that the first request of a batch waited.", buckets=SECONDS,
            registry=self.registry)
        self.in_flight = Gauge("tarq_in_flight", "Requests for scores in flight.", registry=self.registry)
        self._unknown = Counter("tarq_unknown_candidates", "Candidates asked for that are not served.",
                                registry=self.registry)
        self._skipped = Counter("tarq_skipped_events", "Events of histories with unknown items.",
                                registry=self.registry)
        self._swaps = Counter("tarq_swaps", "Attempts to serve another version.", ["result"],
                              registry=self.registry)
        self._version = Gauge("tarq_version", "1 for the version that is served.", ["version"],
                              registry=self.registry)

    def request(self, path: str, status: int) -> None:
        """Counts an answer that was sent."""
        self._requests.labels(path, str(status)).inc()

    def answered(self, ranking: Ranking, seconds: float) -> None:
        """Records that a request for scores was answered."""
        self._seconds.observe(seconds)
        self._unknown.inc(len(ranking.unknown))
        self._skipped.inc(ranking.skipped)

    def refused(self, reason: str) -> None:
        """Counts a request that was refused with 503."""
        self._refused.labels(reason).inc()

    def batch(self, size: int, waited: float, seconds: float) -> None:
        """Records a computed batch."""
        self._batch_size.observe(size)
        self._wait_seconds.observe(waited)
        self._batch_seconds.observe(seconds)

    def swap(self, result: str) -> None:
        """Counts an attempt to serve another version; `result` is "taken" or "refused"."""
        self._swaps.labels(result).inc()

    def serves(self, version: str, before: str | None) -> None:
        """Records that `version` took over from `before`."""
        if before is not None:
            self._version.remove(before)
        self._version.labels(version).set(1)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
