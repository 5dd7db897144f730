"""Decodes files named on its standard input, one a line, and prints what came of each as JSON.

Whoever starts it sees from a missing answer that the process died, or hangs, and with which file.
"""

import json
import resource
import sys
import time
from pathlib import Path

from transformers_testa.video_decoding_testa import VideoDecodingError
from transformers_testa.video_processing_testa import TestaVideoProcessor


def memory(line: str) -> int:
    """Return what /proc/self/status says in `line` ("VmRSS", "VmHWM", "VmSize"), in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024


def decode(processor: TestaVideoProcessor, video: str | bytes) -> dict[str, str]:
    try:
        frames = processor.decode(video)
        return {"outcome": "decoded", "message": str(tuple(frames.shape))}
    except VideoDecodingError as error:
        return {"outcome": "refused", "message": str(error)}
    except Exception as error:  # What must never come: the caller's test says so.
        return {"outcome": type(error).__name__, "message": str(error)}


def main(settings: str, address_space: str):
    """Answer each line; the process may take `address_space` bytes more than it has at the start, so the machine is safe."""
    processor = TestaVideoProcessor(**json.loads(settings))
    limit = memory("VmSize") + int(address_space)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    at_start = memory("VmRSS")
    print("ready", flush=True)
    for line in sys.stdin:
        # The peak since now, not since the process began.
        Path("/proc/self/clear_refs").write_text("5")
        start = time.monotonic()
        result = decode(processor, line.rstrip("\n"))
        # What is lost at every file adds up.
        result |= {"seconds": time.monotonic() - start, "memory": memory("VmHWM") - at_start}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
