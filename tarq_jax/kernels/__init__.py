"""Pallas kernels of the core operations, behind their argument `implementation`.

`"xla"` is what XLA makes of plain JAX; `"pallas"` a kernel of this package, or a NotImplementedError that
says why not; None the faster of the two by the table `PREFERRED`, which only measurements may fill
(`python -m benchmarks`), and XLA where the kernel does not fit. A kernel is compiled by Mosaic on a TPU; on
a CPU the same kernel is interpreted, slowly, so that tests can compare its numbers. Under a mesh call it
within `shard_map`, as XLA cannot partition it.

Operations with a kernel for TPUs, by their functions:

- `encode`, `quantization.encode`: all levels in one pass over the latents, one-hot products on the MXU;
- `attend`, `attention.multi_head_attention`: flash attention; for NVIDIA's Hopper too, in bfloat16;
- `expand`, `expansion.expand`: flash attention, products of values and keys formed in VMEM;
- `look_up`, `attention.look_up`: one-hot products on the MXU;
- `look_up_expansion`, `expansion.look_up_expansion`: likewise, with the Jacobians in VMEM;
- `align`, `losses.codebook_alignment`: both distributions of all levels in VMEM.

`personalized_codebook` is `attend` with codewords as queries. Top-k has no kernel: XLA's own reads the scores
once. Derivatives are those of the XLA form, computed anew, so that nothing large is kept for them.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Implementation = Literal["xla", "pallas"] | None

# operation -> module that has its kernel, under its name, and a `refuse_` function of the same arguments that
# says why it does not take them. Imported when a kernel is wanted: Pallas takes half a second.
MODULES = {"encode": "encode", "attend": "attention", "expand": "attention", "look_up": "look_up",
           "look_up_expansion": "look_up", "align": "align"}
ON_GPU = ("attend",)  # the operations that have a kernel for NVIDIA
# (operation, platform) -> "pallas", where it was measured at par or better. None was measured yet.
PREFERRED: Mapping[tuple[str, str], str] = {}


def pick(
    operation: str, implementation: Implementation, *arguments: Any, refusal: str | None = None
) -> Callable[..., Any] | None:
    """The kernel that an operation is to run as, a function of the arguments; None for XLA.

    Args:
      operation: one of the names above.
      implementation: what the caller asked for.
      arguments: of the kernel.
      refusal: why no kernel would do, if the caller knows.

    Raises:
      NotImplementedError: a kernel was asked for that does not take these arguments.
      ValueError: `implementation` is unknown.
    """
    if implementation not in ("xla", "pallas", None):
        raise ValueError(f"implementation is {implementation!r}, expected 'xla', 'pallas' or None")
    platform = jax.default_backend()
    if (implementation or PREFERRED.get((operation, platform), "xla")) == "xla":
        return None
    module = importlib.import_module(f"tarq_jax.kernels.{MODULES[operation]}")
    if platform == "gpu" and operation not in ON_GPU:
        refusal = "this is a GPU, and the kernel is for a TPU"
    refusal = refusal or getattr(module, f"refuse_{operation}")(*arguments)
    if refusal and implementation == "pallas":
        raise NotImplementedError(f"{operation} has no kernel for this: {refusal}; use implementation='xla'")
    return None if refusal else getattr(module, operation)


def with_derivative_of(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, differentiated in either mode as `plain`, of the same arguments, computed anew."""
    function = jax.custom_jvp(kernel)
    recomputed = jax.checkpoint(plain)

    @function.defjvp
    def _(primals, tangents):
        return kernel(*primals), jax.jvp(recomputed, primals, tangents)[1]

    return function
