"""Every notebook runs from end to end on the shipped models, in the smoke profile, and leaves the figures it declares."""

from lib.paths import REPO
from lib.pipeline import run
from lib.studies import read_studies


def test_the_smoke_profile(tmp_path):
    assert run(profile="smoke", out=tmp_path) == 0
    for study in read_studies(REPO).values():
        for figure in study.figures:
            for kind in ("pdf", "png", "csv", "json"):
                assert (tmp_path / "figures" / f"{figure}.{kind}").stat().st_size > 0
