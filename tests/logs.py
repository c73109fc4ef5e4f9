"""Small files in the formats of the logs that Beam prepares."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tarq_jax.data import taobao_ads, taobao_userbehavior
from tarq_jax.data.taobao_userbehavior import DAY

PROFILE_HEADER = "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level," \
                 "occupation,new_user_class_level "


def write(path: Path, lines: Iterable[object]) -> Path:
    """Writes a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def userbehavior_rows(seed: int = 0, users: int = 20, events: int = 25) -> list[tuple]:
    """(user, item, category, behavior, time), shuffled; some rows have the same second."""
    rng = np.random.default_rng(seed)
    first = taobao_userbehavior.FIRST
    kinds = ["pv", "pv", "buy", "cart", "fav"]
    return [(int(user) + 1, int(item) * 3, int(item) % 5 + 1, str(rng.choice(kinds)),
             first + int(rng.integers(0, 9 * 24)) * 3600)
            for user, item in zip(rng.permutation(np.arange(users * events) % users),
                                  rng.integers(1, 40, users * events), strict=True)]


def write_userbehavior(folder: Path) -> dict[str, str]:
    """Writes a file in the form of UserBehavior.csv; returns the options of its data set."""
    rows = [",".join(map(str, row)) for row in userbehavior_rows()]
    return {"source": str(write(folder / "UserBehavior.csv", rows))}


def ads_rows(seed: int = 0) -> dict[str, list[tuple]]:
    """Rows of each of the four files."""
    rng, first = np.random.default_rng(seed), taobao_ads.FIRST

    def times(start: int, stop: int, num: int) -> list[int]:
        return (first + 3600 * rng.integers(24 * start, 24 * stop, num)).tolist()

    shown, log = 160, 400
    clicks = rng.integers(0, 2, shown)
    return {
        "shown": list(zip(rng.integers(1, 16, shown).tolist(), times(0, 8, shown),
                          rng.integers(1, 13, shown).tolist(),
                          rng.choice(["430548_1007", "430539_1007"], shown).tolist(),
                          (1 - clicks).tolist(), clicks.tolist(), strict=True)),
        "ads": [(ad, ad % 4 + 1, ad % 5 + 1, ad % 6 + 1, "NULL" if ad == 3 else ad % 3 + 1, 9.5 * ad)
                for ad in range(1, 13)],
        "profiles": [(user, user % 97, user % 13, user % 2 + 1, user % 7, "" if user % 3 else user % 3 + 1,
                      user % 3 + 1, user % 2, "" if user % 4 else 3) for user in range(1, 13)],
        "behaviors": list(zip(rng.integers(1, 16, log).tolist(), times(-10, 8, log),
                              rng.choice(["pv", "cart", "fav", "buy"], log).tolist(),
                              rng.integers(1, 5, log).tolist(), rng.integers(1, 4, log).tolist(),
                              strict=True)),
    }


ADS_HEADERS = {"shown": "user,time_stamp,adgroup_id,pid,nonclk,clk",
               "ads": "adgroup_id,cate_id,campaign_id,customer,brand,price", "profiles": PROFILE_HEADER,
               "behaviors": "user,time_stamp,btag,cate,brand"}


def write_ads(folder: Path, rows: dict[str, list[tuple]] | None = None) -> dict[str, str]:
    """Writes files in the form of the four ads files; returns the options of their data set."""
    for role, lines in (rows or ads_rows()).items():
        write(folder / taobao_ads.FILES[role],
              [ADS_HEADERS[role], *(",".join(map(str, line)) for line in lines)])
    return {"source": str(folder)}


def write_impressions(folder: Path) -> dict[str, str | int]:
    """Writes two kinds of files with named columns; returns the options of their data set."""
    rng = np.random.default_rng(0)
    shown = [f"u{rng.integers(1, 9)},{DAY + 60 * rng.integers(0, 600)},i{rng.integers(1, 20)},{place % 2},"
             f"c{rng.integers(1, 4)},{rng.choice(['f', 'm', ''])},home" for place in range(200)]
    done = [f"u{rng.integers(1, 9)}\t{60 * rng.integers(0, 2000)}\ti{rng.integers(1, 25)}\tclick"
            for _ in range(150)]
    header = "who,when,what,clicked,category,gender,page"
    write(folder / "impressions-0.csv", [header, *shown[:120]])
    write(folder / "impressions-1.csv", [header, *shown[120:]])
    write(folder / "behaviors.csv", ["who,when,what,kind", *(line.replace("\t", ",") for line in done)])
    return {"source": f"{folder}/impressions-*.csv", "behaviors": f"{folder}/behaviors.csv",
            "user_column": "who", "time_column": "when", "item_column": "what", "label_column": "clicked",
            "item_features": "category", "user_features": "gender", "context_features": "page",
            "event_features": "kind", "validation_start": DAY + 24_000, "test_start": DAY + 30_000}
