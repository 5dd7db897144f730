"""Seconds and peak memory of converting full-size checkpoints of the released layout, on the machine this runs on.

    python benchmarks/conversion.py --output conversion.json

The released files aren't needed: files of the same tensors, with random values, are written to a temporary folder (up
to 2.3 GB at a time) and converted by the command line in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import describe_machine, print_table, save_json
from tqdm import tqdm
from transformers import AutoConfig


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from original import in_released_layout  # noqa: E402

from transformers_testa import TestaForPreTraining, TestaForRetrieval, TestaForVideoQA  # noqa: E402


# By architecture the model, a folder with its configuration, and the case of the tests whose names its file has.
CHECKPOINTS = {
    "retrieval": (TestaForRetrieval, "testa-base-didemo-f32", "retrieval_full"),
    "pretraining": (TestaForPreTraining, "testa-base", "pretraining"),
    "videoqa": (TestaForVideoQA, "testa-base-activitynetqa-f32", "videoqa_full"),
}


def write_checkpoint(file: Path, architecture: str):
    """Write a file as the released code would, of the base size, with random weights."""
    model_class, folder, case = CHECKPOINTS[architecture]
    with torch.device("meta"):
        model = model_class(AutoConfig.from_pretrained(ROOT / "hub_configs" / folder))
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter)
    weights = in_released_layout(model, case)
    for name in weights:
        if "_m." in name:  # the teacher's are tensors of their own
            weights[name] = weights[name].clone()
    torch.save({"model": weights}, file)


def convert(file: Path, architecture: str, output_dir: Path) -> tuple[float, float]:
    """Convert a file in a process of its own; return its seconds and the most memory it had, in GiB."""
    folder = ROOT / "hub_configs" / CHECKPOINTS[architecture][1]
    command = (sys.executable, "-m", "transformers_testa.conversion", file, output_dir)
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--architecture", architecture, "--config_dir", folder], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    args = parser.parse_args(arguments)
    rows = []
    for architecture in tqdm(CHECKPOINTS, desc="Converting", unit="file"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "testa.pth")
            write_checkpoint(file, architecture)
            seconds, gibibytes = convert(file, architecture, Path(folder, "converted"))
            rows.append(
                {
                    "architecture": architecture,
                    "GB of the file": file.stat().st_size / 1e9,
                    "seconds": seconds,
                    "peak GiB": gibibytes,
                }
            )
    print_table(rows)
    save_json(args.output, describe_machine(), rows)


if __name__ == "__main__":
    main()
