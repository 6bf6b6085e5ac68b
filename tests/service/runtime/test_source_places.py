"""What clients may name as sources, and what it stands for: nothing is looked at for that."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.platform.source_places import LONGEST, Asked, NotAllowed, Pattern, Place, parsed, places_of
from service.settings import Settings

PLACES = ("/data/traces", "s3://boots/kernels/?endpoint_override=10.0.0.9:9000&scheme=http", "gs://whole", "red=/red")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/data/traces/a.parquet", "/data/traces"),
        ("/data/traces/deep/**", "/data/traces"),
        ("/data/traces/*.parquet", "/data/traces"),
        ("/data/traces/[ab] c.log", "/data/traces"),
        ("/red/a", "/red"),
        ("s3://boots/kernels/2026/date=1/a.parquet", "s3://boots/kernels"),
        ("s3://boots/kernels/**/*.parquet", "s3://boots/kernels"),
        ("gs://whole/a", "gs://whole/"),
        ("gs://whole/**", "gs://whole/"),
    ],
)
def test_what_is_below_a_place_is_taken(text: str, place: str) -> None:
    ((asked, found),) = parsed([text], places_of(PLACES, "red"))
    assert found.name == place and f"{asked.root}/{'/'.join(asked.parts)}" == text


HOSTILE = {
    # Beside, above, and by another way there.
    "/data/traces": "must be below",
    "/data/traces/": "none of them empty",
    "/data/traces-not/a": "must be below",
    "/data/a": "must be below",
    "/data/*/a": "must be below",
    "/data/trace*/a": "must be below",
    "/data/[t]races/a": "must be below",
    "/**": "must be below",
    "/": "none of them empty",
    "/etc/passwd": "must be below",
    "/proc/self/environ": "must be below",
    "/data/traces/../../etc/passwd": "empty, . or ..",
    "/data/traces/..": "empty, . or ..",
    "/data/traces/./a": "empty, . or ..",
    "/data/traces//a": "empty, . or ..",
    "//data/traces/a": "empty, . or ..",
    "data/traces/a": "must be an absolute path",
    "~/a": "must be an absolute path",
    "": "must be an absolute path",
    "/blue/a": "must be below",
    # Other hosts, other credentials, other options: an address is the operator's.
    "s3://other/kernels/a": "must be below",
    "s3://boots/a": "must be below",
    "s3://boots/kernels": "must be below",
    "s3://boots/kernels-not/a": "must be below",
    "s3://boots/*/a": "must be below",
    "s3://boots": "none of them empty",
    "s3://boots/kernels/../a": "empty, . or ..",
    "s3://boots/kernels//a": "empty, . or ..",
    "s3://*/kernels/a": "must be an absolute path",
    "s3://me:secret@boots/kernels/a": "must be an absolute path",
    "s3://boots:9000/kernels/a": "must be an absolute path",
    "s3://boots/kernels/a?endpoint_override=169.254.169.254:80&scheme=http": "must have no ?",
    "s3://boots/kernels/a?": "must have no ?",
    "s3://boots?endpoint_override=127.0.0.1:80/kernels/a": "must have no ?",
    "s3://boots/kernels/a#b": "must have no #",
    "s3://boots/kernels/%2e%2e/a": "must have no %",
    "s3://boots/kernels/%2E%2E%2Fa": "must have no %",
    "s3://boots%2fkernels/a": "must have no %",
    "/data/traces/%2e%2e/a": "must have no %",
    "/data/traces/..\\a": "must have no \\",
    "S3://boots/kernels/a": "must be an absolute path",
    "s3:/boots/kernels/a": "must be an absolute path",
    "s3:///kernels/a": "must be an absolute path",
    "s3a://boots/kernels/a": "must be an absolute path",
    "http://169.254.169.254/latest": "must be an absolute path",
    "https://boots/kernels/a": "must be an absolute path",
    "file:///data/traces/a": "must be an absolute path",
    "file://data/traces/a": "must be an absolute path",
    "hdfs://boots/kernels/a": "must be an absolute path",
    "mock:///data/traces/a": "must be an absolute path",
    "unix:/data/traces/a": "must be an absolute path",
    "gs://whole": "none of them empty",
    "red=/red/a": "must be an absolute path",
    # What is not to be seen, or means something else.
    "/data/traces/a\0": "characters that are printed",
    "/data/traces/a\n": "characters that are printed",
    "/data/traces/\u202ea": "characters that are printed",
    "/data/traces/\ud800": "characters that are printed",
    "/data/traces/\u2028": "characters that are printed",
    "s3://boots\n/kernels/a": "characters that are printed",
    "/data/traces/" + "a/" * 65 + "a": "at most 64 parts",
    "/data/traces/" + "a" * LONGEST: f"at most {LONGEST} characters",
    # A letter that looks like one, or is one in another form.
    "/data/tra\u0441es/a": "must be below",
    "s3://b\u043eots/kernels/a": "must be an absolute path",
    "/data/traces\uff0fa": "must be below",
}


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_not_below_a_place_is_refused(text: str) -> None:
    places = [place for place in places_of(PLACES, "blue") if place.tenant is None]
    with pytest.raises(NotAllowed) as refusal:
        parsed(["/data/traces/fine", text], places)
    assert HOSTILE[text] in str(refusal.value) and refusal.value.position == 1  # type: ignore[attr-defined]
    assert "10.0.0.9" not in str(refusal.value)


def test_a_place_is_for_its_tenant() -> None:
    assert [place.name for place in places_of(PLACES, "red")][-1] == "/red"
    assert "/red" not in {place.name for place in places_of(PLACES, "blue")}
    with pytest.raises(NotAllowed, match="lists no place"):
        places_of(("red=/red",), "blue")
    with pytest.raises(NotAllowed, match="lists no place"):
        places_of((), "red")


@pytest.mark.parametrize(
    "text",
    [
        "/",
        "",
        "data",
        "/data/../etc",
        "/data/./a",
        "/data//a",
        "/data/*",
        "s3://",
        "s3:///a",
        "s3://me:secret@boots/a",
        "s3://boots/a?access key=b",
        "s3://boots/a?endpoint_override=a/b",
        "s3://boots/*",
        "http://boots/a",
        "file:///data",
        "red=blue=/data",
        "/data\n",
    ],
)
def test_a_setting_that_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        Place.parse(text)
    with pytest.raises(ValidationError, match="must be"):
        Settings(footprint_sources=(text,))


def test_how_a_store_is_reached_is_the_operators() -> None:
    place = Place.parse("red=s3://boots/kernels/?endpoint_override=[::1]:9000&scheme=http")
    assert (place.tenant, place.name) == ("red", "s3://boots/kernels")
    assert place.address == "s3://boots?endpoint_override=[::1]:9000&scheme=http"


@pytest.mark.parametrize("address", ["nowhere", "http://10.0.0.1:1", "10.0.0.1", ""])
def test_a_setting_that_is_no_cluster_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="must be local, auto, HOST:PORT or ray://HOST:PORT"):
        Settings(ray_address=address)


@pytest.mark.parametrize(
    ("pattern", "path", "meant"),
    [
        ("*.p", "a.p", True),
        ("*.p", "x/a.p", False),
        ("*", "x/a", False),
        ("**", "a", True),
        ("**", "x/y/a", True),
        ("**/a", "a", True),
        ("**/a", "x/y/a", True),
        ("**/a", "x/y/b", False),
        ("**/**/a", "x/a", True),
        ("x/**", "x/y/a", True),
        ("x/**", "y/a", False),
        ("x/**/y/*.p", "x/y/a.p", True),
        ("x/**/y/*.p", "x/q/r/y/a.p", True),
        ("x/**/y/*.p", "x/q/r/a.p", False),
        ("*/**", "a", False),
        ("*/**", "x/a", True),
        ("**/x/**", "q/x/y/a", True),
        ("**/x/**", "x", False),
        ("[ab].p", "b.p", True),
        ("[!a].p", "a.p", False),
        ("[", "[", True),
        ("[z-a]", "b", False),
        ("a**b", "axxb", True),
        ("a**b", "a/b", False),
    ],
)
def test_a_pattern_is_walked_part_by_part(pattern: str, path: str, meant: bool) -> None:
    walked = Pattern(pattern.split("/"))
    *folders, name = path.split("/")
    at = walked.begin
    for folder in folders:
        at = walked.below(at, folder)
    assert walked.means(at, name) is meant


def test_no_pattern_takes_long_on_purpose() -> None:
    """By a regular expression that goes back and forth these would take years."""
    stars = Pattern(["*a" * 60 + "*b"])
    assert not stars.means(stars.begin, "a" * 255)
    folders = Pattern([*["**", "a"] * 30, "b"])
    at = folders.begin
    for _ in range(64):
        at = folders.below(at, "a")
    assert len(at) <= 61 and not folders.means(at, "a") and folders.means(at, "b")


def test_what_is_named_is_taken_apart() -> None:
    assert Asked.parse("/a/b*/c").fixed == 1 and Asked.parse("/a/b").fixed == 2
