"""The notebook under docs/: it is well formed, holds nothing of the machine it was written on, and
runs from its first cell to its last."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from system.presets import PRESETS
from tests.pages import links, read

PRESET = "maml-trpo/navigation-2d"
BOOK = json.loads(read("docs/evaluation.ipynb"))
CODE = ["".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == "code"]


def test_format():
    assert BOOK["nbformat"] == 4
    assert BOOK["nbformat_minor"] >= 5
    assert BOOK["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in BOOK["cells"]]
    assert len(set(names)) == len(names)
    for cell in BOOK["cells"]:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell["id"])
        needed = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            needed |= {"execution_count", "outputs"}
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == needed
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_named_files_exist():
    text = "".join("".join(cell["source"]) for cell in BOOK["cells"])
    assert links(text)
    for link in links(text):
        read(f"docs/{link}")


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """() → what the cells left behind, run in a folder of their own, on shorter episodes."""
    import matplotlib

    monkeypatch.chdir(tmp_path)
    short = replace(PRESETS[PRESET](), task_options={"horizon": 10})
    monkeypatch.setitem(PRESETS, PRESET, lambda: short)
    before = matplotlib.get_backend()
    matplotlib.use("agg")

    def run():
        namespace: dict = {"__name__": "notebook"}
        for number, source in enumerate(CODE):
            exec(compile(source, f"cell {number}", "exec"), namespace)
        return namespace

    yield run
    import matplotlib.pyplot as plt

    plt.close("all")
    matplotlib.use(before)


@pytest.mark.usefixtures("torch_threads")
def test_every_cell_runs_and_runs_again(executed, capsys):
    first = executed()
    assert first["config"].preset == PRESET
    assert len(first["records"]) == first["config"].iterations
    shown = [len(figure.axes[0].get_lines()) for figure in figures()]
    assert shown == [len(first["shown"]), 2]
    assert [row["k"] for row in first["evaluation"]["adapt"]] == [0, 1, 2, 3]
    assert re.search(r"k = 3: +-\d", capsys.readouterr().out)
    again = executed()
    assert again["config"] == first["config"]
    assert again["evaluation"] == first["evaluation"]
    assert "from iteration" in capsys.readouterr().out


def figures():
    import matplotlib.pyplot as plt

    return [plt.figure(number) for number in plt.get_fignums()]
