"""The theme and `save`: files that are equal when the data are, legible in Chinese and to colour-blind readers."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import zlib

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt
from PIL import Image

from lib import figures
from lib.figures import COLOURS, COLUMN, MARKERS, OTHER_COLOURS, heatmap, legend, points_with_intervals, save, use_theme
from lib.files import git_state
from lib.paths import REPO

TABLE = pd.DataFrame(
    [
        {"method": method, "strength": strength, "refusal": rate, "lo": rate - 0.1, "hi": rate + 0.05}
        for method, slope in (("baseline", 0), ("ablate", 0.8), ("random", 0.1))
        for strength, rate in ((s, 0.9 - slope * s) for s in (0.0, 0.5, 1.0))
    ]
)


@pytest.fixture(autouse=True)
def theme():
    """The house style, given back after each test with whatever was drawn."""
    mpl.use("agg")
    with mpl.rc_context():
        use_theme()
        yield
    plt.close("all")


def dose_response(title: str = "拒绝率 refusal rate"):
    use_theme()
    fig, ax = plt.subplots()
    points_with_intervals(ax, TABLE, "strength", "refusal", "method")
    ax.set_title(title)
    legend(fig)
    return fig


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_figure_is_four_files_of_one_name(tmp_path):
    assert save(dose_response(), "dose_response", TABLE, directory=tmp_path) == tmp_path / "dose_response.pdf"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"dose_response.{s}" for s in ("csv", "json", "pdf", "png")]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "dose_response.csv"), TABLE)
    with Image.open(tmp_path / "dose_response.png") as image:
        assert image.size == (round(300 * COLUMN), 720)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_provenance_tells_where_a_figure_came_from(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    facts = {"model": "smol-mdlm", "seed": np.int64(3), "layers": (1, 2), "prompt": "你好"}
    save(dose_response(), "f", TABLE, caption="Refusal falls.", provenance=facts, directory=tmp_path)
    record = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert record["id"] == "f" and record["caption"] == "Refusal falls."
    assert record["created"] == "1970-01-02T00:00:00+00:00"
    assert record["run"] == {"model": "smol-mdlm", "seed": 3, "layers": [1, 2], "prompt": "你好"}
    assert record["csv_sha256"] == hashlib.sha256((tmp_path / "f.csv").read_bytes()).hexdigest()
    assert {"python", "torch", "transformers", "matplotlib"} <= record["versions"].keys()
    if record["git"]:
        assert re.fullmatch("[0-9a-f]{40}", record["git"]["commit"]) and isinstance(record["git"]["dirty"], bool)


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(REPO) is None


def digests(directory) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.suffix != ".json"}


def test_bytes_are_the_same_again_and_in_another_process(tmp_path):
    fig = dose_response()
    for name in ("first", "again"):
        save(fig, "f", TABLE, directory=tmp_path / name)
    assert digests(tmp_path / "first") == digests(tmp_path / "again")

    script = "import sys; from tests.test_figures import *; save(dose_response(), 'f', TABLE, directory=sys.argv[1])"
    environment = os.environ | {
        "PYTHONHASHSEED": "123",
        "SOURCE_DATE_EPOCH": "0",
        "TZ": "Asia/Tokyo",
        "MPLBACKEND": "svg",
    }
    command = [sys.executable, "-c", script, str(tmp_path / "other")]
    subprocess.run(command, cwd=figures.REPO, env=environment, check=True)
    assert digests(tmp_path / "other") == digests(tmp_path / "first")


def test_the_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MDLM_FIGURES", str(tmp_path / "elsewhere"))
    assert save(dose_response(), "f", TABLE) == tmp_path / "elsewhere" / "f.pdf"


@pytest.mark.parametrize(
    "id, data, reason",
    [
        ("Dose response", TABLE, "lower-case letters"),
        ("../f", TABLE, "lower-case letters"),
        ("f", TABLE[:0], "empty"),
        ("f", TABLE.groupby("method").mean(), "reset_index"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, id, data, reason):
    with pytest.raises(ValueError, match=reason):
        save(dose_response(), id, data, directory=tmp_path)
    assert not any(tmp_path.iterdir())


# --- fonts ------------------------------------------------------------------------------------------------------------


def plain(pdf: bytes) -> str:
    """A PDF with its streams decompressed and no spaces, for looking up names in it."""
    streams = re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL)
    texts = [zlib.decompressobj().decompress(stream) for stream in streams if stream.startswith(b"x")]
    return b"".join([pdf, *texts]).decode("latin-1").replace(" ", "")


def test_chinese_is_drawn_in_truetype_on_any_machine(tmp_path):
    title = "中文(“拒绝”率)、λ = ½ → 嗯"
    pdf = plain(save(dose_response(title), "f", TABLE, directory=tmp_path).read_bytes())
    assert "NotoSansSC-GB2312" in pdf and "DejaVuSans" in pdf
    assert "/CIDFontType2" in pdf and "/Type3" not in pdf


def test_fonts_do_not_depend_on_the_theme_at_saving(tmp_path):
    fig = dose_response()
    mpl.rcdefaults()
    assert "/Type3" not in plain(save(fig, "f", TABLE, directory=tmp_path).read_bytes())


@pytest.mark.parametrize("character", ["ꯍ", "\U0001f999", "龘"])
def test_a_character_without_a_glyph_is_an_error(tmp_path, character):
    fig = dose_response(character)
    with pytest.warns(UserWarning, match="missing from font"):
        fig.canvas.draw()  # a notebook has shown it before: the second drawing must not pass in silence
    with pytest.raises(ValueError, match=r"figure f: Glyph .* missing"):
        save(fig, "f", TABLE, directory=tmp_path)
    assert not any(tmp_path.iterdir())


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_points_whiskers_and_colours_are_those_of_the_table():
    fig = dose_response()
    (ax,) = fig.axes
    assert [line.get_color() for line in ax.lines] == [COLOURS[m] for m in ("baseline", "ablate", "random")]
    for line, whiskers, (_, rows) in zip(ax.lines, ax.collections, TABLE.groupby("method", sort=False), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), rows[["strength", "refusal"]])
        np.testing.assert_array_equal([s[:, 1] for s in whiskers.get_segments()], rows[["lo", "hi"]])
    assert ax.get_xlim()[0] > -0.1 and ax.get_xlim()[1] < 1.1


def test_words_on_the_axis_are_places():
    fig, ax = plt.subplots()
    table = TABLE.replace({"method": {"baseline": "smol-mdlm", "ablate": "smol-ar", "random": "smol-base"}})
    points_with_intervals(ax, table[table["strength"] == 1], "method", "refusal")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["smol-mdlm", "smol-ar", "smol-base"]
    assert ax.lines[0].get_linestyle() == "None"
    with pytest.raises(ValueError, match="no entries"):
        legend(fig)


def test_more_levels_than_colours_are_refused():
    table = pd.concat([TABLE.assign(layer=layer) for layer in range(8)])
    with pytest.raises(ValueError, match="8 levels"):
        points_with_intervals(plt.subplots()[1], table, "strength", "refusal", "layer")


def test_a_legend_stays_inside_the_page_and_off_the_axes():
    fig, axes = plt.subplots(1, 2)
    table = TABLE.replace({"method": {"baseline": "a long name of a model", "ablate": "另一个模型的长名字", "random": "third"}})
    for ax in axes:
        points_with_intervals(ax, table, "strength", "refusal", "method")
    key = legend(fig)
    fig.canvas.draw()
    box = key.get_window_extent()
    assert len(key.get_texts()) == 3
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
    assert not any(box.overlaps(ax.get_tightbbox()) for ax in axes)


def test_a_heatmap_is_white_at_zero_and_grey_where_nothing_was_measured():
    fig, ax = plt.subplots()
    matrix = pd.DataFrame([[0.5, -0.2], [0.0, np.nan]], index=["层 0", "层 1"], columns=["first", "last"])
    heatmap(ax, matrix, "cosine", diverging=True, annotate=True)
    (mesh,) = [c for c in ax.collections if hasattr(c, "get_coordinates")]
    assert mesh.get_clim() == (-0.5, 0.5)
    fig.canvas.draw()
    assert min(mesh.cmap(mesh.norm(0.0))[:3]) > 0.95
    assert colors.to_hex(ax.get_facecolor()) == "#cccccc"
    assert [text.get_text() for text in ax.texts] == ["0.50", "-0.20", "0.00"]


# --- colours ----------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def lab(colour: str, sight: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of an sRGB colour as a reader with this sight sees it."""
    rgb = np.array(colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ np.clip(sight @ linear, 0.001, 1) / XYZ.sum(axis=1))  # the cube root alone: not exact near black
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def least_distance(palette, sight: str) -> float:
    """Delta E (1976) of the closest pair; 2.3 is just noticeable side by side."""
    return min(np.linalg.norm(lab(a, SIGHT[sight]) - lab(b, SIGHT[sight])) for a, b in itertools.combinations(palette, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_that_share_axes_are_far_apart_for_every_reader(sight):
    for together in ("baseline ablate clamp add random", "harmful harmless", "en zh"):
        assert least_distance([COLOURS[meaning] for meaning in together.split()], sight) > 20, together
    assert least_distance(OTHER_COLOURS, sight) > 15
    assert least_distance(COLOURS.values(), sight) > 7  # meanings that seldom meet; their markers differ too


def test_one_meaning_one_colour_and_marker_pairs_differ():
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert MARKERS.keys() == COLOURS.keys()
    for together in ("baseline ablate clamp add random", "harmful harmless", "en zh"):
        markers = [MARKERS[meaning] for meaning in together.split()]
        assert len(set(markers)) == len(markers)
