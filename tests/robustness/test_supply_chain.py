"""What this package runs and asks for: no code of strangers, no network that nobody asked for."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]
# What opens a file may run code in it, unless an argument says no.
NEEDED_ARGUMENT = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
FORBIDDEN = (
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "pd.read_pickle"),
    *("cloudpickle.load", "cloudpickle.loads", "yaml.load", "yaml.unsafe_load", "shelve.open", "marshal.loads"),
    *("eval", "exec", "os.system", "torch.hub.load", "torch.jit.load"),
)


def unsafe_calls(source: str) -> list[tuple[int, str]]:
    """Return line and name of each call that might run code of the file it opens, or of a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in NEEDED_ARGUMENT:
            argument, value = NEEDED_ARGUMENT[name]
            given = {keyword.arg: keyword.value for keyword in node.keywords}.get(argument)
            if not (isinstance(given, ast.Constant) and given.value is value):
                found.append((node.lineno, name))
        elif name in FORBIDDEN or any(
            keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
        ):
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_opened_in_a_way_that_could_run_it(file):
    assert unsafe_calls(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "pickle.loads(data)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_could_run_a_file_is_found(source):
    assert len(unsafe_calls(source)) == 1


def test_the_demo_and_all_scripts_run_without_the_network_and_publish_safetensors(tmp_path):
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_runs.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    for name in ("pretraining", "retrieval", "videoqa"):
        published = {file.name for file in (tmp_path / name).iterdir() if file.is_file()}
        assert "model.safetensors" in published
        assert not [
            file for file in published if Path(file).suffix in (".bin", ".pt", ".pth", ".pkl", ".npy", ".ckpt")
        ]


def test_an_attempt_to_use_the_network_is_noticed(tmp_path):
    code = (
        "import sys, pathlib, urllib.request; sys.path.insert(0, sys.argv[1]); import offline_runs\n"
        "offline_runs.forbid_network(pathlib.Path(sys.argv[2]))\n"
        "urllib.request.urlopen('http://127.0.0.1:9')"
    )
    attempts = tmp_path / "attempts"
    finished = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(attempts)], capture_output=True, text=True
    )
    assert "may not use the network" in finished.stderr and "127.0.0.1" in attempts.read_text()
