"""Pallas kernels of the core operations, behind their argument `implementation`.

`"xla"` is what XLA makes of plain JAX; `"pallas"` a kernel of this package, or a NotImplementedError that
says why not; None the faster of the two by the table `PREFERRED`, which only measurements may fill
(`python -m benchmarks`), and XLA where the kernel does not fit. A kernel is compiled by Mosaic on a TPU; on
a CPU the same kernel is interpreted, slowly, so that tests can compare its numbers. Under a mesh call it
within `shard_map`, as XLA cannot partition it.

| operation | functions | TPU | NVIDIA |
|---|---|---|---|
| `encode` | `quantization.encode` | all levels in one pass, one-hot on the MXU | XLA |
| `attend` | `attention.multi_head_attention`, `personalized_codebook` | flash attention | XLA |
| `expand` | `expansion.expand` | flash attention, products formed in VMEM | XLA |
| `look_up` | `attention.look_up` | one-hot on the MXU | XLA |
| `look_up_expansion` | `expansion.look_up_expansion` | one-hot on the MXU | XLA |
| `align` | `losses.codebook_alignment` | distances of all levels in VMEM | XLA |

Derivatives are those of the XLA form, computed anew, so that nothing large is kept for them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Implementation = Literal["xla", "pallas"] | None

# (operation, platform) -> "pallas", where it was measured at par or better. None was measured on a TPU yet.
PREFERRED: Mapping[tuple[str, str], str] = {}


def use_pallas(operation: str, implementation: Implementation, refusal: str | None) -> bool:
    """Whether an operation is to run as a kernel.

    Args:
      operation: a name of the table above.
      implementation: what the caller asked for.
      refusal: why the kernel cannot take these arguments; None if it can.

    Raises:
      NotImplementedError: a kernel was asked for that does not take these arguments.
      ValueError: `implementation` is unknown.
    """
    if implementation not in ("xla", "pallas", None):
        raise ValueError(f"implementation is {implementation!r}, expected 'xla', 'pallas' or None")
    if implementation == "pallas" and refusal:
        raise NotImplementedError(f"{operation} has no kernel for this: {refusal}; use implementation='xla'")
    preferred = PREFERRED.get((operation, jax.default_backend())) == "pallas"
    return implementation == "pallas" or (implementation is None and preferred and not refusal)


def with_derivative_of(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, differentiated in either mode as `plain`, of the same arguments, computed anew."""
    function = jax.custom_jvp(kernel)
    recomputed = jax.checkpoint(plain)

    @function.defjvp
    def _(primals, tangents):
        return kernel(*primals), jax.jvp(recomputed, primals, tangents)[1]

    return function
