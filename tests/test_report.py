"""The report."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mxcompile import artifact, report
from mxcompile.artifact import Artifact
from mxcompile.formats import FORMATS
from mxcompile.plan import PrecisionPlan, Unit
from tests import toy

PLAN = PrecisionPlan.uniform(
    (
        Unit("model.embed_tokens.weight", 40, 32),
        Unit("model.layers.0.mlp.up_proj.weight", 32, 32),
        Unit("model.layers.11.mlp.up_proj.weight", 32, 32),
        Unit("model.layers.11.<b>odd</b>.weight", 32, 32),
    ),
    FORMATS["int4"],
)


@pytest.fixture
def html(tmp_path: Path) -> str:
    (tmp_path / "code").write_bytes(b"")
    with artifact.staged(tmp_path / "out.mxc") as folder:
        built = artifact.write(
            folder,
            dataclasses.replace(toy.manifest(), name="<script>alert(1)</script>"),
            code=tmp_path / "code",
            weights=toy.weights(),
            plan=PLAN,
        )
        manifest = dataclasses.replace(built.manifest, quality={"kld_mean": 0.01234567})
        return report.render(
            Artifact(folder, manifest), predicted={"damage": 0.5}, seconds={"solve": 1.25}
        )


def test_shows_what_was_measured_and_predicted(html: str) -> None:
    for part in ("kld mean", "0.01235", "damage", "0.5", "solve", "1.2 s", "int4", "100.0 %"):
        assert part in html


def test_the_heat_map_has_a_row_a_component_and_a_column_a_layer(html: str) -> None:
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert svg.count("<rect") == 4
    assert svg.count("mlp.up_proj<title>") == 1
    assert ">11<title>" in svg


def test_is_escaped_and_needs_nothing_from_elsewhere(html: str) -> None:
    tags: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            assert not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}

    Reader().feed(html)
    assert not tags & {"script", "link", "img", "iframe", "b"}
    assert "http" not in html
