"""Residual quantization against faiss and vector-quantize-pytorch, on the same latents in one run.

    pip install -e '.[bench]' && python -m benchmarks.quantization --json=benchmarks/results/quantization.json

Each library fits its own codebooks (L=3, K=256) to the same latents, then encodes them. The peers fit
greedily whatever the beam with which they encode, because their errors are larger after fitting with a beam.
faiss is measured with and without refining its codebook by least squares, as ours is. Errors are
`sum |z - z_q|^2 / sum |z - mean|^2`. Seconds are medians of calls that take turns; compilation is not
included and is reported separately. vector-quantize-pytorch also computes the quantized latents in each call.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks.peers import check_installed
from benchmarks.timing import in_turns
from tarq_jax import cli, quantization, reporting

SIZES = flags.DEFINE_list("latents", ["10000", "100000"], "Numbers of latents.")
THREADS = flags.DEFINE_integer("threads", 2, "Threads of the peers; JAX uses all cores available to it.",
                               lower_bound=1)
JSON = cli.json_flag()

LEVELS, CODEWORDS, WIDTH = 3, 256, 64
EPOCHS, BATCH = 3, 2000  # of vector-quantize-pytorch's moving averages
SECONDS = 1.0  # for which each is measured
OWN = "tarq_jax, refined"


class Quantizer(NamedTuple):
    """A fitted quantizer of any library."""

    name: str
    beam: int
    fit_seconds: float
    compile_seconds: float
    encode: Callable[[], Any]  # the latents' codes
    error: Callable[[], float]
    memory: float  # temporary memory of encoding, in MB; nan if the library does not report it


def make_latents(num: int, seed: int = 0) -> np.ndarray:
    """Clusters of different sizes, with noise that is large in few directions: [num, 64] float32."""
    rng = np.random.default_rng(seed)
    clusters = 200
    share = rng.dirichlet(np.full(clusters, 2.0))
    centres = rng.normal(size=(clusters, WIDTH))
    scales = 1.5 * np.exp(-np.arange(WIDTH) / 16)
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    noise = (rng.normal(size=(num, WIDTH)) * scales) @ rotation
    return (centres[rng.choice(clusters, num, p=share)] + noise).astype(np.float32)


def relative_error(latents: np.ndarray, quantized: np.ndarray) -> float:
    """The share of the variance that remains."""
    return float(np.square(latents - quantized).sum() / np.square(latents - latents.mean(axis=0)).sum())


def ours(latents: np.ndarray, beam: int, refined: bool) -> Quantizer:
    """tarq_jax: k-means level by level, optionally refined by least squares over all levels."""
    encode = quantization.encode if beam == 1 else functools.partial(quantization.beam_encode, beam=beam)
    fit = quantization.kmeans_codebook
    if refined:
        fit = functools.partial(quantization.fit_codebook, encode=encode)
    fit = jax.jit(functools.partial(fit, num_levels=LEVELS, num_codewords=CODEWORDS))
    points = jnp.asarray(latents)
    start = time.perf_counter()
    codewords = jax.block_until_ready(fit(jax.random.key(0), points)).codewords
    fit_seconds = time.perf_counter() - start
    start = time.perf_counter()
    codes_of = jax.jit(lambda points: encode(codewords, points).codes).lower(points).compile()
    compile_seconds = time.perf_counter() - start
    memory = codes_of.memory_analysis()
    return Quantizer(
        OWN if refined else "tarq_jax, k-means", beam, fit_seconds, compile_seconds,
        lambda: codes_of(points),
        lambda: relative_error(latents, np.asarray(quantization.decode(codewords, codes_of(points)))),
        memory.temp_size_in_bytes / 2**20 if memory else float("nan"),
    )


def faiss_residual(latents: np.ndarray, beam: int, refined: bool, lut: bool) -> Quantizer:
    """faiss `ResidualQuantizer`, optionally with refined codebooks, and with its table of products."""
    import faiss

    faiss.omp_set_num_threads(THREADS.value)
    quantizer = faiss.ResidualQuantizer(WIDTH, LEVELS, 8)
    quantizer.max_beam_size = 1
    if refined:
        quantizer.train_type |= faiss.ResidualQuantizer.Train_refine_codebook
    start = time.perf_counter()
    quantizer.train(latents)
    fit_seconds = time.perf_counter() - start
    quantizer.max_beam_size, quantizer.use_beam_LUT = beam, int(lut)
    name = f"faiss{', refined' if refined else ''}{', LUT' if lut else ''}"
    return Quantizer(
        name, beam, fit_seconds, 0.0, lambda: quantizer.compute_codes(latents),
        lambda: relative_error(latents, quantizer.decode(quantizer.compute_codes(latents))), float("nan"),
    )


def torch_residual(latents: np.ndarray, beam: int) -> Quantizer:
    """vector-quantize-pytorch `ResidualVQ`: k-means on a large first batch, then moving averages."""
    import torch
    from vector_quantize_pytorch import ResidualVQ

    torch.set_num_threads(THREADS.value)
    torch.manual_seed(0)
    module = ResidualVQ(
        dim=WIDTH, num_quantizers=LEVELS, codebook_size=CODEWORDS, kmeans_init=True, kmeans_iters=20,
        decay=0.9, threshold_ema_dead_code=2)
    points = torch.from_numpy(latents)
    start = time.perf_counter()
    module.train()
    module(points[None, :10 * BATCH])
    for epoch in range(EPOCHS):
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(epoch))
        for first in range(0, len(points), BATCH):
            module(points[None, order[first:first + BATCH]])
    fit_seconds = time.perf_counter() - start
    module.eval()

    @torch.no_grad()
    def encode():
        return module(points[None], beam_size=beam)

    return Quantizer("vector-quantize-pytorch", beam, fit_seconds, 0.0, lambda: encode()[1].numpy(),
                     lambda: relative_error(latents, encode()[0][0].numpy()), float("nan"))


def quantizers(latents: np.ndarray) -> Iterator[Callable[[], Quantizer]]:
    """All quantizers to compare; each is fitted when called."""
    for beam in (1, 5):
        for refined in (False, True):
            yield functools.partial(ours, latents, beam, refined)
        for refined, lut in ((False, False), (True, False), (True, True)):
            yield functools.partial(faiss_residual, latents, beam, refined, lut)
        yield functools.partial(torch_residual, latents, beam)


def compare(num: int, console: Console) -> Iterator[dict[str, Any]]:
    """A row per quantizer and beam, with its time divided by that of our refined quantizer."""
    latents = make_latents(num)
    made = [make() for make in track(list(quantizers(latents)), f"fitting, {num:,} latents", console=console)]
    with console.status(f"encoding {num:,} latents"):
        seconds = in_turns(dict(enumerate(one.encode for one in made)), seconds=SECONDS)
    medians = [float(np.median(seconds[place])) for place in range(len(made))]
    own = {one.beam: median for one, median in zip(made, medians, strict=True) if one.name == OWN}
    for place, (one, median) in enumerate(zip(made, medians, strict=True)):
        yield {
            "latents": num, "model": one.name, "beam": one.beam, "quantization_error": one.error(),
            "encode_seconds": median,
            "encode_spread": float(np.subtract(*np.quantile(seconds[place], [0.75, 0.25]))),
            "calls": len(seconds[place]), "ratio": median / own[one.beam], "fit_seconds": one.fit_seconds,
            "compile_seconds": one.compile_seconds, "temporary_mb": one.memory}


def main() -> None:
    """Compares for each number of latents and prints the table."""
    counts = cli.whole_numbers(SIZES, f"whole numbers of at least {CODEWORDS}", least=CODEWORDS)
    check_installed("faiss", "torch", "vector_quantize_pytorch")
    rows = [row for num in counts for row in compare(num, Console())]
    reporting.print_table(rows, f"L={LEVELS}, K={CODEWORDS}, D={WIDTH}, {THREADS.value} threads")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
