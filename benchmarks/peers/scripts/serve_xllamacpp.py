"""llama-server from the `xllamacpp` wheel, as one process. Run by the peers' Python, not by Deskside's.

    python serve_xllamacpp.py MODEL PORT THREADS PROFILE CELLS
    python serve_xllamacpp.py --system-info

PROFILE is one of PROFILES, CELLS the length of a slot. `unified` and `split` have 16 slots with reusable prefixes; in
`split` each has a KV stream of its own and looks at its own cells only. With `-ram` finished slots are also copied to
a cache of prompts in host memory, which pays where a prompt comes back, and costs where none does. `shipped` has the
defaults of the llama-server command (4 slots over one unified cache, sliding-window cache, that cache of prompts); the
wheel's own default is a single slot.
"""

import signal
import sys

import xllamacpp

SLOTS, SHIPPED_SLOTS = 16, 4
PROFILES = ("unified", "unified-ram", "split", "split-ram", "shipped")


def settings(model: str, port: int, threads: int, profile: str, cells: int) -> "xllamacpp.CommonParams":
    """The parameters of one profile. Raises ValueError when it is not one of PROFILES."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cont_batching = params.cache_prompt = params.warmup = True
    params.kv_unified = not profile.startswith("split")
    if profile == "shipped":
        params.n_parallel = SHIPPED_SLOTS
        return params
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * cells
    params.swa_full = True
    if not profile.endswith("-ram"):
        params.cache_ram_mib = 0
    return params


def main() -> None:
    """Serve until SIGTERM."""
    if sys.argv[1] == "--system-info":
        print(xllamacpp.get_system_info())
        return
    model, port, threads, profile, cells = sys.argv[1:]
    server = xllamacpp.Server(settings(model, int(port), int(threads), profile, int(cells)))
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
