"""Taobao UserBehavior: which item does a user open next, among negatives drawn by popularity?

`UserBehavior.csv` has no header and one row per event: user_id, item_id, category_id, behavior_type (pv, buy,
cart or fav), timestamp; 100 million rows from 9 days. Rows outside these days, a few hundredths of a percent,
are malformed. Every event of a kind in `targets` is a positive; positives of the same user in the same second
form one request.
"""

import dataclasses
from typing import Any

from tarq_jax.data.sources import LogOptions, PipelineSource, matching_files, require
from tarq_jax.schema import ITEM_ID, Field, Schema

DAY = 86_400
FIRST = 1_511_539_200  # 2017-11-25, 00:00 in China
BEHAVIORS = {"pv": 1, "ipv": 1, "cart": 2, "fav": 3, "buy": 4}  # values of the event field `behavior`


@dataclasses.dataclass(frozen=True)
class UserBehaviorOptions(LogOptions):
    """How requests are made: the eighth day is validation, the ninth is test."""

    validation_start: int = FIRST + 7 * DAY
    test_start: int = FIRST + 8 * DAY
    num_negatives: int = 15
    targets: str = "pv"  # kinds of events that are predicted, such as "pv,buy"
    first_time: int = FIRST  # seconds; earlier events are malformed
    last_time: int = FIRST + 9 * DAY  # seconds; events from then on are malformed

    def __post_init__(self):
        super().__post_init__()
        require(set(self.targets.split(",")) <= BEHAVIORS.keys(), "targets", self.targets,
                f"kinds of {sorted(BEHAVIORS)}, separated by commas")
        require(self.first_time < self.last_time, "last_time", self.last_time,
                f"more than first_time ({self.first_time})")


def make_schema(options: UserBehaviorOptions) -> Schema:
    """The fields."""
    del options
    return Schema((Field(ITEM_ID, "item", "categorical"), Field("category", "item", "categorical"),
                   Field("behavior", "event", "categorical", 1 + max(BEHAVIORS.values()))))


def _files(options: UserBehaviorOptions):
    return matching_files(options.source, "source", "UserBehavior.csv")


def _parts(root: Any, options: UserBehaviorOptions) -> Any:
    from tarq_jax.data.beam import userbehavior  # imported here because Beam is an extra

    return userbehavior.parts(root, options)


SOURCE = PipelineSource("taobao_userbehavior", UserBehaviorOptions, make_schema, _parts, _files,
                        description="Taobao UserBehavior: the next item among negatives drawn by popularity.")
