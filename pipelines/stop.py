"""`python -m pipelines.stop [--storage FOLDER]`: end what `--keep` left running."""

import argparse
import os
import signal
import sys
from pathlib import Path

from heliostat.launch.cluster import stop_kept_cluster
from heliostat.recipe import Recipe


def stop_page(storage: Path) -> bool:
    """End MLflow's page by its recorded process id, if that is still what runs under it."""
    file = storage / "mlflow.pid"
    if not file.is_file():
        return False
    pid = int(file.read_text())
    file.unlink()
    command = Path(f"/proc/{pid}/cmdline")
    if not command.exists() or b"mlflow" not in command.read_bytes():
        return False
    os.killpg(pid, signal.SIGTERM)  # started as the leader of its own session
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default=Recipe.model_fields["storage"].default)
    storage = Path(parser.parse_args().storage).expanduser()
    print("MLflow's page: " + ("ended" if stop_page(storage) else "was not running"))
    stopped = stop_kept_cluster(storage)
    print(f"Ray: {stopped} processes ended" if stopped else "Ray: no cluster was kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
