"""llama-server from the `xllamacpp` wheel, as one process. Run by the peers' Python, not by Deskside's.

    python serve_xllamacpp.py MODEL PORT THREADS best|ram|shipped
    python serve_xllamacpp.py --system-info

`shipped` has the defaults of the llama-server command (4 slots over one unified cache, sliding-window cache); the
wheel's own default is a single slot. `best` has 16 slots with reusable prefixes and no prompt cache in host memory:
that cache copies finished slots, which pays only where whole prompts repeat, and here none does. `ram` is `best` with
that cache, so that the choice is measured as well.
"""

import signal
import sys

import xllamacpp

SLOTS = {"best": 16, "ram": 16, "shipped": 4}
CONTEXT = 32768


def settings(model: str, port: int, threads: int, profile: str) -> "xllamacpp.CommonParams":
    """The parameters of one profile."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = SLOTS[profile]
    params.kv_unified = True
    params.cont_batching = params.cache_prompt = params.warmup = True
    if profile != "shipped":
        params.swa_full = True
        params.n_ctx = CONTEXT
    if profile == "best":
        params.cache_ram_mib = 0
    return params


def main() -> None:
    """Serve until SIGTERM."""
    if sys.argv[1] == "--system-info":
        print(xllamacpp.get_system_info())
        return
    model, port, threads, profile = sys.argv[1:]
    server = xllamacpp.Server(settings(model, int(port), int(threads), profile))
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
