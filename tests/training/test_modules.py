"""From settings to modules: settings of single models reach them, and missing data is reported."""

import pytest
import workloads

from tarq_jax.config import COMPARED, MODELS
from tarq_jax.models import FirstOrderTarq, TwoTower
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
