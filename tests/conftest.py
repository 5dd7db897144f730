import os

from hypothesis import HealthCheck, Phase, settings


# Before anything imports a Hugging Face library: no test asks the network for a model or a data set.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nor do processes of pytest-xdist take each other's cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# How long an example takes says more about the machine than about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
# The same few examples for every mutant, and no search for a smaller one that shows it.
settings.register_profile(
    "mutation",
    settings.get_profile("any machine"),
    derandomize=True,
    database=None,
    max_examples=8,
    phases=[Phase.explicit, Phase.generate],
)
