"""What every lesson promises about itself, held to what was measured and to what is there."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LESSONS = sorted(p for p in (ROOT / "notebooks").glob("*/*.ipynb"))
MEASURED = json.loads((ROOT / "benchmarks" / "lessons.json").read_text())
EACH = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


def markdown(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


@EACH
def test_the_header_says_what_was_measured(path):
    measured, header = MEASURED[path.stem], markdown(path)[0]
    assert (f"the cells run in {measured['seconds']:.0f} s and {measured['gigabytes']:.1f} GB on "
            "two CPU cores") in header
    assert measured["seconds"] <= 90


@EACH
def test_it_opens_and_closes_as_lessons_do(path):
    cells = markdown(path)
    number = path.stem.partition("_")[0]
    assert cells[0].startswith(f"# {number} · ")
    for word in ("**You will**", "**Why:**", "**Needs**", "**Takes**"):
        assert f"\n- {word}" in cells[0], word
    headings = re.findall(r"^## (.+)", "\n".join(cells), re.M)
    assert "Recap" in headings
    assert any("mistake" in h.lower() for h in headings)
    assert "**Next: " in cells[-1]
    text = "\n".join(cells)
    assert "| symbol | meaning | in the package |" in text
    assert "**Predict, then run.**" in text


@EACH
def test_there_is_a_slider_and_a_figure(path):
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    data = [o.get("data", {}) for o in outputs]
    assert any("application/vnd.jupyter.widget-view+json" in d for d in data)
    assert any("image/png" in d for d in data)


@EACH
def test_the_readme_has_it_on_the_map(path):
    readme = (ROOT / "README.md").read_text()
    assert f"(notebooks/{path.parent.name}/{path.name})" in readme


@EACH
def test_names_in_the_recap_exist(path):
    """What the recap says is in the package is there: its last column, as code."""
    import minidiffuser
    from minidiffuser import clip, objective, oracles, plots, schedule, solvers, tasks  # noqa: F401
    from minidiffuser.data import commands, filters

    known = {name for module in (minidiffuser, clip, commands, filters, objective, oracles,
                                 schedule, solvers, tasks,
                                 schedule.NoiseSchedule, oracles.GaussianMixture,
                                 minidiffuser.UniDiffuser) for name in dir(module)}
    known |= {"guidance_scale", "eta", "eps", "x0", "x", "t", "noise", "schedule", "solvers",
              "objective", "tasks", "pipe", "sampled", "given", "filters", "clip", "data", "fetch",
              "laion2B", "en", "image", "images", "texts", "scorer", "bits", "d"}
    rows = re.findall(r"^\| .+ \| .+ \| (.+) \|$", "\n".join(markdown(path)), re.M)
    code = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    assert code
    for span in code:
        for name in re.findall(r"[A-Za-z_]\w*", span):
            assert name in known, f"{name} in `{span}`"
