"""llama.cpp's own HTTP server, alone in a process: what its engine behind ours is compared with.

python -m bench.bare_llama_cpp FILE.gguf PORT --threads 2
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("port", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-tokens", type=int, default=16384)
    parser.add_argument("--requests", type=int, default=32, help="that it answers at once")
    arguments = parser.parse_args()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.file
    parameters.hostnames, parameters.port = ["127.0.0.1"], arguments.port
    parameters.n_ctx, parameters.n_parallel, parameters.kv_unified = arguments.cache_tokens, arguments.requests, True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = arguments.threads
    parameters.fit_params, parameters.verbosity = False, 0
    server = xllamacpp.Server(parameters)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    del server


if __name__ == "__main__":
    main()
