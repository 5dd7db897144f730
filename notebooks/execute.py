"""Execute notebooks, and store them with what they show.

    python notebooks/execute.py notebooks/quickstart.ipynb ...

What goes to stderr (warnings, bars of progress) isn't stored: it tells of the machine.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


def execute(file: Path) -> NotebookNode:
    """Return a notebook with its outputs, executed in its folder. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(file, as_version=4)
    settings = {"kernel_name": "python3", "timeout": 600, "record_timing": False}
    NotebookClient(notebook, resources={"metadata": {"path": str(file.parent)}}, **settings).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}  # else with the version of the machine's Python
    return notebook


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        nbformat.write(execute(Path(argument)), argument)
