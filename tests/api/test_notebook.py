"""The example notebook, executed by a real kernel."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook" / "three_clients.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after all its cells have run, in an empty folder; a cell that raises fails here."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("IPYTHONDIR", os.fspath(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", os.fspath(folder / "runtime"))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": os.fspath(folder)}}).execute()
    return notebook


def shown(notebook: Any, start: str, kind: str = "text/html") -> list[str]:
    """What the cell whose source begins with `start` shows, in one format."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(start)]
    return [output["data"][kind] for output in cell.outputs if kind in output.get("data", {})]


def test_progress_grows_into_one_table_of_all_rounds(executed: Any) -> None:
    progress, result = shown(executed, "config =")
    assert progress.count("<tr>") == 1 + 6  # the head and six rounds
    assert "scoring majority on test" in progress
    assert "finished=True" in result


def test_frames_report_and_comparison_are_shown(executed: Any) -> None:
    (scores,) = shown(executed, "run.scores")
    assert all(
        f"<td>{name}</td>" in scores for name in ("fedamole_peers", "base", "majority", "north", "south", "east")
    )
    (report,) = shown(executed, "run.report()")
    assert report.startswith("<iframe srcdoc=")
    assert "<script" not in report.replace("&lt;script", "")  # it stays inside the frame
    tables = shown(executed, "result =")[-1]
    assert "fedamole_peers" in tables
    assert "p (pairs)" in tables


def test_the_personal_model_answers(executed: Any) -> None:
    (answer,) = shown(executed, "model, tokenizer", "text/plain")
    assert answer.strip("'") in ("now", "later")


def test_the_notebook_is_stored_without_output() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
