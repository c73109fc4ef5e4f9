"""Pallas kernels of the core operations, selected by their argument `implementation`.

`"xla"` runs the plain JAX implementation. `"pallas"` runs a kernel of this package, or raises
NotImplementedError with the reason. None runs the kernel only if the table `PREFERRED` says that it is faster
for these shapes, and it supports the arguments; otherwise XLA. Only measurements (`python -m benchmarks`) may
add entries to the table. On a TPU, Mosaic compiles a kernel; on a CPU the same kernel is interpreted, slowly,
so that tests can compare its numbers. Under a mesh, call a kernel within `shard_map`, as XLA cannot partition
it. Kernels look up rows by multiplying with one-hot codes, so a NaN or infinity in the table reaches every
candidate; XLA's gather passes it only to candidates that select that row.

Operations with a TPU kernel, and the functions that use them:

- `encode`, `quantization.encode`: all levels in one pass over the latents, one-hot products on the MXU;
- `attend`, `attention.multi_head_attention`: flash attention;
- `expand`, `expansion.expand`: flash attention, products of values and keys formed in VMEM;
- `look_up`, `attention.look_up`: one-hot products on the MXU;
- `look_up_expansion`, `expansion.look_up_expansion`: likewise, with the Jacobians in VMEM;
- `align`, `losses.codebook_alignment`: both distributions of all levels in VMEM.

For NVIDIA's Hopper there are kernels of `encode` and `align`, in float32 for rows of up to 64 numbers, and of
`attend`, in bfloat16. Look-ups have none: XLA fuses a gather with the sum, which we expect to be fast on a
GPU. `personalized_codebook` is `attend` with codewords as queries. Top-k has no kernel: XLA's own takes a
hundredth of a request's time on a CPU. Derivatives are those of the XLA implementation, which is recomputed
for them, so that nothing large is kept.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Implementation = Literal["xla", "pallas"] | None

# operation -> module with its kernel, a function of the operation's name, and a function `refuse_NAME` of the
# same arguments that returns why the kernel does not support them. Modules are imported only when a kernel is
# requested, as importing Pallas takes half a second.
MODULES = {"encode": "encode", "attend": "attention", "expand": "attention", "look_up": "look_up",
           "look_up_expansion": "look_up", "align": "align"}
ON_GPU = ("encode", "attend", "align")  # the operations that have a kernel for NVIDIA GPUs
# (operation, platform) -> whether the kernel was measured to be at least as fast for arguments of these
# shapes. None measured yet.
PREFERRED: Mapping[tuple[str, str], Callable[..., bool]] = {}


def pick(
    operation: str, implementation: Implementation, *arguments: Any, refusal: str | None = None
) -> Callable[..., Any] | None:
    """The kernel to run an operation with, a function of the arguments; None to run it by XLA.

    Args:
      operation: one of the names above.
      implementation: the caller's choice.
      arguments: arguments of the kernel.
      refusal: why no kernel can be used, if the caller knows a reason.

    Raises:
      NotImplementedError: a kernel was requested that does not support these arguments.
      ValueError: `implementation` is unknown.
    """
    if implementation not in ("xla", "pallas", None):
        raise ValueError(f"implementation is {implementation!r}, expected 'xla', 'pallas' or None")
    platform = jax.default_backend()
    if implementation == "xla" or (implementation is None and not _preferred(operation, platform, arguments)):
        return None
    module = importlib.import_module(f"tarq_jax.kernels.{MODULES[operation]}")
    if _symbolic(arguments):
        refusal = refusal or "a size is symbolic, and kernels are compiled for one size"
    if platform == "gpu" and operation not in ON_GPU:
        refusal = "this is a GPU, and the kernel is for a TPU"
    refusal = refusal or getattr(module, f"refuse_{operation}")(*arguments)
    if platform == "gpu":
        refusal = refusal or _refuse_device()
    if refusal and implementation == "pallas":
        raise NotImplementedError(f"{operation} has no kernel for this: {refusal}; use implementation='xla'")
    return None if refusal else getattr(module, operation)


def _preferred(operation: str, platform: str, arguments: Any) -> bool:
    """Whether the kernel was measured to be at least as fast for these shapes; False for symbolic ones."""
    faster = PREFERRED.get((operation, platform))
    return faster is not None and not _symbolic(arguments) and faster(*arguments)


def _symbolic(arguments: Any) -> bool:
    """Whether the size of an axis is symbolic, as in a program that is exported for every size."""
    return not all(isinstance(size, int) for leaf in jax.tree.leaves(arguments) for size in leaf.shape)


def _refuse_device() -> str | None:
    """Why no kernel can run on the GPU of this machine; None if they can.

    This is separate from other refusals, because code may be lowered for another GPU than this machine's.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if str(capability).split(".")[0] == "9":
        return None
    return f"this GPU is of compute capability {capability}, expected 9.x: wgmma is on Hopper alone"


def with_derivative_of(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` with the derivatives, in either mode, of `plain`, which is recomputed for them."""
    function = jax.custom_jvp(kernel)
    recomputed = jax.checkpoint(plain)

    @function.defjvp
    def _(primals, tangents):
        return kernel(*primals), jax.jvp(recomputed, primals, tangents)[1]

    return function
