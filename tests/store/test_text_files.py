"""Text files in a store: their texts, their paths, and the memories that were written from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gradmem import GradmemError
from gradmem.errors import Conflict, Missing, QuotaExceeded
from gradmem.store import Store
from gradmem.store.text_files import TextFiles
from stored import made

LONG = 2**20


@pytest.fixture
def files(store: Store) -> TextFiles:
    """Two files, one in a directory, and one whose name begins as that of the directory."""
    files = TextFiles(store)
    for path in ("/a/b", "/a.b", "/c"):
        files.create(path, f"text of {path}")
    return files


def texts(files: TextFiles, path: str) -> dict[str, str]:
    return {file.path: file.text for file in files.read(path)}


def kept(files: TextFiles, path: str, seed: int = 1) -> str:
    """Keep a memory of a file; return its id."""
    (file,) = files.read(path)
    return files.keep(file, made(seed)).id


def test_files_and_directories(files: TextFiles) -> None:
    assert texts(files, "/a") == {"/a/b": "text of /a/b"}
    assert texts(files, "/c") == {"/c": "text of /c"}
    assert files.sizes("") == {"/a.b": 12, "/a/b": 12, "/c": 10}
    assert files.edit("/c", str.upper) == "TEXT OF /C"
    files.rename("/a", "/d/e")
    assert texts(files, "/d") == {"/d/e/b": "text of /a/b"}
    assert files.delete("/d") == 1
    files.create("/d", "a file now, \N{SNOWMAN}")
    assert files.sizes("") == {"/a.b": 12, "/c": 10, "/d": 15}


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda files: files.create("/c", ""), Conflict, "File /c already exists"),
        (lambda files: files.create("/a", ""), Conflict, "File /a already exists"),
        (lambda files: files.create("/c/d/e", ""), Conflict, "/c is a file, not a directory"),
        (lambda files: files.rename("/c", "/a.b"), Conflict, "The destination /a.b already exists"),
        (lambda files: files.rename("/c", "/a"), Conflict, "The destination /a already exists"),
        (lambda files: files.rename("/a", "/a/c"), Conflict, "/a cannot be moved into itself"),
        (lambda files: files.rename("/c", "/a.b/c"), Conflict, "/a.b is a file, not a directory"),
        (lambda files: files.rename("/x", "/y"), Missing, "the path /x does not exist"),
        (lambda files: files.read("/x"), Missing, "the path /x does not exist"),
        (lambda files: files.edit("/a", str.upper), Missing, "the path /a does not exist"),
        (lambda files: files.delete("/x"), Missing, "the path /x does not exist"),
        (lambda files: files.create("/d", "x" * (LONG + 1)), GradmemError, "at most 1,048,576 bytes"),
        (lambda files: files.edit("/c", lambda _: "\0"), GradmemError, "without NUL"),
        (lambda files: files.create("/" + "d" * 200, ""), GradmemError, "up to 200 characters"),
        (lambda files: files.rename("/a", "/" + "d" * 198), GradmemError, "up to 200 characters"),
        *[
            (lambda files, path=path: files.create(path, ""), GradmemError, "must be")
            for path in ("x", "", "/", "/x/", "//x", "/x/../y", "/./x", "/x\n", "/x*", "-/x")
        ],
    ],
)
def test_what_is_refused_changes_nothing(
    files: TextFiles, use: Callable[[TextFiles], object], error: type[Exception], words: str
) -> None:
    before = texts(files, "")
    with pytest.raises(error, match=words):
        use(files)
    assert texts(files, "") == before


def test_a_memory_lasts_as_long_as_its_text(store: Store, files: TextFiles) -> None:
    first = kept(files, "/a/b")
    assert (store.get("/a/b").id, files.read("/a/b")[0].memory) == (first, first)
    files.rename("/a", "/d")
    assert (store.get("/d/b").id, files.read("/d/b")[0].memory) == (first, first)
    files.edit("/d/b", lambda text: text + "!")
    assert (store.list(), files.read("/d/b")[0].memory) == ([], None)
    second = kept(files, "/d/b")
    store.delete(second)
    assert files.read("/d/b")[0].memory is None
    kept(files, "/d/b")
    files.delete("/d")
    assert store.list() == []


def test_files_of_one_text_have_a_memory_each(store: Store, files: TextFiles) -> None:
    files.create("/same", "text of /c")
    assert kept(files, "/c") != kept(files, "/same")
    files.delete("/c")
    assert [entry.name for entry in store.list()] == ["/same"]


def test_a_memory_of_a_text_that_has_changed_is_not_kept(store: Store, files: TextFiles) -> None:
    (file,) = files.read("/c")
    files.edit("/c", str.upper)
    with pytest.raises(Conflict, match="/c has changed meanwhile"):
        files.keep(file, made(1))
    files.delete("/c")
    with pytest.raises(Conflict, match="/c has changed meanwhile"):
        files.keep(file, made(1))
    assert store.list() == []


def test_pinned_memories_and_names_that_are_taken(store: Store, files: TextFiles) -> None:
    kept(files, "/c")
    store.pin("/c")
    for use in (lambda: files.edit("/c", str.upper), lambda: files.delete("/c")):
        with pytest.raises(Conflict, match="the memory of /c is pinned"):
            use()
    store.put(made(2), name="/a/b")
    with pytest.raises(Conflict, match="the name '/a/b' is taken"):
        kept(files, "/a/b", 3)
    with pytest.raises(Conflict, match="the name '/a/b' is taken"):
        files.rename("/c", "/a/b") if files.delete("/a") else None


def test_each_owner_has_own_files(store: Store, files: TextFiles) -> None:
    other = TextFiles(store.owned_by("other"))
    assert other.sizes("") == {}
    with pytest.raises(Missing):
        other.delete("/c")
    other.create("/c", "of the other")
    assert (texts(other, "/c"), texts(files, "/c")) == ({"/c": "of the other"}, {"/c": "text of /c"})


def test_files_count_in_the_quota(store: Store, place: str) -> None:
    size = len(made(1).to_bytes())
    limited = Store(place, max_memories=2, max_bytes=size + 100)
    files = TextFiles(limited)
    files.create("/a", "x" * 40)
    files.create("/b", "x" * 40)
    for use in (lambda: files.create("/c", ""), lambda: limited.put(made(2))):
        with pytest.raises(QuotaExceeded, match="at most 2 memories"):
            use()
    kept(files, "/a")  # it takes no place of its own
    for refused in (lambda: files.edit("/b", lambda text: text + "x" * 21), lambda: kept(files, "/b", 2)):
        with pytest.raises(QuotaExceeded, match=f"at most {size + 100:,} bytes"):
            refused()
    files.edit("/b", lambda text: text + "x" * 20)
    with pytest.raises(QuotaExceeded, match="at most 2 memories"):
        limited.put(made(2))
