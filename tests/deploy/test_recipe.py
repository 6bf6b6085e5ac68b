"""The steps of a recipe are carried out as written, on a small one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.deploy.recipe import Image, instructions

RECIPE = """\
# A comment
FROM base AS build
ENV KIND=small \\
    WHERE=/opt/subpage/made
WORKDIR /opt/subpage
COPY LICENSE README.md ./
RUN mkdir made \\
 && echo "$KIND" > "$WHERE/kind"
FROM base
LABEL a="b"
RUN useradd --uid 10001 somebody && install -d -o somebody -m 0700 /var/lib/subpage
COPY --from=build /opt/subpage/made /opt/subpage/made
WORKDIR /opt/subpage
USER 10001
RUN test -r made/kind && touch /var/lib/subpage/here
VOLUME ["/var/lib/subpage"]
EXPOSE 1
HEALTHCHECK --interval=1s CMD ["true"]
CMD ["cat", "/opt/subpage/made/kind"]
"""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image")
    for parent in (path, *path.parents):
        if parent.stat().st_uid == os.getuid() and parent.name.startswith(("pytest", "image")):
            parent.chmod(0o755)
    return path


def test_steps(folder: Path) -> None:
    image = Image(folder)
    image.build(RECIPE)
    assert image.run(image.command).stdout == "small\n"
    assert image.run(image.health).returncode == 0 and image.volumes == ["/var/lib/subpage"] and image.user == "10001"
    assert not (image.root / "opt/subpage/LICENSE").exists(), "the first stage is left behind"
    kept = (image.root / "var/lib/subpage/here").stat()
    assert kept.st_uid == (10001 if os.geteuid() == 0 else os.getuid())
    assert (image.root / "var/lib/subpage").stat().st_mode & 0o777 == 0o700
    assert image.environment == {}, "that of the last stage"


def test_a_step_that_fails(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"RUN echo oh >&2 && false\n\noh"):
        Image(folder).build("FROM base\nRUN echo oh >&2 && false\n")


def test_continued_lines() -> None:
    assert instructions("FROM a\n# no\nRUN b \\\n  c\n") == [("FROM", "a"), ("RUN", "b  c")]
