"""From settings to modules: settings of single models reach them, and missing data is reported."""

import jax.numpy as jnp
import pytest
import workloads

from tarq_jax import quantization
from tarq_jax.config import COMPARED, MODELS
from tarq_jax.models import Compute, FirstOrderTarq, Tarq, TwoTower
from tarq_jax.models.embedding import Tables
from tarq_jax.training.modules import MODULES, make_module


def test_every_name_has_a_module():
    assert tuple(MODULES) == MODELS
    assert set(COMPARED) <= set(MODELS) and {*workloads.BASELINES} == {*MODELS} - {*COMPARED}


def test_settings_reach_the_baselines(tiny_config):
    settings = tiny_config.model
    settings.num_vectors, settings.hash_rounds, settings.hash_bits = 3, 5, 2
    settings.num_selected, settings.category = 7, "item_id"

    def module(name):
        settings.name = name
        return make_module(settings, workloads.SCHEMA)

    assert module("inttower").num_vectors == 3
    assert (module("sdim").rounds, module("sdim").bits) == (5, 2)
    assert module("eta").similarity.keywords == {"rounds": 5, "bits": 2}
    assert module("sim").similarity.keywords == {"field": "item_id"}
    assert module("eta").num_selected == module("sim").num_selected == 7
    for name in workloads.BASELINES:
        assert type(module(name)) is type(workloads.BASELINES[name])
        assert (module(name).width, module(name).num_heads, module(name).hidden) == (4, 2, (4,))


@pytest.mark.parametrize(("order", "expected"), [(0, Tarq), (1, FirstOrderTarq)])
def test_settings_reach_tarq(tiny_config, order, expected):
    """None of them is at its default, so that a module that ignores one differs."""
    settings = tiny_config.model
    settings.order, settings.num_levels, settings.head, settings.decoded = order, 5, "dot", "item"
    settings.aligned_share, settings.student_gradient = 0.5, "teacher"
    settings.assign, settings.pass_through = "cosine", "rotation"
    settings.dtype, settings.remat, settings.attention_block = "bfloat16", True, 4
    module = make_module(settings, workloads.SCHEMA)
    assert type(module) is expected
    assert (module.width, module.num_heads, module.hidden, module.num_levels) == (4, 2, (4,), 5)
    assert (module.head, module.decoded, module.aligned_share) == ("dot", "item", 0.5)
    assert module.student_gradient == "teacher" and module.pass_through is quantization.rotate
    assert module.encode.keywords == {"assign": quantization.nearest_by_cosine, "block": 0}
    assert module.compute == Compute(jnp.dtype("bfloat16"), True, 4)


@pytest.mark.parametrize("name", MODELS)
def test_settings_of_precision_and_memory_reach_every_model(tiny_config, name):
    settings, tables = tiny_config.model, Tables(lambda path: 8)
    settings.name, settings.category = name, "item_id"
    settings.dtype, settings.remat, settings.attention_block = "bfloat16", True, 4
    module = make_module(settings, workloads.SCHEMA, tables)
    assert module.compute == Compute(jnp.dtype("bfloat16"), True, 4) and module.tables is tables


@pytest.mark.parametrize("category", ["", "item_price", "event_type", "nothing"])
def test_a_search_by_category_needs_one(tiny_config, category):
    tiny_config.model.name, tiny_config.model.category = "sim", category
    with pytest.raises(ValueError) as caught:
        make_module(tiny_config.model, workloads.SCHEMA)
    assert str(caught.value) == (
        f"config.model.category is {category!r}, expected a categorical field of the data's items, one of "
        "('item_id',), with config.model.name='sim'")


def test_two_tower_large_encodes_the_history_as_often_as_tarq(tiny_config):
    modules = {}
    for name in ("two_tower_large", "tarq"):
        tiny_config.model.name = name
        modules[name] = make_module(tiny_config.model, workloads.SCHEMA)
    assert isinstance(modules["two_tower_large"], TwoTower) and isinstance(modules["tarq"], FirstOrderTarq)
    assert modules["two_tower_large"].num_encoders == 2  # one for the backbone, one for the teacher
    assert modules["two_tower_large"].hidden == (16,)
