"""The figures that are curves or bars: the two clocks, the leak, the dial, and what was measured."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures.style import CADD, CDM, FAINT, INK, MDLM, STRONG, panels
from benchmarks.figures.tables import matching, numbers, read_table
from cadd_min.latent import log_likelihood
from cadd_min.sampler import sample
from cadd_min.schedule import CONTINUOUS, DISCRETE, NoiseSchedule

LAW = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)  # of the dial's three tokens; token 3 is the mask


def clocks() -> Figure:
    """Draw alpha_t, gamma_bar_t and SNR(t) of each schedule."""
    figure, (left, middle, right) = panels(
        r"Two clocks: $\alpha_t$ tells how many tokens are left, $\bar\gamma_t$ how much of a masked token's latent.",
        3,
    )
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    for name, colour in zip(DISCRETE, (MDLM, STRONG, CADD, CDM, FAINT, INK)):
        line(left, t, NoiseSchedule(name).alpha(t), name, colour)
    for name, colour in zip(CONTINUOUS, (MDLM, STRONG, CADD, CDM)):
        schedule = NoiseSchedule(continuous=name)
        line(middle, t, schedule.gamma_bar(t), name, colour)
        line(right, t[1:-1], schedule.snr(t[1:-1]), name, colour)
    left.set(title=r"$\alpha_t$, share of tokens unmasked", xlabel="t")
    middle.set(title=r"$\bar\gamma_t$, share of the signal", xlabel="t", ylim=(-0.03, 1.03))
    right.set(title=r"SNR$(t) = \bar\gamma_t / (1 - \bar\gamma_t)$", xlabel="t", yscale="log", ylim=(1e-3, 1e3))
    right.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
    left.legend(), middle.legend()
    return figure


def line(axes: Axes, x: torch.Tensor, y: torch.Tensor, name: str, colour: str) -> None:
    axes.plot(x.numpy(), y.numpy(), label=name, color=colour)


def leak() -> Figure:
    """Draw the row norm, the CE and the errors over training, of a free table and of a held one."""
    figure, axes = panels(
        "The leak: a table that may grow tells the answer. The loss looks wonderful, the samples are worse.", 3
    )
    rows = read_table("tables/leak.md", "table", "step")
    for name, colour in (("free", MDLM), ("held", CADD)):
        own = [row for row in rows if row["table"] == name]
        for panel, column in zip(axes, ("row norm", "CE, nats", "impossible transitions")):
            points = [(float(row["step"]), *numbers(row[column])[0]) for row in own if row[column]]
            band(panel, *map(list, zip(*points)), name, colour)
            panel.set(title=column, xlabel="training step", ylim=(0, None))
    label_last(axes[0], ("free", "held"))
    return figure


def band(
    axes: Axes, x: list[float], mean: list[float], spread: list[float], name: str, colour: str, **style: object
) -> None:
    """Draw a mean and its spread over seeds."""
    axes.plot(x, mean, label=name, color=colour, **style)
    low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def label_last(axes: Axes, names: tuple[str, ...]) -> None:
    """Write each curve's name at its last point, in its colour."""
    for curve, name in zip(axes.get_lines(), names):
        x, y = curve.get_data()
        axes.annotate(
            name, (x[-1], y[-1]), xytext=(0, 5), textcoords="offset points", ha="right", color=curve.get_color()
        )


def dial() -> Figure:
    """Draw what hard, soft and sample make of a known law of three tokens, at T = 4, 16 and 64."""
    figure, axes = panels(
        "The dial: sample keeps the law of three tokens, soft nearly, hard draws the most frequent token too often.", 3
    )
    table = rows_of_three()
    for panel, steps in zip(axes, (4, 16, 64)):
        for place, (zhat, colour) in enumerate((("hard", MDLM), ("soft", CADD), ("sample", CDM))):
            share = frequencies(table, steps, zhat)
            x = [token + 0.27 * (place - 1) for token in range(3)]
            panel.bar(x, share.tolist(), width=0.25, color=colour, label=zhat)
        for token, p in enumerate(LAW.tolist()):
            panel.plot(
                [token - 0.42, token + 0.42], [p, p], color=INK, linewidth=1.4, label="law" if token == 0 else None
            )
        panel.set(title=f"T = {steps}", xticks=range(3), xticklabels=["a", "b", "c"], ylim=(0, 1))
    axes[0].set_ylabel("share of samples")
    axes[-1].legend()
    return figure


def rows_of_three() -> torch.Tensor:
    """Make the latents (4, 2) of three tokens, far apart at equal length, and of the mask."""
    angle = 2 * torch.pi * torch.arange(4, dtype=torch.float64) / 3
    return 1.5 * torch.stack([angle.cos(), angle.sin()], -1)


COUNT = 40_000  # samples of the dial


def frequencies(table: torch.Tensor, steps: int, zhat: str) -> torch.Tensor:
    """Sample independent tokens with their exact denoiser, by Bayes' rule, and return the share (3,) of each."""
    schedule = NoiseSchedule("cosine", "linear")

    def exact(x_t: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return LAW.log() + log_likelihood(z_t, t, table[:3], schedule)  # (B, 1, 3)

    x = sample(
        exact, (COUNT, 1), table, schedule, 3, steps=steps, zhat=zhat, generator=torch.Generator().manual_seed(0)
    )
    return torch.bincount(x.flatten(), minlength=3) / COUNT


LAWS = {  # tables of the budget: their errors, and the ticks along y
    "chain": ("impossible transitions", [0.02, 0.05, 0.1, 0.2, 0.5]),
    "sudoku": ("broken units", [0.5, 0.6, 0.7, 0.8, 0.9]),
    "molecules": ("not valid", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
}
LOOKS = {  # their lines: label, colour, dashes
    "mdlm": ("masked model", MDLM, "-"),
    "late soft": ("late latent", CADD, "-"),
    **{f"mdlm hard:temperature=0{tau}": (f"masked model, temperature {tau}", MDLM, ":") for tau in (".7", ".8")},
    **{f"late soft:temperature=0{tau}": (f"late latent, temperature {tau}", CADD, ":") for tau in (".7", ".8")},
}
RUNNERS = {"mdlm": ("masked model", MDLM), "cadd": ("CADD", CADD)}
MODELS = {  # first cells of the rows that are drawn, in two tables of docs/tables/latent.md
    "exact denoiser": ("masked model", "CADD as it is by default", "the same (64 dimensions), cosine alpha"),
    "trained, tiny": ("mdlm", "cadd (default)", "cadd, a strong latent"),
}


def errors() -> Figure:
    """Draw the share of impossible transitions over T, of exact denoisers and of trained networks, and its ratio."""
    figure, axes = panels(
        "An exact denoiser gains much by the latent. A trained one keeps a part, and loses it again in many steps.", 3
    )
    for panel, (title, rows), dashes in zip(axes, MODELS.items(), ("-", "--")):
        masked, *latents = [over_steps(title, row, zhat) for row, zhat in zip(rows, ("", "soft", "soft"))]
        for points, name, colour in zip(
            (masked, *latents), ("masked model", "default", "strong latent"), (MDLM, CADD, STRONG)
        ):
            band(panel, *points, name, colour, marker="o", markersize=4)
            ratio = [a / b for a, b in zip(points[1], masked[1])]
            axes[2].plot(
                points[0], ratio, color=colour, linestyle=dashes, marker="o", markersize=4, label=f"{name}, {title}"
            )
        logarithmic(panel, steps=[4, 8, 16, 32, 64], values=[0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
        panel.set_title(f"{title}: impossible transitions")
    axes[1].sharey(axes[0])
    axes[0].legend()
    axes[2].set(title="the same, relative to the masked model", xscale="log", xlabel="steps T", ylim=(0, 1.1))
    axes[2].set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    axes[2].minorticks_off()
    axes[2].annotate("solid: exact, dashed: trained", (4, 0.04))
    return figure


def over_steps(table: str, model: str, zhat: str) -> tuple[list[float], list[float], list[float]]:
    """Return T, and mean and spread of the errors there, from a table of docs/tables/latent.md."""
    row = matching(read_table("tables/latent.md", table, "zhat"), model, zhat)[0]
    cells = {column.removeprefix("T=").partition(":")[0]: cell for column, cell in row.items()}
    steps, means, spreads = zip(*[(float(T), *numbers(cell)[0]) for T, cell in cells.items() if T.isdigit() and cell])
    return list(steps), list(means), list(spreads)


def logarithmic(axes: Axes, steps: list[int], values: list[float]) -> None:
    """Make both axes logarithmic, with steps T along x and the given ticks."""
    axes.set(xscale="log", yscale="log", xlabel="steps T")
    axes.minorticks_off()
    axes.set_xticks(steps, map(str, steps))
    axes.set_yticks(values, map(str, values))


def schedules() -> Figure:
    """Draw the exact denoiser's errors over the power p of alpha_t, by the latent's length, and over K."""
    figure, axes = panels(
        "Reveal the tokens late, by one latent each: the exact denoiser then makes few errors in few steps.", 3
    )
    rows = [row for row in read_table("tables/schedules.md", "alpha", "gamma_bar") if row["time grid"] == "uniform"]
    powers = {"linear": 1, "power2": 2, "power4": 4, "power8": 8}
    for panel, column in zip(axes, ("T=4: errors / tv", "T=8")):
        for length, colour in zip("1234", (FAINT, CDM, CADD, STRONG)):
            own = [r for r in rows if (r["gamma_bar"], r["dimensions"], r["length"]) == ("linear", "9", length)]
            points = [(powers[r["alpha"]], *numbers(r[column])[0]) for r in own if r["alpha"] in powers]
            band(panel, *map(list, zip(*points)), f"length {length}", colour, marker="o", markersize=4)
        panel.axhline(numbers(rows[0][column])[0][0], color=MDLM, label="masked model")
        logarithmic(panel, steps=list(powers.values()), values=[0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
        panel.set(title=f"{column.partition(':')[0]}: impossible transitions", xlabel=r"p, $\alpha_t = (1 - t)^p$")
    latents = read_table("tables/schedules.md", "alpha, length", "zhat", "K")
    for name, colour in (("linear, 2", FAINT), ("power4, 3", CADD)):
        own = [row for row in latents if row["alpha, length"] == name and row["zhat"] == "soft"]
        band(axes[2], *map(list, zip(*[(int(r["K"]), *numbers(r["T=8"])[0]) for r in own])), name, colour, marker="o")
    axes[2].axhline(numbers(rows[0]["T=8"])[0][0], color=MDLM, label="masked model")
    logarithmic(axes[2], steps=[1, 2, 4], values=[0.01, 0.02, 0.05, 0.1, 0.2])
    axes[2].set(title="T=8: K latents averaged", xlabel="K")
    axes[0].legend(loc="lower left"), axes[2].legend()
    return figure


def budget() -> Figure:
    """Draw the errors of trained networks over T, a panel for each law: the masked model, and the late latent."""
    sentence = "In few steps a late latent makes fewer errors than the masked model: half as many on a chain."
    figure, axes = panels(sentence, len(LAWS), height=3.2)
    for panel, (law, (error, ticks)) in zip(axes, LAWS.items()):
        for row in read_table("tables/budget.md", law):
            label, colour, dashes = LOOKS.get(row.pop(law), ("", "", ""))
            if label:
                points = [(int(T.removeprefix("T = ")), *numbers(cell)[0]) for T, cell in row.items() if T != "one"]
                steps = [T for T, *_ in points]
                band(panel, *map(list, zip(*points)), label, colour, linestyle=dashes, marker="o", markersize=4)
        logarithmic(panel, steps=steps, values=ticks)
        panel.set_title(f"{law}: {error}")
        panel.legend()
    return figure


def frontier() -> Figure:
    """Draw bits a character under the judge against entropy, by temperature, on Wikipedia."""
    sentence = "Text: at equal entropy CADD's soft is level with the masked model; hard only walks along the line."
    figure, (axes,) = panels(sentence, 1, height=3.2)
    first = "bits at entropy, T = 32"
    looks = {
        "mdlm": (MDLM, "-"),
        "cadd (default), soft": (CADD, "-"),
        "cadd (default), hard": (CADD, ":"),
        "cadd, strong, soft": (STRONG, "-"),
        "cadd, strong, hard": (STRONG, ":"),
    }
    for row in read_table("tables/results.md", first):
        name = row.pop(first)
        points = [numbers(cell) for cell in row.values()]  # (bits, spread), (entropy, 0)
        x, y, bars = zip(*[(entropy, bits, spread) for (bits, spread), (entropy, _) in points])
        colour, dashes = looks[name]
        label = name.replace("mdlm", "masked model").replace("cadd", "CADD")
        axes.errorbar(x, y, bars, color=colour, linestyle=dashes, marker="o", markersize=4, label=label)
    axes.set(xlabel="entropy of the tokens, nats", ylabel="judge, bits a character")
    axes.legend()
    return figure


def frechet() -> Figure:
    """Draw the Fréchet distance of digits over T."""
    figure, (axes,) = panels("Digits: CADD's 16 steps are worth the masked model's 64.", 1, height=3.2)
    rows = read_table("tables/images.md", "", "zhat", "T", "FD")
    looks = (("mdlm", "", MDLM, "masked model"), ("cadd", "soft", CADD, "CADD, soft"),
             ("cdm", "soft", CDM, "continuous model, soft"))  # fmt: skip
    for model, zhat, colour, name in looks:
        points = [(float(row["T"]), *numbers(row["FD"])[0]) for row in matching(rows, model, zhat)]
        band(axes, *map(list, zip(*points)), name, colour, marker="o", markersize=4)
    logarithmic(axes, steps=[4, 8, 16, 64], values=[1, 2, 5, 10, 20])
    axes.set_ylabel("Fréchet distance to real digits")
    axes.legend()
    return figure


def speedrun() -> Figure:
    """Draw the bound over seconds of training: as it was before, as it is, and with the latent's likelihood."""
    rows = read_table("tables/speedrun.md", "track", "model", "row")
    tracks = list(dict.fromkeys(row["track"] for row in rows))
    sentence = "The new start in 100 seconds (solid), the old start in 300 (dotted), and the likelihood added (dashed)."
    figure, axes = panels(sentence, len(tracks))
    dashes = {"before": ":", "third": "-", "bayes": "--"}
    for row in rows:
        model, name = row["model"], row["row"].split()[0]
        if model not in RUNNERS or name not in dashes:
            continue
        seconds, _ = numbers(row["seconds"])[0]
        way = numbers(row["after 1/8, 1/4, 1/2 of them"]) + numbers(row["bound, nats/token"])
        x, (y, spread) = [seconds * share for share in (1 / 8, 1 / 4, 1 / 2, 1)], map(list, zip(*way))
        label, colour = RUNNERS[model]
        panel, label = axes[tracks.index(row["track"])], label if name == "third" else None
        band(panel, x, y, spread, label, colour, linestyle=dashes[name], marker="o", markersize=4)
    for panel, track in zip(axes, tracks):
        panel.set(title=track, xlabel="seconds of training")
    axes[0].set_ylabel("bound, nats a token")
    axes[-1].legend(loc="upper right")
    return figure


def speed() -> Figure:
    """Draw the times of both kernels beside eager PyTorch, compiled PyTorch and the machine's floor."""
    figure, axes = panels(
        "The two loops around the network, on two cores: fused beside PyTorch and what the machine allows.",
        2,
        height=2.2,
    )
    for panel, title, floor in zip(axes, ("forward noising", "reverse step"), ("copy", "amax")):
        row = read_table("performance.md", title)[0]
        fused = "fused" if "fused" in row else "fused hard"
        times = [numbers(row[name])[0][0] for name in ("eager", "compile", fused, floor)]
        bars = panel.barh(range(4), times, color=[FAINT, FAINT, CADD, CDM])
        panel.bar_label(bars, [f"{time:,.1f} ms" for time in times], padding=3, color=INK)
        labels = ["PyTorch", "torch.compile", "this project", f"floor: {floor}"]
        panel.set(title=f"{title}, {row[title]}", yticks=range(4), yticklabels=labels, xticks=[])
        panel.set_xlim(right=max(times) * 1.3)
        panel.spines["bottom"].set_visible(False)
        panel.invert_yaxis()
    return figure
