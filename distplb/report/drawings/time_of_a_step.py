"""Where the time of a step goes, beside an even GPU with the same experts and beside other runs."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from distplb.report.drawings.base import ReportFigure, refuse_if_lacking
from distplb.report.drawings.every_sampled_step import NO_STEPS
from distplb.report.drawings.style import COLOURS, FONT, GREY, WIDE, dress, empty, is_narrow, legend_below
from distplb.report.formatting import label, percent, plural, printable, shortened
from distplb.report.run import Run
from distplb.report.step_summary import Distance, distances, products_apart
from distplb.report.step_times import PARTS, StepTime

__all__ = ["TIME_OF_A_STEP", "time_of_a_step"]

_PALER = {  # a part, the colour, and the share of white in it: a family of parts has one colour
    "experts": ("blue", 0.0),
    "experts backward": ("blue", 0.35),
    "dispatch": ("sky", 0.55),
    "waiting": ("vermilion", 0.0),
    "waiting backward": ("vermilion", 0.35),
    "waiting to count": ("vermilion", 0.65),
    "count": ("black", 0.0),
    "split": ("yellow", 0.0),
    "push": ("purple", 0.0),
    "push again": ("purple", 0.4),
    "bring home": ("green", 0.0),
}
_NOTICED = 5e-4  # of the other run: a smaller difference rounds to 0.0 %
_OTHER_TOKENS = 0.005  # difference in tokens above which seconds do not compare
_CEILING = "an even GPU with the same experts"
_WORDS = {
    "waiting": "waiting",
    "push": "push",
    "split": "split",
    "products": "products",
    "the rest": "the rest",
}


def time_of_a_step(run: Run, width: float = WIDE) -> Figure:
    """Stacked bars of the seconds of a typical step by part: this run, an even GPU, and each run beside it.

    Args:
        run: a run with sampled steps that were timed, perhaps with other runs beside it.
        width: width in inches.

    Raises:
        DistplbError: if the run lacks the data.
    """
    refuse_if_lacking(_lacks(run))
    bars = _bars(run)
    figure = empty(width, 0.62 * len(bars) + (2.5 if is_narrow(width) else 1.5))
    axes = figure.subplots()
    dress(axes, "", "ms a step, all layers", "", grid="x")
    longest = max(time.total for _, time in bars)
    for row, (name, time) in enumerate(bars):
        _draw(axes, row, label(name, 40 if is_narrow(width) else 90), time, longest)
    axes.axvline(1000 * bars[1][1].total, color=COLOURS["black"], linewidth=0.9, linestyle="--", zorder=0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 1150 * longest)
    axes.set_ylim(len(bars) - 0.5, -0.75)
    drawn = {part for _, time in bars for part in time.parts}
    legend_below(figure, [Patch(color=_colour(part), label=part) for part in PARTS if part in drawn], width)
    return figure


def _caption(run: Run) -> str:
    time = run.step_time
    assert time is not None, "a run that lacks nothing was timed"
    covered = "from dispatch to the end of compute" + (", and of the experts' backward" * time.has_backward)
    text = (
        f"Milliseconds of a typical step by part, {covered}, summed over the layers. Each part is a mean over the "
        f"ranks and over {plural(time.num_steps, 'sampled step')}: the middle half by total, without the first step "
        "after a start. “experts” is the mean GPU; “waiting” is what the busiest takes longer, and “dispatch” what the "
        "caller does between dispatch and compute. "
    )
    if not time.has_backward:
        text += "The backward was not measured. "
    even = time.even.total
    text += (
        f"An even GPU with the same experts, which waits for nobody and needs no replica, would take {_ms(even)} "
        f"(dashed): this is the fair ceiling. This run takes {_ms(time.total)}, that is "
        f"{_longer(time.total - even, even)}. "
    )
    if run.beside:
        text += (
            "In what follows, “waiting” has all three parts of that name, “push” includes push again and bring home, "
            "“split” includes count, “products” are experts and experts backward, and the rest is dispatch. Runs at "
            "different times also differ by what else the machine did. "
        )
    text += " ".join(map(_distance, distances(run)))
    apart = products_apart(run)
    if apart is not None:
        names, skewed, small = apart
        text += (
            f" With {names} beside it, the products' part has two: skewed experts {_signed(skewed)}, and smaller "
            f"products, which come with replicas, {_signed(small)}."
        )
    return text


def _lacks(run: Run) -> str:
    if run.sampled is None:
        return NO_STEPS
    return "" if run.step_time is not None else "The sampled steps have no times."


def _bars(run: Run) -> list[tuple[str, StepTime]]:
    time = run.step_time
    assert time is not None, "a run that lacks nothing was timed"
    others = [(printable(other.name), other.step_time) for other in run.beside if other.step_time is not None]
    return [("this run", time), (_CEILING, time.even), *others]


def _draw(axes: Axes, row: int, name: str, time: StepTime, longest: float) -> None:
    """One bar, with its name above it and its total at its end."""
    left = 0.0
    for part, value in time.parts.items():
        style: dict[str, Any] = {"hatch": "////", "edgecolor": "white"} if name == _CEILING else {}
        axes.barh(row, 1000 * value, left=left, height=0.5, color=_colour(part), linewidth=0, label=part, **style)
        left += 1000 * value
    axes.text(left + 10 * longest, row, _ms(time.total), va="center", fontsize=FONT, color=COLOURS["black"])
    axes.text(0, row - 0.3, name, va="bottom", fontsize=FONT, color=COLOURS["black"])


def _colour(part: str) -> tuple[float, float, float]:
    name, white = _PALER.get(part, ("", 0.0))
    red, green, blue = (one + (1 - one) * white for one in to_rgb(COLOURS.get(name, GREY)))
    return red, green, blue


def _distance(distance: Distance) -> str:
    """How far this run is from another one, in words; parts that differ by less than 0.05 % are left out."""
    there = distance.seconds_there
    whole = distance.seconds - there
    noticed = {name: value for name, value in distance.longer.items() if abs(value) >= _NOTICED * max(there, 1e-12)}
    parts = ", ".join(f"{_WORDS[name]} {_signed(value)} ({_per_cent(value, there)})" for name, value in noticed.items())
    text = f"Beside {shortened(printable(distance.name))}, whose step takes {_ms(there)}, "
    text += "comparing the forward alone, " if distance.is_forward else ""
    text += f"this run takes {_longer(whole, there)}{f': {parts}' * bool(parts)}."
    if distance.tokens is not None and abs(distance.tokens - 1) > _OTHER_TOKENS:
        text += f" But a step has {percent(distance.tokens)} of the tokens there, so times do not compare."
    return text


def _longer(seconds: float, reference: float) -> str:
    if abs(seconds) < _NOTICED * reference:
        return "as long"
    share = f" ({percent(abs(seconds) / reference)})" if reference else ""
    return f"{_ms(abs(seconds))}{share} {'longer' if seconds >= 0 else 'less'}"


def _per_cent(seconds: float, reference: float) -> str:
    sign = "+" if seconds >= 0 else "−"
    return f"{sign}{100 * abs(seconds) / reference:.1f} %" if reference else "–"


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '−'}{_ms(abs(seconds))}"


def _ms(seconds: float) -> str:
    """Milliseconds, to a hundredth at most.

    >>> _ms(0.0812), _ms(12.0), _ms(0.00000957)
    ('81.2 ms', '12,000 ms', '0.01 ms')
    """
    value = 1000 * seconds
    return f"{value:,.0f} ms" if value >= 99.95 else f"{value:.1f} ms" if value >= 9.995 else f"{value:.2f} ms"


TIME_OF_A_STEP = ReportFigure("Time of a step", time_of_a_step, _caption, _lacks)
