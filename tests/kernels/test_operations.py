"""Every implementation of an operation of `benchmarks.operations` gives the numbers of the textbook."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from benchmarks import measuring, operations
from benchmarks.operations import OPERATIONS
from benchmarks.workloads import WORKLOADS
from tarq_jax import attention, expansion, kernels, losses, quantization
from tarq_jax.kernels import align_gpu, attention_gpu, encode_gpu, hopper
from tarq_jax.types import Expansion

KERNELS = [name for name, operation in OPERATIONS.items() if "pallas" in operation.implementations]
WAYS = [(name, way) for name, operation in OPERATIONS.items() for way in operation.implementations
        if way not in ("plain", "xla_whole")]  # at the sizes of tests `xla` takes everything together


@functools.cache
def expected(name, workload, direction="forward", dtype=jnp.float32):
    """The result of `plain`, in float32, for arguments that are rounded to a type."""
    operation = OPERATIONS[name]
    plain = operation.implementations["plain"]
    function = operations.gradient(operation, plain) if direction == "gradient" else plain
    return jax.jit(function)(*(as_float32(array) for array in arguments(name, workload, dtype)))


@functools.cache
def arguments(name, workload, dtype=jnp.float32):
    return operations.make_arguments(OPERATIONS[name], WORKLOADS[workload], dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_specs_are_those_of_the_arguments(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        made = operations.make_arguments(OPERATIONS[name], WORKLOADS["odd"], dtype)
        specs = operations.specs(OPERATIONS[name], WORKLOADS["odd"], dtype)
        assert [(spec.shape, spec.dtype) for spec in specs] == [(array.shape, array.dtype) for array in made]


def as_float32(array):
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def run(function, name, way, workload, dtype=jnp.float32):
    """Calls the function with its arguments prepared for this way; preparation on the host is not traced."""
    found = arguments(name, workload, dtype)
    if way not in OPERATIONS[name].prepared:
        return jax.jit(function)(*found)
    prepared = OPERATIONS[name].prepared[way](*found)
    return function(*prepared)


@pytest.mark.parametrize("workload", ["odd", "single", "blocks"])
@pytest.mark.parametrize("name, way", WAYS)
def test_numbers_are_those_of_the_textbook(name, way, workload):
    found = run(OPERATIONS[name].implementations[way], name, way, workload)
    assert measuring.error(found, expected(name, workload)) < 1e-5


@pytest.mark.parametrize("name, way", [(name, way) for name, way in WAYS if OPERATIONS[name].differentiable
                                       and way not in OPERATIONS[name].prepared])
def test_gradients_are_those_of_the_textbook(name, way):
    operation = OPERATIONS[name]
    found = run(operations.gradient(operation, operation.implementations[way]), name, way, "odd")
    assert measuring.error(found, expected(name, "odd", "gradient")) < 1e-5


@pytest.mark.parametrize("name, way", [(name, way) for name in KERNELS for way in ("pallas", "xla")])
def test_numbers_in_bfloat16(name, way):
    found = run(OPERATIONS[name].implementations[way], name, way, "odd", jnp.bfloat16)
    floats = [leaf for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in floats)
    assert measuring.error(jax.tree.map(as_float32, found), expected(name, "odd", dtype=jnp.bfloat16)) < 0.03


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_of_kernels_in_bfloat16(name):
    operation = OPERATIONS[name]
    function = operations.gradient(operation, operation.implementations["pallas"])
    found = run(function, name, "pallas", "odd", jnp.bfloat16)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}
    exact = expected(name, "odd", "gradient", jnp.bfloat16)
    assert measuring.error(jax.tree.map(as_float32, found), exact) < 0.1


@pytest.mark.parametrize("name", ["attend", "personalize", "expand"])
def test_kernels_where_the_mask_has_gaps(name):
    """The first block of positions and single ones after it are masked."""
    *others, mask = arguments(name, "blocks")
    mask = jnp.asarray(np.random.default_rng(0).random(mask.shape) < 0.5).at[:, :600].set(False)
    found, exact = (jax.jit(OPERATIONS[name].implementations[way])(*others, mask)
                    for way in ("pallas", "plain"))
    assert measuring.error(found, exact) < 1e-5


@pytest.mark.parametrize("direction", ["forward", "gradient"])
@pytest.mark.parametrize("workload", ["odd", "paper"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_lower_for_a_tpu(name, workload, direction):
    function = measuring.function_of(measuring.Key(name, workload, "pallas", direction))
    specs = operations.specs(OPERATIONS[name], WORKLOADS[workload])
    assert "tpu_custom_call" in jax.jit(function).trace(*specs).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_is_the_default_where_it_was_not_measured(name):
    operation = OPERATIONS[name]
    assert not any(preferred == name for preferred, _ in kernels.PREFERRED)
    default = {
        "encode": lambda codewords, latents: quantization.encode(codewords, latents),
        "look_up_expansion": lambda means, jacobians, codes, residuals: expansion.look_up_expansion(
            Expansion(means, jacobians), codes[None], residuals[None]),
    }.get(name)
    if default is None:
        return
    specs = operations.specs(operation, WORKLOADS["single"])
    text = jax.jit(default).trace(*specs).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text


def history(width, dtype=jnp.bfloat16, seed=0):
    """Queries, keys, values and mask of two requests; the second one has an empty history."""
    rng = np.random.default_rng(seed)
    queries, keys, values = (jnp.asarray(rng.normal(size=(2, 2, length, width)), dtype)
                             for length in (70, 130, 130))
    return queries, keys, values, jnp.asarray(rng.random((2, 130)) < 0.6).at[1].set(False)


# Kernels for NVIDIA run in Mosaic GPU's own interpreter, and lower for a GPU that this machine does not have.


def lowered_for_nvidia(function, *arrays):
    """Whether a kernel is in the program, and XLA cannot undo the rounding that splits float32 in terms."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return "mosaic_gpu" in text and (arrays[-1].dtype != jnp.float32 or "reduce_precision" in text)


@pytest.mark.parametrize("width, centre", [(64, 0.0), (24, 100.0)])
def test_encoding_on_a_gpu(width, centre):
    """Levels of several blocks and of one codeword, far from the origin too: the codes are those of XLA."""
    rng = np.random.default_rng(width)
    levels = [jnp.asarray(rng.normal(size=(size, width)) + centre, jnp.float32) for size in (70, 1, 130)]
    latents = jnp.asarray(rng.normal(size=(70, width)) + 3 * centre, jnp.float32)
    found = encode_gpu.encode(levels, latents, interpret=InterpretGPUParams())
    np.testing.assert_array_equal(found, quantization.encode(levels, latents).codes)


def test_a_codeword_far_from_all_others_changes_no_code_on_a_gpu():
    rng = np.random.default_rng(0)
    levels = [rng.normal(size=(size, 16)).astype(np.float32) for size in (70, 20)]
    latents = jnp.asarray(rng.normal(size=(70, 16)), jnp.float32)
    far = [jnp.asarray(np.concatenate([np.full((1, 16), 1e5, np.float32), level])) for level in levels]
    found = encode_gpu.encode(far, latents, interpret=InterpretGPUParams())
    np.testing.assert_array_equal(found, quantization.encode(levels, latents).codes + 1)


def test_encoding_lowers_for_a_gpu():
    encode = functools.partial(quantization.encode, implementation="pallas")
    levels, latents = [jnp.ones((size, 24)) for size in (70, 1)], jnp.ones((70, 24))
    total = jax.value_and_grad(lambda *given: encode(*given).quantized.sum())
    assert lowered_for_nvidia(total, levels, latents)
    both = [[level] * 2 for level in levels], [latents] * 2
    assert lowered_for_nvidia(jax.vmap(lambda *given: encode(*given).codes), *jax.tree.map(
        jnp.stack, both, is_leaf=lambda leaf: isinstance(leaf[0], jax.Array)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_encoding_of_nan_on_a_gpu():
    """The codes of latents that are not finite are the last ones, as by XLA."""
    rng = np.random.default_rng(0)
    levels = [rng.normal(size=(size, 16)).astype(np.float32) for size in (70, 20)]
    latents = rng.normal(size=(4, 16)).astype(np.float32)
    latents[1], latents[2, 3] = np.nan, np.inf
    found = encode_gpu.encode(jax.tree.map(jnp.asarray, levels), jnp.asarray(latents),
                              interpret=InterpretGPUParams())
    np.testing.assert_array_equal(found, quantization.encode(levels, latents).codes)
    assert found[1:3].tolist() == [[69, 19]] * 2


@pytest.mark.parametrize("workload", ["odd", "single"])
def test_alignment_on_a_gpu(workload):
    arrays = arguments("align", workload)
    found = align_gpu.align(*arrays, interpret=InterpretGPUParams())
    assert measuring.error(found, expected("align", workload)) < 1e-6


def test_alignment_on_a_gpu_with_several_blocks_of_codewords():
    sizes = WORKLOADS["odd"]._replace(G=70, K=130)
    arrays = operations.make_arguments(OPERATIONS["align"], sizes)
    found = align_gpu.align(*arrays, interpret=InterpretGPUParams())
    assert measuring.error(found, OPERATIONS["align"].implementations["plain"](*arrays)) < 1e-6


def test_alignment_lowers_for_a_gpu():
    arrays = arguments("align", "odd")
    align = functools.partial(losses.codebook_alignment, implementation="pallas")
    assert lowered_for_nvidia(jax.vmap(align), *(jnp.stack([array] * 2) for array in arrays))
    assert lowered_for_nvidia(jax.value_and_grad(lambda *given: align(*given).sum()), *arrays)


@pytest.mark.parametrize("align", [
    functools.partial(align_gpu.align, interpret=InterpretGPUParams()),
    functools.partial(losses.codebook_alignment, implementation="pallas"), losses.codebook_alignment])
def test_alignment_far_from_the_origin(align):
    """A translation of all, by the first level's codewords, changes only roundings of the arguments."""
    latents, outputs, codewords, personalized, chosen, attended = arguments("align", "odd")
    first = jnp.zeros((len(codewords), 1, 1)).at[0].set(100.0)
    moved = (latents + 100, outputs + 100, codewords + first, personalized + first,
             chosen + first[:, 0], attended + first[:, 0])
    assert measuring.error(align(*moved), expected("align", "odd")) < 1e-4


@pytest.mark.parametrize("align", [
    functools.partial(align_gpu.align, interpret=InterpretGPUParams()),
    functools.partial(losses.codebook_alignment, implementation="pallas"), losses.codebook_alignment])
def test_alignment_with_a_codeword_far_from_all_others(align):
    """Its probability is 0 in both distributions. What it attends to is not far from what the others do."""
    latents, outputs, codewords, personalized, chosen, attended = arguments("align", "odd")
    far = [jnp.pad(words, [(0, 0)] * (words.ndim - 2) + [(1, 0), (0, 0)], constant_values=value)
           for words, value in ((codewords, 1e4), (personalized, 2.0))]
    assert measuring.error(align(latents, outputs, *far, chosen, attended), expected("align", "odd")) < 1e-4


def test_alignment_on_a_gpu_is_zero_where_distributions_agree():
    """Even where the first codewords, which others are relative to, are far from everything."""
    latents, _, codewords, _, chosen, _ = arguments("align", "odd")
    codewords = codewords.at[:, 0].set(20.0)
    personalized = jnp.broadcast_to(codewords, (len(latents), *codewords.shape)).at[:, :, 0].set(-20.0)
    found = align_gpu.align(latents, latents, codewords, personalized, chosen, chosen,
                            interpret=InterpretGPUParams())
    np.testing.assert_allclose(found, 0.0, atol=1e-5)


@pytest.mark.parametrize("width", hopper.WIDTHS)
def test_attention_on_a_gpu(width):
    arrays = history(width)
    found = attention_gpu.attend(*arrays, interpret=InterpretGPUParams())
    exact = OPERATIONS["attend"].implementations["plain"](*map(as_float32, arrays))
    assert not np.any(np.asarray(found[1])) and measuring.error(as_float32(found), exact) < 0.01
    attend = functools.partial(attention.multi_head_attention, implementation="pallas")
    assert lowered_for_nvidia(attend, *arrays)
    assert lowered_for_nvidia(jax.value_and_grad(lambda *given: as_float32(attend(*given)).sum()), *arrays)


@pytest.mark.parametrize("width, dtype, complaint", [
    (16, jnp.float32, "queries are float32, expected bfloat16 on a GPU"),
    (24, jnp.bfloat16, r"heads are 24 wide, expected one of \(16, 32, 64\) on a GPU"),
])
def test_attention_on_a_gpu_refuses(monkeypatch, width, dtype, complaint):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match=complaint):
        attention.multi_head_attention(*history(width, dtype), implementation="pallas")
    with pytest.raises(NotImplementedError, match="look_up has no kernel for this: this is a GPU"):
        attention.look_up(*arguments("look_up", "odd"), implementation="pallas")


def test_encoding_and_alignment_on_a_gpu_refuse_wide_rows(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match="latents are 65 wide, expected at most 64 on a GPU"):
        quantization.encode(jnp.zeros((1, 3, 65)), jnp.zeros((5, 65)), implementation="pallas")
    with pytest.raises(NotImplementedError, match="latents are 65 wide, expected at most 64 on a GPU"):
        losses.codebook_alignment(
            *jnp.zeros((2, 2, 3, 65)), jnp.zeros((3, 4, 65)), jnp.zeros((2, 3, 4, 65)),
            *jnp.zeros((2, 2, 3, 3, 65)), implementation="pallas")


@pytest.mark.parametrize("capability, complaint", [
    ("9.0", None), ("8.0", "compute capability 8.0, expected 9.x"), ("10.0", "compute capability 10.0"),
    ("gfx942", "compute capability gfx942"),
])
def test_kernels_for_nvidia_are_for_hopper(monkeypatch, capability, complaint):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    calls = {"attend": history(16)} | {name: arguments(name, "odd") for name in ("encode", "align")}
    assert calls.keys() == set(kernels.ON_GPU)
    for name, arrays in calls.items():
        if complaint is None:
            assert kernels.pick(name, "pallas", *arrays) is not None
            continue
        with pytest.raises(NotImplementedError, match=complaint):
            kernels.pick(name, "pallas", *arrays)
        assert kernels.pick(name, None, *arrays) is None


# What a kernel refuses


def encode(**options):
    return quantization.encode(jnp.zeros((2, 3, 4)), jnp.zeros((5, 4)), **options)


@pytest.mark.parametrize("call, complaint", [
    (lambda: encode(assign=quantization.nearest_by_cosine, implementation="pallas"), "expected nearest"),
    (lambda: quantization.encode(jnp.zeros((1, 3, 4)), jnp.zeros((0, 4)), implementation="pallas"),
     r"shape \(0, 4\)"),
    (lambda: quantization.encode(jnp.zeros((1, 2**14, 256)), jnp.zeros((5, 256)), implementation="pallas"),
     "codewords and blocks take 51412992 bytes of VMEM, expected at most 16777216"),
    # blocks alone, whatever the tables
    (lambda: quantization.encode(jnp.zeros((1, 2, 2**13)), jnp.zeros((256, 2**13)), implementation="pallas"),
     "of VMEM"),
    (lambda: attention.multi_head_attention(
        *jnp.zeros((3, 1, 1, 512, 4096)), jnp.ones((1, 512), bool), implementation="pallas"), "blocks take"),
    (lambda: expansion.expand(*jnp.zeros((1, 1, 256, 64)), *jnp.zeros((2, 1, 1, 512, 64)),
                              jnp.ones((1, 512), bool), implementation="pallas"), "blocks take"),
    (lambda: attention.look_up(jnp.zeros((1, 1, 4, 2**15)), jnp.zeros((1, 256, 1), int),
                               implementation="pallas"), "personalized and blocks take"),
    (lambda: expansion.look_up_expansion(
        Expansion(jnp.zeros((1, 1, 4, 128)), jnp.zeros((1, 1, 4, 128, 128))), jnp.zeros((1, 256), int),
        jnp.zeros((1, 1, 256, 128)), implementation="pallas"), "means and jacobians and blocks take"),
    (lambda: losses.codebook_alignment(
        *jnp.zeros((2, 1, 128, 2**13)), jnp.zeros((1, 4, 2**13)), jnp.zeros((1, 1, 4, 2**13)),
        *jnp.zeros((2, 1, 128, 1, 2**13)), implementation="pallas"), "codewords and personalized and blocks"),
    (lambda: quantization.encode(jnp.zeros((1, 3, 4), jnp.float16), jnp.zeros((5, 4)),
                                 implementation="pallas"), "types are float16, float32"),
    (lambda: attention.look_up(jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 0, 3), int), implementation="pallas"),
     r"shapes \(2, 3, 4, 5\) and \(2, 0, 3\)"),
    (lambda: expansion.look_up_expansion(
        Expansion(jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3, 4, 5, 5))), jnp.zeros((2, 0), int),
        jnp.zeros((2, 3, 0, 5)), implementation="pallas"), r"shapes \(2, 3, 4, 5, 5\) and \(2, 0\)"),
    (lambda: losses.codebook_alignment(
        *jnp.zeros((2, 2, 0, 5)), jnp.zeros((3, 4, 5)), jnp.zeros((2, 3, 4, 5)), *jnp.zeros((2, 2, 0, 3, 5)),
        implementation="pallas"), r"shapes \(2, 0, 5\) and \(2, 3, 4, 5\)"),
])
def test_a_kernel_says_what_it_does_not_take(call, complaint):
    with pytest.raises(NotImplementedError, match=complaint):
        call()


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="implementation is 'cuda', expected 'xla', 'pallas' or None"):
        encode(implementation="cuda")


def test_none_falls_back_where_the_kernel_does_not_fit(monkeypatch):
    monkeypatch.setattr(kernels, "PREFERRED", {
        ("encode", jax.default_backend()): lambda levels, latents: latents.size > 100})
    codewords, latents = arguments("encode", "odd")
    kernel = jax.make_jaxpr(quantization.encode)(codewords, latents)
    assert "pallas_call" in str(kernel)
    assert "pallas_call" not in str(jax.make_jaxpr(quantization.encode)(codewords, latents[:1, :2]))
    items, = export.symbolic_shape("m")  # a program for every size
    spec = jax.ShapeDtypeStruct((items, latents.shape[-1]), latents.dtype)
    export.export(jax.jit(lambda latents: quantization.encode(codewords, latents).codes))(spec)
    with pytest.raises(NotImplementedError, match="encode has no kernel for this: a size is symbolic"):
        jax.eval_shape(functools.partial(quantization.encode, codewords, implementation="pallas"), spec)
    cosine = functools.partial(quantization.encode, assign=quantization.nearest_by_cosine)
    assert "pallas_call" not in str(jax.make_jaxpr(cosine)(codewords, latents))


@pytest.mark.parametrize("way", ["xla", "pallas"])
def test_codes_beyond_the_last_are_taken_for_it(way):
    """They are clipped, forward and backward; they give neither zeros nor NaN."""
    table, codes = arguments("look_up", "odd")
    means, jacobians, first, residuals = arguments("look_up_expansion", "odd")
    first, residuals = (jnp.broadcast_to(one, (len(means), *one.shape)) for one in (first, residuals))
    last = table.shape[2] - 1, means.shape[2] - 1
    beyond, most = (jnp.full_like(codes, last[0] + more) for more in (3, 0))
    for function in (attention.look_up, jax.grad(lambda *both, **way: attention.look_up(*both, **way).sum())):
        np.testing.assert_allclose(function(table, beyond, implementation=way),
                                   function(table, most, implementation="xla"), rtol=1e-5)

    def changed(means, jacobians, residuals, more, way):
        return expansion.look_up_expansion(Expansion(means, jacobians), jnp.full_like(first, last[1] + more),
                                           residuals, implementation=way)

    for function in (changed, jax.grad(lambda *given: jnp.square(changed(*given)).sum(), argnums=(0, 1, 2))):
        for one, other in zip(jax.tree.leaves(function(means, jacobians, residuals, 3, way)),
                              jax.tree.leaves(function(means, jacobians, residuals, 0, "xla")), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_kernels_compose_with_vmap_and_forward_mode():
    codes, residuals = arguments("look_up_expansion", "odd")[2:]
    expanded = Expansion(*arguments("look_up_expansion", "odd")[:2])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), expanded)

    def look_up(expanded, residuals, way):
        both = (jnp.broadcast_to(array, (2, *array.shape)) for array in (codes, residuals))
        return expansion.look_up_expansion(expanded, *both, implementation=way)

    for function in (
        lambda way: jax.vmap(functools.partial(look_up, residuals=residuals, way=way))(stacked),
        lambda way: jax.jvp(lambda moved: look_up(expanded, moved, way), (residuals,), (residuals,)),
    ):
        for one, other in zip(*(jax.tree.leaves(jax.jit(functools.partial(function, way))())
                                for way in ("xla", "pallas")), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
