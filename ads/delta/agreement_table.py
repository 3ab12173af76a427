"""What stage 2 found of Delta's agreement with the exact one in words. No torch is imported."""

LEAST_CORRELATION = 0.99
FIGURES = {
    "correlation": "correlation",
    "correlation_p10": "10th percentile",
    "sine": "|sin|",
    "relative_error": "median relative error",
}


def rows(found):
    """{way to Delta: its figures}."""
    ways = {f"exact, rank {found['rank'] or 'full'}": found["exact"]}
    ways |= {f"central, eps {eps}": figures for eps, figures in found["central"].items()}
    if "split_half" in found:
        ways["two halves of the traces"] = found["split_half"]
    return ways


def caption(found):
    return (
        f"Delta at {found['num_positions']} positions against the exact one in float32 along the full "
        f"gradient; proxy_dtype {found['dtype']}"
    )


def spread(found):
    lams = ", ".join(f"{lam:g} ({s})" for s, lam in found["lam_of_spread"].items())
    return f"std of Delta {found['delta_std']:g} nats; lam for a std of lam * Delta (nats): {lams}"


def table(found, eps):
    """The lines that stage 2 prints, a warning among them where Delta is poor."""
    lines = [caption(found), " " * 26 + "  ".join(FIGURES.values())]
    for way, figures in rows(found).items():
        shown = (f"{figures[key]:{len(title)}.4f}" for key, title in FIGURES.items())
        lines.append(f"{way:26}" + "  ".join(shown))
    return [*lines, spread(found), *filter(None, [warning(found, eps)])]


def used(found, eps):
    """The figures of the Delta that traces will be sampled with."""
    return found["central"][f"{eps:g}"] if eps else found["exact"]


def warning(found, eps):
    """One line if the Delta to be used is a poor one, else None."""
    correlation = used(found, eps)["correlation"]
    if correlation >= LEAST_CORRELATION:
        return None
    remedy = "set eps=0 (the exact derivative)" if eps else "raise grad_rank (0: full)"
    if found["dtype"] != "float32":
        remedy += " or set proxy_dtype=float32"
    return f"WARNING: Delta correlates only {correlation:.3f} with the exact one: {remedy}"
