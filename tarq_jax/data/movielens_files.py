"""The forms in which MovieLens is distributed, and how their files are read into columns."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tarq_jax.data.records import Columns
from tarq_jax.data.rows import (
    BadRow,
    NumberChunk,
    RowReport,
    check_report,
    merge_reports,
    number_chunks,
    parse_number,
    read_rows,
    reject_rows,
    split_csv,
    split_row,
)

GENRES_100K = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
               "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
               "Thriller", "War", "Western")  # the order of the flags in u.item
NO_GENRE = {"", "unknown", "(no genres listed)"}
OLDEST = 150  # years; a greater age of a user is malformed


class Item(NamedTuple):
    """A row of an item file."""

    id: int
    year: int  # 0 if unknown
    genres: tuple[str, ...]


class User(NamedTuple):
    """A row of a user file."""

    id: int
    age: float
    gender: str
    occupation: str


class Form(NamedTuple):
    """The files of one form in a folder, and how their rows are read."""

    name: str
    ratings: Path
    items: Path
    users: Path | None
    delimiter: str
    header: bool
    lowest: float  # lowest rating of the scale; the highest is 5
    columns: tuple[str, ...]  # columns of the ratings file
    item: Callable[[str], Item]
    user: Callable[[str], User] | None
    encoding: str


class Ratings(NamedTuple):
    """Columns of the ratings, in the order of their file."""

    user: np.ndarray  # [E] int64 original id
    item: np.ndarray  # [E] int32 row in the item table
    rating: np.ndarray  # [E] float32
    time: np.ndarray  # [E] int64 seconds


def _id(text: str) -> int:
    if not 0 <= (found := parse_number(text, int)) < 2 ** 53:  # ids of ratings are read as float64
        raise BadRow("id out of range")
    return found


def _user(identifier: str, age: str, gender: str, occupation: str) -> User:
    if not 0 <= (years := parse_number(age, float)) <= OLDEST:
        raise BadRow("age out of range")
    return User(_id(identifier), years, gender, occupation)


def _item(identifier: str, title: str, genres: list[str], year: str | None = None) -> Item:
    """An item; unless `year` is given, it is read from brackets at the end of the title."""
    found = re.search(r"\((\d{4})[^)]*\)\s*$", title) if year is None else re.fullmatch(r"(\d{4})", year)
    kept = tuple(genre for genre in genres if genre not in NO_GENRE)
    return Item(_id(identifier), int(found[1]) if found else 0, kept)


def _item_100k(text: str) -> Item:
    parts = split_row(text, "|", 5 + len(GENRES_100K))
    flags = parts[5:]
    if not set(flags) <= {"0", "1"}:
        raise BadRow("genre flag other than 0 or 1")
    return _item(parts[0], parts[1], [g for g, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"])


def _item_1m(text: str) -> Item:
    identifier, title, genres = split_row(text, "::", 3)
    return _item(identifier, title, genres.split("|"))


def _item_25m(text: str) -> Item:
    identifier, title, genres = split_csv(text, ",", 3)
    return _item(identifier, title, genres.split("|"))


def _user_100k(text: str) -> User:
    identifier, age, gender, occupation, _ = split_row(text, "|", 5)
    return _user(identifier, age, gender, occupation)


def _user_1m(text: str) -> User:
    identifier, gender, age, occupation, _ = split_row(text, "::", 5)
    return _user(identifier, age, gender, occupation)


def _header(path: Path, required: dict[str, tuple[str, ...]]) -> tuple[list[int], int]:
    """Positions of the required columns, each with several names, in a `name:type` header; and its length."""
    with path.open(encoding="utf-8") as file:
        names = [part.split(":")[0] for part in file.readline().rstrip("\r\n").split("\t")]
    positions = []
    for column, aliases in required.items():
        found = [names.index(alias) for alias in aliases if alias in names]
        if not found:
            raise ValueError(f"{path}: no column {column!r} in its first line, found {names}")
        positions.append(found[0])
    return positions, len(names)


def _atomic_item(path: Path) -> Callable[[str], Item]:
    """A parser for the rows of an `.item` file."""
    positions, width = _header(path, {
        "item_id": ("item_id",), "title": ("movie_title", "title"), "year": ("release_year", "year"),
        "genres": ("class", "genre", "genres")})

    def parse(text: str) -> Item:
        parts = split_row(text, "\t", width)
        identifier, title, year, genres = (parts[position] for position in positions)
        return _item(identifier, title, genres.split(" "), year)

    return parse


def _atomic_user(path: Path) -> Callable[[str], User]:
    """A parser for the rows of a `.user` file."""
    positions, width = _header(path, {name: (name,) for name in ("user_id", "age", "gender", "occupation")})

    def parse(text: str) -> User:
        parts = split_row(text, "\t", width)
        identifier, age, gender, occupation = (parts[position] for position in positions)
        return _user(identifier, age, gender, occupation)

    return parse


COLUMNS = ("user_id", "item_id", "rating", "timestamp")


def _atomic(folder: Path, stem: str) -> Form:
    """The form for `.inter`, `.item` and `.user` files with `name:type` headers."""
    ratings, items, users = (folder / f"{stem}{suffix}" for suffix in (".inter", ".item", ".user"))
    positions, width = _header(ratings, {name: (name,) for name in COLUMNS})
    columns = [f"column_{index}" for index in range(width)]
    for name, position in zip(COLUMNS, positions, strict=True):
        columns[position] = name
    has_users = users.is_file()
    return Form("atomic", ratings, items, users if has_users else None, "\t", True, 0.5, tuple(columns),
                _atomic_item(items), _atomic_user(users) if has_users else None, "utf-8")


def _forms(folder: Path) -> dict[str, tuple[tuple[str, ...], Callable[[], Form]]]:
    """For each form: the files that it needs, and a function that makes the `Form`."""
    stem = next((path.stem for path in sorted(folder.glob("*.inter"))), "*")
    return {
        "ml-100k": (("u.data", "u.item", "u.user"), lambda: Form(
            "ml-100k", folder / "u.data", folder / "u.item", folder / "u.user", "\t", False, 1.0, COLUMNS,
            _item_100k, _user_100k, "latin-1")),
        "ml-1m": (("ratings.dat", "movies.dat", "users.dat"), lambda: Form(
            "ml-1m", folder / "ratings.dat", folder / "movies.dat", folder / "users.dat", "::", False, 1.0,
            COLUMNS, _item_1m, _user_1m, "latin-1")),
        "ml-25m": (("ratings.csv", "movies.csv"), lambda: Form(
            "ml-25m", folder / "ratings.csv", folder / "movies.csv", None, ",", True, 0.5, COLUMNS,
            _item_25m, None, "utf-8")),
        "atomic": ((f"{stem}.inter", f"{stem}.item"), lambda: _atomic(folder, stem)),
    }


def find_form(source: str) -> Form:
    """The form of the data in a folder, recognised by the files in it.

    Raises:
      FileNotFoundError: the folder or one of its files is missing; the message says which are expected.
    """
    folder = Path(source).expanduser()
    forms = _forms(folder)
    for files, make in forms.values():
        if (folder / files[0]).is_file():
            missing = [name for name in files if not (folder / name).is_file()]
            if missing:
                raise FileNotFoundError(f"{folder} has {files[0]} but not {missing}, expected all of {files}")
            return make()
    expected = "; or ".join(f"{', '.join(files)} ({name})" for name, (files, _) in forms.items())
    what = "has no MovieLens data" if folder.is_dir() else "is not a folder"
    raise FileNotFoundError(f"{folder} {what}: expected a folder with {expected}; "
                            "set it by --config.data.source=DIR")


def _unique(rows: list) -> list:
    """Rows sorted by id; of rows with the same id, only the first is kept."""
    return [row for _, row in sorted({row.id: row for row in reversed(rows)}.items())]


def read_items(form: Form, max_bad_fraction: float) -> tuple[np.ndarray, Columns, tuple[str, ...], RowReport]:
    """Reads the item file.

    Returns:
      Original ids [V - 1], sorted; columns `year` [V - 1] float32 (decades since 1990, 0 if unknown) and
      `genres` [V - 1, genres] float32 in {0, 1}, absent if no item has a genre; names of genres; report.
    """
    rows, report = read_rows(form.items, form.item, max_bad_fraction=max_bad_fraction, encoding=form.encoding,
                             header=form.header)
    items = _unique(rows)
    genres = tuple(sorted({genre for item in items for genre in item.genres}))
    years = np.array([item.year for item in items], np.float32)
    columns = {"year": np.where(years > 0, (years - 1990) / 10, 0).astype(np.float32)}
    if genres:
        hot = [[genre in item.genres for genre in genres] for item in items]
        columns["genres"] = np.array(hot, np.float32).reshape(-1, len(genres))
    return np.array([item.id for item in items], np.int64), columns, genres, report


def read_users(form: Form, max_bad_fraction: float) -> tuple[np.ndarray, Columns, dict[str, int], RowReport]:
    """Reads the user file, if the form has one.

    Returns:
      Original ids [U], sorted; columns `age` float32 ((years - 35) / 15), `gender` and `occupation` int32
      (from 1, in the order of their names), no columns without a user file; sizes of the latter two; report.
    """
    if form.users is None or form.user is None:
        return np.zeros(0, np.int64), {}, {}, RowReport()
    rows, report = read_rows(form.users, form.user, max_bad_fraction=max_bad_fraction, encoding=form.encoding,
                             header=form.header and form.name == "atomic")
    users = _unique(rows)
    ages = np.array([user.age for user in users], np.float64)
    columns, sizes = {"age": ((ages - 35) / 15).astype(np.float32)}, {}
    for name in ("gender", "occupation"):
        names, codes = np.unique([getattr(user, name) for user in users], return_inverse=True)
        columns[name], sizes[name] = (codes + 1).astype(np.int32), len(names) + 1
    return np.array([user.id for user in users], np.int64), columns, sizes, report


def _chunk_ratings(form: Form, item_ids: np.ndarray, chunk: NumberChunk) -> tuple[Ratings, RowReport]:
    """The valid ratings of a chunk, and the report of malformed rows."""
    user, item, rating, time = (chunk.values[:, form.columns.index(name)] for name in COLUMNS)
    row = np.searchsorted(item_ids, item)
    on_scale = (rating >= form.lowest) & (rating <= 5) & (np.rint(2 * rating) == 2 * rating)
    keep, report = reject_rows(chunk, form.ratings, (
        ("not a number", ~np.isfinite(chunk.values).all(1)),
        ("rating outside the scale", ~on_scale),
        ("user id not a positive integer", (user < 1) | (user >= 2**53) | (np.rint(user) != user)),
        ("timestamp out of range", np.abs(time) >= 2**53),
        ("unknown item", np.append(item_ids, -1)[row] != item)))
    return Ratings(user[keep].astype(np.int64), (row[keep] + 1).astype(np.int32),
                   rating[keep].astype(np.float32), time[keep].astype(np.int64)), report


def read_ratings(form: Form, item_ids: np.ndarray, max_bad_fraction: float) -> tuple[Ratings, RowReport]:
    """Reads the ratings in chunks, without an object per row; `item_ids` are all known ids, sorted."""
    parts, reports = [], []
    for chunk in number_chunks(form.ratings, form.delimiter, len(form.columns), header=form.header):
        part, report = _chunk_ratings(form, item_ids, chunk)
        parts.append(part)
        reports.append(report)
    report = merge_reports(reports)
    check_report(report, form.ratings, max_bad_fraction)
    if not parts:
        return Ratings(*(np.zeros(0, t) for t in (np.int64, np.int32, np.float32, np.int64))), report
    return Ratings(*(np.concatenate(column) for column in zip(*parts, strict=True))), report
