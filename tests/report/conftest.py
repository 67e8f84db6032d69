import pytest

from mi.report import plots


@pytest.fixture
def figure_files() -> None:
    """Reports of this test write their figures in every format."""


@pytest.fixture
def svg_files() -> None:
    """Reports of this test write their figures as SVG."""


@pytest.fixture(autouse=True)
def _draw_without_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out and draw every figure, but write none: the files take longer than all the rest."""
    formats = plots.METADATA
    if 'svg_files' in request.fixturenames:
        formats = {'svg': formats['svg']}
    elif 'figure_files' not in request.fixturenames:
        formats = {}
    monkeypatch.setattr(plots, 'METADATA', formats)
