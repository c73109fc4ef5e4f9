"""A complete training step of TARQ against the same step in PyTorch, on one device in one run.

    pip install -e '.[bench]'
    python -m benchmarks.training_step --json=benchmarks/results/training_step.json

Both use the model, sizes, batch, losses and AdamW of `configs/synthetic.py` (order 1, EMA codebook) and
`configs/synthetic_order_0.py`. PyTorch starts from our parameters; every loss must agree in each of `CHECKED`
steps, or the command fails. Steps are measured in turns (ours, PyTorch, ours, ...) with batches ready in
memory; the rows give medians. On a machine with more than two cores, call it under `taskset -c 0,1`.
PyTorch's threads wait for each other, so one thread may be faster than two if the machine does other work:
both numbers are measured. With `--device=cuda` both train on a GPU, with all products in float32; losses may
then differ ten times as much.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks.peers import check_installed
from configs import synthetic, synthetic_order_0
from tarq_jax import cli, data, reporting
from tarq_jax.training import setup
from tarq_jax.types import Batch

CONFIG_NAMES = flags.DEFINE_list("configs", ["order 1", "order 0"], "Configurations to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each contender.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Steps per turn.", lower_bound=1)
THREADS = flags.DEFINE_list("threads", ["2", "1"], "PyTorch's threads; JAX uses all cores.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Of PyTorch; has to be that of JAX.")
JSON = cli.json_flag()

CONFIGS = {"order 1": synthetic, "order 0": synthetic_order_0}
BATCHES, CHECKED, TOLERANCE = 16, 5, {"cpu": 1e-3, "cuda": 1e-2}


class Workload(NamedTuple):
    """What both implementations train."""

    config: ml_collections.ConfigDict
    dataset: data.Dataset
    batches: list[Batch]  # with NumPy leaves
    parts: setup.Setup  # on one device, with a fitted codebook in use


class Contender(NamedTuple):
    """One implementation of the step; it continues from its last state."""

    name: str
    step: Callable[[int], Any]  # index of a batch -> the loss, perhaps not computed yet
    wait: Callable[[Any], Any]  # waits until such losses are computed
    losses: Callable[[int], np.ndarray]  # the same step, with all losses, on the host


def make_workload(config: ml_collections.ConfigDict) -> Workload:
    """The configuration's data with fewer requests, and a state just after the codebook is initialised."""
    config.steps = 100_000  # far from the end of the learning rate's schedule
    options = {"train_requests": 2048, "validation_requests": 1, "test_requests": 1} | {
        name: config.data[name] for name in ("num_items", "history_length", "sharpness", "seed")}
    dataset = data.synthetic.generate(data.SyntheticOptions(**options))
    shapes, parts = setup.batch_shapes(dataset), setup.set_up(config, dataset)
    state = setup.initialise_codebook(config, parts.objective, parts.state, dataset, shapes, parts.mesh)
    state = state.replace(step=state.step + config.codebook.start + 1)  # no revival in the first steps
    batches = data.train_batches(dataset, "train", batch_size=config.batch_size, seed=0, **shapes)
    return Workload(config, dataset, list(itertools.islice(batches, BATCHES)), parts._replace(state=state))


def ours(workload: Workload) -> Contender:
    """The compiled training step, including health metrics and revival."""
    way, mesh, objective, optimizer, state = workload.parts
    step = setup.compile_step(workload.config, objective, optimizer, mesh, state)
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    batches = [way.put(batch, mesh) for batch in workload.batches]

    def take(index):
        nonlocal state
        state, metrics = step(state, batches[index])
        return metrics

    def losses(index):
        from benchmarks.peers.torch_tarq import LOSSES

        metrics = jax.device_get(take(index))
        return np.array([metrics[f"loss/{name}"] for name in LOSSES])

    return Contender("tarq_jax", lambda index: take(index)["loss"], jax.block_until_ready, losses)


def pytorch(workload: Workload, compiled: bool, threads: int, device: str = "cpu") -> Contender:
    """The PyTorch peer, eager or with model and codebook update under `torch.compile`; AdamW is fused."""
    import torch

    from benchmarks.peers import from_flax, torch_tarq

    config, settings = workload.config, workload.config.optimizer
    features = next(field for field in workload.dataset.schema.fields if field.name == "features")
    sizes = torch_tarq.Sizes(
        num_items=workload.dataset.schema.num_items, vector=features.size, width=config.model.width,
        heads=config.model.num_heads, hidden=tuple(config.model.hidden), levels=config.model.num_levels,
        codewords=config.model.num_codewords, order=config.model.order,
        aligned_share=config.model.aligned_share)
    model, codebook = from_flax.torch_model(workload.parts.state, sizes)
    model = model.to(device)
    codebook = torch_tarq.Codebook(*(part.to(device) for part in codebook))
    decayed = [value for name, value in model.named_parameters() if name != "codewords"]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if sizes.order == 0:
        groups.append({"params": [model.codewords], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.steps)
    loss_weights = torch.tensor([config.loss_weights[name] for name in torch_tarq.LOSSES], device=device)
    batches = [torch_tarq.TorchBatch(*(column.to(device) for column in from_flax.torch_batch(batch)))
               for batch in workload.batches]
    forward, update = ((torch.compile(model), torch.compile(torch_tarq.update_codebook)) if compiled
                       else (model, torch_tarq.update_codebook))

    def take(index):
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        batch = batches[index]
        optimizer.zero_grad(set_to_none=True)
        losses, _, codes, residuals, _ = forward(batch)
        (losses * loss_weights).sum().backward()
        optimizer.step()
        schedule.step()
        update(model, codebook, codes, residuals, batch.weights > 0, config.codebook.decay)
        return losses

    where = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
    name = f"PyTorch{', torch.compile' if compiled else ''}, {where}"
    return Contender(name, lambda index: take(index)[0].detach(), lambda found: torch.stack(found).cpu(),
                     lambda index: take(index).detach().cpu().numpy())


def check_same(own: Contender, peer: Contender, tolerance: float = TOLERANCE["cpu"]) -> float:
    """Largest relative difference of any loss over the first steps; raises ValueError above the tolerance."""
    worst = 0.0
    for index in range(CHECKED):
        expected, found = own.losses(index), peer.losses(index)
        worst = max(worst, float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-3))))
        if not worst < tolerance:
            raise ValueError(f"{peer.name}: losses of step {index} are {found}, expected {expected}")
    return worst


def seconds_of_turns(contenders: list[Contender], console: Console, title: str) -> dict[str, list[float]]:
    """Seconds per step of each contender, one number per turn; the first turn is a warm-up and left out."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in track(range(ROUNDS.value + 1), title, console=console):
        for contender in contenders:
            start = time.perf_counter()
            found = [contender.step(index % BATCHES) for index in range(STEPS.value)]
            contender.wait(found)
            if turn:
                seconds[contender.name].append((time.perf_counter() - start) / STEPS.value)
    return seconds


def compare(name: str, threads: list[int], console: Console) -> Iterator[dict[str, Any]]:
    """A row per contender: candidate examples per second, and its time divided by ours."""
    workload = make_workload(CONFIGS[name].get_config())
    peers = [pytorch(workload, compiled, number, DEVICE.value)
             for number in threads for compiled in (False, True)]
    differences = [check_same(ours(workload), peer, TOLERANCE[DEVICE.value]) for peer in peers]
    contenders = [ours(workload), *peers]
    seconds = seconds_of_turns(contenders, console, name)
    examples = float(np.mean([batch.candidate_mask.sum() for batch in workload.batches]))
    own = np.median(seconds["tarq_jax"])
    for contender, difference in zip(contenders, [0.0, *differences], strict=True):
        lower, median, upper = np.quantile(seconds[contender.name], [0.25, 0.5, 0.75])
        yield {"config": name, "model": contender.name, "examples_per_second": examples / median,
               "step_ms": 1e3 * median, "step_spread_ms": 1e3 * (upper - lower), "ratio": median / own,
               "loss_difference": difference}


def main() -> None:
    """Measures what the flags ask for and prints the table."""
    names = cli.names(CONFIG_NAMES, CONFIGS)
    threads = cli.whole_numbers(THREADS, "numbers of threads like 2,1")
    if (found := jax.default_backend().replace("gpu", "cuda")) != DEVICE.value:
        cli.wrong_call(f"--device is {DEVICE.value!r}, expected {found!r}, on which JAX runs")
    check_installed("torch")
    jax.config.update("jax_default_matmul_precision", "highest")
    threads = threads if DEVICE.value == "cpu" else [1]
    rows = [row for name in names for row in compare(name, threads, Console())]
    reporting.print_table(rows, "a training step")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
