"""Serve an ensemble's base and its merged members with vLLM on loopback, run a command with their addresses, stop.

    python -m bench.served ensemble/ensemble.json --dtype float32 -- curate score --corpus rows.jsonl \\
        --ensemble ensemble/ensemble.json --dtype float32 --store stores/server

Run it from the repository, in an environment with vLLM (CPU build). The command gets --base-url and --served-model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from curate.core.identity import read_run
from curate.core.refs import weights_at
from curate.core.vllm import merged
from curate.score import ensemble_members
from tests.real_vllm import Served


def main() -> None:
    """Parse, serve, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    base, runs = ensemble_members(arguments.ensemble)
    with ExitStack() as held:
        places = [(weights_at(base)[0], "aligned")]
        for card, adapter in map(read_run, runs):
            places.append((held.enter_context(merged(base, adapter))[0], card.name))
        words = []
        for weights, name in places:
            server = Served(weights, (name,), dtype=arguments.dtype).start()
            held.callback(server.kill)
            words += ["--base-url", server.ready().url]
        sys.exit(subprocess.run([*arguments.command, *words], check=False).returncode)


if __name__ == "__main__":
    main()
