"""How results look, and where each figure came from: one theme, three ways to draw, one `save`.

A figure is four files of one name: .pdf and .png, .csv (the table it was drawn from) and .json (provenance). Equal data
and library versions give equal bytes in the first three; what changes between runs, commit and time, is in the .json
alone. Knows tables and axes; knows nothing of models.
"""

import hashlib
import io
import json
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from math import ceil
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from .files import atomic, git_state, versions
from .identity import plain
from .paths import DATA, REPO

COLUMN, PAGE = 3.35, 6.9  # print widths in inches: one column, both columns

# One colour, one meaning. Okabe and Ito (2008) without yellow, which is too pale for lines; then a grey and Tol's wine.
COLOURS = {
    "baseline": "#000000",
    "ablate": "#0072B2",
    "clamp": "#56B4E9",
    "add": "#E69F00",
    "random": "#AAAAAA",
    "harmful": "#D55E00",
    "harmless": "#009E73",
    "en": "#CC79A7",
    "zh": "#882255",
}
MARKERS = dict(zip(COLOURS, "osD^XvPo^", strict=True))  # print in grey loses colours
OTHER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"  # both read the same to colour-blind eyes; PuOr_r is white at zero

CHINESE_FONT = DATA / "fonts" / "NotoSansSC-GB2312.ttf"
THEME = {
    "font.family": ["DejaVu Sans", "Noto Sans SC GB2312"],  # per glyph: the second draws what the first lacks
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "legend.fontsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.prop_cycle": mpl.cycler(color=OTHER_COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "figure.figsize": (COLUMN, 2.4),
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,  # on screen
    "savefig.dpi": 300,  # PNG, and pictures inside a PDF
    "pdf.fonttype": 42,  # TrueType; many venues refuse the default, Type 3
}


def use_theme() -> None:
    """Make the house style the default of figures made from here on: the first cell of a notebook."""
    _register_chinese()
    mpl.rcParams.update(THEME)


@cache
def _register_chinese() -> None:
    """Let matplotlib find the font of the repository, so that Chinese labels need none of the system's."""
    font_manager.fontManager.addfont(CHINESE_FONT)


# --- drawing ----------------------------------------------------------------------------------------------------------


def points_with_intervals(
    ax: Axes, table: pd.DataFrame, x: str, y: str, hue: str | None = None, lo: str = "lo", hi: str = "hi"
) -> None:
    """Draw column y against x as dots with whiskers from lo to hi, one colour and marker a level of hue.

    Numbers on x are joined by lines; words on x are places. Levels share a place side by side, so that no whisker hides
    another. Levels that COLOURS names keep their colour; a hue with others (models, layers) takes the theme's in order.
    """
    table = table.reset_index(drop=True)
    groups = list(table.groupby(hue, sort=False)) if hue else [(None, table)]
    numeric = pd.api.types.is_numeric_dtype(table[x])
    places, words = (table[x], None) if numeric else pd.factorize(table[x])
    pitch, line = (1.5, "-") if numeric else (9, "none")  # points between levels
    styles = _styles([level for level, _ in groups])
    for i, (level, rows) in enumerate(groups):
        colour, marker = styles[i]
        nudge = ScaledTranslation(pitch / 72 * (i - (len(groups) - 1) / 2), 0, ax.figure.dpi_scale_trans)
        rows = rows.assign(place=places[rows.index]).sort_values("place")
        whiskers = ax.vlines(rows["place"], rows[lo], rows[hi], color=colour, linewidth=1)
        (dots,) = ax.plot(rows["place"], rows[y], color=colour, marker=marker, linestyle=line, label=level)
        for drawn in (whiskers, dots):  # afterwards, so that the limits of the axes come from the data alone
            drawn.set_transform(ax.transData + nudge)
    if words is not None:
        ax.set_xticks(range(len(words)), words)
        ax.set_xlim(-0.5, len(words) - 0.5)
    elif pd.api.types.is_integer_dtype(table[x]):
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # there is no layer 2.5
    ax.set(xlabel=x, ylabel=y)


def _styles(levels: list) -> list[tuple[str, str]]:
    """(colour, marker) of each level of a hue: its own where all are in COLOURS, else those of the cycle."""
    if levels and all(level in COLOURS for level in levels):
        return [(COLOURS[level], MARKERS[level]) for level in levels]
    if len(levels) > len(OTHER_COLOURS):
        raise ValueError(f"{len(levels)} levels of one hue cannot be told apart; draw at most {len(OTHER_COLOURS)}")
    return list(zip(OTHER_COLOURS, "osD^vPX", strict=True))[: len(levels)]


def slant(ax: Axes) -> None:
    """Turn long words on the x axis so that each ends below its tick."""
    for label in ax.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")


def legend(fig: Figure) -> Legend:
    """One key for all axes, above them, in as few rows as the width allows: it never covers data."""
    entries = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        raise ValueError("no entries for a legend; draw with hue= or label= first")
    for rows in range(1, len(entries) + 1):
        columns = ceil(len(entries) / rows)
        key = fig.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)
        if columns == 1 or key.get_window_extent().width <= fig.bbox.width:
            break
        key.remove()
    return key


def heatmap(
    ax: Axes,
    matrix: pd.DataFrame,
    label: str,
    *,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    annotate: bool = False,
) -> None:
    """Draw matrix, its index down the side and its columns along the bottom; `label` names the colour bar.

    diverging: white at zero, both signs to the same depth. limits: (lowest, highest) colour, to share between panels.
    annotate: write each value with two decimals. Missing cells are grey.
    """
    if limits is None and diverging:
        reach = matrix.abs().max(axis=None)
        limits = -reach, reach
    look = {"cmap": DIVERGING if diverging else SEQUENTIAL, "annot": annotate, "fmt": ".2f", "rasterized": True}
    low, high = limits or (None, None)
    sns.heatmap(matrix, ax=ax, vmin=low, vmax=high, cbar_kws={"label": label}, **look)
    ax.set_facecolor("0.8")
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)


# --- saving -----------------------------------------------------------------------------------------------------------


def save(
    fig: Figure,
    id: str,
    data: pd.DataFrame,
    *,
    caption: str | None = None,
    provenance: Mapping | None = None,
    claims: Sequence[Mapping] = (),
    directory: Path | str | None = None,
) -> Path:
    """Write <id>.pdf, .png, .csv and .json, each at once or not at all, and return the path of the PDF.

    data: the tidy table behind the figure. provenance: what the caller knows, as JSON: model, parameters, seed. claims: what the
    figure shows of the papers' claims (see claims.py), kept in the .json. directory: `folder()` unless told. Raises ValueError
    for an id that is not of [a-z0-9_], for a table that is empty or has a named index, and for a character that no font has.
    """
    if not re.fullmatch("[a-z0-9_]+", id):
        raise ValueError(f"figure id {id!r}; use lower-case letters, digits and underscores")
    if data.empty:
        raise ValueError(f"figure {id}: the table behind it is empty")
    if any(name is not None for name in data.index.names):
        raise ValueError(f"figure {id}: the index {data.index.names} would be lost; call reset_index() on the table")

    table = data.to_csv(index=False, lineterminator="\n").encode()
    record = {
        "id": id,
        "caption": caption,
        "run": plain(provenance or {}, "provenance"),
        "claims": plain(list(claims), "claims"),
        "csv_sha256": hashlib.sha256(table).hexdigest(),
        "git": git_state(REPO),
        "versions": versions(),
        "created": datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), UTC).isoformat(),
    }
    files = {
        "csv": table,
        "pdf": _render(fig, id, "pdf", CreationDate=None),
        "png": _render(fig, id, "png", Software=None),
        "json": (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode(),
    }
    directory = Path(directory or folder())
    for suffix, content in files.items():
        with atomic(directory / f"{id}.{suffix}") as temporary:
            temporary.write_bytes(content)
    return directory / f"{id}.pdf"


def folder() -> Path:
    """Where figures go: $MDLM_FIGURES, else figures/ of the repository."""
    return Path(os.environ.get("MDLM_FIGURES") or REPO / "figures")


def _render(fig: Figure, id: str, format: str, **metadata) -> bytes:
    """The figure as a file's bytes. Raises ValueError for a character that would print as an empty box."""
    _register_chinese()
    target = io.BytesIO()
    with mpl.rc_context(THEME), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing from font")
        try:
            fig.savefig(target, format=format, metadata=metadata)
        except UserWarning as missing:
            raise ValueError(f"figure {id}: {missing}") from None
    return target.getvalue()
