"""The pictures of the documentation, drawn by the library itself: `python docs/pictures.py DIR`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from tarq_jax import quantization
from tarq_jax.attention import attention_weights, multi_head_attention
from tarq_jax.expansion import expand, look_up_expansion

BLUE, ORANGE, GREEN, GREY = "#3366aa", "#dd7733", "#338855", "#999999"


def latents(num: int = 600, clusters: int = 7, seed: int = 2) -> jax.Array:
    """Latents [num, 2] of items from several clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-3, 3, (clusters, 2))
    points = centres[rng.integers(clusters, size=num)] + 0.45 * rng.normal(size=(num, 2))
    return jnp.asarray(points, jnp.float32)


def levels(axes) -> None:
    """Level 1 gives an item's cluster, level 2 its place in it; residuals of all clusters share codewords."""
    points = latents()
    book = quantization.kmeans_codebook(jax.random.key(0), points, num_levels=2, num_codewords=7)
    output = quantization.encode(book.codewords, points)
    for level, place in enumerate(axes):
        place.scatter(*output.residuals[:, level].T, c=output.codes[:, level], s=5, cmap="tab10", alpha=0.5)
        place.scatter(*book.codewords[level].T, c="black", marker="x", s=50, label="codewords")
        place.set_aspect("equal")
        place.set_xticks([]), place.set_yticks([])
    axes[0].set_title("level 1: latents of items")
    axes[1].set_title("level 2: what level 1 left over")
    axes[0].legend(loc="upper left", frameon=False)


def rows(axes) -> None:
    """Items attend almost as their codewords do: a few rows are computed, all others are looked up."""
    items, history = latents(48), latents(40, seed=3)
    book = quantization.kmeans_codebook(jax.random.key(0), items, num_levels=1, num_codewords=6)
    codes = quantization.encode(book.codewords, items).codes[:, 0]
    order = jnp.argsort(codes)
    seen = jnp.ones(len(history), bool)
    exact = attention_weights(items[order], history, seen)
    once = attention_weights(book.codewords[0], history, seen)
    for place, weights, title in zip(axes, (exact, once, once[codes[order]]), (
            "target attention: every candidate", "TARQ: every codeword, once a request",
            "... looked up by the candidates"), strict=True):
        place.imshow(weights, aspect="auto", cmap="Blues", interpolation="nearest")
        place.set(title=title, xlabel="history", xticks=[], yticks=[])
    axes[0].set_ylabel("candidates"), axes[1].set_ylabel("codewords"), axes[2].set_ylabel("candidates")


def tangents(place) -> None:
    """Attention output as a function of a query: exact, looked up, and corrected by its first derivative."""
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(1, 1, 12, 1)), jnp.float32) * scale for scale in (2.0, 1.0))
    mask = jnp.ones((1, 12), bool)
    queries = jnp.linspace(-3, 3, 241)[:, None]
    codewords = jnp.linspace(-2.4, 2.4, 5)[:, None]
    codes = quantization.nearest(queries, codewords)
    expansion = expand(codewords[None], keys, values, mask)
    exact = multi_head_attention(queries[None, None], keys, values, mask)
    order_0 = expansion.means[0, 0, codes, 0]
    order_1 = look_up_expansion(expansion, codes[None], (queries - codewords[codes])[None, None])
    place.plot(queries[:, 0], exact.ravel(), color=GREY, linewidth=5, alpha=0.6, label="target attention")
    place.plot(queries[:, 0], order_0, color=BLUE, drawstyle="steps-mid", label="order 0: the codeword's")
    place.plot(queries[:, 0], order_1.ravel(), color=ORANGE, label="order 1: and its derivative")
    place.plot(codewords[:, 0], expansion.means.ravel(), "kx", label="codewords")
    place.set(xlabel="query", ylabel="attention output", title="what a candidate looks up")
    place.legend(frameon=False)


def costs(place, history: int = 1000, width: int = 64, heads: int = 4, codewords: int = 64) -> None:
    """Multiplications per request, for the equations in docs/mathematics.md."""
    candidates = np.geomspace(100, 100_000, 50)
    each = width // heads
    place.loglog(candidates, 2 * candidates * history * width, color=GREY, label="target attention")
    place.loglog(candidates, 3 * codewords * history * 2 * width + 3 * candidates * width, color=BLUE,
                 label="TARQ, order 0, L=3")
    place.loglog(candidates, codewords * history * width * (2 + each) + candidates * width * each,
                 color=ORANGE, label="TARQ, order 1")
    place.loglog(candidates, candidates * width, color=GREEN, label="two-tower")
    place.set(xlabel="candidates", ylabel="multiplications a request",
              title=f"history {history:,}, D={width}, H={heads}, K={codewords}")
    place.legend(frameon=False)


PICTURES = {"levels": (levels, 2, (9, 4.2)), "rows": (rows, 3, (12, 3.6)), "tangents": (tangents, 1, (6, 4)),
            "costs": (costs, 1, (6, 4))}


def draw_all(folder: Path, kind: str = "svg") -> None:
    """Draws every picture to FOLDER/NAME.KIND."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, panels, size) in PICTURES.items():
        figure, axes = plt.subplots(1, panels, figsize=size, constrained_layout=True)
        draw(axes)
        figure.savefig(folder / f"{name}.{kind}", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]), "png")
