"""Settings of a service, with defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    body: int = 1 << 22  # bytes; a larger body is refused with 413
    history: int = 10_000  # events; the programs may take fewer, and then leave out the oldest of them
    candidates: int = 100_000
    top_k: int = 1000
    seconds: float = 2.0  # to receive a body (408) and to answer it (504)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a service."""

    limits: Limits = dataclasses.field(default_factory=Limits)
    token: str | None = None  # that /score and, without a token of its own, /swap have to carry
    swap_token: str | None = None
    swaps: bool = True  # whether /swap is served; it needs a token
    delay: float = 0.002  # seconds that a request waits for others while nothing runs
    budget: float | None = None  # seconds from arrival to answer; by default see `batching.Batcher.budget`
    queue: int = 256  # requests that may be in flight
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)  # numbers of requests that are computed together
    candidate_sizes: tuple[int, ...] = (1024, 8192)  # numbers that given candidates are padded to

    @property
    def tokens(self) -> dict[str, str | None]:
        """The token that requests of a path have to carry."""
        return {"/score": self.token, "/swap": self.swap_token or self.token}
