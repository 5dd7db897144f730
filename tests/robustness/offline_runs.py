"""Makes a tiny demo, trains with the three scripts and searches, in a process that may not use the network.

    python offline_runs.py FOLDER

Every attempt to look up or reach an address is an error, and written to FOLDER/attempts, in case that the error is
caught by someone.
"""

import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
COMMON = ("--do_train", "--max_train_steps", "1", "--per_device_train_batch_size", "2", "--max_words", "16")


def forbid_network(attempts: Path):
    def audit(event: str, arguments: tuple):
        if event in FORBIDDEN:
            with attempts.open("a") as file:
                file.write(f"{event} {arguments!r}\n")
            raise PermissionError(f"{event}: this process may not use the network")

    sys.addaudithook(audit)


def main(folder: Path):
    forbid_network(folder / "attempts")
    # Nobody says that there is no network.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    sys.path.insert(0, str(ROOT))
    import run_pretraining
    import run_retrieval
    import run_videoqa
    from transformers_testa.data.demo import DemoArguments, make_demo

    os.chdir(folder)
    sizes = {"num_train": 4, "num_validation": 2, "num_test": 2, "image_size": 32, "fps": 4}
    make_demo(DemoArguments("stories", **sizes, min_scenes=3, max_scenes=4, num_processes=1))
    config = ("--config_name", str(ROOT / "hub_configs" / "testa-demo"), *COMMON)
    run_pretraining.main([*config, "--train_file", "stories/train.jsonl", "--output_dir", "pretraining"])
    test = ("--do_predict", "--test_file")
    trained = ("--model_name_or_path", "pretraining", *COMMON)
    run_retrieval.main(
        [*trained, "--train_file", "stories/train.jsonl", *test, "stories/test.jsonl", "--output_dir", "retrieval"]
    )
    run_videoqa.main(
        [*trained, "--train_file", "stories/train_qa.jsonl", *test, "stories/test_qa.jsonl", "--output_dir", "videoqa"]
    )
    search = ("--gallery_dir", "gallery", "--query", "a red circle grows")
    run_retrieval.main(["--model_name_or_path", "retrieval", "--index_folder", "stories/videos", *search])


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
