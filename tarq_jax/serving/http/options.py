"""What can be set of a service, with defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request."""

    body: int = 1 << 20  # bytes; more are a 413
    history: int = 10_000  # events; those of them that programs have no room for, the oldest, are left out
    candidates: int = 100_000
    top_k: int = 1000
    seconds: float = 2.0  # to receive a body (408) and to answer it (504)


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a service."""

    limits: Limits = dataclasses.field(default_factory=Limits)
    token: str | None = None  # that requests have to bear
    swaps: bool = True  # whether /swap is served, to those who bear it
    delay: float = 0.002  # seconds that a request waits for company while nothing runs
    budget: float | None = None  # seconds from arrival to answer; by default see `batching.Batcher.budget`
    queue: int = 256  # requests that may be on their way
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)  # numbers of requests that are computed together
    candidate_sizes: tuple[int, ...] = (1024, 8192)  # numbers that given candidates are padded to
