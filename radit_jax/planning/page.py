"""Plans in words."""

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2**30


def of_plan(plan: Mapping[str, Any]) -> str:
    """One plan, for the screen and for ``plan.md``."""
    hbm, flops, seconds = plan["hbm"], plan["flops"], plan["seconds"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    lines = [
        f"# {plan['recipe']} on {plan['slice']} ({plan['chips']} chips)",
        "",
        f"Mesh {mesh}; "
        + ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
        + ".",
        f"Compiled in {plan['compile_seconds']:.0f} s by "
        + " and ".join(f"{n} {v}" for n, v in plan["versions"].items())
        + "; nothing was run. Times are bounds: no run is faster.",
        "",
        f"**{'It fits' if plan['fits'] else 'IT DOES NOT FIT'}**: "
        f"{hbm['total'] / GIB:.2f} GiB of {hbm['usable'] / GIB:.2f} GiB that a program "
        f"may have of a chip's {hbm['capacity'] / GIB:.0f} GiB."
        + (f" The compiler: {plan['refused']}." if plan["refused"] else ""),
        "",
    ]
    lines += table(
        ("HBM of a chip", "GiB"),
        [
            (kind, f"{size / GIB:.2f}")
            for kind, size in sorted(hbm["kinds"].items(), key=lambda kv: -kv[1])
            if size >= GIB / 200
        ],
    )
    lines += table(
        ("largest buffers", "GiB", "array", "of"),
        [
            (b["kind"], f"{b['bytes'] / GIB:.2f}", b["shape"], _tail(b["name"]))
            for b in hbm["largest"][:12]
        ],
    )
    interconnect = sum(seconds["interconnect"].values())
    lines += table(
        ("work of a chip in a step", "", "least seconds"),
        [
            (
                "FLOPs"
                + (
                    f" ({_big(flops['kernels'])} in kernels)"
                    if flops["kernels"]
                    else ""
                ),
                _big(flops["per_chip"]),
                f"{seconds['compute']:.3f}",
            ),
            ("HBM bytes", _big(plan["hbm_bytes"]), f"{seconds['hbm']:.3f}"),
            *(
                (
                    f"interconnect, {axis}",
                    _big(
                        sum(c["wire"] for c in plan["collectives"] if c["axis"] == axis)
                    )
                    + "B",
                    f"{time:.3f}",
                )
                for axis, time in seconds["interconnect"].items()
                if time >= 0.0005
            ),
        ],
    )
    lines += [
        f"Recompute factor {flops['recompute']:.3f}: FLOPs over the model's own.",
        f"Interconnect {interconnect:.3f} s, "
        f"{100 * interconnect / seconds['compute']:.0f} % of compute.",
        "",
        f"**At most {100 * plan['utilisation']:.1f} % of peak** (MFU), "
        f"{plan['items_per_second']:,.0f} {plan['unit']}/s, a step in "
        f"{seconds['step']:.3f} s, all {plan['steps']:,.0f} steps in "
        f"{plan['hours']:.2f} hours, if all the work above overlaps perfectly;",
        f"{100 * plan['utilisation_one_by_one']:.1f} % and "
        f"{seconds['one_by_one']:.3f} s if the interconnect is never hidden.",
        "",
    ]
    lines += table(
        ("collective", "axis", "chips", "MB", "times", "seconds", "of"),
        [
            (
                c["kind"],
                c["axis"],
                c["chips"],
                f"{c['bytes'] / 1e6:.1f}",
                c["times"],
                f"{c['seconds']:.4f}",
                _tail(c["scope"]),
            )
            for c in plan["collectives"][:16]
        ],
    )
    if len(plan.get("tried", ())) > 1:
        lines += table(
            ("tried", "GiB", "fits", "at most", f"{plan['unit']}/s", "bare"),
            [
                (
                    t["choice"],
                    f"{t['total'] / GIB:.1f}",
                    "yes" if t["fits"] else "no",
                    f"{100 * t['utilisation']:.1f} %",
                    f"{t['items_per_second']:,.0f}",
                    f"{t['items_per_second_bare']:,.0f}",
                )
                for t in plan["tried"]
            ],
        )
        if plan["fits"]:
            flags = next(t["flags"] for t in plan["tried"] if t["fits"])
            lines += [f"Run it with `{flags}`.", ""]
    return "\n".join(lines)


HEAD = """# What fits where, and how fast it can be

Made by `python -m radit_jax.main --config configs/plan.py:scale`, which compiles the
jitted step of each stage for the slice named, on one machine with no TPU, with
{versions}. **Nothing here was run on a TPU.** What is exact, what is a bound:

- *HBM* is the compiler's own buffer assignment, the program included: what a chip will
  hold. *of* is what libtpu lets a program have, the chip's memory less the runtime's.
- *recompute* is the FLOPs of the compiled program over the model's own: 6 per weight
  and token, 2 where nothing is trained, and causal attention. 1: nothing is done twice.
- *compute*, *memory*, *links* are the least seconds of a step that the FLOPs, the HBM
  traffic and the collectives can take by the chip's published figures. Bytes of a
  collective flow through as many links as its mesh axis has, rings counted twice.
  Published figures are not reached in practice.
- *at most*: share of peak FLOPs (MFU) if all three overlap perfectly. No run is faster.
  *bare*: if the links never work while the chip computes. Real runs lie around it.
- */s* and *hours* go with *at most*. *hours* are of the whole run: 500 steps of LM-FT,
  1,850 of R-FT, the answers of all 947,000 examples of R-FT after 10 passages and none,
  2,500 questions to read (`prefill`) and to answer (`generate`) after 10 passages each,
  399M passages to embed, 900,000 queries to search.
- Every plan has its mesh, collectives and largest buffers in `plans/`. For your own:
  `--config configs/plan.py --config.stage_config=STAGE:MODEL --config.slice=...`. Where
  it does not fit, the nearest change that does is looked for, and
  `--config.search=True` ranks meshes, remat policies and micro-batches.

"""


def of_all(plans: Sequence[Mapping[str, Any]]) -> str:
    """The page about all checked-in plans."""
    versions = " and ".join(f"{n} {v}" for n, v in plans[0]["versions"].items())
    lines = [HEAD.format(versions=versions)]
    lines += table(
        (
            *("recipe", "slice", "mesh", "remat, parts", "GiB", "of", "recompute"),
            *("compute", "memory", "links", "at most", "bare", "/s", "hours"),
        ),
        [_row(plan) for plan in plans],
    )
    lines += [_goals(plan) for plan in plans if plan["recipe"] == "lm_ft:llama_65b"]
    lines.append(NOTES)
    return "\n".join(lines)


def _goals(plan: Mapping[str, Any]) -> str:
    """The paper's largest run against what was aimed at."""
    seconds, hbm = plan["seconds"], plan["hbm"]
    links = sum(seconds["interconnect"].values()) / seconds["compute"]
    return f"""## The paper's largest run

LLaMA 65B, {plan["settings"]["rows"]} rows of {plan["settings"]["row_tokens"]} tokens,
on {plan["chips"]} chips ({plan["slice"]}), as the paper had 64 accelerators:

- {hbm["total"] / GIB:.1f} GiB of a chip (aim: under 85);
- recompute factor {plan["flops"]["recompute"]:.3f} (aim: under 1.15);
- links busy {100 * links:.0f} % of the time the chip computes (aim: under 100 %);
- at most {100 * plan["utilisation"]:.0f} % MFU, {
        100 * plan["utilisation_one_by_one"]:.0f} % with nothing overlapped (aim: 65 %,
  as the best published figure of this class is 65.4 %, measured, for Llama-2-70B).
"""


NOTES = """## What the plans show

- LM-FT keeps all matrix products (`remat=dots`) on these slices. On fewer or smaller
  chips, policies down to `full` trade FLOPs for memory; `plan` finds which fits.
- Over `fsdp` a decoding step gathers all weights for one token of every prompt, which
  is many times its other work. So `evaluate` has a mesh of its own: some chips share a
  row, the others are replicas. With more chips to a row each reads fewer weights for a
  token, and waits for more sums, which plans take to have no latency.
- Embedding waits for memory: its attention writes all scores. The fused kernel does not
  help (36 % at most): it fills passages of 160 tokens up to 256.
- Exact search reads every passage once for a block of 128 queries, and `approx_max_k`
  (expected recall 0.95 on each chip) keeps scores out of memory. 399M passages of 768
  numbers in bfloat16 are 571 GiB. [retrieval.md](retrieval.md) has what they cost on
  other slices, on disk, and with ScaNN on hosts.
"""


def _row(plan: Mapping[str, Any]) -> tuple[Any, ...]:
    hbm, seconds, settings = plan["hbm"], plan["seconds"], plan["settings"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
    return (
        plan["recipe"],
        f"{plan['slice']} ({plan['chips']})",
        mesh,
        f"{settings['remat']}, {settings['micro_batches']}"
        if "remat" in settings
        else "",
        f"{hbm['total'] / GIB:.1f}{'' if plan['fits'] else ' DOES NOT FIT'}",
        f"{hbm['usable'] / GIB:.1f}",
        f"{plan['flops']['recompute']:.2f}",
        *(f"{seconds[part]:.3f}" for part in ("compute", "hbm")),
        f"{sum(seconds['interconnect'].values()):.3f}",
        f"{100 * plan['utilisation']:.0f} %",
        f"{100 * plan['utilisation_one_by_one']:.0f} %",
        f"{plan['items_per_second']:,.0f} {plan['unit']}",
        f"{plan['hours']:.2g}",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table, columns padded so that it reads well on a screen too."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return [lines[0], rule, *lines[1:], ""]


def _big(value: float) -> str:
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {letter}"
    return f"{value:.0f} "


def _tail(scope: str) -> str:
    """The end of a scope, without what every scope has."""
    parts = [
        part
        for part in scope.split("/")
        if part not in ("while", "body", "closed_call", "jit(step)")
    ]
    return "/".join(parts)[-60:]
