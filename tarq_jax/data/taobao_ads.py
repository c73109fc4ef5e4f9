"""Taobao display ads (Ali_Display_Ad_Click): will the user click this ad?

The source is a folder with the four files as published, with headers:
`raw_sample.csv` (user, time_stamp, adgroup_id, pid, nonclk, clk), the ads shown in 8 days;
`ad_feature.csv` (adgroup_id, cate_id, campaign_id, customer, brand, price); brand may be NULL;
`user_profile.csv` (userid and eight attributes, some of which may be empty; the last name ends in a space);
`behavior_log.csv` (user, time_stamp, btag, cate, brand), what users did in 22 days; btag is ipv (pv in the
file itself), cart, fav or buy.

A behavior has a category and a brand but no ad. So the item table holds the ads and, besides, each pair of
category and brand as an item of its own. Histories consist of pairs, and share the embeddings of category and
brand with the ads.
"""

import dataclasses
from pathlib import Path
from typing import Any

from tarq_jax.data.sources import LogOptions, PipelineSource, matching_files
from tarq_jax.data.taobao_userbehavior import BEHAVIORS, DAY
from tarq_jax.schema import ITEM_ID, Field, Schema

FIRST = 1_494_000_000  # 2017-05-06, 00:00 in China, when the first ads are shown
HISTORY_DAYS = 15  # days of behaviors before the first ads
FILES = {"shown": "raw_sample.csv", "ads": "ad_feature.csv", "profiles": "user_profile.csv",
         "behaviors": "behavior_log.csv"}
PROFILE = {"cms_segid": 97, "cms_group_id": 13, "final_gender_code": 3, "age_level": 7, "pvalue_level": 4,
           "shopping_level": 4, "occupation": 2, "new_user_class_level": 5}  # number of values, from 0
PLACES = {"430548_1007": 1, "430539_1007": 2}  # values of the context field `pid`; any other is 0


@dataclasses.dataclass(frozen=True)
class AdsOptions(LogOptions):
    """How requests are made: the seventh day of ads is validation, the eighth is test."""

    validation_start: int = FIRST + 6 * DAY
    test_start: int = FIRST + 7 * DAY
    first_time: int = FIRST - HISTORY_DAYS * DAY  # seconds; earlier rows are malformed
    last_time: int = FIRST + 8 * DAY  # seconds; rows from then on are malformed


def make_schema(options: AdsOptions) -> Schema:
    """The fields; `price` is (log(1 + yuan) - 5) / 2, an attribute is its value plus 1, or 0 if empty."""
    del options
    item = [Field(name, "item", "categorical") for name in (ITEM_ID, "cate", "brand", "campaign", "customer")]
    user = [Field(name, "user", "categorical", 1 + values) for name, values in PROFILE.items()]
    return Schema((*item, Field("price", "item", "numeric"), *user,
                   Field("pid", "context", "categorical", 1 + len(PLACES)),
                   Field("behavior", "event", "categorical", 1 + max(BEHAVIORS.values()))))


def _files(options: AdsOptions):
    found: dict[str, Path] = {}
    for name in FILES.values():
        found |= matching_files(f"{options.source.rstrip('/')}/{name}", "source",
                                f"a folder with {', '.join(FILES.values())}")
    return found


def _parts(root: Any, options: AdsOptions) -> Any:
    from tarq_jax.data.beam import ads  # imported here because Beam is an extra

    return ads.parts(root, options)


SOURCE = PipelineSource("taobao_ads", AdsOptions, make_schema, _parts, _files,
                        description="Taobao display ads: clicks on ads, after what was looked at and bought.")
