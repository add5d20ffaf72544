"""`python -m pipelines.monitor [--storage FOLDER] [--port 9090]`: Prometheus beside the Ray cluster of this machine,
with the project's rules, until Ctrl-C."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from heliostat.launch.cluster import ROOT, nodes_file
from heliostat.monitor.prometheus import check, configure, prometheus
from heliostat.recipe import Recipe
from pipelines.answer import answer, end_on_signals

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
DASHBOARDS = ROOT / "deploy" / "grafana"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default=Recipe.model_fields["storage"].default)
    parser.add_argument("--port", type=int, default=9090)
    parser.add_argument("--every-s", type=float, default=10.0, help="between two readings; Ray reports every 10 s")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> dict[str, Any]:
    storage = Path(options.storage).expanduser()
    check(options.port)
    nodes = nodes_file(storage)
    folder = storage / "monitor"
    configuration = configure(folder, nodes, RULES, options.every_s)
    with prometheus(folder, configuration, options.port) as (url, process):
        print(f"Prometheus of {nodes.parent.name}: {url}; Ctrl-C ends it", flush=True)
        print(f"Dashboards to import into Grafana: {DASHBOARDS}/*.json", flush=True)
        try:
            while process.poll() is None:
                time.sleep(0.2)
            raise RuntimeError(f"Prometheus has ended, see {folder / 'prometheus.log'}")
        except KeyboardInterrupt:
            pass
    return {"prometheus": url, "session": nodes.parent.name, "folder": str(folder)}


def main() -> int:
    options = parse(sys.argv[1:])
    end_on_signals()
    return answer("monitor", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
